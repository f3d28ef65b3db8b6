"""Drives an ASGI application in process, byte by byte: what a test sends is exactly what the application sees."""

import asyncio
import json
from dataclasses import dataclass, field
from typing import Any


@dataclass
class Answer:
    """What came back. headers: lower-case names; several values of one name joined by `, `."""

    status: int = 0
    headers: dict[str, str] = field(default_factory=dict)
    body: bytes = b""
    parts: list[bytes] = field(default_factory=list)

    def json(self) -> Any:
        return json.loads(self.body)


@dataclass
class Caller:
    """Sends requests to one application. leave_after: disconnect once so many body parts have arrived."""

    app: Any
    host: str = "localhost:11435"
    scheme: str = "http"
    client: tuple[str, int] = ("127.0.0.1", 50000)

    async def request(
        self,
        method: str,
        target: str,
        *,
        headers: dict[str, str] | list[tuple[str, str]] = (),  # type: ignore[assignment]
        body: bytes = b"",
        host: str | None = None,
        leave_after: int | None = None,
        read_all: bool = True,
    ) -> Answer:
        sent = list(headers.items()) if isinstance(headers, dict) else list(headers)
        if not any(name.lower() == "host" for name, _ in sent) and host != "":
            sent.insert(0, ("host", host or self.host))
        if body and not any(name.lower() == "content-length" for name, _ in sent):
            sent.append(("content-length", str(len(body))))
        raw_path, _, query = target.partition("?")
        from urllib.parse import unquote

        scope = {
            "type": "http",
            "http_version": "1.1",
            "method": method,
            "scheme": self.scheme,
            "path": unquote(raw_path),
            "raw_path": raw_path.encode("latin-1"),
            "query_string": query.encode("latin-1"),
            "headers": [(name.lower().encode("latin-1"), value.encode("latin-1")) for name, value in sent],
            "client": self.client,
            "server": ("127.0.0.1", 11435),
        }
        answer, left = Answer(), asyncio.Event()
        if leave_after == 0:
            left.set()
        messages = [{"type": "http.request", "body": body, "more_body": False}]

        async def receive() -> dict[str, Any]:
            if messages:
                return messages.pop(0)
            await left.wait()
            return {"type": "http.disconnect"}

        async def send(message: dict[str, Any]) -> None:
            if message["type"] == "http.response.start":
                answer.status = message["status"]
                for name, value in message["headers"]:
                    key, text = name.decode("latin-1").lower(), value.decode("latin-1")
                    answer.headers[key] = f"{answer.headers[key]}, {text}" if key in answer.headers else text
            elif message["type"] == "http.response.body":
                answer.body += message.get("body", b"")
                if message.get("body"):
                    answer.parts.append(message["body"])
                if leave_after is not None and len(answer.parts) >= leave_after:
                    left.set()

        await self.app(scope, receive, send)
        left.set()
        return answer
