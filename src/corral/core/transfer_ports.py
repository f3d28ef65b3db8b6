"""What moving models needs from the outside: a registry somewhere else, and a place for blobs on their way in.

`RegistryGateway` hides everything that a registry may demand or do wrong: tokens, redirects, stalls, broken connections, answers
without end. Whoever reads a range gets exactly those bytes or a coded error; whether they are the right bytes only their digest
tells, and checking that is the reader's business.
"""

from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Protocol

from corral.core.registry import Visibility
from corral.wire.errors import CorralError
from corral.wire.names import Digest, ModelName

#: Waits that many seconds. Handed in, so that tests do not wait.
Sleeper = Callable[[float], Awaitable[None]]


@dataclass(frozen=True, slots=True)
class RemoteRepository:
    """A repository at some registry. base_url: scheme, host and port, no trailing slash. path: `namespace/name`."""

    base_url: str
    path: str


@dataclass(frozen=True, slots=True, kw_only=True)
class RemoteManifest:
    """A manifest as a registry sent it; digest is over body."""

    digest: Digest
    media_type: str
    body: bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class BlobToSend:
    """A blob that a registry may want. read: the bytes [first, first + count), opened anew for every attempt. mount_from: a
    repository (`namespace/name`) of the same registry that may have it, or nothing."""

    digest: Digest
    size_bytes: int
    read: Callable[[int, int], AsyncIterator[bytes]]
    mount_from: str = ""


class Interrupted(CorralError):
    """A transfer that got no further, for want of a connection or of a registry in health: what arrived may be gone on with."""

    def __init__(self, message: str) -> None:
        super().__init__("upstream_failed", message)


class RegistryGateway(Protocol):
    """A registry, spoken to as Ollama and OCI tools do. Tries anonymously first; proves itself only when it is told to, and only
    to the registry itself.

    All verbs raise: unauthorized (no proof helps), forbidden, not_found, rate_limited, too_large (an answer beyond its bound),
    upstream_failed (misbehaving; as `Interrupted`: not reached, or broken off for good). Messages of refusals begin with the
    status and hold what the registry said.
    """

    async def manifest(self, repository: RemoteRepository, reference: str) -> RemoteManifest | None:
        """By tag or digest; None when there is none. At most 16 MiB. A digest that was asked for or announced is checked."""
        ...

    async def blob_size(self, repository: RemoteRepository, digest: Digest) -> int | None:
        """Bytes, or None when the registry does not have the blob there."""
        ...

    def read_blob(self, repository: RemoteRepository, digest: Digest, *, first: int, count: int) -> AsyncGenerator[bytes, None]:
        """Exactly the bytes [first, first + count) as they arrive, not verified; goes on by itself after stalls and broken
        connections. Raises also: not_found."""
        ...

    async def send_blob(self, repository: RemoteRepository, blob: BlobToSend, progress: Callable[[int], None]) -> None:
        """Have the blob there; at once when it is. progress: bytes that the registry has so far; may go back."""
        ...

    async def put_manifest(
        self, repository: RemoteRepository, reference: str, manifest: RemoteManifest, *, visibility: Visibility | None = None
    ) -> None:
        """visibility: asked of a Corral hub together with the manifest; other registries pass over it."""
        ...


# ── Where blobs arrive ───────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True, slots=True)
class MissingPart:
    """A stretch of a blob that is not there yet. number: of the part it belongs to."""

    number: int
    first: int
    count: int


class PartialBlob(Protocol):
    """A blob on its way in. Closed exactly once, by `finish`, `keep` or `drop`."""

    @property
    def size_bytes(self) -> int: ...

    @property
    def completed_bytes(self) -> int:
        """How much of it is there."""
        ...

    def missing(self) -> Sequence[MissingPart]:
        """What is still to be fetched, in order. Parts may be written at the same time, each by one writer."""
        ...

    async def write(self, number: int, chunk: bytes) -> None:
        """Append to a part. Raises: storage_full, unavailable."""
        ...

    async def finish(self) -> None:
        """Verify, sync, and give the blob its name. Raises: digest_invalid, and what was there is gone."""
        ...

    async def keep(self) -> None:
        """Close it; what is there is kept for the next attempt. Safe after `finish`."""
        ...

    async def drop(self) -> None:
        """Close it and remove what is there. Safe after `finish`."""
        ...


class BlobShelf(Protocol):
    """The blobs of this machine, for moving them in and out."""

    def blob_size(self, digest: Digest) -> int | None:
        """Bytes of a whole blob, None when it is not there."""
        ...

    async def receive(self, digest: Digest, size_bytes: int) -> PartialBlob:
        """Begin or go on with a blob that is not there. Raises: conflict when another process is receiving it, storage_full,
        unavailable."""
        ...

    def read_blob(self, digest: Digest, first: int, count: int) -> AsyncIterator[bytes]:
        """Bytes of a whole blob, in blocks. Raises: not_found."""
        ...


class InstalledManifests(Protocol):
    """The manifests of this machine. Names compare without regard to case."""

    async def manifest(self, name: ModelName) -> tuple[ModelName, bytes] | None:
        """The name as it is spelled here, and the manifest's bytes, whatever they are."""
        ...

    async def put_manifest(self, name: ModelName, body: bytes) -> ModelName:
        """Install it durably, under the spelling that the name has already; returns that."""
        ...

    def hold(self, digests: Iterable[Digest]) -> AbstractContextManager[None]:
        """Keep those blobs while the block runs, though no manifest names them yet."""
        ...

    async def remove_unused(self, digests: Iterable[Digest]) -> None:
        """Remove those of the blobs that no manifest names any more and nobody uses."""
        ...
