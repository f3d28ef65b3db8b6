"""Identity stores of one family, and an account to put into them."""

from dataclasses import dataclass

from corral.core.ports import AccountStore, AuditLog, CredentialStore, SessionStore, UsageStore
from corral.core.records import Account
from corral.storage.sql.accounts import SqlAccounts
from corral.storage.sql.audit import SqlAudit
from corral.storage.sql.credentials import SqlCredentials
from corral.storage.sql.engine import Database
from corral.storage.sql.sessions import SqlSessions
from corral.storage.sql.usage import SqlUsage
from fakes import NOON


@dataclass(frozen=True)
class Stores:
    """One adapter of every identity port, over the same data."""

    accounts: AccountStore
    sessions: SessionStore
    credentials: CredentialStore
    usage: UsageStore
    audit: AuditLog


def sql_stores(database: Database) -> Stores:
    """The adapters over one open database."""
    return Stores(SqlAccounts(database), SqlSessions(database), SqlCredentials(database), SqlUsage(database), SqlAudit(database))


def account(name: str = "Ada", **changes: object) -> Account:
    """An account named so."""
    values = {"id": f"a-{name.lower()}", "name": name, "email": "", "is_admin": False, "created_at": NOON, **changes}
    return Account(**values)  # type: ignore[arg-type]
