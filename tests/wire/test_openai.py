"""The OpenAI dialect: requests become native ones, native events become exactly the frames of the reference trace."""

import json
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from corral.wire.errors import CorralError
from corral.wire.names import parse_name
from corral.wire.native import ChatResponse, Logprob, Message, ToolCall, ToolCallFunction, decode
from corral.wire.openai import (
    ChatCompletionRequest,
    ChatStream,
    NativeChatCompletion,
    chat_completion,
    model_object,
    to_native,
    usage_in_tail,
    usage_of,
)
from fakes import NOON

PIXEL = "iVBORw0KGgo="
CALL = {"id": "call_1", "index": 0, "type": "function", "function": {"name": "f", "arguments": '{"b":1,"a":2}'}}


def native(**fields: Any) -> NativeChatCompletion:
    body = {"model": "m", "messages": [{"role": "user", "content": "hi"}], **fields}
    return to_native(decode(json.dumps(body).encode(), ChatCompletionRequest))


def refused(**fields: Any) -> str:
    with pytest.raises(CorralError) as caught:
        native(**fields)
    assert caught.value.status == 400
    return caught.value.message


def event(
    content: str = "", *, thinking: str = "", calls: list[ToolCall] | None = None, done: bool = False, **fields: Any
) -> ChatResponse:
    message = Message(role="assistant", content=content, thinking=thinking, tool_calls=calls or [])
    return ChatResponse(model="m", created_at="1970-01-01T00:00:01.9Z", message=message, done=done, **fields)


def call(index: int = 0) -> ToolCall:
    return ToolCall(id="call_1", function=ToolCallFunction(index=index, name="f", arguments={"city": "Oslo"}))


def frames(*events: ChatResponse, includes_usage: bool = False) -> list[str]:
    encoder = ChatStream("chatcmpl-7", includes_usage=includes_usage)
    text = b"".join(map(encoder.encode, events)).decode()
    assert text.endswith("\n\n")
    return text.removesuffix("\n\n").split("\n\n")


def chunk(delta: dict[str, Any], finish_reason: str | None = None, **fields: Any) -> str:
    choice = {"index": 0, "delta": delta, "finish_reason": finish_reason, **fields}
    return (
        'data: {"id":"chatcmpl-7","object":"chat.completion.chunk","created":1,"model":"m","system_fingerprint":"fp_ollama",'
        f'"choices":[{msgspec.json.encode(choice).decode()}]}}'
    )


# ── Requests ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_request_without_options_gets_openais_defaults() -> None:
    request = native()
    assert request.options == {"temperature": 1.0, "top_p": 1.0}
    assert (request.think, request.format, request.tools, request.wants_stream) == (None, None, [], False)
    assert request.path == "/v1/chat/completions"


def test_request_options_are_mapped() -> None:
    request = native(
        max_tokens=5, seed=1, stop="x", temperature=0, top_p=0.5, frequency_penalty=0.1, presence_penalty=0.2, stream=True
    )
    assert request.options == {
        "num_predict": 5,
        "seed": 1,
        "stop": ["x"],
        "temperature": 0.0,
        "top_p": 0.5,
        "frequency_penalty": 0.1,
        "presence_penalty": 0.2,
    }
    assert request.wants_stream


def test_request_max_completion_tokens_counts_and_wins() -> None:
    assert native(max_completion_tokens=3, max_tokens=9).options["num_predict"] == 3


def test_request_stop_list_keeps_its_texts() -> None:
    assert native(stop=["a", 1, "b"]).options["stop"] == ["a", "b"]


def test_request_ignores_what_has_no_meaning_here() -> None:
    request = native(n=2, user="u", logit_bias={"1": 2}, parallel_tool_calls=True)
    assert request.options == {"temperature": 1.0, "top_p": 1.0}


