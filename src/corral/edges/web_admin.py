"""Pages for administrators: accounts and the audit log."""

from collections.abc import Sequence
from dataclasses import replace

from starlette.requests import Request
from starlette.responses import Response

from corral.core.ports import AuditLog
from corral.core.records import Account, AuditEvent, Principal
from corral.edges.asgi import Dialect, Endpoint, caller_of, endpoint, facts_of
from corral.edges.forms import ADMIN, MAX_FORM_BYTES, StepUp, Unproven, query_of, redirect, session_form, session_of
from corral.edges.pages import Draft, Pages
from corral.hub.accounts import Accounts
from corral.wire.errors import CorralError

_SHOWN_EVENTS = 50
_NOTICES = {"disable": "The account is disabled.", "enable": "The account is enabled."}


def _with_names(events: Sequence[AuditEvent], accounts: Sequence[Account]) -> list[AuditEvent]:
    """The events with accounts' names in the place of their ids. An actor is an account, or `account by credential`."""
    names = {account.id: account.name for account in accounts}

    def named(text: str) -> str:
        account, by, credential = text.partition(" by ")
        return names.get(account, account) + by + credential

    return [replace(event, actor=named(event.actor), subject=named(event.subject)) for event in events]


class AdminPages:
    """Handlers of /admin."""

    def __init__(self, *, pages: Pages, accounts: Accounts, audit: AuditLog, step_up: StepUp) -> None:
        self._pages = pages
        self._accounts = accounts
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
        accounts = await self._accounts.list()
        events = await self._audit.recent(limit=_SHOWN_EVENTS)
        return self._pages.render(
            "admin.html",
            caller=caller_of(request),
            accounts=accounts,
            events=_with_names(events, accounts),
            notice=_NOTICES.get(query_of(request).text("done"), ""),
        )

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
