"""Anthropic's dialect: requests become native ones, native events become exactly the events of the reference trace."""

import json
from contextlib import suppress
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from corral.wire.anthropic import (
    CountTokensRequest,
    MessagesRequest,
    MessageStream,
    NativeMessages,
    count_response,
    messages_response,
    to_native,
    to_native_count,
)
from corral.wire.errors import CorralError
from corral.wire.frames import SseDecoder, anthropic_error
from corral.wire.native import ChatResponse, Message, ToolCall, ToolCallFunction, decode, estimated_tokens
from corral.wire.web_search import FUNCTION

PIXEL = "iVBORw0KGgo="
IMAGE = {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": PIXEL}}
USE = {"type": "tool_use", "id": "toolu_1", "name": "get_weather", "input": {"city": "Oslo", "at": 1}}
WEATHER = {"name": "get_weather", "description": "Weather", "input_schema": {"type": "object", "properties": {"city": {}}}}
SHOWN = {
    "type": "function",
    "function": {"name": "get_weather", "description": "Weather", "parameters": {"type": "object", "properties": {"city": {}}}},
}


def native(**fields: Any) -> NativeMessages:
    body = {"model": "m", "max_tokens": 9, "messages": [{"role": "user", "content": "hi"}], **fields}
    return to_native(decode(json.dumps(body).encode(), MessagesRequest))


def turns(*messages: tuple[str, Any], **fields: Any) -> list[Message]:
    return native(messages=[{"role": role, "content": content} for role, content in messages], **fields).messages


def refused(**fields: Any) -> str:
    with pytest.raises(CorralError) as caught:
        native(**fields)
    assert (caught.value.code, caught.value.status) == ("bad_request", 400)
    return caught.value.message


def event(
    content: str = "", *, thinking: str = "", calls: list[ToolCall] | None = None, done_reason: str = "", **fields: Any
) -> ChatResponse:
    message = Message(role="assistant", content=content, thinking=thinking, tool_calls=calls or [])
    created_at = "1970-01-01T00:00:01.9Z"
    return ChatResponse(
        model="m", created_at=created_at, message=message, done=bool(done_reason), done_reason=done_reason, **fields
    )


def call(call_id: str = "call_1") -> ToolCall:
    return ToolCall(id=call_id, function=ToolCallFunction(name="get_weather", arguments={"city": "Oslo"}))


END = event(done_reason="stop", prompt_eval_count=9, eval_count=2)


def stream(*events: ChatResponse, estimate: int = 4) -> str:
    encoder = MessageStream("msg_7", "m", estimate=estimate)
    return b"".join(map(encoder.encode, events)).decode()


def shown(*events: ChatResponse) -> list[str]:
    """The data of all events, without those that every stream has at its ends."""
    found = [item.data.decode() for item in SseDecoder().feed(stream(*events).encode())]
    return found[1:-2]


# ── Requests ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_request_injects_no_defaults() -> None:
    request = native()
    assert request.options == {"num_predict": 9}
    assert (request.think, request.format, request.tools, request.wants_stream) == (None, None, [], False)
    assert (request.path, request.relaxes_thinking) == ("/v1/messages", True)
    assert request.messages == [Message(role="user", content="hi")]


def test_request_options_are_mapped() -> None:
    request = native(temperature=0, top_p=0.5, top_k=3, stop_sequences=["x"], stream=True, metadata={"user_id": "u"})
    assert request.options == {"num_predict": 9, "temperature": 0, "top_p": 0.5, "top_k": 3, "stop": ["x"]}
    assert request.wants_stream


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({"model": "", "max_tokens": 0}, "model is required"),
        ({"max_tokens": 0, "messages": []}, "max_tokens is required and must be positive"),
        ({"max_tokens": -1}, "max_tokens is required and must be positive"),
        ({"messages": []}, "messages is required"),
        ({"messages": [{"role": "user"}]}, "messages[0]: content must be a string or a list of blocks"),
        ({"messages": [{"role": "user", "content": ["x"]}]}, "messages[0]: Expected `object`, got `str` - at `$[0]`"),
    ],
)
def test_request_without_what_it_needs_is_refused_in_this_order(fields: dict[str, Any], text: str) -> None:
    assert refused(**fields) == text


@pytest.mark.parametrize(
    ("fields", "think"),
    [
        ({"thinking": {"type": "enabled", "budget_tokens": 1024}}, True),
        ({"thinking": {"type": "disabled"}, "output_config": {"effort": "high"}}, False),
        ({"thinking": {"type": "adaptive"}}, None),
        ({"output_config": {"effort": " High "}}, "high"),
        ({"output_config": {"effort": "xhigh"}}, "high"),
        ({"output_config": {"effort": "max"}}, "max"),
        ({"output_config": {"effort": "enormous"}}, None),
        ({"output_config": {}}, None),
    ],
)
def test_thinking_is_asked_for_by_either_field(fields: dict[str, Any], think: Any) -> None:
    assert native(**fields).think == think


