"""In-memory stand-ins for the ports of identity, and a clock and bytes that tests control. They pass the suites in
tests/contracts.

Fakes of other areas live in fakes_<area>.py.
"""

import asyncio
import random
from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from dataclasses import replace
from datetime import UTC, datetime, timedelta

from corral.core.records import (
    Account,
    ApiKey,
    AuditEvent,
    BrowserSession,
    Device,
    Scope,
    StoredApiKey,
    UsageEntry,
)
from corral.wire.errors import CorralError
from corral.wire.signing import DevicePublicKey
from corral.wire.text import one_line

#: A fixed moment, 2026-09-21, inside the time of the signing vectors (ts = 1790000000).
NOON = datetime.fromtimestamp(1_790_000_000, UTC)


class FakeClock:
    """A clock that moves only when told to."""

    def __init__(self, now: datetime = NOON) -> None:
        self._now = now
        self._monotonic_ns = 0

    def now(self) -> datetime:
        return self._now

    def monotonic_ns(self) -> int:
        return self._monotonic_ns

    def advance(self, seconds: float) -> None:
        """Let time pass."""
        self._now += timedelta(seconds=seconds)
        self._monotonic_ns += round(seconds * 1e9)

    def set_back(self, seconds: float) -> None:
        """Change the time of day as an administrator would; the steady counter goes on."""
        self._now -= timedelta(seconds=seconds)


class SeededEntropy:
    """Bytes that are the same in every run and differ from call to call."""

    def __init__(self, seed: int = 0) -> None:
        self._random = random.Random(seed)

    def bytes(self, count: int) -> bytes:
        return self._random.randbytes(count)


class _Failing:
    """A fake that can be told to fail, and counts what it was asked."""

    def __init__(self) -> None:
        self.calls: Counter[str] = Counter()
        self.fails: Exception | None = None

    def _called(self, name: str) -> None:
        self.calls[name] += 1
        if self.fails is not None:
            raise self.fails


class MemoryAccounts(_Failing):
    """An AccountStore."""

    def __init__(self) -> None:
        super().__init__()
        self._accounts: dict[str, Account] = {}
        self._hashes: dict[str, str] = {}
        self._taken: set[str] = set()

    async def add(self, account: Account, password_hash: str) -> None:
        self._called("add")
        if account.name.lower() in self._taken:
            raise CorralError("conflict", "that name or e-mail address is already in use")
        self._check_email(account)
        self._taken.add(account.name.lower())
        self._accounts[account.id] = account
        self._hashes[account.id] = password_hash

    async def by_id(self, account_id: str) -> Account | None:
        self._called("by_id")
        return self._accounts.get(account_id)

    async def by_name(self, name: str) -> Account | None:
        self._called("by_name")
        return next((found for found in self._accounts.values() if found.name.lower() == name.lower()), None)

    async def by_email(self, email: str) -> Account | None:
        self._called("by_email")
        wanted = email.lower()
        return next((found for found in self._accounts.values() if wanted and found.email.lower() == wanted), None)

    async def list(self) -> Sequence[Account]:
        self._called("list")
        return sorted(self._accounts.values(), key=lambda account: (account.created_at, account.id))

    async def password_hash(self, account_id: str) -> str:
        self._called("password_hash")
        return self._hashes.get(account_id, "")

    async def set_password_hash(self, account_id: str, password_hash: str, *, now: datetime) -> None:
        self._called("set_password_hash")
        await self.renew_password_hash(account_id, password_hash)

    async def renew_password_hash(self, account_id: str, password_hash: str) -> None:
        self._called("renew_password_hash")
        if account_id in self._accounts:
            self._hashes[account_id] = password_hash

    async def set_disabled(self, account_id: str, disabled_at: datetime | None) -> None:
        self._called("set_disabled")
        self._change(account_id, disabled_at=disabled_at)

    async def set_admin(self, account_id: str, is_admin: bool, *, now: datetime) -> None:
        self._called("set_admin")
        self._change(account_id, is_admin=is_admin)

    async def set_quota(self, account_id: str, quota_bytes: int | None) -> None:
        self._called("set_quota")
        self._change(account_id, quota_bytes=quota_bytes)

    def _change(self, account_id: str, **changes: object) -> None:
        account = self._accounts.get(account_id)
        if account is None:
            return
        changed = replace(account, **changes)  # type: ignore[arg-type]
        if not (changed.is_admin and changed.is_active):
            self._keep_an_administrator(account)
        self._accounts[account_id] = changed

    def _keep_an_administrator(self, account: Account | None) -> None:
        admins = [other.id for other in self._accounts.values() if other.is_admin and other.is_active]
        if account is not None and admins == [account.id]:
            raise CorralError("conflict", "that is the only administrator; make another one first")

    async def remove(self, account_id: str, *, now: datetime) -> bool:
        self._called("remove")
        self._keep_an_administrator(self._accounts.get(account_id))
        self._hashes.pop(account_id, None)
        return self._accounts.pop(account_id, None) is not None

    def live(self, account_id: str) -> Account | None:
        """For the other fakes, which join with accounts."""
        return self._accounts.get(account_id)

    def _check_email(self, account: Account) -> None:
        for other in self._accounts.values():
            if account.email and other.id != account.id and other.email.lower() == account.email.lower():
                raise CorralError("conflict", "that name or e-mail address is already in use")


