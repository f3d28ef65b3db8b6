"""A secured local server over its whole route table: who gets which route, which models there are for whom, and that nobody
spends this machine's account at its hub who may not."""

import json
import logging
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from functools import cache
from ipaddress import ip_network
from pathlib import Path
from typing import Any

import pytest
from starlette.requests import Request
from starlette.responses import Response

from asgi_client import Answer, Caller
from corral.core.policy import PUBLIC
from corral.core.records import Account, Capability, Model, Principal, Proof
from corral.edges.asgi import App, Endpoint, endpoint
from corral.edges.create_api import CreateApi
from corral.edges.library_api import transfer_endpoints
from corral.edges.local_api import LocalApi, local_app
from corral.edges.local_cloud_api import LocalCloudApi
from corral.edges.local_guard import LocalGuard
from corral.hub.replay import ReplayGuard
from corral.hub.throttle import Throttle, per_minutes
from corral.local.cloud import CloudAccess, CloudSwitch
from corral.local.door import LocalDoor
from corral.local.models import LocalModels
from corral.local.web_search import HubSearch
from corral.wire.apikeys import ENTROPY_BYTES, ApiKeyText, make_api_key
from corral.wire.authorized_keys import Right, key_digest, parse_authorized_keys
from corral.wire.errors import CorralError
from corral.wire.native import ChatRequest
from fakes import FakeClock
from fakes_local import FakeGateway, FakeInference, MemoryModels, installed, stub, stub_models

LIST = Path(__file__).with_name("local_rights.txt")
LAN, HERE = "192.168.7.20", "127.0.0.1"
HUB = "http://localhost:11435"
#: Requests that would be the hub's to answer, or that would go through it.
CLOUD: list[tuple[str, str, dict[str, Any]]] = [
    ("POST", "/api/generate", {"model": "big:cloud", "prompt": "x"}),
    ("POST", "/api/generate", {"model": "far:1t", "prompt": "x"}),
    ("POST", "/api/chat", {"model": "big:1t-cloud", "messages": []}),
    ("POST", "/api/chat", {"model": "far:1t", "messages": [{"role": "user", "content": "x"}], "stream": False}),
    ("POST", "/api/embed", {"model": "big:cloud", "input": "x"}),
    ("POST", "/api/embed", {"model": "far:1t", "input": "x"}),
    ("POST", "/api/embeddings", {"model": "far:1t", "prompt": "x"}),
    ("POST", "/api/show", {"model": "big:cloud"}),
    ("GET", "/v1/models/big:cloud", {}),
    ("POST", "/v1/chat/completions", {"model": "big:cloud", "messages": [{"role": "user", "content": "x"}]}),
    ("POST", "/v1/chat/completions", {"model": "far:1t", "messages": [{"role": "user", "content": "x"}]}),
    ("POST", "/v1/completions", {"model": "far:1t", "prompt": "x"}),
    ("POST", "/v1/embeddings", {"model": "far:1t", "input": "x"}),
    ("POST", "/v1/responses", {"model": "big:cloud", "input": "x"}),
    ("POST", "/v1/messages", {"model": "big:cloud", "max_tokens": 1, "messages": [{"role": "user", "content": "x"}]}),
    ("POST", "/v1/messages/count_tokens", {"model": "far:1t", "messages": [{"role": "user", "content": "x"}]}),
    ("POST", "/api/experimental/web_search", {"query": "x"}),
    ("POST", "/api/experimental/web_fetch", {"url": "https://example.org"}),
    ("POST", "/api/me", {}),
]


@cache
def key_of(options: str) -> ApiKeyText:
    """One key for each kind of line."""
    return make_api_key(options.encode().ljust(ENTROPY_BYTES, b"\1")[:ENTROPY_BYTES])


@dataclass(frozen=True)
class Loaded:
    model: Model
    expires_at: datetime = datetime(2026, 1, 1, tzinfo=UTC)
    size_bytes: int = 1
    vram_bytes: int = 0
    context_length: int = 1


