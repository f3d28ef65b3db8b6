"""API keys as text: `crlk_` + 10 base62 public id + 32 base62 secret (190 bits) + 6 base62 CRC-32 of all before.

The prefix lets scanners find a leaked key, the checksum lets us refuse junk before any look-up. What is stored is an HMAC
of the whole text under a pepper that lives outside the database, so a stolen or writable database alone is worth nothing.
"""

import hmac
import re
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field

from corral.wire.secrets import Secret

_ALPHABET = "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"
_FORM = re.compile(r"crl[ksd]_[0-9A-Za-z]{48}")
ENTROPY_BYTES = 64
_ID_LENGTH, _SECRET_LENGTH, _CHECK_LENGTH = 10, 32, 6
API_KEY_PREFIX = "crlk_"
API_KEY_LENGTH = len(API_KEY_PREFIX) + _ID_LENGTH + _SECRET_LENGTH + _CHECK_LENGTH


@dataclass(frozen=True, slots=True)
class ApiKeyText:
    """A well-formed key. public_id: safe to store, log and show. text: the whole key."""

    public_id: str
    text: Secret

    @property
    def prefix(self) -> str:
        """What listings show: `crlk_` and the first characters of the public id."""
        return self.text.reveal()[:9]


def make_api_key(entropy: bytes) -> ApiKeyText:
    """A new key from `ENTROPY_BYTES` random bytes. Base62 digits are drawn by modulo of a 512-bit number: the bias is under
    2^-250."""
    if len(entropy) != ENTROPY_BYTES:
        raise ValueError(f"an API key takes {ENTROPY_BYTES} random bytes")
    body = API_KEY_PREFIX + _base62(int.from_bytes(entropy), _ID_LENGTH + _SECRET_LENGTH)
    return ApiKeyText(body[5 : 5 + _ID_LENGTH], Secret(body + _checksum(body)))


def parse_api_key(text: str) -> ApiKeyText | None:
    """The key, or None when it is malformed or its checksum is wrong. Touches nothing but its argument."""
    if not _FORM.fullmatch(text):
        return None
    body, check = text[:-_CHECK_LENGTH], text[-_CHECK_LENGTH:]
    if not hmac.compare_digest(_checksum(body), check):
        return None
    return ApiKeyText(body[5 : 5 + _ID_LENGTH], Secret(text))


def api_key_hmac(key: ApiKeyText, pepper: bytes) -> bytes:
    """The 32 bytes that are stored and compared. pepper: at least 32 secret bytes, kept outside the database."""
    return hmac.digest(pepper, key.text.reveal().encode(), "sha256")


@dataclass(frozen=True, slots=True, kw_only=True)
class Peppers:
    """The secrets that API keys are hashed under. values: id -> 32 bytes; new keys take the current one, old ones keep theirs."""

    current_id: str
    values: Mapping[str, bytes] = field(repr=False)


def _checksum(body: str) -> str:
    return _base62(zlib.crc32(body.encode()), _CHECK_LENGTH)


def _base62(number: int, length: int) -> str:
    digits = []
    for _ in range(length):
        number, digit = divmod(number, 62)
        digits.append(_ALPHABET[digit])
    return "".join(reversed(digits))
