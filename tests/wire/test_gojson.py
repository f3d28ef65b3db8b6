"""The words of Go's decoder, as the real server gave them for these bodies (fb30760)."""

import json
from typing import Any

import msgspec
import pytest

from corral.wire.anthropic import MessagesRequest
from corral.wire.create import CreateRequest
from corral.wire.errors import CorralError
from corral.wire.gojson import base64_complaint, go_type_of, syntax_complaint, type_complaint
from corral.wire.library import PullRequest
from corral.wire.native import ChatRequest, EmbeddingsRequest, EmbedRequest, GenerateRequest, ShowRequest, decode
from corral.wire.openai import ChatCompletionRequest
from corral.wire.openai_more import CompletionRequest, EmbeddingRequest
from corral.wire.responses import ResponsesRequest

SYNTAX = [
    (b"{", "unexpected EOF"),
    (b"[", "unexpected EOF"),
    (b"nul", "unexpected EOF"),
    (b'{"a"', "unexpected EOF"),
    (b'{"a":', "unexpected EOF"),
    (b'{"a":1', "unexpected EOF"),
    (b'{"a":"', "unexpected EOF"),
    (b'{"a":"\\', "unexpected EOF"),
    (b'{"a":"\\u', "unexpected EOF"),
    (b'{"a":fals', "unexpected EOF"),
    (b"x", "invalid character 'x' looking for beginning of value"),
    (b'{"a":}', "invalid character '}' looking for beginning of value"),
    (b'{"a":.5}', "invalid character '.' looking for beginning of value"),
    (b'{"a":NaN}', "invalid character 'N' looking for beginning of value"),
    (b'{"a":+1}', "invalid character '+' looking for beginning of value"),
    (b"{\"a\":'x'}", "invalid character '\\'' looking for beginning of value"),
    (b'{"a":\\}', "invalid character '\\\\' looking for beginning of value"),
    (b'{"a":\x00}', "invalid character '\\x00' looking for beginning of value"),
    (b'{"a":\xc3\xa9}', "invalid character 'Ã' looking for beginning of value"),
    (b'{"a":\xff}', "invalid character 'ÿ' looking for beginning of value"),
    (b'\xef\xbb\xbf{"a":1}', "invalid character 'ï' looking for beginning of value"),
    (b'{"a":[1,]}', "invalid character ']' looking for beginning of value"),
    (b"{'a':1}", "invalid character '\\'' looking for beginning of object key string"),
    (b'{"a":1,}', "invalid character '}' looking for beginning of object key string"),
    (b"{,}", "invalid character ',' looking for beginning of object key string"),
    (b'{"a" 1}', "invalid character '1' after object key"),
    (b'{"a":1 "b"}', "invalid character '\"' after object key:value pair"),
    (b'{"a":01}', "invalid character '1' after object key:value pair"),
    (b'{"a":0x1}', "invalid character 'x' after object key:value pair"),
    (b'{"a":[1 2]}', "invalid character '2' after array element"),
    (b'{"a":tru}', "invalid character '}' in literal true (expecting 'e')"),
    (b'{"a":nulx', "invalid character 'x' in literal null (expecting 'l')"),
    (b'{"a":-}', "invalid character '}' in numeric literal"),
    (b'{"a":--1}', "invalid character '-' in numeric literal"),
    (b'{"a":1.}', "invalid character '}' after decimal point in numeric literal"),
    (b'{"a":1.x}', "invalid character 'x' after decimal point in numeric literal"),
    (b'{"a":1e}', "invalid character '}' in exponent of numeric literal"),
    (b'{"a":1ex}', "invalid character 'x' in exponent of numeric literal"),
    (b'{"a":"\\x"}', "invalid character 'x' in string escape code"),
    (b'{"a":"\\u12g4"}', "invalid character 'g' in \\u hexadecimal character escape"),
    (b'{"a":"\n"}', "invalid character '\\n' in string literal"),
    (b'{"a":"x\ty"}', "invalid character '\\t' in string literal"),
    (b'{"a":"\x1f"}', "invalid character '\\x1f' in string literal"),
    (b"[" * 10_001, "invalid character '[' exceeded max depth"),
]