class Counting(FakeInference):
    """It counts tokens, too."""

    async def count_tokens(self, model: Model, request: ChatRequest) -> int:
        self.models.append(model)
        return 7


class Secured:
    """A local server that is secured, with real handlers; the hub answers nothing unless told to."""

    def __init__(self, *, is_open_here: bool = False, **options: Any) -> None:
        self.gateway, self.inference = FakeGateway(), Counting()
        cloud = CloudAccess(self.gateway, CloudSwitch(False, lambda: False), device_name="box", version="9")
        here = [replace(installed(name), capabilities=frozenset(Capability)) for name in ("llama3:8b", "qwen3:8b")]
        store = MemoryModels(*here, stub(installed("far:1t"), host=HUB, remote="huge:1t"))
        models = LocalModels(store, self.inference, stub_models(self.gateway, HUB, cloud=cloud))  # type: ignore[arg-type]
        api = LocalApi(
            models=models,
            loaded=lambda: [Loaded(model) for model in here],
            cloud=cloud,
            web=HubSearch(cloud),
            hub_url=lambda: HUB,
            version="9",
        )
        clock = FakeClock()
        guesses = Throttle(clock)
        self.lines: list[str] = []
        door = LocalDoor(
            lambda: parse_authorized_keys("\n".join(self.lines).encode()),
            where="~/keys",
            admits_this_machine=is_open_here,
            clock=clock,
            replay=ReplayGuard(clock),
            guess=lambda network: guesses.attempt((per_minutes(5, 1), (network,))),
            is_news=lambda what, who: True,
        )
        more = [*CreateApi(None).endpoints(), *transfer_endpoints(None), *LocalCloudApi(cloud).endpoints()]  # type: ignore[arg-type]
        self.app: App = local_app(api, LocalGuard(hostname="box"), more, door=door, **options)

    def key(self, options: str = "") -> str:
        """An API key whose line begins with these options."""
        key = key_of(options)
        self.lines.append(f"{options} key-sha256 {key_digest(key).hex()} {options or 'plain'}")
        return key.text.reveal()

    async def request(
        self, method: str, target: str, body: Any = None, *, key: str = "", network: str = LAN, headers: Any = ()
    ) -> Answer:
        sent = [*headers, *([("authorization", f"Bearer {key}")] if key else [])]
        payload = b"" if body is None else json.dumps(body).encode()
        caller = Caller(self.app, host="box:11434", client=(network, 1))
        return await caller.request(method, target, body=payload, headers=sent)

    async def names(self, path: str, key: str) -> list[str]:
        """Of the models that a listing shows."""
        listed = (await self.request("GET", path, key=key)).json()
        return sorted(row.get("name") or row["id"] for row in listed["models" if "models" in listed else "data"])


async def done(request: Request) -> Response:
    return Response(b"done")


def rows() -> Iterator[tuple[str, Endpoint]]:
    """(method, route) of the whole table."""
    for row in Secured().app.endpoints:
        for method in sorted(row.methods):
            yield method, row


# ── Which route for whom ─────────────────────────────────────────────────────────────────────────────────────────────


def test_t112_rights_of_the_routes_are_those_of_the_list() -> None:
    found = {f"{row.access.right} {method} {row.path}" for method, row in rows()}
    assert found == {line for line in LIST.read_text().splitlines() if line and not line.startswith("#")}


@pytest.mark.parametrize("right", list(Right))
async def test_t112_every_route_is_for_those_who_have_its_right_and_for_nobody_else(right: Right) -> None:
    server = Secured(finish=lambda row: replace(row, handler=done, cancel_on_disconnect=False))
    key = server.key(f"rights={right}")
    for method, row in rows():
        path = re.sub(r"\{[^}]+\}", "x", row.path)
        assert row.access.right is not None
        expected = 200 if right.covers(row.access.right) else 403
        assert (await server.request(method, path, key=key)).status == expected, f"{right}: {method} {path}"
        for wrong in ("", "x", key[:-1] + "_"):
            answer = await server.request(method, path, key=wrong, network=f"10.0.0.{len(wrong)}")
            assert answer.status in (401, 429), f"{method} {path} answered {answer.status} to nobody"


