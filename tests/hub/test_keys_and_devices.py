"""What a person does with devices and API keys: connect, list, rename, revoke, create, rotate."""

import asyncio
from dataclasses import replace
from datetime import UTC, datetime, timedelta, timezone
from typing import Any

import pytest

from corral.core.policy import ALL_SCOPES, DEVICE_SCOPES
from corral.core.records import Account, BrowserSession, Device, Principal, Proof, Scope
from corral.core.registry import Grant
from corral.hub.credentials import MAX_KEY_LIFE, MAX_LIVE_KEYS
from corral.hub.networks import network_of
from corral.wire.errors import CorralError
from corral.wire.signing import DevicePrivateKey
from fakes import NOON
from identity_hub import CAFE, HOME, LAPTOP, PHONE, IdentityHub, bearer, browser, error_of

TAIL = LAPTOP.public.fingerprint[-6:]
STRANGER = "a" + "0" * 24


@pytest.fixture
def hub() -> IdentityHub:
    return IdentityHub()


@pytest.fixture
async def ada(hub: IdentityHub) -> Account:
    return await hub.add("Ada")


@pytest.fixture
async def bob(hub: IdentityHub) -> Account:
    return await hub.add("Bob")


@pytest.fixture
async def session(hub: IdentityHub, ada: Account) -> BrowserSession:
    return (await hub.session(ada))[0]


async def knock(hub: IdentityHub, key: DevicePrivateKey = LAPTOP, *, network: str = HOME) -> str:
    """Let a device call /api/me; the code of the link it is given."""
    link: str = (await hub.refusal(hub.stock(key, network=network))).detail["signin_url"]
    return link.rpartition("code=")[2]


async def connect(hub: IdentityHub, session: BrowserSession, account: Account, **changes: Any) -> Device:
    values = {"encoded_key": LAPTOP.public.encoded, "name": "dev box", "code": "", "network": HOME, **changes}
    return await hub.credentials.connect_device(session, account, **values)


# ── Connecting ───────────────────────────────────────────────────────────────────────────────────────────────────────


async def test_device_that_knocked_is_connected_and_let_in(hub: IdentityHub, ada: Account, session: BrowserSession) -> None:
    code = await knock(hub)
    device = await connect(hub, session, ada, code=code)
    assert (device.account_id, device.name, device.key, device.scopes) == (ada.id, "dev box", LAPTOP.public, DEVICE_SCOPES)
    assert (await hub.who(hub.stock())).device == device
    assert hub.audit.events[-1].action == "device.connect"
    assert hub.audit.events[-1].note == f"dev box {LAPTOP.public.fingerprint}"


async def test_link_without_a_code_connects_on_the_devices_own_network(
    hub: IdentityHub, ada: Account, session: BrowserSession
) -> None:
    await knock(hub)
    assert (await connect(hub, session, ada)).account_id == ada.id


@pytest.mark.parametrize(("scopes", "kept"), [({Scope.INFERENCE}, {Scope.INFERENCE}), (set(), set())])
async def test_device_gets_only_the_ticked_scopes(
    hub: IdentityHub, ada: Account, session: BrowserSession, scopes: set[Scope], kept: set[Scope]
) -> None:
    await knock(hub)
    await connect(hub, session, ada, scopes=frozenset(scopes))
    assert (await hub.who(hub.stock())).scopes == kept


async def test_t045_device_that_did_not_knock_lately_conflicts(hub: IdentityHub, ada: Account, session: BrowserSession) -> None:
    assert (await error_of(connect(hub, session, ada))).code == "conflict"
    code = await knock(hub)
    hub.clock.advance(15 * 60 + 1)
    fresh = (await hub.session(ada))[0]
    assert (await error_of(connect(hub, fresh, ada, code=code))).code == "conflict"
    assert await hub.credentials.devices_of(ada) == []


@pytest.mark.parametrize("code", ["0" * 32, "x", "é", "\ud800"])
async def test_t050_wrong_or_old_code_is_gone(hub: IdentityHub, ada: Account, session: BrowserSession, code: str) -> None:
    await knock(hub)
    assert (await error_of(connect(hub, session, ada, code=code))).code == "gone"


async def test_t050_code_used_up_by_connecting_is_not_used_again(
    hub: IdentityHub, ada: Account, bob: Account, session: BrowserSession
) -> None:
    code = await knock(hub)
    device = await connect(hub, session, ada, code=code)
    await hub.credentials.revoke_device(ada, device.id)
    of_bob = (await hub.session(bob))[0]
    assert (await error_of(connect(hub, of_bob, bob, code=code))).code == "conflict"
    assert await knock(hub) != code


@pytest.mark.parametrize("code_is_sent", [True, False])
async def test_t045_browser_in_another_network_must_type_the_tail(
    hub: IdentityHub, ada: Account, session: BrowserSession, code_is_sent: bool
) -> None:
    code = await knock(hub, network=CAFE)
    code = code if code_is_sent else ""
    for wrong in ("", TAIL.swapcase(), TAIL[1:], "é", "\ud800"):
        error = await error_of(connect(hub, session, ada, code=code, fingerprint_tail=wrong))
        assert error.code in ("invalid", "rate_limited")
    assert (await error_of(connect(hub, session, ada, code=code, fingerprint_tail=TAIL))).code == "rate_limited"
    hub.clock.advance(15 * 60)
    code = await knock(hub, network=CAFE)
    fresh = (await hub.session(ada))[0]
    assert (await connect(hub, fresh, ada, code=code, fingerprint_tail=f" {TAIL} ")).account_id == ada.id


