"""Values as Go's templates see and print them: the kinds beside Python's own, fmt's verbs, encoding/json's habits. Pure.

Values are str, int, float, bool, bytes, None (Go's nil), sequences, mappings, and the two kinds below.
Source: Go's fmt, encoding/json and text/template, 1.26.
"""

import base64
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from json.encoder import encode_basestring as _quoted
from typing import Any

from corral.wire.errors import CorralError
from corral.wire.units import go_quoted

_MAX_JSON_DEPTH = 100
_MAX_WIDTH = 10_000
_MAX_VERBS = 1000


@dataclass(frozen=True, slots=True, kw_only=True)
class Struct:
    """A Go struct. kind: its type, for errors. members: in Go's order. methods: name -> what a call without arguments gives;
    `String` also decides how it is printed. json: what JSON shows instead of the members."""

    kind: str
    members: Mapping[str, Any]
    methods: Mapping[str, Callable[[], str]] = field(default_factory=dict)
    json: Callable[[], Any] | None = None


@dataclass(frozen=True, slots=True)
class Shown:
    """A sequence or mapping with a text of its own. json: what JSON shows instead."""

    of: Any
    text: Callable[[], str]
    json: Callable[[], Any] | None = None


@dataclass(frozen=True, slots=True)
class Ordered:
    """A JSON object whose keys keep their order; plain mappings are written in the order of their keys."""

    pairs: Sequence[tuple[str, Any]]


def plain(value: Any) -> Any:
    """The sequence or mapping within a Shown; anything else as it is."""
    return value.of if isinstance(value, Shown) else value


def is_sequence(value: Any) -> bool:
    """Whether it is one of Go's slices."""
    return isinstance(value, list | tuple)


def is_true(value: Any) -> bool:
    """Truth in Go: what is not the zero of its kind, and every struct."""
    return True if isinstance(value, Struct) else bool(plain(value))


# ── Printing ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def shown(value: Any) -> str:
    """A value as `%v` prints it."""
    match value:
        case str():
            return value
        case None:
            return "<nil>"
        case bool():
            return "true" if value else "false"
        case int():
            return str(value)
        case float():
            return _general(value)
        case Shown():
            return value.text()
        case Struct():
            if text := value.methods.get("String"):
                return text()
            return "{" + " ".join(map(shown, value.members.values())) + "}"
        case Mapping():
            return "map[" + " ".join(f"{shown(key)}:{shown(value[key])}" for key in sorted(value)) + "]"
        case _:
            return "[" + " ".join(map(shown, value)) + "]"


def sprint(values: Sequence[Any]) -> str:
    """All values, with a space between two of which neither is a text."""
    parts: list[str] = []
    for index, value in enumerate(values):
        if index and not isinstance(value, str) and not isinstance(values[index - 1], str):
            parts.append(" ")
        parts.append(shown(value))
    return "".join(parts)


def _general(value: float) -> str:
    """`%v` of a float: as few digits as tell it apart; an exponent where there would be many zeros."""
    digits, exponent, sign = _decimal(value)
    if not digits:
        return sign
    return _scientific(digits, exponent, sign) if not -4 <= exponent < 6 else _fixed(digits, exponent, sign)


def _decimal(value: float) -> tuple[str, int, str]:
    """(significant digits, the power of ten of the first, sign); without digits, the sign is the whole text."""
    if value != value:
        return "", 0, "NaN"
    if value in (float("inf"), float("-inf")):
        return "", 0, "+Inf" if value > 0 else "-Inf"
    sign = "-" if str(value).startswith("-") else ""
    mantissa, _, exponent = f"{abs(value)!r}".partition("e")
    whole, _, fraction = mantissa.partition(".")
    power = int(exponent or 0) + len(whole) - 1
    digits = (whole + fraction).lstrip("0")
    power -= len(whole + fraction) - len(digits)
    digits = digits.rstrip("0")
    return (digits, power, sign) if digits else ("0", 0, sign)


def _scientific(digits: str, exponent: int, sign: str) -> str:
    fraction = f".{digits[1:]}" if len(digits) > 1 else ""
    return f"{sign}{digits[0]}{fraction}e{'-' if exponent < 0 else '+'}{abs(exponent):02d}"


def _fixed(digits: str, exponent: int, sign: str) -> str:
    if exponent < 0:
        return f"{sign}0.{'0' * (-exponent - 1)}{digits}"
    whole = digits[: exponent + 1].ljust(exponent + 1, "0")
    fraction = digits[exponent + 1 :]
    return f"{sign}{whole}.{fraction}" if fraction else f"{sign}{whole}"


# ── JSON ─────────────────────────────────────────────────────────────────────────────────────────────────────────────

_UNSAFE = re.compile("[<>&\u2028\u2029]")


def to_json(value: Any) -> str:
    """JSON as Go's encoding/json writes it: compact, sorted keys, `<>&` escaped. Raises: bad_request for deep nesting."""
    parts: list[str] = []
    _write(value, parts.append, 0)
    # All of these can stand in texts only.
    return _UNSAFE.sub(lambda match: f"\\u{ord(match[0]):04x}", "".join(parts))


