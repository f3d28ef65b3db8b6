"""The HTTP layer: malformed requests, permissions, bodies, streams and error dialects."""

import asyncio
import ipaddress
from collections.abc import AsyncIterator
from datetime import UTC, datetime

import pytest
from starlette.requests import Request
from starlette.responses import Response

from asgi_client import Caller
from corral.core.policy import CLIENT_PROOFS, FULL_PROOFS, PUBLIC, Access
from corral.core.records import Account, Principal, Proof, RequestFacts, Scope, Visitor
from corral.edges.asgi import (
    App,
    AppOptions,
    Dialect,
    GuardVerdict,
    body_of,
    body_stream,
    caller_of,
    endpoint,
    facts_of,
    json_response,
    maybe_visitor,
)
from corral.edges.bodies import Disconnected
from corral.edges.stream_response import stream
from corral.wire.errors import CorralError
from corral.wire.frames import ndjson_error

ALICE = Account(id="a1", name="alice", email="", is_admin=False, created_at=datetime(2026, 1, 1, tzinfo=UTC))


async def hello(request: Request) -> Response:
    return json_response({"hello": body_of(request).decode()})


async def seen(request: Request) -> Response:
    facts = facts_of(request)
    return json_response({"target": facts.target, "network": facts.network, "secure": facts.is_secure})


async def who(request: Request) -> Response:
    return json_response({"name": caller_of(request).account.name})


async def boom(request: Request) -> Response:
    raise ValueError("/secret/path crlk_secret")


def principal(proof: Proof = Proof.API_KEY, *scopes: Scope) -> Principal:
    return Principal(account=ALICE, proof=proof, credential_id="k1", scopes=frozenset(scopes))


async def authenticate(facts: RequestFacts) -> Principal | None:
    """A stand-in for the hub's door: the header names the proof and the scopes."""
    values = facts.headers.get("authorization")
    if not values:
        return None
    proof, _, scopes = values[0].partition(" ")
    if proof == "bad":
        raise CorralError("unauthorized")
    return principal(Proof(proof), *(Scope(scope) for scope in scopes.split()))


async def kept(request: Request) -> Response:
    return Response(b"", headers={"Cache-Control": "private"})


def app(**options: object) -> App:
    rows = [
        endpoint("GET", "/hello", hello, PUBLIC),
        endpoint("POST", "/hello", hello, PUBLIC, max_body_bytes=10),
        endpoint("GET", "/seen", seen, PUBLIC),
        endpoint("GET", "/seen/{what}", seen, PUBLIC),
        endpoint("GET", "/who", who, Access(CLIENT_PROOFS)),
        endpoint("GET", "/open", hello, Access(CLIENT_PROOFS, is_open=True)),
        endpoint("GET", "/kept", kept, Access(CLIENT_PROOFS)),
        endpoint("POST", "/keys", who, Access(FULL_PROOFS, Scope.KEYS)),
        endpoint("GET", "/admin", who, Access(FULL_PROOFS, is_admin_only=True)),
        endpoint("GET", "/boom", boom, PUBLIC),
        endpoint("GET", "/boom/openai", boom, PUBLIC, dialect=Dialect.OPENAI),
        endpoint("GET", "/page", who, Access(FULL_PROOFS), dialect=Dialect.HTML),
        endpoint("GET", "/item/{item_id}", hello, PUBLIC),
        endpoint("GET", "/tree/{leaf:path}", hello, PUBLIC),
    ]
    return App(rows, AppOptions(**{"authenticate": authenticate, **options}))  # type: ignore[arg-type]


async def test_public_route_serves_anyone_and_names_the_request() -> None:
    answer = await Caller(app()).request("GET", "/hello")
    assert (answer.status, answer.json()) == (200, {"hello": ""})
    assert answer.headers["content-type"] == "application/json; charset=utf-8"
    assert len(answer.headers["x-request-id"]) == 16


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ([], 401),
        ([("authorization", "bad")], 401),
        ([("authorization", "stock-signature")], 200),
        ([("authorization", "api-key")], 200),
    ],
)
async def test_route_with_access_admits_only_its_proofs(headers: list[tuple[str, str]], status: int) -> None:
    answer = await Caller(app()).request("GET", "/who", headers=headers)
    assert answer.status == status


