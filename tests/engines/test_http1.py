"""HTTP to whoever runs models: whole answers however they are cut, and an end to everything else."""

import asyncio
import socket
import ssl
from collections.abc import AsyncIterator, Iterator
from contextlib import suppress
from ipaddress import ip_address
from itertools import pairwise
from pathlib import Path

import pytest
from cryptography import x509
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from certificates import self_signed
from corral.engines import http1
from corral.engines.http1 import Answer, BrokenAnswer, Place, Pool, posted
from fakes_engine import RawServer, raw_server

CHUNKED = b"5\r\nHello\r\n1;name=x\r\n,\r\nA\r\n wide worl\r\n00001\r\nd\r\n0\r\nTrailer: x\r\n\r\n"


@pytest.fixture
async def server() -> AsyncIterator[RawServer]:
    async with raw_server() as served:
        yield served


def place(server: RawServer) -> Place:
    return Place(server.url, {"Connection": "close", "Key": "value"})


async def fetched(
    server: RawServer, *pieces: bytes | asyncio.Event | None, silence_s: float = 10, limit: int = 1000
) -> tuple[int, bytes]:
    """Status and body, when the server answers with these pieces and then hangs up."""
    server.answers["/x"] = [*pieces, None]
    async with posted(place(server), "/x", b"body", silence_s=silence_s) as answer:
        return answer.status, await answer.read(limit)


