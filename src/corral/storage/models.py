"""From a manifest and its blobs to a `Model`: the one place for both the home directory and the hub.

```
<cache>/headers/<64 hex>.json   what the GGUF file with that digest says of itself (its header takes some 20 ms to read)
```

A digest names its content for ever, so nothing kept under one goes stale; a note that does not fit the blob's size, or cannot be
read, is made again. Everything here blocks; async callers use threads. Source: ollama server/{images,model_list_cache,routes}.go.
"""

import dataclasses
import os
import threading
from collections.abc import Mapping
from datetime import datetime
from hashlib import sha256
from pathlib import Path
from typing import Any, Protocol, TypeVar

import msgspec

from corral.core.records import Capability, Model, ModelDetails
from corral.storage.blobs import Blob, BlobFiles, Progress, open_regular, write_note
from corral.wire import gguf, manifest, templates
from corral.wire.errors import CorralError
from corral.wire.gguf import UNKNOWN_QUANTIZATION
from corral.wire.manifest import Layer, Manifest, ModelConfig
from corral.wire.names import Digest, ModelName

_MAX_TEXT_BYTES = 1 << 20
_MAX_KEPT = 2048
#: Grows when a note's content changes meaning.
_NOTE_VERSION = 2

#: Built-in parsers of Ollama that a config may name -> what they add. Source: model/parsers/*.go.
_TOOLS = frozenset({Capability.TOOLS})
_THINKING = frozenset({Capability.THINKING})
_PARSERS: Mapping[str, frozenset[Capability]] = {
    **dict.fromkeys(("qwen3", "qwen3-coder", "qwen3-vl-instruct", "ministral", "olmo3", "functiongemma"), _TOOLS),
    **dict.fromkeys(("gemma4-no-thinking", "glm-ocr", "lfm2"), _TOOLS),
    **dict.fromkeys(("qwen3-thinking", "qwen3.5", "ornith", "qwen3-vl-thinking", "harmony", "cogito"), _TOOLS | _THINKING),
    **dict.fromkeys(("deepseek3", "nemotron-3-nano", "nemotron-3.5-nano", "glm-4.7", "gemma4"), _TOOLS | _THINKING),
    **dict.fromkeys(("lfm2-thinking", "laguna", "poolside-v1", "cohere", "glimmer"), _TOOLS | _THINKING),
    "olmo3-think": _THINKING,
}

#: Tokens around the gap that a model fills. A file without these keys may still have them: the engine knows some by their text.
_INFILL = frozenset(f"tokenizer.ggml.fim_{part}_token_id" for part in ("pre", "suf", "mid"))

K = TypeVar("K")
V = TypeVar("V")


class WeightFacts(msgspec.Struct, frozen=True, kw_only=True):
    """What a GGUF file says of itself, ready to be listed. metadata: as JSON; arrays that were stepped over as null. tensors: the
    tensor table as JSON text, since hundreds of rows that are hardly ever asked for would take up memory as objects."""

    version: int = _NOTE_VERSION
    size_bytes: int
    architecture: str
    kind: str
    quantization: str
    parameter_count: int
    is_projector: bool
    metadata: dict[str, Any]
    tensors: msgspec.Raw = msgspec.Raw(b"[]")

    def own(self, name: str) -> object:
        """`<architecture>.<name>`, or None."""
        return self.metadata.get(f"{self.architecture}.{name}")

    @property
    def chat_template(self) -> str:
        """The Jinja template, or nothing."""
        return str(self.metadata.get("tokenizer.chat_template") or "")


class ReadFacts(Protocol):
    """Reads what the GGUF file at a path says of itself; messages name it as shown_as."""

    def __call__(self, path: Path, *, shown_as: str) -> WeightFacts: ...


