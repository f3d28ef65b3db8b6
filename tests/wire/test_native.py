"""Native requests and responses: exact bytes of the reference traces, and a decoder that is as tolerant as Go's and no more."""

import json
import time
from datetime import UTC, datetime, timedelta, timezone
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from corral.wire.errors import CorralError
from corral.wire.native import (
    ChatRequest,
    ChatResponse,
    EmbeddingsRequest,
    EmbeddingsResponse,
    EmbedRequest,
    EmbedResponse,
    GenerateRequest,
    GenerateResponse,
    Logprob,
    Message,
    ShowRequest,
    TokenLogprob,
    ToolCall,
    ToolCallFunction,
    decode,
    format_time,
    join_chat,
    join_generate,
    model_not_found,
    model_not_pulled,
    model_required,
    raw_request,
    unix_seconds,
)

REQUESTS = [GenerateRequest, ChatRequest, EmbedRequest, EmbeddingsRequest, ShowRequest]
TIME = "2026-08-22T10:00:00.1Z"


def encoded(value: object) -> str:
    return msgspec.json.encode(value).decode()


def chat(content: str = "", *, done: bool = False, **fields: Any) -> ChatResponse:
    return ChatResponse(model="m", created_at=TIME, message=Message(role="assistant", content=content), done=done, **fields)


# ── Responses ────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_chat_thinking_chunk_is_the_trace() -> None:
    message = Message(role="assistant", content="", thinking="User greets")
    assert encoded(ChatResponse(model="m", created_at=TIME, message=message, done=False)) == (
        '{"model":"m","created_at":"2026-08-22T10:00:00.1Z",'
        '"message":{"role":"assistant","content":"","thinking":"User greets"},"done":false}'
    )


def test_chat_final_chunk_is_the_trace() -> None:
    metrics = {
        "total_duration": 912345678,
        "load_duration": 41234567,
        "prompt_eval_count": 11,
        "prompt_eval_duration": 70000000,
        "eval_count": 9,
        "eval_duration": 300000000,
    }
    assert encoded(chat(done=True, done_reason="stop", **metrics)) == (
        '{"model":"m","created_at":"2026-08-22T10:00:00.1Z","message":{"role":"assistant","content":""},"done":true,'
        '"done_reason":"stop","total_duration":912345678,"load_duration":41234567,"prompt_eval_count":11,'
        '"prompt_eval_duration":70000000,"eval_count":9,"eval_duration":300000000}'
    )


def test_chat_tool_call_is_the_trace() -> None:
    call = ToolCall(id="call_ab12cd34", function=ToolCallFunction(index=0, name="get_weather", arguments={"city": "Oslo"}))
    message = Message(role="assistant", content="", tool_calls=[call])
    assert encoded(message) == (
        '{"role":"assistant","content":"","tool_calls":[{"id":"call_ab12cd34",'
        '"function":{"index":0,"name":"get_weather","arguments":{"city":"Oslo"}}}]}'
    )


def test_generate_chunk_and_final_object_keep_ollamas_order() -> None:
    assert encoded(GenerateResponse(model="m", created_at=TIME, response="Hi", done=False)) == (
        '{"model":"m","created_at":"2026-08-22T10:00:00.1Z","response":"Hi","done":false}'
    )
    final = GenerateResponse(
        model="m",
        created_at=TIME,
        response="",
        thinking="t",
        done=True,
        done_reason="length",
        context=[1, 2],
        total_duration=6,
        load_duration=5,
        prompt_eval_count=4,
        prompt_eval_duration=3,
        eval_count=2,
        eval_duration=1,
    )
    assert encoded(final) == (
        '{"model":"m","created_at":"2026-08-22T10:00:00.1Z","response":"","thinking":"t","done":true,"done_reason":"length",'
        '"context":[1,2],"total_duration":6,"load_duration":5,"prompt_eval_count":4,"prompt_eval_duration":3,"eval_count":2,'
        '"eval_duration":1}'
    )


def test_logprobs_leave_out_what_was_not_asked_for() -> None:
    alone = Logprob(token="a", logprob=-0.5, bytes=[97])
    assert encoded(alone) == '{"token":"a","logprob":-0.5,"bytes":[97]}'
    both = Logprob(token="a", logprob=-0.5, top_logprobs=[TokenLogprob(token="b", logprob=-1.5)])
    assert encoded(both) == '{"token":"a","logprob":-0.5,"top_logprobs":[{"token":"b","logprob":-1.5}]}'


