"""A scripted HTTP server for the CLI's tests, and a way to run one command against it in this process."""

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


@dataclass
class Seen:
    """A request as the server got it."""

    method: str
    path: str
    headers: dict[str, str]
    body: Any


@dataclass
class FakeServer:
    """answers: `METHOD path` -> (status, object) or (status, list of objects) for a stream. url: where it listens."""

    answers: dict[str, tuple[int, Any]] = field(default_factory=dict)
    seen: list[Seen] = field(default_factory=list)
    url: str = ""
    #: As answers, for what is answered differently from time to time.
    vary: dict[str, Callable[[], tuple[int, Any]]] = field(default_factory=dict)

    @property
    def host(self) -> str:
        return self.url.removeprefix("http://")

    def handle(self, request: BaseHTTPRequestHandler) -> None:
        length = int(request.headers.get("Content-Length") or 0)
        text = request.rfile.read(length)
        headers = {name.lower(): value for name, value in request.headers.items()}
        is_raw = headers.get("content-type") == "application/octet-stream"
        body = text if is_raw else json.loads(text) if text else None
        self.seen.append(Seen(request.command, request.path, headers, body))
        name = f"{request.command} {request.path}"
        status, answer = self.vary.get(name, lambda: self.answers.get(name, (404, {"error": "404 page not found"})))()
        lines = answer if isinstance(answer, list) else [answer]
        content = b"".join(line if isinstance(line, bytes) else json.dumps(line).encode() + b"\n" for line in lines)
        request.send_response(status)
        request.send_header("Content-Length", str(len(content)))
        request.end_headers()
        if request.command != "HEAD":
            request.wfile.write(content)


@contextmanager
def fake_server(answers: dict[str, tuple[int, Any]]) -> Iterator[FakeServer]:
    """A server that gives those answers on a free port of loopback until the block ends."""
    fake = FakeServer(answers)

    class Handler(BaseHTTPRequestHandler):
        def do(self) -> None:
            fake.handle(self)

        do_GET = do_HEAD = do_POST = do_DELETE = do  # noqa: N815 - the names that http.server looks for

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    fake.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield fake
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
