"""Signed HTTP to a hub, for the CLI and for the local server's relay.

Every request carries one of two proofs (wire.signing, wire.strong). Which one a hub takes is asked once, by its discovery
document, and remembered. A hub that agreed on the strong form is never again talked to in the stock form: only `renegotiate`,
which a person starts by signing in, takes a weaker answer. A hub is signed for only over TLS or loopback.

Redirects are never followed and no cookie is kept: a signature goes to the configured hub or nowhere. A proxy that the person
configured sees no more than which hub it is: what is signed beyond this machine goes through TLS.
"""

import asyncio
import base64
import errno
import io
import platform
import ssl
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from types import SimpleNamespace
from typing import Final
from weakref import WeakSet

import aiohttp
from multidict import CIMultiDict
from yarl import URL

from corral.core.ports import Clock, DeviceKeys, Entropy, HubCall, HubMemory, HubReply, HubTerms
from corral.wire.discovery import (
    DISCOVERY_PATH,
    STOCK,
    STRONG,
    HubAddress,
    device_name_header,
    parse_discovery,
    parse_hub_address,
    refuse_local_server,
)
from corral.wire.errors import CorralError
from corral.wire.proxies import ProxyRules
from corral.wire.signing import (
    DevicePrivateKey,
    DevicePublicKey,
    authorization_header,
    enrollment_challenge,
    request_challenge,
    signed_target,
)
from corral.wire.strong import NONCE_BYTES, sign_headers

#: What of a small answer is read; what of an error is read (security.md 5, bounded reads of foreign answers).
_MAX_REPLY_BYTES: Final = 1024 * 1024
_MAX_ERROR_BYTES: Final = 64 * 1024
_CONNECT_TIMEOUT_S: Final = 10.0
_SMALL_BODY_BYTES: Final = 64 * 1024
_SMALL_CALL_TIMEOUT_S: Final = 30.0
#: A hub that refuses a strong signature is asked at most this often whether it still takes them.
_RECHECK_EVERY_NS: Final = 60 * 1_000_000_000
#: `Date` has whole seconds and the answer took its time, so smaller differences mean nothing.
_CLOCK_TOLERANCE_S: Final = 4.0
#: A clock further off than this is a fault to be mended, not to be worked around.
_MAX_CLOCK_OFFSET_S: Final = 300.0


@dataclass(slots=True)
class _Trace:
    is_reused: bool = False


def open_session() -> aiohttp.ClientSession:
    """The connections a process keeps to hubs. Make one inside the event loop and close it at the end."""

    async def note_reuse(_session: object, context: SimpleNamespace, _parameters: object) -> None:
        if isinstance(context.trace_request_ctx, _Trace):
            context.trace_request_ctx.is_reused = True

    tracing = aiohttp.TraceConfig()
    tracing.on_connection_reuseconn.append(note_reuse)
    return aiohttp.ClientSession(
        trace_configs=[tracing],
        connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=30),
        cookie_jar=aiohttp.DummyCookieJar(),
        timeout=aiohttp.ClientTimeout(total=None, sock_connect=_CONNECT_TIMEOUT_S),
        trust_env=False,
        # A relay passes bytes on as they are, and nothing here asks for a coded answer.
        auto_decompress=False,
        raise_for_status=False,
    )


