"""The checks that a request passes on its way to a principal, each small, named and pure. `door` calls them in their fixed order.

A check returns what the next one needs or raises the one error that belongs to it. All that is wrong about a credential
itself has one answer, `unauthorized`, so that a stranger cannot tell a known one from an unknown one.
"""

import hmac
from dataclasses import dataclass
from datetime import datetime
from urllib.parse import unquote

from corral.core.policy import ALL_SCOPES
from corral.core.records import Account, ApiKey, RequestFacts, Scope, StoredApiKey
from corral.wire import signing, strong
from corral.wire.apikeys import ApiKeyText, Peppers, api_key_hmac, parse_api_key
from corral.wire.browser import SAFE_METHODS, cookie_values, is_same_origin
from corral.wire.errors import CorralError

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
    }
)


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
class SessionCookie:
    """The value of the session cookie."""

    text: str


Presented = StockHeader | StrongHeaders | KeyText | SessionCookie


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
        return _authorization(authorizations[0])
    if keys:
        return KeyText(keys[0])
    if is_signed:
        return StrongHeaders({name: ", ".join(values) for name, values in facts.headers.items()})
    return SessionCookie(cookies[0]) if cookies else None


def _authorization(value: str) -> StockHeader | KeyText:
    if signing.looks_like_device_header(value):
        return StockHeader(value)
    scheme, _, rest = value.partition(" ")
    if scheme.lower() != "bearer":
        raise CorralError("unauthorized")
    return KeyText(rest)


# ── Signatures ───────────────────────────────────────────────────────────────────────────────────────────────────────


def signed_message(facts: RequestFacts, public_url: str) -> bytes:
    """The bytes a stock client must have signed for this request. The form depends on the path alone, so that a signature
    made for one is worthless for the other (T15); the public URL is configured, never taken from the request (T18)."""
    if path_of(facts) == TOKEN_PATH:
        return signing.token_challenge(public_url, facts.target)
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
