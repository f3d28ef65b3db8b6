"""HTTP out to the open web: pages that an account asked the hub for, and the operator's search engine.

A page's address comes from a stranger, and this machine reaches what strangers must not: its own services, its network, the
address where a cloud keeps its machines' credentials. So every connection of a fetch is judged where it is made: the name is
resolved once, *all* its addresses must be public, and one of them is dialled. Redirects are followed by hand, each judged anew.
No proxy is used, since only the proxy would know what it connects to; nothing of ours travels; what comes is cut off at a size
and a time. Every failure to reach an address has the same words, so that nobody can map a network by them (security.md T98-T104).
"""

import asyncio
import codecs
import ipaddress
import re
import socket
import zlib
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, Final
from urllib.parse import urljoin

import aiohttp
import msgspec
from aiohttp.abc import AbstractResolver, ResolveResult
from yarl import URL

from corral.clients.reach import Reach, reach_of_address
from corral.core.web import FetchedPage
from corral.wire.errors import CorralError
from corral.wire.webpage import PageAddress, SearchResult, parse_page_address, plain_result

Network = ipaddress.IPv4Network | ipaddress.IPv6Network
MakeSocket = Callable[[Any], socket.socket]
LookUp = Callable[..., Sequence[tuple[Any, ...]]]

MAX_PAGE_BYTES: Final = 5 * 1024 * 1024
_MAX_REDIRECTS: Final = 5
_PAGE_TIME_S: Final = 15.0
_MAX_SEARCH_BYTES: Final = 4 * 1024 * 1024
_SEARCH_TIME_S: Final = 20.0
_PORTS: Final = frozenset({80, 443})
_LOOK_UPS_AT_ONCE: Final = 16
_CHARSET = re.compile(r"charset\s*=\s*[\"']?\s*([A-Za-z0-9_.:-]{1,40})", re.IGNORECASE)
#: The beginnings of Python's names for them. Not UTF-7, which no browser reads any more.
_PAGE_CHARSETS: Final = (
    "utf-8",
    "utf-16",
    "utf-32",
    "ascii",
    "iso8859",
    "cp",
    "koi8",
    "gb",
    "big5",
    "euc_",
    "shift_jis",
    "iso2022_jp",
    "mac",
    "tis",
)
#: So much is decoded at a time: no other thread runs meanwhile, and what cannot be decoded takes long.
_DECODED_BYTES: Final = 64 * 1024
_HEADERS: Final = {
    "Accept": "text/html,application/xhtml+xml,text/plain;q=0.9,application/json;q=0.8",
    "Accept-Encoding": "gzip, identity",
}
#: How each coding of a body is undone; the number is zlib's for the container.
_CODINGS: Final = {"": None, "identity": None, "gzip": 31, "x-gzip": 31, "deflate": 15}


class _Refused(OSError):
    """An address that may not be reached. An OSError, so that it takes the way of every other failure to connect."""


class NameThreads(AbstractResolver):
    """Looks names up in threads of its own. A stranger chooses the name, and with it a name server that never answers: whoever
    waits for that must not do so in the few threads that all else in this process shares. look_up: as socket.getaddrinfo."""

    def __init__(self, look_up: LookUp = socket.getaddrinfo) -> None:
        self._look_up = look_up
        self._threads = ThreadPoolExecutor(_LOOK_UPS_AT_ONCE, thread_name_prefix="corral-names")

    async def resolve(self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_UNSPEC) -> list[ResolveResult]:
        """All addresses. Raises: OSError."""
        look_up = partial(self._look_up, host, port, family=family, type=socket.SOCK_STREAM, flags=socket.AI_ADDRCONFIG)
        rows = await asyncio.get_running_loop().run_in_executor(self._threads, look_up)
        numeric = socket.AI_NUMERICHOST | socket.AI_NUMERICSERV
        return [
            ResolveResult(hostname=host, host=address[0], port=address[1], family=kind, proto=protocol, flags=numeric)
            for kind, _, protocol, _, address in rows
        ]

    async def close(self) -> None:
        """Wait for nothing: a look-up cannot be interrupted."""
        self._threads.shutdown(wait=False, cancel_futures=True)


