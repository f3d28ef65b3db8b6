"""The archive of a backup: what is written is read back, and nothing that was not written is (hostile ones, R13)."""

import hashlib
import io
import json
import subprocess
import tarfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import pytest
from hypothesis import given
from hypothesis import strategies as st

from corral.storage.archive import (
    Manifest,
    Member,
    archive_size,
    blob_member,
    file_member,
    read_manifest,
    read_members,
    write_archive,
)
from corral.wire.errors import CorralError
from fakes import NOON
from fakes_registry import digest_of

DATABASE, PEPPERS = b"a database" * 100, b'{"current": "p1"}'
WEIGHTS, OTHER = b"weights" * 1000, b""


def members_of(*blobs: tuple[bytes, str]) -> dict[Member, bytes]:
    """Members in their order, with their content."""
    found = {
        file_member("hub.db", io.BytesIO(DATABASE)): DATABASE,
        file_member("peppers.json", io.BytesIO(PEPPERS)): PEPPERS,
    }
    for content, algorithm in blobs:
        found[blob_member(digest_of(content, algorithm), len(content))] = content
    return found


def manifest_of(members: dict[Member, bytes]) -> Manifest:
    return Manifest(version="1.0", revision="0006", created_at=NOON, has_blobs=True, members=list(members))


def archive_of(members: dict[Member, bytes]) -> bytes:
    target = io.BytesIO()
    write_archive(target, manifest_of(members), lambda member: io.BytesIO(members[member]), quiet)
    return target.getvalue()


def quiet(done: int, total: int) -> None:
    """Nobody looks."""


def read(archive: bytes | BinaryIO, skip: str = "") -> dict[str, bytes]:
    """What an archive holds, all of it checked. skip: a member that is only to be checked."""
    found: dict[str, io.BytesIO] = {}

    @contextmanager
    def place(member: Member) -> Iterator[BinaryIO | None]:
        found[member.name] = io.BytesIO()
        yield None if member.name == skip else found[member.name]

    source = io.BytesIO(archive) if isinstance(archive, bytes) else archive
    read_members(source, read_manifest(source), place, quiet)
    return {name: file.getvalue() for name, file in found.items()}


def refusal(archive: bytes) -> str:
    with pytest.raises(CorralError) as error:
        read(archive)
    assert error.value.code == "invalid"
    return error.value.message


MEMBERS = members_of((WEIGHTS, "sha256"), (WEIGHTS, "sha512"), (OTHER, "sha256"))
GOOD = archive_of(MEMBERS)


# ── What is written is read ──────────────────────────────────────────────────────────────────────────────────────────


@given(st.lists(st.tuples(st.binary(max_size=2000), st.sampled_from(["sha256", "sha512"])), unique=True, max_size=5))
def test_archive_is_read_as_it_was_written_and_as_long_as_was_said(blobs: list[tuple[bytes, str]]) -> None:
    members = members_of(*blobs)
    archive = archive_of(members)
    assert read(archive) == {member.name: content for member, content in members.items()}
    assert len(archive) == archive_size(manifest_of(members))


def test_member_that_is_only_to_be_checked_is_checked() -> None:
    name = list(MEMBERS)[2].name
    assert read(GOOD, skip=name)[name] == b""
    damaged = GOOD.replace(WEIGHTS, WEIGHTS[:-1] + b"X", 1)
    with pytest.raises(CorralError, match="is not what it was"):
        read(damaged, skip=name)


def test_any_tar_unpacks_it_into_the_layout_of_a_home(tmp_path: Path) -> None:
    (tmp_path / "a.tar").write_bytes(GOOD)
    subprocess.run(["tar", "-xf", "a.tar"], cwd=tmp_path, check=True, capture_output=True)
    for member, content in MEMBERS.items():
        assert (tmp_path / member.name).read_bytes() == content
        assert (tmp_path / member.name).stat().st_mode & 0o777 == 0o600
    said = json.loads((tmp_path / "manifest.json").read_text())
    assert (said["format"], said["revision"]) == (1, "0006")
    assert [one["name"] for one in said["members"]] == [member.name for member in MEMBERS]