async def test_t045_refused_connections_are_in_the_audit_log_once_in_a_while(
    hub: IdentityHub, ada: Account, session: BrowserSession
) -> None:
    code = await knock(hub, network=CAFE)
    hub.audit.events.clear()
    for _ in range(6):
        await error_of(connect(hub, session, ada, code=code, fingerprint_tail="xxxxxx"))
    events = [(event.action, event.actor, event.subject, event.network, event.note) for event in hub.audit.events]
    about = ("device.connect_refused", ada.id, LAPTOP.public.fingerprint, HOME)
    assert events == [(*about, "invalid"), (*about, "rate_limited")]
    hub.clock.advance(600)
    fresh = (await hub.session(ada))[0]
    await error_of(connect(hub, fresh, ada, code="0" * 32))
    assert (hub.audit.events[-1].action, hub.audit.events[-1].note) == ("device.connect_refused", "gone")


async def test_t045_right_tail_forgives_the_wrong_ones(hub: IdentityHub, ada: Account, session: BrowserSession) -> None:
    for key in (LAPTOP, PHONE):
        await knock(hub, key, network=CAFE)
        for _ in range(4):
            error = await error_of(connect(hub, session, ada, encoded_key=key.public.encoded, fingerprint_tail="xxxxxx"))
            assert error.code == "invalid"
        tail = key.public.fingerprint[-6:]
        await connect(hub, session, ada, encoded_key=key.public.encoded, fingerprint_tail=tail)


async def test_t046_password_typed_long_ago_is_asked_for_first(hub: IdentityHub, ada: Account, session: BrowserSession) -> None:
    await knock(hub)
    hub.clock.advance(301)
    error = await error_of(connect(hub, session, ada))
    assert (error.code, error.detail) == ("forbidden", {"step_up": True})


async def test_t047_key_of_another_account_conflicts_and_stays(
    hub: IdentityHub, ada: Account, bob: Account, session: BrowserSession
) -> None:
    device = await hub.link(bob)
    assert (await error_of(connect(hub, session, ada))).code == "conflict"
    assert (await hub.who(hub.stock())).device == device


async def test_t047_two_accounts_at_once_make_one_link(
    hub: IdentityHub, ada: Account, bob: Account, session: BrowserSession
) -> None:
    code = await knock(hub)
    of_bob = (await hub.session(bob))[0]
    connecting = (connect(hub, session, ada, code=code), connect(hub, of_bob, bob, code=code))
    outcomes = await asyncio.gather(*connecting, return_exceptions=True)
    assert sorted(isinstance(outcome, CorralError) for outcome in outcomes) == [False, True]


async def test_connecting_twice_gives_the_same_device(hub: IdentityHub, ada: Account, session: BrowserSession) -> None:
    await knock(hub)
    assert await connect(hub, session, ada) == await connect(hub, session, ada, name="other")


async def test_device_that_vanished_meanwhile_conflicts(hub: IdentityHub, ada: Account, session: BrowserSession) -> None:
    await knock(hub)
    await connect(hub, session, ada)
    look_up, answers = hub.store.device, [await hub.store.device(LAPTOP.public), None]

    async def changing(_: object) -> object:
        return answers.pop(0)

    hub.store.device = changing  # type: ignore[assignment,method-assign]
    assert (await error_of(connect(hub, session, ada))).code == "conflict"
    hub.store.device = look_up  # type: ignore[method-assign]


@pytest.mark.parametrize("key", ["", "junk", "\ud800", LAPTOP.public.encoded + "=", LAPTOP.public.authorized_key, "A" * 10_240])
async def test_t020_damaged_key_of_a_link_is_a_bad_request(
    hub: IdentityHub, ada: Account, session: BrowserSession, key: str
) -> None:
    assert (await error_of(connect(hub, session, ada, encoded_key=key))).code == "bad_request"


async def test_pending_device_tells_what_the_page_must_show(hub: IdentityHub, ada: Account, bob: Account) -> None:
    async def pending(network: str = HOME, account: Account | None = ada) -> tuple[object, ...]:
        found = await hub.credentials.pending_device(
            encoded_key=LAPTOP.public.encoded, name="<b>\r\n", code="", network=network, account=account
        )
        assert found.key == LAPTOP.public
        return found.name, found.sighting is not None, found.needs_tail, found.already

    assert await pending() == ("b", False, True, "")
    await knock(hub, network=HOME)
    assert await pending() == ("b", True, False, "")
    assert await pending(CAFE) == ("b", True, True, "")
    await hub.link(ada)
    assert await pending() == ("b", False, True, "this account")
    assert await pending(account=bob) == ("b", False, True, "another")
    assert await pending(account=None) == ("b", False, True, "another")


