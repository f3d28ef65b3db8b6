"""What Ollama keeps in a home directory, in Ollama's own layout, so that either program reads what the other wrote.

```
~/.ollama/id_ed25519                                              the device key, OpenSSH form, 0600; id_ed25519.pub, 0644
$OLLAMA_MODELS/blobs/sha256-<64 hex>                              weights, configs, templates … (see blobs.py)
$OLLAMA_MODELS/manifests/<host>/<namespace>/<model>/<tag>         JSON; exactly four levels
```

Source: ollama manifest/{manifest,paths}.go, auth/auth.go, cmd/cmd.go initializeKeypair, fb30760.
"""

import asyncio
import contextlib
import os
import shutil
import tempfile
import threading
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Mapping, Sequence
from datetime import datetime
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import ParamSpec, TypeVar

from corral.core.ports import Entropy
from corral.core.records import Model
from corral.storage.blobs import STALE_AFTER, BlobFiles, Progress, disk_errors, in_thread, in_thread_reporting, open_regular
from corral.storage.manifests import Found, ManifestTree
from corral.storage.models import ModelBlobs, WeightFacts
from corral.storage.secretfile import create_private, ensure_private_dir, read_private
from corral.wire.errors import CorralError
from corral.wire.manifest import MAX_CONFIG_BYTES
from corral.wire.names import Digest, ModelName
from corral.wire.signing import DevicePrivateKey

P = ParamSpec("P")
T = TypeVar("T")

#: Nobody has such a file; a stream without an end is cut off there.
MAX_BLOB_BYTES = 1 << 44
#: What directories for tools are called.
_WORKSHOP = "corral-workshop-"


