"""The HTTP surface of the local server: one visible route list, and the branch that sends a request to the hub.

Nobody proves who they are here unless the server is secured: every route is public, and the guard (local_guard) is what keeps web
pages out. On a secured server each route demands the right it declares, and what this device does at the hub is done for callers
who may use its account (`check_cloud`) alone. A request whose
model is asked for with `:cloud`, or is installed as a stub of a model at the hub, is passed on with this device's signature; all
else runs on this machine. Errors of that branch have Ollama's plain form on the routes of other dialects as well, since that is
where they look for `signin_url`. Source: ollama server/routes.go, server/cloud_proxy.go.
"""

import asyncio
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass, replace
from typing import Final
from urllib.parse import quote

from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.types import Receive, Scope, Send

import corral
from corral.core.local_rights import check_cloud, may_use_model
from corral.core.policy import MANAGES, READS, USES, secured
from corral.edges.asgi import (
    App,
    AppOptions,
    Dialect,
    Endpoint,
    Guard,
    Handler,
    body_of,
    endpoint,
    facts_of,
    json_response,
    maybe_caller,
    server_log,
)
from corral.edges.inference_api import WebSearch, inference_endpoints, ps_endpoint
from corral.edges.stream_response import told
from corral.local.cloud import Cloud, CloudAccess, HubRefused, RelayedAnswer, bounded, route
from corral.local.door import LocalDoor
from corral.local.hub_cache import cacheable
from corral.local.models import LocalModels, RunsElsewhere
from corral.wire.authorized_keys import Network
from corral.wire.discovery import DISCOVERY_PATH
from corral.wire.errors import CorralError, native_body, shutting_down
from corral.wire.frames import MAX_FRAME_BYTES, NDJSON, SSE, anthropic_error, ndjson_error, responses_error, sse_error
from corral.wire.inventory import LoadedLike
from corral.wire.names import parse_name
from corral.wire.native import ShowRequest, decode, model_not_found, raw_request

#: What this server says is data. A browser that is led here shows it as text, and lets it load and run nothing.
_RESPONSE_HEADERS: Final = (
    ("X-Content-Type-Options", "nosniff"),
    ("Content-Security-Policy", "default-src 'none'; sandbox"),
)
_JSON: Final = (("content-type", "application/json; charset=utf-8"),)
_RUN = "remote model is unavailable"
_DETAILS = "remote model details are unavailable"
#: Routes whose model may be one of the hub's -> what is not available when the cloud is off.
_RELAYED: Final = {
    "/api/generate": _RUN,
    "/api/chat": _RUN,
    "/api/embed": _RUN,
    "/api/embeddings": _RUN,
    "/api/show": _DETAILS,
    "/v1/chat/completions": _RUN,
    "/v1/completions": _RUN,
    "/v1/embeddings": _RUN,
    "/v1/responses": _RUN,
    "/v1/messages": _RUN,
    "/v1/messages/count_tokens": _RUN,
    "/v1/models/{model}": _DETAILS,
}


