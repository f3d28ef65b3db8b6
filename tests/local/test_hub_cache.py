"""What is kept of the hub's answers: for how long, for whom, and how much."""

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import msgspec
import pytest

from corral.core.ports import HubCall
from corral.local.background import Background, background_work
from corral.local.cloud import CloudAccess, CloudSwitch, HubRefused
from corral.local.hub_cache import BOUND_S, FRESH_S, HubCache, cacheable
from corral.wire.errors import CorralError
from corral.wire.native import GenerateRequest
from corral.wire.signing import DevicePrivateKey
from fakes import FakeClock
from fakes_local import FakeGateway, installed, stub, stub_models

JSON = {"content-type": "application/json"}


@pytest.fixture
async def background() -> AsyncIterator[Background]:
    async with background_work() as work:
        yield work


class Hub:
    """What a cache asks: gives its answers in turn, the last one again."""

    def __init__(self, *answers: bytes | CorralError) -> None:
        self.answers = list(answers)
        self.asked = 0
        self.heard = asyncio.Event()
        self.goes_on = asyncio.Event()
        self.goes_on.set()

    async def fetch(self) -> bytes:
        self.asked += 1
        self.heard.set()
        answer = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
        await self.goes_on.wait()
        if isinstance(answer, CorralError):
            raise answer
        return answer


async def settled(hub: Hub, asked: int) -> None:
    """Until the hub was asked so often, and the answers are there."""
    async with asyncio.timeout(10):
        while hub.asked < asked:
            await asyncio.sleep(0)
        for _ in range(10):
            await asyncio.sleep(0)


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        (b'{"model":"m"}', False),
        (b'{"name":"m","verbose":false}', False),
        (b'{"model":"m","Verbose":true}', True),
        (b'{"model":"m","verbose":null}', False),
        (b'{"model":"m","verbose":1}', None),
        (b'{"model":"m","system":""}', None),
        (b'{"model":"m","options":{}}', None),
        (b'{"model":"m","new":1}', None),
        (b'{"model":"m","VERBOSE":true,"verbose":false}', None),
    ],
)
def test_only_a_plain_question_has_a_kept_answer(body: bytes, expected: bool | None) -> None:
    assert cacheable(msgspec.json.decode(body, type=dict[str, msgspec.Raw])) is expected


async def test_fresh_answer_is_given_without_asking(background: Background) -> None:
    clock, hub = FakeClock(), Hub(b"1", b"2")
    cache = HubCache(clock, background)
    assert await cache.get("me", "m", hub.fetch) == b"1"
    clock.advance(FRESH_S - 0.1)
    assert await cache.get("me", "m", hub.fetch) == b"1"
    assert hub.asked == 1


async def test_stale_answer_is_given_and_asked_for_once_behind_the_callers_back(background: Background) -> None:
    clock, hub = FakeClock(), Hub(b"1", b"2")
    cache = HubCache(clock, background)
    await cache.get("me", "m", hub.fetch)
    clock.advance(FRESH_S)
    hub.goes_on.clear()
    assert [await cache.get("me", "m", hub.fetch) for _ in range(3)] == [b"1"] * 3
    await settled(hub, 2)
    hub.goes_on.set()
    await settled(hub, 2)
    assert await cache.get("me", "m", hub.fetch) == b"2"
    assert hub.asked == 2


async def test_nothing_older_than_the_bound_is_ever_given(background: Background) -> None:
    clock, hub = FakeClock(), Hub(b"1", CorralError("upstream_failed"))
    cache = HubCache(clock, background)
    await cache.get("me", "m", hub.fetch)
    clock.advance(BOUND_S)
    with pytest.raises(CorralError):
        await cache.get("me", "m", hub.fetch)


async def test_hub_that_is_away_leaves_what_is_kept_until_the_bound(background: Background) -> None:
    clock, hub = FakeClock(), Hub(b"1", CorralError("upstream_failed"))
    cache = HubCache(clock, background)
    await cache.get("me", "m", hub.fetch)
    clock.advance(FRESH_S)
    await cache.get("me", "m", hub.fetch)
    await settled(hub, 2)
    clock.advance(BOUND_S - FRESH_S - 1)
    assert await cache.get("me", "m", hub.fetch) == b"1"


