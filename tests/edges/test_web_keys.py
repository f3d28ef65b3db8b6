"""Devices and API keys on /settings/keys."""

import re
from datetime import timedelta

import pytest

from corral.core.records import ApiKey, Device, Proof, Scope, UsageEntry
from corral.wire.apikeys import parse_api_key
from fakes_web import PASSWORD, Browser, Page, Site, device_key

SECRET = re.compile(r"crlk_[0-9A-Za-z]{48}")


@pytest.fixture
async def site() -> Site:
    site = Site()
    await site.host("smollm2:135m")
    return site


async def keys(site: Site, name: str = "alice") -> list[ApiKey]:
    return list(await site.credentials.keys_of(await site.accounts.named(name)))


async def created(site: Site, browser: Browser, **changes: object) -> Page:
    page = await browser.get("/settings/keys")
    return await browser.submit(page, "/settings/keys", **{"name": "ci", **changes})  # type: ignore[arg-type]


async def device(site: Site, name: str = "alice", number: int = 1) -> Device:
    account = await site.accounts.named(name)
    key = device_key(number).public.authorized_key
    return await site.credentials.add_device(account, name="finch", authorized_key=key, scopes=frozenset({Scope.INFERENCE}))


# ── Creating ─────────────────────────────────────────────────────────────────────────────────────────────────────────


async def test_t53_created_key_is_shown_once_and_never_again(site: Site) -> None:
    browser = await site.signed_in()
    page = await created(site, browser)
    (secret,) = SECRET.findall(page.html)
    assert (page.status, page.headers["cache-control"]) == (201, "no-store")
    assert parse_api_key(secret) is not None
    for path in ("/settings/keys", "/settings/usage", "/settings", "/"):
        assert secret not in (await browser.get(path)).html
    assert not [event for event in site.audit.events if secret in str(event)]


async def test_new_key_runs_models_for_ninety_days_unless_chosen_otherwise(site: Site) -> None:
    browser = await site.signed_in()
    await created(site, browser)
    site.clock.advance(1)
    await created(site, browser, name="notebook", scope=["inference", "models:pull"], expires="never")
    first, second = await keys(site)
    assert (first.scopes, first.expires_at) == ({Scope.INFERENCE}, first.created_at + timedelta(days=90))
    assert (second.name, second.scopes, second.expires_at) == ("notebook", {Scope.INFERENCE, Scope.PULL}, None)


@pytest.mark.parametrize(
    ("changes", "field"),
    [({"name": " "}, "name"), ({"name": "\u202e"}, "name"), ({"scope": []}, "scope"), ({"expires": "0"}, "expires")],
)
async def test_mistake_is_shown_at_its_field_and_nothing_is_made(site: Site, changes: dict[str, object], field: str) -> None:
    browser = await site.signed_in()
    await created(site, browser)
    page = await created(site, browser, **changes)
    assert page.status == 422
    assert page.find("p", id=f"e-{field}")
    assert page.find("details", **{"class": "open-form"})[0].get("open") == ""
    assert len(await keys(site)) == 1


async def test_name_of_a_live_key_is_refused_for_another_one(site: Site) -> None:
    browser = await site.signed_in()
    await created(site, browser, expires="7")
    page = await created(site, browser, name=" CI ")
    assert (page.status, "You have a key named CI already." in page.text, len(await keys(site))) == (422, True, 1)
    site.clock.advance(7 * 86_400)
    assert (await created(site, await site.signed_in(), password=PASSWORD)).status == 201


async def test_keys_of_one_name_are_told_apart_by_their_age(site: Site) -> None:
    browser = await site.signed_in()
    await created(site, browser)
    assert "ci made" not in (await browser.get("/settings/keys")).text
    site.clock.advance(120)
    (old,) = await keys(site)
    path = f"/settings/keys/{old.id}/rotate"
    await browser.submit(await browser.get(path), path)
    text = (await browser.get("/settings/keys")).text
    assert "ci made 2 minutes ago, replaced" in text
    assert "ci made just now" in text


@pytest.mark.parametrize("changes", [{"scope": ["admin:*"]}, {"name": ["a", "b"]}])
async def test_form_that_the_page_cannot_send_is_refused(site: Site, changes: dict[str, object]) -> None:
    browser = await site.signed_in()
    assert (await created(site, browser, **changes)).status == 400
    assert not await keys(site)


async def test_t82_fields_that_the_form_does_not_have_are_ignored(site: Site) -> None:
    browser = await site.signed_in()
    bob = await site.add_account("bob")
    await created(site, browser, account_id=bob.id, id="k0", prefix="crlk_0000", revoked_at="1")
    (key,) = await keys(site)
    assert (key.id == "k0", key.revoked_at, await keys(site, "bob")) == (False, None, [])


