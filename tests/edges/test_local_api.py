"""The local server as its callers see it: in process towards the caller, over a real socket towards the hub."""

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any

import aiohttp
import pytest

import corral
from asgi_client import Answer, Caller
from corral.clients.hub import HubClient, open_session
from corral.core.ports import HubTerms
from corral.edges.asgi import App
from corral.edges.local_api import LocalApi, local_app
from corral.edges.local_guard import LocalGuard
from corral.local.cloud import CloudAccess, CloudSwitch
from corral.local.models import LocalModels
from corral.wire.discovery import STOCK
from corral.wire.signing import connect_url, parse_authorization, request_challenge, verify
from fakes import FakeClock, SeededEntropy
from fakes_local import (
    FakeDeviceKeys,
    FakeInference,
    MemoryHubs,
    MemoryModels,
    Received,
    Script,
    SocketHub,
    Wire,
    installed,
    socket_hub,
    stub,
    stub_models,
)

KEYS = FakeDeviceKeys()
VERSION = "0.34.0"
EVIL_HEADERS = [
    ("authorization", "Bearer crlk_callers"),
    ("cookie", "session=callers"),
    ("x-api-key", "crlk_callers"),
    ("x-forwarded-for", "203.0.113.9"),
    ("x-forwarded-host", "evil.example"),
    ("corral-device-name", "somebody else"),
    ("x-goog-api-key", "callers"),
    ("private-token", "callers"),
    ("x-amz-security-token", "callers"),
    ("x-remote-user", "caller"),
]


async def nothing(request: Received, wire: Wire) -> None:
    raise AssertionError(f"nobody expected {request.method} {request.target}")


@pytest.fixture
async def hub() -> AsyncIterator[SocketHub]:
    async with socket_hub(nothing) as served:
        yield served


@pytest.fixture
async def session() -> AsyncIterator[aiohttp.ClientSession]:
    async with open_session() as opened:
        yield opened


class Local:
    """A local server whose parts a test may change before its first request."""

    def __init__(self, hub: SocketHub, session: aiohttp.ClientSession) -> None:
        self.hub = hub
        self.hub_url = hub.url
        self.inference = FakeInference()
        self.is_off = {"env": False, "config": False}
        memory = MemoryHubs()
        memory.keep_terms(hub.url, HubTerms(signature=STOCK, public_url=hub.url))
        self.memory = memory
        remote = stub(installed("big:1t"), host=hub.url, remote="huge:2t")
        foreign = stub(installed("far:1t"), host="https://elsewhere.example", remote="far:1t")
        self.store = MemoryModels(installed("llama3:8b"), remote, foreign)
        gateway = HubClient(
            lambda: self.hub_url,
            KEYS,
            memory=memory,
            clock=FakeClock(),
            entropy=SeededEntropy(),
            session=session,
            device_name="ada's box",
            version="9.9",
        )
        self._gateway = gateway

    def app(self) -> App:
        switch = CloudSwitch(self.is_off["env"], lambda: self.is_off["config"])
        cloud = CloudAccess(self._gateway, switch, device_name="ada's box", version=VERSION)
        stubs = stub_models(self._gateway, self.hub_url, cloud=cloud)
        api = LocalApi(
            models=LocalModels(self.store, self.inference, stubs),  # type: ignore[arg-type]
            loaded=list,
            cloud=cloud,
            hub_url=lambda: self.hub_url,
            version=VERSION,
        )
        return local_app(api, LocalGuard(hostname="adas-box"))

    async def request(self, method: str, target: str, body: Any = None, **options: Any) -> Answer:
        payload = body if isinstance(body, bytes) else b"" if body is None else json.dumps(body).encode()
        caller = Caller(self.app(), host="localhost:11434")
        return await asyncio.wait_for(caller.request(method, target, body=payload, **options), 10)


@pytest.fixture
def local(hub: SocketHub, session: aiohttp.ClientSession) -> Local:
    return Local(hub, session)


def lines_of(answer: Answer) -> list[dict[str, Any]]:
    return [json.loads(line) for line in answer.body.splitlines()]


