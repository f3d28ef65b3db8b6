"""The hub's JSON surface over its real services, with in-memory stores."""

import base64
import json
from dataclasses import dataclass
from datetime import timedelta
from uuid import UUID

import pytest

from asgi_client import Answer, Caller
from corral.core.records import Account, Scope
from corral.edges.asgi import App, AppOptions
from corral.edges.hub_api import HubApi
from corral.hub.accounts import AccountRules, Accounts
from corral.hub.credentials import Credentials
from corral.hub.passwords import PasswordCost
from corral.hub.sightings import MemorySightings
from corral.hub.tokens import RegistryTokens
from corral.wire.apikeys import Peppers
from corral.wire.browser import session_cookie_name
from corral.wire.signing import DevicePrivateKey, authorization_header, enrollment_challenge, request_challenge
from corral.wire.strong import NONCE_BYTES, sign_headers
from fakes import FakeClock, MemoryAccounts, MemoryAudit, MemoryCredentials, MemorySessions, MemoryUsage, SeededEntropy
from identity_hub import TOKEN_KEYS

PUBLIC_URL = "http://localhost:11435"
FINCH = DevicePrivateKey(b"f" * 32)
WREN = DevicePrivateKey(b"w" * 32)


@dataclass
class Hub:
    """A hub in memory, and the ways to call it."""

    app: App
    clock: FakeClock
    entropy: SeededEntropy
    accounts: Accounts
    credentials: Credentials
    audit: MemoryAudit
    alice: Account
    bob: Account

    async def stock(self, key: DevicePrivateKey, method: str, path: str, body: bytes = b"") -> Answer:
        target = f"{path}?ts={int(self.clock.now().timestamp())}"
        header = authorization_header(key, request_challenge(method, target))
        return await Caller(self.app).request(method, target, headers={"authorization": header}, body=body)

    async def strong(self, key: DevicePrivateKey, method: str, path: str, body: bytes = b"") -> Answer:
        now, nonce = self.clock.now().timestamp(), self.entropy.bytes(NONCE_BYTES)
        headers = sign_headers(key, method, PUBLIC_URL + path, {}, body=body, now=now, nonce=nonce)
        return await Caller(self.app).request(method, path, headers=headers, body=body)

    async def bearer(self, key: str, method: str, path: str, body: bytes = b"") -> Answer:
        return await Caller(self.app).request(method, path, headers={"authorization": f"Bearer {key}"}, body=body)

    async def session(self, account: Account) -> str:
        """The cookie of a browser that has just signed in."""
        _, value = await self.accounts.open_session(account, network="127.0.0.1", user_agent="Firefox/140.0")
        return f"{session_cookie_name(PUBLIC_URL)}={value.reveal()}"

    async def browser(self, cookie: str, method: str, path: str, body: bytes = b"") -> Answer:
        headers = {"cookie": cookie, "sec-fetch-site": "same-origin"}
        return await Caller(self.app).request(method, path, headers=headers, body=body)

    async def api_key(self, account: Account, *scopes: Scope) -> tuple[str, str]:
        key, secret = await self.credentials.create_key(account, name="k", scopes=frozenset(scopes), expires_at=None)
        return key.id, secret.reveal()


@pytest.fixture
async def hub() -> Hub:
    clock, entropy = FakeClock(), SeededEntropy()
    store = MemoryAccounts()
    audit = MemoryAudit()
    rules = AccountRules(sign_up_open=True, password_cost=PasswordCost(time_cost=1, memory_kib=8))
    accounts = Accounts(accounts=store, sessions=MemorySessions(store), audit=audit, clock=clock, entropy=entropy, rules=rules)
    credentials = Credentials(
        accounts=accounts,
        store=MemoryCredentials(store),
        sightings=MemorySightings(),
        audit=audit,
        clock=clock,
        entropy=entropy,
        peppers=Peppers(current_id="p1", values={"p1": b"p" * 32}),
        tokens=RegistryTokens(TOKEN_KEYS, issuer=PUBLIC_URL, clock=clock, entropy=entropy),
        public_url=PUBLIC_URL,
    )
    people = [await accounts.add(name, email="", password="seventeen quiet herons", is_admin=False) for name in ("alice", "bob")]

    async def is_ready() -> bool:
        return True

    api = HubApi(credentials=credentials, usage=MemoryUsage(), clock=clock, public_url=PUBLIC_URL, is_ready=is_ready)
    app = App(api.endpoints(), AppOptions(authenticate=credentials.authenticate))
    return Hub(app, clock, entropy, accounts, credentials, audit, *people)


