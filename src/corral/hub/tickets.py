"""Tickets: addresses of one blob or one upload that work without an Authorization header, for a while.

Stock clients fetch the parts of a blob from an address they were sent to, sixteen at a time and without their token, and never
ask for a new address; some send a whole blob to one. A ticket in that address says which credential it was made for. It is good
for one purpose, one repository and one blob or upload, all under its MAC, until its time is over (W11). It is no authority
either: each use asks again whether the credential still is accepted, and gives what that may do at the moment (F20, T39).
"""

import base64
import binascii
import hmac
from collections.abc import Sequence
from datetime import datetime, timedelta
from enum import StrEnum
from hashlib import sha256

import msgspec

from corral.core.ports import Clock, CredentialStore
from corral.core.records import Account, Device, Principal, Proof, Scope, Visitor
from corral.hub import checks
from corral.hub.registry import BlobFacts, Registry
from corral.hub.repositories import REFUSALS, Caller
from corral.wire.errors import CorralError
from corral.wire.names import Digest
from corral.wire.repositories import RepositoryName
from corral.wire.signing import parse_encoded_key
from corral.wire.tokens import TICKET_LIFETIME_S

#: A ticket lives as long as its blob takes on a slow line, and no longer than a day.
MIN_LIFE, MAX_LIFE = timedelta(hours=1), timedelta(seconds=TICKET_LIFETIME_S)
_SLOW_BYTES_PER_S = 64 << 10
#: Longer ones are not ours.
_MAX_TEXT = 1024


class TicketKind(StrEnum):
    """What a ticket is good for."""

    #: Reading a blob.
    BLOB = "blob"
    #: Sending the content of an upload.
    UPLOAD = "upload"


class _Payload(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """What a ticket says itself; the rest of what it is good for is known where it is used. expires_at: epoch seconds. holder:
    `device`, `key` or `visitor`."""

    expires_at: int
    holder: str
    credential_id: str = ""
    device_key: str = ""


class Tickets:
    """Makes tickets and takes them. secret: 32 bytes. previous: secrets whose tickets are still taken."""

    def __init__(self, secret: bytes, *, credentials: CredentialStore, clock: Clock, previous: Sequence[bytes] = ()) -> None:
        self._current_id = _id_of(secret)
        self._secrets = {_id_of(known): known for known in (*previous, secret)}
        self._credentials = credentials
        self._clock = clock

    def issue(self, kind: TicketKind, name: RepositoryName, subject: Digest | str, caller: Caller, *, size_bytes: int) -> str:
        """A ticket in letters, digits and `-_.`, which survive in any query. subject: a blob's digest or an upload's id.
        size_bytes: of the content, which says how long the ticket lives. Raises: forbidden for a browser session."""
        life = MIN_LIFE + timedelta(seconds=size_bytes // _SLOW_BYTES_PER_S)
        expires_at = self._clock.now() + min(life, MAX_LIFE)
        payload = msgspec.json.encode(_payload(caller, expires_at))
        mac = _mac(self._secrets[self._current_id], kind, name, subject, payload)
        return f"{self._current_id}.{_base64url(payload)}.{_base64url(mac)}"

    async def redeem(self, text: str, kind: TicketKind, name: RepositoryName, subject: Digest | str) -> Principal | Visitor:
        """Who a ticket was made for, with what that credential may do now. Raises: forbidden for one that is altered, expired,
        for something else, or whose credential is not accepted any more; unavailable."""
        key_id, payload, mac = _split(text)
        secret = self._secrets.get(key_id)
        if secret is None or not hmac.compare_digest(_mac(secret, kind, name, subject, payload), mac):
            raise _bad_ticket()
        said = msgspec.json.decode(payload, type=_Payload)
        if self._clock.now().timestamp() >= said.expires_at:
            raise _bad_ticket()
        return await self._holder(said)

    async def blob(self, text: str, registry: Registry, name: RepositoryName, digest: Digest) -> BlobFacts:
        """The blob that a ticket is for. Raises: forbidden, also when the right to it was taken away since; blob_unknown."""
        caller = await self.redeem(text, TicketKind.BLOB, name, digest)
        try:
            return await registry.blob(name, digest, caller)
        except CorralError as error:
            if error.code not in REFUSALS:
                raise
            raise _bad_ticket() from error

    async def _holder(self, said: _Payload) -> Principal | Visitor:
        if said.holder == "visitor":
            return Visitor()
        if said.holder == "device":
            return await self._device(said)
        stored = await self._credentials.api_key(said.credential_id)
        if stored is None or not checks.is_live_key(stored.key, self._clock.now()):
            raise _bad_ticket()
        return _principal(stored.owner, stored.key.id, stored.key.scopes, device=None)

    async def _device(self, said: _Payload) -> Principal:
        found = await self._credentials.device(parse_encoded_key(said.device_key))
        # Its key may be another account's by now, as another device.
        if found is None or found[0].id != said.credential_id:
            raise _bad_ticket()
        return _principal(found[1], found[0].id, found[0].scopes, device=found[0])


def _payload(caller: Caller, expires_at: datetime) -> _Payload:
    seconds = int(expires_at.timestamp())
    match caller:
        case Principal(device=device) if device is not None:
            return _Payload(seconds, "device", device.id, device.key.encoded)
        case Principal(session=None, credential_id=credential_id):
            return _Payload(seconds, "key", credential_id)
        case Principal():
            raise CorralError("forbidden", "such an address is for devices and API keys; a browser has its session")
        case _:
            return _Payload(seconds, "visitor")


def _principal(owner: Account, credential_id: str, scopes: frozenset[Scope], *, device: Device | None) -> Principal:
    if not owner.is_active:
        raise _bad_ticket()
    # What it is good for is under its MAC, so it needs no grants.
    return Principal(
        account=owner,
        proof=Proof.REGISTRY_TOKEN,
        credential_id=credential_id,
        scopes=scopes & checks.rights_of(owner),
        device=device,
    )


def _id_of(secret: bytes) -> str:
    return sha256(b"corral ticket id" + secret).hexdigest()[:8]


def _mac(secret: bytes, kind: TicketKind, name: RepositoryName, subject: Digest | str, payload: bytes) -> bytes:
    # As a JSON list, in which no part can run into the next.
    covered = msgspec.json.encode(["corral ticket 1", str(kind), str(name.key), str(subject), payload.decode()])
    return hmac.digest(secret, covered, "sha256")


def _split(text: str) -> tuple[str, bytes, bytes]:
    parts = text.split(".")
    if len(text) > _MAX_TEXT or len(parts) != 3:
        raise _bad_ticket()
    try:
        payload, mac = (_from_base64url(part) for part in parts[1:])
        payload.decode("ascii")
    except ValueError as error:
        raise _bad_ticket() from error
    return parts[0], payload, mac


def _base64url(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).decode().rstrip("=")


def _from_base64url(text: str) -> bytes:
    data = base64.b64decode(text + "=" * (-len(text) % 4), altchars=b"-_", validate=True)
    # One ticket has one spelling: the last digit may hold bits that do not count.
    if _base64url(data) != text:
        raise binascii.Error("not as it was written")
    return data


def _bad_ticket() -> CorralError:
    return CorralError("forbidden", "this address is not valid, or not any more; ask the registry again")
