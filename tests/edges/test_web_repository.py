"""What an owner changes about a repository, and that nobody else finds these pages."""

import pytest

from corral.core.registry import Right, Visibility
from corral.edges.forms import MEMBER
from fakes_web import PASSWORD, Browser, Page, Site

BASE = "/settings/models/alice/tiny"
GETS = ("access", "publish", "hide", "readme", "tag?name=latest", "delete")
POSTS = ("publish", "hide", "collaborator", "readme", "tag?name=latest", "delete")


@pytest.fixture
async def site() -> Site:
    """alice has a private and a public model; bob is there."""
    site = Site()
    await site.add_account("alice")
    await site.add_account("bob")
    await site.push("alice/tiny")
    await site.push("alice/open", is_public=True)
    return site


@pytest.fixture
async def alice(site: Site) -> Browser:
    return await site.signed_in("alice")


async def visibility(site: Site, name: str = "tiny") -> Visibility:
    found = await site.registry_store.repository("alice", name)
    assert found is not None
    return found.visibility


async def events(site: Site) -> list[tuple[str, str]]:
    return [(event.action, event.note) for event in await site.audit.recent() if event.action.startswith("repository.")]


def without_number(page: Page) -> tuple[int, str]:
    return page.status, page.html.replace(page.headers["x-request-id"], "")


# ── Nobody else (T29, T79, T83) ──────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("path", GETS)
@pytest.mark.parametrize("name", ["tiny", "open"])
async def test_t29_pages_of_somebody_elses_repository_are_those_of_a_missing_one(site: Site, path: str, name: str) -> None:
    bob = await site.signed_in("bob")
    missing = await bob.get(f"/settings/models/alice/nothing/{path}")
    page = await bob.get(f"/settings/models/alice/{name}/{path}")
    assert without_number(page) == without_number(missing)
    assert page.status == 404


@pytest.mark.parametrize("path", POSTS)
@pytest.mark.parametrize("name", ["tiny", "open"])
async def test_t29_forms_of_somebody_elses_repository_do_nothing_and_tell_nothing(site: Site, path: str, name: str) -> None:
    bob = await site.signed_in("bob")
    token = (await bob.get("/settings")).form("/signout").fields["csrf"][0]
    fields = {"csrf": token, "account": "bob", "right": "push", "confirm": f"alice/{name}", "readme": "mine"}
    before = await visibility(site, name), dict(site.writes)
    missing = await bob.post(f"/settings/models/alice/nothing/{path}", fields)
    page = await bob.post(f"/settings/models/alice/{name}/{path}", fields)
    assert without_number(page) == without_number(missing)
    assert (await visibility(site, name), dict(site.writes)) == before
    assert await events(site) == []


@pytest.mark.parametrize("path", [*GETS, *POSTS])
async def test_visitor_is_sent_to_sign_in_whatever_is_there(site: Site, path: str) -> None:
    for name in ("tiny", "nothing"):
        page = await Browser(site).get(f"/settings/models/alice/{name}/{path}", method="GET" if path in GETS else "POST")
        assert page.status in (303, 401)


@pytest.mark.parametrize("path", POSTS)
@pytest.mark.parametrize("origin", [{}, {"sec-fetch-site": "cross-site"}, {"sec-fetch-site": "same-site"}, {"origin": "null"}])
async def test_t79_form_of_another_site_is_refused(site: Site, alice: Browser, path: str, origin: dict[str, str]) -> None:
    token = (await alice.get(f"{BASE}/access")).form("/signout").fields["csrf"][0]
    fields = {"csrf": token, "account": "bob", "right": "push", "confirm": "alice/tiny", "readme": "mine"}
    page = await alice.post(f"{BASE}/{path}", fields, headers=origin)
    assert page.status == 403
    assert await events(site) == []


@pytest.mark.parametrize("path", POSTS)
async def test_form_without_the_sessions_token_is_refused(site: Site, alice: Browser, path: str) -> None:
    fields = {"csrf": "x", "account": "bob", "right": "push", "confirm": "alice/tiny", "readme": "mine"}
    assert (await alice.post(f"{BASE}/{path}", fields)).status == 403
    assert await events(site) == []


def test_t83_every_form_declares_who_may_send_it(site: Site) -> None:
    rows = [row for row in site.rows if row.path.startswith("/settings/models/")]
    assert {row.access for row in rows} == {MEMBER}
    assert {row.path.rpartition("/")[2] for row in rows if "POST" in row.methods} == {path.partition("?")[0] for path in POSTS}
    assert all(row.methods in ({"POST"}, {"GET", "HEAD"}) for row in rows)


# ── Visibility ───────────────────────────────────────────────────────────────────────────────────────────────────────


