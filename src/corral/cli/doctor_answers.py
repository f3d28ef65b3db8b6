"""What a server answered `corral doctor`, whatever it was: no answer is trusted to have a form, and none to be short."""

import json
from collections.abc import Mapping
from typing import Any, Final
from urllib.parse import parse_qs, urlsplit

from corral.core.checkup import Standing, Trouble
from corral.wire.errors import CorralError

#: Longest text of somebody else's in a finding.
_MAX_TEXT: Final = 200


def standing_of(status: int, answer: Any) -> Standing:
    """What an answer to `/api/me` says."""
    body = object_of(answer)
    link = text_of(body.get("signin_url"), most=2048)
    device = object_of(body.get("device"))
    return Standing(
        status=status,
        account=text_of(body.get("name")) if status == 200 else "",
        device_id=text_of(device.get("id")),
        device_name=text_of(device.get("name")),
        has_link=bool(link),
        fingerprint=_fingerprint_in(link),
        message=text_of(body.get("error")),
    )


def _fingerprint_in(link: str) -> str:
    """Of the key that a link to sign in at would connect, empty when there is none."""
    from corral.wire.signing import parse_encoded_key

    try:
        encoded = parse_qs(urlsplit(link).query).get("key", [""])[0]
        return parse_encoded_key(encoded).fingerprint if encoded else ""
    except (CorralError, ValueError):
        return ""


def failed(message: str, advice: str) -> Standing:
    """Why nobody answered."""
    return Standing(trouble=Trouble(text_of(message), advice))


def json_of(body: bytes) -> Any:
    """None for what is no JSON."""
    try:
        return json.loads(body)
    except (ValueError, RecursionError):
        return None


def object_of(value: Any) -> Mapping[str, Any]:
    """An empty one for anything else."""
    return value if isinstance(value, dict) else {}


def objects_of(value: Any) -> list[Mapping[str, Any]]:
    """Those in a list."""
    return [entry for entry in value if isinstance(entry, dict)] if isinstance(value, list) else []


def texts_of(value: Any) -> tuple[str, ...]:
    """Of a list, each cut."""
    return tuple(text_of(entry) for entry in value) if isinstance(value, list) else ()


def text_of(value: Any, *, most: int = _MAX_TEXT) -> str:
    """Cut where it is too long, empty for anything else."""
    return value[:most] if isinstance(value, str) else ""


def is_same_place(one: str, other: str) -> bool:
    """Whether two URLs name one server."""
    from corral.wire.discovery import origin_of

    first, second = origin_of(one), origin_of(other)
    return first is not None and second is not None and first.is_same_place(second)


def is_of_a_hub(status: int, body: bytes) -> bool:
    """Whether an answer to an unsigned `POST /api/me` may be a hub's: it knows the route, and speaks JSON."""
    if status in (404, 405, 501) or 300 <= status < 400:
        return False
    # What stands before a hub answers in its own form when it refuses or fails.
    return status in (403, 407, 408, 429) or status >= 500 or isinstance(json_of(body), dict)