async def test_t46_creating_asks_for_a_password_typed_long_ago(site: Site) -> None:
    browser = await site.signed_in()
    site.clock.advance(301)
    refused = await created(site, browser)
    assert (refused.status, await keys(site)) == (403, [])
    wrong = await created(site, browser, password="wrong")
    assert (wrong.status, "This is not your password" in wrong.text) == (403, True)
    made = await created(site, browser, password=PASSWORD)
    assert made.status == 201
    assert made.form("/signout").fields["csrf"] == (await browser.get("/settings/keys")).form("/settings/keys").fields["csrf"]


async def test_account_with_very_many_keys_is_told_to_revoke_one(site: Site) -> None:
    browser = await site.signed_in()
    account = await site.accounts.named("alice")
    for number in range(100):
        await site.credentials.create_key(account, name=f"k{number}", scopes=frozenset({Scope.INFERENCE}), expires_at=None)
    page = await created(site, browser)
    assert (page.status, "revoke one first" in page.text) == (409, True)


# ── The list ─────────────────────────────────────────────────────────────────────────────────────────────────────────


async def test_list_tells_what_each_key_may_do_and_what_it_did(site: Site) -> None:
    browser = await site.signed_in()
    account = await site.accounts.named("alice")
    await created(site, browser)
    (key,) = await keys(site)
    entry = UsageEntry(
        account_id=account.id,
        credential_id=key.id,
        proof=Proof.API_KEY,
        model="smollm2:135m",
        path="/api/generate",
        started_at=site.clock.now(),
        duration_ns=1,
        prompt_tokens=200_000,
        eval_tokens=1_000_000,
        outcome="ok",
    )
    await site.usage.add([entry])
    page = await browser.get("/settings/keys")
    assert f"ci {key.prefix}… inference never 1.2 M tokens in 90 days Rotate Revoke" in page.text


async def test_key_that_expires_soon_or_has_expired_is_marked_with_words(site: Site) -> None:
    browser = await site.signed_in()
    await created(site, browser, expires="7")
    assert "in 7 days Rotate Revoke" in (await browser.get("/settings/keys")).text
    site.clock.advance(7 * 86_400)
    browser = await site.signed_in()
    assert "expired Revoke" in (await browser.get("/settings/keys")).text


async def test_empty_lists_say_what_fills_them(site: Site) -> None:
    page = await (await site.signed_in()).get("/settings/keys")
    assert "corral signin --hub http://localhost:11435" in page.text
    assert not page.find("details", **{"class": "open-form"})
    assert page.form("/settings/keys")


# ── Rotating and revoking keys ───────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(("overlap", "hours"), [("1h", 1), ("24h", 24), ("7d", 168)])
async def test_t64_rotated_key_lives_on_for_the_overlap(site: Site, overlap: str, hours: int) -> None:
    browser = await site.signed_in()
    await created(site, browser)
    (old,) = await keys(site)
    site.clock.advance(1)
    path = f"/settings/keys/{old.id}/rotate"
    page = await browser.submit(await browser.get(path), path, overlap=overlap)
    assert (page.status, len(SECRET.findall(page.html))) == (201, 1)
    old, new = await keys(site)
    assert (old.expires_at, new.name) == (site.clock.now() + timedelta(hours=hours), "ci")


async def test_t64_leaked_key_is_refused_at_once(site: Site) -> None:
    browser = await site.signed_in()
    await created(site, browser)
    (old,) = await keys(site)
    site.clock.advance(1)
    path = f"/settings/keys/{old.id}/rotate"
    page = await browser.submit(await browser.get(path), path, overlap="0")
    assert "is refused from now on" in page.text
    assert (await keys(site))[0].revoked_at is not None


async def test_rotating_asks_for_a_password_typed_long_ago_and_keeps_the_choice(site: Site) -> None:
    browser = await site.signed_in()
    await created(site, browser)
    (old,) = await keys(site)
    site.clock.advance(301)
    path = f"/settings/keys/{old.id}/rotate"
    page = await browser.submit(await browser.get(path), path, overlap="7d")
    assert (page.status, page.form(path).fields["overlap"]) == (403, ["7d"])
    assert (await browser.submit(page, path, password=PASSWORD)).status == 201


async def test_overlap_that_the_form_does_not_offer_is_refused(site: Site) -> None:
    browser = await site.signed_in()
    await created(site, browser)
    (old,) = await keys(site)
    path = f"/settings/keys/{old.id}/rotate"
    assert (await browser.submit(await browser.get(path), path, overlap="99y")).status == 400


