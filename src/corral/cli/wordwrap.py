"""Lines broken between words while the text still arrives. No terminal, no escape codes: text in, text out.

A word is held back until it is known to be whole, so that nothing has to be taken back from the screen: what has been written can
be copied from a recording as it stands. Four things are left alone: blanks before the first word of a line, a word that no line
can hold (a link stays in one piece), the lines of a fenced block (code broken for show no longer runs), and a width
that leaves no room for sensible lines. Wide characters, as of Chinese, may be broken between.
"""

import unicodedata

#: Columns that stay free at the right edge, and the narrowest terminal in which breaking lines still helps; both as in Ollama.
#: Source: ollama cmd/cmd.go displayResponse, fb30760.
_MARGIN, _NARROWEST = 5, 10
_TAB = 8
_JOINER = "\u200d"
_FENCE = "```"
_CLOSING = ("Pe", "Pf", "Po")


class WordWrap:
    """One text on its way into a column. Feed it pieces in their order and print what comes back; at the end, print `rest()`."""

    def __init__(self) -> None:
        self._limit = 0
        self._column = 0
        self._blanks = ""
        self._word = ""
        self._word_width = 0
        #: The first word of a line, as far as it tells whether a fenced block begins or ends.
        self._head = ""
        self._is_fenced = False
        #: Within a word that no line can hold: it goes on unbroken to its end.
        self._is_long = False
        self._is_joined = False

    def feed(self, text: str, columns: int) -> str:
        """What of the text can be printed now. columns: the terminal's width at this moment."""
        if columns < _NARROWEST:
            return self.rest() + text
        self._limit = columns - _MARGIN
        return "".join(map(self._add, text))

    def rest(self) -> str:
        """What was held back. The text may go on after it."""
        held = self._place() + self._blanks
        self._column, self._blanks = self._column_after(self._blanks), ""
        return held

    def _add(self, char: str) -> str:
        if char == "\n":
            return self._end_line()
        if len(self._head) < len(_FENCE) and (self._head or char not in " \t"):
            self._head += char
        if self._is_fenced:
            return char
        if char in " \t":
            self._is_long = False
            placed = self._place()
            self._blanks += char
            return placed
        return self._add_letter(char)

    def _add_letter(self, char: str) -> str:
        width = 0 if self._is_joined else char_width(char)
        self._is_joined = char == _JOINER
        # What has no width is part of the character before it, and no line begins with a comma.
        is_tied = width == 0 or (width == 2 and unicodedata.category(char) in _CLOSING)
        if width == 2 and not is_tied:
            self._is_long = False
            before = self._place()
            self._word, self._word_width = char, width
            return before + self._place()
        if self._is_long or (is_tied and not self._word):
            self._column += width
            return char
        self._word += char
        self._word_width += width
        if self._word_width <= self._limit:
            return ""
        self._is_long = True
        return self._place()

    def _place(self) -> str:
        """The held word, on this line where it fits, else on the next; the blanks between the two lines are not printed."""
        if not self._word:
            return ""
        width = self._column_after(self._blanks) + self._word_width
        if width > self._limit and self._column > 0:
            placed, self._column = f"\n{self._word}", self._word_width
        else:
            placed, self._column = self._blanks + self._word, width
        self._blanks, self._word, self._word_width = "", "", 0
        return placed

    def _column_after(self, blanks: str) -> int:
        column = self._column
        for char in blanks:
            column += _TAB - column % _TAB if char == "\t" else 1
        return column

    def _end_line(self) -> str:
        # Blanks at the end of a line may mean a break in Markdown; they stay.
        line = self._place() + self._blanks
        if self._head == _FENCE:
            self._is_fenced = not self._is_fenced
        self._column, self._head, self._blanks = 0, "", ""
        self._is_long = self._is_joined = False
        return f"{line}\n"


def char_width(char: str) -> int:
    """Columns that a terminal gives a character: 0 for what is drawn onto its neighbour, 2 for wide ones."""
    if char.isascii():
        return 1
    if unicodedata.category(char) in ("Mn", "Me", "Cf"):
        return 0
    return 2 if unicodedata.east_asian_width(char) in ("W", "F") else 1


def width_of(text: str) -> int:
    """Columns of a text without line ends."""
    return len(text) if text.isascii() else sum(map(char_width, text))
