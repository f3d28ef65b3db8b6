"""Looks at this machine, its local server and the hub for `corral doctor`, and changes nothing.

Every step has a few seconds; what takes longer is a fact like any other. Steps that block (the resolver above all, which knows
no time limit) run in threads that nobody waits for. A credential goes only where it could be of use: the API key of a Corral hub
to a Corral hub, any other to a hub that is none; over plain http to this machine alone.
"""

import asyncio
import socket
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import TYPE_CHECKING, Any, Final, TypeVar
from urllib.parse import urlsplit

import corral
from corral.cli import render
from corral.cli.api import ApiError, ServerApi
from corral.cli.context import Failed
from corral.cli.doctor_answers import (
    failed,
    is_of_a_hub,
    is_same_place,
    json_of,
    object_of,
    objects_of,
    standing_of,
    text_of,
    texts_of,
)
from corral.core.checkup import ApiKeySeen, HubSeen, HubSource, Seen, ServerSeen, Standing, Trouble
from corral.wire.errors import CorralError

if TYPE_CHECKING:
    import aiohttp

    from corral.clients.hub import HubClient
    from corral.core.ports import Clock
    from corral.settings import Settings
    from corral.wire.signing import DevicePrivateKey

T = TypeVar("T")

#: Of one step, on this machine and beyond it.
_HERE_S: Final = 3.0
_AWAY_S: Final = 5.0
#: The local server itself asks the hub.
_RELAYED_S: Final = 8.0
_MAX_BYTES: Final = 64 * 1024
#: What stands before a hub says so where the hub itself was not asked.
_BARRED: Final = frozenset({401, 403, 407, 408, 429})
_LOOPBACK_WORDS: Final = frozenset({"*", "localhost", "127.0.0.1", "127.0.0.0/8"})


@dataclass(frozen=True, slots=True, kw_only=True)
class _Own:
    """What is looked with: this machine's settings, key and clock."""

    settings: "Settings"
    key: "DevicePrivateKey | None"
    clock: "Clock"


async def look(settings: "Settings", hub_option: str, *, clock: "Clock", is_identity_only: bool) -> Seen:
    """All facts. hub_option: `--hub`, parsed, or empty. is_identity_only: leave engine and models alone."""
    from corral.main import checkup

    key_file, key = checkup.device_key(settings)
    own = _Own(settings=settings, key=key, clock=clock)
    saved, memory_trouble = checkup.saved_hub(settings)
    async with asyncio.TaskGroup() as group:
        is_whole = not is_identity_only and _is_here(settings)
        engine = group.create_task(checkup.engine(settings)) if is_whole else None
        server = await _server(own)
        hub = _chosen(settings, hub_option, server, saved)
        is_off = checkup.is_cloud_off(settings)
        is_unwanted = bool(server.cloud_off_by) or is_off or memory_trouble is not None
        hub = replace(hub, is_asked=not (hub.source == "default" and is_unwanted))
        at_hub = await _AtHub.look(own, hub, takes_key=not server.took_key)
        server = replace(server, standing=await _relayed(own, server, at_hub))
    return Seen(
        now=clock.now(),
        platform=checkup.platform(),
        version=corral.__version__,
        user=checkup.own_user(),
        key=key_file,
        server=server,
        hub=at_hub.hub,
        saved_hub=saved,
        memory_trouble=memory_trouble,
        is_cloud_off_here=is_off,
        is_signing=settings.is_signing,
        device=at_hub.device,
        api_key=at_hub.api_key,
        models=checkup.models_folder(settings) if is_whole else None,
        engine=engine.result() if engine else None,
        authorized=checkup.authorized(settings) if server.is_here and server.user in ("", checkup.own_user()) else None,
        is_loopback_proxied=bool(settings.proxies.http) and not _LOOPBACK_WORDS & set(settings.proxies.exceptions),
        warnings=settings.warnings,
    )


async def in_time(work: Callable[[], T], *, limit_s: float) -> T:
    """What work returns or raises, unless it takes too long. Raises: TimeoutError; the thread is then left to itself. Failed for
    what cannot be sent (a host name, a header that is none) or read (JSON without a bottom)."""
    loop = asyncio.get_running_loop()
    ended: asyncio.Future[T] = loop.create_future()

    def finish(put: Callable[[], None]) -> None:
        # The loop may be gone, and whoever waited may have left.
        with suppress(RuntimeError):
            loop.call_soon_threadsafe(lambda: None if ended.done() else put())

    def run() -> None:
        try:
            result = work()
        except (Failed, CorralError, OSError) as error:
            # A name of `except` ends with its block.
            failure: Exception = error
            finish(lambda: ended.set_exception(failure))
        except (ValueError, RecursionError) as error:
            failure = Failed("it cannot be asked in these words, or answers in ones that cannot be read")
            failure.__cause__ = error
            finish(lambda: ended.set_exception(failure))
        else:
            finish(lambda: ended.set_result(result))

    threading.Thread(target=run, daemon=True).start()
    async with asyncio.timeout(limit_s):
        return await ended


