"""`/v2/token` over the real door and real tokens: who gets which grant, and in what form."""

import asyncio
import base64
import json
from datetime import datetime
from pathlib import Path
from typing import Any
from urllib.parse import urlencode, urlsplit

import pytest

from asgi_client import Answer, Caller
from corral.core.policy import ALL_SCOPES
from corral.core.records import Account, Principal
from corral.edges.asgi import App, AppOptions
from corral.edges.token_api import token_endpoints
from corral.hub.tokens import TokenContent
from corral.wire import signing
from corral.wire.registry import Challenge, ScopeRequest, token_request_url
from corral.wire.signing import DevicePrivateKey
from identity_hub import LAPTOP, PHONE, IdentityHub, browser

VECTORS = Path(__file__).parent.parent / "vectors"
GO: dict[str, Any] = json.loads((VECTORS / "signing-vectors-go.json").read_text())
OURS: dict[str, Any] = json.loads((VECTORS / "signing-vectors.json").read_text())


class TokenHub(IdentityHub):
    """A hub with a token endpoint, in which everybody may do everything in their own namespace and pull from `library`."""

    def __init__(self, public_url: str = "https://hub.example") -> None:
        super().__init__(public_url=public_url)
        rows = token_endpoints(tokens=self.tokens, credentials=self.credentials, grantable=self.grantable)
        self.app = App(rows, AppOptions(authenticate=self.credentials.authenticate))
        self.asked: list[ScopeRequest] = []

    async def grantable(self, principal: Principal | None, scope: ScopeRequest) -> frozenset[str]:
        self.asked.append(scope)
        namespace = scope.repository.partition("/")[0].lower()
        own = frozenset({"pull", "push", "delete"}) if principal and principal.account.name.lower() == namespace else frozenset()
        return (own | ({"pull"} if namespace == "library" else frozenset())) & scope.actions

    async def get(self, query: str = "", **headers: str) -> Answer:
        return await Caller(self.app, scheme="https").request("GET", f"/v2/token?{query}", headers=headers)

    async def post(self, **form: str) -> Answer:
        headers = {"content-type": "application/x-www-form-urlencoded"}
        body = urlencode(form).encode()
        return await Caller(self.app, scheme="https").request("POST", "/v2/token", headers=headers, body=body)

    async def signed(self, key: DevicePrivateKey, *scopes: str, nonce: str = "AAECAwQFBgcICQoLDA0ODw") -> Answer:
        """As a stock client answers a challenge."""
        challenge = Challenge(realm=f"{self.public_url}/v2/token", service="corral", scopes=scopes)
        url = token_request_url(challenge, ts=int(self.clock.now().timestamp()), nonce=nonce)
        parts = urlsplit(url)
        header = signing.authorization_header(key, signing.token_challenge(self.public_url, f"{parts.path}?{parts.query}"))
        return await self.get(parts.query, authorization=header)

    def content(self, answer: Answer) -> TokenContent:
        """What the token of an answer says."""
        assert answer.status == 200, answer.body
        return self.tokens.verify(answer.json()["token"])


@pytest.fixture
def hub() -> TokenHub:
    return TokenHub()


@pytest.fixture
async def ada(hub: TokenHub) -> Account:
    return await hub.add("Ada")


def basic(name: str, password: str) -> str:
    return "Basic " + base64.b64encode(f"{name}:{password}".encode()).decode()


# ── The answer ───────────────────────────────────────────────────────────────────────────────────────────────────────


async def test_answer_has_the_token_twice_its_hour_and_is_kept_by_nobody(hub: TokenHub, ada: Account) -> None:
    await hub.link(ada, scopes=ALL_SCOPES)
    answer = await hub.signed(LAPTOP, "repository:ada/tiny:pull,push")
    body = answer.json()
    assert body["token"] == body["access_token"]
    assert (body["expires_in"], body["scope"]) == (3600, "repository:ada/tiny:pull,push")
    assert datetime.fromisoformat(body["issued_at"]) == hub.clock.now()
    assert "refresh_token" not in body
    assert answer.headers["cache-control"] == "no-store"
    assert answer.headers["content-type"].startswith("application/json")


async def test_request_without_credential_gets_a_visitors_token(hub: TokenHub) -> None:
    content = hub.content(await hub.get("service=corral&scope=repository%3Alibrary/tiny%3Apull,push"))
    assert (content.kind, content.key, content.grants) == ("visitor", None, {"library/tiny": {"pull"}})


async def test_unknown_device_gets_a_visitors_token_and_may_be_connected(hub: TokenHub) -> None:
    content = hub.content(await hub.signed(PHONE, "repository:ada/tiny:pull,push", "repository:library/tiny:pull"))
    assert (content.kind, content.key, content.grants) == ("visitor", PHONE.public, {"library/tiny": {"pull"}})
    assert len(hub.sightings) == 1