async def test_t112_every_route_refuses_a_stranger_where_this_machines_programs_are_let_in() -> None:
    server = Secured(is_open_here=True, finish=lambda row: replace(row, handler=done, cancel_on_disconnect=False))
    for method, row in rows():
        path = re.sub(r"\{[^}]+\}", "x", row.path)
        assert (await server.request(method, path)).status == 401
        assert (await server.request(method, path, network=HERE)).status == 200
        assert (await server.request(method, path, network=HERE, headers=[("x-forwarded-for", HERE)])).status == 401


@pytest.mark.parametrize("is_open_here", [True, False])
async def test_t112_body_of_a_stranger_who_shows_nothing_is_not_read(is_open_here: bool) -> None:
    app, sent = Secured(is_open_here=is_open_here).app, []

    async def receive() -> dict[str, Any]:
        raise AssertionError("the body was asked for")

    async def send(message: Any) -> None:
        sent.append(message)

    headers = [(b"host", b"box:11434"), (b"content-length", b"20000000")]
    scope = {"type": "http", "method": "POST", "path": "/api/chat", "raw_path": b"/api/chat", "query_string": b""}
    await app({**scope, "headers": headers, "client": (LAN, 1), "scheme": "http", "http_version": "1.1"}, receive, send)  # type: ignore[arg-type]
    assert sent[0]["status"] == 401


def test_t112_secured_server_with_a_route_that_declares_no_right_does_not_start() -> None:
    api = Secured().app

    class Api:
        def endpoints(self) -> list[Endpoint]:
            return [endpoint("GET", "/api/new", done, PUBLIC)]

    door = LocalDoor.__new__(LocalDoor)
    door.admits_this_machine = True
    with pytest.raises(TypeError, match="right"):
        local_app(Api(), LocalGuard(hostname="box"), door=door)  # type: ignore[arg-type]
    assert api.endpoints


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/api/chat", {"error": "unauthorized"}),
        ("/v1/chat/completions", {"error": {"message": "unauthorized", "type": "api_error", "param": None, "code": None}}),
        ("/v1/messages", {"type": "error", "error": {"type": "authentication_error", "message": "unauthorized"}}),
    ],
)
@pytest.mark.parametrize("is_open_here", [True, False])
async def test_refusal_speaks_the_dialect_of_its_route_and_names_no_page_to_sign_in_at(
    path: str, body: dict[str, Any], is_open_here: bool
) -> None:
    answer = await Secured(is_open_here=is_open_here).request("POST", path, {"model": "llama3:8b"})
    assert answer.status == 401
    assert {name: value for name, value in answer.json().items() if name != "request_id"} == body


async def test_anthropics_header_lets_in_on_its_route() -> None:
    server = Secured()
    asked = {"model": "llama3:8b", "max_tokens": 9, "messages": [{"role": "user", "content": "x"}]}
    answer = await server.request("POST", "/v1/messages", asked, headers=[("x-api-key", server.key())])
    assert (answer.status, answer.json()["content"][0]["text"]) == (200, "onetwo")


async def test_t053_what_is_told_to_a_key_is_kept_by_nobody_on_the_way() -> None:
    server = Secured()
    assert (await server.request("GET", "/api/tags", key=server.key())).headers["cache-control"] == "no-store"


async def test_guesses_are_slowed_down_for_their_network_and_right_keys_are_not() -> None:
    server = Secured()
    key = server.key()
    statuses = [(await server.request("GET", "/api/tags", key="crlk_x")).status for _ in range(7)]
    assert statuses == [401] * 5 + [429] * 2
    assert (await server.request("GET", "/api/tags", key=key)).status == 200
    assert (await server.request("GET", "/api/tags", key="crlk_x", network="10.0.0.9")).status == 401
    assert (await server.request("GET", "/api/tags")).status == 401, "who shows nothing guesses nothing"