# ── The local server ─────────────────────────────────────────────────────────────────────────────────────────────────


class _Asking(ServerApi):
    """The server at OLLAMA_HOST, asked without any credential; after a 401 of its own, with whatever commands would prove
    themselves by. Unlike them it makes no device key for that."""

    def __init__(self, own: _Own, *, limit_s: float) -> None:
        super().__init__(
            own.settings.local,
            None,
            advice="check OLLAMA_HOST",
            kind="an Ollama server",
            timeout_s=limit_s,
            proxies=own.settings.proxies,
        )
        self._own = own
        self._is_proving = False

    def ask(self, method: str, path: str) -> Any:
        """The answer's JSON. Raises: ApiError, Failed when nobody answers."""
        try:
            return self.request(method, path)
        except ApiError as error:
            # A 401 with a link is a hub's, about the server's own key.
            if error.code != 401 or "signin_url" in error.body or self._is_proving:
                raise
            # Over plain http others could read an API key, but not use a strong signature again.
            if not (self._may_carry_key or self._own.settings.is_signing):
                raise
        self._is_proving = True
        key = self._own.settings.api_key
        self._api_key = key if key and not self._own.settings.is_signing else None
        return self.request(method, path)

    @property
    def is_proving(self) -> bool:
        """Whether a credential was asked for."""
        return self._is_proving

    @property
    def is_using_key(self) -> bool:
        """Whether OLLAMA_API_KEY was asked for."""
        return self._api_key is not None

    def _proven(self, method: str, path: str) -> tuple[str, dict[str, str]]:
        from corral.wire.signing import authorization_header, request_challenge, signed_target

        key = self._signing_key
        if key is None:
            return super()._proven(method, path)
        route, _, query = path.partition("?")
        target = signed_target(route, query, int(self._own.clock.now().timestamp()))
        return target, {**self._headers(), "Authorization": authorization_header(key, request_challenge(method, target))}

    def _proven_with_body(self, method: str, path: str, body: bytes) -> tuple[str, dict[str, str]]:
        """As `LocalApi`: over plain http to another machine by the strong signature."""
        from corral.main.shared import SystemEntropy
        from corral.wire.strong import NONCE_BYTES, sign_headers

        key = self._signing_key
        if key is None or self._may_carry_key:
            return self._proven(method, path)
        headers = {**self._headers(), "Host": urlsplit(self.url).netloc}
        now, nonce = self._own.clock.now().timestamp(), SystemEntropy().bytes(NONCE_BYTES)
        return path, {**headers, **sign_headers(key, method, self.url + path, headers, body=body, now=now, nonce=nonce)}

    @property
    def _signing_key(self) -> "DevicePrivateKey | None":
        return self._own.key if self._is_proving and self._own.settings.is_signing else None


async def _server(own: _Own) -> ServerSeen:
    from corral.main.checkup import listening_user

    address = own.settings.local
    seen = ServerSeen(url=address.url, is_here=_is_here(own.settings))
    try:
        seen = await in_time(lambda: _asked_server(_Asking(own, limit_s=_HERE_S), seen), limit_s=2 * _HERE_S)
    except TimeoutError:
        return replace(seen, trouble=_silent(seen.url))
    except Failed as error:
        return replace(seen, trouble=Trouble(f"{seen.url}: {error.message}", "check OLLAMA_HOST and OLLAMA_API_KEY"))
    return replace(seen, user=listening_user(address.port)) if seen.is_here and seen.is_answering else seen


def _is_here(settings: "Settings") -> bool:
    """Whether OLLAMA_HOST names this machine; an address that stands for all of its own does."""
    from corral.main.checkup import is_own_address

    return settings.local.is_loopback or is_own_address(settings.local.host)


