"""Which requests go out through a proxy: HTTP_PROXY, HTTPS_PROXY and NO_PROXY, as Go programs read them. Pure.

What goes to this machine never does. Source: Go golang.org/x/net/http/httpproxy.
"""

import ipaddress
from dataclasses import dataclass, field
from urllib.parse import urlsplit

_DEFAULT_PORTS = {"http": 80, "https": 443}


@dataclass(frozen=True, slots=True, kw_only=True)
class ProxyRules:
    """http, https: the proxy's URL for either scheme, empty for none; may hold a password. exceptions: words of NO_PROXY: `*`,
    host names (which cover what ends in them), addresses and networks, each with or without a port."""

    http: str = field(default="", repr=False)
    https: str = field(default="", repr=False)
    exceptions: tuple[str, ...] = ()

    def proxy_of(self, url: str) -> str | None:
        """The proxy for a URL, or None. url: http or https, with a host."""
        parts = urlsplit(url)
        host = (parts.hostname or "").rstrip(".")
        proxy = self.https if parts.scheme == "https" else self.http
        if not proxy or not host or _is_loopback(host):
            return None
        port = parts.port or _DEFAULT_PORTS.get(parts.scheme, 0)
        return None if any(_covers(word.strip().lower(), host, port) for word in self.exceptions) else proxy


def _covers(word: str, host: str, port: int) -> bool:
    """Whether one word of NO_PROXY means that host. host: lower case, without brackets."""
    if not word or word == "*":
        return word == "*"
    address = _address(host)
    if "/" in word:
        try:
            return address is not None and address in ipaddress.ip_network(word, strict=False)
        except ValueError:
            return False
    name, wanted_port = _split_port(word)
    if wanted_port not in ("", str(port)):
        return False
    if address is not None:
        return _address(name) == address
    suffix = name.removeprefix("*").lstrip(".")
    is_subdomain = host.endswith(f".{suffix}")
    # A word with a leading dot means what is below the name, not the name itself.
    return bool(suffix) and (is_subdomain or (host == suffix and not name.startswith((".", "*"))))


def _split_port(word: str) -> tuple[str, str]:
    if word.startswith("["):
        name, _, rest = word[1:].partition("]")
        return name, rest.removeprefix(":")
    if word.count(":") == 1:
        name, _, port = word.partition(":")
        return name, port
    return word, ""


def _is_loopback(host: str) -> bool:
    # wire.discovery knows it as well, but is too much to import for commands that only read the settings.
    address = _address(host)
    return host == "localhost" or host.endswith(".localhost") or (address is not None and address.is_loopback)


def _address(text: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    try:
        return ipaddress.ip_address(text)
    except ValueError:
        return None
