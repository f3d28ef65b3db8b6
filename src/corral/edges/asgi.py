"""The HTTP layer both servers share: a strict door, one declared permission per route, and errors in the caller's dialect.

A request passes, in this order: the strict checks of `_refuse_malformed` → the server's guard (Host and Origin rules) → the route
table → the bounded body (of whoever has to show a credential, only when there is one; on routes that stream it, never here) →
authentication (last: who was let in first could bring the body after the credential was revoked) → the route's `Access` → the
handler. A streamed body comes after all that, so its sender is confirmed when its end is here, before the handler has the last
part of it (T62). Whatever raises a `CorralError` on the way is answered in the dialect of the route. Nothing here decides by
path: permissions are part of the route table, and an endpoint cannot be made without one.
`request.url` and `request.base_url` are never used, since they are rebuilt from the Host header.
"""

import asyncio
import contextlib
import ipaddress
import logging
import random
import re
import time
from collections.abc import Awaitable, Callable, Iterable, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from functools import partial
from http import HTTPStatus
from urllib.parse import quote

import msgspec
from starlette.requests import Request
from starlette.responses import RedirectResponse, Response
from starlette.types import Message, Receive, Scope, Send

from corral.core.policy import Access, check_access
from corral.core.records import Principal, RequestFacts, Visitor
from corral.edges.bodies import BodyLimits, BodyReader, BodyStream, Disconnected, Memory, StreamLimits
from corral.edges.leaving import canceled_on_disconnect
from corral.edges.routing import PathTable
from corral.edges.stream_response import told
from corral.wire.errors import CorralError, anthropic_body, native_body, openai_body, registry_body

Handler = Callable[[Request], Awaitable[Response]]
Authenticate = Callable[[RequestFacts], Awaitable[Principal | Visitor | None]]
#: Whether who was let in would be let in still, without the proof: that may be spent. Raises: unauthorized, unavailable.
Confirm = Callable[[Principal], Awaitable[None]]

MAX_HEADER_BYTES = 16 * 1024
#: Enough for every request that holds no prompt.
MAX_BODY_BYTES = 1024 * 1024
#: For prompts with images.
MAX_PROMPT_BYTES = 20 * 1024 * 1024
#: A request with none of these proves nothing.
_CREDENTIAL_HEADERS = frozenset({"authorization", "cookie", "signature", "signature-input", "x-api-key"})
_METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})
_HOST = re.compile(r"(?:[A-Za-z0-9_.-]+|\[[0-9A-Fa-f:.]+\])(?::[0-9]{1,5})?")
#: %41 and its like: letters, digits and `-._~` mean the same when they are encoded, so whoever encodes them wants a second
#: spelling of a path, which some check will not know. Source: RFC 3986 2.3.
_NEEDLESSLY_ENCODED = rb"%(?:[46][1-9a-f]|[57][0-9a]|3[0-9]|2[de]|5f|7e)"
_BAD_PATH = re.compile(rb"//|/\.\.?(?:/|$)|%00|[\x00-\x20#\\\x7f-\xff]|" + _NEEDLESSLY_ENCODED, re.IGNORECASE)
_JSON = b"application/json; charset=utf-8"
_NO_STORE = (b"cache-control", b"no-store")
#: Of a page that says who is signed in.
_OWN_PAGE = {"Cache-Control": "no-store", "Vary": "Cookie"}

#: Ids name a request in logs and are no secret. Asking the kernel would hand the interpreter to another thread each time.
_request_ids = random.Random()  # noqa: S311

access_log = logging.getLogger("corral.access")
server_log = logging.getLogger("corral.server")


class Dialect(StrEnum):
    """Whose error form a route speaks."""

    NATIVE = "native"
    OPENAI = "openai"
    ANTHROPIC = "anthropic"
    REGISTRY = "registry"
    HTML = "html"
    TEXT = "text"


#: Of `/api` and `/v1`. Pages and the registry say themselves what may be kept.
_API_DIALECTS = frozenset({Dialect.NATIVE, Dialect.OPENAI, Dialect.ANTHROPIC})


