"""What every CredentialStore does."""

import asyncio
from dataclasses import replace
from datetime import timedelta

import pytest

from corral.core.records import Account, ApiKey, Device, Scope
from corral.wire.errors import CorralError
from corral.wire.signing import DevicePrivateKey, DevicePublicKey
from fakes import NOON
from identity_stores import Stores, account

LATER = NOON + timedelta(seconds=1)
KEY = DevicePrivateKey(bytes(32)).public
OTHER_KEY = DevicePrivateKey(bytes([1] * 32)).public


def device(owner: Account, device_id: str = "d1", key: DevicePublicKey = KEY, **changes: object) -> Device:
    values = {
        "id": device_id,
        "account_id": owner.id,
        "name": "laptop",
        "key": key,
        "scopes": frozenset({Scope.INFERENCE, Scope.PULL}),
        "created_at": NOON,
        **changes,
    }
    return Device(**values)  # type: ignore[arg-type]


def api_key(owner: Account, key_id: str = "k1", **changes: object) -> ApiKey:
    values = {
        "id": key_id,
        "account_id": owner.id,
        "name": "ci",
        "prefix": "crlk_abcd",
        "scopes": frozenset({Scope.INFERENCE}),
        "created_at": NOON,
        **changes,
    }
    return ApiKey(**values)  # type: ignore[arg-type]


# ── Devices ──────────────────────────────────────────────────────────────────────────────────────────────────────────


async def test_device_added_is_found_by_its_key_with_its_owner(stores: Stores, ada: Account) -> None:
    await stores.credentials.add_device(device(ada))
    assert await stores.credentials.device(KEY) == (device(ada), ada)
    assert await stores.credentials.device(OTHER_KEY) is None


async def test_device_keeps_every_field(stores: Stores, ada: Account) -> None:
    full = device(ada, scopes=frozenset(Scope), last_used_at=LATER, last_network="192.0.2.1", name="Zoë's <box>")
    await stores.credentials.add_device(full)
    assert await stores.credentials.device(KEY) == (full, ada)
    assert await stores.credentials.devices_of(ada.id) == [full]


async def test_t047_device_key_in_use_conflicts_for_anybody(stores: Stores, ada: Account, bob: Account) -> None:
    await stores.credentials.add_device(device(ada))
    for owner in (ada, bob):
        with pytest.raises(CorralError) as error:
            await stores.credentials.add_device(device(owner, "d2"))
        assert error.value.code == "conflict"
    assert await stores.credentials.device(KEY) == (device(ada), ada)


async def test_t047_device_key_added_by_two_accounts_at_once_goes_to_one(stores: Stores, ada: Account, bob: Account) -> None:
    adding = (stores.credentials.add_device(device(owner, owner.id)) for owner in (ada, bob))
    outcomes = await asyncio.gather(*adding, return_exceptions=True)
    assert sorted(isinstance(outcome, CorralError) for outcome in outcomes) == [False, True]
    found = await stores.credentials.device(KEY)
    assert found is not None
    assert found[0].account_id == found[1].id


async def test_device_revoked_is_not_found_and_its_key_can_be_added_again(stores: Stores, ada: Account, bob: Account) -> None:
    await stores.credentials.add_device(device(ada))
    assert await stores.credentials.revoke_device(ada.id, "d1", now=LATER)
    assert await stores.credentials.device(KEY) is None
    assert await stores.credentials.devices_of(ada.id) == []
    assert not await stores.credentials.revoke_device(ada.id, "d1", now=LATER)
    await stores.credentials.add_device(device(bob, "d2"))
    assert await stores.credentials.device(KEY) == (device(bob, "d2"), bob)


async def test_t066_device_of_somebody_else_is_neither_revoked_nor_renamed(stores: Stores, ada: Account, bob: Account) -> None:
    await stores.credentials.add_device(device(ada))
    assert not await stores.credentials.revoke_device(bob.id, "d1", now=LATER)
    assert not await stores.credentials.rename_device(bob.id, "d1", "mine")
    assert await stores.credentials.device(KEY) == (device(ada), ada)


async def test_device_is_renamed(stores: Stores, ada: Account) -> None:
    await stores.credentials.add_device(device(ada))
    assert await stores.credentials.rename_device(ada.id, "d1", "desk")
    assert not await stores.credentials.rename_device(ada.id, "nothing", "desk")
    assert await stores.credentials.devices_of(ada.id) == [device(ada, name="desk")]


