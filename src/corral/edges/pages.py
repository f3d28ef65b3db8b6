"""HTML: the one template environment, what every page is given, its security headers, and the static files.

Everything a person typed or a device claimed reaches a page through a template with autoescape; nothing here or in the handlers
joins markup and text. The Content-Security-Policy allows no inline script or style, so templates have none, and the one script
may not use a DOM sink (`require-trusted-types-for`). What a page needs to know about time and the hub is given to `Pages`, once.
"""

from collections.abc import Container, Mapping
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from functools import cache
from hashlib import sha256
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlsplit

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from starlette.responses import Response

import corral
from corral.core.ports import Clock
from corral.core.records import Principal
from corral.core.scopes import SCOPE_MEANINGS, format_scope_names
from corral.edges.asgi import Failure
from corral.wire.browser import safe_next
from corral.wire.errors import CorralError
from corral.wire.units import format_count, format_size

_HERE = Path(__file__).parent
_MEDIA_TYPES = {".css": "text/css; charset=utf-8", ".js": "text/javascript; charset=utf-8", ".svg": "image/svg+xml"}

_CSP = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; connect-src 'self'; form-action 'self'; "
    "base-uri 'none'; frame-ancestors 'none'; require-trusted-types-for 'script'"
)


def security_headers(public_url: str) -> tuple[tuple[str, str], ...]:
    """Headers every answer of the hub may carry, and every page must. public_url: https makes the browser insist on https."""
    headers = (
        ("Content-Security-Policy", _CSP),
        ("X-Content-Type-Options", "nosniff"),
        ("X-Frame-Options", "DENY"),
        ("Cross-Origin-Opener-Policy", "same-origin"),
        ("Cross-Origin-Resource-Policy", "same-origin"),
        ("Referrer-Policy", "same-origin"),
    )
    if public_url.startswith("https://"):
        return (*headers, ("Strict-Transport-Security", "max-age=31536000"))
    return headers


@dataclass(frozen=True, slots=True)
class Draft:
    """A form as it is shown: what was typed, and what is wrong with it.

    errors: field name -> one sentence, in the order of the page; the name `""` is for the form as a whole. Passwords are never
    among the values.
    """

    values: Mapping[str, str] = field(default_factory=dict)
    errors: Mapping[str, str] = field(default_factory=dict)

    @property
    def first_wrong(self) -> str:
        """The field that gets the focus."""
        return next((name for name in self.errors if name), "")


@dataclass(frozen=True, slots=True, kw_only=True)
class StaticFile:
    """A file of the pages. path: holds a hash of the body, so that a browser may keep it for ever."""

    path: str
    body: bytes
    media_type: str

    def response(self) -> Response:
        """The answer to a request for it."""
        headers = {"Cache-Control": "public, max-age=31536000, immutable", "X-Content-Type-Options": "nosniff"}
        return Response(self.body, headers=headers, media_type=self.media_type)


@cache
def static_files() -> Mapping[str, StaticFile]:
    """File name without directory and hash -> file. Read once: they are part of the program."""
    return {path.name: _static_file(path) for path in sorted((_HERE / "static").iterdir()) if path.suffix in _MEDIA_TYPES}


def _static_file(path: Path) -> StaticFile:
    body = path.read_bytes()
    name = f"{path.stem}.{sha256(body).hexdigest()[:12]}{path.suffix}"
    return StaticFile(path=f"/static/{name}", body=body, media_type=_MEDIA_TYPES[path.suffix])


class Pages:
    """Renders pages of one hub."""

    def __init__(self, *, public_url: str, clock: Clock, sign_up_open: bool) -> None:
        self._clock = clock
        self._headers = security_headers(public_url)
        self._site = _site(public_url=public_url, sign_up_open=sign_up_open)

    def render(
        self,
        template: str,
        *,
        caller: Principal | None,
        status: int = 200,
        is_personal: bool = False,
        referrer: str = "same-origin",
        **context: object,
    ) -> Response:
        """A page. is_personal: keep it out of caches also for a visitor who is not signed in. referrer: its Referrer-Policy; note
        that with `no-referrer` browsers post its forms with `Origin: null`, which only Sec-Fetch-Site makes good."""
        page: dict[str, Any] = {"caller": caller, "now": self._clock.now(), **self._site, **context}
        headers = dict(self._headers)
        headers["Vary"] = "Cookie"
        headers["Cache-Control"] = "no-store" if caller or is_personal else "no-cache"
        headers["Referrer-Policy"] = referrer
        html = _environment().get_template(template).render(page)
        return Response(html.encode(), status, headers=headers, media_type="text/html; charset=utf-8")

    def error(self, failure: Failure) -> bytes:
        """The page for a failure that no form can show in place, with the head that all pages have."""
        error = failure.error
        heading, advice = _EXPLAINED.get(error.code, _SERVER_ERROR if error.status >= 500 else _CLIENT_ERROR)
        # What an error says by itself, the heading says already.
        is_told = error.status >= 500 or error.code == "unauthorized" or error.message == CorralError(error.code).message
        # A key or a device has no session, and the head is a browser's.
        caller = failure.caller if failure.caller is not None and failure.caller.session is not None else None
        page = {
            **self._site,
            "caller": caller,
            "now": self._clock.now(),
            "error": error,
            "heading": heading,
            "advice": advice,
            "text": "" if is_told else error.message,
            "way_on": _way_on(replace(failure, caller=caller)),
            "request_id": failure.request_id,
        }
        return _environment().get_template("error.html").render(page).encode()


