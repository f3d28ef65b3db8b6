"""Requests that are longer than a model's context: found out only after an engine has refused one, then cut or refused in words.

Nobody counts the tokens of a request that fits: that would cost every request two more calls. An engine refuses what is too long
as bad_request, and only then is the prompt rendered and counted here, so that its text need not be understood.

Runners are loaded so that an answer which fills its context goes on, the oldest half forgotten. Who does not want that (`shift`)
has the length of the answer bounded instead: Ollama would load the model again, under everybody else's requests.
"""

from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from corral.core.ports import ChatCall, Chunk, CompletionCall, Finish, Runner
from corral.wire.errors import CorralError

Call = ChatCall | CompletionCall
Event = Chunk | Finish

#: What Ollama reckons for a picture that no tokenizer counts.
_IMAGE_TOKENS = 768
TOO_LONG = (
    "the prompt is longer than the context length currently available to the model; shorten the prompt, "
    "adjust the context length in settings, or use a model with a longer context length"
)
INPUT_TOO_LONG = "the input length exceeds the context length"
#: Texts that an engine is given at a time. It keeps kilobytes for each, and what others ask meanwhile waits behind all of them.
TEXTS_AT_ONCE = 64
#: Of all vectors of one request together: half a gigabyte of memory, and as much of JSON.
MAX_NUMBERS = 1 << 24


async def fitted_events(
    runner: Runner,
    call: Call,
    *,
    context_length: int,
    truncate: bool,
    shift: bool = True,
    shorter: Callable[[int], Awaitable[Call]] | None = None,
    droppable: int = 0,
    as_completion: Callable[[str], CompletionCall] | None = None,
) -> AsyncGenerator[Event, None]:
    """The events of a call. truncate: leave out the oldest messages of a chat that is too long, never system messages or the last
    one. shift: the answer may go on when the context is full, and of a completion that is too long the middle may be left out.
    shorter, droppable: the call without so many messages, and how many may go; for a call that is no chat itself. as_completion:
    makes a chat a completion, of the prompt that its template gives. Raises: bad_request with Ollama's text when it cannot be
    made to fit; whatever the runner raises."""
    if isinstance(call, ChatCall):
        shorter, droppable = partial(_without, call), len(call.messages) - 1
    if not shift and context_length > 0:
        call = _ending_within(call, context_length - await count_tokens(runner, call))
    events = _started(runner, call)
    try:
        try:
            event = await anext(events, None)
        except CorralError as error:
            if error.code != "bad_request":
                raise
            fitting = await _shortened(runner, call, context_length, shorter if truncate else None, droppable)
            if fitting is None:
                raise
            if isinstance(fitting, _TooLong):
                fitting = await _without_middle(runner, call, context_length, as_completion) if truncate and shift else None
                if fitting is None:
                    raise CorralError("bad_request", TOO_LONG) from error
            if not shift:
                fitting = _ending_within(fitting, context_length - await count_tokens(runner, fitting))
            await _close(events)
            events = _started(runner, fitting)
            event = await anext(events, None)
        while event is not None:
            yield event
            event = await anext(events, None)
    finally:
        await _close(events)


def _started(runner: Runner, call: Call) -> AsyncIterator[Event]:
    return runner.chat(call) if isinstance(call, ChatCall) else runner.complete(call)


async def _close(events: AsyncIterator[Event]) -> None:
    close = getattr(events, "aclose", None)
    if close is not None:
        await close()


async def _shortened(
    runner: Runner, call: Call, context_length: int, shorter: Callable[[int], Awaitable[Call]] | None, droppable: int
) -> "Call | _TooLong | None":
    """The call with messages left out, if that helps; None when length was not what the engine disliked."""
    if context_length <= 0 or await count_tokens(runner, call) < context_length:
        return None
    if shorter is None or droppable < 1:
        return _TooLong()
    # Leaving out more never makes a prompt longer, so the fewest messages to leave out are found by halving.
    low, high = 1, droppable
    while low < high:
        middle = (low + high) // 2
        if await count_tokens(runner, await shorter(middle)) < context_length:
            high = middle
        else:
            low = middle + 1
    fitting = await shorter(low)
    return fitting if await count_tokens(runner, fitting) < context_length else _TooLong()


