"""Recommended models: which of a foreign list can be used."""

from typing import Any

import msgspec
import pytest

from corral.wire.recommendations import Recommendation, parse_recommendations, recommendations_body

LIMITS = {"context_length": 8, "max_output_tokens": 4}


def parsed(*rows: object) -> list[Recommendation]:
    return parse_recommendations(msgspec.json.encode({"recommendations": rows}))


def test_row_keeps_what_is_known_and_is_written_without_the_rest() -> None:
    row: dict[str, Any] = {"model": " m:cloud ", "description": " d ", **LIMITS, "required_plan": "pro", "new": 1}
    assert msgspec.json.encode(recommendations_body(parsed(row, {"model": "local", "description": "l", "vram_bytes": 7}))) == (
        b'{"recommendations":[{"model":"m:cloud","description":"d","context_length":8,"max_output_tokens":4,"required_plan":"pro"},'
        b'{"model":"local","description":"l","vram_bytes":7}]}'
    )


@pytest.mark.parametrize(
    "row",
    [
        {"model": "m:cloud", "description": "without limits"},
        {"model": "m:20b-cloud", "description": "", "context_length": 8},
        {"model": " ", "description": ""},
        {"model": "m:cloud:local", "description": ""},
        {"model": 7, "description": ""},
        {"description": ""},
        "m",
        None,
    ],
)
def test_row_that_cannot_be_used_is_left_out(row: object) -> None:
    assert [one.model for one in parsed(row, {"model": "good", "description": ""})] == ["good"]


def test_model_is_listed_once_and_the_list_is_bounded() -> None:
    rows = [{"model": f"m{number % 150}", "description": ""} for number in range(300)]
    assert len(parsed(*rows)) == 100
    assert len(parsed(rows[0], rows[0])) == 1


@pytest.mark.parametrize("body", [b"", b"x", b"[]", b"{}", b'{"recommendations":{}}', b"[" * 10_000, b"\xff"])
def test_answer_that_is_no_list_recommends_nothing(body: bytes) -> None:
    assert parse_recommendations(body) == []
