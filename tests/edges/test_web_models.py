"""The front page, listings, search, and the pages of namespaces and models."""

import re
from html import unescape
from urllib.parse import quote

import pytest

from corral.core.catalog import Facts, Kind, LayerFacts
from corral.core.registry import Right
from corral.wire.names import Digest
from corral.wire.repositories import RepositoryName
from fakes_web import Browser, Page, Site


@pytest.fixture
async def site() -> Site:
    site = Site()
    await site.host("smollm2:135m")
    await site.host("gemma3:270m")
    await site.host("alice/tiny:latest", is_public=False)
    return site


@pytest.fixture
async def pushed() -> Site:
    """A hub with accounts alice and bob, where alice has a private and a public model."""
    site = Site()
    await site.add_account("alice")
    await site.add_account("bob")
    await site.push("alice/secret")
    await site.push("alice/tiny", is_public=True)
    return site


def without_number(page: Page) -> tuple[int, dict[str, str], str]:
    """A page, but for the number of its request."""
    number = page.headers["x-request-id"]
    headers = {name: value for name, value in page.headers.items() if name != "x-request-id"}
    return page.status, headers, page.html.replace(number, "")


def links(page: Page, prefix: str = "/") -> list[str]:
    """Where the links of the main part lead, those of the frame aside."""
    frame = {"/", "/library", "/signin", "/signup", "/settings", "/settings/keys", "/settings/usage"}
    found = [link["href"] for link in page.find("a")]
    return [href for href in found if href.startswith(prefix) and href not in frame]


# ── Hosted models ────────────────────────────────────────────────────────────────────────────────────────────────────


async def test_front_page_shows_models_and_commands_that_fit_them(site: Site) -> None:
    page = await Browser(site).get("/")
    assert page.find("a", href="/library/smollm2")
    assert "corral signin --hub http://localhost:11435" in page.text
    assert "corral run gemma3:270m-cloud" in page.text
    assert '"model":"gemma3:270m"' in page.text


async def test_front_page_shows_programs_that_ask_and_print(site: Site) -> None:
    page = await Browser(site).get("/")
    for name in ("python", "openai"):
        (program,) = re.findall(f'<code id="{name}">(.*?)</code>', page.html, flags=re.DOTALL)
        compile(unescape(program), name, "exec")
        assert "gemma3:270m" in program
        assert program.splitlines()[-1].startswith("print(")


async def test_front_page_of_an_empty_hub_says_how_to_fill_it() -> None:
    page = await Browser(Site()).get("/")
    assert "corral hub host NAME" in page.text


async def test_front_page_offers_the_visitor_what_they_may_do() -> None:
    closed, open_ = Site(sign_up_open=False), Site()
    assert not (await Browser(closed).get("/")).find("a", href="/signup")
    assert (await Browser(open_).get("/")).find("a", href="/signup")
    assert (await (await open_.signed_in()).get("/")).find("a", href="/settings/keys")


async def test_t29_private_hosted_model_is_there_for_its_owner_and_for_nobody_else(site: Site) -> None:
    owner, member, visitor = await site.signed_in("alice"), await site.signed_in("bob"), Browser(site)
    assert (await owner.get("/alice/tiny")).status == 200
    for stranger in (member, visitor):
        missing = without_number(await stranger.get("/alice/nothing"))
        assert without_number(await stranger.get("/alice/tiny")) == missing
        for path in ("/", "/library", "/search?q=tiny"):
            assert "/alice/tiny" not in (await stranger.get(path)).html


async def test_page_of_a_hosted_model_shows_facts_and_tags(site: Site) -> None:
    await site.host("alice/tiny:big")
    page = await (await site.signed_in("alice")).get("/alice/tiny")
    assert "llama, 134.52M parameters, Q4_1 · 92 MB · 8k context · completion" in page.text
    assert "latest 3f9a1c000000 134.52M Q4_1 8k 92 MB" in page.text
    assert "big 3f9a1c000000" in page.text
    assert (await Browser(site).get("/Library/SmolLM2")).status == 200
    assert (await Browser(site).get("/library/smollm2:135m")).status == 200
    assert (await Browser(site).get("/library/smollm2:7b")).status == 404