class _TooLong:
    """That no message can be left out to make a call fit."""


async def _without_middle(
    runner: Runner, call: Call, context_length: int, as_completion: Callable[[str], CompletionCall] | None
) -> CompletionCall | None:
    """A completion with `num_keep` tokens of its beginning and so much of its end that half of what is left of the context stays
    free; None for what is none. Source: ollama llm/llama_server.go completionPromptForRequest."""
    if isinstance(call, ChatCall):
        if as_completion is None or any(map(_media_of, call.messages)):
            return None
        call = as_completion(await runner.apply_template(call))
    if call.suffix or call.media:
        return None
    beginning = [] if call.context else await runner.tokenize("")
    tokens = [*call.context, *await runner.tokenize(call.prompt, add_special=not call.context)]
    wanted = call.sampling.values.get("n_keep", 0)
    keep = min(len(tokens) if wanted < 0 else wanted + len(beginning), context_length - 1)
    limit = context_length - max((context_length - keep) // 2, 1)
    return replace(call, prompt="", context=(*tokens[:keep], *tokens[len(tokens) - (limit - keep) :]))


def _ending_within(call: Call, tokens: int) -> Call:
    """The call with an answer of at most so many tokens; as it is where that leaves none, which the engine will refuse."""
    values = call.sampling.values
    wanted = values.get("n_predict", -1)
    if tokens <= 0 or 0 <= wanted <= tokens:
        return call
    return replace(call, sampling=replace(call.sampling, values={**values, "n_predict": tokens}))


async def _without(call: ChatCall, count: int) -> ChatCall:
    """The chat without the first so many messages, except those of the system among them."""
    kept = [message for message in call.messages[:count] if message.get("role") == "system"]
    return replace(call, messages=[*kept, *call.messages[count:]])


async def count_tokens(runner: Runner, call: Call) -> int:
    """Of the prompt that the engine would read; pictures are reckoned."""
    if isinstance(call, CompletionCall):
        return len(call.context) + len(await runner.tokenize(call.prompt)) + _IMAGE_TOKENS * len(call.media)
    return len(await runner.tokenize(await runner.apply_template(call))) + _IMAGE_TOKENS * sum(map(_media_of, call.messages))


def _media_of(message: dict[str, Any]) -> int:
    content = message.get("content")
    return sum(1 for part in content if part.get("type") != "text") if isinstance(content, list) else 0


async def embed_fitting(runner: Runner, texts: Sequence[str], *, limit: int, truncate: bool) -> tuple[list[list[float]], int]:
    """One vector per text and the tokens read. limit: tokens that one text may have. truncate: cut longer texts at their end.
    Raises: bad_request with Ollama's text for a text that may not be cut; too_large for vectors that no answer has room for."""
    vectors: list[list[float]] = []
    tokens = 0
    for start in range(0, len(texts), TEXTS_AT_ONCE):
        found, read = await _embed_some(runner, texts[start : start + TEXTS_AT_ONCE], limit=limit, truncate=truncate)
        if found and len(texts) * len(found[0]) > MAX_NUMBERS:
            most = f"{MAX_NUMBERS // len(found[0]):,}"
            raise CorralError("too_large", f"these are too many texts for one answer; embed at most {most} of them at a time")
        vectors += found
        tokens += read
    return vectors, tokens


async def _embed_some(runner: Runner, texts: Sequence[str], *, limit: int, truncate: bool) -> tuple[list[list[float]], int]:
    try:
        return await runner.embed(texts)
    except CorralError as error:
        if error.code != "bad_request" or limit <= 0:
            raise
        fitting = [await _cut(runner, text, limit) for text in texts]
        if fitting == list(texts):
            raise
        if not truncate:
            raise CorralError("bad_request", INPUT_TOO_LONG) from error
    return await runner.embed(fitting)


async def _cut(runner: Runner, text: str, limit: int) -> str:
    """The longest beginning of at most so many tokens, found by halving, since engines count but do not cut."""
    if len(await runner.tokenize(text)) <= limit:
        return text
    low, high = 0, len(text) - 1
    while low < high:
        middle = (low + high + 1) // 2
        if len(await runner.tokenize(text[:middle])) <= limit:
            low = middle
        else:
            high = middle - 1
    return text[:low]