async def test_me_names_the_account_of_a_connected_device(hub: Hub) -> None:
    await hub.credentials.add_device(hub.alice, name="finch", authorized_key=FINCH.public.authorized_key, scopes=frozenset(Scope))
    for answer in (await hub.stock(FINCH, "POST", "/api/me"), await hub.strong(FINCH, "POST", "/api/me")):
        assert (answer.status, answer.json()["name"], answer.json()["plan"]) == (200, "alice", "free")
        assert answer.json()["device"]["name"] == "finch"
        # Ollama's command reads the whole answer only if this is a UUID.
        assert str(UUID(answer.json()["id"])) == answer.json()["id"]


async def test_me_tells_an_unknown_device_where_to_sign_in(hub: Hub) -> None:
    first, again = await hub.stock(FINCH, "POST", "/api/me"), await hub.stock(FINCH, "POST", "/api/me")
    assert first.status == 401
    assert list(first.json()) == ["error", "signin_url"]
    assert first.json()["error"] == "unauthorized"
    assert first.json()["signin_url"].startswith(f"{PUBLIC_URL}/connect?name=")
    assert f"key={FINCH.public.encoded}" in first.json()["signin_url"]
    assert again.json() == first.json()


async def test_me_without_credentials_is_401_without_a_link(hub: Hub) -> None:
    answer = await Caller(hub.app).request("POST", "/api/me")
    assert (answer.status, answer.json()) == (401, {"error": "unauthorized"})


async def test_t016_stock_signature_may_not_manage_keys_or_devices(hub: Hub) -> None:
    await hub.credentials.add_device(hub.alice, name="finch", authorized_key=FINCH.public.authorized_key, scopes=frozenset(Scope))
    for method, path in [("POST", "/api/keys"), ("GET", "/api/keys"), ("GET", "/api/user/keys"), ("POST", "/api/user/keys")]:
        assert (await hub.stock(FINCH, method, path, b'{"name":"x"}' if method == "POST" else b"")).status == 403


async def test_key_is_created_used_rotated_and_revoked_by_the_strong_signature(hub: Hub) -> None:
    await hub.credentials.add_device(hub.alice, name="finch", authorized_key=FINCH.public.authorized_key, scopes=frozenset(Scope))
    made = (await hub.strong(FINCH, "POST", "/api/keys", b'{"name":"ci","scopes":["inference","keys"]}')).json()
    assert set(made) == {*("id", "name", "prefix", "scopes", "created_at", "expires_at", "last_used_at", "revoked_at", "key")}
    assert (await hub.bearer(made["key"], "POST", "/api/me")).status == 200
    heir = (await hub.strong(FINCH, "POST", f"/api/keys/{made['id']}/rotate", b'{"overlap":"1h"}')).json()
    assert [(await hub.bearer(key, "POST", "/api/me")).status for key in (made["key"], heir["key"])] == [200, 200]
    hub.clock.advance(3601)
    assert [(await hub.bearer(key, "POST", "/api/me")).status for key in (made["key"], heir["key"])] == [401, 200]
    assert (await hub.strong(FINCH, "DELETE", f"/api/keys/{heir['id']}")).status == 200
    assert (await hub.bearer(heir["key"], "POST", "/api/me")).status == 401


async def test_t053_secret_is_in_the_answer_to_create_and_nowhere_else(hub: Hub) -> None:
    _, manager = await hub.api_key(hub.alice, Scope.KEYS, Scope.INFERENCE)
    answer = await hub.bearer(manager, "POST", "/api/keys", b'{"name":"ci"}')
    assert (answer.status, answer.headers["cache-control"]) == (201, "no-store")
    secret = answer.json()["key"]
    listed = await hub.bearer(manager, "GET", "/api/keys")
    assert secret not in listed.body.decode()
    assert secret[15:] not in listed.body.decode()


