"""Reading request bodies: what is too large, too slow, or too much at once."""

import asyncio
from collections.abc import Iterable
from typing import Any

import pytest
from starlette.types import Receive

from corral.edges.bodies import BodyLimits, BodyReader, BodyStream, Disconnected, Memory, StreamLimits
from corral.wire.errors import CorralError

CHUNKED = {"transfer-encoding": ["chunked"]}
PATIENCE_S = 5


def sending(parts: Iterable[bytes], *, pause_s: float = 0, then: str = "end") -> Receive:
    """A caller that sends parts and then ends the body, leaves, or does nothing any more (`stall`)."""
    left = iter(parts)

    async def receive() -> dict[str, Any]:
        if pause_s:
            await asyncio.sleep(pause_s)
        part = next(left, None)
        if part is not None:
            return {"type": "http.request", "body": part, "more_body": True}
        if then == "stall":
            await asyncio.Event().wait()
        return {"type": "http.disconnect"} if then == "leave" else {"type": "http.request", "body": b"", "more_body": False}

    return receive


async def read(receive: Receive, *, reader: BodyReader | None = None, max_bytes: int = 100, **limits: Any) -> bytes:
    reader = reader or BodyReader(BodyLimits(**limits))
    return await asyncio.wait_for(reader.read(CHUNKED, receive, max_bytes), PATIENCE_S)


async def code_of(receive: Receive, **options: Any) -> tuple[str, int]:
    with pytest.raises(CorralError) as refused:
        await read(receive, **options)
    return refused.value.code, refused.value.status


async def test_body_in_parts_arrives_whole() -> None:
    assert await read(sending([b"ab", b"", b"cd"])) == b"abcd"


async def test_bodies_that_are_there_at_once_cost_no_task_and_share_one_timer(monkeypatch: pytest.MonkeyPatch) -> None:
    loop = asyncio.get_running_loop()
    tasks, timers, set_timer = [], [], loop.call_later

    async def receive() -> dict[str, Any]:
        tasks.append(len(asyncio.all_tasks()))
        return {"type": "http.request", "body": b"x", "more_body": False}

    monkeypatch.setattr(loop, "call_later", lambda *args: timers.append(args) or set_timer(*args))
    reader = BodyReader(BodyLimits())
    for _ in range(5):
        assert await reader.read(CHUNKED, receive, 10) == b"x"
    assert tasks == [len(asyncio.all_tasks())] * 5
    assert len(timers) == 1


async def test_end_of_the_server_is_not_taken_for_a_slow_body() -> None:
    reading = asyncio.create_task(BodyReader(BodyLimits()).read(CHUNKED, sending([], then="stall"), 10))
    await asyncio.sleep(0)
    reading.cancel()
    await asyncio.wait([reading])
    assert reading.cancelled()


async def test_t110_time_is_kept_for_every_body_of_a_server() -> None:
    reader = BodyReader(BodyLimits(stall_s=0.005))
    for _ in range(2):
        assert await code_of(sending([], then="stall"), reader=reader) == ("too_slow", 408)
    both = [reader.read(CHUNKED, sending([], then="stall"), 10) for _ in range(2)]
    ended = await asyncio.wait_for(asyncio.gather(*both, return_exceptions=True), PATIENCE_S)
    assert [getattr(error, "code", error) for error in ended] == ["too_slow", "too_slow"]


async def test_body_that_is_not_announced_is_not_waited_for() -> None:
    assert await BodyReader(BodyLimits()).read({"host": ["x"]}, sending([], then="stall"), 10) == b""


@pytest.mark.parametrize("parts", [[], [b"x" * 50]])
async def test_t110_body_that_pauses_too_long_is_408(parts: list[bytes]) -> None:
    assert await code_of(sending(parts, then="stall"), stall_s=0.005) == ("too_slow", 408)


async def test_t110_body_that_drips_is_408_although_it_never_pauses() -> None:
    drips = sending([b"x"] * 1_000, pause_s=0.002)
    assert await code_of(drips, max_bytes=10_000, stall_s=0.01, bytes_per_s=100_000) == ("too_slow", 408)


async def test_t110_body_that_came_fast_at_first_cannot_drip_later() -> None:
    # The burst alone would buy a second, longer than all the drips take.
    burst_then_drips = sending([b"x" * 5_000, *[b"x"] * 100], pause_s=0.002)
    assert await code_of(burst_then_drips, max_bytes=10_000, stall_s=0.01, bytes_per_s=5_000) == ("too_slow", 408)


async def test_slow_body_that_keeps_coming_arrives() -> None:
    slow = sending([b"x" * 10] * 8, pause_s=0.002)
    assert len(await read(slow, stall_s=0.05, bytes_per_s=200)) == 80


async def test_t110_body_larger_than_allowed_is_413_while_it_arrives() -> None:
    assert await code_of(sending([b"x" * 60, b"x" * 60], then="stall")) == ("too_large", 413)