def test_embeddings_are_sent_even_when_empty() -> None:
    assert encoded(EmbedResponse(model="m", embeddings=[])) == '{"model":"m","embeddings":[]}'
    assert encoded(EmbeddingsResponse(embedding=[])) == '{"embedding":[]}'


def test_joined_chat_is_the_last_event_with_all_text_and_calls() -> None:
    call = ToolCall(function=ToolCallFunction(name="f", arguments={}))
    thinking = ChatResponse(
        model="m", created_at=TIME, message=Message(role="assistant", content="", thinking="hm"), done=False, logprobs=[]
    )
    last = ChatResponse(
        model="m", created_at=TIME, message=Message(role="assistant", content="", tool_calls=[call]), done=True, eval_count=3
    )
    token = Logprob(token="a", logprob=0.0)
    joined = join_chat([thinking, chat("a", logprobs=[token]), chat("b", logprobs=[token]), last])
    assert joined.message == Message(role="assistant", content="ab", thinking="hm", tool_calls=[call])
    assert (joined.done, joined.eval_count, joined.logprobs) == (True, 3, [token, token])


def test_joined_generate_is_the_last_event_with_all_text() -> None:
    parts = [GenerateResponse(model="m", created_at=TIME, response=text, thinking=text, done=False) for text in "ab"]
    last = GenerateResponse(model="m", created_at=TIME, response="", done=True, done_reason="stop", context=[1])
    joined = join_generate([*parts, last])
    assert (joined.response, joined.thinking, joined.done_reason, joined.context) == ("ab", "ab", "stop", [1])


@pytest.mark.parametrize(
    ("moment", "text"),
    [
        (datetime(2026, 8, 22, 10, 0, 0, 100000, UTC), "2026-08-22T10:00:00.1Z"),
        (datetime(2026, 8, 22, 10, 0, 0, 0, UTC), "2026-08-22T10:00:00Z"),
        (datetime(2026, 8, 22, 10, 0, 0, 1, UTC), "2026-08-22T10:00:00.000001Z"),
        (datetime(2026, 8, 22, 12, 0, tzinfo=timezone(timedelta(hours=2))), "2026-08-22T10:00:00Z"),
    ],
)
def test_time_is_utc_without_trailing_zeros(moment: datetime, text: str) -> None:
    assert format_time(moment) == text
    assert unix_seconds(text) == 1787392800


# ── Requests ─────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("body", [b"", b" \n"])
@pytest.mark.parametrize("kind", REQUESTS)
def test_request_without_body_is_refused_with_ollamas_text(kind: type[msgspec.Struct], body: bytes) -> None:
    with pytest.raises(CorralError, match=r"^missing request body$"):
        decode(body, kind)


@pytest.mark.parametrize("body", [b"{}", b"null"])
@pytest.mark.parametrize("kind", REQUESTS)
def test_request_of_an_empty_object_goes_on_to_the_field_checks(kind: type[Any], body: bytes) -> None:
    assert decode(body, kind).model == ""


def test_generate_request_has_ollamas_defaults() -> None:
    request = decode(b'{"model":"m"}', GenerateRequest)
    assert request.wants_stream
    assert request.only_loads
    assert (request.keep_alive_s, request.think, request.truncate, request.context, request.options) == (
        None,
        None,
        None,
        None,
        {},
    )


def test_request_keys_match_in_any_case() -> None:
    request = decode(b'{"MODEL":"m","Prompt":"hi","KEEP_ALIVE":"5m","Stream":false}', GenerateRequest)
    assert (request.model, request.prompt, request.keep_alive_s, request.wants_stream) == ("m", "hi", 300.0, False)


@pytest.mark.parametrize("body", [b'{"model":"a","Model":"b"}', b'{"Model":"b","model":"a"}'])
def test_request_key_in_the_exact_case_wins(body: bytes) -> None:
    assert decode(body, GenerateRequest).model == "a"
    assert raw_request(body).model == "a"


def test_request_nulls_are_unset_at_every_level() -> None:
    body = b"""{"model":"m","stream":null,"options":null,"tools":null,"think":null,"messages":
        [{"role":"User","content":null,"images":null,"tool_calls":null},null]}"""
    request = decode(body, ChatRequest)
    assert request.messages == [Message(role="user", content=""), Message(role="", content="")]
    assert request.wants_stream


def test_request_unknown_fields_are_ignored() -> None:
    assert decode(b'{"model":"m","zz":{"deep":[1]},"messages":[{"zz":1}]}', ChatRequest).messages == [
        Message(role="", content="")
    ]


