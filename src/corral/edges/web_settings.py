"""Pages about oneself: profile, use, password, browser sessions, and the end of the account."""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta

from starlette.requests import Request
from starlette.responses import Response

from corral.core.ports import Clock, UsageStore
from corral.core.records import Account, Principal
from corral.core.registry import Visibility
from corral.core.scrubbing import HurtBlob, HurtBlobs
from corral.edges.asgi import Dialect, Endpoint, caller_of, endpoint, facts_of
from corral.edges.forms import (
    MAX_FORM_BYTES,
    MEMBER,
    Cookies,
    StepUp,
    Unproven,
    query_of,
    redirect,
    session_form,
    session_of,
    wrong_password,
)
from corral.edges.pages import Draft, Pages
from corral.hub.accounts import Accounts
from corral.hub.credentials import Credentials
from corral.hub.quotas import Quotas
from corral.hub.repositories import Repositories
from corral.wire.errors import CorralError

_PERIODS = (1, 7, 30)
#: What a page says after a change, by the word in its address: the address chooses a sentence, it never brings one.
_NOTICES = {"password": "Your password is changed.", "sessions": "You are signed out everywhere else."}


@dataclass(frozen=True, slots=True, kw_only=True)
class UsageRow:
    """One line of the usage table. what: `device`, `key` or what else ran a model."""

    name: str
    what: str
    model: str
    requests: int
    prompt_tokens: int
    eval_tokens: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Used:
    """What an account had run in the last 30 days. tokens: of prompts and answers."""

    requests: int
    tokens: int


async def used_lately(usage: UsageStore, account: Account, clock: Clock) -> Used:
    """What the account had run lately, by whatever credential."""
    totals = await usage.totals(account.id, since=clock.now() - timedelta(days=_PERIODS[-1]))
    tokens = sum(prompt + answer for _, _, _, prompt, answer in totals)
    return Used(requests=sum(requests for _, _, requests, _, _ in totals), tokens=tokens)


def damaged_models(hurt: Sequence[HurtBlob], namespace: str = "") -> list[str]:
    """The models, each once, that a damaged blob belongs to; of one namespace, or of all."""
    models = {model for blob in hurt for model in blob.models}
    return sorted(model for model in models if not namespace or model.lower().startswith(f"{namespace.lower()}/"))


