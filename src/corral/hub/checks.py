"""The checks that a request passes on its way to a principal, each small, named and pure. `door` calls them in their fixed order.

A check returns what the next one needs or raises the one error that belongs to it. All that is wrong about a credential
itself has one answer, `unauthorized`, so that a stranger cannot tell a known one from an unknown one.
"""

import base64
import binascii
import hmac
import re
from dataclasses import dataclass
from datetime import datetime
from urllib.parse import unquote

from corral.core.policy import ALL_SCOPES
from corral.core.records import Account, ApiKey, RequestFacts, Scope, StoredApiKey
from corral.wire import signing, strong
from corral.wire.apikeys import ApiKeyText, Peppers, api_key_hmac, parse_api_key
from corral.wire.browser import SAFE_METHODS, cookie_values, is_same_origin
from corral.wire.errors import CorralError
from corral.wire.hosts import called_url
from corral.wire.tokens import GRACE_S, looks_like_token

#: Where a stock client fetches a registry token; the only place for that form of signature.
TOKEN_PATH = "/v2/token"  # noqa: S105 - a path
#: Where an unknown device is told how to sign in, and remembered for the connect page.
SIGNIN_PATHS = frozenset(
    {
        "/api/me",
        "/api/generate",
        "/api/chat",
        "/api/embed",
        "/api/embeddings",
        "/v1/chat/completions",
        "/v1/completions",
        "/v1/embeddings",
        "/v1/responses",
        "/v1/messages",
        "/v1/messages/count_tokens",
    }
)


#: The registry's routes: the only ones that take an account's name with an API key (Basic), or a registry token.
_REGISTRY_PATHS = "/v2/"
_UPLOAD = re.compile(r"/v2/.+/blobs/uploads/[^/]+")
#: No name or address of an account is longer, and an API key is shorter than that.
_MAX_BASIC = 600

# ── Which credential was presented ───────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True, slots=True)
class StockHeader:
    """An Authorization value of a device, in the form of stock clients."""

    text: str


@dataclass(frozen=True, slots=True)
class StrongHeaders:
    """Headers of an HTTP message signature, repeated fields joined."""

    headers: dict[str, str]


@dataclass(frozen=True, slots=True)
class KeyText:
    """What claims to be an API key."""

    text: str


@dataclass(frozen=True, slots=True)
class NamedKey:
    """What claims to be an account's name or address, and an API key of it."""

    name: str
    text: str


@dataclass(frozen=True, slots=True)
class TokenText:
    """What claims to be a registry token."""

    text: str


@dataclass(frozen=True, slots=True)
class SessionCookie:
    """The value of the session cookie."""

    text: str


Presented = StockHeader | StrongHeaders | KeyText | NamedKey | TokenText | SessionCookie


def presented(facts: RequestFacts, cookie_name: str) -> Presented | None:
    """The one credential of a request, or None when it carries none. Raises: two_credentials; unauthorized for a scheme that
    is not ours: whoever tries to prove something is never served as a stranger instead."""
    authorizations = facts.headers.get("authorization", ())
    # SDKs send an empty x-api-key when they were given a bearer token instead.
    keys = [value for value in facts.headers.get("x-api-key", ()) if value]
    cookies = [value for value in cookie_values(facts.headers, cookie_name) if value]
    is_signed = strong.is_strong(facts.headers)
    if len(authorizations) + len(keys) + len(cookies) + is_signed > 1:
        raise CorralError("two_credentials")
    if authorizations:
        return _authorization(authorizations[0], facts)
    if keys:
        return KeyText(keys[0])
    if is_signed:
        return StrongHeaders({name: ", ".join(values) for name, values in facts.headers.items()})
    return SessionCookie(cookies[0]) if cookies else None


def _authorization(value: str, facts: RequestFacts) -> StockHeader | KeyText | NamedKey | TokenText:
    if signing.looks_like_device_header(value):
        return StockHeader(value)
    scheme, _, rest = value.partition(" ")
    path = path_of(facts)
    is_registry = path.startswith(_REGISTRY_PATHS)
    match scheme.lower():
        # A token makes no other token, else one that leaked would never end.
        case "bearer" if is_registry and path != TOKEN_PATH and looks_like_token(rest):
            return TokenText(rest)
        case "bearer":
            return KeyText(rest)
        case "basic" if is_registry:
            return _named_key(rest)
    raise CorralError("unauthorized")


