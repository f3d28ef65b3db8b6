"""Foreign text made fit to be shown or logged: names that devices and people choose for themselves."""

import unicodedata

#: Punctuation a name may hold besides letters, marks and digits: enough for `Ada's MacBook (work)` and `ci-runner-3.example.org`.
_NAME_PUNCTUATION = frozenset(" ._-'()@+#,:/&")
MAX_NAME = 64


def one_line(text: str) -> str:
    """The text with everything that ends a line, moves a cursor or turns the writing direction written out as `\\u001b`."""
    if text.isascii() and text.isprintable():
        return text
    return "".join(_written_out(character) if _is_control(character) else character for character in text)


def _is_control(character: str) -> bool:
    # Cc: C0, DEL, C1. Cf: zero-width and bidirectional marks. Cs: lone surrogates, which no UTF-8 file takes. Zl, Zp: line ends.
    return unicodedata.category(character) in ("Cc", "Cf", "Cs", "Zl", "Zp")


def _written_out(character: str) -> str:
    return f"\\u{ord(character):04x}"


def shown_name(text: str) -> str:
    """A chosen name cut down to one short line of letters, digits and harmless punctuation; empty when nothing is left.

    Marks that pile up on one letter are cut as well, since they can hide the lines around them.
    """
    kept: list[str] = []
    # Cut before normalising too: a name of ten megabytes is not worth the work.
    for character in unicodedata.normalize("NFC", text[: 4 * MAX_NAME]):
        kind = unicodedata.category(character)[0]
        is_first_mark = kind == "M" and bool(kept) and unicodedata.category(kept[-1])[0] == "L"
        if kind in "LN" or character in _NAME_PUNCTUATION or is_first_mark:
            kept.append(character)
        elif kind == "Z" or character in "\t\r\n":
            kept.append(" ")
    return " ".join("".join(kept).split())[:MAX_NAME].strip()