def _write(value: Any, put: Callable[[str], None], depth: int) -> None:
    if depth > _MAX_JSON_DEPTH:
        raise CorralError("bad_request", "template: a value is nested too deeply for JSON")
    match value:
        case str():
            put(_quoted(value))
        case bytes():
            put(_quoted(base64.b64encode(value).decode()))
        case None | bool():
            put({None: "null", True: "true", False: "false"}[value])
        case int():
            put(str(value))
        case float():
            put(_json_number(value))
        case Shown():
            _write(value.json() if value.json else value.of, put, depth + 1)
        case Struct():
            _write(value.json() if value.json else Ordered(list(value.members.items())), put, depth + 1)
        case Ordered():
            _write_object(value.pairs, put, depth)
        case Mapping():
            _write_object(sorted(value.items()), put, depth)
        case _:
            put("[")
            for index, item in enumerate(value):
                put("," if index else "")
                _write(item, put, depth + 1)
            put("]")


def _write_object(pairs: Iterable[tuple[str, Any]], put: Callable[[str], None], depth: int) -> None:
    put("{")
    for index, (key, item) in enumerate(pairs):
        put("," if index else "")
        put(_quoted(key))
        put(":")
        _write(item, put, depth + 1)
    put("}")


def _json_number(value: float) -> str:
    digits, exponent, sign = _decimal(value)
    if not digits:
        raise CorralError("bad_request", "template: a number that JSON does not know")
    if -7 < exponent < 21:
        return _fixed(digits, exponent, sign)
    # One zero less than %e writes: 1e-07 is 1e-7.
    return re.sub(r"e-0(?=\d$)", "e-", _scientific(digits, exponent, sign))


# ── printf ───────────────────────────────────────────────────────────────────────────────────────────────────────────

_VERB = re.compile(r"%([-+# 0]*)(\d*)(?:\.(\d*))?(.?)", re.DOTALL)
_KINDS = {str: "string", bool: "bool", int: "int", float: "float64"}


def sprintf(template: str, values: Sequence[Any]) -> str:
    """What Go's Sprintf gives, for the common verbs. Raises: bad_request for others, and for fields of absurd width."""
    rest = list(values)
    parts: list[str] = []
    at = 0
    for count, match in enumerate(_VERB.finditer(template)):
        parts.append(template[at : match.start()])
        at = match.end()
        flags, width, precision, verb = match.groups()
        if count > _MAX_VERBS or len(width) > 5 or len(precision or "") > 3 or int(width or 0) > _MAX_WIDTH:
            raise CorralError("bad_request", "template: printf makes too much of its format")
        if not verb:
            parts.append("%!(NOVERB)")
        elif verb == "%":
            parts.append("%")
        elif not rest:
            parts.append(f"%!{verb}(MISSING)")
        else:
            text = _formatted(rest.pop(0), verb, flags, None if precision is None else int(precision or 0))
            parts.append(_padded(text, flags, int(width or 0), verb))
    parts.append(template[at:])
    if rest:
        parts.append("%!(EXTRA " + ", ".join(f"{_kind(value)}={shown(value)}" for value in rest) + ")")
    return "".join(parts)


def _formatted(value: Any, verb: str, flags: str, precision: int | None) -> str:
    signed = ("+" if "+" in flags else " " if " " in flags else "-") if isinstance(value, int | float) else ""
    match value, verb:
        case _, "v":
            return shown(value)
        case None, _:
            return f"%!{verb}(<nil>)"
        case bool(), "t":
            return shown(value)
        case str(), "s":
            return value[:precision]
        case Shown() | Struct(), "s":
            # Not cut: what is made is what counts as work.
            return shown(value)
        case str(), "q":
            return go_quoted(value)
        case bool(), _:
            pass
        case int(), "d":
            return format(value, f"{signed}d")
        case int(), "x" | "X" | "o" | "b":
            return format(value, verb)
        case int(), "c":
            return chr(value) if 0 <= value < 0xD800 or 0xE000 <= value < 0x110000 else "\ufffd"
        case float(), "f" | "F" | "e":
            return format(value, f"{signed}.{6 if precision is None else precision}{verb}")
        case float(), "g":
            return _general(value)
        case str(), "x" | "X":
            return value.encode().hex() if verb == "x" else value.encode().hex().upper()
        case _:
            pass
    if isinstance(value, str | bool | int | float):
        return f"%!{verb}({_kind(value)}={shown(value)})"
    raise CorralError("bad_request", f"template: printf cannot show this value with %{verb}")


def _padded(text: str, flags: str, width: int, verb: str) -> str:
    if "-" in flags:
        return text.ljust(width)
    if "0" in flags and verb in "dfeFxXob":
        return text.zfill(width)
    return text.rjust(width)


def _kind(value: Any) -> str:
    return _KINDS.get(type(value), value.kind if isinstance(value, Struct) else "interface {}")
