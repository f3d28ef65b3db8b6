"""Numbers as people read them, durations as Go writes and reads them. Imports little: commands that print a number load this."""

import re

#: What Go's time.Duration, an int64 of nanoseconds, can hold.
MAX_DURATION_S = (2**63 - 1) / 1e9
_UNITS_S = {"ns": 1e-9, "us": 1e-6, "µs": 1e-6, "μs": 1e-6, "ms": 1e-3, "s": 1.0, "m": 60.0, "h": 3600.0}
#: One group per number and unit. The unit is whatever is neither a digit nor a dot, so that an unknown one can be named.
_TERM = re.compile(r"([0-9]*\.?[0-9]*)([^0-9.]*)")
#: The longest text that is looked at: Go's largest duration has 25 characters.
_MAX_TEXT = 100
#: The longest text that is told of: no name is longer.
_MAX_SHOWN = 600
_GO_SHORT = {7: "\\a", 8: "\\b", 9: "\\t", 10: "\\n", 11: "\\v", 12: "\\f", 13: "\\r", 34: '\\"', 92: "\\\\"}
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


def parse_duration(text: str) -> float:
    """Seconds of a Go duration such as `1h30m`. Raises: ValueError with the text of Go's time.ParseDuration."""
    sign, rest = (text[0], text[1:]) if text[:1] in ("+", "-") else ("+", text)
    if rest == "0":
        return 0.0
    invalid = ValueError(f"time: invalid duration {quoted(text)}")
    if not rest or len(rest) > _MAX_TEXT:
        raise invalid
    total, position = 0.0, 0
    while position < len(rest):
        term = _TERM.match(rest, position)
        assert term is not None  # the pattern matches the empty text
        digits, unit = term.groups()
        if digits in ("", "."):
            raise invalid
        if not unit:
            raise ValueError(f"time: missing unit in duration {quoted(text)}")
        if unit not in _UNITS_S:
            raise ValueError(f"time: unknown unit {quoted(unit)} in duration {quoted(text)}")
        total += float(digits) * _UNITS_S[unit]
        position = term.end()
    if total > MAX_DURATION_S:
        raise invalid
    return -total if sign == "-" else total


def quoted(text: str) -> str:
    """As `go_quoted`, for an error; cut, since the caller chose it."""
    return go_quoted(text[:_MAX_SHOWN])


def go_quoted(text: str) -> str:
    """Text as Go's %q writes it."""
    return '"' + "".join(map(_quoted_character, text)) + '"'


def _quoted_character(character: str) -> str:
    code = ord(character)
    if code in _GO_SHORT:
        return _GO_SHORT[code]
    if character.isprintable():
        return character
    return f"\\x{code:02x}" if code < 0x80 else f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"


def _decimal(count: int, size: int) -> str:
    whole, rest = divmod(count, size)
    digits = str(rest).zfill(len(str(size)) - 1).rstrip("0") if rest else ""
    return f"{whole}.{digits}" if digits else str(whole)
