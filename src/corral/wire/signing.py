"""How a device proves itself: key text forms, the bytes that are signed, and the Authorization header. Both sides live here.

Stock clients sign three forms, which differ only in the signed text:

- *API call* (ollama's api.Client) and *relay* (a local server passing a request on): `METHOD,request-target`, where the target
  carries `ts` in its query and is taken exactly as it travels.
- *registry token*: `GET,<public URL + target>,<base64(hex(sha256("")))>`, where the target carries `ts` and `nonce`.

The header is `<base64 SSH key blob>:<base64 signature>`, with no scheme word. Verification never decodes, sorts or re-encodes
what it was given. Source: ollama auth/auth.go, api/client.go, server/cloud_proxy.go, server/auth.go, and the vectors in
tests/vectors. The stronger form that our own halves negotiate is in `strong`.
"""

import base64
import binascii
import re
from dataclasses import dataclass
from hashlib import sha256
from urllib.parse import quote

from nacl import bindings
from nacl.exceptions import BadSignatureError

from corral.wire.errors import CorralError
from corral.wire.pasted import fault_of_public_key

#: Seconds that a signed `ts` may lie before or behind the verifier's clock.
WINDOW_S = 300

#: base64 of the hex SHA-256 of nothing: the "body digest" of the registry-token form.
_EMPTY_BODY = base64.b64encode(sha256(b"").hexdigest().encode()).decode()

_KEY_TYPE = b"\x00\x00\x00\x0bssh-ed25519\x00\x00\x00\x20"
#: 68 characters are 51 bytes to the bit. Of the last one before the padding, four bits are spare and have to be zero: a signature
#: has one spelling and not sixteen (T11).
_HEADER = re.compile(r"([A-Za-z0-9+/]{68}):([A-Za-z0-9+/]{85}[AQgw]==)")
_SIGNATURE_BYTES = 64
#: Of a key in a link: base64 of `ssh-ed25519 ` and 68 characters.
_ENCODED_LENGTH = 107
_TS = re.compile(r"[0-9]{10}")


@dataclass(frozen=True, slots=True)
class DevicePublicKey:
    """The Ed25519 public key of one installation. raw: 32 bytes, not yet known to be a usable point."""

    raw: bytes

    @property
    def blob(self) -> bytes:
        """The SSH wire form, 51 bytes."""
        return _KEY_TYPE + self.raw

    @property
    def blob_text(self) -> str:
        """base64 of the blob, 68 characters: the first half of the header."""
        return base64.b64encode(self.blob).decode()

    @property
    def authorized_key(self) -> str:
        """The line of an `authorized_keys` file, without comment."""
        return f"ssh-ed25519 {self.blob_text}"

    @property
    def fingerprint(self) -> str:
        """`SHA256:` and 43 characters, as `ssh-keygen -lf` prints it. The identity of a device."""
        return "SHA256:" + base64.b64encode(sha256(self.blob).digest()).decode().rstrip("=")

    @property
    def encoded(self) -> str:
        """base64url, unpadded, of the authorized key: `key=` of a connect link, `{encodedKey}` of a path."""
        return base64.urlsafe_b64encode(self.authorized_key.encode()).decode().rstrip("=")


def parse_authorized_key(text: str) -> DevicePublicKey:
    """A public key that may be stored: right type, canonical, and a point of the main subgroup. Raises: bad_request."""
    key = _authorized_key(text)
    if key is None:
        advice = "copy the one line of ~/.ollama/id_ed25519.pub on the device, whole and without quotes"
        raise CorralError("bad_request", f"{fault_of_public_key(text)} → {advice}")
    return key


def _authorized_key(text: str) -> DevicePublicKey | None:
    parts = text.strip().split()
    if len(parts) < 2 or parts[0] != "ssh-ed25519":
        return None
    key = key_from_blob_text(parts[1])
    # Small-order keys verify signatures that nobody made; libsodium refuses them when it verifies, so refuse them here too.
    return key if key is not None and bindings.crypto_core_ed25519_is_valid_point(key.raw) else None


def parse_encoded_key(text: str) -> DevicePublicKey:
    """The key of a connect link or path; exactly one spelling per key is accepted. Raises: bad_request."""
    try:
        decoded = base64.b64decode(text + "=" * (-len(text) % 4), altchars=b"-_", validate=True).decode("ascii")
    except (ValueError, binascii.Error) as error:
        raise _damaged_link(text) from error
    key = _authorized_key(decoded)
    if key is None or key.encoded != text:
        raise _damaged_link(text)
    return key


def _damaged_link(text: str) -> CorralError:
    if not text:
        return CorralError("bad_request", "there is no key in this link")
    if len(text) < _ENCODED_LENGTH:
        return CorralError("bad_request", f"the key in this link is cut off: {len(text)} of {_ENCODED_LENGTH} characters")
    return CorralError("bad_request", "the key in this link is damaged")


def key_from_blob_text(text: str) -> DevicePublicKey | None:
    """The key of a blob's one canonical base64 text, not yet known to be a usable point; None for anything else."""
    blob = _strict_base64(text)
    if blob is None or len(blob) != len(_KEY_TYPE) + 32 or not blob.startswith(_KEY_TYPE):
        return None
    return DevicePublicKey(blob[len(_KEY_TYPE) :])


def _strict_base64(text: str) -> bytes | None:
    """The bytes, or None unless `text` is their one canonical spelling (a 64-byte value has 16 accepted by lax decoders)."""
    try:
        decoded = base64.b64decode(text, validate=True)
    except (ValueError, binascii.Error):
        return None
    return decoded if base64.b64encode(decoded).decode() == text else None


