"""What a line of `authorized_keys` lets its holder do at a secured local server. Pure: every rule is a row of a test table.

A caller of None is nobody who had to prove anything: any caller of a server that is not secured, or a program on the machine
itself. Such a caller may do everything, as with Ollama.
"""

import hmac
import ipaddress
from collections.abc import Sequence
from datetime import UTC, datetime
from fnmatch import fnmatchcase

from corral.core.records import Model, Principal
from corral.wire.authorized_keys import AuthorizedKey, AuthorizedKeys, Right
from corral.wire.errors import CorralError
from corral.wire.names import ModelName
from corral.wire.signing import DevicePublicKey

#: Headers by which a proxy says that it passes a request on for somebody else. Many names, since one that is missing here makes a
#: stranger look like a program of this machine.
_FORWARDING = frozenset({"via", "x-cluster-client-ip", "x-envoy-external-address", "x-real-ip", "x-remote-addr", "x-remote-ip"})
_FORWARDING_PREFIXES = ("cf-", "fly-", "ngrok-", "tailscale-", "x-original-", "x-proxy")
#: Of the names that each vendor has for the one address.
_FORWARDING_PARTS = ("forwarded", "client-ip", "clientip", "user-ip", "connecting-ip", "connection-ip")


# ── Who is let in ────────────────────────────────────────────────────────────────────────────────────────────────────


def comes_from_here(network: str, headers: dict[str, list[str]]) -> bool:
    """Whether a program of this machine sends a request for itself. network: the address that the connection comes from. What a
    proxy on this machine passes on for others comes from loopback, too; one that says so is not taken for its neighbours."""
    if any(_tells_of_forwarding(name.replace("_", "-")) for name in headers):
        return False
    address = _address(network)
    return address is not None and address.is_loopback


def _tells_of_forwarding(name: str) -> bool:
    is_known = name in _FORWARDING or name.startswith(_FORWARDING_PREFIXES)
    return is_known or any(part in name for part in _FORWARDING_PARTS)


def lines_of_device(keys: AuthorizedKeys, key: DevicePublicKey) -> Sequence[AuthorizedKey]:
    """The lines with this key, whether or not their terms fit."""
    return [entry for entry in keys.entries if entry.key == key]


def lines_of_digest(keys: AuthorizedKeys, digest: bytes) -> Sequence[AuthorizedKey]:
    """The lines of an API key, whether or not their terms fit. All are compared, each in constant time (T56)."""
    return [entry for entry in keys.entries if hmac.compare_digest(entry.digest, digest)]


def why_not_in_force(entry: AuthorizedKey, *, network: str, now: datetime) -> str:
    """What keeps the line from counting now, for a caller from there; empty when it counts."""
    terms = entry.terms
    if terms.expires_at is not None and now >= terms.expires_at:
        return f"expired at {terms.expires_at.astimezone(UTC):%Y-%m-%d %H:%M} UTC"
    address = _address(network)
    if terms.networks and (address is None or not any(address in allowed for allowed in terms.networks)):
        return f"counts only from {', '.join(map(str, terms.networks))}"
    return ""


def _address(text: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    """An IPv4 address that came over a socket of IPv6 as what it is."""
    try:
        address = ipaddress.ip_address(text.partition("%")[0])
    except ValueError:
        return None
    return getattr(address, "ipv4_mapped", None) or address


# ── What they may do ─────────────────────────────────────────────────────────────────────────────────────────────────


def check_right(caller: Principal, right: Right) -> None:
    """Raises: forbidden, with what the line lacks."""
    if caller.authorized is None or not caller.authorized.terms.right.covers(right):
        raise CorralError("forbidden", f"this key may not do that here: it takes rights={right} in the server's authorized_keys")


def may_use_cloud(caller: Principal | None) -> bool:
    """Whether the caller may act as this machine's account at its hub: whoever pays for that account says so in the line."""
    if caller is None:
        return True
    terms = caller.authorized.terms if caller.authorized else None
    return terms is not None and (terms.has_cloud or terms.right is Right.MANAGE)


def check_cloud(caller: Principal | None) -> None:
    """Raises: forbidden."""
    if not may_use_cloud(caller):
        raise CorralError("forbidden", "this key may not use hosted models here: it takes cloud in the server's authorized_keys")


def may_use_model(caller: Principal | None, name: ModelName) -> bool:
    """Whether the caller may know of a model. Names compare as listings show them, without regard to case; a pattern without a
    tag stands for every tag, and `*` for nothing that holds a slash."""
    if caller is None:
        return True
    terms = caller.authorized.terms if caller.authorized else None
    if terms is None or terms.right is Right.MANAGE or not terms.models:
        return terms is not None
    return any(_matches(pattern, name.key.short) for pattern in terms.models)


def may_know_model(caller: Principal | None, model: Model) -> bool:
    """Whether the caller is told of a model that is installed; to others it is absent, in the same words. A stub is for those
    with `cloud`: for nobody else it runs, and it tells of this machine's hub and what its account has there."""
    return may_use_model(caller, model.name) and (not model.is_stub or may_use_cloud(caller))


def _matches(pattern: str, short: str) -> bool:
    if ":" not in pattern.rpartition("/")[2]:
        pattern += ":*"
    wanted, parts = pattern.split("/"), short.split("/")
    return len(wanted) == len(parts) and all(map(fnmatchcase, parts, wanted))
