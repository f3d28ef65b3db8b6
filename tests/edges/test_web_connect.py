"""Connecting a device in the browser: what is shown, what is demanded, what is refused."""

import asyncio
from collections.abc import Sequence
from urllib.parse import urlencode

import pytest

from corral.core.records import Device, Scope
from fakes_web import PASSWORD, Browser, Page, Site, device_key

KEY = device_key()
FINGERPRINT = KEY.public.fingerprint
ELSEWHERE = "198.51.100.7"


@pytest.fixture
def site() -> Site:
    return Site()


async def devices(site: Site, name: str = "alice") -> Sequence[Device]:
    return await site.credentials.devices_of(await site.accounts.named(name))


async def asked(site: Site, browser: Browser, *, network: str = "127.0.0.1", name: str = "finch") -> Page:
    """The connect page of a device that has just asked."""
    return await browser.get(await site.knock(KEY, network=network, name=name))


# ── The page ─────────────────────────────────────────────────────────────────────────────────────────────────────────


async def test_t42_visitor_signs_in_or_up_first_and_comes_back(site: Site) -> None:
    await site.add_account()
    link = await site.knock(KEY)
    browser = Browser(site)
    page = await browser.get(link, follow=True)
    assert [found for found in page.find("a") if found["href"].startswith("/signup?next=%2Fconnect%3F")]
    page = await browser.submit(page, "/signin", name="alice", password=PASSWORD)
    assert page.find("form", action="/connect")
    assert page.form("/connect").fields["name"] == ["finch"]


async def test_page_shows_whose_account_which_device_and_from_where(site: Site) -> None:
    browser = await site.signed_in()
    link = await site.knock(KEY)
    site.clock.advance(12)
    page = await browser.get(link)
    assert "alice @localhost:11435" in page.text
    assert "finch (chosen by the device, not verified)" in page.text
    assert FINGERPRINT in page.text
    assert "12 seconds ago, from this network" in page.text


async def test_time_of_asking_is_that_of_the_first_request_however_often_the_device_polls(site: Site) -> None:
    browser = await site.signed_in()
    await site.knock(KEY)
    for _ in range(3):
        site.clock.advance(4)
        link = await site.knock(KEY)
    assert "12 seconds ago, from this network" in (await browser.get(link)).text


async def test_device_on_this_network_may_run_pull_and_manage_but_not_push_unless_ticked(site: Site) -> None:
    page = await asked(site, await site.signed_in())
    assert page.form("/connect").fields["scope"] == ["inference", "models:pull", "keys"]


async def test_device_on_another_network_is_offered_less(site: Site) -> None:
    page = await asked(site, await site.signed_in(), network=ELSEWHERE)
    assert page.form("/connect").fields["scope"] == ["inference", "models:pull"]
    assert ELSEWHERE in page.text
    assert page.find("input", name="fingerprint_tail")


@pytest.mark.parametrize("name", ["<script>alert(1)</script>", "a\u202eb\u200fc", "a\r\nb\x1b[31m", "n" * 10_000, ""])
async def test_t48_name_of_a_device_is_cut_to_something_harmless(site: Site, name: str) -> None:
    browser = await site.signed_in()
    await site.knock(KEY)
    page = await browser.get("/connect?" + urlencode({"name": name, "key": KEY.public.encoded}))
    await browser.submit(page, "/connect")
    (device,) = await devices(site)
    assert 1 <= len(device.name) <= 64
    assert device.name.isprintable()
    assert "<" not in device.name
    assert "not verified" in page.text


@pytest.mark.parametrize(
    ("key", "said"),
    [
        ("", "There is no key in this link."),
        ("x", "The key in this link is cut off: 1 of 107 characters."),
        ("A" * 80, "The key in this link is cut off: 80 of 107 characters."),
        (KEY.public.encoded[:-1], "The key in this link is cut off: 106 of 107 characters."),
        (KEY.public.encoded + "=", "The key in this link is damaged."),
        (f"{KEY.public.encoded[:40]}%0A{KEY.public.encoded[40:]}", "The key in this link is damaged."),
        ("x" * 9000, "The key in this link is damaged."),
    ],
)
async def test_t12_damaged_key_is_a_page_that_says_what_is_wrong_and_how_to_get_another(site: Site, key: str, said: str) -> None:
    browser = await site.signed_in()
    answer = await browser.get(f"/connect?name=finch&key={key}")
    assert answer.status == 400
    assert f"{said} Open it once more, whole, or run this on the device" in answer.text
    assert "corral signin" in answer.text
    assert not [form for form in answer.forms if form.action == "/connect"]


# ── Connecting ───────────────────────────────────────────────────────────────────────────────────────────────────────


async def test_t51_connecting_makes_a_device_a_page_that_says_so_and_an_audit_row(site: Site) -> None:
    browser = await site.signed_in()
    page = await browser.submit(await asked(site, browser), "/connect")
    (device,) = await devices(site)
    assert "finch is connected." in page.text
    assert "You can close this page." in page.text
    assert device.scopes == {Scope.INFERENCE, Scope.PULL, Scope.KEYS}
    assert "device.connect" in site.audit.actions


