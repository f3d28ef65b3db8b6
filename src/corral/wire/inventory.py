"""Models as /api/tags, /api/ps and /api/show describe them: pure functions from a model's facts to JSON objects.

The wire knows no records, so what is needed of a model is said here as protocols, which core.records.Model and serving's
LoadedModel fit. Source: ollama api/types.go ListModelResponse, ProcessModelResponse, ShowResponse; server/routes.go
GetModelInfo; parser/parser.go.
"""

from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime
from typing import Any, Protocol

import msgspec

from corral.wire.modelfile import Instruction, format_modelfile
from corral.wire.names import Digest, ModelName
from corral.wire.native import format_time


class DetailsLike(Protocol):
    """core.records.ModelDetails."""

    @property
    def parent_model(self) -> str: ...
    @property
    def format(self) -> str: ...
    @property
    def family(self) -> str: ...
    @property
    def families(self) -> tuple[str, ...]: ...
    @property
    def parameter_size(self) -> str: ...
    @property
    def quantization_level(self) -> str: ...
    @property
    def context_length(self) -> int | None: ...
    @property
    def embedding_length(self) -> int | None: ...


class ModelLike(Protocol):
    """core.records.Model."""

    @property
    def name(self) -> ModelName: ...
    @property
    def digest(self) -> Digest: ...
    @property
    def size_bytes(self) -> int: ...
    @property
    def modified_at(self) -> datetime: ...
    @property
    def details(self) -> DetailsLike: ...
    @property
    def capabilities(self) -> Iterable[str]: ...
    @property
    def weights(self) -> str | None: ...
    @property
    def projector(self) -> str | None: ...
    @property
    def adapters(self) -> tuple[str, ...]: ...
    @property
    def template(self) -> str: ...
    @property
    def chat_template(self) -> str: ...
    @property
    def system(self) -> str: ...
    @property
    def license(self) -> str: ...
    @property
    def parameters(self) -> Mapping[str, object]: ...
    @property
    def messages(self) -> Sequence[tuple[str, str]]: ...
    @property
    def metadata(self) -> Mapping[str, object]: ...
    @property
    def remote_host(self) -> str: ...
    @property
    def remote_model(self) -> str: ...
    @property
    def licenses(self) -> tuple[str, ...]: ...
    @property
    def draft(self) -> str | None: ...
    @property
    def renderer(self) -> str: ...
    @property
    def parser(self) -> str: ...
    @property
    def requires(self) -> str: ...
    @property
    def tensors(self) -> bytes: ...
    @property
    def projector_metadata(self) -> Mapping[str, object]: ...


class LoadedLike(Protocol):
    """serving.runners.LoadedModel."""

    @property
    def model(self) -> ModelLike: ...
    @property
    def expires_at(self) -> datetime: ...
    @property
    def size_bytes(self) -> int: ...
    @property
    def vram_bytes(self) -> int: ...
    @property
    def context_length(self) -> int: ...


#: Ollama lists capabilities in the order it finds them; ours is fixed.
_CAPABILITY_ORDER = ("completion", "embedding", "vision", "audio", "tools", "insert", "thinking", "image")
#: What Ollama shows, and means, for a model without any template.
DEFAULT_TEMPLATE = "{{ .Prompt }}"
#: Shown by nothing: the name is the model's own business and the template has its own field.
_HIDDEN_METADATA = frozenset({"general.name", "tokenizer.chat_template"})


def tags_entry(model: ModelLike) -> dict[str, Any]:
    """One row of GET /api/tags."""
    return {
        "name": model.name.short,
        "model": model.name.short,
        **_remote(model),
        "modified_at": format_time(model.modified_at),
        "size": model.size_bytes,
        "digest": model.digest.hex,
        "details": _details(model.details) | _lengths(model.details),
        **_capabilities(model),
    }


def ps_entry(loaded: LoadedLike) -> dict[str, Any]:
    """One row of GET /api/ps."""
    model = loaded.model
    return {
        "name": model.name.short,
        "model": model.name.short,
        "size": loaded.size_bytes,
        "digest": model.digest.hex,
        "details": _details(model.details) | {"parent_model": ""},
        "expires_at": format_time(loaded.expires_at),
        "size_vram": loaded.vram_bytes,
        "context_length": loaded.context_length,
    }


