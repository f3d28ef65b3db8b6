"""The stronger signature that our own client and our own hub negotiate: HTTP Message Signatures (RFC 9421).

It covers what the stock form leaves out: the host, the whole target and the body (RFC 9530 Content-Digest), and carries a nonce
that the verifier must use up. `keyid` is the base64 SSH key blob, not the fingerprint, so that a verifier can check the signature
before any look-up, in the same order as for the stock form.
"""

import base64
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from http_message_signatures import (
    HTTPMessageSigner,
    HTTPMessageVerifier,
    HTTPSignatureKeyResolver,
    algorithms,
)
from http_message_signatures.exceptions import HTTPMessageSignaturesException
from nacl import bindings

from corral.wire.errors import CorralError
from corral.wire.signing import DevicePrivateKey, DevicePublicKey, check_window, parse_authorized_key

TAG = "corral-v1"
#: A signature older than this is refused; the nonce must be remembered at least this long plus the allowed skew.
MAX_AGE_S = 60
NONCE_BYTES = 16
_COVERED = ("@method", "@target-uri", "content-digest")


@dataclass(slots=True)
class _Message:
    method: str
    url: str
    headers: dict[str, str] = field(default_factory=dict)


class _Keys(HTTPSignatureKeyResolver):
    """Resolves the one key id that is expected in this call and no other. public: the key that was asked for, once it was."""

    def __init__(self, private: DevicePrivateKey | None = None) -> None:
        self._private = private
        self.public: DevicePublicKey | None = None

    def resolve_private_key(self, key_id: str) -> Ed25519PrivateKey:
        if self._private is None or key_id != self._private.public.blob_text:
            raise KeyError(key_id)
        return Ed25519PrivateKey.from_private_bytes(self._private.seed)

    def resolve_public_key(self, key_id: str) -> Ed25519PublicKey:
        # parse_authorized_key refuses small-order points, which `cryptography` alone would accept.
        self.public = parse_authorized_key(f"ssh-ed25519 {key_id}")
        return Ed25519PublicKey.from_public_bytes(self.public.raw)


def sign_headers(
    key: DevicePrivateKey, method: str, url: str, headers: Mapping[str, str], *, body: bytes, now: float, nonce: bytes
) -> dict[str, str]:
    """The headers to add: Content-Digest, Signature-Input and Signature. url: absolute, as it will be sent. headers: those
    that will be sent; `content-type` is covered when present. nonce: `NONCE_BYTES` random bytes. Raises: bad_request for
    another URL."""
    sent = {name.lower(): value for name, value in headers.items()}
    message = _Message(method.upper(), url, {"content-type": sent["content-type"]} if "content-type" in sent else {})
    covered = (*_COVERED[:2], *(("content-type",) if "content-type" in sent else ()))
    try:
        HTTPMessageSigner(signature_algorithm=algorithms.ED25519, key_resolver=_Keys(key)).sign(
            message,
            key_id=key.public.blob_text,
            created=datetime.fromtimestamp(int(now), UTC),
            nonce=base64.urlsafe_b64encode(nonce).decode().rstrip("="),
            label="corral",
            tag=TAG,
            covered_component_ids=covered,
            body=body,
        )
    except HTTPMessageSignaturesException as error:
        raise CorralError("bad_request", "this URL cannot be signed; it is not an absolute URL in its encoded form") from error
    message.headers.pop("content-type", None)
    return message.headers


@dataclass(frozen=True, slots=True)
class StrongProof:
    """A verified strong signature. nonce: to be used up, keyed with the key, before the request is let in."""

    key: DevicePublicKey
    nonce: str


def is_strong(headers: Mapping[str, object]) -> bool:
    """Whether a request claims a strong signature. headers: lower-case names."""
    return "signature-input" in headers or "signature" in headers


def verify_headers(method: str, url: str, headers: Mapping[str, str], *, body: bytes, now: float) -> StrongProof:
    """Check a strong signature over everything it must cover. url: our configured public URL plus the raw target, never rebuilt
    from Host. headers: lower-case names, repeated fields joined by `, `. Raises: unauthorized; clock_skew when the clock is
    minutes off."""
    required = (*_COVERED, *(("content-type",) if "content-type" in headers else ()))
    keys = _Keys()
    verifier = HTTPMessageVerifier(signature_algorithm=algorithms.ED25519, key_resolver=keys)
    try:
        results = verifier.verify(
            _Message(method, url, dict(headers)),
            # The library reads the real clock; age is checked below against the clock we are given.
            max_age=None,
            expect_tag=TAG,
            require_components=required,
            body=body,
        )
    except (HTTPMessageSignaturesException, CorralError, ValueError) as error:
        raise CorralError("unauthorized") from error
    if len(results) != 1 or headers["signature-input"].count("tag=") != 1 or keys.public is None:
        raise CorralError("unauthorized")
    parameters = results[0].parameters
    created, nonce = parameters.get("created"), parameters.get("nonce")
    if not isinstance(created, int) or not isinstance(nonce, str) or not 16 <= len(nonce) <= 64:
        raise CorralError("unauthorized")
    _check_age(created, now)
    return StrongProof(keys.public, nonce)


def _check_age(created: int, now: float) -> None:
    # Far off means a wrong clock, and gets the answer that says so; a little off may be a replay, and gets none of its own.
    check_window(created, now)
    age = timedelta(seconds=now - created)
    if not timedelta(seconds=-5) <= age <= timedelta(seconds=MAX_AGE_S):
        raise CorralError("unauthorized", f"the signature was made {round(now - created)} s ago; check this machine's clock")


# Checked once at import so that a build of libsodium without the call fails at start, not at the first request.
assert bindings.has_crypto_core_ed25519
