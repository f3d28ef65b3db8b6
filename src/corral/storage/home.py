"""What Ollama keeps in a home directory, in Ollama's own layout, so that either program reads what the other wrote.

```
~/.ollama/id_ed25519                                              the device key, OpenSSH form, 0600; id_ed25519.pub, 0644
$OLLAMA_MODELS/blobs/sha256-<64 hex>                              weights, configs, templates … (see blobs.py)
$OLLAMA_MODELS/manifests/<host>/<namespace>/<model>/<tag>         JSON; exactly four levels
```

Whatever else lies in the manifests tree is not looked at: symbolic links, files on other levels, names that are no model's.
Source: ollama manifest/{manifest,paths}.go, auth/auth.go, cmd/cmd.go initializeKeypair, fb30760.
"""

import asyncio
import contextlib
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from functools import partial
from hashlib import sha256
from pathlib import Path

from corral.core.ports import Entropy
from corral.core.records import Model
from corral.storage.blobs import BlobFiles, Progress, disk_errors, in_thread_reporting, read_regular, write_atomically
from corral.storage.models import ModelBlobs
from corral.storage.secretfile import create_private, ensure_private_dir, read_private
from corral.wire.errors import CorralError
from corral.wire.manifest import MAX_MANIFEST_BYTES
from corral.wire.names import ModelName, parse_name
from corral.wire.signing import DevicePrivateKey

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