async def test_t043_looking_at_a_pending_device_writes_nothing(hub: IdentityHub, ada: Account) -> None:
    await knock(hub)
    before = dict(hub.store.calls), dict(hub.audit.calls), len(hub.sightings)
    await hub.credentials.pending_device(encoded_key=LAPTOP.public.encoded, name="x", code="", network=HOME, account=ada)
    assert (before[0] | {"device": hub.store.calls["device"]}, before[1]) == (dict(hub.store.calls), dict(hub.audit.calls))
    assert len(hub.sightings) == before[2]


async def test_t048_nameless_device_is_called_so(hub: IdentityHub, ada: Account, session: BrowserSession) -> None:
    await knock(hub)
    assert (await connect(hub, session, ada, name="\u202e\x00")).name == "unnamed device"


@pytest.mark.parametrize(
    ("one", "two", "is_same"),
    [
        ("127.0.0.1", "::1", True),
        ("127.0.0.1", "127.9.9.9", True),
        ("192.0.2.1", "192.0.2.1", True),
        ("192.0.2.1", "192.0.2.2", False),
        ("::ffff:192.0.2.1", "192.0.2.1", True),
        ("2001:db8::1", "2001:db8::ffff:ffff:ffff:ffff", True),
        ("2001:db8::1", "2001:db8:0:1::1", False),
        ("unix:", "unix:", True),
        ("", "127.0.0.1", False),
    ],
)
def test_addresses_of_one_network_are_told_from_others(one: str, two: str, is_same: bool) -> None:
    assert (network_of(one) == network_of(two)) is is_same


# ── Devices without a browser ────────────────────────────────────────────────────────────────────────────────────────


async def test_device_is_added_by_hand_once(hub: IdentityHub, ada: Account, bob: Account) -> None:
    device = await hub.link(ada)
    assert await hub.link(ada) == device
    assert (await error_of(hub.link(bob))).code == "conflict"
    assert hub.audit.actions.count("device.add") == 1


async def test_device_added_by_hand_again_gets_the_scopes_it_lacks(hub: IdentityHub, ada: Account) -> None:
    key = LAPTOP.public.authorized_key
    first = await hub.credentials.add_device(ada, name="x", authorized_key=key, scopes=frozenset({Scope.PULL}))
    again = await hub.credentials.add_device(ada, name="x", authorized_key=key, scopes=frozenset({Scope.PUSH}))
    assert (again.id, again.scopes) == (first.id, {Scope.PULL, Scope.PUSH})
    assert await hub.credentials.devices_of(ada) == [again]
    assert hub.audit.actions.count("device.scopes") == 1


async def test_device_added_by_hand_is_no_longer_a_sighting(hub: IdentityHub, ada: Account) -> None:
    await knock(hub)
    await hub.link(ada)
    assert len(hub.sightings) == 0


@pytest.mark.parametrize("key", ["", "ssh-rsa AAAA", "ssh-ed25519", "ssh-ed25519 AAAA", "\ud800"])
async def test_damaged_key_added_by_hand_is_a_bad_request(hub: IdentityHub, ada: Account, key: str) -> None:
    adding = hub.credentials.add_device(ada, name="x", authorized_key=key, scopes=DEVICE_SCOPES)
    assert (await error_of(adding)).code == "bad_request"


async def test_t061_device_added_by_an_api_key_has_no_more_than_the_key(hub: IdentityHub, ada: Account) -> None:
    _, text = await hub.key(ada, {Scope.KEYS, Scope.INFERENCE})
    by_key = await hub.who(bearer(text))
    adding = hub.credentials.add_device(
        by_key, name="x", authorized_key=LAPTOP.public.authorized_key, scopes=frozenset({Scope.PUSH})
    )
    assert (await error_of(adding)).code == "forbidden"
    device = await hub.credentials.add_device(by_key, name="x", authorized_key=LAPTOP.public.authorized_key, scopes=by_key.scopes)
    assert device.scopes == by_key.scopes
    assert hub.audit.events[-1].actor == f"{ada.id} by {by_key.credential_id}"


# ── Managing devices ─────────────────────────────────────────────────────────────────────────────────────────────────


async def test_t062_device_revoked_is_refused_on_the_next_call(hub: IdentityHub, ada: Account) -> None:
    device = await hub.link(ada)
    principals = [await hub.who(hub.stock()), await hub.who(hub.strong())]
    await hub.credentials.revoke_device(ada, device.id, "console")
    assert [(await hub.refusal(request)).code for request in (hub.stock(), hub.strong())] == ["unauthorized"] * 2
    assert [await hub.credentials.is_live(principal) for principal in principals] == [False, False]
    assert hub.audit.events[-1].actor == "console"


async def test_device_linked_anew_does_not_revive_old_streams(hub: IdentityHub, ada: Account) -> None:
    device = await hub.link(ada)
    principal = await hub.who(hub.stock())
    await hub.credentials.revoke_device(ada, device.id)
    assert (await hub.link(ada)).id != device.id
    assert not await hub.credentials.is_live(principal)


async def test_device_is_renamed_to_what_can_be_shown(hub: IdentityHub, ada: Account) -> None:
    device = await hub.link(ada)
    assert (await hub.credentials.rename_device(ada, device.id, "desk\r\n\x1b[1m")).name == "desk 1m"
    assert [found.name for found in await hub.credentials.devices_of(ada)] == ["desk 1m"]
    assert (await error_of(hub.credentials.rename_device(ada, device.id, "\x00"))).code == "invalid"


