"""What making, copying and removing models needs from a disk and from llama.cpp's tools."""

from collections.abc import AsyncIterator, Callable, Iterable, Mapping
from contextlib import AbstractContextManager
from typing import Any, Protocol

from corral.core.records import Model
from corral.wire.names import Digest, ModelName


class GgufFacts(Protocol):
    """What a GGUF file says of itself. kind: `adapter`, `model` … or nothing. metadata: key/values without long arrays."""

    @property
    def architecture(self) -> str: ...
    @property
    def kind(self) -> str: ...
    @property
    def quantization(self) -> str: ...
    @property
    def parameter_count(self) -> int: ...
    @property
    def is_projector(self) -> bool: ...
    @property
    def metadata(self) -> dict[str, Any]: ...


class LibraryStore(Protocol):
    """The installed models of this machine. Names compare without regard to case."""

    async def get(self, name: ModelName) -> Model | None: ...

    async def manifest(self, name: ModelName) -> tuple[ModelName, bytes] | None:
        """The name as it is spelled here, and the manifest's bytes, whatever they are."""
        ...

    async def put_manifest(self, name: ModelName, body: bytes) -> ModelName:
        """Install it durably, under the spelling that the name has already; returns that."""
        ...

    async def remove(self, name: ModelName) -> bool:
        """Remove a manifest; its blobs stay. False when there is none."""
        ...

    async def unnamed(self, digests: Iterable[Digest]) -> frozenset[Digest]:
        """Those that no manifest names."""
        ...

    async def remove_unused(self, digests: Iterable[Digest]) -> None:
        """Remove those of the blobs that no manifest names, nobody holds and no runner has loaded."""
        ...

    def hold(self, digests: Iterable[Digest]) -> AbstractContextManager[None]:
        """Keep those blobs while the block runs, whoever removes what."""
        ...


class LibraryBlobs(Protocol):
    """The blobs of this machine."""

    def blob_size(self, digest: Digest) -> int | None:
        """Bytes of a whole blob, None when it is not there."""
        ...

    async def put_stream(self, chunks: AsyncIterator[bytes], expected: Digest) -> None:
        """Store a blob that arrives. Raises: bad_request on another digest than expected, storage_full, unavailable."""
        ...

    async def put_bytes(self, content: bytes) -> tuple[Digest, int]:
        """Store a small blob; its digest and size. Raises: storage_full, unavailable."""
        ...

    async def take_in(self, path: str) -> tuple[Digest, int]:
        """Store a file that a tool made; its digest and size. Raises: storage_full, unavailable."""
        ...

    async def read_small(self, digest: Digest) -> bytes:
        """The content of a config or a text. Raises: not_found, too_large."""
        ...

    async def read_head(self, digest: Digest, count: int) -> bytes:
        """How a blob begins. Raises: not_found."""
        ...

    async def gguf_facts(self, digest: Digest) -> GgufFacts:
        """What the GGUF file in that blob says of itself, checked. Raises: bad_request, not_found."""
        ...

    def workshop(self, files: Mapping[str, Digest]) -> AbstractContextManager[str]:
        """A directory of its own where those blobs lie under those relative names, and where tools may write; gone afterwards.
        Raises: bad_request for names that do not stay inside."""
        ...


class ModelTools(Protocol):
    """llama.cpp's programs, as far as they are installed. Paths are absolute. All verbs raise: not_supported when the program is
    not there, engine_failed with its last words."""

    async def quantize(self, source: str, target: str, kind: str, progress: Callable[[float], None]) -> None:
        """kind: `Q4_K_M` …, checked by the caller. progress: between 0 and 1."""
        ...

    async def merge(self, first: str, target: str) -> None:
        """One GGUF file out of several parts. first: the one called `…-00001-of-0000N.gguf`; the others lie beside it."""
        ...

    async def convert(self, directory: str, target: str) -> None:
        """A GGUF file out of safetensors and what belongs to them."""
        ...

    async def convert_adapter(self, directory: str, target: str, base: str) -> None:
        """The same for an adapter. base: a directory that holds the base model's config.json."""
        ...
