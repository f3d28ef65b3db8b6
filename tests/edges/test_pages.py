"""Rendering: how values are written, what headers a page carries, static files, contrast of the palette."""

import re
from datetime import timedelta
from hashlib import sha256
from itertools import product

import pytest

from corral.core.records import Scope
from corral.core.scopes import format_scope_names
from corral.edges.asgi import Failure
from corral.edges.pages import (
    Pages,
    format_ago,
    format_ahead,
    format_browser,
    format_sentence,
    security_headers,
    shorten_fingerprint,
    static_files,
)
from corral.edges.web_models import Entry
from corral.wire.errors import CODES, CorralError
from fakes import NOON, FakeClock
from fakes_web import device_key

STYLE = static_files()["corral.css"].body.decode()


@pytest.mark.parametrize(
    ("seconds", "words"),
    [
        (-5, "just now"),
        (1, "just now"),
        (12, "12 seconds ago"),
        (60, "1 minute ago"),
        (7200, "2 hours ago"),
        (29 * 86_400, "29 days ago"),
        (30 * 86_400, "on 2026-08-22"),
    ],
)
def test_past_moment_is_told_as_a_person_would(seconds: int, words: str) -> None:
    assert format_ago(NOON - timedelta(seconds=seconds), NOON) == words


def test_moment_that_never_was_is_never() -> None:
    assert format_ago(None, NOON) == "never"


def test_future_moment_is_told_by_its_largest_unit() -> None:
    assert format_ahead(NOON + timedelta(days=78, hours=3), NOON) == "78 days"
    assert format_ahead(NOON + timedelta(days=90, seconds=-1), NOON) == "90 days"
    assert format_ahead(NOON + timedelta(minutes=59, seconds=50), NOON) == "1 hour"
    assert format_ahead(NOON - timedelta(days=1), NOON) == "0 seconds"


def test_scopes_are_told_in_a_fixed_order() -> None:
    assert format_scope_names(frozenset({"newer", Scope.KEYS, Scope.INFERENCE})) == "inference, keys, newer"
    assert format_scope_names(frozenset()) == "nothing"


def test_short_fingerprint_shows_both_ends() -> None:
    whole = device_key().public.fingerprint
    short = shorten_fingerprint(whole)
    assert (short[:11], short[-4:], len(short)) == (whole[:11], whole[-4:], 16)


@pytest.mark.parametrize(
    ("agent", "words"),
    [
        ("Mozilla/5.0 (X11; Linux x86_64; rv:140.0) Gecko/20100101 Firefox/140.0", "Firefox on Linux"),
        ("Mozilla/5.0 (Windows NT 10.0) AppleWebKit/537.36 Chrome/140.0 Safari/537.36 Edg/140.0", "Edge on Windows"),
        (
            "Mozilla/5.0 (iPhone; CPU iPhone OS 19_0 like Mac OS X) Version/19.0 Safari/604.1",
            "Safari on iPhone",
        ),
        ("curl/8", "A browser"),
    ],
)
def test_browser_is_named_by_its_most_specific_mark(agent: str, words: str) -> None:
    assert format_browser(agent) == words


def test_message_of_a_service_becomes_a_sentence() -> None:
    assert format_sentence("that is taken") == "That is taken."
    assert format_sentence("Really?") == "Really?"


def test_https_hub_insists_on_https_and_others_do_not() -> None:
    assert ("Strict-Transport-Security", "max-age=31536000") in security_headers("https://hub.example.org")
    assert "Strict-Transport-Security" not in dict(security_headers("http://localhost:11435"))


def test_static_file_is_named_by_its_content_and_kept_for_ever() -> None:
    file = static_files()["corral.css"]
    assert sha256(file.body).hexdigest()[:12] in file.path
    assert "immutable" in file.response().headers["cache-control"]


