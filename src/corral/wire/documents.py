"""JSON documents read strictly: bounded, each member once, only numbers that JSON has, nothing that could not be written back.

A member that occurs twice is refused: two readers that pick different ones would check one value and use the other. Members
that are null count as absent, as in Go.
"""

import json
import math
from typing import Any, NoReturn, TypeVar

import msgspec

from corral.wire.errors import CorralError

#: Levels of nesting that a document may have where that is checked.
MAX_DEPTH = 32

T = TypeVar("T")


def refuse(what: str, reason: str, *, code: str = "bad_request") -> NoReturn:
    """Say what is wrong with a document. what: its kind, such as `manifest`."""
    raise CorralError(code, f"invalid {what}: {reason}")


def parse_object(data: bytes, limit: int, what: str, *, code: str = "bad_request") -> dict[str, Any]:
    """The JSON object that data is. limit: bytes. Raises: code, too_large."""
    value = parse_json(data, limit, what, code=code)
    if not isinstance(value, dict):
        refuse(what, "it is not a JSON object", code=code)
    return value


def parse_json(data: bytes, limit: int, what: str, *, code: str = "bad_request") -> Any:
    """The JSON value that data is. limit: bytes. Raises: code, too_large."""
    if len(data) > limit:
        raise CorralError("too_large", f"the {what} has {len(data)} bytes; at most {limit} are read")
    try:
        value = json.loads(data, object_pairs_hook=_object, parse_constant=_no_constant, parse_float=_finite)
        if b"\\u" in data:
            # Half a surrogate pair parses, but no encoder downstream could write it; the UnicodeError is a ValueError.
            json.dumps(value, ensure_ascii=False).encode()
    # RecursionError: 100,000 brackets. ValueError also covers numbers of 5,000 digits and bytes that are not UTF-8.
    except (ValueError, RecursionError) as error:
        raise CorralError(code, f"invalid {what}: {error}") from error
    return value


def convert(value: object, kind: type[T], what: str, *, code: str = "bad_request") -> T:
    """The value as a record of that type. Raises: code."""
    try:
        return msgspec.convert(value, kind)
    except msgspec.ValidationError as error:
        raise CorralError(code, f"invalid {what}: {error}") from error


def check_depth(value: object, what: str, *, code: str = "bad_request") -> None:
    """Refuse a parsed document that nests deeper than `MAX_DEPTH`. Raises: code."""
    # Level by level: whoever reads the document later may recurse, this check may not.
    level = [value]
    for _ in range(MAX_DEPTH):
        level = [
            member
            for holder in level
            if isinstance(holder, dict | list)
            for member in (holder.values() if isinstance(holder, dict) else holder)
            if isinstance(member, dict | list)
        ]
        if not level:
            return
    refuse(what, f"it nests deeper than {MAX_DEPTH} levels", code=code)


def _object(pairs: list[tuple[str, object]]) -> dict[str, object]:
    """A JSON object without members that are null."""
    members = dict(pairs)
    if len(members) != len(pairs):
        raise ValueError("a member occurs twice")
    return {name: value for name, value in members.items() if value is not None}


def _no_constant(text: str) -> NoReturn:
    raise ValueError(f"{text} is not JSON")


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"the number {text[:40]} is too large")
    return number
