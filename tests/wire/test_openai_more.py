"""OpenAI's older completions and its embeddings."""

import base64
import json
import struct
from typing import Any

import msgspec
import pytest

from corral.wire.errors import CorralError
from corral.wire.native import EmbedResponse, GenerateResponse, decode
from corral.wire.openai_more import (
    CompletionRequest,
    CompletionStream,
    EmbeddingRequest,
    NativeCompletion,
    NativeEmbedding,
    completion,
    embedding_list,
    to_native_completion,
    to_native_embedding,
)


def native(**fields: Any) -> NativeCompletion:
    return to_native_completion(decode(json.dumps({"model": "m", "prompt": "hi", **fields}).encode(), CompletionRequest))


def embedding(**fields: Any) -> NativeEmbedding:
    return to_native_embedding(decode(json.dumps({"model": "m", **fields}).encode(), EmbeddingRequest))


def event(response: str = "", done_reason: str = "", **fields: Any) -> GenerateResponse:
    created_at = "1970-01-01T00:00:01.9Z"
    return GenerateResponse(
        model="m", created_at=created_at, response=response, done=bool(done_reason), done_reason=done_reason, **fields
    )


END = event(done_reason="stop", prompt_eval_count=3, eval_count=2)


def frames(*events: GenerateResponse, includes_usage: bool = False) -> list[str]:
    encoder = CompletionStream("cmpl-7", includes_usage=includes_usage)
    return b"".join(map(encoder.encode, events)).decode().removesuffix("\n\n").split("\n\n")


def chunk(choices: str, more: str = "") -> str:
    return (
        'data: {"id":"cmpl-7","object":"text_completion","created":1,"choices":['
        f'{choices}],"model":"m","system_fingerprint":"fp_ollama"{more}}}'
    )


# ── Completions ──────────────────────────────────────────────────────────────────────────────────────────────────────


def test_completion_without_options_gets_openais_defaults() -> None:
    request = native()
    assert request.options == {"temperature": 1.0, "top_p": 1.0, "frequency_penalty": 0.0, "presence_penalty": 0.0}
    assert (request.prompt, request.suffix, request.wants_stream, request.logprobs) == ("hi", "", False, False)
    assert request.path == "/v1/completions"


def test_completion_options_are_mapped() -> None:
    request = native(
        suffix="end", max_tokens=5, seed=1, stop="x", temperature=0, top_p=0.5, frequency_penalty=0.1, stream=True, logprobs=2
    )
    assert request.options == {
        "num_predict": 5,
        "seed": 1,
        "stop": ["x"],
        "temperature": 0.0,
        "top_p": 0.5,
        "frequency_penalty": 0.1,
        "presence_penalty": 0.0,
    }
    assert (request.suffix, request.wants_stream, request.logprobs, request.top_logprobs) == ("end", True, True, 2)
    assert native(top_p=0, stop=["a", "b"]).options["top_p"] == 1.0
    assert native(stop=["a", "b"]).options["stop"] == ["a", "b"]
    assert native(prompt=["hi"]).prompt == "hi"


@pytest.mark.parametrize(
    ("item", "kind"), [(1, "float64"), (True, "bool"), ([], "[]interface {}"), ({}, "map[string]interface {}"), (None, "<nil>")]
)
def test_stop_that_is_no_text_is_refused_in_ollamas_words(item: Any, kind: str) -> None:
    with pytest.raises(CorralError) as refused:
        native(stop=["a", item])
    assert (refused.value.message, refused.value.status) == (f"invalid type for 'stop' field: {kind}", 400)


@pytest.mark.parametrize("prompt", [["a", "b"], [1, 2], [], 5, [[1]]])
def test_prompt_that_is_not_one_text_is_refused(prompt: Any) -> None:
    with pytest.raises(CorralError, match="prompt must be one text"):
        native(prompt=prompt)