def streaming(*pieces: bytes, content_type: str = "application/x-ndjson", then_cut: bool = False) -> Script:
    async def script(request: Received, wire: Wire) -> None:
        await wire.begin_stream(content_type)
        for piece in pieces:
            await wire.chunk(piece)
        if then_cut:
            wire.cut()
        else:
            await wire.end_stream()

    return script


# ── The server itself ────────────────────────────────────────────────────────────────────────────────────────────────


async def test_server_says_that_it_runs(local: Local) -> None:
    answer = await local.request("GET", "/")
    assert (answer.status, answer.body) == (200, b"Ollama is running")
    assert answer.headers["content-type"].startswith("text/plain")


async def test_version_is_one_that_clients_can_compare(local: Local) -> None:
    answer = await local.request("GET", "/api/version")
    assert answer.json()["version"] == VERSION
    assert all(part.isdecimal() for part in answer.json()["version"].split("."))


@pytest.mark.parametrize(
    ("env", "config", "cloud"),
    [
        (False, False, {"disabled": False, "source": "none"}),
        (True, False, {"disabled": True, "source": "env"}),
        (False, True, {"disabled": True, "source": "config"}),
        (True, True, {"disabled": True, "source": "both"}),
    ],
)
async def test_status_names_the_hub_and_what_switched_it_off(
    env: bool, config: bool, cloud: dict[str, Any], local: Local
) -> None:
    local.is_off = {"env": env, "config": config}
    assert (await local.request("GET", "/api/status")).json() == {"cloud": cloud, "hub": local.hub_url, "auth": "off"}


async def test_unknown_path_and_wrong_method_answer_as_ollama_does(local: Local) -> None:
    unknown = await local.request("GET", "/api/nowhere")
    assert (unknown.status, unknown.body) == (404, b"404 page not found")
    assert unknown.headers["content-type"] == "text/plain"
    wrong = await local.request("PUT", "/api/chat", {})
    assert (wrong.status, wrong.body, wrong.headers["allow"]) == (405, b"405 method not allowed", "POST")
    assert (await local.request("DELETE", "/api/tags")).headers["allow"] == "GET, HEAD"


@pytest.mark.parametrize(
    ("method", "target", "status", "location"),
    [
        ("GET", "/api/tags/", 301, "/api/tags"),
        ("HEAD", "/api/version/?a=%20b/", 307, "/api/version?a=%20b/"),
        ("POST", "/api/chat/", 307, "/api/chat"),
        ("GET", "/v1/models/m/", 301, "/v1/models/m"),
        ("PUT", "/api/chat/", 404, None),
        ("GET", "/api/nowhere/", 404, None),
        ("GET", "/api/", 404, None),
        ("GET", "/api/tags%2F", 404, None),
    ],
)
async def test_slash_too_many_leads_to_the_route_without_it(
    method: str, target: str, status: int, location: str | None, local: Local
) -> None:
    answer = await local.request(method, target, {"model": "x"} if method == "POST" else None)
    assert (answer.status, answer.headers.get("location")) == (status, location)


async def test_credentials_of_a_caller_are_ignored(local: Local) -> None:
    body = {"model": "llama3:8b", "prompt": "x", "stream": False}
    answer = await local.request("POST", "/api/generate", body, headers=[("authorization", "Bearer nonsense"), ("cookie", "a=b")])
    assert answer.status == 200


async def test_installed_model_answers_here_and_the_hub_hears_nothing(local: Local) -> None:
    answer = await local.request("POST", "/api/generate", {"model": "llama3:8b", "prompt": "x"})
    assert [line["response"] for line in lines_of(answer)] == ["one", "two", ""]
    assert answer.headers["content-type"] == "application/x-ndjson"
    assert local.hub.received == []


async def test_model_that_is_not_there_is_told_in_the_routes_words(local: Local) -> None:
    assert (await local.request("POST", "/api/generate", {"model": "gone"})).json() == {"error": "model 'gone' not found"}
    assert (await local.request("POST", "/api/embed", {"model": "gone"})).json()["error"].endswith("try pulling it first")
    openai = await local.request(
        "POST", "/v1/chat/completions", {"model": "gone", "messages": [{"role": "user", "content": "x"}]}
    )
    assert (openai.status, openai.json()["error"]["type"]) == (404, "not_found_error")


