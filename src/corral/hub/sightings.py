"""Unknown devices seen lately, in memory: what a connect page checks before it lets a person connect a device (W7).

Anybody can make keys and knock, so the store forgets after a quarter of an hour, holds a fixed number, and lets one network keep
only a few at a time. A hub with several workers needs a shared one; the port allows for it.
"""

from collections import OrderedDict
from dataclasses import replace
from datetime import datetime, timedelta

from corral.core.records import Sighting
from corral.hub.networks import network_of
from corral.wire.errors import CorralError
from corral.wire.signing import DevicePublicKey

#: How long a sighting counts after the device was last seen.
SIGHTING_TTL = timedelta(minutes=15)


class MemorySightings:
    """A SightingStore. per_network: how many unknown keys one network may have in it; capacity: how many there are in all."""

    def __init__(self, *, capacity: int = 10_000, per_network: int = 20) -> None:
        self._capacity = capacity
        self._per_network = per_network
        # Least lately seen first, so that what expires and what is evicted is always at the front.
        self._kept: OrderedDict[DevicePublicKey, Sighting] = OrderedDict()
        self._counts: dict[str, int] = {}

    def __len__(self) -> int:
        return len(self._kept)

    async def record(self, sighting: Sighting) -> Sighting:
        """Keep or refresh. The network is that of the latest call: that is where the device is now."""
        self._drop_expired(sighting.last_seen_at)
        known = self._kept.get(sighting.key)
        if known is not None:
            sighting = replace(sighting, code=known.code, first_seen_at=known.first_seen_at)
            self._drop(sighting.key)
        elif self._counts.get(network_of(sighting.network), 0) >= self._per_network:
            raise CorralError(
                "rate_limited", "too many unknown devices from this network; try again later", retry_after_s=_ttl_s()
            )
        elif len(self._kept) >= self._capacity:
            self._drop(next(iter(self._kept)))
        self._kept[sighting.key] = sighting
        network = network_of(sighting.network)
        self._counts[network] = self._counts.get(network, 0) + 1
        return sighting

    async def find(self, key: DevicePublicKey, *, since: datetime) -> Sighting | None:
        """None when the device was not seen since then."""
        found = self._kept.get(key)
        return found if found is not None and found.last_seen_at >= since else None

    async def forget(self, key: DevicePublicKey) -> None:
        """The device is connected now, or was refused."""
        if key in self._kept:
            self._drop(key)

    def _drop_expired(self, now: datetime) -> None:
        while self._kept:
            oldest = next(iter(self._kept.values()))
            if oldest.last_seen_at + SIGHTING_TTL > now:
                return
            self._drop(oldest.key)

    def _drop(self, key: DevicePublicKey) -> None:
        network = network_of(self._kept.pop(key).network)
        self._counts[network] -= 1
        if not self._counts[network]:
            del self._counts[network]


def _ttl_s() -> int:
    return int(SIGHTING_TTL.total_seconds())