async def test_devices_are_told_apart(hub: IdentityHub, ada: Account) -> None:
    laptop, phone = await hub.link(ada), await hub.link(ada, PHONE)
    await hub.credentials.rename_device(ada, phone.id, "phone")
    await hub.credentials.rename_device(ada, laptop.id, "desk")
    names = {device.id: device.name for device in await hub.credentials.devices_of(ada)}
    assert names == {laptop.id: "desk", phone.id: "phone"}


async def test_device_with_fewer_scopes_may_do_less_on_its_next_call(hub: IdentityHub, ada: Account) -> None:
    device = await hub.link(ada, scopes=frozenset({Scope.INFERENCE, Scope.PUSH}))
    running = await hub.who(hub.stock())
    changed = await hub.credentials.set_device_scopes(ada, device.id, frozenset({Scope.INFERENCE}), network=HOME)
    assert changed.scopes == (await hub.who(hub.stock())).scopes == (await hub.who(hub.strong())).scopes == {Scope.INFERENCE}
    assert await hub.credentials.is_live(running)
    event = hub.audit.events[-1]
    assert (event.action, event.subject, event.note, event.network) == ("device.scopes", device.id, "laptop: inference", HOME)


async def test_t021_device_that_may_run_nothing_any_more_is_not_live_for_what_it_runs(hub: IdentityHub, ada: Account) -> None:
    device = await hub.link(ada, scopes=frozenset({Scope.INFERENCE, Scope.PULL}))
    running = await hub.who(hub.stock())
    await hub.credentials.set_device_scopes(ada, device.id, frozenset())
    assert not await hub.credentials.is_live(running)
    assert (await hub.who(hub.stock())).scopes == frozenset()
    assert hub.audit.events[-1].note == "laptop: nothing"


async def test_registry_token_of_a_device_has_no_more_than_the_device_has_when_it_is_used(hub: IdentityHub, ada: Account) -> None:
    device = await hub.link(ada, scopes=frozenset({Scope.PULL, Scope.PUSH}))
    grants = [Grant("ada/tiny", frozenset({"pull", "push"}))]
    text = hub.tokens.issue(await hub.who(hub.token()), grants).text.reveal()
    pushing = bearer(text, "PUT", "/v2/ada/tiny/manifests/latest")
    assert (await hub.who(pushing)).scopes == {Scope.PULL, Scope.PUSH}
    await hub.credentials.set_device_scopes(ada, device.id, frozenset({Scope.PULL}))
    assert (await hub.who(pushing)).scopes == {Scope.PULL}


async def test_device_keeps_its_scopes_without_a_row_when_they_are_the_same(hub: IdentityHub, ada: Account) -> None:
    device = await hub.link(ada)
    assert await hub.credentials.set_device_scopes(ada, device.id, device.scopes) == device
    assert "device.scopes" not in hub.audit.actions


async def test_t061_credential_takes_any_scope_of_a_device_back_and_gives_only_its_own(hub: IdentityHub, ada: Account) -> None:
    device = await hub.link(ada, scopes=frozenset({Scope.INFERENCE, Scope.PULL, Scope.PUSH}))
    _, text = await hub.key(ada, {Scope.KEYS})
    by_key = await hub.who(bearer(text))
    change = hub.credentials.set_device_scopes
    assert (await change(by_key, device.id, frozenset({Scope.INFERENCE, Scope.PUSH}))).scopes == {Scope.INFERENCE, Scope.PUSH}
    back = change(by_key, device.id, frozenset({Scope.INFERENCE, Scope.PULL, Scope.PUSH}))
    assert (await error_of(back)).code == "forbidden"


async def test_device_revoked_while_its_scopes_change_is_not_found(hub: IdentityHub, ada: Account) -> None:
    device = await hub.link(ada)

    async def gone(*_: object, **__: object) -> bool:
        return False

    hub.store.set_device_scopes = gone  # type: ignore[assignment,method-assign]
    assert (await error_of(hub.credentials.set_device_scopes(ada, device.id, frozenset()))).code == "not_found"


@pytest.mark.parametrize("device_id", ["foreign", STRANGER, "", "' OR 1=1--", "\r\n" + "x" * 10_000])
async def test_t066_foreign_or_unknown_device_is_not_found_and_audited(
    hub: IdentityHub, ada: Account, bob: Account, device_id: str
) -> None:
    of_bob = await hub.link(bob)
    device_id = of_bob.id if device_id == "foreign" else device_id
    hub.audit.events.clear()
    for doing in (hub.credentials.revoke_device(ada, device_id), hub.credentials.rename_device(ada, device_id, "x")):
        error = await error_of(doing)
        assert (error.code, error.message) == ("not_found", "no such device")
    assert hub.audit.actions == ["device.access_refused"] * 2
    assert {event.actor for event in hub.audit.events} == {ada.id}
    assert (await hub.who(hub.stock())).device == of_bob


