"""Numbers as people read them."""

import pytest

from corral.wire.units import format_count, format_nanoseconds, format_size


@pytest.mark.parametrize(
    ("number", "words"),
    [(0, "0"), (940, "940"), (999, "999"), (1000, "1 k"), (1_234_567, "1.2 M"), (999_999, "1 M"), (12_345, "12 k")],
)
def test_count_keeps_two_digits_that_matter(number: int, words: str) -> None:
    assert format_count(number) == words


def test_size_is_in_decimal_units() -> None:
    assert [format_size(size) for size in (1, 91_739_413, 1_100_000_000)] == ["1 B", "92 MB", "1.1 GB"]


@pytest.mark.parametrize(
    ("ns", "text"),
    [
        (0, "0s"),
        (999, "999ns"),
        (45_200_000, "45.2ms"),
        (1_234_567_891, "1.234567891s"),
        (62_500_000_000, "1m2.5s"),
        (3_600_000_000_000, "1h0m0s"),
    ],
)
def test_duration_is_written_as_go_writes_it(ns: int, text: str) -> None:
    assert format_nanoseconds(ns) == text
