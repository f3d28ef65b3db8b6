"""A LibraryStore with its blobs in memory, tools that write what they are told to, and files for making models of."""

import contextlib
import json
import struct
import tempfile
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Any

from corral.core.records import Model, ModelDetails
from corral.wire import gguf, manifest
from corral.wire.errors import CorralError
from corral.wire.names import Digest, ModelName
from fakes import NOON
from fakes_models import LLAMA, gguf_bytes

ADAPTER = gguf_bytes({"general.architecture": "llama", "general.type": "adapter"})
PROJECTOR = gguf_bytes({"general.architecture": "clip", "general.type": "mmproj"})
WEIGHTS = gguf_bytes()
UNQUANTIZED = gguf_bytes({**LLAMA, "general.file_type": 1})


def digest_of(content: bytes) -> Digest:
    """The digest content has."""
    return Digest(sha256(content).hexdigest())


def shard(number: int, count: int = 2) -> bytes:
    """One part of a split GGUF file. number: from 1."""
    return gguf_bytes({**LLAMA, "split.no": number - 1, "split.count": count})


def safetensors_bytes(*, length: int | None = None, end: int = 8) -> bytes:
    """A file with one tensor of eight bytes. length, end: what its header claims."""
    header = json.dumps({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, end]}, "__metadata__": {}}).encode()
    return struct.pack("<Q", len(header) if length is None else length) + header + bytes(8)


@dataclass(frozen=True)
class Facts:
    """What a GGUF file says of itself."""

    architecture: str
    kind: str
    quantization: str
    parameter_count: int
    is_projector: bool
    metadata: dict[str, Any]