async def test_t020_device_signs_itself_out_by_its_stock_signature(hub: IdentityHub, ada: Account) -> None:
    await hub.link(ada)
    principal = await hub.who(hub.stock(method="DELETE", path=f"/api/user/keys/{LAPTOP.public.encoded}"))
    await hub.credentials.sign_out_device(principal, LAPTOP.public.encoded)
    assert (await hub.refusal(hub.stock())).code == "unauthorized"


async def test_t020_stock_signature_does_not_sign_out_another_device(hub: IdentityHub, ada: Account) -> None:
    await hub.link(ada, scopes=DEVICE_SCOPES)
    await hub.link(ada, PHONE)
    principal = await hub.who(hub.stock())
    assert (await error_of(hub.credentials.sign_out_device(principal, PHONE.public.encoded))).code == "forbidden"
    assert (await hub.who(hub.stock(PHONE))).account == ada


@pytest.mark.parametrize(("scope", "code"), [(Scope.KEYS, ""), (Scope.INFERENCE, "forbidden")])
async def test_signing_out_another_device_takes_the_scope_keys(hub: IdentityHub, ada: Account, scope: Scope, code: str) -> None:
    await hub.link(ada)
    _, text = await hub.key(ada, {scope})
    by_key = await hub.who(bearer(text))
    if code:
        assert (await error_of(hub.credentials.sign_out_device(by_key, LAPTOP.public.encoded))).code == code
    else:
        await hub.credentials.sign_out_device(by_key, LAPTOP.public.encoded)
    assert len(await hub.credentials.devices_of(ada)) == (1 if code else 0)


async def test_t020_foreign_or_unknown_key_is_not_found_and_stays_linked(hub: IdentityHub, ada: Account, bob: Account) -> None:
    await hub.link(ada)
    of_bob = await hub.link(bob, PHONE)
    principal = await hub.who(hub.stock())
    for key in (PHONE, DevicePrivateKey(bytes([9] * 32))):
        assert (await error_of(hub.credentials.sign_out_device(principal, key.public.encoded))).code == "not_found"
    assert (await hub.who(hub.stock(PHONE))).device == of_bob
    assert hub.audit.actions[-1] == "device.sign_out_refused"


@pytest.mark.parametrize("key", ["", "x" * 10_240, LAPTOP.public.encoded + "=", LAPTOP.public.encoded[:-1], "\ud800", "..%2f"])
async def test_t020_damaged_key_is_a_bad_request(hub: IdentityHub, ada: Account, key: str) -> None:
    await hub.link(ada)
    principal = await hub.who(hub.stock())
    assert (await error_of(hub.credentials.sign_out_device(principal, key))).code == "bad_request"


# ── Creating keys ────────────────────────────────────────────────────────────────────────────────────────────────────


async def test_t053_secret_is_given_once_and_kept_nowhere(hub: IdentityHub, ada: Account) -> None:
    key, secret = await hub.credentials.create_key(ada, name="ci", scopes=ALL_SCOPES, expires_at=None, network=HOME)
    text = secret.reveal()
    assert text.startswith(key.prefix)
    assert text[5:15] == key.id
    kept = repr(vars(hub.store)) + repr(hub.audit.events) + repr(await hub.credentials.keys_of(ada)) + repr((key, secret))
    assert text not in kept
    assert text[15:47] not in kept
    assert hub.audit.events[-1].note == "ci: inference keys models:pull models:push"
    assert hub.audit.events[-1].network == HOME


@pytest.mark.parametrize(
    "changes",
    [
        {"name": ""},
        {"name": "\r\n"},
        {"scopes": frozenset()},
        {"expires_at": NOON},
        {"expires_at": NOON - timedelta(days=1)},
    ],
)
async def test_key_without_name_scope_or_future_is_invalid(hub: IdentityHub, ada: Account, changes: dict[str, Any]) -> None:
    values = {"name": "ci", "scopes": ALL_SCOPES, "expires_at": None, **changes}
    assert (await error_of(hub.credentials.create_key(ada, **values))).code == "invalid"
    assert await hub.credentials.keys_of(ada) == []


_EASTERN, _WESTERN = timezone(timedelta(hours=23, minutes=59)), timezone(-timedelta(hours=23, minutes=59))


@pytest.mark.parametrize("expires_at", [datetime.max.replace(tzinfo=zone) for zone in (UTC, _EASTERN, _WESTERN)])
async def test_t062_key_with_an_expiry_beyond_all_calendars_is_invalid_and_leaves_no_trace(
    hub: IdentityHub, ada: Account, expires_at: datetime
) -> None:
    hub.audit.events.clear()
    assert (await error_of(hub.key(ada, expires_at=expires_at))).code == "invalid"
    assert (await hub.credentials.keys_of(ada), hub.audit.events) == ([], [])


async def test_key_expiry_of_another_time_zone_is_kept_in_utc_and_the_longest_is_ten_years(
    hub: IdentityHub, ada: Account
) -> None:
    latest = NOON + MAX_KEY_LIFE
    key, _ = await hub.credentials.create_key(
        ada, name="ci", scopes=ALL_SCOPES, expires_at=latest.astimezone(timezone(timedelta(hours=-7)))
    )
    assert (key.expires_at, key.expires_at.tzinfo if key.expires_at else None) == (latest, UTC)
    assert (await error_of(hub.key(ada, expires_at=latest + timedelta(microseconds=1)))).code == "invalid"