class LocalApi:
    """Handlers of the local server. loaded: the runners, for /api/ps. hub_url: the hub in use, asked for each time. version: the
    level of Ollama's API. asks: whom the server asks for a credential, in the words of CORRAL_LOCAL_AUTH."""

    def __init__(
        self,
        *,
        models: LocalModels,
        loaded: Callable[[], Sequence[LoadedLike]],
        cloud: CloudAccess,
        web: WebSearch | None = None,
        hub_url: Callable[[], str],
        version: str,
        asks: str = "off",
    ) -> None:
        self._models = models
        self._loaded = loaded
        self._cloud = cloud
        self._web = web
        self._hub_url = hub_url
        self._version = version
        self._asks = asks

    def endpoints(self) -> list[Endpoint]:
        """Every route of the local server."""
        return [
            endpoint("GET,HEAD", "/", self.alive, READS),
            endpoint("GET,HEAD", "/api/version", self.version, READS),
            endpoint("GET", "/api/status", self.status, READS),
            endpoint("GET", DISCOVERY_PATH, self.discovery, READS),
            endpoint("POST", "/api/me", self.me, READS, cancel_on_disconnect=True),
            endpoint("POST", "/api/signout", self.sign_out, MANAGES),
            endpoint("DELETE", "/api/user/keys/{encoded_key}", self.sign_out, MANAGES),
            ps_endpoint(self._loaded, READS),
            *(self._with_cloud(row) for row in inference_endpoints(self._models, USES, READS, web=self._web)),
        ]

    async def alive(self, request: Request) -> Response:
        """What monitors and installers look for."""
        return PlainTextResponse("Ollama is running")

    async def version(self, request: Request) -> Response:
        """The level of Ollama's API, which clients compare, and our own version beside it."""
        return json_response({"version": self._version, "corral": corral.__version__})

    async def status(self, request: Request) -> Response:
        """Whether the cloud is switched off, which hub is the cloud, and who is asked for a credential."""
        source = self._cloud.off_by
        cloud = {"disabled": source != "none", "source": source}
        return json_response({"cloud": cloud, "hub": self._hub_url(), "auth": self._asks})

    async def discovery(self, request: Request) -> Response:
        """That this is a local server, and which hub it uses: whoever takes it for a hub is told."""
        return json_response({"corral": corral.__version__, "hub": self._hub_url()})

    async def me(self, request: Request) -> Response:
        """The account this device is connected to."""
        check_cloud(maybe_caller(request))
        return json_response(await self._cloud.whoami())

    async def sign_out(self, request: Request) -> Response:
        """Disconnect this device; the older path names a key, which is ignored as Ollama ignores it."""
        await self._cloud.sign_out()
        return json_response(None)

    # ── The branch to the hub ────────────────────────────────────────────────────────────────────────────────────────

    def _with_cloud(self, row: Endpoint) -> Endpoint:
        """The route with the branch to the hub in front of its handler, if its requests name a model."""
        operation = _RELAYED.get(row.path)
        if operation is None:
            return row
        here = row.handler

        async def handle(request: Request) -> Response:
            try:
                target = self._explicit_target(request, row)
                if target is None:
                    return await self._run_here(request, here, row, operation)
                _check_name(request, target)
                return await self._relay(request, row, target, operation)
            except _CloudError as failed:
                response = json_response(native_body(failed.error), failed.error.status)
                if failed.error.retry_after_s is not None:
                    response.headers["Retry-After"] = str(failed.error.retry_after_s)
                return response

        return replace(row, handler=handle, cancel_on_disconnect=True)

    def _explicit_target(self, request: Request, row: Endpoint) -> str | None:
        """The hub's name of a model that is asked for with a suffix; None for one that may be installed, and for a request that
        the handler will refuse in its own words."""
        try:
            where = route(_requested(request, row), None, hub="")
        except CorralError:
            return None
        return where.model if isinstance(where, Cloud) else None

    async def _run_here(self, request: Request, here: Handler, row: Endpoint, operation: str) -> Response:
        try:
            return await here(request)
        except RunsElsewhere as found:
            where = route(_requested(request, row), found.stub, hub=self._hub_url())
            assert isinstance(where, Cloud)
            return await self._relay(request, row, where.model, operation)
        except CorralError as error:
            # Of a stub's hub. Clients of every dialect look for the link to sign in at in the plain form.
            if error.code == "unauthorized":
                raise _CloudError(error) from error
            raise

    async def _relay(self, request: Request, row: Endpoint, model: str, operation: str) -> Response:
        check_cloud(maybe_caller(request))
        facts = facts_of(request)
        path, body, query, verbose = row.path, b"", facts.target.partition("?")[2], None
        if facts.method == "POST":
            raw = raw_request(body_of(request))
            body = raw.with_model(model)
            verbose = cacheable(raw.fields) if path == "/api/show" and not query else None
        else:
            path = row.path.replace("{model}", quote(model, safe=":/"))
        try:
            self._cloud.require_on(operation)
            if verbose is not None:
                return _whole_response(200, _JSON, await self._cloud.show(model, body, facts.headers, verbose=verbose))
            answer = await self._cloud.relay(facts.method, path, query=query, headers=facts.headers, body=body)
            return await relayed_response(answer, row.path)
        except HubRefused as refused:
            return _whole_response(refused.reply.status, refused.reply.headers, refused.reply.body)
        except CorralError as error:
            raise _CloudError(error) from error


def local_app(
    api: LocalApi,
    guard: Guard,
    more: Sequence[Endpoint] = (),
    *,
    finish: Callable[[Endpoint], Endpoint] = lambda row: row,
    door: LocalDoor | None = None,
    trusted_proxies: Sequence[Network] = (),
) -> App:
    """The application of a local server. guard: see local_guard. more: routes beside these. finish: is done to each route.
    door: of a secured server; trusted_proxies: whose word that one takes for where a request comes from. Raises: TypeError for a
    route of a secured server that declares no right."""
    rows = [finish(row) for row in (*api.endpoints(), *more)]
    if door is not None:
        # Where programs of this machine need no credential, who sends none is known only to the door.
        rows = [replace(row, access=secured(row.access, is_open=door.admits_this_machine)) for row in rows]
    options = AppOptions(
        guard=guard,
        fallback=lambda path: Dialect.TEXT,
        response_headers=_RESPONSE_HEADERS,
        redirects_slashes=True,
    )
    if door is not None:
        options = replace(
            options,
            authenticate=door.authenticate,
            confirm=door.confirm,
            asks=door.turns_away,
            trusted_proxies=trusted_proxies,
        )
    return App(rows, options)


