"""What a backup is made of: a tar of exactly known members in exactly known order, each with its digest said beforehand.

```
manifest.json                     first: what follows, in order
hub.db                            a copy of the database (storage/sql/snapshot.py)
peppers.json                      what API keys are hashed with
blobs/sha256-<64 hex>, …          as in CORRAL_HOME; left out of a backup without blobs
```

Theory of operation. A backup is written and read as a stream, block by block, with the digest of each member taken on the way, so
that it may come from a pipe and be larger than any memory. Any tar unpacks it into the layout of CORRAL_HOME.

Reading trusts nothing. Of tar there is one header of 512 bytes after the other, each of which must say what the manifest says
comes next: a link, a device, another name or another length is refused where it stands, and with it everything that could lead
out of a directory. Names are those above; nothing is read that has no length, and no length is believed beyond its bound.
"""

import hashlib
import tarfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from datetime import datetime
from typing import Annotated, BinaryIO

import msgspec

from corral.storage.blobs import Progress, disk_errors
from corral.wire.errors import CorralError
from corral.wire.names import Digest, parse_content_digest

#: Of what this module writes. A backup of a higher one is refused.
FORMAT = 1
MANIFEST, DATABASE, PEPPERS, BLOBS = "manifest.json", "hub.db", "peppers.json", "blobs/"

_BLOCK, _HEADER = 1 << 20, tarfile.BLOCKSIZE
#: Half a million blobs.
_MAX_MANIFEST_BYTES = 128 << 20
_MAX_PEPPERS_BYTES = 64 << 10
#: As much as a blob may have.
_MAX_MEMBER_BYTES = 1 << 44


class Member(msgspec.Struct, frozen=True, kw_only=True):
    """One member. digest: of its content, `sha256:…` or `sha512:…`."""

    name: str
    size_bytes: int
    digest: str

    @property
    def blob(self) -> Digest | None:
        """Which blob it is, if it is one."""
        return parse_content_digest(self.digest) if self.name.startswith(BLOBS) else None


class Manifest(msgspec.Struct, frozen=True, kw_only=True):
    """What a backup says of itself. version: of the Corral that made it. revision: of the database's schema. has_blobs: whether
    they were to be part of it."""

    format: int = FORMAT
    version: str
    revision: str
    created_at: Annotated[datetime, msgspec.Meta(tz=True)]
    has_blobs: bool
    members: list[Member]

    @property
    def size_bytes(self) -> int:
        """Of all members."""
        return sum(member.size_bytes for member in self.members)

    @property
    def blobs(self) -> Sequence[Member]:
        """Those members that are blobs."""
        return [member for member in self.members if member.name.startswith(BLOBS)]


def blob_member(digest: Digest, size_bytes: int) -> Member:
    """A blob as a member."""
    return Member(name=f"{BLOBS}{digest.file_name}", size_bytes=size_bytes, digest=str(digest))


def file_member(name: str, file: BinaryIO) -> Member:
    """A file as a member, which is read for it."""
    state, size_bytes = hashlib.sha256(), 0
    while block := file.read(_BLOCK):
        state.update(block)
        size_bytes += len(block)
    return Member(name=name, size_bytes=size_bytes, digest=f"sha256:{state.hexdigest()}")


# ── Writing ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def archive_size(manifest: Manifest) -> int:
    """How long the archive of it becomes."""
    body = len(_encoded(manifest))
    members = sum(
        len(_header(member.name, member.size_bytes, manifest)) + _padded(member.size_bytes) for member in manifest.members
    )
    return _HEADER + _padded(body) + members + 2 * _HEADER


