"""Pages that connect a device: what a `signin_url` leads to.

The link can be mailed by anybody (W7), so opening it changes nothing and tells everything: whose account, which device, from
where. Only the form connects, with the session's token, a password typed lately, and, when the device is on another network,
characters that only its owner's terminal shows.
"""

import hmac
from dataclasses import dataclass
from urllib.parse import urlencode

from starlette.requests import Request
from starlette.responses import Response

from corral.core.records import Principal, Scope
from corral.edges.asgi import Dialect, Endpoint, caller_of, endpoint, facts_of
from corral.edges.forms import (
    MAX_FORM_BYTES,
    MEMBER,
    Form,
    Stepped,
    StepUp,
    Unproven,
    query_of,
    redirect,
    session_form,
    session_of,
    sign_in_path,
)
from corral.edges.pages import Draft, Pages, scope_choices
from corral.hub.credentials import TAIL_LENGTH, Credentials, PendingDevice
from corral.wire.errors import CorralError

#: What a device on the visitor's own network gets unless a box is changed; pushing is for those who ask for it.
_TICKED = frozenset({Scope.INFERENCE, Scope.PULL, Scope.KEYS})
#: The same for a device on another network: what a phished visitor would give away is kept small.
_TICKED_ELSEWHERE = frozenset({Scope.INFERENCE, Scope.PULL})

#: The address of these pages holds a one-time code.
_REFERRER = "no-referrer"


@dataclass(frozen=True, slots=True)
class _Link:
    """What a connect link says; nothing in it is trusted."""

    name: str
    key: str
    code: str

    @property
    def path(self) -> str:
        fields = {"name": self.name, "key": self.key, "code": self.code}
        return "/connect?" + urlencode({field: text for field, text in fields.items() if text})


def _link_of(form: Form) -> _Link:
    return _Link(form.text("name"), form.text("key"), form.text("code"))


