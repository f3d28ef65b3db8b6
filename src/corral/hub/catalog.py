"""What people browse: listings, search, descriptions, and how often something was pulled.

How far somebody sees is `reach_of`; the store applies it to every row, so that nothing here has to be left out afterwards.
"""

import logging
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

from corral.core.catalog import CatalogPage, CatalogStore, Description, Order, reach_of
from corral.core.records import Principal
from corral.core.registry import RegistryStore, Repository, Right, Tag
from corral.hub.repositories import Repositories
from corral.wire.errors import CorralError
from corral.wire.names import DEFAULT_TAG, Digest
from corral.wire.registry import ScopeRequest
from corral.wire.repositories import RepositoryName, is_tag

#: Repositories of one piece of a listing.
PAGE_SIZE = 20
#: How often a background task is to call `flush`.
FLUSH_EVERY_S = 10.0
#: Tags of one piece of a repository's page.
TAGS_SHOWN = 100
MAX_QUERY = 200
#: Repositories with pulls that are not written yet. More than are pulled from in one interval.
_CAPACITY = 10_000

_log = logging.getLogger("corral.server")


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelView:
    """What the page of a repository shows. rights: what the caller may do there. tags: some, in order; more_tags: what asks for
    those behind them, empty at the end. chosen: the tag that was asked for, else `latest`, else the one that moved last; None
    where there is none. descriptions: of all these."""

    repository: Repository
    readme: str
    rights: frozenset[Right]
    pulls: int
    tags: tuple[Tag, ...]
    more_tags: str
    chosen: Tag | None
    descriptions: Mapping[Digest, Description]


class Catalog:
    """The hub's repositories as visitors find them. registry: the rows themselves, read for what may be seen."""

    def __init__(self, *, store: CatalogStore, registry: RegistryStore, repositories: Repositories) -> None:
        self._store = store
        self._registry = registry
        self._repositories = repositories
        self._pulls: Counter[RepositoryName] = Counter()

    async def browse(
        self, caller: Principal | None, *, order: Order = Order.NEWEST, namespace: str = "", after: str = ""
    ) -> CatalogPage:
        """A piece of everything the caller may see, or of one namespace. Raises: bad_request for an `after` of nobody's."""
        return await self._store.page(reach_of(caller), order=order, limit=PAGE_SIZE, namespace=namespace, after=after)

    async def search(self, caller: Principal | None, query: str, *, order: Order = Order.NEWEST, after: str = "") -> CatalogPage:
        """A piece of what holds every word of the query, as the beginning of a word of its own. Raises: as `browse`."""
        return await self._store.page(
            reach_of(caller), order=order, limit=PAGE_SIZE, words=query[:MAX_QUERY].split() or [query], after=after
        )

    async def is_visible(self, name: RepositoryName, caller: Principal | None) -> bool:
        """Whether there is such a repository for the caller."""
        return await self._repositories.find_readable(name, caller) is not None

    async def view(self, name: RepositoryName, caller: Principal | None, *, tag: str = "", after: str = "") -> ModelView | None:
        """A repository's page; None for one that is not there for the caller, or has no such tag."""
        repository = await self._repositories.find_readable(name, caller)
        if repository is None:
            return None
        listed = await self._registry.tags(repository.id, after=after, limit=TAGS_SHOWN + 1)
        tags = tuple(listed[:TAGS_SHOWN])
        chosen = await self._chosen(repository, tags, tag)
        if tag and chosen is None:
            return None
        return ModelView(
            repository=repository,
            readme=await self._registry.readme(repository.id),
            rights=await self._rights(name, caller),
            pulls=await self._store.pulls(repository.id) + self._pulls[name.key],
            tags=tags,
            more_tags=tags[-1].name if len(listed) > TAGS_SHOWN else "",
            chosen=chosen,
            descriptions=await self._store.descriptions([shown.digest for shown in (*tags, *([chosen] if chosen else ()))]),
        )

    async def _chosen(self, repository: Repository, tags: tuple[Tag, ...], asked: str) -> Tag | None:
        exact = next((tag for tag in tags if tag.name == (asked or DEFAULT_TAG)), None)
        if exact is not None or (asked and not is_tag(asked)):
            return exact
        if not asked:
            return max(tags, key=lambda tag: tag.updated_at, default=None)
        # Not among those listed: one further down, or in another spelling.
        found = await self._registry.manifest(repository.id, asked)
        if found is None:
            return None
        return Tag(
            name=asked,
            digest=found.digest,
            media_type=found.media_type,
            size_bytes=0,
            updated_at=repository.updated_at,
        )

    async def _rights(self, name: RepositoryName, caller: Principal | None) -> frozenset[Right]:
        every = ScopeRequest(kind="repository", repository=str(name), actions=frozenset(map(str, Right)))
        return frozenset(Right(action) for action in await self._repositories.grantable(caller, every))

    def count_pull(self, name: RepositoryName) -> None:
        """Note that somebody fetched a manifest. Never waits and never fails."""
        if len(self._pulls) < _CAPACITY or name.key in self._pulls:
            self._pulls[name.key] += 1

    async def flush(self) -> None:
        """Write what was counted, every FLUSH_EVERY_S and once at the end of the process. While the database is away it waits."""
        counted, self._pulls = self._pulls, Counter()
        try:
            await self._store.add_pulls(counted)
        except CorralError as error:
            self._pulls.update(counted)
            _log.warning("counts of pulls wait for the database: %s", error.message)


def words_of(query: str) -> list[str]:
    """The words of a search, in lower case, as the pages compare them themselves."""
    return re.findall(r"[^\W_]+", query[:MAX_QUERY].lower())