def write_archive(target: BinaryIO, manifest: Manifest, open_member: Callable[[Member], BinaryIO], progress: Progress) -> None:
    """Write all of it. progress: of the archive's bytes. Raises: conflict when a member is not what the manifest says,
    storage_full, unavailable."""
    body, total, done = _encoded(manifest), archive_size(manifest), 0

    def put(*parts: bytes) -> None:
        nonlocal done
        _put(target, *parts)
        done += sum(map(len, parts))
        progress(done, total)

    put(_header(MANIFEST, len(body), manifest), body, _padding(len(body)))
    for member in manifest.members:
        put(_header(member.name, member.size_bytes, manifest))
        with open_member(member) as source:
            check = _Check(member)
            for block in _blocks(source, member.size_bytes):
                check.update(block)
                put(block)
            if not check.is_right or source.read(1):
                raise _changed(member)
        put(_padding(member.size_bytes))
    put(bytes(2 * _HEADER))
    with disk_errors("the backup"):
        target.flush()


def _put(target: BinaryIO, *parts: bytes) -> None:
    with disk_errors("the backup"):
        for part in parts:
            rest = memoryview(part)
            while rest:
                # A pipe without a buffer takes what it has room for.
                rest = rest[target.write(rest) :]


def _changed(member: Member) -> CorralError:
    if member.blob is None:
        return CorralError("conflict", f"{member.name} changed while it was read; try again")
    # Scrubbing sets it aside and names the models that it belongs to; from then on backups are made without it.
    return CorralError("conflict", f"blob {member.digest[:19]} is damaged on this disk → corral hub scrub, and back up again")


def _header(name: str, size_bytes: int, manifest: Manifest) -> bytes:
    info = tarfile.TarInfo(name)
    info.size, info.mode, info.mtime = size_bytes, 0o600, int(manifest.created_at.timestamp())
    return info.tobuf(tarfile.GNU_FORMAT)


def _encoded(manifest: Manifest) -> bytes:
    body = msgspec.json.format(msgspec.json.encode(manifest), indent=1) + b"\n"
    if len(body) > _MAX_MANIFEST_BYTES:
        text = f"{len(manifest.members)} blobs are more than a backup can name"
        raise CorralError("not_supported", f"{text} → back up --without-blobs, and copy blobs/ behind it")
    return body


def _padded(size_bytes: int) -> int:
    return size_bytes + len(_padding(size_bytes))


def _padding(size_bytes: int) -> bytes:
    return bytes(-size_bytes % _HEADER)


# ── Reading ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def read_manifest(source: BinaryIO) -> Manifest:
    """The manifest, which stands first. Raises: invalid for what is no backup, or one that this Corral cannot read."""
    # Somebody's first mistake is another file altogether, which is neither cut off nor damaged.
    head = b"".join(_blocks(source, _HEADER))
    if not head.startswith(MANIFEST.encode()):
        raise CorralError("invalid", "this is no backup of a hub → give a file that `corral hub backup` made, not compressed")
    name, size_bytes = _next_header(source, head)
    if name != MANIFEST or not 0 < size_bytes <= _MAX_MANIFEST_BYTES:
        raise _no_backup()
    body = b"".join(_blocks(source, size_bytes))
    _skip(source, size_bytes)
    try:
        # Asked first: a newer manifest may look quite different.
        if (found := msgspec.json.decode(body, type=_Format).format) > FORMAT:
            text = f"the backup was made by a newer Corral (format {found}, this one reads {FORMAT})"
            raise CorralError("invalid", f"{text} → install that version and restore with it")
        manifest = msgspec.json.decode(body, type=Manifest)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise _no_backup() from error
    _check_members(manifest)
    return manifest


class _Format(msgspec.Struct, frozen=True):
    format: int


def _check_members(manifest: Manifest) -> None:
    names = [member.name for member in manifest.members]
    is_sound = names[:2] == [DATABASE, PEPPERS] and len(set(names)) == len(names) and manifest.format == FORMAT
    if not is_sound or manifest.members[1].size_bytes > _MAX_PEPPERS_BYTES:
        raise _no_backup()
    for member in manifest.members:
        try:
            digest = parse_content_digest(member.digest)
        except CorralError as error:
            raise _no_backup() from error
        is_blob = member.name == f"{BLOBS}{digest.file_name}"
        if not (is_blob or member.name in (DATABASE, PEPPERS)) or not 0 <= member.size_bytes <= _MAX_MEMBER_BYTES:
            raise _no_backup()


