"""Streams as bytes: what is encoded, and that decoding does not depend on how a socket cuts the bytes."""

import itertools

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from corral.wire.errors import CorralError
from corral.wire.frames import (
    NdjsonDecoder,
    SseDecoder,
    SseEvent,
    encode_ndjson,
    encode_sse,
    ndjson_error,
    sse_error,
)

LINE_ENDS = ("\n", "\r\n", "\r")
names = st.text(st.characters(codec="utf-8", exclude_characters="\r\n\0"), max_size=8)
sse_lines = st.one_of(
    names.map(lambda text: f"data: {text}"),
    names.map(lambda text: f"data:{text}"),
    names.map(lambda text: f"event: {text}"),
    names.map(lambda text: f": {text}"),
    names,
    st.just(""),
)


def cut(data: bytes, positions: list[int]) -> list[bytes]:
    """data in pieces, some of them possibly empty."""
    marks = [0, *sorted(position % (len(data) + 1) for position in positions), len(data)]
    return [data[start:end] for start, end in itertools.pairwise(marks)]


def read_sse(pieces: list[bytes]) -> list[SseEvent]:
    decoder = SseDecoder()
    return [event for piece in pieces for event in decoder.feed(piece)]


def read_ndjson(pieces: list[bytes]) -> list[bytes]:
    decoder = NdjsonDecoder()
    return [line for piece in pieces for line in decoder.feed(piece)] + decoder.finish()


def feed_all(decoder: NdjsonDecoder | SseDecoder, pieces: list[bytes]) -> None:
    for piece in pieces:
        decoder.feed(piece)


def test_value_encodes_to_one_line() -> None:
    assert encode_ndjson({"a": "x\ny"}) == b'{"a":"x\\ny"}\n'


def test_value_encodes_to_one_event() -> None:
    assert encode_sse({"a": 1}) == b'data: {"a":1}\n\n'


def test_native_error_frame_keeps_details() -> None:
    error = CorralError("unauthorized", detail={"signin_url": "http://h/connect"})
    assert ndjson_error(error) == b'{"error":"unauthorized","signin_url":"http://h/connect"}\n'


def test_openai_error_frame_is_the_openai_error_object() -> None:
    assert (
        sse_error(CorralError("engine_failed", "gone"))
        == b'data: {"error":{"message":"gone","type":"api_error","param":null,"code":null}}\n\n'
    )


@given(
    lines=st.lists(sse_lines, max_size=12),
    ends=st.lists(st.sampled_from(LINE_ENDS), min_size=12, max_size=12),
    cuts=st.lists(st.integers(0)),
)
@example(lines=["data: a", "", "data: b", ""], ends=["\r\n"] * 12, cuts=[8, 9, 10, 11])
def test_sse_decodes_the_same_for_any_cut(lines: list[str], ends: list[str], cuts: list[int]) -> None:
    data = "".join(line + end for line, end in zip(lines, ends, strict=False)).encode()
    assert read_sse(cut(data, cuts)) == read_sse([data])


@given(
    lines=st.lists(st.dictionaries(names, st.integers(), max_size=2), max_size=8),
    cuts=st.lists(st.integers(0)),
    is_ended=st.booleans(),
)
def test_ndjson_decodes_the_same_for_any_cut(lines: list[dict[str, int]], cuts: list[int], is_ended: bool) -> None:
    encoded = [encode_ndjson(line) for line in lines]
    data = b"".join(encoded) if is_ended else b"".join(encoded).removesuffix(b"\n")
    assert read_ndjson(cut(data, cuts)) == [line.strip() for line in encoded]


@given(st.lists(st.dictionaries(names, names, max_size=3)), st.lists(st.integers(0)))
def test_sse_gives_back_what_was_encoded(values: list[dict[str, str]], cuts: list[int]) -> None:
    encoded = [encode_sse(value) for value in values]
    expected = [SseEvent(event.removeprefix(b"data: ").rstrip(b"\n")) for event in encoded]
    assert read_sse(cut(b"".join(encoded), cuts)) == expected


def test_sse_joins_data_lines_and_keeps_the_name() -> None:
    assert read_sse([b"event: x\ndata: a\ndata: b\n\n"]) == [SseEvent(b"a\nb", "x")]


def test_sse_skips_comments_ids_and_events_without_data() -> None:
    assert read_sse([b": hi\nid: 1\nretry: 5\n\nevent: ping\n\ndata: a\n\n"]) == [SseEvent(b"a")]


def test_sse_name_does_not_leak_into_the_next_event() -> None:
    assert read_sse([b"event: x\n\ndata: a\n\n"]) == [SseEvent(b"a")]


def test_sse_drops_an_event_that_the_end_cuts_off() -> None:
    assert read_sse([b"data: a\n\ndata: b\n"]) == [SseEvent(b"a")]


def test_sse_byte_order_mark_is_skipped() -> None:
    assert read_sse([b"\xef\xbb", b"\xbfdata: a\n\n"]) == [SseEvent(b"a")]


def test_ndjson_blank_lines_are_skipped() -> None:
    assert read_ndjson([b"\n{}\r\n \n[]\n"]) == [b"{}", b"[]"]


@pytest.mark.parametrize("pieces", [[b"x" * 11], [b"x" * 6, b"x" * 6], [b"a\n" + b"x" * 11]])
def test_ndjson_line_over_the_bound_is_refused(pieces: list[bytes]) -> None:
    decoder = NdjsonDecoder(max_bytes=10)
    with pytest.raises(CorralError, match="larger than 10 bytes") as caught:
        feed_all(decoder, pieces)
    assert caught.value.code == "too_large"


@pytest.mark.parametrize("pieces", [[b"data: " + b"x" * 11], [b"data: xxxxx\n"] * 3])
def test_sse_event_over_the_bound_is_refused(pieces: list[bytes]) -> None:
    decoder = SseDecoder(max_bytes=13)
    with pytest.raises(CorralError, match="larger than 13 bytes"):
        feed_all(decoder, pieces)
