"""Model names and digests: the grammar, the defaults, and the `:cloud`, `-cloud` and `:local` suffixes.

A name is `[scheme://][host/][namespace/]model[:tag]`. The tag is what follows the last `:` behind the last `/`. Names compare
without regard to case. Source: ollama types/model/name.go and internal/modelref.
"""

import re
from dataclasses import dataclass
from enum import StrEnum
from functools import lru_cache

from corral.wire.errors import CorralError

DEFAULT_HOST = "registry.ollama.ai"
DEFAULT_NAMESPACE = "library"
DEFAULT_TAG = "latest"

# The first character is a letter, digit or underscore; only a host may hold a colon, a namespace may not hold a dot.
_HOST = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.:-]{0,349}")
_NAMESPACE = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_-]{0,79}")
_MODEL = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,79}")
_TAG = _MODEL
_DIGEST = re.compile(r"sha256:[0-9a-f]{64}")
_CONTENT_DIGEST = re.compile(r"sha256:[0-9a-f]{64}|sha512:[0-9a-f]{128}")


@dataclass(frozen=True, slots=True)
class ModelName:
    """A complete, valid name; every part is safe as a single path component (`..` and separators cannot occur)."""

    host: str
    namespace: str
    model: str
    tag: str

    def __str__(self) -> str:
        return f"{self.host}/{self.namespace}/{self.model}:{self.tag}"

    @property
    def repository(self) -> str:
        """`namespace/model`."""
        return f"{self.namespace}/{self.model}"

    @property
    def short(self) -> str:
        """The shortest form that means the same, always with its tag, as listings show it."""
        if self.host != DEFAULT_HOST:
            return str(self)
        if self.namespace != DEFAULT_NAMESPACE:
            return f"{self.repository}:{self.tag}"
        return f"{self.model}:{self.tag}"

    @property
    def key(self) -> "ModelName":
        """The same name in lower case: equal for names that differ only by case."""
        return ModelName(self.host.lower(), self.namespace.lower(), self.model.lower(), self.tag.lower())


# Every request names a model, and most of them the same few. Only valid names are kept: a refusal is raised anew each time.
@lru_cache(maxsize=4096)
def parse_name(text: str) -> ModelName:
    """Complete a model name with the defaults. Raises: bad_request `invalid model name`."""
    head, slash, last = text.rpartition("/")
    model, colon, tag = last.rpartition(":")
    if not colon:
        model, tag = last, DEFAULT_TAG
    host, namespace = DEFAULT_HOST, DEFAULT_NAMESPACE
    if slash:
        host_part, two, namespace = head.rpartition("/")
        # A scheme belongs to a host: `file://x` names nothing.
        host = host_part.split("://", 1)[-1] if two else DEFAULT_HOST
    parts = ((_HOST, host), (_NAMESPACE, namespace), (_MODEL, model), (_TAG, tag))
    if not all(pattern.fullmatch(part) for pattern, part in parts):
        raise CorralError("bad_request", "invalid model name")
    return ModelName(host, namespace, model, tag)


class Source(StrEnum):
    """Where the caller asks a model to run."""

    UNSPECIFIED = "unspecified"
    LOCAL = "local"
    CLOUD = "cloud"


@dataclass(frozen=True, slots=True)
class ModelReference:
    """What a request's `model` asks for. base: the name without its source suffix, as written."""

    base: str
    source: Source


def parse_reference(text: str) -> ModelReference:
    """Split a source suffix off a model name, and the blanks around it, before the name itself is parsed. Raises: bad_request for
    two suffixes."""
    text = text.strip()
    base, source = _split_source(text)
    _, second = _split_source(base)
    if source is not Source.UNSPECIFIED and second is not Source.UNSPECIFIED:
        raise CorralError("bad_request", f'use either :local or :cloud, not both: "{text}"')
    return ModelReference(base, source)


def _split_source(text: str) -> tuple[str, Source]:
    head, colon, last = text.rpartition(":")
    if not colon or "/" in last:
        return text, Source.UNSPECIFIED
    suffix = last.strip().lower()
    if suffix == "cloud":
        return head, Source.CLOUD
    if suffix == "local":
        return head, Source.LOCAL
    if suffix.endswith("-cloud") and len(suffix) > len("-cloud"):
        return f"{head}:{last.strip()[: -len('-cloud')]}", Source.CLOUD
    return text, Source.UNSPECIFIED


def cloud_tag(base: str) -> str:
    """The stub's name for a cloud model: `m:20b` -> `m:20b-cloud`, `m` -> `m:cloud`."""
    _, colon, last = base.rpartition(":")
    return f"{base}-cloud" if colon and "/" not in last else f"{base}:cloud"


@dataclass(frozen=True, slots=True)
class Digest:
    """A content digest. Holding one means that it is well formed, so it is safe in a path. algorithm: Ollama knows `sha256` only;
    a registry also takes `sha512`."""

    hex: str
    algorithm: str = "sha256"

    def __str__(self) -> str:
        return f"{self.algorithm}:{self.hex}"

    @property
    def file_name(self) -> str:
        """The blob's file name in Ollama's layout."""
        return f"{self.algorithm}-{self.hex}"


def parse_digest(text: str) -> Digest:
    """Exactly `sha256:` and 64 lower-case hex digits. Raises: bad_request `invalid digest format`."""
    if not _DIGEST.fullmatch(text):
        raise CorralError("bad_request", "invalid digest format")
    return Digest(text.removeprefix("sha256:"))


def parse_content_digest(text: str) -> Digest:
    """As registries take it: `sha256:` and 64, or `sha512:` and 128 lower-case hex digits. Raises: digest_invalid."""
    if not _CONTENT_DIGEST.fullmatch(text):
        raise CorralError("digest_invalid", "a digest is sha256: or sha512: and lower-case hex digits")
    algorithm, _, digits = text.partition(":")
    return Digest(digits, algorithm)