class PublicResolver(AbstractResolver):
    """Resolves names for connections to the open web. allowed: internal networks that may be reached as well, on any port."""

    def __init__(self, allowed: Sequence[Network] = (), resolver: AbstractResolver | None = None) -> None:
        self._allowed = tuple(allowed)
        self._resolver = resolver or NameThreads()

    async def resolve(self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_UNSPEC) -> list[ResolveResult]:
        """The addresses, when all of them may be reached. Raises: OSError."""
        found = await self._resolver.resolve(host, port, family)
        for row in found:
            self.check(row["host"], port)
        return found

    async def close(self) -> None:
        """As the session ends."""
        await self._resolver.close()

    def check(self, address: str, port: int) -> None:
        """Judge one address. Raises: OSError."""
        reach = reach_of_address(address)
        # Link-local addresses have no server that anybody could mean, and the metadata of clouds.
        if reach is Reach.ODD:
            raise _Refused
        parsed = ipaddress.ip_address(address.partition("%")[0])
        if any(parsed in network for network in self._allowed):
            return
        if reach is not Reach.PUBLIC or port not in _PORTS:
            raise _Refused


def open_page_session(resolver: PublicResolver, *, make_socket: MakeSocket | None = None) -> aiohttp.ClientSession:
    """Connections to the open web. Make one inside the event loop and close it at the end. make_socket: makes each of them."""
    return aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(
            resolver=resolver, use_dns_cache=False, force_close=True, limit=64, socket_factory=make_socket
        ),
        cookie_jar=aiohttp.DummyCookieJar(),
        timeout=aiohttp.ClientTimeout(total=_PAGE_TIME_S),
        trust_env=False,
        auto_decompress=False,
        max_line_size=16 * 1024,
        max_field_size=16 * 1024,
    )


class PageClient:
    """A PageFetcher. session: see `open_page_session`, with the same resolver. user_agent: how pages know us."""

    def __init__(
        self, session: aiohttp.ClientSession, resolver: PublicResolver, *, user_agent: str, time_s: float = _PAGE_TIME_S
    ) -> None:
        self._session = session
        self._resolver = resolver
        self._headers = {**_HEADERS, "User-Agent": user_agent}
        self._time_s = time_s

    async def fetch(self, address: PageAddress) -> FetchedPage:
        """See PageFetcher."""
        try:
            async with asyncio.timeout(self._time_s):
                return await self._follow(address)
        except (aiohttp.ClientError, OSError, ValueError) as error:
            # TimeoutError is an OSError. One sentence for all: what differs would tell what is there.
            raise CorralError("upstream_failed", "the page could not be fetched") from error

    async def _follow(self, address: PageAddress) -> FetchedPage:
        for _ in range(_MAX_REDIRECTS + 1):
            self._check_literal(address)
            url = URL(str(address), encoded=True)
            async with self._session.get(url, headers=self._headers, allow_redirects=False) as response:
                location = response.headers.get("Location", "") if 300 <= response.status < 400 else ""
                if not location:
                    return await self._page(address, response)
            following = parse_page_address(urljoin(str(address), location))
            if address.scheme == "https" and following.scheme == "http":
                raise CorralError("upstream_failed", "the page leads from https to http, which is not followed")
            address = following
        raise CorralError("upstream_failed", "the page leads on and on")

    def _check_literal(self, address: PageAddress) -> None:
        """For a host that is an address no resolver is asked. Raises: OSError."""
        host = address.host.strip("[]")
        try:
            ipaddress.ip_address(host)
        except ValueError:
            return
        self._resolver.check(host, address.port)

    async def _page(self, address: PageAddress, response: aiohttp.ClientResponse) -> FetchedPage:
        if response.status != 200:
            raise CorralError("upstream_failed", f"the page answered {response.status}")
        kind = response.headers.get("Content-Type", "text/html")
        body = await _body_of(response)
        text = await asyncio.to_thread(_decoded, body, kind)
        return FetchedPage(address=address, media_type=kind.partition(";")[0].strip().lower(), text=text)


