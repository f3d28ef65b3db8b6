"""HTTP to our own child: whole answers however they are cut, and an end to everything else."""

import asyncio
from collections.abc import AsyncIterator
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from corral.engines.loopback import BrokenAnswer, _Body, _Chunked, _parse_head, posted
from fakes_engine import RawServer, raw_server

CHUNKED = b"5\r\nHello\r\n1;name=x\r\n,\r\nA\r\n wide worl\r\n00001\r\nd\r\n0\r\nTrailer: x\r\n\r\n"


@pytest.fixture
async def server() -> AsyncIterator[RawServer]:
    async with raw_server() as served:
        yield served


def address(server: RawServer) -> tuple[str, int]:
    host, _, port = server.url.removeprefix("http://").partition(":")
    return host, int(port)


async def fetched(
    server: RawServer, *pieces: bytes | asyncio.Event | None, silence_s: float = 10, limit: int = 1000
) -> tuple[int, bytes]:
    """Status and body, when the server answers with these pieces and then hangs up."""
    server.answers["/x"] = [*pieces, None]
    async with posted(address(server), "/x", {"Key": "value"}, b"body", silence_s=silence_s) as answer:
        return answer.status, await answer.read(limit)


def fed(body: _Body, data: bytes, cuts: list[int]) -> bytes:
    edges = [0, *sorted(cuts), len(data)]
    return b"".join(piece for start, end in pairwise(edges) for piece in body.feed(data[start:end]))


@given(st.lists(st.integers(0, len(CHUNKED)), max_size=8))
def test_chunks_are_the_same_however_they_are_cut(cuts: list[int]) -> None:
    body = _Chunked()
    assert fed(body, CHUNKED, cuts) == b"Hello, wide world"
    assert body.is_whole


@given(st.binary(max_size=60))
def test_whatever_comes_as_chunks_gives_bytes_or_a_refusal(noise: bytes) -> None:
    try:
        found = _Chunked().feed(noise)
    except ValueError:
        return
    assert sum(map(len, found)) <= len(noise)


@pytest.mark.parametrize(
    "noise", [b"xyz\r\n", b"\r\n", b"-5\r\n", b"0x5\r\n", b"123456789\r\n", b"1" * 2000, "\u0661\r\n".encode()]
)
def test_chunk_size_that_is_none_is_refused(noise: bytes) -> None:
    with pytest.raises(ValueError, match="chunk size"):
        _Chunked().feed(noise)


@pytest.mark.parametrize(
    "head",
    [b"", b"HTTP/1.1", b"SPDY/1 200 OK", b"HTTP/1.1 2xx OK", b"HTTP/1.1 0200 OK", b"HTTP/1.1 200 OK\r\nContent-Length: -1"],
)
def test_head_that_is_none_is_refused(head: bytes) -> None:
    with pytest.raises(ValueError, match=r"no |unpack"):
        _parse_head(head)


async def test_request_says_what_is_asked(server: RawServer) -> None:
    await fetched(server, b"HTTP/1.1 204 No Content\r\nContent-Length: 0\r\n\r\n")
    (asked,) = server.asked
    assert (asked.method, asked.path, asked.body) == ("POST", "/x", b"body")
    assert asked.headers == {
        "host": server.url.removeprefix("http://"),
        "connection": "close",
        "key": "value",
        "content-length": "4",
    }


async def test_request_without_a_body_is_a_get(server: RawServer) -> None:
    server.answer("/health", {"status": "ok"})
    async with posted(address(server), "/health", {}, None, silence_s=10) as answer:
        assert answer.status == 200
        assert await answer.read(100) == b'{"status": "ok"}'
    assert server.asked[0].method == "GET"


@pytest.mark.parametrize(
    "answer",
    [
        b"HTTP/1.1 200 OK\r\nContent-Length: 17\r\n\r\nHello, wide worldNOT THIS",
        b"HTTP/1.0 200 OK\r\n\r\nHello, wide world",
        b"HTTP/1.1 200\r\ntransfer-encoding:  Chunked\r\n\r\n" + CHUNKED,
    ],
)
async def test_body_ends_where_its_head_says(server: RawServer, answer: bytes) -> None:
    assert await fetched(server, answer) == (200, b"Hello, wide world")
    await fetched(server, *(answer[position : position + 1] for position in range(len(answer))))


@pytest.mark.parametrize(
    "answer",
    [
        b"",
        b"HTTP/1.1 200 OK\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nHell",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nHello\r\n",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nnonsense\r\n",
        b"nonsense\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nX: " + b"x" * 70_000,
    ],
)
async def test_answer_that_breaks_off_or_is_nonsense_is_broken(server: RawServer, answer: bytes) -> None:
    with pytest.raises(BrokenAnswer):
        await fetched(server, answer)


async def test_answer_that_is_too_large_is_broken(server: RawServer) -> None:
    with pytest.raises(BrokenAnswer, match="more than 10 bytes"):
        await fetched(server, b"HTTP/1.1 200 OK\r\n\r\nHello, wide world", limit=10)


async def test_server_that_falls_silent_is_given_up(server: RawServer) -> None:
    with pytest.raises(BrokenAnswer, match="nothing for"):
        await fetched(server, b"HTTP/1.1 200 OK\r\n\r\nHello", asyncio.Event(), silence_s=0.05)
    await asyncio.wait_for(server.gone.wait(), 2)


async def test_r7_reader_that_is_slow_makes_the_server_wait(server: RawServer) -> None:
    block, blocks = b"x" * 2**20, 64
    server.answers["/x"] = [b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % (len(block) * blocks), *[block] * blocks, None]
    async with posted(address(server), "/x", {}, b"", silence_s=10) as answer:
        largest = total = 0
        while data := await answer.next():
            largest, total = max(largest, len(data)), total + len(data)
            for _ in range(20):
                await asyncio.sleep(0)
    assert total == len(block) * blocks
    assert largest < 2**20