@pytest.mark.parametrize(
    ("query", "found"), [("smol", ["smollm2"]), ("LLAMA", ["gemma3", "smollm2"]), ("llama gemma", ["gemma3"]), ("zebra", [])]
)
async def test_search_finds_hosted_models_that_hold_every_word(site: Site, query: str, found: list[str]) -> None:
    page = await Browser(site).get(f"/search?q={query.replace(' ', '+')}")
    assert links(page, "/library/") == [f"/library/{name}" for name in found]
    assert found or "Nothing matches" in page.text


# ── Listings ─────────────────────────────────────────────────────────────────────────────────────────────────────────


async def test_t29_private_model_is_listed_and_found_for_its_owner_and_for_nobody_else(pushed: Site) -> None:
    owner, member, visitor = await pushed.signed_in("alice"), await pushed.signed_in("bob"), Browser(pushed)
    for path in ("/", "/library", "/alice", "/search?q=secret", "/search?q=llama"):
        assert "/alice/secret" in links(await owner.get(path)), path
        for stranger in (member, visitor):
            page = await stranger.get(path)
            assert "/alice/secret" not in page.html, path


async def test_t29_namespace_without_anything_to_see_is_like_one_without_an_account(pushed: Site) -> None:
    visitor, bob = Browser(pushed), await pushed.signed_in("bob")
    missing = without_number(await visitor.get("/nobody"))
    assert without_number(await visitor.get("/bob")) == missing
    own = await bob.get("/Bob")
    assert (own.status, "You have no model here" in own.text, "corral push bob/MODEL" in own.text) == (200, True, True)


async def test_collaborator_finds_what_they_were_let_into(pushed: Site) -> None:
    repository = await pushed.registry_store.repository("alice", "secret")
    bob = await pushed.account_store.by_name("bob")
    assert repository is not None
    assert bob is not None
    await pushed.registry_store.set_collaborator(repository.id, bob.id, Right.PULL)
    browser = await pushed.signed_in("bob")
    assert "/alice/secret" in links(await browser.get("/library"))
    page = await browser.get("/alice/secret")
    assert (page.status, "Make public" in page.text, "Remove" in page.text) == (200, False, False)


async def test_listing_is_cut_into_pieces_that_hold_everything_once() -> None:
    site = Site()
    await site.add_account("alice")
    for number in range(45):
        site.clock.advance(1)
        await site.push(f"alice/m{number:02}", is_public=True)
    for first in ("/library", "/alice", "/search?q=llama", "/library?order=pulled", "/search?q=m&order=pulled"):
        found, path = [], first
        while path:
            page = await Browser(site).get(path)
            found += links(page, "/alice/m")
            path = next((link["href"] for link in page.find("a", rel="next")), "")
        assert len(found) == len(set(found)) == 45, first
        assert found[0] == "/alice/m44" or "pulled" in first


async def test_listing_by_most_pulled_begins_with_that(pushed: Site) -> None:
    await pushed.push("bob/famous", is_public=True)
    pushed.clock.advance(60)
    await pushed.push("alice/tiny", "new", is_public=True)
    for _ in range(12):
        pushed.catalog.count_pull(RepositoryName("Bob", "Famous"))
    await pushed.catalog.flush()
    visitor = Browser(pushed)
    assert links(await visitor.get("/library"), "/alice")[0] == "/alice/tiny"
    page = await visitor.get("/library?order=pulled")
    assert [href for href in links(page) if "?" not in href] == ["/bob/famous", "/alice/tiny"]
    assert "12 pulls" in page.text
    assert "pulled 12 times" in (await visitor.get("/bob/famous")).text


@pytest.mark.parametrize("after", ["x", "1.", "1.;", "../1"])
async def test_piece_of_no_listing_is_refused(pushed: Site, after: str) -> None:
    assert (await Browser(pushed).get(f"/library?after={quote(after)}")).status == 400


