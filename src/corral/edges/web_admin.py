"""Pages for administrators: accounts and the audit log."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from starlette.requests import Request
from starlette.responses import Response

from corral.core.ports import AuditLog, Clock, UsageStore
from corral.core.records import Account, AuditEvent, Device, Principal
from corral.core.scrubbing import HurtBlobs
from corral.edges.asgi import Dialect, Endpoint, caller_of, endpoint, facts_of
from corral.edges.forms import ADMIN, MAX_FORM_BYTES, StepUp, Unproven, query_of, redirect, session_form, session_of
from corral.edges.pages import Draft, Pages
from corral.edges.web_settings import Used, damaged_models, used_lately
from corral.hub.accounts import Accounts
from corral.hub.credentials import Credentials
from corral.hub.quotas import Quotas, StorageUse
from corral.wire.errors import CorralError
from corral.wire.names import DEFAULT_NAMESPACE

_SHOWN_EVENTS = 50
#: What each of them uses is asked for one by one.
_SHOWN_ACCOUNTS = 100
_NOTICES = {"disable": "The account is disabled.", "enable": "The account is enabled."}


def _index_after(accounts: Sequence[Account], name: str) -> int:
    """Where a list goes on behind the account of that name; at its beginning when there is none."""
    return next((index for index, account in enumerate(accounts, 1) if name and account.name == name), 0)


def _ids_in(events: Sequence[AuditEvent]) -> set[str]:
    """What may be a device's id there."""
    return {event.subject for event in events} | {event.actor.partition(" by ")[2] for event in events}


def _with_names(events: Sequence[AuditEvent], accounts: Sequence[Account], devices: Mapping[str, Device]) -> list[AuditEvent]:
    """The events with names in the place of ids: of accounts, and of devices with the end of the fingerprint, since many have one
    name. An actor is an account, or `account by credential`."""
    names = {account.id: account.name for account in accounts}
    names |= {device.id: f"{device.name} …{device.key.fingerprint[-4:]}" for device in devices.values()}

    def named(text: str) -> str:
        account, by, credential = text.partition(" by ")
        return names.get(account, account) + by + names.get(credential, credential)

    return [replace(event, actor=named(event.actor), subject=named(event.subject)) for event in events]


@dataclass(frozen=True, slots=True, kw_only=True)
class AccountRow:
    """One line of the table of accounts."""

    account: Account
    storage: StorageUse
    used: Used


class AdminPages:
    """Handlers of /admin."""

    def __init__(
        self,
        *,
        pages: Pages,
        accounts: Accounts,
        credentials: Credentials,
        quotas: Quotas,
        hurt_blobs: HurtBlobs,
        usage: UsageStore,
        audit: AuditLog,
        step_up: StepUp,
        clock: Clock,
    ) -> None:
        self._pages = pages
        self._accounts = accounts
        self._credentials = credentials
        self._quotas = quotas
        self._hurt_blobs = hurt_blobs
        self._usage = usage
        self._clock = clock
        self._audit = audit
        self._step_up = step_up

    def endpoints(self) -> list[Endpoint]:
        """All for administrators only."""
        html, limit = Dialect.HTML, MAX_FORM_BYTES
        return [
            endpoint("GET,HEAD", "/admin", self.show, ADMIN, dialect=html),
            endpoint("GET,HEAD", "/admin/accounts/{name}/disable", self.show_disable, ADMIN, dialect=html),
            endpoint("POST", "/admin/accounts/{name}/disable", self.disable, ADMIN, dialect=html, max_body_bytes=limit),
            endpoint("GET,HEAD", "/admin/accounts/{name}/enable", self.show_enable, ADMIN, dialect=html),
            endpoint("POST", "/admin/accounts/{name}/enable", self.enable, ADMIN, dialect=html, max_body_bytes=limit),
        ]

    async def show(self, request: Request) -> Response:
        """Who has an account, and what changed lately."""
        query, accounts = query_of(request), await self._accounts.list()
        first = _index_after(accounts, query.text("after"))
        shown = accounts[first : first + _SHOWN_ACCOUNTS]
        events = await self._audit.recent(limit=_SHOWN_EVENTS)
        return self._pages.render(
            "admin.html",
            caller=caller_of(request),
            rows=[await self._row(account) for account in shown],
            count=len(accounts),
            more=shown[-1].name if first + len(shown) < len(accounts) else "",
            damaged=damaged_models(await self._hurt_blobs()),
            library=await self._quotas.use_of(DEFAULT_NAMESPACE),
            events=_with_names(events, accounts, await self._credentials.devices_written_down(_ids_in(events))),
            notice=_NOTICES.get(query.text("done"), ""),
        )

    async def _row(self, account: Account) -> AccountRow:
        storage = await self._quotas.use_of(account.name)
        return AccountRow(account=account, storage=storage, used=await used_lately(self._usage, account, self._clock))

    async def show_disable(self, request: Request) -> Response:
        """What disabling will do."""
        return self._confirm_page(caller_of(request), await self._account(request), "disable", Draft())

    async def show_enable(self, request: Request) -> Response:
        """What enabling will do."""
        return self._confirm_page(caller_of(request), await self._account(request), "enable", Draft())

    async def disable(self, request: Request) -> Response:
        """Turn an account off."""
        return await self._switch(request, "disable")

    async def enable(self, request: Request) -> Response:
        """Turn an account on again."""
        return await self._switch(request, "enable")

    async def _switch(self, request: Request, verb: str) -> Response:
        form, caller, _ = session_form(request)
        account = await self._account(request)
        if account.id == caller.account.id:
            raise CorralError("conflict", "you cannot do that to your own account; another administrator can")
        stepped = await self._step_up.check(request, form, caller)
        if isinstance(stepped, Unproven):
            return self._confirm_page(caller, account, verb, Draft(errors=stepped.errors), status=stepped.status)
        await self._accounts.set_disabled(
            account.name, verb == "disable", actor=caller.account.id, network=facts_of(request).network
        )
        return self._step_up.finish(redirect(f"/admin?done={verb}"), stepped)

    async def _account(self, request: Request) -> Account:
        return await self._accounts.named(request.path_params["name"])

    def _confirm_page(self, caller: Principal, account: Account, verb: str, draft: Draft, *, status: int = 200) -> Response:
        consequence = {
            "disable": "Its browsers are signed out, and its devices and API keys are refused from their next request on."
            " Nothing is deleted.",
            "enable": "Its devices and API keys work again, and its owner can sign in.",
        }[verb]
        return self._pages.render(
            "confirm.html",
            caller=caller,
            status=status,
            draft=draft,
            needs_password=self._step_up.is_needed(session_of(caller)),
            heading=f"{verb.capitalize()} the account {account.name}?",
            consequence=consequence,
            action=f"/admin/accounts/{account.name}/{verb}",
            verb=f"{verb.capitalize()} {account.name}",
            back="/admin",
            keep="Leave it",
        )