class MemorySessions(_Failing):
    """A SessionStore. accounts: where the owners of sessions are."""

    def __init__(self, accounts: MemoryAccounts) -> None:
        super().__init__()
        self._owners = accounts
        self._sessions: dict[str, BrowserSession] = {}
        self._codes: dict[str, tuple[str, datetime]] = {}

    async def add(self, session: BrowserSession) -> None:
        self._called("add")
        self._sessions = {key: old for key, old in self._sessions.items() if old.expires_at > session.created_at}
        self._sessions[session.id] = session

    async def get(self, session_id: str) -> tuple[BrowserSession, Account] | None:
        self._called("get")
        session = self._sessions.get(session_id)
        owner = self._owners.live(session.account_id) if session else None
        return (session, owner) if session and owner else None

    async def update(self, session: BrowserSession) -> None:
        self._called("update")
        if session.id in self._sessions:
            self._sessions[session.id] = replace(
                self._sessions[session.id],
                last_used_at=session.last_used_at,
                authenticated_at=session.authenticated_at,
                expires_at=session.expires_at,
            )

    async def remove(self, session_id: str) -> None:
        self._called("remove")
        self._sessions.pop(session_id, None)

    async def remove_all(self, account_id: str, *, except_id: str = "") -> None:
        self._called("remove_all")
        self._sessions = {
            key: session for key, session in self._sessions.items() if session.account_id != account_id or key == except_id
        }

    async def of_account(self, account_id: str, *, now: datetime) -> Sequence[BrowserSession]:
        self._called("of_account")
        live = [session for session in self._sessions.values() if session.account_id == account_id and session.expires_at > now]
        return sorted(live, key=lambda session: (-session.last_used_at.timestamp(), session.id))

    async def put_code(self, purpose: str, digest: str, *, expires_at: datetime) -> None:
        self._called("put_code")
        self._codes[purpose] = (digest, expires_at)

    async def has_code(self, purpose: str, digest: str, *, now: datetime) -> bool:
        self._called("has_code")
        kept, expires_at = self._codes.get(purpose, ("", now))
        return kept == digest and now < expires_at

    async def take_code(self, purpose: str, digest: str, *, now: datetime) -> bool:
        self._called("take_code")
        if not await self.has_code(purpose, digest, now=now):
            return False
        del self._codes[purpose]
        return True


