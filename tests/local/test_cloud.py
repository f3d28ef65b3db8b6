"""What a local server does at the hub: which requests go there, what of them travels, and how refusals are told."""

import json

import pytest

from corral.core.records import Model
from corral.local.cloud import Cloud, CloudAccess, CloudSwitch, Local, data_type, headers_for_caller, headers_for_hub, route
from corral.wire.errors import CorralError, native_body
from corral.wire.signing import connect_url
from fakes_local import FakeGateway, installed, stub

HUB = "http://localhost:11435"
VERSION = "0.34.0"


def switch(*, by_env: bool = False, by_config: bool = False) -> CloudSwitch:
    return CloudSwitch(by_env, lambda: by_config)


@pytest.fixture
def gateway() -> FakeGateway:
    return FakeGateway(base=HUB)


@pytest.fixture
def cloud(gateway: FakeGateway) -> CloudAccess:
    return CloudAccess(gateway, switch(), device_name="ada's box", version=VERSION)


# ── Which requests go to the hub ─────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("requested", "there", "expected"),
    [
        ("llama3", None, Local()),
        ("llama3:8b", installed(), Local()),
        ("llama3:8b-cloud", None, Cloud("llama3:8b")),
        ("llama3:8b-CLOUD", installed(), Cloud("llama3:8b")),
        ("llama3:cloud", None, Cloud("llama3")),
        ("llama3:8b:cloud", None, Cloud("llama3:8b")),
        ("ada/llama3:8b-cloud", None, Cloud("ada/llama3:8b")),
        ("llama3:8b:local", installed(), Local()),
        ("llama3:8b:local", None, Local()),
        ("my-cloud-model", None, Local()),
        ("llama3:clod", None, Local()),
        ("", None, Local()),
        ("https://registry.example/ada/llama3:cloud", None, Cloud("registry.example/ada/llama3")),
        ("llama3:8b", stub(installed(), host=HUB, remote="big:1t"), Cloud("big:1t")),
        ("llama3:8b", stub(installed(), host="http://127.0.0.1:11435", remote="big:1t"), Cloud("big:1t")),
        ("llama3:8b", stub(installed(), host=f"{HUB}/", remote="big:1t"), Cloud("big:1t")),
    ],
)
def test_route_follows_the_suffix_first_and_the_stub_then(requested: str, there: Model | None, expected: Local | Cloud) -> None:
    assert route(requested, there, hub=HUB) == expected


@pytest.mark.parametrize(
    "host", ["https://ollama.com:443", "http://localhost:11436", "https://localhost:11435", "nonsense", "http://evil.com"]
)
def test_stub_of_another_server_is_not_run(host: str) -> None:
    with pytest.raises(CorralError) as refused:
        route("llama3:8b", stub(installed(), host=host, remote="x"), hub=HUB)
    assert (refused.value.status, refused.value.message) == (400, "this server cannot run this remote model")


def test_stub_of_the_public_cloud_runs_when_that_is_the_hub() -> None:
    there = stub(installed(), host="https://ollama.com:443", remote="gpt-oss:120b")
    assert route("gpt-oss:120b-x", there, hub="https://ollama.com") == Cloud("gpt-oss:120b")


def test_local_suffix_on_a_stub_is_not_found_under_the_requested_name() -> None:
    with pytest.raises(CorralError) as refused:
        route("llama3:8b:local", stub(installed(), host=HUB, remote="x"), hub=HUB)
    assert (refused.value.status, refused.value.message) == (404, "model 'llama3:8b:local' not found")


@pytest.mark.parametrize("base", ["..", ".", "", "a/../../b", "../x", "a?b", "a#b", "a b", "a%2e", "x://../../a", "a/b/c/d"])
def test_t111_what_is_no_model_name_never_goes_to_the_hub(base: str) -> None:
    for requested, there in ((f"{base}:cloud", None), ("llama3:8b", stub(installed(), host=HUB, remote=base))):
        with pytest.raises(CorralError, match="invalid model name") as refused:
            route(requested, there, hub=HUB)
        assert refused.value.status == 400


def test_two_suffixes_are_refused() -> None:
    with pytest.raises(CorralError, match='use either :local or :cloud, not both: "x:cloud:local"'):
        route("x:cloud:local", None, hub=HUB)


@pytest.mark.parametrize(
    ("by_env", "by_config", "source"),
    [(False, False, "none"), (True, False, "env"), (False, True, "config"), (True, True, "both")],
)
def test_switch_names_what_turned_the_cloud_off(by_env: bool, by_config: bool, source: str) -> None:
    made = switch(by_env=by_env, by_config=by_config)
    assert made.source == source
    if source == "none":
        made.require_on("remote model is unavailable")
        return
    with pytest.raises(CorralError) as refused:
        made.require_on("remote model is unavailable")
    assert (refused.value.status, refused.value.message) == (403, "ollama cloud is disabled: remote model is unavailable")