# ── Host and Origin, on every route ──────────────────────────────────────────────────────────────────────────────────

ROUTES = [
    ("GET", "/"),
    ("HEAD", "/"),
    ("GET", "/api/version"),
    ("GET", "/.well-known/corral"),
    ("GET", "/api/status"),
    ("GET", "/api/tags"),
    ("GET", "/api/ps"),
    ("POST", "/api/show"),
    ("POST", "/api/generate"),
    ("POST", "/api/chat"),
    ("POST", "/api/embed"),
    ("POST", "/api/embeddings"),
    ("POST", "/api/me"),
    ("POST", "/api/signout"),
    ("DELETE", "/api/user/keys/x"),
    ("POST", "/v1/audio/transcriptions"),
    ("POST", "/v1/chat/completions"),
    ("POST", "/v1/completions"),
    ("POST", "/v1/embeddings"),
    ("POST", "/v1/responses"),
    ("POST", "/v1/messages"),
    ("POST", "/v1/messages/count_tokens"),
    ("GET", "/v1/models"),
    ("GET", "/v1/models/x"),
    ("GET", "/nowhere"),
    ("OPTIONS", "/api/chat"),
    ("OPTIONS", "/nowhere"),
]
#: Routes of later versions are covered before they exist.
CHANGING = ["/api/delete", "/api/pull", "/api/create", "/api/push", "/api/copy", "/api/signout", "/api/me"]


def test_route_list_of_the_guard_tests_is_complete(local: Local) -> None:
    served = {row.path.partition("{")[0] for row in local.app().endpoints}
    assert served <= {path if path in served else path.rpartition("/")[0] + "/" for _, path in ROUTES}


@pytest.mark.parametrize(("method", "path"), ROUTES)
@pytest.mark.parametrize(
    "host", ["evil.com", "localhost.evil.com", "evil.local", "x.internal", "127.0.0.1.nip.io", "localhost.", "a/b"]
)
async def test_t086_foreign_host_is_refused_on_every_route(method: str, path: str, host: str, local: Local) -> None:
    answer = await local.request(method, path, {"model": "llama3:8b"} if method == "POST" else None, headers=[("host", host)])
    # A Host that is no host at all does not even get as far as the guard.
    assert answer.status == (400 if host == "a/b" else 403)
    assert local.inference.models == []


@pytest.mark.parametrize("host", ["localhost:11434", "127.0.0.1", "[::1]", "192.168.1.20:11434", "adas-box.local"])
@pytest.mark.parametrize("method", ["GET", "HEAD"])
async def test_t086_own_host_is_served(host: str, method: str, local: Local) -> None:
    assert (await local.request(method, "/", headers=[("host", host)])).status == 200


@pytest.mark.parametrize(
    ("headers", "status"),
    [([], 200), ([("origin", "http://localhost")], 403), ([("sec-fetch-site", "none")], 403)],
)
async def test_t086_missing_host_is_served_to_what_is_no_browser(
    headers: list[tuple[str, str]], status: int, local: Local
) -> None:
    assert (await local.request("GET", "/", headers=[("host", ""), *headers])).status == status


@pytest.mark.parametrize("path", CHANGING)
@pytest.mark.parametrize("origin", ["https://evil.com", "null"])
async def test_t088_foreign_page_changes_nothing(path: str, origin: str, local: Local) -> None:
    headers = [("origin", origin), ("content-type", "text/plain")]
    for method in ("POST", "DELETE", "OPTIONS"):
        answer = await local.request(method, path, {"model": "llama3:8b"}, headers=headers)
        assert answer.status == 403
        assert not [name for name in answer.headers if name.startswith("access-control-")]
    assert local.hub.received == []