class HubClient:
    """A `HubGateway` over HTTP. hub_url: asked for every request, so that a running server follows `corral signin --hub`.

    session: see `open_session`; the caller closes it. device_name: this machine's host name, sent so that a hub can name the
    device in the signin link it makes. version: ours, for User-Agent. proxies: by what a hub on another machine is reached.
    """

    def __init__(
        self,
        hub_url: Callable[[], str],
        keys: DeviceKeys,
        *,
        memory: HubMemory,
        clock: Clock,
        entropy: Entropy,
        session: aiohttp.ClientSession,
        device_name: str,
        version: str,
        proxies: ProxyRules | None = None,
    ) -> None:
        self._hub_url = hub_url
        self._proxies = proxies or ProxyRules()
        self._keys = keys
        self._memory = memory
        self._clock = clock
        self._entropy = entropy
        self._session = session
        self._own_headers = (
            device_name_header(device_name),
            # A coded stream would wait for full blocks.
            ("accept-encoding", "identity"),
        )
        self._user_agent = user_agent(version)
        self._negotiating = asyncio.Lock()
        self._clock_offset_s: dict[str, float] = {}
        self._rechecked_ns: dict[str, int] = {}
        self._open: WeakSet[HubResponse] = WeakSet()

    # ── What services and commands call ──────────────────────────────────────────────────────────────────────────────

    async def signin_base(self) -> str:
        """The hub's public URL, which signin links begin with."""
        return (await self._terms(self._address())).public_url

    def device_key(self) -> DevicePublicKey:
        """The public half of this installation's key. Raises: invalid."""
        return (self._keys.load() or self._keys.load_or_create()).public

    async def enrollment(self, credential_id: str) -> dict[str, str | int]:
        """The members of a request to add this device by a credential: `key`, `ts` and `signature`; see
        signing.enrollment_challenge. Raises: upstream_failed, invalid."""
        hub = self._address()
        key = self._keys.load() or self._keys.load_or_create()
        public_url = (await self._terms(hub)).public_url
        ts = int(self._clock.now().timestamp() + self._clock_offset_s.get(str(hub), 0.0))
        signature = base64.b64encode(key.sign(enrollment_challenge(public_url, credential_id, ts))).decode()
        return {"key": key.public.authorized_key, "ts": ts, "signature": signature}

    async def request(self, method: str, path: str, body: bytes = b"") -> tuple[int, dict[str, str], bytes]:
        """(status, headers by lower-case name, body) of a signed call. path: may hold a query. body: JSON."""
        target, _, query = path.partition("?")
        headers = (("content-type", "application/json"),) if body else ()
        reply = await self.send(HubCall(method=method, path=target, query=query, headers=headers, body=body))
        return reply.status, dict(reply.headers), reply.body

    async def send(self, call: HubCall) -> HubReply:
        """A signed call with a small answer. Raises: see HubGateway."""
        try:
            async with asyncio.timeout(_SMALL_CALL_TIMEOUT_S):
                stream = await self.open_stream(call)
                try:
                    limit = _MAX_REPLY_BYTES if stream.status < 400 else _MAX_ERROR_BYTES
                    return HubReply(status=stream.status, headers=stream.headers, body=await stream.read(limit))
                finally:
                    await stream.close()
        except TimeoutError as error:
            raise CorralError("upstream_failed", f"the hub {self._hub_url()} did not answer in time → is it running?") from error

    async def open_stream(self, call: HubCall) -> "HubResponse":
        """A signed call whose answer is read as it arrives. Raises: see HubGateway."""
        hub = self._address()
        key = self._keys.load() or self._keys.load_or_create()
        terms = await self._terms(hub)
        response = await self._attempt(hub, terms, key, call)
        if terms.signature == STOCK or response.status not in (401, 403):
            return response
        try:
            remedied = await self._remedy(hub, terms, response)
        except BaseException:
            await response.close()
            raise
        if remedied is None:
            return response
        await response.close()
        return await self._attempt(hub, remedied, key, call)

    async def renegotiate(self) -> tuple[HubTerms | None, HubTerms]:
        """Ask the hub anew which signature it takes and keep the answer, even a weaker one: what a person asks for by signing in.
        Returns (what was agreed before, what is agreed now), so that the person can be told."""
        hub = self._address()
        before = self._memory.terms(str(hub))
        now = await self._ask_terms(hub)
        if now != before:
            self._memory.keep_terms(str(hub), now)
        return before, now

    def abandon(self) -> None:
        """Break off every answer that is still arriving: whoever reads one gets upstream_failed. For the end of a server."""
        for response in tuple(self._open):
            response.abandon()

    # ── Terms ────────────────────────────────────────────────────────────────────────────────────────────────────────

    def _address(self) -> HubAddress:
        hub = parse_hub_address(self._hub_url())
        if not hub.is_private_line:
            raise CorralError(
                "forbidden",
                f"the hub {hub} would be reached over plain http, where others can read and reuse this device's signature; "
                "give its https address (corral signin --hub https://…)",
            )
        return hub

    async def _terms(self, hub: HubAddress) -> HubTerms:
        kept = self._memory.terms(str(hub))
        if kept is not None:
            return self._checked(hub, kept)
        async with self._negotiating:
            kept = self._memory.terms(str(hub))
            if kept is None:
                kept = await self._ask_terms(hub)
                self._memory.keep_terms(str(hub), kept)
            return kept

    def _checked(self, hub: HubAddress, terms: HubTerms) -> HubTerms:
        if terms.signature not in (STRONG, STOCK):
            raise CorralError(
                "forbidden",
                f"this device agreed with the hub {hub} on the signature {terms.signature}, which this version of corral "
                "does not know; update corral, or run `corral signin` again",
            )
        if not parse_hub_address(terms.public_url).is_same_place(hub):
            raise CorralError("invalid", f"~/.ollama/corral.json gives the hub {hub} another address; run `corral signin` again")
        return terms

    async def _ask_terms(self, hub: HubAddress) -> HubTerms:
        """What the hub offers now. Raises: upstream_failed, invalid."""
        url = URL(f"{hub}{DISCOVERY_PATH}", encoded=True)
        timeout = aiohttp.ClientTimeout(total=_SMALL_CALL_TIMEOUT_S, sock_connect=_CONNECT_TIMEOUT_S)
        headers = {"User-Agent": self._user_agent, "Accept": "application/json", "Accept-Encoding": "identity"}
        try:
            proxy = self._proxies.proxy_of(str(hub))
            async with self._session.get(url, headers=headers, timeout=timeout, allow_redirects=False, proxy=proxy) as reply:
                body = await _read_bounded(reply, _MAX_ERROR_BYTES)
                status, date = reply.status, reply.headers.get("Date", "")
        except (aiohttp.ClientError, OSError) as error:
            raise _unreachable(hub, error) from error
        if status >= 500 or status in (401, 403, 407, 408, 429):
            raise CorralError("upstream_failed", f"the hub {hub} answered {status} when asked how to sign; try again later")
        public_url = parse_discovery(body, hub) if status == 200 else None
        if public_url is None:
            if status == 200:
                refuse_local_server(body, hub)
            return HubTerms(signature=STOCK, public_url=str(hub))
        self._set_clock(hub, date)
        return HubTerms(signature=STRONG, public_url=public_url)

    async def _remedy(self, hub: HubAddress, terms: HubTerms, response: "HubResponse") -> HubTerms | None:
        """Why a strong signature may have been refused, other than that the device is not connected: terms to try again with, or
        None. Raises: clock_skew, forbidden."""
        used = self._clock_offset_s.get(str(hub), 0.0)
        self._set_clock(hub, response.header("date"))
        if self._clock_offset_s.get(str(hub), 0.0) != used:
            return terms
        now = self._clock.monotonic_ns()
        if now - self._rechecked_ns.get(str(hub), now - _RECHECK_EVERY_NS) < _RECHECK_EVERY_NS:
            return None
        self._rechecked_ns[str(hub)] = now
        offered = await self._ask_terms(hub)
        if offered.signature != STRONG:
            raise CorralError(
                "forbidden",
                f"the hub {hub} agreed on the stronger signature and no longer takes it; "
                "if that is meant to be, run `corral signin` again",
            )
        if offered == terms:
            return None
        self._memory.keep_terms(str(hub), offered)
        return offered

    def _set_clock(self, hub: HubAddress, date: str) -> None:
        """Sign by the hub's clock from now on: a strong signature lives for a minute only. Raises: clock_skew."""
        offset = _clock_offset_s(date, self._clock.now())
        if abs(offset) > _MAX_CLOCK_OFFSET_S:
            where = "behind" if offset > 0 else "ahead of"
            raise CorralError(
                "clock_skew", f"this machine's clock is {abs(offset):.0f} s {where} the hub's; set it right and try again"
            )
        known = self._clock_offset_s.get(str(hub), 0.0)
        if abs(offset - known) > _CLOCK_TOLERANCE_S:
            self._clock_offset_s[str(hub)] = offset if abs(offset) > _CLOCK_TOLERANCE_S else 0.0

    # ── One request ──────────────────────────────────────────────────────────────────────────────────────────────────

    async def _attempt(self, hub: HubAddress, terms: HubTerms, key: DevicePrivateKey, call: HubCall) -> "HubResponse":
        trace = _Trace()
        try:
            try:
                return await self._send_signed(hub, terms, key, call, trace)
            except aiohttp.ServerDisconnectedError:
                # A new connection that breaks may have carried the request; a kept one that did was closed before, so ask again.
                if not trace.is_reused:
                    raise
                return await self._send_signed(hub, terms, key, call, trace)
        except (aiohttp.ClientError, OSError) as error:
            raise _unreachable(hub, error) from error

    async def _send_signed(
        self, hub: HubAddress, terms: HubTerms, key: DevicePrivateKey, call: HubCall, trace: _Trace
    ) -> "HubResponse":
        headers = CIMultiDict([*call.headers, *self._own_headers])
        headers.setdefault("user-agent", self._user_agent)
        now = self._clock.now().timestamp()
        if terms.signature == STRONG:
            target = f"{call.path}?{call.query}" if call.query else call.path
            signed = {name: value for name, value in headers.items() if name == "content-type"}
            now += self._clock_offset_s.get(str(hub), 0.0)
            nonce = self._entropy.bytes(NONCE_BYTES)
            url = terms.public_url + target
            headers.update(sign_headers(key, call.method, url, signed, body=call.body, now=now, nonce=nonce))
        else:
            target = signed_target(call.path, call.query, int(now))
            headers["authorization"] = authorization_header(key, request_challenge(call.method, target))
        response = await self._session.request(
            call.method,
            URL(f"{hub}{target}", encoded=True),
            data=_sendable(call.body),
            headers=headers,
            allow_redirects=False,
            proxy=self._proxies.proxy_of(str(hub)),
            skip_auto_headers=("Accept", "Content-Type"),
            trace_request_ctx=trace,
        )
        answer = HubResponse(hub, response)
        self._open.add(answer)
        return answer


