"""Chats whose prompt a Go template makes: which models those are, the prompt, and the parts of the answer.

The engine sees a bare completion, so what it does elsewhere happens here: the oldest messages are left out of a chat that is too
long, thoughts and calls are told apart by the template's tags, and a schema is held to only once thinking has ended. Source:
ollama server/routes.go, server/prompt.go, server/images.go, fb30760.
"""

import asyncio
import re
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field, replace
from datetime import date
from functools import lru_cache
from typing import Any

import msgspec

from corral.core.ports import ChatCall, Chunk, CompletionCall, Finish, Runner, Sampling
from corral.core.records import Capability, Model
from corral.serving.fitting import fitted_events
from corral.wire.errors import CorralError
from corral.wire.goprompt import ANY_OBJECT, GoPrompt, go_prompt, with_places
from corral.wire.gotemplate import Allowance
from corral.wire.native import Message
from corral.wire.options import Think
from corral.wire.splitting import CallSplitter, ThinkingSplitter
from corral.wire.templates import go_fields, go_has_thinking, jinja_has_thinking, jinja_has_tools, jinja_is_preferred

Event = Chunk | Finish

#: What templates may begin with and tokenizers add by themselves.
_BEGINNING = re.compile(r"<s>|<bos>|<BOS_TOKEN>|<\|begin_of_text\|>|<\|startoftext\|>|<｜begin▁of▁sentence｜>|\[BOS\]")
_SPECIAL = re.compile(r"<[^>]+>|\[[^\]]+\]")
_THINK_TAGS = ("<think>", "</think>")
_CALL_TAG = "<tool_call>"
_HARMONY = ("gptoss", "gpt-oss")
#: Up to here a prompt is made in less than a few milliseconds, by any template that people use: the most elaborate one known
#: takes 2600 steps for so many messages. Whoever wrote the template may have meant it to take long, so the steps are bounded too.
_FEW_MESSAGES, _FEW_CHARACTERS, _FEW_STEPS = 64, 256 * 1024, 4000
#: Ollama's names of parsers whose models think between those tags, and call behind that one, in JSON. What other names stand for,
#: known or not, is read by the engine, by the template inside the weights (docs/divergences.md).
_PARSERS_OF_TAGS = frozenset(
    {"qwen3-thinking", "qwen3.5", "qwen3-vl-thinking", "deepseek3", "cogito", "olmo3-think", "lfm2-thinking"}
)
_PARSERS_OF_CALLS = frozenset({"qwen3", "qwen3-thinking", "qwen3-vl-instruct", "qwen3-vl-thinking"})


def template_for(model: Model, *, prefers_go: bool | None) -> str:
    """The Go template that makes this model's prompts; empty when the template inside the weights does, or the engine's own for
    chats with weights that have none. prefers_go: what the operator said (OLLAMA_GO_TEMPLATE), None for nothing."""
    if not model.weights:
        return ""
    if not model.chat_template:
        return model.template
    # Ollama renders these by code of its own; the template inside the weights says the same.
    has_own_code = model.renderer or model.parser or model.details.family in _HARMONY
    if not model.template or has_own_code or prefers_go is False:
        return ""
    if prefers_go is None and jinja_is_preferred(model.chat_template, model.template):
        return ""
    return model.template


def described(model: Model, *, prefers_go: bool | None) -> Model:
    """The model as it is run: with one template, and what can be done by that one. prefers_go: as for template_for."""
    if not (model.weights and model.template and model.chat_template):
        return model
    is_go = bool(template_for(model, prefers_go=prefers_go))
    lacking = _only_by_the_other(model.template, model.chat_template, is_go=is_go)
    if model.parser or model.details.family in _HARMONY:
        lacking = frozenset()  # these can more than their templates tell
    return replace(model, capabilities=model.capabilities - lacking, chat_template="" if is_go else model.chat_template)


@lru_cache(maxsize=512)
def _only_by_the_other(template: str, chat_template: str, *, is_go: bool) -> frozenset[Capability]:
    """What a model with two templates can do by the one that is not chosen. Filling gaps goes by the Go template in any case."""
    by_jinja = {Capability.TOOLS: jinja_has_tools(chat_template), Capability.THINKING: jinja_has_thinking(chat_template)}
    by_go = {Capability.TOOLS: "tools" in go_fields(template), Capability.THINKING: go_has_thinking(template)}
    chosen, other = (by_go, by_jinja) if is_go else (by_jinja, by_go)
    return frozenset(name for name, can in other.items() if can and not chosen[name])