@pytest.mark.parametrize("proof", list(Proof))
@pytest.mark.parametrize("scopes", ["", "inference", "keys", "inference keys"])
async def test_t016_stock_signature_never_reaches_a_route_that_changes_keys(proof: Proof, scopes: str) -> None:
    answer = await Caller(app()).request("POST", "/keys", headers={"authorization": f"{proof} {scopes}"})
    assert answer.status == (200 if proof in FULL_PROOFS and "keys" in scopes else 403)


async def test_admin_route_refuses_an_account_that_is_not_admin() -> None:
    assert (await Caller(app()).request("GET", "/admin", headers={"authorization": "api-key"})).status == 403


def test_t060_route_without_a_declared_access_does_not_start() -> None:
    row = endpoint("GET", "/x", hello, None)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="declares no access"):
        App([row], AppOptions())


def test_server_without_authentication_refuses_a_route_that_demands_it() -> None:
    with pytest.raises(TypeError, match="checks none"):
        App([endpoint("GET", "/x", hello, Access(CLIENT_PROOFS))], AppOptions())


@pytest.mark.parametrize(
    "target",
    ["//hello", "/x/../hello", "/./hello", "/hello%00", "/%2e%2e/hello", "/hello#x", "/he\\llo", "@google.com", "", "/h llo"],
)
async def test_t111_path_not_in_plain_form_is_refused(target: str) -> None:
    assert (await Caller(app()).request("GET", target)).status == 400


@pytest.mark.parametrize(
    "spelled", ["%68ello", "h%65llo", "hell%6F", "hello%2dx", "hello%2Ex", "%5Fx", "x%7e", "x%30", "x%39", "%5A", "%41"]
)
async def test_t111_path_with_a_needlessly_encoded_character_is_refused(spelled: str) -> None:
    assert (await Caller(app()).request("GET", f"/{spelled}")).status == 400


@pytest.mark.parametrize("target", ["/item/a%3Ab", "/item/a%40b", "/item/a%20b", "/item/%C3%A9", "/item/a%5Bb", "/item/a%60b"])
async def test_t111_path_with_a_reserved_character_encoded_is_routed(target: str) -> None:
    assert (await Caller(app()).request("GET", target)).status == 200


@pytest.mark.parametrize(
    ("target", "status"),
    [
        ("/tree/a%2Fb", 200),
        ("/tree%2Fa", 404),
        ("/item%2Fa", 404),
        ("/item%2fa%2fb", 404),
        ("/%2Fitem/a", 404),
        ("/hello%2F", 404),
    ],
)
async def test_t111_encoded_slash_is_part_of_a_value_and_never_of_a_route(target: str, status: int) -> None:
    assert (await Caller(app()).request("GET", target)).status == status


@pytest.mark.parametrize("host", ["a/health?x=", "a b", "a@b", "a:b", "[::1", "a:999999", "a,b"])
async def test_t111_invalid_host_is_refused(host: str) -> None:
    assert (await Caller(app()).request("GET", "/hello", headers=[("host", host)])).status == 400


@pytest.mark.parametrize(
    "headers",
    [
        [("host", "a"), ("host", "b")],
        [("host", "a"), ("authorization", "api-key"), ("authorization", "api-key")],
        [("host", "a"), ("content-length", "0"), ("transfer-encoding", "chunked")],
        [("host", "a"), ("content-encoding", "gzip")],
    ],
)
async def test_t110_ambiguous_headers_are_refused(headers: list[tuple[str, str]]) -> None:
    assert (await Caller(app()).request("GET", "/who", headers=headers)).status == 400


@pytest.mark.parametrize("headers", [[], [("host", "")]])
async def test_t110_missing_host_is_refused(headers: list[tuple[str, str]]) -> None:
    # The HTTP server gives an empty one where there is none.
    assert (await Caller(app()).request("GET", "/hello", headers=headers, host="")).status == 400


async def test_t086_guard_is_asked_about_a_missing_host() -> None:
    asked: list[list[str]] = []

    def guard(method: str, path: str, headers: dict[str, list[str]]) -> GuardVerdict:
        asked.append(headers["host"])
        return GuardVerdict()

    assert (await Caller(app(guard=guard)).request("GET", "/hello", headers=[("host", "")])).status == 200
    assert asked == [[""]]