@pytest.mark.parametrize("scope", [Scope.PULL, Scope.PUSH])
async def test_t061_key_made_by_a_key_has_no_more_scopes(hub: IdentityHub, ada: Account, scope: Scope) -> None:
    _, text = await hub.key(ada, {Scope.KEYS})
    by_key = await hub.who(bearer(text))
    creating = hub.credentials.create_key(by_key, name="x", scopes=frozenset({scope, Scope.KEYS}), expires_at=None)
    error = await error_of(creating)
    assert (error.code, error.status) == ("forbidden", 403)
    assert scope in error.message
    key, _ = await hub.credentials.create_key(by_key, name="x", scopes=frozenset({Scope.KEYS}), expires_at=None)
    assert key.scopes == {Scope.KEYS}


async def test_t061_key_that_manages_keys_may_also_give_inference_and_one_that_does_not_may_not(
    hub: IdentityHub, ada: Account
) -> None:
    wanted = {"name": "x", "scopes": frozenset({Scope.INFERENCE}), "expires_at": None}
    for scopes, is_allowed in [({Scope.KEYS}, True), ({Scope.PULL}, False)]:
        _, text = await hub.key(ada, scopes)
        making = hub.credentials.create_key(await hub.who(bearer(text)), **wanted)
        if is_allowed:
            assert (await making)[0].scopes == {Scope.INFERENCE}
        else:
            assert (await error_of(making)).code == "forbidden"


async def test_t061_key_made_in_a_browser_may_have_every_scope(hub: IdentityHub, ada: Account) -> None:
    _, cookie = await hub.session(ada)
    in_browser = await hub.who(browser(cookie))
    key, _ = await hub.credentials.create_key(in_browser, name="x", scopes=ALL_SCOPES, expires_at=None)
    assert key.scopes == ALL_SCOPES
    assert hub.audit.events[-1].actor == ada.id


async def test_t061_disabled_owner_can_give_nothing_away(hub: IdentityHub, ada: Account) -> None:
    disabled = await hub.accounts.set_disabled("Ada", True)
    creating = hub.credentials.create_key(disabled, name="x", scopes=frozenset({Scope.INFERENCE}), expires_at=None)
    assert (await error_of(creating)).code == "forbidden"


async def test_keys_of_an_account_are_limited_in_number(hub: IdentityHub, ada: Account) -> None:
    ids = [(await hub.key(ada))[0] for _ in range(MAX_LIVE_KEYS)]
    assert (await error_of(hub.key(ada))).code == "conflict"
    await hub.credentials.revoke_key(ada, ids[0])
    await hub.key(ada)


# ── Revoking and rotating keys ───────────────────────────────────────────────────────────────────────────────────────


async def test_key_revoked_twice_is_no_error_and_audited_once(hub: IdentityHub, ada: Account) -> None:
    key_id, _ = await hub.key(ada)
    await hub.credentials.revoke_key(ada, key_id)
    await hub.credentials.revoke_key(ada, key_id)
    assert hub.audit.actions.count("key.revoke") == 1


@pytest.mark.parametrize("key_id", ["foreign", "0123456789", "", "' OR 1=1--", "\r\n" + "x" * 10_000])
async def test_t066_foreign_or_unknown_key_is_not_found_and_audited(
    hub: IdentityHub, ada: Account, bob: Account, key_id: str
) -> None:
    of_bob, text = await hub.key(bob)
    key_id = of_bob if key_id == "foreign" else key_id
    hub.audit.events.clear()
    for doing in (hub.credentials.revoke_key(ada, key_id), hub.credentials.rotate_key(ada, key_id, overlap_s=0)):
        error = await error_of(doing)
        assert (error.code, error.status, error.message) == ("not_found", 404, "no such API key")
    assert [(event.action, event.actor) for event in hub.audit.events] == [("key.access_refused", ada.id)] * 2
    assert (await hub.who(bearer(text))).account == bob


async def test_t064_rotation_without_overlap_refuses_the_old_key_at_once(hub: IdentityHub, ada: Account) -> None:
    key_id, old = await hub.key(ada, {Scope.INFERENCE}, name="build")
    key, secret = await hub.credentials.rotate_key(ada, key_id, overlap_s=0)
    assert (key.name, key.scopes, key.expires_at) == ("build", {Scope.INFERENCE}, None)
    assert (await hub.refusal(bearer(old))).code == "unauthorized"
    assert (await hub.who(bearer(secret.reveal()))).credential_id == key.id


async def test_t064_rotation_with_overlap_keeps_both_for_that_time(hub: IdentityHub, ada: Account) -> None:
    key_id, old = await hub.key(ada)
    _, secret = await hub.credentials.rotate_key(ada, key_id, overlap_s=3600)
    hub.clock.advance(3599)
    for text in (old, secret.reveal()):
        assert (await hub.who(bearer(text))).account == ada
    hub.clock.advance(1)
    assert (await hub.refusal(bearer(old))).code == "unauthorized"
    assert (await hub.who(bearer(secret.reveal()))).account == ada


