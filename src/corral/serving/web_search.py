"""A chat whose model may search the web: what the server runs between the model's turns.

Theory of operation. The model's words go out as they come. Its calls are held back until its turn ends: when one of them is a
search, the server searches, adds call and results to the conversation, and lets the model go on; the other calls of such a turn
are dropped, because the model decided on them before it knew, and asks again for what it still wants. The caller sees one answer
with one end, whose counts are those of all turns. Nothing here knows a dialect, or who searches where.
Source: ollama middleware/{web_search,openai,anthropic}.go, fb30760.
"""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Sequence
from contextlib import aclosing
from typing import Final

import msgspec

from corral.wire.errors import CorralError
from corral.wire.native import ChatRequest, ChatResponse, Message, ToolCall
from corral.wire.web_search import (
    NAME,
    SearchBegun,
    SearchDone,
    SearchError,
    SearchEvent,
    SearchFailed,
    query_of,
    results_text,
    search_call,
)
from corral.wire.webpage import SearchResult

Chat = Callable[[ChatRequest], AsyncIterator[ChatResponse]]
Search = Callable[[str], Awaitable[Sequence[SearchResult]]]

#: For one search. The caller waits meanwhile.
SEARCH_TIMEOUT_S: Final = 60.0
#: What the end of an answer adds up of its turns.
_TIMES: Final = ("total_duration", "load_duration", "prompt_eval_duration", "eval_duration")
_COUNTS: Final = (*_TIMES, "prompt_eval_count", "eval_count")


async def searching_chat(
    request: ChatRequest, *, limit: int, chat: Chat, search: Search
) -> AsyncGenerator[ChatResponse | SearchEvent, None]:
    """The events of a chat, with those of its searches in between; the last one has done set, and all calls for the caller.
    limit: searches at most. chat: runs the model for one turn. Raises: whatever `chat` raises. What `search` raises becomes a
    SearchFailed, after which comes nothing but the end."""
    turns: list[_Turn] = []
    while True:
        turns.append(turn := _Turn())
        async with aclosing(turn.words(chat(request))) as words:
            async for event in words:
                yield event
        call = search_call(turn.calls)
        if call is None:
            yield _end(turns, turn.calls)
            return
        number, query = len(turns), query_of(call)
        yield SearchBegun(number, query)
        outcome = _refusal(number, query, limit) or await _outcome(search, number, query)
        yield outcome
        if isinstance(outcome, SearchFailed):
            yield _end(turns, [])
            return
        request = _continued(request, turn, call, outcome.results)


class _Turn:
    """What the model said in one turn."""

    def __init__(self) -> None:
        self.calls: list[ToolCall] = []
        self.last: ChatResponse | None = None
        self._content: list[str] = []
        self._thinking: list[str] = []

    async def words(self, events: AsyncIterator[ChatResponse]) -> AsyncGenerator[ChatResponse, None]:
        """What goes out at once. The turn's events are closed with it."""
        try:
            async for event in events:
                if (words := self._take(event)) is not None:
                    yield words
        finally:
            if isinstance(events, AsyncGenerator):
                await events.aclose()

    def _take(self, event: ChatResponse) -> ChatResponse | None:
        """Note one event; what of it goes out at once. The first one does always, since a stream begins with it."""
        is_first, self.last = self.last is None, event
        self.calls += event.message.tool_calls
        self._content.append(event.message.content)
        self._thinking.append(event.message.thinking)
        if not (is_first or event.message.content or event.message.thinking):
            return None
        message = msgspec.structs.replace(event.message, tool_calls=[])
        return msgspec.structs.replace(event, message=message, done=False, done_reason="", **dict.fromkeys(_COUNTS, 0))

    def message(self, call: ToolCall) -> Message:
        """The turn as the next one sees it: with one call."""
        content, thinking = "".join(self._content), "".join(self._thinking)
        return Message(role="assistant", content=content, thinking=thinking, tool_calls=[call])


def _end(turns: Sequence[_Turn], calls: list[ToolCall]) -> ChatResponse:
    """The last event. Raises: engine_failed when a turn ended without one."""
    lasts = [turn.last for turn in turns if turn.last is not None and turn.last.done]
    if len(lasts) < len(turns):
        raise CorralError("engine_failed", "the model's answer ended too early")
    counts = {name: sum(getattr(last, name) for last in lasts) for name in _COUNTS}
    message = Message(role="assistant", content="", tool_calls=calls)
    return msgspec.structs.replace(lasts[-1], message=message, logprobs=[], **counts)


def _refusal(number: int, query: str, limit: int) -> SearchFailed | None:
    """Why a search is not even tried."""
    if number > limit:
        error = SearchError(f"web_search exceeded the maximum of {limit} calls")
        return SearchFailed(number, query, "max_uses_exceeded", error)
    if not query:
        error = SearchError("web_search requires a non-empty string query")
        return SearchFailed(number, query, "invalid_request", error)
    return None


async def _outcome(search: Search, number: int, query: str) -> SearchDone | SearchFailed:
    try:
        async with asyncio.timeout(SEARCH_TIMEOUT_S):
            return SearchDone(number, query, await search(query))
    except TimeoutError:
        error = SearchError(f"the web search took longer than {SEARCH_TIMEOUT_S:g} seconds")
    except CorralError as found:
        error = SearchError.of(found)
    return SearchFailed(number, query, "too_many_requests" if error.status == 429 else "unavailable", error)


def _continued(request: ChatRequest, turn: _Turn, call: ToolCall, results: Sequence[SearchResult]) -> ChatRequest:
    """The request for the next turn."""
    found = Message(role="tool", content=results_text(results), tool_name=NAME, tool_call_id=call.id)
    return msgspec.structs.replace(request, messages=[*request.messages, turn.message(call), found])