@pytest.mark.parametrize("method", ["TRACE", "XFOO", "dispatch", "CONNECT"])
async def test_t110_unknown_method_is_refused(method: str) -> None:
    assert (await Caller(app()).request(method, "/hello")).status == 405


async def test_t110_large_headers_are_refused() -> None:
    assert (await Caller(app()).request("GET", "/hello", headers={"x": "a" * 17_000})).status == 431


async def test_t110_oversized_body_is_refused_before_authentication_is_skipped() -> None:
    caller = Caller(app())
    assert (await caller.request("POST", "/hello", body=b"x" * 11)).status == 413
    assert (await caller.request("POST", "/hello", body=b"x" * 11, headers={"transfer-encoding": "chunked"})).status in (400, 413)
    assert (await caller.request("POST", "/hello", body=b"x" * 10)).json() == {"hello": "x" * 10}


async def test_chunked_body_is_bounded_while_it_arrives() -> None:
    scope_headers = [("transfer-encoding", "chunked")]
    caller = Caller(app())
    answer = await caller.request("POST", "/hello", body=b"x" * 11, headers=[*scope_headers, ("content-length", "5")])
    assert answer.status == 400


async def never(*_: object) -> dict[str, object]:
    await asyncio.Event().wait()
    raise AssertionError


@pytest.mark.parametrize("headers", [[(b"content-length", b"10")], [(b"transfer-encoding", b"chunked")]])
async def test_t110_body_of_a_caller_without_credentials_is_not_waited_for(headers: list[tuple[bytes, bytes]]) -> None:
    sent: list[dict[str, object]] = []

    async def send(message: dict[str, object]) -> None:
        sent.append(message)

    scope = {
        "type": "http",
        "http_version": "1.1",
        "method": "POST",
        "scheme": "http",
        "path": "/keys",
        "raw_path": b"/keys",
        "query_string": b"",
        "headers": [(b"host", b"a"), *headers],
        "client": ("192.0.2.1", 1),
    }
    await asyncio.wait_for(app()(scope, never, send), 5)  # type: ignore[arg-type]
    assert sent[0]["status"] == 401


async def test_t110_refused_caller_is_logged_with_its_network(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "corral.access")
    caller = Caller(app(), client=("192.0.2.7", 1))
    assert (await caller.request("POST", "/keys", body=b"x")).status == 401
    assert (await caller.request("POST", "/hello", body=b"x" * 11)).status == 413
    assert [record.fields["network"] for record in caplog.records] == ["192.0.2.7"] * 2  # type: ignore[attr-defined]


def test_t110_body_of_a_route_is_small_unless_it_says_otherwise() -> None:
    assert endpoint("POST", "/x", hello, PUBLIC).max_body_bytes == 1024 * 1024


async def test_target_is_handed_on_exactly_as_received() -> None:
    answer = await Caller(app()).request("GET", "/seen/a%3Ab?b=%31&a=2&a=1")
    assert answer.json()["target"] == "/seen/a%3Ab?b=%31&a=2&a=1"


async def test_unknown_path_and_wrong_method_are_404_and_405() -> None:
    caller = Caller(app())
    assert (await caller.request("GET", "/nowhere")).json() == {"error": "not found"}
    assert (await caller.request("DELETE", "/hello")).status == 405


async def test_t115_unexpected_failure_shows_the_request_id_and_nothing_else(caplog: pytest.LogCaptureFixture) -> None:
    answer = await Caller(app()).request("GET", "/boom")
    assert answer.status == 500
    assert answer.json() == {"error": "internal error", "request_id": answer.headers["x-request-id"]}
    assert answer.headers["x-request-id"] in caplog.text


async def test_error_takes_the_dialect_of_its_route() -> None:
    answer = await Caller(app()).request("GET", "/boom/openai")
    assert answer.json() == {"error": {"message": "internal error", "type": "api_error", "param": None, "code": None}}


async def test_page_without_session_leads_to_sign_in_and_back() -> None:
    answer = await Caller(app()).request("GET", "/page?a=1")
    assert (answer.status, answer.headers["location"]) == (303, "/signin?next=%2Fpage%3Fa%3D1")


