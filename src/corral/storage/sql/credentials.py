"""Devices, API keys and used nonces in the database."""

from collections.abc import Collection, Iterable, Mapping, Sequence
from datetime import datetime
from functools import lru_cache
from typing import Any

import sqlalchemy as sa
from sqlalchemy.exc import IntegrityError

from corral.core.records import Account, ApiKey, Device, Scope, StoredApiKey
from corral.storage.revocations import Kind, Revocation
from corral.storage.sql.accounts import ACCOUNT_COLUMNS, ACCOUNT_WIDTH, account_of
from corral.storage.sql.engine import Database, is_conflict
from corral.storage.sql.schema import api_keys, devices, from_micros, nonces, to_micros
from corral.wire.errors import CorralError
from corral.wire.signing import DevicePublicKey

_DEVICE_BY_KEY = (
    f"SELECT {ACCOUNT_COLUMNS}, d.id, d.name, d.key, d.scopes, d.created_at, d.last_used_at, d.last_network, d.revoked_at"  # noqa: S608
    " FROM devices d JOIN accounts a ON a.id = d.account_id WHERE d.key = ? AND d.revoked_at IS NULL AND a.deleted_at IS NULL"
)
_API_KEY_BY_ID = (
    f"SELECT {ACCOUNT_COLUMNS}, k.id, k.name, k.prefix, k.scopes, k.created_at, k.expires_at, k.last_used_at, k.revoked_at,"  # noqa: S608
    " k.successor_id, k.hmac, k.pepper_id"
    " FROM api_keys k JOIN accounts a ON a.id = k.account_id WHERE k.id = ? AND a.deleted_at IS NULL"
)
# An expired nonce counts as a new one; a live one is left as it is, which changes no row.
_USE_NONCE = (
    "INSERT INTO nonces (nonce, expires_at) VALUES (?, ?)"
    " ON CONFLICT (nonce) DO UPDATE SET expires_at = excluded.expires_at WHERE nonces.expires_at <= ?"
)
#: After how many uses of a nonce the expired ones are cleared away: their cost is spread thinly and the table stays small.
_NONCES_BETWEEN_CLEANUPS = 256
#: Fewer than any SQLite takes as parameters of one statement.
_IDS_AT_ONCE = 500