@pytest.mark.parametrize(
    ("effort", "think"),
    [
        ("none", False),
        ("minimal", "low"),
        ("low", "low"),
        ("medium", "medium"),
        ("high", "high"),
        ("xhigh", "max"),
        ("ultra", "max"),
        ("max", "max"),
        ("", None),
    ],
)
def test_request_effort_becomes_think(effort: str, think: object) -> None:
    assert native(reasoning_effort=effort).think == think
    assert native(reasoning={"effort": effort}, reasoning_effort="bad").think == think


def test_request_effort_unknown_names_the_efforts() -> None:
    assert refused(reasoning_effort="x") == (
        'invalid reasoning value: "x" (must be "minimal", "low", "medium", "high", "xhigh", "ultra", "max", or "none")'
    )


@pytest.mark.parametrize(
    ("wanted", "sent"),
    [
        ({"type": "text"}, None),
        ({"type": "json_object"}, "json"),
        ({"type": " JSON_schema ", "json_schema": {"name": "x", "schema": {"b": 1, "a": 2}}}, {"b": 1, "a": 2}),
        ({"type": "json_schema"}, None),
        (None, None),
    ],
)
def test_request_response_format_becomes_format(wanted: object, sent: object) -> None:
    assert native(response_format=wanted).format == sent


TOOLS = [{"type": "function", "function": {"name": name, "parameters": {"type": "object", "$comment": "kept"}}} for name in "fg"]


def test_request_tools_are_kept_as_they_are() -> None:
    assert native(tools=TOOLS, tool_choice="auto").tools == TOOLS


def test_request_tool_choice_picks_what_the_model_is_shown() -> None:
    assert native(tools=TOOLS, tool_choice="none").tools == []
    assert native(tools=TOOLS, tool_choice={"type": "function", "function": {"name": "g"}}).tools == TOOLS[1:]


def test_request_without_messages_answers_ollamas_text() -> None:
    assert refused(messages=[]) == "[] is too short - 'messages'"


def test_request_without_body_answers_ollamas_text() -> None:
    with pytest.raises(CorralError, match="EOF"):
        decode(b"", ChatCompletionRequest, empty="EOF")