async def test_guard_runs_before_everything_and_its_headers_are_sent() -> None:
    def guard(method: str, path: str, headers: dict[str, list[str]]) -> GuardVerdict:
        return GuardVerdict(status=403) if headers["host"] == ["evil"] else GuardVerdict(headers=(("vary", "Origin"),))

    caller = Caller(app(guard=guard))
    assert (await caller.request("GET", "/nowhere", host="evil")).status == 403
    assert (await caller.request("GET", "/hello")).headers["vary"] == "Origin"
    assert (await caller.request("GET", "/boom")).headers["vary"] == "Origin"


@pytest.mark.parametrize(
    ("client", "expected"),
    [
        ("10.0.0.1", {"network": "203.0.113.9", "secure": True}),
        ("192.0.2.1", {"network": "192.0.2.1", "secure": False}),
        ("127.0.0.1", {"network": "127.0.0.1", "secure": True}),
    ],
)
async def test_t017_forwarded_headers_count_only_from_configured_proxies(client: str, expected: dict[str, object]) -> None:
    caller = Caller(app(trusted_proxies=[ipaddress.ip_network("10.0.0.0/8")]), client=(client, 1))
    headers = {"x-forwarded-for": "127.0.0.1, 203.0.113.9, 10.0.0.7", "x-forwarded-proto": "https"}
    answer = (await caller.request("GET", "/seen", headers=headers)).json()
    assert {name: answer[name] for name in expected} == expected


# ── Streams ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def streaming(events: "AsyncIterator[int]", *, cancel: bool = True) -> App:
    async def handler(request: Request) -> Response:
        return await stream(
            request,
            events,
            lambda event: b"%d\n" % event,
            content_type="application/x-ndjson",
            error_frame=lambda error: f"error {error.code}\n".encode(),
        )

    return App([endpoint("GET", "/stream", handler, PUBLIC, cancel_on_disconnect=cancel)], AppOptions())


async def numbers(count: int, *, fail: str = "", closed: list[str] | None = None) -> AsyncIterator[int]:
    try:
        for number in range(count):
            yield number
        if fail:
            raise CorralError(fail)
    finally:
        if closed is not None:
            closed.append("closed")


async def test_stream_sends_each_event_by_itself() -> None:
    answer = await Caller(streaming(numbers(3))).request("GET", "/stream")
    assert answer.parts == [b"0\n", b"1\n", b"2\n"]
    assert answer.headers["content-type"] == "application/x-ndjson"


async def test_stream_failing_before_its_first_event_is_a_real_status() -> None:
    answer = await Caller(streaming(numbers(0, fail="busy"))).request("GET", "/stream")
    assert (answer.status, "error" in answer.json()) == (503, True)


async def test_stream_failing_later_ends_with_one_error_frame() -> None:
    answer = await Caller(streaming(numbers(2, fail="engine_failed"))).request("GET", "/stream")
    assert (answer.status, answer.parts) == (200, [b"0\n", b"1\n", b"error engine_failed\n"])


async def test_stream_is_closed_when_its_caller_leaves() -> None:
    closed: list[str] = []

    async def endless() -> AsyncIterator[int]:
        try:
            yield 1
            await asyncio.Event().wait()
        finally:
            closed.append("closed")

    await asyncio.wait_for(Caller(streaming(endless())).request("GET", "/stream", leave_after=1), 5)
    assert closed == ["closed"]


async def test_stream_is_closed_when_its_caller_leaves_before_the_first_event() -> None:
    closed: list[str] = []

    async def silent() -> AsyncIterator[int]:
        try:
            await asyncio.Event().wait()
            yield 1
        finally:
            closed.append("closed")

    await asyncio.wait_for(Caller(streaming(silent())).request("GET", "/stream", leave_after=0, body=b""), 5)
    assert closed == ["closed"]


async def test_stream_ends_with_a_frame_when_the_server_shuts_down() -> None:
    built = streaming(numbers(3))
    built.closing.set()
    answer = await Caller(built).request("GET", "/stream")
    assert answer.parts == [b"0\n", b"1\n", b"error unavailable\n"]


# ── What may be kept on the way ──────────────────────────────────────────────────────────────────────────────────────


async def test_t053_answer_to_somebody_in_particular_is_kept_by_nobody() -> None:
    caller = Caller(app())
    for path, proof, status in (("/who", "api-key", 200), ("/open", "api-key", 200), ("/who", "session", 403)):
        answer = await caller.request("GET", path, headers={"authorization": proof})
        assert (answer.status, answer.headers["cache-control"]) == (status, "no-store")
    assert "cache-control" not in (await caller.request("GET", "/open")).headers


