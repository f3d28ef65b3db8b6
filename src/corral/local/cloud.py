"""Everything a local server does at the hub for a signed-in device: decide what runs there, pass requests on, account matters.

A caller of the local server sends no credentials; the device's signature is added here. Therefore nothing that a caller sends may
choose where a request goes or speak for somebody else: the hub is configured, the path is the route's own, and the caller's
credentials, cookies and claims about its address are dropped. In the other direction the hub answers with data, never with
anything that a browser would run or obey in the name of the local server. Of the body only `model` is replaced, so unknown fields
survive.

Source: ollama server/cloud_proxy.go, internal/modelref, server/routes.go; security.md T90.
"""

import asyncio
import re
from collections.abc import AsyncIterator, Awaitable, Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import msgspec

from corral.core.ports import HubCall, HubGateway, HubReply, HubStream
from corral.core.records import Model
from corral.local.hub_cache import HubCache
from corral.wire.discovery import origin_of
from corral.wire.errors import CorralError
from corral.wire.frames import NDJSON, SSE
from corral.wire.names import Source, parse_name, parse_reference
from corral.wire.recommendations import RECOMMENDATIONS_PATH, Recommendation, parse_recommendations
from corral.wire.signing import connect_url

_MAX_ERROR_BYTES: Final = 64 * 1024
_MAX_LINK_LENGTH: Final = 2048
_MAX_WHOLE_BYTES: Final = 64 * 1024 * 1024
_RECOMMENDATIONS_S: Final = 3.0

#: Of a caller's headers, what says how the answer should look or helps to find it again. An allow-list: there is no end of names
#: under which gateways and SDKs send credentials, addresses and identities.
_TO_HUB = frozenset(
    {
        "accept",
        "accept-language",
        "anthropic-beta",
        "anthropic-version",
        "content-type",
        "idempotency-key",
        "openai-beta",
        "user-agent",
        "x-client-request-id",
        "x-request-id",
    }
)
_TO_HUB_PREFIXES = ("x-stainless-",)
#: Of the hub's headers, what callers make use of. An allow-list: whatever else a browser may one day obey (`Link`, `Set-Login`, a
#: policy, a cache) would be obeyed for the local server's origin.
_TO_CALLER = frozenset({"retry-after", "retry-after-ms", "x-should-retry"})
_TO_CALLER_PREFIXES = ("ratelimit-", "x-ratelimit-", "anthropic-ratelimit-")
#: What the hub's API answers with. None of them can hold a script that a browser runs.
_DATA_TYPES = frozenset({"application/json", NDJSON, SSE})
_UTF8 = re.compile(r"\s*charset=\"?utf-8\"?\s*", re.IGNORECASE)


# ── Where a model runs ───────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True, slots=True)
class Local:
    """On this machine."""


@dataclass(frozen=True, slots=True)
class Cloud:
    """At the hub, under this name."""

    model: str


def route(requested: str, installed: Model | None, *, hub: str) -> Local | Cloud:
    """Where a request's model runs. installed: what the store holds under that name, if anything. hub: base URL of the hub used.
    Raises: bad_request for two source suffixes, a name that is none, and a stub of another server; not_found for `:local` on a
    stub."""
    reference = parse_reference(requested)
    if reference.source is Source.CLOUD:
        return Cloud(_hub_name(reference.base))
    if installed is None or not installed.is_stub:
        return Local()
    if reference.source is Source.LOCAL:
        raise CorralError("not_found", f"model '{requested}' not found")
    stub_origin, hub_origin = origin_of(installed.remote_host), origin_of(hub)
    if stub_origin is not None and hub_origin is not None and stub_origin.is_same_place(hub_origin):
        return Cloud(_hub_name(installed.remote_model))
    raise CorralError("bad_request", "this server cannot run this remote model")


def _hub_name(text: str) -> str:
    """The name as written, without a scheme, once it is known to be one: it becomes part of a path that is signed.
    Raises: bad_request."""
    parse_name(text)
    return text.split("://", 1)[-1]


# ── The switch ───────────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True, slots=True)
class CloudSwitch:
    """Whether the cloud is off. by_env: OLLAMA_NO_CLOUD. by_config: asks `server.json`, anew each time."""

    by_env: bool
    by_config: Callable[[], bool]

    @property
    def source(self) -> str:
        """What switched it off: `none`, `env`, `config` or `both`."""
        by_config = self.by_config()
        if self.by_env:
            return "both" if by_config else "env"
        return "config" if by_config else "none"

    def require_on(self, operation: str) -> None:
        """Raises: cloud_disabled, with Ollama's words for the operation."""
        if self.source != "none":
            raise CorralError("cloud_disabled", f"ollama cloud is disabled: {operation}")


# ── Headers ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def headers_for_hub(headers: Mapping[str, Sequence[str]], *, version: str) -> list[tuple[str, str]]:
    """What of a caller's headers travels on. headers: lower-case name -> values."""
    named = _named_by_connection(headers.get("connection", ()))
    kept = [
        (name, value)
        for name, values in headers.items()
        if (name in _TO_HUB or name.startswith(_TO_HUB_PREFIXES)) and name not in named
        for value in values
    ]
    if "content-type" not in headers:
        kept.append(("content-type", "application/json"))
    kept.append(("x-ollama-client-version", version))
    return kept


