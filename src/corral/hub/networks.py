"""Which addresses count as one network: for limits, and for asking whether a browser and a device are in the same place."""

import ipaddress
from functools import lru_cache


@lru_cache(maxsize=4096)
def network_of(address: str) -> str:
    """The network an address stands for: an IPv4 address alone, the /64 of an IPv6 address (one customer has all of it),
    `loopback` for this machine whichever way it is written, and the text itself when it is no address."""
    try:
        parsed = ipaddress.ip_address(address)
    except ValueError:
        return address
    mapped = getattr(parsed, "ipv4_mapped", None)
    if mapped is not None:
        parsed = mapped
    if parsed.is_loopback:
        return "loopback"
    if parsed.version == 4:
        return str(parsed)
    return str(ipaddress.ip_network((parsed, 64), strict=False))
