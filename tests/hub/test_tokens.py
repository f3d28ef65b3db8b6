"""Registry tokens: what is issued, what is taken back, and what the door makes of it."""

import asyncio
import base64
import json
from dataclasses import replace

import pytest
from joserfc import jwt
from joserfc.jwk import OctKey, OKPKey
from nacl import bindings

from corral.core.policy import ALL_SCOPES
from corral.core.records import Account, Device, Proof, Scope, Sighting, Visitor
from corral.core.registry import Grant
from corral.hub.tokens import RegistryTokens
from corral.wire.errors import CorralError
from corral.wire.signing import DevicePrivateKey
from corral.wire.tokens import GRACE_S, LIFETIME_S, TokenKeys
from identity_hub import CAFE, HOME, HUB, LAPTOP, PHONE, TOKEN_KEYS, IdentityHub, basic, bearer, browser, error_of, facts

GRANTS = [Grant("Ada/Tiny", frozenset({"pull", "push"}))]
MANIFEST = "/v2/ada/tiny/manifests/latest"
SESSION = "/v2/ada/tiny/blobs/uploads/u1"


@pytest.fixture
def hub() -> IdentityHub:
    return IdentityHub()


@pytest.fixture
async def ada(hub: IdentityHub) -> Account:
    return await hub.add("Ada")


@pytest.fixture
async def device(hub: IdentityHub, ada: Account) -> Device:
    return await hub.link(ada, scopes=ALL_SCOPES)


async def device_token(hub: IdentityHub, grants: list[Grant] = GRANTS) -> str:
    """A token for the laptop, fetched by its signature."""
    return hub.tokens.issue(await hub.who(hub.token(nonce=hub.entropy.bytes(16))), grants).text.reveal()


async def visitor_token(hub: IdentityHub) -> str:
    """A token for the laptop, which nobody connected."""
    return hub.tokens.issue(await hub.visitor(hub.token(nonce=hub.entropy.bytes(16))), []).text.reveal()


def parts_of(token: str) -> tuple[dict[str, object], dict[str, object]]:
    """(header, claims), unchecked."""
    header, claims = (json.loads(base64.urlsafe_b64decode(part + "==")) for part in token.split(".")[:2])
    return header, claims


def restarted(hub: IdentityHub, *, keys: TokenKeys = TOKEN_KEYS, issuer: str = HUB, service: str = "corral") -> RegistryTokens:
    """The tokens of another hub, or of this one after a change."""
    return RegistryTokens(keys, issuer=issuer, service=service, clock=hub.clock, entropy=hub.entropy)


# ── What a token says ────────────────────────────────────────────────────────────────────────────────────────────────


async def test_token_names_hub_account_credential_and_grants(hub: IdentityHub, device: Device) -> None:
    header, claims = parts_of(await device_token(hub))
    now = int(hub.clock.now().timestamp())
    assert header == {"typ": "JWT", "alg": "Ed25519", "kid": "t2"}
    assert (claims["iss"], claims["aud"], claims["sub"]) == (HUB, "corral", "Ada")
    assert (claims["iat"], claims["nbf"], claims["exp"]) == (now, now, now + LIFETIME_S)
    assert claims["access"] == [{"type": "repository", "name": "Ada/Tiny", "actions": ["pull", "push"]}]
    assert claims["corral"] == {"kind": "device", "id": device.id, "key": base64.b64encode(LAPTOP.public.raw).decode()}


def test_service_is_the_one_that_challenges_name(hub: IdentityHub) -> None:
    assert hub.tokens.service == "corral"


async def test_two_tokens_of_one_moment_differ(hub: IdentityHub) -> None:
    assert hub.tokens.issue(None, []).text != hub.tokens.issue(None, []).text


async def test_issued_token_hides_its_text(hub: IdentityHub) -> None:
    issued = hub.tokens.issue(None, [])
    assert issued.text.reveal() not in repr(issued)


async def test_token_is_a_jwt_that_others_read(hub: IdentityHub) -> None:
    public = bindings.crypto_sign_seed_keypair(TOKEN_KEYS.seeds["t2"])[0]
    key = OKPKey.import_key({"kty": "OKP", "crv": "Ed25519", "x": base64.urlsafe_b64encode(public).decode().rstrip("=")})
    assert jwt.decode(hub.tokens.issue(None, []).text.reveal(), key, algorithms=["Ed25519"]).claims["sub"] == ""


def test_grants_are_found_whatever_the_case_and_joined(hub: IdentityHub) -> None:
    grants = [*GRANTS, Grant("ada/tiny", frozenset({"delete"}))]
    content = hub.tokens.verify(hub.tokens.issue(None, grants).text.reveal())
    assert content.grants == {"ada/tiny": {"pull", "push", "delete"}}