async def test_device_gets_other_scopes(stores: Stores, ada: Account, bob: Account) -> None:
    await stores.credentials.add_device(device(ada))
    assert await stores.credentials.set_device_scopes(ada.id, "d1", frozenset({Scope.PUSH}), now=LATER)
    assert not await stores.credentials.set_device_scopes(bob.id, "d1", frozenset(Scope), now=LATER)
    assert await stores.credentials.devices_of(ada.id) == [device(ada, scopes=frozenset({Scope.PUSH}))]


async def test_device_of_a_disabled_owner_is_found_with_that_state(stores: Stores, ada: Account) -> None:
    await stores.credentials.add_device(device(ada))
    disabled = replace(ada, disabled_at=LATER)
    await stores.accounts.set_disabled(ada.id, LATER)
    assert await stores.credentials.device(KEY) == (device(ada), disabled)


async def test_t062_device_and_key_of_a_removed_owner_are_gone_and_a_new_account_sees_none(stores: Stores, ada: Account) -> None:
    await stores.credentials.add_device(device(ada))
    await stores.credentials.add_api_key(api_key(ada), hmac=bytes(32), pepper_id="p1")
    await stores.accounts.remove(ada.id, now=LATER)
    new = account("Zed")
    await stores.accounts.add(new, "hash")
    assert await stores.credentials.device(KEY) is None
    assert await stores.credentials.api_key("k1") is None
    assert await stores.credentials.api_keys_of(new.id) == []
    assert await stores.credentials.devices_of(new.id) == []


async def test_devices_are_listed_per_account_oldest_first(stores: Stores, ada: Account, bob: Account) -> None:
    young, old = device(ada, "young", created_at=LATER), device(ada, "old", OTHER_KEY)
    await stores.credentials.add_device(young)
    await stores.credentials.add_device(old)
    assert await stores.credentials.devices_of(ada.id) == [old, young]
    assert await stores.credentials.devices_of(bob.id) == []


async def test_devices_are_found_by_their_ids_whoever_owns_them_and_revoked_or_not(
    stores: Stores, ada: Account, bob: Account
) -> None:
    await stores.credentials.add_device(device(ada))
    await stores.credentials.add_device(device(bob, "d2", OTHER_KEY))
    await stores.credentials.revoke_device(ada.id, "d1", now=LATER)
    found = await stores.credentials.devices_with(["d1", "d2", *(f"gone{number}" for number in range(1000))])
    assert sorted(found, key=lambda one: one.id) == [device(ada, revoked_at=LATER), device(bob, "d2", OTHER_KEY)]
    assert not await stores.credentials.devices_with([])


# ── API keys ─────────────────────────────────────────────────────────────────────────────────────────────────────────


async def test_api_key_added_is_found_with_owner_hmac_and_pepper(stores: Stores, ada: Account) -> None:
    full = api_key(ada, scopes=frozenset(Scope), expires_at=LATER)
    await stores.credentials.add_api_key(full, hmac=b"\x00" * 31 + b"\xff", pepper_id="p1")
    found = await stores.credentials.api_key("k1")
    assert found is not None
    assert (found.key, found.owner, found.hmac, found.pepper_id) == (full, ada, b"\x00" * 31 + b"\xff", "p1")
    assert await stores.credentials.api_key("k2") is None
    assert await stores.credentials.api_keys_of(ada.id) == [full]


async def test_t062_api_key_revoked_is_seen_revoked_at_once(stores: Stores, ada: Account) -> None:
    await stores.credentials.add_api_key(api_key(ada), hmac=bytes(32), pepper_id="p1")
    # Looked up before, so that a read left open would show its old snapshot.
    assert await stores.credentials.api_key("k1") is not None
    assert await stores.credentials.revoke_api_key(ada.id, "k1", now=LATER)
    found = await stores.credentials.api_key("k1")
    assert found is not None
    assert found.key == api_key(ada, revoked_at=LATER)
    assert await stores.credentials.api_keys_of(ada.id) == [api_key(ada, revoked_at=LATER)]


