"""Web search, web fetch and recommendations: on the hub for whoever may run models, on the local server for anybody."""

import json
from collections.abc import Sequence
from typing import Any

import pytest

from asgi_client import Answer, Caller
from corral.core.records import Capability, Model, ModelDetails, Principal, RequestFacts, Scope
from corral.core.web import FetchedPage
from corral.edges.asgi import App, AppOptions
from corral.edges.local_api import LocalApi, local_app
from corral.edges.local_cloud_api import LocalCloudApi
from corral.edges.local_guard import LocalGuard
from corral.edges.web_tools_api import WebToolsApi, recommendation_of
from corral.hub.metering import UsageMeter
from corral.hub.web_tools import WebTools
from corral.local.cloud import CloudAccess, CloudSwitch
from corral.local.models import LocalModels
from corral.wire.errors import CorralError
from corral.wire.signing import connect_url
from corral.wire.webpage import PageAddress, SearchResult
from fakes import FakeClock, MemoryUsage
from fakes_inference import a_caller, a_model
from fakes_local import FakeGateway, FakeInference, MemoryModels, stub_models

SEARCH, FETCH = "/api/experimental/web_search", "/api/experimental/web_fetch"
RECOMMENDATIONS = "/api/experimental/model-recommendations"


# ── The hub ──────────────────────────────────────────────────────────────────────────────────────────────────────────


class Engine:
    async def search(self, query: str, count: int) -> Sequence[SearchResult]:
        return [SearchResult(title=query, url="https://one.example/", content=str(count))] * count


class Fetcher:
    async def fetch(self, address: PageAddress) -> FetchedPage:
        return FetchedPage(address=address, media_type="text/html", text="<title>t</title>x <a href=/y>y</a>")


class Hub:
    """The hub's routes, for callers with a scope."""

    def __init__(self, *models: Model) -> None:
        self.usage = MemoryUsage()
        self.meter = UsageMeter(self.usage)
        self.caller: Principal | None = a_caller()
        tools = WebTools(engine=Engine(), fetcher=Fetcher(), usage=self.meter, clock=FakeClock())

        async def public_models() -> Sequence[Model]:
            return models

        self.app = App(WebToolsApi(tools, public_models).endpoints(), AppOptions(authenticate=self._authenticate))

    async def _authenticate(self, facts: RequestFacts) -> Principal | None:
        return self.caller if "authorization" in facts.headers else None

    async def post(self, path: str, body: Any, **options: Any) -> Answer:
        payload = body if isinstance(body, bytes) else json.dumps(body).encode()
        headers = options.pop("headers", {"authorization": "Bearer x"})
        return await Caller(self.app).request("POST", path, headers=headers, body=payload)


async def test_search_answers_in_ollamas_form_and_counts() -> None:
    hub = Hub()
    answer = await hub.post("/api/web_search", {"query": "cats", "max_results": 2})
    row = {"title": "cats", "url": "https://one.example/", "content": "2"}
    assert (answer.status, answer.json()) == (200, {"results": [row, row]})
    await hub.meter.flush()
    assert [(entry.model, entry.path, entry.prompt_tokens) for entry in hub.usage.entries] == [
        ("web_search", "/api/web_search", 0)
    ]


async def test_fetch_answers_in_ollamas_form() -> None:
    answer = await Hub().post("/api/web_fetch", {"url": "example.org"})
    assert answer.json() == {"title": "t", "content": "x y", "links": ["https://example.org/y"]}


@pytest.mark.parametrize("path", ["/api/web_search", "/api/web_fetch"])
async def test_web_is_for_whoever_may_run_models(path: str) -> None:
    hub = Hub()
    assert (await hub.post(path, {"query": "x", "url": "x"}, headers={})).status == 401
    hub.caller = Principal(
        account=a_caller().account, proof=a_caller().proof, credential_id="k", scopes=frozenset(Scope) - {Scope.INFERENCE}
    )
    assert (await hub.post(path, {"query": "x", "url": "example.org"})).status == 403


@pytest.mark.parametrize("path", ["/api/web_search", "/api/web_fetch"])
@pytest.mark.parametrize(
    "body", [b"", b"{}", b"[]", b"x", b'{"query":1,"url":1}', b'{"query":"%s","url":"%s"}' % (b"x" * 3000, b"x" * 3000)]
)
async def test_body_that_asks_for_nothing_is_refused(path: str, body: bytes) -> None:
    assert (await Hub().post(path, body)).status == 400


async def test_t110_only_a_short_question_is_taken() -> None:
    assert (await Hub().post("/api/web_search", b" " * 20_000)).status == 413


async def test_hub_recommends_its_own_models_to_anybody() -> None:
    details = ModelDetails(family="llama", parameter_size="135M", quantization_level="Q4_1", context_length=2048)
    model = a_model("smol:135m", details=details, capabilities=frozenset({Capability.COMPLETION, Capability.TOOLS}))
    answer = await Caller(Hub(model, a_model("other")).app).request("GET", RECOMMENDATIONS)
    assert answer.json() == {
        "recommendations": [
            {
                "model": "smol:135m-cloud",
                "description": "llama 135M Q4_1, completion, tools",
                "context_length": 2048,
                "max_output_tokens": 2048,
            },
            {"model": "other:cloud", "description": "llama, completion"},
        ]
    }