class MemoryCredentials(_Failing):
    """A CredentialStore. accounts: where the owners are."""

    def __init__(self, accounts: MemoryAccounts) -> None:
        super().__init__()
        self._owners = accounts
        self._devices: dict[str, Device] = {}
        self._keys: dict[str, tuple[ApiKey, bytes, str]] = {}
        self._nonces: dict[str, datetime] = {}
        #: Whether look-ups of keys let other tasks go first, as a database may.
        self.pauses = False

    async def device(self, key: DevicePublicKey) -> tuple[Device, Account] | None:
        self._called("device")
        device = next((found for found in self._devices.values() if found.key == key and found.revoked_at is None), None)
        owner = self._owners.live(device.account_id) if device else None
        return (device, owner) if device and owner else None

    async def api_key(self, public_id: str) -> StoredApiKey | None:
        self._called("api_key")
        if public_id not in self._keys:
            return None
        key, hmac, pepper_id = self._keys[public_id]
        if self.pauses:
            await asyncio.sleep(0)
        owner = self._owners.live(key.account_id)
        return StoredApiKey(key=key, owner=owner, hmac=hmac, pepper_id=pepper_id) if owner else None

    async def devices_of(self, account_id: str) -> Sequence[Device]:
        self._called("devices_of")
        mine = (device for device in self._devices.values() if device.account_id == account_id and device.revoked_at is None)
        return sorted(mine, key=lambda device: (device.created_at, device.id))

    async def devices_with(self, ids: Collection[str]) -> Sequence[Device]:
        self._called("devices_with")
        return [self._devices[device_id] for device_id in ids if device_id in self._devices]

    async def add_device(self, device: Device) -> None:
        self._called("add_device")
        if any(other.key == device.key and other.revoked_at is None for other in self._devices.values()):
            raise CorralError("conflict", "this device is already connected")
        self._devices[device.id] = device

    async def revoke_device(self, account_id: str, device_id: str, *, now: datetime) -> bool:
        self._called("revoke_device")
        return self._change_device(account_id, device_id, revoked_at=now)

    async def rename_device(self, account_id: str, device_id: str, name: str) -> bool:
        self._called("rename_device")
        return self._change_device(account_id, device_id, name=name)

    async def set_device_scopes(self, account_id: str, device_id: str, scopes: frozenset[Scope], *, now: datetime) -> bool:
        self._called("set_device_scopes")
        return self._change_device(account_id, device_id, scopes=scopes)

    def _change_device(self, account_id: str, device_id: str, **changes: object) -> bool:
        device = self._devices.get(device_id)
        if device is None or device.account_id != account_id or device.revoked_at is not None:
            return False
        self._devices[device_id] = replace(device, **changes)  # type: ignore[arg-type]
        return True

    async def api_keys_of(self, account_id: str) -> Sequence[ApiKey]:
        self._called("api_keys_of")
        mine = (key for key, _, _ in self._keys.values() if key.account_id == account_id)
        return sorted(mine, key=lambda key: (key.created_at, key.id))

    async def add_api_key(self, key: ApiKey, *, hmac: bytes, pepper_id: str, max_live: int | None = None) -> None:
        self._called("add_api_key")
        self._add_key(key, hmac, pepper_id, max_live, ())

    def _add_key(self, key: ApiKey, hmac: bytes, pepper_id: str, max_live: int | None, ended: Iterable[str]) -> None:
        live = [
            other
            for other, _, _ in self._keys.values()
            if other.account_id == key.account_id
            and other.revoked_at is None
            and (other.expires_at is None or other.expires_at > key.created_at)
            and other.id not in ended
        ]
        if max_live is not None and len(live) >= max_live:
            raise CorralError("conflict", f"an account has at most {max_live} live API keys; revoke one first")
        self._keys[key.id] = (key, hmac, pepper_id)

    async def replace_api_key(
        self, old: ApiKey, new: ApiKey, *, hmac: bytes, pepper_id: str, old_ends_at: datetime, max_live: int | None = None
    ) -> bool:
        self._called("replace_api_key")
        kept = self._keys.get(old.id, (None, b"", ""))[0]
        if kept is None or kept.account_id != old.account_id or kept.revoked_at or kept.expires_at != old.expires_at:
            return False
        if kept.successor_id:
            return False
        is_over = old_ends_at <= new.created_at
        self._add_key(new, hmac, pepper_id, max_live, (old.id,) if is_over else ())
        if is_over:
            self._change_key(old.account_id, old.id, successor_id=new.id, revoked_at=old_ends_at)
        else:
            ends_at = min(old_ends_at, old.expires_at or old_ends_at)
            self._change_key(old.account_id, old.id, successor_id=new.id, expires_at=ends_at)
        return True

    async def revoke_api_key(self, account_id: str, key_id: str, *, now: datetime) -> bool:
        self._called("revoke_api_key")
        return self._change_key(account_id, key_id, revoked_at=now)

    def _change_key(self, account_id: str, key_id: str, **changes: object) -> bool:
        key, hmac, pepper_id = self._keys.get(key_id, (None, b"", ""))
        if key is None or key.account_id != account_id or key.revoked_at is not None:
            return False
        self._keys[key_id] = (replace(key, **changes), hmac, pepper_id)  # type: ignore[arg-type]
        return True

    async def record_use(self, uses: Iterable[tuple[str, datetime, str]]) -> None:
        self._called("record_use")
        for credential_id, at, network in uses:
            if credential_id in self._devices:
                self._devices[credential_id] = replace(self._devices[credential_id], last_used_at=at, last_network=network)
            elif credential_id in self._keys:
                key, hmac, pepper_id = self._keys[credential_id]
                self._keys[credential_id] = (replace(key, last_used_at=at), hmac, pepper_id)

    async def use_nonce(self, nonce: str, *, now: datetime, expires_at: datetime) -> bool:
        self._called("use_nonce")
        self._nonces = {kept: until for kept, until in self._nonces.items() if until > now}
        if nonce in self._nonces:
            return False
        self._nonces[nonce] = expires_at
        return True


