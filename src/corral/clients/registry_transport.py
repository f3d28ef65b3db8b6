"""Requests to registries that nobody vouches for: tokens, redirects, bounds.

Theory of operation. A request first goes without credentials. A 401 with a Bearer challenge is answered with a token: for
reading, an anonymous one; when that does not help, one that this device signs for. A signature goes to the registry itself or
nowhere (T92): the realm must have the very scheme, host and port of the registry. Asking as nobody proves nothing: an anonymous
token may come from another host, by https, as those of Docker Hub do. A token goes to the registry's origin only, whatever
redirects say; and neither a redirect nor a realm may lead further inside than the registry itself is (T93). Every answer is
bounded, and none may be coded.
Source: registry.md 1.1 and 3; ollama server/{auth,images}.go, fb30760.
"""

import asyncio
import base64
import contextlib
import json
import re
from collections import OrderedDict
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Final
from urllib.parse import urljoin, urlsplit

import aiohttp
from yarl import URL

from corral.clients.hub import reason_of
from corral.clients.reach import GuardedResolver, Reach, is_loopback
from corral.core.ports import Clock, DeviceKeys, Entropy
from corral.core.transfer_ports import RemoteRepository
from corral.wire.discovery import HubAddress, device_name_header, origin_of
from corral.wire.errors import CorralError
from corral.wire.proxies import ProxyRules
from corral.wire.registry import Challenge, parse_challenge, token_request_url
from corral.wire.signing import authorization_header, token_challenge

MAX_ERROR_BYTES: Final = 64 * 1024
_MAX_TOKEN_BYTES: Final = 64 * 1024
_MAX_REDIRECTS: Final = 5
#: Repositories whose tokens are kept for the next request.
_MAX_STANDINGS: Final = 1000
_CONNECT_TIMEOUT_S: Final = 10.0
#: For a small answer from its first byte to its last: a drip must not hold a pull for ever.
_SMALL_ANSWER_S: Final = 60.0
#: What a registry may take to answer once it has all bytes: it may be syncing a gigabyte.
_SYNC_TIMEOUT_S: Final = 300.0
_REDIRECTS: Final = frozenset({301, 302, 303, 307, 308})
_TOKEN: Final = re.compile(r"[\x21-\x7e]{1,65536}")


class Trouble(Exception):
    """Something that may go away by itself: a broken connection, a stall, a server in need. wait_s: what the server asked for."""

    def __init__(self, reason: str, wait_s: float = 0.0) -> None:
        self.reason = reason
        self.wait_s = wait_s
        super().__init__(reason)


class Unreachable(Trouble):
    """Nobody was there to be asked: the host's name is not known, nothing listens, its certificate is another's."""


class _Proof(IntEnum):
    """How a token was come by."""

    NONE = 0
    ANONYMOUS = 1
    SIGNED = 2


@dataclass(slots=True)
class _Standing:
    """What is known of this client's rights in one repository."""

    token: str = ""
    proof: _Proof = _Proof.NONE
    challenge: Challenge | None = None
    lock: asyncio.Lock = field(default_factory=asyncio.Lock)


@dataclass(frozen=True, slots=True, kw_only=True)
class Call:
    """A request. url: absolute. body: made anew for every attempt; length: its bytes. writes: whether it is part of a push, which
    nobody does anonymously. follows: whether redirects are."""

    repository: RemoteRepository
    method: str
    url: str
    headers: Mapping[str, str] = field(default_factory=dict)
    body: Callable[[], AsyncIterator[bytes]] | None = None
    length: int = 0
    writes: bool = False
    follows: bool = True


def open_registry_session(resolver: GuardedResolver) -> aiohttp.ClientSession:
    """The connections a process keeps to registries. Make one inside the event loop and close it at the end."""
    return aiohttp.ClientSession(
        # Without a cache of names: the resolver has to judge the addresses of every connection.
        connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=30, resolver=resolver, use_dns_cache=False),
        cookie_jar=aiohttp.DummyCookieJar(),
        timeout=aiohttp.ClientTimeout(total=None, sock_connect=_CONNECT_TIMEOUT_S),
        trust_env=False,
        auto_decompress=False,
        raise_for_status=False,
        read_bufsize=1 << 20,
    )