class SqlCredentials:
    """A CredentialStore."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self._nonces_used = 0

    async def device(self, key: DevicePublicKey) -> tuple[Device, Account] | None:
        """By the unique index of live keys."""
        return self._database.look_up(_DEVICE_BY_KEY, _device_and_owner, key.raw)

    async def api_key(self, public_id: str) -> StoredApiKey | None:
        """By primary key."""
        return self._database.look_up(_API_KEY_BY_ID, _stored_api_key, public_id)

    async def devices_of(self, account_id: str) -> Sequence[Device]:
        """Live ones, oldest first."""
        query = (
            sa.select(devices)
            .where(devices.c.account_id == account_id, devices.c.revoked_at.is_(None))
            .order_by(devices.c.created_at, devices.c.id)
        )
        rows = await self._database.read(lambda connection: connection.execute(query).mappings().all())
        return [_device_from(row) for row in rows]

    async def devices_with(self, ids: Collection[str]) -> Sequence[Device]:
        """Revoked ones included: a row is kept for the names in usage and audit."""
        wanted = sorted(ids)

        def work(connection: sa.Connection) -> list[Device]:
            found: list[Device] = []
            for start in range(0, len(wanted), _IDS_AT_ONCE):
                query = sa.select(devices).where(devices.c.id.in_(wanted[start : start + _IDS_AT_ONCE]))
                found += map(_device_from, connection.execute(query).mappings())
            return found

        return await self._database.read(work) if wanted else ()

    async def add_device(self, device: Device) -> None:
        """Insert; the unique index decides between two accounts that connect one key at once."""
        row = devices.insert().values(
            id=device.id,
            account_id=device.account_id,
            name=device.name,
            key=device.key.raw,
            scopes=format_scopes(device.scopes),
            created_at=device.created_at,
            last_used_at=device.last_used_at,
            last_network=device.last_network,
            revoked_at=device.revoked_at,
        )
        try:
            await self._database.write(lambda connection: connection.execute(row))
        except IntegrityError as error:
            if not is_conflict(error):
                raise
            raise CorralError("conflict", "this device is already connected") from error

    async def revoke_device(self, account_id: str, device_id: str, *, now: datetime) -> bool:
        """Durable before it returns."""
        change = _live_device(account_id, device_id).values(revoked_at=now)
        return await self._take_away(change, Revocation(at=now, kind=Kind.DEVICE, subject=device_id))

    async def rename_device(self, account_id: str, device_id: str, name: str) -> bool:
        """False when the account has no such live device."""
        return await self._change(_live_device(account_id, device_id).values(name=name))

    async def set_device_scopes(self, account_id: str, device_id: str, scopes: frozenset[Scope], *, now: datetime) -> bool:
        """False when the account has no such live device."""
        had = sa.select(devices.c.scopes).where(devices.c.id == device_id)
        change = _live_device(account_id, device_id).values(scopes=format_scopes(scopes))

        def work(connection: sa.Connection) -> bool:
            before = parse_scopes(connection.execute(had).scalar_one_or_none() or "")
            is_changed = connection.execute(change).rowcount == 1
            if is_changed and before - scopes:
                narrowed = Revocation(at=now, kind=Kind.DEVICE_SCOPES, subject=device_id, value=format_scopes(scopes))
                self._database.revoke(connection, narrowed)
            return is_changed

        return await self._database.write(work)

    async def api_keys_of(self, account_id: str) -> Sequence[ApiKey]:
        """All of them, revoked ones included, oldest first."""
        columns = [column for column in api_keys.c if column.name not in ("hmac", "pepper_id", "last_network")]
        query = sa.select(*columns).where(api_keys.c.account_id == account_id).order_by(api_keys.c.created_at, api_keys.c.id)
        rows = await self._database.read(lambda connection: connection.execute(query).mappings().all())
        return [ApiKey(**{**row, "scopes": parse_scopes(row["scopes"])}) for row in rows]

    async def add_api_key(self, key: ApiKey, *, hmac: bytes, pepper_id: str, max_live: int | None = None) -> None:
        """Count and insert in one transaction."""
        row = _new_api_key(key, hmac, pepper_id)

        def work(connection: sa.Connection) -> None:
            _check_room(connection, key, max_live)
            connection.execute(row)

        await self._database.write(work)

    async def replace_api_key(
        self, old: ApiKey, new: ApiKey, *, hmac: bytes, pepper_id: str, old_ends_at: datetime, max_live: int | None = None
    ) -> bool:
        """One transaction; the old row is changed under the condition that it is still as it was read."""
        as_read = _live_api_key(old.account_id, old.id).where(
            api_keys.c.expires_at.is_not_distinct_from(old.expires_at), api_keys.c.successor_id == ""
        )
        if old_ends_at <= new.created_at:
            end = as_read.values(successor_id=new.id, revoked_at=old_ends_at)
            ended = Revocation(at=old_ends_at, kind=Kind.KEY, subject=old.id)
        else:
            ends_at = min(old_ends_at, old.expires_at or old_ends_at)
            end = as_read.values(successor_id=new.id, expires_at=ends_at)
            ended = Revocation(at=new.created_at, kind=Kind.KEY, subject=old.id, value=ends_at.isoformat())
        row = _new_api_key(new, hmac, pepper_id)

        def work(connection: sa.Connection) -> bool:
            if connection.execute(end).rowcount != 1:
                return False
            _check_room(connection, new, max_live)
            connection.execute(row)
            self._database.revoke(connection, ended)
            return True

        return await self._database.write(work)

    async def revoke_api_key(self, account_id: str, key_id: str, *, now: datetime) -> bool:
        """Durable before it returns: whoever was told that a key is revoked can rely on it, whatever happens to the machine."""
        change = _live_api_key(account_id, key_id).values(revoked_at=now)
        return await self._take_away(change, Revocation(at=now, kind=Kind.KEY, subject=key_id))

    async def _take_away(self, change: sa.Update, revocation: Revocation) -> bool:
        def work(connection: sa.Connection) -> bool:
            is_changed = connection.execute(change).rowcount == 1
            if is_changed:
                self._database.revoke(connection, revocation)
            return is_changed

        return await self._database.write(work)

    async def _change(self, change: sa.Update) -> bool:
        return await self._database.write(lambda connection: connection.execute(change).rowcount) == 1

    async def record_use(self, uses: Iterable[tuple[str, datetime, str]]) -> None:
        """One relaxed transaction for the whole batch."""
        batch = [{"credential": credential_id, "at": at, "via": network} for credential_id, at, network in uses]
        if not batch:
            return

        def work(connection: sa.Connection) -> None:
            # The ids of both tables are random text, so an id of one is never an id of the other.
            for table in (devices, api_keys):
                change = (
                    table.update()
                    .where(table.c.id == sa.bindparam("credential"))
                    .values(last_used_at=sa.bindparam("at"), last_network=sa.bindparam("via"))
                )
                connection.execute(change, batch)

        await self._database.write_relaxed(work)

    async def use_nonce(self, nonce: str, *, now: datetime, expires_at: datetime) -> bool:
        """One statement, so that of two who come at once only one changes a row."""
        self._nonces_used += 1
        if self._nonces_used % _NONCES_BETWEEN_CLEANUPS == 0:
            expired = nonces.delete().where(nonces.c.expires_at <= now)
            await self._database.write_relaxed(lambda connection: connection.execute(expired))
        return await self._database.write_row(_USE_NONCE, nonce, to_micros(expires_at), to_micros(now)) == 1


def _device_from(row: Mapping[Any, Any]) -> Device:
    return Device(**{**row, "key": DevicePublicKey(row["key"]), "scopes": parse_scopes(row["scopes"])})


def _live_device(account_id: str, device_id: str) -> sa.Update:
    # The owner is part of the condition, so that a foreign id finds nothing instead of being checked afterwards (T66).
    return devices.update().where(devices.c.id == device_id, devices.c.account_id == account_id, devices.c.revoked_at.is_(None))


def _live_api_key(account_id: str, key_id: str) -> sa.Update:
    return api_keys.update().where(api_keys.c.id == key_id, api_keys.c.account_id == account_id, api_keys.c.revoked_at.is_(None))


def _new_api_key(key: ApiKey, hmac: bytes, pepper_id: str) -> sa.Insert:
    return api_keys.insert().values(
        id=key.id,
        account_id=key.account_id,
        name=key.name,
        prefix=key.prefix,
        scopes=format_scopes(key.scopes),
        hmac=hmac,
        pepper_id=pepper_id,
        created_at=key.created_at,
        expires_at=key.expires_at,
        last_used_at=key.last_used_at,
        last_network="",
        revoked_at=key.revoked_at,
    )


def _check_room(connection: sa.Connection, new: ApiKey, max_live: int | None) -> None:
    if max_live is None:
        return
    live = sa.select(sa.func.count()).where(
        api_keys.c.account_id == new.account_id,
        api_keys.c.revoked_at.is_(None),
        sa.or_(api_keys.c.expires_at.is_(None), api_keys.c.expires_at > new.created_at),
    )
    if connection.execute(live).scalar_one() >= max_live:
        raise CorralError("conflict", f"an account has at most {max_live} live API keys; revoke one first")


def format_scopes(scopes: Iterable[Scope]) -> str:
    """Scopes as a column keeps them: sorted, separated by spaces."""
    return " ".join(sorted(scopes))


_KNOWN = {str(scope): scope for scope in Scope}


@lru_cache(maxsize=256)
def parse_scopes(text: str) -> frozenset[Scope]:
    """The scopes of a column. One that this version does not know (a newer one wrote it) gives nothing."""
    return frozenset([_KNOWN[word] for word in text.split(" ") if word in _KNOWN])


def _time(micros: int | None) -> datetime | None:
    return None if micros is None else from_micros(micros)


def _device_and_owner(row: tuple[Any, ...]) -> tuple[Device, Account]:
    return _device_of(row), account_of(row)


def _stored_api_key(row: tuple[Any, ...]) -> StoredApiKey:
    return StoredApiKey(key=_api_key_of(row), owner=account_of(row), hmac=row[-2], pepper_id=row[-1])


def _device_of(row: Sequence[Any]) -> Device:
    device_id, name, key, scopes, created_at, last_used_at, last_network, revoked_at = row[ACCOUNT_WIDTH:]
    return Device(
        id=device_id,
        account_id=row[0],
        name=name,
        key=DevicePublicKey(key),
        scopes=parse_scopes(scopes),
        created_at=from_micros(created_at),
        last_used_at=_time(last_used_at),
        last_network=last_network,
        revoked_at=_time(revoked_at),
    )


def _api_key_of(row: Sequence[Any]) -> ApiKey:
    key_id, name, prefix, scopes, created_at, expires_at, last_used_at, revoked_at, successor_id = row[ACCOUNT_WIDTH:-2]
    return ApiKey(
        id=key_id,
        account_id=row[0],
        name=name,
        prefix=prefix,
        scopes=parse_scopes(scopes),
        created_at=from_micros(created_at),
        expires_at=_time(expires_at),
        last_used_at=_time(last_used_at),
        revoked_at=_time(revoked_at),
        successor_id=successor_id,
    )
