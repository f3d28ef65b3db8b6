"""A type for text that must not be shown."""

import hmac


def is_sendable(text: str) -> bool:
    """Whether a header can hold it: no line break, nothing but ASCII."""
    return text.isascii() and text.isprintable()


class Secret:
    """Text whose repr, str and format are `***`. `reveal()` gives it; equality takes constant time."""

    __slots__ = ("_text",)

    def __init__(self, text: str) -> None:
        self._text = text

    def reveal(self) -> str:
        """The secret itself: for the one line that sends, hashes or prints it."""
        return self._text

    def __repr__(self) -> str:
        return "***"

    __str__ = __repr__

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Secret):
            return NotImplemented
        return hmac.compare_digest(self._text.encode("utf-8", "surrogatepass"), other._text.encode("utf-8", "surrogatepass"))

    __hash__ = None  # type: ignore[assignment]  # hashing would let a secret be used as a dict key, where `==` leaks timing

    def __reduce__(self) -> tuple[object, ...]:
        raise TypeError("a Secret is not pickled")