async def test_ticked_boxes_are_what_the_device_may_do(site: Site) -> None:
    browser = await site.signed_in()
    await browser.submit(await asked(site, browser), "/connect", scope=["models:push"])
    (device,) = await devices(site)
    assert device.scopes == {Scope.PUSH}


async def test_stock_link_without_a_code_connects_as_well(site: Site) -> None:
    browser = await site.signed_in()
    await site.knock(KEY)
    page = await browser.get(f"/connect?name=finch&key={KEY.public.encoded}")
    assert "is connected" in (await browser.submit(page, "/connect")).text


async def test_t44_post_without_token_or_from_elsewhere_links_nothing(site: Site) -> None:
    browser = await site.signed_in()
    fields = (await asked(site, browser)).form("/connect").fields
    without = {name: values for name, values in fields.items() if name != "csrf"}
    assert (await browser.post("/connect", without)).status == 403
    for headers in ({"sec-fetch-site": "cross-site"}, {"origin": "null"}, {}):
        assert (await browser.post("/connect", fields, headers=headers)).status == 403
    assert not await devices(site)


async def test_page_without_referrer_posts_with_a_null_origin_which_the_browser_vouches_for(site: Site) -> None:
    browser = await site.signed_in()
    fields = (await asked(site, browser)).form("/connect").fields
    answer = await browser.post("/connect", fields, headers={"origin": "null", "sec-fetch-site": "same-origin"})
    assert answer.status == 303


# ── A device that cannot be connected ────────────────────────────────────────────────────────────────────────────────


async def test_t45_device_that_has_not_asked_is_refused_with_what_to_do(site: Site) -> None:
    browser = await site.signed_in()
    page = await browser.get(f"/connect?name=finch&key={KEY.public.encoded}")
    assert page.status == 409
    assert "corral signin" in page.text


async def test_t45_device_that_asked_too_long_ago_is_refused_by_page_and_form(site: Site) -> None:
    browser = await site.signed_in()
    link = await site.knock(KEY)
    page = await browser.get(link)
    site.clock.advance(901)
    assert (await browser.get(link)).status == 409
    answer = await browser.submit(page, "/connect", password=PASSWORD)
    assert answer.status == 409
    assert not await devices(site)


async def test_t45_device_on_another_network_needs_the_end_of_its_fingerprint(site: Site) -> None:
    browser = await site.signed_in()
    page = await asked(site, browser, network=ELSEWHERE)
    wrong = await browser.submit(page, "/connect", fingerprint_tail="wrong!")
    (focused,) = [found for found in wrong.find("input") if "autofocus" in found]
    assert (wrong.status, focused["name"], focused["value"]) == (422, "fingerprint_tail", "wrong!")
    assert not await devices(site)
    assert "is connected" in (await browser.submit(wrong, "/connect", fingerprint_tail=FINGERPRINT[-6:])).text


async def test_t045_page_that_asks_for_the_end_of_a_fingerprint_does_not_show_it(site: Site) -> None:
    browser = await site.signed_in()
    page = await asked(site, browser, network=ELSEWHERE)
    wrong = await browser.submit(page, "/connect", fingerprint_tail="wrong!")
    site.clock.advance(360)
    for shown in (page, wrong, await asked(site, browser, network=ELSEWHERE)):
        assert shown.find("input", name="fingerprint_tail")
        assert FINGERPRINT[:-6] in shown.text
        # Nor in an attribute: the fields of the link hold the key, of which the fingerprint is a digest.
        assert FINGERPRINT[-6:] not in shown.html


async def test_t045_page_of_a_link_that_does_not_work_does_not_show_the_end_either(site: Site) -> None:
    browser = await site.signed_in()
    page = await browser.get(f"/connect?name=finch&key={KEY.public.encoded}")
    assert page.status == 409
    assert FINGERPRINT[-6:] not in page.html


async def test_t45_guessing_the_end_of_a_fingerprint_ends_after_five_tries(site: Site) -> None:
    browser = await site.signed_in()
    page = await asked(site, browser, network=ELSEWHERE)
    statuses = [(await browser.submit(page, "/connect", fingerprint_tail="wrong!")).status for _ in range(6)]
    assert statuses == [422, 422, 422, 422, 422, 429]
    assert (await browser.submit(page, "/connect", fingerprint_tail=FINGERPRINT[-6:])).status == 429


async def test_ticks_survive_a_mistake(site: Site) -> None:
    browser = await site.signed_in()
    page = await asked(site, browser, network=ELSEWHERE)
    again = await browser.submit(page, "/connect", fingerprint_tail="wrong!", scope=["models:push"])
    assert again.form("/connect").fields["scope"] == ["models:push"]