def _asked_server(api: _Asking, seen: ServerSeen) -> ServerSeen:
    try:
        version = api.ask("GET", "/api/version")
    except ApiError as error:
        return replace(seen, status=error.code, message=text_of(error.body.get("error")))
    except Failed as error:
        if isinstance(error.__cause__, TimeoutError):
            return replace(seen, trouble=_silent(seen.url))
        is_absent = isinstance(error.__cause__, ConnectionRefusedError)
        return replace(seen, is_absent=is_absent, trouble=Trouble(error.message, error.advice))
    told = object_of(version)
    seen = replace(seen, corral=text_of(told.get("corral")), ollama=text_of(told.get("version")))
    document, status = object_of(_maybe(api, "/.well-known/corral")), object_of(_maybe(api, "/api/status"))
    cloud = object_of(status.get("cloud"))
    return replace(
        seen,
        is_let_in=api.is_proving,
        took_key=api.is_using_key,
        is_hub="public_url" in document,
        hub=text_of(status.get("hub")),
        cloud_off_by=text_of(cloud.get("source")) if cloud.get("disabled") is True else "",
    )


def _silent(url: str) -> Trouble:
    return Trouble(f"{url} takes a connection and does not answer", "restart what listens there, or check OLLAMA_HOST")


def _maybe(api: _Asking, path: str) -> Any:
    try:
        return api.ask("GET", path)
    except Failed:
        return None


async def _relayed(own: _Own, server: ServerSeen, at_hub: "_AtHub") -> Standing | None:
    """Who the local server is at the hub; not asked where that is another hub, or none that answers."""
    from corral.main import checkup

    hub = at_hub.hub
    is_same_hub = not server.hub or is_same_place(server.hub, hub.url)
    if not server.is_answering or server.is_hub or server.cloud_off_by or not hub.is_well or not is_same_hub:
        return None
    is_connected = at_hub.device is not None and bool(at_hub.device.account)
    is_ours = server.user in ("", checkup.own_user())
    # It would note down what it agrees with the hub, in this very home, and say what is known already.
    if is_ours and not is_connected and not checkup.knows_hub(own.settings, hub.url):
        return None
    # It would make the key that is missing, or stumble over the same one.
    if is_ours and server.is_here and own.key is None:
        return None

    def ask() -> Standing:
        try:
            return standing_of(200, _Asking(own, limit_s=_RELAYED_S).ask("POST", "/api/me"))
        except ApiError as error:
            # A server that cannot reach its hub passes on why, with what to do behind the arrow.
            return failed(error.message, error.advice) if error.code >= 500 else standing_of(error.code, error.body)
        except Failed as error:
            return failed(error.message, error.advice)

    try:
        return await in_time(ask, limit_s=_RELAYED_S)
    except Failed as error:
        return failed(f"the local server: {error.message}", "")
    except TimeoutError:
        return failed(f"the local server does not answer within {_RELAYED_S:.0f} s when asked who it is", "")


# ── The hub ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def _chosen(settings: "Settings", option: str, server: ServerSeen, saved: str) -> HubSeen:
    """The hub that every other command would use, and who says so; see cli.hub_access.chosen_hub."""
    from corral.settings import DEFAULT_HUB
    from corral.wire.discovery import parse_hub_address

    # A server elsewhere must not choose where this device's signature goes.
    of_server = server.hub if settings.local.is_loopback else ""
    # A server that follows the last sign-in, or was told of no hub at all, did not choose.
    if of_server and is_same_place(of_server, saved or DEFAULT_HUB):
        of_server = ""
    choices: tuple[tuple[str, HubSource], ...] = (
        (option, "--hub"),
        (settings.hub, "CORRAL_HUB"),
        (of_server, "the local server"),
        (saved, "the last sign-in"),
        (DEFAULT_HUB, "default"),
    )
    url, source = next(choice for choice in choices if choice[0])
    try:
        return HubSeen(url=url, source=source, is_private_line=parse_hub_address(url).is_private_line)
    except CorralError as error:
        return HubSeen(url=url, source=source, trouble=Trouble(error.message))


@dataclass(frozen=True, slots=True, kw_only=True)
class _AtHub:
    """What the hub told."""

    hub: HubSeen
    device: Standing | None = None
    api_key: ApiKeySeen | None = None

    @classmethod
    async def look(cls, own: _Own, hub: HubSeen, *, takes_key: bool) -> "_AtHub":
        """Ask the hub who it is, then who this device is, then who the API key is. takes_key: False for a key that opens the
        local server, and is nothing to show to a hub."""
        from corral.clients.hub import open_session
        from corral.main.checkup import looking_client
        from corral.wire.signing import WINDOW_S

        api_key = _presented(own.settings)
        if not hub.is_well:
            return cls(hub=hub, api_key=api_key)
        async with open_session() as session:
            hub = await _reached(own, hub, session)
            if not hub.is_well:
                return cls(hub=hub, api_key=api_key)
            offset_s = hub.clock_offset_s or 0.0
            device, keys = None, None
            if own.key is not None and (hub.is_corral or abs(offset_s) <= WINDOW_S):
                client = looking_client(
                    own.settings,
                    hub.url,
                    own.key,
                    session=session,
                    clock=own.clock,
                    offset_s=offset_s if hub.is_corral else 0.0,
                )
                device = await _device(client, hub)
                keys = await _listed(client, "/api/keys") if device.account and api_key and hub.is_corral else None
        if takes_key:
            api_key = await _api_key(own.settings, hub, api_key, keys)
        return cls(hub=hub, device=device, api_key=api_key)


