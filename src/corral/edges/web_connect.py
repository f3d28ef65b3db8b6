"""Pages that connect a device: what a `signin_url` leads to.

The link can be mailed by anybody (W7), so opening it changes nothing and tells everything: whose account, which device, from where.
Only the form connects, with the session's token, a password typed lately, and, when the device is on another network, characters
that only its owner's terminal shows.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from urllib.parse import urlencode

from starlette.requests import Request
from starlette.responses import Response

from corral.core.records import BrowserSession, Principal, Scope
from corral.edges.asgi import Dialect, Endpoint, caller_of, endpoint, facts_of
from corral.edges.forms import (
    MAX_FORM_BYTES,
    MEMBER,
    Form,
    StepUp,
    Stepped,
    Unproven,
    query_of,
    redirect,
    session_form,
    session_of,
    sign_in_path,
)
from corral.edges.pages import SCOPE_WORDS, Draft, Pages
from corral.hub.credentials import Credentials, PendingDevice
from corral.wire.errors import CorralError

#: What a device on the visitor's own network gets unless a box is changed; pushing is for those who ask for it.
_TICKED = frozenset({Scope.INFERENCE, Scope.PULL, Scope.KEYS})
#: The same for a device on another network: what a phished visitor would give away is kept small.
_TICKED_ELSEWHERE = frozenset({Scope.INFERENCE, Scope.PULL})


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
        link, caller = _link_of(query_of(request)), caller_of(request)
        try:
            pending = await self._pending(request, link)
        except CorralError as error:
            return self._refused(caller, error, link)
        return self._form_page(caller, session_of(caller), link, pending, Draft())

    async def connect(self, request: Request) -> Response:
        """Connect, or the page again with what is wrong with it."""
        form, caller, _ = session_form(request)
        stepped = await self._step_up.check(request, form, caller)
        if isinstance(stepped, Unproven):
            return await self._again(request, caller, form, stepped.errors, stepped.status)
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
                fingerprint_tail=form.text("fingerprint_tail").strip(),
                scopes=form.scopes(),
            )
        except CorralError as error:
            if error.code in ("forbidden", "invalid", "rate_limited"):
                return await self._again(request, stepped.caller, form, {"fingerprint_tail": error.message}, error.status)
            return self._refused(stepped.caller, error, link)
        return redirect(f"/connect/done?{urlencode({'device': device.id})}")

    async def done(self, request: Request) -> Response:
        """Says which device was connected. Raises: not_found for a device that is not the visitor's."""
        caller, device_id = caller_of(request), query_of(request).text("device")
        devices = await self._credentials.devices_of(caller.account)
        device = next((found for found in devices if found.id == device_id), None)
        if device is None:
            raise CorralError("not_found")
        return self._pages.render("connected.html", caller=caller, is_personal=True, device=device)

    async def declined(self, request: Request) -> Response:
        """For who did not start this. The sighting lapses by itself: a GET changes nothing."""
        return self._pages.render("declined.html", caller=caller_of(request))

    async def _pending(self, request: Request, link: _Link) -> PendingDevice:
        """Raises: conflict, gone, bad_request."""
        pending = await self._credentials.pending_device(
            encoded_key=link.key, name=link.name, code=link.code, network=facts_of(request).network
        )
        return pending

    async def _again(self, request: Request, caller: Principal, form: Form, errors: Mapping[str, str], status: int) -> Response:
        link = _link_of(form)
        try:
            pending = await self._pending(request, link)
        except CorralError as error:
            return self._refused(caller, error, link)
        draft = Draft({"fingerprint_tail": form.text("fingerprint_tail")}, errors)
        return self._form_page(caller, session_of(caller), link, pending, draft, ticked=form.scopes(), status=status)

    def _form_page(
        self,
        caller: Principal,
        link: _Link,
        pending: PendingDevice,
        draft: Draft,
        *,
        ticked: frozenset[Scope] | None = None,
        status: int = 200,
    ) -> Response:
        if ticked is None:
            ticked = _TICKED_ELSEWHERE if pending.needs_tail else _TICKED
        return self._pages.render(
            "connect.html",
            caller=caller,
            status=status,
            is_personal=True,
            draft=draft,
            link=link,
            pending=pending,
            choices=[(scope, words, scope in ticked) for scope, words in SCOPE_WORDS.items()],
            needs_password=self._step_up.is_needed(session_of(caller)),
            switch_path=sign_in_path(link.path),
        )