class HomeModels:
    """The models of one machine (`ModelStore`, `InstalledManifests`, `LibraryStore`).

    root: what `OLLAMA_MODELS` names. cache_dir: may be deleted at any time. in_use: paths of files that runners have loaded;
    asked on the event loop, before anything is removed.
    """

    def __init__(self, root: Path, cache_dir: Path, *, in_use: Callable[[], Iterable[str]] = tuple) -> None:
        self._root = root
        self._tree = ManifestTree(root / "manifests")
        self._blobs = BlobFiles(root / "blobs", cache_dir)
        self._models = ModelBlobs(self._blobs, cache_dir)
        self._in_use = in_use
        #: By the spelling on the disk: the manifest file in the state it was read in, and what it was.
        self._seen: dict[ModelName, tuple[Found, Model]] = {}
        #: Blobs that a pull or a create counts on, though no manifest names them yet -> how many do.
        self._held: Counter[Digest] = Counter()
        #: Between a look at what manifests name and the removal of the rest, none may be written.
        self._changes = threading.Lock()

    async def list(self) -> Sequence[Model]:
        """Newest first. Manifests that cannot be read are skipped."""
        return await asyncio.to_thread(self._list)

    async def get(self, name: ModelName) -> Model | None:
        """Compared without regard to case. Raises: invalid when the model is there but its manifest cannot be read."""
        # On the path of every request: one lstat takes 2 µs, the way to a thread and back half a millisecond on busy cores.
        seen = self._seen.get(name)
        if seen is not None and seen[0].is_unchanged:
            return seen[1]
        return await asyncio.to_thread(self._get, name)

    async def install_gguf(
        self, name: ModelName, path: Path, progress: Progress, *, parameters: Mapping[str, object] | None = None
    ) -> Model:
        """Have the GGUF file at that path installed under that name; at once when it already is.

        A model of that name with other weights is replaced; the name keeps the spelling it has. parameters: PARAMETERs
        of a model that is new. progress is called from a thread.
        Canceling stops the work; at most a blob that no manifest names stays behind. Raises: as `ModelBlobs.import_gguf`.
        """
        return await in_thread_reporting(partial(self._install, name, path, parameters), progress)

    # ── Changing manifests ───────────────────────────────────────────────────────────────────────────────────────────

    async def manifest(self, name: ModelName) -> tuple[ModelName, bytes] | None:
        """The name as it is spelled here, and the manifest's bytes, whatever they are. Compared without regard to case."""
        return await asyncio.to_thread(self._manifest, name)

    async def put_manifest(self, name: ModelName, body: bytes) -> ModelName:
        """Install a manifest durably, under the spelling that the name has already; returns that. What it replaces keeps its
        blobs: see `remove_unused`. Raises: invalid, storage_full, unavailable."""
        return await in_thread(partial(self._locked, self._tree.write, name, body))

    async def remove(self, name: ModelName) -> bool:
        """Remove a model's manifest; its blobs stay. Compared without regard to case. False when there is none."""
        return await in_thread(partial(self._locked, self._remove, name))

    # ── Keeping and removing blobs ───────────────────────────────────────────────────────────────────────────────────

    @contextlib.contextmanager
    def hold(self, digests: Iterable[Digest]) -> Iterator[None]:
        """Keep those blobs while the block runs, whoever removes what; a name nobody holds a blob of is no error."""
        held = list(digests)
        self._held.update(held)
        try:
            yield
        finally:
            self._held.subtract(held)
            for digest in held:
                if self._held[digest] <= 0:
                    del self._held[digest]

    async def unnamed(self, digests: Iterable[Digest]) -> frozenset[Digest]:
        """Those of the blobs that no manifest names."""
        named = await asyncio.to_thread(self._tree.named_blobs)
        return frozenset(digests) - named.digests

    async def remove_unused(self, digests: Iterable[Digest]) -> None:
        """Remove those of the blobs that no manifest names, nobody holds and no runner has loaded. Raises: unavailable."""
        loaded = frozenset(self._in_use())
        await in_thread(partial(self._locked, self._remove_unused, frozenset(digests), loaded))

    async def remove_stale(self, now: datetime) -> None:
        """Remove what killed processes left behind. For the start of a server."""
        with disk_errors("the model store"):
            await asyncio.to_thread(self._remove_stale, now)

    async def prune(self, now: datetime) -> int | None:
        """For the start of a server: name blobs as they are named today, and remove those that no manifest names and that are
        more than an hour old. How many those were; None when a manifest cannot be read, and nothing was removed for that reason.
        Raises: unavailable."""
        loaded = frozenset(self._in_use())
        return await in_thread(partial(self._locked, self._prune, now, loaded))

    # ── Blobs on their own ───────────────────────────────────────────────────────────────────────────────────────────

    def blob_size(self, digest: Digest) -> int | None:
        """Bytes of a whole blob, None when it is not there."""
        return self._blobs.size_of(digest)

    async def put_stream(self, chunks: AsyncIterator[bytes], expected: Digest) -> None:
        """Store a blob that arrives. Raises: bad_request on another digest than expected, storage_full, unavailable."""
        await self._blobs.put_stream(chunks, expected=expected, max_bytes=MAX_BLOB_BYTES)

    async def put_bytes(self, content: bytes) -> tuple[Digest, int]:
        """Store a small blob; its digest and its size. Raises: storage_full, unavailable."""
        blob = await in_thread(partial(self._blobs.put_bytes, content))
        return blob.digest, blob.size_bytes

    async def take_in(self, path: str) -> tuple[Digest, int]:
        """Store a file that a tool made; its digest and its size. Raises: as `BlobFiles.put_file`."""
        blob = await in_thread_reporting(partial(self._blobs.put_file, Path(path)), _unreported)
        return blob.digest, blob.size_bytes

    async def read_small(self, digest: Digest) -> bytes:
        """The content of a small blob: a config, a text. Raises: not_found, too_large."""
        return await asyncio.to_thread(partial(self._blobs.read, digest, max_bytes=MAX_CONFIG_BYTES))

    async def read_head(self, digest: Digest, count: int) -> bytes:
        """How a blob begins. Raises: not_found."""
        return await asyncio.to_thread(self._read_head, digest, count)

    @contextlib.contextmanager
    def workshop(self, files: Mapping[str, Digest]) -> Iterator[str]:
        """A directory of its own where those blobs lie under those relative names, and where tools may write; gone afterwards.
        It is on the blobs' file system, so that neither way costs a copy. Raises: bad_request for a name that does not stay
        inside or leads through another, not_found, storage_full, unavailable."""
        with disk_errors("the model store"):
            self._root.mkdir(parents=True, exist_ok=True)
            directory = tempfile.TemporaryDirectory(prefix=_WORKSHOP, dir=self._root, ignore_cleanup_errors=True)
        with directory as path:
            for name, digest in files.items():
                self._blobs.lay_out(digest, Path(path), name)
            yield path

    async def gguf_facts(self, digest: Digest) -> WeightFacts:
        """What the GGUF file in that blob says of itself, checked. Raises: bad_request, not_found."""
        return await asyncio.to_thread(self._models.facts, digest)

    # ── In a thread ──────────────────────────────────────────────────────────────────────────────────────────────────

    def _locked(self, work: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        with self._changes:
            return work(*args, **kwargs)

    def _list(self) -> Sequence[Model]:
        models, seen = [], {}
        for found in self._tree.walk():
            with contextlib.suppress(CorralError):
                model = self._read(found)
                models.append(model)
                seen[found.name] = (found, model)
        self._seen = seen
        return sorted(models, key=lambda model: (model.modified_at, model.name.short), reverse=True)

    def _get(self, name: ModelName) -> Model | None:
        found = self._unchanged(name) or self._tree.find(name)
        if found is None:
            return None
        try:
            model = self._read(found)
        except CorralError as error:
            raise CorralError("invalid", f"model '{name.short}' is damaged: {error.message}") from error
        self._seen[found.name] = (found, model)
        return model

    def _unchanged(self, name: ModelName) -> Found | None:
        """The manifest if it was read under this very spelling and is as it was. Saves walking the tree for every request."""
        found, _ = self._seen.get(name, (None, None))
        return found if found is not None and found.is_unchanged else None

    def _install(self, name: ModelName, path: Path, parameters: Mapping[str, object] | None, progress: Progress) -> Model:
        current = self._current(name)
        body = self._models.import_gguf(path, progress, current=current, parameters=parameters)
        if body != current:
            self._locked(self._tree.write, name, body)
        installed = self._get(name)
        if installed is None:
            raise CorralError("conflict", f"model '{name.short}' was removed while it was being installed")
        return installed

    def _current(self, name: ModelName) -> bytes | None:
        """The manifest of an installed model; None as well for one that cannot be read, so that installing mends it."""
        found = self._tree.find(name)
        if found is None:
            return None
        try:
            body = found.read()
            self._models.read(found.name, body, found.modified_at)
        except CorralError:
            return None
        return body

    def _manifest(self, name: ModelName) -> tuple[ModelName, bytes] | None:
        found = self._tree.find(name)
        return None if found is None else (found.name, found.read())

    def _read(self, found: Found) -> Model:
        seen, model = self._seen.get(found.name, (None, None))
        if seen == found and model is not None:
            return model
        return self._models.read(found.name, found.read(), found.modified_at)

    def _remove(self, name: ModelName) -> bool:
        found = self._tree.find(name)
        return found is not None and self._tree.remove(found)

    def _remove_unused(self, digests: frozenset[Digest], loaded: frozenset[str]) -> None:
        # A manifest that cannot be read names nothing here, as in Ollama: else one damaged file would keep everything for ever.
        for digest in digests - self._tree.named_blobs().digests:
            if self._is_free(digest, loaded):
                self._blobs.remove(digest)

    def _remove_stale(self, now: datetime) -> None:
        self._blobs.remove_stale(now)
        for workshop in self._root.glob(f"{_WORKSHOP}*"):
            # One that is younger may be another server's.
            if workshop.lstat().st_mtime < (now - STALE_AFTER).timestamp():
                shutil.rmtree(workshop, ignore_errors=True)

    def _is_free(self, digest: Digest, loaded: frozenset[str]) -> bool:
        return digest not in self._held and str(self._blobs.path(digest)) not in loaded

    def _prune(self, now: datetime, loaded: frozenset[str]) -> int | None:
        self._blobs.rename_old()
        named = self._tree.named_blobs()
        if not named.is_certain:
            return None
        unused = [digest for digest in self._blobs.older_than(now) if digest not in named.digests]
        removed = [digest for digest in unused if self._is_free(digest, loaded) and self._blobs.remove(digest)]
        self._tree.remove_empty()
        return len(removed)

    def _read_head(self, digest: Digest, count: int) -> bytes:
        with open_regular(self._blobs.path(digest), shown_as=f"blob {digest}") as file:
            return file.read(count)


def _unreported(done: int, total: int) -> None:
    """Nobody watches."""


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
            raise CorralError("invalid", f"{self._path} is a symbolic link → put the key file itself there")
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
        raise CorralError("invalid", f"{path} has a passphrase → remove it with: ssh-keygen -p -N '' -f {path}") from error
    except (ValueError, UnsupportedAlgorithm) as error:
        raise CorralError("invalid", f"{path} is damaged → move it away, and sign in again with the new key") from error
    if not isinstance(key, Ed25519PrivateKey):
        raise CorralError("invalid", f"{path} is not an Ed25519 key → move it away, and sign in again with the new key")
    return DevicePrivateKey(key.private_bytes_raw())