class ModelBlobs:
    """The models whose blobs are in one store, and the way in for new ones. cache_dir: as for `BlobFiles`; may be shared.
    read_facts: how a file's header is read for the first time, raising as `facts_of` does."""

    def __init__(self, blobs: BlobFiles, cache_dir: Path, read_facts: ReadFacts | None = None) -> None:
        self._blobs = blobs
        self._read_facts = read_facts or facts_of
        self._headers = cache_dir / "headers"
        self._models: _Recent[Digest, Model] = _Recent()
        self._facts: _Recent[Digest, WeightFacts] = _Recent()

    def read(self, name: ModelName, body: bytes, modified_at: datetime) -> Model:
        """The model of a manifest. Weights that are missing or damaged leave the model listed, without capabilities.

        Raises: bad_request, not_found or too_large when the manifest, the config or a text layer cannot be read.
        """
        digest = Digest(sha256(body).hexdigest())
        known = self.known(name, digest, modified_at)
        return known if known is not None else self._read(name, digest, manifest.parse_manifest(body), modified_at)

    def known(self, name: ModelName, digest: Digest, modified_at: datetime) -> Model | None:
        """The model if its manifest was read lately; touches no file."""
        model = self._models.get(digest)
        return dataclasses.replace(model, name=name, modified_at=modified_at) if model is not None else None

    def facts(self, digest: Digest) -> WeightFacts:
        """What the GGUF file in that blob says of itself. Raises: bad_request, not_found."""
        size_bytes = self._blobs.size_of(digest)
        facts = self._facts.get(digest) or self._read_note(digest)
        if facts is None or facts.size_bytes != size_bytes:
            facts = self._read_facts(self._blobs.path(digest), shown_as=f"blob {digest}")
            write_note(self._note_path(digest), msgspec.json.encode(facts))
        self._facts.put(digest, facts)
        return facts

    def import_gguf(
        self, path: Path, progress: Progress, *, current: bytes | None, parameters: Mapping[str, object] | None = None
    ) -> bytes:
        """Put a GGUF file, and the config that describes it, into the store; the manifest's bytes, to be stored by the caller.

        current: the manifest that has the name now. It is the answer when its weights are this very file: what else it holds, a
        template or parameters, was somebody's wish. parameters: of a model that is new. A file that was taken in before is not
        read again until it changes.
        Raises: not_found, bad_request (with a sentence on what the file is instead), conflict, storage_full, unavailable.
        """
        known = self._blobs.known(path)
        if current is not None and known is not None and _holds_weights(current, known):
            return current
        # Looked at before it is hashed, which takes a minute for a large file, and described after that from what was stored.
        _check_runnable(facts_of(path, shown_as=path.name), path.name)
        weights = self._blobs.put_file(path, progress)
        if current is not None and _holds_weights(current, weights.digest):
            return current
        facts = self.facts(weights.digest)
        config = ModelConfig(
            model_format="gguf",
            model_family=facts.architecture,
            model_families=(facts.architecture,),
            model_type=gguf.format_parameters(facts.parameter_count),
            file_type=facts.quantization,
        )
        described = self._blobs.put_bytes(manifest.format_config(config, [weights.digest]))
        layers = [_layer(weights, manifest.MODEL_LAYER)]
        if parameters:
            layers.append(_layer(self._blobs.put_bytes(manifest.format_params(parameters)), manifest.PARAMS_LAYER))
        return manifest.format_manifest(Manifest(config=_layer(described, manifest.CONFIG_TYPE), layers=tuple(layers)))

    def _read_note(self, digest: Digest) -> WeightFacts | None:
        try:
            facts = msgspec.json.decode(self._note_path(digest).read_bytes(), type=WeightFacts)
        except (OSError, msgspec.DecodeError):
            return None
        return facts if facts.version == _NOTE_VERSION else None

    def _note_path(self, digest: Digest) -> Path:
        return self._headers / f"{digest.hex}.json"

    def _read(self, name: ModelName, digest: Digest, document: Manifest, modified_at: datetime) -> Model:
        config = self._config(document)
        weights = _last(document, manifest.MODEL_LAYER)
        facts = None if config.is_stub or weights is None else self._facts_or_none(weights.digest)
        projector = document.first(manifest.PROJECTOR_LAYER)
        encoder = None if projector is None else self._facts_or_none(projector.digest)
        template = self._text(document, manifest.TEMPLATE_LAYER) or self._text(document, manifest.PROMPT_LAYER)
        params = _last(document, manifest.PARAMS_LAYER)
        messages = _last(document, manifest.MESSAGES_LAYER)
        licenses = tuple(self._content(layer) for layer in _all(document, manifest.LICENSE_LAYER))
        model = Model(
            name=name,
            digest=digest,
            size_bytes=document.size_bytes,
            modified_at=modified_at,
            details=_details(config, facts, parent=weights.source if weights else ""),
            capabilities=capabilities_of(config, facts, template=template) | _encoder_adds(projector, encoder),
            weights=self._path(weights),
            projector=self._path(projector),
            adapters=tuple(str(self._blobs.path(layer.digest)) for layer in _all(document, manifest.ADAPTER_LAYER)),
            template=template,
            chat_template=facts.chat_template if facts else "",
            system=self._text(document, manifest.SYSTEM_LAYER),
            license="\n".join(licenses),
            licenses=licenses,
            parameters=manifest.parse_params(self._bytes(params)) if params else {},
            messages=manifest.parse_messages(self._bytes(messages)) if messages else (),
            metadata=_metadata(config, facts),
            remote_host=config.remote_host if config.is_stub else "",
            remote_model=config.remote_model if config.is_stub else "",
            draft=self._path(document.first(manifest.DRAFT_LAYER)),
            renderer=config.renderer,
            parser=config.parser,
            requires=config.requires,
            tensors=bytes(facts.tensors) if facts else b"[]",
            projector_metadata=_metadata(config, encoder) if encoder else {},
        )
        # A model without its weights is read again next time: somebody may put them back under the same digest.
        if facts is not None or weights is None or config.is_stub:
            self._models.put(digest, model)
        return model

    def _facts_or_none(self, digest: Digest) -> WeightFacts | None:
        try:
            return self.facts(digest)
        except CorralError:
            return None

    def _path(self, layer: Layer | None) -> str | None:
        return str(self._blobs.path(layer.digest)) if layer is not None else None

    def _config(self, document: Manifest) -> ModelConfig:
        if document.config is None:
            return ModelConfig()
        return manifest.parse_config(self._blobs.read(document.config.digest, max_bytes=manifest.MAX_CONFIG_BYTES))

    def _bytes(self, layer: Layer) -> bytes:
        return self._blobs.read(layer.digest, max_bytes=_MAX_TEXT_BYTES)

    def _content(self, layer: Layer) -> str:
        return self._bytes(layer).decode(errors="replace")

    def _text(self, document: Manifest, media_type: str) -> str:
        layer = _last(document, media_type)
        return self._content(layer) if layer is not None else ""