@pytest.mark.parametrize("refusal", [HubRefused(404, [], b"{}"), HubRefused(403, [], b"{}"), CorralError("unauthorized")])
async def test_model_that_was_withdrawn_is_forgotten_with_the_next_refresh(refusal: CorralError, background: Background) -> None:
    clock, hub = FakeClock(), Hub(b"1", refusal)
    cache = HubCache(clock, background)
    await cache.get("me", "m", hub.fetch)
    clock.advance(FRESH_S)
    assert await cache.get("me", "m", hub.fetch) == b"1"
    await settled(hub, 2)
    with pytest.raises(CorralError):
        await cache.get("me", "m", hub.fetch)


async def test_answer_is_as_old_as_its_question(background: Background) -> None:
    clock, hub = FakeClock(), Hub(b"1")
    cache = HubCache(clock, background)
    hub.goes_on.clear()
    asking = asyncio.create_task(cache.get("me", "m", hub.fetch))
    await hub.heard.wait()
    clock.advance(BOUND_S)
    hub.goes_on.set()
    await asking
    await cache.get("me", "m", hub.fetch)
    assert hub.asked == 2


# ── For whom ─────────────────────────────────────────────────────────────────────────────────────────────────────────


async def test_answer_for_one_identity_is_not_given_to_another(background: Background) -> None:
    cache = HubCache(FakeClock(), background)
    assert await cache.get("ada", "m", Hub(b"hers").fetch) == b"hers"
    assert await cache.get("bob", "m", Hub(b"his").fetch) == b"his"
    assert await cache.get("ada", "other", Hub(b"x").fetch) == b"x"


async def test_nothing_is_left_after_the_session_not_even_what_was_on_its_way(background: Background) -> None:
    cache, hub = HubCache(FakeClock(), background), Hub(b"private", b"public")
    hub.goes_on.clear()
    asking = asyncio.create_task(cache.get("me", "m", hub.fetch))
    await hub.heard.wait()
    cache.forget()
    hub.goes_on.set()
    assert await asking == b"private"
    assert await cache.get("me", "m", hub.fetch) == b"public"


async def test_other_account_on_the_same_device_starts_anew(background: Background) -> None:
    cache = HubCache(FakeClock(), background)
    cache.note_account("ada")
    await cache.get("me", "m", Hub(b"hers").fetch)
    cache.note_account("ada")
    assert await cache.get("me", "m", Hub(b"x").fetch) == b"hers"
    cache.note_account("bob")
    assert await cache.get("me", "m", Hub(b"his").fetch) == b"his"


# ── How much ─────────────────────────────────────────────────────────────────────────────────────────────────────────


async def test_oldest_answers_go_when_there_are_too_many_or_too_large_ones(background: Background) -> None:
    cache = HubCache(FakeClock(), background)
    for number in range(257):
        await cache.get("me", number, Hub(b"x").fetch)
    again = Hub(b"y")
    assert await cache.get("me", 0, again.fetch) == b"y"
    assert await cache.get("me", 256, Hub(b"z").fetch) == b"x"
    large = b"x" * (256 * 1024)
    for number in range(33):
        await cache.get("me", f"large{number}", Hub(large).fetch)
    assert await cache.get("me", "large0", again.fetch) == b"y"
    assert await cache.get("me", "large32", again.fetch) == large


async def test_answer_beyond_the_bound_is_not_kept(background: Background) -> None:
    cache, hub = HubCache(FakeClock(), background), Hub(b"x" * (256 * 1024 + 1))
    for _ in range(2):
        await cache.get("me", "m", hub.fetch)
    assert hub.asked == 2


async def test_flood_of_stale_questions_does_not_flood_the_hub(background: Background) -> None:
    clock, hub = FakeClock(), Hub(b"x")
    cache = HubCache(clock, background)
    for number in range(40):
        await cache.get("me", number, hub.fetch)
    clock.advance(FRESH_S)
    hub.goes_on.clear()
    for number in range(40):
        await cache.get("me", number, hub.fetch)
    await settled(hub, 56)
    assert hub.asked == 40 + 16
    hub.goes_on.set()


async def test_work_ends_with_the_server_and_its_failures_are_nobodys(caplog: pytest.LogCaptureFixture) -> None:
    async def fails() -> None:
        raise RuntimeError("x")

    async def endless() -> None:
        await asyncio.Event().wait()

    async with background_work() as work:
        assert work.begin(fails, time_s=1)
        assert work.begin(endless, time_s=0.01)
        assert work.begin(endless, time_s=1000)
        await asyncio.sleep(0.05)
    assert "background work failed" in caplog.text


