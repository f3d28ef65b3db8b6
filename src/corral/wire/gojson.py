"""What Go's decoder says of a body that it refuses, for clients that match on Ollama's words and people who look them up. Pure.

Nothing is decided here: msgspec has refused the body already, and this looks again for the words. The scanner follows the grammar
up to the first character that breaks it, the other half walks a parsed value beside the struct it should have been. Source: Go
encoding/json scanner.go and decode.go; ollama server/routes.go ShouldBindJSON, fb30760.
"""

import json
import re
from collections.abc import Iterator, Mapping
from types import NoneType, UnionType
from typing import Any, get_args, get_origin

import msgspec

#: Further inside nobody looks for words: the search is slower than the refusal it explains.
_MAX_SCANNED_BYTES = 64 * 1024
_MAX_DEPTH = 10_000
_TRUNCATED = "unexpected EOF"

_SPACE = re.compile(rb"[ \t\r\n]*")
_STRING = re.compile(rb'"(?:[^"\\\x00-\x1f]|\\(?:["\\/bfnrt]|u[0-9A-Fa-f]{4}))*')
_NUMBER = re.compile(rb"-?(?:0|[1-9][0-9]*)(?:\.[0-9]+)?(?:[eE][+-]?[0-9]+)?")
#: Half of a character beyond U+FFFF without the other half; behind an even number of backslashes, since one that is escaped
#: begins nothing. msgspec's words for it speak of something else.
_HALF = re.compile(
    rb"(?<!\\)(?:\\\\)*"
    rb"(?:\\u[dD][89abAB][0-9A-Fa-f]{2}(?!\\u[dD][c-fC-F])|(?<!\\u[dD][89abAB][0-9A-Fa-f]{2})\\u[dD][c-fC-F])"
)
_HALF_TOLD = "a \\u escape in the request body is half of a character"
_HEX = b"0123456789abcdefABCDEF"


class _BrokenError(Exception):
    """What is wrong, in Go's words."""


def syntax_complaint(body: bytes) -> str | None:
    """What is wrong with a text that msgspec has refused; None for one that has no fault which Go would name but a lone half of
    a character, or too far inside."""
    try:
        at = _space(body, _value_end(body[:_MAX_SCANNED_BYTES]))
        if at < len(body):
            return _unexpected(body, at, "after top-level value")
    except _BrokenError as error:
        is_cut = len(body) > _MAX_SCANNED_BYTES and str(error) == _TRUNCATED
        return None if is_cut else str(error)
    return _HALF_TOLD if _HALF.search(body, 0, _MAX_SCANNED_BYTES) else None


def _value_end(body: bytes) -> int:
    """Where the first value ends."""
    at, closers = 0, bytearray()
    while True:
        at = _space(body, at)
        opened = _at(body, at)
        if opened in (b"{", b"["):
            closers += b"}" if opened == b"{" else b"]"
            if len(closers) > _MAX_DEPTH:
                raise _BrokenError(f"invalid character '{opened.decode()}' exceeded max depth")
            at = _space(body, at + 1)
            if _at(body, at) != closers[-1:]:
                at = _key_end(body, at) if opened == b"{" else at
                continue
        else:
            at = _scalar_end(body, at)
        at = _closed(body, at, closers)
        if not closers:
            return at


def _closed(body: bytes, at: int, closers: bytearray) -> int:
    """Behind all brackets that end here and the comma and key that follow them; `closers` empty when the value is complete."""
    while closers:
        at = _space(body, at)
        found = _at(body, at)
        if found == closers[-1:]:
            closers.pop()
            at += 1
        elif found == b",":
            at = _space(body, at + 1)
            return _key_end(body, at) if closers[-1:] == b"}" else at
        else:
            where = "after object key:value pair" if closers[-1:] == b"}" else "after array element"
            raise _BrokenError(_unexpected(body, at, where))
    return at


def _key_end(body: bytes, at: int) -> int:
    """Behind a key and its colon."""
    if _at(body, at) != b'"':
        raise _BrokenError(_unexpected(body, at, "looking for beginning of object key string"))
    at = _space(body, _string_end(body, at))
    if _at(body, at) != b":":
        raise _BrokenError(_unexpected(body, at, "after object key"))
    return at + 1


