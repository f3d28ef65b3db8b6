"""Bodies whose length says nothing of what they take."""

import pytest

from corral.wire.errors import CorralError
from corral.wire.jsonparts import MAX_PARTS, check_parts
from corral.wire.native import ChatRequest, decode


@pytest.mark.parametrize(
    ("piece", "parts"),
    [(b"{},", 1), (b"[],", 1), (b"null,", 1), (b'{"content":null},', 2), (b'"[",{"a":"\\"{"},', 1), (b"nul[,", 1)],
)
def test_t106_text_of_too_many_parts_is_refused(piece: bytes, parts: int) -> None:
    check_parts(piece * (MAX_PARTS // parts))
    with pytest.raises(CorralError, match="more than 120,000 objects, lists and nulls") as refused:
        check_parts(piece * (MAX_PARTS // parts + 1))
    assert refused.value.status == 413


@pytest.mark.parametrize(
    "text",
    [
        b'"' + b"{[null" * 50_000 + b'"',
        b'"' + b'\\"{' * 50_000,
        b'"' * 300_001,
        b"n" * 300_000,
        b"\\" * 300_000,
        b'"\\\\"' * 90_000,
    ],
    ids=["braces in a string", "escaped quotes without an end", "quotes", "no nulls", "backslashes", "escaped backslashes"],
)
def test_text_of_few_parts_is_let_through(text: bytes) -> None:
    check_parts(text)


def test_t106_chat_of_a_million_empty_messages_is_refused_before_it_is_made() -> None:
    with pytest.raises(CorralError) as refused:
        decode(b'{"model":"m","messages":[' + b"{}," * 1_000_000 + b"{}]}", ChatRequest)
    assert refused.value.code == "too_large"