def _sendable(body: bytes) -> bytes | io.BytesIO | None:
    """A small body leaves in one packet with the head. Larger bytes aiohttp would write in one go, and warn; a BytesIO it reads
    piecewise."""
    return (body or None) if len(body) <= _SMALL_BODY_BYTES else io.BytesIO(body)


class HubResponse:
    """A `HubStream` over an aiohttp response."""

    def __init__(self, hub: HubAddress, response: aiohttp.ClientResponse) -> None:
        self._hub = hub
        self._response = response

    @property
    def status(self) -> int:
        """As the hub sent it."""
        return self._response.status

    @property
    def headers(self) -> Sequence[tuple[str, str]]:
        """As the hub sent them, names in lower case."""
        return [(name.lower(), value) for name, value in self._response.headers.items()]

    def header(self, name: str) -> str:
        """One header's first value, or empty."""
        return self._response.headers.get(name, "")

    async def chunks(self) -> AsyncIterator[bytes]:
        """What arrived, as it arrived. Raises: upstream_failed when the hub stops early."""
        try:
            async for chunk in self._response.content.iter_any():
                yield chunk
        except (aiohttp.ClientError, OSError) as error:
            raise CorralError("upstream_failed", f"the hub {self._hub} stopped before its answer was complete") from error

    async def read(self, limit_bytes: int) -> bytes:
        """The body, cut off at the limit. Raises: upstream_failed."""
        try:
            return await _read_bounded(self._response, limit_bytes)
        except (aiohttp.ClientError, OSError) as error:
            raise CorralError("upstream_failed", f"the hub {self._hub} stopped before its answer was complete") from error

    def abandon(self) -> None:
        """End the connection under a reader. aiohttp alone would leave the reader waiting for ever."""
        self._response.content.set_exception(aiohttp.ClientConnectionError("abandoned"))
        self._response.close()

    async def close(self) -> None:
        """Give the connection back when the body was read, end it otherwise, so that the hub sees its caller leave."""
        if self._response.content.at_eof():
            self._response.release()
        else:
            self._response.close()