# ── What travels ─────────────────────────────────────────────────────────────────────────────────────────────────────

DROPPED = {
    "authorization": ["Bearer crlk_x"],
    "cookie": ["session=1"],
    "x-api-key": ["crlk_x"],
    "api-key": ["crlk_x"],
    "proxy-authorization": ["Basic x"],
    "forwarded": ["for=1.2.3.4"],
    "x-forwarded-for": ["1.2.3.4"],
    "x-forwarded-host": ["evil.com"],
    "x-forwarded-proto": ["https"],
    "x-real-ip": ["1.2.3.4"],
    "via": ["1.1 proxy"],
    "host": ["localhost:11434"],
    "content-length": ["3"],
    "transfer-encoding": ["chunked"],
    "connection": ["close, X-Hop"],
    "x-hop": ["1"],
    "te": ["trailers"],
    "upgrade": ["websocket"],
    "expect": ["100-continue"],
    "accept-encoding": ["gzip"],
    "origin": ["http://localhost:3000"],
    "referer": ["http://localhost:3000/secret"],
    "sec-fetch-site": ["same-site"],
    "signature": ["x"],
    "signature-input": ["x"],
    "content-digest": ["x"],
    "corral-device-name": ["somebody else"],
    "x-ollama-client-version": ["9"],
    "x-http-method-override": ["DELETE"],
    "x-goog-api-key": ["x"],
    "private-token": ["x"],
    "ocp-apim-subscription-key": ["x"],
    "cf-access-jwt-assertion": ["x"],
    "x-auth-request-access-token": ["x"],
    "x-amz-security-token": ["x"],
    "x-csrf-token": ["x"],
    "x-remote-user": ["ada"],
    "openai-organization": ["org-x"],
    "x-custom": ["1"],
}
KEPT = {
    "content-type": ["application/json; charset=utf-8"],
    "accept": ["application/x-ndjson", "text/plain"],
    "user-agent": ["ollama-python/0.6"],
    "x-stainless-lang": ["python"],
    "x-stainless-retry-count": ["1"],
    "anthropic-version": ["2023-06-01"],
    "anthropic-beta": ["tools-2024-04-04"],
    "openai-beta": ["assistants=v2"],
    "accept-language": ["de"],
    "x-request-id": ["r1"],
    "x-client-request-id": ["r2"],
    "idempotency-key": ["r3"],
}


def test_t090_only_what_shapes_the_answer_travels_to_the_hub() -> None:
    sent = headers_for_hub(DROPPED | KEPT, version=VERSION)
    expected = [(name, value) for name, values in KEPT.items() for value in values]
    assert sorted(sent) == sorted([*expected, ("x-ollama-client-version", VERSION)])


def test_t090_header_of_one_connection_does_not_travel_even_when_its_name_would() -> None:
    sent = headers_for_hub({"connection": ["close, X-Request-Id"], "x-request-id": ["r1"]}, version=VERSION)
    assert "x-request-id" not in dict(sent)


def test_content_type_is_json_when_the_caller_named_none() -> None:
    assert ("content-type", "application/json") in headers_for_hub({}, version=VERSION)


def test_t090_hub_sets_no_cookies_and_grants_no_access_in_our_name() -> None:
    received = [
        ("retry-after", "7"),
        ("ratelimit-remaining", "0"),
        ("x-ratelimit-reset", "1"),
        ("x-ratelimit-reset", "2"),
        ("content-type", "application/x-ndjson"),
        ("x-custom", "1"),
        ("set-cookie", "a=b"),
        ("set-login", "logged-in"),
        ("link", "</x>; rel=preload"),
        ("content-security-policy", "default-src *"),
        ("content-disposition", "attachment"),
        ("cache-control", "max-age=31536000"),
        ("access-control-allow-origin", "*"),
        ("access-control-allow-credentials", "true"),
        ("connection", "keep-alive, ratelimit-limit"),
        ("ratelimit-limit", "1"),
        ("keep-alive", "timeout=5"),
        ("transfer-encoding", "chunked"),
        ("content-length", "3"),
        ("clear-site-data", '"*"'),
        ("strict-transport-security", "max-age=1"),
        ("location", "https://evil.com"),
        ("refresh", "0; url=https://evil.com"),
        ("date", "x"),
        ("server", "x"),
    ]
    assert headers_for_caller(received) == received[:4]


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (["application/json"], "application/json"),
        (["application/json; charset=utf-8"], "application/json; charset=utf-8"),
        (['Application/X-NDJSON;charset="UTF-8"'], "application/x-ndjson; charset=utf-8"),
        (["text/event-stream; x=1"], "text/event-stream"),
        (["application/json; x, text/html"], "application/json"),
        (["application/json, text/html"], None),
        (["application/json", "text/html"], None),
        (["text/html"], None),
        (["text/plain; charset=utf-8"], None),
        (["image/svg+xml"], None),
        ([""], None),
        ([], None),
    ],
)
def test_t090_hub_answers_with_data_only(values: list[str], expected: str | None) -> None:
    assert data_type([("content-type", value) for value in values]) == expected


