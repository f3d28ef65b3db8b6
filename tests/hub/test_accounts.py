"""Accounts: signing up and in, browser sessions, administration."""

import asyncio
import re
from statistics import median
from time import perf_counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from corral.core.records import Account
from corral.hub.accounts import RESERVED_NAMES, AccountRules, Accounts
from corral.hub.passwords import PasswordCost, Passwords, check_password
from corral.hub.throttle import Throttle, per_minutes
from corral.wire.errors import CorralError
from fakes import FakeClock, MemoryAccounts, MemoryAudit, MemorySessions, SeededEntropy
from identity_hub import CAFE, HOME, PASSWORD, IdentityHub, error_of


@pytest.fixture
def hub() -> IdentityHub:
    return IdentityHub()


@pytest.fixture
async def ada(hub: IdentityHub) -> Account:
    return await hub.add("Ada")


@pytest.fixture
async def root(hub: IdentityHub) -> Account:
    return await hub.add("Grace", is_admin=True)


# ── The first account ────────────────────────────────────────────────────────────────────────────────────────────────


async def test_t085_setup_code_makes_the_first_account_an_administrator_once(hub: IdentityHub) -> None:
    code = await hub.accounts.new_setup_code()
    assert code is not None
    assert re.fullmatch(r"[0-9A-HJKMNP-TV-Z]{4}-[0-9A-HJKMNP-TV-Z]{4}", code)
    assert await hub.accounts.check_setup_code(code, network=HOME)
    first = await hub.accounts.sign_up("Ada", "ada@example.org", PASSWORD, setup_code=code, network=HOME)
    assert first.is_admin
    assert not await hub.accounts.check_setup_code(code, network=HOME)
    assert (await error_of(hub.accounts.sign_up("Bob", "", PASSWORD, setup_code=code))).code == "gone"
    assert await hub.accounts.new_setup_code() is None


async def test_t085_first_account_without_or_with_a_wrong_code_is_refused(hub: IdentityHub) -> None:
    await hub.accounts.new_setup_code()
    for code in ("", "0000-0000", "\ud800", "x" * 10_000):
        assert (await error_of(hub.accounts.sign_up("Ada", "", PASSWORD, setup_code=code))).code == "gone"
    assert await hub.accounts.list() == []


async def test_t085_fresh_hub_has_no_account_and_no_code(hub: IdentityHub) -> None:
    assert await hub.accounts.list() == []
    for code in ("", "0000-0000"):
        assert not await hub.accounts.check_setup_code(code, network=HOME)
    for name in ("admin", "root", "corral"):
        assert (await error_of(hub.accounts.sign_in(name, name, network=HOME))).code == "unauthorized"


async def test_t085_setup_code_expires_and_is_replaced_by_the_next(hub: IdentityHub) -> None:
    old = await hub.accounts.new_setup_code()
    new = await hub.accounts.new_setup_code()
    assert old is not None
    assert new is not None
    assert not await hub.accounts.check_setup_code(old, network=HOME)
    hub.clock.advance(30 * 60 - 1)
    assert await hub.accounts.check_setup_code(new, network=HOME)
    hub.clock.advance(1)
    assert not await hub.accounts.check_setup_code(new, network=HOME)
    assert (await error_of(hub.accounts.sign_up("Ada", "", PASSWORD, setup_code=new))).code == "gone"


async def test_t085_setup_code_is_guessed_only_so_often(hub: IdentityHub) -> None:
    code = await hub.accounts.new_setup_code() or ""
    for _ in range(30):
        assert not await hub.accounts.check_setup_code("0000-0000", network=CAFE)
    error = await error_of(hub.accounts.check_setup_code(code, network=CAFE))
    assert (error.code, error.retry_after_s) == ("rate_limited", 300)
    assert await hub.accounts.check_setup_code(code, network=HOME)
    hub.clock.advance(300)
    assert await hub.accounts.check_setup_code(code, network=CAFE)


async def test_t085_setup_code_used_by_two_at_once_makes_one_account(hub: IdentityHub) -> None:
    code = await hub.accounts.new_setup_code() or ""
    signing_up = (hub.accounts.sign_up(name, "", PASSWORD, setup_code=code) for name in ("Ada", "Bob"))
    outcomes = await asyncio.gather(*signing_up, return_exceptions=True)
    assert sorted(isinstance(outcome, CorralError) for outcome in outcomes) == [False, True]
    assert len(await hub.accounts.list()) == 1


async def test_setup_code_survives_a_mistake_in_the_form_and_careless_typing(hub: IdentityHub) -> None:
    code = await hub.accounts.new_setup_code() or ""
    assert (await error_of(hub.accounts.sign_up("Ada", "", "short", setup_code=code))).code == "invalid"
    typed = f" {code.lower().replace('-', ' ').replace('0', 'o').replace('1', 'l')}"
    assert (await hub.accounts.sign_up("Ada", "", PASSWORD, setup_code=typed)).is_admin


