"""The newcomer's six steps of the README, with real processes, a real model and a real browser; and their pages, looked at."""

import base64
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Browser, Locator, Page, expect

from flows.browser import chromium, look_at, person, tab_to
from flows.stack import BRIEF, MODEL, PASSWORD, Stack, call

pytestmark = pytest.mark.browser
CLOUD = f"{MODEL}-cloud"


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with chromium(tmp_path_factory.mktemp("chromium")) as started:
        yield started


@pytest.fixture(scope="module")
def started(tmp_path_factory: pytest.TempPathFactory, home_with_model: Path) -> Iterator[Stack]:
    """A started installation where anybody may make an account."""
    with Stack(tmp_path_factory.mktemp("open"), like=home_with_model, CORRAL_SIGNUP="open") as stack:
        stack.start()
        stack.add_account()
        yield stack


@pytest.fixture
def running(started: Stack) -> Iterator[Stack]:
    """That installation with its device connected to nobody. Each test makes an account of its own."""
    yield started
    started.corral("signout")


def test_newcomer_from_an_empty_home_to_a_revoked_key(fresh: Stack, small_model: Path, browser: Browser) -> None:
    up = fresh.start("--model", f"{MODEL}={small_model}", *BRIEF)
    setup_link = up.wait_for(r"http://\S+/signup\?code=\S+")[0]

    # Step 2: the local server needs no authentication.
    assert fresh.generate(MODEL, "Hello, world!").lines[-1]["done"] is True

    # Step 3: a hosted model does, and says where to get it.
    refused = fresh.generate(CLOUD)
    assert refused.status == 401
    assert refused.json["error"] == "unauthorized"
    assert refused.json["signin_url"].startswith(f"{fresh.hub_url}/connect?name=")

    with person(browser) as page:
        # Step 4: create the account, connect the device; the waiting command notices.
        page.goto(setup_link)
        look_at(page, "signup-first")
        create_account(page)
        signin = fresh.begin("signin")
        link = signin.wait_for(r"http://\S+/connect\?\S+")[0]
        fingerprint = signin.wait_for(r"SHA256:\S{43}")[0]
        connect(page, link, fingerprint)
        assert signin.finish() == 0
        assert "alice" in signin.output
        assert fresh.opened_links.read_text().strip() == link
        streamed = fresh.generate(CLOUD)
        assert streamed.status == 200
        assert len(streamed.lines) > 1
        assert streamed.lines[-1]["done"] is True
        assert streamed.lines[-1]["eval_count"] > 0
        assert fresh.corral("run", CLOUD, "Why is the sky blue?").stdout.strip()
        assert "alice" in fresh.corral("whoami").stdout

        # Step 5: an API key, used directly at the hub, then revoked.
        key = create_key(page, fresh, "notebook")
        answer = fresh.generate(MODEL, at=fresh.hub_url, key=key, stream=False)
        assert answer.status == 200
        assert answer.json["done"] is True
        assert answer.json["response"]
        revoke_key(page, "notebook")
        assert fresh.generate(MODEL, at=fresh.hub_url, key=key).status == 401

    # Step 6: signed out, hosted models are refused again; the local one is not.
    fresh.corral("signout")
    assert fresh.generate(CLOUD).status == 401
    assert fresh.generate(MODEL).status == 200


def test_pages_at_phone_and_laptop_width_show_everything(running: Stack, browser: Browser) -> None:
    with person(browser) as page:
        page.goto(f"{running.hub_url}/signup")
        look_at(page, "signup")
        create_account(page, "ben")
        signin = running.begin("signin")
        link = signin.wait_for(r"http://\S+/connect\?\S+")[0]
        page.goto(link)
        look_at(page, "connect")
        connect(page, link, signin.wait_for(r"SHA256:\S{43}")[0])
        look_at(page, "connected")
        signin.finish()
        page.goto(f"{running.hub_url}/settings/keys")
        look_at(page, "keys-first")
        create_key(page, running, "a-key-with-a-rather-long-name-that-has-to-fit-somewhere")
        look_at(page, "keys-created")
        page.goto(f"{running.hub_url}/settings/keys")
        look_at(page, "keys")
        for path in ("/", "/settings", "/settings/usage", "/nowhere"):
            page.goto(running.hub_url + path)
            look_at(page, "page" + path.replace("/", "-"))
        page.emulate_media(color_scheme="dark")
        page.goto(f"{running.hub_url}/settings/keys")
        look_at(page, "keys-dark")
    with person(browser) as visitor:
        visitor.goto(f"{running.hub_url}/signin")
        look_at(visitor, "signin")