@pytest.mark.parametrize("status", [200, 404, 503])
async def test_t090_page_of_the_hub_is_502_and_not_passed_on(status: int, cloud: CloudAccess, gateway: FakeGateway) -> None:
    stream = gateway.will_answer(status, b"<script>", headers={"content-type": "text/html"})
    with pytest.raises(CorralError, match=f"the hub answered {status} with something else than JSON") as refused:
        await cloud.relay("GET", "/v1/models/x", headers={})
    assert refused.value.status == 502
    assert stream.is_closed


async def test_relay_sends_path_query_and_body_as_they_are(cloud: CloudAccess, gateway: FakeGateway) -> None:
    gateway.will_answer(
        200, b"one\n", b"two\n", headers=[("content-type", "application/x-ndjson; charset=utf-8"), ("set-cookie", "a=b")]
    )
    body = b'{ "model":"x", "unknown": 1e5}'
    answer = await cloud.relay("POST", "/api/chat", query="b=2&a=%31", headers={"authorization": ["Bearer x"]}, body=body)
    (call,) = gateway.calls
    assert (call.method, call.path, call.query, call.body) == ("POST", "/api/chat", "b=2&a=%31", body)
    assert "authorization" not in dict(call.headers)
    assert (answer.status, answer.media_type) == (200, "application/x-ndjson")
    assert answer.headers == [("content-type", "application/x-ndjson; charset=utf-8")]
    assert [chunk async for chunk in answer.chunks()] == [b"one\n", b"two\n"]


@pytest.mark.parametrize("status", [400, 403, 404, 429, 500, 503])
async def test_refusal_of_the_hub_is_passed_on(status: int, cloud: CloudAccess, gateway: FakeGateway) -> None:
    gateway.will_answer(status, b'{"error":"why"}', headers={"content-type": "application/json", "retry-after": "3"})
    answer = await cloud.relay("POST", "/api/chat", headers={}, body=b"{}")
    assert (answer.status, dict(answer.headers)["retry-after"]) == (status, "3")


@pytest.mark.parametrize("query", ["a b", "a#b", "a\nb", "ü"])
async def test_query_that_is_not_encoded_is_refused(query: str, cloud: CloudAccess, gateway: FakeGateway) -> None:
    with pytest.raises(CorralError) as refused:
        await cloud.relay("POST", "/api/chat", query=query, headers={}, body=b"{}")
    assert refused.value.code == "bad_request"
    assert gateway.calls == []


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
async def test_t090_redirect_of_the_hub_is_not_passed_on(status: int, cloud: CloudAccess, gateway: FakeGateway) -> None:
    stream = gateway.will_answer(status, headers={"location": "https://evil.com"})
    with pytest.raises(CorralError) as refused:
        await cloud.relay("POST", "/api/chat", headers={}, body=b"{}")
    assert refused.value.code == "upstream_failed"
    assert stream.is_closed
    assert "evil.com" not in refused.value.message


async def test_damaged_key_is_our_fault_and_not_the_requests(cloud: CloudAccess, gateway: FakeGateway) -> None:
    gateway.will_fail(CorralError("invalid", "chmod 600 it"))
    with pytest.raises(CorralError, match="chmod 600 it") as refused:
        await cloud.relay("POST", "/api/chat", headers={}, body=b"{}")
    assert refused.value.status == 500


# ── Who one is ───────────────────────────────────────────────────────────────────────────────────────────────────────

OWN_LINK = connect_url(HUB, "ada's box", FakeGateway().key)