def test_request_tool_call_arguments_keep_their_order() -> None:
    body = b'{"model":"m","messages":[{"role":"assistant","tool_calls":[{"Function":{"Name":"f","arguments":{"b":1,"a":[2]}}}]}]}'
    (message,) = decode(body, ChatRequest).messages
    assert message.tool_calls == [ToolCall(function=ToolCallFunction(name="f", arguments={"b": 1, "a": [2]}))]
    assert list(message.tool_calls[0].function.arguments) == ["b", "a"]


def test_request_tool_call_without_anything_has_gos_zero_values() -> None:
    body = b'{"model":"m","messages":[{"tool_calls":[{},{"function":{}}]}]}'
    first, second = (decode(body, ChatRequest).messages[0].tool_calls for _ in range(2))
    assert first == [ToolCall(function=ToolCallFunction(name="", arguments={}))] * 2
    first[0].function.arguments["mine"] = 1
    assert second[0].function.arguments == {}


def test_request_images_are_base64() -> None:
    assert decode(b'{"model":"m","images":["aGVsbG8="]}', GenerateRequest).images == [b"hello"]
    with pytest.raises(CorralError, match="base64"):
        decode(b'{"model":"m","images":["!"]}', GenerateRequest)


@pytest.mark.parametrize(
    ("body", "kind", "text"),
    [
        (b'{"top_logprobs":21}', ChatRequest, "top_logprobs must be between 0 and 20"),
        (b'{"top_logprobs":-1}', GenerateRequest, "top_logprobs must be between 0 and 20"),
        (b'{"think":"x"}', ChatRequest, "invalid think value"),
        (b'{"keep_alive":"10"}', EmbedRequest, "missing unit in duration"),
        (
            b'{"stream":"yes"}',
            GenerateRequest,
            "cannot unmarshal string into Go struct field GenerateRequest.stream of type bool",
        ),
        (
            b'{"prompt":1}',
            EmbeddingsRequest,
            "cannot unmarshal number into Go struct field EmbeddingRequest.prompt of type string",
        ),
        (b"[]", ChatRequest, "cannot unmarshal array into Go value of type api.ChatRequest"),
        (
            b'{"messages":{}}',
            ChatRequest,
            "cannot unmarshal object into Go struct field ChatRequest.messages of type []api.Message",
        ),
        (b'{"tools":["f"]}', ChatRequest, "cannot unmarshal string into Go struct field ChatRequest.tools of type api.Tool"),
        (
            b'{"options":[]}',
            ChatRequest,
            "cannot unmarshal array into Go struct field ChatRequest.options of type map[string]interface {}",
        ),
    ],
)
def test_request_with_a_wrong_value_says_which(body: bytes, kind: type[msgspec.Struct], text: str) -> None:
    with pytest.raises(CorralError) as caught:
        decode(body, kind)
    assert text in caught.value.message
    assert caught.value.status == 400


HOSTILE = {
    "nan": b'{"model":"m","options":{"temperature":NaN}}',
    "infinite": b'{"model":"m","options":{"temperature":1e999}}',
    "5000 digits": b'{"model":"m","options":{"num_ctx":' + b"9" * 5000 + b"}}",
    "4000 digits": b'{"model":"m","top_logprobs":' + b"9" * 4000 + b"}",
    "a million digits": b'{"model":' + b"9" * 1_000_000 + b"}",
    "deep list": b'{"model":' + b"[" * 100_000,
    "deep list in a known field": b'{"model":"m","options":{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}}",
    "deep object": b'{"a":' * 100_000,
    "lone high surrogate": b'{"model":"\\ud800"}',
    "lone low surrogate": b'{"model":"\\udc00"}',
    "two high surrogates": b'{"model":"\\ud800\\ud800"}',
    "raw surrogate": b'{"model":"\xed\xa0\x80"}',
    "not utf-8": b'{"model":"\xff"}',
    "byte order mark": b'\xef\xbb\xbf{"model":"m"}',
    "trailing text": b'{"model":"m"} x',
    "half": b'{"model":"m"',
    "control character": b'{"model":"a\nb"}',
    "single quotes": b"{'model':'m'}",
    "many colons": b'{"a":' + b":" * 1_000_000,
}


@pytest.mark.parametrize("body", HOSTILE.values(), ids=HOSTILE.keys())
def test_t106_hostile_json_is_refused_in_bounded_time(body: bytes) -> None:
    # The best of three: what else the machine does is not what is bounded.
    taken = []
    for _ in range(3):
        started = time.process_time()
        with pytest.raises(CorralError) as caught:
            decode(body, GenerateRequest)
        taken.append(time.process_time() - started)
        assert caught.value.status == 400
    assert min(taken) < 0.1