async def test_t088_extension_may_chat_but_not_sign_out_and_curl_may_both(local: Local) -> None:
    extension = [("origin", "chrome-extension://abcdef")]
    chat = {"model": "llama3:8b", "messages": [{"role": "user", "content": "x"}]}
    answer = await local.request("POST", "/api/chat", chat, headers=extension)
    assert answer.status == 200
    assert answer.headers["access-control-allow-origin"] == "chrome-extension://abcdef"
    for method, path in (
        ("POST", "/api/signout"),
        ("POST", "/api/me"),
        ("DELETE", "/api/user/keys/x"),
        ("DELETE", "/api/delete"),
    ):
        assert (await local.request(method, path, {}, headers=extension)).status == 403
    assert local.hub.received == []
    plain = await local.request("POST", "/api/chat", chat, headers=[("content-type", "application/x-www-form-urlencoded")])
    assert plain.status == 200


async def test_t089_preflight_is_answered_for_local_pages_only(local: Local) -> None:
    asked = ("access-control-request-method", "POST")
    allowed = await local.request("OPTIONS", "/api/chat", headers=[("origin", "http://localhost:3000"), asked])
    assert (allowed.status, allowed.body) == (204, b"")
    assert allowed.headers["access-control-allow-origin"] == "http://localhost:3000"
    evil = await local.request("OPTIONS", "/api/chat", headers=[("origin", "https://evil.com"), asked])
    assert (evil.status, "access-control-allow-origin" in evil.headers) == (403, False)


async def test_t089_error_answers_carry_the_cors_headers_too(local: Local) -> None:
    answer = await local.request("POST", "/api/chat", {"model": "gone"}, headers=[("origin", "http://localhost:3000")])
    assert answer.headers["access-control-allow-origin"] == "http://localhost:3000"


# ── The branch to the hub ────────────────────────────────────────────────────────────────────────────────────────────

CLOUD_ROUTES = [
    *(f"/api/{name}" for name in ("generate", "chat", "embed", "embeddings", "show")),
    *(f"/v1/{name}" for name in ("chat/completions", "completions", "embeddings", "responses")),
    *(f"/v1/messages{more}" for more in ("", "/count_tokens")),
]


@pytest.mark.parametrize("path", CLOUD_ROUTES)
async def test_cloud_model_is_relayed_with_only_the_model_replaced(path: str, local: Local) -> None:
    local.hub.script = streaming(b'{"done":true}\n')
    body = b'{"unknown": {"deep":[1e5,"\\u00e9"]}, "model": "gpt:20b-cloud", "keep_alive":-1, "big": 12345678901234567890}'
    answer = await local.request("POST", f"{path}?b=2&a=%31", body)
    (request,) = local.hub.received
    assert answer.status == 200
    assert request.target.partition("?")[0] == path
    assert request.body == body.replace(b"gpt:20b-cloud", b"gpt:20b").replace(b": ", b":").replace(b", ", b",")
    verify(parse_authorization(request.header("authorization")), request_challenge("POST", request.target))
    assert sorted(request.target.partition("?")[2].split("&"))[:2] == ["a=%31", "b=2"]
    assert local.inference.models == []


async def test_t090_caller_speaks_for_nobody_at_the_hub_and_the_hub_sets_nothing_here(local: Local) -> None:
    async def script(request: Received, wire: Wire) -> None:
        sent = (
            ("Set-Cookie", "a=b"),
            ("Access-Control-Allow-Origin", "*"),
            ("Retry-After", "1"),
            ("Link", "</x>"),
            ("Clear-Site-Data", '"*"'),
        )
        await wire.answer_json(200, {"done": True}, *sent)

    local.hub.script = script
    headers = [
        *EVIL_HEADERS,
        ("user-agent", "ollama-python/1"),
        ("accept", "application/json"),
        ("x-request-id", "2"),
        ("x-custom", "3"),
    ]
    answer = await local.request("POST", "/api/chat", {"model": "m:cloud"}, headers=headers)
    (request,) = local.hub.received
    assert request.header("authorization").startswith(KEYS.key.public.blob_text)
    assert not {"cookie", "x-api-key", "x-forwarded-for", "x-forwarded-host", "x-custom"} & set(request.names)
    assert not any("caller" in value for _, value in request.headers)
    assert request.header("corral-device-name") == "ada's box"
    assert request.header("x-ollama-client-version") == VERSION
    assert request.header("user-agent") == "ollama-python/1"
    assert request.header("x-request-id") == "2"
    assert max(request.names.values()) == 1
    assert request.header("host") == local.hub_url.removeprefix("http://")
    assert answer.headers["retry-after"] == "1"
    assert not {"link", "set-cookie", "access-control-allow-origin", "clear-site-data"} & set(answer.headers)
    assert answer.json() == {"done": True}
    assert answer.headers["content-type"] == "application/json"