@pytest.mark.parametrize(
    ("answer", "link"),
    [
        (b"", OWN_LINK),
        (b"<html>", OWN_LINK),
        (b'{"error":"who?"}', OWN_LINK),
        (b'{"signin_url":3}', OWN_LINK),
        (
            b'{"signin_url":"http://localhost:11435/connect?name=x&key=y&code=z"}',
            "http://localhost:11435/connect?name=x&key=y&code=z",
        ),
        (b'{"signin_url":"https://evil.com/connect?name=x&key=y"}', OWN_LINK),
        (b'{"signin_url":"http://localhost:11435@evil.com/"}', OWN_LINK),
        (b'{"signin_url":"http://localhost:11436/connect"}', OWN_LINK),
        (b'{"signin_url":"javascript:alert(1)"}', OWN_LINK),
        (b'{"signin_url":"http://localhost:11435/\\u001b[2J"}', OWN_LINK),
        (json.dumps({"signin_url": f"{HUB}/{'x' * 3000}"}).encode(), OWN_LINK),
    ],
)
async def test_401_becomes_the_body_clients_know_with_a_link_that_leads_to_the_hub(
    answer: bytes, link: str, cloud: CloudAccess, gateway: FakeGateway
) -> None:
    stream = gateway.will_answer(401, answer)
    gateway.will_answer(401, answer)
    for work in (cloud.relay("POST", "/api/chat", headers={}, body=b"{}"), cloud.whoami()):
        with pytest.raises(CorralError) as refused:
            await work
        assert refused.value.status == 401
        assert native_body(refused.value) == {"error": "unauthorized", "signin_url": link}
    assert stream.is_closed
    assert OWN_LINK.startswith("http://localhost:11435/connect?name=ada%27s%20box&key=")


async def test_whoami_gives_the_hubs_words_and_a_plan(cloud: CloudAccess, gateway: FakeGateway) -> None:
    gateway.will_answer(200, b'{"id":"1","name":"ada","email":"a@b","plan":"","device":{"id":"d"}}')
    gateway.will_answer(200, b'{"name":"ada","plan":"pro"}')
    assert await cloud.whoami() == {"id": "1", "name": "ada", "email": "a@b", "plan": "free", "device": {"id": "d"}}
    assert (await cloud.whoami())["plan"] == "pro"
    assert [(call.method, call.path, call.body) for call in gateway.calls] == [("POST", "/api/me", b"")] * 2


@pytest.mark.parametrize("body", [b"{}", b"[]", b'{"name":""}', b"junk"])
async def test_whoami_without_a_name_is_not_signed_in(body: bytes, cloud: CloudAccess, gateway: FakeGateway) -> None:
    gateway.will_answer(200, body)
    with pytest.raises(CorralError) as refused:
        await cloud.whoami()
    assert refused.value.detail == {"signin_url": OWN_LINK}


@pytest.mark.parametrize(
    ("status", "body", "message"),
    [
        (403, b'{"error":"request time is 412 s behind the server; check this machine\'s clock"}', "412 s behind"),
        (403, b'{"error":"line\\none\\u001b[2J"}', "line one [2J"),
        (500, b"<html>", "the hub answered 500"),
        (302, b"", "the hub answered 302"),
    ],
)
async def test_whoami_that_fails_says_why(
    status: int, body: bytes, message: str, cloud: CloudAccess, gateway: FakeGateway
) -> None:
    gateway.will_answer(status, body)
    with pytest.raises(CorralError) as refused:
        await cloud.whoami()
    # A 401 here would send people into a sign-in loop that cannot mend a clock.
    assert refused.value.status == 503
    assert refused.value.message.startswith("account unavailable: ")
    assert message in refused.value.message


async def test_whoami_without_a_hub_says_so(cloud: CloudAccess, gateway: FakeGateway) -> None:
    gateway.will_fail(CorralError("upstream_failed", "could not reach the hub x: connection refused → is it running?"))
    with pytest.raises(CorralError, match="account unavailable: could not reach the hub x") as refused:
        await cloud.whoami()
    assert refused.value.status == 503


async def test_sign_out_deletes_this_devices_key_at_the_hub(cloud: CloudAccess, gateway: FakeGateway) -> None:
    gateway.will_answer(200, b"null")
    await cloud.sign_out()
    assert (gateway.calls[0].method, gateway.calls[0].path) == ("DELETE", f"/api/user/keys/{gateway.key.encoded}")


async def test_sign_out_of_a_device_that_is_not_connected_says_so(cloud: CloudAccess, gateway: FakeGateway) -> None:
    gateway.will_answer(401, b'{"error":"unauthorized"}')
    with pytest.raises(CorralError) as refused:
        await cloud.sign_out()
    assert refused.value.status == 401
    assert native_body(refused.value) == {"error": "you are not currently signed in"}


async def test_sign_out_that_fails_says_so_and_why(cloud: CloudAccess, gateway: FakeGateway) -> None:
    gateway.will_answer(503)
    gateway.will_fail(CorralError("upstream_failed", "could not reach the hub"))
    for reason in ("the hub answered 503", "could not reach the hub"):
        with pytest.raises(CorralError, match=f"there was an error signing out: {reason}") as refused:
            await cloud.sign_out()
        assert refused.value.status == 500