def headers_for_caller(headers: Iterable[tuple[str, str]]) -> list[tuple[str, str]]:
    """What of the hub's headers travels back. For `content-type` see `data_type`; `content-length` is our own server's."""
    pairs = list(headers)
    named = _named_by_connection(value for name, value in pairs if name == "connection")
    return [
        (name, value)
        for name, value in pairs
        if (name in _TO_CALLER or name.startswith(_TO_CALLER_PREFIXES)) and name not in named
    ]


def data_type(headers: Iterable[tuple[str, str]]) -> str | None:
    """The `content-type` to pass on: JSON, NDJSON or SSE, with `charset=utf-8` at most; None when the hub's is anything else.

    Browsers go by the last of several types, and by what stands behind a comma in a parameter, so one that is merely looked at
    and then repeated could still be a page.
    """
    values = [value for name, value in headers if name == "content-type"]
    if len(values) != 1:
        return None
    media, _, parameters = values[0].partition(";")
    media = media.strip().lower()
    if media not in _DATA_TYPES:
        return None
    return f"{media}; charset=utf-8" if _UTF8.fullmatch(parameters) else media


def _named_by_connection(values: Iterable[str]) -> set[str]:
    return {name.strip().lower() for value in values for name in value.split(",")}


# ── The service ──────────────────────────────────────────────────────────────────────────────────────────────────────


class RelayedAnswer:
    """The hub's answer on its way to the caller. Whoever got it closes it."""

    def __init__(self, stream: HubStream, content_type: str) -> None:
        self._stream = stream
        self.status = stream.status
        self.headers = [("content-type", content_type), *headers_for_caller(stream.headers)]
        #: Without parameters.
        self.media_type = content_type.partition(";")[0]

    def chunks(self) -> AsyncIterator[bytes]:
        """The body as it arrives. Raises: upstream_failed when it ends too early."""
        return self._stream.chunks()

    async def close(self) -> None:
        """Let the hub go; it stops generating when its answer was not read to the end."""
        await self._stream.close()


class HubRefused(CorralError):
    """The hub's own answer to a request that it did not grant, to be passed on as it is."""

    def __init__(self, status: int, headers: Sequence[tuple[str, str]], body: bytes) -> None:
        self.reply = HubReply(status=status, headers=headers, body=body)
        is_passing = status == 429 or status >= 500
        super().__init__("upstream_failed" if is_passing else "bad_request", f"the hub answered {status}", status=status)


