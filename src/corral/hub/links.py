"""Which blobs a repository has, and how it comes to have one that is on this hub already.

A blob's right to be read is its link to a repository, never the file. A link is made from content that was just uploaded, or from
another repository that the same caller may pull from: nobody learns by a digest what others have (T30-T32).
"""

import logging
from collections import OrderedDict
from datetime import datetime, timedelta

from corral.core.ports import Clock
from corral.core.records import Principal
from corral.core.registry import RegistryFiles, RegistryStore, Repository
from corral.hub.quotas import Quotas
from corral.hub.replay import Alarms
from corral.hub.repositories import Caller, Repositories
from corral.wire.errors import CorralError
from corral.wire.names import Digest
from corral.wire.repositories import parse_repository

#: How long content stays that no manifest names, after it was last uploaded, mounted or found: longer than the longest push.
LEASE = timedelta(hours=24)
#: A lease is renewed no more often than this.
_LEASE_GRAIN = timedelta(hours=1)
_MAX_RENEWED = 100_000

_log = logging.getLogger("corral.registry")


class BlobLinks:
    """The links between repositories and blobs."""

    def __init__(
        self, *, repositories: Repositories, quotas: Quotas, store: RegistryStore, files: RegistryFiles, clock: Clock
    ) -> None:
        self._repositories = repositories
        self._quotas = quotas
        self._store = store
        self._files = files
        self._clock = clock
        self._alarms = Alarms(clock)
        self._renewed: OrderedDict[tuple[str, Digest], datetime] = OrderedDict()

    async def size_of(self, repository: Repository, digest: Digest) -> int | None:
        """Bytes of a blob that the repository has; None for any other, and for one whose file is lost: whoever pushes it again
        heals it."""
        size_bytes = await self._store.blob_size(repository.id, digest)
        if size_bytes is None:
            return None
        if self._files.size_of(digest) != size_bytes:
            if self._alarms.is_news("blob.missing", str(digest)):
                _log.error("the file of blob %s is missing or cut short; push it again or restore it from a backup", digest)
            return None
        return size_bytes

    def is_renewal_due(self, repository: Repository, digest: Digest) -> bool:
        """Whether `renew` would write anything."""
        last = self._renewed.get((repository.id, digest))
        return last is None or self._clock.now() - last >= _LEASE_GRAIN

    async def renew(self, repository: Repository, digest: Digest) -> bool:
        """Keep a blob that the repository has from being collected: somebody was told that it need not be sent. False when it
        was collected just now."""
        now, key = self._clock.now(), (repository.id, digest)
        if not self.is_renewal_due(repository, digest):
            return True
        if not await self._store.link_blob(repository.id, digest, until=now + LEASE):
            return False
        self._renewed[key] = now
        self._renewed.move_to_end(key)
        if len(self._renewed) > _MAX_RENEWED:
            self._renewed.popitem(last=False)
        return True

    async def check_room(self, repository: Repository, count: int) -> None:
        """Refuse what the repository has no room for. Raises: forbidden for a quota; storage_full."""
        await self._quotas.check(repository, count)

    def forget(self, repository: Repository, digest: Digest) -> None:
        """The repository does not have the blob any more."""
        self._renewed.pop((repository.id, digest), None)

    async def mount(self, repository: Repository, digest: Digest, source: str, caller: Caller) -> bool:
        """Have a blob from the repository that is named. False when the caller may not pull from that, when it does not have the
        blob, and when the name is none: stock clients name repositories of other registries and files here (F23). Raises:
        forbidden when it would exceed a quota."""
        try:
            name = parse_repository(source)
        except CorralError:
            return False
        found = await self._repositories.find_readable(name, caller)
        return found is not None and await self._link(repository, digest, found)

    async def borrow(self, repository: Repository, digest: Digest, caller: Caller) -> bool:
        """Have a blob from any repository that the caller may pull from. False when there is none. Raises: as `mount`."""
        found = await self._repositories.find_source(digest, caller) if isinstance(caller, Principal) else None
        return found is not None and await self._link(repository, digest, found)

    async def _link(self, repository: Repository, digest: Digest, source: Repository) -> bool:
        size_bytes = await self.size_of(source, digest)
        if size_bytes is None:
            return False
        # Taken until it is linked, so that many who mount at once cannot each use up the same room.
        async with self._quotas.linked(repository, 0 if repository.id == source.id else size_bytes) as room:
            is_linked = await self._store.link_blob(repository.id, digest, until=self._clock.now() + LEASE)
            if is_linked:
                room.keep()
        return is_linked
