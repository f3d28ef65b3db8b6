"""How far inside an address lies, so that a stranger's redirect cannot use this machine to reach what only it can reach.

A public registry may point to public addresses. One on a private network may point into private networks, one on this machine to
this machine as well. Link-local addresses, where clouds keep the credentials of their machines, are never pointed to. What counts
are the addresses a connection is really made to: names are judged when they are resolved for it, so a name that changes its mind
gains nothing (T93, T98).
"""

import contextlib
import ipaddress
import socket
from collections.abc import Iterator
from contextvars import ContextVar
from enum import IntEnum

from aiohttp.abc import AbstractResolver, ResolveResult
from aiohttp.resolver import ThreadedResolver

from corral.wire.errors import CorralError

#: Prefixes behind which an IPv4 address stands: NAT64, and two that nobody uses but everybody parses.
_EMBEDDING = tuple(map(ipaddress.ip_network, ("64:ff9b::/96", "::/96", "::ffff:0:0:0/96")))
#: All that was ever given out. Python takes more for public: site-local addresses, a network's own NAT64.
_PUBLIC_V6 = ipaddress.ip_network("2000::/3")
#: Public addresses, but inside Azure and Oracle's cloud those that hand out the machine's secrets.
_METADATA = frozenset(map(ipaddress.ip_address, ("168.63.129.16", "192.0.0.192")))


#: Names that nobody outside has: what a proxy makes of them lies inside.
_INNER_DOMAINS = frozenset({"local", "localhost", "internal", "intranet", "private", "corp", "home", "lan", "arpa", "onion"})


class Reach(IntEnum):
    """Where an address lies, or how far a connection may go: each includes those before it."""

    PUBLIC = 0
    PRIVATE = 1
    LOOPBACK = 2
    #: Link-local, multicast and whatever else is nobody's server.
    ODD = 3
    #: For the address that a person named.
    ANY = 4


def _meant_address(text: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address:
    """The address of an IP literal; the IPv4 address which an IPv6 one stands for. Raises: ValueError."""
    address = ipaddress.ip_address(text.partition("%")[0])
    if not isinstance(address, ipaddress.IPv6Address):
        return address
    inner = address.ipv4_mapped or address.sixtofour
    if inner is None and int(address) > 1 and any(address in network for network in _EMBEDDING):
        inner = ipaddress.IPv4Address(int(address) & 0xFFFFFFFF)
    return inner or address


def reach_of_address(text: str) -> Reach:
    """Where an IP literal lies; that of the IPv4 address which an IPv6 one stands for."""
    address = _meant_address(text)
    if address.is_loopback or address.is_unspecified:
        return Reach.LOOPBACK
    if address.is_link_local or address.is_multicast or address in _METADATA:
        return Reach.ODD
    is_given_out = address.version == 4 or address in _PUBLIC_V6
    return Reach.PUBLIC if address.is_global and is_given_out else Reach.PRIVATE


def is_loopback(host: str) -> bool:
    """Whether a host is this machine by its very name."""
    try:
        return reach_of_address(host) is Reach.LOOPBACK
    except ValueError:
        return host.lower() == "localhost"


_within: ContextVar[Reach] = ContextVar("_within", default=Reach.ANY)


class GuardedResolver(AbstractResolver):
    """Resolves names for connections, and refuses addresses beyond the reach that is set where the request is made."""

    def __init__(self, resolver: AbstractResolver | None = None) -> None:
        self._resolver = resolver or ThreadedResolver()

    async def resolve(self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_UNSPEC) -> list[ResolveResult]:
        """The addresses, all of them within reach. Raises: upstream_failed."""
        found = await self._resolver.resolve(host, port, family)
        for address in found:
            _check(address["host"], host)
        return found

    async def close(self) -> None:
        """As the session ends."""
        await self._resolver.close()

    async def reach_of(self, host: str, port: int) -> Reach:
        """How far a host may point: as far as the outermost of its addresses lies, since whoever says what a name means could
        claim any. One that lies nowhere may point to public addresses."""
        try:
            reach = reach_of_address(host)
        except ValueError:
            found = await self._resolver.resolve(host, port, socket.AF_UNSPEC)
            reach = min(reach_of_address(address["host"]) for address in found)
        return Reach.PUBLIC if reach is Reach.ODD else reach

    @contextlib.contextmanager
    def within(self, reach: Reach) -> Iterator[None]:
        """Connections that are made in the block go no further."""
        token = _within.set(reach)
        try:
            yield
        finally:
            _within.reset(token)

    def check_literal(self, host: str) -> None:
        """Judge a host that is an address already: for those no resolver is asked. Raises: upstream_failed."""
        with contextlib.suppress(ValueError):
            ipaddress.ip_address(host)
            _check(host, host)

    async def check(self, host: str, port: int, *, is_proxied: bool) -> None:
        """Judge a host before anything is sent to it: a kept connection asks no resolver, and a proxy asks its own. Raises:
        upstream_failed.

        Behind a proxy this machine may know inner names only, so one that it does not know passes if it could be anybody's. What
        the proxy then reaches still needs a certificate for that name, since only https goes by it.
        """
        self.check_literal(host)
        with contextlib.suppress(ValueError):
            ipaddress.ip_address(host)
            return
        *above, last = host.rstrip(".").lower().split(".")
        # 010.0.0.1 is 8.0.0.1 to some and 10.0.0.1 to others, so what it is here says nothing.
        if is_proxied and last[:1].isdigit():
            raise _refused(host)
        try:
            await self.resolve(host, port)
        except UnicodeError:
            raise CorralError("upstream_failed", "the registry points to a host whose name is none") from None
        except OSError:
            if is_proxied and (not above or last in _INNER_DOMAINS):
                raise _refused(host) from None


def _check(address: str, host: str) -> None:
    if reach_of_address(address) > _within.get():
        raise _refused(host)


def _refused(host: str) -> CorralError:
    return CorralError("upstream_failed", f"the registry points to {host}, an internal address, which is refused")
