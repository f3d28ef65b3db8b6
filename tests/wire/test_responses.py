"""OpenAI's responses: items become native messages, native events become numbered events."""

import json
from contextlib import suppress
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from corral.wire.errors import CorralError
from corral.wire.frames import SseDecoder, responses_error
from corral.wire.native import ChatResponse, Message, ToolCall, ToolCallFunction, decode
from corral.wire.responses import NativeResponse, ResponsesRequest, ResponseStream, response_object, to_native_response

PIXEL = {"type": "input_image", "detail": "auto", "image_url": "data:image/png;base64,iVBORw0KGgo="}
CALL = {"type": "function_call", "call_id": "c1", "name": "f", "arguments": '{"b":1,"a":2}'}
RESULT = {"type": "function_call_output", "call_id": "c1", "output": "42"}
NATIVE_CALL = ToolCall(id="c1", function=ToolCallFunction(name="f", arguments={"b": 1, "a": 2}))


def request_of(**fields: Any) -> ResponsesRequest:
    return decode(json.dumps({"model": "m", **fields}).encode(), ResponsesRequest)


def native(**fields: Any) -> NativeResponse:
    return to_native_response(request_of(**{"input": "hi", **fields}))


def messages(*items: Any, **fields: Any) -> list[Message]:
    return native(input=list(items), **fields).messages


def refused(**fields: Any) -> str:
    with pytest.raises(CorralError) as caught:
        native(**fields)
    assert caught.value.status == 400
    return caught.value.message


def event(
    content: str = "", *, thinking: str = "", calls: list[ToolCall] | None = None, done_reason: str = "", **fields: Any
) -> ChatResponse:
    message = Message(role="assistant", content=content, thinking=thinking, tool_calls=calls or [])
    created_at = "1970-01-01T00:00:01.9Z" if not done_reason else "1970-01-01T00:00:04Z"
    return ChatResponse(
        model="m", created_at=created_at, message=message, done=bool(done_reason), done_reason=done_reason, **fields
    )


END = event(done_reason="stop", prompt_eval_count=3, eval_count=2)


def stream(*events: ChatResponse, **fields: Any) -> list[tuple[str, dict[str, Any]]]:
    """(event name, data) of each event, the numbering checked and left out."""
    encoder = ResponseStream(7, request_of(**fields))
    found = SseDecoder().feed(b"".join(map(encoder.encode, events)))
    pairs = [(item.name, json.loads(item.data)) for item in found]
    assert [data.pop("sequence_number") for _, data in pairs] == list(range(len(pairs)))
    assert [data.pop("type") for _, data in pairs] == [name for name, _ in pairs]
    return pairs


def said(text: str) -> dict[str, Any]:
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}


def message_item(item_id: str, text: str) -> dict[str, Any]:
    return {"id": item_id, "type": "message", "status": "completed", "role": "assistant", "content": [said(text)]}


def reasoning_item(item_id: str, text: str) -> dict[str, Any]:
    summary = [{"type": "summary_text", "text": text}]
    return {"id": item_id, "type": "reasoning", "summary": summary, "encrypted_content": text}


def call_item(item_id: str) -> dict[str, Any]:
    head = {"id": item_id, "type": "function_call", "status": "completed"}
    return {**head, "call_id": "c1", "name": "f", "arguments": '{"b":1,"a":2}'}


# ── Requests ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_request_without_options_gets_openais_temperature_only() -> None:
    request = native()
    assert request.options == {"temperature": 1.0}
    assert (request.think, request.format, request.tools, request.wants_stream) == (None, None, [], False)
    assert (request.path, request.messages) == ("/v1/responses", [Message(role="user", content="hi")])