@pytest.mark.parametrize(
    ("system", "text"),
    [
        ("be brief", "be brief"),
        ([{"type": "text", "text": "be "}, {"type": "text", "text": "brief", "cache_control": {}}], "be brief"),
        ([{"type": "image"}, {"type": "text"}, "x"], ""),
        ("", ""),
        (5, ""),
    ],
)
def test_system_becomes_the_first_message(system: Any, text: str) -> None:
    expected = [Message(role="system", content=text)] if text else []
    assert native(system=system).messages == [*expected, Message(role="user", content="hi")]


def test_text_and_images_of_a_message_stay_one_message() -> None:
    blocks = [{"type": "text", "text": "a"}, IMAGE, {"type": "text", "text": "b"}, {"type": "text"}, {"type": "novel"}, {}]
    assert turns(("USER", blocks)) == [Message(role="user", content="ab", images=[b"\x89PNG\r\n\x1a\n"])]
    assert turns(("user", [{"type": "novel"}])) == []


def test_answer_with_thinking_and_calls_is_one_message() -> None:
    blocks = [
        {"type": "thinking", "thinking": "hm", "signature": "s"},
        {"type": "text", "text": "let me see", "citations": None},
        USE,
        {"type": "tool_use", "id": "2", "name": "now"},
    ]
    assert turns(("assistant", blocks)) == [
        Message(
            role="assistant",
            content="let me see",
            thinking="hm",
            tool_calls=[
                ToolCall(id="toolu_1", function=ToolCallFunction(name="get_weather", arguments={"city": "Oslo", "at": 1})),
                ToolCall(id="2", function=ToolCallFunction(name="now", arguments={})),
            ],
        )
    ]


def test_results_come_before_what_the_caller_says_beside_them() -> None:
    result = {"type": "tool_result", "tool_use_id": "toolu_1", "content": [{"type": "text", "text": "rain"}, IMAGE, "x", {}]}
    *_, first, second, said = turns(
        ("assistant", [USE]),
        ("user", [{"type": "text", "text": "well?"}, result, {"type": "tool_result", "tool_use_id": "?", "content": "sun"}]),
    )
    assert (first.role, first.content, first.tool_call_id, first.tool_name) == ("tool", "rain", "toolu_1", "get_weather")
    assert first.images == [b"\x89PNG\r\n\x1a\n"]
    assert (second.content, second.tool_call_id, second.tool_name) == ("sun", "?", "")
    assert (said.role, said.content) == ("user", "well?")


def test_result_of_another_role_follows_what_it_said() -> None:
    said, result = turns(("assistant", [{"type": "tool_result", "tool_use_id": "1"}, {"type": "text", "text": "a"}]))
    assert (said.content, result.role, result.content) == ("a", "tool", "")


@pytest.mark.parametrize(
    ("content", "text"),
    [
        ("found", "found"),
        (
            [
                {"type": "web_search_result", "title": "T", "url": "https://x"},
                {"type": "web_search_result"},
                {"type": "novel"},
                5,
            ],
            "- T: https://x\n- : \n",
        ),
        ({"type": "web_search_tool_result_error", "error_code": "unavailable"}, "web_search_tool_result_error: unavailable"),
        ([{"type": "web_search_tool_result_error"}], "web_search_tool_result_error"),
        (None, ""),
    ],
)
def test_earlier_search_is_told_to_the_model(content: Any, text: str) -> None:
    use = {"type": "server_tool_use", "id": "s1", "name": "web_search", "input": {"query": "q"}}
    result = {"type": "web_search_tool_result", "tool_use_id": "s1", "content": content}
    asked, found = turns(("assistant", [use, result]))
    assert asked.tool_calls[0].function.arguments == {"query": "q"}
    assert (found.role, found.content, found.tool_name) == ("tool", text, "web_search")