def test_too_many_logprobs_are_refused_as_on_the_native_route() -> None:
    with pytest.raises(CorralError, match="top_logprobs must be between 0 and 20"):
        native(logprobs=21)


def test_whole_completion() -> None:
    assert msgspec.json.encode(completion("cmpl-7", event("Hello", "stop", prompt_eval_count=3, eval_count=2))) == (
        b'{"id":"cmpl-7","object":"text_completion","created":1,"model":"m","system_fingerprint":"fp_ollama",'
        b'"choices":[{"text":"Hello","index":0,"finish_reason":"stop"}],'
        b'"usage":{"prompt_tokens":3,"completion_tokens":2,"total_tokens":5}}'
    )


def test_completion_stream_ends_with_the_reason_and_done() -> None:
    assert frames(event("Hel"), event(thinking="hm"), event("lo"), END) == [
        chunk('{"text":"Hel","index":0,"finish_reason":null}'),
        chunk('{"text":"","index":0,"finish_reason":null}'),
        chunk('{"text":"lo","index":0,"finish_reason":null}'),
        chunk('{"text":"","index":0,"finish_reason":"stop"}'),
        "data: [DONE]",
    ]


def test_completion_stream_with_usage_has_zeros_until_the_last_chunk() -> None:
    zeros = ',"usage":{"prompt_tokens":0,"completion_tokens":0,"total_tokens":0}'
    assert frames(event("Hel"), END, includes_usage=True) == [
        chunk('{"text":"Hel","index":0,"finish_reason":null}', zeros),
        chunk('{"text":"","index":0,"finish_reason":"stop"}', zeros),
        chunk("", ',"usage":{"prompt_tokens":3,"completion_tokens":2,"total_tokens":5}'),
        "data: [DONE]",
    ]


@pytest.mark.parametrize(("options", "includes"), [(None, False), ({}, False), ({"include_usage": True}, True)])
def test_usage_is_included_when_asked_for(options: Any, includes: bool) -> None:
    body = json.dumps({"model": "m", "stream_options": options}).encode()
    assert decode(body, CompletionRequest).includes_usage is includes


# ── Embeddings ───────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(("given", "texts"), [("a", ["a"]), (["a", "b"], ["a", "b"]), ("", [""]), (["", "a"], ["", "a"])])
def test_input_is_text_or_texts(given: Any, texts: list[str]) -> None:
    request = embedding(input=given, dimensions=2)
    assert (request.texts, request.dimensions, request.path) == (texts, 2, "/v1/embeddings")


@pytest.mark.parametrize("fields", [{}, {"input": None}, {"input": []}])
def test_missing_input_is_refused(fields: dict[str, Any]) -> None:
    with pytest.raises(CorralError) as refused:
        embedding(**fields)
    assert (refused.value.message, refused.value.status) == ("invalid input", 400)


def test_unknown_encoding_is_refused_before_the_input() -> None:
    with pytest.raises(CorralError) as refused:
        embedding(encoding_format="hex")
    assert refused.value.message == "Invalid value for 'encoding_format' = hex. Supported values: ['float', 'base64']."
    assert embedding(encoding_format="FLOAT", input="a").texts == ["a"]


def test_vectors_are_numbers_or_bytes() -> None:
    response = EmbedResponse(model="m", embeddings=[[0.5, -2.0], [1.0, 0.0]], prompt_eval_count=3)
    assert msgspec.json.encode(embedding_list(response, is_base64=False)) == (
        b'{"object":"list","data":[{"object":"embedding","embedding":[0.5,-2.0],"index":0},'
        b'{"object":"embedding","embedding":[1.0,0.0],"index":1}],"model":"m","usage":{"prompt_tokens":3,"total_tokens":3}}'
    )
    (first, _) = embedding_list(response, is_base64=True)["data"]
    assert struct.unpack("<2f", base64.b64decode(first.embedding)) == (0.5, -2.0)
    assert decode(b'{"encoding_format":"BASE64"}', EmbeddingRequest).is_base64