def facts_of(path: Path, *, shown_as: str) -> WeightFacts:
    """What the GGUF file at that path says of itself. Raises: not_found, bad_request; the messages name it as shown_as."""
    with open_regular(path, shown_as=shown_as) as file:
        descriptor = file.fileno()
        size_bytes = os.fstat(descriptor).st_size
        try:
            header = gguf.read_header(lambda offset, count: os.pread(descriptor, count, offset), size_bytes)
        except CorralError as error:
            raise CorralError(error.code, f"{shown_as} is {error.message}") from error
        except OSError as error:
            raise CorralError("bad_request", f"{shown_as} cannot be read: {error.strerror}") from error
    return msgspec.json.decode(msgspec.json.encode(gguf.facts_of(header, size_bytes)), type=WeightFacts)


def capabilities_of(config: ModelConfig, facts: WeightFacts | None, *, template: str) -> frozenset[Capability]:
    """What the model can do by itself. template: the Go template of the Modelfile, or nothing."""
    found = {Capability(name) for name in config.capabilities if name in _KNOWN}
    if facts is not None:
        found.add(Capability.COMPLETION if facts.own("pooling_type") is None else Capability.EMBEDDING)
        if facts.own("vision.block_count") is not None:
            found.add(Capability.VISION)
        if facts.own("audio.block_count") is not None:
            found.add(Capability.AUDIO)
        if templates.jinja_has_tools(facts.chat_template):
            found.add(Capability.TOOLS)
        if templates.jinja_has_thinking(facts.chat_template):
            found.add(Capability.THINKING)
    fields = templates.go_fields(template)
    if "tools" in fields:
        found.add(Capability.TOOLS)
    if "suffix" in fields or (facts is not None and facts.metadata.keys() >= _INFILL):
        found.add(Capability.INSERT)
    if templates.go_has_thinking(template) or config.model_family in ("gptoss", "gpt-oss"):
        found.add(Capability.THINKING)
    return frozenset(found | _PARSERS.get(config.parser, frozenset()))


