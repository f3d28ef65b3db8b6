"""An OpenAI-compatible server with one fixed answer, so cheap that what is in front of it is what gets measured.

`python -m bench.fixed_upstream PORT`. A body that holds `"stream":true` is answered with 64 chunks, any other with one object.
"""

import asyncio
import json
import sys

_COMPLETION = {
    "id": "chatcmpl-fixed",
    "object": "chat.completion",
    "created": 1,
    "model": "fixed",
    "choices": [{"index": 0, "message": {"role": "assistant", "content": "The sky is blue."}, "finish_reason": "stop"}],
    "usage": {"prompt_tokens": 12, "completion_tokens": 5, "total_tokens": 17},
}


def _chunk(delta: dict[str, str], **more: object) -> bytes:
    choice = {"index": 0, "delta": delta, "finish_reason": None}
    event = {
        "id": "chatcmpl-fixed",
        "object": "chat.completion.chunk",
        "created": 1,
        "model": "fixed",
        "choices": [choice],
        **more,
    }
    return b"data: " + json.dumps(event, separators=(",", ":")).encode() + b"\n\n"


def _framed(data: bytes) -> bytes:
    return b"%x\r\n%s\r\n" % (len(data), data)


def _answer(body: bytes, kind: bytes) -> bytes:
    return b"HTTP/1.1 200 OK\r\nContent-Type: %s\r\nContent-Length: %d\r\n\r\n%s" % (kind, len(body), body)


_UNARY = _answer(json.dumps(_COMPLETION).encode(), b"application/json")
_HEALTH = _answer(b'{"status":"ok","object":"list","data":[{"id":"fixed","object":"model"}]}', b"application/json")
_STREAM_HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
_END = {"index": 0, "delta": {}, "finish_reason": "stop"}
_FRAMES = [_framed(_chunk({"content": f" word{number}"})) for number in range(62)]
_FRAMES += [_framed(_chunk({}, choices=[_END])), _framed(_chunk({}, choices=[], usage=_COMPLETION["usage"]))]
_LAST = _framed(b"data: [DONE]\n\n") + b"0\r\n\r\n"


class _Server(asyncio.Protocol):
    """Reads just enough of HTTP/1.1 to know where a request ends."""

    def __init__(self) -> None:
        self._buffer = bytearray()
        self._task: asyncio.Task[None] | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        self._buffer += data
        while (end := self._buffer.find(b"\r\n\r\n")) >= 0:
            head = bytes(self._buffer[:end]).lower()
            at = head.find(b"content-length:")
            size = int(head[at + 15 :].split(b"\r\n", 1)[0]) if at >= 0 else 0
            if len(self._buffer) < end + 4 + size:
                return
            body = bytes(self._buffer[end + 4 : end + 4 + size])
            del self._buffer[: end + 4 + size]
            if b'"stream":true' in body or b'"stream": true' in body:
                self._task = asyncio.create_task(self._stream())
            else:
                self._transport.write(_UNARY if head.startswith(b"post") else _HEALTH)

    async def _stream(self) -> None:
        # Each chunk is sent by itself, as a model's tokens are. Between some of them the other streams get their turn; between
        # all of them, the loop of this process would be what is measured.
        self._transport.write(_STREAM_HEAD)
        for number, frame in enumerate(_FRAMES):
            self._transport.write(frame)
            if number % 8 == 7:
                await asyncio.sleep(0)
        self._transport.write(_LAST)


async def main(port: int) -> None:
    """Serve until ended."""
    server = await asyncio.get_running_loop().create_server(_Server, "127.0.0.1", port)
    await server.serve_forever()


if __name__ == "__main__":
    asyncio.run(main(int(sys.argv[1])))