async def test_t090_page_of_the_hub_is_no_page_of_this_server(local: Local) -> None:
    async def script(request: Received, wire: Wire) -> None:
        await wire.answer(200, b"<script>alert(document.domain)</script>", ("Content-Type", "text/html"))

    local.hub.script = script
    answer = await local.request("GET", "/v1/models/html:cloud")
    assert (answer.status, b"<script>" in answer.body) == (502, False)
    assert answer.headers["content-type"].startswith("application/json")


@pytest.mark.parametrize(("method", "path"), ROUTES)
async def test_t090_browser_takes_every_answer_for_data(method: str, path: str, local: Local) -> None:
    async def script(request: Received, wire: Wire) -> None:
        await wire.answer_json(200, {"name": "ada"}, ("Content-Security-Policy", "default-src *"))

    local.hub.script = script
    answer = await local.request(method, path, {"model": "m:cloud"} if method == "POST" else None)
    assert answer.headers["x-content-type-options"] == "nosniff"
    assert answer.headers["content-security-policy"] == "default-src 'none'; sandbox"


@pytest.mark.parametrize("target", ["http://evil.example/api/chat", "//evil.example/api/chat", "/api/chat@evil.example"])
async def test_t090_caller_cannot_choose_where_a_request_goes(target: str, local: Local) -> None:
    answer = await local.request(
        "POST", target, {"model": "m:cloud", "host": "evil.example", "remote_host": "http://evil.example"}
    )
    assert answer.status in (400, 404, 405)
    assert local.hub.received == []


async def test_t090_redirect_of_the_hub_ends_here(local: Local) -> None:
    async def script(request: Received, wire: Wire) -> None:
        await wire.answer(307, b"", ("Location", "/api/elsewhere"))

    local.hub.script = script
    answer = await local.request("POST", "/api/chat", {"model": "m:cloud"})
    assert (answer.status, "location" in answer.headers) == (502, False)
    assert len(local.hub.received) == 1


async def test_stub_of_the_hub_is_relayed_under_its_own_name(local: Local) -> None:
    local.hub.script = streaming(b'{"done":true}\n')
    for path in ("/api/generate", "/api/chat", "/v1/chat/completions"):
        messages = [{"role": "user", "content": "x"}]
        assert (await local.request("POST", path, {"model": "big:1t", "prompt": "x", "messages": messages})).status == 200
        assert json.loads(local.hub.received[-1].body)["model"] == "huge:2t"
    assert (await local.request("POST", "/api/chat", {"model": "big:1t:local", "messages": messages})).status == 404
    assert len(local.hub.received) == 3


@pytest.mark.parametrize("path", ["/api/chat", "/v1/chat/completions", "/v1/messages", "/v1/responses"])
async def test_stub_of_the_hub_says_where_to_sign_in_in_every_dialect(path: str, local: Local) -> None:
    async def script(request: Received, wire: Wire) -> None:
        await wire.answer_json(401, {"error": "unauthorized"})

    local.hub.script = script
    body = {"model": "big:1t", "messages": [{"role": "user", "content": "x"}], "input": "x", "max_tokens": 5}
    answer = await local.request("POST", path, body)
    assert (answer.status, answer.json()["error"]) == (401, "unauthorized")
    assert answer.json()["signin_url"].startswith(f"{local.hub_url}/connect?")


@pytest.mark.parametrize("path", ["/api/embed", "/api/embeddings", "/v1/embeddings"])
async def test_embedding_by_a_stub_of_the_hub_is_passed_on(path: str, local: Local) -> None:
    async def script(request: Received, wire: Wire) -> None:
        await wire.answer_json(200, {"embedding": []})

    local.hub.script = script
    assert (await local.request("POST", path, {"model": "big:1t", "input": "x", "prompt": "x"})).status == 200
    assert json.loads(local.hub.received[-1].body)["model"] == "huge:2t"


