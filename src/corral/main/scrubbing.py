"""Reading the hub's blobs again: in the background of one that runs, and when somebody asks."""

import asyncio
import contextlib
import logging
import os
from collections.abc import AsyncIterator, Callable
from datetime import timedelta
from functools import partial
from typing import TYPE_CHECKING

from corral.main.shared import repeat

if TYPE_CHECKING:
    from corral.core.scrubbing import ScrubProgress
    from corral.hub.scrubber import Scrubbed, Scrubber
    from corral.main.services import HubServices
    from corral.settings import Settings

_log = logging.getLogger("corral.server")


def _scrubber(settings: "Settings", services: "HubServices") -> "Scrubber":
    from corral.hub.scrubber import Scrubber
    from corral.storage.blobs import BlobFiles
    from corral.storage.locks import held_alone
    from corral.storage.scrubbing import BlobChecks
    from corral.storage.sql.scrubbing import SqlScrubbing

    home = settings.corral_home
    return Scrubber(
        store=SqlScrubbing(services.database),
        files=BlobChecks(home / "blobs"),
        size_of=BlobFiles(home / "blobs", home / "cache").size_of,
        audit=services.audit,
        clock=services.clock,
        alone=partial(held_alone, home / "scrub.lock", otherwise="another scrub is under way; try again when it is done"),
        sleep=asyncio.sleep,
    )


@contextlib.asynccontextmanager
async def scrubbing(settings: "Settings", services: "HubServices") -> AsyncIterator[None]:
    """Read blobs again that are due, while the block runs and the machine has nothing better to do."""
    if not settings.scrub_days:
        yield
        return
    from corral.hub.scrubber import SCRUB_EVERY_S

    scrubber, every = _scrubber(settings, services), timedelta(days=settings.scrub_days)

    async def tend() -> None:
        found = await scrubber.tend(every=every, is_busy=_is_busy)
        if found.blobs:
            _log.info("read %d blobs of %d bytes again: %d damaged", found.blobs, found.size_bytes, found.damaged)

    async with asyncio.TaskGroup() as background:
        task = background.create_task(repeat(tend, every_s=SCRUB_EVERY_S))
        try:
            yield
        finally:
            task.cancel()


def _is_busy() -> bool:
    """Whether more wants to run than there are cores."""
    return hasattr(os, "getloadavg") and os.getloadavg()[0] > (os.cpu_count() or 1)


async def scrub_blobs(settings: "Settings", *, bytes_s: int, report: "Callable[[ScrubProgress], None]") -> "Scrubbed":
    """Read all blobs of this machine's hub, whether or not it runs. bytes_s: at most, 0 for no limit. Raises: conflict while
    somebody else does."""
    from corral.hub.accounts import CONSOLE
    from corral.main.services import open_existing_hub

    async with open_existing_hub(settings) as services:
        return await _scrubber(settings, services).scrub(actor=CONSOLE, bytes_s=bytes_s, report=report)
