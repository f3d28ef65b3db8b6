"""The front page, the library, search and model pages."""

import pytest

from fakes_web import Browser, Page, Site


@pytest.fixture
async def site() -> Site:
    site = Site()
    await site.host("smollm2:135m")
    await site.host("gemma3:270m")
    await site.host("alice/tiny:latest", is_public=False)
    return site


def without_number(page: Page) -> tuple[int, str]:
    """An error page, but for the number of its request."""
    return page.status, page.html.replace(page.headers["x-request-id"], "")


async def test_front_page_shows_models_and_commands_that_fit_them(site: Site) -> None:
    page = await Browser(site).get("/")
    assert page.find("a", href="/library/smollm2")
    assert "corral signin --hub http://localhost:11435" in page.text
    assert "corral run gemma3:270m-cloud" in page.text
    assert '"model":"gemma3:270m"' in page.text


async def test_front_page_of_an_empty_hub_says_how_to_fill_it() -> None:
    page = await Browser(Site()).get("/")
    assert "corral hub host NAME" in page.text


async def test_front_page_offers_the_visitor_what_they_may_do() -> None:
    closed, open_ = Site(sign_up_open=False), Site()
    assert not (await Browser(closed).get("/")).find("a", href="/signup")
    assert (await Browser(open_).get("/")).find("a", href="/signup")
    assert (await (await open_.signed_in()).get("/")).find("a", href="/settings/keys")


async def test_t29_private_model_is_there_for_its_owner_and_for_nobody_else(site: Site) -> None:
    owner, member, visitor = await site.signed_in("alice"), await site.signed_in("bob"), Browser(site)
    assert (await owner.get("/alice/tiny")).status == 200
    missing = without_number(await visitor.get("/alice/nothing"))
    for stranger in (member, visitor):
        assert without_number(await stranger.get("/alice/tiny")) == missing
        for path in ("/", "/library", "/search?q=tiny"):
            assert "/alice/tiny" not in (await stranger.get(path)).html


async def test_model_page_shows_facts_and_tags(site: Site) -> None:
    await site.host("alice/tiny:big")
    page = await (await site.signed_in("alice")).get("/alice/tiny")
    assert "llama, 134.52M parameters, Q4_1 · 92 MB · 8k context · completion" in page.text
    assert "latest 3f9a1c000000 134.52M Q4_1 8k 92 MB" in page.text
    assert "big 3f9a1c000000" in page.text
    assert (await Browser(site).get("/Library/SmolLM2")).status == 200
    assert (await Browser(site).get("/library/smollm2:135m")).status == 200


@pytest.mark.parametrize(
    ("query", "found"), [("smol", ["smollm2"]), ("LLAMA", ["gemma3", "smollm2"]), ("llama gemma", ["gemma3"]), ("zebra", [])]
)
async def test_search_finds_models_that_hold_every_word(site: Site, query: str, found: list[str]) -> None:
    page = await Browser(site).get(f"/search?q={query.replace(' ', '+')}")
    links = [link["href"] for link in page.find("a") if link["href"].startswith("/library/")]
    assert links == [f"/library/{name}" for name in found]
    assert found or "Nothing matches" in page.text


@pytest.mark.parametrize("path", ["/api/nothing", "/v1/nothing", "/v2/nothing"])
async def test_unknown_path_of_an_interface_is_not_answered_by_a_page(site: Site, path: str) -> None:
    for method in ("GET", "POST"):
        answer = await Browser(site).get(path, method=method)
        assert (answer.status, answer.headers["content-type"]) == (404, "application/json; charset=utf-8")


@pytest.mark.parametrize("path", ["/static/x", "/admin/x", "/settings/x", "/connect/x", "/nobody/nothing", "/nothing"])
async def test_unknown_page_is_a_page_that_says_so(site: Site, path: str) -> None:
    answer = await Browser(site).get(path)
    assert (answer.status, "There is nothing here" in answer.text) == (404, True)