@pytest.mark.parametrize(("body", "text"), SYNTAX)
def test_text_that_is_no_json_is_refused_in_gos_words(body: bytes, text: str) -> None:
    assert syntax_complaint(body) == text
    if len(body) < 100:
        with pytest.raises(CorralError) as caught:
            decode(body, ChatRequest)
        assert caught.value.message == text


@pytest.mark.parametrize(
    "body",
    [b"1", b"-0.5e+3", b"null", b'"a\\n\\u00e9"', b"[]", b"{}", b' {"a" : [ { } , [ 1 ] , "x" , true ] } ', b'{"a":"\x7f"}'],
)
def test_good_text_has_no_fault(body: bytes) -> None:
    json.loads(body)
    assert syntax_complaint(body) is None


@pytest.mark.parametrize("text", [r"\ud800", r"\uDE00", r"\uD83Dx", r"\ud83d\ud83d\ude00"])
def test_half_of_a_character_is_named_as_such(text: str) -> None:
    with pytest.raises(CorralError, match=r"^a \\u escape in the request body is half of a character$"):
        decode(f'{{"model":"{text}"}}'.encode(), ChatRequest)
    assert decode(rb'{"model":"\uD83D\uDE00"}', ChatRequest).model == "\N{GRINNING FACE}"


@pytest.mark.parametrize(("text", "is_half"), [(r"\\ud800", False), (r"\\\ud800", True), (r"\\\\ud800\ud83d\ude00", False)])
def test_escaped_backslash_begins_no_half_of_a_character(text: str, is_half: bool) -> None:
    # Refused for its number.
    with pytest.raises(CorralError) as refused:
        decode(f'{{"model":"{text}","options":{{"a":1e999}}}}'.encode(), ChatRequest)
    assert ("half" in refused.value.message) == is_half


def test_what_follows_the_first_value_is_a_fault_and_far_inside_nobody_looks() -> None:
    assert syntax_complaint(b'{"a":1}x') == "invalid character 'x' after top-level value"
    assert syntax_complaint(b'"' + b"a" * 70_000 + b'" x') is None