def test_progress_ends_at_all_of_it_and_memory_holds_a_block() -> None:
    class Endless(io.RawIOBase):
        """More than fits into one block."""

        largest, left = 0, 3 << 20

        def readable(self) -> bool:
            return True

        def read(self, size: int = -1) -> bytes:
            self.largest = max(self.largest, size)
            count = min(size, self.left)
            self.left -= count
            return bytes(count)

    large = Endless()
    blob = blob_member(digest_of(bytes(3 << 20)), 3 << 20)
    members = {**members_of(), blob: b""}
    seen: list[tuple[int, int]] = []
    write_archive(
        io.BytesIO(),
        manifest_of(members),
        lambda member: large if member == blob else io.BytesIO(members[member]),
        lambda done, total: seen.append((done, total)),
    )
    assert seen[-1] == (archive_size(manifest_of(members)),) * 2
    assert large.largest <= 1 << 20


@pytest.mark.parametrize("content", [WEIGHTS[:-1], WEIGHTS[:-1] + b"X", WEIGHTS + b"X"])
def test_blob_that_is_not_what_its_name_says_ends_the_backup(content: bytes) -> None:
    members = {**members_of(), blob_member(digest_of(WEIGHTS), len(WEIGHTS)): content}
    with pytest.raises(CorralError, match=r"blob sha256:\w{12} is damaged on this disk → corral hub scrub") as error:
        archive_of(members)
    assert error.value.code == "conflict"


def test_r003_full_disk_is_said_to_be_full() -> None:
    with Path("/dev/full").open("wb", buffering=0) as target, pytest.raises(CorralError) as error:
        write_archive(target, manifest_of(MEMBERS), lambda member: io.BytesIO(MEMBERS[member]), quiet)
    assert error.value.code == "storage_full"


# ── And nothing else ─────────────────────────────────────────────────────────────────────────────────────────────────


def test_r013_archive_that_is_cut_off_anywhere_is_refused() -> None:
    # Every boundary and its neighbours.
    ends = {end + near for end in range(0, len(GOOD), 512) for near in (-1, 0, 1)} & set(range(len(GOOD)))
    for end in sorted(ends):
        refusal(GOOD[:end])


@given(st.integers(0, len(GOOD) - 1), st.integers(1, 255))
def test_r013_archive_with_one_byte_changed_is_refused_or_the_same(at: int, change: int) -> None:
    damaged = GOOD[:at] + bytes([GOOD[at] ^ change]) + GOOD[at + 1 :]
    try:
        found = read(damaged)
    except CorralError as error:
        found = {"refused": error.code.encode()}
    assert found in (read(GOOD), {"refused": b"invalid"})


@given(st.binary(max_size=3000))
def test_r013_what_is_no_archive_is_refused(content: bytes) -> None:
    refusal(content)


def hostile(change: Callable[[list[tarfile.TarInfo]], object]) -> bytes:
    """The members of a good archive, packed by another hand, which changed their headers. Sizes stay what the bodies have."""
    target = io.BytesIO()
    with tarfile.open(fileobj=io.BytesIO(GOOD)) as good:
        entries = good.getmembers()
        bodies = {id(entry): (good.extractfile(entry) or io.BytesIO()).read() for entry in entries}
        change(entries)
        with tarfile.open(fileobj=target, mode="w", format=tarfile.GNU_FORMAT) as tar:
            for entry in entries:
                tar.addfile(entry, io.BytesIO(bodies.get(id(entry), b"")))
    return target.getvalue()


def as_type(kind: bytes, **fields: Any) -> Callable[[list[tarfile.TarInfo]], object]:
    def change(entries: list[tarfile.TarInfo]) -> None:
        entries[3].type = kind
        entries[3].size = 0
        for name, value in fields.items():
            setattr(entries[3], name, value)

    return change


def added(name: str) -> Callable[[list[tarfile.TarInfo]], object]:
    return lambda entries: entries.append(tarfile.TarInfo(name))


def renamed(name: str) -> Callable[[list[tarfile.TarInfo]], object]:
    return lambda entries: setattr(entries[3], "name", name)


HOSTILE = {
    "symbolic link": as_type(tarfile.SYMTYPE, linkname="/etc/passwd"),
    "hard link": as_type(tarfile.LNKTYPE, linkname="../../etc/passwd"),
    "character device": as_type(tarfile.CHRTYPE, devmajor=1, devminor=3),
    "block device": as_type(tarfile.BLKTYPE, devmajor=8, devminor=0),
    "fifo": as_type(tarfile.FIFOTYPE),
    "directory": as_type(tarfile.DIRTYPE),
    "sparse file": as_type(tarfile.GNUTYPE_SPARSE),
    "something unknown": as_type(b"Z"),
    "absolute name": renamed("/etc/cron.d/x"),
    "name that leads out": renamed("blobs/../../x"),
    "name with a dot": renamed("./" + list(MEMBERS)[2].name),
    "name of another blob": renamed("blobs/sha256-" + "0" * 64),
    "long name that leads out": renamed("../" * 60 + "x"),
    "longer name than there is": renamed("x" * 5000),
    "member more": added("authorized_keys"),
    "manifest twice": added("manifest.json"),
    "other order": lambda entries: entries.reverse(),
    "member less": lambda entries: entries.pop(),
    "no database": lambda entries: entries.pop(1),
}


