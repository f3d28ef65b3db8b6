"""POST /api/create, /api/copy and DELETE /api/delete: requests, their events, and the rules that need no disk.

Source: ollama api/types.go CreateRequest, ProgressResponse; server/create.go, fb30760.
"""

import re
from collections.abc import Iterable, Mapping
from typing import Any
from urllib.parse import urlsplit

import msgspec

from corral.wire.documents import parse_object
from corral.wire.errors import CorralError
from corral.wire.manifest import ModelConfig
from corral.wire.names import Digest, parse_digest
from corral.wire.native import Message

#: What a model may be made into by llama-quantize.
QUANTIZATIONS = ("F32", "F16", "Q4_K_S", "Q4_K_M", "Q8_0")
#: What it may be made out of.
UNQUANTIZED = frozenset({"F16", "BF16", "F32"})
#: Stands for the digest of a file that is being made.
WORKING_DIGEST = "0000000000000000000"

MAX_SAFETENSORS_HEADER = 100_000_000
_MAX_INFO = 2**63 - 1
_LOCAL_PORT = 11434
_SPLIT_NAME = re.compile(r"(?P<prefix>.*)-(?P<number>[0-9]{5})-of-(?P<count>[0-9]{5})\.gguf")
#: What may lie beside safetensors. No program is among it: the converter must have nothing to run and no pickle to load (T109).
_BESIDE_SAFETENSORS = re.compile(r".*\.(?:safetensors|json|jinja|txt|model)")


class CreateRequest(msgspec.Struct, frozen=True, kw_only=True):
    """POST /api/create. files, adapters, draft_files: relative name -> digest; None when not sent, which differs from empty."""

    model: str = ""
    name: str = ""
    source: str = msgspec.field(default="", name="from")
    remote_host: str = ""
    files: dict[str, str] | None = None
    adapters: dict[str, str] | None = None
    draft_files: dict[str, str] | None = None
    template: str = ""
    system: str = ""
    license: Any = None
    parameters: dict[str, Any] = {}
    messages: list[Message] = []
    quantize: str = ""
    quantization: str = ""
    draft_quantize: str = ""
    renderer: str = ""
    parser: str = ""
    requires: str = ""
    info: dict[str, Any] = {}
    stream: bool | None = None

    @property
    def wanted(self) -> str:
        """The name to make."""
        return self.model or self.name

    @property
    def licenses(self) -> list[str]:
        """Raises: bad_request when it is neither text nor a list of texts."""
        texts = self.license if isinstance(self.license, list) else [self.license]
        if not all(isinstance(text, str) or text is None for text in texts):
            raise CorralError("bad_request", "license must be a text or a list of texts")
        return [text for text in texts if text]


class CopyRequest(msgspec.Struct, frozen=True, kw_only=True):
    """POST /api/copy."""

    source: str = ""
    destination: str = ""


class DeleteRequest(msgspec.Struct, frozen=True, kw_only=True):
    """DELETE /api/delete. name: what older clients send instead of model."""

    model: str = ""
    name: str = ""


