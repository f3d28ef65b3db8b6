"""Describing what was pushed, in the background: a push is answered without waiting for it.

The database itself keeps the list of what waits, so nothing is lost with the process, and what the administration commands store
is found as well. What cannot be tried now (no process can be started, the database is away) is tried again after a pause.
"""

import asyncio
import contextlib
import logging
from typing import NoReturn

from corral.core.catalog import CatalogStore, Describer
from corral.wire.errors import CorralError

#: How long at most until somebody looks whether another process stored something.
_PAUSE_S = 15.0
_BATCH = 16

_log = logging.getLogger("corral.server")


class Describing:
    """Describes manifests one at a time, newest first, and keeps the search index in step with what changed."""

    def __init__(self, store: CatalogStore, describer: Describer, *, pause_s: float = _PAUSE_S) -> None:
        self._store = store
        self._describer = describer
        self._pause_s = pause_s
        self._awake = asyncio.Event()

    def notify(self) -> None:
        """Something was pushed or changed: do not wait for the end of the pause."""
        self._awake.set()

    async def run(self) -> NoReturn:
        """Work until canceled."""
        while True:
            self._awake.clear()
            try:
                await self.catch_up()
            except CorralError as error:
                _log.warning("describing models waits: %s", error.message)
            except Exception:  # noqa: BLE001 - the outermost loop of a background task: one failure does not end it
                _log.exception("describing models failed")
            # Not wait_for: up to Python 3.11 it forgets a cancellation that comes with a push, and the hub would never end.
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self._pause_s):
                    await self._awake.wait()

    async def catch_up(self) -> None:
        """Describe and index all that waits. Raises: unavailable."""
        await self._index()
        while waiting := await self._store.undescribed(limit=_BATCH):
            for stored in waiting:
                await self._store.describe(await self._describer.describe(stored))
            await self._index()

    async def _index(self) -> None:
        # Each batch is one short transaction; between them others may write.
        while await self._store.refresh(limit=_BATCH):
            pass