async def _body_of(response: aiohttp.ClientResponse) -> bytes:
    """The body without its coding, cut off at the limit: nothing unpacks beyond it. Raises: ValueError for another coding."""
    coding = response.headers.get("Content-Encoding", "").strip().lower()
    if coding not in _CODINGS:
        raise ValueError(coding)
    window = _CODINGS[coding]
    unpack = None if window is None else zlib.decompressobj(window)
    parts: list[bytes] = []
    room = room_packed = MAX_PAGE_BYTES
    async for data in response.content.iter_any():
        room_packed -= len(data)
        try:
            part = data[:room] if unpack is None else unpack.decompress(data, room)
        except zlib.error as error:
            raise ValueError(coding) from error
        parts.append(part)
        room -= len(part)
        # What unpacks to nothing is endless as well, and zlib keeps, copying it each time, what comes behind the end.
        if room <= 0 or room_packed <= 0 or (unpack is not None and unpack.eof):
            break
    return b"".join(parts)


def _decoded(body: bytes, content_type: str) -> str:
    """As the header says, else as the page's own head does, else UTF-8."""
    found = _CHARSET.search(content_type) or _CHARSET.search(body[:2048].decode("latin-1"))
    try:
        charset = codecs.lookup(found[1]).name if found else "utf-8"
    except LookupError:
        charset = "utf-8"
    # Others are for something else than pages, and some of them take a minute for a megabyte.
    charset = charset if charset.startswith(_PAGE_CHARSETS) else "utf-8"
    if charset in ("utf-16", "utf-32") and not body.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE, codecs.BOM_UTF32_BE)):
        charset += "-le"  # as browsers read what does not say; the decoder would give up
    decoder = codecs.getincrementaldecoder(charset)("replace")
    pieces = (body[at : at + _DECODED_BYTES] for at in range(0, len(body), _DECODED_BYTES))
    return "".join([*map(decoder.decode, pieces), decoder.decode(b"", final=True)])


def open_search_session() -> aiohttp.ClientSession:
    """Connections to the search engine. Make one inside the event loop and close it at the end."""
    return aiohttp.ClientSession(
        cookie_jar=aiohttp.DummyCookieJar(), timeout=aiohttp.ClientTimeout(total=_SEARCH_TIME_S), trust_env=False
    )


class SearxngClient:
    """A SearchEngine: the JSON of a SearXNG. url: of its search; chosen by the operator, so it may be anywhere."""

    def __init__(self, session: aiohttp.ClientSession, url: str, *, user_agent: str) -> None:
        self._session = session
        self._url = url
        self._headers = {"Accept": "application/json", "User-Agent": user_agent}

    async def search(self, query: str, count: int) -> list[SearchResult]:
        """See SearchEngine."""
        parameters = {"q": query, "format": "json"}
        try:
            async with self._session.get(self._url, params=parameters, headers=self._headers, allow_redirects=False) as response:
                status, body = response.status, await _bounded(response, _MAX_SEARCH_BYTES)
        except (aiohttp.ClientError, OSError) as error:
            raise CorralError("upstream_failed", "the search engine could not be reached") from error
        if status in (401, 403):
            text = "the search engine refuses answers in JSON; its administrator has to allow them (search.formats)"
            raise CorralError("upstream_failed", text)
        if status == 429:
            raise CorralError("rate_limited", "the search engine has had too many searches; try again later", retry_after_s=30)
        rows = _rows(body)
        if status != 200 or rows is None:
            raise CorralError("upstream_failed", "the search engine's answer is not understood")
        return [found for row in rows if (found := _result(row)) is not None][:count]


def _rows(body: bytes) -> list[Any] | None:
    try:
        value = msgspec.json.decode(body)
    except (msgspec.DecodeError, RecursionError, UnicodeDecodeError):
        return None
    rows = value.get("results") if isinstance(value, Mapping) else None
    return rows if isinstance(rows, list) else None


def _result(row: object) -> SearchResult | None:
    return plain_result(row.get("title"), row.get("url"), row.get("content")) if isinstance(row, Mapping) else None


async def _bounded(response: aiohttp.ClientResponse, limit_bytes: int) -> bytes:
    """Raises: OSError for an answer that is too long."""
    parts: list[bytes] = []
    size = 0
    async for data in response.content.iter_any():
        size += len(data)
        if size > limit_bytes:
            raise OSError("too long")
        parts.append(data)
    return b"".join(parts)
