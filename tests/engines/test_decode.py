"""Streamed answers: every cut of the bytes gives the same chunks, and what an engine should not send is an error with a code."""

import json
from contextlib import suppress
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from corral.core.ports import Chunk, Finish, Timings
from corral.engines.decode import ChatDecoder, CompletionDecoder, error_text
from corral.wire.errors import CorralError

#: As llama.cpp sends it, cut down to what matters.
CHAT = (
    b'data: {"choices":[{"finish_reason":null,"index":0,"delta":{"role":"assistant","content":null}}],"id":"chatcmpl-1"}\n\n'
    b'data: {"choices":[{"finish_reason":null,"index":0,"delta":{"reasoning_content":"Hmm"}}]}\n\n'
    b": a comment, sent while a long prompt is read\n\n"
    b'data: {"choices":[{"finish_reason":null,"index":0,"delta":{"content":"Hel\xc3\xa9"}}],"model":"model"}\n\n'
    b'data: {"choices":[{"finish_reason":null,"index":0,"delta":{"content":"lo"}}]}\n\n'
    b'data: {"choices":[{"finish_reason":"stop","index":0,"delta":{}}]}\n\n'
    b'data: {"choices":[],"usage":{"completion_tokens":3,"prompt_tokens":31},'
    b'"timings":{"cache_n":24,"prompt_n":7,"prompt_ms":213.779,"predicted_n":3,"predicted_ms":28.646}}\n\n'
    b"data: [DONE]\n\n"
)
ANSWER = [
    Chunk(thinking="Hmm"),
    Chunk(content="Helé"),
    Chunk(content="lo"),
    Finish(
        reason="stop",
        timings=Timings(prompt_tokens=31, prompt_ns=213_779_000, eval_tokens=3, eval_ns=28_646_000),
    ),
]


def decoded(decoder: ChatDecoder | CompletionDecoder, *pieces: bytes) -> list[Chunk | Finish]:
    found: list[Chunk | Finish] = [chunk for piece in pieces for chunk in decoder.feed(piece)]
    return [*found, *(decoder.finish() or ())]


def events(*values: object) -> bytes:
    return b"".join(b"data: " + json.dumps(value).encode() + b"\n\n" for value in values)


@given(st.lists(st.integers(0, len(CHAT)), max_size=6))
def test_chat_is_the_same_however_its_bytes_are_cut(cuts: list[int]) -> None:
    edges = [0, *sorted(cuts), len(CHAT)]
    pieces = [CHAT[start:end] for start, end in pairwise(edges)]
    assert decoded(ChatDecoder(), *pieces) == ANSWER


def call(index: int, **members: object) -> dict[str, object]:
    return {"choices": [{"delta": {"tool_calls": [{"index": index, **members}]}}]}


def test_calls_are_put_together_and_come_whole_before_the_end() -> None:
    found = decoded(
        ChatDecoder(),
        events(
            call(0, id="call_1", type="function", function={"name": "get_weather", "arguments": ""}),
            call(0, function={"arguments": '{"city":'}),
            call(1, id="call_2", function={"name": "get_time", "arguments": "{}"}),
            call(0, function={"arguments": '"Oslo"}'}),
            {"choices": [{"delta": {}, "finish_reason": "tool_calls"}]},
        ),
    )
    first = {"index": 0, "id": "call_1", "type": "function", "function": {"name": "get_weather", "arguments": '{"city":"Oslo"}'}}
    second = {"index": 1, "id": "call_2", "type": "function", "function": {"name": "get_time", "arguments": "{}"}}
    assert found == [Chunk(tool_calls=[first, second]), Finish(reason="stop", timings=Timings())]


def test_calls_without_number_are_bounded() -> None:
    with pytest.raises(CorralError, match="tool calls"):
        list(ChatDecoder().feed(events(*(call(index) for index in range(2000)))))


def test_probabilities_come_with_their_token() -> None:
    token = {"token": "a", "logprob": -0.5, "bytes": [97], "top_logprobs": []}
    (found,) = ChatDecoder().feed(events({"choices": [{"delta": {"content": "a"}, "logprobs": {"content": [token]}}]}))
    assert found == Chunk(content="a", logprobs=[token])


def test_alternatives_that_are_null_are_none() -> None:
    token = {"token": "a", "logprob": -0.5, "bytes": None, "top_logprobs": None}
    (found,) = ChatDecoder().feed(events({"choices": [{"delta": {"content": "a"}, "logprobs": {"content": [token]}}]}))
    assert found.logprobs == [{"token": "a", "logprob": -0.5}]


@pytest.mark.parametrize("token", [{"token": "a"}, {"logprob": 1}, {"token": "a", "logprob": 1, "top_logprobs": 7}, 7])
def test_probabilities_of_another_shape_are_the_engines_failure(token: object) -> None:
    for decoder, event in (
        (ChatDecoder(), {"choices": [{"delta": {"content": "a"}, "logprobs": {"content": [token]}}]}),
        (CompletionDecoder(), {"content": "a", "completion_probabilities": [token]}),
    ):
        with pytest.raises(CorralError, match="not understood"):
            list(decoder.feed(events(event)))