@pytest.mark.parametrize("what", HOSTILE)
def test_r013_archive_with_what_does_not_belong_there_is_refused(what: str) -> None:
    refusal(hostile(HOSTILE[what]))


def test_archive_packed_by_another_hand_is_good_if_it_is_the_same() -> None:
    assert read(hostile(lambda entries: None)) == read(GOOD)


def with_manifest(change: Callable[[dict[str, Any]], object]) -> bytes:
    """A good archive whose manifest says something else."""
    with tarfile.open(fileobj=io.BytesIO(GOOD)) as good:
        first = good.extractfile("manifest.json")
        assert first is not None
        said = json.loads(first.read())
    change(said)
    return manifest_first(json.dumps(said).encode())


def manifest_first(body: bytes, size: int | None = None) -> bytes:
    """An archive that begins with that manifest and goes on as the good one does."""
    info = tarfile.TarInfo("manifest.json")
    info.size = len(body) if size is None else size
    behind = GOOD.index(b"hub.db\0")
    return info.tobuf(tarfile.GNU_FORMAT) + body + bytes(-len(body) % 512) + GOOD[behind:]


BLOB = 2
SAID: dict[str, Callable[[dict[str, Any]], object]] = {
    "name outside": lambda said: said["members"][BLOB].update(name="../x"),
    "name of no blob": lambda said: said["members"][BLOB].update(name="settings.json"),
    "blob of another digest": lambda said: said["members"][BLOB].update(digest="sha256:" + "0" * 64),
    "digest that is none": lambda said: said["members"][BLOB].update(digest="md5:00"),
    "digest in capitals": lambda said: said["members"][0].update(digest=said["members"][0]["digest"].upper()),
    "member twice": lambda said: said["members"].append(said["members"][BLOB]),
    "length below zero": lambda said: said["members"][BLOB].update(size_bytes=-1),
    "absurd length": lambda said: said["members"][BLOB].update(size_bytes=1 << 62),
    "length beyond numbers": lambda said: said["members"][BLOB].update(size_bytes=10**40),
    "absurd peppers": lambda said: said["members"][1].update(size_bytes=1 << 30),
    "no database": lambda said: said["members"].pop(0),
    "no members": lambda said: said.update(members=[]),
    "older than the first": lambda said: said.update(format=0),
    "time without a zone": lambda said: said.update(created_at="2026-01-01T12:00:00"),
    "no time": lambda said: said.update(created_at="yesterday"),
    "no format": lambda said: said.pop("format"),
}


@pytest.mark.parametrize("what", SAID)
def test_r013_manifest_that_says_what_cannot_be_is_refused(what: str) -> None:
    refusal(with_manifest(SAID[what]))


def test_manifest_may_say_more_than_is_known() -> None:
    assert read(with_manifest(lambda said: said.update(comment="nightly"))) == read(GOOD)


@pytest.mark.parametrize("body", [b"", b"nonsense", b"[]", b"null", b"[" * 100_000, b'{"format": 1}', b"\xff"])
def test_r013_manifest_that_is_none_is_refused(body: bytes) -> None:
    refusal(manifest_first(body))


@pytest.mark.parametrize("size", [1 << 30, 1 << 60])
def test_r013_manifest_of_absurd_length_is_not_read(size: int) -> None:
    class Counted(io.BytesIO):
        largest = 0

        def read(self, count: int | None = -1, /) -> bytes:
            self.largest = max(self.largest, count or 0)
            return super().read(count)

    source = Counted(manifest_first(b"{}", size))
    with pytest.raises(CorralError):
        read_manifest(source)
    assert source.largest <= 1 << 20


def test_r020_backup_of_a_newer_format_is_refused_with_what_to_do() -> None:
    said = refusal(with_manifest(lambda said: said.update(format=2, members="otherwise")))
    assert said.startswith("the backup was made by a newer Corral (format 2, this one reads 1) → install that version")


def test_digest_of_a_file_is_that_of_its_content() -> None:
    content = bytes(range(256)) * 8192
    member = file_member("hub.db", io.BytesIO(content))
    assert (member.size_bytes, member.digest) == (len(content), f"sha256:{hashlib.sha256(content).hexdigest()}")