class CloudAccess:
    """The hub, for one device. device_name: this machine's host name, for signin links. version: the level of Ollama's API.
    cache: for what is asked often, if anything is kept."""

    def __init__(
        self, gateway: HubGateway, switch: CloudSwitch, *, device_name: str, version: str, cache: HubCache | None = None
    ) -> None:
        self._gateway = gateway
        self._switch = switch
        self._device_name = device_name
        self._version = version
        self._cache = cache

    @property
    def off_by(self) -> str:
        """What switched the cloud off, `none` when it is on."""
        return self._switch.source

    def require_on(self, operation: str) -> None:
        """Raises: cloud_disabled."""
        self._switch.require_on(operation)

    async def relay(
        self, method: str, path: str, *, query: str = "", headers: Mapping[str, Sequence[str]], body: bytes = b""
    ) -> RelayedAnswer:
        """Pass a request on to the same path at the hub, signed. body: with the hub's name of the model already in it.
        Raises: unauthorized with a signin link; upstream_failed; whatever HubGateway raises."""
        if not query.isascii() or not query.isprintable() or "#" in query or " " in query:
            raise CorralError("bad_request", "the query holds characters that must be percent-encoded")
        call = HubCall(method=method, path=path, query=query, headers=headers_for_hub(headers, version=self._version), body=body)
        try:
            stream = await self._gateway.open_stream(call)
        except CorralError as error:
            # A damaged key or memory is this machine's fault, not the request's.
            raise CorralError("internal", error.message) if error.code == "invalid" else error from None
        content_type = data_type(stream.headers)
        if content_type and stream.status != 401 and not 300 <= stream.status < 400:
            return RelayedAnswer(stream, content_type)
        try:
            answer = await stream.read(_MAX_ERROR_BYTES)
        finally:
            await stream.close()
        if stream.status == 401:
            raise await self.not_signed_in(answer)
        if 300 <= stream.status < 400:
            # Following it would send a signed request, and the prompt, to a place nobody configured.
            raise CorralError("upstream_failed", f"the hub answered with a redirect ({stream.status}); check the hub's address")
        # A browser would run a page of the hub as one of the local server's.
        raise CorralError(
            "upstream_failed", f"the hub answered {stream.status} with something else than JSON; check the hub's address"
        )

    async def show(self, model: str, body: bytes, headers: Mapping[str, Sequence[str]], *, verbose: bool) -> bytes:
        """The hub's answer to a request for a model's facts that depends on nothing else, possibly a kept one. Raises: HubRefused
        for any answer but 200; whatever relay raises."""

        async def fetch() -> bytes:
            answer = await self.relay("POST", "/api/show", headers=headers, body=body)
            try:
                whole = await bounded(answer)
            finally:
                await answer.close()
            if answer.status != 200:
                raise HubRefused(answer.status, answer.headers, whole)
            return whole

        return await self._kept(("show", model.lower(), verbose), fetch)

    async def recommendations(self) -> list[Recommendation]:
        """What the hub recommends; nothing when it is off, away or has nothing to say. No model is recommended from here."""

        async def fetch() -> bytes:
            call = HubCall(method="GET", path=RECOMMENDATIONS_PATH, headers=[("accept", "application/json")])
            reply = await self._gateway.send(call)
            if reply.status != 200:
                raise HubRefused(reply.status, reply.headers, reply.body)
            return reply.body

        if self.off_by != "none":
            return []
        try:
            async with asyncio.timeout(_RECOMMENDATIONS_S):
                return parse_recommendations(await self._kept(("recommendations",), fetch))
        except (CorralError, TimeoutError):
            return []

    async def _kept(self, what: Hashable, fetch: Callable[[], Awaitable[bytes]]) -> bytes:
        if self._cache is None:
            return await fetch()
        who = (await self._gateway.signin_base(), self._gateway.device_key().encoded)
        return await self._cache.get(who, what, fetch)

    async def whoami(self) -> dict[str, Any]:
        """The account this device is connected to, as the hub describes it. Raises: unauthorized with a signin link; unavailable
        with the reason (Ollama says only `account unavailable`; docs/divergences.md)."""
        try:
            reply = await self._gateway.send(HubCall(method="POST", path="/api/me"))
        except CorralError as error:
            raise CorralError("unavailable", f"account unavailable: {error.message}") from error
        if reply.status == 401:
            raise await self.not_signed_in(reply.body)
        if reply.status != 200:
            raise CorralError("unavailable", f"account unavailable: {_words_of(reply)}")
        user = object_of(reply.body)
        if not user.get("name"):
            raise await self.not_signed_in(b"")
        if self._cache is not None:
            self._cache.note_account(str(user.get("id") or user["name"]))
        return {**user, "plan": user.get("plan") or "free"}

    async def sign_out(self) -> None:
        """Disconnect this device at the hub; its key stays. Raises: unauthorized when it was not connected; internal."""
        # Whatever the hub answers: nobody who asked for this wants to see the account's models any more.
        if self._cache is not None:
            self._cache.forget()
        try:
            path = f"/api/user/keys/{self._gateway.device_key().encoded}"
            reply = await self._gateway.send(HubCall(method="DELETE", path=path))
        except CorralError as error:
            raise CorralError("internal", f"there was an error signing out: {error.message}") from error
        if reply.status == 401:
            raise CorralError("unauthorized", "you are not currently signed in")
        if reply.status != 200:
            raise CorralError("internal", f"there was an error signing out: {_words_of(reply)}")

    async def not_signed_in(self, answer: bytes) -> CorralError:
        """The 401 that clients know how to show. The hub's own link is kept, since it may hold a one-time code, but only when it
        leads to the hub: people are told to open it and sign in there."""
        if self._cache is not None:
            self._cache.forget()
        base = await self._gateway.signin_base()
        offered = object_of(answer).get("signin_url")
        if not _is_link_to(offered, base):
            offered = connect_url(base, self._device_name, self._gateway.device_key())
        return CorralError("unauthorized", "unauthorized", detail={"signin_url": offered})


async def bounded(answer: RelayedAnswer, *, name: str = "answer", max_bytes: int = _MAX_WHOLE_BYTES) -> bytes:
    """The whole body. name: what the error calls it. Raises: upstream_failed for one that is too large, or breaks off."""
    parts: list[bytes] = []
    size = 0
    async for chunk in answer.chunks():
        size += len(chunk)
        if size > max_bytes:
            raise CorralError("upstream_failed", f"the hub's {name} is larger than {max_bytes} bytes")
        parts.append(chunk)
    return b"".join(parts)


def _is_link_to(link: object, base: str) -> bool:
    if not isinstance(link, str) or len(link) > _MAX_LINK_LENGTH:
        return False
    origin = origin_of(link)
    return origin is not None and origin == origin_of(base)


def object_of(body: bytes) -> dict[str, Any]:
    """The JSON object in a foreign answer, empty when it is none."""
    try:
        value = msgspec.json.decode(body)
    except (msgspec.DecodeError, RecursionError, UnicodeDecodeError):
        return {}
    return value if isinstance(value, dict) else {}


def _words_of(reply: HubReply) -> str:
    """The hub's own error text, on one line and not too long, or its status."""
    text = object_of(reply.body).get("error")
    if not isinstance(text, str) or not text:
        return f"the hub answered {reply.status}"
    return "".join(character if character.isprintable() else " " for character in text[:500])
