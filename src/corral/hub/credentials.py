"""Devices and API keys: connecting and revoking, creating and rotating; and, through `door`, what they open.

Every change of authority is written to the audit log before it is made; when that row cannot be written, the change does not
happen. Whoever acts through a credential can hand out no more than that credential may do (T61).
"""

import hmac
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timedelta

from corral.core.policy import ALL_SCOPES, DEVICE_SCOPES, may_grant, needs_step_up
from corral.core.ports import AuditLog, Clock, CredentialStore, Entropy, SightingStore
from corral.core.records import (
    Account,
    ApiKey,
    AuditEvent,
    BrowserSession,
    Device,
    Principal,
    Proof,
    RequestFacts,
    Scope,
    Sighting,
    Visitor,
)
from corral.hub import checks
from corral.hub.accounts import Accounts
from corral.hub.door import Door
from corral.hub.networks import network_of
from corral.hub.replay import Alarms
from corral.hub.sightings import SIGHTING_TTL
from corral.hub.throttle import Throttle, per_minutes
from corral.hub.tokens import RegistryTokens
from corral.wire.apikeys import ENTROPY_BYTES, ApiKeyText, Peppers, api_key_hmac, make_api_key
from corral.wire.errors import CorralError
from corral.wire.secrets import Secret
from corral.wire.signing import DevicePublicKey, parse_authorized_key, parse_encoded_key
from corral.wire.text import shown_name

#: How many characters at the end of a fingerprint a person is asked for.
TAIL_LENGTH = 6
MAX_OVERLAP_S = 7 * 24 * 3600
#: More keys than anybody can keep apart; it bounds what one account can put into listings.
MAX_LIVE_KEYS = 100
#: A key may live for ever, but a date is one that every clock and calendar in the way can hold.
MAX_KEY_LIFE = timedelta(days=3653)
_TAILS = per_minutes(5, 15)

#: Who acts: a principal, within what its credential may do, or an account as such, when the page or the console speaks for it.
Acting = Account | Principal


@dataclass(frozen=True, slots=True, kw_only=True)
class PendingDevice:
    """What a connect page shows. name: cleaned, never verified. sighting: None when the device was not seen lately.
    needs_tail: whether the person must type the end of the fingerprint. already: `this account`, `another`, or empty when the
    device is free."""

    key: DevicePublicKey
    name: str
    sighting: Sighting | None
    needs_tail: bool
    already: str


