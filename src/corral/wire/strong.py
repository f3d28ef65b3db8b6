"""The stronger signature that our own client and our own hub negotiate: HTTP Message Signatures (RFC 9421).

It covers what the stock form leaves out: the host, the whole target and the body (RFC 9530 Content-Digest), and carries a nonce
that the verifier must use up. `keyid` is the base64 SSH key blob, not the fingerprint, so that a verifier can check the signature
before any look-up, in the same order as for the stock form.

Our own client writes it in one spelling, which is written and read here; every other spelling that the standard allows, and every
URL with something unusual in it, goes through the http-message-signatures package. That reads any signature there is, which takes
0.8 ms, on either side of every request that waits for its first token; one known spelling takes 0.1 ms. The tests hold the two
against each other.
"""

import base64
import re
from binascii import a2b_base64
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from hashlib import sha256

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from http_message_signatures import (
    HTTPMessageSigner,
    HTTPMessageVerifier,
    HTTPSignatureKeyResolver,
    algorithms,
)
from http_message_signatures.exceptions import HTTPMessageSignaturesException

from corral.wire.errors import CorralError
from corral.wire.signing import (
    DevicePrivateKey,
    DeviceProof,
    DevicePublicKey,
    check_window,
    key_from_blob_text,
    parse_authorized_key,
    verify,
)

TAG = "corral-v1"
#: A signature older than this is refused; the nonce must be remembered at least this long plus the allowed skew.
MAX_AGE_S = 60
NONCE_BYTES = 16
_COVERED = ("@method", "@target-uri", "content-digest")
_ALL_COVERED = '"@method" "@target-uri" "content-type" "content-digest"'

#: What needs no thought to be signed: `_URL` is its own target URI as RFC 9421 2.2.2 wants it, and so on.
_METHOD = re.compile(r"[A-Z]{1,20}")
_URL = re.compile(r"https?://[a-z0-9.\-]+(?::[0-9]+)?/(?:[A-Za-z0-9._~\-!$&'()*+,;=:@/?]|%[0-9A-Fa-f]{2})*")
_CONTENT_TYPE = re.compile(r"[!-~](?:[ -~]*[!-~])?")
#: A signature as `_signed` writes it. The last character before padding has spare bits, which have to be zero: one spelling each.
_INPUT = re.compile(
    r'corral=(\("@method" "@target-uri"( "content-type")? "content-digest"\)'
    r';created=([0-9]{10});keyid="([A-Za-z0-9+/]{68})";alg="ed25519";nonce="([A-Za-z0-9_-]{16,64})";tag="corral-v1")'
)
_DIGEST = re.compile(r"sha-256=:[A-Za-z0-9+/]{43}=:")
_SIGNATURE = re.compile(r"corral=:([A-Za-z0-9+/]{85}[AQgw]==):")


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
    content_type = next((value for name, value in headers.items() if name.lower() == "content-type"), None)
    nonce_text = base64.urlsafe_b64encode(nonce).decode().rstrip("=")
    if _is_plain(method, url, content_type):
        return _signed(key, method, url, content_type, body=body, created=int(now), nonce=nonce_text)
    message = _Message(method.upper(), url, {} if content_type is None else {"content-type": content_type})
    covered = (*_COVERED[:2], *(() if content_type is None else ("content-type",)))
    try:
        HTTPMessageSigner(signature_algorithm=algorithms.ED25519, key_resolver=_Keys(key)).sign(
            message,
            key_id=key.public.blob_text,
            created=datetime.fromtimestamp(int(now), UTC),
            nonce=nonce_text,
            label="corral",
            tag=TAG,
            covered_component_ids=covered,
            body=body,
        )
    except HTTPMessageSignaturesException as error:
        raise CorralError("bad_request", "this URL cannot be signed; it is not an absolute URL in its encoded form") from error
    message.headers.pop("content-type", None)
    return message.headers


def _is_plain(method: str, url: str, content_type: str | None) -> bool:
    return bool(
        _METHOD.fullmatch(method) and _URL.fullmatch(url) and (content_type is None or _CONTENT_TYPE.fullmatch(content_type))
    )


def _signed(
    key: DevicePrivateKey, method: str, url: str, content_type: str | None, *, body: bytes, created: int, nonce: str
) -> dict[str, str]:
    covered = '"@method" "@target-uri" "content-digest"' if content_type is None else _ALL_COVERED
    digest = _digest(body)
    parameters = f'({covered});created={created};keyid="{key.public.blob_text}";alg="ed25519";nonce="{nonce}";tag="{TAG}"'
    signature = key.sign(_base(method, url, content_type, digest, parameters))
    return {
        "Content-Digest": digest,
        "Signature-Input": f"corral={parameters}",
        "Signature": f"corral=:{base64.b64encode(signature).decode()}:",
    }


def _digest(body: bytes) -> str:
    return f"sha-256=:{base64.b64encode(sha256(body).digest()).decode()}:"


def _base(method: str, url: str, content_type: str | None, digest: str, parameters: str) -> bytes:
    """The bytes that are signed. Source: RFC 9421 2.5."""
    type_line = "" if content_type is None else f'"content-type": {content_type}\n'
    return (
        f'"@method": {method}\n"@target-uri": {url}\n{type_line}"content-digest": {digest}\n"@signature-params": {parameters}'
    ).encode("ascii")


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
    found = _verified_by_hand(method, url, headers, body) or _verified_by_package(method, url, headers, body)
    key, created, nonce = found
    _check_age(created, now)
    return StrongProof(key, nonce)


def _verified_by_hand(method: str, url: str, headers: Mapping[str, str], body: bytes) -> tuple[DevicePublicKey, int, str] | None:
    """(key, created, nonce) of a signature in our own spelling; None for any other. The key need not be of the main subgroup, as
    in the stock form: one that is not cannot be connected. Raises: unauthorized."""
    content_type = headers.get("content-type")
    spelled = _INPUT.fullmatch(headers.get("signature-input", ""))
    signature = _SIGNATURE.fullmatch(headers.get("signature", ""))
    digest = headers.get("content-digest", "")
    if not (spelled and signature and _DIGEST.fullmatch(digest) and _is_plain(method, url, content_type)):
        return None
    parameters, covers_type, created, blob_text, nonce = spelled.groups()
    public = key_from_blob_text(blob_text)
    if public is None or (covers_type is None) != (content_type is None) or digest != _digest(body):
        raise CorralError("unauthorized")
    verify(DeviceProof(public, a2b_base64(signature[1])), _base(method, url, content_type, digest, parameters))
    return public, int(created), nonce


def _verified_by_package(method: str, url: str, headers: Mapping[str, str], body: bytes) -> tuple[DevicePublicKey, int, str]:
    """(key, created, nonce) of a signature in any spelling. Raises: unauthorized."""
    required = (*_COVERED, *(("content-type",) if "content-type" in headers else ()))
    keys = _Keys()
    verifier = HTTPMessageVerifier(signature_algorithm=algorithms.ED25519, key_resolver=keys)
    try:
        results = verifier.verify(
            _Message(method, url, dict(headers)),
            # The library reads the real clock; age is checked against the clock we are given.
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
    return keys.public, created, nonce


def _check_age(created: int, now: float) -> None:
    # Far off means a wrong clock, and gets the answer that says so; a little off may be a replay, and gets none of its own.
    check_window(created, now)
    age = timedelta(seconds=now - created)
    if not timedelta(seconds=-5) <= age <= timedelta(seconds=MAX_AGE_S):
        raise CorralError("unauthorized", f"the signature was made {round(now - created)} s ago; check this machine's clock")