class ConnectPages:
    """Handlers of /connect."""

    def __init__(self, *, pages: Pages, credentials: Credentials, step_up: StepUp) -> None:
        self._pages = pages
        self._credentials = credentials
        self._step_up = step_up

    def endpoints(self) -> list[Endpoint]:
        """The GETs change nothing, whoever sends them."""
        html = Dialect.HTML
        return [
            endpoint("GET,HEAD", "/connect", self.show, MEMBER, dialect=html),
            endpoint("POST", "/connect", self.connect, MEMBER, dialect=html, max_body_bytes=MAX_FORM_BYTES),
            endpoint("GET,HEAD", "/connect/done", self.done, MEMBER, dialect=html),
            endpoint("GET,HEAD", "/connect/declined", self.declined, MEMBER, dialect=html),
        ]

    async def show(self, request: Request) -> Response:
        """The device that asks, or why it cannot be connected."""
        return await self._page(request, caller_of(request), _link_of(query_of(request)), Draft())

    async def connect(self, request: Request) -> Response:
        """Connect, or the page again with what is wrong with it."""
        form, caller, _ = session_form(request)
        stepped = await self._step_up.check(request, form, caller)
        if isinstance(stepped, Unproven):
            draft = Draft(_typed(form), stepped.errors)
            return await self._page(request, caller, _link_of(form), draft, ticked=form.scopes(), status=stepped.status)
        return self._step_up.finish(await self._connect(request, form, stepped), stepped)

    async def _connect(self, request: Request, form: Form, stepped: Stepped) -> Response:
        link = _link_of(form)
        try:
            device = await self._credentials.connect_device(
                stepped.session,
                stepped.account,
                encoded_key=link.key,
                name=link.name,
                code=link.code,
                network=facts_of(request).network,
                fingerprint_tail=form.text("fingerprint_tail"),
                scopes=form.scopes(),
            )
        except CorralError as error:
            if error.code in ("conflict", "gone"):
                return self._problem_page(stepped.caller, _problem_of(error))
            if error.code not in ("invalid", "rate_limited"):
                raise
            draft = Draft(_typed(form), {"fingerprint_tail": error.message})
            return await self._page(request, stepped.caller, link, draft, ticked=form.scopes(), status=error.status)
        return redirect(f"/connect/done?{urlencode({'device': device.id})}")

    async def done(self, request: Request) -> Response:
        """Says which device was connected. Raises: not_found for a device that is not the visitor's."""
        caller, device_id = caller_of(request), query_of(request).text("device")
        devices = await self._credentials.devices_of(caller.account)
        device = next((found for found in devices if found.id == device_id), None)
        if device is None:
            raise CorralError("not_found")
        return self._pages.render("connected.html", caller=caller, referrer=_REFERRER, device=device)

    async def declined(self, request: Request) -> Response:
        """For who did not start this. The sighting lapses by itself: a GET changes nothing."""
        return self._pages.render("declined.html", caller=caller_of(request), referrer=_REFERRER)

    async def _page(
        self,
        request: Request,
        caller: Principal,
        link: _Link,
        draft: Draft,
        *,
        ticked: frozenset[Scope] | None = None,
        status: int = 200,
    ) -> Response:
        """The form, or why there is none."""
        try:
            pending = await self._credentials.pending_device(
                encoded_key=link.key, name=link.name, code=link.code, network=facts_of(request).network, account=caller.account
            )
        except CorralError as error:
            if error.code != "bad_request":
                raise
            return self._problem_page(caller, _damaged(error))
        problem = _problem_with(pending, link)
        if problem is not None:
            return self._problem_page(caller, problem, pending)
        if ticked is None:
            ticked = _TICKED_ELSEWHERE if pending.needs_tail else _TICKED
        return self._pages.render(
            "connect.html",
            caller=caller,
            status=status,
            referrer=_REFERRER,
            draft=draft,
            link=link,
            pending=pending,
            fingerprint=_shown_fingerprint(pending),
            choices=scope_choices(ticked),
            needs_password=self._step_up.is_needed(session_of(caller)),
            switch_path=sign_in_path(link.path),
        )

    def _problem_page(self, caller: Principal, problem: "_Problem", pending: PendingDevice | None = None) -> Response:
        return self._pages.render(
            "connect_problem.html",
            caller=caller,
            status=problem.status,
            referrer=_REFERRER,
            problem=problem,
            pending=pending,
            fingerprint=_shown_fingerprint(pending) if pending else "",
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Problem:
    """Why a device cannot be connected now, and what to do about it. command: for the device, or empty."""

    heading: str
    text: str
    status: int
    command: str = "corral signin"


_NOT_SEEN = _Problem(
    heading="This device is not waiting",
    text="It has not asked to be connected in the last 15 minutes. Run this on it, and open the link that it prints:",
    status=409,
)
_OLD_LINK = _Problem(
    heading="This link is old",
    text="It was used, or the device has made a new one since. Run this on the device, and open the link that it prints:",
    status=410,
)
_ELSEWHERE = _Problem(
    heading="This device is connected to another account",
    text="A device belongs to one account at a time. Sign it out there first, by running this on it:",
    status=409,
    command="corral signout",
)
_CONNECTED = _Problem(
    heading="This device is already connected",
    text="It is connected to your account. There is nothing more to do, and you can close this page.",
    status=200,
    command="",
)


def _problem_with(pending: PendingDevice, link: _Link) -> _Problem | None:
    if pending.already:
        return _CONNECTED if pending.already == "this account" else _ELSEWHERE
    if pending.sighting is None:
        return _NOT_SEEN
    # Said here already, so that nobody types a password for a link that cannot work; `connect_device` is what enforces it.
    is_old = bool(link.code) and not hmac.compare_digest(link.code.encode(), pending.sighting.code.encode())
    return _OLD_LINK if is_old else None


def _damaged(error: CorralError) -> _Problem:
    """The page for a link that did not come whole out of a terminal or a message."""
    text = f"{error.message}. Open it once more, whole, or run this on the device and open the link that it prints:"
    return _Problem(heading="This link is damaged", text=text, status=error.status)


def _problem_of(error: CorralError) -> _Problem:
    """The page for a device whose state changed between the page and its form."""
    if error.code == "gone":
        return _OLD_LINK
    return _Problem(heading="This device cannot be connected now", text=error.message, status=error.status, command="")


def _shown_fingerprint(pending: PendingDevice) -> str:
    """The fingerprint, without the end where that is what the visitor has to read off the device: the page must not hold the
    answer to its own question (W7)."""
    return f"{pending.key.fingerprint[:-TAIL_LENGTH]}…" if pending.needs_tail else pending.key.fingerprint


def _typed(form: Form) -> dict[str, str]:
    return {"fingerprint_tail": form.text("fingerprint_tail")}
