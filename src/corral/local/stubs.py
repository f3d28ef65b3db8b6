"""Installed models that run elsewhere: a request for one takes its texts and options along, and every line of the answer says
where it comes from.

A stub is a manifest whose config names a server and a model there. Anybody who can install a model could so choose where prompts
go; therefore a stub runs only at the hub in use, or at a host that the person who runs this server listed in `OLLAMA_REMOTES`.
The device signs for the hub and for nobody else: the stock signature names no host, so any other server could pass it on to the
hub (security.md W6).

A request is decoded and written anew, as Ollama does it, so that all dialects take this one way. Source: ollama server/routes.go
GenerateHandler, ChatHandler, filterThinkTags; api/client.go stream; server/create.go remoteURL; fb30760.
"""

from collections.abc import AsyncGenerator, Callable, Mapping
from contextlib import aclosing
from dataclasses import dataclass
from datetime import datetime
from http import HTTPStatus
from typing import Any, Final, TypeVar

import msgspec

from corral.core.ports import Clock, HubCall, HubGateway, HubStream, UpstreamRelay
from corral.core.records import Model
from corral.local.cloud import CloudAccess
from corral.serving.rendered import thinks_in_content, without_old_thoughts
from corral.wire.discovery import HubAddress, origin_of
from corral.wire.errors import CorralError
from corral.wire.frames import NDJSON, NdjsonDecoder
from corral.wire.native import ChatRequest, ChatResponse, GenerateRequest, GenerateResponse, Message, decode, format_time
from corral.wire.options import format_duration

Request = GenerateRequest | ChatRequest
R = TypeVar("R", GenerateResponse, ChatResponse)

RUN: Final = "remote model is unavailable"
DETAILS: Final = "remote model details are unavailable"
_MAX_ERROR_BYTES: Final = 64 * 1024
_MAX_ERROR_CHARACTERS: Final = 1000
_HEADERS: Final = (("accept", NDJSON), ("content-type", "application/json"))


@dataclass(frozen=True, slots=True)
class Remotes:
    """Where stubs may run. hosts: entries of `OLLAMA_REMOTES` in lower case, a name for all its ports, or a name and a port; none
    means: at the hub in use and nowhere else."""

    hosts: tuple[str, ...] = ()

    def is_hub(self, stub: Model, hub: str) -> bool:
        """Whether a stub runs at the hub; else it runs at another server that is allowed. hub: its base URL. Raises: bad_request
        for a stub of a server that is not."""
        there, here = origin_of(stub.remote_host), origin_of(hub)
        if there is not None and (not self.hosts or self._names(there)):
            # Behind a path lies something else than the hub, which has none.
            if here is not None and there.is_same_place(here) and stub.remote_host.rstrip("/").count("/") == 2:
                return True
            if self.hosts:
                return False
        raise CorralError("bad_request", "this server cannot run this remote model")

    def _names(self, there: HubAddress) -> bool:
        # A name alone is every port of that machine, as in Ollama: whoever made a stub chooses the port and the path.
        host = f"[{there.host}]" if ":" in there.host else there.host
        return there.host in self.hosts or f"{host}:{there.port}" in self.hosts