# ── Over a gateway ───────────────────────────────────────────────────────────────────────────────────────────────────


def cloud_of(gateway: FakeGateway, background: Background, *, is_off: bool = False) -> CloudAccess:
    cache = HubCache(FakeClock(), background)
    return CloudAccess(gateway, CloudSwitch(is_off, lambda: False), device_name="box", version="0", cache=cache)


async def show(cloud: CloudAccess, model: str = "m") -> bytes:
    return await cloud.show(model, b"{}", {}, verbose=False)


async def test_second_question_for_a_model_does_not_reach_the_hub(background: Background) -> None:
    gateway = FakeGateway()
    gateway.will_answer(200, b'{"details":', b"{}}", headers=JSON)
    cloud = cloud_of(gateway, background)
    assert await show(cloud) == await show(cloud, "M") == b'{"details":{}}'
    assert [call.path for call in gateway.calls] == ["/api/show"]


@pytest.mark.parametrize("ending", ["signed out", "unknown", "other key", "other hub"])
async def test_private_model_is_not_shown_to_whoever_comes_next(ending: str, background: Background) -> None:
    gateway = FakeGateway()
    cloud = cloud_of(gateway, background)
    gateway.will_answer(200, b"private", headers=JSON)
    assert await show(cloud) == b"private"
    if ending == "signed out":
        gateway.will_answer(500)
        with pytest.raises(CorralError):
            await cloud.sign_out()
    elif ending == "unknown":
        gateway.will_answer(401, headers=JSON)
        with pytest.raises(CorralError):
            await cloud.whoami()
    elif ending == "other key":
        gateway.key = DevicePrivateKey(b"o" * 32).public
    else:
        gateway.base = "https://other.example"
    gateway.will_answer(404, b'{"error":"model \'m\' not found"}', headers=JSON)
    with pytest.raises(HubRefused) as refused:
        await show(cloud)
    assert (refused.value.reply.status, refused.value.reply.body) == (404, b'{"error":"model \'m\' not found"}')


async def test_stub_that_is_refused_ends_the_session_too(background: Background) -> None:
    gateway = FakeGateway()
    cloud = cloud_of(gateway, background)
    gateway.will_answer(200, b"private", headers=JSON)
    await show(cloud)
    gateway.will_answer(401, b"{}")
    there = stub(installed(), host="http://localhost:11435", remote="m")
    with pytest.raises(CorralError):
        [event async for event in stub_models(gateway, cloud=cloud).generate(there, GenerateRequest(model="m", prompt="x"))]
    gateway.will_answer(200, b"public", headers=JSON)
    assert await show(cloud) == b"public"


def recommended(*rows: dict[str, Any]) -> bytes:
    return msgspec.json.encode({"recommendations": list(rows)})


async def test_recommendations_are_the_hubs_and_kept(background: Background) -> None:
    gateway = FakeGateway()
    gateway.will_answer(200, recommended({"model": "m:cloud", "description": "d", "context_length": 1, "max_output_tokens": 1}))
    cloud = cloud_of(gateway, background)
    assert [row.model for row in await cloud.recommendations()] == ["m:cloud"]
    assert [row.model for row in await cloud.recommendations()] == ["m:cloud"]
    (call,) = gateway.calls
    assert (call.method, call.path) == ("GET", "/api/experimental/model-recommendations")


@pytest.mark.parametrize("answer", [(404, b""), (200, b"no json"), (200, b"[]"), (200, b'{"recommendations":7}')])
async def test_hub_without_recommendations_recommends_nothing(answer: tuple[int, bytes], background: Background) -> None:
    gateway = FakeGateway()
    gateway.will_answer(*answer)
    assert await cloud_of(gateway, background).recommendations() == []


async def test_hub_that_is_away_or_off_recommends_nothing(background: Background) -> None:
    gateway = FakeGateway()
    gateway.will_fail(CorralError("upstream_failed"))
    assert await cloud_of(gateway, background).recommendations() == []
    assert await cloud_of(gateway, background, is_off=True).recommendations() == []
    assert len(gateway.calls) == 1
    assert isinstance(gateway.calls[0], HubCall)