class MemoryLibrary:
    """A `LibraryStore` and `LibraryBlobs`. in_use: blobs that a runner has loaded."""

    def __init__(self) -> None:
        self.blobs: dict[Digest, bytes] = {}
        self.manifests: dict[ModelName, bytes] = {}
        self.in_use: set[Digest] = set()
        self._held: Counter[Digest] = Counter()

    # ── Manifests ────────────────────────────────────────────────────────────────────────────────────────────────────

    async def get(self, name: ModelName) -> Model | None:
        spelled = self._spelled(name)
        if spelled is None:
            return None
        try:
            document = manifest.parse_manifest(self.manifests[spelled])
        except CorralError as error:
            raise CorralError("invalid", "damaged") from error
        weights = document.first(manifest.MODEL_LAYER)
        return Model(
            name=spelled,
            digest=digest_of(self.manifests[spelled]),
            size_bytes=document.size_bytes,
            modified_at=NOON,
            details=ModelDetails(),
            capabilities=frozenset(),
            weights=f"/blobs/{weights.digest.file_name}" if weights else None,
        )

    async def manifest(self, name: ModelName) -> tuple[ModelName, bytes] | None:
        spelled = self._spelled(name)
        return None if spelled is None else (spelled, self.manifests[spelled])

    async def put_manifest(self, name: ModelName, body: bytes) -> ModelName:
        spelled = self._spelled(name) or name
        self.manifests[spelled] = body
        return spelled

    async def remove(self, name: ModelName) -> bool:
        spelled = self._spelled(name)
        return spelled is not None and self.manifests.pop(spelled, None) is not None

    async def unnamed(self, digests: Iterable[Digest]) -> frozenset[Digest]:
        named: set[Digest] = set()
        for body in self.manifests.values():
            with contextlib.suppress(CorralError):
                named |= {layer.digest for layer in manifest.parse_manifest(body).blobs}
        return frozenset(digests) - named

    async def remove_unused(self, digests: Iterable[Digest]) -> None:
        for digest in await self.unnamed(digests):
            if digest not in self.in_use and not self._held[digest]:
                self.blobs.pop(digest, None)

    @contextlib.contextmanager
    def hold(self, digests: Iterable[Digest]) -> Iterator[None]:
        held = list(digests)
        self._held.update(held)
        try:
            yield
        finally:
            self._held.subtract(held)

    def _spelled(self, name: ModelName) -> ModelName | None:
        return next((known for known in self.manifests if known.key == name.key), None)

    # ── Blobs ────────────────────────────────────────────────────────────────────────────────────────────────────────

    def put(self, content: bytes) -> Digest:
        """Have a blob there."""
        digest = digest_of(content)
        self.blobs[digest] = content
        return digest

    def blob_size(self, digest: Digest) -> int | None:
        return len(self.blobs[digest]) if digest in self.blobs else None

    async def put_stream(self, chunks: AsyncIterator[bytes], expected: Digest) -> None:
        content = b"".join([chunk async for chunk in chunks])
        found = digest_of(content)
        if found != expected:
            raise CorralError("bad_request", f'digest mismatch, expected "{expected}", got "{found}"')
        self.put(content)

    async def put_bytes(self, content: bytes) -> tuple[Digest, int]:
        return self.put(content), len(content)

    async def take_in(self, path: str) -> tuple[Digest, int]:
        content = Path(path).read_bytes()
        return self.put(content), len(content)

    async def read_small(self, digest: Digest) -> bytes:
        return self._read(digest)

    async def read_head(self, digest: Digest, count: int) -> bytes:
        return self._read(digest)[:count]

    async def gguf_facts(self, digest: Digest) -> Facts:
        content = self._read(digest)
        try:
            header = gguf.read_header(lambda offset, count: content[offset : offset + count], len(content))
        except CorralError as error:
            raise CorralError(error.code, f"blob {digest} is {error.message}") from error
        return Facts(
            architecture=header.architecture,
            kind=header.kind,
            quantization=header.quantization,
            parameter_count=header.parameter_count,
            is_projector=header.is_projector,
            metadata=dict(header.metadata),
        )

    @contextlib.contextmanager
    def workshop(self, files: Mapping[str, Digest]) -> Iterator[str]:
        with tempfile.TemporaryDirectory() as directory:
            for name, digest in files.items():
                target = Path(directory) / name
                if ".." in target.parts or not target.is_relative_to(directory):
                    raise CorralError("bad_request", "file path must be relative")
                content = self._read(digest)
                try:
                    target.parent.mkdir(parents=True, exist_ok=True)
                    with target.open("xb") as file:
                        file.write(content)
                except (FileExistsError, NotADirectoryError) as error:
                    raise CorralError("bad_request", f"the file {name} is given twice, or as a directory") from error
            yield directory

    def _read(self, digest: Digest) -> bytes:
        if digest not in self.blobs:
            raise CorralError("not_found", f"blob {digest}: no such file")
        return self.blobs[digest]


@dataclass
class ScriptedTools:
    """llama.cpp's programs, which write `result`; none of them is there when result is None. calls: (verb, names that lay in the
    directory, further arguments)."""

    result: bytes | None = None
    calls: list[tuple[str, list[str], tuple[str, ...]]] = field(default_factory=list)

    async def quantize(self, source: str, target: str, kind: str, progress: Callable[[float], None]) -> None:
        self._run("quantize", Path(source).parent, target, kind)
        progress(0.5)

    async def merge(self, first: str, target: str) -> None:
        self._run("merge", Path(first).parent, target, Path(first).name)

    async def convert(self, directory: str, target: str) -> None:
        self._run("convert", Path(directory), target)

    async def convert_adapter(self, directory: str, target: str, base: str) -> None:
        self._run("convert_adapter", Path(directory), target)

    def _run(self, verb: str, directory: Path, target: str, *arguments: str) -> None:
        if self.result is None:
            raise CorralError("not_supported", f"{verb} needs a program")
        names = sorted(str(path.relative_to(directory)) for path in directory.rglob("*") if path.is_file())
        self.calls.append((verb, names, arguments))
        Path(target).write_bytes(self.result)
