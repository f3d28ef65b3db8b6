"""Repositories: who may do what in them, how they come into being, and what their owner decides about them.

`find` is the one decision that every request for content goes through. Its order is part of the promise:

```
public, and only to be pulled           served to anybody, with any credential or none
no credential                           unauthorized, whether or not the repository exists
a visitor                               name_unknown for a pull, forbidden for the rest
a credential without the scope          forbidden, whether or not the repository exists
an account without the right            name_unknown for a pull, forbidden for the rest; asked of the database each time
a registry token without the grant      unauthorized, with the scope to ask for: only here would another token help
```

A private repository is answered for exactly as one that does not exist, after the same look-ups (T29).
"""

from collections.abc import Sequence
from dataclasses import replace
from datetime import timedelta

from corral.core.ports import AccountStore, AuditLog, Clock, Entropy
from corral.core.records import Account, AuditEvent, Principal, Scope, Visitor
from corral.core.registry import Collaborator, RegistryStore, Repository, Right, Visibility
from corral.hub.accounts import CONSOLE, quota_note
from corral.wire.errors import CorralError
from corral.wire.names import DEFAULT_NAMESPACE, Digest
from corral.wire.registry import ScopeRequest, scope_text
from corral.wire.repositories import RepositoryName, parse_repository
from corral.wire.text import one_line

#: Who sends a request: somebody proven, somebody with a token for what is public, or nobody at all.
Caller = Principal | Visitor | None

MAX_README_BYTES = 256 << 10
#: Of one account, unless the hub's settings say otherwise: a script that pushes to ever new names shall not fill the database.
MAX_REPOSITORIES = 1000
_ID_BYTES = 12
#: What each right demands of the credential.
_SCOPES = {Right.PULL: Scope.PULL, Right.PUSH: Scope.PUSH, Right.DELETE: Scope.PUSH}
_RANK = {right: rank for rank, right in enumerate(Right)}
#: Codes that say that somebody may not, and not that something broke.
REFUSALS = frozenset({"unauthorized", "forbidden", "name_unknown"})


