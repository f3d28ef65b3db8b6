"""The memory of unknown devices: it forgets, it is bounded, and one network cannot fill it."""

from datetime import timedelta

import pytest

from corral.core.records import Sighting
from corral.hub.sightings import SIGHTING_TTL, MemorySightings
from corral.wire.errors import CorralError
from corral.wire.signing import DevicePublicKey
from fakes import NOON
from identity_hub import error_of


def key(number: int) -> DevicePublicKey:
    return DevicePublicKey(number.to_bytes(32))


def sighting(number: int = 0, *, at_s: float = 0, network: str = "192.0.2.1", code: str = "code") -> Sighting:
    at = NOON + timedelta(seconds=at_s)
    return Sighting(key=key(number), code=code, network=network, first_seen_at=at, last_seen_at=at)


async def test_sighting_recorded_is_found_since_it_was_last_seen() -> None:
    store = MemorySightings()
    await store.record(sighting())
    assert await store.find(key(0), since=NOON) == sighting()
    assert await store.find(key(0), since=NOON + timedelta(microseconds=1)) is None
    assert await store.find(key(1), since=NOON) is None


async def test_t003_sighting_seen_again_keeps_its_code_and_first_time() -> None:
    store = MemorySightings()
    await store.record(sighting(code="first"))
    again = await store.record(sighting(at_s=60, code="second", network="198.51.100.1"))
    assert (again.code, again.first_seen_at, again.last_seen_at) == ("first", NOON, NOON + timedelta(seconds=60))
    assert again.network == "198.51.100.1"
    assert len(store) == 1


async def test_t003_sighting_that_expired_gets_a_new_code() -> None:
    store = MemorySightings()
    await store.record(sighting(code="first"))
    again = await store.record(sighting(at_s=SIGHTING_TTL.total_seconds(), code="second"))
    assert again.code == "second"


async def test_t003_ten_thousand_keys_from_one_network_are_limited() -> None:
    store = MemorySightings(capacity=1000, per_network=20)
    codes = []
    for number in range(10_000):
        try:
            await store.record(sighting(number, network=f"2001:db8::{number:x}"))
            codes.append("")
        except CorralError as error:
            codes.append(error.code)
    assert codes == [""] * 20 + ["rate_limited"] * 9980
    assert len(store) == 20
    assert (await store.record(sighting(0, at_s=1, network="2001:db8::1", code="other"))).code == "code"


async def test_t003_keys_from_many_networks_stay_within_the_cap_and_push_out_the_oldest() -> None:
    store = MemorySightings(capacity=100)
    for number in range(1000):
        await store.record(sighting(number, at_s=number / 10, network=f"10.0.{number // 200}.{number % 200}"))
    assert len(store) == 100
    assert await store.find(key(899), since=NOON) is None
    assert await store.find(key(900), since=NOON) is not None


async def test_network_limit_frees_itself_when_sightings_expire_or_are_forgotten() -> None:
    store = MemorySightings(per_network=2)
    await store.record(sighting(1))
    await store.record(sighting(2, at_s=10))
    assert (await error_of(store.record(sighting(3, at_s=20)))).retry_after_s == SIGHTING_TTL.total_seconds()
    await store.forget(key(2))
    await store.forget(key(2))
    await store.record(sighting(3, at_s=20))
    with pytest.raises(CorralError):
        await store.record(sighting(4, at_s=30))
    await store.record(sighting(4, at_s=SIGHTING_TTL.total_seconds()))
    assert await store.find(key(1), since=NOON) is None


async def test_device_that_moves_is_counted_where_it_is() -> None:
    store = MemorySightings(per_network=1)
    await store.record(sighting(1, network="192.0.2.1"))
    await store.record(sighting(1, at_s=1, network="198.51.100.1"))
    await store.record(sighting(2, at_s=2, network="192.0.2.1"))
    with pytest.raises(CorralError):
        await store.record(sighting(3, at_s=3, network="198.51.100.1"))