async def test_t064_rotation_does_not_lengthen_the_old_keys_life(hub: IdentityHub, ada: Account) -> None:
    key_id, old = await hub.key(ada, expires_at=hub.clock.now() + timedelta(hours=1))
    hub.clock.advance(1800)
    new, _ = await hub.credentials.rotate_key(ada, key_id, overlap_s=7 * 24 * 3600)
    assert new.expires_at == hub.clock.now() + timedelta(hours=1)
    hub.clock.advance(1800)
    assert (await hub.refusal(bearer(old))).code == "unauthorized"


async def test_t062_rotation_of_a_key_from_before_the_limit_gives_one_within_it(hub: IdentityHub, ada: Account) -> None:
    await hub.key(ada)
    (made,) = await hub.store.api_keys_of(ada.id)
    endless = replace(made, id="k1", expires_at=datetime.max.replace(tzinfo=UTC))
    await hub.store.add_api_key(endless, hmac=bytes(32), pepper_id="p1")
    new, _ = await hub.credentials.rotate_key(ada, endless.id, overlap_s=0)
    assert new.expires_at == NOON + MAX_KEY_LIFE


async def test_t062_key_is_revoked_by_a_look_up_and_not_by_a_list(hub: IdentityHub, ada: Account) -> None:
    key_id, text = await hub.key(ada)
    listed = hub.store.calls["api_keys_of"]
    await hub.credentials.revoke_key(ada, key_id)
    assert hub.store.calls["api_keys_of"] == listed
    assert (await hub.refusal(bearer(text))).code == "unauthorized"


@pytest.mark.parametrize("overlap_s", [-1, 7 * 24 * 3600 + 1])
async def test_rotation_with_an_impossible_overlap_is_invalid(hub: IdentityHub, ada: Account, overlap_s: int) -> None:
    key_id, _ = await hub.key(ada)
    assert (await error_of(hub.credentials.rotate_key(ada, key_id, overlap_s=overlap_s))).code == "invalid"


@pytest.mark.parametrize("end", ["revoked", "expired"])
async def test_rotation_of_a_dead_key_is_not_found(hub: IdentityHub, ada: Account, end: str) -> None:
    key_id, _ = await hub.key(ada, expires_at=hub.clock.now() + timedelta(hours=1))
    if end == "revoked":
        await hub.credentials.revoke_key(ada, key_id)
    else:
        hub.clock.advance(3600)
    assert (await error_of(hub.credentials.rotate_key(ada, key_id, overlap_s=0))).code == "not_found"
    assert len(await hub.credentials.keys_of(ada)) == 1


@pytest.mark.parametrize("overlap_s", [0, 3600])
async def test_t064_rotation_by_twelve_at_once_makes_one_successor(hub: IdentityHub, ada: Account, overlap_s: int) -> None:
    key_id, _ = await hub.key(ada)
    hub.store.pauses = True
    rotating = (hub.credentials.rotate_key(ada, key_id, overlap_s=overlap_s) for _ in range(12))
    outcomes = await asyncio.gather(*rotating, return_exceptions=True)
    assert [getattr(outcome, "code", "made") for outcome in outcomes].count("made") == 1
    assert len(await hub.credentials.keys_of(ada)) == 2
    refused = [event for event in hub.audit.events if event.action == "key.rotate_refused"]
    assert len(refused) == hub.audit.actions.count("key.rotate") - 1


async def test_t064_key_is_not_rotated_again_while_it_overlaps_with_its_successor(hub: IdentityHub, ada: Account) -> None:
    key_id, text = await hub.key(ada)
    successor, _ = await hub.credentials.rotate_key(ada, key_id, overlap_s=3600)
    for overlap_s in (0, 3600):
        assert (await error_of(hub.credentials.rotate_key(ada, key_id, overlap_s=overlap_s))).code == "conflict"
    assert hub.audit.actions.count("key.rotate") == 1
    assert (await hub.who(bearer(text))).credential_id == key_id
    await hub.credentials.rotate_key(ada, successor.id, overlap_s=0)


async def test_rotation_with_an_overlap_is_within_the_limit_of_live_keys(hub: IdentityHub, ada: Account) -> None:
    ids = [(await hub.key(ada))[0] for _ in range(MAX_LIVE_KEYS)]
    assert (await error_of(hub.credentials.rotate_key(ada, ids[0], overlap_s=3600))).code == "conflict"
    assert hub.audit.actions[-1] == "key.rotate_refused"
    await hub.credentials.rotate_key(ada, ids[0], overlap_s=0)


@pytest.mark.parametrize("wanted_s", [None, 7200])
async def test_t061_key_made_or_rotated_by_an_expiring_key_ends_with_it(
    hub: IdentityHub, ada: Account, wanted_s: int | None
) -> None:
    ends = NOON + timedelta(hours=1)
    own_id, text = await hub.key(ada, {Scope.KEYS}, expires_at=ends)
    lasting_id, _ = await hub.key(ada, {Scope.KEYS})
    by_key = await hub.who(bearer(text))
    wanted = None if wanted_s is None else NOON + timedelta(seconds=wanted_s)
    made, _ = await hub.credentials.create_key(by_key, name="x", scopes=frozenset({Scope.KEYS}), expires_at=wanted)
    hub.clock.advance(1800)
    rotated = [(await hub.credentials.rotate_key(by_key, key_id, overlap_s=0))[0] for key_id in (lasting_id, own_id)]
    assert {key.expires_at for key in (made, *rotated)} == {ends}
    sooner, _ = await hub.credentials.create_key(
        by_key, name="x", scopes=frozenset({Scope.KEYS}), expires_at=hub.clock.now() + timedelta(seconds=60)
    )
    assert sooner.expires_at == hub.clock.now() + timedelta(seconds=60)