def test_length_is_the_only_other_reason() -> None:
    for reason, expected in (("length", "length"), ("stop", "stop"), ("content_filter", "stop")):
        (end,) = decoded(ChatDecoder(), events({"choices": [{"delta": {}, "finish_reason": reason}]}))
        assert isinstance(end, Finish)
        assert end.reason == expected


def test_usage_counts_where_there_are_no_timings() -> None:
    usage = {"choices": [], "usage": {"prompt_tokens": 5, "completion_tokens": 7}}
    (end,) = decoded(ChatDecoder(), events({"choices": [{"finish_reason": "stop"}]}, usage))
    assert end == Finish(reason="stop", timings=Timings(prompt_tokens=5, eval_tokens=7))


def test_text_of_plain_completions_is_content() -> None:
    found = decoded(ChatDecoder(), events({"choices": [{"text": "Hel"}]}, {"choices": [{"text": "", "finish_reason": "stop"}]}))
    assert found == [Chunk(content="Hel"), Finish(reason="stop", timings=Timings())]


def test_chat_that_breaks_off_has_no_end() -> None:
    decoder = ChatDecoder()
    assert list(decoder.feed(CHAT[: CHAT.index(b'finish_reason":"stop')]))
    assert decoder.finish() is None


COMPLETION = (
    events({"index": 0, "content": "Hel", "tokens": [1], "stop": False})
    + events({"content": "lo", "stop": False, "completion_probabilities": [{"id": 7, "token": "lo", "logprob": -1.5}]})
    + events({"stop": True, "stop_type": "limit", "timings": {"prompt_n": 1, "predicted_n": 2, "predicted_ms": 1.5}})
)


@given(st.integers(0, len(COMPLETION)))
def test_completion_is_the_same_however_its_bytes_are_cut(cut: int) -> None:
    assert decoded(CompletionDecoder(), COMPLETION[:cut], COMPLETION[cut:]) == [
        Chunk(content="Hel"),
        Chunk(content="lo", logprobs=[{"token": "lo", "logprob": -1.5}]),
        Finish(reason="length", timings=Timings(prompt_tokens=1, eval_tokens=2, eval_ns=1_500_000)),
    ]


@pytest.mark.parametrize("stop_type", ["eos", "word", "none", ""])
def test_completion_that_did_not_reach_its_limit_has_stopped(stop_type: str) -> None:
    (end,) = decoded(CompletionDecoder(), events({"content": "", "stop": True, "stop_type": stop_type}))
    assert end == Finish(reason="stop", timings=Timings())


def test_completion_that_breaks_off_has_no_end() -> None:
    assert CompletionDecoder().finish() is None


@pytest.mark.parametrize("decoder", [ChatDecoder, CompletionDecoder])
@pytest.mark.parametrize(
    ("error", "words"),
    [({"code": 500, "message": "out of slots"}, "out of slots"), ("boom", "boom"), ({}, "no reason"), (7, "no reason")],
)
def test_error_in_the_stream_is_raised_with_its_words(
    decoder: type[ChatDecoder | CompletionDecoder], error: object, words: str
) -> None:
    with pytest.raises(CorralError, match=words) as raised:
        list(decoder("upstream_failed").feed(events({"error": error})))
    assert raised.value.code == "upstream_failed"


@pytest.mark.parametrize(
    ("decoder", "text"),
    [(ChatDecoder, {"choices": [{"delta": {"content": "Hel"}}]}), (CompletionDecoder, {"content": "Hel"})],
)
def test_text_that_came_with_an_error_is_given_before_it(
    decoder: type[ChatDecoder | CompletionDecoder], text: dict[str, object]
) -> None:
    """As it is when the two come apart: else it hung on the network whether an answer begins, or is a failure."""
    chunks = iter(decoder().feed(events(text, {"error": "boom"})))
    assert next(chunks) == Chunk(content="Hel")
    with pytest.raises(CorralError, match="boom"):
        next(chunks)


@pytest.mark.parametrize("decoder", [ChatDecoder, CompletionDecoder])
@given(st.binary(max_size=40))
def test_whatever_is_sent_gives_chunks_or_an_error_with_a_code(
    decoder: type[ChatDecoder | CompletionDecoder], noise: bytes
) -> None:
    taken = decoder()
    with suppress(CorralError):
        list(taken.feed(b"data: " + noise + b"\n\n"))
    taken.finish()


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        (b'{"error":{"code":400,"message":"no such thing","type":"x"}}', "no such thing"),
        (b'{"error":"just text"}', "just text"),
        (b" plain text \n", "plain text"),
        (b'{"detail":"other"}', '{"detail":"other"}'),
        (b"\xff\xfe", "\ufffd\ufffd"),
        (b"", ""),
    ],
)
def test_error_text_is_the_message_or_the_body(body: bytes, expected: str) -> None:
    assert error_text(body) == expected