def _encoder_adds(projector: Layer | None, encoder: WeightFacts | None) -> frozenset[Capability]:
    """What a projector adds to a model: sight, and hearing where its header says so."""
    if projector is None:
        return frozenset()
    hears = encoder is not None and any(
        value is True for key, value in encoder.metadata.items() if key.endswith(".has_audio_encoder")
    )
    return frozenset({Capability.VISION, Capability.AUDIO} if hears else {Capability.VISION})


_KNOWN = frozenset(Capability)


# ── Weights ────────────────────────────────────────────────────────────────────────────────────────────────


def _holds_weights(body: bytes, digest: Digest) -> bool:
    """Whether a manifest's weights are that blob; False for a manifest that cannot be read."""
    try:
        weights = _last(manifest.parse_manifest(body), manifest.MODEL_LAYER)
    except CorralError:
        return False
    return weights is not None and weights.digest == digest


def _check_runnable(facts: WeightFacts, shown_as: str) -> None:
    if facts.is_projector:
        raise CorralError("bad_request", f"{shown_as} is the image or sound encoder of a model, not a model")
    if facts.kind == "adapter":
        raise CorralError("bad_request", f"{shown_as} is an adapter for a model, not a model")
    if facts.architecture == "unknown":
        raise CorralError("bad_request", f"{shown_as} does not say which architecture it has")
    parts = facts.metadata.get("split.count")
    if isinstance(parts, int) and parts > 1:
        raise CorralError("bad_request", f"{shown_as} is one of {parts} parts; merge them first: llama-gguf-split --merge")


def _layer(blob: Blob, media_type: str) -> Layer:
    return Layer(media_type=media_type, digest=blob.digest, size_bytes=blob.size_bytes)


# ── Facts ────────────────────────────────────────────────────────────────────────────────────────────────────────────


def _metadata(config: ModelConfig, facts: WeightFacts | None) -> dict[str, object]:
    """What `model_info` shows; for a stub, what its config tells."""
    if facts is not None:
        return {**facts.metadata, "general.parameter_count": facts.parameter_count}
    if not (config.is_stub and config.model_family):
        return {}
    told = {
        "general.architecture": config.model_family,
        "general.basename": config.base_name,
        f"{config.model_family}.context_length": config.context_length,
        f"{config.model_family}.embedding_length": config.embedding_length,
    }
    return {key: value for key, value in told.items() if value}


def _details(config: ModelConfig, facts: WeightFacts | None, *, parent: str) -> ModelDetails:
    return ModelDetails(
        format=config.model_format or ("gguf" if facts else ""),
        family=config.model_family or (facts.architecture if facts else ""),
        families=config.model_families,
        parameter_size=config.model_type or (gguf.format_parameters(facts.parameter_count) if facts else ""),
        quantization_level=_quantization(config, facts),
        context_length=_usable(config.context_length) or _count(facts, "context_length"),
        embedding_length=_usable(config.embedding_length) or _count(facts, "embedding_length"),
        parent_model=parent,
    )


def _quantization(config: ModelConfig, facts: WeightFacts | None) -> str:
    is_unknown = config.file_type in ("", UNKNOWN_QUANTIZATION)
    return facts.quantization if facts is not None and is_unknown else config.file_type


def _count(facts: WeightFacts | None, name: str) -> int | None:
    return _usable(facts.own(name)) if facts is not None else None


def _usable(value: object) -> int | None:
    """The number, if it can be one of tokens or dimensions. No database holds a larger one, and no client in Go reads an answer
    with one: a single model would hide all others (T105)."""
    return value if isinstance(value, int) and 0 < value < 2**63 else None


def _all(document: Manifest, media_type: str) -> list[Layer]:
    return [layer for layer in document.layers if layer.media_type == media_type]


def _last(document: Manifest, media_type: str) -> Layer | None:
    """The last layer of that type: the one that counts where there are several."""
    return next(iter(reversed(_all(document, media_type))), None)


class _Recent(dict[K, V]):
    """A dictionary that forgets its oldest entry when it is full. Safe for threads."""

    def __init__(self) -> None:
        super().__init__()
        self._lock = threading.Lock()

    def put(self, key: K, value: V) -> None:
        """Keep the value."""
        with self._lock:
            if key not in self and len(self) >= _MAX_KEPT:
                del self[next(iter(self))]
            self[key] = value