async def test_t061_rotation_of_a_stronger_key_is_forbidden(hub: IdentityHub, ada: Account) -> None:
    strong_id, _ = await hub.key(ada, ALL_SCOPES)
    _, text = await hub.key(ada, {Scope.KEYS})
    by_key = await hub.who(bearer(text))
    assert (await error_of(hub.credentials.rotate_key(by_key, strong_id, overlap_s=0))).code == "forbidden"


# ── Audit ────────────────────────────────────────────────────────────────────────────────────────────────────────────


async def test_t114_every_change_of_credentials_is_in_the_audit_log(
    hub: IdentityHub, ada: Account, session: BrowserSession
) -> None:
    await knock(hub)
    hub.audit.events.clear()
    device = await connect(hub, session, ada)
    await hub.credentials.rename_device(ada, device.id, "desk")
    await hub.credentials.revoke_device(ada, device.id)
    await hub.link(ada)
    await hub.credentials.sign_out_device(await hub.who(hub.stock()), LAPTOP.public.encoded)
    key_id, _ = await hub.key(ada)
    new, _ = await hub.credentials.rotate_key(ada, key_id, overlap_s=0)
    await hub.credentials.revoke_key(ada, new.id)
    assert hub.audit.actions == [
        "device.connect",
        "device.rename",
        "device.revoke",
        "device.add",
        "device.sign_out",
        "key.create",
        "key.rotate",
        "key.revoke",
    ]


_CHANGES = ["connect", "rename", "revoke device", "add", "sign out", "create", "rotate", "revoke key"]


async def test_t114_changes_and_refusals_carry_the_network_they_came_from(hub: IdentityHub, ada: Account, bob: Account) -> None:
    of_bob, _ = await hub.key(bob)
    key_id, _ = await hub.key(ada)
    device = await hub.link(bob, PHONE)
    await hub.link(ada)
    by_device = await hub.who(hub.stock())
    hub.audit.events.clear()
    new, _ = await hub.credentials.rotate_key(ada, key_id, overlap_s=0, network=CAFE)
    await hub.credentials.revoke_key(ada, new.id, network=CAFE)
    await error_of(hub.credentials.rotate_key(ada, of_bob, overlap_s=0, network=CAFE))
    await error_of(hub.credentials.revoke_device(ada, device.id, network=CAFE))
    await error_of(hub.credentials.sign_out_device(by_device, PHONE.public.encoded, network=CAFE))
    await hub.credentials.sign_out_device(by_device, LAPTOP.public.encoded, network=CAFE)
    assert {event.network for event in hub.audit.events} == {CAFE}
    assert len(hub.audit.events) == 6


@pytest.mark.parametrize("change", _CHANGES)
async def test_change_that_cannot_be_audited_does_not_happen(hub: IdentityHub, ada: Account, change: str) -> None:
    session, _ = await hub.session(ada)
    device = await hub.link(ada)
    key_id, text = await hub.key(ada)
    await knock(hub, PHONE)
    principal = Principal(account=ada, proof=Proof.STOCK_SIGNATURE, credential_id=device.id, scopes=device.scopes, device=device)
    before = await hub.credentials.devices_of(ada), await hub.credentials.keys_of(ada)
    hub.audit.fails = CorralError("unavailable")
    doing = {
        "connect": lambda: connect(hub, session, ada, encoded_key=PHONE.public.encoded),
        "rename": lambda: hub.credentials.rename_device(ada, device.id, "x"),
        "revoke device": lambda: hub.credentials.revoke_device(ada, device.id),
        "add": lambda: hub.link(ada, PHONE),
        "sign out": lambda: hub.credentials.sign_out_device(principal, LAPTOP.public.encoded),
        "create": lambda: hub.key(ada),
        "rotate": lambda: hub.credentials.rotate_key(ada, key_id, overlap_s=0),
        "revoke key": lambda: hub.credentials.revoke_key(ada, key_id),
    }[change]
    assert (await error_of(doing())).code == "unavailable"
    assert (await hub.credentials.devices_of(ada), await hub.credentials.keys_of(ada)) == before
    assert (await hub.who(bearer(text))).account == ada


async def test_session_and_device_ids_do_not_reach_the_audit_log_as_secrets(hub: IdentityHub, ada: Account) -> None:
    session, cookie = await hub.session(ada)
    in_browser = await hub.who(browser(cookie))
    await hub.credentials.create_key(replace(in_browser), name="x", scopes=ALL_SCOPES, expires_at=None)
    text = repr(hub.audit.events)
    for secret in (cookie, session.id, session.csrf):
        assert secret not in text