# ── Signing up ───────────────────────────────────────────────────────────────────────────────────────────────────────


async def test_sign_up_where_it_is_open_makes_a_member(hub: IdentityHub, root: Account) -> None:
    bob = await hub.accounts.sign_up("Bob", "bob@example.org", PASSWORD, network=HOME)
    assert not bob.is_admin
    assert await hub.accounts.sign_in("bob", PASSWORD, network=HOME) == bob
    assert hub.audit.events[-1].note == "Bob, member"


async def test_sign_up_where_it_is_closed_is_forbidden() -> None:
    hub = IdentityHub(sign_up_open=False)
    await hub.add("Grace", is_admin=True)
    assert (await error_of(hub.accounts.sign_up("Bob", "", PASSWORD))).code == "forbidden"


async def test_sign_up_with_a_taken_name_or_address_conflicts(hub: IdentityHub, ada: Account) -> None:
    assert (await error_of(hub.accounts.sign_up("aDA", "", PASSWORD))).code == "conflict"
    assert (await error_of(hub.accounts.sign_up("Bob", "ADA@example.org", PASSWORD))).code == "conflict"
    assert hub.audit.actions == ["account.create"]


@pytest.mark.parametrize(
    "name",
    [
        "",
        "a",
        "-ab",
        "_ab",
        "a b",
        "a.b",
        "a/b",
        "ab\n",
        "é",
        "ab\x00",
        "x" * 40,
        "\ud800",
        "аda",
        "Library",
        "admin",
        "api",
        "v2",
        "healthz",
    ],
)
async def test_name_that_is_malformed_or_reserved_is_invalid(hub: IdentityHub, root: Account, name: str) -> None:
    assert (await error_of(hub.accounts.sign_up(name, "", PASSWORD))).code == "invalid"


def test_reserved_names_are_written_as_they_are_compared() -> None:
    assert all(name == name.lower() for name in RESERVED_NAMES)
    required = "library admin api v1 v2 settings signin signup connect search static healthz"
    assert set(required.split()) <= RESERVED_NAMES


@pytest.mark.parametrize(
    "email", ["ada", "@", "a@", "@b", "a b@c", "a@b\n", "a@b@c", "a\x00@b", "\ud800@b", "a@" + "b" * 300, "<a@b>"]
)
async def test_email_that_is_malformed_is_invalid(hub: IdentityHub, root: Account, email: str) -> None:
    assert (await error_of(hub.accounts.sign_up("Bob", email, PASSWORD))).code == "invalid"


async def test_sign_ups_from_one_network_are_limited(hub: IdentityHub, root: Account) -> None:
    for number in range(10):
        await hub.accounts.sign_up(f"user{number}", "", PASSWORD, network=HOME)
    error = await error_of(hub.accounts.sign_up("one-more", "", PASSWORD, network=HOME))
    assert (error.code, error.retry_after_s) == ("rate_limited", 300)
    await hub.accounts.sign_up("one-more", "", PASSWORD, network=CAFE)


# ── Passwords ────────────────────────────────────────────────────────────────────────────────────────────────────────

ADA = ("ada-lovelace", "countess@example.org")


@pytest.mark.parametrize(
    "password",
    [
        "",
        "fourteen chars"[:14],
        "password1234567",
        "passwordpassword",
        "Password123Password123",
        "qwertyuiopasdfgh",
        "1234567890123456",
        "aaaaaaaaaaaaaaaa",
        "abcabcabcabcabcabc",
        "abababababababab1"[:16],
        "ollama-corral-2026",
        "letmein letmein!",
        "ada-lovelace-2026",
        "countess@example.org",
        "x" * 1025,
        "é" * 600,
        "fifteen and \ud800 more characters",
    ],
)
def test_t073_password_short_long_common_or_made_of_names_is_invalid(password: str) -> None:
    with pytest.raises(CorralError) as error:
        check_password(password, own_words=ADA)
    assert (error.value.code, error.value.status) == ("invalid", 422)
    assert not password or password not in error.value.message


@pytest.mark.parametrize(
    "password",
    [
        PASSWORD,
        "correct horse battery staple",
        "fifteen  chars!",
        "🐎 with spaces and emoji, sixty-four characters long, as it may be",
        "tGq8vLw2ZrPx7Ks",
        "correcthorse-ollama-is-not-all",
        " " + "leading and trailing" + " ",
        "ünïcødé wörds hérè",
        "x1" + "yz" * 30 + "tnkq",
    ],
)
def test_t073_password_that_is_long_and_ones_own_is_accepted(password: str) -> None:
    check_password(password, own_words=ADA)