def user_agent(version: str) -> str:
    """How our clients call themselves."""
    return f"corral/{version} ({platform.machine()} {platform.system().lower()}) Python/{platform.python_version()}"


async def _read_bounded(response: aiohttp.ClientResponse, limit_bytes: int) -> bytes:
    parts: list[bytes] = []
    size = 0
    async for chunk in response.content.iter_any():
        parts.append(chunk[: limit_bytes - size])
        size += len(parts[-1])
        if size >= limit_bytes:
            break
    return b"".join(parts)


def _clock_offset_s(date: str, now: datetime) -> float:
    """How far `now` is behind a `Date` header; 0 when the header says nothing."""
    try:
        theirs = parsedate_to_datetime(date)
    except ValueError:
        return 0.0
    return (theirs.replace(tzinfo=theirs.tzinfo or UTC) - now).total_seconds()


def _unreachable(hub: HubAddress, error: Exception) -> CorralError:
    return CorralError("upstream_failed", f"could not reach the hub {hub}: {reason_of(error)}")


def reason_of(error: Exception) -> str:
    """Why a connection failed and what to do, in a few words. The library's own texts repeat addresses and internals."""
    match error:
        # The first is a kind of the errors below.
        case aiohttp.ClientProxyConnectionError() | aiohttp.ClientHttpProxyError():
            return "the proxy did not let it through → check HTTPS_PROXY and NO_PROXY"
        case aiohttp.ClientConnectorDNSError():
            return "its host name is not known → check the address, or the network"
        case aiohttp.ClientConnectorCertificateError() | aiohttp.ClientSSLError() | ssl.SSLError():
            # Of two processes, the one that says this is the one whose environment counts.
            return (
                "its TLS certificate or handshake was not accepted → check the address; an authority of your own goes into "
                "SSL_CERT_FILE, for the local server too (start it anew)"
            )
        case aiohttp.ServerDisconnectedError():
            return "it closed the connection without an answer → look at its log"
        case TimeoutError() | aiohttp.ServerTimeoutError():
            return "it did not answer in time → is it running?"
        case OSError(errno=errno.ECONNREFUSED):
            return "connection refused → is it running?"
        case OSError(strerror=str(text)) if text:
            return f"{text.lower()} → is it running?"
        case _:
            return "its answer was not understood → is that address a hub's?"
