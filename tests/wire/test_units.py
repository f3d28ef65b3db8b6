"""Numbers as people read them."""

import pytest

from corral.wire.units import format_count, format_size


@pytest.mark.parametrize(
    ("number", "words"),
    [(0, "0"), (940, "940"), (999, "999"), (1000, "1 k"), (1_234_567, "1.2 M"), (999_999, "1 M"), (12_345, "12 k")],
)
def test_count_keeps_two_digits_that_matter(number: int, words: str) -> None:
    assert format_count(number) == words


def test_size_is_in_decimal_units() -> None:
    assert [format_size(size) for size in (1, 91_739_413, 1_100_000_000)] == ["1 B", "92 MB", "1.1 GB"]