async def test_t073_every_byte_of_a_long_password_matters() -> None:
    passwords = Passwords(PasswordCost(time_cost=1, memory_kib=8), SeededEntropy())
    long = "a long password " * 60
    kept = await passwords.hash(long)
    assert await passwords.is_right(long, kept)
    assert not await passwords.is_right(long[:-1] + "x", kept)
    assert not await passwords.is_right(long[:72], kept)


async def test_password_typed_in_another_composition_is_the_same() -> None:
    passwords = Passwords(PasswordCost(time_cost=1, memory_kib=8), SeededEntropy())
    assert await passwords.is_right("cafe\u0301 au lait please", await passwords.hash("caf\u00e9 au lait please"))


async def test_password_hash_that_is_damaged_is_unavailable_and_never_right() -> None:
    passwords = Passwords(PasswordCost(time_cost=1, memory_kib=8), SeededEntropy())
    assert (await error_of(passwords.is_right(PASSWORD, "not a hash"))).code == "unavailable"


@given(st.text(st.characters(exclude_categories=[]), max_size=40))
@settings(max_examples=60)
def test_any_password_is_accepted_or_invalid(password: str) -> None:
    try:
        check_password(password, own_words=("Ada", ""))
        code = ""
    except CorralError as error:
        code = error.code
    assert code in ("", "invalid")


# ── Signing in ───────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("name", ["Ada", "ada", "ADA", "ada@example.org", "Ada@Example.org"])
async def test_sign_in_by_name_or_address(hub: IdentityHub, ada: Account, name: str) -> None:
    assert await hub.accounts.sign_in(name, PASSWORD, network=HOME) == ada


async def test_t069_unknown_wrong_and_disabled_get_one_answer(hub: IdentityHub, ada: Account) -> None:
    bob = await hub.add("Bob")
    await hub.accounts.set_disabled("Bob", True)
    attempts = [
        ("nobody", PASSWORD),
        (ada.name, "wrong"),
        (bob.name, PASSWORD),
        (bob.name, "wrong"),
        ("", ""),
        ("\ud800", "\ud800"),
    ]
    attempts.append((ada.name, "x" * 5000))
    errors = [await error_of(hub.accounts.sign_in(name, password, network=HOME)) for name, password in attempts]
    answers = {(error.code, error.status, error.message, str(error.detail), error.retry_after_s) for error in errors}
    assert answers == {("unauthorized", 401, "the name or the password is not right", "{}", None)}


@pytest.mark.parametrize("way", ["sign in", "step up"])
@pytest.mark.parametrize("password", [PASSWORD, "wrong"])
async def test_t069_disabled_account_is_limited_alike_with_the_right_password(
    hub: IdentityHub, ada: Account, password: str, way: str
) -> None:
    session, _ = await hub.session(ada)
    await hub.accounts.set_disabled("Ada", True)
    doing = {
        "sign in": lambda: hub.accounts.sign_in("Ada", password, network=HOME),
        "step up": lambda: hub.accounts.step_up(session, password, network=HOME),
    }[way]
    codes = [(await error_of(doing())).code for _ in range(12)]
    assert codes == ["unauthorized"] * 10 + ["rate_limited"] * 2


async def test_t069_unknown_wrong_and_disabled_take_the_same_time() -> None:
    # Real time, since what is measured is the work that argon2 does. 2 ms each, so that a skipped hash would stand out.
    store = MemoryAccounts()
    rules = AccountRules(password_cost=PasswordCost(time_cost=1, memory_kib=1024))
    clock = FakeClock()
    accounts = Accounts(
        accounts=store, sessions=MemorySessions(store), audit=MemoryAudit(), clock=clock, entropy=SeededEntropy(), rules=rules
    )
    for name in ("Ada", "Bob", "Grace"):
        await accounts.add(name, email="", password=PASSWORD, is_admin=name == "Grace")
    await accounts.set_disabled("Bob", True)

    async def time_s(name: str) -> float:
        clock.advance(60)
        started = perf_counter()
        await error_of(accounts.sign_in(name, "not the password", network=HOME))
        return perf_counter() - started

    times = {name: [] for name in ("nobody", "Ada", "Bob")}  # type: dict[str, list[float]]
    for _ in range(25):
        for name, taken in times.items():
            taken.append(await time_s(name))
    medians = [median(taken) for taken in times.values()]
    assert max(medians) - min(medians) < 0.005