@pytest.mark.parametrize(
    ("body", "status"),
    [
        (b"", 400),
        (b"{", 422),
        (b"[]", 422),
        (b'{"name":""}', 422),
        (b'{"name":"x","scopes":["root"]}', 422),
        (b'{"name":"x","scopes":[]}', 422),
        (b'{"name":"x","expires_at":"yesterday"}', 422),
        (b'{"name":"x","expires_at":"2020-01-01T00:00:00Z"}', 422),
        (b'{"name":"x","expires_at":"2030-01-01T00:00:00"}', 422),
        (b"[" * 100_000, 422),
    ],
)
async def test_create_key_with_a_bad_body_says_what_is_wrong(hub: Hub, body: bytes, status: int) -> None:
    _, manager = await hub.api_key(hub.alice, Scope.KEYS, Scope.INFERENCE)
    answer = await hub.bearer(manager, "POST", "/api/keys", body)
    assert answer.status == status
    assert answer.json()["error"]


async def test_t061_key_cannot_create_one_with_wider_scopes(hub: Hub) -> None:
    _, manager = await hub.api_key(hub.alice, Scope.KEYS)
    answer = await hub.bearer(manager, "POST", "/api/keys", b'{"name":"x","scopes":["models:push"]}')
    assert answer.status == 403
    assert answer.json()["error"].endswith("does not have: models:push → ask for less, or use one that has it")


async def test_t046_session_whose_password_is_old_makes_and_rotates_no_key(hub: Hub) -> None:
    cookie = await hub.session(hub.alice)
    made = await hub.browser(cookie, "POST", "/api/keys", b'{"name":"ci"}')
    assert made.status == 201
    hub.clock.advance(301)
    for path in ("/api/keys", f"/api/keys/{made.json()['id']}/rotate"):
        refused = await hub.browser(cookie, "POST", path, b'{"name":"ci"}')
        assert (refused.status, refused.json()["step_up"]) == (403, True)
    assert len((await hub.browser(cookie, "GET", "/api/keys")).json()) == 1
    assert (await hub.bearer(made.json()["key"], "POST", "/api/me")).status == 200
    assert (await hub.browser(cookie, "DELETE", f"/api/keys/{made.json()['id']}")).status == 200


async def test_t046_session_adds_no_device_without_its_page(hub: Hub) -> None:
    body = json.dumps({"name": "box", "key": FINCH.public.authorized_key}).encode()
    assert (await hub.browser(await hub.session(hub.alice), "POST", "/api/user/keys", body)).status == 403
    assert not await hub.credentials.devices_of(hub.alice)


async def test_t066_foreign_key_and_device_are_not_found(hub: Hub) -> None:
    _, manager = await hub.api_key(hub.alice, Scope.KEYS)
    foreign, text = await hub.api_key(hub.bob, Scope.INFERENCE)
    await hub.credentials.add_device(hub.bob, name="wren", authorized_key=WREN.public.authorized_key, scopes=frozenset(Scope))
    for method, path in [
        ("DELETE", f"/api/keys/{foreign}"),
        ("POST", f"/api/keys/{foreign}/rotate"),
        ("DELETE", f"/api/user/keys/{WREN.public.encoded}"),
        ("PATCH", f"/api/user/keys/{WREN.public.encoded}"),
    ]:
        body = b'{"scopes":[]}' if method == "PATCH" else b""
        assert (await hub.bearer(manager, method, path, body)).status == 404
    assert hub.audit.actions[-1] == "device.access_refused"
    assert (await hub.bearer(text, "POST", "/api/me")).status == 200
    assert (await hub.stock(WREN, "POST", "/api/me")).status == 200


