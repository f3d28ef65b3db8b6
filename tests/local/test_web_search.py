"""Searches of local models, done at the hub: what is sent, and how little of the answer is believed."""

import json
from typing import Any

import pytest

from corral.local.cloud import CloudAccess, CloudSwitch
from corral.local.web_search import HubSearch
from corral.wire.errors import CorralError
from corral.wire.webpage import SearchResult
from fakes_local import FakeGateway

JSON = {"content-type": "application/json"}


class Hub:
    """A hub that answers as told."""

    def __init__(self, *, is_off: bool = False) -> None:
        self.gateway = FakeGateway()
        switch = CloudSwitch(is_off, lambda: False)
        self.search = HubSearch(CloudAccess(self.gateway, switch, device_name="box", version="9"))

    async def refusal(self) -> CorralError:
        with pytest.raises(CorralError) as caught:
            await self.search.search_for(None, "rain")
        return caught.value


def body(*rows: Any) -> bytes:
    return json.dumps({"results": rows}).encode()


async def test_search_is_asked_of_the_hub_and_signed_there() -> None:
    hub = Hub()
    answer = hub.gateway.will_answer(200, body({"title": "t", "url": "https://x.example/", "content": "c"}), headers=JSON)
    assert await hub.search.search_for(None, "rain") == [SearchResult(title="t", url="https://x.example/", content="c")]
    (call,) = hub.gateway.calls
    assert (call.method, call.path, json.loads(call.body)) == ("POST", "/api/web_search", {"query": "rain", "max_results": 5})
    assert answer.is_closed


async def test_search_is_off_with_the_cloud() -> None:
    hub = Hub(is_off=True)
    error = await hub.refusal()
    assert (error.status, error.message) == (403, "ollama cloud is disabled: web search is unavailable")
    assert hub.gateway.calls == []


async def test_device_that_is_not_connected_gets_the_link() -> None:
    hub = Hub()
    hub.gateway.will_answer(401, b"{}", headers=JSON)
    assert (await hub.refusal()).detail["signin_url"].startswith("http://localhost:11435/connect?")


@pytest.mark.parametrize(
    ("status", "code"),
    [(403, "forbidden"), (429, "rate_limited"), (500, "upstream_failed"), (501, "not_supported"), (503, "unavailable")],
)
async def test_refusal_of_the_hub_keeps_its_words(status: int, code: str) -> None:
    hub = Hub()
    answer = hub.gateway.will_answer(status, b'{"error":"no\\u001b[2J"}', headers=JSON)
    error = await hub.refusal()
    assert (error.code, error.message) == (code, "no\\u001b[2J")
    assert answer.is_closed


@pytest.mark.parametrize("text", [b"", b"[]", b"{", b'{"results":{}}', b"[" * 5000, b'{"results":null}'])
async def test_t122_answer_that_is_none_is_refused(text: bytes) -> None:
    hub = Hub()
    hub.gateway.will_answer(200, text, headers=JSON)
    assert (await hub.refusal()).code == "upstream_failed"


async def test_t122_answer_without_end_is_cut_off() -> None:
    hub = Hub()
    answer = hub.gateway.will_answer(200, *[b"x" * 2**20] * 3, headers=JSON)
    assert "larger than" in (await hub.refusal()).message
    assert answer.is_closed


async def test_t122_answer_in_another_form_than_json_is_refused() -> None:
    hub = Hub()
    hub.gateway.will_answer(200, b"<html>", headers={"content-type": "text/html"})
    assert (await hub.refusal()).code == "upstream_failed"