@dataclass(frozen=True, slots=True)
class _Found:
    """A manifest file: whose it is, where, and what tells that it has not changed: inode, size, mtime in ns."""

    name: ModelName
    path: Path
    identity: tuple[int, int, int]

    @property
    def modified_at(self) -> datetime:
        """Of the file."""
        return _EPOCH + timedelta(microseconds=self.identity[2] // 1000)


class HomeModels:
    """The models of one machine (`ModelStore`). root: what `OLLAMA_MODELS` names. cache_dir: may be deleted at any time."""

    def __init__(self, root: Path, cache_dir: Path) -> None:
        self._manifests = root / "manifests"
        self._blobs = BlobFiles(root / "blobs", cache_dir)
        self._models = ModelBlobs(self._blobs, cache_dir)
        #: By the spelling on the disk: the manifest file in the state it was read in, and what it was.
        self._seen: dict[ModelName, tuple[_Found, Model]] = {}

    async def list(self) -> Sequence[Model]:
        """Newest first. Manifests that cannot be read are skipped."""
        return await asyncio.to_thread(self._list)

    async def get(self, name: ModelName) -> Model | None:
        """Compared without regard to case. Raises: invalid when the model is there but its manifest cannot be read."""
        # On the path of every request: one lstat takes 2 µs, the way to a thread and back half a millisecond on busy cores.
        seen = self._seen.get(name)
        if seen is not None and self._unchanged(name) is not None:
            return seen[1]
        return await asyncio.to_thread(self._get, name)

    async def install_gguf(self, name: ModelName, path: Path, progress: Progress) -> Model:
        """Have the GGUF file at that path installed under that name; at once when it already is.

        A model of that name with other weights is replaced; the name keeps the spelling it has. progress is called from a thread.
        Canceling stops the work; at most a blob that no manifest names stays behind. Raises: as `ModelBlobs.import_gguf`.
        """
        return await in_thread_reporting(partial(self._install, name, path), progress)

    async def remove_stale(self, now: datetime) -> None:
        """Remove what killed processes left behind. For the start of a server."""
        with disk_errors("the model store"):
            await asyncio.to_thread(self._blobs.remove_stale, now)

    def _list(self) -> Sequence[Model]:
        models, seen = [], {}
        for found in self._walk():
            with contextlib.suppress(CorralError):
                model = self._read(found)
                models.append(model)
                seen[found.name] = (found, model)
        self._seen = seen
        return sorted(models, key=lambda model: (model.modified_at, model.name.short), reverse=True)

    def _get(self, name: ModelName) -> Model | None:
        found = self._unchanged(name) or self._find(name)
        if found is None:
            return None
        try:
            model = self._read(found)
        except CorralError as error:
            raise CorralError("invalid", f"model '{name.short}' is damaged: {error.message}") from error
        self._seen[found.name] = (found, model)
        return model

    def _unchanged(self, name: ModelName) -> _Found | None:
        """The manifest if it was read under this very spelling and is as it was. Saves walking the tree for every request."""
        found, _ = self._seen.get(name, (None, None))
        if found is None:
            return None
        try:
            state = found.path.lstat()
        except OSError:
            return None
        return found if _identity(state) == found.identity else None

    def _install(self, name: ModelName, path: Path, progress: Progress) -> Model:
        current = self._current(name)
        body = self._models.import_gguf(path, progress, current=current)
        if body != current:
            self._write(self._spelled(name), body)
        installed = self._get(name)
        if installed is None:
            raise CorralError("conflict", f"model '{name.short}' was removed while it was being installed")
        return installed

    def _current(self, name: ModelName) -> bytes | None:
        """The manifest of an installed model; None as well for one that cannot be read, so that installing mends it."""
        found = self._find(name)
        if found is None:
            return None
        try:
            body = _content(found)
            self._models.read(found.name, body, found.modified_at)
        except CorralError:
            return None
        return body

    def _write(self, name: ModelName, body: bytes) -> None:
        target = self._manifests
        for part in (name.host, name.namespace, name.model):
            target /= part
            if target.is_symlink():
                raise CorralError("invalid", f"{part} among the manifests is a symbolic link; a directory belongs there")
        write_atomically(target / name.tag, body, beside=self._manifests)

    def _read(self, found: _Found) -> Model:
        seen, model = self._seen.get(found.name, (None, None))
        if seen == found and model is not None:
            return model
        return self._models.read(found.name, _content(found), found.modified_at)

    # ── The manifests tree ───────────────────────────────────────────────────────────────────────────────────────────

    def _walk(self) -> Iterator[_Found]:
        """Every manifest file."""
        return _descend(self._manifests, (None, None, None, None), ())

    def _find(self, name: ModelName) -> _Found | None:
        """The manifest of a name in whatever case; the spelling asked for comes first if several exist."""
        wanted = (name.host, name.namespace, name.model, name.tag)
        return next(_descend(self._manifests, wanted, ()), None)

    def _spelled(self, name: ModelName) -> ModelName:
        """The name with those leading parts as they are spelled already, so that no two directories differ by case alone."""
        directory, parts = self._manifests, [name.host, name.namespace, name.model, name.tag]
        for index, part in enumerate(parts):
            entry = next(iter(_entries(directory, part)), None)
            if entry is None:
                break
            parts[index] = entry.name
            directory /= entry.name
        return ModelName(*parts)


def _descend(directory: Path, wanted: tuple[str | None, ...], above: tuple[str, ...]) -> Iterator[_Found]:
    """The files exactly as many levels down as wanted has parts, which are names in any case, or None for all."""
    for entry in _entries(directory, wanted[0]):
        parts = (*above, entry.name)
        if len(wanted) > 1 and entry.is_dir(follow_symlinks=False):
            yield from _descend(directory / entry.name, wanted[1:], parts)
        elif len(wanted) == 1 and entry.is_file(follow_symlinks=False) and (found := _found(parts, entry)) is not None:
            yield found


def _entries(directory: Path, wanted: str | None) -> list[os.DirEntry[str]]:
    """What is in a directory; of one name in any case, the exact spelling first."""
    try:
        with os.scandir(directory) as found:
            entries = list(found)
    except OSError:
        return []
    if wanted is None:
        return entries
    matching = (entry for entry in entries if entry.name.lower() == wanted.lower())
    return sorted(matching, key=lambda entry: (entry.name != wanted, entry.name))


def _found(parts: tuple[str, ...], entry: os.DirEntry[str]) -> _Found | None:
    """The manifest; None when its path is no model's name, or it went away."""
    try:
        # Four parts are parsed into those very parts or not at all.
        name, state = parse_name(str(ModelName(*parts))), entry.stat(follow_symlinks=False)
    except (CorralError, OSError):
        return None
    return _Found(name, Path(entry), _identity(state))


def _identity(state: os.stat_result) -> tuple[int, int, int]:
    return state.st_ino, state.st_size, state.st_mtime_ns


def _content(found: _Found) -> bytes:
    """A manifest's bytes. Raises: not_found, bad_request, too_large."""
    shown_as = f"the manifest of {found.name.short}"
    return read_regular(found.path, shown_as=shown_as, max_bytes=MAX_MANIFEST_BYTES, flags=os.O_NOFOLLOW)


# ── The device key ───────────────────────────────────────────────────────────────────────────────────────────────────


class FileDeviceKeys:
    """The key of this installation (`DeviceKeys`). directory: `~/.ollama`."""

    def __init__(self, directory: Path, entropy: Entropy) -> None:
        self._path = directory / "id_ed25519"
        self._entropy = entropy
        #: Digest of the file's bytes -> the key in them. The file is opened and its mode checked every time all the same.
        self._parsed: tuple[bytes, DevicePrivateKey] | None = None

    def load(self) -> DevicePrivateKey | None:
        """None when there is none. Raises: invalid, naming the command that mends it, for a file that is damaged, protected by a
        passphrase, of another kind, readable by others, not ours, or no regular file."""
        if self._path.is_symlink():
            # Refused below in any case; said here because the system's own words for it are about "too many levels".
            raise CorralError("invalid", f"{self._path} is a symbolic link; put the key file itself there")
        content = read_private(self._path)
        if content is None:
            return None
        digest = sha256(content).digest()
        if self._parsed is None or self._parsed[0] != digest:
            self._parsed = (digest, _parse_private_key(content, self._path))
        return self._parsed[1]

    def load_or_create(self) -> DevicePrivateKey:
        """The key, made now if there is none; of several starters one makes it and all get the same. A file that is there is
        never replaced. Raises: as `load`, and invalid when the file cannot be written."""
        if self.load() is None:
            ensure_private_dir(self._path.parent)
            create_private(self._path, _format_private_key(self._entropy.bytes(32)))
        key = self.load()
        if key is None:
            raise CorralError("invalid", f"{self._path} was removed while it was being made")
        self._write_public(key)
        return key

    def _write_public(self, key: DevicePrivateKey) -> None:
        """For people to copy; nothing reads it, so a failure is none."""
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        with contextlib.suppress(OSError), os.fdopen(os.open(f"{self._path}.pub", flags, 0o644), "wb") as file:
            os.fchmod(file.fileno(), 0o644)
            file.write(f"{key.public.authorized_key}\n".encode())


def _format_private_key(seed: bytes) -> bytes:
    # Imported here: it takes longer than all else that a command needs which only loads the key it loaded before.
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
    from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

    return Ed25519PrivateKey.from_private_bytes(seed).private_bytes(Encoding.PEM, PrivateFormat.OpenSSH, NoEncryption())


def _parse_private_key(content: bytes, path: Path) -> DevicePrivateKey:
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
    from cryptography.hazmat.primitives.serialization import load_ssh_private_key

    try:
        key = load_ssh_private_key(content, password=None)
    except TypeError as error:
        raise CorralError("invalid", f"{path} has a passphrase; remove it with: ssh-keygen -p -N '' -f {path}") from error
    except (ValueError, UnsupportedAlgorithm) as error:
        raise CorralError("invalid", f"{path} is damaged; move it away, and sign in again with the new key") from error
    if not isinstance(key, Ed25519PrivateKey):
        raise CorralError("invalid", f"{path} is not an Ed25519 key; move it away, and sign in again with the new key")
    return DevicePrivateKey(key.private_bytes_raw())
