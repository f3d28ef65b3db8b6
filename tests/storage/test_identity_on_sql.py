"""The identity services on a real database file: what holds between processes, on the disk, and while it is locked."""

import asyncio
import sqlite3
from collections.abc import AsyncIterator, Callable
from contextlib import closing
from pathlib import Path

import pytest

from corral.core.policy import ALL_SCOPES
from corral.core.records import Account, Principal, RequestFacts, Visitor
from corral.storage.sql import engine as engine_module
from corral.storage.sql.engine import Database, open_database
from corral.wire.errors import CorralError
from fakes import FakeClock
from identity_hub import HOME, LAPTOP, PASSWORD, IdentityHub, basic, bearer, browser, error_of
from identity_stores import sql_stores

Open = Callable[[], IdentityHub]


@pytest.fixture
async def open_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Open]:
    """Opens hubs that share one database file, as workers and administration commands do."""
    # Patched because the real time-out is five seconds; what is tested is what comes of it.
    monkeypatch.setattr(engine_module, "BUSY_TIMEOUT_S", 0.05)
    databases: list[Database] = []
    clock = FakeClock()

    def one_more() -> IdentityHub:
        databases.append(open_database(tmp_path / "home" / "hub.db"))
        return IdentityHub(stores=sql_stores(databases[-1]), clock=clock, seed=len(databases))

    yield one_more
    for database in databases:
        await database.close()


async def everything(hub: IdentityHub, ada: Account) -> dict[str, Callable[[], RequestFacts]]:
    """A request for each kind of credential of an account, made anew each time."""
    await hub.link(ada, scopes=ALL_SCOPES)
    _, key = await hub.key(ada)
    _, cookie = await hub.session(ada)
    return {"key": lambda: bearer(key), "stock": hub.stock, "strong": hub.strong, "session": lambda: browser(cookie)}


async def test_every_form_is_let_in_by_any_worker(open_hub: Open) -> None:
    one, two = open_hub(), open_hub()
    ada = await one.add("Ada")
    for make in (await everything(one, ada)).values():
        assert (await one.who(make())).account == ada
        assert (await two.who(make())).account == ada


async def test_t062_what_one_worker_revokes_every_other_refuses_on_its_next_request(open_hub: Open) -> None:
    one, two = open_hub(), open_hub()
    ada = await one.add("Ada")
    requests = await everything(one, ada)
    principals = {form: await two.who(make()) for form, make in requests.items()}
    await one.credentials.revoke_key(ada, principals["key"].credential_id)
    assert (await two.refusal(requests["key"]())).code == "unauthorized"
    await one.credentials.revoke_device(ada, principals["stock"].credential_id)
    assert (await two.refusal(requests["stock"]())).code == "unauthorized"
    assert (await two.refusal(requests["strong"]())).code == "unauthorized"
    session = principals["session"].session
    assert session is not None
    await one.accounts.sign_out(session)
    assert await two.credentials.authenticate(requests["session"]()) is None
    assert [await two.credentials.is_live(principal) for principal in principals.values()] == [False] * 4


@pytest.mark.parametrize("change", ["disable", "remove"])
async def test_t062_account_disabled_elsewhere_is_refused_on_its_next_request(open_hub: Open, change: str) -> None:
    hub, console = open_hub(), open_hub()
    ada = await hub.add("Ada")
    requests = await everything(hub, ada)
    for make in requests.values():
        await hub.who(make())
    await (console.accounts.set_disabled("Ada", True) if change == "disable" else console.accounts.remove("Ada"))
    assert [(await hub.refusal(requests[form]())).code for form in ("key", "stock", "strong")] == ["unauthorized"] * 3
    assert await hub.credentials.authenticate(requests["session"]()) is None


@pytest.mark.parametrize("is_connected", [True, False])
async def test_t024_of_fifty_token_requests_with_one_nonce_at_two_workers_one_is_let_in(
    open_hub: Open, monkeypatch: pytest.MonkeyPatch, *, is_connected: bool
) -> None:
    # Fifty writes take longer than the other tests here let anybody wait.
    monkeypatch.setattr(engine_module, "BUSY_TIMEOUT_S", 5.0)
    one, two = open_hub(), open_hub()
    if is_connected:
        await one.link(await one.add("Ada"))
    asking = (hub.credentials.authenticate(hub.token()) for hub in [one, two] * 25)
    outcomes = await asyncio.gather(*asking, return_exceptions=True)
    assert sum(isinstance(outcome, Principal if is_connected else Visitor) for outcome in outcomes) == 1
    assert {outcome.code for outcome in outcomes if isinstance(outcome, CorralError)} == {"unauthorized"}


async def test_t062_token_of_a_key_revoked_at_one_worker_is_refused_at_every_other(open_hub: Open) -> None:
    one, two = open_hub(), open_hub()
    ada = await one.add("Ada")
    key_id, key = await one.key(ada)
    token = one.tokens.issue(await one.who(basic("ada", key)), []).text.reveal()
    assert (await two.who(bearer(token, "GET", "/v2/"))).account == ada
    await one.credentials.revoke_key(ada, key_id)
    assert (await two.refusal(bearer(token, "GET", "/v2/"))).code == "unauthorized"


async def test_t019_nonce_used_at_one_worker_is_used_at_every_other(open_hub: Open) -> None:
    one, two = open_hub(), open_hub()
    ada = await one.add("Ada")
    await one.link(ada)
    request = one.strong()
    assert (await one.who(request)).account == ada
    assert (await two.refusal(request)).code == "unauthorized"


async def test_r004_while_the_database_is_locked_reads_let_in_and_what_needs_a_write_is_unavailable(
    open_hub: Open, tmp_path: Path
) -> None:
    hub = open_hub()
    ada = await hub.add("Ada")
    requests = await everything(hub, ada)
    token = hub.token()
    with closing(sqlite3.connect(tmp_path / "home" / "hub.db", isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        for form in ("key", "stock", "session"):
            assert (await hub.who(requests[form]())).account == ada
        hub.clock.advance(120)
        assert (await hub.who(requests["session"]())).account == ada
        hub.clock.advance(-120)
        for request in (requests["strong"](), token):
            error = await hub.refusal(request)
            assert (error.code, error.retry_after_s) == ("unavailable", 1)
        for changing in (hub.key(ada), hub.accounts.set_disabled("Ada", True), hub.session(ada)):
            assert (await error_of(changing)).code == "unavailable"
        await hub.credentials.flush_uses()
        other.execute("ROLLBACK")
    await hub.credentials.flush_uses()
    assert (await hub.credentials.keys_of(ada))[0].last_used_at is not None
    assert len(await hub.credentials.keys_of(ada)) == 1
    assert (await hub.who(requests["strong"]())).account == ada


async def test_t053_no_secret_is_in_any_file_of_the_hub(open_hub: Open, tmp_path: Path) -> None:
    hub = open_hub()
    code = await hub.accounts.new_setup_code() or ""
    ada = await hub.accounts.sign_up("Ada", "ada@example.org", PASSWORD, setup_code=code, network=HOME)
    _, key = await hub.key(ada)
    _, cookie = await hub.session(ada)
    await hub.link(ada)
    for request in (bearer(key), browser(cookie), hub.stock(), hub.strong()):
        await hub.who(request)
    await hub.credentials.flush_uses()
    kept = b"".join(path.read_bytes() for path in (tmp_path / "home").iterdir())
    assert b"ada@example.org" in kept  # it is the right pile of bytes
    for secret in (code, code.replace("-", ""), PASSWORD, key, key[15:47], cookie, LAPTOP.seed.hex()):
        assert secret.encode() not in kept
