"""The only way in: what a request presents becomes a principal, a visitor, nothing, or an error. The order is promised.

```
one credential at most                                                        two_credentials
stock signature   header → ts → window → signature → transport → device → owner → mark → uses (or nonce)
                  for a token, of a device nobody connected: … → transport → limit → nonce → a visitor
strong signature  signature over everything → device → owner → nonce
API key           checksum → look-up → secret → revoked, expired → owner (→ the account named with it)
registry token    signature → issuer, audience, time → the credential it was given for, as above from its look-up on
session cookie    own page (unless GET or HEAD) → session
```

Nothing is looked up before the presented proof holds by itself, so a stranger can neither probe which keys are registered nor put
work on the database. A store that fails makes the request fail: there is no path from an error to a principal, nor to a stranger.
"""

from dataclasses import replace
from datetime import datetime, timedelta
from typing import assert_never

from corral.core.policy import ALL_SCOPES
from corral.core.ports import AuditLog, Clock, CredentialStore, Entropy, SightingStore
from corral.core.records import (
    Account,
    AuditEvent,
    Device,
    Principal,
    Proof,
    RequestFacts,
    Scope,
    Sighting,
    StoredApiKey,
    Visitor,
)
from corral.hub import checks
from corral.hub.accounts import Accounts
from corral.hub.checks import KeyText, NamedKey, SessionCookie, StockHeader, StrongHeaders, TokenText
from corral.hub.networks import network_of
from corral.hub.replay import Alarms, ReplayGuard
from corral.hub.sightings import SIGHTING_TTL
from corral.hub.throttle import Throttle, per_minutes
from corral.hub.tokens import RegistryTokens, TokenContent
from corral.wire import signing, strong
from corral.wire.apikeys import Peppers
from corral.wire.browser import session_cookie_name
from corral.wire.discovery import DEVICE_NAME_HEADER
from corral.wire.errors import CorralError
from corral.wire.signing import DevicePublicKey
from corral.wire.text import shown_name

#: Twice the longest time for which a signature is accepted, so that a nonce is never forgotten too early.
_NONCE_TTL = timedelta(seconds=4 * signing.WINDOW_S)
#: More credentials than this used within a minute are not all noted.
_MAX_USES = 100_000
#: Token requests of devices that nobody connected, per network: each costs a row for its nonce.
_STRANGERS = per_minutes(300, 5)