def _check_name(request: Request, model: str) -> None:
    """Raises: not_found for a model of the hub that the caller may not know of."""
    if not may_use_model(maybe_caller(request), parse_name(model)):
        raise model_not_found(model)


class _CloudError(Exception):
    """An error of the branch to the hub, to be answered in the plain form whatever the route's dialect."""

    def __init__(self, error: CorralError) -> None:
        self.error = error
        super().__init__(error.message)


def _requested(request: Request, row: Endpoint) -> str:
    """The model a request names. Raises: bad_request for a body that is not an object."""
    if "{model}" in row.path:
        return str(request.path_params["model"])
    if row.path != "/api/show":
        return raw_request(body_of(request)).model
    wanted = decode(body_of(request), ShowRequest)
    return wanted.model or wanted.name


# ── The hub's answer, on to the caller ───────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True, slots=True)
class _StreamForm:
    """How a stream is cut into frames, and how it tells an error. ends: what a frame may end with."""

    ends: tuple[bytes, ...]
    error_frame: Callable[[CorralError], bytes]

    def split(self, data: bytes) -> tuple[bytes, bytes]:
        """(whole frames, the beginning of the next one)."""
        if data.endswith(self.ends):
            return data, b""
        cut = max((at + len(end) for end in self.ends if (at := data.rfind(end)) >= 0), default=0)
        return data[:cut], data[cut:]


_FORMS: Final = {
    NDJSON: _StreamForm((b"\n",), ndjson_error),
    SSE: _StreamForm((b"\n\n", b"\r\n\r\n"), sse_error),
}


#: Routes whose streams tell errors in their own way.
_NAMED_FORMS: Final = {
    "/v1/messages": replace(_FORMS[SSE], error_frame=anthropic_error),
    "/v1/responses": replace(_FORMS[SSE], error_frame=responses_error),
}


async def relayed_response(answer: RelayedAnswer, path: str) -> Response:
    """A stream goes on as it arrives. Anything else is awaited whole, so that a hub that dies in the middle of it is a 502 and
    not half an object. path: of the route. Raises: upstream_failed."""
    form = _FORMS.get(answer.media_type)
    if answer.media_type == SSE:
        form = _NAMED_FORMS.get(path, form)
    if form is not None:
        return _RelayedStream(answer, form)
    try:
        body = await bounded(answer)
    finally:
        await answer.close()
    return _whole_response(answer.status, answer.headers, body)


def _encoded(headers: Sequence[tuple[str, str]]) -> list[tuple[bytes, bytes]]:
    return [(name.encode("latin-1"), value.encode("latin-1")) for name, value in headers]


def _whole_response(status: int, headers: Sequence[tuple[str, str]], body: bytes) -> Response:
    response = Response(body, status)
    response.raw_headers = [*_encoded(headers), (b"content-length", str(len(body)).encode())]
    return response


class _RelayedStream(Response):
    """Sends on what arrives, when it arrives, and lets the hub go when the caller leaves.

    The beginning of a frame waits for its end: nobody can use it earlier, and when the hub breaks off, an error frame can follow
    the last whole one (Ollama would end the stream as if it were complete; docs/divergences.md).
    """

    def __init__(self, answer: RelayedAnswer, form: _StreamForm) -> None:
        self._answer = answer
        self._form = form
        self.status_code = answer.status
        self.background = None
        self.raw_headers = _encoded(answer.headers)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send status and headers, then the body."""
        closing: asyncio.Event = scope["corral.closing"]
        try:
            await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
            async with aclosing(self._frames(closing)) as frames:
                async for data in frames:
                    await send({"type": "http.response.body", "body": data, "more_body": True})
            await send({"type": "http.response.body", "body": b"", "more_body": False})
        finally:
            await self._answer.close()

    async def _frames(self, closing: asyncio.Event) -> AsyncGenerator[bytes, None]:
        rest = b""
        try:
            async for chunk in self._answer.chunks():
                whole, rest = self._form.split(rest + chunk)
                if len(rest) > MAX_FRAME_BYTES:
                    raise CorralError("upstream_failed", "the hub sent a line that does not end")
                if whole:
                    yield whole
                if closing.is_set():
                    raise shutting_down()
        except CorralError as error:
            server_log.warning("a relayed stream broke off: %s", error.message)
            yield self._form.error_frame(told(error, closing))
        else:
            if rest:
                yield rest
