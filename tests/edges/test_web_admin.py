"""Administration in the browser."""

import pytest

from corral.core.records import Proof, UsageEntry
from fakes_web import PASSWORD, Site, device_key


@pytest.fixture
async def site() -> Site:
    site = Site()
    await site.add_account("alice", is_admin=True)
    await site.add_account("bob")
    return site


async def test_administration_is_refused_to_others_by_page_and_form(site: Site) -> None:
    browser = await site.signed_in("bob")
    csrf = (await browser.get("/settings")).form("/signout").fields["csrf"]
    assert (await browser.get("/admin")).status == 403
    assert (await browser.post("/admin/accounts/alice/disable", {"csrf": csrf})).status == 403
    assert "/admin" not in (await browser.get("/")).html


async def test_accounts_are_listed_with_what_can_be_done_to_them(site: Site) -> None:
    browser = await site.signed_in("alice")
    text = (await browser.get("/admin")).text
    assert "alice administrator alice@example.org 2026-09-21 0 B 0 tokens active you" in text
    assert "bob bob@example.org 2026-09-21 0 B 0 tokens active Disable" in text
    assert "Sign-up is open" in text


async def test_accounts_are_listed_with_what_they_store_and_use(site: Site) -> None:
    bob = await site.account_store.by_name("bob")
    assert bob is not None
    await site.accounts.set_quota("bob", 200)
    await site.push("bob/tiny")
    await site.push("library/big")
    await site.usage.add([used(site, bob.id, tokens=40_000)])
    text = (await (await site.signed_in("alice")).get("/admin")).text
    assert "bob bob@example.org 2026-09-21 140 B of 200 B 120 k tokens active" in text
    assert "The library stores 143 B ." in text


async def test_accounts_are_listed_a_hundred_at_a_time(site: Site) -> None:
    for number in range(101):
        site.clock.advance(1)
        await site.add_account(f"user{number}")
    browser = await site.signed_in("alice")
    first = await browser.get("/admin")
    (link,) = [found["href"] for found in first.find("a") if "after=" in found["href"]]
    assert ("user97@" in first.text, "user98@" in first.text) == (True, False)
    second = await browser.get(link)
    assert ("user97@" in second.text, "user98@" in second.text, "user100@" in second.text) == (False, True, True)
    assert not [found for found in second.find("a") if "after=" in found["href"]]
    assert "user0@" in (await browser.get("/admin?after=nobody")).text


def used(site: Site, account_id: str, *, tokens: int) -> UsageEntry:
    return UsageEntry(
        account_id=account_id,
        credential_id="k",
        proof=Proof.API_KEY,
        model="smollm2:135m",
        path="/api/generate",
        started_at=site.clock.now(),
        duration_ns=1,
        prompt_tokens=tokens,
        eval_tokens=2 * tokens,
        outcome="ok",
    )


async def test_disabled_account_is_out_at_once_and_comes_back_when_enabled(site: Site) -> None:
    member, browser = await site.signed_in("bob"), await site.signed_in("alice")
    path = "/admin/accounts/bob/disable"
    page = await browser.submit(await browser.get(path), path)
    assert "The account is disabled." in page.text
    assert "disabled just now Enable" in page.text
    assert (await member.get("/settings")).status == 303
    path = "/admin/accounts/bob/enable"
    assert "The account is enabled." in (await browser.submit(await browser.get(path), path)).text
    assert (await site.accounts.sign_in("bob", PASSWORD, network="")).is_active


async def test_audit_log_tells_from_where_an_account_was_disabled_and_enabled(site: Site) -> None:
    browser = await site.signed_in("alice")
    for verb in ("disable", "enable"):
        path = f"/admin/accounts/bob/{verb}"
        await browser.submit(await browser.get(path), path)
    networks = [event.network for event in site.audit.events if event.action in ("account.disable", "account.enable")]
    assert networks == [browser.network] * 2


async def test_administrator_cannot_disable_the_own_account(site: Site) -> None:
    browser = await site.signed_in("alice")
    path = "/admin/accounts/alice/disable"
    assert (await browser.submit(await browser.get(path), path)).status == 409
    assert (await site.accounts.named("alice")).is_active


async def test_acts_of_an_administrator_need_a_fresh_password(site: Site) -> None:
    browser = await site.signed_in("alice")
    site.clock.advance(301)
    path = "/admin/accounts/bob/disable"
    page = await browser.submit(await browser.get(path), path)
    assert page.status == 403
    assert (await site.accounts.named("bob")).is_active
    assert "is disabled" in (await browser.submit(page, path, password=PASSWORD)).text


async def test_account_that_does_not_exist_is_not_found(site: Site) -> None:
    browser = await site.signed_in("alice")
    assert (await browser.get("/admin/accounts/nobody/disable")).status == 404


async def test_recent_events_are_told_with_names(site: Site) -> None:
    browser = await site.signed_in("alice")
    member = await site.signed_in("bob")
    await member.submit(await member.get(await site.knock(device_key())), "/connect")
    text = (await browser.get("/admin")).text
    assert f"device.connect just now bob finch …{device_key().public.fingerprint[-4:]}" in text
    assert "account.create just now console bob" in text