@pytest.mark.parametrize(
    ("block", "text"),
    [
        ({"type": "tool_use", "name": "f"}, "tool_use block missing required 'id' field"),
        ({"type": "tool_use", "id": "1", "name": ""}, "tool_use block missing required 'name' field"),
        ({"type": "tool_use", "id": "1", "name": "f", "input": "x"}, "the input of a tool_use block must be an object"),
        ({"type": "image"}, "invalid image source"),
        (
            {"type": "image", "source": {"type": "url", "url": "https://x"}},
            "invalid image source type: url. Only base64 images are supported.",
        ),
        ({"type": "image", "source": {}}, "invalid image source type: . Only base64 images are supported."),
        ({"type": "image", "source": {"type": "base64", "data": "?"}}, None),
        ({"type": "tool_result", "content": [{"type": "image", "source": 5}]}, "invalid tool_result image source"),
    ],
)
def test_block_that_cannot_be_used_is_refused(block: dict[str, Any], text: str | None) -> None:
    found = refused(messages=[{"role": "user", "content": [block]}])
    assert found == text or (text is None and found.startswith("invalid base64 image data: "))


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"format": {"type": "json_schema", "schema": {"type": "object"}}}, {"type": "object"}),
        ({"format": {"type": "novel"}}, None),
        ({"format": None}, None),
    ],
)
def test_output_format_is_mapped(config: dict[str, Any], expected: Any) -> None:
    assert native(output_config=config).format == expected


def test_tools_are_shown_as_functions_and_what_nobody_runs_is_not() -> None:
    search = {"type": "web_search_20250305", "name": "web_search", "max_uses": 3}
    fetch = {"type": "web_fetch_20260318", "name": "web_fetch"}
    shell = {"type": "bash_20250124", "name": "bash"}
    function = {"name": "bash", "description": "", "parameters": {"type": "object", "properties": {}}}
    assert native(tools=[WEATHER, search, fetch, shell]).tools == [SHOWN, {"type": "function", "function": function}, FUNCTION]


@pytest.mark.parametrize(
    ("choice", "names"),
    [
        ({"type": "auto"}, ["get_weather", "f"]),
        ({"type": "any"}, ["get_weather", "f"]),
        ({"type": "tool", "name": "f"}, ["f"]),
        ({"type": "none"}, []),
    ],
)
def test_tool_choice_chooses_what_the_model_is_shown(choice: dict[str, str], names: list[str]) -> None:
    request = native(tools=[WEATHER, {"name": "f"}], tool_choice=choice)
    assert [tool["function"]["name"] for tool in request.tools] == names


def test_count_takes_what_goes_into_the_prompt_and_needs_no_limit() -> None:
    body = {"model": "m", "messages": [{"role": "user", "content": "hi"}], "tools": [WEATHER], "system": "s"}
    request = to_native_count(decode(json.dumps(body).encode(), CountTokensRequest))
    assert [message.role for message in request.messages] == ["system", "user"]
    assert (request.tools, request.path) == ([SHOWN], "/v1/messages/count_tokens")
    for missing in ("model", "messages"):
        with pytest.raises(CorralError, match=f"{missing} is required"):
            to_native_count(decode(json.dumps({**body, missing: None}).encode(), CountTokensRequest))
    assert count_response(5) == {"input_tokens": 5}


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-9, 9) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["type", "text", "source", "id"]), inner),
    max_leaves=6,
)
BLOCKS = st.sampled_from(["text", "image", "tool_use", "tool_result", "thinking", "web_search_tool_result", "novel"])
MEMBERS = st.sampled_from(["text", "thinking", "source", "id", "name", "input", "content", "tool_use_id"])


@given(st.lists(st.builds(lambda kind, rest: {**rest, "type": kind}, BLOCKS, st.dictionaries(MEMBERS, JSON)), max_size=4))
def test_any_blocks_are_understood_or_refused(blocks: list[Any]) -> None:
    with suppress(CorralError):
        assert all(isinstance(message.content, str) for message in turns(("user", blocks)))


# ── Answers ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_whole_answer_holds_thinking_text_and_calls() -> None:
    response = event("Hi", thinking="hm", calls=[call()], done_reason="stop", prompt_eval_count=9, eval_count=2)
    assert msgspec.json.encode(messages_response("msg_7", response)) == msgspec.json.encode(
        {
            "id": "msg_7",
            "type": "message",
            "role": "assistant",
            "model": "m",
            "content": [
                {"type": "thinking", "thinking": "hm"},
                {"type": "text", "text": "Hi"},
                {"type": "tool_use", "id": "call_1", "name": "get_weather", "input": {"city": "Oslo"}},
            ],
            "stop_reason": "tool_use",
            "usage": {"input_tokens": 9, "output_tokens": 2},
        }
    )


@pytest.mark.parametrize(
    ("done_reason", "stop_reason"), [("stop", "end_turn"), ("length", "max_tokens"), ("load", "stop_sequence"), ("", None)]
)
def test_stop_reason_is_in_anthropics_words(done_reason: str, stop_reason: str | None) -> None:
    assert messages_response("msg_7", event(done_reason=done_reason)).get("stop_reason") == stop_reason
    assert messages_response("msg_7", event(done_reason=done_reason))["content"] == []


