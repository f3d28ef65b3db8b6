"""The loop between a model and the server's web search."""

import asyncio
from collections.abc import AsyncGenerator, Sequence
from typing import Any

import pytest

from corral.serving import web_search
from corral.serving.web_search import searching_chat
from corral.wire.errors import CorralError
from corral.wire.native import ChatRequest, ChatResponse, Message, ToolCall, ToolCallFunction
from corral.wire.web_search import FUNCTION, SearchBegun, SearchDone, SearchFailed
from corral.wire.webpage import SearchResult

TIME = "2026-09-21T14:13:20Z"
FOUND = [SearchResult(title="Rain", url="https://rain.example/", content="It rains.")]


def call(name: str = "web_search", call_id: str = "c1", **arguments: Any) -> ToolCall:
    return ToolCall(id=call_id, function=ToolCallFunction(name=name, arguments=arguments))


def said(content: str = "", *, thinking: str = "", calls: Sequence[ToolCall] = (), done: bool = False) -> ChatResponse:
    message = Message(role="assistant", content=content, thinking=thinking, tool_calls=list(calls))
    counts = {"done_reason": "stop", "prompt_eval_count": 10, "eval_count": 2, "total_duration": 5} if done else {}
    return ChatResponse(model="m", created_at=TIME, message=message, done=done, **counts)


SEARCHES = [said(calls=[call(query="rain")]), said(done=True)]
ANSWERS = [said("It "), said("rains."), said(done=True)]


class World:
    """A model with a script for each turn, and a search."""

    def __init__(self, *turns: Sequence[ChatResponse | Exception], found: Sequence[SearchResult] | Exception = FOUND) -> None:
        self.turns = list(turns)
        self.found = found
        self.requests: list[ChatRequest] = []
        self.queries: list[str] = []
        self.open_turns = 0
        self.waits = asyncio.Event()
        self.never: asyncio.Event | None = None

    async def chat(self, request: ChatRequest) -> AsyncGenerator[ChatResponse, None]:
        self.requests.append(request)
        self.open_turns += 1
        try:
            for event in self.turns.pop(0):
                if isinstance(event, Exception):
                    raise event
                yield event
        finally:
            self.open_turns -= 1

    async def search(self, query: str) -> Sequence[SearchResult]:
        self.queries.append(query)
        if self.never is not None:
            self.waits.set()
            await self.never.wait()
        if isinstance(self.found, Exception):
            raise self.found
        return self.found

    def events(self, limit: int = 3) -> AsyncGenerator[Any, None]:
        request = ChatRequest(model="m", messages=[Message(role="user", content="weather?")], tools=[dict(FUNCTION)])
        return searching_chat(request, limit=limit, chat=self.chat, search=self.search)

    async def all(self, limit: int = 3) -> list[Any]:
        return [event async for event in self.events(limit)]


def end_of(events: Sequence[Any]) -> ChatResponse:
    """The last event; no other one is done."""
    dones = [event for event in events if isinstance(event, ChatResponse) and event.done]
    assert dones == [events[-1]]
    return dones[0]


async def test_answer_without_a_search_is_the_models_own() -> None:
    world = World(ANSWERS)
    events = await world.all()
    assert [event.message.content for event in events] == ["It ", "rains.", ""]
    assert (end_of(events).prompt_eval_count, end_of(events).eval_count) == (10, 2)
    assert world.queries == []


async def test_calls_for_the_caller_come_with_the_end() -> None:
    events = await World([said("Hm", calls=[call("f")]), said(done=True)]).all()
    assert [event.message.tool_calls for event in events] == [[], [call("f")]]
    assert end_of(events).done_reason == "stop"


async def test_model_is_asked_again_with_what_was_found() -> None:
    world = World([said(thinking="look"), said("Let me see."), *SEARCHES], ANSWERS)
    events = await world.all()
    assert events[2:4] == [SearchBegun(1, "rain"), SearchDone(1, "rain", FOUND)]
    assert [event.message.content for event in events if isinstance(event, ChatResponse)] == [
        "",
        "Let me see.",
        "It ",
        "rains.",
        "",
    ]
    first, second = world.requests
    assert second.tools == first.tools
    assert second.messages == [
        *first.messages,
        Message(role="assistant", content="Let me see.", thinking="look", tool_calls=[call(query="rain")]),
        Message(
            role="tool",
            content="Title: Rain\nURL: https://rain.example/\nContent: It rains.\n\n",
            tool_name="web_search",
            tool_call_id="c1",
        ),
    ]


