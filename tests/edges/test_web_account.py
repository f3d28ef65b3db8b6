"""Signing up, in and out."""

from urllib.parse import quote

import pytest

from fakes_web import PASSWORD, Browser, Page, Site

#: What must never become the place a browser is sent on to (T42, T80).
REDIRECTS = (
    "//evil.example",
    "///evil.example",
    "/\\evil.example",
    "\\\\evil.example",
    "https:evil.example",
    "https://evil.example/",
    "http:///evil.example",
    "javascript:alert(1)",
    "/%0d%0aSet-Cookie:%20x=1",
    "/\r\nSet-Cookie: x=1",
    "/\t/evil.example",
    " /evil",
    "evil.example",
    "/..//evil.example",
    "/x//evil.example",
    "/@evil.example\x00",
    "",
    "/" + "a" * 5000,
)


@pytest.fixture
def site() -> Site:
    return Site()


async def signed_up(browser: Browser, **changes: str) -> Page:
    page = await browser.get("/signup")
    return await browser.submit(page, "/signup", follow=False, **{"name": "bob", "password": PASSWORD, **changes})


# ── The first account ────────────────────────────────────────────────────────────────────────────────────────────────


async def test_t85_setup_link_makes_the_administrator_once(site: Site) -> None:
    code = await site.accounts.new_setup_code()
    browser = Browser(site)
    page = await browser.get(f"/signup?code={code}")
    assert "Create the admin account" in page.text
    answer = await browser.submit(page, "/signup", follow=False, name="alice", password=PASSWORD)
    assert (answer.status, answer.headers["location"]) == (303, "/")
    assert (await site.accounts.named("alice")).is_admin
    again = await Browser(site, network="192.0.2.1").get(f"/signup?code={code}")
    assert "Create an account" in again.text
    assert "admin" not in again.text


async def test_t85_setup_code_is_guessed_by_its_page_only_so_often(site: Site) -> None:
    code = await site.accounts.new_setup_code()
    stranger = Browser(site, network="192.0.2.9")
    answers = [(await stranger.get(f"/signup?code=0000-{number:04}")).status for number in range(31)]
    assert (answers[-2], answers[-1]) == (410, 429)
    assert "Create the admin account" in (await Browser(site).get(f"/signup?code={code}")).text


async def test_setup_code_survives_a_mistake_in_the_form(site: Site) -> None:
    code = await site.accounts.new_setup_code()
    browser = Browser(site)
    page = await browser.submit(await browser.get(f"/signup?code={code}"), "/signup", name="alice", password="short")
    assert page.status == 422
    assert page.form("/signup").fields["name"] == ["alice"]
    assert (await browser.submit(page, "/signup", follow=False, password=PASSWORD)).status == 303


async def test_expired_setup_link_says_how_to_get_a_new_one() -> None:
    site = Site(sign_up_open=False)
    code = await site.accounts.new_setup_code()
    site.clock.advance(1801)
    page = await Browser(site).get(f"/signup?code={code}")
    assert page.status == 410
    assert "corral up" in page.text
    assert not [form for form in page.forms if form.action == "/signup"]


async def test_setup_code_that_expires_under_the_form_answers_gone(site: Site) -> None:
    code = await site.accounts.new_setup_code()
    browser = Browser(site)
    page = await browser.get(f"/signup?code={code}")
    site.clock.advance(1801)
    assert (await browser.submit(page, "/signup", name="alice", password=PASSWORD)).status == 410


# ── Later accounts ───────────────────────────────────────────────────────────────────────────────────────────────────


async def test_open_sign_up_makes_an_ordinary_account_and_signs_in(site: Site) -> None:
    await site.add_account(is_admin=True)
    browser = Browser(site)
    page = await browser.submit(await browser.get("/signup"), "/signup", name="bob", password=PASSWORD)
    assert not (await site.accounts.named("bob")).is_admin
    assert page.find("form", action="/signout")


async def test_closed_sign_up_is_a_plain_sentence_and_refuses_the_form() -> None:
    site = Site(sign_up_open=False)
    await site.add_account(is_admin=True)
    browser = Browser(site)
    assert "Sign-up is closed" in (await browser.get("/signup")).text
    answer = await browser.post("/signup", {"name": "bob", "password": PASSWORD})
    assert answer.status == 403
    assert await site.account_store.by_name("bob") is None


async def test_t82_fields_that_the_form_does_not_have_are_ignored(site: Site) -> None:
    await site.add_account(is_admin=True)
    await signed_up(Browser(site), is_admin="1", role="admin", plan="pro", id="a0", disabled_at="", created_at="0")
    bob = await site.accounts.named("bob")
    assert (bob.is_admin, bob.id == "a0", bob.is_active) == (False, False, True)


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"name": "settings"}, "name"),
        ({"name": "<b>"}, "name"),
        ({"name": "alice"}, "name"),
        ({"email": "nobody"}, "email"),
        ({"password": "fourteen chars"}, "password"),
        ({"password": "x" * 2000}, "password"),
    ],
)
async def test_mistake_is_shown_at_its_field_which_gets_the_focus(site: Site, changes: dict[str, str], field: str) -> None:
    await site.add_account()
    browser = Browser(site)
    fields = {"name": "bob", "email": "bob@example.org", "password": PASSWORD, **changes}
    page = await browser.submit(await browser.get("/signup"), "/signup", **fields)
    (wrong,) = [found for found in page.find("input") if "aria-invalid" in found]
    assert (page.status in (409, 422), wrong["name"], "autofocus" in wrong) == (True, field, True)
    assert f"e-{field}" in wrong["aria-describedby"].split()
    assert fields["password"] not in page.html