def test_message_parts_stay_one_message() -> None:
    parts = [
        {"type": "text", "text": "a"},
        {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{PIXEL}"}},
        {"type": "text", "text": "b"},
        {"type": "image_url", "image_url": f"data:;base64,{PIXEL}"},
        {"type": "input_audio", "input_audio": {"data": "aGk=", "format": "wav"}},
    ]
    (message,) = native(messages=[{"role": "User", "content": parts}]).messages
    pixel = b"\x89PNG\r\n\x1a\n"
    assert message == Message(role="user", content="a\nb", images=[pixel, pixel, b"hi"])


def test_message_calls_and_their_answer_are_joined_by_id() -> None:
    asked = {"role": "assistant", "content": None, "reasoning": "r", "tool_calls": [CALL]}
    answer = {"role": "tool", "content": "42", "tool_call_id": "call_1"}
    first, second = native(messages=[asked, answer]).messages
    assert first.thinking == "r"
    assert list(first.tool_calls[0].function.arguments.items()) == [("b", 1), ("a", 2)]
    assert (second.role, second.tool_name, second.tool_call_id) == ("tool", "f", "call_1")


def test_message_answer_keeps_its_own_name_and_an_unknown_id_gives_none() -> None:
    named = {"role": "tool", "content": "", "tool_call_id": "x", "name": "g"}
    unnamed = {"role": "tool", "content": "", "tool_call_id": "x"}
    bare = {"role": "tool", "content": ""}
    assert [message.tool_name for message in native(messages=[named, unnamed, bare]).messages] == ["g", "", ""]


@pytest.mark.parametrize(
    ("message", "text"),
    [
        ({"role": "user", "content": None}, "invalid message content type: <nil>"),
        ({"role": "user"}, "invalid message content type: <nil>"),
        ({"role": "user", "content": 1}, "invalid message content type: float64"),
        ({"role": "user", "content": ["x"]}, "invalid message format"),
        ({"role": "user", "content": [{"type": "text"}]}, "invalid message format"),
        ({"role": "user", "content": [{"type": "file"}]}, "invalid message format"),
        ({"role": "user", "content": [{"type": "image_url"}]}, "invalid message format"),
        ({"role": "user", "content": [{"type": "input_audio"}]}, "invalid input_audio format"),
        ({"role": "user", "content": [{"type": "input_audio", "input_audio": {"data": "!"}}]}, "invalid input_audio base64 data"),
        (
            {"role": "user", "content": [{"type": "image_url", "image_url": "https://x/a.png"}]},
            "image URLs are not currently supported, please use base64 encoded data instead",
        ),
        ({"role": "user", "content": [{"type": "image_url", "image_url": "file:///etc/passwd"}]}, "invalid image input"),
        ({"role": "user", "content": [{"type": "image_url", "image_url": "data:image/svg;base64,aGk="}]}, "invalid image input"),
        ({"role": "user", "content": [{"type": "image_url", "image_url": "data:;base64,!"}]}, "invalid image input"),
        ({"role": "user", "content": [{"type": "image_url", "image_url": "data:;base64,é"}]}, "invalid image input"),
        (
            {"role": "assistant", "tool_calls": [{"id": "1", "function": {"name": "f", "arguments": "[]"}}]},
            "invalid tool call arguments",
        ),
    ],
)
def test_message_that_means_nothing_answers_ollamas_text(message: dict[str, Any], text: str) -> None:
    assert refused(messages=[message]) == text


# ── Streams ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_stream_with_usage_is_the_trace() -> None:
    final = event(done=True, done_reason="stop", prompt_eval_count=3, eval_count=2)
    assert frames(event("Hel"), event("lo"), final, includes_usage=True) == [
        chunk({"role": "assistant", "content": "Hel"}),
        chunk({"content": "lo"}),
        chunk({}, "stop"),
        'data: {"id":"chatcmpl-7","object":"chat.completion.chunk","created":1,"model":"m","system_fingerprint":"fp_ollama",'
        '"choices":[],"usage":{"prompt_tokens":3,"completion_tokens":2,"total_tokens":5}}',
        "data: [DONE]",
    ]


def test_stream_without_usage_never_mentions_it() -> None:
    assert frames(event("a"), event(done=True, done_reason="length"))[-2:] == [chunk({}, "length"), "data: [DONE]"]


def test_stream_of_nothing_still_opens_with_the_role() -> None:
    assert frames(event(done=True, done_reason="stop")) == [
        chunk({"role": "assistant", "content": ""}),
        chunk({}, "stop"),
        "data: [DONE]",
    ]


def test_stream_thinking_is_reasoning_with_empty_content() -> None:
    assert frames(event(thinking="hm"))[0] == chunk({"role": "assistant", "content": "", "reasoning": "hm"})


def test_stream_event_with_thinking_and_answer_is_split() -> None:
    token = Logprob(token="a", logprob=0.0)
    first, second = frames(event("a", thinking="hm", logprobs=[token]))
    assert first == chunk({"role": "assistant", "reasoning": "hm"}, logprobs={"content": [{"token": "a", "logprob": 0.0}]})
    assert second == chunk({"content": "a"})


def test_stream_calls_in_the_last_event_are_sent_and_named_as_the_reason() -> None:
    arguments = '{"city":"Oslo"}'
    sent = {"id": "call_1", "index": 0, "type": "function", "function": {"name": "f", "arguments": arguments}}
    assert frames(event("a"), event(calls=[call()], done=True, done_reason="stop")) == [
        chunk({"role": "assistant", "content": "a"}),
        chunk({"content": "", "tool_calls": [sent]}),
        chunk({}, "tool_calls"),
        "data: [DONE]",
    ]


def test_stream_cut_by_length_stays_length_with_calls() -> None:
    assert frames(event(calls=[call()], done=True, done_reason="length"))[1] == chunk({}, "length")


def test_stream_uses_one_time_for_all_chunks() -> None:
    encoder = ChatStream("x", includes_usage=False)
    encoder.encode(event("a"))
    later = msgspec.structs.replace(event("b"), created_at="2026-08-22T10:00:00Z")
    assert b'"created":1,' in encoder.encode(later)


# ── Whole answers ────────────────────────────────────────────────────────────────────────────────────────────────────


def test_completion_has_ollamas_form() -> None:
    response = event("Hi", thinking="hm", done=True, done_reason="stop", prompt_eval_count=3, eval_count=2)
    assert msgspec.json.encode(chat_completion("chatcmpl-7", response)).decode() == (
        '{"id":"chatcmpl-7","object":"chat.completion","created":1,"model":"m","system_fingerprint":"fp_ollama",'
        '"choices":[{"index":0,"message":{"role":"assistant","content":"Hi","reasoning":"hm"},"finish_reason":"stop"}],'
        '"usage":{"prompt_tokens":3,"completion_tokens":2,"total_tokens":5}}'
    )


def test_completion_with_calls_and_logprobs() -> None:
    token = Logprob(token="a", logprob=0.0)
    completion = json.loads(
        msgspec.json.encode(chat_completion("x", event(calls=[call(1)], done=True, done_reason="stop", logprobs=[token])))
    )
    (choice,) = completion["choices"]
    assert choice["finish_reason"] == "tool_calls"
    assert choice["message"]["tool_calls"] == [
        {"id": "call_1", "index": 1, "type": "function", "function": {"name": "f", "arguments": '{"city":"Oslo"}'}}
    ]
    assert choice["logprobs"] == {"content": [{"token": "a", "logprob": 0.0}]}


def test_completion_without_reason_says_null() -> None:
    assert chat_completion("x", event(done=True))["choices"][0]["finish_reason"] is None


def test_model_object_names_the_owner() -> None:
    assert model_object("m:latest", parse_name("ada/m"), NOON) == {
        "id": "m:latest",
        "object": "model",
        "created": 1790000000,
        "owned_by": "ada",
    }


# ── Counting ─────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("body", "counted"),
    [
        (b'{"id":"x","usage":{"prompt_tokens":3,"completion_tokens":2,"total_tokens":5}}', (3, 2)),
        (b'{"usage":{"prompt_tokens":3}}', (3, 0)),
        (b'{"usage":{"prompt_tokens":99999999999,"completion_tokens":1}}', (2**31 - 1, 1)),
        (b'{"usage":null}', None),
        (b"{}", None),
        (b'{"usage":{"prompt_tokens":-1,"completion_tokens":2}}', None),
        (b'{"usage":{"prompt_tokens":1e308}}', None),
        (b"not json", None),
        (b"\xff", None),
    ],
)
def test_usage_of_an_upstream_is_believed_within_reason(body: bytes, counted: tuple[int, int] | None) -> None:
    assert usage_of(body) == counted


def test_usage_of_a_stream_is_in_its_last_events() -> None:
    usage = b'data: {"choices":[],"usage":{"prompt_tokens":3,"completion_tokens":2}}\n\n'
    assert usage_in_tail(b'","x":1}\n\n' + usage + b"data: [DONE]\n\n") == (3, 2)
    assert usage_in_tail(usage.removesuffix(b"\n\n")) == (3, 2)


@pytest.mark.parametrize(
    "tail", [b"", b"data: [DONE]\n\n", b'{"usage":{}}', b'data: {"usage"', b'data: {"content":"\\"usage\\""}\n\n']
)
def test_usage_of_a_stream_that_states_none_is_none(tail: bytes) -> None:
    assert usage_in_tail(tail) is None


@given(st.binary(max_size=100))
def test_usage_of_any_bytes_is_none_or_counts(tail: bytes) -> None:
    for counted in (usage_of(tail), usage_in_tail(b'data: {"usage"' + tail)):
        assert counted is None or min(counted) >= 0
