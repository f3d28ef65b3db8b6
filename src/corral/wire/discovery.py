"""Where a hub is, and what it says about itself: addresses, their origins, and the discovery document of a Corral hub.

A strong signature covers the URL that the hub announces as its public one. A dishonest hub could announce another hub's URL and
pass the signatures on to it (security.md W6), so an announced URL counts only when it is the address the person chose, give or
take the spelling of loopback.
"""

import ipaddress
import re
from dataclasses import dataclass
from typing import Final
from urllib.parse import urlsplit

import msgspec

from corral.wire.errors import CorralError
from corral.wire.hostnames import is_lookable
from corral.wire.strong import TAG

#: The level of Ollama's API that we speak. Clients compare it with the version they need, so it is what `/api/version` says.
OLLAMA_VERSION: Final = "0.34.0"
DISCOVERY_PATH: Final = "/.well-known/corral"
#: Optional header of a device's request: what it calls itself. Never verified, only shown on the page that connects it.
DEVICE_NAME_HEADER: Final = "corral-device-name"
#: How a request to a hub is signed.
STRONG: Final = TAG
STOCK: Final = "stock"
_DEFAULT_PORTS = {"http": 80, "https": 443}


def device_name_header(name: str) -> tuple[str, str]:
    """The header, with so much of a machine's name as a header may hold."""
    return DEVICE_NAME_HEADER, re.sub(r"[^ -~]+", "-", name).strip()[:100] or "device"


@dataclass(frozen=True, slots=True)
class HubAddress:
    """A hub's origin. host: lower case, IPv6 without brackets."""

    scheme: str
    host: str
    port: int

    def __str__(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        port = "" if self.port == _DEFAULT_PORTS[self.scheme] else f":{self.port}"
        return f"{self.scheme}://{host}{port}"

    @property
    def is_loopback(self) -> bool:
        """Whether nobody can listen on the way."""
        return is_loopback_host(self.host)

    @property
    def is_private_line(self) -> bool:
        """Whether a signature may travel there: over TLS, or without leaving the machine."""
        return self.scheme == "https" or self.is_loopback

    def is_same_place(self, other: "HubAddress") -> bool:
        """Whether both name one server: equal, or two spellings of one loopback port."""
        if self.is_loopback and other.is_loopback:
            return (self.scheme, self.port) == (other.scheme, other.port)
        return self == other


def parse_hub_address(text: str) -> HubAddress:
    """The origin of a hub's base URL. Raises: invalid for anything but scheme, host and port."""
    address = origin_of(text)
    parts = urlsplit(text) if address else None
    if address is None or parts is None or parts.path.strip("/") or parts.query or parts.fragment:
        raise CorralError("invalid", "a hub's address looks like https://hub.example.org: scheme, host and port, nothing else")
    return address


def origin_of(url: str) -> HubAddress | None:
    """The origin of an http or https URL, None when it is none or holds a user name."""
    if not url.isascii() or not url.isprintable() or " " in url:
        return None
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError:
        return None
    if parts.scheme not in _DEFAULT_PORTS or not parts.hostname or not is_lookable(parts.hostname) or "@" in parts.netloc:
        return None
    return HubAddress(parts.scheme, parts.hostname.lower(), port or _DEFAULT_PORTS[parts.scheme])


def is_loopback_host(host: str) -> bool:
    """Whether a host name or an IP literal without brackets means this machine."""
    if host.lower() == "localhost" or host.lower().endswith(".localhost"):
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


class _Document(msgspec.Struct):
    corral: str
    public_url: str
    signatures: list[str]


class _LocalServer(msgspec.Struct):
    corral: str
    hub: str


def refuse_local_server(body: bytes, address: HubAddress) -> None:
    """Raises: invalid when the answer to discovery is the one that a local server gives."""
    try:
        hub = origin_of(msgspec.json.decode(body, type=_LocalServer).hub)
    except (msgspec.MsgspecError, RecursionError, UnicodeDecodeError):
        return
    if hub is not None:
        raise CorralError("invalid", f"{address} is a local server; its hub is {hub} → name that one with --hub {hub}")


def parse_discovery(body: bytes, hub: HubAddress) -> str | None:
    """The public URL that strong signatures for this hub cover; None when the body is no discovery document or offers none.
    Raises: invalid when the document names another place than the one that was asked."""
    try:
        document = msgspec.json.decode(body, type=_Document)
    except (msgspec.MsgspecError, RecursionError, UnicodeDecodeError):
        return None
    if STRONG not in document.signatures:
        return None
    public = parse_hub_address(document.public_url)
    if not public.is_same_place(hub):
        raise CorralError(
            "invalid",
            f"the hub at {hub} says that its address is {public} → use that one (corral signin --hub {public}), "
            f"or set CORRAL_PUBLIC_URL={hub} on the hub",
        )
    return document.public_url.rstrip("/")