async def test_api_key_is_revoked_once(stores: Stores, ada: Account) -> None:
    await stores.credentials.add_api_key(api_key(ada), hmac=bytes(32), pepper_id="p1")
    assert await stores.credentials.revoke_api_key(ada.id, "k1", now=LATER)
    assert not await stores.credentials.revoke_api_key(ada.id, "k1", now=LATER + timedelta(days=1))
    assert await stores.credentials.api_keys_of(ada.id) == [api_key(ada, revoked_at=LATER)]


async def test_t066_api_key_of_somebody_else_is_not_touched(stores: Stores, ada: Account, bob: Account) -> None:
    await stores.credentials.add_api_key(api_key(ada), hmac=bytes(32), pepper_id="p1")
    assert not await stores.credentials.revoke_api_key(bob.id, "k1", now=LATER)
    assert await stores.credentials.api_keys_of(ada.id) == [api_key(ada)]
    assert await stores.credentials.api_keys_of(bob.id) == []


async def test_t064_key_is_replaced_by_its_successor_and_revoked(stores: Stores, ada: Account) -> None:
    old, new = api_key(ada), api_key(ada, "k2", created_at=LATER)
    await stores.credentials.add_api_key(old, hmac=bytes(32), pepper_id="p1")
    assert await stores.credentials.replace_api_key(old, new, hmac=b"n" * 32, pepper_id="p2", old_ends_at=LATER)
    assert await stores.credentials.api_keys_of(ada.id) == [replace(old, revoked_at=LATER, successor_id="k2"), new]
    found = await stores.credentials.api_key("k2")
    assert found is not None
    assert (found.hmac, found.pepper_id) == (b"n" * 32, "p2")


async def test_t064_key_replaced_with_an_overlap_expires_and_never_later_than_before(stores: Stores, ada: Account) -> None:
    much_later = LATER + timedelta(days=1)
    free, bound = api_key(ada), api_key(ada, "k2", expires_at=LATER + timedelta(hours=1))
    for number, old in enumerate((free, bound)):
        new = api_key(ada, f"new{number}", created_at=LATER)
        await stores.credentials.add_api_key(old, hmac=bytes(32), pepper_id="p1")
        assert await stores.credentials.replace_api_key(old, new, hmac=bytes(32), pepper_id="p1", old_ends_at=much_later)
    kept = {key.id: key for key in await stores.credentials.api_keys_of(ada.id)}
    assert kept["k1"] == replace(free, expires_at=much_later, successor_id="new0")
    assert kept["k2"] == replace(bound, successor_id="new1")


async def test_key_that_has_a_successor_is_not_replaced_again(stores: Stores, ada: Account) -> None:
    await stores.credentials.add_api_key(api_key(ada), hmac=bytes(32), pepper_id="p1")
    overlap_ends = LATER + timedelta(days=1)
    old = api_key(ada)
    for number, is_replaced in enumerate((True, False)):
        new = api_key(ada, f"new{number}", created_at=LATER)
        outcome = await stores.credentials.replace_api_key(old, new, hmac=bytes(32), pepper_id="p1", old_ends_at=overlap_ends)
        assert outcome is is_replaced
        found = await stores.credentials.api_key("k1")
        assert found is not None
        assert found.key.successor_id == "new0"
        old = found.key
    assert len(await stores.credentials.api_keys_of(ada.id)) == 2


async def test_t064_key_replaced_by_twelve_at_once_is_replaced_by_one(stores: Stores, ada: Account) -> None:
    old = api_key(ada)
    await stores.credentials.add_api_key(old, hmac=bytes(32), pepper_id="p1")
    replacing = (
        stores.credentials.replace_api_key(
            old, api_key(ada, f"new{number}", created_at=LATER), hmac=bytes(32), pepper_id="p1", old_ends_at=LATER
        )
        for number in range(12)
    )
    assert sum(await asyncio.gather(*replacing)) == 1
    assert len(await stores.credentials.api_keys_of(ada.id)) == 2