class RegistryTransport:
    """Sends `Call`s. keys: of this device; None for a client that never proves who it is. stall_s: how long an answer
    may pause. device_name: this machine's host name, told to whom it pushes, so that whoever connects it there knows it again.
    proxies: by what https is spoken; http never goes by one, since then nothing would prove who is behind it."""

    def __init__(
        self,
        session: aiohttp.ClientSession,
        resolver: GuardedResolver,
        *,
        keys: DeviceKeys | None,
        clock: Clock,
        entropy: Entropy,
        user_agent: str,
        device_name: str = "",
        stall_s: float = 30.0,
        proxies: ProxyRules | None = None,
    ) -> None:
        self._session = session
        self._resolver = resolver
        self._keys = keys
        self._clock = clock
        self._entropy = entropy
        self._user_agent = user_agent
        self._name_headers = [device_name_header(device_name)] if device_name else []
        self._stall_s = stall_s
        self._proxies = proxies or ProxyRules()
        self._standings: OrderedDict[tuple[str, str], _Standing] = OrderedDict()

    @contextlib.asynccontextmanager
    async def answer(self, call: Call) -> AsyncIterator[aiohttp.ClientResponse]:
        """The answer to a call, whatever its status, with the best proof there is. Raises: Trouble; upstream_failed for a
        registry that misbehaves."""
        response = await self._authorized(call)
        try:
            # What is found out while the answer is read is trouble of the same kind.
            with _trouble():
                yield response
        finally:
            if response.content.at_eof():
                response.release()
            else:
                response.close()

    async def read(self, response: aiohttp.ClientResponse, limit_bytes: int, *, what: str) -> bytes:
        """A small body. Raises: too_large beyond the limit, also when that is only announced; Trouble."""
        parts, size = [], 0
        if (response.content_length or 0) > limit_bytes:
            raise CorralError("too_large", f"the registry's {what} is longer than {limit_bytes} bytes")
        with _trouble():
            async with asyncio.timeout(_SMALL_ANSWER_S):
                async for chunk in response.content.iter_any():
                    size += len(chunk)
                    if size > limit_bytes:
                        raise CorralError("too_large", f"the registry's {what} is longer than {limit_bytes} bytes")
                    parts.append(chunk)
        return b"".join(parts)

    async def refusal(self, response: aiohttp.ClientResponse) -> CorralError:
        """The error that an answer of 400 or more is, in the words that Ollama has for it."""
        status = response.status
        if status == 404:
            return CorralError("not_found", "file does not exist")
        if status == 401:
            return CorralError("unauthorized", "unauthorized: access denied")
        try:
            body = (await self.read(response, MAX_ERROR_BYTES, what="error")).decode(errors="replace")
        except (Trouble, CorralError):
            body = response.reason or ""
        code = {403: "forbidden", 413: "too_large", 429: "rate_limited"}.get(status, "upstream_failed")
        return CorralError(code, f"{status}: {body.strip()}")

    # ── Tokens ───────────────────────────────────────────────────────────────────────────────────────────────────────

    async def _authorized(self, call: Call) -> aiohttp.ClientResponse:
        standing = self._standing(call.repository)
        tried: set[_Proof] = set()
        while True:
            token = standing.token
            response = await self._followed(call, token)
            if response.status not in (401, 403, 404):
                return response
            try:
                may_help = await self._better_token(call, standing, response, token, tried)
            except BaseException:
                response.close()
                raise
            if not may_help:
                return response
            response.close()

    def _standing(self, repository: RemoteRepository) -> _Standing:
        key = (repository.base_url, repository.path)
        standing = self._standings.setdefault(key, _Standing())
        self._standings.move_to_end(key)
        # A hub that mirrors is asked for any names by anybody, for months.
        if len(self._standings) > _MAX_STANDINGS:
            self._standings.popitem(last=False)
        return standing

    async def _better_token(
        self, call: Call, standing: _Standing, response: aiohttp.ClientResponse, used: str, tried: set[_Proof]
    ) -> bool:
        """Whether there is another token now. tried: the proofs asked for during this call; each is, once."""
        async with standing.lock:
            if response.status == 401 and not _is_from(response, call.repository):
                return False
            if response.status == 401:
                standing.challenge = _challenge_of(response)
            elif standing.proof is not _Proof.ANONYMOUS or call.writes:
                # Who proved who they are, and may not, is not asked again. A stranger may have been told 404 for what is private.
                return False
            if standing.token != used:
                return True
            wanted = [_Proof.SIGNED] if call.writes or response.status != 401 else [_Proof.ANONYMOUS, _Proof.SIGNED]
            for proof in wanted:
                if proof in tried or proof < standing.proof or (proof is _Proof.SIGNED and self._keys is None):
                    continue
                if proof is _Proof.SIGNED and not call.writes and _is_elsewhere(standing.challenge, call.repository):
                    # There is only an anonymous token to be had, and that was tried.
                    continue
                tried.add(proof)
                token = await self._token(call.repository, standing.challenge, proof)
                if token is not None:
                    standing.token, standing.proof = token, proof
                    return True
            return False

    async def _token(self, repository: RemoteRepository, challenge: Challenge | None, proof: _Proof) -> str | None:
        """A token of that proof; None when the registry gives strangers none. Raises: upstream_failed, forbidden."""
        assert challenge is not None
        reach = await self._reach_of_realm(challenge, repository, proof)
        nonce = base64.urlsafe_b64encode(self._entropy.bytes(16)).decode().rstrip("=")
        url = token_request_url(challenge, ts=int(self._clock.now().timestamp()), nonce=nonce)
        headers = {}
        if proof is _Proof.SIGNED:
            assert self._keys is not None
            key = self._keys.load() or self._keys.load_or_create()
            target = url.removeprefix(repository.base_url)
            headers["Authorization"] = authorization_header(key, token_challenge(repository.base_url, target))
        with _trouble():
            response = await self._send("GET", url, headers, self._stall_s, reach=reach)
            async with response:
                if response.status == 200:
                    return _token_in(await self.read(response, _MAX_TOKEN_BYTES, what="token"))
                if proof is _Proof.ANONYMOUS and response.status < 500:
                    return None
                raise await self.refusal(response)

    async def _reach_of_realm(self, challenge: Challenge, repository: RemoteRepository, proof: _Proof) -> Reach:
        """How far a request for a token may go. Raises: upstream_failed where none may be made."""
        if not _is_elsewhere(challenge, repository):
            return Reach.ANY
        # Whoever gets a signature for another registry's token can use it there (CVE-2025-51471).
        if proof is _Proof.SIGNED or urlsplit(challenge.realm).scheme != "https":
            raise CorralError(
                "upstream_failed", f"the registry {repository.base_url} sends for a token to another place, which is refused"
            )
        home = _origin(repository.base_url)
        with _trouble():
            # What answers on this machine by https is nobody's token service.
            return min(await self._reach_of(home), Reach.PRIVATE)

    async def _reach_of(self, home: HubAddress) -> Reach:
        """How far a registry may point. Behind a proxy its name need not be known here; then it is a public one."""
        try:
            return await self._resolver.reach_of(home.host, home.port)
        except OSError:
            if self._proxy_of(str(home)) is None:
                raise
            return Reach.PUBLIC

    def _proxy_of(self, url: str) -> str | None:
        return self._proxies.proxy_of(url) if url.startswith("https://") else None

    # ── One request ──────────────────────────────────────────────────────────────────────────────────────────────────

    async def _followed(self, call: Call, token: str) -> aiohttp.ClientResponse:
        url = call.url
        for _ in range(_MAX_REDIRECTS + 1):
            response = await self._attempt(call, url, token)
            target = _redirect_of(response) if call.follows and call.method in ("GET", "HEAD") else None
            if target is None:
                return response
            response.close()
            url = joined(url, target)
        raise CorralError("upstream_failed", f"the registry {call.repository.base_url} redirects without end")

    async def _attempt(self, call: Call, url: str, token: str) -> aiohttp.ClientResponse:
        home, place = _origin(call.repository.base_url), _origin(url)
        headers = dict(call.headers)
        if place == home:
            if token:
                headers["Authorization"] = f"Bearer {token}"
            if call.writes:
                # A refused push is answered with a link, which somebody opens elsewhere; nobody else needs the name.
                headers.update(self._name_headers)
            reach = Reach.ANY
        else:
            if home.scheme == "https" and place.scheme != "https":
                raise CorralError("upstream_failed", f"the registry {home} redirects from https to {place.scheme}")
            reach = await self._reach_of(home)
        if call.body is not None or call.method in ("PUT", "PATCH", "POST"):
            headers["Content-Length"] = str(call.length)
        body = call.body() if call.body is not None and call.length else None
        timeout_s = _SYNC_TIMEOUT_S if call.writes else self._stall_s
        try:
            with _trouble():
                response = await self._send(call.method, url, headers, timeout_s, body, reach=reach)
        except Unreachable as trouble:
            if place == home:
                raise
            raise _astray(home, place, trouble) from trouble
        coding = response.headers.get("Content-Encoding", "identity").strip().lower()
        if coding not in ("", "identity"):
            response.close()
            raise CorralError("upstream_failed", f"the registry {home} answers in a coding that was not asked for")
        return response

    async def _send(
        self,
        method: str,
        url: str,
        headers: Mapping[str, str],
        timeout_s: float,
        body: AsyncIterator[bytes] | None = None,
        *,
        reach: Reach,
    ) -> aiohttp.ClientResponse:
        place, proxy = _origin(url), self._proxy_of(url)
        if reach is not Reach.ANY:
            with self._resolver.within(reach):
                await self._resolver.check(place.host, place.port, is_proxied=proxy is not None)
        # What is connected to is then the proxy alone, which whoever runs this named, wherever it is.
        with self._resolver.within(reach if proxy is None else Reach.ANY):
            return await self._session.request(
                method,
                URL(url, encoded=True),
                data=body,
                headers={"User-Agent": self._user_agent, "Accept-Encoding": "identity", **headers},
                allow_redirects=False,
                proxy=proxy,
                skip_auto_headers=("Accept", "Content-Type"),
                timeout=aiohttp.ClientTimeout(total=None, sock_connect=_CONNECT_TIMEOUT_S, sock_read=timeout_s),
            )


