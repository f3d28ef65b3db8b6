"""A model's answer on its way to the terminal: words as they arrive, thinking set apart, figures at the end.

Source: ollama cmd/cmd.go chat, generate, renderToolCalls; api/types.go Metrics.Summary, fb30760.
"""

import json
import os
import sys
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from corral.cli import render
from corral.cli.api import ApiError
from corral.cli.context import Failed
from corral.cli.waiting import Waiting
from corral.cli.wordwrap import WordWrap
from corral.wire.units import format_nanoseconds

_LABEL_WIDTH = 22
_NS = 1_000_000_000


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """What was said. final: the stream's last object. is_cut: whether Ctrl-C ended it."""

    content: str
    thinking: str
    final: Mapping[str, Any]
    is_cut: bool

    @property
    def message(self) -> dict[str, Any]:
        """As a part of the conversation."""
        message = {"role": "assistant", "content": self.content}
        return {**message, "thinking": self.thinking} if self.thinking else message


class Column:
    """Writes a model's words to standard output: on a terminal without control characters, and broken between words if wanted; a
    pipe gets them as they are."""

    def __init__(self, *, is_wrapped: bool) -> None:
        self._is_terminal = sys.stdout.isatty()
        self._wrap = WordWrap() if is_wrapped and self._is_terminal else None

    def write(self, text: str, *, quiet: bool = False) -> None:
        """quiet: in grey on a terminal."""
        if self._is_terminal:
            text = render.plain_text(text)
        shown = self._wrap.feed(text, columns_of_terminal()) if self._wrap else text
        self._put(shown, quiet=quiet)

    def end(self, *, quiet: bool = False) -> None:
        """Write what was held back; what comes next begins on a line of its own."""
        if self._wrap:
            self._put(self._wrap.rest(), quiet=quiet)
            self._wrap = WordWrap()

    def _put(self, text: str, *, quiet: bool) -> None:
        if text:
            sys.stdout.write(render.quiet(text) if quiet else text)
            sys.stdout.flush()


def columns_of_terminal() -> int:
    """Columns of the terminal at this moment; 80 when it does not tell."""
    try:
        return os.get_terminal_size(sys.stdout.fileno()).columns or 80
    except OSError:
        return 80


@dataclass(slots=True)
class _Printer:
    """Puts the pieces of one answer where they belong."""

    column: Column
    hides_thinking: bool
    is_thinking: bool = False
    content: list[str] = field(default_factory=list)
    thoughts: list[str] = field(default_factory=list)

    def think(self, text: str) -> None:
        if not self.is_thinking:
            self.is_thinking = True
            print(render.quiet("Thinking..."), flush=True)
        self.thoughts.append(text)
        self.column.write(text, quiet=True)

    def say(self, text: str) -> None:
        self.stop_thinking()
        self.content.append(text)
        self.column.write(text)

    def call(self, calls: Iterable[Mapping[str, Any]]) -> None:
        """Calls of tools, of which the command line has none."""
        self.stop_thinking()
        self.column.end()
        lines = [tool_call_text(call.get("function") or {}) for call in calls]
        print("\n".join(map(render.quiet, lines)), end="", flush=True)

    def end(self) -> None:
        """Write what was held back, and close what is open."""
        self.stop_thinking()
        self.column.end()

    @property
    def has_begun(self) -> bool:
        """Whether anything of the answer is on the screen."""
        return bool(self.thoughts or self.content)

    def stop_thinking(self) -> None:
        if self.is_thinking:
            self.is_thinking = False
            self.column.end(quiet=True)
            ended = self.thoughts and self.thoughts[-1].endswith("\n")
            print(("" if ended else "\n") + render.quiet("...done thinking.") + "\n", flush=True)


def tool_call_text(function: Mapping[str, Any]) -> str:
    """One line about a call that nobody carries out."""
    arguments = json.dumps(function.get("arguments") or {}, ensure_ascii=False, separators=(",", ":"))
    name = render.plain(str(function.get("name") or ""))
    return f"  Model called a non-existent function '{name}()' with arguments: {render.plain(arguments)}"


def show_answer(events: Iterator[Mapping[str, Any]], *, is_wrapped: bool, hides_thinking: bool) -> Answer:
    """Print an answer of generate or chat as it arrives. Ctrl-C ends it, and what was said until then is returned."""
    printer = _Printer(Column(is_wrapped=is_wrapped), hides_thinking)
    final: Mapping[str, Any] = {}
    is_cut = False
    try:
        with Waiting() as waiting:
            for event in events:
                _show(event, printer, waiting)
                final = event
    except KeyboardInterrupt:
        is_cut = True
    except Failed:
        printer.end()
        if printer.has_begun:
            print()
        raise
    printer.end()
    return Answer(content="".join(printer.content), thinking="".join(printer.thoughts), final=final, is_cut=is_cut)


def _show(event: Mapping[str, Any], printer: _Printer, waiting: Waiting) -> None:
    message = event.get("message") or {}
    thinking = event.get("thinking") or message.get("thinking") or ""
    content = event.get("response") or message.get("content") or ""
    calls = event.get("tool_calls") or message.get("tool_calls") or ()
    if thinking and not printer.hides_thinking:
        waiting.stop()
        printer.think(thinking)
    if content:
        waiting.stop()
        printer.say(content)
    if calls:
        waiting.stop()
        printer.call(calls)


def show_stored(text: str, *, is_wrapped: bool) -> None:
    """An answer that was given before, as one that is given now."""
    column = Column(is_wrapped=is_wrapped)
    column.write(text)
    column.end()
    print("\n")


def figures(final: Mapping[str, Any]) -> str:
    """What --verbose prints: durations, counts and rates of one answer; of a figure that is missing, no line."""
    rows: list[tuple[str, str]] = []
    for label, name in (("total duration:", "total_duration"), ("load duration:", "load_duration")):
        if ns := final.get(name, 0):
            rows.append((label, format_nanoseconds(ns)))
    for label, name in (("prompt eval", "prompt_eval"), ("eval", "eval")):
        count, ns = final.get(f"{name}_count", 0), final.get(f"{name}_duration", 0)
        if count:
            rows.append((f"{label} count:", f"{count} token(s)"))
        if ns:
            # Whole seconds and the rest apart, as Go divides.
            seconds = ns // _NS + ns % _NS / _NS
            rows += [(f"{label} duration:", format_nanoseconds(ns)), (f"{label} rate:", f"{count / seconds:.2f} tokens/s")]
    return "".join(f"{label:<{_LABEL_WIDTH}}{value}\n" for label, value in rows)


def explained(error: Failed) -> Failed:
    """An error of inference with what to do about it, where the server's own words leave that open."""
    if not isinstance(error, ApiError):
        return error
    link = error.body.get("signin_url")
    if error.code == 401 and isinstance(link, str) and link.startswith(("https://", "http://")) and " " not in link:
        return Failed(error.message, f"{error.advice}, or open {link}")
    if error.code == 429:
        return Failed(error.message, "wait a little and ask again")
    return error


def show_failure(error: Failed) -> None:
    """An error within a conversation, which goes on."""
    sys.stderr.write(render.error_text(error.message, error.advice) + "\n")