def _named_key(text: str) -> NamedKey:
    """Source: RFC 7617."""
    try:
        name, colon, password = base64.b64decode(text[:_MAX_BASIC], validate=True).decode().partition(":")
    except (ValueError, binascii.Error) as error:
        raise CorralError("unauthorized") from error
    if not colon or not name:
        raise CorralError("unauthorized")
    return NamedKey(name, password)


# ── Signatures ───────────────────────────────────────────────────────────────────────────────────────────────────────


def signed_message(facts: RequestFacts, public_url: str) -> bytes:
    """The bytes a stock client must have signed for this request. The form depends on the path alone, so that a signature
    made for one is worthless for the other (T15); the public URL is configured, and the request says no more of it than which
    of the hub's own names it was called by (T18)."""
    if path_of(facts) == TOKEN_PATH:
        host = facts.headers.get("host", [""])[0]
        return signing.token_challenge(called_url(public_url, host) or public_url, facts.target)
    return signing.request_challenge(facts.method, facts.target)


def path_of(facts: RequestFacts) -> str:
    """The path of the target, decoded once, as the route table sees it: `/v2%2Ftoken` gets where `/v2/token` does."""
    return unquote(facts.target.partition("?")[0])


def token_nonce(facts: RequestFacts) -> str:
    """The nonce of a registry-token request: exactly one, 16 to 64 characters. Raises: unauthorized."""
    query = facts.target.partition("?")[2]
    values = [part[6:] for part in query.split("&") if part.startswith("nonce=")]
    if len(values) != 1 or not 16 <= len(values[0]) <= 64:
        raise CorralError("unauthorized")
    return values[0]


# ── Registry tokens ──────────────────────────────────────────────────────────────────────────────────────────────────


def token_leeway_s(facts: RequestFacts) -> int:
    """How long after its end a token is taken: the end of a push that was under way need not be fetched a new one, where a stock
    client would lose the part it is sending. Everywhere else a token ends when it says."""
    is_under_way = facts.method in ("PATCH", "PUT") and _UPLOAD.fullmatch(path_of(facts)) is not None
    return GRACE_S if is_under_way else 0


# ── API keys ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def key_text(text: str) -> ApiKeyText:
    """The key, once its checksum is right: junk is refused before any look-up (T54). Raises: unauthorized."""
    key = parse_api_key(text)
    if key is None:
        raise CorralError("unauthorized")
    return key


def check_secret(key: ApiKeyText, stored: StoredApiKey | None, peppers: Peppers) -> StoredApiKey:
    """The stored key this text is of. An unknown id costs the same as a wrong secret (T55). Raises: unauthorized."""
    pepper = peppers.values.get(stored.pepper_id if stored else peppers.current_id)
    if pepper is None:
        raise CorralError("unauthorized")
    is_right = hmac.compare_digest(api_key_hmac(key, pepper), stored.hmac if stored else bytes(32))
    if stored is None or not is_right:
        raise CorralError("unauthorized")
    return stored


def check_names_owner(name: str, owner: Account) -> None:
    """Raises: unauthorized when the key is another account's. name: of the account, or its e-mail address, in any case."""
    if name.lower() not in {owner.name.lower(), owner.email.lower()}:
        raise CorralError("unauthorized")


def check_key_is_live(key: ApiKey, now: datetime) -> None:
    """Raises: unauthorized for a key that is revoked or past its expiry."""
    if not is_live_key(key, now):
        raise CorralError("unauthorized")


def is_live_key(key: ApiKey, now: datetime) -> bool:
    """Neither revoked nor expired."""
    return key.revoked_at is None and (key.expires_at is None or now < key.expires_at)


# ── Sessions and owners ──────────────────────────────────────────────────────────────────────────────────────────────


def check_own_page(facts: RequestFacts, public_url: str) -> None:
    """A browser sends its cookie wherever a page tells it to, so what changes something must come from our own pages (T79).
    Raises: forbidden."""
    if facts.method not in SAFE_METHODS and not is_same_origin(facts.headers, public_url):
        raise CorralError("forbidden", "this request was sent from another site; open the page on this hub and send it there")


def check_owner(owner: Account) -> None:
    """Raises: unauthorized when the account is disabled."""
    if not owner.is_active:
        raise CorralError("unauthorized")


def rights_of(owner: Account) -> frozenset[Scope]:
    """What the owner may do at present; no credential of theirs is worth more (T61)."""
    return ALL_SCOPES if owner.is_active else frozenset()
