"""Registry tokens as text: a JWT (RFC 7519) that the hub signs for itself with Ed25519, and the strict reading of one.

Nobody but the hub reads its tokens, so there is exactly one acceptable header per signing key, compared as text before anything
is decoded: another algorithm, `crit`, `jwk`, `jku` or a second spelling cannot even be expressed. Libraries choose by what the
header says, which is where their holes were (alg none, HS256 with the public key), and this reading costs less than half of
joserfc's. The algorithm is written `Ed25519`, the name that RFC 9864 gives to what was a case of `EdDSA`.
"""

import base64
import binascii
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

import msgspec
from nacl import bindings
from nacl.exceptions import BadSignatureError

from corral.wire.errors import CorralError

ALGORITHM = "Ed25519"
#: Seconds that a token is good for.
LIFETIME_S = 3600
#: Seconds for which a push that was under way may go on with a token that has expired.
GRACE_S = 300

#: Seconds that a link under which content is moved without a token is good for, at most.
TICKET_LIFETIME_S = 24 * 3600

_SIGNATURE_BYTES = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenKeys:
    """The hub's signing keys. seeds: id -> 32 bytes. New tokens are signed with the current one; tokens by the others are good
    until they expire. ticket_secret: at least 32 bytes, for the links under which blobs are fetched without a token.
    former_ticket_secrets: those by which links were made that may still be good."""

    current_id: str
    seeds: Mapping[str, bytes] = field(repr=False)
    ticket_secret: bytes = field(repr=False)
    former_ticket_secrets: tuple[bytes, ...] = field(default=(), repr=False)


class TokenAccess(msgspec.Struct, frozen=True):
    """One entry of `access`: what the token is good for. Source: distribution docs, spec/auth/jwt.md."""

    type: str
    name: str
    actions: list[str]


class TokenHolder(msgspec.Struct, frozen=True):
    """The private claim `corral`: which credential the token was given for. id: of the API key or device. key: the device's
    public key, base64 of its 32 bytes; for a visitor, empty when nothing was presented."""

    kind: Literal["device", "key", "visitor"]
    id: str = ""
    key: str = ""


class TokenClaims(msgspec.Struct, frozen=True, kw_only=True):
    """The claims of a token. sub: the account's name, or empty. Times: whole seconds since the epoch."""

    iss: str
    sub: str
    aud: str
    iat: int
    nbf: int
    exp: int
    jti: str
    access: list[TokenAccess]
    corral: TokenHolder


def token_header(key_id: str) -> dict[str, str]:
    """The header of every token that a key signs."""
    return {"typ": "JWT", "alg": ALGORITHM, "kid": key_id}


def header_text(key_id: str) -> str:
    """The same as the first part of the token's text."""
    return _base64url(json.dumps(token_header(key_id), separators=(",", ":")).encode())


def public_keys(keys: TokenKeys) -> dict[str, bytes]:
    """First part of a token's text -> the public key that it must be signed with."""
    return {header_text(key_id): bindings.crypto_sign_seed_keypair(seed)[0] for key_id, seed in keys.seeds.items()}


def looks_like_token(text: str) -> bool:
    """Whether a bearer credential claims to be a token, and not an API key."""
    return text.count(".") == 2


def read_token(text: str, keys: Mapping[str, bytes]) -> TokenClaims:
    """The claims of a token that one of our keys signed; nothing is said about its time yet. keys: of `public_keys`. Raises:
    unauthorized."""
    signed, _, signature_text = text.rpartition(".")
    header, _, payload = signed.partition(".")
    public = keys.get(header)
    signature = _unbase64url(signature_text)
    if public is None or signature is None or len(signature) != _SIGNATURE_BYTES:
        raise CorralError("unauthorized")
    try:
        bindings.crypto_sign_open(signature + signed.encode(), public)
        return msgspec.json.decode(_unbase64url(payload) or b"", type=TokenClaims)
    except (BadSignatureError, UnicodeEncodeError, UnicodeDecodeError, msgspec.MsgspecError, RecursionError) as error:
        raise CorralError("unauthorized") from error


def check_claims(claims: TokenClaims, *, issuer: str, service: str, now: float, leeway_s: int = 0) -> None:
    """Refuse a token of another hub or service, and one whose time has not come or is over. leeway_s: seconds behind its end for
    which it is taken nevertheless. Raises: unauthorized."""
    if claims.iss != issuer or claims.aud != service:
        raise CorralError("unauthorized", "this token was made for another registry")
    if claims.nbf > now:
        raise CorralError("unauthorized", "this token is not valid yet")
    if now >= claims.exp + leeway_s:
        raise CorralError("unauthorized", "this token has expired; fetch a new one")


def _base64url(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).decode().rstrip("=")


def _unbase64url(text: str) -> bytes | None:
    """The bytes, or None unless `text` is their one canonical spelling."""
    try:
        decoded = base64.b64decode(text + "=" * (-len(text) % 4), altchars=b"-_", validate=True)
    except (ValueError, binascii.Error):
        return None
    return decoded if _base64url(decoded) == text else None