def _scalar_end(body: bytes, at: int) -> int:
    first = _at(body, at)
    if first == b'"':
        return _string_end(body, at)
    for word in (b"true", b"false", b"null"):
        if first == word[:1]:
            for offset, expected in enumerate(word):
                if _at(body, at + offset) != bytes([expected]):
                    where = f"in literal {word.decode()} (expecting '{chr(expected)}')"
                    raise _BrokenError(_unexpected(body, at + offset, where))
            return at + len(word)
    if not first or first not in b"-0123456789":
        raise _BrokenError(_unexpected(body, at, "looking for beginning of value"))
    match = _NUMBER.match(body, at)
    if match is None:
        raise _BrokenError(_unexpected(body, at + 1, "in numeric literal"))
    end = match.end()
    text = match[0].lower()
    if _at(body, end) == b"." and b"." not in text and b"e" not in text:
        raise _BrokenError(_unexpected(body, end + 1, "after decimal point in numeric literal"))
    if _at(body, end) in (b"e", b"E") and b"e" not in text:
        signed = end + 2 if _at(body, end + 1) in (b"+", b"-") else end + 1
        raise _BrokenError(_unexpected(body, signed, "in exponent of numeric literal"))
    return end


def _string_end(body: bytes, at: int) -> int:
    match = _STRING.match(body, at)
    end = match.end() if match else at + 1
    if _at(body, end) == b'"':
        return end + 1
    if _at(body, end) != b"\\":
        raise _BrokenError(_unexpected(body, end, "in string literal"))
    if _at(body, end + 1) != b"u":
        raise _BrokenError(_unexpected(body, end + 1, "in string escape code"))
    wrong = next((place for place in range(end + 2, end + 6) if not _at(body, place) or _at(body, place) not in _HEX), end + 6)
    raise _BrokenError(_unexpected(body, wrong, "in \\u hexadecimal character escape"))


def _space(body: bytes, at: int) -> int:
    match = _SPACE.match(body, at)
    return match.end() if match else at


def _at(body: bytes, at: int) -> bytes:
    return body[at : at + 1]


def _unexpected(body: bytes, at: int, where: str) -> str:
    if at >= len(body):
        return _TRUNCATED
    return f"invalid character {_quoted(body[at])} {where}"


_ESCAPES = {"'": "\\'", "\\": "\\\\", "\a": "\\a", "\b": "\\b", "\f": "\\f", "\n": "\\n", "\r": "\\r", "\t": "\\t", "\v": "\\v"}


def _quoted(byte: int) -> str:
    """A byte as Go shows it: as the character of that number, which need not be the one that was meant."""
    character = chr(byte)
    if character in _ESCAPES:
        return f"'{_ESCAPES[character]}'"
    if character.isprintable() or byte == 0xA0:
        return f"'{character}'" if byte != 0xA0 else "'\\u00a0'"
    return f"'\\x{byte:02x}'" if byte < 0x80 else f"'\\u{byte:04x}'"


# ── Types ────────────────────────────────────────────────────────────────────────────────────────────────────────────


def go_named(kind: type[msgspec.Struct]) -> str:
    """Package and type of Ollama's struct: `go_name` of ours where it has one, else of package api and of the same name."""
    name: str = getattr(kind, "go_name", f"api.{kind.__name__.lstrip('_')}")
    return name


def type_complaint(value: Any, kind: type[msgspec.Struct]) -> str | None:
    """What does not fit, first come first told. value: a parsed body with the struct's own keys and without nulls. None when
    nothing here explains it."""
    if not isinstance(value, dict):
        return f"json: cannot unmarshal {_go_kind(value)} into Go value of type {go_named(kind)}"
    return next(_struct_complaints(value, kind, go_named(kind), ""), None)


def _struct_complaints(value: Mapping[str, Any], kind: type[msgspec.Struct], told: str, path: str) -> Iterator[str]:
    """told: the struct that a complaint names: the inmost that Go's decoder knows of."""
    fields = {row.encode_name: row for row in msgspec.structs.fields(kind)}
    named: Mapping[str, str] = getattr(kind, "go_types", {})
    for name, item in value.items():
        if name in fields:
            place = f"{path}.{name}" if path else name
            yield from _complaints(item, fields[name].type, told, place, named.get(name, ""))