@dataclass(slots=True, kw_only=True)
class RenderedCall:
    """A chat and the template that makes its prompt. tools: None when the request has none. schema: of the answer. context:
    tokens that go before the prompt. tags: around thoughts, empty when none are expected. call_tag: before calls. raw: the
    engine's answer as it came, complete at its end."""

    template: GoPrompt
    messages: Sequence[Message]
    tools: Sequence[dict[str, Any]] | None
    think: Think
    today: date
    tags: tuple[str, str] = ("", "")
    call_tag: str = ANY_OBJECT
    schema: dict[str, Any] | None = None
    context: Sequence[int] = ()
    sampling: Sampling = field(default_factory=Sampling)
    raw: list[str] = field(default_factory=list)

    async def prompt(self) -> str:
        """For all messages. That of a long chat is made in a thread, since it can take a second. Raises: bad_request for what the
        template does wrong."""
        characters = sum(len(message.content) for message in self.messages)
        if len(self.messages) <= _FEW_MESSAGES and characters <= _FEW_CHARACTERS:
            return await made_by_template(self._rendered)
        return await asyncio.to_thread(self._rendered, Allowance())

    def _rendered(self, allowance: Allowance) -> str:
        messages = with_places(self.messages)[0]
        return self.template.chat(messages, self.tools, self.think, today=self.today, allowance=allowance)

    @property
    def media(self) -> list[bytes]:
        """The files of all messages, in the order of their places in the prompt."""
        return [data for message in self.messages for data in message.images]

    def completion(self, prompt: str) -> CompletionCall:
        """What the engine is asked, without the schema."""
        wanted = [self.call_tag] if self.tools and self.call_tag not in (ANY_OBJECT, "[") else []
        special = [match[0] if (match := _SPECIAL.match(tag)) else tag for tag in (*wanted, *self.tags) if tag]
        return CompletionCall(
            prompt=prompt,
            context=self.context,
            sampling=self.sampling,
            preserved_tokens=tuple(special),
            media=self.media,
        )

    def without(self, count: int) -> "RenderedCall":
        """The chat without the first so many messages, except those of the system among them."""
        kept = [message for message in self.messages[:count] if message.role == "system"]
        return replace(self, messages=[*kept, *self.messages[count:]])


async def made_by_template(make: Callable[[Allowance], str]) -> str:
    """What a template makes of little: at once where few steps do, else in a thread, from the start. Raises: as `make`."""
    few = Allowance(steps=_FEW_STEPS)
    try:
        return make(few)
    except CorralError:
        if few.steps >= 0:
            raise
    return await asyncio.to_thread(make, Allowance())


def rendered_call(
    model: Model,
    template: str,
    messages: Sequence[Message],
    *,
    tools: Sequence[dict[str, Any]] | None,
    think: Think,
    today: date,
    sampling: Sampling,
    schema: dict[str, Any] | None = None,
    context: Sequence[int] = (),
) -> RenderedCall:
    """Raises: bad_request for a template that cannot be read."""
    prompt = go_prompt(template)
    tags, call_tag = prompt.thinking_tags, prompt.call_tag
    has_tags = model.parser in _PARSERS_OF_TAGS or all(tag in model.chat_template for tag in _THINK_TAGS)
    if not all(tags) and has_tags:
        tags = _THINK_TAGS
    if call_tag == ANY_OBJECT and model.parser in _PARSERS_OF_CALLS:
        call_tag = _CALL_TAG
    if thinks_in_content(model):
        messages = without_old_thoughts(messages)
    return RenderedCall(
        template=prompt,
        messages=messages,
        tools=tools,
        think=think,
        today=today,
        tags=tags if think else ("", ""),
        call_tag=call_tag,
        schema=schema,
        context=context,
        sampling=completion_sampling(sampling),
    )


def completion_sampling(sampling: Sampling) -> Sampling:
    """Options of a chat in the words of a completion, which has its own for likelihoods."""
    values = {name: value for name, value in sampling.values.items() if name not in ("logprobs", "top_logprobs")}
    if sampling.values.get("logprobs"):
        values["n_probs"] = sampling.values["top_logprobs"]
    return Sampling(values=values)


def thinks_in_content(model: Model) -> bool:
    """Whether clients send back, as part of what the model said, what it thought: those that were written for it before there
    was a field for thoughts."""
    return model.details.family == "qwen3" or model.name.model == "deepseek-r1"


def without_old_thoughts(messages: Sequence[Message]) -> list[Message]:
    """Without what was thought before the last question; only what follows that keeps it."""
    last_question = max((index for index, message in enumerate(messages) if message.role == "user"), default=-1)
    return [
        _said(message) if message.role == "assistant" and index < last_question else message
        for index, message in enumerate(messages)
    ]


def _said(message: Message) -> Message:
    splitter = ThinkingSplitter(*_THINK_TAGS)
    content = splitter.feed(message.content)[1] + splitter.finish()[1]
    return msgspec.structs.replace(message, content=content)


# ── Running ──────────────────────────────────────────────────────────────────────────────────────────────────────────


