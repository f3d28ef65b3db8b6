"""The pages in a real browser, where only that can tell: nothing runs, is framed or overflows, and every control is reached."""

import asyncio
import contextlib
import operator
import os
import socket
from collections.abc import AsyncIterator
from dataclasses import dataclass, replace

import pytest
import pytest_asyncio
from playwright.async_api import ConsoleMessage, Dialog, Error, Page, async_playwright, expect
from starlette.types import Receive, Send
from starlette.types import Scope as AsgiScope

from attacks import XSS
from corral.core.catalog import LayerFacts
from corral.core.records import Scope
from corral.core.registry import Right
from corral.edges.asgi import App
from corral.edges.listen import serve
from corral.wire.names import Digest
from fakes_web import FACTS, Site, device_key
from flows.browser import FLAGS, chromium_path

# One loop, socket, browser and page for all of them: starting a browser takes longer than most tests here, and so does a page.
pytestmark = [pytest.mark.browser, pytest.mark.asyncio(loop_scope="module")]

LONG = "a-name-that-nobody-would-choose-but-which-is-allowed-all-the-same"
#: Ends the title, the script, the attribute and the element that it is in.
ATTACK = "</title><script>alert(1)</script>'\"><svg onload=alert(1)><img src=x onerror=alert(1)>"
#: How many attacks share a page here. Each by itself is the business of test_markdown.py, which needs no browser.
AT_ONCE = 15
WIDTHS = (360, 1280)