@pytest.mark.parametrize("name", sorted(HOSTILE.keys() - {"infinite", "4000 digits", "5000 digits"}))
def test_t106_hostile_json_is_refused_by_the_relay_too(name: str) -> None:
    # Numbers of other fields are not looked into there: they travel as the bytes they are.
    with pytest.raises(CorralError):
        _ = raw_request(HOSTILE[name]).model


def test_t106_duplicate_keys_mean_the_same_to_the_relay_and_to_us() -> None:
    body = b'{"model":"a","model":"b","stream":false,"stream":true}'
    assert raw_request(body).model == decode(body, GenerateRequest).model == "b"
    assert raw_request(body).with_model("c") == b'{"model":"c","stream":true}'


@given(st.binary(max_size=200))
def test_request_of_any_bytes_decodes_or_gives_a_coded_error(body: bytes) -> None:
    for kind in REQUESTS:
        try:
            decode(body, kind)
        except CorralError as error:
            assert error.status == 400  # noqa: PT017 - most draws are refused, and that is the point


json_values = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(allow_nan=False, allow_infinity=False), st.text(max_size=5)),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=5), inner, max_size=3)),
    max_leaves=8,
)
fields = st.sampled_from([row.encode_name for kind in REQUESTS for row in msgspec.structs.fields(kind)])


@given(st.dictionaries(fields, json_values, max_size=5))
def test_request_of_any_values_decodes_or_gives_a_coded_error(value: dict[str, Any]) -> None:
    body = json.dumps(value).encode()
    for kind in REQUESTS:
        try:
            decode(body, kind)
        except CorralError as error:
            assert error.status == 400  # noqa: PT017 - see above


@pytest.mark.parametrize(("given_input", "texts"), [(None, []), ("", []), ("a", ["a"]), ([], []), (["a", ""], ["a", ""])])
def test_embed_input_is_a_text_or_texts(given_input: Any, texts: list[str]) -> None:
    assert EmbedRequest(model="m", input=given_input).texts == texts


@pytest.mark.parametrize("given_input", [1, ["a", 1], {}, True])
def test_embed_input_of_another_kind_is_refused(given_input: Any) -> None:
    with pytest.raises(CorralError, match=r"^invalid input type$"):
        EmbedRequest(model="m", input=given_input)


def test_not_found_texts_are_those_of_the_routes() -> None:
    assert model_required().message == "model is required"
    assert model_not_found("x").message == "model 'x' not found"
    assert model_not_pulled("x").message == 'model "x" not found, try pulling it first'


# ── Bodies that are passed on ────────────────────────────────────────────────────────────────────────────────────────


def test_relayed_body_keeps_the_bytes_of_every_other_value() -> None:
    body = b'{ "messages" : [ {"b":1.50, "a" : 1e2} ], "Model":"a:cloud", "zz" : "\\u00e9" , "n":12345678901234567890123}'
    assert raw_request(body).with_model("a") == (
        b'{"messages":[ {"b":1.50, "a" : 1e2} ],"model":"a","zz":"\\u00e9","n":12345678901234567890123}'
    )


def test_relayed_body_without_model_gets_one() -> None:
    assert raw_request(b'{"a":1}').with_model("m") == b'{"a":1,"model":"m"}'


@given(st.dictionaries(st.text(max_size=6), json_values, max_size=5), st.text(max_size=8))
def test_relayed_body_differs_in_the_model_only(value: dict[str, Any], model: str) -> None:
    sent = json.loads(raw_request(json.dumps(value).encode()).with_model(model))
    assert sent == {key: item for key, item in value.items() if key.lower() != "model"} | {"model": model}


@pytest.mark.parametrize(("body", "model"), [(b"null", ""), (b'{"model":null}', ""), (b'{"a":1}', ""), (b'{"MODEL":"m"}', "m")])
def test_model_of_a_body_is_empty_when_it_names_none(body: bytes, model: str) -> None:
    assert raw_request(body).model == model


@pytest.mark.parametrize("body", [b'{"model":1}', b"[]", b'"m"', b"", b"{"])
def test_model_of_what_is_no_request_is_refused(body: bytes) -> None:
    with pytest.raises(CorralError) as caught:
        _ = raw_request(body).model
    assert caught.value.code == "bad_request"