# ── Vectors ──────────────────────────────────────────────────────────────────────────────────────────────────────────


async def test_t001_vector_of_the_registry_notes_gets_a_token() -> None:
    hub = TokenHub("https://corral.example:8443")
    hub.clock.set_back(hub.clock.now().timestamp() - 1_700_000_000)
    device = await hub.link(await hub.add("ana"), DevicePrivateKey(bytes(range(32))), scopes=ALL_SCOPES)
    query = "nonce=AAECAwQFBgcICQoLDA0ODw&scope=repository%3Aana%2Fm%3Apull%2Cpush&service=corral&ts=1700000000"
    key = "AAAAC3NzaC1lZDI1NTE5AAAAIAOhB7/zzhC+HXDdGOdLwJln5NYwm6UNXx3chmQSVTG4"
    signature = "jmTXnqdcylo9cNUcJNbWHQm3QL+1B9xZMaPzONnEZr0qcZaWgrJx6S01v55vv11pIpcJIAOb7N+yAxQmBv17Bw=="
    content = hub.content(await hub.get(query, authorization=f"{key}:{signature}"))
    assert (content.credential_id, content.grants) == (device.id, {"ana/m": {"pull", "push"}})


@pytest.mark.parametrize(
    "case", [case for case in OURS["cases"] if case["kind"] == "registry-token"], ids=lambda case: case["note"]
)
async def test_t001_own_vectors_get_a_token(case: dict[str, Any]) -> None:
    url = urlsplit(case["url"])
    hub = TokenHub(f"{url.scheme}://{url.netloc}")
    hub.clock.advance(case["ts"] - hub.clock.now().timestamp())
    key = next(key for key in OURS["keys"] if key["name"] == case["key"])
    device = await hub.credentials.add_device(
        await hub.add("Ada"), name="x", authorized_key=key["authorized_key"], scopes=ALL_SCOPES
    )
    assert hub.content(await hub.get(url.query, authorization=case["authorization"])).credential_id == device.id


@pytest.mark.parametrize("vector", [vector for vector in GO["vectors"] if vector["Form"] == "C"])
async def test_t001_go_vectors_get_a_token(vector: dict[str, str]) -> None:
    hub = TokenHub()
    hub.clock.set_back(hub.clock.now().timestamp() - GO["ts"])
    device = await hub.credentials.add_device(await hub.add("ns"), name="go", authorized_key=GO["public_key"], scopes=ALL_SCOPES)
    content = hub.content(await hub.get(urlsplit(vector["Target"]).query, authorization=vector["Authorization"]))
    assert (content.credential_id, content.grants) == (device.id, {"ns/model": {"pull", "push"}})


# ── T24 to T28 ───────────────────────────────────────────────────────────────────────────────────────────────────────


async def test_t024_of_fifty_requests_with_one_nonce_one_gets_a_token(hub: TokenHub, ada: Account) -> None:
    await hub.link(ada)
    answers = await asyncio.gather(*(hub.signed(LAPTOP, "repository:ada/tiny:pull") for _ in range(50)))
    assert sorted(answer.status for answer in answers) == [200] + [401] * 49
    assert (await hub.signed(LAPTOP, "repository:ada/tiny:pull", nonce="AAECAwQFBgcICQoLDA0ODg")).status == 200


async def test_t026_scope_beyond_rights_gets_the_intersection(hub: TokenHub, ada: Account) -> None:
    await hub.link(ada, scopes=ALL_SCOPES)
    answer = await hub.signed(LAPTOP, "repository:Ada/tiny:pull,push", "repository:library/m:pull,push", "repository:bob/m:pull")
    assert hub.content(answer).grants == {"ada/tiny": {"pull", "push"}, "library/m": {"pull"}}
    assert answer.json()["scope"] == "repository:Ada/tiny:pull,push repository:library/m:pull"


async def test_t026_grant_of_nothing_is_an_answer(hub: TokenHub, ada: Account) -> None:
    await hub.link(ada)
    answer = await hub.signed(LAPTOP, "repository:bob/tiny:pull,push")
    assert (answer.status, hub.content(answer).grants, answer.json()["scope"]) == (200, {}, "")


@pytest.mark.parametrize(
    "scope",
    ["repository:../x:pull", "registry:catalog:*", "*", "", "repository:ada:pull", "repository:ada/tiny:", "x:ada/tiny:pull"],
)
async def test_t028_scope_that_is_none_grants_nothing(hub: TokenHub, ada: Account, scope: str) -> None:
    _, key = await hub.key(ada)
    answer = await hub.get(urlencode({"scope": scope}), authorization=basic("ada", key))
    assert (hub.content(answer).grants, hub.asked) == ({}, [])