async def _reached(own: _Own, hub: HubSeen, session: "aiohttp.ClientSession") -> HubSeen:
    """The hub with what its discovery document and its clock say."""
    import aiohttp

    from corral.clients.hub import reason_of, user_agent
    from corral.wire.discovery import DISCOVERY_PATH, parse_discovery, parse_hub_address, refuse_local_server

    proxy = own.settings.proxies.proxy_of(hub.url)
    hub = replace(hub, proxy=urlsplit(proxy).netloc.rpartition("@")[2] if proxy else "")
    try:
        await _resolve(proxy or hub.url)
        headers = {"User-Agent": user_agent(corral.__version__), "Accept": "application/json", "Accept-Encoding": "identity"}
        begun_ns = time.monotonic_ns()
        async with asyncio.timeout(_AWAY_S):
            async with session.get(f"{hub.url}{DISCOVERY_PATH}", headers=headers, allow_redirects=False, proxy=proxy) as reply:
                took_ms = (time.monotonic_ns() - begun_ns) // 1_000_000
                offset_s = _offset_s(reply.headers.get("Date", ""), own.clock.now())
                body = await _read(reply)
        address = parse_hub_address(hub.url)
        public_url = parse_discovery(body, address) if reply.status == 200 else None
        if reply.status == 200 and public_url is None:
            refuse_local_server(body, address)
        if public_url is None and reply.status not in _BARRED:
            # A hub without such a document knows who may ask it; told unsigned, so that a stranger gets no signature.
            async with asyncio.timeout(_AWAY_S):
                async with session.post(f"{hub.url}/api/me", headers=headers, allow_redirects=False, proxy=proxy) as answer:
                    if not is_of_a_hub(answer.status, await _read(answer)):
                        text = f"{hub.url} is not a hub: it answered {answer.status} when asked who this is"
                        return replace(hub, trouble=Trouble(text))
    except CorralError as error:
        message, _, advice = error.message.partition(" → ")
        return replace(hub, trouble=Trouble(message, advice))
    except UnicodeError:
        return replace(hub, trouble=Trouble(f"{hub.url} holds a host name that is none"))
    except (aiohttp.ClientError, OSError) as error:
        message, _, advice = reason_of(error).partition(" → ")
        is_absent = isinstance(getattr(error, "os_error", error), ConnectionRefusedError) and not proxy
        return replace(hub, is_absent=is_absent, trouble=Trouble(f"{hub.url} cannot be reached: {message}", advice))
    if reply.status >= 500 or reply.status in _BARRED:
        return replace(hub, trouble=Trouble(f"{hub.url} answered {reply.status}", "ask whoever runs it; its log says why"))
    return replace(hub, is_corral=public_url is not None, took_ms=took_ms, clock_offset_s=offset_s)


async def _read(reply: "aiohttp.ClientResponse") -> bytes:
    body = b""
    async for chunk in reply.content.iter_any():
        body += chunk
        if len(body) > _MAX_BYTES:
            break
    return body[:_MAX_BYTES]


async def _resolve(url: str) -> None:
    """Look a host's name up once, in a thread that can be left: the library's own look-up is waited for at the end of the
    program. Raises: upstream_failed when it takes too long; what it says otherwise, the library will say as well."""
    parts = urlsplit(url)
    try:
        with suppress(OSError, Failed):
            await in_time(lambda: socket.getaddrinfo(parts.hostname, parts.port), limit_s=_HERE_S)
    except TimeoutError:
        text = f"the name {parts.hostname} was not resolved within {_HERE_S:.0f} s → check the network and its name server"
        raise CorralError("upstream_failed", text) from None


def _offset_s(date: str, now: datetime) -> float | None:
    """How far `now` is behind a `Date` header; None when that says nothing."""
    try:
        theirs = parsedate_to_datetime(date)
    except ValueError:
        return None
    return (theirs.replace(tzinfo=theirs.tzinfo or UTC) - now).total_seconds()