def test_request_options_are_mapped() -> None:
    schema = {"type": "object"}
    request = native(
        temperature=0,
        top_p=0.5,
        max_output_tokens=9,
        stream=True,
        reasoning={"effort": "minimal", "summary": "auto"},
        text={"format": {"type": "json_schema", "name": "n", "schema": schema}},
        store=True,
        include=["x"],
        conversation={"id": "x"},
        previous_response_id="resp_1",
    )
    assert request.options == {"temperature": 0.0, "top_p": 0.5, "num_predict": 9}
    assert (request.think, request.format, request.wants_stream) == ("low", schema, True)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ({}, None),
        ({"format": {"type": "text"}}, None),
        ({"format": {"type": "json_schema"}}, None),
        ({"format": {"type": "json_object"}}, "json"),
    ],
)
def test_text_format_is_mapped(text: dict[str, Any], expected: Any) -> None:
    assert native(text=text).format == expected


def test_unknown_effort_is_refused() -> None:
    assert refused(reasoning={"effort": "tiny"}).startswith('invalid reasoning value: "tiny"')


def test_instructions_lead() -> None:
    system = Message(role="system", content="be brief")
    assert native(instructions="be brief").messages == [system, Message(role="user", content="hi")]
    for nothing in ("", None):
        assert native(instructions="be brief", input=nothing).messages == [system]


def test_message_may_be_text_or_parts_and_needs_no_type() -> None:
    parts = [{"type": "input_text", "text": "a"}, PIXEL, {"type": "input_image", "file_id": "f"}]
    assert messages({"role": "user", "content": "a"}, {"type": "message", "role": "developer", "content": parts}) == [
        Message(role="user", content="a"),
        Message(role="developer", content="a", images=[b"\x89PNG\r\n\x1a\n"]),
    ]
    assert messages({"type": "message"}) == [Message(role="", content="")]


def test_reasoning_belongs_to_the_answer_that_follows() -> None:
    thought = {"type": "reasoning", "summary": [], "encrypted_content": "hm"}
    answer = {"role": "assistant", "content": [{"type": "output_text", "text": "a"}]}
    expected = Message(role="assistant", content="a", thinking="hm")
    assert messages(thought, {"role": "user", "content": "q"}, answer)[-1] == expected
    assert messages(thought, CALL) == [Message(role="assistant", content="", thinking="hm", tool_calls=[NATIVE_CALL])]
    assert messages({"role": "user", "content": "q"}, thought)[-1] == Message(role="assistant", content="", thinking="hm")
    assert messages({"type": "reasoning"}) == []


def test_calls_join_the_answer_and_results_name_their_tool() -> None:
    answer = {"role": "assistant", "content": "let me see"}
    second = {**CALL, "call_id": "c2", "name": "g", "arguments": ""}
    asked, result, other = messages(answer, CALL, second, RESULT, {**RESULT, "call_id": "?"})
    assert asked == Message(
        role="assistant",
        content="let me see",
        tool_calls=[NATIVE_CALL, ToolCall(id="c2", function=ToolCallFunction(index=1, name="g", arguments={}))],
    )
    assert (result.role, result.content, result.tool_call_id, result.tool_name) == ("tool", "42", "c1", "f")
    assert other.tool_name == ""


def test_result_may_be_text_parts_and_pictures() -> None:
    (result,) = messages({**RESULT, "output": [{"type": "output_text", "text": "a"}, PIXEL]})
    assert (result.content, len(result.images)) == ("a", 1)
    assert messages({**RESULT, "output": None})[0].content == ""


def test_words_between_a_call_and_its_result_join_the_call() -> None:
    words = {"role": "assistant", "content": "soon"}
    asked, result = messages({"role": "assistant", "content": "ok"}, CALL, words, RESULT)
    assert (asked.content, asked.tool_calls, result.role) == ("ok\nsoon", [NATIVE_CALL], "tool")
    thought = {"type": "reasoning", "encrypted_content": "hm"}
    asked, _ = messages(CALL, thought, words, RESULT)
    assert (asked.content, asked.thinking) == ("soon", "hm")
    # Another call's result is no reason to join.
    assert len(messages(CALL, words, {**RESULT, "call_id": "c9"})) == 3
    assert len(messages(words, RESULT)) == 2


def test_earlier_search_is_passed_over() -> None:
    assert messages({"type": "web_search_call", "id": "ws_1", "status": "completed"}) == []