async def test_t110_unfinished_bodies_are_bounded_together_and_let_go_when_they_end() -> None:
    reader = BodyReader(BodyLimits(max_unfinished_bytes=100))
    held = asyncio.create_task(reader.read(CHUNKED, sending([b"x" * 60], then="stall"), 100))
    await asyncio.sleep(0)
    assert await code_of(sending([b"x" * 60], then="stall"), reader=reader) == ("unavailable", 503)
    assert await read(sending([b"x" * 40]), reader=reader) == b"x" * 40
    held.cancel()
    await asyncio.wait([held])
    assert await read(sending([b"x" * 60]), reader=reader) == b"x" * 60
    for _ in range(3):
        with pytest.raises(Disconnected):
            await read(sending([b"x" * 60], then="leave"), reader=reader)
        assert (await code_of(sending([b"x" * 60, b"x" * 60]), reader=reader))[0] == "too_large"
    assert await read(sending([b"x" * 90]), reader=reader) == b"x" * 90


# ── Bodies that are handed on as they arrive ─────────────────────────────────────────────────────────────────────────


def stream_of(messages: Iterable[object], length: int | None, *, memory: Memory | None = None, **limits: float) -> BodyStream:
    """A stream over ASGI messages: bytes are parts, None waits for ever, and what is left out at the end is a lost connection."""
    left = iter(messages)

    async def receive() -> dict[str, object]:
        message = next(left, "gone")
        if message is None:
            await asyncio.Event().wait()
        if message == "gone":
            return {"type": "http.disconnect"}
        if message == "end":
            return {"type": "http.request", "body": b"", "more_body": False}
        return {"type": "http.request", "body": message, "more_body": True}

    headers = {"transfer-encoding": ["chunked"]} if length is None else {"content-length": [str(length)]}
    return BodyStream(headers, receive, StreamLimits(**limits), memory=memory)  # type: ignore[arg-type]


async def test_stream_whole_gives_the_parts_as_they_came() -> None:
    stream = stream_of([b"ab", b"c", "end"], 3)
    assert [part async for part in stream] == [b"ab", b"c"]
    assert stream.declared_bytes == 3


async def test_stream_without_a_body_reads_nothing() -> None:
    stream = stream_of([None], 0)
    assert [part async for part in stream] == []


async def test_stream_chunked_tells_no_length() -> None:
    stream = stream_of([b"ab", "end"], None)
    assert stream.declared_bytes is None
    assert await stream.read(10) == b"ab"


@pytest.mark.parametrize("ending", [(), ("end",)])
async def test_stream_that_ends_before_its_length_is_a_lost_connection(ending: tuple[str, ...]) -> None:
    stream = stream_of([b"ab", *ending], 3)
    with pytest.raises(Disconnected):
        await stream.read(10)


async def test_stream_that_pauses_is_ended() -> None:
    stream = stream_of([b"ab", None], 3, stall_s=0.001)
    with pytest.raises(CorralError) as caught:
        await stream.read(10)
    assert caught.value.code == "too_slow"


async def test_stream_below_the_lowest_rate_is_ended() -> None:
    stream = stream_of([b"a"] * 100, 100, grace_s=-1, bytes_per_s=1_000_000)
    with pytest.raises(CorralError) as caught:
        await stream.read(1000)
    assert caught.value.code == "too_slow"


@pytest.mark.parametrize("length", [11, None])
async def test_stream_read_whole_is_bounded(length: int | None) -> None:
    stream = stream_of([b"abcdef", b"ghijk", "end"], length)
    with pytest.raises(CorralError) as caught:
        await stream.read(10)
    assert caught.value.code == "too_large"


async def test_f18_streams_that_are_read_whole_are_bounded_together_until_their_requests_end() -> None:
    memory, large = Memory(100), [b"x" * 65_536, b"x" * 60, "end"]
    first = stream_of(large, None, memory=memory)
    assert len(await first.read(10**6)) == 65_596
    second = stream_of(large, None, memory=memory)
    with pytest.raises(CorralError) as caught:
        await second.read(10**6)
    assert (caught.value.code, caught.value.retry_after_s) == ("unavailable", 5)
    # Small ones get in all the same.
    assert await stream_of([b"x" * 65_536, "end"], None, memory=memory).read(10**6) == b"x" * 65_536
    second.forget()
    first.forget()
    first.forget()
    assert len(await stream_of(large, None, memory=memory).read(10**6)) == 65_596


async def test_f22_length_of_thousands_of_digits_is_refused_and_not_counted() -> None:
    digits = "0" * 5000 + "1"
    with pytest.raises(CorralError) as caught:
        await BodyReader(BodyLimits()).read({"content-length": [digits]}, sending([]), 10)
    assert caught.value.code == "too_large"


@pytest.mark.parametrize("lengths", [["1", "2"], ["-1"], ["+1"], ["1,1"], [""], ["0" * 5000 + "1"]])
async def test_f22_stream_of_unclear_length_is_refused(lengths: list[str]) -> None:
    async def receive() -> dict[str, object]:
        raise AssertionError

    with pytest.raises(CorralError) as caught:
        BodyStream({"content-length": lengths}, receive, StreamLimits())  # type: ignore[arg-type]
    assert caught.value.code == "bad_request"
