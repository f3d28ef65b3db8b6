"""What every AccountStore does."""

import asyncio
from dataclasses import replace
from datetime import timedelta

import pytest

from corral.core.records import Account
from corral.wire.errors import CorralError
from fakes import NOON
from identity_stores import Stores, account


async def test_account_added_is_found_by_id_name_and_email(stores: Stores) -> None:
    ada = account("Ada", email="Ada@Example.org", is_admin=True)
    await stores.accounts.add(ada, "hash")
    assert await stores.accounts.by_id(ada.id) == ada
    assert await stores.accounts.by_name("aDA") == ada
    assert await stores.accounts.by_email("ada@example.ORG") == ada
    assert await stores.accounts.password_hash(ada.id) == "hash"


async def test_account_unknown_is_none(stores: Stores, ada: Account) -> None:
    assert await stores.accounts.by_id("nobody") is None
    assert await stores.accounts.by_name("nobody") is None
    assert await stores.accounts.by_name("") is None
    assert await stores.accounts.by_email("") is None
    assert await stores.accounts.password_hash("nobody") == ""


async def test_account_name_that_no_database_can_hold_is_none(stores: Stores) -> None:
    assert await stores.accounts.by_name("\ud800") is None
    assert await stores.accounts.by_email("\ud800@x") is None


async def test_account_name_taken_in_other_case_conflicts(stores: Stores, ada: Account) -> None:
    with pytest.raises(CorralError) as error:
        await stores.accounts.add(account("ADA", id="other"), "hash")
    assert error.value.code == "conflict"


async def test_account_email_taken_conflicts(stores: Stores) -> None:
    await stores.accounts.add(account("Ada", email="a@example.org"), "hash")
    with pytest.raises(CorralError) as added:
        await stores.accounts.add(account("Bob", email="A@example.org"), "hash")
    assert added.value.code == "conflict"


async def test_account_without_email_does_not_conflict(stores: Stores, ada: Account, bob: Account) -> None:
    assert [found.name for found in await stores.accounts.list()] == ["Ada", "Bob"]


async def test_accounts_are_listed_oldest_first(stores: Stores) -> None:
    await stores.accounts.add(account("Young", created_at=NOON + timedelta(microseconds=1)), "hash")
    await stores.accounts.add(account("Old", created_at=NOON), "hash")
    assert [found.name for found in await stores.accounts.list()] == ["Old", "Young"]


async def test_account_role_and_disabling_are_changed_and_changed_back(stores: Stores, ada: Account, bob: Account) -> None:
    await stores.accounts.set_admin(bob.id, True, now=NOON)
    await stores.accounts.set_admin(ada.id, True, now=NOON)
    await stores.accounts.set_disabled(ada.id, NOON)
    changed = replace(ada, is_admin=True, disabled_at=NOON)
    assert await stores.accounts.by_id(ada.id) == changed
    assert changed in await stores.accounts.list()
    await stores.accounts.set_disabled(ada.id, None)
    await stores.accounts.set_admin(ada.id, False, now=NOON)
    assert await stores.accounts.by_id(ada.id) == ada


async def test_account_quota_is_set_and_taken_back(stores: Stores, ada: Account) -> None:
    await stores.accounts.set_quota(ada.id, 2**40)
    changed = replace(ada, quota_bytes=2**40)
    assert await stores.accounts.by_name("ADA") == changed
    assert changed in await stores.accounts.list()
    await stores.accounts.set_quota(ada.id, None)
    assert await stores.accounts.by_id(ada.id) == ada


async def test_t062_account_disabled_and_promoted_at_once_is_both(stores: Stores, ada: Account) -> None:
    await asyncio.gather(stores.accounts.set_disabled(ada.id, NOON), stores.accounts.set_admin(ada.id, True, now=NOON))
    assert await stores.accounts.by_id(ada.id) == replace(ada, is_admin=True, disabled_at=NOON)


@pytest.mark.parametrize("doing", ["demote", "disable", "remove"])
async def test_last_administrator_stays_one_whoever_acts_at_once(stores: Stores, ada: Account, doing: str) -> None:
    act = {
        "demote": lambda account_id: stores.accounts.set_admin(account_id, False, now=NOON),
        "disable": lambda account_id: stores.accounts.set_disabled(account_id, NOON),
        "remove": lambda account_id: stores.accounts.remove(account_id, now=NOON),
    }[doing]
    admins = [account(name, is_admin=True) for name in ("One", "Two", "Three")]
    for admin in admins:
        await stores.accounts.add(admin, "hash")
    await stores.accounts.add(account("Off", is_admin=True, disabled_at=NOON), "hash")
    outcomes = await asyncio.gather(*(act(admin.id) for admin in admins), return_exceptions=True)
    assert [getattr(outcome, "code", "") for outcome in outcomes].count("conflict") == 1
    left = [found for found in await stores.accounts.list() if found.is_admin and found.is_active]
    assert len(left) == 1
    await act(ada.id)  # who is none may be


async def test_account_password_hash_is_replaced(stores: Stores, ada: Account) -> None:
    await stores.accounts.set_password_hash(ada.id, "new", now=NOON)
    assert await stores.accounts.password_hash(ada.id) == "new"
    await stores.accounts.renew_password_hash(ada.id, "newer")
    assert await stores.accounts.password_hash(ada.id) == "newer"


async def test_t119_account_removed_is_found_by_nothing_and_its_name_stays_taken(stores: Stores) -> None:
    ada = account("Ada", email="a@example.org")
    await stores.accounts.add(ada, "hash")
    assert await stores.accounts.remove(ada.id, now=NOON)
    assert await stores.accounts.by_id(ada.id) is None
    assert await stores.accounts.by_name("ada") is None
    assert await stores.accounts.by_email("a@example.org") is None
    assert await stores.accounts.password_hash(ada.id) == ""
    assert await stores.accounts.list() == []
    with pytest.raises(CorralError) as error:
        await stores.accounts.add(account("aDa", id="new"), "hash")
    assert error.value.code == "conflict"


async def test_account_removed_frees_its_email_and_cannot_be_changed(stores: Stores) -> None:
    ada = account("Ada", email="a@example.org")
    await stores.accounts.add(ada, "hash")
    await stores.accounts.remove(ada.id, now=NOON)
    assert not await stores.accounts.remove(ada.id, now=NOON)
    await stores.accounts.set_disabled(ada.id, None)
    await stores.accounts.set_admin(ada.id, True, now=NOON)
    await stores.accounts.set_password_hash(ada.id, "hash", now=NOON)
    assert await stores.accounts.by_id(ada.id) is None
    await stores.accounts.add(account("Bob", email="a@example.org"), "hash")