def show_body(model: ModelLike, *, verbose: bool = False, system: str = "") -> dict[str, Any]:
    """Answer of POST /api/show. verbose: keep arrays of the metadata, and list the tensors. system: shown in place of the model's
    own, when given."""
    template = model.chat_template or model.template or DEFAULT_TEMPLATE
    system = system or model.system
    texts = {
        "license": model.license,
        "modelfile": _modelfile(model, system),
        "parameters": "\n".join(f"{name:<30} {_go_literal(value)}" for name, value in _parameters(model)),
        "template": template,
        "system": system,
    }
    return {
        **{name: text for name, text in texts.items() if text},
        "details": _details(model.details),
        **({"messages": [{"role": role, "content": text} for role, text in model.messages]} if model.messages else {}),
        **_remote(model),
        # Clients need the object even when nothing is known.
        "model_info": _model_info(model, verbose=verbose),
        **({"projector_info": _shown(model.projector_metadata, verbose=verbose)} if model.projector_metadata else {}),
        **({"tensors": msgspec.Raw(model.tensors)} if verbose and not model.remote_host else {}),
        **_capabilities(model),
        "modified_at": format_time(model.modified_at),
        **({"requires": model.requires} if model.requires else {}),
    }


def _details(details: DetailsLike) -> dict[str, Any]:
    return {
        "parent_model": details.parent_model,
        "format": details.format,
        "family": details.family,
        "families": list(details.families) or None,
        "parameter_size": details.parameter_size,
        "quantization_level": details.quantization_level,
    }


def _lengths(details: DetailsLike) -> dict[str, int]:
    lengths = {"context_length": details.context_length, "embedding_length": details.embedding_length}
    return {name: length for name, length in lengths.items() if length}


def _remote(model: ModelLike) -> dict[str, str]:
    return {"remote_model": model.remote_model, "remote_host": model.remote_host} if model.remote_host else {}


def _capabilities(model: ModelLike) -> dict[str, list[str]]:
    """Nothing for a model of which nothing is known, as Ollama leaves an empty list out."""
    given = {str(capability) for capability in model.capabilities}
    ordered = [name for name in _CAPABILITY_ORDER if name in given] + sorted(given.difference(_CAPABILITY_ORDER))
    return {"capabilities": ordered} if ordered else {}


def _model_info(model: ModelLike, *, verbose: bool) -> dict[str, Any]:
    if not model.metadata and model.remote_host:
        family, lengths = model.details.family, _lengths(model.details)
        return (
            {"general.architecture": family, **{f"{family}.{name}": length for name, length in lengths.items()}} if family else {}
        )
    return _shown(model.metadata, verbose=verbose)


def _shown(metadata: Mapping[str, object], *, verbose: bool) -> dict[str, object]:
    return {
        name: None if isinstance(value, list | tuple) and value and not verbose else value
        for name, value in sorted(metadata.items())
        if name not in _HIDDEN_METADATA
    }


def _modelfile(model: ModelLike, system: str) -> str:
    """The Modelfile that makes the same model again. The template inside the weights is none of it: it comes with them, and is of
    another language than TEMPLATE."""
    name = model.name.short
    # The path of the weights is a fact of this machine: a service that answers strangers hands in a model without it.
    lines = [Instruction("from", model.weights or name)]
    lines += [Instruction("adapter", path) for path in model.adapters]
    lines += [Instruction("draft", model.draft)] if model.draft else []
    lines += [Instruction("from", model.projector)] if model.projector else []
    texts = {"template": model.template, "system": system, "renderer": model.renderer, "parser": model.parser}
    lines += [Instruction(command, text) for command, text in texts.items() if text]
    lines += [Instruction("parameter", _plain(value), parameter) for parameter, value in _parameters(model)]
    lines += [Instruction("license", text) for text in model.licenses or (model.license,) if text]
    lines += [Instruction("message", text, role) for role, text in model.messages]
    lines += [Instruction("requires", model.requires)] if model.requires else []
    head = (
        f'# Modelfile generated by "corral show"\n# To build a new Modelfile based on this, replace FROM with:\n# FROM {name}\n\n'
    )
    return head + format_modelfile(lines)


def _parameters(model: ModelLike) -> list[tuple[str, object]]:
    """Every parameter with its value, one row per value of a list."""
    return [
        (name, item)
        for name, value in model.parameters.items()
        for item in (value if isinstance(value, list | tuple) else (value,))
    ]


def _go_literal(value: object) -> str:
    """A parameter as Go's %#v prints it."""
    if not isinstance(value, str):
        return _plain(value)
    escaped = value.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n").replace("\r", "\\r").replace("\t", "\\t")
    return f'"{escaped}"'


def _plain(value: object) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    # Numbers of a params layer come out of JSON, where 64 and 64.0 are the same number. Go would write a million as 1e+06,
    # which no integer parameter could be read back from.
    return str(int(value)) if isinstance(value, float) and value.is_integer() else str(value)
