"""Collecting: what nobody needs any more is removed while the hub runs, in small steps, without ever racing a push.

```
upload that nobody touched for a day            its row, then its file
link of a blob that no manifest names           once its lease is past
repository that nobody pushed a manifest to     once it is a day old and holds nothing any more
blob that nobody links                          once its lease is past: condemned, then its file, then its row
upload file without a row, temporary file       once it is an hour old
blob file without a row                         once it is a day old: it gets a row with a lease that is past, and goes as above
```

Nothing is decided by the age of a blob's file. Whoever is about to place or link a blob leases it first, and the store gives no
lease of a condemned blob; so between condemning and forgetting nobody can count on the file that is removed there.
"""

import asyncio
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from datetime import datetime, timedelta

from corral.core.ports import Clock
from corral.core.registry import RegistryFiles, RegistryStore
from corral.hub.uploads import IDLE_AFTER, TOMBSTONE_LIFE, Uploads
from corral.wire.names import Digest

#: How often a running hub collects, and how soon after its start for the first time: what was condemned before a crash can be
#: neither pushed nor mounted until then.
COLLECT_EVERY_S, COLLECT_FIRST_S = 3600.0, 10.0
#: A file without a row may belong to a publication that is under way; none takes this long to come to its row.
_ORPHAN_AFTER = timedelta(days=1)
#: Rows of one transaction: those who push wait for it.
_AT_ONCE = 200
_FAR = timedelta(days=10_000)


@dataclass(frozen=True, slots=True, kw_only=True)
class Collected:
    """What was removed, or could be. uploads: given up or long finished. links: of blobs to repositories. repositories: that no
    push came to an end in. blobs, size_bytes: that nobody linked any more. files: left behind by killed processes."""

    uploads: int = 0
    links: int = 0
    repositories: int = 0
    blobs: int = 0
    size_bytes: int = 0
    files: int = 0

    @property
    def is_empty(self) -> bool:
        """Whether there was nothing to do."""
        return not any(asdict(self).values())


class Collector:
    """Removes what nobody needs. alone: holds off every other collector of this hub, in other processes too, while its block
    runs, and raises conflict when one is at it: two would remove the file of a blob that came back between them."""

    def __init__(
        self,
        *,
        store: RegistryStore,
        files: RegistryFiles,
        uploads: Uploads,
        clock: Clock,
        alone: Callable[[], AbstractContextManager[None]],
    ) -> None:
        self._store = store
        self._files = files
        self._uploads = uploads
        self._clock = clock
        self._alone = alone

    async def collect(self) -> Collected:
        """Do everything once. Raises: conflict when another collector is at it; unavailable."""
        with self._alone():
            uploads = await self._uploads.purge()
            links = await self._unlink()
            repositories = await self._remove_repositories()
            known = await self._store.idle_uploads(open_before=self._for_ever, finished_before=self._for_ever)
            files = await self._files.remove_strays(known, now=self._clock.now())
            await self._adopt_orphans()
            blobs, size_bytes = await self._remove_blobs()
        return Collected(uploads=uploads, links=links, repositories=repositories, blobs=blobs, size_bytes=size_bytes, files=files)

    async def survey(self) -> Collected:
        """What `collect` would remove, but for the files that killed processes left of uploads and for repositories that hold
        nothing, which are only found by removing them. Changes nothing."""
        now = self._clock.now()
        uploads = await self._store.idle_uploads(open_before=now - IDLE_AFTER, finished_before=now - TOMBSTONE_LIFE)
        garbage = await self._store.garbage(now=now)
        orphans = [self._files.size_of(digest) or 0 for digest in await self._orphans()]
        return Collected(
            uploads=len(uploads),
            links=garbage.links,
            blobs=garbage.blobs + len(orphans),
            size_bytes=garbage.size_bytes + sum(orphans),
        )

    @property
    def _for_ever(self) -> datetime:
        return self._clock.now() + _FAR

    async def _unlink(self) -> int:
        links = 0
        while removed := await self._store.unnamed_links(now=self._clock.now(), limit=_AT_ONCE):
            links += removed
            await asyncio.sleep(0)
        return links

    async def _remove_repositories(self) -> int:
        repositories, before = 0, self._clock.now() - IDLE_AFTER
        while removed := await self._store.remove_unused_repositories(created_before=before, limit=_AT_ONCE):
            repositories += removed
            await asyncio.sleep(0)
        return repositories

    async def _orphans(self) -> list[Digest]:
        """Blob files that no row tells of."""
        before = self._clock.now() - _ORPHAN_AFTER
        return [
            digest
            async for digest, changed_at in self._files.blobs_on_disk()
            if changed_at < before and not await self._store.is_known_blob(digest)
        ]

    async def _adopt_orphans(self) -> None:
        # Not removed here: somebody may be about to place the same blob. As a row it is condemned by the same rules as any.
        for digest in await self._orphans():
            size_bytes = self._files.size_of(digest)
            if size_bytes is not None:
                await self._store.lease_blob(digest, size_bytes, until=self._clock.now())

    async def _remove_blobs(self) -> tuple[int, int]:
        blobs = size_bytes = 0
        while condemned := await self._store.condemn_blobs(now=self._clock.now(), limit=_AT_ONCE):
            for digest, size in condemned:
                await self._files.remove_blob(digest)
                await self._store.forget_blob(digest)
                blobs, size_bytes = blobs + 1, size_bytes + size
        return blobs, size_bytes