async def test_device_scopes_are_changed_by_whoever_manages_devices_and_hold_from_the_next_call(hub: Hub) -> None:
    finch = await hub.credentials.add_device(
        hub.alice, name="finch", authorized_key=FINCH.public.authorized_key, scopes=frozenset(Scope)
    )
    path, less = f"/api/user/keys/{FINCH.public.encoded}", b'{"scopes":["inference"]}'
    # A stock signature covers no body, so it could be sent along with another one (T16).
    assert (await hub.stock(FINCH, "PATCH", path, less)).status == 403
    answer = await hub.strong(FINCH, "PATCH", path, less)
    assert (answer.status, answer.json()["id"], answer.json()["scopes"]) == (200, finch.id, ["inference"])
    assert (await hub.strong(FINCH, "PATCH", path, b'{"scopes":["keys"]}')).status == 403
    assert (await hub.strong(FINCH, "GET", "/api/user/keys")).status == 403


async def test_t061_api_key_gives_a_device_no_scope_that_it_lacks(hub: Hub) -> None:
    await hub.credentials.add_device(hub.alice, name="finch", authorized_key=FINCH.public.authorized_key, scopes=frozenset())
    _, manager = await hub.api_key(hub.alice, Scope.KEYS)
    path = f"/api/user/keys/{FINCH.public.encoded}"
    assert (await hub.bearer(manager, "PATCH", path, b'{"scopes":["models:push"]}')).status == 403
    assert (await hub.bearer(manager, "PATCH", path, b'{"scopes":["inference"]}')).json()["scopes"] == ["inference"]
    assert (await hub.bearer(manager, "PATCH", path, b'{"scopes":["admin"]}')).status == 422


async def test_t046_browser_gives_a_device_more_only_with_a_fresh_password(hub: Hub) -> None:
    await hub.credentials.add_device(hub.alice, name="finch", authorized_key=FINCH.public.authorized_key, scopes=frozenset(Scope))
    cookie, path = await hub.session(hub.alice), f"/api/user/keys/{FINCH.public.encoded}"
    hub.clock.advance(301)
    assert (await hub.browser(cookie, "PATCH", path, b'{"scopes":["inference"]}')).status == 200
    refused = await hub.browser(cookie, "PATCH", path, b'{"scopes":["inference","keys"]}')
    assert (refused.status, refused.json()["step_up"]) == (403, True)


async def test_t020_device_signs_itself_out_and_is_refused_from_then_on(hub: Hub) -> None:
    await hub.credentials.add_device(hub.alice, name="finch", authorized_key=FINCH.public.authorized_key, scopes=frozenset(Scope))
    answer = await hub.stock(FINCH, "DELETE", f"/api/user/keys/{FINCH.public.encoded}")
    assert (answer.status, answer.body) == (200, b"null")
    assert (await hub.stock(FINCH, "POST", "/api/me")).status == 401


@pytest.mark.parametrize("spelling", ["x" * 10_000, "%00", "c3NoLWVkMjU1MTk", "%F0%9F%98%80"])
async def test_t020_damaged_key_in_the_path_is_refused(hub: Hub, spelling: str) -> None:
    _, manager = await hub.api_key(hub.alice, Scope.KEYS)
    assert (await hub.bearer(manager, "DELETE", f"/api/user/keys/{spelling}")).status in (400, 404)


def enrollment(
    hub: Hub, credential_id: str, *, by: DevicePrivateKey = FINCH, public_url: str = PUBLIC_URL, age_s: int = 0
) -> bytes:
    """The body that asks for FINCH to be added, signed by a device for a credential."""
    ts = int(hub.clock.now().timestamp()) - age_s
    signature = base64.b64encode(by.sign(enrollment_challenge(public_url, credential_id, ts))).decode()
    return json.dumps({"name": "box", "key": FINCH.public.authorized_key, "ts": ts, "signature": signature}).encode()


async def test_device_is_added_by_a_key_with_the_scope_and_by_no_other(hub: Hub) -> None:
    weak_id, weak = await hub.api_key(hub.alice, Scope.INFERENCE)
    assert (await hub.bearer(weak, "POST", "/api/user/keys", enrollment(hub, weak_id))).status == 403
    manager_id, manager = await hub.api_key(hub.alice, Scope.KEYS)
    answer = await hub.bearer(manager, "POST", "/api/user/keys", enrollment(hub, manager_id))
    assert (answer.status, answer.json()["scopes"]) == (201, ["inference", "keys"])
    assert (await hub.stock(FINCH, "POST", "/api/me")).status == 200
    devices = (await hub.bearer(manager, "GET", "/api/user/keys")).json()
    assert [(device["name"], device["current"]) for device in devices] == [("box", False)]