async def test_t028_a_thousand_scopes_are_cut_or_refused(hub: TokenHub, ada: Account) -> None:
    _, key = await hub.key(ada)
    scopes = [f"repository:ada/m{number}:pull" for number in range(1000)]
    as_list = await hub.get(urlencode({"scope": " ".join(scopes)}), authorization=basic("ada", key))
    assert len(hub.content(as_list).grants) == len(hub.asked) <= 100
    repeated = await hub.get(urlencode([("scope", scope) for scope in scopes]), authorization=basic("ada", key))
    assert repeated.status == 400


async def test_scope_with_every_action_grants_what_there_is(hub: TokenHub, ada: Account) -> None:
    _, key = await hub.key(ada)
    content = hub.content(await hub.get("scope=repository:ada/tiny:*", authorization=basic("ada", key)))
    assert content.grants == {"ada/tiny": {"pull", "push", "delete"}}


# ── An account and an API key ────────────────────────────────────────────────────────────────────────────────────────


async def test_basic_gets_a_token_for_its_key(hub: TokenHub, ada: Account) -> None:
    key_id, key = await hub.key(ada)
    query = "service=corral&account=ada&client_id=docker&offline_token=true&scope=repository%3Aada/tiny%3Apull"
    content = hub.content(await hub.get(query, authorization=basic("ada", key)))
    assert (content.kind, content.credential_id, content.grants) == ("key", key_id, {"ada/tiny": {"pull"}})


async def test_bad_credentials_are_401_in_the_registrys_form(hub: TokenHub, ada: Account) -> None:
    _, key = await hub.key(ada)
    for value in (
        basic("bob", key),
        basic("ada", "x"),
        basic("ada", key[:-1] + "0"),
        "Basic !",
        "Token x",
        "a:b",
        "Bearer a.b.c",
    ):
        answer = await hub.get("scope=repository:ada/tiny:pull", authorization=value)
        assert (answer.status, answer.json()["errors"][0]["code"]) == (401, "UNAUTHORIZED")


async def test_token_makes_no_other_token(hub: TokenHub, ada: Account) -> None:
    await hub.link(ada)
    token = (await hub.signed(LAPTOP, "repository:ada/tiny:pull")).json()["token"]
    assert (await hub.get("scope=repository:ada/tiny:pull", authorization=f"Bearer {token}")).status == 401


async def test_browser_gets_no_token(hub: TokenHub, ada: Account) -> None:
    _, cookie = await hub.session(ada)
    headers = {name: values[0] for name, values in browser(cookie).headers.items()}
    assert (await hub.get("scope=repository:ada/tiny:pull", **headers)).status == 403


# ── POST ─────────────────────────────────────────────────────────────────────────────────────────────────────────────


async def test_form_with_an_api_key_as_password_gets_a_token(hub: TokenHub, ada: Account) -> None:
    key_id, key = await hub.key(ada)
    answer = await hub.post(
        grant_type="password",
        service="corral",
        client_id="containerd-client",
        access_type="offline",
        username="ada@example.org",
        password=key,
        scope="repository:ada/tiny:pull,push repository:bob/tiny:pull",
    )
    content = hub.content(answer)
    assert (content.credential_id, content.grants) == (key_id, {"ada/tiny": {"pull", "push"}})
    assert answer.json()["scope"] == "repository:ada/tiny:pull,push"


async def test_form_with_a_wrong_password_is_401(hub: TokenHub, ada: Account) -> None:
    _, key = await hub.key(await hub.add("Bob"))
    for password in (key, "", "nine green bottles on a wall"):
        answer = await hub.post(grant_type="password", username="ada", password=password)
        assert answer.status == 401


@pytest.mark.parametrize("grant_type", ["refresh_token", "authorization_code", ""])
async def test_form_with_another_grant_type_is_400_unsupported(hub: TokenHub, grant_type: str) -> None:
    answer = await hub.post(grant_type=grant_type, refresh_token="x", scope="repository:library/tiny:pull")
    assert (answer.status, answer.json()["errors"][0]["code"]) == (400, "UNSUPPORTED")


async def test_form_beside_a_header_is_two_credentials(hub: TokenHub, ada: Account) -> None:
    _, key = await hub.key(ada)
    headers = {"content-type": "application/x-www-form-urlencoded", "authorization": basic("ada", key)}
    body = urlencode({"grant_type": "password", "username": "ada", "password": key}).encode()
    answer = await Caller(hub.app).request("POST", "/v2/token", headers=headers, body=body)
    assert answer.status == 400
    assert "token" not in answer.json()


async def test_body_that_is_no_form_is_400(hub: TokenHub) -> None:
    answer = await Caller(hub.app).request("POST", "/v2/token", headers={"content-type": "application/json"}, body=b"{}")
    assert (answer.status, "errors" in answer.json()) == (400, True)