@pytest.mark.parametrize(
    ("given", "text"),
    [
        (5, "input must be a string or array"),
        ([{"type": "item_reference", "id": "x"}], 'input[0]: unknown input item type: "item_reference"'),
        (["x"], "input[0]: Expected `object`, got `str`"),
        ([{}], "input[0]: input item missing required 'type' field"),
        ([{"role": "user", "content": 5}], "input[0]: content must be a string or array"),
        ([{**RESULT, "output": 5}], "input[0]: output must be a string or array"),
        ([{"role": "user", "content": [{"type": "x"}]}], "input[0]: content[0]: unknown content type: x"),
        ([{"role": "user", "content": ["x"]}], "input[0]: content[0]: unknown content type: "),
        ([{"role": "user", "content": [{"type": "input_text"}]}], "input[0]: content[0]: text must be a string"),
        ([{"role": "user", "content": [{"type": "input_file"}]}], "file inputs are not currently supported"),
        (
            [{"role": "user", "content": [{**PIXEL, "image_url": "https://x"}]}],
            "image URLs are not currently supported, please use base64 encoded data instead",
        ),
        (
            [{**CALL, "arguments": "[]"}],
            "input[0]: failed to parse function call arguments: they are no JSON object",
        ),
    ],
)
def test_input_that_cannot_be_used_is_refused_with_its_place(given: Any, text: str) -> None:
    assert refused(input=given) == text


def test_tools_are_functions_namespaces_and_the_one_built_in_that_a_server_runs() -> None:
    tools = [
        {"type": "function", "name": "f", "description": "d", "parameters": {"type": "object"}, "strict": None},
        {
            "type": "namespace",
            "name": "crm",
            "tools": [{"type": "function", "name": "get"}, {"type": "function", "name": "crm.put"}, 5],
        },
        {"type": "namespace", "tools": [{"type": "namespace", "name": "a", "tools": [{"type": "custom", "name": "b"}]}]},
        {"type": "web_search"},
        {"type": "local_shell"},
    ]
    found = [tool["function"] for tool in native(tools=tools).tools]
    assert [function["name"] for function in found] == ["f", "crm.get", "crm.put", "a.b", "web_search"]
    assert found[0] == {"name": "f", "description": "d", "parameters": {"type": "object"}}
    assert found[1]["parameters"] == {"type": "object", "properties": {}}
    deep: dict[str, Any] = {"type": "function", "name": "f"}
    for _ in range(20):
        deep = {"type": "namespace", "name": "n", "tools": [deep]}
    assert native(tools=[deep]).tools == []


@pytest.mark.parametrize(
    ("choice", "names"),
    [("auto", ["f", "g"]), ("none", []), ({"type": "function", "name": "g"}, ["g"]), ({"type": "hosted"}, ["f", "g"])],
)
def test_tool_choice_chooses_what_the_model_is_shown(choice: Any, names: list[str]) -> None:
    tools = [{"type": "function", "name": "f"}, {"type": "function", "name": "g"}]
    assert [tool["function"]["name"] for tool in native(tools=tools, tool_choice=choice).tools] == names


JSON = st.recursive(
    st.none() | st.integers(-9, 9) | st.sampled_from(["message", "input_text", "reasoning", "function_call", "c1", "{}"]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["type", "role", "content", "text", "call_id", "output", "arguments"]), inner)
    ),
    max_leaves=8,
)


@given(JSON)
def test_any_input_is_understood_or_refused(given: Any) -> None:
    with suppress(CorralError):
        assert all(isinstance(message.content, str) for message in native(input=given).messages)


# ── Answers ──────────────────────────────────────────────────────────────────────────────────────────────────────────

TOLD = (
    '"previous_response_id":null,"instructions":null,"output":OUTPUT,"error":null,"tools":[],"tool_choice":"auto",'
    '"truncation":"disabled","parallel_tool_calls":true,"text":{"format":{"type":"text"}},"top_p":1.0,"presence_penalty":0,'
    '"frequency_penalty":0,"top_logprobs":0,"temperature":1.0,"reasoning":null,"usage":USAGE,"max_output_tokens":null,'
    '"max_tool_calls":null,"store":false,"background":false,"service_tier":"default","metadata":{},"safety_identifier":null,'
    '"prompt_cache_key":null}'
)
USAGE = (
    '{"input_tokens":3,"output_tokens":2,"total_tokens":5,"input_tokens_details":{"cached_tokens":0},'
    '"output_tokens_details":{"reasoning_tokens":0}}'
)