def test_model_that_nothing_is_known_of_is_recommended_without_words() -> None:
    model = a_model("m", details=ModelDetails(), capabilities=frozenset())
    assert recommendation_of(model).description == ""


# ── The local server ─────────────────────────────────────────────────────────────────────────────────────────────────


class Local:
    """A local server whose hub answers as told."""

    def __init__(self, *, is_off: bool = False) -> None:
        self.gateway = FakeGateway()
        cloud = CloudAccess(self.gateway, CloudSwitch(is_off, lambda: False), device_name="box", version="0.34.0")
        models = LocalModels(MemoryModels(), FakeInference(), stub_models())  # type: ignore[arg-type]
        api = LocalApi(models=models, loaded=list, cloud=cloud, hub_url=lambda: self.gateway.base, version="0")
        self.app = local_app(api, LocalGuard(hostname="box"), LocalCloudApi(cloud).endpoints())

    async def request(self, method: str, target: str, body: bytes = b"", **options: Any) -> Answer:
        return await Caller(self.app, host="localhost:11434").request(method, target, body=body, **options)


@pytest.mark.parametrize(("path", "there"), [(SEARCH, "/api/web_search"), (FETCH, "/api/web_fetch")])
async def test_t090_question_goes_to_the_hub_as_it_is_and_without_the_callers_credentials(path: str, there: str) -> None:
    local = Local()
    local.gateway.will_answer(200, b'{"results":[]}', headers={"content-type": "application/json", "set-cookie": "a=b"})
    headers = [("authorization", "Bearer callers"), ("content-type", "text/plain"), ("x-request-id", "r")]
    answer = await local.request("POST", f"{path}?x=1", b'{"query": "a",  "new":1}', headers=headers)
    assert (answer.status, answer.body) == (200, b'{"results":[]}')
    assert "set-cookie" not in answer.headers
    (call,) = local.gateway.calls
    assert (call.method, call.path, call.query, call.body) == ("POST", there, "x=1", b'{"query": "a",  "new":1}')
    assert dict(call.headers) == {"content-type": "text/plain", "x-request-id": "r", "x-ollama-client-version": "0.34.0"}


@pytest.mark.parametrize(
    ("path", "text"),
    [
        (SEARCH, "ollama cloud is disabled: web search is unavailable"),
        (FETCH, "ollama cloud is disabled: web fetch is unavailable"),
    ],
)
async def test_cloud_that_is_off_says_what_is_not_there(path: str, text: str) -> None:
    answer = await Local(is_off=True).request("POST", path, b"{}")
    assert (answer.status, answer.json()) == (403, {"error": text})


@pytest.mark.parametrize("path", [SEARCH, FETCH])
async def test_question_without_a_body_is_refused_before_the_hub_hears_of_it(path: str) -> None:
    for body in (b"", b" \n"):
        answer = await Local().request("POST", path, body)
        assert (answer.status, answer.json()) == (400, {"error": "missing request body"})


async def test_refusal_of_the_hub_comes_back_as_it_is() -> None:
    local = Local()
    local.gateway.will_answer(501, b'{"error":"web search is not set up"}', headers={"content-type": "application/json"})
    answer = await local.request("POST", SEARCH, b"{}")
    assert (answer.status, answer.body) == (501, b'{"error":"web search is not set up"}')


async def test_hub_that_dies_in_its_answer_is_502() -> None:
    local = Local()
    broken = CorralError("upstream_failed", "the hub ended the connection before its answer was complete")
    stream = local.gateway.will_answer(200, b'{"results":', broken, headers={"content-type": "application/json"})
    answer = await local.request("POST", SEARCH, b"{}")
    assert (answer.status, answer.json()) == (502, {"error": broken.message})
    assert stream.is_closed


async def test_device_that_is_not_connected_gets_the_link() -> None:
    local = Local()
    local.gateway.will_answer(401, b"{}")
    answer = await local.request("POST", SEARCH, b"{}")
    link = connect_url(local.gateway.base, "box", local.gateway.key)
    assert (answer.status, answer.json()) == (401, {"error": "unauthorized", "signin_url": link})


async def test_t086_foreign_host_is_refused_on_these_routes_too() -> None:
    local = Local()
    for method, path in (("POST", SEARCH), ("POST", FETCH), ("GET", RECOMMENDATIONS)):
        assert (await Caller(local.app, host="evil.example").request(method, path, body=b"{}")).status == 403
    assert local.gateway.calls == []


async def test_t088_extension_may_not_have_pages_fetched() -> None:
    headers = [("origin", "chrome-extension://abc")]
    assert (await Local().request("POST", FETCH, b"{}", headers=headers)).status == 403


async def test_local_server_passes_the_hubs_recommendations_on() -> None:
    local = Local()
    row = {"model": "m:cloud", "description": "d", "context_length": 1, "max_output_tokens": 1}
    local.gateway.will_answer(200, json.dumps({"recommendations": [row, {"model": "x:cloud", "description": ""}]}).encode())
    assert (await local.request("GET", RECOMMENDATIONS)).json() == {"recommendations": [row]}
    assert (await Local(is_off=True).request("GET", RECOMMENDATIONS)).json() == {"recommendations": []}