async def test_access_log_names_the_line_and_holds_no_key(caplog: pytest.LogCaptureFixture) -> None:
    server = Secured()
    key = server.key("rights=read")
    with caplog.at_level(logging.INFO, "corral.access"):
        await server.request("GET", "/api/tags", key=key)
    (record,) = [record for record in caplog.records if record.name == "corral.access"]
    fields = record.fields  # type: ignore[attr-defined]
    assert (fields["account"], fields["network"]) == ("rightsread", LAN)
    assert fields["credential"].startswith("key-sha256:")
    assert key[5:] not in str(fields)


async def test_trusted_proxy_says_where_a_request_comes_from_and_lends_nobody_its_place() -> None:
    server = Secured(is_open_here=True, trusted_proxies=[ip_network("127.0.0.0/8")])
    key = server.key('from="192.168.7.0/24"')
    for forwarded, status in ((LAN, 200), ("10.0.0.1", 401), (f"{LAN}, 10.0.0.1", 401)):
        headers = [("x-forwarded-for", forwarded)]
        assert (await server.request("GET", "/api/tags", key=key, network=HERE, headers=headers)).status == status
    for headers in ([("x-forwarded-for", HERE)], [("x-forwarded-for", "")], [("via", "1.1 x")]):
        assert (await server.request("GET", "/api/tags", network=HERE, headers=headers)).status == 401


async def test_t086_foreign_host_and_foreign_page_stay_out_with_a_right_key_too() -> None:
    server = Secured()
    key = server.key("rights=manage")
    caller = Caller(server.app, host="evil.com", client=(LAN, 1))
    assert (await caller.request("GET", "/api/tags", headers={"authorization": f"Bearer {key}"})).status == 403
    headers = [("origin", "https://evil.com")]
    assert (await server.request("GET", "/api/tags", key=key, headers=headers)).status == 403


# ── Which models for whom ────────────────────────────────────────────────────────────────────────────────────────────


async def test_listings_show_the_models_of_the_line() -> None:
    server = Secured()
    for path in ("/api/tags", "/api/ps", "/v1/models"):
        assert await server.names(path, server.key('models="llama*"')) == ["llama3:8b"]
        assert "qwen3:8b" in await server.names(path, server.key())
        assert "qwen3:8b" in await server.names(path, server.key('rights=manage,models="llama*"'))


@pytest.mark.parametrize("path", ["/api/tags", "/v1/models"])
async def test_t029_stub_is_listed_for_lines_with_cloud_alone(path: str) -> None:
    server = Secured()
    for options in ("rights=read", "", 'models="far*"'):
        assert "far:1t" not in await server.names(path, server.key(options))
    for options in ("rights=read,cloud", "cloud", "rights=manage"):
        assert "far:1t" in await server.names(path, server.key(options))


@pytest.mark.parametrize(
    ("path", "more"),
    [
        ("/api/generate", {"prompt": "x"}),
        ("/api/chat", {"messages": []}),
        ("/api/embed", {"input": "x"}),
        ("/api/embeddings", {"prompt": "x"}),
        ("/api/show", {}),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "x"}]}),
        ("/v1/completions", {"prompt": "x"}),
        ("/v1/embeddings", {"input": "x"}),
        ("/v1/responses", {"input": "x"}),
        ("/v1/messages", {"max_tokens": 1, "messages": [{"role": "user", "content": "x"}]}),
        ("/v1/messages/count_tokens", {"messages": [{"role": "user", "content": "x"}]}),
    ],
)
async def test_t029_model_one_may_not_know_of_is_absent_in_the_words_for_one_that_is_not_installed(
    path: str, more: dict[str, Any]
) -> None:
    server = Secured()
    key = server.key('models="llama*,far*"')
    for spelling in ("qwen3:8b", "QWEN3:8b", "registry.ollama.ai/library/qwen3:8b", "qwen3:8b:local", "far:1t", "far:1t:local"):
        hidden = await server.request("POST", path, {"model": spelling, **more}, key=key)
        other = re.sub("(?i)qwen3|far", "nothing", spelling)
        absent = await server.request("POST", path, {"model": other, **more}, key=key)
        told = [re.sub(rb"(?i)qwen3|far|nothing|req_[0-9a-f]+", b"", answer.body) for answer in (hidden, absent)]
        assert (hidden.status, told[0]) == (404, told[1])
    assert server.inference.models == []