async def test_stub_of_another_server_is_not_relayed(local: Local) -> None:
    answer = await local.request("POST", "/api/generate", {"model": "far:1t", "prompt": "x"})
    assert (answer.status, answer.json()) == (400, {"error": "this server cannot run this remote model"})


async def test_show_of_a_cloud_model_by_its_old_field_is_relayed(local: Local) -> None:
    local.hub.script = streaming(b"{}")
    await local.request("POST", "/api/show", {"name": "m:cloud", "verbose": True})
    assert json.loads(local.hub.received[-1].body)["model"] == "m"


async def test_openai_model_by_name_is_relayed(local: Local) -> None:
    async def script(request: Received, wire: Wire) -> None:
        await wire.answer_json(200, {"id": "m:20b"})

    local.hub.script = script
    answer = await local.request("GET", "/v1/models/m:20b-cloud")
    assert (answer.status, answer.json()) == (200, {"id": "m:20b"})
    assert local.hub.received[0].target.partition("?")[0] == "/v1/models/m:20b"


@pytest.mark.parametrize("name", ["..:cloud", ".:cloud", "..:x-cloud", ":cloud", "a%20b:cloud", "a%3Fb:cloud"])
async def test_t111_name_that_would_leave_its_place_in_the_path_is_not_signed(name: str, local: Local) -> None:
    answer = await local.request("GET", f"/v1/models/{name}")
    assert answer.status in (400, 404)
    assert local.hub.received == []


@pytest.mark.parametrize("path", CLOUD_ROUTES)
async def test_cloud_that_is_off_is_403_in_plain_form_and_the_hub_hears_nothing(path: str, local: Local) -> None:
    local.is_off["env"] = True
    answer = await local.request("POST", path, {"model": "m:cloud"})
    what = "remote model details are unavailable" if path == "/api/show" else "remote model is unavailable"
    assert (answer.status, answer.json()) == (403, {"error": f"ollama cloud is disabled: {what}"})
    assert local.hub.received == []


@pytest.mark.parametrize("path", CLOUD_ROUTES)
async def test_device_that_is_not_connected_gets_exactly_the_body_clients_parse(path: str, local: Local) -> None:
    async def script(request: Received, wire: Wire) -> None:
        await wire.answer_json(401, {"error": {"message": "unauthorized"}}, ("WWW-Authenticate", "Bearer"))

    local.hub.script = script
    answer = await local.request("POST", path, {"model": "m:cloud"})
    link = connect_url(local.hub_url, "ada's box", KEYS.key.public)
    assert answer.status == 401
    assert answer.body == json.dumps({"error": "unauthorized", "signin_url": link}, separators=(",", ":")).encode()
    assert "www-authenticate" not in answer.headers


async def test_hubs_own_link_is_kept(local: Local) -> None:
    link = f"{local.hub_url}/connect?name=x&key=y&code=z"

    async def script(request: Received, wire: Wire) -> None:
        await wire.answer_json(401, {"error": "unauthorized", "signin_url": link})

    local.hub.script = script
    assert (await local.request("POST", "/api/chat", {"model": "m:cloud"})).json()["signin_url"] == link
    assert (await local.request("POST", "/api/me")).json() == {"error": "unauthorized", "signin_url": link}


@pytest.mark.parametrize("path", ["/api/chat", "/v1/chat/completions"])
async def test_hub_that_is_away_is_502_with_its_address(path: str, local: Local) -> None:
    async with socket_hub(nothing) as gone:
        local.hub_url = gone.url
    answer = await local.request("POST", path, {"model": "m:cloud"})
    assert (answer.status, answer.json()) == (
        502,
        {"error": f"could not reach the hub {local.hub_url}: connection refused → is it running?"},
    )


