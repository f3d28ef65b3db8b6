"""Where a request came from, where a browser may go, and cookies."""

import json
from pathlib import Path
from urllib.parse import urljoin, urlsplit

import pytest
from hypothesis import given
from hypothesis import strategies as st

from corral.wire.browser import (
    cookie_values,
    format_cookie,
    is_same_origin,
    origin_of,
    safe_next,
    session_cookie_name,
)

HUB = "https://hub.example"
REDIRECTS = json.loads((Path(__file__).parent.parent / "vectors" / "redirects.json").read_text())


# ── Same origin ──────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    "headers",
    [
        {"sec-fetch-site": ["same-origin"]},
        {"sec-fetch-site": ["same-origin"], "origin": [HUB]},
        {"origin": [HUB]},
    ],
)
def test_t079_request_of_our_own_page_is_same_origin(headers: dict[str, list[str]]) -> None:
    assert is_same_origin(headers, HUB)


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"sec-fetch-site": []},
        {"sec-fetch-site": ["cross-site"]},
        {"sec-fetch-site": ["same-site"]},
        {"sec-fetch-site": ["none"]},
        {"sec-fetch-site": [""]},
        {"sec-fetch-site": ["Same-Origin"]},
        {"sec-fetch-site": ["same-origin", "same-origin"]},
        {"sec-fetch-site": ["cross-site"], "origin": [HUB]},
        {"origin": ["null"]},
        {"origin": [""]},
        {"origin": ["https://evil.example"]},
        {"origin": ["http://hub.example"]},
        {"origin": ["https://hub.example:8443"]},
        {"origin": ["https://hub.example.evil.example"]},
        {"origin": ["https://hub.example/"]},
        {"origin": [HUB, HUB]},
        {"referer": [HUB + "/settings"]},
    ],
)
def test_t079_absent_foreign_null_or_doubled_headers_are_not_same_origin(headers: dict[str, list[str]]) -> None:
    assert not is_same_origin(headers, HUB)


@pytest.mark.parametrize(
    ("url", "origin"),
    [
        ("https://Hub.Example", "https://hub.example"),
        ("https://hub.example:443/", "https://hub.example"),
        ("http://hub.example:80", "http://hub.example"),
        ("http://hub.example:443", "http://hub.example:443"),
        ("http://localhost:11435", "http://localhost:11435"),
        ("http://[::1]:11435/x", "http://[::1]:11435"),
    ],
)
def test_origin_is_written_as_browsers_write_it(url: str, origin: str) -> None:
    assert origin_of(url) == origin


# ── Onward targets ───────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("text", REDIRECTS["refused"])
def test_t080_open_redirect_corpus_leads_home(text: str) -> None:
    assert safe_next(text) == "/"


@pytest.mark.parametrize("text", REDIRECTS["accepted"])
def test_t080_path_of_our_own_is_kept(text: str) -> None:
    assert safe_next(text) == text


@given(st.text(max_size=40) | st.text("/\\.:@%?#\t evil0dA2fc", max_size=30))
def test_t080_whatever_is_kept_stays_on_our_origin(text: str) -> None:
    kept = safe_next(text)
    where = urlsplit(urljoin("https://hub.example/signin", kept))
    assert (where.scheme, where.netloc) == ("https", "hub.example")
    assert kept.isascii()
    assert kept.isprintable()
    assert "\\" not in kept
    assert kept in (text, "/")


# ── Cookies ──────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("lines", "values"),
    [
        ([], []),
        (["corral=v"], ["v"]),
        (["a=1; corral=v; b=2"], ["v"]),
        (["a=1;corral=v"], ["v"]),
        (["a=1", "corral=v"], ["v"]),
        (["corral=v; corral=w"], ["v", "w"]),
        (["corral="], [""]),
        (["corral"], [""]),
        (["xcorral=v; Corral=v; corralx=v"], []),
        (["corral=a=b"], ["a=b"]),
        ([";;=; =v;"], []),
    ],
)
def test_cookie_values_are_found_under_their_exact_name(lines: list[str], values: list[str]) -> None:
    assert cookie_values({"cookie": lines}, "corral") == values


@given(st.text("abcXYZ019_-", min_size=1))
def test_cookie_written_is_read_back(value: str) -> None:
    written = format_cookie("corral", value, max_age_s=60)
    assert cookie_values({"cookie": [written.partition(";")[0]]}, "corral") == [value]


def test_cookie_over_tls_is_bound_to_host_and_path() -> None:
    assert session_cookie_name(HUB) == "__Host-corral"
    assert (
        format_cookie("__Host-corral", "v", max_age_s=60) == "__Host-corral=v; Path=/; Max-Age=60; HttpOnly; SameSite=Lax; Secure"
    )


def test_cookie_over_plain_http_has_another_name_and_is_not_secure() -> None:
    assert session_cookie_name("http://localhost:11435") == "corral-11435"
    assert format_cookie("corral-11435", "", max_age_s=0) == "corral-11435=; Path=/; Max-Age=0; HttpOnly; SameSite=Lax"


def test_hubs_on_one_machine_do_not_overwrite_each_others_sessions() -> None:
    names = {session_cookie_name(url) for url in ("http://localhost:11435", "http://localhost:9", "http://localhost", HUB)}
    assert names == {"corral-11435", "corral-9", "corral-80", "__Host-corral"}