class StubModels:
    """Runs stubs. elsewhere: takes requests to other servers than the hub, unsigned. hub_url: the hub in use, asked each time."""

    def __init__(
        self,
        cloud: CloudAccess,
        gateway: HubGateway,
        elsewhere: UpstreamRelay,
        *,
        remotes: Remotes,
        hub_url: Callable[[], str],
        clock: Clock,
    ) -> None:
        self._cloud = cloud
        self._gateway = gateway
        self._elsewhere = elsewhere
        self._remotes = remotes
        self._hub_url = hub_url
        self._clock = clock

    def require_shown(self) -> None:
        """Raises: cloud_disabled."""
        self._cloud.require_on(DETAILS)

    def require_at_hub(self, stub: Model) -> None:
        """For what is passed on as it is. Raises: bad_request for a stub of another server."""
        if not self._remotes.is_hub(stub, self._hub_url()):
            raise CorralError("bad_request", "this remote model takes chats and prompts only")

    async def generate(self, stub: Model, request: GenerateRequest) -> AsyncGenerator[GenerateResponse, None]:
        """The events of a generation. Raises: cloud_disabled, bad_request, unauthorized, upstream_failed, and with the status of
        the other server whatever that answered."""
        async with aclosing(self._run(stub, request, generate_body(stub, request), GenerateResponse)) as events:
            async for event in events:
                yield event

    async def chat(self, stub: Model, request: ChatRequest) -> AsyncGenerator[ChatResponse, None]:
        """The events of a chat. Raises: as generate."""
        if request.only_loads and request.keep_alive_s == 0:
            now = format_time(self._clock.now())
            message = Message(role="assistant", content="")
            yield ChatResponse(model=request.model, created_at=now, message=message, done=True, done_reason="unload")
            return
        async with aclosing(self._run(stub, request, chat_body(stub, request), ChatResponse)) as events:
            async for event in events:
                yield event

    async def _run(self, stub: Model, request: Request, body: bytes, kind: type[R]) -> AsyncGenerator[R, None]:
        self._cloud.require_on(RUN)
        is_hub = self._remotes.is_hub(stub, self._hub_url())
        # Whatever route the request came in by, its body is a native one now.
        path = ChatRequest.path if isinstance(request, ChatRequest) else GenerateRequest.path
        answer = await (self._ask_hub(path, body) if is_hub else self._ask(stub, path, body))
        try:
            if answer.status != HTTPStatus.OK:
                raise await self._refusal(answer, is_hub=is_hub)
            said = {"model": request.model, "remote_model": stub.remote_model, "remote_host": stub.remote_host}
            is_empty = True
            async with aclosing(_lines(answer)) as lines:
                async for line in lines:
                    event, is_empty = _event(line, kind), False
                    created_at = event.created_at if _is_time(event.created_at) else format_time(self._clock.now())
                    yield msgspec.structs.replace(event, created_at=created_at, **said)
            if is_empty:
                raise CorralError("upstream_failed", f"{stub.remote_host} gave no answer", status=500)
        finally:
            await answer.close()

    async def _ask_hub(self, path: str, body: bytes) -> HubStream:
        try:
            return await self._gateway.open_stream(HubCall(method="POST", path=path, headers=_HEADERS, body=body))
        except CorralError as error:
            # A damaged key or memory is this machine's fault, not the request's.
            raise CorralError("internal", error.message) if error.code == "invalid" else _broken(error) from error

    async def _ask(self, stub: Model, path: str, body: bytes) -> HubStream:
        try:
            return await self._elsewhere.open_stream(stub.remote_host.rstrip("/"), path, body)
        except CorralError as error:
            raise CorralError("upstream_failed", f"{stub.remote_host} could not be reached", status=500) from error

    async def _refusal(self, answer: HubStream, *, is_hub: bool) -> CorralError:
        body = await answer.read(_MAX_ERROR_BYTES)
        if answer.status == HTTPStatus.UNAUTHORIZED:
            # Only the hub's own page is one to sign in at.
            return await self._cloud.not_signed_in(body) if is_hub else CorralError("unauthorized")
        if answer.status < HTTPStatus.BAD_REQUEST:
            text = f"the remote server answered {answer.status}, which leads elsewhere; check its address"
            return CorralError("upstream_failed", text, status=500)
        detail = {"StatusCode": answer.status, "Status": _status_line(answer.status)}
        code = "rate_limited" if answer.status == HTTPStatus.TOO_MANY_REQUESTS else "upstream_failed"
        after = dict(answer.headers).get("retry-after", "")
        retry_after_s = int(after) if after.isascii() and after.isdigit() and len(after) < 6 else None
        return CorralError(
            code,
            _told(body) or f"the remote server answered {answer.status}",
            detail=detail,
            status=answer.status,
            retry_after_s=retry_after_s,
        )


# ── What is sent ─────────────────────────────────────────────────────────────────────────────────────────────────────


def generate_body(stub: Model, request: GenerateRequest) -> bytes:
    """POST /api/generate for the stub's server: what the request leaves open, the stub says. Its messages have no place here."""
    fields: dict[str, Any] = {
        "model": stub.remote_model,
        "prompt": request.prompt,
        "suffix": request.suffix,
        "system": request.system or stub.system,
        "template": request.template or stub.template,
        **({"context": request.context} if request.context else {}),
        **_if_set("stream", request.stream),
        **({"raw": True} if request.raw else {}),
        **_if_set("format", request.format),
        **_keep_alive(request),
        **({"images": request.images} if request.images else {}),
    }
    return msgspec.json.encode(fields | _options(stub, request) | _switches(request))