def test_whole_answer_to_the_byte() -> None:
    answer = response_object(7, request_of(), event("Hi", thinking="hm", done_reason="length", prompt_eval_count=3, eval_count=2))
    output = json.dumps([reasoning_item("rs_7_0", "hm"), message_item("msg_7_1", "Hi")], separators=(",", ":"))
    assert msgspec.json.encode(answer).decode() == (
        '{"id":"resp_7","object":"response","created_at":4,"completed_at":4,"status":"completed","incomplete_details":null,'
        '"model":"m",' + TOLD.replace("OUTPUT", output).replace("USAGE", USAGE)
    )


def test_function_is_told_back_with_every_member_that_clients_want() -> None:
    answer = response_object(7, request_of(tools=[{"type": "function", "name": "f"}, {"type": "web_search"}]), END)
    assert json.dumps(answer["tools"]) == (
        '[{"type": "function", "name": "f", "description": null, "strict": null, "parameters": null}, {"type": "web_search"}]'
    )


def test_whole_answer_tells_the_request_back() -> None:
    tool = {"type": "function", "name": "f", "description": None, "strict": True, "parameters": {"x": 1}}
    answer = response_object(
        7,
        request_of(
            instructions="be brief",
            tools=[tool],
            truncation="auto",
            background=True,
            top_p=0.5,
            temperature=0.25,
            max_output_tokens=9,
            reasoning={"effort": "low"},
            text={"format": {"type": "json_schema", "name": "n", "schema": {}, "strict": False}},
        ),
        END,
    )
    told = json.loads(msgspec.json.encode(answer))
    assert (told["instructions"], told["tools"], told["truncation"], told["background"]) == ("be brief", [tool], "auto", True)
    assert (told["top_p"], told["temperature"], told["max_output_tokens"]) == (0.5, 0.25, 9)
    assert told["reasoning"] == {"effort": "low", "summary": None}
    assert told["text"] == {"format": {"type": "json_schema", "name": "n", "schema": {}, "strict": False}}
    assert told["output"] == [message_item("msg_7_0", "")]
    summarised = response_object(7, request_of(reasoning={"summary": "auto"}), END)
    assert summarised["reasoning"] == {"effort": None, "summary": "auto"}


def test_whole_answer_with_calls_has_a_message_only_for_words() -> None:
    assert response_object(7, request_of(), event(calls=[NATIVE_CALL]))["output"] == [call_item("fc_7_0")]
    assert response_object(7, request_of(), event("ok", calls=[NATIVE_CALL]))["output"] == [
        message_item("msg_7_0", "ok"),
        call_item("fc_7_1"),
    ]


def test_stream_of_words_to_the_byte() -> None:
    encoder = ResponseStream(7, request_of())
    parts = b"".join(map(encoder.encode, [event("He"), event("y"), END])).decode().removesuffix("\n\n").split("\n\n")
    begun = (
        '{"id":"resp_7","object":"response","created_at":1,"completed_at":null,"status":"in_progress","incomplete_details":null,'
        '"model":"m",' + TOLD.replace("OUTPUT", "[]").replace("USAGE", "null")
    )
    item = '{"id":"msg_7_0","type":"message","status":"completed","role":"assistant","content":[PART]}'
    part = '{"type":"output_text","text":"Hey","annotations":[],"logprobs":[]}'
    done = item.replace("PART", part)
    ended = begun.replace('"completed_at":null,"status":"in_progress"', '"completed_at":4,"status":"completed"')
    ended = ended.replace('"output":[]', f'"output":[{done}]').replace('"usage":null', f'"usage":{USAGE}')
    place = '"item_id":"msg_7_0","output_index":0,"content_index":0'
    rows = [
        ("response.created", f'"response":{begun}'),
        ("response.in_progress", f'"response":{begun}'),
        (
            "response.output_item.added",
            '"output_index":0,"item":{"id":"msg_7_0","type":"message","status":"in_progress","role":"assistant","content":[]}',
        ),
        ("response.content_part.added", f'{place},"part":{part.replace("Hey", "")}'),
        ("response.output_text.delta", f'{place},"delta":"He","logprobs":[]'),
        ("response.output_text.delta", f'{place},"delta":"y","logprobs":[]'),
        ("response.output_text.done", f'{place},"text":"Hey","logprobs":[]'),
        ("response.content_part.done", f'{place},"part":{part}'),
        ("response.output_item.done", f'"output_index":0,"item":{done}'),
        ("response.completed", f'"response":{ended}'),
    ]
    assert parts == [
        f'event: {name}\ndata: {{"type":"{name}","sequence_number":{number},{rest}}}' for number, (name, rest) in enumerate(rows)
    ]