class SettingsPages:
    """Handlers of /settings, /settings/usage and /settings/delete."""

    def __init__(
        self,
        *,
        pages: Pages,
        accounts: Accounts,
        credentials: Credentials,
        repositories: Repositories,
        quotas: Quotas,
        hurt_blobs: HurtBlobs,
        usage: UsageStore,
        cookies: Cookies,
        step_up: StepUp,
        clock: Clock,
    ) -> None:
        self._pages = pages
        self._accounts = accounts
        self._credentials = credentials
        self._repositories = repositories
        self._quotas = quotas
        self._hurt_blobs = hurt_blobs
        self._usage = usage
        self._cookies = cookies
        self._step_up = step_up
        self._clock = clock

    def endpoints(self) -> list[Endpoint]:
        """All for signed-in browsers only."""
        html, limit = Dialect.HTML, MAX_FORM_BYTES
        return [
            endpoint("GET,HEAD", "/settings", self.show, MEMBER, dialect=html),
            endpoint("POST", "/settings/password", self.change_password, MEMBER, dialect=html, max_body_bytes=limit),
            endpoint("POST", "/settings/sessions", self.end_other_sessions, MEMBER, dialect=html, max_body_bytes=limit),
            endpoint("GET,HEAD", "/settings/usage", self.show_usage, MEMBER, dialect=html),
            endpoint("GET,HEAD", "/settings/delete", self.show_delete, MEMBER, dialect=html),
            endpoint("POST", "/settings/delete", self.delete, MEMBER, dialect=html, max_body_bytes=limit),
        ]

    async def show(self, request: Request) -> Response:
        """Profile, use, sessions and the password form."""
        notice = _NOTICES.get(query_of(request).text("done"), "")
        return await self._page(caller_of(request), Draft(), notice=notice)

    async def _page(self, caller: Principal, draft: Draft, *, notice: str = "", status: int = 200) -> Response:
        sessions = sorted(
            await self._accounts.sessions_of(caller.account), key=lambda session: session.id != session_of(caller).id
        )
        return self._pages.render(
            "settings.html",
            caller=caller,
            status=status,
            draft=draft,
            sessions=sessions,
            notice=notice,
            storage=await self._quotas.use_of(caller.account.name),
            repositories=len(await self._repositories.visible(caller.account.name, caller)),
            max_repositories=self._repositories.max_per_account,
            damaged=damaged_models(await self._hurt_blobs(), caller.account.name),
            used=await used_lately(self._usage, caller.account, self._clock),
        )

    async def change_password(self, request: Request) -> Response:
        """Set a new password; every other session of the account ends (T74)."""
        form, caller, session = session_form(request)
        network = facts_of(request).network
        try:
            renewed, value = await self._accounts.change_password(
                session, form.text("current"), form.text("new"), network=network
            )
        except CorralError as error:
            if error.code not in ("unauthorized", "rate_limited", "invalid"):
                raise
            errors = {"new": error.message} if error.code == "invalid" else wrong_password(error, "current")
            return await self._page(caller, Draft(errors=errors), status=422 if error.code == "unauthorized" else error.status)
        return self._cookies.set_on(redirect("/settings?done=password"), renewed, value)

    async def end_other_sessions(self, request: Request) -> Response:
        """Sign out every browser but this one."""
        _, _, session = session_form(request)
        await self._accounts.sign_out_others(session, network=facts_of(request).network)
        return redirect("/settings?done=sessions")

    async def show_delete(self, request: Request) -> Response:
        """What ends with the account; its name is typed to confirm it."""
        return await self._delete_page(caller_of(request), Draft())

    async def delete(self, request: Request) -> Response:
        """Delete the visitor's own account, with all that is its own: at once, for good (T119)."""
        form, caller, _ = session_form(request)
        name, typed = caller.account.name, form.text("confirm").strip()
        if typed.lower() != name.lower():
            draft = Draft({"confirm": typed}, {"confirm": f"Type {name} to delete the account."})
            return await self._delete_page(caller, draft, status=422)
        stepped = await self._step_up.check(request, form, caller)
        if isinstance(stepped, Unproven):
            return await self._delete_page(caller, Draft({"confirm": typed}, stepped.errors), status=stepped.status)
        try:
            await self._accounts.remove(name, actor=caller.account.id, network=facts_of(request).network)
        except CorralError as error:
            if error.code != "conflict":
                raise
            draft = Draft({"confirm": typed}, {"": error.message})
            return self._step_up.finish(await self._delete_page(stepped.caller, draft, status=409), stepped)
        return self._cookies.clear_on(redirect("/?done=deleted"))

    async def _delete_page(self, caller: Principal, draft: Draft, *, status: int = 200) -> Response:
        owned = await self._repositories.visible(caller.account.name, caller)
        return self._pages.render(
            "account_delete.html",
            caller=caller,
            status=status,
            draft=draft,
            public=[found.path for found in owned if found.visibility is Visibility.PUBLIC],
            private=[found.path for found in owned if found.visibility is not Visibility.PUBLIC],
            devices=len(await self._credentials.devices_of(caller.account)),
            keys=len([key for key in await self._credentials.keys_of(caller.account) if key.revoked_at is None]),
            needs_password=self._step_up.is_needed(session_of(caller)),
        )

    async def show_usage(self, request: Request) -> Response:
        """Requests and tokens of a period, by what sent them and by model."""
        caller = caller_of(request)
        asked = query_of(request).text("days")
        days = next((period for period in _PERIODS if str(period) == asked), _PERIODS[-1])
        rows = await self._usage_rows(caller.account, timedelta(days=days))
        return self._pages.render("usage.html", caller=caller, rows=rows, days=days, periods=_PERIODS)

    async def _usage_rows(self, account: Account, period: timedelta) -> list[UsageRow]:
        totals = await self._usage.totals(account.id, since=self._clock.now() - period)
        devices = await self._credentials.devices_written_down({row[0] for row in totals})
        names = {device.id: (device.name, "revoked" if device.revoked_at else "device") for device in devices.values()}
        names |= {key.id: (key.name, "key") for key in await self._credentials.keys_of(account)}
        rows = []
        for credential_id, model, requests, prompt_tokens, eval_tokens in totals:
            name, what = names.get(credential_id, ("A device", "revoked"))
            rows.append(
                UsageRow(
                    name=name, what=what, model=model, requests=requests, prompt_tokens=prompt_tokens, eval_tokens=eval_tokens
                )
            )
        return sorted(rows, key=lambda row: (-row.prompt_tokens - row.eval_tokens, row.name, row.model))
