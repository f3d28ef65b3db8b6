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
    """The same place by a host that stock clients take for another: a name with its first letter in the other case, which every
    resolver and every certificate check takes for the same; `localhost` for 127.0.0.1. None for other addresses, which have one
    spelling. base_url: from `called_url`."""
    scheme, _, authority = base_url.partition("://")
    if authority.partition(":")[0] == "127.0.0.1":
        return f"{scheme}://{authority.replace('127.0.0.1', 'localhost', 1)}"
    return f"{scheme}://{authority[0].swapcase()}{authority[1:]}" if authority[:1].isalpha() else None
