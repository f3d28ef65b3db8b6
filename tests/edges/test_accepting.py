"""As many connections as there are descriptors for: the others wait, nobody is hurt, and an end finds all that were taken."""

import asyncio
import contextlib
import os
import resource
from collections.abc import Iterator
from pathlib import Path

import pytest
from starlette.requests import Request
from starlette.responses import Response

from corral.core.policy import PUBLIC
from corral.edges import accepting
from corral.edges.asgi import App, AppOptions, endpoint, json_response
from corral.edges.listen import serve
from corral.edges.port import listening_socket

pytestmark = pytest.mark.flow

Streams = tuple[asyncio.StreamReader, asyncio.StreamWriter]


@contextlib.contextmanager
def spare_descriptors(count: int) -> Iterator[int]:
    """Let this process open that many more and no other. Yields how many it may have in all."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    limit = max(int(entry.name) for entry in Path("/proc/self/fd").iterdir()) + 1 + count
    held: list[int] = []
    resource.setrlimit(resource.RLIMIT_NOFILE, (limit, hard))
    try:
        # Below the last one may be gaps.
        with contextlib.suppress(OSError):
            while True:
                held.append(os.dup(0))
        for _ in range(count):
            os.close(held.pop())
        yield limit
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        for descriptor in held:
            os.close(descriptor)


async def alive(request: Request) -> Response:
    return json_response({"alive": True})


class Served:
    """A running `serve`."""

    def __init__(self) -> None:
        with listening_socket("127.0.0.1", 0) as free:
            self.port: int = free.getsockname()[1]
        self.stop, self._ready = asyncio.Event(), asyncio.Event()
        app = App([endpoint("GET", "/", alive, PUBLIC)], AppOptions())

        async def release() -> None:
            pass

        self.task = asyncio.create_task(
            serve(app, "127.0.0.1", self.port, on_ready=self._ready.set, release=release, stop=self.stop)
        )

    async def ready(self) -> None:
        await asyncio.wait_for(self._ready.wait(), 20)

    async def connect(self) -> Streams:
        return await asyncio.open_connection("127.0.0.1", self.port)

    async def ended(self) -> None:
        self.stop.set()
        await asyncio.wait_for(self.task, 5)


def ask(streams: Streams) -> "asyncio.Task[bool]":
    """Whether the answer comes, on a connection that stays."""

    async def answered() -> bool:
        reader, writer = streams
        writer.write(b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n")
        head = await reader.readuntil(b"\r\n\r\n")
        await reader.readuntil(b"}")
        return head.startswith(b"HTTP/1.1 200 ")

    return asyncio.create_task(answered())


async def test_r15_connections_beyond_half_of_the_descriptors_wait_until_one_ends(caplog: pytest.LogCaptureFixture) -> None:
    with spare_descriptors(16) as limit:
        served = Served()
        await served.ready()
    most = limit // 2
    callers = [await served.connect() for _ in range(most + 3)]
    assert all([await asyncio.wait_for(ask(caller), 20) for caller in callers[:most]])
    waiting = [ask(caller) for caller in callers[most:]]
    assert await asyncio.wait_for(ask(callers[0]), 20)
    assert not any(task.done() for task in waiting)
    for _, writer in callers[:3]:
        writer.close()
    assert all(await asyncio.wait_for(asyncio.gather(*waiting), 20))
    assert len(caplog.records) == 1
    for _, writer in callers:
        writer.close()
    await served.ended()


async def test_r15_server_without_descriptors_answers_whom_it_has_and_recovers(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(accepting, "_RETRY_S", 0.01)
    served = Served()
    await served.ready()
    first = await served.connect()
    assert await asyncio.wait_for(ask(first), 20)
    with spare_descriptors(1):
        # One for our end of it, none for the server's.
        second = await served.connect()
        waiting = ask(second)
        for _ in range(50):
            assert await asyncio.wait_for(ask(first), 20)
        assert not waiting.done()
    assert await asyncio.wait_for(waiting, 20)
    assert [record.message for record in caplog.records] == ["no connection can be taken: Too many open files"]
    for _, writer in (first, second):
        writer.close()
    await served.ended()


@pytest.mark.parametrize("steps", range(8))
async def test_r12_end_does_not_wait_for_a_connection_that_came_an_instant_before(steps: int) -> None:
    served = Served()
    await served.ready()
    connecting = asyncio.create_task(served.connect())
    for _ in range(steps):
        await asyncio.sleep(0)
    await served.ended()
    with contextlib.suppress(ConnectionError):
        _, writer = await connecting
        writer.close()
