"""Native messages ⇄ the chat messages of llama.cpp's own API, which are OpenAI's with media and calls of its own taste.

Source: ollama llm/llama_server.go llamaServerChatMessage, llama.cpp tools/server/README.md.
"""

import base64
from collections.abc import Mapping
from typing import Any

import msgspec

from corral.wire.native import Message, ToolCall, ToolCallFunction
from corral.wire.openai import openai_calls, parse_arguments


def engine_message(message: Message) -> dict[str, Any]:
    """A native message in the shape llama.cpp's chat API takes. Earlier thinking is not sent back, as Ollama does."""
    converted: dict[str, Any] = {"role": message.role}
    if message.tool_call_id:
        converted["tool_call_id"] = message.tool_call_id
    if message.tool_name:
        converted["name"] = message.tool_name
    if message.tool_calls:
        converted["tool_calls"] = [msgspec.to_builtins(call) for call in openai_calls(message.tool_calls)]
    if not message.images:
        converted["content"] = message.content
        return converted
    text = [{"type": "text", "text": message.content}] if message.content else []
    converted["content"] = [*text, *map(_engine_media, message.images)]
    return converted


def _engine_media(data: bytes) -> dict[str, Any]:
    encoded = base64.b64encode(data).decode()
    if audio := _audio_format(data):
        return {"type": "input_audio", "input_audio": {"data": encoded, "format": audio}}
    return {"type": "image_url", "image_url": {"url": f"data:{_image_type(data)};base64,{encoded}"}}


def _audio_format(data: bytes) -> str:
    if data[:4] == b"RIFF" and data[8:12] == b"WAVE":
        return "wav"
    is_mp3_frame = len(data) > 1 and data[0] == 0xFF and data[1] & 0xE0 == 0xE0
    return "mp3" if data[:3] == b"ID3" or is_mp3_frame else ""


_IMAGE_STARTS = ((b"\x89PNG\r\n\x1a\n", "image/png"), (b"GIF8", "image/gif"), (b"BM", "image/bmp"))


def _image_type(data: bytes) -> str:
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return "image/webp"
    return next((kind for start, kind in _IMAGE_STARTS if data.startswith(start)), "image/jpeg")


def native_call(call: Mapping[str, Any], index: int, fallback_id: str) -> ToolCall:
    """A complete call as an engine reports it. Arguments that are no JSON object are kept under `arguments`, since a model's slip
    must not lose the answer. index: its place in the answer. fallback_id: for engines that give none."""
    function = call.get("function")
    function = function if isinstance(function, Mapping) else {}
    given = function.get("arguments")
    arguments = given if isinstance(given, dict) else parse_arguments(str(given)) if given else {}
    return ToolCall(
        id=str(call.get("id") or fallback_id),
        function=ToolCallFunction(
            index=index, name=str(function.get("name", "")), arguments={"arguments": given} if arguments is None else arguments
        ),
    )