class Repositories:
    """The hub's repositories and everybody's rights in them. max_per_account: how many an account may have; 0 sets no limit. The
    library's are the administrators'."""

    def __init__(
        self,
        *,
        store: RegistryStore,
        accounts: AccountStore,
        audit: AuditLog,
        clock: Clock,
        entropy: Entropy,
        max_per_account: int = MAX_REPOSITORIES,
    ) -> None:
        self._store = store
        self.max_per_account = max_per_account
        self._accounts = accounts
        self._audit = audit
        self._clock = clock
        self._entropy = entropy

    # ── The decision ─────────────────────────────────────────────────────────────────────────────────────────────────

    async def find(self, name: RepositoryName, right: Right, caller: Caller) -> Repository:
        """The repository, for a caller who may do that in it. A push by whoever owns the namespace makes it, private.

        Raises: unauthorized (with the detail `error: insufficient_scope` and the scope to ask for, where another token would
        help), forbidden (for one more repository than an account may have as well), name_unknown.
        """
        found = await self._decide(name, right, caller)
        if found is None and right is Right.PUSH and isinstance(caller, Principal):
            return await self._create(name, caller.account)
        return _known(found)

    async def find_existing(self, name: RepositoryName, right: Right, caller: Caller) -> Repository:
        """As `find`, but nothing is made by it."""
        return _known(await self._decide(name, right, caller))

    async def find_or_none(self, name: RepositoryName, right: Right, caller: Caller) -> Repository | None:
        """As `find_existing`, but None for one that does not exist and that the caller could make."""
        return await self._decide(name, right, caller)

    async def find_readable(self, name: RepositoryName, caller: Caller) -> Repository | None:
        """The repository if the caller may pull from it with this very credential (T32), None for every reason not to."""
        try:
            return await self.find_existing(name, Right.PULL, caller)
        except CorralError as error:
            if error.code not in REFUSALS:
                raise
            return None

    async def may(self, found: Repository, right: Right, caller: Caller) -> bool:
        """Whether `find` would give the caller that repository for that right."""
        name = RepositoryName(found.namespace, found.name)
        try:
            return await self._decide(name, right, caller) is not None
        except CorralError as error:
            if error.code not in REFUSALS:
                raise
            return False

    async def find_source(self, digest: Digest, caller: Principal) -> Repository | None:
        """A repository that has the blob and that the caller may pull from: one that is public or the caller's own.

        Those of others who let the caller in are passed over unless they are named: asking about each would make a blob that
        exists somewhere answer later than one that does not (T30).
        """
        for repository in await self._store.sources_of(digest):
            if await self._is_public(repository) or self._is_open_to(repository, caller):
                return repository
        return None

    async def grantable(self, principal: Principal | None, request: ScopeRequest) -> frozenset[str]:
        """Of the actions that a registry token is asked for, those that the principal has now; None stands for anybody."""
        try:
            name = parse_repository(request.repository)
        except CorralError:
            return frozenset()
        found = await self._store.repository(name.namespace, name.name)
        allowed = {Right.PULL} if await self._is_public(found) else set()
        if principal is not None:
            held = await self._held(found, name, principal.account)
            allowed |= {right for right in Right if _implies(held, right) and _is_in_scope(principal, right)}
            allowed = {right for right in allowed if _is_granted(principal, name, right)}
        return request.actions & frozenset(str(right) for right in allowed)

    def check_credential(self, name: RepositoryName, right: Right, principal: Principal) -> None:
        """Let a credential through that is good for that right in that repository, whatever its owner's own rights are. Raises:
        forbidden, unauthorized as `find`."""
        _check_scope(principal, right)
        _check_grant(principal, name, right)

    async def _decide(self, name: RepositoryName, right: Right, caller: Caller) -> Repository | None:
        found = await self._store.repository(name.namespace, name.name)
        if right is Right.PULL and await self._is_public(found):
            return found
        match caller:
            case None:
                raise CorralError("unauthorized")
            case Visitor():
                raise _stranger(caller, right)
            case Principal():
                _check_scope(caller, right)
                if not _implies(await self._held(found, name, caller.account), right):
                    raise _no_right(name, right)
                _check_grant(caller, name, right)
                if right is Right.PUSH and found is not None and found.mirrored_from:
                    text = f"{name} is a mirror of {found.mirrored_from}; to push to it here, delete it first"
                    raise CorralError("forbidden", text)
                return found

    async def _held(self, found: Repository | None, name: RepositoryName, account: Account) -> Right | None:
        """What the account may do there by itself: the owner everything, in a repository yet to be made as well."""
        if owns_namespace(account, name.namespace) or (account.is_admin and found is not None and found.mirrored_from):
            return Right.DELETE
        # Both are asked for what does not exist too: the answer must not come sooner.
        right = await self._store.right_of(found.id if found else "", account.id)
        is_alive = await self._is_alive(name.namespace)
        return right if is_alive else None

    async def _is_public(self, found: Repository | None) -> bool:
        if found is None or found.visibility is not Visibility.PUBLIC:
            return False
        # Nobody here has to answer for what a mirror keeps.
        return bool(found.mirrored_from) or await self._is_alive(found.namespace)

    async def _is_alive(self, namespace: str) -> bool:
        """Whether somebody answers for what is in a namespace. A deleted account's name stays taken and its content is gone for
        everybody (T119); so is that of a disabled one while it is."""
        if is_hub_namespace(namespace):
            return True
        owner = await self._accounts.by_name(namespace)
        return owner is not None and owner.is_active

    def _is_open_to(self, repository: Repository, caller: Principal) -> bool:
        name = RepositoryName(repository.namespace, repository.name)
        is_own = owns_namespace(caller.account, repository.namespace)
        return is_own and _is_in_scope(caller, Right.PULL) and _is_granted(caller, name, Right.PULL)

    async def _create(self, name: RepositoryName, owner: Account) -> Repository:
        now = self._clock.now()
        # In the account's own spelling, not in that of whoever pushed first.
        namespace = DEFAULT_NAMESPACE if name.key.namespace == DEFAULT_NAMESPACE else owner.name
        repository = Repository(
            id="r" + self._entropy.bytes(_ID_BYTES).hex(),
            namespace=namespace,
            name=name.name,
            visibility=Visibility.PRIVATE,
            created_at=now,
            updated_at=now,
        )
        is_bounded = bool(self.max_per_account) and not is_hub_namespace(namespace)
        return await self._store.add_repository(repository, at_most=self.max_per_account if is_bounded else None)

    async def remove_unused(self, found: Repository) -> None:
        """Take back a repository that was just made for a push that came to nothing, unless somebody else pushes to it."""
        moment = self._clock.now() + timedelta(microseconds=1)
        await self._store.remove_unused_repositories(created_before=moment, limit=1, repository_id=found.id)

    # ── What the owner decides ───────────────────────────────────────────────────────────────────────────────────────

    async def visible(self, namespace: str, caller: Caller) -> Sequence[Repository]:
        """The repositories of a namespace that the caller may pull from, by name."""
        listed = await self._store.repositories_of(namespace)
        names = [RepositoryName(repository.namespace, repository.name) for repository in listed]
        found = [await self.find_readable(name, caller) for name in names]
        return [repository for repository in found if repository is not None]

    async def set_visibility(
        self, name: RepositoryName, caller: Caller, visibility: Visibility, *, network: str = ""
    ) -> Repository:
        """Let anybody pull from it, or its own people alone: from the next request on. Raises: as `find` for the owner."""
        found = await self.find_existing(name, Right.DELETE, caller)
        if found.visibility is not visibility:
            await self._record(caller, "repository.visibility", found, note=f"{found.path}: {visibility}", network=network)
            await self._store.change_repository(found.id, visibility=visibility)
        return replace(found, visibility=visibility)

    async def set_readme(self, name: RepositoryName, caller: Caller, readme: str) -> None:
        """What its page says, in markdown; for whoever may push. Raises: as `find`; too_large, invalid."""
        found = await self.find_existing(name, Right.PUSH, caller)
        try:
            size_bytes = len(readme.encode())
        except UnicodeEncodeError as error:
            raise CorralError("invalid", "a README is text in UTF-8") from error
        if size_bytes > MAX_README_BYTES:
            raise CorralError("too_large", f"a README has at most {MAX_README_BYTES >> 10} KiB")
        await self._store.change_repository(found.id, readme=readme)

    async def readme(self, name: RepositoryName, caller: Caller) -> str:
        """The same, for whoever may pull. Raises: as `find`."""
        return await self._store.readme((await self.find_existing(name, Right.PULL, caller)).id)

    async def collaborators(self, name: RepositoryName, caller: Caller) -> Sequence[Collaborator]:
        """Who was let in, by name. Raises: as `find` for the owner."""
        found = await self.find_existing(name, Right.DELETE, caller)
        return await self._store.collaborators(found.id)

    async def set_collaborator(
        self, name: RepositoryName, caller: Caller, account_name: str, right: Right | None, *, network: str = ""
    ) -> None:
        """Let somebody pull, or push and pull; None takes it back. Removing content stays the owner's (T38). Raises: as `find`
        for the owner; not_found, invalid."""
        found = await self.find_existing(name, Right.DELETE, caller)
        if right is Right.DELETE:
            raise CorralError("invalid", "a collaborator can have pull or push", detail={"field": "right"})
        account = await self._accounts.by_name(account_name)
        if account is None:
            raise CorralError(
                "not_found", f"there is no account named {one_line(account_name)[:64]}", detail={"field": "account"}
            )
        if right is not None and owns_namespace(account, found.namespace):
            raise CorralError("invalid", f"{account.name} owns {found.path} already", detail={"field": "account"})
        note = f"{found.path}: {account.name}, {right or 'nothing'}"
        await self._record(caller, "repository.collaborator", found, note=note, network=network)
        await self._store.set_collaborator(found.id, account.id, right)

    async def remove(self, name: RepositoryName, caller: Caller, *, network: str = "") -> None:
        """Delete it with its tags, and withdraw what is hosted from it. Raises: as `find` for the owner."""
        found = await self.find_existing(name, Right.DELETE, caller)
        await self._record(caller, "repository.remove", found, note=found.path, network=network)
        await self._store.remove_repository(found.id)

    async def set_quota(self, name: RepositoryName, quota_bytes: int | None, *, actor: str = CONSOLE) -> None:
        """How many bytes it may hold; None leaves that to its namespace. For administration. Raises: name_unknown, invalid."""
        found = _known(await self._store.repository(name.namespace, name.name))
        await self._append(actor, "repository.quota", found, note=f"{found.path}: {quota_note(quota_bytes)}")
        await self._store.set_repository_quota(found.id, quota_bytes)

    async def _record(self, caller: Caller, action: str, subject: Repository, *, note: str, network: str) -> None:
        actor = caller.account.id if isinstance(caller, Principal) else ""
        await self._append(actor, action, subject, note=note, network=network)

    async def _append(self, actor: str, action: str, subject: Repository, *, note: str, network: str = "") -> None:
        event = AuditEvent(at=self._clock.now(), actor=actor, action=action, subject=subject.id, network=network, note=note)
        await self._audit.append(event)