async def test_t029_hidden_model_is_no_member_of_openais_list() -> None:
    server = Secured()
    key = server.key('models="llama*"')
    assert (await server.request("GET", "/v1/models/qwen3:8b", key=key)).status == 404
    assert (await server.request("GET", "/v1/models/llama3:8b", key=key)).status == 200


async def test_model_of_a_pattern_is_run() -> None:
    server = Secured()
    key = server.key('models="llama*"')
    answer = await server.request("POST", "/api/generate", {"model": "llama3:8b", "prompt": "x", "stream": False}, key=key)
    assert (answer.status, answer.json()["response"]) == (200, "onetwo")


# ── The account at the hub ───────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(("method", "path", "body"), CLOUD)
@pytest.mark.parametrize("options", ["", 'models="*"'])
async def test_t090_line_without_cloud_never_reaches_the_hub(method: str, path: str, body: dict[str, Any], options: str) -> None:
    server = Secured()
    answer = await server.request(method, path, body or None, key=server.key(options))
    if body.get("model") == "far:1t":
        assert answer.status == 404
    else:
        assert answer.status == 403
        assert b"it takes cloud" in answer.body
    assert server.gateway.calls == []


@pytest.mark.parametrize(("method", "path", "body"), CLOUD)
@pytest.mark.parametrize("options", ["cloud", "rights=manage", 'cloud,models="big*,far*,huge*"'])
async def test_t090_line_with_cloud_reaches_it_without_the_callers_key(
    method: str, path: str, body: dict[str, Any], options: str
) -> None:
    server = Secured()
    server.gateway.will_answer(418, b'{"error":"teapot"}', headers={"content-type": "application/json"})
    key = server.key(options)
    await server.request(method, path, body or None, key=key, headers=[("x-request-id", "r")])
    (call,) = server.gateway.calls
    assert key not in str(call)


async def test_hub_model_of_no_pattern_is_absent_and_nobody_asks_the_hub() -> None:
    server = Secured()
    answer = await server.request(
        "POST", "/api/chat", {"model": "big:cloud", "messages": []}, key=server.key('cloud,models="llama*"')
    )
    assert (answer.status, server.gateway.calls) == (404, [])


async def test_nothing_is_recommended_to_a_line_without_cloud() -> None:
    server = Secured()
    answer = await server.request("GET", "/api/experimental/model-recommendations", key=server.key())
    assert (answer.status, answer.json(), server.gateway.calls) == (200, {"recommendations": []}, [])


async def test_search_for_a_line_without_cloud_is_refused_before_the_hub_hears_of_it() -> None:
    server, door = Secured(), parse_authorized_keys(f"key-sha256 {'0' * 64} ci".encode()).entries[0]
    account = Account(id="x", name="ci", email="", is_admin=False, created_at=datetime(2026, 1, 1, tzinfo=UTC))
    caller = Principal(account=account, proof=Proof.API_KEY, credential_id="x", scopes=frozenset(), authorized=door)
    cloud = CloudAccess(server.gateway, CloudSwitch(False, lambda: False), device_name="box", version="9")
    with pytest.raises(CorralError, match="it takes cloud"):
        await HubSearch(cloud).search_for(caller, "rain")
    assert server.gateway.calls == []