class Door:
    """An ASGI application that stands for that of whichever hub a test makes, behind one socket."""

    def __init__(self, port: int) -> None:
        self.public_url = f"http://localhost:{port}"
        self.closing = asyncio.Event()
        self.app: App | None = None

    async def __call__(self, scope: AsgiScope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await Site().app(scope, receive, send)
        else:
            assert self.app is not None
            await self.app(scope, receive, send)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def door() -> AsyncIterator[Door]:
    """A real socket."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    door, ready, stop = Door(port), asyncio.Event(), asyncio.Event()
    serving = asyncio.create_task(serve(door, "127.0.0.1", port, on_ready=ready.set, release=_nothing, stop=stop, drain_s=1))
    await asyncio.wait_for(ready.wait(), 10)
    yield door
    stop.set()
    await asyncio.wait_for(serving, 10)


@pytest_asyncio.fixture(loop_scope="module")
async def site(door: Door) -> Site:
    """A hub in memory behind the socket."""
    return await opened(door)


async def opened(door: Door) -> Site:
    """A new hub, and the door leads to it."""
    site = Site(public_url=door.public_url)
    await site.host("smollm2:135m")
    await site.host("alice/tiny:latest")
    door.app = site.app
    return site


async def _nothing() -> None:
    """Nothing waits for an engine here."""


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def window(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Page]:
    """A browser's only page."""
    path = chromium_path()
    async with async_playwright() as playwright:
        env = {"HOME": str(tmp_path_factory.mktemp("chromium")), "PATH": os.environ["PATH"]}
        browser = await playwright.chromium.launch(executable_path=path, args=list(FLAGS), env=dict(env))
        context = await browser.new_context(viewport={"width": WIDTHS[-1], "height": 800})
        yield await context.new_page()
        await browser.close()


@contextlib.asynccontextmanager
async def visit(window: Page, site: Site) -> AsyncIterator[tuple[Page, list[str]]]:
    """The page signed in as an administrator and with no other cookie, and what the browser complains about."""
    signed_in = await site.signed_in(is_admin=True)
    ((name, value),) = signed_in.cookies.items()
    await window.context.clear_cookies()
    await window.context.add_cookies([{"name": name, "value": value, "url": site.public_url}])
    complaints: list[str] = []

    def note(what: ConsoleMessage | Error | Dialog) -> None:
        if not isinstance(what, ConsoleMessage):
            complaints.append(what.message)
        # The browser itself notes every answer with an error status.
        elif what.type == "error" and "Failed to load resource" not in what.text:
            complaints.append(what.text)

    for event in ("console", "pageerror", "dialog"):
        window.on(event, note)  # type: ignore[call-overload]
    yield window, complaints
    # Nothing of this visit speaks in the next one.
    await window.goto("about:blank")
    for event in ("console", "pageerror", "dialog"):
        window.remove_listener(event, note)


async def fill(site: Site, name: str) -> list[str]:
    """Put a name wherever somebody may choose one; the pages that show it."""
    await site.signed_in(is_admin=True)
    account = await site.accounts.named("alice")
    await _fill_models(site, name)
    scopes = frozenset(Scope)
    device = await site.credentials.add_device(
        account, name=name, authorized_key=device_key(7).public.authorized_key, scopes=scopes
    )
    key, _ = await site.credentials.create_key(account, name=name, scopes=scopes, expires_at=None)
    gone, _ = await site.credentials.create_key(account, name=name, scopes=scopes, expires_at=None)
    await site.credentials.revoke_key(account, gone.id)
    await site.accounts.open_session(account, network=name, user_agent=name)
    link = await site.knock(device_key(8), network="203.0.113.9", name=name)
    return [
        *("/", "/library", "/alice/tiny", "/settings", "/settings/keys", "/settings/usage", "/admin", "/nowhere", link),
        "/settings/delete",
        *("/alice", "/alice/long", f"/alice/long:{LONG}", "/search?q=a"),
        *(f"/settings/models/alice/long/{page}" for page in ("access", "publish", "readme", "delete", f"tag?name={LONG}")),
        *(f"/settings/keys/{key.id}/{verb}" for verb in ("rotate", "revoke")),
        *(f"/settings/devices/{device.id}/{verb}" for verb in ("rename", "scopes", "revoke")),
    ]


async def _fill_models(site: Site, text: str) -> None:
    """A model in whose facts and README a text stands wherever a stranger may put one."""
    facts = replace(FACTS, family=text, parameter_size=text, quantization=text)
    texts = {"template": text * 20, "license": text * 20, "parameters": ((text, text * 5),), "note": text * 5}
    layers = (LayerFacts(text, Digest("a" * 64), 1),)
    for tag in ("latest", LONG):
        await site.push("alice/long", tag, facts=facts, layers=layers, layer_count=1, **texts)
    repository = await site.registry_store.repository("alice", "long")
    friend = await site.account_store.by_name(LONG[:39]) or await site.add_account(LONG[:39])
    assert repository is not None
    wide = f"| {text} | {text} |\n|-|-|\n| {text * 9} | b |\n\n    {text * 20}\n\n# {text * 3}\n\n{text * 30}"
    await site.registry_store.change_repository(repository.id, readme=wide)
    await site.registry_store.set_collaborator(repository.id, friend.id, Right.PULL)


@dataclass(frozen=True, slots=True)
class Seen:
    """What there was on a page. elements: those that an attack may have inserted. reaches: its width in windows of WIDTHS."""

    path: str
    elements: int
    reaches: tuple[int, ...]


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def seen(door: Door, window: Page) -> tuple[list[Seen], list[str]]:
    """Every page, where each name that somebody may choose is long and attacks; and what the browser complained about."""
    site = await opened(door)
    paths, pages = await fill(site, LONG + ATTACK), []
    async with visit(window, site) as (page, complaints):
        for path in paths:
            await page.goto(site.public_url + path)
            elements = await page.locator("main script, main img, main iframe, main svg").count()
            await page.evaluate("for (const closed of document.querySelectorAll('details')) closed.open = true")
            reaches = []
            for width in WIDTHS:
                await page.set_viewport_size({"width": width, "height": 800})
                reaches.append(await page.evaluate("document.scrollingElement.scrollWidth"))
            pages.append(Seen(path, elements, tuple(reaches)))
    return pages, complaints


async def test_t81_names_that_attack_run_nothing_in_a_browser(seen: tuple[list[Seen], list[str]]) -> None:
    pages, complaints = seen
    assert [page.path for page in pages if page.elements] == []
    assert complaints == []


async def test_nothing_overflows_however_long_the_names(seen: tuple[list[Seen], list[str]]) -> None:
    pages, _ = seen
    assert [page for page in pages if any(map(operator.gt, page.reaches, WIDTHS))] == []


async def test_t81_readme_and_facts_that_attack_run_nothing_in_a_browser(site: Site, window: Page) -> None:
    await site.signed_in(is_admin=True)
    groups = ["\n\n".join(XSS[first : first + AT_ONCE]) for first in range(0, len(XSS), AT_ONCE)]
    for number, attack in enumerate(groups):
        texts = {"template": attack, "system": attack, "license": attack, "parameters": ((attack, attack),), "note": attack}
        facts = replace(FACTS, family=attack, parameter_size=attack, quantization=attack)
        await site.push(f"alice/m{number}", facts=facts, **texts)
        found = await site.registry_store.repository("alice", f"m{number}")
        assert found is not None
        await site.registry_store.change_repository(found.id, readme=f"{attack}\n\n> {attack}\n\n{attack}")
    async with visit(window, site) as (page, complaints):
        paths = [f"/alice/m{number}" for number in range(len(groups))]
        for path in [*paths, *(f"/settings/models{path}/readme" for path in paths), "/alice", "/library", "/search?q=alert"]:
            await page.goto(site.public_url + path)
            inserted = "main script, main img, main iframe, main svg, main form[action^=http], main style"
            assert await page.locator(inserted).count() == 0
        assert complaints == []


async def test_t49_connect_page_in_a_frame_of_another_site_stays_blank(site: Site, window: Page) -> None:
    link = await site.knock(device_key())
    async with visit(window, site) as (page, _):
        await page.goto("about:blank")
        await page.set_content(f'<iframe src="{site.public_url}{link}" width="600" height="400"></iframe>')
        frame = page.frames[1]
        await frame.wait_for_load_state()
        assert await frame.locator("form").count() == 0
        assert "finch" not in await frame.content()


async def test_tab_reaches_every_control_of_the_connect_page_in_order(site: Site, window: Page) -> None:
    link = await site.knock(device_key(), network="203.0.113.9")
    async with visit(window, site) as (page, _):
        await page.goto(site.public_url + link)
        await expect(page.get_by_role("button", name="Connect")).to_be_enabled()
        reached = []
        while "Switch account" not in reached:
            await page.keyboard.press("Tab")
            reached.append(await page.evaluate("(e => e.value || e.textContent.trim() || e.name)(document.activeElement)"))
            ring = await page.evaluate("getComputedStyle(document.activeElement).outlineStyle")
            assert ring != "none", reached
        scopes = ["inference", "models:pull", "models:push", "keys"]
        assert reached[0] == "Skip to content"
        assert reached[-8:] == [*scopes, "fingerprint_tail", "Connect finch", "Not me", "Switch account"]


async def test_copy_button_copies_what_it_stands_beside(site: Site, window: Page) -> None:
    async with visit(window, site) as (page, _):
        await page.context.grant_permissions(["clipboard-read", "clipboard-write"])
        await page.goto(site.public_url)
        await page.get_by_role("button", name="Copy command").first.click()
        # The browser copies, and then calls back.
        await expect(page.locator("#said")).to_have_text("Copied")
        assert await page.evaluate("navigator.clipboard.readText()") == f"corral signin --hub {site.public_url}"