def chat_body(stub: Model, request: ChatRequest) -> bytes:
    """POST /api/chat for the stub's server."""
    fields: dict[str, Any] = {
        "model": stub.remote_model,
        "messages": _messages(stub, request) or None,
        **_if_set("stream", request.stream),
        **_if_set("format", request.format),
        **_keep_alive(request),
        **({"tools": request.tools} if request.tools else {}),
    }
    return msgspec.json.encode(fields | _options(stub, request) | _switches(request))


def _messages(stub: Model, request: ChatRequest) -> list[Message]:
    if not request.messages:
        return []
    messages = [Message(role=role, content=text) for role, text in stub.messages] + list(request.messages)
    if stub.system and request.messages[0].role != "system":
        messages.insert(0, Message(role="system", content=stub.system))
    return without_old_thoughts(messages) if thinks_in_content(stub) else messages


def _options(stub: Model, request: Request) -> dict[str, Any]:
    # In the order of their names, as Go writes maps.
    merged = {**stub.parameters, **request.options}
    return {"options": {name: merged[name] for name in sorted(merged)}}


def _keep_alive(request: Request) -> dict[str, str]:
    return {} if request.keep_alive_s is None else {"keep_alive": format_duration(request.keep_alive_s)}


def _switches(request: Request) -> dict[str, Any]:
    return {
        **_if_set("think", request.think),
        **_if_set("truncate", request.truncate),
        **_if_set("shift", request.shift),
        **({"_debug_render_only": True} if request.debug_render_only else {}),
        **({"logprobs": True} if request.logprobs else {}),
        **({"top_logprobs": request.top_logprobs} if request.top_logprobs else {}),
    }


def _if_set(name: str, value: object) -> dict[str, Any]:
    return {} if value is None else {name: value}


# ── What comes back ──────────────────────────────────────────────────────────────────────────────────────────────────


async def _lines(answer: HubStream) -> AsyncGenerator[bytes, None]:
    decoder = NdjsonDecoder()
    try:
        async for chunk in answer.chunks():
            for line in decoder.feed(chunk):
                yield line
    except CorralError as error:
        raise _broken(error) from error
    for line in decoder.finish():
        yield line


def _event(line: bytes, kind: type[R]) -> R:
    """One line as an event. Raises: upstream_failed with the words of an error line, or of one that is no JSON object."""
    try:
        value = msgspec.json.decode(line)
    except (msgspec.DecodeError, RecursionError, UnicodeDecodeError):
        raise CorralError("upstream_failed", _printable(line), status=500) from None
    told = value.get("error") if isinstance(value, dict) else None
    if isinstance(told, str) and told:
        raise CorralError("upstream_failed", told[:_MAX_ERROR_CHARACTERS], status=500)
    try:
        return decode(line, kind)
    except CorralError as error:
        raise CorralError(
            "upstream_failed", f"the remote server's answer is not understood: {error.message}", status=500
        ) from error


def _is_time(text: str) -> bool:
    try:
        datetime.fromisoformat(text)
    except ValueError:
        return False
    return True


def _told(body: bytes) -> str:
    """The words of a refusal: its `error`, or its first line where it has none."""
    line = body.strip().partition(b"\n")[0]
    try:
        value = msgspec.json.decode(line)
    except (msgspec.DecodeError, RecursionError, UnicodeDecodeError):
        return _printable(line)
    told: Mapping[str, Any] = value if isinstance(value, dict) else {}
    return str(told["error"])[:_MAX_ERROR_CHARACTERS] if isinstance(told.get("error"), str) else ""


def _printable(line: bytes) -> str:
    text = line[:_MAX_ERROR_CHARACTERS].decode("utf-8", "replace")
    return "".join(character if character.isprintable() else " " for character in text)


def _status_line(status: int) -> str:
    try:
        return f"{status} {HTTPStatus(status).phrase}"
    except ValueError:
        return str(status)


def _broken(error: CorralError) -> CorralError:
    """What could not be asked or heard, with the status that Ollama has for it."""
    if error.code not in ("upstream_failed", "too_large"):
        return error
    return CorralError("upstream_failed", error.message, status=500)
