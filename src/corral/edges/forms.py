"""What arrives from a form: its fields, the proof that our own page sent it, and where to go afterwards.

Two guards, and every form passes at least one. With a session: the token that the session's pages carry (`session_form`), besides
the origin check that authentication makes for every cookie. Without one (signing in, signing up): the origin check here
(`visitor_form`), because signing a victim in to somebody else's account is an attack too.
"""

import hmac
from collections.abc import Mapping
from dataclasses import dataclass, replace
from urllib.parse import parse_qs, quote

from starlette.requests import Request
from starlette.responses import Response

from corral.core.policy import SESSION_ONLY, Access, needs_step_up
from corral.core.ports import Clock
from corral.core.records import Account, BrowserSession, Principal, Scope
from corral.edges.asgi import body_of, caller_of, facts_of, maybe_caller
from corral.hub.accounts import Accounts
from corral.wire.browser import format_cookie, is_same_origin, session_cookie_name
from corral.wire.errors import CorralError
from corral.wire.secrets import Secret

#: Pages that belong to whoever is signed in. A GET without a session is sent to /signin by the HTTP layer.
MEMBER = Access(SESSION_ONLY)
ADMIN = Access(SESSION_ONLY, is_admin_only=True)

#: No form of ours comes near this.
MAX_FORM_BYTES = 64 * 1024
_MAX_FIELDS = 100

_FORM_TYPE = "application/x-www-form-urlencoded"


@dataclass(frozen=True, slots=True)
class Form:
    """The fields of a form, every value kept."""

    fields: Mapping[str, tuple[str, ...]]

    def text(self, name: str) -> str:
        """The field's value, empty when it was not sent. Raises: bad_request when it was sent twice."""
        values = self.fields.get(name, ("",))
        if len(values) > 1:
            raise CorralError("bad_request", f"the form sends {name} more than once")
        return values[0]

    def scopes(self) -> frozenset[Scope]:
        """The ticked scopes. Raises: bad_request for one that does not exist."""
        try:
            return frozenset(Scope(text) for text in self.fields.get("scope", ()))
        except ValueError as error:
            raise CorralError("bad_request", "the form names a scope that does not exist") from error


def query_of(request: Request) -> Form:
    """The fields of the address."""
    return _parse(facts_of(request).target.partition("?")[2])


def session_form(request: Request) -> tuple[Form, Principal, BrowserSession]:
    """A form of a signed-in page. Raises: unauthorized without a session, forbidden when the form is not of this session."""
    caller = caller_of(request)
    session = session_of(caller)
    form = read_form(request)
    # Compared as bytes: compare_digest refuses text outside ASCII with a TypeError, which a form can contain.
    if not hmac.compare_digest(form.text("csrf").encode(), session.csrf.encode()):
        raise CorralError("forbidden", "this form is not from your present session; reload the page and send it again")
    return form, caller, session


def visitor_form(request: Request, public_url: str) -> Form:
    """A form of a page that needs no session. Raises: forbidden when another site sent it."""
    if not is_same_origin(facts_of(request).headers, public_url):
        raise CorralError("forbidden", "this form was sent from another site; open the page on this hub and send it there")
    return read_form(request)


def session_of(caller: Principal) -> BrowserSession:
    """The browser session behind a caller of a page. Raises: unauthorized."""
    if caller.session is None:
        raise CorralError("unauthorized")
    return caller.session


def member_of(request: Request) -> Principal | None:
    """The caller of a page that anyone may open, or None for a visitor. A key or a device is a visitor there: pages belong to
    browsers, and their forms carry a session's token."""
    caller = maybe_caller(request)
    return caller if caller is not None and caller.session is not None else None


def read_form(request: Request) -> Form:
    """The fields of a form, whoever sent it. Raises: bad_request."""
    content_type = facts_of(request).headers.get("content-type", [""])[-1]
    if content_type.partition(";")[0].strip().lower() != _FORM_TYPE:
        raise CorralError("bad_request", "a form is sent as application/x-www-form-urlencoded")
    try:
        return _parse(body_of(request).decode("utf-8"))
    except UnicodeDecodeError as error:
        raise CorralError("bad_request", "the form is not UTF-8") from error