class ProgressEvent(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One event of create, pull and push. total, completed: bytes of what digest names."""

    status: str
    digest: str = ""
    total: int = 0
    completed: int = 0


def parse_blob_digest(text: str) -> Digest:
    """As paths and requests name blobs: `sha256:` or `sha256-` and 64 lower-case hex digits. Raises: bad_request."""
    return parse_digest(text.replace("-", ":", 1) if text.startswith("sha256-") else text)


def parse_files(files: Mapping[str, str] | None) -> dict[str, Digest]:
    """Relative names with their digests, in order of the names. Raises: bad_request with Ollama's texts."""
    parsed = {}
    for name, digest in sorted((files or {}).items()):
        if not is_local_path(name):
            raise CorralError("bad_request", "file path must be relative")
        parsed[name] = parse_blob_digest(digest)
    return parsed


def is_local_path(text: str) -> bool:
    """Whether a name with slashes stays below the directory it is put in (T108). Backslashes separate on other systems."""
    is_plain = text.isprintable() and "\\" not in text and len(text) <= 1024
    return is_plain and not {"", ".", ".."} & set(text.split("/"))


def split_name(name: str) -> tuple[str, int, int] | None:
    """(prefix, number from 1, count) of a part of a split GGUF file, by its name; None for any other."""
    found = _SPLIT_NAME.fullmatch(name.rpartition("/")[2])
    return (found["prefix"], int(found["number"]), int(found["count"])) if found else None


def may_lie_beside_safetensors(name: str) -> bool:
    """Whether a converter may be given that file."""
    return _BESIDE_SAFETENSORS.fullmatch(name) is not None


def safetensors_header_size(head: bytes, size_bytes: int) -> int:
    """Bytes of the JSON header behind the first eight. head: at least those eight. Raises: bad_request."""
    length = int.from_bytes(head[:8], "little")
    if len(head) < 8 or not 2 <= length <= min(size_bytes - 8, MAX_SAFETENSORS_HEADER):
        raise CorralError("bad_request", "not a usable safetensors file: its header is longer than the file or the limit")
    return length


def check_safetensors_header(header: bytes, data_bytes: int) -> None:
    """Check that every tensor lies inside the file. data_bytes: what follows the header. Raises: bad_request."""
    for name, entry in parse_object(header, MAX_SAFETENSORS_HEADER, "safetensors header").items():
        if name == "__metadata__":
            continue
        if not _is_span(entry.get("data_offsets") if isinstance(entry, dict) else None, data_bytes):
            raise CorralError("bad_request", f"not a usable safetensors file: the tensor {name[:80]!r} lies outside of it")


def _is_span(value: object, size_bytes: int) -> bool:
    if not (isinstance(value, list) and len(value) == 2 and all(type(offset) is int for offset in value)):
        return False
    return bool(0 <= value[0] <= value[1] <= size_bytes)


def parse_remote_host(text: str) -> str:
    """A base URL as Ollama keeps it in a stub: scheme and port always there. Raises: bad_request `bad remote`."""
    if text.startswith("/"):
        return f"http://localhost:{_LOCAL_PORT}{_clean(text)}"
    if "://" not in text:
        text = f"http://{text}"
    if text == "http://ollama.com":
        text = "https://ollama.com:443"
    try:
        parts = urlsplit(text)
        port = parts.port
    except ValueError:
        raise CorralError("bad_request", "bad remote") from None
    host = parts.hostname or "localhost"
    # A user name or password would be shown to everybody who lists models.
    if not parts.scheme or parts.username is not None or not re.fullmatch(r"[A-Za-z0-9._:-]+", host) or parts.query:
        raise CorralError("bad_request", "bad remote")
    shown = f"[{host}]" if ":" in host else host
    # Ollama adds its own port to https as well, where nothing listens; 443 is what somebody who writes https means.
    default = 443 if parts.scheme == "https" else _LOCAL_PORT
    return f"{parts.scheme}://{shown}:{default if port is None else port}{_clean(parts.path)}"


def _clean(path: str) -> str:
    kept: list[str] = []
    for part in path.split("/"):
        if part == "..":
            kept = kept[:-1]
        elif part not in ("", "."):
            kept.append(part)
    return "".join(f"/{part}" for part in kept)


def with_info(config: ModelConfig, info: Mapping[str, Any]) -> ModelConfig:
    """The config with what a request says about the model. Raises: bad_request with Ollama's texts."""
    changes: dict[str, Any] = {}
    fields = {"model_family": "model_family", "base_name": "base_name", "file_type": "quantization_level"}
    for name, asked in {**fields, "model_type": "parameter_size"}.items():
        value = info.get(asked, "")
        if not isinstance(value, str):
            raise CorralError("bad_request", f'info field "{asked}" must be a string')
        if value:
            changes[name] = value
    if "model_family" in changes:
        changes["model_families"] = (changes["model_family"],)
    for name in ("context_length", "embedding_length"):
        number = _count(name, info.get(name, 0))
        if number:
            changes[name] = number
    capabilities = info.get("capabilities")
    if isinstance(capabilities, list):
        changes["capabilities"] = _union(config.capabilities, (text for text in capabilities if isinstance(text, str) and text))
    return msgspec.structs.replace(config, **changes)


def _count(name: str, value: object) -> int:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise CorralError("bad_request", f'info field "{name}" must be a number')
    # The bounds come first: int() of an infinite float raises.
    if not 0 <= value <= _MAX_INFO or value != int(value):
        raise CorralError("bad_request", f'info field "{name}" must be a non-negative integer')
    return int(value)


def _union(known: tuple[str, ...], more: Iterable[str]) -> tuple[str, ...]:
    return tuple(dict.fromkeys([*known, *more]))


def quantization_of(text: str) -> str:
    """A kind of quantization in upper case. Raises: bad_request with Ollama's text and its status 500."""
    kind = text.upper()
    if kind not in QUANTIZATIONS:
        supported = ", ".join(QUANTIZATIONS)
        raise CorralError("bad_request", f"unsupported quantization type {kind} - supported types are {supported}", status=500)
    return kind
