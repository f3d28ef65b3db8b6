"""The only way in: what a request presents becomes a principal, or nothing, or an error. The order is part of the promise.

```
one credential at most                                                        two_credentials
stock signature   header → ts → window → signature → transport → device → owner → mark → uses (or nonce)
strong signature  signature over everything → device → owner → nonce
API key           checksum → look-up → secret → revoked, expired → owner
session cookie    own page (unless GET or HEAD) → session
```

Nothing is looked up before the presented proof holds by itself, so a stranger can neither probe which keys are registered nor put
work on the database. A store that fails makes the request fail: there is no path from an error to a principal, nor to a stranger.
"""

from datetime import datetime, timedelta
from typing import assert_never

from corral.core.policy import ALL_SCOPES
from corral.core.ports import AuditLog, Clock, CredentialStore, Entropy, SightingStore
from corral.core.records import Account, AuditEvent, Device, Principal, Proof, RequestFacts, Sighting
from corral.hub import checks
from corral.hub.accounts import Accounts
from corral.hub.checks import KeyText, SessionCookie, StockHeader, StrongHeaders
from corral.hub.replay import Alarms, ReplayGuard
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
        public_url: str,
    ) -> None:
        self._accounts = accounts
        self._store = store
        self._sightings = sightings
        self._audit = audit
        self._clock = clock
        self._entropy = entropy
        self._peppers = peppers
        self._public_url = public_url
        self._cookie_name = session_cookie_name(public_url)
        self._replay = ReplayGuard(clock)
        self._uses: dict[str, tuple[datetime, str]] = {}
        self._alarms = Alarms(clock)

    async def authenticate(self, facts: RequestFacts) -> Principal | None:
        """Who sends this request; None when nothing was presented. Raises: two_credentials, unauthorized (with `signin_url`
        for an unknown device), clock_skew, stale_signature, forbidden, rate_limited, unavailable."""
        match checks.presented(facts, self._cookie_name):
            case None:
                return None
            case StockHeader(text):
                return await self._by_stock_signature(facts, text)
            case StrongHeaders(headers):
                return await self._by_strong_signature(facts, headers)
            case KeyText(text):
                return await self._by_api_key(facts, text)
            case SessionCookie(text):
                return await self._by_session(facts, text)
            case other:
                assert_never(other)

    # ── Devices ──────────────────────────────────────────────────────────────────────────────────────────────────────

    async def _by_stock_signature(self, facts: RequestFacts, header: str) -> Principal:
        proof = signing.parse_authorization(header)
        ts = signing.parse_ts(facts.target.partition("?")[2])
        signing.check_window(ts, self._clock.now().timestamp())
        message = checks.signed_message(facts, self._public_url)
        signing.verify(proof, message)
        if not facts.is_secure:
            raise await self._exposed(proof.key, facts)
        device, owner = await self._device(proof.key, facts)
        self._replay.check_mark(device.key.raw, ts)
        if checks.path_of(facts) == checks.TOKEN_PATH:
            await self._use_nonce("token", device, checks.token_nonce(facts))
        else:
            await self._count_use(device, message, facts)
        return self._device_principal(device, owner, Proof.STOCK_SIGNATURE, facts)

    async def _by_strong_signature(self, facts: RequestFacts, headers: dict[str, str]) -> Principal:
        now = self._clock.now().timestamp()
        url = self._public_url + facts.target
        proof = strong.verify_headers(facts.method, url, headers, body=facts.body, now=now)
        device, owner = await self._device(proof.key, facts)
        await self._use_nonce("strong", device, proof.nonce)
        return self._device_principal(device, owner, Proof.STRONG_SIGNATURE, facts)

    async def _device(self, key: DevicePublicKey, facts: RequestFacts) -> tuple[Device, Account]:
        found = await self._store.device(key)
        if found is None:
            raise await self._unknown_device(key, facts)
        checks.check_owner(found[1])
        return found

    async def _unknown_device(self, key: DevicePublicKey, facts: RequestFacts) -> CorralError:
        """Where a device may begin to sign in, it is remembered and told how."""
        if checks.path_of(facts) not in checks.SIGNIN_PATHS:
            return CorralError("unauthorized")
        now = self._clock.now()
        code = self._entropy.bytes(16).hex()
        sighting = await self._sightings.record(
            Sighting(key=key, code=code, network=facts.network, first_seen_at=now, last_seen_at=now)
        )
        name = shown_name(" ".join(facts.headers.get(DEVICE_NAME_HEADER, ()))) or "device"
        link = f"{signing.connect_url(self._public_url, name, key)}&code={sighting.code}"
        return CorralError("unauthorized", detail={"signin_url": link})

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

    async def _use_nonce(self, form: str, device: Device, nonce: str) -> None:
        now = self._clock.now()
        # Keyed with the device, so that nobody can use up the nonces of another.
        if not await self._store.use_nonce(f"{form}:{device.id}:{nonce}", now=now, expires_at=now + _NONCE_TTL):
            raise CorralError("unauthorized", "this signature was used already; sign again")

    def _device_principal(self, device: Device, owner: Account, proof: Proof, facts: RequestFacts) -> Principal:
        self._used(device.id, facts)
        scopes = device.scopes & checks.rights_of(owner)
        return Principal(account=owner, proof=proof, credential_id=device.id, scopes=scopes, device=device)

    # ── API keys and sessions ────────────────────────────────────────────────────────────────────────────────────────

    async def _by_api_key(self, facts: RequestFacts, text: str) -> Principal:
        presented = checks.key_text(text)
        stored = checks.check_secret(presented, await self._store.api_key(presented.public_id), self._peppers)
        checks.check_key_is_live(stored.key, self._clock.now())
        checks.check_owner(stored.owner)
        self._used(stored.key.id, facts)
        scopes = stored.key.scopes & checks.rights_of(stored.owner)
        return Principal(
            account=stored.owner,
            proof=Proof.API_KEY,
            credential_id=stored.key.id,
            scopes=scopes,
            expires_at=stored.key.expires_at,
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
        if principal.session is not None:
            return await self._accounts.session_by_id(principal.session.id) is not None
        if principal.device is not None:
            found = await self._store.device(principal.device.key)
            return found is not None and found[0].id == principal.device.id and found[1].is_active
        stored = await self._store.api_key(principal.credential_id)
        return stored is not None and stored.owner.is_active and checks.is_live_key(stored.key, self._clock.now())

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