# ── T27: what is no token of ours ────────────────────────────────────────────────────────────────────────────────────


def forged(header: dict[str, object], claims: dict[str, object], *, seed: bytes = TOKEN_KEYS.seeds["t2"]) -> str:
    """A token with that header and those claims, rightly signed with a key."""
    text = ".".join(base64.urlsafe_b64encode(json.dumps(part).encode()).decode().rstrip("=") for part in (header, claims))
    _, secret = bindings.crypto_sign_seed_keypair(seed)
    return f"{text}.{base64.urlsafe_b64encode(bindings.crypto_sign(text.encode(), secret)[:64]).decode().rstrip('=')}"


@pytest.mark.parametrize(
    "changes",
    [
        {"alg": "none"},
        {"alg": "EdDSA"},
        {"alg": "HS256"},
        {"kid": "t9"},
        {"kid": None},
        {"crit": ["b64"], "b64": False},
        {"jwk": {"kty": "OKP", "crv": "Ed25519", "x": "AAAA"}},
        {"jku": "https://evil.example/keys"},
        {"x5u": "https://evil.example/keys"},
        {"typ": "JOSE"},
    ],
)
async def test_t027_token_with_another_header_is_unauthorized_though_rightly_signed(
    hub: IdentityHub, device: Device, changes: dict[str, object]
) -> None:
    header, claims = parts_of(await device_token(hub))
    assert (await hub.refusal(bearer(forged(header | changes, claims), "GET", MANIFEST))).code == "unauthorized"


async def test_t027_token_without_signature_or_with_anothers_is_unauthorized(hub: IdentityHub, device: Device) -> None:
    token = await device_token(hub)
    signed, _, signature = token.rpartition(".")
    header, claims = parts_of(token)
    evil = forged(header, claims, seed=b"e" * 32)
    damaged = [
        f"{signed}.",
        f"{signed}.{signature[:-4]}",
        f"{signed}.{signature}==",
        f"{signed[:-2]}AA.{signature}",
        evil,
        "a.b.c",
    ]
    for text in [*damaged, "..", f"{signed}.é{signature}", f"{token}\n", f"{signed}é.{signature}"]:
        assert (await hub.refusal(bearer(text, "GET", MANIFEST))).code == "unauthorized"


async def test_t027_token_by_hs256_with_the_public_key_is_unauthorized(hub: IdentityHub, device: Device) -> None:
    header, claims = parts_of(await device_token(hub))
    public = bindings.crypto_sign_seed_keypair(TOKEN_KEYS.seeds["t2"])[0]
    for name in ("HS256", "Ed25519"):
        text = jwt.encode({**header, "alg": "HS256"}, claims, OctKey.import_key(public), algorithms=["HS256"])
        named = base64.urlsafe_b64encode(json.dumps({**header, "alg": name}, separators=(",", ":")).encode()).decode().rstrip("=")
        assert (await hub.refusal(bearer(f"{named}.{text.partition('.')[2]}", "GET", MANIFEST))).code == "unauthorized"


@pytest.mark.parametrize("claims", [b"", b"[]", b"{}", b'{"iss":1}', b"\xff", b"[" * 100_000])
async def test_t027_signed_text_that_holds_no_claims_is_unauthorized(hub: IdentityHub, claims: bytes) -> None:
    header = hub.tokens.issue(None, []).text.reveal().partition(".")[0]
    text = f"{header}.{base64.urlsafe_b64encode(claims).decode().rstrip('=')}"
    _, secret = bindings.crypto_sign_seed_keypair(TOKEN_KEYS.seeds["t2"])
    signature = base64.urlsafe_b64encode(bindings.crypto_sign(text.encode(), secret)[:64]).decode().rstrip("=")
    assert (await hub.refusal(bearer(f"{text}.{signature}", "GET", MANIFEST))).code == "unauthorized"


async def test_t027_token_of_another_hub_or_service_is_unauthorized(hub: IdentityHub) -> None:
    for other in (restarted(hub, issuer="https://other.example"), restarted(hub, service="other")):
        assert (await hub.refusal(bearer(other.issue(None, []).text.reveal(), "GET", MANIFEST))).code == "unauthorized"


async def test_t027_token_ends_when_it_says(hub: IdentityHub, device: Device) -> None:
    token = await device_token(hub)
    hub.clock.advance(LIFETIME_S - 1)
    await hub.who(bearer(token, "GET", MANIFEST))
    hub.clock.advance(1)
    for method, path in (("GET", MANIFEST), ("PUT", MANIFEST), ("POST", "/v2/ada/tiny/blobs/uploads/"), ("GET", SESSION)):
        error = await hub.refusal(bearer(token, method, path))
        assert (error.code, "expired" in error.message) == ("unauthorized", True)


