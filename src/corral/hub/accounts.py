"""Accounts: how one is made, how a person signs in with a browser, and what an administrator may do with it.

Every change of authority is written to the audit log before it is made; when that row cannot be written, the change does not
happen. A session dies with the authority it was opened under: password, role and disabling all end the account's sessions.
"""

import base64
import re
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime, timedelta
from functools import partial
from hashlib import sha256

from corral.core.ports import AccountStore, AuditLog, Clock, Entropy, SessionStore
from corral.core.records import Account, AuditEvent, BrowserSession
from corral.hub.networks import network_of
from corral.hub.passwords import PasswordCost, Passwords, check_password
from corral.hub.replay import Alarms
from corral.hub.throttle import Throttle, per_minutes
from corral.wire.errors import CorralError
from corral.wire.secrets import Secret
from corral.wire.text import one_line

SETUP_CODE_TTL = timedelta(minutes=30)
#: How long a session lasts: (without use, in all). An administrator's is short.
SESSION_LIFE = (timedelta(hours=24), timedelta(days=30))
ADMIN_SESSION_LIFE = (timedelta(hours=1), timedelta(hours=12))
#: The use of a session is written down no more often than this.
_USE_GRAIN = timedelta(minutes=1)

_COOKIE_BYTES = 32
_COOKIE = re.compile(r"[A-Za-z0-9_-]{43}")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{1,38}")
_EMAIL = re.compile(r"[^@\s\x00-\x1f\x7f<>()\",;:\\]{1,64}@[^@\s\x00-\x1f\x7f<>()\",;:\\]{1,189}")
_MAX_USER_AGENT = 200
_SETUP_PURPOSE = "setup"
#: Crockford's digits: none of I, L, O, U, which are misread or make words.
_CODE_DIGITS = "0123456789ABCDEFGHJKMNPQRSTVWXYZ"

#: Names that are pages, routes or namespaces of the hub itself, or that claim to speak for it.
RESERVED_NAMES = frozenset(
    """
    about abuse account accounts admin administrator api app assets audit auth billing blog blobs cloud connect console corral
    devices docs download downloads email favicon files healthz help home hub info internal keys library livez local localhost
    login logout mail manifests metrics models new news none null official ollama operator orgs owner policy postmaster pricing
    privacy public readyz registry robots root search security settings signin signout signup staff static status support system
    tags team teams terms token undefined upload uploads usage user users v1 v2 v3 webmaster well-known www
    """.split()  # noqa: SIM905 - a list of ninety quoted words is harder to read
)

_TOTAL, _PER_NETWORK, _PER_ACCOUNT = per_minutes(1000, 5), per_minutes(60, 5), per_minutes(10, 5)
_SIGN_UPS_TOTAL, _SIGN_UPS_PER_NETWORK = per_minutes(100, 5), per_minutes(10, 5)
_SETUP_TOTAL, _SETUP_PER_NETWORK = per_minutes(300, 5), per_minutes(30, 5)

CONSOLE = "console"
#: What the audit log says of a password that was not right, by where it was typed.
_WRONG = {"session.refused": "wrong name or password", "session.step_up_refused": "wrong password"}


@dataclass(frozen=True, slots=True, kw_only=True)
class AccountRules:
    """What the operator chose. sign_up_open: whether strangers may make accounts. reserved_names: in lower case, such as the
    namespaces that a mirror keeps."""

    sign_up_open: bool = False
    reserved_names: frozenset[str] = frozenset()
    password_cost: PasswordCost = field(default_factory=PasswordCost)


