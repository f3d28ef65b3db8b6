"""A cheap load generator in a process of its own: raw sockets, prepared requests, nothing parsed that is not needed.

`python -m bench.load` reads a JSON `Plan` from standard input and prints a JSON `Outcome`. It stops by itself, after a number of
seconds or of requests, and talks to loopback only.
"""

import asyncio
import base64
import json
import re
import subprocess
import sys
import time
from collections import deque
from dataclasses import asdict, dataclass, field
from typing import Any
from urllib.parse import urlsplit

_LAST_CHUNK = b"0\r\n\r\n"
_LONGEST_S = 60.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What to send. requests: complete HTTP/1.1 requests, base64, sent round and round. count: 0 for as many as fit into seconds.
    first: a regular expression; `Outcome.first` is taken when the body first matches it, at its first byte when empty. keep:
    report the bodies' last bytes too."""

    port: int
    requests: list[str]
    connections: int = 1
    seconds: float = 2.0
    count: int = 0
    first: str = ""
    keep: bool = False


@dataclass(slots=True, kw_only=True)
class Outcome:
    """What came back. Times in seconds, one per answer: first: to what the plan looks for; whole: to the last byte."""

    seconds: float = 0.0
    first: list[float] = field(default_factory=list)
    whole: list[float] = field(default_factory=list)
    statuses: dict[str, int] = field(default_factory=dict)
    bodies: list[str] = field(default_factory=list)

    @property
    def rate(self) -> float:
        """Answers per second."""
        return len(self.whole) / self.seconds

    def check(self) -> "Outcome":
        """Itself, when every answer was a success. Raises: AssertionError with what was not."""
        assert list(self.statuses) == ["200"], f"answers: {self.statuses} {self.bodies[:1]}"
        return self


def request_bytes(method: str, url: str, body: Any = None, headers: dict[str, str] | None = None) -> str:
    """One prepared request for a `Plan`."""
    parts = urlsplit(url)
    data = b"" if body is None else json.dumps(body).encode()
    target = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
    fields = {"Host": parts.netloc, "Content-Length": str(len(data)), "Content-Type": "application/json", **(headers or {})}
    head = f"{method} {target} HTTP/1.1\r\n" + "".join(f"{name}: {value}\r\n" for name, value in fields.items()) + "\r\n"
    return base64.b64encode(head.encode() + data).decode()


def run(plan: Plan) -> Outcome:
    """Carry a plan out in another process, so that this one's work is in nobody's figures."""
    command = [sys.executable, "-m", "bench.load"]
    done = subprocess.run(
        command, input=json.dumps(asdict(plan)), capture_output=True, text=True, check=True, timeout=2 * _LONGEST_S
    )
    return Outcome(**json.loads(done.stdout))


class _Caller(asyncio.Protocol):
    """One connection: sends the next request as soon as an answer is complete. began: when connecting started, since a server
    that closes after every answer makes its callers pay for that too."""

    def __init__(self, session: "_Session", began: float) -> None:
        self._session = session
        self._body = bytearray()
        self._began, self._first = began, 0.0
        self._left: int | None = None
        self._status = ""
        self._head = bytearray()
        self._in_body = self._will_close = False
        self.is_waiting = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport
        self._send()

    def _send(self) -> None:
        request = self._session.next_request()
        if request is None:
            self._transport.close()
            return
        self._in_body, self._first, self._left = False, 0.0, None
        self._will_close = b"Connection: close" in request
        self._head.clear()
        self._body.clear()
        self.is_waiting = True
        self._transport.write(request)

    def data_received(self, data: bytes) -> None:
        if not self._in_body:
            self._head += data
            end = self._head.find(b"\r\n\r\n")
            if end < 0:
                return
            head, data = bytes(self._head[:end]).lower(), bytes(self._head[end + 4 :])
            self._status = head[9:12].decode()
            at = head.find(b"content-length:")
            self._left = int(head[at + 15 :].split(b"\r\n", 1)[0]) if at >= 0 else None
            self._will_close |= b"connection: close" in head
            self._in_body = True
        self._body += data
        if not self._first and data and self._session.pattern.search(self._body):
            self._first = time.perf_counter()
        is_whole = len(self._body) >= self._left if self._left is not None else self._body.endswith(_LAST_CHUNK)
        if is_whole:
            now = time.perf_counter()
            self._session.note(self._status, (self._first or now) - self._began, now - self._began, self._body)
            self.is_waiting = False
            if self._will_close:
                self._transport.close()
            else:
                self._began = time.perf_counter()
                self._send()

    def connection_lost(self, _: Exception | None) -> None:
        self._session.lost(self)


class _Session:
    """The shared state of all connections of a plan."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.pattern = re.compile(plan.first.encode(), re.DOTALL)
        self.outcome = Outcome()
        self.done = asyncio.Event()
        self._requests = deque(base64.b64decode(text) for text in plan.requests)
        self._sent = self._open = 0
        self._connecting: asyncio.Task[None] | None = None
        self._began = self._last = time.perf_counter()

    def next_request(self) -> bytes | None:
        if self.is_over:
            return None
        self._sent += 1
        self._requests.rotate(-1)
        return self._requests[-1]

    @property
    def is_over(self) -> bool:
        late = time.perf_counter() - self._began > (_LONGEST_S if self.plan.count else self.plan.seconds)
        return late or 0 < self.plan.count <= self._sent

    def note(self, status: str, first: float, whole: float, body: bytearray) -> None:
        self._last = time.perf_counter()
        self.outcome.statuses[status] = self.outcome.statuses.get(status, 0) + 1
        self.outcome.first.append(first)
        self.outcome.whole.append(whole)
        if self.plan.keep or (status != "200" and not self.outcome.bodies):
            self.outcome.bodies.append(bytes(body[-4000:]).decode(errors="replace"))

    def lost(self, caller: _Caller) -> None:
        if caller.is_waiting:
            self.outcome.statuses["cut"] = self.outcome.statuses.get("cut", 0) + 1
        elif not self.is_over:
            self._connecting = asyncio.create_task(self._connect())
            return
        self._open -= 1
        if self._open <= 0:
            self.done.set()

    async def _connect(self) -> None:
        began = time.perf_counter()
        await asyncio.get_running_loop().create_connection(lambda: _Caller(self, began), "127.0.0.1", self.plan.port)

    async def run(self) -> Outcome:
        self._open = self.plan.connections
        for _ in range(self.plan.connections):
            await self._connect()
        await asyncio.wait_for(self.done.wait(), 2 * _LONGEST_S)
        self.outcome.seconds = self._last - self._began
        return self.outcome


def main() -> None:
    """Carry out the plan on standard input."""
    plan = Plan(**json.load(sys.stdin))

    async def go() -> Outcome:
        return await _Session(plan).run()

    json.dump(asdict(asyncio.run(go())), sys.stdout)


if __name__ == "__main__":
    main()