async def test_sign_in_hashes_again_when_the_cost_was_raised(hub: IdentityHub, ada: Account) -> None:
    old = await hub.account_store.password_hash(ada.id)
    dearer = Accounts(
        accounts=hub.account_store,
        sessions=hub.session_store,
        audit=hub.audit,
        clock=hub.clock,
        entropy=hub.entropy,
        rules=AccountRules(password_cost=PasswordCost(time_cost=2, memory_kib=8)),
    )
    await error_of(dearer.sign_in("Ada", "wrong", network=HOME))
    assert await hub.account_store.password_hash(ada.id) == old
    await dearer.sign_in("Ada", PASSWORD, network=HOME)
    new = await hub.account_store.password_hash(ada.id)
    assert new != old
    await dearer.sign_in("Ada", PASSWORD, network=HOME)
    assert await hub.account_store.password_hash(ada.id) == new


async def test_guessing_at_one_account_is_limited_and_its_owner_elsewhere_is_not(hub: IdentityHub, ada: Account) -> None:
    for _ in range(10):
        assert (await error_of(hub.accounts.sign_in("Ada", "wrong", network=CAFE))).code == "unauthorized"
    error = await error_of(hub.accounts.sign_in("Ada", PASSWORD, network=CAFE))
    assert (error.code, error.status, error.retry_after_s) == ("rate_limited", 429, 300)
    assert (await error_of(hub.accounts.sign_in("ada@example.org", PASSWORD, network=CAFE))).code == "rate_limited"
    assert await hub.accounts.sign_in("Ada", PASSWORD, network=HOME) == ada


async def test_guessing_limit_ends_with_its_window_and_after_a_success(hub: IdentityHub, ada: Account) -> None:
    for _ in range(9):
        await error_of(hub.accounts.sign_in("Ada", "wrong", network=HOME))
    await hub.accounts.sign_in("Ada", PASSWORD, network=HOME)
    for _ in range(10):
        assert (await error_of(hub.accounts.sign_in("Ada", "wrong", network=HOME))).code == "unauthorized"
        hub.clock.advance(1)
    error = await error_of(hub.accounts.sign_in("Ada", PASSWORD, network=HOME))
    assert error.retry_after_s == 290
    hub.clock.advance(290)
    assert await hub.accounts.sign_in("Ada", PASSWORD, network=HOME) == ada


async def test_guessing_in_parallel_gets_no_more_tries(hub: IdentityHub, ada: Account) -> None:
    guesses = (error_of(hub.accounts.sign_in("Ada", "wrong", network=HOME)) for _ in range(50))
    codes = [error.code for error in await asyncio.gather(*guesses)]
    assert codes.count("unauthorized") == 10
    assert codes.count("rate_limited") == 40


async def test_guessing_at_many_accounts_from_one_network_is_limited(hub: IdentityHub, ada: Account) -> None:
    for number in range(60):
        await error_of(hub.accounts.sign_in(f"user{number}", "wrong", network="2001:db8::1"))
    assert (await error_of(hub.accounts.sign_in("Ada", PASSWORD, network="2001:db8::ffff:1"))).code == "rate_limited"
    assert await hub.accounts.sign_in("Ada", PASSWORD, network="2001:db8:0:1::1") == ada


async def test_guessing_from_everywhere_is_limited(hub: IdentityHub, ada: Account) -> None:
    for number in range(1000):
        await error_of(hub.accounts.sign_in("nobody", "x" * 2000, network=f"10.0.{number // 200}.{number % 200}"))
    assert (await error_of(hub.accounts.sign_in("Ada", PASSWORD, network=HOME))).code == "rate_limited"


async def test_t072_one_network_cannot_use_up_the_attempts_of_all_others(hub: IdentityHub, ada: Account) -> None:
    for number in range(1010):
        await error_of(hub.accounts.sign_in(f"user{number}", "x" * 2000, network=CAFE))
    assert await hub.accounts.sign_in("Ada", PASSWORD, network=HOME) == ada
    session, _ = await hub.session(ada)
    await hub.accounts.step_up(session, PASSWORD, network=HOME)


async def test_t072_one_network_cannot_use_up_the_sign_ups_of_all_others(hub: IdentityHub, root: Account) -> None:
    for _ in range(110):
        await error_of(hub.accounts.sign_up("", "", PASSWORD, network=CAFE))
    await hub.accounts.sign_up("Bob", "", PASSWORD, network=HOME)


def test_t072_refused_attempt_is_counted_nowhere_and_told_the_longest_wait() -> None:
    clock, wide, narrow = FakeClock(), per_minutes(2, 5), per_minutes(1, 10)
    throttle = Throttle(clock)
    throttle.attempt((wide, ("all",)), (narrow, ("one",)))
    for _ in range(5):
        with pytest.raises(CorralError) as refused:
            throttle.attempt((wide, ("all",)), (narrow, ("one",)))
        assert refused.value.retry_after_s == 600
    throttle.attempt((wide, ("all",)), (narrow, ("two",)))
    with pytest.raises(CorralError) as both:
        throttle.attempt((wide, ("all",)), (narrow, ("two",)))
    assert both.value.retry_after_s == 600


