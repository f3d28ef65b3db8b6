"""Profile, password, sessions and usage."""

import pytest

from asgi_client import Caller
from corral.core.records import Proof, Scope, UsageEntry
from corral.core.registry import Visibility
from corral.core.scrubbing import HurtBlob
from corral.wire.errors import CorralError
from corral.wire.names import Digest
from fakes import NOON
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


async def test_damage_is_told_to_whose_models_it_hurts_and_to_administrators(site: Site) -> None:
    await site.add_account("rita", is_admin=True)
    alice, bob, rita = [await site.signed_in(name) for name in ("alice", "bob", "rita")]
    assert "damaged" not in (await alice.get("/settings")).text + (await rita.get("/admin")).text
    models = ("alice/tiny:latest", "bob/big:1t", "library/x@sha256:0")
    site.hurt = [HurtBlob(digest=Digest(f"{n}" * 64), size_bytes=1, since=NOON, models=models[:n]) for n in (1, 3)]
    own = (await alice.get("/settings")).text
    assert (
        "1 model is damaged on the hub’s disk What is damaged is not served. Push from a machine that has it: alice/tiny" in own
    )
    assert "bob/" not in own
    assert "alice/" not in (await bob.get("/settings")).text
    assert "3 models are damaged on the hub’s disk" in (await rita.get("/admin")).text
    assert "alice/tiny:latest, bob/big:1t, library/x@sha256:0" in (await rita.get("/admin")).text
    site.hurt = [HurtBlob(digest=Digest("1" * 64), size_bytes=1, since=NOON, models=tuple(f"a/{n:02}" for n in range(22)))]
    assert "a/19 and 2 more" in (await rita.get("/admin")).text


async def test_storage_and_use_are_told_in_units_for_people(site: Site) -> None:
    browser = await site.signed_in()
    account = await site.accounts.named("alice")
    words = "Storage 0 B (no limit but the disk) Repositories 0 of 1,000 Last 30 days 0 requests, 0 tokens"
    assert words in (await browser.get("/settings")).text
    await site.usage.add([entry(site, account.id, "k1", 400_000)])
    await site.push("alice/tiny")
    for quota, words in ((2_000_000_000, "2 GB"), (150, "150 B nearly full"), (9, "9 B full")):
        await site.accounts.set_quota("alice", quota)
        page = await browser.get("/settings")
        assert f"Storage 142 B of {words} Repositories 1 of 1,000 Last 30 days 1 request, 1.2 M tokens" in page.text
        assert page.find("meter")[0]["max"] == str(quota)
    assert "Stored: 142 B of 9 B full" in (await browser.get("/alice")).text
    (repository,) = await site.registry_store.repositories_of("alice")
    await site.registry_store.change_repository(repository.id, visibility=Visibility.PUBLIC)
    assert "Stored" not in (await (await site.signed_in("bob")).get("/alice")).text


# ── The end of the account ───────────────────────────────────────────────────────────────────────────────────────────


async def test_page_tells_what_ends_with_the_account(site: Site) -> None:
    browser = await site.signed_in()
    account = await site.accounts.named("alice")
    await site.push("alice/tiny", is_public=True)
    await site.push("alice/secret")
    await site.credentials.create_key(account, name="ci", scopes=frozenset({Scope.INFERENCE}), expires_at=None)
    text = (await browser.get("/settings/delete")).text
    assert "1 public model goes, for everybody: alice/tiny" in text
    assert "1 private model goes: alice/secret" in text
    assert "0 devices are signed out, 1 API key is refused" in text


async def test_t119_account_deleted_by_its_owner_is_dead_at_once(site: Site) -> None:
    await site.add_account("boss", is_admin=True)
    other, browser = await site.signed_in(network="192.0.2.1"), await site.signed_in()
    account = await site.accounts.named("alice")
    _, secret = await site.credentials.create_key(account, name="ci", scopes=frozenset({Scope.INFERENCE}), expires_at=None)
    await site.push("alice/tiny", is_public=True)
    old = dict(browser.cookies)
    page = await browser.submit(await browser.get("/settings/delete"), "/settings/delete", confirm="Alice")
    assert "Your account is deleted." in page.text
    assert page.find("a", href="/signin")
    for gone in (other, Browser(site, cookies=old)):
        assert (await gone.get("/settings")).status == 303
    headers = {"authorization": f"Bearer {secret.reveal()}"}
    assert (await Caller(site.app, scheme="https").request("POST", "/api/me", headers=headers)).status == 401
    assert (await Browser(site).get("/alice/tiny")).status == 404
    with pytest.raises(CorralError) as caught:
        await site.add_account("ALICE")
    assert caught.value.code == "conflict"
    (event,) = [event for event in site.audit.events if event.action == "account.remove"]
    assert (event.actor, event.subject, event.note, event.network) == (account.id, account.id, "alice", "127.0.0.1")


async def test_account_is_deleted_only_by_its_name_and_a_fresh_password(site: Site) -> None:
    browser = await site.signed_in()
    page = await browser.submit(await browser.get("/settings/delete"), "/settings/delete", confirm="alcie")
    assert (page.status, bool(page.find("p", id="e-confirm"))) == (422, True)
    site.clock.advance(301)
    asked = await browser.submit(await browser.get("/settings/delete"), "/settings/delete", confirm="alice")
    assert (asked.status, asked.form("/settings/delete").fields["confirm"]) == (403, ["alice"])
    assert (await browser.submit(asked, "/settings/delete", password="wrong")).status == 403
    assert await site.account_store.by_name("alice")
    assert (await browser.submit(asked, "/settings/delete", password=PASSWORD)).status == 200
    assert not await site.account_store.by_name("alice")


async def test_only_administrator_is_not_deleted(site: Site) -> None:
    browser = await site.signed_in(is_admin=True)
    site.clock.advance(301)
    page = await browser.get("/settings/delete")
    refused = await browser.submit(page, "/settings/delete", confirm="alice", password=PASSWORD)
    assert (refused.status, "Alice is the only administrator; make another one first." in refused.text) == (409, True)
    # The password that was typed for it counts from now on.
    assert (await browser.get("/settings")).status == 200
    assert "account.remove" not in site.audit.actions


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
    await site.credentials.revoke_device(account, device.id)
    assert "finch revoked smollm2:135m 1 10 20" in (await browser.get("/settings/usage")).text
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