class Door:
    """Authenticates requests and remembers, in memory, when a credential was last used."""

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
        self._accounts = accounts
        self._store = store
        self._sightings = sightings
        self._audit = audit
        self._clock = clock
        self._entropy = entropy
        self._peppers = peppers
        self._tokens = tokens
        self._public_url = public_url
        self._cookie_name = session_cookie_name(public_url)
        self._replay = ReplayGuard(clock)
        self._uses: dict[str, tuple[datetime, str]] = {}
        self._alarms = Alarms(clock)
        self._strangers = Throttle(clock)

    async def authenticate(self, facts: RequestFacts) -> Principal | Visitor | None:
        """Who sends this request; None when nothing was presented. A visitor holds a registry token for what is public, or asks
        for one with the key of a device that nobody connected. Raises: two_credentials, unauthorized (with `signin_url`
        for an unknown device), clock_skew, stale_signature, forbidden, rate_limited, unavailable."""
        match checks.presented(facts, self._cookie_name):
            case None:
                return None
            case StockHeader(text):
                return await self._by_stock_signature(facts, text)
            case StrongHeaders(headers):
                return await self._by_strong_signature(facts, headers)
            case KeyText(text):
                return self._key_principal(await self._live_key(text), facts)
            case NamedKey(name, text):
                return await self.by_named_key(name, text, facts)
            case TokenText(text):
                return await self._by_token(facts, text)
            case SessionCookie(text):
                return await self._by_session(facts, text)
            case other:
                assert_never(other)

    # ── Devices ──────────────────────────────────────────────────────────────────────────────────────────────────────

    async def _by_stock_signature(self, facts: RequestFacts, header: str) -> Principal | Visitor:
        proof = signing.parse_authorization(header)
        ts = signing.parse_ts(facts.target.partition("?")[2])
        signing.check_window(ts, self._clock.now().timestamp())
        message = checks.signed_message(facts, self._public_url)
        signing.verify(proof, message)
        if not facts.is_secure:
            raise await self._exposed(proof.key, facts)
        is_for_token = checks.path_of(facts) == checks.TOKEN_PATH
        found = await self._store.device(proof.key)
        if found is None and is_for_token:
            return await self._stranger(proof.key, facts)
        device, owner = await self._checked_device(found, proof.key, facts)
        self._replay.check_mark(device.key.raw, ts)
        if is_for_token:
            await self._use_nonce("token", device.key, checks.token_nonce(facts))
        else:
            await self._count_use(device, message, facts)
        return self._device_principal(device, owner, Proof.STOCK_SIGNATURE, facts)

    async def _by_strong_signature(self, facts: RequestFacts, headers: dict[str, str]) -> Principal:
        now = self._clock.now().timestamp()
        url = self._public_url + facts.target
        proof = strong.verify_headers(facts.method, url, headers, body=facts.body, now=now)
        device, owner = await self._checked_device(await self._store.device(proof.key), proof.key, facts)
        await self._use_nonce("strong", device.key, proof.nonce)
        return self._device_principal(device, owner, Proof.STRONG_SIGNATURE, facts)

    async def _checked_device(
        self, found: tuple[Device, Account] | None, key: DevicePublicKey, facts: RequestFacts
    ) -> tuple[Device, Account]:
        if found is None:
            raise await self._unknown_device(key, facts)
        checks.check_owner(found[1])
        return found

    async def _unknown_device(self, key: DevicePublicKey, facts: RequestFacts) -> CorralError:
        """Where a device may begin to sign in, it is remembered and told how."""
        if checks.path_of(facts) not in checks.SIGNIN_PATHS:
            return CorralError("unauthorized")
        sighting = await self._sighted(key, facts)
        return CorralError("unauthorized", detail={"signin_url": self._signin_url(key, sighting.code, facts)})

    async def _sighted(self, key: DevicePublicKey, facts: RequestFacts) -> Sighting:
        now, code = self._clock.now(), self._entropy.bytes(16).hex()
        return await self._sightings.record(
            Sighting(key=key, code=code, network=facts.network, first_seen_at=now, last_seen_at=now)
        )

    def _signin_url(self, key: DevicePublicKey, code: str, facts: RequestFacts) -> str:
        name = shown_name(" ".join(facts.headers.get(DEVICE_NAME_HEADER, ()))) or "device"
        url = signing.connect_url(self._public_url, name, key)
        return f"{url}&code={code}" if code else url

    async def _stranger(self, key: DevicePublicKey, facts: RequestFacts) -> Visitor:
        """A device that nobody connected may fetch a token, for what is public. Its nonce is used up all the same: the device may
        be connected a moment later, and a copy of this request would then get a token for what is its owner's."""
        self._strangers.attempt((_STRANGERS, ("stranger", network_of(facts.network))))
        await self._use_nonce("token", key, checks.token_nonce(facts))
        try:
            code = (await self._sighted(key, facts)).code
        except CorralError as error:
            # Many devices behind one address must still be able to pull what is public.
            if error.code != "rate_limited":
                raise
            code = ""
        return Visitor(fingerprint=key.fingerprint, signin_url=self._signin_url(key, code, facts), key=key)

    async def _exposed(self, key: DevicePublicKey, facts: RequestFacts) -> CorralError:
        """The signature travelled in the clear, where it could be copied and sent along with another body (W1)."""
        found = await self._store.device(key)
        if found is not None and self._alarms.is_news("key_exposed", found[0].id):
            await self._record(found[0], "key_exposed", facts, note="a signature came over plain http")
        return CorralError("forbidden", "this signed request came over plain http, where it can be copied; use https")

    async def _count_use(self, device: Device, message: bytes, facts: RequestFacts) -> None:
        uses = self._replay.count(device.key.raw, message)
        if uses <= self._replay.uses_per_minute:
            return
        if self._alarms.is_news("replay_suspected", device.id):
            await self._record(device, "replay_suspected", facts, note=f"one signature used {uses} times in a minute")
        raise CorralError(
            "rate_limited", "this signed request was sent too often; sign again with the current time", retry_after_s=1
        )

    async def _use_nonce(self, form: str, key: DevicePublicKey, nonce: str) -> None:
        now = self._clock.now()
        # Keyed with the device, so that nobody can use up the nonces of another.
        if not await self._store.use_nonce(f"{form}:{key.fingerprint}:{nonce}", now=now, expires_at=now + _NONCE_TTL):
            raise CorralError("unauthorized", "this signature was used already; sign again")

    def _device_principal(self, device: Device, owner: Account, proof: Proof, facts: RequestFacts) -> Principal:
        self._used(device.id, facts)
        scopes = device.scopes & checks.rights_of(owner)
        return Principal(account=owner, proof=proof, credential_id=device.id, scopes=scopes, device=device)

    # ── Registry tokens ──────────────────────────────────────────────────────────────────────────────────────────────

    async def _by_token(self, facts: RequestFacts, text: str) -> Principal | Visitor:
        content = self._tokens.verify(text, leeway_s=checks.token_leeway_s(facts))
        match content.kind:
            case "device":
                principal = await self._token_device(content, facts)
            case "key":
                stored = self._live(await self._store.api_key(content.credential_id))
                principal = self._key_principal(stored, facts)
            case _:
                return await self._token_visitor(content, facts)
        return replace(principal, proof=Proof.REGISTRY_TOKEN, grants=content.grants)

    async def _token_device(self, content: TokenContent, facts: RequestFacts) -> Principal:
        found = await self._store.device(content.key) if content.key else None
        # The key may belong to another account by now, as another device.
        if found is None or found[0].id != content.credential_id:
            raise CorralError("unauthorized", "the device that this token was given to is not connected any more")
        checks.check_owner(found[1])
        return self._device_principal(*found, Proof.REGISTRY_TOKEN, facts)

    async def _token_visitor(self, content: TokenContent, facts: RequestFacts) -> Visitor:
        if content.key is None:
            return Visitor()
        if await self._store.device(content.key) is not None:
            # Whoever connected it while it pushes gets a better token by asking again.
            raise CorralError("unauthorized", "this device was connected meanwhile; fetch a new token")
        sighting = await self._sightings.find(content.key, since=self._clock.now() - SIGHTING_TTL)
        url = self._signin_url(content.key, sighting.code if sighting else "", facts)
        return Visitor(fingerprint=content.key.fingerprint, signin_url=url, key=content.key)

    # ── API keys and sessions ────────────────────────────────────────────────────────────────────────────────────────

    async def by_named_key(self, name: str, text: str, facts: RequestFacts) -> Principal:
        """The owner of an API key, when it is the account that is named with it. Raises: unauthorized, unavailable."""
        stored = await self._live_key(text)
        checks.check_names_owner(name, stored.owner)
        return self._key_principal(stored, facts)

    async def _live_key(self, text: str) -> StoredApiKey:
        presented = checks.key_text(text)
        return self._live(checks.check_secret(presented, await self._store.api_key(presented.public_id), self._peppers))

    def _live(self, stored: StoredApiKey | None) -> StoredApiKey:
        if stored is None:
            raise CorralError("unauthorized")
        checks.check_key_is_live(stored.key, self._clock.now())
        checks.check_owner(stored.owner)
        return stored

    def _key_principal(self, stored: StoredApiKey, facts: RequestFacts) -> Principal:
        key = stored.key
        self._used(key.id, facts)
        return Principal(
            account=stored.owner,
            proof=Proof.API_KEY,
            credential_id=key.id,
            scopes=key.scopes & checks.rights_of(stored.owner),
            expires_at=key.expires_at,
        )

    async def _by_session(self, facts: RequestFacts, cookie: str) -> Principal | None:
        """None for a session that has ended: the browser still sends its cookie, and must be able to see the sign-in page."""
        checks.check_own_page(facts, self._public_url)
        found = await self._accounts.session(cookie)
        if found is None:
            return None
        session, owner = found
        scopes = ALL_SCOPES & checks.rights_of(owner)
        return Principal(account=owner, proof=Proof.SESSION, credential_id=session.id, scopes=scopes, session=session)

    # ── Afterwards ───────────────────────────────────────────────────────────────────────────────────────────────────

    async def is_live(self, principal: Principal) -> bool:
        """Whether the credential would still be accepted; running streams ask every few seconds (T21, T62). Raises:
        unavailable."""
        found = await self._at_present(principal)
        # Taking that scope back from a device that might run models ends what it runs; taking another one does not.
        return found is not None and (Scope.INFERENCE in found.scopes or Scope.INFERENCE not in principal.scopes)

    async def confirm(self, principal: Principal) -> None:
        """Once more, when a body has come that took its time (T62). A registry token may have ended meanwhile: what counts is the
        credential it was given for. Raises: unauthorized when that would not be accepted any more, or may do less than when its
        request began; unavailable."""
        found = await self._at_present(principal)
        if found is None or not principal.scopes <= found.scopes or principal.account.is_admin > found.account.is_admin:
            raise CorralError("unauthorized", "this credential was revoked, or may do less, since the request began")

    async def _at_present(self, principal: Principal) -> Principal | None:
        """The principal as its credential would be let in now; None when it would not."""
        if principal.session is not None:
            session = await self._accounts.session_by_id(principal.session.id)
            return replace(principal, account=session[1]) if session else None
        if principal.device is not None:
            found = await self._store.device(principal.device.key)
            if found is None or found[0].id != principal.device.id:
                return None
            scopes, owner = found[0].scopes, found[1]
        else:
            stored = await self._store.api_key(principal.credential_id)
            if stored is None or not checks.is_live_key(stored.key, self._clock.now()):
                return None
            scopes, owner = stored.key.scopes, stored.owner
        return replace(principal, account=owner, scopes=scopes & checks.rights_of(owner)) if owner.is_active else None

    async def flush_uses(self) -> None:
        """Write down, in one batch, when and from where credentials were last used. What cannot be written now is kept for
        the next time: noting a use must never stop one (T65)."""
        batch, self._uses = self._uses, {}
        try:
            await self._store.record_use([(credential_id, at, network) for credential_id, (at, network) in batch.items()])
        except CorralError as error:
            if error.code != "unavailable":
                raise
            self._uses = {**batch, **self._uses}

    def unwritten_use(self, credential_id: str) -> tuple[datetime, str] | None:
        """When and from where a credential was last used, while that still waits to be written down."""
        return self._uses.get(credential_id)

    def _used(self, credential_id: str, facts: RequestFacts) -> None:
        if len(self._uses) < _MAX_USES or credential_id in self._uses:
            self._uses[credential_id] = (self._clock.now(), facts.network)

    async def _record(self, device: Device, action: str, facts: RequestFacts, *, note: str) -> None:
        event = AuditEvent(
            at=self._clock.now(), actor=device.account_id, action=action, subject=device.id, network=facts.network, note=note
        )
        await self._audit.append(event)
