"""Profile, password, sessions and usage."""

import pytest

from corral.core.records import Proof, Scope, UsageEntry
from fakes_web import PASSWORD, Browser, Page, Site, device_key

NEW = "another lamp over another river"


@pytest.fixture
def site() -> Site:
    return Site()


async def changed(browser: Browser, current: str, new: str) -> Page:
    return await browser.submit(await browser.get("/settings"), "/settings/password", current=current, new=new)


async def test_profile_tells_name_address_role_and_sessions(site: Site) -> None:
    browser = await site.signed_in()
    text = (await browser.get("/settings")).text
    assert "Name alice E-mail alice@example.org Role member Here since 2026-09-21" in text
    assert "Firefox on Linux this browser 127.0.0.1 just now" in text


async def test_t74_new_password_ends_every_other_session_and_renews_this_one(site: Site) -> None:
    other = await site.signed_in(network="192.0.2.1")
    browser = await site.signed_in()
    old = dict(browser.cookies)
    page = await changed(browser, PASSWORD, NEW)
    assert "Your password is changed." in page.text
    assert (await other.get("/settings")).status == 303
    assert (await Browser(site, cookies=old).get("/settings")).status == 303
    assert (await browser.get("/settings")).status == 200
    assert (await site.accounts.sign_in("alice", NEW, network="")).name == "alice"


@pytest.mark.parametrize(
    ("current", "new", "field"),
    [
        ("wrong", NEW, "current"),
        (PASSWORD, "short", "new"),
        (PASSWORD, "alicealicealice", "new"),
        ("", "", "current"),
    ],
)
async def test_mistake_with_passwords_is_shown_at_its_field(site: Site, current: str, new: str, field: str) -> None:
    browser = await site.signed_in()
    page = await changed(browser, current, new)
    (wrong,) = [found for found in page.find("input") if "aria-invalid" in found]
    assert (page.status, wrong["name"], "autofocus" in wrong) == (422, field, True)
    assert (await site.accounts.sign_in("alice", PASSWORD, network="")).name == "alice"


async def test_guessing_the_present_password_is_throttled(site: Site) -> None:
    browser = await site.signed_in()
    statuses = [(await changed(browser, "wrong", NEW)).status for _ in range(11)]
    assert statuses == [422] * 10 + [429]


async def test_other_sessions_can_be_ended_at_once(site: Site) -> None:
    other = await site.signed_in(network="192.0.2.1")
    browser = await site.signed_in()
    page = await browser.submit(await browser.get("/settings"), "/settings/sessions")
    assert "You are signed out everywhere else." in page.text
    assert (await other.get("/settings")).status == 303
    assert not [form for form in page.forms if form.action == "/settings/sessions"]


async def test_notice_in_the_address_is_chosen_never_written(site: Site) -> None:
    browser = await site.signed_in()
    assert "evil words" not in (await browser.get("/settings?done=evil+words")).html
    assert "evil words" not in (await browser.get("/settings/keys?done=evil+words")).html


async def test_usage_is_told_by_what_sent_it_and_by_model_for_a_period(site: Site) -> None:
    browser = await site.signed_in()
    account = await site.accounts.named("alice")
    key, _ = await site.credentials.create_key(account, name="ci", scopes=frozenset({Scope.INFERENCE}), expires_at=None)
    authorized = device_key().public.authorized_key
    device = await site.credentials.add_device(account, name="finch", authorized_key=authorized, scopes=frozenset(Scope))
    await site.usage.add([entry(site, account.id, key.id, 1000), entry(site, account.id, device.id, 10)])
    await site.usage.add([entry(site, account.id, "d-gone", 1), entry(site, "somebody else", key.id, 5_000_000)])
    page = await browser.get("/settings/usage")
    assert "ci key smollm2:135m 1 1,000 2,000" in page.text
    assert "finch device smollm2:135m 1 10 20" in page.text
    assert "A device revoked smollm2:135m 1 1 2" in page.text
    assert "All 3 1,011 2,022" in page.text
    site.clock.advance(2 * 86_400)
    browser = await site.signed_in()
    assert "Nothing was used" in (await browser.get("/settings/usage?days=1")).text
    assert "ci key" in (await browser.get("/settings/usage?days=99999999")).text


def entry(site: Site, account_id: str, credential_id: str, tokens: int) -> UsageEntry:
    return UsageEntry(
        account_id=account_id,
        credential_id=credential_id,
        proof=Proof.API_KEY,
        model="smollm2:135m",
        path="/api/generate",
        started_at=site.clock.now(),
        duration_ns=1,
        prompt_tokens=tokens,
        eval_tokens=2 * tokens,
        outcome="ok",
    )
