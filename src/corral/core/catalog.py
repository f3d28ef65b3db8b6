"""The catalog's vocabulary: what is told of a pushed model, and what people browse.

A *description* belongs to a manifest and is made once, after the push, from files that strangers wrote; until then the manifest
*waits*. A *listing* shows repositories, as far as somebody reaches.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum
from typing import Protocol

from corral.core.records import Capability, Principal
from corral.core.registry import StoredManifest, Visibility
from corral.wire.names import DEFAULT_NAMESPACE, Digest
from corral.wire.repositories import RepositoryName

#: Grows when more is told of a manifest than before; whatever has an older description is then described again.
DESCRIPTION_VERSION = 1


class Kind(StrEnum):
    """What a manifest turned out to be."""

    #: Nobody has looked yet.
    WAITING = "waiting"
    MODEL = "model"
    #: A model that another server runs.
    STUB = "stub"
    #: Not a model: an image, a chart, anything else that OCI tools push.
    ARTIFACT = "artifact"
    #: A model whose files cannot be read. It is stored and served all the same.
    UNREADABLE = "unreadable"


class Order(StrEnum):
    """What a listing begins with."""

    NEWEST = "newest"
    MOST_PULLED = "pulled"


@dataclass(frozen=True, slots=True, kw_only=True)
class Facts:
    """What a listing tells of a model in one line. size_bytes: all layers and the config."""

    kind: Kind
    size_bytes: int = 0
    family: str = ""
    parameter_size: str = ""
    quantization: str = ""
    context_length: int | None = None
    capabilities: frozenset[Capability] = frozenset()


@dataclass(frozen=True, slots=True)
class LayerFacts:
    """One blob of a manifest. kind: `model`, `license` … for those of Ollama, else its media type."""

    kind: str
    digest: Digest
    size_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Description:
    """What a model's page tells of one manifest. Texts are cut at what a page can bear. parameters: name and value as people read
    them. layers: the first ones; layer_count: how many there are. note: why an unreadable one is."""

    digest: Digest
    facts: Facts
    template: str = ""
    system: str = ""
    license: str = ""
    parameters: tuple[tuple[str, str], ...] = ()
    layers: tuple[LayerFacts, ...] = ()
    layer_count: int = 0
    note: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Reach:
    """How far somebody sees beyond what is public. namespaces: those whose owner they are, in lower case. account_id: for the
    repositories they were let into; empty for a visitor."""

    account_id: str = ""
    namespaces: frozenset[str] = frozenset()


def reach_of(caller: Principal | None) -> Reach:
    """What somebody may see: what is public, their own, where they collaborate, and for administrators the library."""
    if caller is None:
        return Reach()
    account = caller.account
    library = {DEFAULT_NAMESPACE} if account.is_admin else set()
    return Reach(account_id=account.id, namespaces=frozenset({account.name.lower()} | library))


@dataclass(frozen=True, slots=True, kw_only=True)
class CatalogEntry:
    """A repository in a listing. facts: of its tag `latest`, or of the tag that moved last; None where it has no tag."""

    repository_id: str
    namespace: str
    name: str
    visibility: Visibility
    updated_at: datetime
    pulls: int
    facts: Facts | None


@dataclass(frozen=True, slots=True, kw_only=True)
class CatalogPage:
    """A piece of a listing. after: what asks for the next piece; empty at the end."""

    entries: tuple[CatalogEntry, ...]
    after: str = ""


class Describer(Protocol):
    """Looks into what was pushed."""

    async def describe(self, stored: StoredManifest) -> Description:
        """Whatever is wrong with what was pushed ends up in the description. Raises: unavailable when it could not be tried."""
        ...


class CatalogStore(Protocol):
    """Descriptions, counters of pulls, and the index behind listings and search. Which repositories there are, and who may see
    them, it takes from the registry's own rows at each question: nothing here can make a private one visible."""

    async def undescribed(self, *, limit: int) -> Sequence[StoredManifest]:
        """Manifests without a description of the present version, those pushed last first."""
        ...

    async def describe(self, description: Description) -> None:
        """Keep it. A manifest that is gone by now is passed over."""
        ...

    async def descriptions(self, digests: Sequence[Digest]) -> Mapping[Digest, Description]:
        """Those that there are."""
        ...

    async def refresh(self, *, limit: int) -> int:
        """Bring the search index up to date with repositories that changed; how many those were, at most limit."""
        ...

    async def add_pulls(self, counts: Mapping[RepositoryName, int]) -> None:
        """How many more, by name in any case. One that is gone by now is passed over."""
        ...

    async def pulls(self, repository_id: str) -> int: ...

    async def page(
        self,
        reach: Reach,
        *,
        order: Order,
        limit: int,
        words: Sequence[str] = (),
        namespace: str = "",
        after: str = "",
    ) -> CatalogPage:
        """A piece of what is visible: of one namespace, if named, and where each word begins a word of its name, tags or facts.
        A search by most pulled looks at the newest few hundred that match. Raises: bad_request for an `after` of nobody's."""
        ...
