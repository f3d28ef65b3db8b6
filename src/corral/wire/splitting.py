"""Thoughts and tool calls, told apart from an answer that comes as text. Pure: pieces of text in, parts of the answer out.

Engines do this for the templates inside weights; for a prompt that a Go template made, the tags are known from the template
alone. Source: ollama thinking/parser.go and tools/tools.go, fb30760, for the behaviour.
"""

import json
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from corral.wire.documents import check_depth
from corral.wire.errors import CorralError

#: A call that is longer is no call.
_MAX_CALL_CHARACTERS = 4 * 1024 * 1024
_MAX_CALL_DEPTH = 20


def partial_end(text: str, tag: str) -> int:
    """How many characters at the end of the text may be the beginning of the tag."""
    return next((count for count in range(min(len(text), len(tag) - 1), 0, -1) if text.endswith(tag[:count])), 0)


class ThinkingSplitter:
    """An answer whose thoughts stand between two tags. They count only at its very beginning; space behind either tag is
    dropped. is_inside: whether the prompt has opened them already."""

    def __init__(self, opening: str, closing: str, *, is_inside: bool = False) -> None:
        self._opening = opening
        self._closing = closing
        self._state = "inside" if is_inside else "before"
        self._drops_space = is_inside
        self._held = ""

    def feed(self, text: str) -> tuple[str, str]:
        """(thoughts, content) that are certain by now."""
        self._held += text
        thoughts, content = "", ""
        if self._state == "before":
            content = self._look_for_opening()
        if self._state == "inside":
            thoughts = self._look_for_closing()
        if self._state == "after":
            content += self._taken()
        return thoughts, content

    def finish(self) -> tuple[str, str]:
        """(thoughts, content) that were held back because they might have been tags."""
        held, self._held = self._held, ""
        return (held, "") if self._state == "inside" else ("", held)

    def _look_for_opening(self) -> str:
        begun = self._held.lstrip()
        if begun.startswith(self._opening):
            self._held, self._state, self._drops_space = begun[len(self._opening) :], "inside", True
            return ""
        if self._opening.startswith(begun):
            return ""
        self._state = "after"
        # No tag, so nothing of it is ours to drop.
        return self._taken()

    def _look_for_closing(self) -> str:
        if self._drops_space:
            self._held = self._held.lstrip()
            self._drops_space = not self._held
        thoughts, found, rest = self._held.partition(self._closing)
        if found:
            self._held, self._state, self._drops_space = rest, "after", True
            return thoughts
        certain = len(self._held) - partial_end(self._held, self._closing)
        thoughts, self._held = self._held[:certain], self._held[certain:]
        return thoughts

    def _taken(self) -> str:
        text, self._held = self._held, ""
        if self._drops_space:
            text = text.lstrip()
            self._drops_space = not text
        return text


@dataclass(frozen=True, slots=True)
class _Call:
    name: str
    arguments: dict[str, Any]