@pytest.mark.parametrize("change", ["revoked", "rotated", "unknown", "foreign"])
async def test_t064_key_that_is_no_longer_as_it_was_read_is_not_replaced(
    stores: Stores, ada: Account, bob: Account, change: str
) -> None:
    old = api_key(ada)
    await stores.credentials.add_api_key(old, hmac=bytes(32), pepper_id="p1")
    match change:
        case "revoked":
            await stores.credentials.revoke_api_key(ada.id, "k1", now=LATER)
        case "rotated":
            first, ends_at = api_key(ada, "k3", created_at=LATER), LATER + timedelta(hours=1)
            await stores.credentials.replace_api_key(old, first, hmac=b"n" * 32, pepper_id="p1", old_ends_at=ends_at)
        case "unknown":
            old = replace(old, id="k0")
        case "foreign":
            old = replace(old, account_id=bob.id)
    before = await stores.credentials.api_keys_of(ada.id)
    new = api_key(ada, "k2", created_at=LATER)
    assert not await stores.credentials.replace_api_key(old, new, hmac=bytes(32), pepper_id="p1", old_ends_at=LATER)
    assert await stores.credentials.api_keys_of(ada.id) == before


async def test_api_keys_beyond_the_limit_conflict_and_dead_ones_do_not_count(stores: Stores, ada: Account, bob: Account) -> None:
    async def adding(key_id: str, **changes: object) -> None:
        added = api_key(ada, key_id, **changes)
        await stores.credentials.add_api_key(added, hmac=bytes(32), pepper_id="p1", max_live=2)

    await adding("expired", expires_at=LATER)
    await adding("revoked", revoked_at=NOON)
    await stores.credentials.add_api_key(api_key(bob, "other"), hmac=bytes(32), pepper_id="p1", max_live=2)
    outcomes = await asyncio.gather(*(adding(f"k{n}", created_at=LATER) for n in range(5)), return_exceptions=True)
    assert [getattr(outcome, "code", "") for outcome in outcomes].count("conflict") == 3
    old = next(key for key in await stores.credentials.api_keys_of(ada.id) if key.created_at == LATER)
    values = {"hmac": bytes(32), "pepper_id": "p1", "max_live": 2}
    new = api_key(ada, "new", created_at=LATER)
    with pytest.raises(CorralError) as error:
        await stores.credentials.replace_api_key(old, new, old_ends_at=LATER + timedelta(hours=1), **values)  # type: ignore[arg-type]
    assert error.value.code == "conflict"
    assert old in await stores.credentials.api_keys_of(ada.id)
    assert await stores.credentials.replace_api_key(old, new, old_ends_at=LATER, **values)  # type: ignore[arg-type]


async def test_uses_of_devices_and_keys_are_recorded_in_one_batch(stores: Stores, ada: Account) -> None:
    await stores.credentials.add_device(device(ada))
    await stores.credentials.add_api_key(api_key(ada), hmac=bytes(32), pepper_id="p1")
    await stores.credentials.record_use([("d1", LATER, "192.0.2.1"), ("k1", LATER, "192.0.2.2"), ("gone", LATER, "")])
    await stores.credentials.record_use([])
    assert await stores.credentials.devices_of(ada.id) == [device(ada, last_used_at=LATER, last_network="192.0.2.1")]
    assert await stores.credentials.api_keys_of(ada.id) == [api_key(ada, last_used_at=LATER)]


# ── Nonces ───────────────────────────────────────────────────────────────────────────────────────────────────────────


async def test_nonce_is_used_once_until_it_expires(stores: Stores) -> None:
    end = NOON + timedelta(minutes=20)
    assert await stores.credentials.use_nonce("n", now=NOON, expires_at=end)
    assert not await stores.credentials.use_nonce("n", now=end - timedelta(microseconds=1), expires_at=end)
    assert await stores.credentials.use_nonce("m", now=NOON, expires_at=end)
    assert await stores.credentials.use_nonce("n", now=end, expires_at=end + timedelta(minutes=20))


async def test_t024_nonce_used_by_fifty_at_once_is_used_by_one(stores: Stores) -> None:
    end = NOON + timedelta(minutes=20)
    used = await asyncio.gather(*(stores.credentials.use_nonce("n", now=NOON, expires_at=end) for _ in range(50)))
    assert sum(used) == 1


async def test_nonces_in_great_number_do_not_lose_the_live_ones(stores: Stores) -> None:
    end = NOON + timedelta(minutes=20)
    await stores.credentials.use_nonce("kept", now=NOON, expires_at=end)
    for number in range(300):
        await stores.credentials.use_nonce(f"short-{number}", now=NOON, expires_at=NOON + timedelta(seconds=1))
    assert not await stores.credentials.use_nonce("kept", now=LATER, expires_at=end)