@contextlib.contextmanager
def _trouble() -> Iterator[None]:
    """Whatever may go wrong with a connection, as trouble."""
    try:
        yield
    except aiohttp.ClientConnectorError as error:
        raise Unreachable(reason_of(error)) from error
    except (aiohttp.ClientError, OSError, TimeoutError) as error:
        raise Trouble(reason_of(error)) from error


def _astray(home: HubAddress, place: HubAddress, trouble: Unreachable) -> Exception:
    """What became of a request that the registry sent to a place where nobody is. On this machine nothing lies between that may
    recover, so that is told of at once; anywhere else it is tried again."""
    text = f"the registry {home} sends this client on to {place}, which could not be reached: {trouble.reason}"
    return CorralError("upstream_failed", text) if is_loopback(place.host) else Trouble(text)


def joined(url: str, target: str) -> str:
    """Where a Location leads. Raises: upstream_failed."""
    try:
        return urljoin(url, target)
    except ValueError as error:
        raise CorralError("upstream_failed", "the registry names an address that is none") from error


def _origin(url: str) -> HubAddress:
    origin = origin_of(url)
    if origin is None:
        raise CorralError("upstream_failed", "the registry names an address that is no plain http or https URL")
    return origin


def _is_from(response: aiohttp.ClientResponse, repository: RemoteRepository) -> bool:
    """Whether the registry itself answered, not a place that it redirected to."""
    return origin_of(str(response.url)) == origin_of(repository.base_url)


