"""A real browser for the flows: Debian's Chromium, driven by Playwright's protocol client, which downloads nothing here."""

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Browser, Locator, Page, expect, sync_playwright

#: Narrowest phone and common laptop, in CSS pixels.
WIDTHS = (360, 1280)
FLAGS = (
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--no-proxy-server",
)


def chromium_path() -> str:
    """The browser's program. Skips by name when there is none."""
    found = next((path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), "")
    if not found:
        pytest.skip("chromium is not installed (Debian: apt-get install chromium)")
    return found


@contextlib.contextmanager
def chromium(folder: Path) -> Iterator[Browser]:
    """A headless browser with a home of its own."""
    with sync_playwright() as playwright:
        env = {"HOME": str(folder), "PATH": os.environ["PATH"]}
        browser = playwright.chromium.launch(executable_path=chromium_path(), args=list(FLAGS), env=dict(env))
        yield browser
        browser.close()


@contextlib.contextmanager
def person(browser: Browser) -> Iterator[Page]:
    """A visitor with empty cookies. Fails when a page logged an error, such as one of the content security policy."""
    context = browser.new_context(viewport={"width": 1280, "height": 800}, reduced_motion="reduce")
    context.set_default_timeout(15_000)
    page = context.new_page()
    complaints: list[str] = []
    page.on("console", lambda message: complaints.append(message.text) if message.type == "error" else None)
    page.on("pageerror", lambda error: complaints.append(str(error)))
    yield page
    context.close()
    # The browser itself notes every answer with an error status, which some steps provoke.
    assert not [text for text in complaints if "Failed to load resource" not in text]


def look_at(page: Page, name: str) -> None:
    """Fail when anything reaches beyond the edge at any width. CORRAL_TEST_SCREENSHOTS names a folder for pictures of it."""
    folder = os.environ.get("CORRAL_TEST_SCREENSHOTS")
    for width in WIDTHS:
        page.set_viewport_size({"width": width, "height": 800})
        if folder:
            page.screenshot(path=Path(folder) / f"{name}-{width}.png", full_page=True)
        reach = page.evaluate("document.documentElement.scrollWidth")
        assert reach <= width, f"{name} is {reach} px wide in a window of {width} px"
        outside = page.evaluate(
            """width => [...document.querySelectorAll('body *')].filter(e => {
                const box = e.getBoundingClientRect();
                return box.width && box.right > width + 0.5 && getComputedStyle(e).position !== 'absolute' &&
                    !e.closest('[data-scrolls]');
            }).map(e => e.outerHTML.slice(0, 120))""",
            width,
        )
        assert not outside, f"{name} at {width} px: {outside}"
    styled = page.evaluate("[...document.styleSheets].some(sheet => sheet.cssRules.length > 0)")
    assert styled, f"{name} has no style sheet"


def tab_to(page: Page, target: Locator) -> None:
    """Move the focus by Tab alone until it is on the control; the focus must be visible there."""
    expect(target).to_be_visible()
    for _ in range(60):
        if target.evaluate("element => element === document.activeElement"):
            ring = target.evaluate("e => getComputedStyle(e).outlineStyle + ' ' + getComputedStyle(e).boxShadow")
            assert ring != "none none", f"the focus on {target} cannot be seen"
            return
        page.keyboard.press("Tab")
    raise AssertionError(f"Tab never reaches {target}")