async def test_owner_makes_it_public_and_private_again(site: Site, alice: Browser) -> None:
    page = await alice.get("/alice/tiny")
    assert page.find("a", href=f"{BASE}/publish")
    asked = await alice.get(f"{BASE}/publish")
    assert "without an account" in asked.text
    done = await alice.submit(asked, f"{BASE}/publish")
    assert (done.status, "It is public." in done.text) == (200, True)
    assert await visibility(site) is Visibility.PUBLIC
    assert (await Browser(site).get("/alice/tiny")).status == 200
    done = await alice.submit(await alice.get(f"{BASE}/hide"), f"{BASE}/hide")
    assert "It is private." in done.text
    assert (await Browser(site).get("/alice/tiny")).status == 404
    notes = ["alice/tiny: public", "alice/tiny: private"]
    assert sorted(await events(site)) == sorted(("repository.visibility", note) for note in notes)


async def test_t46_making_public_asks_for_the_password_after_five_minutes(site: Site, alice: Browser) -> None:
    site.clock.advance(301)
    asked = await alice.get(f"{BASE}/publish")
    assert asked.find("input", name="password")
    for password in ("", "wrong password, quite long"):
        refused = await alice.submit(asked, f"{BASE}/publish", password=password)
        assert refused.status == 403
        assert await visibility(site) is Visibility.PRIVATE
    await alice.submit(asked, f"{BASE}/publish", password=PASSWORD)
    assert await visibility(site) is Visibility.PUBLIC
    site.clock.advance(301)
    asked = await alice.get(f"{BASE}/hide")
    assert not asked.find("input", name="password")
    await alice.submit(asked, f"{BASE}/hide")
    assert await visibility(site) is Visibility.PRIVATE


# ── People ───────────────────────────────────────────────────────────────────────────────────────────────────────────


async def test_owner_lets_somebody_in_and_out_again(site: Site, alice: Browser) -> None:
    page = await alice.get(f"{BASE}/access")
    assert "Nobody but you." in page.text
    page = await alice.submit(page, f"{BASE}/collaborator", account=" Bob ", right="push")
    assert "bob pull and push" in page.text
    bob = await site.signed_in("bob")
    assert (await bob.get("/alice/tiny")).status == 200
    assert (await bob.get(f"{BASE}/access")).status == 404
    page = await alice.submit(page, f"{BASE}/collaborator")  # the first form of the page is the row's
    assert "Nobody but you." in page.text
    assert (await bob.get("/alice/tiny")).status == 404
    assert [action for action, _ in await events(site)] == ["repository.collaborator"] * 2


@pytest.mark.parametrize(
    ("account", "words"), [("nobody", "no account named nobody"), ("alice", "owns"), ("", "no account named")]
)
async def test_somebody_who_cannot_be_let_in_is_told_at_the_field(site: Site, alice: Browser, account: str, words: str) -> None:
    page = await alice.submit(await alice.get(f"{BASE}/access"), f"{BASE}/collaborator", account=account, right="pull")
    assert (page.status, words in page.text) == (422, True)
    assert page.find("input", name="account", value=account)[0]["aria-invalid"] == "true"
    assert await events(site) == []


@pytest.mark.parametrize("right", ["delete", "admin", "pull,push"])
async def test_t38_right_that_is_not_to_be_given_is_refused(site: Site, alice: Browser, right: str) -> None:
    page = await alice.submit(await alice.get(f"{BASE}/access"), f"{BASE}/collaborator", account="bob", right=right)
    assert page.status == 400


async def test_t46_letting_in_asks_for_the_password_after_five_minutes_and_letting_out_does_not(
    site: Site, alice: Browser
) -> None:
    await alice.submit(await alice.get(f"{BASE}/access"), f"{BASE}/collaborator", account="bob", right="pull")
    site.clock.advance(301)
    await site.add_account("carol")
    page = await alice.get(f"{BASE}/access")
    token = page.form("/signout").fields["csrf"][0]
    fields = {"csrf": token, "account": "carol", "right": "push"}
    refused = await alice.post(f"{BASE}/collaborator", fields)
    assert refused.status == 403
    assert refused.find("input", name="account", value="carol")
    assert (await alice.post(f"{BASE}/collaborator", {**fields, "password": PASSWORD})).status == 303
    site.clock.advance(301)
    page = await alice.submit(await alice.get(f"{BASE}/access"), f"{BASE}/collaborator")
    assert "They may not do that any more." in page.text


# ── README ───────────────────────────────────────────────────────────────────────────────────────────────────────────


async def test_owner_writes_a_readme_and_changes_it(site: Site, alice: Browser) -> None:
    page = await alice.get("/alice/tiny")
    assert page.find("a", href=f"{BASE}/readme")
    page = await alice.submit(await alice.get(f"{BASE}/readme"), f"{BASE}/readme", readme="# Tiny\r\n\r\nA **toy** & more")
    assert "<strong>toy</strong> &amp; more" in page.html
    found = await site.registry_store.repository("alice", "tiny")
    assert found is not None
    assert await site.registry_store.readme(found.id) == "# Tiny\n\nA **toy** & more"
    editor = await alice.get(f"{BASE}/readme")
    assert "# Tiny\n\nA **toy** &amp; more</textarea>" in editor.html