def _parse(text: str) -> Form:
    try:
        pairs = parse_qs(text, keep_blank_values=True, max_num_fields=_MAX_FIELDS, errors="strict")
    except ValueError as error:  # too many fields, or bytes that are not UTF-8
        raise CorralError("bad_request", "the form has too many fields or is not UTF-8") from error
    return Form({name: tuple(values) for name, values in pairs.items()})


def sign_in_path(next_path: str) -> str:
    """/signin that leads back to a path."""
    return f"/signin?next={quote(next_path, safe='')}"


def redirect(path: str) -> Response:
    """303 to a path of this hub."""
    return Response(status_code=303, headers={"Location": path, "Cache-Control": "no-store"})


class Cookies:
    """Sets and clears the session cookie of one hub."""

    def __init__(self, *, public_url: str, clock: Clock) -> None:
        self._name = session_cookie_name(public_url)
        self._clock = clock

    def set_on(self, response: Response, session: BrowserSession, value: Secret) -> Response:
        """The response, which makes the browser keep the session until it ends."""
        remaining_s = max(0, int((session.expires_at - self._clock.now()).total_seconds()))
        response.headers["Set-Cookie"] = format_cookie(self._name, value.reveal(), max_age_s=remaining_s)
        return response

    def clear_on(self, response: Response) -> Response:
        """The response, which makes the browser forget the session."""
        response.headers["Set-Cookie"] = format_cookie(self._name, "", max_age_s=0)
        return response


@dataclass(frozen=True, slots=True, kw_only=True)
class Stepped:
    """Somebody who may do what needs a fresh password. renewed: the new cookie, when the password was typed just now."""

    caller: Principal
    session: BrowserSession
    renewed: Secret | None = None

    @property
    def account(self) -> Account:
        """Whose session it is."""
        return self.caller.account


@dataclass(frozen=True, slots=True, kw_only=True)
class Unproven:
    """Somebody whose password was needed and is missing or wrong. errors: for the form they sent."""

    errors: Mapping[str, str]
    status: int


class StepUp:
    """Asks for the password again before what gives a credential away."""

    def __init__(self, *, accounts: Accounts, cookies: Cookies, clock: Clock) -> None:
        self._accounts = accounts
        self._cookies = cookies
        self._clock = clock

    def is_needed(self, session: BrowserSession) -> bool:
        """Whether the form must ask for the password."""
        return needs_step_up(session, self._clock.now())

    async def check(self, request: Request, form: Form, caller: Principal) -> Stepped | Unproven:
        """Take the form's password where one is needed; the session then has a new id."""
        session = session_of(caller)
        if not self.is_needed(session):
            return Stepped(caller=caller, session=session)
        password = form.text("password")
        if not password:
            errors = {"password": "Type your password: it is more than five minutes since you last did."}
            return Unproven(errors=errors, status=403)
        try:
            renewed, value = await self._accounts.step_up(session, password, network=facts_of(request).network)
        except CorralError as error:
            if error.code not in ("unauthorized", "rate_limited"):
                raise
            return Unproven(errors=wrong_password(error, "password"), status=429 if error.code == "rate_limited" else 403)
        return Stepped(caller=replace(caller, session=renewed), session=renewed, renewed=value)

    def finish(self, response: Response, stepped: Stepped) -> Response:
        """The response, with the new cookie if there is one: the old session id is dead whatever came after."""
        return self._cookies.set_on(response, stepped.session, stepped.renewed) if stepped.renewed else response


def wrong_password(error: CorralError, field: str) -> dict[str, str]:
    """What a form says when the signed-in person's own password was refused or throttled."""
    if error.code == "rate_limited":
        return {"": f"Too many tries. Wait {error.retry_after_s or 60} seconds, then try again."}
    return {field: "This is not your password."}
