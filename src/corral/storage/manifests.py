"""The tree of manifests in Ollama's layout: found in any case, written under the spelling that is there, removed cleanly.

```
<root>/<host>/<namespace>/<model>/<tag>     JSON; exactly four levels
```

Whatever else lies there is no model: symbolic links, files on other levels, names that are no model's; and nothing is written
through a link (T34). When it comes to *keeping* blobs, links count: somebody who moved half of the tree to another disk must not
lose the weights. Everything here blocks; async callers use threads. Source: ollama manifest/{manifest,paths}.go, fb30760.
"""

import contextlib
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

from corral.storage.blobs import disk_errors, read_regular, write_atomically
from corral.wire.errors import CorralError
from corral.wire.manifest import MAX_MANIFEST_BYTES, parse_manifest
from corral.wire.names import Digest, ModelName, parse_name

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_LEVELS = 4
_ANY_DIGEST = re.compile(rb"sha256[:-]([0-9a-f]{64})")


@dataclass(frozen=True, slots=True)
class Found:
    """A manifest file: whose it is, where, and what tells that it has not changed: inode, size, mtime in ns."""

    name: ModelName
    path: Path
    identity: tuple[int, int, int]

    @property
    def modified_at(self) -> datetime:
        """Of the file."""
        return _EPOCH + timedelta(microseconds=self.identity[2] // 1000)

    @property
    def is_unchanged(self) -> bool:
        """Whether the file still is in that state."""
        try:
            return _identity(self.path.lstat()) == self.identity
        except OSError:
            return False

    def read(self) -> bytes:
        """The manifest's bytes. Raises: not_found, bad_request, too_large."""
        shown_as = f"the manifest of {self.name.short}"
        return read_regular(self.path, shown_as=shown_as, max_bytes=MAX_MANIFEST_BYTES, flags=os.O_NOFOLLOW)


@dataclass(frozen=True, slots=True)
class NamedBlobs:
    """What all manifests name. is_certain: whether every one of them could be read."""

    digests: frozenset[Digest]
    is_certain: bool


class ManifestTree:
    """The manifests below one directory, which is made when the first one is written."""

    def __init__(self, root: Path) -> None:
        self._root = root

    def walk(self) -> Iterator[Found]:
        """Every manifest file. Raises: unavailable."""
        return _descend(self._root, (None,) * _LEVELS, ())

    def find(self, name: ModelName) -> Found | None:
        """The manifest of a name in whatever case; the spelling asked for comes first if several exist. Raises: unavailable."""
        return next(_descend(self._root, (name.host, name.namespace, name.model, name.tag), ()), None)

    def spelled(self, name: ModelName) -> ModelName:
        """The name with those leading parts as they are spelled already, so that no two directories differ by case alone."""
        directory, parts = self._root, [name.host, name.namespace, name.model, name.tag]
        for index, part in enumerate(parts):
            entry = next(iter(_entries(directory, part)), None)
            if entry is None:
                break
            parts[index] = entry.name
            directory /= entry.name
        return ModelName(*parts)

    def write(self, name: ModelName, body: bytes) -> ModelName:
        """Create or replace a manifest durably, under the spelling the name has; returns that.

        Raises: invalid for a path that leads through a link, storage_full, unavailable.
        """
        spelled = self.spelled(name)
        target = self._root
        for part in (spelled.host, spelled.namespace, spelled.model):
            target /= part
            if target.is_symlink():
                raise CorralError("invalid", f"{part} among the manifests is a symbolic link; a directory belongs there")
        write_atomically(target / spelled.tag, body, beside=self._root)
        return spelled

    def remove(self, found: Found) -> bool:
        """Remove a manifest, and directories that are empty then. False when somebody was quicker. Raises: unavailable."""
        with disk_errors("the model store"):
            try:
                found.path.unlink()
            except FileNotFoundError:
                return False
        directory = found.path.parent
        while directory != self._root:
            try:
                directory.rmdir()
            except OSError:  # not empty, or gone already
                break
            directory = directory.parent
        return True

    def remove_empty(self) -> None:
        """Remove directories that hold nothing."""
        for directory, _, _ in os.walk(self._root, topdown=False):
            if Path(directory) != self._root:
                with contextlib.suppress(OSError):
                    Path(directory).rmdir()

    def named_blobs(self) -> NamedBlobs:
        """Every blob that some manifest names, links followed: what is not here, nobody needs. Raises: unavailable."""
        digests: set[Digest] = set()
        is_certain = True
        for path in _files_below(self._root, _LEVELS):
            body = b""
            try:
                body = read_regular(path, shown_as="a manifest", max_bytes=MAX_MANIFEST_BYTES)
                digests.update(layer.digest for layer in parse_manifest(body).blobs)
            except CorralError:
                is_certain = False
                # Whatever it is, it is not ours to judge: somebody may mend it and want its weights.
                digests.update(Digest(digits.decode()) for digits in _ANY_DIGEST.findall(body))
        return NamedBlobs(frozenset(digests), is_certain)


def _descend(directory: Path, wanted: tuple[str | None, ...], above: tuple[str, ...]) -> Iterator[Found]:
    """The files exactly as many levels down as wanted has parts, which are names in any case, or None for all."""
    for entry in _entries(directory, wanted[0]):
        parts = (*above, entry.name)
        if len(wanted) > 1 and entry.is_dir(follow_symlinks=False):
            yield from _descend(directory / entry.name, wanted[1:], parts)
        elif len(wanted) == 1 and entry.is_file(follow_symlinks=False) and (found := _found(parts, entry)) is not None:
            yield found


def _entries(directory: Path, wanted: str | None) -> list[os.DirEntry[str]]:
    """What is in a directory; of one name in any case, the exact spelling first. Raises: unavailable for one that is there and
    cannot be read: were it taken for empty, the blobs that are named in it would be removed."""
    try:
        with os.scandir(directory) as found:
            entries = list(found)
    except (FileNotFoundError, NotADirectoryError):
        return []
    except OSError as error:
        raise CorralError("unavailable", f"the model store cannot be read: {error.strerror}") from error
    if wanted is None:
        return entries
    matching = (entry for entry in entries if entry.name.lower() == wanted.lower())
    return sorted(matching, key=lambda entry: (entry.name != wanted, entry.name))


def _files_below(directory: Path, levels: int) -> Iterator[Path]:
    """Whatever is no directory, so many levels down, links followed; a link that leads nowhere is given as well."""
    for entry in _entries(directory, None):
        if levels > 1 and entry.is_dir():
            yield from _files_below(directory / entry.name, levels - 1)
        elif (levels == 1 and not entry.is_dir()) or (entry.is_symlink() and not entry.is_file()):
            yield Path(entry)


def _found(parts: tuple[str, ...], entry: os.DirEntry[str]) -> Found | None:
    """The manifest; None when its path is no model's name, or it went away."""
    try:
        # Four parts are parsed into those very parts or not at all.
        name, state = parse_name(str(ModelName(*parts))), entry.stat(follow_symlinks=False)
    except (CorralError, OSError):
        return None
    return Found(name, Path(entry), _identity(state))


def _identity(state: os.stat_result) -> tuple[int, int, int]:
    return state.st_ino, state.st_size, state.st_mtime_ns