def test_keyboard_alone_connects_a_device_and_makes_and_revokes_a_key(running: Stack, browser: Browser) -> None:
    with person(browser) as page:
        page.goto(f"{running.hub_url}/signup")
        for label, text in (("Name", "carl"), ("E-mail (optional)", "carl@example.org"), ("Password", PASSWORD)):
            tab_to(page, page.get_by_label(label, exact=True))
            page.keyboard.type(text)
        page.keyboard.press("Enter")
        expect(page.get_by_text("carl").first).to_be_visible()
        signin = running.begin("signin")
        page.goto(signin.wait_for(r"http://\S+/connect\?\S+")[0])
        press(page, page.get_by_role("button", name="Connect", exact=False).first)
        assert signin.finish() == 0
        page.goto(f"{running.hub_url}/settings/keys")
        tab_to(page, page.get_by_label("Name", exact=True))
        page.keyboard.type("by hand")
        page.keyboard.press("Enter")
        key = shown_key(page)
        assert running.generate(MODEL, at=running.hub_url, key=key).status == 200
        press(page, page.get_by_role("link", name="Done"))
        press(page, page.get_by_role("link", name="Revoke by hand"))
        press(page, page.get_by_role("button", name="Revoke"))
        expect(page.get_by_role("status").first).to_contain_text("revoked", ignore_case=True)
        assert running.generate(MODEL, at=running.hub_url, key=key).status == 401


def test_connect_page_without_scripts_still_connects(running: Stack, browser: Browser) -> None:
    context = browser.new_context(java_script_enabled=False)
    try:
        page = context.new_page()
        page.goto(f"{running.hub_url}/signup")
        create_account(page, "dora")
        signin = running.begin("signin")
        connect(page, signin.wait_for(r"http://\S+/connect\?\S+")[0], "SHA256:")
        assert signin.finish() == 0
    finally:
        context.close()


def test_delete_of_the_encoded_key_signs_one_device_out(running: Stack) -> None:
    running.add_account("emil", admin=False)
    key = running.sign_in("emil")
    (device,) = call("GET", f"{running.hub_url}/api/user/keys", key=key).json
    assert running.generate(CLOUD).status == 200
    encoded = encoded_key(device["key"])
    assert call("DELETE", f"{running.hub_url}/api/user/keys/{encoded}", key=key).status == 200
    assert running.generate(CLOUD).status == 401


def create_account(page: Page, name: str = "alice") -> None:
    """Fill in the form of the page."""
    page.get_by_label("Name", exact=True).fill(name)
    page.get_by_label("E-mail").fill(f"{name}@example.org")
    page.get_by_label("Password", exact=True).fill(PASSWORD)
    page.get_by_role("button", name="Create account").click()
    expect(page.get_by_text(name).first).to_be_attached()
    assert "/signup" not in page.url


def connect(page: Page, link: str, fingerprint: str) -> None:
    page.goto(link)
    expect(page.get_by_text(fingerprint).first).to_be_visible()
    page.get_by_role("button", name="Connect").first.click()
    expect(page.get_by_role("heading", name="is connected")).to_be_visible()


def create_key(page: Page, stack: Stack, name: str) -> str:
    page.goto(f"{stack.hub_url}/settings/keys")
    # The form is open on an account without keys, and behind its button on one with keys.
    for closed in page.locator("details.open-form:not([open]) > summary").all():
        closed.click()
    page.get_by_label("Name", exact=True).fill(name)
    page.locator("form").get_by_role("button", name="Create key").click()
    return shown_key(page)


def shown_key(page: Page) -> str:
    """The secret, which this page alone shows."""
    return page.locator("code", has_text=re.compile(r"^crlk_[0-9A-Za-z]{48}$")).first.inner_text().strip()


def revoke_key(page: Page, name: str) -> None:
    page.get_by_role("link", name="Done").click()
    page.get_by_role("link", name=f"Revoke {name}").click()
    page.get_by_role("button", name="Revoke").click()
    expect(page.get_by_role("status").first).to_contain_text("revoked", ignore_case=True)


def press(page: Page, target: Locator) -> None:
    """Reach a control with Tab and press Enter there."""
    expect(target).to_be_enabled()
    tab_to(page, target)
    page.keyboard.press("Enter")


def encoded_key(authorized_key: str) -> str:
    """base64url without padding, the `{encodedKey}` of the path."""

    return base64.urlsafe_b64encode(authorized_key.encode()).decode().rstrip("=")
