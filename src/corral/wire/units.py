"""Numbers as people read them, and durations as Go writes them. Imports nothing: commands that print a number load this."""

_NS_PER_S = 1_000_000_000
_PREFIXES = ("", "k", "M", "G", "T")


def format_size(size_bytes: int) -> str:
    """`92 MB`, `1.1 GB`: decimal units, as Ollama's listings have them."""
    return f"{_scaled(size_bytes)}B"


def format_count(number: int) -> str:
    """`940`, `12 k`, `1.2 M`."""
    return _scaled(number).rstrip()


def _scaled(number: float) -> str:
    index = 0
    # 999.5 would be written as 1000 of the smaller unit.
    while number >= 999.5 and index < len(_PREFIXES) - 1:
        number, index = number / 1000, index + 1
    digits = f"{number:.1f}" if index and number < 9.95 else f"{number:.0f}"
    return f"{digits.removesuffix('.0')} {_PREFIXES[index]}"


def format_nanoseconds(count: int) -> str:
    """A duration as Go writes it: `5m0s`, `1.5s`, `300ms`, `0s`. Source: Go time.Duration.String."""
    if count <= 0:
        return "0s"
    for unit, size in (("ns", 1), ("µs", 1000), ("ms", 1_000_000)):
        if count < min(size * 1000, _NS_PER_S):
            return f"{_decimal(count, size)}{unit}"
    minutes, rest = divmod(count, 60 * _NS_PER_S)
    hours, minutes = divmod(minutes, 60)
    head = f"{hours}h{minutes}m" if hours else f"{minutes}m" if minutes else ""
    return f"{head}{_decimal(rest, _NS_PER_S)}s"


def _decimal(count: int, size: int) -> str:
    whole, rest = divmod(count, size)
    digits = str(rest).zfill(len(str(size)) - 1).rstrip("0") if rest else ""
    return f"{whole}.{digits}" if digits else str(whole)
