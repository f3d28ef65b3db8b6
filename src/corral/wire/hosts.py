"""Under which names a hub's registry is called, and how it names itself back.

A stock client goes on only where it started: the host of a token realm must equal, character by character, the one it called.
And it takes a URL for another server's as soon as the host is spelled differently. So the caller's own spelling of the Host
header is used for what it must follow, but never a name that is not ours: a realm that follows any Host is one that anybody
chooses.
"""

from corral.wire.discovery import parse_hub_address
from corral.wire.errors import CorralError

_MAX_HOST = 300


def called_url(public_url: str, host: str) -> str | None:
    """The hub's base URL with its host as this Host header spells it; None for the name of somebody else. A hub on loopback has
    every name of loopback, on its port."""
    public = parse_hub_address(public_url)
    if len(host) > _MAX_HOST:
        return None
    try:
        called = parse_hub_address(f"{public.scheme}://{host}")
    except CorralError:
        return None
    return f"{public.scheme}://{host}" if called.is_same_place(public) else None


def other_spelling(base_url: str) -> str | None:
    """The same place by a host that stock clients take for another: `localhost` and 127.0.0.1 for each other, of any other name
    its first letter in the other case. None for an address, which has one spelling. base_url: from `called_url`."""
    scheme, _, authority = base_url.partition("://")
    host, colon, port = authority.partition(":")
    if host.lower() == "localhost":
        return f"{scheme}://127.0.0.1{colon}{port}"
    if host == "127.0.0.1":
        return f"{scheme}://localhost{colon}{port}"
    if not host[:1].isalpha():
        return None
    return f"{scheme}://{host[0].swapcase()}{host[1:]}{colon}{port}"