def read_members(
    source: BinaryIO, manifest: Manifest, place: Callable[[Member], AbstractContextManager[BinaryIO | None]], progress: Progress
) -> None:
    """Read everything behind the manifest. place: a file for a member, None where its content is only to be checked. Raises:
    invalid for anything that is not as the manifest says, storage_full, unavailable."""
    total, done = manifest.size_bytes, 0
    for member in manifest.members:
        if _next_header(source) != (member.name, member.size_bytes):
            raise CorralError("invalid", f"the backup is damaged: {_shown(member)} is not where it should be")
        check = _Check(member)
        with place(member) as target:
            for block in _blocks(source, member.size_bytes):
                check.update(block)
                if target is not None:
                    _put(target, block)
                done += len(block)
                progress(done, total)
        if not check.is_right:
            raise CorralError("invalid", f"the backup is damaged: {_shown(member)} is not what it was")
        _skip(source, member.size_bytes)
    if any(_exactly(source, 2 * _HEADER)):
        raise CorralError("invalid", "the backup is damaged: it goes on where it should end")


def _next_header(source: BinaryIO, head: bytes | None = None) -> tuple[str, int]:
    """Name and size of the next member, which is a plain file. head: where the source was read so far. Raises: invalid."""
    header = _parsed_header(_exactly(source, _HEADER) if head is None else head)
    long_name = ""
    if header.type == tarfile.GNUTYPE_LONGNAME and 0 < header.size <= _HEADER:
        # The only name that is too long for a header is that of a SHA-512.
        long_name = _exactly(source, _HEADER)[: header.size].rstrip(b"\0").decode("ascii", "replace")
        header = _parsed_header(_exactly(source, _HEADER))
    if header.type not in (tarfile.REGTYPE, tarfile.AREGTYPE) or header.size < 0:
        raise CorralError("invalid", "this is not a backup of Corral, or it is damaged: it holds something else than plain files")
    return long_name or header.name, header.size


def _parsed_header(head: bytes) -> tarfile.TarInfo:
    if len(head) < _HEADER:
        raise _cut_off()
    try:
        return tarfile.TarInfo.frombuf(head, "ascii", "replace")
    except (tarfile.HeaderError, ValueError, OverflowError) as error:
        raise _no_backup() from error


class _Check:
    """Whether the content of a member is what its digest says."""

    def __init__(self, member: Member) -> None:
        self._wanted = parse_content_digest(member.digest)
        self._state = hashlib.new(self._wanted.algorithm)
        self._left = member.size_bytes

    def update(self, block: bytes) -> None:
        self._state.update(block)
        self._left -= len(block)

    @property
    def is_right(self) -> bool:
        return not self._left and self._state.hexdigest() == self._wanted.hex


def _blocks(source: BinaryIO, size_bytes: int) -> Iterator[bytes]:
    """So many bytes, or as many as there are. Raises: unavailable."""
    while size_bytes:
        try:
            block = source.read(min(_BLOCK, size_bytes))
        except OSError as error:
            raise CorralError("unavailable", f"reading failed: {error.strerror}") from error
        if not block:
            return
        size_bytes -= len(block)
        yield block


def _exactly(source: BinaryIO, size_bytes: int) -> bytes:
    content = b"".join(_blocks(source, size_bytes))
    if len(content) < size_bytes:
        raise _cut_off()
    return content


def _skip(source: BinaryIO, size_bytes: int) -> None:
    _exactly(source, len(_padding(size_bytes)))


def _shown(member: Member) -> str:
    return member.name[: len(BLOBS) + 19]


def _cut_off() -> CorralError:
    return CorralError("invalid", "the backup is cut off: it ends before it is complete")


def _no_backup() -> CorralError:
    return CorralError("invalid", "this is not a backup of Corral, or it is damaged")
