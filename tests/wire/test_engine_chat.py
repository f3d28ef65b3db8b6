"""Messages as llama.cpp's chat API takes them, and its calls as native ones."""

import base64
from typing import Any

import pytest

from corral.wire.engine_chat import engine_message, native_call
from corral.wire.native import Message, ToolCall, ToolCallFunction


def test_text_message_is_role_and_content() -> None:
    assert engine_message(Message(role="user", content="hi")) == {"role": "user", "content": "hi"}


def test_earlier_thinking_is_not_sent_back() -> None:
    assert engine_message(Message(role="assistant", content="a", thinking="hm")) == {"role": "assistant", "content": "a"}


def test_calls_carry_their_arguments_as_text() -> None:
    call = ToolCall(id="c1", function=ToolCallFunction(index=0, name="f", arguments={"b": 1, "a": "é"}))
    assert engine_message(Message(role="assistant", content="", tool_calls=[call])) == {
        "role": "assistant",
        "content": "",
        "tool_calls": [{"id": "c1", "index": 0, "type": "function", "function": {"name": "f", "arguments": '{"b":1,"a":"é"}'}}],
    }


def test_tool_answer_names_its_call() -> None:
    message = Message(role="tool", content="42", tool_name="f", tool_call_id="c1")
    assert engine_message(message) == {"role": "tool", "tool_call_id": "c1", "name": "f", "content": "42"}


@pytest.mark.parametrize(
    ("data", "kind"),
    [
        (b"\x89PNG\r\n\x1a\nx", "image/png"),
        (b"\xff\xd8\xff\xe0x", "image/jpeg"),
        (b"GIF89a", "image/gif"),
        (b"BMx", "image/bmp"),
        (b"RIFF....WEBPx", "image/webp"),
        (b"?", "image/jpeg"),
        (b"", "image/jpeg"),
    ],
)
def test_image_travels_as_a_data_uri_of_its_kind(data: bytes, kind: str) -> None:
    sent = engine_message(Message(role="user", content="see", images=[data]))
    url = f"data:{kind};base64,{base64.b64encode(data).decode()}"
    assert sent["content"] == [{"type": "text", "text": "see"}, {"type": "image_url", "image_url": {"url": url}}]


def test_image_without_text_is_alone() -> None:
    assert [part["type"] for part in engine_message(Message(role="user", content="", images=[b"x"]))["content"]] == ["image_url"]


@pytest.mark.parametrize(("data", "kind"), [(b"RIFF....WAVEfmt ", "wav"), (b"ID3x", "mp3"), (b"\xff\xfbx", "mp3")])
def test_sound_travels_as_input_audio(data: bytes, kind: str) -> None:
    (part,) = engine_message(Message(role="user", content="", images=[data]))["content"]
    assert part == {"type": "input_audio", "input_audio": {"data": base64.b64encode(data).decode(), "format": kind}}


@pytest.mark.parametrize(
    ("given_arguments", "arguments"),
    [
        ('{"b":1,"a":2}', {"b": 1, "a": 2}),
        ({"a": 1}, {"a": 1}),
        ("", {}),
        (None, {}),
        ("not json", {"arguments": "not json"}),
        ("[1]", {"arguments": "[1]"}),
    ],
)
def test_call_arguments_become_an_object(given_arguments: Any, arguments: dict[str, Any]) -> None:
    call = {"id": "c1", "type": "function", "function": {"name": "f", "arguments": given_arguments}}
    assert native_call(call, 2, "x") == ToolCall(id="c1", function=ToolCallFunction(index=2, name="f", arguments=arguments))


@pytest.mark.parametrize("call", [{}, {"function": None}, {"id": "", "function": {}}])
def test_call_without_anything_still_has_an_id(call: dict[str, Any]) -> None:
    assert native_call(call, 0, "call_x") == ToolCall(id="call_x", function=ToolCallFunction(name="", arguments={}))
