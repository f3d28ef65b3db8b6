"""What holds for every page: guards of the routes, headers, inert content, forms that can be used by anybody."""

import re
from collections.abc import AsyncIterator
from urllib.parse import quote

import pytest

from corral.core.policy import SESSION_ONLY
from corral.core.records import AuditEvent, Scope
from corral.edges.asgi import Endpoint
from corral.edges.pages import static_files
from corral.wire.signing import authorization_header, request_challenge, signed_target
from fakes import NOON
from fakes_web import PASSWORD, Browser, Page, Site, device_key

#: Forms that a visitor without a session may send.
VISITOR_FORMS = {"/signin", "/signup"}
XSS = (
    "<script>alert(1)</script>",
    '"><img src=x onerror=alert(1)>',
    "'><svg onload=alert(1)>",
    "javascript:alert(1)",
    "</title><script>alert(1)</script>",
    "{{ 7*7 }}{% raw %}",
    "\u202egnp.exe",
    "a\r\nSet-Cookie: x=1",
)


@pytest.fixture
async def site() -> Site:
    site = Site()
    await site.host("smollm2:135m")
    return site


def concrete(path: str) -> str:
    """A path of the route table with its parameters filled in."""
    return re.sub(r"\{[a-z_]+(?::[a-z]+)?\}", "x", path)


def posts(site: Site) -> list[Endpoint]:
    return [row for row in site.rows if not row.methods <= {"GET", "HEAD"}]


# ── Guards ───────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"sec-fetch-site": "cross-site"},
        {"sec-fetch-site": "same-site"},
        {"sec-fetch-site": "none"},
        {"origin": "null"},
        {"origin": "https://evil.example"},
    ],
)
async def test_t79_every_form_refuses_a_post_that_is_not_from_our_own_page(site: Site, headers: dict[str, str]) -> None:
    browser = await site.signed_in(is_admin=True)
    csrf = (await browser.get("/settings")).form("/signout").fields["csrf"]
    before = site.writes
    for row in posts(site):
        answer = await browser.post(concrete(row.path), {"csrf": csrf}, headers=headers)
        assert answer.status == 403, row.path
    assert site.writes == before


async def test_t44_every_form_of_a_session_refuses_a_post_without_its_token(site: Site) -> None:
    browser = await site.signed_in(is_admin=True)
    other = (await (await site.signed_in("bob")).get("/settings")).form("/signout").fields["csrf"]
    before = site.writes
    for row in posts(site):
        for fields in ({}, {"csrf": ""}, {"csrf": other[0]}):
            answer = await browser.post(concrete(row.path), fields)
            assert answer.status == 403 or row.path in VISITOR_FORMS, row.path
    assert {name: count for name, count in site.writes.items() if "Accounts" in name or "Credentials" in name} == {
        name: count for name, count in before.items() if "Accounts" in name or "Credentials" in name
    }


async def test_t52_form_of_a_visitor_refuses_a_post_from_another_site(site: Site) -> None:
    await site.add_account()
    for path in VISITOR_FORMS:
        stranger = Browser(site, headers={"sec-fetch-site": "cross-site"})
        answer = await stranger.post(path, {"name": "alice", "password": PASSWORD})
        assert (answer.status, stranger.cookies) == (403, {})


@pytest.mark.parametrize(("path", "status"), [("/no.where/at/all.html", 404), ("/settings/password", 405), ("/admin", 403)])
async def test_page_of_an_error_knows_who_is_signed_in_and_is_kept_by_no_cache(site: Site, path: str, status: int) -> None:
    page = await (await site.signed_in()).get(path)
    assert (page.status, page.headers["cache-control"], page.headers["vary"]) == (status, "no-store", "Cookie")
    assert page.form("/signout").fields["csrf"]
    assert page.find("a", href="/settings")
    assert not page.find("a", href="/signin")


async def test_page_of_an_error_lets_a_visitor_sign_in(site: Site) -> None:
    page = await Browser(site, cookies={"corral-11435": "A" * 43}).get("/no.where/at/all.html")
    assert (page.status, [link["href"] for link in page.find("a", href="/signin")]) == (404, ["/signin"] * 2)


def test_t83_every_view_declares_its_post_apart_from_its_get(site: Site) -> None:
    for row in posts(site):
        assert row.methods == {"POST"}, row.path
        readers = [other.handler for other in site.rows if other.path == row.path and other is not row]
        assert row.handler not in readers, row.path


def test_t60_every_form_but_those_for_visitors_demands_a_session(site: Site) -> None:
    public = {row.path for row in posts(site) if row.access.proofs != SESSION_ONLY}
    assert public == VISITOR_FORMS


def test_pages_of_administration_are_for_administrators_only(site: Site) -> None:
    rows = [row for row in site.rows if row.path.startswith("/admin")]
    assert rows
    assert all(row.access.is_admin_only for row in rows)