async def test_limit_of_the_hub_reaches_the_caller_as_it_is(local: Local) -> None:
    async def script(request: Received, wire: Wire) -> None:
        await wire.answer(429, b'{"error":"slow down"}', ("Content-Type", "application/json"), ("Retry-After", "7"))

    local.hub.script = script
    answer = await local.request("POST", "/api/chat", {"model": "m:cloud"})
    assert (answer.status, answer.body, answer.headers["retry-after"]) == (429, b'{"error":"slow down"}', "7")


async def test_stream_is_passed_on_piece_by_piece(local: Local) -> None:
    local.hub.script = streaming(b'{"a":1}\n', b'{"b":2}\n{"c":3}\n')
    answer = await local.request("POST", "/api/chat", {"model": "m:cloud"})
    assert b"".join(answer.parts) == b'{"a":1}\n{"b":2}\n{"c":3}\n'
    assert answer.parts[0].startswith(b'{"a":1}\n')
    assert answer.headers["content-type"] == "application/x-ndjson"


@pytest.mark.parametrize(
    ("pieces", "content_type", "expected"),
    [
        ([b'{"a":1}\n'], "application/x-ndjson", [b'{"a":1}', b"error"]),
        ([b'{"a":1}\n{"b'], "application/x-ndjson", [b'{"a":1}', b"error"]),
        ([b'{"a', b'":1}\n', b"{"], "application/x-ndjson; charset=utf-8", [b'{"a":1}', b"error"]),
        ([b'data: {"a":1}\n\n'], "text/event-stream", [b'data: {"a":1}', b"", b"error", b""]),
        ([b'data: {"a":1}\n\ndata: {"b":2}\n'], "text/event-stream", [b'data: {"a":1}', b"", b"error", b""]),
        ([], "application/x-ndjson", [b"error"]),
    ],
)
async def test_hub_that_dies_in_a_stream_ends_it_with_an_error_frame_and_nothing_half(
    pieces: list[bytes], content_type: str, expected: list[bytes], local: Local
) -> None:
    local.hub.script = streaming(*pieces, content_type=content_type, then_cut=True)
    path = "/v1/chat/completions" if "event" in content_type else "/api/chat"
    answer = await local.request("POST", path, {"model": "m:cloud", "stream": True})
    assert answer.status == 200
    lines = [b"error" if b'"error"' in line else line for line in answer.body.split(b"\n")[:-1]]
    assert lines == expected
    assert b"[DONE]" not in answer.body


@pytest.mark.parametrize(
    ("path", "told"),
    [
        ("/v1/completions", b'data: {"error":{"message":"'),
        ("/v1/responses", b'event: error\ndata: {"type":"error","code":"server_error","message":"'),
        ("/v1/messages", b'event: error\ndata: {"type":"error","error":{"type":"api_error","message":"'),
    ],
)
async def test_hub_that_dies_in_a_stream_is_told_in_the_routes_own_form(path: str, told: bytes, local: Local) -> None:
    local.hub.script = streaming(b"event: a\ndata: {}\n\nevent", content_type="text/event-stream", then_cut=True)
    answer = await local.request("POST", path, {"model": "m:cloud", "stream": True})
    assert answer.body.startswith(b"event: a\ndata: {}\n\n" + told)
    assert answer.body.endswith(b"\n\n")


async def test_stream_without_a_last_line_end_arrives_whole(local: Local) -> None:
    local.hub.script = streaming(b'{"a":1}\n{"done":true}')
    assert (await local.request("POST", "/api/chat", {"model": "m:cloud"})).body == b'{"a":1}\n{"done":true}'


async def test_hub_that_dies_in_a_whole_answer_is_502(local: Local) -> None:
    local.hub.script = streaming(b'{"a":', content_type="application/json", then_cut=True)
    answer = await local.request("POST", "/api/chat", {"model": "m:cloud", "stream": False})
    assert answer.status == 502
    assert "before its answer was complete" in answer.json()["error"]