def _challenge_of(response: aiohttp.ClientResponse) -> Challenge:
    # Only the first: readers that pick different ones of several would be told different things.
    return parse_challenge(response.headers.get("WWW-Authenticate", ""))


def _is_elsewhere(challenge: Challenge | None, repository: RemoteRepository) -> bool:
    """Whether tokens are to be had at another origin than the registry's own, compared as text."""
    if challenge is None:
        return False
    realm, home = urlsplit(challenge.realm), urlsplit(repository.base_url)
    return (realm.scheme, realm.netloc) != (home.scheme, home.netloc)


def _token_in(body: bytes) -> str:
    try:
        answer = json.loads(body)
    except (ValueError, RecursionError):
        answer = None
    token = (answer.get("token") or answer.get("access_token")) if isinstance(answer, dict) else None
    if not isinstance(token, str) or not _TOKEN.fullmatch(token):
        raise CorralError("upstream_failed", "the registry's token is none")
    return token


def _redirect_of(response: aiohttp.ClientResponse) -> str | None:
    """Where an answer points to, None when it is one. A 200 with a Location, as Ollama wants it, is an answer too."""
    if response.status not in _REDIRECTS:
        return None
    location = response.headers.get("Location")
    if not location:
        response.close()
        raise CorralError("upstream_failed", "the registry redirects to nowhere")
    return location
