"""Publishing, as a person does it: a private push, its page signed in and signed out, making it public, pulling it elsewhere."""

import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Browser, Page, expect

from flows.browser import chromium, look_at, person, tab_to
from flows.stack import MODEL, PASSWORD, Stack, answers, call, wait_until

pytestmark = [pytest.mark.browser, pytest.mark.flow]
README = "# Tiny\n\nA *small* model. [More](https://example.org/tiny)\n\n<script>alert(1)</script>\n\n![loss](https://example.org/l.png)"


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with chromium(tmp_path_factory.mktemp("chromium")) as started:
        yield started


@pytest.fixture(scope="module")
def alice(shared: Stack) -> Stack:
    """The module's installation with its device connected by alice, for pushing as well. Each test has a model of its own."""
    key = shared.add_key("alice", "inference", "keys", "models:pull", "models:push")
    shared.corral("signin", "--api-key-stdin", given=key + "\n")
    return shared


@pytest.fixture
def elsewhere(tmp_path: Path) -> Iterator[Stack]:
    """A second home directory on another machine: no account, no model, its own local server."""
    with Stack(tmp_path / "elsewhere") as stack:
        stack.begin("serve")
        wait_until(lambda: answers(f"{stack.local_url}/api/version"), "the second local server")
        yield stack


@pytest.fixture(scope="module")
def small_screen(browser: Browser) -> Page:
    return browser.new_context(viewport={"width": 360, "height": 740}, java_script_enabled=False).new_page()


@pytest.fixture
def phone(small_screen: Page) -> Page:
    """A page of a phone that runs no scripts, with empty cookies."""
    small_screen.context.clear_cookies()
    return small_screen


def sign_in(page: Page, stack: Stack, name: str = "alice") -> None:
    page.goto(f"{stack.hub_url}/signin")
    page.get_by_label("Name", exact=False).first.fill(name)
    page.get_by_label("Password", exact=True).fill(PASSWORD)
    page.keyboard.press("Enter")
    expect(page.get_by_text(name).first).to_be_visible()


def push(stack: Stack, name: str, *flags: str) -> None:
    stack.corral("cp", MODEL, name)
    stack.corral("push", name, *flags)


def page_of(stack: Stack, path: str) -> tuple[int, str]:
    """What a visitor gets, but for the number of the request."""
    answer = call("GET", stack.hub_url + path)
    return answer.status, answer.body.decode().replace(answer.headers.get("x-request-id", "-"), "")


def test_private_push_is_made_public_in_the_browser_and_pulled_without_an_account(
    alice: Stack, browser: Browser, elsewhere: Stack
) -> None:
    push(alice, "alice/tiny", "--private")
    url = f"{alice.hub_url}/alice/tiny"
    with person(browser) as page, person(browser) as visitor:
        # Signed in, it is there, and described once somebody had time to look into it.
        sign_in(page, alice)
        wait_until(lambda: "Q4_1" in page.request.get(url).text(), "the description")
        page.goto(url)
        expect(page.locator("h1")).to_contain_text("private")
        look_at(page, "publish-private")

        # Signed out, it is not, in the same words as what never was.
        visitor.goto(url)
        expect(visitor.get_by_role("heading", name="There is nothing here")).to_be_visible()
        assert page_of(alice, "/alice/tiny") == page_of(alice, "/alice/nothing")
        assert "alice/tiny" not in page_of(alice, "/library")[1]
        refused = elsewhere.corral("pull", f"{alice.hub_url.removeprefix('http://')}/alice/tiny", status=1)
        assert "does not exist" in refused.stderr

        page.get_by_role("link", name="Make public").click()
        look_at(page, "publish-confirm")
        page.get_by_role("button", name="Make public").click()
        expect(page.get_by_text("It is public.")).to_be_visible()
        look_at(page, "publish-public")
        page.emulate_media(color_scheme="dark")
        look_at(page, "publish-public-dark")

        # Whoever opens the page copies the command, and runs it where nobody is signed in.
        visitor.context.grant_permissions(["clipboard-read", "clipboard-write"])
        visitor.goto(url)
        visitor.get_by_role("button", name="Copy command").first.click()
        command = visitor.evaluate("navigator.clipboard.readText()")
        look_at(visitor, "publish-visitor")
    program, *arguments = shlex.split(command)
    assert program == "corral"
    elsewhere.corral(*arguments)
    installed = elsewhere.corral("list").stdout
    assert re.search(r"/alice/tiny\S*\s", installed), installed
    assert elsewhere.generate(arguments[-1], "Hello, world!").lines[-1]["done"] is True
    assert not (elsewhere.home / ".ollama" / "corral.json").exists()