async def test_expired_token_finishes_an_upload_that_was_under_way(hub: IdentityHub, device: Device) -> None:
    token = await device_token(hub)
    hub.clock.advance(LIFETIME_S + GRACE_S - 1)
    for method in ("PATCH", "PUT"):
        await hub.who(bearer(token, method, SESSION))
    hub.clock.advance(1)
    assert (await hub.refusal(bearer(token, "PATCH", SESSION))).code == "unauthorized"


async def test_token_from_before_the_clock_was_set_back_is_unauthorized(hub: IdentityHub) -> None:
    token = hub.tokens.issue(None, []).text.reveal()
    hub.clock.set_back(10)
    assert (await error_of(_verify(hub, token))).message == "this token is not valid yet"


async def _verify(hub: IdentityHub, token: str) -> None:
    hub.tokens.verify(token)


# ── Rotation ─────────────────────────────────────────────────────────────────────────────────────────────────────────


async def test_token_of_a_former_key_is_taken_while_the_key_is_kept(hub: IdentityHub) -> None:
    former = restarted(hub, keys=replace(TOKEN_KEYS, current_id="t1"))
    token = former.issue(None, []).text.reveal()
    assert parts_of(token)[0]["kid"] == "t1"
    assert isinstance(await hub.credentials.authenticate(bearer(token, "GET", MANIFEST)), Visitor)
    without = restarted(hub, keys=replace(TOKEN_KEYS, seeds={"t2": TOKEN_KEYS.seeds["t2"]}))
    with pytest.raises(Exception, match="unauthorized"):
        without.verify(token)


# ── The credential behind a token ────────────────────────────────────────────────────────────────────────────────────


async def test_device_token_is_its_owner_within_the_devices_scopes(hub: IdentityHub, ada: Account) -> None:
    device = await hub.link(ada, scopes=frozenset({Scope.PULL}))
    principal = await hub.who(bearer(await device_token(hub), "GET", MANIFEST))
    assert (principal.account, principal.device, principal.proof) == (ada, device, Proof.REGISTRY_TOKEN)
    assert (principal.credential_id, principal.scopes) == (device.id, {Scope.PULL})
    assert principal.grants == {"ada/tiny": {"pull", "push"}}
    assert await hub.credentials.is_live(principal)


async def test_key_token_is_its_owner_within_the_keys_scopes(hub: IdentityHub, ada: Account) -> None:
    key_id, text = await hub.key(ada, {Scope.PUSH})
    token = hub.tokens.issue(await hub.who(basic("ada", text)), GRANTS).text.reveal()
    principal = await hub.who(bearer(token, "PUT", MANIFEST))
    assert (principal.credential_id, principal.scopes, principal.proof) == (key_id, {Scope.PUSH}, Proof.REGISTRY_TOKEN)
    assert await hub.credentials.is_live(principal)
    assert parts_of(token)[1]["corral"] == {"kind": "key", "id": key_id, "key": ""}


async def test_t062_token_of_a_revoked_device_is_unauthorized_at_once(hub: IdentityHub, ada: Account, device: Device) -> None:
    token = await device_token(hub)
    await hub.credentials.revoke_device(ada, device.id)
    assert (await hub.refusal(bearer(token, "GET", MANIFEST))).code == "unauthorized"
    # Nor does it come to life when somebody else connects the same device.
    await hub.link(await hub.add("Bob"))
    assert (await hub.refusal(bearer(token, "GET", MANIFEST))).code == "unauthorized"


async def test_t062_token_of_a_revoked_or_expired_key_is_unauthorized_at_once(hub: IdentityHub, ada: Account) -> None:
    key_id, text = await hub.key(ada)
    token = hub.tokens.issue(await hub.who(basic("ada", text)), GRANTS).text.reveal()
    await hub.credentials.revoke_key(ada, key_id)
    assert (await hub.refusal(bearer(token, "GET", MANIFEST))).code == "unauthorized"