async def test_answer_that_says_itself_what_may_be_kept_is_left_as_it_is() -> None:
    answer = await Caller(app()).request("GET", "/kept", headers={"authorization": "api-key"})
    assert answer.headers["cache-control"] == "private"


@pytest.mark.parametrize("dialect", list(Dialect))
async def test_error_headers_are_sent_in_every_dialect(dialect: Dialect) -> None:
    async def refuse(request: Request) -> Response:
        raise CorralError("range_invalid", headers={"Content-Range": "bytes */5"})

    answer = await Caller(App([endpoint("GET", "/x", refuse, PUBLIC, dialect=dialect)], AppOptions())).request("GET", "/x")
    assert (answer.status, answer.headers["content-range"]) == (416, "bytes */5")


async def test_streamed_body_is_not_read_before_the_caller_is_known_and_ends_when_they_are_confirmed() -> None:
    confirmed: list[str] = []

    async def confirm(principal: Principal) -> None:
        confirmed.append(principal.account.name)

    async def take(request: Request) -> Response:
        assert not confirmed
        return json_response({"read": (await body_stream(request).read(100)).decode()})

    rows = [endpoint("PUT", "/x", take, Access(CLIENT_PROOFS), streams_body=True)]
    caller = Caller(App(rows, AppOptions(authenticate=authenticate, confirm=confirm)))
    assert (await caller.request("PUT", "/x", body=b"abc")).status == 401
    taken = await caller.request("PUT", "/x", body=b"abc", headers={"authorization": "api-key"})
    assert taken.json() == {"read": "abc"}
    assert len(confirmed) == 1


async def test_t062_streamed_body_of_whoever_is_not_confirmed_has_no_end() -> None:
    seen: list[bytes] = []

    async def refuse(principal: Principal) -> None:
        raise CorralError("unauthorized")

    async def take(request: Request) -> Response:
        async for part in body_stream(request):
            seen.append(part)
        return json_response({})

    rows = [endpoint("PUT", "/x", take, Access(CLIENT_PROOFS), streams_body=True)]
    caller = Caller(App(rows, AppOptions(authenticate=authenticate, confirm=refuse)))
    refused = await caller.request("PUT", "/x", body=b"abc", headers={"authorization": "api-key"})
    assert (refused.status, seen) == (401, [])


def test_t062_server_that_confirms_nobody_streams_no_body_of_theirs() -> None:
    with pytest.raises(TypeError, match="confirms no sender"):
        App([endpoint("PUT", "/x", hello, Access(CLIENT_PROOFS), streams_body=True)], AppOptions(authenticate=authenticate))


async def test_visitor_is_let_through_where_a_route_is_open_and_nowhere_else() -> None:
    async def visit(facts: RequestFacts) -> Visitor:
        return Visitor(fingerprint="SHA256:x")

    async def seen_as(request: Request) -> Response:
        visitor = maybe_visitor(request)
        return json_response({"fingerprint": visitor.fingerprint if visitor else None})

    rows = [
        endpoint("GET", "/open", seen_as, Access(CLIENT_PROOFS, is_open=True)),
        endpoint("GET", "/closed", seen_as, Access(CLIENT_PROOFS)),
        endpoint("GET", "/public", seen_as, PUBLIC),
    ]
    caller = Caller(App(rows, AppOptions(authenticate=visit)))
    proof = {"authorization": "Bearer x"}
    assert (await caller.request("GET", "/open", headers=proof)).json() == {"fingerprint": "SHA256:x"}
    assert (await caller.request("GET", "/closed", headers=proof)).status == 401
    assert (await caller.request("GET", "/public", headers=proof)).json() == {"fingerprint": None}


async def test_events_are_closed_when_their_caller_left_before_the_first_frame() -> None:
    closed = []

    async def events() -> AsyncIterator[bytes]:
        try:
            yield b"x"
            yield b"y"
        finally:
            closed.append(True)

    async def send(_: object) -> None:
        raise Disconnected

    scope = {"type": "http", "corral.closing": asyncio.Event()}
    response = await stream(Request(scope), events(), bytes, content_type="text/plain", error_frame=ndjson_error)
    with pytest.raises(Disconnected):
        await response(scope, None, send)  # type: ignore[arg-type]
    assert closed