@pytest.mark.parametrize("leave_after", [0, 1])
async def test_caller_that_leaves_ends_the_hubs_work(leave_after: int, local: Local) -> None:
    left: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    async def endless(request: Received, wire: Wire) -> None:
        if leave_after:
            await wire.begin_stream()
            await wire.chunk(b'{"a":1}\n')
        await wire.has_left.wait()
        left.set_result(None)

    local.hub.script = endless
    asking = asyncio.create_task(local.request("POST", "/api/chat", {"model": "m:cloud"}, leave_after=leave_after))
    if leave_after == 0:
        # It leaves before anything was asked of the hub, or while it waits for the answer; either way nothing goes on.
        await asking
        if not local.hub.received:
            return
    await asyncio.wait_for(left, 5)
    await asking


async def test_relayed_stream_ends_with_a_frame_when_the_server_shuts_down(local: Local) -> None:
    local.hub.script = streaming(b'{"a":1}\n', b'{"b":2}\n')
    app = local.app()
    app.closing.set()
    answer = await Caller(app, host="localhost").request("POST", "/api/chat", body=b'{"model":"m:cloud"}')
    assert lines_of(answer)[0] == {"a": 1}
    assert lines_of(answer)[-1] == {"error": "the server is shutting down"}


@pytest.mark.parametrize(
    ("body", "status"),
    [(b"", 400), (b"{", 400), (b"[]", 400), (b'{"model":3}', 400), (b'{"model":"x:cloud:local"}', 400), (b"\xff", 400)],
)
@pytest.mark.parametrize("path", CLOUD_ROUTES)
async def test_body_that_cannot_be_read_is_refused_by_the_route_itself(path: str, body: bytes, status: int, local: Local) -> None:
    answer = await local.request("POST", path, body)
    assert answer.status == status
    assert ("message" in answer.json()["error"]) is path.startswith("/v1/")
    assert local.hub.received == []


@pytest.mark.parametrize("path", CLOUD_ROUTES)
async def test_t110_only_a_prompt_may_be_large(path: str, local: Local) -> None:
    local.hub.script = streaming(b'{"done":true}\n')
    answer = await local.request("POST", path, {"model": "m:cloud", "prompt": "x" * (2 * 1024 * 1024)})
    assert answer.status == (413 if path == "/api/show" else 200)


# ── Accounts ─────────────────────────────────────────────────────────────────────────────────────────────────────────


async def test_me_is_asked_at_the_hub(local: Local) -> None:
    async def script(request: Received, wire: Wire) -> None:
        await wire.answer_json(200, {"id": "1", "name": "ada", "email": "ada@example.org"})

    local.hub.script = script
    answer = await local.request("POST", "/api/me")
    assert answer.json() == {"id": "1", "name": "ada", "email": "ada@example.org", "plan": "free"}
    assert local.hub.received[0].target.startswith("/api/me?ts=")


@pytest.mark.parametrize(("method", "path"), [("POST", "/api/signout"), ("DELETE", "/api/user/keys/whatever")])
async def test_sign_out_deletes_this_devices_key_and_answers_null(method: str, path: str, local: Local) -> None:
    async def script(request: Received, wire: Wire) -> None:
        await wire.answer_json(200, None)

    local.hub.script = script
    answer = await local.request(method, path)
    assert (answer.status, answer.body) == (200, b"null")
    (request,) = local.hub.received
    assert request.method == "DELETE"
    assert request.target.startswith(f"/api/user/keys/{KEYS.key.public.encoded}?ts=")


async def test_account_routes_work_while_the_cloud_is_off(local: Local) -> None:
    async def script(request: Received, wire: Wire) -> None:
        await wire.answer_json(401, {})

    local.hub.script = script
    local.is_off["config"] = True
    assert (await local.request("POST", "/api/me")).status == 401
    out = await local.request("POST", "/api/signout")
    assert (out.status, out.json()) == (401, {"error": "you are not currently signed in"})


async def test_me_without_a_hub_says_why(local: Local) -> None:
    async with socket_hub(nothing) as gone:
        local.hub_url = gone.url
    answer = await local.request("POST", "/api/me")
    assert answer.status == 503
    assert answer.json()["error"].startswith(f"account unavailable: could not reach the hub {gone.url}")


async def test_discovery_says_that_it_is_no_hub(local: Local) -> None:
    answer = await local.request("GET", "/.well-known/corral")
    assert answer.status == 200
    assert answer.json() == {"corral": corral.__version__, "hub": local.hub_url}