def test_page_without_personal_matter_may_be_kept_but_is_checked_each_time() -> None:
    pages = Pages(public_url="http://localhost:11435", clock=FakeClock(), sign_up_open=False)
    answer = pages.render("hosted.html", caller=None, entry=Entry(title="x", path="/x/y", summary="", is_public=True), tags=[])
    assert (answer.headers["cache-control"], answer.headers["vary"]) == ("no-cache", "Cookie")
    assert int(answer.headers["content-length"]) == len(bytes(answer.body))


PAGES = Pages(public_url="http://localhost:11435", clock=FakeClock(), sign_up_open=False)


def failed(code: str, text: str = "", **changes: str) -> str:
    """The page of an error that a visitor meets."""
    error = CorralError(code, text, retry_after_s=7)
    return PAGES.error(Failure(**{"error": error, "request_id": "0123456789abcdef", "target": "/a/b?x=1", **changes})).decode()  # type: ignore[arg-type]


@pytest.mark.parametrize("code", CODES)
def test_every_error_has_a_page_with_the_usual_head_its_request_and_one_thing_to_do(code: str) -> None:
    html = failed(code)
    assert "0123456789abcdef" in html
    assert "7 seconds" in html
    assert 'action="/search"' in html
    assert '<a href="/signin">Sign in</a>' in html
    assert html.count('class="button main"') == 1


@pytest.mark.parametrize(
    ("code", "words", "address"),
    [
        ("not_found", "Sign in", "/signin"),
        ("forbidden", "Sign in", "/signin"),
        ("rate_limited", "Try again", "/a/b?x=1"),
        ("internal", "Try again", "/a/b?x=1"),
        ("invalid", "Go to the front page", "/"),
    ],
)
def test_error_page_offers_what_helps(code: str, words: str, address: str) -> None:
    assert f'<a class="button main" href="{address}">{words}</a>' in failed(code)


@pytest.mark.parametrize("target", ["//evil.example", "/\\evil.example", "/x\r\ny", "/\xff\x00"])
def test_t80_error_page_leads_nowhere_else(target: str) -> None:
    for code in ("not_found", "internal"):
        assert "evil" not in failed(code, target=target)


def test_error_page_of_a_form_offers_nothing_that_would_send_it_again() -> None:
    assert 'href="/">Go to the front page' in failed("internal", target="")


def test_t115_page_of_an_internal_error_says_nothing_but_its_number() -> None:
    assert "hub.db" not in failed("internal", "/srv/corral/hub.db is locked")


def test_t81_error_page_writes_a_message_down_as_text() -> None:
    assert "<img" not in failed("invalid", "<img src=x onerror=alert(1)>")


# ── The palette ──────────────────────────────────────────────────────────────────────────────────────────────────────


def _palette(scheme: str) -> dict[str, str]:
    light, dark = re.findall(r":root \{(.*?)\}", STYLE, re.DOTALL)[:2]
    return dict(re.findall(r"--([a-z-]+): (#[0-9a-f]{6});", light if scheme == "light" else dark))


def _luminance(colour: str) -> float:
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return sum(weight * part for weight, part in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


def _contrast(one: str, other: str) -> float:
    lighter, darker = sorted((_luminance(one), _luminance(other)), reverse=True)
    return (lighter + 0.05) / (darker + 0.05)


@pytest.mark.parametrize(
    ("scheme", "text", "ground", "least"),
    [
        *((scheme, "ink", ground, 7.0) for scheme, ground in product(("light", "dark"), ("paper", "surface"))),
        *(
            (scheme, text, ground, 4.5)
            for scheme, text, ground in product(
                ("light", "dark"), ("quiet", "accent", "good", "warn", "bad"), ("paper", "surface")
            )
        ),
        *((scheme, f"on-{ground}", ground, 4.5) for scheme, ground in product(("light", "dark"), ("accent", "bad"))),
    ],
)
def test_text_stands_out_from_its_ground(scheme: str, text: str, ground: str, least: float) -> None:
    palette = _palette(scheme)
    assert _contrast(palette[text], palette[ground]) >= least


def test_script_uses_no_sink_that_trusted_types_guards() -> None:
    script = static_files()["corral.js"].body.decode()
    assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|eval\(|Function\(|setTimeout\(\"", script)