def is_hub_namespace(namespace: str) -> bool:
    """Whether a namespace is the hub's own: the library, or a mirror's, which is called like the registry it copies. No account
    can be: the one name is reserved, and the others have a dot."""
    return namespace.lower() == DEFAULT_NAMESPACE or "." in namespace


def owns_namespace(account: Account, namespace: str) -> bool:
    """Whether what is in the namespace is the account's; administrators own the library."""
    wanted = namespace.lower()
    return wanted == account.name.lower() or (account.is_admin and wanted == DEFAULT_NAMESPACE)


# ── Each check by itself ─────────────────────────────────────────────────────────────────────────────────────────────


def _implies(held: Right | None, right: Right) -> bool:
    return held is not None and _RANK[held] >= _RANK[right]


def _is_in_scope(principal: Principal, right: Right) -> bool:
    return _SCOPES[right] in principal.scopes


def _is_granted(principal: Principal, name: RepositoryName, right: Right) -> bool:
    """Whether a registry token is good for that; other credentials are not bound to repositories."""
    if principal.grants is None:
        return True
    actions = principal.grants.get(str(name.key), frozenset())
    return any(str(higher) in actions for higher in Right if _implies(higher, right))


def _check_scope(principal: Principal, right: Right) -> None:
    if not _is_in_scope(principal, right):
        if principal.device is None:
            raise CorralError("forbidden", f"this API key lacks the scope {_SCOPES[right]}; create one that has it")
        text = f"this device may not {right}: it lacks the scope {_SCOPES[right]}"
        raise CorralError("forbidden", f"{text}; allow it on the hub's page of devices and keys, /settings/keys")


