"""The documents behind a model: the manifest (which layers, which config) and the config (what the model is).

A manifest is kept and sent as the bytes it came as, because its digest is over them; what is parsed here is only read. Unknown
members are tolerated. Source: ollama manifest/{manifest,layer}.go, types/model/config.go, fb30760.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import msgspec

from corral.wire.documents import convert, parse_json, parse_object, refuse
from corral.wire.names import Digest, parse_digest

MANIFEST_TYPE = "application/vnd.docker.distribution.manifest.v2+json"
CONFIG_TYPE = "application/vnd.docker.container.image.v1+json"
_LAYER = "application/vnd.ollama.image."
MODEL_LAYER = _LAYER + "model"
DRAFT_LAYER = _LAYER + "draft"
PROJECTOR_LAYER = _LAYER + "projector"
ADAPTER_LAYER = _LAYER + "adapter"
TEMPLATE_LAYER = _LAYER + "template"
#: What `template` was called once.
PROMPT_LAYER = _LAYER + "prompt"
SYSTEM_LAYER = _LAYER + "system"
PARAMS_LAYER = _LAYER + "params"
MESSAGES_LAYER = _LAYER + "messages"
LICENSE_LAYER = _LAYER + "license"

#: A model of 10,000 tensor layers takes about 2.5 MB, and half a second of the one thread that writes to a hub's database.
MAX_MANIFEST_BYTES = 16 << 20
MAX_CONFIG_BYTES = 4 << 20
MAX_LAYERS = 12_000
_MAX_SIZE = 2**63 - 1


class Layer(msgspec.Struct, frozen=True, kw_only=True):
    """A blob and what it is. source: the model or file it was made from (`from` on the wire). name: of a tensor or a file."""

    media_type: str
    digest: Digest
    size_bytes: int
    source: str = ""
    name: str = ""


class Manifest(msgspec.Struct, frozen=True, kw_only=True):
    """A parsed manifest. layers: in manifest order. config: None where the document leaves its digest empty."""

    config: Layer | None
    layers: tuple[Layer, ...]
    media_type: str = MANIFEST_TYPE

    @property
    def size_bytes(self) -> int:
        """All layers and the config, as listings show it."""
        return sum(layer.size_bytes for layer in self.blobs)

    @property
    def blobs(self) -> tuple[Layer, ...]:
        """Everything the manifest refers to, config last."""
        return self.layers if self.config is None else (*self.layers, self.config)

    def first(self, media_type: str) -> Layer | None:
        """The first layer of that type."""
        return next((layer for layer in self.layers if layer.media_type == media_type), None)


class ModelConfig(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """The config blob. model_type: parameter size as shown. file_type: quantization as shown. remote_*: set on a stub. draft:
    format, architecture and what else Ollama says of the draft model, which nothing here depends on."""

    model_format: str = ""
    model_family: str = ""
    model_families: tuple[str, ...] = ()
    model_type: str = ""
    file_type: str = ""
    renderer: str = ""
    parser: str = ""
    requires: str = ""
    remote_host: str = ""
    remote_model: str = ""
    capabilities: tuple[str, ...] = ()
    context_length: int = 0
    embedding_length: int = 0
    base_name: str = ""
    draft: dict[str, Any] = {}

    @property
    def is_stub(self) -> bool:
        """Whether the model runs somewhere else."""
        return bool(self.remote_host and self.remote_model)


class _WireLayer(msgspec.Struct, rename="camel"):
    media_type: str = ""
    digest: str = ""
    size: int = 0
    source: str = msgspec.field(default="", name="from")
    name: str = ""


class _WireManifest(msgspec.Struct, rename="camel"):
    schema_version: int = 2
    media_type: str = ""
    config: _WireLayer = msgspec.field(default_factory=_WireLayer)
    layers: list[_WireLayer] = msgspec.field(default_factory=list)


def parse_manifest(data: bytes) -> Manifest:
    """Read a manifest. Raises: bad_request when it is not one; too_large."""
    wire = convert(parse_object(data, MAX_MANIFEST_BYTES, "manifest"), _WireManifest, "manifest")
    if wire.schema_version != 2:
        refuse("manifest", f"schemaVersion is {wire.schema_version}, not 2")
    if len(wire.layers) > MAX_LAYERS:
        refuse("manifest", f"it has more than {MAX_LAYERS} layers")
    return Manifest(
        media_type=wire.media_type,
        config=_layer(wire.config) if wire.config.digest else None,
        layers=tuple(_layer(layer) for layer in wire.layers),
    )


def format_manifest(manifest: Manifest) -> bytes:
    """The document as Ollama writes it: compact, members in its order, a newline at the end."""
    if manifest.config is None:
        raise ValueError("a manifest is written with a config")
    document = {
        "schemaVersion": 2,
        "mediaType": manifest.media_type,
        "config": _wire_layer(manifest.config),
        "layers": [_wire_layer(layer) for layer in manifest.layers],
    }
    return msgspec.json.encode(document) + b"\n"


def parse_config(data: bytes) -> ModelConfig:
    """Read a config blob; null members count as absent, as in Go. Raises: bad_request, too_large."""
    document = parse_object(data, MAX_CONFIG_BYTES, "config")
    # The youngest member, whose shape may change once more: a model is not unreadable for what only describes its draft.
    if not isinstance(document.get("draft"), dict):
        document.pop("draft", None)
    return convert(document, ModelConfig, "config")


def format_config(config: ModelConfig, diff_ids: Sequence[Digest]) -> bytes:
    """The document as Ollama writes it. diff_ids: the layers' digests, which older releases of it look for."""
    shown = ("model_format", "model_family", "model_families", "model_type", "file_type")
    document = {
        **{name: getattr(config, name) for name in shown},
        **msgspec.to_builtins(config),
        "architecture": "amd64",
        "os": "linux",
        "rootfs": {"type": "layers", "diff_ids": [str(digest) for digest in diff_ids]},
    }
    return msgspec.json.encode(document) + b"\n"


def parse_params(data: bytes) -> dict[str, object]:
    """Read a params layer: Modelfile PARAMETERs by their wire names. Raises: bad_request, too_large."""
    return parse_object(data, MAX_CONFIG_BYTES, "params layer")


def format_params(params: Mapping[str, object]) -> bytes:
    """The bytes of a params layer, in a fixed order so that equal parameters are one blob."""
    return msgspec.json.encode(dict(params), order="sorted") + b"\n"


class _WireMessage(msgspec.Struct):
    role: str = ""
    content: str = ""


def parse_messages(data: bytes) -> tuple[tuple[str, str], ...]:
    """Read a messages layer as (role, content). Raises: bad_request, too_large."""
    value = parse_json(data, MAX_MANIFEST_BYTES, "messages layer")
    messages = convert(value, list[_WireMessage], "messages layer")
    return tuple((message.role, message.content) for message in messages)


def _layer(wire: _WireLayer) -> Layer:
    if not 0 <= wire.size <= _MAX_SIZE:
        refuse("manifest", f"a layer's size is {wire.size}")
    return Layer(
        media_type=wire.media_type,
        digest=parse_digest(wire.digest),
        size_bytes=wire.size,
        source=wire.source,
        name=wire.name,
    )


def _wire_layer(layer: Layer) -> dict[str, object]:
    named = {"from": layer.source, "name": layer.name}
    return {
        "mediaType": layer.media_type,
        "digest": str(layer.digest),
        "size": layer.size_bytes,
        **{name: text for name, text in named.items() if text},
    }