FIELD = "json: cannot unmarshal {} into Go struct field {} of type {}"
CALLS = '{"messages":[{"tool_calls":%s}]}'
TYPES: list[tuple[type[msgspec.Struct], str, str]] = [
    (ChatRequest, "[]", "json: cannot unmarshal array into Go value of type api.ChatRequest"),
    (GenerateRequest, "true", "json: cannot unmarshal bool into Go value of type api.GenerateRequest"),
    (EmbeddingsRequest, '"x"', "json: cannot unmarshal string into Go value of type api.EmbeddingRequest"),
    (ChatRequest, '{"model":1}', FIELD.format("number", "ChatRequest.model", "string")),
    (ChatRequest, '{"model":{}}', FIELD.format("object", "ChatRequest.model", "string")),
    (ChatRequest, '{"MODEL":true}', FIELD.format("bool", "ChatRequest.model", "string")),
    (ChatRequest, '{"messages":1}', FIELD.format("number", "ChatRequest.messages", "[]api.Message")),
    (ChatRequest, '{"messages":[1]}', FIELD.format("number", "ChatRequest.messages", "api.Alias")),
    (ChatRequest, '{"messages":[[]]}', FIELD.format("array", "ChatRequest.messages", "api.Alias")),
    (ChatRequest, '{"messages":[{"role":1}]}', FIELD.format("number", "ChatRequest.messages.role", "string")),
    (ChatRequest, '{"messages":[{"content":[]}]}', FIELD.format("array", "ChatRequest.messages.content", "string")),
    (ChatRequest, '{"messages":[{"images":"x"}]}', FIELD.format("string", "ChatRequest.messages.images", "[]api.ImageData")),
    (ChatRequest, '{"messages":[{"images":[1]}]}', FIELD.format("number", "ChatRequest.messages.images", "api.ImageData")),
    (ChatRequest, '{"messages":[{"images":["@@"]}]}', "illegal base64 data at input byte 0"),
    (ChatRequest, '{"messages":[{"images":["aGk"]}]}', "illegal base64 data at input byte 0"),
    (ChatRequest, '{"messages":[{"images":["aGkaa?=="]}]}', "illegal base64 data at input byte 5"),
    (ChatRequest, '{"messages":[{"tool_calls":[1]}]}', FIELD.format("number", "ChatRequest.messages.tool_calls", "api.ToolCall")),
    (
        ChatRequest,
        '{"messages":[{"tool_calls":[{"function":1}]}]}',
        FIELD.format("number", "ChatRequest.messages.tool_calls.function", "api.ToolCallFunction"),
    ),
    (
        ChatRequest,
        '{"messages":[{"tool_calls":[{"function":{"index":"x"}}]}]}',
        FIELD.format("string", "ChatRequest.messages.tool_calls.function.index", "int"),
    ),
    (ChatRequest, '{"tools":{}}', FIELD.format("object", "ChatRequest.tools", "api.Tools")),
    (ChatRequest, '{"tools":["x"]}', FIELD.format("string", "ChatRequest.tools", "api.Tool")),
    (ChatRequest, '{"tools":[{"type":1}]}', FIELD.format("number", "Tool.tools.type", "string")),
    (ChatRequest, '{"tools":[{"function":1}]}', FIELD.format("number", "Tool.tools.function", "api.ToolFunction")),
    (
        ChatRequest,
        '{"tools":[{"function":{"name":1}}]}',
        FIELD.format("number", "ToolFunction.tools.function.name", "string"),
    ),
    (
        ChatRequest,
        '{"tools":[{"function":{"parameters":1}}]}',
        FIELD.format("number", "ToolFunction.tools.function.parameters", "api.ToolFunctionParameters"),
    ),
    (ChatRequest, '{"options":[]}', FIELD.format("array", "ChatRequest.options", "map[string]interface {}")),
    (ChatRequest, '{"stream":"s"}', FIELD.format("string", "ChatRequest.stream", "bool")),
    (ChatRequest, '{"top_logprobs":1.5}', FIELD.format("number 1.5", "ChatRequest.top_logprobs", "int")),
    (ChatRequest, '{"top_logprobs":true}', FIELD.format("bool", "ChatRequest.top_logprobs", "int")),
    (GenerateRequest, '{"context":["a"]}', FIELD.format("string", "GenerateRequest.context", "int")),
    (GenerateRequest, '{"context":1}', FIELD.format("number", "GenerateRequest.context", "[]int")),
    (GenerateRequest, '{"_debug_render_only":1}', FIELD.format("number", "GenerateRequest._debug_render_only", "bool")),
    (EmbedRequest, '{"dimensions":"x"}', FIELD.format("string", "EmbedRequest.dimensions", "int")),
    (ShowRequest, '{"verbose":1}', FIELD.format("number", "ShowRequest.verbose", "bool")),
    (PullRequest, '{"insecure":1}', FIELD.format("number", "PullRequest.insecure", "bool")),
    (CreateRequest, '{"files":{"a":1}}', FIELD.format("number", "CreateRequest.files", "string")),
    (CreateRequest, '{"files":1}', FIELD.format("number", "CreateRequest.files", "map[string]string")),
    (ChatCompletionRequest, '{"messages":[1]}', FIELD.format("number", "ChatCompletionRequest.messages", "openai.Message")),
    (ChatCompletionRequest, '{"messages":[{"role":1}]}', FIELD.format("number", "Message.messages.role", "string")),
    (ChatCompletionRequest, '{"temperature":"x"}', FIELD.format("string", "ChatCompletionRequest.temperature", "float64")),
    (ChatCompletionRequest, '{"tools":1}', FIELD.format("number", "ChatCompletionRequest.tools", "[]api.Tool")),
    (ChatCompletionRequest, '{"tools":[1]}', FIELD.format("number", "ChatCompletionRequest.tools", "api.Tool")),
    (
        ChatCompletionRequest,
        '{"response_format":{"type":1}}',
        FIELD.format("number", "ResponseFormat.response_format.type", "string"),
    ),
    (CompletionRequest, '{"max_tokens":"x"}', FIELD.format("string", "CompletionRequest.max_tokens", "int")),
    (EmbeddingRequest, '{"encoding_format":1}', FIELD.format("number", "EmbedRequest.encoding_format", "string")),
    (ResponsesRequest, '{"tools":1}', FIELD.format("number", "ResponsesRequest.tools", "[]openai.ResponsesTool")),
    (ResponsesRequest, '{"text":1}', FIELD.format("number", "ResponsesRequest.text", "openai.ResponsesText")),
    (
        MessagesRequest,
        '{"messages":[1]}',
        FIELD.format(
            "number",
            "MessagesRequest.messages",
            'struct { Role string "json:\\"role\\""; Content json.RawMessage "json:\\"content\\"" }',
        ),
    ),
    (ChatCompletionRequest, CALLS % "1", FIELD.format("number", "Message.messages.tool_calls", "[]openai.ToolCall")),
    (ChatCompletionRequest, CALLS % '[{"id":1}]', FIELD.format("number", "ToolCall.messages.tool_calls.id", "string")),
    (
        ChatCompletionRequest,
        CALLS % '[{"function":1}]',
        FIELD.format(
            "number",
            "ToolCall.messages.tool_calls.function",
            'struct { Name string "json:\\"name\\""; Arguments string "json:\\"arguments\\"" }',
        ),
    ),
    (
        ChatCompletionRequest,
        CALLS % '[{"function":{"arguments":{}}}]',
        FIELD.format("object", ".messages.tool_calls.function.arguments", "string"),
    ),
    (MessagesRequest, '{"tool_choice":1}', FIELD.format("number", "MessagesRequest.tool_choice", "anthropic.ToolChoice")),
    (MessagesRequest, '{"output_config":[]}', FIELD.format("array", "MessagesRequest.output_config", "anthropic.OutputConfig")),
    (MessagesRequest, '{"messages":1}', FIELD.format("number", "MessagesRequest.messages", "[]anthropic.MessageParam")),
    (MessagesRequest, '{"messages":[{"role":1}]}', FIELD.format("number", "MessagesRequest.messages.role", "string")),
    (MessagesRequest, '{"thinking":1}', FIELD.format("number", "MessagesRequest.thinking", "anthropic.ThinkingConfig")),
    (MessagesRequest, '{"stop_sequences":"x"}', FIELD.format("string", "MessagesRequest.stop_sequences", "[]string")),
]