async def test_t42_page_that_needs_a_session_sends_a_visitor_to_sign_in_and_back(site: Site) -> None:
    for row in site.rows:
        if row.access.proofs and "GET" in row.methods:
            path = concrete(row.path)
            answer = await Browser(site).get(path)
            assert (answer.status, answer.headers["location"]) == (303, f"/signin?next={path.replace('/', '%2F')}"), path


async def test_form_of_a_session_that_has_ended_says_to_sign_in(site: Site) -> None:
    browser = await site.signed_in()
    page = await browser.get("/settings/keys")
    site.clock.advance(25 * 3600)
    answer = await browser.submit(page, "/settings/keys", name="ci")
    assert answer.status == 401
    assert answer.find("a", href="/signin")


async def test_t43_reading_any_page_changes_nothing(site: Site) -> None:
    browser = await site.signed_in(is_admin=True)
    link = await site.knock(device_key())
    key, _ = await make_key(site)
    before = site.writes
    for method in ("GET", "HEAD"):
        for path in [concrete(row.path) for row in site.rows if "GET" in row.methods]:
            await browser.get(path, method=method)
        for path in (link, f"/settings/keys/{key}/revoke", f"/settings/keys/{key}/rotate", "/admin/accounts/alice/disable"):
            answer = await browser.get(path, method=method)
            assert answer.status == 200, path
    assert site.writes == before


async def make_key(site: Site, name: str = "ci") -> tuple[str, str]:
    account = await site.accounts.named("alice")
    key, secret = await site.credentials.create_key(account, name=name, scopes=frozenset({Scope.INFERENCE}), expires_at=None)
    return key.id, secret.reveal()


async def test_t066_page_takes_a_key_or_a_device_for_a_visitor(site: Site) -> None:
    account = await site.add_account()
    await site.host("alice/tiny:latest", is_public=False)
    device = device_key()
    await site.credentials.add_device(account, name="finch", authorized_key=device.public.authorized_key, scopes=frozenset(Scope))
    _, key = await make_key(site)
    for path in ("/", "/library", "/search?q=smollm2", "/library/smollm2", "/signin", "/signup", "/alice/tiny"):
        target = signed_target(*path.partition("?")[::2], int(NOON.timestamp()))
        signature = authorization_header(device, request_challenge("GET", target))
        seen = await Browser(site).get(path)
        for address, authorization in ((path, f"Bearer {key}"), (target, signature)):
            page = await Browser(site, headers={"authorization": authorization}).get(address)
            assert page.status == seen.status == (404 if path == "/alice/tiny" else 200)
            assert "alice" not in page.text


# ── Headers ──────────────────────────────────────────────────────────────────────────────────────────────────────────

CSP = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; connect-src 'self'; form-action 'self'; "
    "base-uri 'none'; frame-ancestors 'none'; require-trusted-types-for 'script'"
)


async def test_t49_every_page_forbids_framing_sniffing_and_foreign_content(site: Site) -> None:
    async for page in every_page(site):
        assert page.headers["content-security-policy"] == CSP
        assert page.headers["x-frame-options"] == "DENY"
        assert page.headers["x-content-type-options"] == "nosniff"
        assert page.headers["cross-origin-opener-policy"] == "same-origin"
        assert page.headers["cross-origin-resource-policy"] == "same-origin"
        assert page.headers["referrer-policy"] in ("same-origin", "no-referrer")


async def test_t49_connect_page_sends_no_referrer_and_is_not_stored(site: Site) -> None:
    browser = await site.signed_in()
    page = await browser.get(await site.knock(device_key()))
    assert (page.headers["referrer-policy"], page.headers["cache-control"]) == ("no-referrer", "no-store")


async def test_page_of_a_session_is_never_stored(site: Site) -> None:
    browser = await site.signed_in(is_admin=True)
    for path in ("/", "/library", "/settings", "/settings/keys", "/settings/usage", "/admin"):
        assert (await browser.get(path)).headers["cache-control"] == "no-store"
    for path in ("/signin", "/signup"):
        assert (await Browser(site).get(path)).headers["cache-control"] == "no-store"


async def test_static_files_are_served_under_the_names_that_pages_use(site: Site) -> None:
    page = await Browser(site).get("/")
    used = {found["href"] for found in page.find("link")} | {found["src"] for found in page.find("script")}
    assert used == {file.path for file in static_files().values()}
    for path in used:
        answer = await Browser(site).get(path)
        assert (answer.status, "immutable" in answer.headers["cache-control"]) == (200, True)
    assert (await Browser(site).get("/static/corral.css")).status == 404


# ── Content ──────────────────────────────────────────────────────────────────────────────────────────────────────────