async def _device(client: "HubClient", hub: HubSeen) -> Standing:
    """Who this device is, since when, and what it may do."""
    standing = await _signed(client, "POST", "/api/me")
    if not standing.account or not hub.is_corral:
        return standing
    own = next((entry for entry in await _listed(client, "/api/user/keys") or () if entry.get("current") is True), None)
    if own is not None:
        scopes = texts_of(own.get("scopes"))
        since = render.parse_time(text_of(own.get("created_at")))
        return replace(standing, since=since, scopes=scopes, may_run="inference" in scopes)
    # A device without the scope `keys` is told no list.
    return replace(standing, may_run=(await _signed(client, "POST", "/api/generate")).status != 403)


async def _signed(client: "HubClient", method: str, path: str) -> Standing:
    try:
        async with asyncio.timeout(_AWAY_S):
            status, _, body = await client.request(method, path)
    except TimeoutError:
        return failed(f"the hub does not answer within {_AWAY_S:.0f} s when asked who this is", "is it overloaded?")
    except CorralError as error:
        message, _, advice = error.message.partition(" → ")
        return failed(message, advice)
    return standing_of(status, json_of(body))


async def _listed(client: "HubClient", path: str) -> list[Mapping[str, Any]] | None:
    """The objects of a list; None where the hub does not tell."""
    try:
        async with asyncio.timeout(_AWAY_S):
            status, _, body = await client.request("GET", path)
    except (TimeoutError, CorralError):
        return None
    return objects_of(json_of(body)) if status == 200 else None


# ── The API key ──────────────────────────────────────────────────────────────────────────────────────────────────────


def _presented(settings: "Settings") -> ApiKeySeen | None:
    from corral.wire.apikeys import parse_api_key
    from corral.wire.pasted import fault_of_api_key

    if settings.api_key is None:
        return None
    text = settings.api_key.reveal()
    own = parse_api_key(text)
    return ApiKeySeen(prefix=own.prefix) if own else ApiKeySeen(fault=fault_of_api_key(text))


async def _api_key(
    settings: "Settings", hub: HubSeen, seen: ApiKeySeen | None, listed: list[Mapping[str, Any]] | None
) -> ApiKeySeen | None:
    """The key, tried at the hub. listed: the keys of the account that this device is connected to, where the hub told. One that
    cannot be the hub's is not sent there: it would be told to a stranger."""
    from corral.wire.apikeys import parse_api_key

    if seen is None or settings.api_key is None or bool(seen.prefix) != hub.is_corral:
        return seen
    api = ServerApi.of_hub(hub.url, settings.api_key, settings.proxies)
    try:
        standing, own_list = await in_time(lambda: _asked_with_key(api, is_corral=hub.is_corral), limit_s=_AWAY_S)
    except TimeoutError:
        text = f"{hub.url} does not answer a request with this key within {_AWAY_S:.0f} s"
        return replace(seen, standing=failed(text, "is it overloaded?"))
    except Failed as error:
        return replace(seen, standing=failed(error.message, error.advice))
    keys = own_list if own_list is not None else listed
    own = parse_api_key(settings.api_key.reveal())
    entry = next((key for key in keys or () if own is not None and key.get("id") == own.public_id), None)
    if entry is None:
        return replace(seen, standing=standing, is_listed=None if keys is None else False)
    scopes = texts_of(entry.get("scopes"))
    return replace(
        seen,
        standing=replace(standing, may_run="inference" in scopes),
        is_listed=True,
        scopes=scopes,
        expires_at=render.parse_time(text_of(entry.get("expires_at"))),
        revoked_at=render.parse_time(text_of(entry.get("revoked_at"))),
    )


def _asked_with_key(api: ServerApi, *, is_corral: bool) -> tuple[Standing, list[Mapping[str, Any]] | None]:
    """(who the key is, the keys of its account where it may list them)."""
    try:
        standing = standing_of(200, api.post("/api/me"))
    except ApiError as error:
        return standing_of(error.code, error.body), None
    if not is_corral:
        return standing, None
    try:
        return standing, objects_of(api.get("/api/keys"))
    except ApiError:
        return replace(standing, may_run=_may_run(api)), None


def _may_run(api: ServerApi) -> bool | None:
    """Whether a request that runs nothing, since it names no model, is refused for what it is or for who asks."""
    try:
        api.post("/api/generate", {})
    except ApiError as error:
        return {403: False, 400: True, 404: True, 422: True}.get(error.code)
    return True