@pytest.mark.parametrize(("kind", "body", "text"), TYPES)
def test_value_of_a_wrong_type_is_refused_in_gos_words(kind: type[msgspec.Struct], body: str, text: str) -> None:
    with pytest.raises(CorralError) as caught:
        decode(body.encode(), kind)
    assert (caught.value.status, caught.value.message) == (400, text)


@pytest.mark.parametrize("broken", ["aGk=\n", "aG\r\nk="])
def test_picture_in_base64_may_have_line_breaks(broken: str) -> None:
    body: dict[str, Any] = {"messages": [{"role": "user", "images": [broken]}]}
    assert decode(json.dumps(body).encode(), ChatRequest).messages[0].images == [b"hi"]


def test_value_that_fits_gives_nothing_to_say() -> None:
    body: dict[str, Any] = {
        "model": "m",
        "messages": [{"role": "user", "images": ["aGk="], "tool_calls": [{"function": {"name": "f", "arguments": {}}}]}],
        "options": {"a": 1},
        "stream": None,
        "think": 1.5,
        "top_logprobs": 3,
    }
    assert type_complaint(body, ChatRequest) is None
    assert type_complaint({"files": {"a": "b"}}, CreateRequest) is None
    assert type_complaint({"temperature": 1}, ChatCompletionRequest) is None


@pytest.mark.parametrize(
    ("value", "name"),
    [
        (True, "bool"),
        (1, "float64"),
        (1.5, "float64"),
        ("a", "string"),
        ([], "[]interface {}"),
        ({}, "map[string]interface {}"),
        (None, "<nil>"),
    ],
)
def test_values_have_gos_names(value: object, name: str) -> None:
    assert go_type_of(value) == name


@pytest.mark.parametrize(
    ("text", "at"),
    [
        ("", None),
        ("aGk=", None),
        ("aGkaaGk=", None),
        ("aG=k", 2),
        ("aG=", 3),
        ("aG==x", 4),
        ("aGk=x", 4),
        ("a===", 1),
        ("aGka====", 4),
        ("aGk", 0),
    ],
)
def test_fault_of_base64_is_found(text: str, at: int | None) -> None:
    assert base64_complaint(text) == (None if at is None else f"illegal base64 data at input byte {at}")