def test_attempts_kept_in_memory_are_bounded() -> None:
    clock, limit = FakeClock(), per_minutes(1, 5)
    throttle = Throttle(clock, max_keys=10)
    for number in range(11):
        throttle.attempt((limit, (str(number),)))
    throttle.attempt((limit, ("0",)))  # the oldest was forgotten for the eleventh
    with pytest.raises(CorralError):
        throttle.attempt((limit, ("10",)))


# ── Sessions ─────────────────────────────────────────────────────────────────────────────────────────────────────────


async def test_session_opened_is_found_by_its_cookie_and_kept_as_a_digest(hub: IdentityHub, ada: Account) -> None:
    session, cookie = await hub.accounts.open_session(ada, network=HOME, user_agent="Mozilla\r\n\x1b[1m" + "x" * 500)
    assert await hub.accounts.session(cookie.reveal()) == (session, ada)
    assert re.fullmatch(r"[A-Za-z0-9_-]{43}", cookie.reveal())
    assert cookie.reveal() not in repr(session)
    assert re.fullmatch(r"[0-9a-f]{64}", session.id)
    assert session.user_agent.isprintable()
    assert len(session.user_agent) == 200


@pytest.mark.parametrize("cookie", ["", "x", "A" * 42, "A" * 44, "A" * 42 + "\n", "A" * 42 + "é", "\ud800" * 43, "' OR 1=1--"])
async def test_session_of_a_malformed_cookie_is_none_without_a_look_up(hub: IdentityHub, ada: Account, cookie: str) -> None:
    before = hub.lookups
    assert await hub.accounts.session(cookie) is None
    assert hub.lookups == before


async def test_session_of_an_unknown_cookie_is_none(hub: IdentityHub) -> None:
    assert await hub.accounts.session("A" * 43) is None


async def test_session_unused_for_a_day_ends_and_used_ones_go_on(hub: IdentityHub, ada: Account) -> None:
    _, used = await hub.session(ada)
    _, unused = await hub.session(ada)
    for _ in range(24):
        hub.clock.advance(3600)
        assert await hub.accounts.session(used) is not None
    assert await hub.accounts.session(unused) is None
    assert await hub.accounts.session(used) is not None


async def test_session_ends_after_thirty_days_however_much_it_is_used(hub: IdentityHub, ada: Account) -> None:
    _, cookie = await hub.session(ada)
    for _ in range(59):
        hub.clock.advance(12 * 3600)
        assert await hub.accounts.session(cookie) is not None
    hub.clock.advance(12 * 3600)
    assert await hub.accounts.session(cookie) is None


async def test_session_of_an_administrator_is_short(hub: IdentityHub, root: Account) -> None:
    _, unused = await hub.session(root)
    _, used = await hub.session(root)
    for _ in range(13):
        hub.clock.advance(3300)
        assert await hub.accounts.session(used) is not None
    assert await hub.accounts.session(unused) is None
    hub.clock.advance(300)
    assert await hub.accounts.session(used) is None


async def test_session_use_is_written_once_a_minute(hub: IdentityHub, ada: Account) -> None:
    _, cookie = await hub.session(ada)
    for _ in range(120):
        hub.clock.advance(1)
        await hub.accounts.session(cookie)
    assert hub.session_store.calls["update"] == 2


async def test_session_is_readable_while_the_database_cannot_be_written(hub: IdentityHub, ada: Account) -> None:
    session, cookie = await hub.session(ada)
    hub.clock.advance(120)
    hub.session_store.update = _failing("unavailable")  # type: ignore[method-assign]
    assert await hub.accounts.session(cookie) == (session, ada)
    hub.session_store.update = _failing("internal")  # type: ignore[method-assign]
    assert (await error_of(hub.accounts.session(cookie))).code == "internal"


def _failing(code: str):  # type: ignore[no-untyped-def]
    async def fail(*_: object, **__: object) -> None:
        raise CorralError(code)

    return fail


async def test_t059_session_of_a_store_that_fails_is_an_error_and_never_none(hub: IdentityHub, ada: Account) -> None:
    _, cookie = await hub.session(ada)
    hub.session_store.fails = CorralError("unavailable")
    assert (await error_of(hub.accounts.session(cookie))).code == "unavailable"


async def test_t074_signing_in_twice_gives_different_ids(hub: IdentityHub, ada: Account) -> None:
    (one, cookie), (two, cookie2) = await hub.session(ada), await hub.session(ada)
    assert len({one.id, two.id, one.csrf, two.csrf, cookie, cookie2}) == 6