async def every_page(site: Site) -> AsyncIterator[Page]:
    """Every page there is, with something on it, and the refusals."""
    admin = await site.signed_in(is_admin=True)
    account = await site.accounts.named("alice")
    links = [await site.knock(device_key(1)), await site.knock(device_key(2), network="192.0.2.9")]
    device = await site.credentials.add_device(
        account, name="finch", authorized_key=device_key(3).public.authorized_key, scopes=frozenset(Scope)
    )
    key, _ = await make_key(site)
    gone, _ = await make_key(site, "gone")
    await site.credentials.revoke_key(account, gone)
    for path in ("/", "/library", "/search?q=x", "/library/smollm2", "/signin", "/signup", "/signup?code=x", "/nowhere"):
        yield await Browser(site).get(path)
    paths = [
        *links,
        *("/settings", "/settings/keys", "/settings/usage", "/settings/usage?days=7", "/admin", "/connect/declined"),
        *(f"/settings/keys/{key}/{verb}" for verb in ("rotate", "revoke")),
        *(f"/settings/devices/{device.id}/{verb}" for verb in ("rename", "revoke")),
        f"/connect/done?device={device.id}",
        *("/admin/accounts/alice/disable", "/connect?name=x&key=y"),
    ]
    for path in paths:
        yield await admin.get(path)
    site.clock.advance(360)
    for path in (links[1], "/settings/keys", f"/settings/keys/{key}/rotate"):
        yield await admin.get(path)


async def test_every_page_is_light_and_holds_no_script_or_style_of_its_own(site: Site) -> None:
    async for page in every_page(site):
        assert len(page.html.encode()) < 60_000
        assert int(page.headers["content-length"]) == len(page.html.encode())
        assert_inert(page)


def assert_inert(page: Page) -> None:
    """Nothing on the page runs but our own script, and nothing comes from elsewhere."""
    own = {file.path for file in static_files().values()}
    for tag, attributes in page.elements:
        assert tag not in ("img", "iframe", "object", "embed", "style", "base", "meta-refresh"), (tag, attributes)
        assert not [name for name in attributes if name.startswith("on") or name == "style"], (tag, attributes)
        assert tag != "script" or attributes["src"] in own
        assert not re.match(r"\s*(javascript|data|vbscript):", attributes.get("href", ""), re.IGNORECASE)
        assert not re.match(r"https?:|//", attributes.get("href", "") + attributes.get("action", "")), attributes
    assert not re.search(r"<script[^>]*>[^<]", page.html)


async def test_every_page_can_be_used_by_keyboard_and_screen_reader(site: Site) -> None:
    async for page in every_page(site):
        ids = [attributes["id"] for _, attributes in page.elements if "id" in attributes]
        assert len(ids) == len(set(ids))
        assert page.find("html", lang="en")
        assert [tag for tag, _ in page.elements].count("h1") == 1
        assert page.find("a", href="#main", **{"class": "skip"})
        assert page.find("main", id="main")
        assert sum("autofocus" in attributes for _, attributes in page.elements) <= 1
        labelled = {found.get("for") for found in page.find("label")}
        for tag, attributes in page.elements:
            for reference in (*attributes.get("aria-describedby", "").split(), *attributes.get("aria-labelledby", "").split()):
                assert reference in ids, reference
            if tag in ("input", "select") and attributes.get("type") not in ("hidden", "checkbox", "radio"):
                assert attributes.get("id") in labelled or "hidden" in attributes, attributes
        assert not [found for found in page.find("a") if found.get("tabindex")]


async def test_every_form_that_posts_carries_the_token_of_its_session(site: Site) -> None:
    async for page in every_page(site):
        for form in page.forms:
            if form.method == "post" and form.action not in VISITOR_FORMS:
                assert form.fields["csrf"][0], form.action


@pytest.mark.parametrize("attack", XSS)
async def test_t81_text_of_others_is_inert_wherever_it_is_shown(site: Site, attack: str) -> None:
    browser = await site.signed_in(is_admin=True)
    account = await site.accounts.named("alice")
    link = await site.knock(device_key(), name=attack.replace("\r\n", " ").encode("ascii", "replace").decode())
    pages = [await browser.get(link)]
    pages.append(await browser.submit(pages[0], "/connect", name=attack))
    made = await browser.submit(await browser.get("/settings/keys"), "/settings/keys", name=attack)
    pages.append(made)
    site.usage.entries.clear()
    await site.audit.append(AuditEvent(at=NOON, actor=attack, action="x", subject=attack, network=attack, note=attack))
    await site.accounts.open_session(account, network=attack, user_agent=attack)
    for path in ("/settings/keys", "/settings", "/settings/usage", "/admin", "/connect/declined"):
        pages.append(await browser.get(path))
    visitor = Browser(site)
    pages.append(await visitor.post("/signin", {"name": attack, "password": attack, "next": attack}))
    pages.append(await visitor.post("/signup", {"name": attack, "email": attack, "password": attack, "code": attack}))
    for page in pages:
        assert_inert(page)
        assert "set-cookie: x" not in str(page.headers).lower()
        assert "49" not in re.findall(r"value=\"([^\"]*)\"", page.html)


@pytest.mark.parametrize("attack", ["<script>alert(1)</script>", '"><img src=x onerror=alert(1)>', "{{ 7*7 }}"])
async def test_t81_search_shows_what_was_sought_as_text(site: Site, attack: str) -> None:
    page = await Browser(site).get(f"/search?q={quote(attack)}")
    assert_inert(page)
    assert page.find("input", name="q")[0]["value"] == attack