async def test_collaborator_who_may_push_writes_the_readme_and_one_who_may_pull_does_not(site: Site) -> None:
    repository, bob = await site.registry_store.repository("alice", "tiny"), await site.account_store.by_name("bob")
    assert repository is not None
    assert bob is not None
    browser = await site.signed_in("bob")
    await site.registry_store.set_collaborator(repository.id, bob.id, Right.PULL)
    assert (await browser.get(f"{BASE}/readme")).status == 404
    await site.registry_store.set_collaborator(repository.id, bob.id, Right.PUSH)
    assert (await browser.submit(await browser.get(f"{BASE}/readme"), f"{BASE}/readme", readme="Hello")).status == 200
    assert "Hello" in (await browser.get("/alice/tiny")).text


async def test_readme_that_is_too_long_is_kept_in_the_form(site: Site, alice: Browser) -> None:
    text = "\N{SNOWMAN}" * 88_000
    page = await alice.submit(await alice.get(f"{BASE}/readme"), f"{BASE}/readme", readme=text)
    assert (page.status, "at most 256 KiB" in page.text, text in page.html) == (422, True, True)
    assert page.find("textarea")[0]["aria-invalid"] == "true"


# ── Deleting ─────────────────────────────────────────────────────────────────────────────────────────────────────────


async def test_owner_removes_a_tag(site: Site, alice: Browser) -> None:
    await site.push("alice/tiny", "old")
    page = await alice.get("/alice/tiny")
    assert page.find("a", href=f"{BASE}/tag?name=old")
    page = await alice.submit(await alice.get(f"{BASE}/tag?name=old"), f"{BASE}/tag")
    assert "The tag is gone." in page.text
    assert not page.find("a", href=f"{BASE}/tag?name=old")
    assert page.find("a", href=f"{BASE}/tag?name=latest")


@pytest.mark.parametrize("query", ["", "?name=", "?name=none", "?name=../x", "?name=sha256:" + "0" * 64])
async def test_tag_that_is_not_there_cannot_be_removed(site: Site, alice: Browser, query: str) -> None:
    assert (await alice.get(f"{BASE}/tag{query}")).status == 404


async def test_owner_deletes_it_by_typing_its_name(site: Site, alice: Browser) -> None:
    asked = await alice.get(f"{BASE}/delete")
    for typed in ("", "tiny", "alice/tin", "alice/tiny2"):
        page = await alice.submit(asked, f"{BASE}/delete", confirm=typed)
        assert (page.status, "Type alice/tiny to delete it" in page.text) == (422, True)
    page = await alice.submit(asked, f"{BASE}/delete", confirm=" Alice/Tiny ")
    assert page.status == 200
    assert (await alice.get("/alice/tiny")).status == 404
    assert await site.registry_store.repository("alice", "tiny") is None
    assert await events(site) == [("repository.remove", "alice/tiny")]


@pytest.mark.parametrize(("path", "fields"), [("tag?name=latest", {}), ("delete", {"confirm": "alice/tiny"})])
async def test_t46_deleting_asks_for_the_password_after_five_minutes(
    site: Site, alice: Browser, path: str, fields: dict[str, str]
) -> None:
    site.clock.advance(301)
    asked = await alice.get(f"{BASE}/{path}")
    action = f"{BASE}/{path.partition('?')[0]}"
    assert (await alice.submit(asked, action, **fields)).status == 403
    assert (await alice.get("/alice/tiny")).find("a", href="/alice/tiny:latest")
    assert (await alice.submit(asked, action, password=PASSWORD, **fields)).status == 200
    assert not (await alice.get("/alice/tiny")).find("a", href="/alice/tiny:latest")


async def test_administrator_owns_the_library_and_nothing_of_others(site: Site) -> None:
    boss = await site.signed_in("boss", is_admin=True)
    await site.push("library/llama")
    assert (await boss.get("/settings/models/library/llama/access")).status == 200
    assert (await boss.get(f"{BASE}/access")).status == 404


@pytest.mark.parametrize("name", ["tiny/tag", "tags/delete", "a/access/b"])
async def test_repository_named_like_an_action_is_its_own(site: Site, alice: Browser, name: str) -> None:
    await site.push(f"alice/{name}")
    base = f"/settings/models/alice/{name}"
    page = await alice.get(f"{base}/delete")
    assert f"Delete alice/{name}?" in page.text
    assert f"Type alice/{name} to delete it" in (await alice.submit(page, f"{base}/delete", confirm="alice/tiny")).text
    assert await site.registry_store.repository("alice", "tiny") is not None


async def test_page_after_deleting_says_that_it_is_done(site: Site) -> None:
    owner, admin = await site.signed_in("alice"), await site.signed_in("boss", is_admin=True)
    for browser, path in ((owner, "alice/tiny"), (admin, "library/tiny")):
        await site.push(path)
        where = f"/settings/models/{path}/delete"
        page = await browser.submit(await browser.get(where), where, confirm=path)
        assert (page.status, "The model is deleted." in page.text) == (200, True)