async def test_t074_step_up_changes_the_id_and_ends_the_old_session(hub: IdentityHub, ada: Account) -> None:
    session, cookie = await hub.session(ada)
    hub.clock.advance(600)
    renewed, new_cookie = await hub.accounts.step_up(session, PASSWORD, network=HOME)
    assert renewed.id != session.id
    assert renewed.csrf != session.csrf
    assert renewed.authenticated_at == hub.clock.now()
    assert renewed.expires_at == session.expires_at
    assert await hub.accounts.session(cookie) is None
    assert await hub.accounts.session(new_cookie.reveal()) == (renewed, ada)


async def test_t074_step_up_with_a_wrong_password_changes_nothing_and_is_limited(hub: IdentityHub, ada: Account) -> None:
    session, cookie = await hub.session(ada)
    for _ in range(10):
        assert (await error_of(hub.accounts.step_up(session, "wrong", network=HOME))).code == "unauthorized"
    assert (await error_of(hub.accounts.step_up(session, PASSWORD, network=HOME))).code == "rate_limited"
    assert await hub.accounts.session(cookie) == (session, ada)


async def test_t074_step_up_of_a_disabled_account_is_refused(hub: IdentityHub, root: Account, ada: Account) -> None:
    session, _ = await hub.session(ada)
    await hub.accounts.set_disabled("Ada", True)
    assert (await error_of(hub.accounts.step_up(session, PASSWORD, network=HOME))).code == "unauthorized"


@pytest.mark.parametrize("change", ["password", "own password", "disable", "promote", "demote", "remove"])
async def test_t074_change_of_authority_ends_every_session(hub: IdentityHub, root: Account, change: str) -> None:
    ada = await hub.add("Ada", is_admin=change == "demote")
    cookies = [(await hub.session(ada))[1] for _ in range(2)]
    other = (await hub.session(root))[1]
    match change:
        case "password":
            await hub.accounts.set_password("Ada", "another good long password")
        case "own password":
            session, _ = await hub.session(ada)
            _, new = await hub.accounts.change_password(session, PASSWORD, "another good long password", network=HOME)
            assert await hub.accounts.session(new.reveal()) is not None
        case "disable":
            await hub.accounts.set_disabled("Ada", True)
        case "promote":
            await hub.accounts.promote("Ada")
        case "demote":
            await hub.accounts.demote("Ada")
        case "remove":
            await hub.accounts.remove("Ada")
    assert [await hub.accounts.session(cookie) for cookie in cookies] == [None, None]
    assert await hub.accounts.session(other) is not None


async def test_sign_out_ends_one_session(hub: IdentityHub, ada: Account) -> None:
    (session, cookie), (_, other) = await hub.session(ada), await hub.session(ada)
    await hub.accounts.sign_out(session)
    assert await hub.accounts.session(cookie) is None
    assert await hub.accounts.session(other) is not None


async def test_sessions_of_an_account_are_listed_without_idle_ones_and_ended_but_for_ones_own(
    hub: IdentityHub, ada: Account
) -> None:
    idle, _ = await hub.session(ada)
    hub.clock.advance(13 * 3600)
    (session, cookie), (other, other_cookie) = await hub.session(ada), await hub.session(ada)
    hub.clock.advance(12 * 3600)
    assert idle not in await hub.accounts.sessions_of(ada)
    assert {found.id for found in await hub.accounts.sessions_of(ada)} == {session.id, other.id}
    await hub.accounts.sign_out_others(session, network=HOME)
    assert await hub.accounts.session(cookie) is not None
    assert await hub.accounts.session(other_cookie) is None
    assert [found.id for found in await hub.accounts.sessions_of(ada)] == [session.id]
    assert hub.audit.actions[-1] == "session.close_others"


# ── Administration ───────────────────────────────────────────────────────────────────────────────────────────────────


async def test_disabled_account_is_refused_and_enabled_again_let_in(hub: IdentityHub, ada: Account) -> None:
    await hub.accounts.set_disabled("ada", True)
    assert (await error_of(hub.accounts.sign_in("Ada", PASSWORD, network=HOME))).code == "unauthorized"
    disabled = await hub.accounts.set_disabled("Ada", True)
    assert not disabled.is_active
    assert hub.audit.actions.count("account.disable") == 1
    assert await hub.accounts.set_disabled("Ada", False) == ada
    assert await hub.accounts.sign_in("Ada", PASSWORD, network=HOME) == ada


async def test_password_set_replaces_the_old_one(hub: IdentityHub, ada: Account) -> None:
    await hub.accounts.set_password("Ada", "another good long password")
    assert (await error_of(hub.accounts.sign_in("Ada", PASSWORD, network=HOME))).code == "unauthorized"
    assert await hub.accounts.sign_in("Ada", "another good long password", network=HOME) == ada
    assert (await error_of(hub.accounts.set_password("Ada", "short"))).code == "invalid"