async def test_t062_token_of_a_disabled_or_removed_account_is_unauthorized_at_once(hub: IdentityHub, ada: Account) -> None:
    await hub.add("Grace", is_admin=True)
    await hub.link(ada)
    _, text = await hub.key(ada)
    tokens = [await device_token(hub), hub.tokens.issue(await hub.who(basic("ada", text)), GRANTS).text.reveal()]
    await hub.accounts.set_disabled("ada", True)
    for token in tokens:
        assert (await hub.refusal(bearer(token, "GET", MANIFEST))).code == "unauthorized"
    await hub.accounts.set_disabled("ada", False)
    assert (await hub.who(bearer(tokens[0], "GET", MANIFEST))).account == ada
    await hub.accounts.remove("ada")
    for token in tokens:
        assert (await hub.refusal(bearer(token, "GET", MANIFEST))).code == "unauthorized"


async def test_token_says_nothing_outside_the_registry_and_makes_no_other_token(hub: IdentityHub, device: Device) -> None:
    token = await device_token(hub)
    for path in ("/api/me", "/v1/models", "/v2", "/v2/token", "/v2%2Ftoken"):
        assert (await hub.refusal(bearer(token, "GET", path))).code == "unauthorized"


# ── Visitors ─────────────────────────────────────────────────────────────────────────────────────────────────────────


async def test_anonymous_token_is_a_visitor_without_a_name(hub: IdentityHub) -> None:
    token = hub.tokens.issue(None, []).text.reveal()
    before = hub.lookups
    assert await hub.visitor(bearer(token, "GET", MANIFEST)) == Visitor()
    assert hub.lookups == before


async def test_unknown_device_gets_a_visitors_token_that_leads_to_the_connect_page(hub: IdentityHub) -> None:
    asked = await hub.visitor(hub.token())
    sighting = await hub.sightings.find(LAPTOP.public, since=hub.clock.now())
    assert sighting is not None
    assert asked.fingerprint == LAPTOP.public.fingerprint
    assert asked.signin_url == f"{HUB}/connect?name=device&key={LAPTOP.public.encoded}&code={sighting.code}"
    came = await hub.visitor(bearer(hub.tokens.issue(asked, []).text.reveal(), "GET", MANIFEST))
    assert came == asked
    pushes = bearer(hub.tokens.issue(asked, []).text.reveal(), "PUT", MANIFEST)
    named = await hub.visitor(replace(pushes, headers=pushes.headers | {"corral-device-name": ["finch"]}))
    assert named.signin_url == asked.signin_url.replace("name=device", "name=finch")
    hub.clock.advance(901)
    later = await hub.visitor(bearer(hub.tokens.issue(asked, []).text.reveal(), "GET", MANIFEST))
    assert later.signin_url == f"{HUB}/connect?name=device&key={LAPTOP.public.encoded}"


async def test_visitor_whose_device_is_connected_meanwhile_has_to_ask_again(hub: IdentityHub, ada: Account) -> None:
    token = await visitor_token(hub)
    await hub.link(ada)
    error = await hub.refusal(bearer(token, "PUT", MANIFEST))
    assert (error.code, "fetch a new token" in error.message) == ("unauthorized", True)


async def test_unknown_device_can_be_connected_after_it_asked_for_a_token(hub: IdentityHub, ada: Account) -> None:
    await hub.visitor(hub.token())
    session, _ = await hub.session(ada)
    device = await hub.credentials.connect_device(
        session, ada, encoded_key=LAPTOP.public.encoded, name="laptop", code="", network=HOME
    )
    assert device.account_id == ada.id


async def test_t024_nonce_of_a_device_connected_meanwhile_is_used_up_all_the_same(hub: IdentityHub, ada: Account) -> None:
    request = hub.token()
    await hub.visitor(request)
    assert (await hub.refusal(request)).code == "unauthorized"
    await hub.link(ada)
    assert (await hub.refusal(request)).code == "unauthorized"


async def test_t024_of_fifty_requests_with_one_nonce_of_an_unknown_device_one_is_let_in(hub: IdentityHub) -> None:
    outcomes = await asyncio.gather(*(hub.credentials.authenticate(hub.token()) for _ in range(50)), return_exceptions=True)
    assert sum(isinstance(outcome, Visitor) for outcome in outcomes) == 1


async def test_unknown_devices_behind_one_address_are_served_when_they_are_too_many_to_remember(hub: IdentityHub) -> None:
    for number in range(21):
        visitor = await hub.visitor(hub.token(DevicePrivateKey(bytes([number] * 32))))
    assert "&code=" not in visitor.signin_url
    assert len(hub.sightings) == 20


async def test_unknown_devices_of_one_network_cannot_fill_the_store_of_nonces(hub: IdentityHub) -> None:
    for number in range(300):
        await hub.visitor(hub.token(nonce=number.to_bytes(16)))
    assert (await hub.refusal(hub.token(nonce=b"n" * 16))).code == "rate_limited"
    await hub.visitor(hub.token(nonce=b"n" * 16, network=CAFE))