class Credentials:
    """Everything about devices and API keys."""

    def __init__(
        self,
        *,
        accounts: Accounts,
        store: CredentialStore,
        sightings: SightingStore,
        audit: AuditLog,
        clock: Clock,
        entropy: Entropy,
        peppers: Peppers,
        tokens: RegistryTokens,
        public_url: str,
    ) -> None:
        self._store = store
        self._sightings = sightings
        self._audit = audit
        self._clock = clock
        self._entropy = entropy
        self._peppers = peppers
        self._tails = Throttle(clock)
        self._alarms = Alarms(clock)
        self._door = Door(
            accounts=accounts,
            store=store,
            sightings=sightings,
            audit=audit,
            clock=clock,
            entropy=entropy,
            peppers=peppers,
            tokens=tokens,
            public_url=public_url,
        )

    async def authenticate(self, facts: RequestFacts) -> Principal | Visitor | None:
        """Who sends this request; see `Door.authenticate`."""
        return await self._door.authenticate(facts)

    async def by_named_key(self, name: str, text: str, facts: RequestFacts) -> Principal:
        """Who a name and an API key are that came in a form; see `Door.by_named_key`."""
        return await self._door.by_named_key(name, text, facts)

    async def is_live(self, principal: Principal) -> bool:
        """Whether the credential would still be accepted."""
        return await self._door.is_live(principal)

    async def confirm(self, principal: Principal) -> None:
        """Raises: unauthorized when the credential would not be accepted any more, or not for as much; see `Door.confirm`."""
        await self._door.confirm(principal)

    async def flush_uses(self) -> None:
        """Write down when credentials were last used."""
        await self._door.flush_uses()

    # ── Devices ──────────────────────────────────────────────────────────────────────────────────────────────────────

    async def pending_device(
        self, *, encoded_key: str, name: str, code: str, network: str, account: Account | None = None
    ) -> PendingDevice:
        """What is known about the device of a connect link. Changes nothing. Raises: bad_request for a damaged key."""
        key = parse_encoded_key(encoded_key)
        sighting = await self._sighting(key)
        return PendingDevice(
            key=key,
            name=_device_name(name),
            sighting=sighting,
            needs_tail=sighting is None or network_of(sighting.network) != network_of(network),
            already=await self._whose(key, account),
        )

    async def _sighting(self, key: DevicePublicKey) -> Sighting | None:
        return await self._sightings.find(key, since=self._clock.now() - SIGHTING_TTL)

    async def _whose(self, key: DevicePublicKey, account: Account | None) -> str:
        found = await self._store.device(key)
        if found is None:
            return ""
        return "this account" if account is not None and found[1].id == account.id else "another"

    async def connect_device(
        self,
        session: BrowserSession,
        account: Account,
        *,
        encoded_key: str,
        name: str,
        code: str,
        network: str,
        fingerprint_tail: str = "",
        scopes: frozenset[Scope] = DEVICE_SCOPES,
    ) -> Device:
        """Bind the device of a connect link to the account. One that is bound to it already is returned as it is.

        A bare link proves nothing about who made it: an attacker could mail his own (W7). So the device must have knocked
        itself lately, the link's code must be the one it was given, and a person in another network than the device types the
        end of its fingerprint. Raises: forbidden (detail `step_up`) when the password was typed too long ago, conflict when
        the device was not seen lately or belongs to somebody else, gone for an old link, invalid for a wrong tail,
        rate_limited after five of those.
        """
        if needs_step_up(session, self._clock.now()):
            raise CorralError("forbidden", "confirm your password first", detail={"step_up": True})
        pending = await self.pending_device(encoded_key=encoded_key, name=name, code=code, network=network, account=account)
        try:
            if pending.already:
                return await self._connected(pending)
            self._check_sighting(pending.sighting, code)
            if pending.needs_tail:
                self._check_tail(account, pending.key, fingerprint_tail)
        except CorralError as error:
            # Once in a while of each kind: five wrong tails are one story, and anybody can make links.
            if self._alarms.is_news(f"device.connect_refused: {error.code}", account.id):
                await self._record(account, "device.connect_refused", pending.key.fingerprint, network=network, note=error.code)
            raise
        device = self._new_device(account, pending.name, pending.key, scopes)
        await self._record(account, "device.connect", device.id, network=network, note=f"{device.name} {device.key.fingerprint}")
        await self._store.add_device(device)
        await self._sightings.forget(pending.key)
        return device

    async def _connected(self, pending: PendingDevice) -> Device:
        found = await self._store.device(pending.key)
        if pending.already != "this account" or found is None:
            # A linked key is never moved: its owner signs the device out first (W8).
            raise CorralError("conflict", "this device is connected to another account; sign it out there first")
        return found[0]

    def _check_sighting(self, sighting: Sighting | None, code: str) -> None:
        if sighting is None:
            raise CorralError(
                "conflict", "this device has not asked to sign in lately; run the sign-in on it and use its new link"
            )
        # A link that the device wrote itself has no code; one that we wrote has the code of this sighting.
        if code and not hmac.compare_digest(code.encode("utf-8", "replace"), sighting.code.encode()):
            raise CorralError("gone", "this link is old; run the sign-in on the device again and use its new link")

    def _check_tail(self, account: Account, key: DevicePublicKey, tail: str) -> None:
        mine = ("tail", account.id)
        self._tails.attempt((_TAILS, mine))
        if not hmac.compare_digest(tail.strip().encode("utf-8", "replace"), key.fingerprint[-TAIL_LENGTH:].encode()):
            raise CorralError(
                "invalid", f"type the last {TAIL_LENGTH} characters of the fingerprint that ssh-keygen -lf shows on the device"
            )
        self._tails.forgive(_TAILS, mine)

    async def add_device(
        self, acting: Acting, *, name: str, authorized_key: str, scopes: frozenset[Scope], network: str = "", actor: str = ""
    ) -> Device:
        """Bind a device without a browser: by somebody who holds a credential of the account, or on the console. actor: `console`
        there. A device that is connected already gets the scopes that it lacks. Raises: bad_request for a damaged key, conflict
        when it belongs to somebody else, forbidden for scopes beyond the actor's own."""
        account = _account_of(acting)
        key = parse_authorized_key(authorized_key)
        _check_within(acting, scopes)
        found = await self._store.device(key)
        if found is not None:
            if found[1].id != account.id:
                raise CorralError("conflict", "this device is connected to another account; sign it out there first")
            return await self._widened(acting, found[0], scopes, network=network, actor=actor)
        device = self._new_device(account, _device_name(name), key, scopes)
        note = f"{device.name} {key.fingerprint}"
        await self._record(acting, "device.add", device.id, network=network, note=note, actor=actor)
        await self._store.add_device(device)
        await self._sightings.forget(key)
        return device

    async def _widened(self, acting: Acting, device: Device, scopes: frozenset[Scope], *, network: str, actor: str) -> Device:
        """The device with those scopes besides its own: whoever connects it once more wants it to do more, never less."""
        wider = device.scopes | scopes & DEVICE_SCOPES
        if wider == device.scopes:
            return device
        note = _scopes_note(device.name, wider)
        await self._record(acting, "device.scopes", device.id, network=network, note=note, actor=actor)
        await self._store.set_device_scopes(device.account_id, device.id, wider, now=self._clock.now())
        return replace(device, scopes=wider)

    def _new_device(self, account: Account, name: str, key: DevicePublicKey, scopes: frozenset[Scope]) -> Device:
        return Device(
            id="d" + self._entropy.bytes(12).hex(),
            account_id=account.id,
            name=name,
            key=key,
            scopes=scopes & DEVICE_SCOPES,
            created_at=self._clock.now(),
        )

    async def devices_of(self, account: Account) -> Sequence[Device]:
        """The live ones, oldest first, with what was used a moment ago."""
        devices = await self._store.devices_of(account.id)
        return [
            replace(device, last_used_at=use[0], last_network=use[1]) if (use := self._door.unwritten_use(device.id)) else device
            for device in devices
        ]

    async def devices_written_down(self, ids: Collection[str]) -> Mapping[str, Device]:
        """Id -> device of those that usage or the audit log speaks of, whoever owns them; revoked ones keep their names. For
        pages that show what was written down to those who may read it, not for lists of somebody's devices."""
        return {device.id: device for device in await self._store.devices_with(ids)}

    async def revoke_device(self, acting: Acting, device_id: str, actor: str = "", *, network: str = "") -> None:
        """Refused from the next request on. Raises: not_found."""
        await self._own_device(acting, device_id, network)
        await self._record(acting, "device.revoke", device_id, network=network, actor=actor)
        await self._store.revoke_device(_account_of(acting).id, device_id, now=self._clock.now())

    async def set_device_scopes(
        self, acting: Acting, device_id: str, scopes: frozenset[Scope], *, network: str = "", actor: str = ""
    ) -> Device:
        """The device with exactly these scopes, from its next request on. Raises: not_found, forbidden for scopes that the device
        would get and the actor does not have; taking some back is open to whoever may sign the device out."""
        device = await self._own_device(acting, device_id, network)
        _check_within(acting, scopes - device.scopes)
        wanted = scopes & DEVICE_SCOPES
        if wanted == device.scopes:
            return device
        await self._record(
            acting, "device.scopes", device.id, network=network, note=_scopes_note(device.name, wanted), actor=actor
        )
        if not await self._store.set_device_scopes(device.account_id, device.id, wanted, now=self._clock.now()):
            raise CorralError("not_found", "no such device")
        return replace(device, scopes=wanted)

    async def rename_device(self, acting: Acting, device_id: str, name: str, *, network: str = "") -> Device:
        """Raises: not_found, invalid for a name of which nothing can be shown."""
        device = await self._own_device(acting, device_id, network)
        shown = shown_name(name)
        if not shown:
            raise CorralError("invalid", "give the device a name")
        await self._record(acting, "device.rename", device_id, network=network, note=f"{device.name} → {shown}")
        await self._store.rename_device(device.account_id, device_id, shown)
        return replace(device, name=shown)

    async def sign_out_device(self, principal: Principal, encoded_key: str, *, network: str = "") -> None:
        """Unbind a device of the caller's account by its key. A stock signature covers no more than the target, so it can
        sign out only the device that made it; anything else takes the scope `keys`. Raises: bad_request, not_found,
        forbidden."""
        key = parse_encoded_key(encoded_key)
        found = await self._store.device(key)
        if found is None or found[1].id != principal.account.id:
            await self._record(principal, "device.sign_out_refused", key.fingerprint, network=network)
            raise CorralError("not_found", "no such device")
        is_own = principal.device is not None and principal.device.key == key
        if not is_own and (principal.proof is Proof.STOCK_SIGNATURE or Scope.KEYS not in principal.scopes):
            raise CorralError("forbidden", "this credential may sign out only its own device")
        await self._record(principal, "device.sign_out", found[0].id, network=network)
        await self._store.revoke_device(principal.account.id, found[0].id, now=self._clock.now())

    async def _own_device(self, acting: Acting, device_id: str, network: str) -> Device:
        for device in await self._store.devices_of(_account_of(acting).id):
            if device.id == device_id:
                return device
        await self._record(acting, "device.access_refused", device_id, network=network)
        raise CorralError("not_found", "no such device")

    # ── API keys ─────────────────────────────────────────────────────────────────────────────────────────────────────

    async def create_key(
        self,
        acting: Acting,
        *,
        name: str,
        scopes: frozenset[Scope],
        expires_at: datetime | None,
        network: str = "",
        actor: str = "",
    ) -> tuple[ApiKey, Secret]:
        """A new key and its text, which is kept nowhere. Raises: invalid for an empty name, no scope or an expiry that is past
        or more than ten years away, forbidden for scopes beyond the actor's own, conflict when the account has very many."""
        _check_within(acting, scopes)
        shown = shown_name(name)
        if not shown or not scopes:
            raise CorralError("invalid", "an API key needs a name and at least one scope")
        key, made = self._new_key(acting, shown, scopes, self._expiry(expires_at))
        await self._check_room(_account_of(acting))
        note = f"{shown}: {' '.join(sorted(scopes))}"
        await self._record(acting, "key.create", key.id, network=network, actor=actor, note=note)
        hmac, pepper_id = self._kept_secret(made)
        try:
            await self._store.add_api_key(key, hmac=hmac, pepper_id=pepper_id, max_live=MAX_LIVE_KEYS)
        except CorralError as error:
            await self._take_back(error, acting, "key.create_refused", key.id, network=network, actor=actor)
            raise
        return key, made.text

    def _expiry(self, wanted: datetime | None) -> datetime | None:
        """The wanted time in UTC. Raises: invalid."""
        if wanted is None:
            return None
        now = self._clock.now()
        # A difference of two times cannot overflow, whatever their zones; converting the wanted one could.
        life = wanted - now
        if not timedelta(0) < life <= MAX_KEY_LIFE:
            raise CorralError("invalid", "the expiry of an API key lies in the future, within ten years")
        return now + life

    async def _check_room(self, account: Account) -> None:
        # Asked first so that the audit log does not tell of keys that were never made; the store decides in the end.
        now = self._clock.now()
        live = [key for key in await self._store.api_keys_of(account.id) if checks.is_live_key(key, now)]
        if len(live) >= MAX_LIVE_KEYS:
            raise CorralError("conflict", f"an account has at most {MAX_LIVE_KEYS} live API keys; revoke one first")

    def _new_key(
        self, acting: Acting, name: str, scopes: frozenset[Scope], expires_at: datetime | None
    ) -> tuple[ApiKey, ApiKeyText]:
        made = make_api_key(self._entropy.bytes(ENTROPY_BYTES))
        # A key that was given away for a time must not make one that outlives it, nor itself live on as its own successor.
        own_end = acting.expires_at if isinstance(acting, Principal) else None
        key = ApiKey(
            id=made.public_id,
            account_id=_account_of(acting).id,
            name=name,
            prefix=made.prefix,
            scopes=scopes,
            created_at=self._clock.now(),
            expires_at=min((end for end in (expires_at, own_end) if end is not None), default=None),
        )
        return key, made

    def _kept_secret(self, made: ApiKeyText) -> tuple[bytes, str]:
        current = self._peppers.current_id
        return api_key_hmac(made, self._peppers.values[current]), current

    async def _take_back(
        self, error: CorralError, acting: Acting, action: str, subject: str, *, network: str, actor: str
    ) -> None:
        """Say in the audit log that what it tells of was refused after all."""
        if error.code in ("conflict", "not_found"):
            await self._record(acting, action, subject, network=network, actor=actor, note=error.message)

    async def rotate_key(
        self, acting: Acting, key_id: str, *, overlap_s: int, network: str = "", actor: str = ""
    ) -> tuple[ApiKey, Secret]:
        """A successor with the same name, scopes and lifetime. The old key lives on for the overlap; at 0 it is revoked
        before this returns. Raises: not_found, invalid for an overlap above seven days, forbidden for a key with scopes
        beyond the actor's, conflict for one that has a successor already and when the account has very many."""
        if not 0 <= overlap_s <= MAX_OVERLAP_S:
            raise CorralError("invalid", "the overlap of a rotation is between 0 and 7 days")
        old = await self._own_live_key(acting, key_id, network)
        _check_within(acting, old.scopes)
        if old.successor_id:
            raise CorralError("conflict", "this API key was rotated already; rotate the one that took its place")
        now = self._clock.now()
        expires_at = None if old.expires_at is None else now + min(old.expires_at - old.created_at, MAX_KEY_LIFE)
        key, made = self._new_key(acting, old.name, old.scopes, expires_at)
        await self._record(acting, "key.rotate", key.id, network=network, actor=actor, note=f"after {old.id}")
        try:
            await self._replace(old, key, made, old_ends_at=key.created_at + timedelta(seconds=overlap_s))
        except CorralError as error:
            await self._take_back(error, acting, "key.rotate_refused", key.id, network=network, actor=actor)
            raise
        return key, made.text

    async def _replace(self, old: ApiKey, new: ApiKey, made: ApiKeyText, *, old_ends_at: datetime) -> None:
        hmac, pepper_id = self._kept_secret(made)
        is_replaced = await self._store.replace_api_key(
            old, new, hmac=hmac, pepper_id=pepper_id, old_ends_at=old_ends_at, max_live=MAX_LIVE_KEYS
        )
        if not is_replaced:
            raise _dead_key()

    async def revoke_key(self, acting: Acting, key_id: str, *, network: str = "", actor: str = "") -> None:
        """Refused from the next request on, in every worker. Revoking twice is no error. Raises: not_found."""
        key = await self._own_key(acting, key_id, network)
        if key.revoked_at is not None:
            return
        await self._record(acting, "key.revoke", key_id, network=network, actor=actor, note=key.name)
        await self._store.revoke_api_key(key.account_id, key_id, now=self._clock.now())

    async def keys_of(self, account: Account) -> Sequence[ApiKey]:
        """All of them, revoked and expired ones included, oldest first, with what was used a moment ago."""
        keys = await self._store.api_keys_of(account.id)
        return [replace(key, last_used_at=use[0]) if (use := self._door.unwritten_use(key.id)) else key for key in keys]

    async def _own_key(self, acting: Acting, key_id: str, network: str) -> ApiKey:
        stored = await self._store.api_key(key_id)
        if stored is not None and stored.key.account_id == _account_of(acting).id:
            return stored.key
        # The same answer whether the key is somebody else's or does not exist, and a trace of who tried (T66).
        await self._record(acting, "key.access_refused", key_id, network=network)
        raise CorralError("not_found", "no such API key")

    async def _own_live_key(self, acting: Acting, key_id: str, network: str) -> ApiKey:
        key = await self._own_key(acting, key_id, network)
        if not checks.is_live_key(key, self._clock.now()):
            raise _dead_key()
        return key

    async def _record(
        self, acting: Acting, action: str, subject: str, *, network: str = "", note: str = "", actor: str = ""
    ) -> None:
        event = AuditEvent(
            at=self._clock.now(),
            actor=actor or _actor_of(acting),
            action=action,
            subject=subject[:100],
            network=network,
            note=note,
        )
        await self._audit.append(event)


def _account_of(acting: Acting) -> Account:
    return acting.account if isinstance(acting, Principal) else acting


def _actor_of(acting: Acting) -> str:
    """Who acted, for the audit log. A session's id is left out: it is a digest, but of a secret."""
    if isinstance(acting, Principal) and acting.session is None:
        return f"{acting.account.id} by {acting.credential_id}"
    return _account_of(acting).id


def _check_within(acting: Acting, scopes: frozenset[Scope]) -> None:
    allowed = may_grant(acting.scopes) if isinstance(acting, Principal) else ALL_SCOPES & checks.rights_of(acting)
    if not scopes <= allowed:
        beyond = ", ".join(sorted(scopes - allowed))
        text = f"this credential cannot give away what it does not have: {beyond} → ask for less, or use one that has it"
        raise CorralError("forbidden", text)


def _dead_key() -> CorralError:
    return CorralError("not_found", "no such API key that is still live")


def _scopes_note(name: str, scopes: frozenset[Scope]) -> str:
    return f"{name}: {' '.join(sorted(scopes)) or 'nothing'}"


def _device_name(name: str) -> str:
    return shown_name(name) or "unnamed device"