async def test_own_password_is_changed_only_with_the_old_one(hub: IdentityHub, ada: Account) -> None:
    session, _ = await hub.session(ada)
    changing = hub.accounts.change_password(session, "wrong", "another good long password", network=HOME)
    assert (await error_of(changing)).code == "unauthorized"
    assert await hub.accounts.sign_in("Ada", PASSWORD, network=HOME) == ada


async def test_promoted_account_is_an_administrator_until_demoted(hub: IdentityHub, root: Account, ada: Account) -> None:
    assert (await hub.accounts.promote("Ada")).is_admin
    assert (await hub.accounts.promote("Ada")).is_admin
    assert not (await hub.accounts.demote("Ada")).is_admin
    assert not (await hub.accounts.demote("Ada")).is_admin


async def test_t062_disabling_is_not_undone_by_a_promotion_at_the_same_time(
    hub: IdentityHub, root: Account, ada: Account
) -> None:
    hub.audit.pauses = True
    await asyncio.gather(hub.accounts.set_disabled("Ada", True), hub.accounts.promote("Ada"))
    found = await hub.accounts.named("Ada")
    assert (found.is_active, found.is_admin) == (False, True)


async def test_last_two_administrators_demoted_at_once_leave_one(hub: IdentityHub, root: Account) -> None:
    await hub.add("Ada", is_admin=True)
    hub.audit.pauses = True
    outcomes = await asyncio.gather(hub.accounts.demote("Ada"), hub.accounts.demote("Grace"), return_exceptions=True)
    assert [getattr(outcome, "code", "") for outcome in outcomes] == ["", "conflict"]
    assert hub.audit.actions[-2:] == ["account.demote", "account.demote_refused"]
    assert [account.name for account in await hub.accounts.list() if account.is_admin] == ["Grace"]


async def test_last_administrator_is_neither_disabled_demoted_nor_removed(hub: IdentityHub, root: Account, ada: Account) -> None:
    for doing in (hub.accounts.set_disabled("Grace", True), hub.accounts.demote("Grace"), hub.accounts.remove("Grace")):
        assert (await error_of(doing)).code == "conflict"
    await hub.accounts.promote("Ada")
    await hub.accounts.remove("Grace")
    assert (await error_of(hub.accounts.set_disabled("Ada", True))).code == "conflict"


async def test_t119_removed_account_cannot_sign_in_and_keeps_its_name(hub: IdentityHub, root: Account, ada: Account) -> None:
    await hub.accounts.remove("Ada")
    assert (await error_of(hub.accounts.sign_in("Ada", PASSWORD, network=HOME))).code == "unauthorized"
    for name in ("Ada", "ADA"):
        assert (await error_of(hub.accounts.sign_up(name, "", PASSWORD))).code == "conflict"
    assert [account.name for account in await hub.accounts.list()] == ["Grace"]


@pytest.mark.parametrize("verb", ["set_disabled", "set_password", "promote", "demote", "remove"])
async def test_unknown_account_is_not_found(hub: IdentityHub, verb: str) -> None:
    arguments = {"set_disabled": [True], "set_password": [PASSWORD]}.get(verb, [])
    error = await error_of(getattr(hub.accounts, verb)("no\r\nbody", *arguments))
    assert error.code == "not_found"
    assert error.message.isprintable()


# ── Audit ────────────────────────────────────────────────────────────────────────────────────────────────────────────


async def test_t114_every_change_of_authority_is_in_the_audit_log(hub: IdentityHub, root: Account) -> None:
    hub.audit.events.clear()
    ada = await hub.accounts.sign_up("Ada", "", PASSWORD, network=HOME)
    session, _ = await hub.session(ada)
    session, _ = await hub.accounts.step_up(session, PASSWORD, network=HOME)
    session, _ = await hub.accounts.change_password(session, PASSWORD, "another good long password", network=HOME)
    await hub.accounts.sign_out(session)
    await hub.accounts.promote("Ada", actor=root.id)
    await hub.accounts.demote("Ada", actor=root.id)
    await hub.accounts.set_disabled("Ada", True, actor=root.id)
    await hub.accounts.set_disabled("Ada", False, actor=root.id)
    await hub.accounts.set_password("Ada", PASSWORD, actor=root.id)
    await hub.accounts.remove("Ada", actor=root.id)
    assert hub.audit.actions == [
        "account.create",
        "session.open",
        "session.step_up",
        "account.password",
        "session.open",
        "session.close",
        "account.promote",
        "account.demote",
        "account.disable",
        "account.enable",
        "account.password",
        "account.remove",
    ]
    assert {event.subject for event in hub.audit.events} == {ada.id}
    assert {event.actor for event in hub.audit.events[6:]} == {root.id}
    assert PASSWORD not in repr(hub.audit.events)