async def test_counts_of_all_turns_are_added_up() -> None:
    end = end_of(await World(SEARCHES, SEARCHES, ANSWERS).all())
    assert (end.prompt_eval_count, end.eval_count, end.total_duration) == (30, 6, 15)


async def test_stream_begins_before_the_search() -> None:
    events = await World([said(calls=[call(query="rain")], done=True)], ANSWERS).all()
    assert isinstance(events[0], ChatResponse)
    assert (events[0].done, events[0].message.tool_calls, events[0].prompt_eval_count) == (False, [], 0)
    assert events[1] == SearchBegun(1, "rain")


async def test_calls_beside_a_search_wait_until_the_model_knows() -> None:
    world = World([said(calls=[call("send", "c0"), call(query="rain"), call(query="sun")]), said(done=True)], ANSWERS)
    events = await world.all()
    assert world.queries == ["rain"]
    assert world.requests[1].messages[1].tool_calls == [call(query="rain")]
    assert end_of(events).message.tool_calls == []


@pytest.mark.parametrize("limit", [1, 2, 3])
async def test_model_that_never_stops_searching_is_stopped(limit: int) -> None:
    world = World(*[SEARCHES] * 9)
    events = await world.all(limit)
    assert len(world.queries) == limit
    assert len(world.requests) == limit + 1
    failed = events[-2]
    assert isinstance(failed, SearchFailed)
    assert (failed.number, failed.error_code) == (limit + 1, "max_uses_exceeded")
    assert failed.error.message == f"web_search exceeded the maximum of {limit} calls"
    assert end_of(events).message.tool_calls == []


@pytest.mark.parametrize("arguments", [{}, {"query": " "}, {"query": 5}])
async def test_search_for_nothing_is_refused(arguments: dict[str, Any]) -> None:
    world = World([said(calls=[call(**arguments)], done=True)])
    failed = (await world.all())[-2]
    assert isinstance(failed, SearchFailed)
    assert (failed.error_code, failed.error.status) == ("invalid_request", 502)
    assert world.queries == []


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (CorralError("upstream_failed"), "unavailable"),
        (CorralError("not_supported"), "unavailable"),
        (CorralError("unauthorized"), "unavailable"),
        (CorralError("rate_limited", retry_after_s=7), "too_many_requests"),
    ],
)
async def test_search_that_fails_ends_the_answer(error: CorralError, code: str) -> None:
    world = World(SEARCHES, found=error)
    events = await world.all()
    failed = events[-2]
    assert isinstance(failed, SearchFailed)
    assert (failed.error_code, failed.error.status, failed.error.retry_after_s) == (code, error.status, error.retry_after_s)
    assert end_of(events).eval_count == 2
    assert len(world.requests) == 1


async def test_search_that_takes_too_long_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    # Patched, because the time is the event loop's own.
    monkeypatch.setattr(web_search, "SEARCH_TIMEOUT_S", 0.0)
    world = World(SEARCHES)
    world.never = asyncio.Event()
    failed = (await world.all())[-2]
    assert isinstance(failed, SearchFailed)
    assert (failed.error_code, failed.error.message) == ("unavailable", "the web search took longer than 0 seconds")


async def test_failure_of_a_later_turn_is_the_models_failure() -> None:
    world = World(SEARCHES, [said("It"), CorralError("engine_failed")])
    with pytest.raises(CorralError, match="model runner"):
        await world.all()
    assert world.open_turns == 0


async def test_turn_without_an_end_is_an_error() -> None:
    with pytest.raises(CorralError) as caught:
        await World([said("It")]).all()
    assert caught.value.code == "engine_failed"


async def test_caller_who_leaves_closes_the_turn() -> None:
    world = World(SEARCHES, ANSWERS)
    events = world.events()
    async for event in events:
        if isinstance(event, ChatResponse) and event.message.content:
            break
    assert world.open_turns == 1
    await events.aclose()
    assert world.open_turns == 0


async def test_caller_who_leaves_during_a_search_ends_it() -> None:
    world = World(SEARCHES, ANSWERS)
    world.never = asyncio.Event()
    running = asyncio.create_task(world.all())
    await world.waits.wait()
    running.cancel()
    with pytest.raises(asyncio.CancelledError):
        await running
    assert (world.open_turns, len(world.requests)) == (0, 1)