@pytest.mark.parametrize("query", ["%22", "*", "a%22%20OR%20b", "-", "%3Cscript%3E", "%00", "x" * 5000])
async def test_search_takes_any_text(pushed: Site, query: str) -> None:
    page = await Browser(pushed).get(f"/search?q={query}")
    assert page.status == 200
    assert "<script>" not in page.html


async def test_search_without_words_shows_everything(pushed: Site) -> None:
    assert "/alice/tiny" in links(await Browser(pushed).get("/search"))


async def test_hosted_repository_is_listed_once_and_marked() -> None:
    site = Site()
    await site.push("library/smollm2", "135m", is_public=True)
    await site.host("smollm2:135m")
    page = await Browser(site).get("/library")
    assert links(page, "/library/") == ["/library/smollm2"]
    assert "smollm2 hosted" in page.text
    page = await Browser(site).get("/library/smollm2")
    for command in ("corral pull localhost:11435/library/smollm2:135m", "corral run smollm2:135m-cloud"):
        assert command in page.text


async def test_hosted_latest_is_run_by_the_name_that_hosting_it_prints(pushed: Site) -> None:
    await pushed.host("alice/tiny:latest")
    for path in ("/", "/alice/tiny"):
        assert "corral run alice/tiny:cloud" in (await Browser(pushed).get(path)).text


# ── The page of a model ──────────────────────────────────────────────────────────────────────────────────────────────


async def test_model_page_tells_what_is_known(pushed: Site) -> None:
    layers = (LayerFacts("model", Digest("a" * 64), 91_000_000),)
    texts = {"template": "{{ .Prompt }}", "system": "Be kind.", "license": "Apache", "parameters": (("stop", "</s>"),)}
    await pushed.push("alice/full", is_public=True, layers=layers, layer_count=70, **texts)
    page = await Browser(pushed).get("/alice/full")
    for words in (
        "llama, 134.52M parameters, Q4_1 · 92 MB · 8k context · completion",
        "corral pull localhost:11435/alice/full Copy",
        "ollama pull --insecure localhost:11435/alice/full Copy",
        "Context 8,192 tokens",
        "Template {{ .Prompt }}",
        "System Be kind.",
        "Licence Apache",
        "stop </s>",
        "Layers (70)",
        "The first 1 of 70.",
    ):
        assert words in page.text
    assert not page.find("img")
    assert len(page.html.encode()) < 60_000


async def test_model_page_over_tls_needs_no_insecure_flag() -> None:
    site = Site(public_url="https://hub.example")
    await site.add_account("alice")
    await site.push("alice/tiny", "v1", is_public=True)
    page = await Browser(site).get("/alice/tiny")
    assert "ollama pull hub.example/alice/tiny:v1" in page.text


async def test_t29_model_page_of_a_private_one_is_that_of_a_missing_one(pushed: Site) -> None:
    owner, member, visitor = await pushed.signed_in("alice"), await pushed.signed_in("bob"), Browser(pushed)
    for path in ("/alice/secret", "/alice/secret:latest", "/ALICE/Secret", "/alice/secret?after=x", "/alice/secret:none"):
        for stranger in (member, visitor):
            missing = without_number(await stranger.get("/alice/nothing"))
            assert without_number(await stranger.get(path)) == missing
    assert (await owner.get("/Alice/SECRET")).status == 200
    assert "corral signin --hub" in (await owner.get("/alice/secret")).text


#: Whatever a page route may be asked for about a repository.
ASKED = ("", "?q=secret", "?after=x&order=pulls&name=latest&done=deleted")