def _complaints(item: Any, annotation: Any, told: str, path: str, named: str) -> Iterator[str]:
    """named: how Go calls the type, where that does not follow from the annotation."""
    kind = _without_none(annotation)
    if kind is Any or item is None:
        return
    outer = get_origin(kind) or kind
    if isinstance(outer, type) and issubclass(outer, msgspec.Struct):
        inner = getattr(outer, "go_alias", go_named(outer))
        if not isinstance(item, dict):
            yield _mismatch(item, told, path, named or inner)
        else:
            # A struct that Go decodes by code of its own is not what its errors name.
            yield from _struct_complaints(item, outer, told if hasattr(outer, "go_alias") else go_named(outer), path)
    elif outer is list and isinstance(item, list):
        element = named.removesuffix("s") if named and not named.startswith("[]") else named.removeprefix("[]")
        for one in item:
            yield from _complaints(one, get_args(kind)[0], told, path, element)
    elif outer is dict and isinstance(item, dict) and get_args(kind)[1] is not Any:
        for one in item.values():
            yield from _complaints(one, get_args(kind)[1], told, path, "")
    elif outer is bytes and isinstance(item, str):
        if (complaint := base64_complaint(item)) is not None:
            yield complaint
    elif not _fits(item, outer):
        yield _mismatch(item, told, path, named or _go_type(kind))


def _fits(item: Any, outer: Any) -> bool:
    if isinstance(item, bool) or outer is bool:
        return isinstance(item, bool) and outer is bool
    if outer is float:
        return isinstance(item, int | float)
    return isinstance(item, outer) if isinstance(outer, type) else True


def _mismatch(item: Any, told: str, path: str, go_type: str) -> str:
    # The number itself is named where a number was wanted, but not this one.
    shown = f"number {json.dumps(item)}" if isinstance(item, float) and go_type == "int" else _go_kind(item)
    return f"json: cannot unmarshal {shown} into Go struct field {told.rpartition('.')[2]}.{path} of type {go_type}"


def _go_kind(item: Any) -> str:
    match item:
        case bool():
            return "bool"
        case int() | float():
            return "number"
        case str():
            return "string"
        case list():
            return "array"
    return "object"


def go_type_of(item: Any) -> str:
    """What a JSON value of no declared type becomes in Go."""
    match item:
        case bool():
            return "bool"
        case int() | float():
            return "float64"
        case str():
            return "string"
        case list():
            return "[]interface {}"
        case dict():
            return "map[string]interface {}"
    return "<nil>"


_GO_TYPES: Mapping[Any, str] = {
    str: "string",
    int: "int",
    float: "float64",
    bool: "bool",
    bytes: "api.ImageData",
    Any: "interface {}",
}


def _go_type(kind: Any) -> str:
    if get_origin(kind) is list:
        return f"[]{_go_type(get_args(kind)[0])}"
    if get_origin(kind) is dict:
        return f"map[string]{_go_type(get_args(kind)[1])}"
    if isinstance(kind, type) and issubclass(kind, msgspec.Struct):
        return go_named(kind)
    return _GO_TYPES.get(kind, "string")


def _without_none(kind: Any) -> Any:
    """X of `X | None`; anything else as it is."""
    inner = [arm for arm in get_args(kind) if arm is not NoneType]
    return inner[0] if isinstance(kind, UnionType) and len(inner) == 1 else kind


_BASE64 = re.compile(r"(?:[A-Za-z0-9+/]{4})*")
_LAST = re.compile(r"[A-Za-z0-9+/]{2}==|[A-Za-z0-9+/]{3}=|")


def base64_complaint(text: str) -> str | None:
    """What is wrong with a text that should be base64; None for a good one."""
    at = _base64_fault(text)
    return None if at is None else f"illegal base64 data at input byte {at}"


def _base64_fault(text: str) -> int | None:
    """Where Go stops to understand it."""
    whole = _BASE64.match(text)
    start = whole.end() if whole else 0
    if _LAST.fullmatch(text, start):
        return None
    rest = text[start : start + 4]
    wrong = next((offset for offset, one in enumerate(rest) if not re.match(r"[A-Za-z0-9+/]", one)), None)
    if wrong is None:
        return start
    if rest[wrong] != "=" or wrong < 2:
        return start + wrong
    if wrong == 3 or rest[2:] == "==":
        return start + 4  # what follows the end
    return start + len(rest) if len(rest) == 3 else start + 2
