"""A model's answer on its way to the terminal: words as they arrive, thinking set apart, figures at the end."""

import json
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from corral.cli import render
from corral.cli.context import Failed

_LABEL_WIDTH = 22


@dataclass(frozen=True, slots=True, kw_only=True)
class RunOptions:
    """What the command line asked for. think: None leaves it to the model."""

    model: str
    verbose: bool = False
    format: Any = None
    think: bool | str | None = None
    hide_thinking: bool = False
    keep_alive: str = ""
    dimensions: int = 0
    truncate: bool | None = None

    def body(self) -> dict[str, Any]:
        """What every request carries."""
        wanted = {"model": self.model, "format": self.format, "think": self.think, "keep_alive": self.keep_alive or None}
        return {name: value for name, value in wanted.items() if value is not None}


@dataclass(slots=True)
class _Printer:
    """Writes pieces of an answer as they come, with the thinking between two lines of its own."""

    hide_thinking: bool
    is_thinking: bool = False
    said: list[str] = field(default_factory=list)

    def thinking(self, text: str) -> None:
        if self.hide_thinking or not text:
            return
        if not self.is_thinking:
            self.is_thinking = True
            self._write(render.quiet("Thinking...") + "\n")
        self._write(render.quiet(text))

    def content(self, text: str) -> None:
        if not text:
            return
        if self.is_thinking:
            self.is_thinking = False
            self._write("\n" + render.quiet("...done thinking.") + "\n\n")
        self.said.append(text)
        self._write(text if not sys.stdout.isatty() else _without_controls(text))

    def _write(self, text: str) -> None:
        sys.stdout.write(text)
        sys.stdout.flush()


def _without_controls(text: str) -> str:
    # A model's words are no commands for the terminal; in a pipe they pass as they are.
    return "".join(char for char in text if char in "\n\t" or not (char < " " or "\x7f" <= char <= "\x9f"))


def show_answer(events: Iterator[Mapping[str, Any]], options: RunOptions) -> tuple[Mapping[str, Any], Mapping[str, Any]]:
    """Print an answer of generate or chat as it arrives. Returns (its last object, the message it makes up)."""
    printer, final = _Printer(options.hide_thinking), {}
    calls: list[Any] = []
    for event in events:
        message = event.get("message") or {}
        printer.thinking(event.get("thinking") or message.get("thinking") or "")
        printer.content(event.get("response") or message.get("content") or "")
        for call in message.get("tool_calls") or []:
            calls.append(call)
            function = call.get("function", {})
            arguments = json.dumps(function.get("arguments", {}))
            printer.content(f"Model called a non-existent function '{function.get('name', '')}()' with arguments: {arguments}\n")
        final = dict(event)
    return final, {"role": "assistant", "content": "".join(printer.said)}


def figures(final: Mapping[str, Any]) -> str:
    """What --verbose prints: durations, counts and rates of one answer."""
    prompt_count, prompt_ns = final.get("prompt_eval_count", 0), final.get("prompt_eval_duration", 0)
    eval_count, eval_ns = final.get("eval_count", 0), final.get("eval_duration", 0)
    rows = [
        ("total duration:", render.duration(final.get("total_duration", 0))),
        ("load duration:", render.duration(final.get("load_duration", 0))),
        ("prompt eval count:", f"{prompt_count} token(s)"),
        ("prompt eval duration:", render.duration(prompt_ns)),
        ("prompt eval rate:", _rate(prompt_count, prompt_ns)),
        ("eval count:", f"{eval_count} token(s)"),
        ("eval duration:", render.duration(eval_ns)),
        ("eval rate:", _rate(eval_count, eval_ns)),
    ]
    return "".join(f"{label:<{_LABEL_WIDTH}}{value}\n" for label, value in rows)


def _rate(count: int, ns: int) -> str:
    return f"{count / ns * 1e9:.2f} tokens/s" if ns else "0.00 tokens/s"


def show_failure(error: Failed) -> None:
    """An error within a conversation, which goes on."""
    sys.stderr.write(render.error_text(error.message, error.advice) + "\n")