def every_get(site: Site, model: str) -> list[str]:
    """The address of every page that can be read, asked for a model of alice in every way."""
    paths = [row.path for row in site.rows if "GET" in row.methods and not row.path.startswith("/static/")]
    named = [
        path.replace("{namespace:namespace}", "alice").replace("{namespace}", "alice").replace("{model:path}", model)
        for path in paths
    ]
    filled = [re.sub(r"\{[a-z_]+\}", "x", path.replace("{name:path}", model)) for path in named]
    tagged = [f"/alice/{model}:latest", f"/ALICE/{model.upper()}"]
    return [path + query for path in (*filled, *tagged) for query in ASKED]


async def readable(site: Site, browser: Browser, model: str = "secret") -> dict[str, object]:
    return {path: without_number(await browser.get(path)) for path in every_get(site, model)}


@pytest.mark.parametrize("who", ["a visitor", "a member", "an administrator"])
async def test_t29_no_page_changes_for_anybody_else_when_a_private_model_comes(site: Site, who: str) -> None:
    await site.add_account("alice")
    await site.push("alice/tiny", is_public=True)
    browser = Browser(site) if who == "a visitor" else await site.signed_in("bob", is_admin=who == "an administrator")
    before = await readable(site, browser)
    await site.push("alice/secret")
    repository = await site.registry_store.repository("alice", "secret")
    assert repository is not None
    await site.registry_store.change_repository(repository.id, readme="# a secret readme")
    await site.host("alice/secret:latest", is_public=False)
    after = await readable(site, browser)
    # Administrators are told how much each account stores.
    told = {path for path in before if before[path] != after[path]}
    assert told == ({f"/admin{query}" for query in ASKED} if who == "an administrator" else set())
    assert "a secret readme" in (await (await site.signed_in("alice")).get("/alice/secret")).text


@pytest.mark.parametrize("is_admin", [False, True])
async def test_t29_no_form_tells_a_private_model_of_another_from_a_missing_one(pushed: Site, is_admin: bool) -> None:
    browser = await pushed.signed_in("carol", is_admin=is_admin)
    csrf = (await browser.get("/settings")).form("/signout").fields["csrf"]
    fields = {"csrf": csrf, "account": "carol", "right": "pull", "confirm": "alice/secret", "readme": "x"}
    before = pushed.writes
    for row in pushed.rows:
        if "POST" not in row.methods or "{name:path}" not in row.path:
            continue
        path = row.path.replace("{namespace}", "alice")
        private = await browser.post(path.replace("{name:path}", "secret") + "?name=latest", fields)
        missing = await browser.post(path.replace("{name:path}", "absent") + "?name=latest", fields)
        assert (private.status, without_number(private)) == (404, without_number(missing))
    assert pushed.writes == before


async def test_robots_are_told_nothing_of_what_is_private_and_kept_off_what_is_not_for_them(pushed: Site) -> None:
    page = await Browser(pushed).get("/robots.txt")
    assert page.html.startswith("User-agent: *\nDisallow: /search$\n")
    assert "alice" not in page.html


async def test_t119_model_page_of_a_disabled_account_is_gone(pushed: Site) -> None:
    await pushed.accounts.set_disabled("alice", True, actor="x")
    visitor = Browser(pushed)
    assert without_number(await visitor.get("/alice/tiny")) == without_number(await visitor.get("/alice/nothing"))
    assert "/alice/tiny" not in (await visitor.get("/library")).html


async def test_model_page_shows_the_tag_that_was_asked_for(pushed: Site) -> None:
    large = Facts(kind=Kind.MODEL, size_bytes=7_000_000_000, parameter_size="7B", quantization="Q8_0")
    await pushed.push("alice/tiny", "7b", is_public=True, facts=large)
    visitor = Browser(pushed)
    assert "Inside latest" in (await visitor.get("/alice/tiny")).text
    page = await visitor.get("/alice/tiny:7b")
    assert "Inside 7b" in page.text
    assert "7B parameters, Q8_0 · 7 GB" in page.text
    assert "corral pull localhost:11435/alice/tiny:7b" in page.text
    assert (await visitor.get("/alice/tiny:7B")).status == 200
    assert (await visitor.get("/alice/tiny:none")).status == 404
    assert (await visitor.get("/alice/tiny:")).status == 200