def test_stream_of_thinking_words_and_calls_numbers_its_items() -> None:
    found = stream(event(thinking="h"), event(thinking="m"), event("ok"), event(calls=[NATIVE_CALL]), END)
    place = {"item_id": "rs_7_0", "output_index": 0, "summary_index": 0}
    thought = reasoning_item("rs_7_0", "hm")
    words, call = message_item("msg_7_1", "ok"), call_item("fc_7_2")
    spot = {"item_id": "fc_7_2", "output_index": 2}
    assert found[2:7] == [
        ("response.output_item.added", {"output_index": 0, "item": {"id": "rs_7_0", "type": "reasoning", "summary": []}}),
        ("response.reasoning_summary_text.delta", {**place, "delta": "h"}),
        ("response.reasoning_summary_text.delta", {**place, "delta": "m"}),
        ("response.reasoning_summary_text.done", {**place, "text": "hm"}),
        ("response.output_item.done", {"output_index": 0, "item": thought}),
    ]
    assert [name for name, _ in found[7:10]] == [
        "response.output_item.added",
        "response.content_part.added",
        "response.output_text.delta",
    ]
    assert found[12:17] == [
        ("response.output_item.done", {"output_index": 1, "item": words}),
        ("response.output_item.added", {"output_index": 2, "item": {**call, "status": "in_progress", "arguments": ""}}),
        ("response.function_call_arguments.delta", {**spot, "delta": '{"b":1,"a":2}'}),
        ("response.function_call_arguments.done", {**spot, "name": "f", "arguments": '{"b":1,"a":2}'}),
        ("response.output_item.done", {"output_index": 2, "item": call}),
    ]
    name, last = found[17]
    assert (name, last["response"]["output"], len(found)) == ("response.completed", [thought, words, call], 18)


def test_thinking_that_nothing_follows_is_closed() -> None:
    names = [name for name, _ in stream(event(thinking="h"), END)]
    assert names[-3:] == ["response.reasoning_summary_text.done", "response.output_item.done", "response.completed"]


def test_stream_of_nothing_has_no_item() -> None:
    found = stream(END)
    assert [name for name, _ in found] == ["response.created", "response.in_progress", "response.completed"]
    assert found[-1][1]["response"]["output"] == []


@pytest.mark.parametrize(("status", "code"), [(None, "server_error"), (429, "rate_limit_exceeded")])
def test_error_after_the_stream_began_fails_the_response(status: int | None, code: str) -> None:
    encoder = ResponseStream(7, request_of())
    sent = encoder.encode(event("a")) + encoder.error(CorralError("engine_failed", "gone", status=status))
    last = SseDecoder().feed(sent)[-1]
    data = json.loads(last.data)
    assert (last.name, data["type"], data["sequence_number"]) == ("response.failed", "response.failed", 5)
    assert (data["response"]["status"], data["response"]["error"]) == ("failed", {"code": code, "message": "gone"})
    assert data["response"]["created_at"] == 1


def test_error_of_a_stream_that_is_passed_on_is_an_event_of_its_own() -> None:
    assert responses_error(CorralError("upstream_failed", "gone")) == (
        b'event: error\ndata: {"type":"error","code":"server_error","message":"gone","param":null}\n\n'
    )