async def test_t114_refused_sign_ins_are_in_the_audit_log_once_in_a_while_and_without_what_was_typed(
    hub: IdentityHub, ada: Account
) -> None:
    hub.audit.events.clear()
    for name in ("Ada", *(f"my-secret-{number}" for number in range(59))):
        await error_of(hub.accounts.sign_in(name, "my-secret", network=CAFE))
    assert [(event.action, event.subject, event.network) for event in hub.audit.events] == [("session.refused", ada.id, CAFE)]
    await error_of(hub.accounts.sign_in("Ada", PASSWORD, network=CAFE))
    await error_of(hub.accounts.sign_in("Ada", PASSWORD, network=CAFE))
    assert [event.note for event in hub.audit.events] == ["wrong name or password", "too many attempts"]
    await error_of(hub.accounts.sign_in("nobody", PASSWORD, network=HOME))
    assert (hub.audit.events[-1].subject, hub.audit.events[-1].network) == ("", HOME)
    hub.clock.advance(600)
    await error_of(hub.accounts.sign_in("Ada", "wrong", network=CAFE))
    assert hub.audit.actions == ["session.refused"] * 4
    assert "secret" not in repr(hub.audit.events)


async def test_t114_refused_step_up_is_in_the_audit_log_with_its_network_beside_refused_sign_ins(
    hub: IdentityHub, ada: Account
) -> None:
    session, _ = await hub.session(ada)
    hub.audit.events.clear()
    await error_of(hub.accounts.sign_in("Ada", "wrong", network=CAFE))
    for _ in range(2):
        await error_of(hub.accounts.step_up(session, "wrong", network=CAFE))
    await error_of(hub.accounts.change_password(session, "wrong", PASSWORD, network=HOME))
    refused = ("session.step_up_refused", ada.id, "wrong password")
    assert [(event.action, event.actor, event.note, event.network) for event in hub.audit.events[1:]] == [
        (*refused, CAFE),
        (*refused, HOME),
    ]


async def test_hub_is_new_until_it_has_an_account(hub: IdentityHub) -> None:
    assert await hub.accounts.is_new()
    await hub.add("Ada")
    assert not await hub.accounts.is_new()
    assert not await hub.accounts.is_new()


async def test_t114_administration_is_audited_with_its_network(hub: IdentityHub, root: Account, ada: Account) -> None:
    session, _ = await hub.session(ada, network=HOME)
    hub.audit.events.clear()
    await hub.accounts.sign_out(session, network=CAFE)
    await hub.accounts.promote("Ada", network=CAFE)
    await hub.accounts.demote("Ada", network=CAFE)
    await hub.accounts.set_disabled("Ada", True, network=CAFE)
    await hub.accounts.set_password("Ada", "another good long password", network=CAFE)
    await hub.accounts.add("Eve", email="", password=PASSWORD, is_admin=False, network=CAFE)
    await hub.accounts.remove("Ada", network=CAFE)
    assert {event.network for event in hub.audit.events} == {CAFE}


async def test_sign_in_is_refused_alike_when_that_cannot_be_audited(hub: IdentityHub, ada: Account) -> None:
    hub.audit.fails = CorralError("unavailable")
    assert (await error_of(hub.accounts.sign_in("Ada", "wrong", network=HOME))).code == "unauthorized"
    hub.audit.fails = CorralError("internal")
    assert (await error_of(hub.accounts.sign_in("Ada", "wrong", network=CAFE))).code == "internal"


@pytest.mark.parametrize(
    "verb", ["add", "sign_up", "set_disabled", "set_password", "promote", "demote", "remove", "open_session"]
)
async def test_change_that_cannot_be_audited_does_not_happen(hub: IdentityHub, root: Account, verb: str) -> None:
    bob = await hub.add("Bob", is_admin=verb == "demote")
    _, cookie = await hub.session(bob)
    before = await hub.accounts.list(), await hub.account_store.password_hash(bob.id)
    opened = hub.session_store.calls["add"]
    hub.audit.fails = CorralError("unavailable", retry_after_s=1)
    doing = {
        "add": lambda: hub.accounts.add("Eve", email="", password=PASSWORD, is_admin=False),
        "sign_up": lambda: hub.accounts.sign_up("Eve", "", PASSWORD),
        "set_disabled": lambda: hub.accounts.set_disabled("Bob", True),
        "set_password": lambda: hub.accounts.set_password("Bob", "another good long password"),
        "promote": lambda: hub.accounts.promote("Bob"),
        "demote": lambda: hub.accounts.demote("Bob"),
        "remove": lambda: hub.accounts.remove("Bob"),
        "open_session": lambda: hub.accounts.open_session(bob, network=HOME, user_agent=""),
    }[verb]
    assert (await error_of(doing())).code == "unavailable"
    assert (await hub.accounts.list(), await hub.account_store.password_hash(bob.id)) == before
    assert hub.session_store.calls["add"] == opened
    assert await hub.accounts.session(cookie) is not None
