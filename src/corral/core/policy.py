"""Who may do what. Pure, so that every rule is a row of a test table."""

from dataclasses import dataclass, replace
from datetime import datetime, timedelta

from corral.core.local_rights import check_right
from corral.core.records import BrowserSession, Principal, Proof, Scope
from corral.wire.authorized_keys import Right
from corral.wire.errors import CorralError

#: Proofs that cover enough of a request to change what an account owns. The stock signature covers no body and no host (W1), so
#: it is accepted only where a route names it.
FULL_PROOFS = frozenset({Proof.STRONG_SIGNATURE, Proof.API_KEY, Proof.SESSION})
#: Proofs for what stock clients sign: inference, `/api/me`, signing a device out, web search and fetch.
CLIENT_PROOFS = frozenset({Proof.STOCK_SIGNATURE, Proof.STRONG_SIGNATURE, Proof.API_KEY})
#: Proofs that add a device without its page. A browser has the page, which shows what it connects and asks for the password.
HEADLESS_PROOFS = FULL_PROOFS - {Proof.SESSION}
SESSION_ONLY = frozenset({Proof.SESSION})
#: What a secured local server takes.
LOCAL_PROOFS = CLIENT_PROOFS

ALL_SCOPES = frozenset(Scope)
#: What a device may do unless its owner ticks otherwise. Managing keys needs the strong signature besides.
DEVICE_SCOPES = frozenset({Scope.INFERENCE, Scope.PULL, Scope.PUSH, Scope.KEYS})

#: A password typed within this time is enough for what gives a credential away (NIST 800-63B, ASVS 7.5.1).
STEP_UP = timedelta(minutes=5)


def may_grant(scopes: frozenset[Scope]) -> frozenset[Scope]:
    """What a credential with these scopes may hand to a device or key it makes: its own, and with `keys` also inference, which is
    what devices are connected for. Anything that changes models must be its own (T61)."""
    return scopes | {Scope.INFERENCE} if Scope.KEYS in scopes else scopes


@dataclass(frozen=True, slots=True)
class Access:
    """What a route demands. Every route declares one; an application with a route that does not is refused at start.

    proofs: accepted ways to prove who one is; empty means that anyone may call. scope: demanded of the credential, or None.
    is_open: whoever shows no credential is let through too; the service behind the route decides what is there for whom.
    right: what a local server demands of a line of `authorized_keys` once it is secured; None on a hub.
    """

    proofs: frozenset[Proof]
    scope: Scope | None = None
    is_admin_only: bool = False
    is_open: bool = False
    right: Right | None = None

    @property
    def is_public(self) -> bool:
        """Whether a request without any credential is served."""
        return self.is_open or not self.proofs


PUBLIC = Access(frozenset())
#: Routes of a local server: anybody's until it is secured (`secured`), then of those whose line has the right.
READS = Access(frozenset(), right=Right.READ)
USES = Access(frozenset(), right=Right.USE)
MANAGES = Access(frozenset(), right=Right.MANAGE)
#: Registry clients: a token, or an API key by itself. Whose content it is decides hub.repositories.
REGISTRY = Access(frozenset({Proof.REGISTRY_TOKEN, Proof.API_KEY}), is_open=True)
#: Where a registry token is fetched: by a device's signature, an account and API key, or nothing.
REGISTRY_TOKENS = Access(frozenset({Proof.STOCK_SIGNATURE, Proof.STRONG_SIGNATURE, Proof.API_KEY}), is_open=True)


def secured(access: Access, *, is_open: bool) -> Access:
    """What a route of a local server demands once the server is secured. is_open: requests without a credential reach the check,
    which decides by where they come from. Raises: TypeError for a route that declares no right."""
    if access.right is None:
        raise TypeError("a route of a secured server declares no right")
    return replace(access, proofs=LOCAL_PROOFS, is_open=is_open)


def check_access(principal: Principal, access: Access) -> None:
    """Let the principal through or say why not. Raises: forbidden."""
    if not access.proofs:
        return
    if principal.proof not in access.proofs:
        raise CorralError("forbidden", _wrong_proof(principal.proof))
    if access.is_admin_only and not principal.account.is_admin:
        raise CorralError("forbidden", "only an administrator may do that")
    if access.scope is not None and access.scope not in principal.scopes:
        raise CorralError("forbidden", f"this credential lacks the scope {access.scope}")
    if access.right is not None:
        check_right(principal, access.right)


def needs_step_up(session: BrowserSession, now: datetime) -> bool:
    """Whether the session's password was typed too long ago for what gives a credential away."""
    return now - session.authenticated_at > STEP_UP


def check_step_up(principal: Principal, now: datetime) -> None:
    """Refuse to give a credential away to a browser that somebody may have left open (T46). Other proofs are keys of their own.
    Raises: forbidden, with the detail `step_up`."""
    if principal.session is not None and needs_step_up(principal.session, now):
        raise CorralError("forbidden", "confirm your password first", detail={"step_up": True})


def _wrong_proof(proof: Proof) -> str:
    if proof is Proof.STOCK_SIGNATURE:
        return "a stock client's signature does not cover the body, so it may not do that; use corral, an API key or the browser"
    return "that takes another kind of credential"
