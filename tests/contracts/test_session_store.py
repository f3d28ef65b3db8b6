"""What every SessionStore does."""

import asyncio
from dataclasses import replace
from datetime import timedelta

from corral.core.records import Account, BrowserSession
from fakes import NOON
from identity_stores import Stores

LATER = NOON + timedelta(hours=1)


def session(owner: Account, session_id: str = "s1", **changes: object) -> BrowserSession:
    values = {
        "id": session_id,
        "account_id": owner.id,
        "csrf": "csrf",
        "created_at": NOON,
        "authenticated_at": NOON,
        "last_used_at": NOON,
        "expires_at": LATER,
        "user_agent": "Mozilla/5.0",
        "network": "192.0.2.1",
        **changes,
    }
    return BrowserSession(**values)  # type: ignore[arg-type]


async def test_session_added_is_got_with_its_owner(stores: Stores, ada: Account) -> None:
    await stores.sessions.add(session(ada))
    assert await stores.sessions.get("s1") == (session(ada), ada)
    assert await stores.sessions.get("s2") is None


async def test_session_of_a_disabled_owner_is_got_whatever_its_state(stores: Stores, ada: Account) -> None:
    await stores.sessions.add(session(ada))
    disabled = replace(ada, disabled_at=NOON)
    await stores.accounts.set_disabled(ada.id, NOON)
    assert await stores.sessions.get("s1") == (session(ada), disabled)


async def test_session_of_a_removed_owner_is_gone(stores: Stores, ada: Account) -> None:
    await stores.sessions.add(session(ada))
    await stores.accounts.remove(ada.id, now=NOON)
    assert await stores.sessions.get("s1") is None


async def test_session_update_stores_its_three_times_only(stores: Stores, ada: Account) -> None:
    await stores.sessions.add(session(ada))
    times = {"last_used_at": LATER, "authenticated_at": LATER, "expires_at": LATER + timedelta(days=1)}
    await stores.sessions.update(session(ada, csrf="other", **times))
    found = await stores.sessions.get("s1")
    assert found is not None
    assert found[0] == session(ada, **times)


async def test_session_update_after_removal_does_not_bring_it_back(stores: Stores, ada: Account) -> None:
    await stores.sessions.add(session(ada))
    await stores.sessions.remove("s1")
    await stores.sessions.update(session(ada))
    assert await stores.sessions.get("s1") is None


async def test_sessions_of_one_account_are_removed_but_for_one(stores: Stores, ada: Account, bob: Account) -> None:
    for session_id, owner in (("s1", ada), ("s2", ada), ("s3", bob)):
        await stores.sessions.add(session(owner, session_id))
    await stores.sessions.remove_all(ada.id, except_id="s2")
    assert await stores.sessions.get("s1") is None
    assert await stores.sessions.get("s2") is not None
    assert await stores.sessions.get("s3") is not None
    await stores.sessions.remove_all(ada.id)
    assert await stores.sessions.get("s2") is None


async def test_sessions_past_their_end_are_cleared_when_one_is_added(stores: Stores, ada: Account) -> None:
    await stores.sessions.add(session(ada, "old", expires_at=NOON))
    await stores.sessions.add(session(ada, "new", created_at=LATER, expires_at=LATER + timedelta(hours=1)))
    assert await stores.sessions.get("old") is None
    assert await stores.sessions.get("new") is not None


async def test_sessions_of_an_account_are_those_that_have_not_expired_latest_used_first(
    stores: Stores, ada: Account, bob: Account
) -> None:
    old, used = session(ada, "old"), session(ada, "used", last_used_at=NOON + timedelta(seconds=1))
    for added in (old, used, session(ada, "ends", expires_at=NOON + timedelta(seconds=1)), session(bob, "other")):
        await stores.sessions.add(added)
    assert await stores.sessions.of_account(ada.id, now=NOON + timedelta(seconds=1)) == [used, old]
    assert await stores.sessions.of_account("nobody", now=NOON) == []


async def test_code_is_known_and_taken_once(stores: Stores) -> None:
    await stores.sessions.put_code("setup", "digest", expires_at=LATER)
    assert await stores.sessions.has_code("setup", "digest", now=NOON)
    assert not await stores.sessions.has_code("setup", "other", now=NOON)
    assert not await stores.sessions.has_code("mail", "digest", now=NOON)
    assert await stores.sessions.take_code("setup", "digest", now=NOON)
    assert not await stores.sessions.has_code("setup", "digest", now=NOON)
    assert not await stores.sessions.take_code("setup", "digest", now=NOON)


async def test_code_past_its_end_is_not_taken(stores: Stores) -> None:
    await stores.sessions.put_code("setup", "digest", expires_at=LATER)
    assert await stores.sessions.has_code("setup", "digest", now=LATER - timedelta(microseconds=1))
    assert not await stores.sessions.has_code("setup", "digest", now=LATER)
    assert not await stores.sessions.take_code("setup", "digest", now=LATER)


async def test_code_replaces_the_one_before_it(stores: Stores) -> None:
    await stores.sessions.put_code("setup", "first", expires_at=LATER)
    await stores.sessions.put_code("setup", "second", expires_at=LATER)
    assert not await stores.sessions.take_code("setup", "first", now=NOON)
    assert await stores.sessions.take_code("setup", "second", now=NOON)


async def test_t085_code_taken_by_fifty_at_once_is_taken_by_one(stores: Stores) -> None:
    await stores.sessions.put_code("setup", "digest", expires_at=LATER)
    taken = await asyncio.gather(*(stores.sessions.take_code("setup", "digest", now=NOON) for _ in range(50)))
    assert sum(taken) == 1