def _check_grant(principal: Principal, name: RepositoryName, right: Right) -> None:
    if not _is_granted(principal, name, right):
        # Pulling comes along: clients ask for exactly this, and look for blobs before they send them.
        actions = {str(Right.PULL), str(right)}
        detail = {"error": "insufficient_scope", "scope": scope_text(str(name), actions)}
        raise CorralError("unauthorized", f"this registry token is not good for {right} in {name}", detail=detail)


# Ollama shows a sentence of its own in the place of a refusal that says "unauthorized" or "access denied" (cmd PushHandler).
def _no_right(name: RepositoryName, right: Right) -> CorralError:
    if right is Right.PULL:
        return CorralError("name_unknown")
    return CorralError("forbidden", f"this account may not {right} in {name}; ask whoever owns {name.namespace}")


def _stranger(visitor: Visitor, right: Right) -> CorralError:
    if right is Right.PULL:
        return CorralError("name_unknown")
    if not visitor.fingerprint:
        return CorralError("forbidden", "that takes an account on this hub; sign in first")
    where = f" at {visitor.signin_url}" if visitor.signin_url else ""
    text = f"the device key {visitor.fingerprint} is connected to no account on this hub; connect it{where}"
    return CorralError("forbidden", text, detail={"signin_url": visitor.signin_url} if visitor.signin_url else None)


def _known(found: Repository | None) -> Repository:
    if found is None:
        raise CorralError("name_unknown")
    return found