#: error code -> (heading, what to do next). Codes that are not here use the status class.
_EXPLAINED = {
    "unauthorized": ("Sign in first", "You are not signed in, or you were signed out in the meantime. Nothing was changed."),
    "not_found": ("There is nothing here", "The address may be mistyped, or what was here is gone or not visible to you."),
    "forbidden": ("You may not do that", "If you should be able to, ask whoever runs this hub."),
    "method_not_allowed": ("That is not how this page works", "Go back and use the form on the page."),
    "gone": ("That link no longer works", "Links of this kind work once and for a short time. Ask for a new one."),
    "rate_limited": ("Too many tries", "Wait a little, then try again."),
    "too_large": ("That is too much at once", "Send less and try again."),
}
_CLIENT_ERROR = ("That did not work", "Nothing was changed. Go back and try again.")
_SERVER_ERROR = (
    "Something failed on this hub",
    "It is not your fault. Try again; if it stays, tell the administrator the number below.",
)


def _way_on(failure: Failure) -> tuple[str, str]:
    """(words, address) of the one thing that an error page offers to do."""
    error, target = failure.error, safe_next(failure.target) if failure.target else ""
    if error.code == "unauthorized" or (failure.caller is None and error.code in ("not_found", "forbidden")):
        # Without the way back: what is private is told of in the very bytes of what never was (T29), an address among them.
        return "Sign in", "/signin"
    if target and (error.status >= 500 or error.code == "rate_limited"):
        return "Try again", target
    if error.code == "not_found":
        return "See all models", "/library"
    return "Go to the front page", "/"


def _site(*, public_url: str, sign_up_open: bool) -> dict[str, Any]:
    """What every template may use."""
    return {
        "hub_url": public_url,
        "hub_name": urlsplit(public_url).netloc,
        "sign_up_open": sign_up_open,
        "version": corral.__version__,
    }


@cache
def _environment() -> Environment:
    environment = Environment(
        loader=FileSystemLoader(_HERE / "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        auto_reload=False,
    )
    environment.globals["static"] = lambda name: static_files()[name].path
    environment.filters.update(
        ago=format_ago,
        ahead=format_ahead,
        browser=format_browser,
        context=format_context,
        count=format_count,
        day=format_day,
        moment=format_moment,
        scopes=format_scope_names,
        sentence=format_sentence,
        short_fingerprint=shorten_fingerprint,
        size=format_size,
        urlpart=lambda text: quote(str(text), safe=""),
    )
    return environment


def format_ago(moment: datetime | None, now: datetime) -> str:
    """`12 seconds ago`, `2 hours ago`, and a date from 30 days on; `never` for None. The future is `just now`."""
    if moment is None:
        return "never"
    elapsed = now - moment
    if elapsed < timedelta(seconds=2):
        return "just now"
    return f"{_span(elapsed)} ago" if elapsed < timedelta(days=30) else f"on {format_day(moment)}"


def format_ahead(moment: datetime, now: datetime) -> str:
    """`78 days`, `3 hours`: how long until then, rounded: of a key's 90 days, a moment is over when they are first shown."""
    left = max(moment - now, timedelta(0))
    _, length = _unit_of(left)
    return _span(left + timedelta(seconds=length / 2))


def _span(span: timedelta) -> str:
    unit, length = _unit_of(span)
    return _plural(int(span.total_seconds() // length), unit)


def _unit_of(span: timedelta) -> tuple[str, int]:
    """The largest that fits, and its seconds."""
    seconds = span.total_seconds()
    return next((unit for unit in (("day", 86_400), ("hour", 3600), ("minute", 60)) if seconds >= unit[1]), ("second", 1))


def _plural(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def format_day(moment: datetime) -> str:
    """`2027-02-21`, in UTC."""
    return moment.astimezone(UTC).strftime("%Y-%m-%d")


def format_moment(moment: datetime) -> str:
    """`2027-02-21 13:05 UTC`."""
    return moment.astimezone(UTC).strftime("%Y-%m-%d %H:%M UTC")


def format_context(tokens: int | None) -> str:
    """`8k`, `512`, and nothing for what is not known."""
    if not tokens:
        return ""
    return f"{tokens // 1024}k" if tokens >= 1024 else str(tokens)


def scope_choices(ticked: Container[str]) -> list[tuple[str, str, bool]]:
    """(scope, what it allows, whether its box is ticked), for the boxes of a form."""
    return [(scope, meaning, scope in ticked) for scope, meaning in SCOPE_MEANINGS.items()]


def shorten_fingerprint(fingerprint: str) -> str:
    """`SHA256:lbms…Sspg`: enough to tell devices of one account apart, never enough to compare on /connect."""
    return f"{fingerprint[:11]}…{fingerprint[-4:]}"


def format_sentence(text: str) -> str:
    """A message of a service as a page writes it: with a capital and a full stop."""
    return text[:1].upper() + text[1:] + ("" if text.endswith((".", "?", "!", ":")) or not text else ".")


_BROWSERS = (("Edg/", "Edge"), ("OPR/", "Opera"), ("Firefox/", "Firefox"), ("Chrome/", "Chrome"), ("Safari/", "Safari"))
_SYSTEMS = (
    ("Android", "Android"), ("iPhone", "iPhone"), ("iPad", "iPad"), ("Windows", "Windows"), ("Mac OS", "macOS"),
    ("CrOS", "ChromeOS"), ("Linux", "Linux"),
)  # fmt: skip


def format_browser(user_agent: str) -> str:
    """`Firefox on Linux`: enough to know one's own browsers again. The most specific mark is looked for first."""
    browser = next((name for mark, name in _BROWSERS if mark in user_agent), "A browser")
    system = next((name for mark, name in _SYSTEMS if mark in user_agent), "")
    return f"{browser} on {system}" if system else browser
