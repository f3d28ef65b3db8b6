"""Registry tokens: what `/v2/token` gives out and the door takes back.

A token says which credential it was given for and which repositories it is good for. It is no authority of its own: the door asks
on every request whether that credential still is good, so a revoked one takes its tokens with it (T62), and what the token grants
is only ever a part of what its holder may do at that moment.
"""

import base64
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime

from joserfc import jwt
from joserfc.jwk import OKPKey
from nacl import bindings

from corral.core.ports import Clock, Entropy
from corral.core.records import Principal, Visitor
from corral.core.registry import Grant
from corral.wire.secrets import Secret
from corral.wire.signing import DevicePublicKey
from corral.wire.tokens import (
    ALGORITHM,
    LIFETIME_S,
    TokenClaims,
    TokenHolder,
    TokenKeys,
    check_claims,
    public_keys,
    read_token,
    token_header,
)

#: The audience, the same on every hub; which hub it is says the issuer. Holds no word that clients look for in a challenge.
SERVICE = "corral"
_JTI_BYTES = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class IssuedToken:
    """A new token. expires_in_s: from issued_at, which is a whole second."""

    text: Secret
    issued_at: datetime
    expires_in_s: int = LIFETIME_S


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenContent:
    """What a good token says. kind: `device`, `key` or `visitor`. credential_id: of the API key or device. key: the device's,
    connected or not. grants: repository in lower case -> actions."""

    kind: str
    credential_id: str
    key: DevicePublicKey | None
    grants: Mapping[str, frozenset[str]]


class RegistryTokens:
    """Makes tokens and reads them. issuer: the hub's public URL. service: the audience, as challenges name it."""

    def __init__(self, keys: TokenKeys, *, issuer: str, service: str = SERVICE, clock: Clock, entropy: Entropy) -> None:
        self._issuer = issuer
        self._service = service
        self._clock = clock
        self._entropy = entropy
        self._header = token_header(keys.current_id)
        self._key = _signing_key(keys.seeds[keys.current_id])
        self._public_keys = public_keys(keys)

    @property
    def service(self) -> str:
        """What challenges name as `service`."""
        return self._service

    def issue(self, caller: Principal | Visitor | None, grants: Sequence[Grant]) -> IssuedToken:
        """A token for whoever showed that. grants: already cut to what the caller may do."""
        now = self._clock.now().replace(microsecond=0)
        issued_at = int(now.timestamp())
        claims = {
            "iss": self._issuer,
            "sub": caller.account.name if isinstance(caller, Principal) else "",
            "aud": self._service,
            "iat": issued_at,
            "nbf": issued_at,
            "exp": issued_at + LIFETIME_S,
            "jti": _base64url(self._entropy.bytes(_JTI_BYTES)),
            "access": [{"type": "repository", "name": one.repository, "actions": sorted(one.actions)} for one in grants],
            "corral": _holder(caller),
        }
        return IssuedToken(text=Secret(jwt.encode(self._header, claims, self._key, algorithms=[ALGORITHM])), issued_at=now)

    def verify(self, text: str, *, leeway_s: int = 0) -> TokenContent:
        """What a token says, once it is certain that we said it, for this hub, and that its time is not over. leeway_s: seconds
        behind its end for which it is taken nevertheless. Raises: unauthorized."""
        claims = read_token(text, self._public_keys)
        now = self._clock.now().timestamp()
        check_claims(claims, issuer=self._issuer, service=self._service, now=now, leeway_s=leeway_s)
        held = claims.corral
        # Written by ourselves, so that there is no question whether it is a good key.
        key = DevicePublicKey(base64.b64decode(held.key)) if held.key else None
        return TokenContent(kind=held.kind, credential_id=held.id, key=key, grants=_grants(claims))


def _holder(caller: Principal | Visitor | None) -> dict[str, str]:
    match caller:
        case Principal(device=device) if device is not None:
            holder = TokenHolder("device", device.id, _base64(device.key.raw))
        case Principal(credential_id=credential_id):
            holder = TokenHolder("key", credential_id)
        case Visitor(key=key) if key is not None:
            holder = TokenHolder("visitor", key=_base64(key.raw))
        case _:
            holder = TokenHolder("visitor")
    return {"kind": holder.kind, "id": holder.id, "key": holder.key}


def _grants(claims: TokenClaims) -> dict[str, frozenset[str]]:
    grants: dict[str, frozenset[str]] = {}
    for entry in claims.access:
        name = entry.name.lower()
        grants[name] = grants.get(name, frozenset()) | frozenset(entry.actions)
    return grants


def _signing_key(seed: bytes) -> OKPKey:
    public, _ = bindings.crypto_sign_seed_keypair(seed)
    return OKPKey.import_key({"kty": "OKP", "crv": "Ed25519", "d": _base64url(seed), "x": _base64url(public)})


def _base64(data: bytes) -> str:
    return base64.b64encode(data).decode()


def _base64url(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).decode().rstrip("=")
