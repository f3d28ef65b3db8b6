"""What is asked of /api/pull and /api/push, and where the registry of a model name is. Their events are `create.ProgressEvent`.

A name without a host, and one with Ollama's default host, means the hub in use, as everything else that Ollama would ask of its
own servers (docs/divergences.md). Source: ollama api/types.go PullRequest, PushRequest; types/model/name.go BaseURL, fb30760.
"""

from typing import Literal

import msgspec

from corral.wire.discovery import HubAddress, origin_of, parse_hub_address
from corral.wire.errors import CorralError
from corral.wire.names import DEFAULT_HOST, ModelName

#: Ollama's own cloud, whose registry has another host than the rest of it.
_OLLAMA = HubAddress("https", "ollama.com", 443)


class PullRequest(msgspec.Struct, frozen=True, kw_only=True):
    """`name` is what older clients send."""

    model: str | None = None
    name: str | None = None
    insecure: bool | None = None
    stream: bool | None = None

    @property
    def wanted(self) -> str:
        """The model's name, as written."""
        return self.model or self.name or ""


class PushRequest(PullRequest, frozen=True, kw_only=True):
    """visibility: an addition of ours, asked of a Corral hub; None leaves it as it is, which is private at first."""

    visibility: Literal["private", "public"] | None = None


def registry_url(name: ModelName, requested: str, *, hub: str, insecure: bool) -> str:
    """Scheme, host and port of the registry of a name.

    requested: the name as written, for its scheme. hub: base URL of the hub in use. insecure: to use plain http. Raises:
    bad_request for a host that is none, forbidden for plain http to another machine that nobody asked for.
    """
    home = parse_hub_address(hub)
    if name.host.lower() == DEFAULT_HOST:
        return f"https://{DEFAULT_HOST}" if home == _OLLAMA else _permitted(home, str(home), insecure=insecure)
    scheme, marked, _ = requested.partition("://")
    if insecure:
        scheme = "http"
    elif not marked:
        scheme = _usual_scheme(name.host, home)
    url = f"{scheme.lower()}://{name.host}"
    place = origin_of(url)
    if place is None:
        raise CorralError("bad_request", "invalid model name")
    return _permitted(place, url, insecure=insecure)


def _usual_scheme(host: str, home: HubAddress) -> str:
    """The hub's own for the hub's host, http on this machine, else https."""
    if origin_of(f"{home.scheme}://{host}") == home:
        return home.scheme
    place = origin_of(f"http://{host}")
    return "http" if place is not None and place.is_loopback else "https"


def _permitted(place: HubAddress, url: str, *, insecure: bool) -> str:
    if not place.is_private_line and not insecure:
        raise CorralError("forbidden", "insecure protocol http")
    return url