async def test_model_page_with_many_tags_shows_them_in_pieces(pushed: Site) -> None:
    for number in range(130):
        await pushed.push("alice/tiny", f"v{number:03}", is_public=True)
    visitor = Browser(pushed)
    page = await visitor.get("/alice/tiny")
    more = page.find("a", rel="next")[0]["href"]
    found = {link["href"] for shown in (page, await visitor.get(more)) for link in shown.find("a") if ":v" in link["href"]}
    assert len(found) == 130


async def test_model_page_of_what_waits_says_so(pushed: Site) -> None:
    await pushed.push("alice/new", is_public=True, facts=None)
    page = await Browser(pushed).get("/alice/new")
    assert "is being read" in page.text
    assert "corral pull localhost:11435/alice/new" in page.text


async def test_t105_model_page_of_what_cannot_be_read_says_why(pushed: Site) -> None:
    await pushed.push(
        "alice/bad", is_public=True, facts=Facts(kind=Kind.UNREADABLE), note="not a usable GGUF file: it is cut short"
    )
    page = await Browser(pushed).get("/alice/bad")
    assert "This model cannot be described Not a usable GGUF file: it is cut short." in page.text
    assert "corral pull localhost:11435/alice/bad" in page.text


async def test_page_of_what_is_no_model_names_a_tool_that_pulls_it(pushed: Site) -> None:
    await pushed.push("alice/image", "v1", is_public=True, facts=Facts(kind=Kind.ARTIFACT, size_bytes=5_000_000))
    page = await Browser(pushed).get("/alice/image")
    assert "oras pull --plain-http localhost:11435/alice/image:v1" in page.text
    assert "not a model · 5 MB" in page.text


async def test_model_that_nests_has_a_page_and_no_command_that_cannot_work(pushed: Site) -> None:
    await pushed.push("alice/a/b", is_public=True)
    page = await Browser(pushed).get("/alice/a/b")
    assert "corral pull localhost:11435/alice/a/b" in page.text
    assert "ollama pull" not in page.text


async def test_repository_without_a_tag_says_how_that_comes(pushed: Site) -> None:
    await pushed.registry_store.remove_tag((await pushed.registry_store.repositories_of("alice"))[0].id, "latest")
    alice = await pushed.signed_in("alice")
    page = await alice.get("/alice/secret")
    assert "There is no tag yet" in page.text
    assert "corral pull" not in page.text
    for listing in ("/", "/alice"):
        assert "No tag yet" in (await alice.get(listing)).text


async def test_readme_is_shown_as_text_with_structure(pushed: Site) -> None:
    repository = await pushed.registry_store.repository("alice", "tiny")
    assert repository is not None
    await pushed.registry_store.change_repository(repository.id, readme="# Tiny\n\nA **small** one. [Paper](https://example.org)")
    page = await Browser(pushed).get("/alice/tiny")
    assert "<h3>Tiny</h3>" in page.html
    assert page.find("a", href="https://example.org", rel="noopener nofollow")


# ── Paths ────────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("path", ["/api/nothing", "/v1/nothing", "/v2/nothing", "/api/a/b/c"])
async def test_unknown_path_of_an_interface_is_not_answered_by_a_page(site: Site, path: str) -> None:
    for method in ("GET", "POST"):
        answer = await Browser(site).get(path, method=method)
        assert (answer.status, answer.headers["content-type"]) == (404, "application/json; charset=utf-8")


_NOWHERE = ("/static/x", "/admin/x", "/settings/x", "/connect/x", "/nobody/nothing", "/nothing", "/favicon.ico", "/a/b/c/d")


@pytest.mark.parametrize("path", [*_NOWHERE, "/-/x", "/a/-b", "/a/b:", "/settings/models/a/b/x"])
async def test_unknown_page_is_a_page_that_says_so(site: Site, path: str) -> None:
    answer = await Browser(site).get(path)
    assert (answer.status, "There is nothing here" in answer.text) == (404, True)