class Accounts:
    """The people of this hub and their browser sessions."""

    def __init__(
        self,
        *,
        accounts: AccountStore,
        sessions: SessionStore,
        audit: AuditLog,
        clock: Clock,
        entropy: Entropy,
        rules: AccountRules | None = None,
    ) -> None:
        self._accounts = accounts
        self._sessions = sessions
        self._audit = audit
        self._clock = clock
        self._entropy = entropy
        self._rules = rules or AccountRules()
        self._passwords = Passwords(self._rules.password_cost, entropy)
        self._throttle = Throttle(clock)
        self._alarms = Alarms(clock)
        self._has_accounts = False

    # ── The first account, and signing up ────────────────────────────────────────────────────────────────────────────

    async def is_new(self) -> bool:
        """Whether this hub waits for its first account."""
        # It never has none again: the last administrator cannot be deleted.
        self._has_accounts = self._has_accounts or bool(await self._accounts.list())
        return not self._has_accounts

    async def new_setup_code(self) -> str | None:
        """A code such as `7K3M-Q9XD` that lets its holder make the first account, an administrator's. None when there is an
        account.

        40 bits, half an hour, one use; a new one replaces the old (T85).
        """
        if await self._accounts.list():
            return None
        number = int.from_bytes(self._entropy.bytes(5))
        digits = "".join(_CODE_DIGITS[number >> shift & 31] for shift in range(35, -1, -5))
        await self._sessions.put_code(_SETUP_PURPOSE, _digest(digits), expires_at=self._clock.now() + SETUP_CODE_TTL)
        return f"{digits[:4]}-{digits[4:]}"

    async def check_setup_code(self, code: str, *, network: str) -> bool:
        """Whether the code would be accepted now. Case, spaces and the hyphen do not matter. Every question is a guess. Raises:
        rate_limited."""
        mine = ("setup", network_of(network))
        self._throttle.attempt((_SETUP_TOTAL, ("setup",)), (_SETUP_PER_NETWORK, mine))
        return await self._is_setup_code(code)

    async def _is_setup_code(self, code: str) -> bool:
        return await self._sessions.has_code(_SETUP_PURPOSE, _digest(_bare_code(code)), now=self._clock.now())

    async def sign_up(self, name: str, email: str, password: str, *, setup_code: str = "", network: str = "") -> Account:
        """A new account; the first one needs the setup code and becomes an administrator. email: may be empty.

        Raises: forbidden when sign-up is closed, gone for a setup code that is used, expired or wrong, invalid for a name,
        address or password that is not acceptable, conflict when the name or address is taken, rate_limited.
        """
        is_first = not await self._accounts.list()
        if not is_first and setup_code:
            raise CorralError("gone", "the first account exists already; sign in instead")
        if not is_first and not self._rules.sign_up_open:
            raise CorralError("forbidden", "sign-up is closed on this hub; ask an administrator for an account")
        where = network_of(network)
        self._throttle.attempt((_SIGN_UPS_TOTAL, ("sign-up",)), (_SIGN_UPS_PER_NETWORK, ("sign-up", where)))
        if is_first and not await self._is_setup_code(setup_code):
            raise _bad_setup_code()
        account = self._new_account(name, email, is_admin=is_first)
        check_password(password, own_words=(name, email))
        password_hash = await self._passwords.hash(password)
        # Taken last, so that a mistake in the form does not use the code up, and by one caller only.
        taken = not is_first or await self._sessions.take_code(
            _SETUP_PURPOSE, _digest(_bare_code(setup_code)), now=self._clock.now()
        )
        if not taken:
            raise _bad_setup_code()
        return await self._add(account, password_hash, actor=account.id, network=network)

    # ── Signing in ───────────────────────────────────────────────────────────────────────────────────────────────────

    async def sign_in(self, name_or_email: str, password: str, *, network: str) -> Account:
        """The account whose password this is. An unknown name, a wrong password and a disabled account are told apart neither
        by the answer nor by the time it takes (T69). Raises: unauthorized, rate_limited."""
        account = await self._find(name_or_email)
        kept = await self._accounts.password_hash(account.id if account else "")
        # Counted under the account and not under what was typed: a name and an address must not give two sets of guesses.
        account = await self._check(account, name_or_email.lower(), password, kept, network=network)
        if self._passwords.is_outdated(kept):
            await self._accounts.renew_password_hash(account.id, await self._passwords.hash(password))
        return account

    async def _find(self, name_or_email: str) -> Account | None:
        by_name = await self._accounts.by_name(name_or_email)
        by_email = await self._accounts.by_email(name_or_email)
        return by_name or by_email

    async def _check(self, account: Account | None, typed: str, password: str, kept: str, *, network: str) -> Account:
        """The account, when it exists and is active and this is its password. typed: what an unknown one was called."""
        try:
            return await self._checked(account, typed, password, kept, network=network)
        except CorralError as error:
            # By the network alone: a row more for an account that exists would show in the time the answer takes (T69), and one
            # for every name tried would bury all else. What was typed is not kept: it may be a password in the wrong field.
            subject = account.id if account else ""
            await self._note_refusal(error, "stranger", "session.refused", subject, about=network_of(network), network=network)
            raise

    async def _note_refusal(self, error: CorralError, actor: str, action: str, subject: str, *, about: str, network: str) -> None:
        """Tell the audit log, now and then, that a password was refused. about: whose refusals are told of once."""
        note = {"unauthorized": _WRONG[action], "rate_limited": "too many attempts"}.get(error.code)
        if note is None or not self._alarms.is_news(f"{action}: {note}", about):
            return
        try:
            await self._record(actor, action, subject, network=network, note=note)
        except CorralError as failure:
            # Nothing changed that would have to be in the log, so the answer is the same without it.
            if failure.code != "unavailable":
                raise

    async def _checked(self, account: Account | None, typed: str, password: str, kept: str, *, network: str) -> Account:
        who, where = account.id if account else typed, network_of(network)
        # Per account and network, never per account alone: strangers must not be able to lock its owner out (ASVS 6.1.1).
        mine = ("password", sha256(who.encode("utf-8", "replace")).hexdigest(), where)
        self._throttle.attempt(
            (_TOTAL, ("password",)),
            (_PER_NETWORK, ("password", where)),
            (_PER_ACCOUNT, mine),
        )
        is_right = await self._passwords.is_right(password, kept)
        # Forgiven to active accounts alone: else a disabled one would tell by its limit which password is right (T69).
        if not is_right or account is None or not account.is_active:
            raise _wrong_password()
        self._throttle.forgive(_PER_ACCOUNT, mine)
        return account

    async def open_session(self, account: Account, *, network: str, user_agent: str) -> tuple[BrowserSession, Secret]:
        """A session for somebody who has just signed in, and the cookie's value, which is kept nowhere."""
        session, cookie = self._new_session(account, network=network, user_agent=user_agent)
        await self._record(account.id, "session.open", account.id, network=network)
        await self._sessions.add(session)
        return session, cookie

    async def session(self, cookie: str) -> tuple[BrowserSession, Account] | None:
        """The live session of a cookie's value. Raises: unavailable; a store that fails signs nobody in and nobody out."""
        if not _COOKIE.fullmatch(cookie):
            return None
        return await self.session_by_id(_digest(cookie))

    async def session_by_id(self, session_id: str) -> tuple[BrowserSession, Account] | None:
        """The same by the session's own id, for work that outlives its request."""
        found = await self._sessions.get(session_id)
        if found is None:
            return None
        session, account = found
        now = self._clock.now()
        idle, _ = _life(account)
        if not account.is_active or now >= session.expires_at or now - session.last_used_at >= idle:
            return None
        return await self._touched(session, now), account

    async def _touched(self, session: BrowserSession, now: datetime) -> BrowserSession:
        if now - session.last_used_at < _USE_GRAIN:
            return session
        touched = replace(session, last_used_at=now)
        try:
            await self._sessions.update(touched)
        except CorralError as error:
            # Pages stay readable on a database that cannot be written (R3); the session merely goes idle earlier.
            if error.code != "unavailable":
                raise
            return session
        return touched

    async def step_up(self, session: BrowserSession, password: str, *, network: str) -> tuple[BrowserSession, Secret]:
        """The same session under a new id, freshly authenticated. Raises: unauthorized, rate_limited."""
        account = await self._owner_with_password(session, password, network=network)
        renewed, cookie = self._new_session(account, network=network, user_agent=session.user_agent)
        # It does not live longer for it: an administrator's twelve hours begin when the browser signed in.
        renewed = replace(renewed, created_at=session.created_at, expires_at=session.expires_at)
        await self._record(account.id, "session.step_up", account.id, network=network)
        await self._sessions.add(renewed)
        await self._sessions.remove(session.id)
        return renewed, cookie

    async def change_password(
        self, session: BrowserSession, old: str, new: str, *, network: str
    ) -> tuple[BrowserSession, Secret]:
        """Set one's own password. Every session of the account ends; the caller gets a new one. Raises: unauthorized, invalid."""
        account = await self._owner_with_password(session, old, network=network)
        await self._set_password(account, new, actor=account.id, network=network)
        return await self.open_session(account, network=network, user_agent=session.user_agent)

    async def _owner_with_password(self, session: BrowserSession, password: str, *, network: str) -> Account:
        """Raises: unauthorized, rate_limited."""
        account = await self._accounts.by_id(session.account_id)
        kept = await self._accounts.password_hash(session.account_id)
        try:
            return await self._checked(account, session.account_id, password, kept, network=network)
        except CorralError as error:
            # Told of apart from sign-ins: whoever sits at a browser that was left open is inside already.
            who = session.account_id
            about = f"{who} {network_of(network)}"
            await self._note_refusal(error, who, "session.step_up_refused", who, about=about, network=network)
            raise

    async def sign_out(self, session: BrowserSession, *, network: str = "") -> None:
        """End one session. network: of the request; that of the session when it is not told."""
        await self._record(session.account_id, "session.close", session.account_id, network=network or session.network)
        await self._sessions.remove(session.id)

    async def sessions_of(self, account: Account) -> Sequence[BrowserSession]:
        """The account's live sessions, latest used first."""
        now = self._clock.now()
        idle, _ = _life(account)
        kept = await self._sessions.of_account(account.id, now=now)
        return [session for session in kept if now - session.last_used_at < idle]

    async def sign_out_others(self, session: BrowserSession, *, network: str) -> None:
        """End every session of the account but this one."""
        await self._record(session.account_id, "session.close_others", session.account_id, network=network)
        await self._sessions.remove_all(session.account_id, except_id=session.id)

    # ── Administration ───────────────────────────────────────────────────────────────────────────────────────────────

    async def add(
        self, name: str, *, email: str, password: str, is_admin: bool, actor: str = CONSOLE, network: str = ""
    ) -> Account:
        """Make an account for somebody. email: may be empty. Raises: invalid, conflict."""
        account = self._new_account(name, email, is_admin=is_admin)
        check_password(password, own_words=(name, email))
        return await self._add(account, await self._passwords.hash(password), actor=actor, network=network)

    async def check_free(self, name: str, *, email: str) -> None:
        """Whether an account of that name and address could be made, asked before somebody is asked for a password. Raises:
        invalid, conflict."""
        await self._check_free(self._new_account(name, email, is_admin=False))

    async def list(self) -> Sequence[Account]:
        """Every account, oldest first."""
        return await self._accounts.list()

    async def named(self, name: str) -> Account:
        """Raises: not_found."""
        account = await self._accounts.by_name(name)
        if account is None:
            raise CorralError("not_found", f"there is no account named {one_line(name)[:64]}")
        return account

    async def set_disabled(self, name: str, disabled: bool, *, actor: str = CONSOLE, network: str = "") -> Account:
        """Turn an account off or on again. Off: nothing of it works from the next request on. Raises: not_found, conflict for the
        last administrator."""
        account = await self.named(name)
        if account.is_active is not disabled:
            return account
        if disabled:
            await self._keep_an_administrator(account)
        action, disabled_at = ("account.disable", self._clock.now()) if disabled else ("account.enable", None)
        return await self._change(
            account, action, partial(self._accounts.set_disabled, account.id, disabled_at), actor=actor, network=network
        )

    async def set_password(self, name: str, password: str, *, actor: str = CONSOLE, network: str = "") -> None:
        """Set somebody's password; their sessions end. Raises: not_found, invalid."""
        await self._set_password(await self.named(name), password, actor=actor, network=network)

    async def promote(self, name: str, *, actor: str = CONSOLE, network: str = "") -> Account:
        """Make an administrator. Raises: not_found."""
        account = await self.named(name)
        if account.is_admin:
            return account
        promote = partial(self._accounts.set_admin, account.id, True, now=self._clock.now())
        return await self._change(account, "account.promote", promote, actor=actor, network=network)

    async def demote(self, name: str, *, actor: str = CONSOLE, network: str = "") -> Account:
        """Make an administrator an ordinary account. Raises: not_found, conflict for the last administrator."""
        account = await self.named(name)
        if not account.is_admin:
            return account
        await self._keep_an_administrator(account)
        demote = partial(self._accounts.set_admin, account.id, False, now=self._clock.now())
        return await self._change(account, "account.demote", demote, actor=actor, network=network)

    async def set_quota(self, name: str, quota_bytes: int | None, *, actor: str = CONSOLE) -> Account:
        """How many bytes its repositories may hold; None leaves that to the hub's default. Raises: not_found, invalid."""
        account = await self.named(name)
        note = f"{account.name}: {quota_note(quota_bytes)}"
        await self._record(actor, "account.quota", account.id, note=note)
        await self._accounts.set_quota(account.id, quota_bytes)
        return replace(account, quota_bytes=quota_bytes)

    async def remove(self, name: str, *, actor: str = CONSOLE, network: str = "") -> None:
        """Delete an account for good: what it owns stops working, and its name is never given out again (T119). Raises:
        not_found, conflict for the last administrator."""
        account = await self.named(name)
        await self._keep_an_administrator(account)
        await self._change(
            account,
            "account.remove",
            partial(self._accounts.remove, account.id, now=self._clock.now()),
            actor=actor,
            network=network,
        )

    async def _keep_an_administrator(self, account: Account) -> None:
        # Asked first, so that the answer has a name in it and the audit log no row; the store decides in the end.
        others = [other for other in await self._accounts.list() if other.is_admin and other.is_active and other.id != account.id]
        if account.is_admin and account.is_active and not others:
            raise CorralError("conflict", f"{account.name} is the only administrator; make another one first")

    async def _change(
        self, account: Account, action: str, change: Callable[[], Awaitable[object]], *, actor: str, network: str
    ) -> Account:
        """The account as it is afterwards."""
        await self._record(actor, action, account.id, network=network, note=account.name)
        try:
            await change()
        except CorralError as error:
            if error.code == "conflict":
                await self._record(actor, f"{action}_refused", account.id, network=network, note=error.message)
            raise
        await self._sessions.remove_all(account.id)
        return await self._accounts.by_id(account.id) or account

    async def _set_password(self, account: Account, password: str, *, actor: str, network: str) -> None:
        check_password(password, own_words=(account.name, account.email))
        password_hash = await self._passwords.hash(password)
        await self._record(actor, "account.password", account.id, network=network)
        await self._accounts.set_password_hash(account.id, password_hash, now=self._clock.now())
        await self._sessions.remove_all(account.id)

    # ── Making records ───────────────────────────────────────────────────────────────────────────────────────────────

    def _new_account(self, name: str, email: str, *, is_admin: bool) -> Account:
        if not _NAME.fullmatch(name):
            raise CorralError(
                "invalid",
                "a name has 2 to 39 letters, digits, hyphens or underscores, and begins with a letter or digit",
                detail={"field": "name"},
            )
        if name.lower() in RESERVED_NAMES | self._rules.reserved_names:
            raise CorralError("invalid", f"the name {name} is reserved; choose another one", detail={"field": "name"})
        if email and not (_EMAIL.fullmatch(email) and email.isprintable()):
            raise CorralError("invalid", "that is not an e-mail address", detail={"field": "email"})
        return Account(id=self._new_id(), name=name, email=email, is_admin=is_admin, created_at=self._clock.now())

    async def _add(self, account: Account, password_hash: str, *, actor: str, network: str) -> Account:
        # Asked first so that the audit log does not tell of accounts that were never made; the store decides in the end.
        await self._check_free(account)
        role = "administrator" if account.is_admin else "member"
        await self._record(actor, "account.create", account.id, network=network, note=f"{account.name}, {role}")
        await self._accounts.add(account, password_hash)
        return account

    async def _check_free(self, account: Account) -> None:
        if await self._accounts.by_name(account.name) or await self._accounts.by_email(account.email):
            raise CorralError("conflict", "that name or e-mail address is already in use", detail={"field": "name"})

    def _new_session(self, account: Account, *, network: str, user_agent: str) -> tuple[BrowserSession, Secret]:
        now = self._clock.now()
        cookie = _url_text(self._entropy.bytes(_COOKIE_BYTES))
        session = BrowserSession(
            id=_digest(cookie),
            account_id=account.id,
            csrf=_url_text(self._entropy.bytes(24)),
            created_at=now,
            authenticated_at=now,
            last_used_at=now,
            expires_at=now + _life(account)[1],
            user_agent=one_line(user_agent)[:_MAX_USER_AGENT],
            network=network,
        )
        return session, Secret(cookie)

    def _new_id(self) -> str:
        return "a" + self._entropy.bytes(12).hex()

    async def _record(self, actor: str, action: str, subject: str, *, network: str = "", note: str = "") -> None:
        event = AuditEvent(at=self._clock.now(), actor=actor, action=action, subject=subject, network=network, note=note)
        await self._audit.append(event)


def quota_note(quota_bytes: int | None) -> str:
    """A quota as the audit log tells it. Raises: invalid."""
    if quota_bytes is not None and quota_bytes < 0:
        raise CorralError("invalid", "a quota is a number of bytes", detail={"field": "quota_bytes"})
    return "none" if quota_bytes is None else f"{quota_bytes:,} bytes"


def _life(account: Account) -> tuple[timedelta, timedelta]:
    return ADMIN_SESSION_LIFE if account.is_admin else SESSION_LIFE


def _digest(text: str) -> str:
    return sha256(text.encode("utf-8", "replace")).hexdigest()


def _url_text(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).decode().rstrip("=")


def _bare_code(code: str) -> str:
    """A code as it was drawn, from how a person may have typed it."""
    return code[:64].upper().replace("-", "").replace(" ", "").translate(str.maketrans("OIL", "011"))


def _wrong_password() -> CorralError:
    return CorralError("unauthorized", "the name or the password is not right")


def _bad_setup_code() -> CorralError:
    return CorralError("gone", "this setup code was used, has expired or is wrong; start the hub again for a new one")
