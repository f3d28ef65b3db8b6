"""Sending blobs: readers who stop, files that change while they are read, and servers that send files by themselves."""

import asyncio
import os
from pathlib import Path
from typing import Any

import pytest
from starlette.requests import Request

from corral.core.records import RequestFacts
from corral.edges.blob_response import BLOCK_BYTES, Blob, bare_response, blob_response
from corral.edges.bodies import Disconnected
from corral.wire.errors import CorralError
from fakes_registry import digest_of

CONTENT = os.urandom(3 * BLOCK_BYTES + 7)


def request_for(method: str = "GET", **headers: str) -> Request:
    """A request for a blob."""
    sent = {name.replace("_", "-"): [value] for name, value in headers.items()}
    facts = RequestFacts(method=method, target="/", headers=sent, body=b"", network="")
    return Request({"type": "http", "method": method, "corral.facts": facts, "headers": []})


@pytest.fixture
def blob(tmp_path: Path) -> Blob:
    path = tmp_path / "blob"
    path.write_bytes(CONTENT)
    return Blob(digest=digest_of(CONTENT), size_bytes=len(CONTENT), source=str(path))


def path_of(blob: Blob) -> Path:
    assert isinstance(blob.source, str)
    return Path(blob.source)


async def sent_by(response: Any, *, read: int | None = None, extensions: tuple[str, ...] = ()) -> list[dict[str, Any]]:
    """The messages of a response, to a reader who takes so many of them and then none."""
    messages: list[dict[str, Any]] = []

    async def send(message: dict[str, Any]) -> None:
        if read is not None and len(messages) >= read:
            await asyncio.Event().wait()
        messages.append(message)

    await response({"type": "http", "extensions": {key: {} for key in extensions}}, None, send)
    return messages


def body_of(messages: list[dict[str, Any]]) -> bytes:
    return b"".join(message.get("body", b"") for message in messages)


def open_files() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


async def test_whole_file_is_sent_in_small_blocks_and_closed(blob: Blob) -> None:
    before = open_files()
    messages = await sent_by(await blob_response(request_for(), blob, {"X-More": "yes"}))
    assert body_of(messages) == CONTENT
    assert [message.get("more_body") for message in messages[1:]] == [True, True, True, False]
    assert (b"x-more", b"yes") in messages[0]["headers"]
    assert open_files() == before


@pytest.mark.parametrize(("wanted", "part"), [({}, (0, len(CONTENT))), ({"range": "bytes=5-9"}, (5, 5))])
async def test_file_is_left_to_a_server_that_can_send_it(blob: Blob, wanted: dict[str, str], part: tuple[int, int]) -> None:
    before = open_files()
    messages = await sent_by(await blob_response(request_for(**wanted), blob, {}), extensions=("http.response.zerocopysend",))
    [only] = messages[1:]
    assert (only["type"], only["offset"], only["count"]) == ("http.response.zerocopysend", *part)
    assert not only["more_body"]
    assert open_files() == before


async def test_empty_file_is_sent_as_nothing(tmp_path: Path) -> None:
    (tmp_path / "empty").touch()
    empty = Blob(digest=digest_of(b""), size_bytes=0, source=str(tmp_path / "empty"))
    assert (await sent_by(await blob_response(request_for(), empty, {})))[1:] == [
        {"type": "http.response.body", "body": b"", "more_body": False}
    ]


async def test_r07_reader_who_stops_is_let_go_and_the_file_closed(blob: Blob) -> None:
    before = open_files()
    response = await blob_response(request_for(), blob, {}, stall_s=0.001)
    with pytest.raises(Disconnected):
        await sent_by(response, read=2)
    assert open_files() == before


async def test_f24_file_cut_short_while_it_is_read_ends_the_connection(blob: Blob) -> None:
    response = await blob_response(request_for(), blob, {})
    path_of(blob).write_bytes(CONTENT[: BLOCK_BYTES + 1])
    with pytest.raises(Disconnected):
        await sent_by(response)


@pytest.mark.parametrize("method", ["GET", "HEAD"])
@pytest.mark.parametrize("content", [None, CONTENT[:-1], CONTENT + b"x"])
async def test_f24_file_that_is_not_the_blob_is_unknown(blob: Blob, method: str, content: bytes | None) -> None:
    path_of(blob).unlink()
    if content is not None:
        path_of(blob).write_bytes(content)
    with pytest.raises(CorralError) as caught:
        await blob_response(request_for(method), blob, {})
    assert caught.value.code == "blob_unknown"


async def test_blob_made_of_bytes_is_sent_whole_and_in_parts() -> None:
    blob = Blob(digest=digest_of(b"abcdef"), size_bytes=6, source=b"abcdef")
    assert body_of(await sent_by(await blob_response(request_for(), blob, {}))) == b"abcdef"
    assert body_of(await sent_by(await blob_response(request_for(range="bytes=1-2"), blob, {}))) == b"bc"
    assert body_of(await sent_by(await blob_response(request_for("HEAD"), blob, {}))) == b""


async def test_bare_response_without_content_says_so() -> None:
    [start, _] = await sent_by(bare_response(202, {"X": "y"}))
    assert start["headers"] == [(b"content-length", b"0"), (b"x", b"y")]
    [start, _] = await sent_by(bare_response(204, {}))
    assert start["headers"] == []
