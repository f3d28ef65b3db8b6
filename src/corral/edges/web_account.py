"""Pages for getting in and out: sign up, sign in, sign out. The only pages whose forms work without a session."""

from starlette.requests import Request
from starlette.responses import Response

from corral.core.policy import PUBLIC
from corral.core.records import Account
from corral.edges.asgi import Dialect, Endpoint, endpoint, facts_of
from corral.edges.forms import MAX_FORM_BYTES, MEMBER, Cookies, Form, member_of, query_of, redirect, session_form, visitor_form
from corral.edges.pages import Draft, Pages
from corral.hub.accounts import Accounts
from corral.wire.browser import safe_next
from corral.wire.errors import CorralError

_MAX_USER_AGENT = 300


class AccountPages:
    """Handlers of /signup, /signin and /signout."""

    def __init__(self, *, pages: Pages, accounts: Accounts, cookies: Cookies, public_url: str, sign_up_open: bool) -> None:
        self._pages = pages
        self._accounts = accounts
        self._cookies = cookies
        self._public_url = public_url
        self._sign_up_open = sign_up_open

    def endpoints(self) -> list[Endpoint]:
        """GET and POST declare their permission apart, here as on every page."""
        html, limit = Dialect.HTML, MAX_FORM_BYTES
        return [
            endpoint("GET,HEAD", "/signup", self.show_sign_up, PUBLIC, dialect=html),
            endpoint("POST", "/signup", self.sign_up, PUBLIC, dialect=html, max_body_bytes=limit),
            endpoint("GET,HEAD", "/signin", self.show_sign_in, PUBLIC, dialect=html),
            endpoint("POST", "/signin", self.sign_in, PUBLIC, dialect=html, max_body_bytes=limit),
            endpoint("POST", "/signout", self.sign_out, MEMBER, dialect=html, max_body_bytes=limit),
        ]

    async def show_sign_up(self, request: Request) -> Response:
        """The form, or the plain sentence that there is none and what to do instead."""
        query = query_of(request)
        code = query.text("code")
        if code and await self._accounts.check_setup_code(code, network=facts_of(request).network):
            return self._sign_up_page(request, query, mode="first")
        if await self._accounts.is_new():
            return self._sign_up_page(request, query, mode="expired" if code else "waiting", status=410 if code else 200)
        if code and not self._sign_up_open:
            return self._sign_up_page(request, query, mode="expired", status=410)
        return self._sign_up_page(request, query, mode="open" if self._sign_up_open else "closed")

    async def sign_up(self, request: Request) -> Response:
        """Make the account and sign in to it. The form's other fields, such as a role or an id, are not looked at (T82)."""
        form = visitor_form(request, self._public_url)
        code, network = form.text("code"), facts_of(request).network
        try:
            account = await self._accounts.sign_up(
                form.text("name"), form.text("email"), form.text("password"), setup_code=code, network=network
            )
        except CorralError as error:
            if error.code in ("gone", "forbidden"):
                return self._sign_up_page(request, form, mode="expired" if code else "closed", status=error.status)
            if error.code not in ("invalid", "conflict", "rate_limited"):
                raise
            draft = Draft(_typed(form, "name", "email"), {str(error.detail.get("field", "")): error.message})
            return self._sign_up_page(request, form, mode="first" if code else "open", draft=draft, status=error.status)
        return await self._enter(request, account, safe_next(form.text("next")))

    def _sign_up_page(
        self, request: Request, form: Form, *, mode: str, draft: Draft | None = None, status: int = 200
    ) -> Response:
        return self._pages.render(
            "signup.html",
            caller=member_of(request),
            status=status,
            is_personal=True,
            mode=mode,
            draft=draft or Draft(),
            code=form.text("code"),
            next=safe_next(form.text("next")),
        )

    async def show_sign_in(self, request: Request) -> Response:
        """The form, or straight on for who is signed in already."""
        next_path = safe_next(query_of(request).text("next"))
        if member_of(request):
            return redirect(next_path)
        return await self._sign_in_page(request, Draft(), next_path)

    async def sign_in(self, request: Request) -> Response:
        """Open a session. Every failure looks the same but for the throttle's."""
        form = visitor_form(request, self._public_url)
        next_path = safe_next(form.text("next"))
        try:
            account = await self._accounts.sign_in(form.text("name"), form.text("password"), network=facts_of(request).network)
        except CorralError as error:
            if error.code not in ("unauthorized", "rate_limited"):
                raise
            draft = Draft(_typed(form, "name"), _sign_in_errors(error))
            return await self._sign_in_page(request, draft, next_path, status=error.status)
        return await self._enter(request, account, next_path)

    async def _sign_in_page(self, request: Request, draft: Draft, next_path: str, *, status: int = 200) -> Response:
        return self._pages.render(
            "signin.html",
            caller=member_of(request),
            status=status,
            is_personal=True,
            draft=draft,
            next=next_path,
            is_connecting=next_path.startswith("/connect?"),
            is_new=await self._accounts.is_new(),
        )

    async def _enter(self, request: Request, account: Account, next_path: str) -> Response:
        facts, before = facts_of(request), member_of(request)
        if before is not None and before.session is not None:
            await self._accounts.sign_out(before.session, network=facts.network)
        user_agent = facts.headers.get("user-agent", [""])[-1][:_MAX_USER_AGENT]
        session, value = await self._accounts.open_session(account, network=facts.network, user_agent=user_agent)
        return self._cookies.set_on(redirect(next_path), session, value)

    async def sign_out(self, request: Request) -> Response:
        """End the session here and in the database. `next` serves those who switch accounts."""
        form, _, session = session_form(request)
        await self._accounts.sign_out(session, network=facts_of(request).network)
        return self._cookies.clear_on(redirect(safe_next(form.text("next"))))


def _typed(form: Form, *names: str) -> dict[str, str]:
    return {name: form.text(name) for name in names}


def _sign_in_errors(error: CorralError) -> dict[str, str]:
    if error.code == "rate_limited":
        return {"": f"Too many tries. Wait {error.retry_after_s or 60} seconds, then try again."}
    # The same words for an unknown name, a wrong password and a disabled account (T69); the focus goes to the password.
    return {"password": "This name and password do not go together, or the account is not in use."}
