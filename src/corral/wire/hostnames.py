"""Which names a host can have."""

from typing import Final

_MAX_LABEL: Final = 63


def is_lookable(host: str) -> bool:
    """Whether a host can be looked up: each part of its name is of a length that names have, a dot at the end aside. For others
    Python's resolver raises a UnicodeError, which nobody expects of a connection. Source: RFC 1035 2.3.4."""
    return all(1 <= len(label) <= _MAX_LABEL for label in host.removesuffix(".").split("."))