async def test_revoking_asks_first_and_never_for_the_password(site: Site) -> None:
    browser = await site.signed_in()
    await created(site, browser)
    (key,) = await keys(site)
    site.clock.advance(3600)
    path = f"/settings/keys/{key.id}/revoke"
    page = await browser.get(path)
    assert (await keys(site))[0].revoked_at is None
    page = await browser.submit(page, path)
    assert "The key is revoked. It is refused from now on." in page.text
    assert "Revoked in the last 30 days (1)" in page.text
    assert (await keys(site))[0].revoked_at == site.clock.now()


async def test_key_revoked_long_ago_is_not_listed(site: Site) -> None:
    browser = await site.signed_in()
    await created(site, browser)
    (key,) = await keys(site)
    await site.credentials.revoke_key(await site.accounts.named("alice"), key.id)
    site.clock.advance(31 * 86_400)
    assert "Revoked in" not in (await (await site.signed_in()).get("/settings/keys")).text


async def test_t66_keys_and_devices_of_others_are_not_there(site: Site) -> None:
    owner = await site.signed_in("bob")
    await created(site, owner)
    (key,) = await keys(site, "bob")
    theirs = await device(site, "bob")
    browser = await site.signed_in()
    csrf = (await browser.get("/settings")).form("/signout").fields["csrf"]
    paths = (
        *(f"/settings/keys/{key.id}/{verb}" for verb in ("rotate", "revoke")),
        *(f"/settings/devices/{theirs.id}/{verb}" for verb in ("rename", "scopes", "revoke")),
    )
    for path in paths:
        assert (await browser.get(path)).status == 404
        assert (await browser.post(path, {"csrf": csrf, "overlap": "0", "name": "mine"})).status == 404
    assert (await keys(site, "bob"))[0].revoked_at is None
    assert {"key.access_refused", "device.access_refused"} <= set(site.audit.actions)


# ── Devices ──────────────────────────────────────────────────────────────────────────────────────────────────────────


async def test_device_is_listed_with_its_fingerprint_and_last_use(site: Site) -> None:
    browser = await site.signed_in()
    found = await device(site)
    await site.credential_store.record_use([(found.id, site.clock.now(), "192.0.2.7")])
    site.clock.advance(120)
    fingerprint = found.key.fingerprint
    assert (
        f"finch {fingerprint[:11]}…{fingerprint[-4:]} inference Change 2 minutes ago from 192.0.2.7"
        in (await browser.get("/settings/keys")).text
    )


async def test_device_is_allowed_less_without_the_password_and_more_with_it(site: Site) -> None:
    browser = await site.signed_in()
    found = await device(site)
    path = f"/settings/devices/{found.id}/scopes"
    page = await browser.get(path)
    assert page.form(path).fields["scope"] == ["inference"]
    site.clock.advance(301)
    assert "may do that from its next request on" in (await browser.submit(page, path, scope=[])).text
    assert [kept.scopes for kept in await site.credentials.devices_of(await site.accounts.named("alice"))] == [frozenset()]

    refused = await browser.submit(await browser.get(path), path, scope=["inference", "models:push"])
    assert (refused.status, refused.form(path).fields["scope"]) == (403, ["inference", "models:push"])
    assert refused.find("p", id="e-password")
    assert (await browser.submit(refused, path, password="wrong")).status == 403
    done = await browser.submit(refused, path, password=PASSWORD)
    assert "finch SHA256:" in done.text
    assert "inference, models:push Change" in done.text


async def test_t82_device_gets_no_scope_that_does_not_exist(site: Site) -> None:
    browser = await site.signed_in()
    path = f"/settings/devices/{(await device(site)).id}/scopes"
    assert (await browser.submit(await browser.get(path), path, scope=["admin:*"])).status == 400


async def test_device_gets_another_name(site: Site) -> None:
    browser = await site.signed_in()
    path = f"/settings/devices/{(await device(site)).id}/rename"
    page = await browser.get(path)
    wrong = await browser.submit(page, path, name="\u200b")
    assert (wrong.status, bool(wrong.find("p", id="e-name"))) == (422, True)
    assert "swift" in (await browser.submit(page, path, name=" swift\n")).text


async def test_revoked_device_is_gone_from_the_list_and_refused(site: Site) -> None:
    browser = await site.signed_in()
    path = f"/settings/devices/{(await device(site)).id}/revoke"
    page = await browser.submit(await browser.get(path), path)
    assert "The device is revoked." in page.text
    assert "No device is connected" in page.text
    assert (await site.knock(device_key())).startswith("/connect?")
