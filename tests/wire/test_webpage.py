"""Pages turned into text, and addresses that mean one thing only."""

import html
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from corral.wire.errors import CorralError
from corral.wire.webpage import (
    MAX_CONTENT,
    FetchRequest,
    SearchRequest,
    page_of_html,
    page_of_text,
    parse_page_address,
    plain_result,
    search_request,
)

BASE = "https://example.org/docs/"


def text_of(markup: str) -> str:
    return page_of_html(markup, BASE).content


# ── Requests ─────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("body", "count"),
    [
        (b'{"query":"x"}', 5),
        (b'{"query":"x","max_results":3}', 3),
        (b'{"query":"x","maxResults":2}', 2),
        (b'{"query":"x","max_results":0}', 1),
        (b'{"query":"x","max_results":99}', 10),
        (b'{"query":"x","max_results":null}', 5),
    ],
)
def test_search_wants_one_to_ten_results(body: bytes, count: int) -> None:
    assert search_request(body).count == count


@pytest.mark.parametrize("body", [b"", b"{}", b'{"query":"  "}', b'{"query":1}', b"[]", b'{"query":"%s"}' % (b"x" * 2001)])
def test_search_without_a_usable_query_is_refused(body: bytes) -> None:
    with pytest.raises(CorralError) as refused:
        search_request(body)
    assert refused.value.status == 400


def test_requests_without_members_have_empty_ones() -> None:
    assert (SearchRequest().query, FetchRequest().url) == ("", "")


# ── Addresses ────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("ollama.com", "https://ollama.com/"),
        ("https://Example.ORG", "https://example.org/"),
        ("http://example.org:80/a?b#c", "http://example.org/a?b"),
        ("https://example.org:8443?x=1", "https://example.org:8443/?x=1"),
        ("http://[::1]:8080/x", "http://[::1]:8080/x"),
        ("https://example.org/Zürich", "https://example.org/Z%C3%BCrich"),
        ("http://127.0.0.1/", "http://127.0.0.1/"),
    ],
)
def test_address_of_a_page_is_read_one_way(text: str, shown: str) -> None:
    assert str(parse_page_address(text)) == shown


@pytest.mark.parametrize(
    "text",
    [
        "",
        "https://",
        "http://a@127.0.0.1#@b",
        "http://ada:secret@example.org/",
        "http://example.org\\@127.0.0.1/",
        "http://example.org/\tx",
        "http://exa\nmple.org/",
        "http://example.org/\r",
        "http://example.org /",
        "http://example。org/",
        "http://ｅxample.org/",
        "http://example..org/",
        "http://.example.org/",
        "http://example.org./",
        "http://2130706433/",
        "http://0177.0.0.1/",
        "http://127.1/",
        "http://127.0.0.01/",
        "http://example.org:0/",
        "http://example.org:99999/",
        "http://[::1/",
        "http://[::ffff:127.0.0.1%25eth0]/",
        "file:///etc/passwd",
        "gopher://example.org/",
        "ftp://example.org/",
        "data://text/html,x",
        "javascript://x",
        "http:///x",
        "http://a/" + "x" * 2000,
    ],
)
def test_t103_address_that_could_be_read_two_ways_is_refused(text: str) -> None:
    with pytest.raises(CorralError) as refused:
        parse_page_address(text)
    assert refused.value.status == 400


# ── Pages ────────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_page_becomes_title_text_and_links() -> None:
    page = page_of_html(
        """<!doctype html><html><head><title>Salt &amp; pepper</title><style>p{}</style></head><body>
        <script>if (a<b) "</p>"</script><!-- hidden --><h1>Hi <b>there</b></h1>
        <p>a  <a href="/x?y=1#z">b</a>&nbsp;c 1 < 2</p>
        <ul><li>one<li><a title="x>y" href='https://o.example/Zürich'>two</a></ul>
        <pre>a
  b</pre><table><tr><th>k<td>v</table><svg/>end<svg><text>no</text></svg>
        <a href="mailto:x@y">m</a><a href=other>o</a><a>n</a></body></html>""",
        BASE,
    )
    assert page.title == "Salt & pepper"
    assert page.content == "# Hi there\n\na b c 1 < 2\n\n- one\n- two\n\na\n  b\n\nk | v\n\nend mon"
    assert page.links == ["https://example.org/x?y=1", "https://o.example/Z%C3%BCrich", "https://example.org/docs/other"]


@pytest.mark.parametrize(
    ("markup", "text"),
    [
        ("", ""),
        ("plain", "plain"),
        ("a<br>b<br/>c", "a\nb\nc"),
        ("a<!-- b", "a"),
        ("a<b", "a"),
        ('a<b x="1', "a"),
        ("a<script>b", "a"),
        ("<p>a<p></p><p>b", "a\n\nb"),
        ("a <!DOCTYPE x> b <?php c ?> d", "a b d"),
        ("a</ b>c", "a</ b>c"),
        ("&#99999999999999999999;&#x110000;&lt;b&gt;", "��<b>"),
        ("<title>t</title><title>u</title>x", "x"),
        ("\u202eevil\u200b\x1b[2J", "evil[2J"),
    ],
)
def test_odd_markup_still_gives_its_text(markup: str, text: str) -> None:
    assert text_of(markup) == text


HOSTILE = [
    ("<div>", 40_000),
    ("<!--<a ", 30_000),
    ("<a ", 60_000),
    ("</a ", 50_000),
    ("b='", 60_000),
    ("<", 200_000),
    ("<p>x", 50_000),
    ("<script></script>", 10_000),
    ("<a href=/%s>", 10_000),
    ("<a x=", 30_000),
    ("x<b>", 50_000),
    ("<title>x<!---->", 10_000),
    ("&#9", 60_000),
]


@pytest.mark.parametrize(("piece", "count"), HOSTILE, ids=lambda value: html.escape(value) if isinstance(value, str) else "")
def test_t102_page_that_means_harm_is_read_in_bounded_time(piece: str, count: int) -> None:
    started = time.process_time()
    page = page_of_html(piece * count, BASE)
    assert time.process_time() - started < 2
    assert len(page.content) <= MAX_CONTENT
    assert len(page.links) <= 300


@given(st.text(alphabet="<>!-/ab =\"'&#;9\n"))
def test_any_text_is_a_page(markup: str) -> None:
    page = page_of_html(markup, BASE)
    assert all(link.startswith(("http://", "https://")) for link in page.links)


def test_text_is_kept_as_it_is_within_bounds() -> None:
    assert page_of_text("a\r\n b\x00").content == "a\n b"
    assert len(page_of_text("x" * (MAX_CONTENT + 1)).content) == MAX_CONTENT


# ── Search results ───────────────────────────────────────────────────────────────────────────────────────────────────


def test_t122_result_is_plain_text_within_bounds() -> None:
    found = plain_result("a\nb\u202e", "https://example.org/x#y", "c\x1b" * 9000)
    assert found is not None
    assert (found.title, found.url) == ("a b", "https://example.org/x")
    assert found.content == "c" * 4000


@pytest.mark.parametrize("url", [None, 1, "", "example.org", "javascript:alert(1)", "file:///x", "https://a@b/"])
def test_result_that_leads_to_no_page_is_dropped(url: object) -> None:
    assert plain_result("t", url, "c") is None


def test_result_without_texts_has_empty_ones() -> None:
    found = plain_result(None, "https://example.org/", ["x"])
    assert found is not None
    assert (found.title, found.content) == ("", "")