async def test_unknown_device_that_cannot_be_remembered_for_another_reason_gets_no_token(hub: IdentityHub) -> None:
    async def failing(_: object) -> Sighting:
        raise CorralError("unavailable")

    hub.sightings.record = failing  # type: ignore[method-assign]
    assert (await hub.refusal(hub.token())).code == "unavailable"


async def test_unknown_device_over_plain_http_is_forbidden(hub: IdentityHub) -> None:
    assert (await hub.refusal(hub.token(is_secure=False))).code == "forbidden"


async def test_device_of_a_disabled_account_gets_no_visitors_token(hub: IdentityHub, device: Device) -> None:
    await hub.add("Grace", is_admin=True)
    await hub.accounts.set_disabled("ada", True)
    assert (await hub.refusal(hub.token())).code == "unauthorized"


async def test_store_that_fails_lets_no_token_in(hub: IdentityHub, ada: Account, device: Device) -> None:
    _, text = await hub.key(ada)
    holders = [await hub.who(hub.token()), await hub.who(basic("ada", text)), Visitor(key=PHONE.public)]
    hub.store.fails = CorralError("unavailable")
    for holder in holders:
        token = hub.tokens.issue(holder, []).text.reveal()
        assert (await hub.refusal(bearer(token, "GET", MANIFEST))).code == "unavailable"


# ── A name and an API key ────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("name", ["Ada", "ada", "ada@example.org", "ADA@Example.org"])
async def test_basic_with_an_api_key_is_its_owner(hub: IdentityHub, ada: Account, name: str) -> None:
    key_id, text = await hub.key(ada, {Scope.PULL})
    for path in ("/v2/", "/v2/token", MANIFEST):
        principal = await hub.who(basic(name, text, target=path))
        assert (principal.account, principal.credential_id, principal.proof) == (ada, key_id, Proof.API_KEY)
        assert (principal.scopes, principal.grants) == ({Scope.PULL}, None)


async def test_basic_outside_the_registry_is_unauthorized_without_a_look_up(hub: IdentityHub, ada: Account) -> None:
    _, text = await hub.key(ada)
    before = hub.lookups
    for path in ("/api/me", "/v1/models", "/v2", "/", "/v2x/"):
        assert (await hub.refusal(basic("Ada", text, target=path))).code == "unauthorized"
    assert hub.lookups == before


async def test_basic_with_the_key_of_another_account_is_unauthorized(hub: IdentityHub, ada: Account) -> None:
    bob = await hub.accounts.add("Bob", email="", password="seventeen quiet herons", is_admin=False)
    _, text = await hub.key(bob)
    for name in ("Ada", " Bob", "Bob ", "x"):
        assert (await hub.refusal(basic(name, text))).code == "unauthorized"
    assert (await hub.who(basic("bob", text))).account == bob


@pytest.mark.parametrize(
    "value", ["Basic", "Basic ", "Basic !!", "Basic QQ==", "Basic OmE=", "Basic /////w==", f"Basic {'QUFB' * 400}", "Basic QTpi:"]
)
async def test_malformed_basic_is_unauthorized_without_a_look_up(hub: IdentityHub, value: str) -> None:
    assert (await hub.refusal(facts("GET", "/v2/", authorization=value))).code == "unauthorized"
    assert hub.lookups == 0


async def test_t057_sql_in_basic_is_unauthorized_without_a_look_up(hub: IdentityHub) -> None:
    assert (await hub.refusal(basic("' OR 1=1--", "' OR 1=1--"))).code == "unauthorized"
    assert hub.lookups == 0


async def test_basic_with_a_revoked_key_is_unauthorized(hub: IdentityHub, ada: Account) -> None:
    key_id, text = await hub.key(ada)
    await hub.credentials.revoke_key(ada, key_id)
    assert (await hub.refusal(basic("Ada", text))).code == "unauthorized"


async def test_bearer_with_an_api_key_is_its_owner_on_the_registrys_paths_too(hub: IdentityHub, ada: Account) -> None:
    _, text = await hub.key(ada)
    for path in ("/v2/", "/v2/token", MANIFEST):
        principal = await hub.who(bearer(text, "GET", path))
        assert (principal.account, principal.proof) == (ada, Proof.API_KEY)


async def test_t059_token_beside_a_session_is_two_credentials(hub: IdentityHub, ada: Account) -> None:
    _, cookie = await hub.session(ada)
    request = browser(cookie, "GET", MANIFEST)
    both = replace(request, headers={**request.headers, "authorization": ["Bearer a.b.c"]})
    assert (await hub.refusal(both)).code == "two_credentials"
