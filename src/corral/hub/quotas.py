"""How much may be stored: the quotas of namespaces and repositories, and what the disk has left.

What is arriving counts before it is stored, so that many pushes at once cannot each use up the same room (T40). A count is never
too small: what was stored while the sum was being read may be counted twice, which matters only at the very edge of a quota.
"""

import contextlib
from collections.abc import AsyncIterator, Iterator, Sequence
from dataclasses import dataclass

from corral.core.ports import AccountStore
from corral.core.registry import RegistryFiles, RegistryStore, Repository
from corral.hub.repositories import is_hub_namespace
from corral.wire.errors import CorralError
from corral.wire.repositories import RepositoryName
from corral.wire.units import format_size

#: Kept free for the database, which must still take revocations when the disk is full of blobs.
HEADROOM_BYTES = 256 << 20
#: How much may come of something of unknown length until the disk is looked at again.
_LOOK_EVERY_BYTES = 8 << 20


@dataclass(slots=True)
class _Tally:
    """What is arriving under one quota now, and what has arrived since somebody began to watch. users: who watch."""

    arriving_bytes: int = 0
    arrived_bytes: int = 0
    users: int = 0


@dataclass(frozen=True, slots=True)
class _Limit:
    """A quota as one reservation sees it. stored_bytes: read after arrived_before was noted."""

    quota_bytes: int
    what: str
    tally: _Tally
    arrived_before: int
    stored_bytes: int

    @property
    def taken_bytes(self) -> int:
        return self.stored_bytes + self.tally.arrived_bytes - self.arrived_before + self.tally.arriving_bytes

    def has_room(self, count: int) -> bool:
        return self.taken_bytes + count <= self.quota_bytes

    @property
    def refusal(self) -> str:
        taken = f"{format_size(self.taken_bytes)} of it taken"
        return f"the storage of {self.what} has no room for that; its quota is {format_size(self.quota_bytes)}, {taken}"


@dataclass(frozen=True, slots=True, kw_only=True)
class StorageUse:
    """What a namespace or a repository takes up, and how much it may. quota_bytes: None for as much as there is."""

    stored_bytes: int
    quota_bytes: int | None


@dataclass(slots=True)
class _Disk:
    """The disk that everything arrives on. awaited_bytes: of what was let in, those that have not arrived yet."""

    files: RegistryFiles
    headroom_bytes: int
    awaited_bytes: int = 0

    async def check(self, keep_free_bytes: int = 0) -> None:
        """Raises: storage_full when what is awaited, from whomever, does not fit."""
        if await self.files.free_bytes() - max(self.headroom_bytes, keep_free_bytes) < self.awaited_bytes:
            raise CorralError("storage_full")