class CallSplitter:
    """An answer that may hold calls of the named tools as JSON, behind a tag. `{` and `[` as tags count only when the answer
    begins with them. Text behind the first call is dropped, which closes it or repeats it."""

    def __init__(self, tag: str, names: Collection[str]) -> None:
        self._tag = tag
        self._is_bare = tag in ("{", "[")
        # The longest first, so that `get` is not found in `get_weather`.
        self._names = sorted(names, key=len, reverse=True)
        self._state = "looking"
        self._held = ""
        self._has_calls = False
        self._scanner = _Objects()

    def feed(self, text: str) -> tuple[str, list[dict[str, Any]]]:
        """(content, complete calls in OpenAI's shape) that are certain by now."""
        if self._state == "done":
            return text, []
        self._held += text
        content = ""
        if self._state == "looking":
            content = self._look_for_tag()
            if self._state != "calling":
                return content, []
        calls = [call for item in self._scanner.feed(self._held) for call in self._calls_of(*item)]
        self._has_calls |= bool(calls)
        if not self._has_calls and (len(self._held) > _MAX_CALL_CHARACTERS or (self._is_bare and self._scanner.is_closed)):
            self._state = "done"
            held, self._held = self._held, ""
            return content + held, []
        return content, [{"function": {"name": call.name, "arguments": call.arguments}} for call in calls]

    def finish(self) -> str:
        """Content that was held back and turned out to be no call."""
        held, self._held = self._held, ""
        return "" if self._has_calls else held

    def _look_for_tag(self) -> str:
        start = self._held.find(self._tag)
        certain = start if start >= 0 else len(self._held) - partial_end(self._held, self._tag)
        content = self._held[:certain]
        if self._is_bare and content.strip():
            self._state = "done"
            content, self._held = self._held, ""
            return content
        self._held = self._held[certain:]
        if start >= 0:
            self._state = "calling"
        return content

    def _calls_of(self, before: str, value: Mapping[str, Any]) -> list[_Call]:
        calls = list(self._named_calls(value, 0))
        if calls:
            return calls
        name = next((name for name in self._names if name in before), None)
        return [] if name is None else [_Call(name, dict(value))]

    def _named_calls(self, value: Any, depth: int) -> Iterator[_Call]:
        """The calls within a JSON value: `{"name": tool, "arguments": …}` or `{tool: arguments}`, at any depth."""
        if depth > _MAX_CALL_DEPTH:
            return
        if isinstance(value, list):
            for item in value:
                yield from self._named_calls(item, depth + 1)
        if not isinstance(value, dict):
            return
        if value.get("name") in self._names:
            given = next((found for key in ("arguments", "parameters") if (found := _arguments(value.get(key))) is not None), {})
            yield _Call(value["name"], given)
            return
        for key, item in value.items():
            if key in self._names and (given_item := _arguments(item)) is not None:
                yield _Call(key, given_item)
            else:
                yield from self._named_calls(item, depth + 1)


def _arguments(value: Any) -> dict[str, Any] | None:
    """An object, or one written as text."""
    if isinstance(value, str):
        value = _parsed(value)
    return value if isinstance(value, dict) else None


def _parsed(text: str) -> Any:
    try:
        value = json.loads(text)
        # What the parser bears differs between Pythons by thousands of levels.
        check_depth(value, "call")
    except (ValueError, RecursionError, CorralError):
        return None
    return value


class _Objects:
    """Finds the complete JSON objects in a text that grows. Looks at every character once. is_closed: a bracket was opened and
    all are closed again."""

    def __init__(self) -> None:
        self.is_closed = False
        self._at = 0
        self._end = 0
        self._start = 0
        self._braces = 0
        self._brackets = 0
        self._is_text = False
        self._is_escaped = False

    def feed(self, text: str) -> Iterator[tuple[str, Mapping[str, Any]]]:
        """(the text before it, the object) for each that is complete now. text: everything so far."""
        while self._at < len(text):
            character = text[self._at]
            self._at += 1
            if self._is_text:
                self._in_text(character)
            elif character == '"':
                self._is_text = True
            elif character in "{}[]":
                value = self._bracket(character, text)
                if isinstance(value, dict):
                    yield text[self._end : self._start], value
                    self._end = self._at

    def _in_text(self, character: str) -> None:
        if self._is_escaped:
            self._is_escaped = False
        elif character == "\\":
            self._is_escaped = True
        else:
            self._is_text = character != '"'

    def _bracket(self, character: str, text: str) -> Any:
        """The JSON value that ends here, if one does."""
        value = None
        if character == "{":
            self._start = self._start if self._braces else self._at - 1
            self._braces += 1
        elif character == "}" and self._braces:
            self._braces -= 1
            value = _parsed(text[self._start : self._at]) if not self._braces else None
        elif not self._braces:
            self._brackets = max(0, self._brackets + (character == "[") - (character == "]"))
        self.is_closed |= character in "}]" and not self._braces and not self._brackets
        return value
