"""A CatalogStore in memory, over the rows of a FakeRegistryStore, and a Describer that reads nothing."""

import re
from collections.abc import Mapping, Sequence

from corral.core.catalog import CatalogEntry, CatalogPage, Description, Facts, Kind, Order, Reach
from corral.core.registry import Repository, StoredManifest, Visibility
from corral.hub.repositories import is_hub_namespace
from corral.wire.errors import CorralError
from corral.wire.names import DEFAULT_TAG, Digest
from corral.wire.repositories import RepositoryName
from fakes import MemoryAccounts
from fakes_registry import FakeRegistryStore


class MemoryCatalog:
    """A CatalogStore. Searches look at everything, so there is nothing to refresh."""

    def __init__(self, registry: FakeRegistryStore, accounts: MemoryAccounts) -> None:
        self._registry = registry
        self._accounts = accounts
        self._described: dict[Digest, Description] = {}
        self._pulls: dict[tuple[str, str], int] = {}

    async def undescribed(self, *, limit: int) -> Sequence[StoredManifest]:
        contents = reversed(self._registry._contents.values())
        every = {digest: new.manifest for content in contents for digest, new in reversed(content.manifests.items())}
        return [stored for digest, stored in every.items() if digest not in self._described][:limit]

    async def describe(self, description: Description) -> None:
        if any(description.digest in content.manifests for content in self._registry._contents.values()):
            self._described[description.digest] = description

    async def descriptions(self, digests: Sequence[Digest]) -> Mapping[Digest, Description]:
        return {digest: self._described[digest] for digest in digests if digest in self._described}

    async def refresh(self, *, limit: int) -> int:
        return 0

    async def add_pulls(self, counts: Mapping[RepositoryName, int]) -> None:
        for name, count in counts.items():
            key = (name.key.namespace, name.key.name)
            self._pulls[key] = self._pulls.get(key, 0) + count

    async def pulls(self, repository_id: str) -> int:
        found = self._registry._repositories.get(repository_id)
        return self._pulls_of(found) if found else 0

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
        if after and not re.fullmatch(r"[0-9]{1,18}\.[A-Za-z0-9_-]{1,64}", after):
            raise CorralError("bad_request")
        found = [
            repository
            for repository in self._registry._repositories.values()
            if await self._is_visible(repository, reach)
            and namespace.lower() in ("", repository.namespace.lower())
            and self._matches(repository, words)
        ]

        def rank(repository: Repository) -> tuple[int, str]:
            newest = int(repository.updated_at.timestamp() * 1_000_000)
            return (newest if order is Order.NEWEST else self._pulls_of(repository)), repository.id

        found.sort(key=rank, reverse=True)
        if after:
            number, _, repository_id = after.partition(".")
            found = [repository for repository in found if rank(repository) < (int(number), repository_id)]
        shown = found[:limit]
        cursor = "{}.{}".format(*rank(shown[-1])) if len(found) > limit else ""
        return CatalogPage(entries=tuple(map(self._entry, shown)), after=cursor)

    def _entry(self, repository: Repository) -> CatalogEntry:
        tags = self._registry._contents[repository.id].tags
        digest = tags.get(DEFAULT_TAG, max(tags.values(), key=lambda tag: tag[1], default=(None,)))[0]
        described = self._described.get(digest) if digest else None
        return CatalogEntry(
            repository_id=repository.id,
            namespace=repository.namespace,
            name=repository.name,
            visibility=repository.visibility,
            updated_at=repository.updated_at,
            pulls=self._pulls_of(repository),
            facts=described.facts if described else Facts(kind=Kind.WAITING) if digest else None,
        )

    async def _is_visible(self, repository: Repository, reach: Reach) -> bool:
        owner = await self._accounts.by_name(repository.namespace)
        is_alive = bool(repository.mirrored_from) or is_hub_namespace(repository.namespace) or (owner and owner.is_active)
        if repository.namespace.lower() in reach.namespaces:
            return True
        rights = self._registry._contents[repository.id].rights
        return bool(is_alive) and (repository.visibility is Visibility.PUBLIC or reach.account_id in rights)

    def _matches(self, repository: Repository, words: Sequence[str]) -> bool:
        content = self._registry._contents[repository.id]
        described = [self._described[digest].facts for digest, _ in content.tags.values() if digest in self._described]
        texts = [repository.path, *content.tags]
        texts += [" ".join((facts.family, facts.parameter_size, facts.quantization, *facts.capabilities)) for facts in described]
        there = re.findall(r"[^\W_]+", " ".join(texts).lower())
        wanted = [piece for word in words for piece in re.findall(r"[^\W_]+", word.lower())]
        return (bool(wanted) or not words) and all(any(word.startswith(piece) for word in there) for piece in wanted)

    def _pulls_of(self, repository: Repository) -> int:
        return self._pulls.get((repository.namespace.lower(), repository.name.lower()), 0)


class PlainDescriber:
    """A Describer that takes everything for one kind of model. fails: raise instead, so often."""

    def __init__(self, facts: Facts, *, fails: int = 0) -> None:
        self.facts = facts
        self.fails = fails
        self.seen: list[Digest] = []

    async def describe(self, stored: StoredManifest) -> Description:
        if self.fails:
            self.fails -= 1
            raise CorralError("unavailable", "no process could be started")
        self.seen.append(stored.digest)
        return Description(digest=stored.digest, facts=self.facts)