@dataclass(slots=True)
class Reservation:
    """Room that is taken while something arrives. _disk: None for what is there already. _next_look: how much may have arrived
    beyond what was announced until the disk is looked at again."""

    _limits: list[_Limit]
    _disk: _Disk | None
    _taken: int = 0
    _arrived: int = 0
    _next_look: int = 0
    _is_kept: bool = False

    def take(self, count: int) -> None:
        """Take room for so many bytes more. Raises: forbidden when a quota has none."""
        for limit in self._limits:
            if not limit.has_room(count):
                raise CorralError("forbidden", limit.refusal)
        self._taken += count
        self._await(count)
        for limit in self._limits:
            limit.tally.arriving_bytes += count

    async def counted(self, chunks: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
        """The chunks as they arrive, with room taken for each that was not announced. Raises: forbidden, storage_full."""
        async for chunk in chunks:
            await self._take_unannounced(self._arrived + len(chunk) - self._taken)
            self._arrived += len(chunk)
            self._await(-len(chunk))
            yield chunk

    async def _take_unannounced(self, count: int) -> None:
        if count <= 0:
            return
        self.take(count)
        if self._disk is not None and self._taken >= self._next_look:
            self._next_look = self._taken + _LOOK_EVERY_BYTES
            await self._disk.check()

    def _await(self, count: int) -> None:
        if self._disk is not None:
            self._disk.awaited_bytes += count

    def keep(self) -> None:
        """What arrived is stored now."""
        self._is_kept = True

    def close(self) -> None:
        """Give the room back, to the store's own count if it was kept."""
        self._await(self._arrived - self._taken)
        for limit in self._limits:
            limit.tally.arriving_bytes -= self._taken
            limit.tally.arrived_bytes += self._taken if self._is_kept else 0


class Quotas:
    """Room on this hub. default_bytes: what an account may store that has no quota of its own; 0 sets no limit. headroom_bytes:
    of the disk, kept free."""

    def __init__(
        self,
        *,
        store: RegistryStore,
        files: RegistryFiles,
        accounts: AccountStore,
        default_bytes: int = 0,
        headroom_bytes: int = HEADROOM_BYTES,
    ) -> None:
        self._store = store
        self._accounts = accounts
        self._default_bytes = default_bytes
        self._disk = _Disk(files, headroom_bytes)
        # Only those that somebody watches: nothing is kept of a namespace that nobody pushes to.
        self._tallies: dict[str, _Tally] = {}

    async def use_of(self, namespace: str) -> StorageUse:
        """What is stored under a name now, uploads under way included."""
        quota_bytes = await self._quota_of_namespace(namespace)
        return StorageUse(stored_bytes=await self._store.stored_bytes(namespace), quota_bytes=quota_bytes)

    async def use_of_repository(self, name: RepositoryName) -> tuple[str, StorageUse]:
        """The repository's path, and the same of it. Raises: name_unknown."""
        found = await self._store.repository(name.namespace, name.name)
        if found is None:
            raise CorralError("name_unknown")
        stored = await self._store.stored_bytes(found.namespace, repository_id=found.id)
        return found.path, StorageUse(stored_bytes=stored, quota_bytes=found.quota_bytes)

    async def check(self, repository: Repository, count: int) -> None:
        """Refuse what cannot be stored before a byte of it is read. Raises: forbidden, storage_full."""
        async with self.reserved(repository, count):
            pass

    @contextlib.asynccontextmanager
    async def reserved(self, repository: Repository, count: int, *, keep_free_bytes: int = 0) -> AsyncIterator[Reservation]:
        """Room for so many bytes while the block runs; more can be taken as it turns out to be needed. keep_free_bytes: of the
        disk, where that is more than for everybody. Raises: forbidden, storage_full."""
        async with self._taken(repository, count, self._disk) as reservation:
            # Looked at when it was taken: else all who ask at once would find the same room free.
            await self._disk.check(keep_free_bytes)
            yield reservation

    @contextlib.asynccontextmanager
    async def linked(self, repository: Repository, count: int) -> AsyncIterator[Reservation]:
        """The same for what is on the disk already. Raises: forbidden."""
        async with self._taken(repository, count, None) as reservation:
            yield reservation

    @contextlib.asynccontextmanager
    async def _taken(self, repository: Repository, count: int, disk: _Disk | None) -> AsyncIterator[Reservation]:
        with contextlib.ExitStack() as watching:
            limits = []
            for what, quota_bytes, repository_id in await self._quotas_of(repository):
                tally = watching.enter_context(self._watched(repository_id or what))
                arrived_before = tally.arrived_bytes
                stored = await self._store.stored_bytes(repository.namespace, repository_id=repository_id)
                limits.append(_Limit(quota_bytes, what, tally, arrived_before, stored))
            reservation = Reservation(limits, disk)
            try:
                reservation.take(count)
                yield reservation
            finally:
                reservation.close()

    async def _quotas_of(self, repository: Repository) -> Sequence[tuple[str, int, str]]:
        """(what, its quota, the repository's id where it is one of a repository)."""
        quotas = []
        quota_bytes = await self._quota_of_namespace(repository.namespace)
        if quota_bytes is not None:
            quotas.append((repository.namespace, quota_bytes, ""))
        if repository.quota_bytes is not None:
            quotas.append((repository.path, repository.quota_bytes, repository.id))
        return quotas

    async def _quota_of_namespace(self, namespace: str) -> int | None:
        # What is in the hub's own namespaces is the administrators', who need no quota to know how large their disk is.
        if is_hub_namespace(namespace):
            return None
        owner = await self._accounts.by_name(namespace)
        if owner is not None and owner.quota_bytes is not None:
            return owner.quota_bytes
        return self._default_bytes or None

    @contextlib.contextmanager
    def _watched(self, key: str) -> Iterator[_Tally]:
        tally = self._tallies.setdefault(key, _Tally())
        tally.users += 1
        try:
            yield tally
        finally:
            tally.users -= 1
            if not tally.users:
                del self._tallies[key]