async def rendered_events(
    runner: Runner, call: RenderedCall, *, context_length: int, truncate: bool, shift: bool = True
) -> AsyncGenerator[Event, None]:
    """The events of a rendered chat, thoughts and calls told apart. truncate, shift: as fitted_events. Raises: as that."""
    prompt = await _without_second_beginning(runner, await call.prompt())
    splitter = _Splitter(call, prompt)
    completion = call.completion(prompt)
    thinks_first = call.schema is not None and splitter.expects_thoughts
    first = completion if thinks_first else replace(completion, grammar_schema=call.schema)
    tokens, kept = 0, call

    async def shorter(count: int) -> CompletionCall:
        nonlocal prompt, kept
        kept = call.without(count)
        prompt = await _without_second_beginning(runner, await kept.prompt())
        return replace(first, prompt=prompt, media=kept.media)

    # An earlier answer's tokens are not messages that could be left out.
    droppable = 0 if call.context else len(call.messages) - 1
    events = fitted_events(
        runner, first, context_length=context_length, truncate=truncate, shift=shift, shorter=shorter, droppable=droppable
    )
    async with aclosing(events) as answer:
        async for event in answer:
            if isinstance(event, Finish):
                for chunk in splitter.finish():
                    yield chunk
                yield event
                return
            tokens += 1
            call.raw.append(event.content)
            chunk = splitter.split(event)
            if thinks_first and chunk.content.strip():
                # Here the schema begins: what was said from here on is asked for again, under it.
                call.raw[:] = ["".join(call.raw).removesuffix(chunk.content)]
                yield replace(chunk, content="", logprobs=())
                break
            yield chunk
        else:
            return
    async for event in _continued(runner, kept, prompt, tokens, context_length=context_length, shift=shift):
        yield event


async def _continued(
    runner: Runner, call: RenderedCall, prompt: str, tokens: int, *, context_length: int, shift: bool
) -> AsyncGenerator[Event, None]:
    """The answer under its schema, behind the thoughts. tokens: how many those were; they count as said, not as read."""
    completion = replace(call.completion(prompt + call.raw[0]), grammar_schema=call.schema)
    events = fitted_events(runner, completion, context_length=context_length, truncate=False, shift=shift)
    async with aclosing(events) as answer:
        async for event in answer:
            if isinstance(event, Finish):
                timings = event.timings
                yield replace(
                    event,
                    timings=replace(
                        timings,
                        prompt_tokens=max(0, timings.prompt_tokens - tokens),
                        eval_tokens=timings.eval_tokens + tokens,
                    ),
                )
            else:
                call.raw.append(event.content)
                yield event


async def _without_second_beginning(runner: Runner, prompt: str) -> str:
    """The prompt without a first token that the tokenizer adds by itself: models answer worse when it comes twice."""
    match = _BEGINNING.match(prompt)
    if match is None:
        return prompt
    tokens = await runner.tokenize(match[0], add_special=True)
    return prompt[match.end() :] if len(tokens) > 1 and tokens[0] == tokens[1] else prompt


class _Splitter:
    """Chunks of text in, chunks with their parts told apart out."""

    def __init__(self, call: RenderedCall, prompt: str) -> None:
        opening, closing = call.tags
        self.expects_thoughts = bool(opening and closing)
        is_inside = self.expects_thoughts and prompt.rstrip().endswith(opening)
        self._thoughts = ThinkingSplitter(opening, closing, is_inside=is_inside) if self.expects_thoughts else None
        names = [str((tool.get("function") or {}).get("name", "")) for tool in call.tools or ()]
        self._calls = CallSplitter(call.call_tag, [name for name in names if name]) if any(names) else None

    def split(self, chunk: Chunk) -> Chunk:
        thoughts, content = self._thoughts.feed(chunk.content) if self._thoughts else ("", chunk.content)
        content, calls = self._calls.feed(content) if self._calls and content else (content, [])
        return Chunk(content=content, thinking=thoughts, tool_calls=calls, logprobs=chunk.logprobs)

    def finish(self) -> list[Chunk]:
        """What was held back, if anything."""
        thoughts, content = self._thoughts.finish() if self._thoughts else ("", "")
        calls: list[dict[str, Any]] = []
        if self._calls:
            content, calls = self._calls.feed(content)
            content += self._calls.finish()
        return [Chunk(content=content, thinking=thoughts, tool_calls=calls)] if content or thoughts or calls else []


async def prompt_read(runner: Runner, call: "ChatCall | CompletionCall | RenderedCall") -> str:
    """The prompt as text that the engine's tokenizer begins by itself."""
    prompt = await rendered_prompt(runner, call)
    return await _without_second_beginning(runner, prompt) if isinstance(call, RenderedCall) else prompt


async def rendered_prompt(runner: Runner, call: "ChatCall | CompletionCall | RenderedCall") -> str:
    """The prompt that the template gives, for people to look at."""
    return await runner.apply_template(call) if isinstance(call, ChatCall) else await _prompt_of(call)


async def _prompt_of(call: CompletionCall | RenderedCall) -> str:
    return call.prompt if isinstance(call, CompletionCall) else await call.prompt()