class MemoryUsage(_Failing):
    """A UsageStore. entries: all that was added, for tests to look at."""

    def __init__(self) -> None:
        super().__init__()
        self.entries: list[UsageEntry] = []

    async def add(self, entries: Sequence[UsageEntry]) -> None:
        self._called("add")
        self.entries.extend(entries)

    async def totals(self, account_id: str, *, since: datetime) -> Sequence[tuple[str, str, int, int, int]]:
        self._called("totals")
        sums: dict[tuple[str, str], list[int]] = {}
        for entry in self.entries:
            if entry.account_id == account_id and entry.started_at >= since:
                total = sums.setdefault((entry.credential_id, entry.model), [0, 0, 0])
                total[0] += 1
                total[1] += entry.prompt_tokens
                total[2] += entry.eval_tokens
        rows = [(credential, model, *total) for (credential, model), total in sums.items()]
        return sorted(rows, key=lambda row: (-(row[3] + row[4]), row[0], row[1]))  # type: ignore[return-value]


class MemoryAudit(_Failing):
    """An AuditLog. events: all that was appended, oldest first."""

    def __init__(self) -> None:
        super().__init__()
        self.events: list[AuditEvent] = []
        #: Whether other tasks go first while a row is written, as they may with a database.
        self.pauses = False

    async def append(self, event: AuditEvent) -> None:
        self._called("append")
        if self.pauses:
            await asyncio.sleep(0)
        self.events.append(
            replace(
                event,
                **{name: one_line(getattr(event, name)) for name in ("actor", "action", "subject", "network", "note")},
            )
        )

    async def recent(self, *, limit: int = 100) -> Sequence[AuditEvent]:
        self._called("recent")
        return self.events[::-1][:limit]

    @property
    def actions(self) -> list[str]:
        """Just the actions, oldest first."""
        return [event.action for event in self.events]
