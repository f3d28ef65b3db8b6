"""Repository names and tags: the union of what Ollama and what OCI tools write. They compare without regard to case.

Settings read them, and with settings every start of the command line: nothing heavy is imported here. Sources: ollama
types/model/name.go, fb30760; distribution-spec 1.1.
"""

import re
from dataclasses import dataclass
from functools import lru_cache

from corral.wire.errors import CorralError

_MAX_NAME = 255
_OCI_COMPONENT = r"[a-z0-9]+(?:(?:\.|_|__|-+)[a-z0-9]+)*"
_OCI_NAME = re.compile(rf"{_OCI_COMPONENT}(?:/{_OCI_COMPONENT})+")
_OLLAMA_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_-]{0,79}/[A-Za-z0-9_][A-Za-z0-9_.-]{0,79}")
# OCI's rule, which holds all that Ollama takes.
_TAG = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,127}")


@dataclass(frozen=True, slots=True)
class RepositoryName:
    """A valid repository name. namespace: the first component, whose account owns it. name: the rest; it may hold slashes. No
    component begins with a dot or a dash."""

    namespace: str
    name: str

    def __str__(self) -> str:
        return f"{self.namespace}/{self.name}"

    @property
    def key(self) -> "RepositoryName":
        """The same name in lower case: equal for names that differ only by case."""
        return RepositoryName(self.namespace.lower(), self.name.lower())


# A push or pull names one repository hundreds of times. Only valid names are kept: a refusal is raised anew each time.
@lru_cache(maxsize=1024)
def parse_repository(text: str) -> RepositoryName:
    """A name of two components as Ollama writes it, or of two and more as OCI tools do; at most 255 characters. Raises:
    name_invalid."""
    if len(text) > _MAX_NAME or not (_OLLAMA_NAME.fullmatch(text) or _OCI_NAME.fullmatch(text)):
        raise CorralError("name_invalid", "a repository's name is NAMESPACE/NAME: letters, digits and . _ - inside")
    namespace, _, name = text.partition("/")
    return RepositoryName(namespace, name)


def is_tag(text: str) -> bool:
    """Whether a manifest's reference can be a tag."""
    return _TAG.fullmatch(text) is not None


def parse_tag(text: str) -> str:
    """A tag that something is to be pushed to, as written. Raises: manifest_invalid."""
    if not is_tag(text):
        raise CorralError("manifest_invalid", "a tag is up to 128 letters, digits and . _ - and begins with none of . -")
    return text


def is_reserved_tag(tag: str) -> bool:
    """Whether clients read the tag as where to run a model, so that it could never be pulled under that name."""
    lowered = tag.lower()
    return lowered in ("local", "cloud") or lowered.endswith("-cloud")
