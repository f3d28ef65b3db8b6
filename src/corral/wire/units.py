"""Numbers as people read them: in pages, and in what the hub says about a quota."""

_PREFIXES = ("", "k", "M", "G", "T")


def format_size(size_bytes: int) -> str:
    """`92 MB`, `1.1 GB`: decimal units, as Ollama's listings have them."""
    return f"{_scaled(size_bytes)}B"


def format_count(number: int) -> str:
    """`940`, `12 k`, `1.2 M`."""
    return _scaled(number).rstrip()


def _scaled(number: float) -> str:
    index = 0
    # 999.5 would be written as 1000 of the smaller unit.
    while number >= 999.5 and index < len(_PREFIXES) - 1:
        number, index = number / 1000, index + 1
    digits = f"{number:.1f}" if index and number < 9.95 else f"{number:.0f}"
    return f"{digits.removesuffix('.0')} {_PREFIXES[index]}"