@dataclass(frozen=True, slots=True, kw_only=True)
class Endpoint:
    """One row of a route table; made by `endpoint`."""

    methods: frozenset[str]
    path: str
    handler: Handler
    access: Access
    dialect: Dialect
    max_body_bytes: int
    cancel_on_disconnect: bool
    streams_body: bool


def endpoint(
    methods: str,
    path: str,
    handler: Handler,
    access: Access,
    *,
    dialect: Dialect = Dialect.NATIVE,
    max_body_bytes: int = MAX_BODY_BYTES,
    cancel_on_disconnect: bool = False,
    streams_body: bool = False,
) -> Endpoint:
    """Declare a route. methods: comma-separated. path: may hold `{name}` and `{name:path}`. cancel_on_disconnect: end the handler
    as soon as its caller leaves; for work that only the caller wants, never for a change that must not stop half way.
    streams_body: the handler reads the body itself, by `body_stream`, of any size; no signature can cover it."""
    return Endpoint(
        methods=frozenset(methods.split(",")),
        path=path,
        handler=handler,
        access=access,
        dialect=dialect,
        max_body_bytes=max_body_bytes,
        cancel_on_disconnect=cancel_on_disconnect,
        streams_body=streams_body,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class GuardVerdict:
    """What a guard decided. headers: added to the answer. status: when set, answer with it and no body, and go no further."""

    headers: tuple[tuple[str, str], ...] = ()
    status: int | None = None


#: (method, path, headers: lower-case name -> values) -> verdict. Runs before anything else, on every route.
Guard = Callable[[str, str, dict[str, list[str]]], GuardVerdict]


@dataclass(frozen=True, slots=True, kw_only=True)
class Failure:
    """What an error page tells. target: what was asked for, as received, when asking again does no harm; else empty."""

    error: CorralError
    request_id: str
    caller: Principal | None = None
    target: str = ""


#: Renders the HTML of an error that no form can show in place.
ErrorPage = Callable[[Failure], bytes]


def body_of(request: Request) -> bytes:
    """The request's body, already read and bounded."""
    return facts_of(request).body


def body_stream(request: Request) -> BodyStream:
    """The request's body, on a route that streams it."""
    body: BodyStream = request.scope["corral.body"]
    return body


def facts_of(request: Request) -> RequestFacts:
    """What arrived, exactly as received."""
    facts: RequestFacts = request.scope["corral.facts"]
    return facts


def maybe_caller(request: Request) -> Principal | None:
    """Who sends this, or None for a request without credentials on a public route."""
    caller: Principal | None = request.scope.get("corral.principal")
    return caller


def caller_of(request: Request) -> Principal:
    """Who sends this. Raises: unauthorized."""
    caller = maybe_caller(request)
    if caller is None:
        raise CorralError("unauthorized")
    return caller


def admit(request: Request, caller: Principal) -> None:
    """Note who sends this, when only the handler could find it out: by an address that it gave out."""
    request.scope["corral.principal"] = caller


def maybe_visitor(request: Request) -> Visitor | None:
    """Who sends this, when it is somebody who proved to be nobody in particular."""
    visitor: Visitor | None = request.scope.get("corral.visitor")
    return visitor


def json_response(value: object, status: int = 200) -> Response:
    """value as JSON in the form native routes use."""
    return _JsonResponse(msgspec.json.encode(value), status)


class _JsonResponse(Response):
    """A whole JSON body. What `Response` works out for every answer anew is the same for all of these."""

    def __init__(self, body: bytes, status: int) -> None:
        self.body = body
        self.status_code = status
        self.background = None
        self.raw_headers = [(b"content-length", str(len(body)).encode()), (b"content-type", _JSON)]


@dataclass(frozen=True, slots=True, kw_only=True)
class AppOptions:
    """How a server wants its application.

    confirm: needed where a route that demands credentials streams its body. fallback: dialect for a path without a route.
    trusted_proxies: networks whose X-Forwarded-For and X-Forwarded-Proto are believed. asks: (address of the caller, headers) ->
    whether a request from there without a credential is refused on open routes, too, before its body is read. response_headers:
    added to every answer. body_limits, stream_limits: how slow and how many bodies may be. challenge: the WWW-Authenticate of a
    401 in the registry's dialect. redirects_slashes: whether a slash too many at a path's end leads to the route without it, and
    a wrong method is told in the words for no route at all, as Ollama's framework does.
    """

    authenticate: Authenticate | None = None
    confirm: Confirm | None = None
    asks: Callable[[str, dict[str, list[str]]], bool] = lambda network, headers: False
    guard: Guard | None = None
    error_page: ErrorPage | None = None
    fallback: Callable[[str], Dialect] = lambda path: Dialect.NATIVE
    trusted_proxies: Sequence[ipaddress.IPv4Network | ipaddress.IPv6Network] = ()
    response_headers: tuple[tuple[str, str], ...] = ()
    body_limits: BodyLimits = field(default_factory=BodyLimits)
    stream_limits: StreamLimits = field(default_factory=StreamLimits)
    challenge: Callable[[Scope, CorralError], str] | None = None
    redirects_slashes: bool = False
    on_startup: Callable[[], Awaitable[None]] | None = None
    on_shutdown: Callable[[], Awaitable[None]] | None = None


class App:
    """The ASGI application made of a route table. closing: set it to end running streams with an error frame."""

    def __init__(self, endpoints: Iterable[Endpoint], options: AppOptions) -> None:
        self.endpoints = tuple(endpoints)
        self.options = options
        self.closing = asyncio.Event()
        self._bodies = BodyReader(options.body_limits)
        self._memory = Memory(options.body_limits.max_unfinished_bytes)
        self._response_headers = [_raw_header(name, value) for name, value in options.response_headers]
        self._routes = self._index_routes()

    def _index_routes(self) -> PathTable[dict[str, Endpoint]]:
        by_path: dict[str, dict[str, Endpoint]] = {}
        for row in self.endpoints:
            if not isinstance(row.access, Access):
                raise TypeError(f"{row.path} declares no access")
            if row.access.proofs and self.options.authenticate is None:
                raise TypeError(f"{row.path} demands credentials of a server that checks none")
            if row.access.proofs and row.streams_body and self.options.confirm is None:
                raise TypeError(f"{row.path} streams its body to a server that confirms no sender")
            methods = by_path.setdefault(row.path, {})
            for method in row.methods:
                if method in methods:
                    raise ValueError(f"{method} {row.path} is declared twice")
                methods[method] = row
        return PathTable(by_path)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self._lifespan(receive, send)
        elif scope["type"] == "http":
            try:
                await self._serve(scope, receive, send)
            finally:
                if "corral.body" in scope:
                    scope["corral.body"].forget()
        else:
            await send({"type": "websocket.close", "code": 1003})

    async def _lifespan(self, receive: Receive, send: Send) -> None:
        await receive()
        if self.options.on_startup:
            await self.options.on_startup()
        await send({"type": "lifespan.startup.complete"})
        await receive()
        if self.options.on_shutdown:
            await self.options.on_shutdown()
        await send({"type": "lifespan.shutdown.complete"})

    async def _serve(self, scope: Scope, receive: Receive, send: Send) -> None:
        sender = _Sender(send, self._response_headers)
        scope["corral.closing"] = self.closing
        scope["corral.dialect"] = self.options.fallback(scope["path"])
        started = time.perf_counter()
        try:
            response = await self._answer(scope, receive, sender)
        except CorralError as error:
            response = self._error_response(told(error, self.closing), scope, sender.request_id)
        except Disconnected:
            response = None
        except Exception:  # noqa: BLE001 - the outermost loop of a request: logged with its id, shown without detail
            server_log.exception("request %s failed", sender.request_id)
            response = self._error_response(CorralError("internal"), scope, sender.request_id)
        if response is not None and not sender.has_started:
            with contextlib.suppress(Disconnected):
                await response(scope, receive, sender)
        self._log(scope, sender, started)

    async def _answer(self, scope: Scope, receive: Receive, sender: "_Sender") -> Response | None:
        """The response, or None when it has been sent already."""
        headers = _collect_headers(scope)
        _refuse_malformed(scope, headers, judges_hosts=self.options.guard is not None)
        if self.options.guard:
            verdict = self.options.guard(scope["method"], scope["path"], headers)
            sender.extra += [_raw_header(name, value) for name, value in verdict.headers]
            if verdict.status is not None:
                return Response(status_code=verdict.status)
        scope["corral.peer"] = _peer(scope, headers, self.options.trusted_proxies)
        if self.options.redirects_slashes and (elsewhere := self._without_slash(scope)) is not None:
            return elsewhere
        try:
            row = self._find(scope)
        except CorralError:
            await self._recognise(scope, headers)
            raise
        scope["corral.dialect"] = row.dialect
        if _CREDENTIAL_HEADERS.isdisjoint(headers) and self._asks(row, scope, headers):
            raise CorralError("unauthorized")
        if row.streams_body:
            confirm = partial(self._confirm, scope)
            scope["corral.body"] = BodyStream(headers, receive, self.options.stream_limits, memory=self._memory, confirm=confirm)
        body = b"" if row.streams_body else await self._bodies.read(headers, receive, row.max_body_bytes)
        facts = scope["corral.facts"] = _facts(scope, headers, body)
        if self.options.authenticate:
            await self._admit(scope, row, facts, sender)
        request = Request(scope, receive)
        if not row.cancel_on_disconnect:
            return await row.handler(request)
        async with canceled_on_disconnect(receive):
            response = await row.handler(request)
            await response(scope, receive, sender)
        return None

    def _asks(self, row: Endpoint, scope: Scope, headers: dict[str, list[str]]) -> bool:
        """Whether a request without a credential is refused before its body is read."""
        return not row.access.is_public or self.options.asks(scope["corral.peer"][0], headers)

    async def _recognise(self, scope: Scope, headers: dict[str, list[str]]) -> None:
        """Note who is signed in, for the head of a page that says that there is nothing here."""
        if self.options.authenticate and scope["corral.dialect"] is Dialect.HTML:
            with contextlib.suppress(CorralError):
                caller = await self.options.authenticate(_facts(scope, headers, b""))
                scope["corral.principal"] = caller if isinstance(caller, Principal) else None

    async def _admit(self, scope: Scope, row: Endpoint, facts: RequestFacts, sender: "_Sender") -> None:
        assert self.options.authenticate is not None
        caller = await self.options.authenticate(facts)
        if isinstance(caller, Principal):
            scope["corral.principal"] = caller
            if row.dialect in _API_DIALECTS:
                # What is told to somebody who proved who they are is kept by nobody on the way (T53).
                sender.extra.append(_NO_STORE)
            check_access(caller, row.access)
        elif caller is not None and row.access.is_open:
            scope["corral.visitor"] = caller
        elif not row.access.is_public:
            raise CorralError("unauthorized")

    async def _confirm(self, scope: Scope) -> None:
        caller: Principal | None = scope.get("corral.principal")
        if caller is not None and self.options.confirm is not None:
            await self.options.confirm(caller)

    def _find(self, scope: Scope) -> Endpoint:
        found = self._routes.find(scope["path"])
        # An encoded slash belongs to a value: as a second spelling of a route, a proxy's rules for its path would not know it.
        if found is None or (b"%" in scope["raw_path"] and not scope["raw_path"].startswith(_literal_start(found[0]))):
            raise CorralError("not_found")
        methods, scope["path_params"] = found
        row = methods.get(scope["method"])
        if row is None:
            if not self.options.redirects_slashes:
                scope["corral.dialect"] = next(iter(methods.values())).dialect
            raise CorralError("method_not_allowed", headers={"Allow": ", ".join(sorted(methods))})
        return row

    def _without_slash(self, scope: Scope) -> Response | None:
        methods = self._routes.without_slash(scope["path"])
        raw_path, mark, query = _raw_target(scope).partition("?")
        # `%2F` at the end is a slash to the route table only, and would be cut in two here.
        if methods is None or scope["method"] not in methods or not raw_path.endswith("/"):
            return None
        status = HTTPStatus.MOVED_PERMANENTLY if scope["method"] == "GET" else HTTPStatus.TEMPORARY_REDIRECT
        return Response(status_code=status, headers={"Location": raw_path[:-1] + mark + query})

    def _error_response(self, error: CorralError, scope: Scope, request_id: str) -> Response:
        dialect: Dialect = scope["corral.dialect"]
        response = _render_error(error, dialect, request_id, scope, self.options.error_page)
        if error.retry_after_s is not None:
            response.headers["Retry-After"] = str(error.retry_after_s)
        if dialect is Dialect.REGISTRY and error.status == HTTPStatus.UNAUTHORIZED and self.options.challenge:
            response.headers["WWW-Authenticate"] = self.options.challenge(scope, error)
        response.headers.update(error.headers)
        return response

    def _log(self, scope: Scope, sender: "_Sender", started: float) -> None:
        if not access_log.isEnabledFor(logging.INFO):
            return
        caller: Principal | None = scope.get("corral.principal")
        fields = {
            "request_id": sender.request_id,
            "method": scope["method"],
            "path": scope["path"],
            "status": sender.status,
            "duration_ms": round((time.perf_counter() - started) * 1000, 1),
            "account": caller.account.name if caller else "",
            "credential": caller.credential_id if caller else "",
            "network": scope["corral.peer"][0] if "corral.peer" in scope else "",
        }
        access_log.info("request", extra={"fields": fields})


def _raw_header(name: str, value: str) -> tuple[bytes, bytes]:
    return name.lower().encode(), value.encode()


class _Sender:
    """Passes messages on, adds the common headers, and remembers what was sent."""

    def __init__(self, send: Send, headers: list[tuple[bytes, bytes]]) -> None:
        self._send = send
        self.request_id = f"{_request_ids.getrandbits(64):016x}"
        self.extra = headers.copy()
        self.status = 499
        self.has_started = False

    async def __call__(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.has_started = True
            self.status = message["status"]
            present = {name for name, _ in message["headers"]}
            added = [header for header in self.extra if header[0] not in present]
            message["headers"] = [*message["headers"], *added, (b"x-request-id", self.request_id.encode())]
        await self._send(message)


def _collect_headers(scope: Scope) -> dict[str, list[str]]:
    headers: dict[str, list[str]] = {}
    total = 0
    for name, value in scope["headers"]:
        total += len(name) + len(value) + 4
        headers.setdefault(name.decode("latin-1").lower(), []).append(value.decode("latin-1"))
    if total > MAX_HEADER_BYTES:
        raise CorralError("headers_too_large")
    return headers


def _literal_start(methods: dict[str, Endpoint]) -> bytes:
    """The part of a route's path that stands before its first value."""
    return next(iter(methods.values())).path.partition("{")[0].encode()


def _refuse_malformed(scope: Scope, headers: dict[str, list[str]], *, judges_hosts: bool) -> None:
    """What servers let through and proxies disagree about is refused here, once. judges_hosts: a guard decides about a missing
    Host, which the HTTP server gives as an empty one. Raises: method_not_allowed, bad_request."""
    if scope["method"] not in _METHODS:
        raise CorralError("method_not_allowed")
    raw_path: bytes = scope["raw_path"]
    if not raw_path.startswith(b"/") or _BAD_PATH.search(raw_path):
        raise CorralError("bad_request", "the path is not in its plain form")
    hosts = headers.get("host", [])
    if len(hosts) != 1 or not (_HOST.fullmatch(hosts[0]) or (judges_hosts and not hosts[0])):
        raise CorralError("bad_request", "exactly one valid Host header is needed")
    if len(headers.get("authorization", [])) > 1:
        raise CorralError("bad_request", "more than one Authorization header")
    if "transfer-encoding" in headers:
        _refuse_coding(scope["http_version"], headers)
    if "content-encoding" in headers and any(encoding.lower() != "identity" for encoding in headers["content-encoding"]):
        raise _coded(scope["path"])


def _refuse_coding(version: str, headers: dict[str, list[str]]) -> None:
    """A body in a transfer coding that is not `chunked` alone would be taken for what it codes; HTTP/1.0 has none, and a proxy of
    that time finds the body's end elsewhere. Source: RFC 9112, 6.1. Raises: bad_request."""
    if "content-length" in headers:
        raise CorralError("bad_request", "both Content-Length and Transfer-Encoding")
    if [coding.strip().lower() for coding in headers["transfer-encoding"]] != ["chunked"] or version == "1.0":
        raise CorralError("bad_request", "Transfer-Encoding must be chunked, and nothing else")


def _coded(path: str) -> CorralError:
    """The refusal of a compressed body. The registry's clients are told in HTTP's own way, since their specification says nothing
    of codings; Ollama's and the SDKs know 400 alone. Source: RFC 9110, 15.5.16."""
    text = "compressed request bodies are not accepted; send the body as it is"
    if not path.startswith("/v2/"):
        return CorralError("bad_request", text)
    return CorralError("unsupported", text, status=415, headers={"Accept-Encoding": "identity"})


def _facts(scope: Scope, headers: dict[str, list[str]], body: bytes) -> RequestFacts:
    network, is_secure = scope["corral.peer"]
    return RequestFacts(
        method=scope["method"], target=_raw_target(scope), headers=headers, body=body, network=network, is_secure=is_secure
    )


def _peer(
    scope: Scope, headers: dict[str, list[str]], trusted: Sequence[ipaddress.IPv4Network | ipaddress.IPv6Network]
) -> tuple[str, bool]:
    """(address of the caller, whether nobody can listen on the way). Forwarded headers count only from configured proxies."""
    client = scope.get("client")
    address = client[0] if client else ""
    is_secure = scope["scheme"] == "https" or address in ("127.0.0.1", "::1", "")
    if not trusted or not _is_in(address, trusted):
        return address, is_secure
    hops = [hop.strip() for value in headers.get("x-forwarded-for", []) for hop in value.split(",")]
    outside = [hop for hop in hops if not _is_in(hop, trusted)]
    proto = headers.get("x-forwarded-proto", [scope["scheme"]])[-1].strip()
    return (outside[-1] if outside else address), proto == "https"


def _is_in(address: str, networks: Sequence[ipaddress.IPv4Network | ipaddress.IPv6Network]) -> bool:
    try:
        parsed = ipaddress.ip_address(address)
    except ValueError:
        return False
    return any(parsed in network for network in networks)


def _render_error(error: CorralError, dialect: Dialect, request_id: str, scope: Scope, page: ErrorPage | None) -> Response:
    match dialect:
        case Dialect.NATIVE:
            body = native_body(error)
            return json_response({**body, "request_id": request_id} if error.code == "internal" else body, error.status)
        case Dialect.OPENAI:
            return Response(msgspec.json.encode(openai_body(error)), error.status, media_type="application/json")
        case Dialect.ANTHROPIC:
            # Anthropic ids have 24 hex digits; ours has 16, which is kept recognisable in front.
            body = anthropic_body(error, f"req_{request_id}{'0' * 8}")
            return Response(msgspec.json.encode(body), error.status, media_type="application/json")
        case Dialect.REGISTRY:
            return Response(msgspec.json.encode(registry_body(error)), error.status, media_type="application/json")
        case Dialect.HTML:
            if error.code == "unauthorized" and scope["method"] == "GET":
                return RedirectResponse(f"/signin?next={quote(_raw_target(scope), safe='')}", 303)
            is_safe = scope["method"] in ("GET", "HEAD")
            caller = scope.get("corral.principal")
            failure = Failure(error=error, request_id=request_id, caller=caller, target=_raw_target(scope) if is_safe else "")
            html = page(failure) if page else error.message.encode()
            return Response(html, error.status, headers=_OWN_PAGE, media_type="text/html; charset=utf-8")
        case Dialect.TEXT:
            return Response(_plain_text(error), error.status, headers={"Content-Type": "text/plain"})


def _raw_target(scope: Scope) -> str:
    query: bytes = scope["query_string"]
    # A path that is refused for what it holds is told of too, so every byte has a letter.
    return str(scope["raw_path"].decode("latin-1")) + ("?" + query.decode("latin-1") if query else "")


def _plain_text(error: CorralError) -> str:
    # The words of the framework that Ollama's own server is written with.
    return {404: "404 page not found", 405: "405 method not allowed"}.get(error.status, error.message)