def connect_url(hub_url: str, name: str, key: DevicePublicKey) -> str:
    """The page where a person connects this device. hub_url: no trailing slash. Source: ollama cmd/cmd.go signin."""
    # Go's url.PathEscape leaves these characters of a path segment alone.
    return f"{hub_url}/connect?name={quote(name, safe='$&+:=@')}&key={key.encoded}"


@dataclass(frozen=True, slots=True)
class DeviceProof:
    """A presented key and a signature by it, not yet verified."""

    key: DevicePublicKey
    signature: bytes


def parse_authorization(header: str) -> DeviceProof:
    """Read the stock header: exactly 157 characters, both halves canonical. Raises: unauthorized."""
    match = _HEADER.fullmatch(header)
    blob = binascii.a2b_base64(match[1]) if match else b""
    if match is None or not blob.startswith(_KEY_TYPE):
        raise CorralError("unauthorized")
    return DeviceProof(DevicePublicKey(blob[len(_KEY_TYPE) :]), binascii.a2b_base64(match[2]))


def looks_like_device_header(header: str) -> bool:
    """Whether an Authorization header claims to be a device's, so that it is judged as one and never as anything else."""
    return ":" in header and " " not in header


def parse_ts(query: str) -> int:
    """`ts` of a raw query: exactly once, ten ASCII digits, seconds since the epoch. Raises: unauthorized."""
    values = [part[3:] for part in query.split("&") if part.startswith("ts=")]
    if len(values) != 1 or not _TS.fullmatch(values[0]):
        raise CorralError("unauthorized")
    return int(values[0])


def check_window(ts: int, now: float) -> None:
    """Refuse a time outside the window with 403 and the offset: a 401 would send a person into a sign-in loop. Raises:
    clock_skew."""
    offset = round(now - ts)
    if abs(now - ts) > WINDOW_S:
        where = "behind" if offset > 0 else "ahead of"
        raise CorralError("clock_skew", f"request time is {abs(offset)} s {where} the server; check this machine's clock")


def request_challenge(method: str, target: str) -> bytes:
    """Bytes signed for an API call or a relayed request. target: raw path and query as it travels, `ts` included."""
    return f"{method},{target}".encode()


def token_challenge(public_url: str, target: str) -> bytes:
    """Bytes signed for a registry token. public_url: the configured base without trailing slash, exactly as the realm is
    written."""
    return f"GET,{public_url}{target},{_EMPTY_BODY}".encode()


def enrollment_challenge(public_url: str, credential_id: str, ts: int) -> bytes:
    """Bytes by which a device agrees to be added by whoever presents one credential, at one hub, now. credential_id: what the hub
    calls the credential: an API key's public id, a device's id. No text that a device signs otherwise begins like this."""
    return f"corral-v1 add-device,{public_url},{credential_id},{ts}".encode()


def verify_enrollment(key: DevicePublicKey, signature: str, message: bytes) -> None:
    """Check that the holder of a key to be added signed for it (W8). signature: base64. Raises: forbidden."""
    decoded = _strict_base64(signature)
    try:
        if decoded is None or len(decoded) != _SIGNATURE_BYTES:
            raise CorralError("unauthorized")
        verify(DeviceProof(key, decoded), message)
    except CorralError as error:
        raise CorralError("forbidden", "the device must sign for being added, and this is not its signature") from error


def verify(proof: DeviceProof, message: bytes) -> None:
    """Check the signature with the presented key. Refuses small-order keys and S not reduced. Raises: unauthorized."""
    try:
        bindings.crypto_sign_open(proof.signature + message, proof.key.raw)
    except (BadSignatureError, ValueError) as error:
        raise CorralError("unauthorized") from error


@dataclass(frozen=True, slots=True, repr=False)
class DevicePrivateKey:
    """The signing half. seed: 32 bytes. Its repr shows only the fingerprint."""

    seed: bytes

    def __repr__(self) -> str:
        return f"DevicePrivateKey({self.public.fingerprint})"

    @property
    def public(self) -> DevicePublicKey:
        """The public half."""
        return DevicePublicKey(bindings.crypto_sign_seed_keypair(self.seed)[0])

    def sign(self, message: bytes) -> bytes:
        """The 64-byte signature."""
        return self.sign_as(message)[1]

    def sign_as(self, message: bytes) -> tuple[DevicePublicKey, bytes]:
        """(the public half, the signature). Each takes the whole key pair, which costs 26 µs to derive."""
        public, secret = bindings.crypto_sign_seed_keypair(self.seed)
        return DevicePublicKey(public), bindings.crypto_sign(message, secret)[:64]


def authorization_header(key: DevicePrivateKey, challenge: bytes) -> str:
    """The stock Authorization value for a challenge."""
    public, signature = key.sign_as(challenge)
    return f"{public.blob_text}:{base64.b64encode(signature).decode()}"


def signed_target(path: str, query: str, ts: int) -> str:
    """Add `ts` to a target as a stock local server does: parameters sorted by name, any old `ts` replaced."""
    pairs = [part for part in query.split("&") if part and not part.startswith("ts=")]
    pairs.append(f"ts={ts}")
    # Go's url.Values.Encode sorts by key and keeps the order of equal keys.
    pairs.sort(key=lambda part: part.split("=", 1)[0])
    return f"{path}?{'&'.join(pairs)}"


# Checked once at import so that a build of libsodium without the call fails at start, not at the first request.
assert bindings.has_crypto_core_ed25519