def press(page: Page, role: str, name: str) -> None:
    """Press a control by keyboard where scripts are off."""
    target = page.get_by_role(role, name=name, exact=True)  # type: ignore[arg-type]
    # Without scripts a page cannot be asked where its focus is, so the element is focused and the key is real.
    target.focus()
    page.keyboard.press("Enter")


def test_owner_works_by_keyboard_without_scripts_on_a_phone(alice: Stack, phone: Page) -> None:
    push(alice, "alice/phone")
    alice.add_account("bob", admin=False)
    sign_in(phone, alice)

    phone.goto(f"{alice.hub_url}/alice/phone")
    press(phone, "link", "Write a README")
    phone.get_by_label("What people should know about it").fill(README)
    press(phone, "button", "Save README")
    expect(phone.get_by_role("heading", name="Tiny", exact=True)).to_be_visible()
    assert phone.locator(".prose script, .prose img").count() == 0
    press(phone, "link", "Access")
    phone.get_by_label("Let somebody in").fill("bob")
    press(phone, "button", "Let in")
    expect(phone.get_by_role("button", name="Remove bob")).to_be_visible()
    press(phone, "button", "Remove bob")
    expect(phone.get_by_text("Nobody but you.")).to_be_visible()
    press(phone, "link", "Delete alice/phone…")
    phone.get_by_label("Type alice/phone to delete it").fill("alice/phone")
    press(phone, "button", "Delete it")
    expect(phone.get_by_text("The model is deleted.")).to_be_visible()
    assert phone.get_by_role("link", name="alice/phone").count() == 0


def test_t119_account_is_deleted_by_keyboard_without_scripts_and_takes_its_models_and_keys_along(
    alice: Stack, phone: Page
) -> None:
    alice.add_account("carol", admin=False)
    key = alice.add_key("carol", "inference", "models:push")
    url = f"{alice.hub_url}/v2/carol/tiny/blobs/uploads/"
    assert call("POST", url, key=key).status == 202
    sign_in(phone, alice, "carol")
    phone.goto(f"{alice.hub_url}/settings")
    press(phone, "link", "Delete carol…")
    expect(phone.get_by_text("1 private model goes: carol/tiny")).to_be_visible()
    phone.get_by_label("Type carol to delete the account").fill("carol")
    press(phone, "button", "Delete the account")
    expect(phone.get_by_text("Your account is deleted.")).to_be_visible()
    phone.goto(f"{alice.hub_url}/settings")
    expect(phone.get_by_role("heading", name="Sign in")).to_be_visible()
    assert call("POST", url, key=key).status == 401
    assert "already in use" in alice.corral("hub", "user", "add", "Carol", "--password-stdin", given=PASSWORD, status=1).stderr


def test_tab_reaches_the_owners_actions(alice: Stack, browser: Browser) -> None:
    push(alice, "alice/tabbed")
    with person(browser) as page:
        sign_in(page, alice)
        page.goto(f"{alice.hub_url}/alice/tabbed")
        tab_to(page, page.get_by_role("button", name="Copy command").first)
        page.goto(f"{alice.hub_url}/alice/tabbed")
        tab_to(page, page.get_by_role("link", name="Make public"))
        page.keyboard.press("Enter")
        tab_to(page, page.get_by_role("button", name="Make public"))
        page.keyboard.press("Enter")
        expect(page.get_by_text("It is public.")).to_be_visible()
        for name, path in (("access", "/access"), ("readme", "/readme"), ("delete", "/delete"), ("hide", "/hide")):
            page.goto(f"{alice.hub_url}/settings/models/alice/tabbed{path}")
            look_at(page, f"repository-{name}")
        for name, path in (("namespace", "/alice"), ("library", "/library"), ("search", "/search?q=tabbed"), ("home", "/")):
            page.goto(alice.hub_url + path)
            expect(page.get_by_role("link", name="alice/tabbed")).to_be_visible()
            look_at(page, f"listing-{name}")
