"""Small GGUF files made of bytes, models laid out on a disk as Ollama does it, and a HostedStore in memory."""

import json
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from hashlib import sha256
from pathlib import Path

from corral.core.records import HostedModel, Model, ModelDetails
from corral.wire.errors import CorralError
from corral.wire.manifest import CONFIG_TYPE, MANIFEST_TYPE, MODEL_LAYER
from corral.wire.names import Digest, ModelName, parse_name
from fakes import NOON

U32, F32, BOOL, STRING, ARRAY, U64 = 4, 6, 7, 8, 9, 10
TENSOR_F32, TENSOR_Q4_1 = 0, 3


@dataclass(frozen=True)
class Raw:
    """A metadata value as it stands in the file: for values that are no values."""

    kind: int
    content: bytes


GgufValue = bool | int | float | str | Sequence[int] | Sequence[str] | Raw

LLAMA: Mapping[str, GgufValue] = {
    "general.architecture": "llama",
    "general.file_type": 3,
    "llama.context_length": 8192,
    "llama.embedding_length": 32,
    "llama.attention.head_count": 4,
    "llama.rope.freq_base": 1e-05,
    "tokenizer.ggml.add_bos_token": True,
    "tokenizer.ggml.tokens": ["a", "b", "c"],
}
WEIGHTS = (("token_embd.weight", (32, 4), TENSOR_Q4_1), ("output_norm.weight", (32,), TENSOR_F32))


def u64(number: int) -> bytes:
    """A number of eight bytes."""
    return struct.pack("<Q", number)


def gguf_string(text: str | bytes) -> bytes:
    """Length and bytes."""
    raw = text.encode() if isinstance(text, str) else text
    return u64(len(raw)) + raw


def _value(value: GgufValue) -> bytes:
    match value:
        case Raw():
            return struct.pack("<I", value.kind) + value.content
        case bool():
            return struct.pack("<I?", BOOL, value)
        case int():
            return struct.pack("<II", U32, value)
        case float():
            return struct.pack("<If", F32, value)
        case str():
            return struct.pack("<I", STRING) + gguf_string(value)
    items = [gguf_string(item) if isinstance(item, str) else struct.pack("<I", item) for item in value]
    kind = STRING if any(isinstance(item, str) for item in value) else U32
    return struct.pack("<IIQ", ARRAY, kind, len(items)) + b"".join(items)


def pairs(metadata: Mapping[str, GgufValue]) -> bytes:
    """Key/values as they stand in a file."""
    return b"".join(gguf_string(key) + _value(value) for key, value in metadata.items())


def tensor_row(name: str | bytes, shape: Sequence[int], kind: int, offset: int) -> bytes:
    """One row of the tensor table."""
    return gguf_string(name) + struct.pack("<I", len(shape)) + b"".join(map(u64, shape)) + struct.pack("<I", kind) + u64(offset)


def gguf_bytes(
    metadata: Mapping[str, GgufValue] = LLAMA,
    tensors: Sequence[tuple[str, Sequence[int], int]] = WEIGHTS,
    *,
    version: int = 3,
    alignment: int = 32,
    filler: bytes = b"\0",
) -> bytes:
    """A whole file that ends with its last tensor. filler: what the weights are made of."""
    sizes = {TENSOR_F32: lambda count: count * 4, TENSOR_Q4_1: lambda count: count // 32 * 20}
    rows, data = [], b""
    for name, shape, kind in tensors:
        data += b"\0" * (-len(data) % alignment)
        rows.append(tensor_row(name, shape, kind, len(data)))
        count = 1
        for length in shape:
            count *= length
        data += filler * sizes[kind](count)
    head = b"GGUF" + struct.pack("<IQQ", version, len(tensors), len(metadata)) + pairs(metadata) + b"".join(rows)
    return head + b"\0" * (-len(head) % alignment) + data


# ── Models ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def model(name: str = "tiny:1b", **changes: object) -> Model:
    """A model of that name."""
    values: dict[str, object] = {
        "name": parse_name(name),
        "digest": Digest(sha256(name.encode()).hexdigest()),
        "size_bytes": 1,
        "modified_at": NOON,
        "details": ModelDetails(),
        "capabilities": frozenset(),
        **changes,
    }
    return Model(**values)  # type: ignore[arg-type]


def put_blob(root: Path, content: bytes) -> Digest:
    """A blob in a store of Ollama's layout."""
    digest = Digest(sha256(content).hexdigest())
    (root / "blobs").mkdir(parents=True, exist_ok=True)
    (root / "blobs" / digest.file_name).write_bytes(content)
    return digest


def put_model(
    root: Path,
    name: str = "tiny:1b",
    weights: bytes | None = None,
    *,
    config: Mapping[str, object] | None = None,
    layers: Mapping[str, bytes] | None = None,
) -> Path:
    """A model as Ollama would have left it; the manifest's path. layers: the rest of the media type -> content."""
    config = {"model_format": "gguf", "model_family": "llama", "model_type": "1B"} if config is None else config
    named = {**({} if weights is None else {"model": weights}), **(layers or {})}
    body = manifest_bytes(root, config, {MODEL_LAYER.removesuffix("model") + kind: content for kind, content in named.items()})
    parts = parse_name(name)
    path = root / "manifests" / parts.host / parts.namespace / parts.model / parts.tag
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(body)
    return path


def manifest_bytes(root: Path, config: Mapping[str, object], layers: Mapping[str, bytes]) -> bytes:
    """A manifest whose blobs are put into the store."""
    rows = [_row(root, media_type, content) for media_type, content in layers.items()]
    document = {
        "schemaVersion": 2,
        "mediaType": MANIFEST_TYPE,
        "config": _row(root, CONFIG_TYPE, json.dumps(config).encode()),
        "layers": rows,
    }
    return json.dumps(document).encode()


def _row(root: Path, media_type: str, content: bytes) -> dict[str, object]:
    return {"mediaType": media_type, "digest": str(put_blob(root, content)), "size": len(content)}


class MemoryHosting:
    """A HostedStore. repository: the models it may offer with their weights."""

    def __init__(self, *repository: Model) -> None:
        self._repository = {model.name.key: model for model in repository}
        self._offered: dict[str, HostedModel] = {}

    async def list(self) -> Sequence[HostedModel]:
        return [self._offered[key] for key in sorted(self._offered)]

    async def get(self, name: str) -> HostedModel | None:
        try:
            return self._offered.get(parse_name(name).key.short)
        except CorralError:
            return None

    async def offer(self, model: HostedModel) -> None:
        if (model.model is None) == (not model.upstream_url):
            raise CorralError("invalid")
        name = parse_name(model.name)
        stored = None
        if model.model is not None:
            stored = self._repository.get(model.model.name.key)
            if stored is None:
                raise CorralError("not_found")
        self._offered[name.key.short] = replace(model, name=name.short, model=stored)

    async def offer_stored(self, name: ModelName, *, is_public: bool, now: datetime) -> None:
        stored = self._repository.get(name.key)
        if stored is None:
            raise CorralError("not_found")
        self._offered[name.key.short] = HostedModel(name=name.short, model=stored, is_public=is_public, created_at=now)

    async def withdraw(self, name: str) -> bool:
        return self._offered.pop(parse_name(name).key.short, None) is not None


def hosted(name: str = "tiny:1b", *, created_at: datetime = NOON, **changes: object) -> HostedModel:
    """An upstream offered under that name, unless changes say otherwise."""
    values: dict[str, object] = {"upstream_url": "http://127.0.0.1:9", "upstream_model": "m", **changes}
    return HostedModel(name=name, created_at=created_at, **values)  # type: ignore[arg-type]