async def test_t047_key_without_proof_of_its_possession_is_not_added(hub: Hub) -> None:
    manager_id, manager = await hub.api_key(hub.bob, Scope.KEYS)
    other_id, _ = await hub.api_key(hub.alice, Scope.KEYS)
    bare = {"name": "box", "key": FINCH.public.authorized_key}
    now = int(hub.clock.now().timestamp())
    # What FINCH signs all day, and its victim may have seen.
    target = f"/api/me?ts={now}"
    captured = base64.b64encode(FINCH.sign(request_challenge("POST", target))).decode()
    bodies = [
        json.dumps(bare).encode(),
        json.dumps({**bare, "ts": now}).encode(),
        *(json.dumps({**bare, "ts": now, "signature": text}).encode() for text in ("", "x", "é", captured, captured * 2)),
        enrollment(hub, manager_id, by=WREN),
        enrollment(hub, other_id),
        enrollment(hub, manager_id, public_url="https://hub.example.org"),
        enrollment(hub, manager_id, age_s=301),
        enrollment(hub, manager_id, age_s=-301),
    ]
    for body in bodies:
        answer = await hub.bearer(manager, "POST", "/api/user/keys", body)
        assert (answer.status, answer.json()["error"] != "") == (403, True)
    assert not await hub.credentials.devices_of(hub.bob)
    assert (await hub.stock(FINCH, "POST", "/api/me")).status == 401


async def test_t047_whose_key_it_is_learns_only_who_holds_it(hub: Hub) -> None:
    await hub.credentials.add_device(hub.alice, name="finch", authorized_key=FINCH.public.authorized_key, scopes=frozenset(Scope))
    manager_id, manager = await hub.api_key(hub.bob, Scope.KEYS)
    assert (await hub.bearer(manager, "POST", "/api/user/keys", enrollment(hub, manager_id, by=WREN))).status == 403
    assert (await hub.bearer(manager, "POST", "/api/user/keys", enrollment(hub, manager_id))).status == 409
    assert (await hub.stock(FINCH, "POST", "/api/me")).json()["name"] == "alice"


@pytest.mark.parametrize("ts", ["-1", "1e999", "9" * 400, '"1767225600"', "null"])
async def test_t047_time_that_is_none_is_invalid(hub: Hub, ts: str) -> None:
    manager_id, manager = await hub.api_key(hub.alice, Scope.KEYS)
    body = json.loads(enrollment(hub, manager_id))
    text = json.dumps({**body, "ts": "TS"}).replace('"TS"', ts)
    assert (await hub.bearer(manager, "POST", "/api/user/keys", text.encode())).status == 422


async def test_connected_device_adds_another_that_signs_for_it(hub: Hub) -> None:
    wren = await hub.credentials.add_device(
        hub.alice, name="wren", authorized_key=WREN.public.authorized_key, scopes=frozenset(Scope)
    )
    answer = await hub.strong(WREN, "POST", "/api/user/keys", enrollment(hub, wren.id))
    assert (answer.status, answer.json()["fingerprint"]) == (201, FINCH.public.fingerprint)


async def test_t066_audit_row_of_every_change_says_where_it_came_from(hub: Hub) -> None:
    for name, key in (("finch", FINCH), ("wren", WREN)):
        owner = hub.alice if key is FINCH else hub.bob
        await hub.credentials.add_device(owner, name=name, authorized_key=key.public.authorized_key, scopes=frozenset(Scope))
    old, manager = await hub.api_key(hub.alice, *Scope)
    headers, body = {"authorization": f"Bearer {manager}"}, b'{"overlap":"1h"}'
    before, elsewhere = len(hub.audit.events), Caller(hub.app, client=("198.51.100.7", 40000), scheme="https")
    for method, path, status in [
        ("POST", f"/api/keys/{old}/rotate", 201),
        ("POST", "/api/keys/nothing/rotate", 404),
        ("DELETE", f"/api/user/keys/{WREN.public.encoded}", 404),
        ("DELETE", f"/api/user/keys/{FINCH.public.encoded}", 200),
        ("DELETE", "/api/keys/nothing", 404),
        ("DELETE", f"/api/keys/{old}", 200),
    ]:
        sent = body if method == "POST" else b""
        assert (await elsewhere.request(method, path, headers=headers, body=sent)).status == status
    actions = [
        "key.rotate",
        "key.access_refused",
        "device.sign_out_refused",
        "device.sign_out",
        "key.access_refused",
        "key.revoke",
    ]
    assert [(event.action, event.network) for event in hub.audit.events[before:]] == [
        (action, "198.51.100.7") for action in actions
    ]