async def test_t47_device_of_another_account_stays_where_it_is(site: Site) -> None:
    owner = await site.signed_in("bob")
    await owner.submit(await asked(site, owner), "/connect")
    browser = await site.signed_in()
    page = await browser.get(f"/connect?name=finch&key={KEY.public.encoded}")
    assert page.status == 409
    assert "another account" in page.text
    csrf = page.form("/signout").fields["csrf"]
    answer = await browser.post("/connect", {"csrf": csrf, "key": KEY.public.encoded, "name": "finch", "scope": "inference"})
    assert answer.status == 409
    assert (len(await devices(site)), len(await devices(site, "bob"))) == (0, 1)


async def test_t47_two_accounts_at_once_make_one_link(site: Site) -> None:
    link = await site.knock(KEY)
    people = [await site.signed_in(name) for name in ("alice", "bob")]
    pages = [await person.get(link) for person in people]
    answers = await asyncio.gather(
        *(person.submit(page, "/connect", follow=False) for person, page in zip(people, pages, strict=True))
    )
    assert sorted(answer.status for answer in answers) == [303, 409]


async def test_device_that_is_connected_already_is_told_so_kindly(site: Site) -> None:
    browser = await site.signed_in()
    page = await asked(site, browser)
    await browser.submit(page, "/connect")
    again = await browser.get(f"/connect?name=finch&key={KEY.public.encoded}")
    assert (again.status, "already connected" in again.text) == (200, True)
    assert "is connected." in (await browser.submit(page, "/connect")).text
    assert len(await devices(site)) == 1


async def test_t50_link_with_an_old_code_is_gone(site: Site) -> None:
    browser = await site.signed_in()
    link = await site.knock(KEY)
    page = await browser.get(link)
    site.clock.advance(901)
    await site.knock(KEY)
    assert (await browser.get(link)).status == 410
    answer = await browser.submit(page, "/connect", password=PASSWORD)
    assert answer.status == 410
    assert not await devices(site)


async def test_done_page_tells_of_ones_own_devices_only(site: Site) -> None:
    owner = await site.signed_in("bob")
    await owner.submit(await asked(site, owner), "/connect")
    (device,) = await devices(site, "bob")
    stranger = await site.signed_in()
    assert (await stranger.get(f"/connect/done?device={device.id}")).status == 404
    assert (await stranger.get("/connect/done")).status == 404


# ── The password again ───────────────────────────────────────────────────────────────────────────────────────────────


async def test_t46_password_typed_long_ago_is_asked_for_again_in_the_same_form(site: Site) -> None:
    browser = await site.signed_in()
    site.clock.advance(301)
    page = await asked(site, browser)
    assert page.find("input", name="password")
    for password, words in (("", "Type your password"), ("wrong", "This is not your password")):
        again = await browser.submit(page, "/connect", password=password)
        assert (again.status, words in again.text) == (403, True)
    assert not await devices(site)
    assert "is connected" in (await browser.submit(page, "/connect", password=PASSWORD)).text


async def test_t46_page_opened_in_time_and_sent_too_late_asks_for_the_password(site: Site) -> None:
    browser = await site.signed_in()
    page = await asked(site, browser)
    assert not page.find("input", name="password")
    site.clock.advance(301)
    again = await browser.submit(page, "/connect")
    assert (again.status, bool(again.find("input", name="password"))) == (403, True)


async def test_t74_typing_the_password_again_gives_the_session_a_new_id_even_when_connecting_then_fails(site: Site) -> None:
    browser = await site.signed_in()
    site.clock.advance(301)
    old = dict(browser.cookies)
    page = await asked(site, browser, network=ELSEWHERE)
    wrong = await browser.submit(page, "/connect", password=PASSWORD, fingerprint_tail="wrong!")
    assert (wrong.status, browser.cookies == old) == (422, False)
    assert (await Browser(site, cookies=old).get("/settings")).status == 303
    # The page that came back is one of the new session: its token fits, and the password is not asked for again.
    assert not wrong.find("input", name="password")
    assert "is connected" in (await browser.submit(wrong, "/connect", fingerprint_tail=FINGERPRINT[-6:])).text


async def test_guessing_the_password_of_an_open_session_is_throttled(site: Site) -> None:
    browser = await site.signed_in()
    site.clock.advance(301)
    page = await asked(site, browser)
    statuses = {(await browser.submit(page, "/connect", password="wrong")).status for _ in range(11)}
    assert statuses == {403, 429}


# ── Ways out ─────────────────────────────────────────────────────────────────────────────────────────────────────────


async def test_switching_accounts_signs_out_and_comes_back_to_the_device(site: Site) -> None:
    await site.add_account("bob")
    browser = await site.signed_in()
    page = await asked(site, browser)
    switch = next(form for form in page.forms if form.action == "/signout" and "next" in form.fields)
    answer = await browser.post(switch.action, switch.fields)
    page = await browser.get(answer.headers["location"], follow=True)
    page = await browser.submit(page, "/signin", name="bob", password=PASSWORD)
    assert "bob @localhost:11435" in page.text


async def test_declining_connects_nothing(site: Site) -> None:
    browser = await site.signed_in()
    page = await asked(site, browser)
    assert page.find("a", href="/connect/declined")
    assert "Nothing was connected" in (await browser.get("/connect/declined")).text
    assert not await devices(site)