@given(st.lists(st.integers(0, len(CHUNKED)), max_size=8))
@settings(max_examples=20, suppress_health_check=[HealthCheck.function_scoped_fixture])
async def test_chunks_are_the_same_however_they_are_cut(server: RawServer, cuts: list[int]) -> None:
    edges = [0, *sorted(cuts), len(CHUNKED)]
    pieces = [CHUNKED[start:end] for start, end in pairwise(edges)]
    assert await fetched(server, b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n", *pieces) == (200, b"Hello, wide world")


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
    async with posted(place(server), "/health", None, silence_s=10) as answer:
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
    async with posted(place(server), "/x", b"", silence_s=10) as answer:
        largest = total = 0
        while data := await answer.next():
            largest, total = max(largest, len(data)), total + len(data)
            for _ in range(20):
                await asyncio.sleep(0)
    assert total == len(block) * blocks
    assert largest < 2**20


async def test_answer_that_ends_with_the_head_is_whole(server: RawServer) -> None:
    assert await fetched(server, b"HTTP/1.1 204 No Content\r\n\r\n") == (204, b"")


async def test_what_is_said_in_advance_is_no_answer(server: RawServer) -> None:
    early = b"HTTP/1.1 100 Continue\r\nContent-Length: 9\r\n\r\nHTTP/1.1 103 Early Hints\r\nLink: x\r\n\r\n"
    server.answers["/x"] = [early, b"HTTP/1.1 200 OK\r\nKind: Late\r\n\r\nHello", None]
    async with posted(place(server), "/x", b"", silence_s=10) as answer:
        assert (answer.status, answer.headers, await answer.read(100)) == (200, [("kind", "Late")], b"Hello")


@pytest.mark.parametrize(
    "url", ["ftp://x", "http://", "http://u@x", "http://x:99999", "http://x:0", "x", "http://x y", "http://x\u2028y"]
)
def test_address_that_is_none_is_refused(url: str) -> None:
    with pytest.raises(ValueError, match=r"."):
        Place(url, {})


@pytest.mark.parametrize("value", ["a\r\nB: c", "a\nb", "\0", "é"])
def test_header_that_cannot_be_sent_is_refused(value: str) -> None:
    with pytest.raises(ValueError, match="cannot be sent"):
        Place("http://x", {"Authorization": value})


def test_request_names_the_server_as_it_was_named_and_keeps_to_its_path() -> None:
    assert Place("https://[::1]:8/a b/%41?q", {}).request("/v1", b"{}")[0] == (
        b"POST /a%20b/%41/v1 HTTP/1.1\r\nHost: [::1]:8\r\nContent-Length: 2\r\n\r\n{}"
    )
    assert Place("http://bücher.example", {}).request("/v1", None) == (
        b"GET /v1 HTTP/1.1\r\nHost: xn--bcher-kva.example\r\n\r\n",
    )
    head, body = Place("http://x", {}).request("/", bytes(100_000))
    assert head.endswith(b"Content-Length: 100000\r\n\r\n")
    assert len(body) == 100_000


# ── Connections that are used again ──────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
async def pool() -> AsyncIterator[Pool]:
    made = Pool(max_connections=2, connect_s=5, silence_s=5, idle_s=4)
    yield made
    made.close()


HELLO = b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nHello"


async def asked(pool: Pool, where: Place) -> bytes:
    """The body of one answer, read to its end."""
    answer = await pool.post(where, "/x", b"{}")
    try:
        return await answer.read(100)
    finally:
        pool.release(where, answer)


async def end_of(answer: Answer) -> None:
    """Return once its connection has ended."""
    with suppress(BrokenAnswer):
        while True:
            await answer.connection.more()


async def test_connection_is_used_again_when_its_answer_was_read(server: RawServer, pool: Pool) -> None:
    server.answers["/x"] = [HELLO]
    where = Place(server.url, {})
    assert [await asked(pool, where) for _ in range(3)] == [b"Hello"] * 3
    assert (server.connections, len(server.asked)) == (1, 3)


async def test_released_twice_is_free_once(server: RawServer, pool: Pool) -> None:
    server.answers["/x"] = [HELLO]
    where = Place(server.url, {})
    for _ in range(3):
        answer = await pool.post(where, "/x", b"{}")
        await answer.read(100)
        pool.release(where, answer)
        pool.release(where, answer)
    one, two = [await pool.post(where, "/x", b"{}") for _ in range(2)]
    third = asyncio.ensure_future(pool.post(where, "/x", b"{}"))
    await asyncio.sleep(0)
    assert not third.done()
    pool.release(where, one)
    pool.release(where, await third)
    pool.release(where, two)


@pytest.mark.parametrize(
    "answer",
    [
        b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\nConnection: close\r\n\r\nHello",
        b"HTTP/1.0 200 OK\r\nContent-Length: 5\r\n\r\nHello",
        HELLO + b"more than was asked for",
        HELLO + HELLO,
    ],
)
async def test_connection_that_is_at_its_end_or_out_of_step_is_not_used_again(
    server: RawServer, pool: Pool, answer: bytes
) -> None:
    server.answers["/x"] = [answer]
    where = Place(server.url, {})
    assert [await asked(pool, where) for _ in range(2)] == [b"Hello"] * 2
    assert server.connections == 2


async def test_answer_that_is_not_read_ends_its_connection(server: RawServer, pool: Pool) -> None:
    server.answers["/x"] = [b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\nHello", asyncio.Event()]
    where = Place(server.url, {})
    answer = await pool.post(where, "/x", b"{}")
    assert await answer.next() == b"Hello"
    pool.release(where, answer)
    await asyncio.wait_for(server.gone.wait(), 2)


async def test_connection_that_its_server_ended_meanwhile_is_not_used_again(server: RawServer, pool: Pool) -> None:
    server.answers["/x"] = [HELLO, None]
    where = Place(server.url, {})
    answer = await pool.post(where, "/x", b"{}")
    await answer.read(100)
    await end_of(answer)
    pool.release(where, answer)
    assert await asked(pool, where) == b"Hello"
    assert server.connections == 2


async def test_idle_connection_is_ended_in_time(server: RawServer) -> None:
    server.answers["/x"] = [HELLO]
    pool, where = Pool(max_connections=2, connect_s=5, silence_s=5, idle_s=0.02), Place(server.url, {})
    answer = await pool.post(where, "/x", b"{}")
    await answer.read(100)
    pool.release(where, answer)
    await end_of(answer)
    pool.close()


async def test_whoever_waits_is_told_when_everything_is_closed(server: RawServer, pool: Pool) -> None:
    server.answers["/x"] = [asyncio.Event()]
    where = Place(server.url, {})
    waiting = asyncio.ensure_future(pool.post(where, "/x", b"{}"))
    while not server.asked:
        await asyncio.sleep(0)
    pool.close()
    with pytest.raises(BrokenAnswer):
        await waiting


async def test_request_that_is_cancelled_leaves_its_place_to_others(server: RawServer) -> None:
    server.answers |= {"/never": [asyncio.Event()], "/x": [HELLO]}
    pool, where = Pool(max_connections=1, connect_s=5, silence_s=5, idle_s=4), Place(server.url, {})
    waiting = asyncio.ensure_future(pool.post(where, "/never", b"{}"))
    while not server.asked:
        await asyncio.sleep(0)
    waiting.cancel()
    assert await asked(pool, where) == b"Hello"
    pool.close()


async def test_second_release_does_not_take_the_connection_from_whoever_has_it_now(server: RawServer, pool: Pool) -> None:
    server.answers["/x"] = [HELLO]
    where = Place(server.url, {})
    first = await pool.post(where, "/x", b"{}")
    await first.read(100)
    pool.release(where, first)
    second = await pool.post(where, "/x", b"{}")
    pool.release(where, first)
    assert second.connection is first.connection
    assert await second.read(100) == b"Hello"
    pool.release(where, second)


@pytest.mark.parametrize("late", [None, b"HTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\nEVIL"], ids=["end", "unsolicited"])
async def test_what_came_late_is_seen_before_a_connection_is_used_again(pool: Pool, late: bytes | None) -> None:
    """Without the event loop having had time to look: that is what a busy one is like."""
    listener = socket.create_server(("127.0.0.1", 0))

    def serve() -> list[socket.socket]:
        peer, _ = listener.accept()
        peer.recv(1000)
        peer.sendall(HELLO)
        return [peer]

    where = Place(f"http://127.0.0.1:{listener.getsockname()[1]}", {})
    serving = asyncio.create_task(asyncio.to_thread(serve))
    answer = await pool.post(where, "/x", b"{}")
    await answer.read(100)
    [peer] = await serving
    pool.release(where, answer)
    peer.sendall(late) if late else peer.close()
    assert not answer.connection.is_quiet()
    assert pool._take(where) is None
    for each in (peer, listener):
        each.close()


@pytest.mark.parametrize("status", [b"099", b"000", b"600", b"999"])
async def test_status_that_is_none_is_broken(server: RawServer, status: bytes) -> None:
    with pytest.raises(BrokenAnswer):
        await fetched(server, b"HTTP/1.1 " + status + b" X\r\nContent-Length: 2\r\n\r\nok")


async def test_answer_that_we_cut_off_is_not_whole(server: RawServer) -> None:
    server.answers["/x"] = [b"HTTP/1.1 200 OK\r\n\r\npart", asyncio.Event()]
    pool, where = Pool(max_connections=2, connect_s=5, silence_s=5, idle_s=4), Place(server.url, {})
    answer = await pool.post(where, "/x", b"{}")
    assert await answer.next() == b"part"
    pool.close()
    with pytest.raises(BrokenAnswer):
        await answer.next()


async def test_server_that_we_keep_waiting_is_not_silent(server: RawServer) -> None:
    block = b"x" * 2**20
    server.answers["/x"] = [b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % (8 * 2**20), *[block] * 8]
    async with posted(place(server), "/x", b"", silence_s=0.05) as answer:
        while not answer.connection._is_paused:
            await asyncio.sleep(0)
        answer.connection._heard_at -= 1
        answer.connection._listen()
        assert len(await answer.read(8 * 2**20)) == 8 * 2**20


async def test_server_that_ends_while_it_is_spoken_to_is_noticed_at_once(pool: Pool) -> None:
    async def hang_up(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write_eof()
        await over.wait()
        writer.transport.abort()

    over = asyncio.Event()
    async with await asyncio.start_server(hang_up, "127.0.0.1", 0) as listening:
        where = Place(f"http://127.0.0.1:{listening.sockets[0].getsockname()[1]}", {})
        with pytest.raises(BrokenAnswer):
            await asyncio.wait_for(pool.post(where, "/x", bytes(20 * 2**20)), 3)
        over.set()


async def test_place_in_a_full_pool_is_not_waited_for_for_ever(server: RawServer) -> None:
    server.answers["/x"] = [HELLO]
    pool, where = Pool(max_connections=1, connect_s=0.02, silence_s=5, idle_s=4), Place(server.url, {})
    answer = await pool.post(where, "/x", b"{}")
    with pytest.raises(TimeoutError):
        await pool.post(where, "/x", b"{}")
    await answer.read(100)
    pool.release(where, answer)
    assert await asked(pool, where) == b"Hello"
    pool.close()


# ── TLS ──────────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def tls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[ssl.SSLContext]:
    """For a server whose certificate is good for 127.0.0.1, and trusted."""
    certificate = self_signed(tmp_path, x509.IPAddress(ip_address("127.0.0.1")))
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
    http1._trust.cache_clear()
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate)
    yield context
    http1._trust.cache_clear()


@pytest.fixture
async def secured(tls: ssl.SSLContext) -> AsyncIterator[RawServer]:
    async with raw_server(tls) as served:
        yield served


async def test_answer_comes_by_tls_and_its_connection_is_used_again(secured: RawServer, pool: Pool) -> None:
    secured.answers["/x"] = [HELLO]
    where = Place(secured.url, {})
    assert [await asked(pool, where) for _ in range(2)] == [b"Hello"] * 2
    assert secured.connections == 1


async def test_certificate_for_another_name_or_of_nobody_is_refused(
    secured: RawServer, pool: Pool, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ssl.SSLCertVerificationError, match="match"):
        await pool.post(Place(secured.url.replace("127.0.0.1", "localhost"), {}), "/x", b"{}")
    monkeypatch.delenv("SSL_CERT_FILE")
    http1._trust.cache_clear()
    with pytest.raises(ssl.SSLCertVerificationError, match="self-signed"):
        await pool.post(Place(secured.url, {}), "/x", b"{}")
    assert secured.asked == []


async def test_answer_without_a_length_that_ends_by_tls_is_whole(secured: RawServer) -> None:
    assert await fetched(secured, b"HTTP/1.1 200 OK\r\n\r\nHello") == (200, b"Hello")


@pytest.mark.parametrize("body", [b"", b"Hello", b"x" * 2 * http1._HIGH_WATER_BYTES], ids=["none", "some", "much"])
async def test_answer_without_a_length_that_is_cut_below_tls_is_broken(tls: ssl.SSLContext, body: bytes) -> None:
    async def cut(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"body")
        writer.transport.set_write_buffer_limits(0)
        writer.write(b"HTTP/1.1 200 OK\r\n\r\n" + body)
        await writer.drain()
        # As somebody on the way would: the end of the connection, and none of what TLS says before it.
        writer.get_extra_info("socket").shutdown(socket.SHUT_WR)
        await reader.read()
        writer.transport.abort()

    async with await asyncio.start_server(cut, "127.0.0.1", 0, ssl=tls) as server:
        host, port = server.sockets[0].getsockname()
        async with posted(Place(f"https://{host}:{port}", {}), "/x", b"body", silence_s=10) as answer:
            with pytest.raises(BrokenAnswer, match="cut off"):
                await answer.read(len(body))