async def test_t053_answer_that_belongs_to_somebody_is_kept_by_no_cache(hub: Hub) -> None:
    _, manager = await hub.api_key(hub.alice, *Scope)
    _, other = await hub.api_key(hub.alice, *Scope)
    for method, path in [
        ("GET", "/api/me"),
        ("POST", "/api/me"),
        ("GET", "/api/keys"),
        ("GET", "/api/user/keys"),
        ("GET", "/api/usage"),
        ("DELETE", f"/api/keys/{other[5:15]}"),
    ]:
        answer = await hub.bearer(manager, method, path)
        assert (answer.status, answer.headers["cache-control"]) == (200, "no-store")
    assert "cache-control" not in (await Caller(hub.app).request("GET", "/api/version")).headers


@pytest.mark.parametrize("path", ["/healthz", "/readyz"])
async def test_monitor_that_asks_by_head_gets_the_status(hub: Hub, path: str) -> None:
    # The server beneath leaves the body of an answer to HEAD out.
    assert (await Caller(hub.app).request("HEAD", path)).status == (await Caller(hub.app).request("GET", path)).status


async def test_t059_two_credentials_are_refused(hub: Hub) -> None:
    _, text = await hub.api_key(hub.alice, Scope.INFERENCE)
    headers = {"authorization": f"Bearer {text}", "x-api-key": text}
    assert (await Caller(hub.app).request("POST", "/api/me", headers=headers)).status == 400


async def test_t004_clock_skew_is_403_and_names_the_offset(hub: Hub) -> None:
    now = int((hub.clock.now() - timedelta(seconds=412)).timestamp())
    target = f"/api/me?ts={now}"
    header = authorization_header(FINCH, request_challenge("POST", target))
    answer = await Caller(hub.app).request("POST", target, headers={"authorization": header})
    assert answer.status == 403
    assert answer.json()["error"] == "request time is 412 s behind the server; check this machine's clock"


async def test_discovery_gives_the_url_that_signatures_cover(hub: Hub) -> None:
    answer = (await Caller(hub.app).request("GET", "/.well-known/corral")).json()
    assert (answer["public_url"], answer["signatures"]) == (PUBLIC_URL, ["corral-v1", "stock"])


async def test_running_models_are_nobodys_to_know_and_the_refusal_says_so(hub: Hub) -> None:
    answer = await Caller(hub.app).request("GET", "/api/ps")
    assert (answer.status, answer.json()["error"]) == (404, "a hub does not say what it runs; ask a local server")


async def test_usage_is_empty_for_a_new_account(hub: Hub) -> None:
    _, text = await hub.api_key(hub.alice, Scope.KEYS)
    assert (await hub.bearer(text, "GET", "/api/usage")).json()["usage"] == []


async def test_t016_usage_names_credentials_so_it_is_for_those_who_may_manage_them(hub: Hub) -> None:
    _, text = await hub.api_key(hub.alice, Scope.INFERENCE, Scope.PULL, Scope.PUSH)
    assert (await hub.bearer(text, "GET", "/api/usage")).status == 403
    await hub.credentials.add_device(hub.alice, name="finch", authorized_key=FINCH.public.authorized_key, scopes=frozenset(Scope))
    assert (await hub.stock(FINCH, "GET", "/api/usage")).status == 403
    assert (await hub.strong(FINCH, "GET", "/api/usage")).status == 200