async def test_t73_password_of_spaces_and_emoji_is_accepted_whole(site: Site) -> None:
    await site.add_account()
    password = "🦙 " * 10 + "über den Zaun, und noch viel weiter als das"
    answer = await signed_up(Browser(site), password=password)
    assert answer.status == 303
    assert (await site.accounts.sign_in("bob", password, network="127.0.0.1")).name == "bob"


# ── Signing in ───────────────────────────────────────────────────────────────────────────────────────────────────────


async def test_signing_in_leads_back_to_where_the_visitor_was_going(site: Site) -> None:
    await site.add_account()
    browser = Browser(site)
    start = await browser.get("/settings/usage?days=7")
    page = await browser.get(start.headers["location"])
    answer = await browser.submit(page, "/signin", follow=False, name="alice", password=PASSWORD)
    assert (answer.status, answer.headers["location"]) == (303, "/settings/usage?days=7")


@pytest.mark.parametrize("target", REDIRECTS)
async def test_t80_signing_in_never_leads_to_another_place(site: Site, target: str) -> None:
    await site.add_account()
    browser = Browser(site)
    page = await browser.get(f"/signin?next={quote(target, safe='')}")
    answer = await browser.submit(page, "/signin", follow=False, name="alice", password=PASSWORD, next=target)
    assert answer.headers["location"] == "/"
    assert (await browser.get(f"/signin?next={quote(target, safe='')}")).headers["location"] == "/"


async def test_t69_unknown_name_wrong_password_and_disabled_account_look_the_same(site: Site) -> None:
    for name in ("alice", "carol"):
        await site.add_account(name)
    await site.accounts.set_disabled("carol", True)
    seen = set()
    for name, password in (("alice", "wrong " * 5), ("nobody", PASSWORD), ("carol", PASSWORD)):
        page = await Browser(site).post("/signin", {"name": name, "password": password})
        own = ("x-request-id", "content-length")  # the length differs by that of the name, which the form gives back
        headers = tuple(sorted((key, value) for key, value in page.headers.items() if key not in own))
        seen.add((page.status, headers, page.html.replace(f'value="{name}"', 'value=""')))
    assert len(seen) == 1
    assert seen.pop()[0] == 401


async def test_wrong_password_keeps_the_name_and_moves_the_focus_to_the_password(site: Site) -> None:
    page = await Browser(site).post("/signin", {"name": "alice", "password": "wrong"})
    assert page.form("/signin").fields["name"] == ["alice"]
    (focused,) = [found for found in page.find("input") if "autofocus" in found]
    assert focused["name"] == "password"


async def test_too_many_tries_say_when_to_try_again(site: Site) -> None:
    browser = Browser(site)
    for _ in range(10):
        await browser.post("/signin", {"name": "alice", "password": "wrong"})
    page = await browser.post("/signin", {"name": "alice", "password": "wrong"})
    assert page.status == 429
    assert "Too many tries. Wait 300 seconds" in page.text


async def test_t74_signing_in_anew_ends_the_session_before(site: Site) -> None:
    browser = await site.signed_in()
    old = dict(browser.cookies)
    await browser.post("/signin", {"name": "alice", "password": PASSWORD})
    assert browser.cookies != old
    assert (await Browser(site, cookies=old).get("/settings")).status == 303


async def test_signing_out_ends_the_session_on_the_hub_and_in_the_browser(site: Site) -> None:
    browser = await site.signed_in()
    old = dict(browser.cookies)
    browser.network = "192.0.2.9"
    answer = await browser.submit(await browser.get("/settings"), "/signout", follow=False)
    assert (answer.status, answer.headers["location"], browser.cookies) == (303, "/", {})
    assert (site.audit.events[-1].action, site.audit.events[-1].network) == ("session.close", "192.0.2.9")
    assert (await Browser(site, cookies=old).get("/settings")).status == 303


async def test_stale_cookie_does_not_keep_a_visitor_from_signing_in(site: Site) -> None:
    await site.add_account()
    browser = Browser(site, cookies={"corral-11435": "x" * 43})
    page = await browser.get("/signin")
    assert (await browser.submit(page, "/signin", follow=False, name="alice", password=PASSWORD)).status == 303


# ── The cookie ───────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("public_url", "name", "is_secure"),
    [("http://localhost:11435", "corral-11435", False), ("https://hub.example.org", "__Host-corral", True)],
)
async def test_cookie_is_for_this_hub_alone_and_out_of_reach_of_scripts(public_url: str, name: str, is_secure: bool) -> None:
    site = Site(public_url=public_url)
    await site.add_account()
    answer = await Browser(site).post("/signin", {"name": "alice", "password": PASSWORD})
    value, *attributes = [part.strip() for part in answer.headers["set-cookie"].split(";")]
    assert value.startswith(f"{name}=")
    assert {"HttpOnly", "SameSite=Lax", "Path=/"} <= set(attributes)
    assert ("Secure" in attributes) is is_secure
    assert not [part for part in attributes if part.startswith("Domain")]
    assert "Max-Age=2592000" in attributes


async def test_administrators_cookie_lives_for_hours_only(site: Site) -> None:
    await site.add_account(is_admin=True)
    answer = await Browser(site).post("/signin", {"name": "alice", "password": PASSWORD})
    assert "Max-Age=43200" in answer.headers["set-cookie"]


# ── Before the first account ─────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("is_open", [True, False])
async def test_hub_without_an_account_says_where_the_first_one_comes_from(is_open: bool) -> None:
    site = Site(sign_up_open=is_open)
    visitor = Browser(site)
    for path in ("/", "/signin", "/signup"):
        assert "The link works once, for 30 minutes" in (await visitor.get(path)).text
    assert (await visitor.get("/signup?code=0000-0000")).status == 410
    await site.add_account()
    for path in ("/", "/signin", "/signup"):
        assert "no account yet" not in (await visitor.get(path)).text