def test_stream_is_the_reference_trace() -> None:
    start = '{"id":"msg_7","type":"message","role":"assistant","model":"m","content":[],"usage":'
    assert stream(event("Hi"), END) == (
        "event: message_start\n"
        f'data: {{"type":"message_start","message":{start}{{"input_tokens":4,"output_tokens":0}}}}}}\n\n'
        "event: content_block_start\n"
        'data: {"type":"content_block_start","index":0,"content_block":{"type":"text","text":""}}\n\n'
        "event: content_block_delta\n"
        'data: {"type":"content_block_delta","index":0,"delta":{"type":"text_delta","text":"Hi"}}\n\n'
        "event: content_block_stop\n"
        'data: {"type":"content_block_stop","index":0}\n\n'
        "event: message_delta\n"
        'data: {"type":"message_delta","delta":{"stop_reason":"end_turn"},"usage":{"input_tokens":9,"output_tokens":2}}\n\n'
        "event: message_stop\n"
        'data: {"type":"message_stop"}\n\n'
    )


def test_stream_of_nothing_has_no_block() -> None:
    names = [item.name for item in SseDecoder().feed(stream(END).encode())]
    assert names == ["message_start", "message_delta", "message_stop"]


def test_first_event_that_knows_the_prompt_states_it() -> None:
    assert '"usage":{"input_tokens":9,"output_tokens":0}' in stream(END)


def test_thinking_text_and_calls_are_blocks_in_a_row() -> None:
    assert shown(
        event(thinking="h"), event(thinking="m"), event("Hi"), event("!"), event(calls=[call(), call("call_2")]), END
    ) == [
        '{"type":"content_block_start","index":0,"content_block":{"type":"thinking","thinking":""}}',
        '{"type":"content_block_delta","index":0,"delta":{"type":"thinking_delta","thinking":"h"}}',
        '{"type":"content_block_delta","index":0,"delta":{"type":"thinking_delta","thinking":"m"}}',
        '{"type":"content_block_stop","index":0}',
        '{"type":"content_block_start","index":1,"content_block":{"type":"text","text":""}}',
        '{"type":"content_block_delta","index":1,"delta":{"type":"text_delta","text":"Hi"}}',
        '{"type":"content_block_delta","index":1,"delta":{"type":"text_delta","text":"!"}}',
        '{"type":"content_block_stop","index":1}',
        '{"type":"content_block_start","index":2,"content_block":'
        '{"type":"tool_use","id":"call_1","name":"get_weather","input":{}}}',
        '{"type":"content_block_delta","index":2,"delta":{"type":"input_json_delta","partial_json":"{\\"city\\":\\"Oslo\\"}"}}',
        '{"type":"content_block_stop","index":2}',
        '{"type":"content_block_start","index":3,"content_block":'
        '{"type":"tool_use","id":"call_2","name":"get_weather","input":{}}}',
        '{"type":"content_block_delta","index":3,"delta":{"type":"input_json_delta","partial_json":"{\\"city\\":\\"Oslo\\"}"}}',
        '{"type":"content_block_stop","index":3}',
    ]


def test_calls_in_the_last_event_make_the_stop_reason() -> None:
    text = stream(event(thinking="h"), event(calls=[call()], done_reason="stop"))
    assert '"delta":{"stop_reason":"tool_use"}' in text
    assert text.count("content_block_stop\n") == 2


def test_thinking_after_text_is_a_block_of_its_own() -> None:
    found = shown(event("a"), event(thinking="b"), event("c"), END)
    assert [json.loads(item)["content_block"]["type"] for item in found if "content_block_start" in item] == [
        "text",
        "thinking",
        "text",
    ]


def test_answer_without_a_reason_says_none() -> None:
    last = ChatResponse(model="m", created_at="x", message=Message(role="assistant", content=""), done=True)
    assert '"delta":{},"usage"' in stream(last)


def test_error_after_the_stream_began_is_an_event_of_its_own() -> None:
    assert anthropic_error(CorralError("busy", "later")) == (
        b'event: error\ndata: {"type":"error","error":{"type":"overloaded_error","message":"later"}}\n\n'
    )


def test_estimate_is_a_quarter_of_what_goes_into_the_prompt() -> None:
    request = native(system="x" * 100, tools=[WEATHER])
    alone = native(system="x" * 100)
    assert estimated_tokens(alone) == (100 + len("user") + len("hi")) // 4
    assert estimated_tokens(request) > estimated_tokens(alone) + 10
    assert estimated_tokens(native(messages=[{"role": "u", "content": ""}])) == 1
    assert estimated_tokens(native(messages=[{"role": "assistant", "content": [USE]}])) > 10
