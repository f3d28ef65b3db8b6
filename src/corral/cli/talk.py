"""The conversation of `corral run MODEL` on a terminal: a prompt, a history file, and a few commands.

prompt_toolkit is used for the line alone (editing, history, paste); everything else is printed plainly, so that what was said can
be scrolled and copied like any other text. The history file is Ollama's, one question a line.
"""

import contextlib
import os
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from prompt_toolkit import PromptSession
from prompt_toolkit.formatted_text import ANSI
from prompt_toolkit.history import History, InMemoryHistory

from corral.cli.answers import RunOptions, figures, show_answer, show_failure
from corral.cli.api import LocalApi
from corral.cli.context import Environment, Failed

_PLACEHOLDER = ANSI("\x1b[90mSend a message (/? for help)\x1b[0m")
_HELP = """Available Commands:
  /clear          Clear the conversation
  /bye            Leave
  /?, /help       Show this help

Use \"\"\" to begin and end a message of several lines.
Ctrl-C stops an answer; Ctrl-D leaves.
"""
_FENCE = '"""'
_KEPT_QUESTIONS = 100


def talk(environment: Environment, api: LocalApi, options: RunOptions) -> None:
    """Converse until the person leaves."""
    load(api, options)
    session: PromptSession[str] = PromptSession(history=_history(environment))
    messages: list[dict[str, Any]] = []
    while True:
        try:
            text = _read(session)
        except KeyboardInterrupt:
            print("\nUse Ctrl + d or /bye to exit.")
            continue
        except EOFError:
            print()
            return
        match text.strip():
            case "":
                continue
            case "/bye" | "/exit":
                return
            case "/?" | "/help":
                print(_HELP)
            case "/clear":
                messages.clear()
                print("Cleared session context")
            case line if word := _unknown_command(line):
                print(f"Unknown command '{word}'. Type /? for help")
            case _:
                _exchange(api, options, messages, text)


def _unknown_command(line: str) -> str:
    """The command that a line tries to be, empty for a question; one that begins with a path, such as /tmp/x, is a question."""
    word, _, rest = line.partition(" ")
    is_command = word.startswith("/") and "\n" not in line and (not rest or "/" not in word[1:])
    return word if is_command else ""


def load(api: LocalApi, options: RunOptions) -> None:
    """Have the model loaded before the first question. Raises: Failed; a hosted model that nobody signed in for fails here."""
    body = {"model": options.model, "keep_alive": options.keep_alive or None, "stream": False}
    api.post("/api/generate", {name: value for name, value in body.items() if value is not None})


def _exchange(api: LocalApi, options: RunOptions, messages: list[dict[str, Any]], text: str) -> None:
    """One question and its answer. What fails or is stopped leaves the conversation as it was."""
    question = {"role": "user", "content": text}
    body = {**options.body(), "messages": [*messages, question]}
    try:
        with contextlib.closing(api.stream("/api/chat", body)) as events:
            final, answer = show_answer(events, options)
    except KeyboardInterrupt:
        print("\n")
        return
    except Failed as error:
        print()
        show_failure(error)
        return
    print("\n")
    messages += [question, dict(answer)]
    if options.verbose:
        sys.stderr.write(figures(final))


def _read(session: PromptSession[str]) -> str:
    text = session.prompt(">>> ", placeholder=_PLACEHOLDER)
    if not text.lstrip().startswith(_FENCE):
        return text
    lines = [text.lstrip().removeprefix(_FENCE)]
    while not lines[-1].rstrip().endswith(_FENCE):
        lines.append(session.prompt("... "))
    lines[-1] = lines[-1].rstrip().removesuffix(_FENCE)
    return "\n".join(lines)


def _history(environment: Environment) -> History:
    settings = environment.settings
    return InMemoryHistory() if settings.is_history_off else _LineHistory(settings.home / ".ollama" / "history")


class _LineHistory(History):
    """The last questions in a file that only its owner may read. A file that cannot be used costs the history, nothing else."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self._path = path

    def load_history_strings(self) -> Iterable[str]:
        """Newest first, as prompt_toolkit wants them."""
        with contextlib.suppress(OSError, UnicodeDecodeError):
            return self._path.read_text().splitlines()[: -_KEPT_QUESTIONS - 1 : -1]
        return []

    def store_string(self, string: str) -> None:
        """Append a question; one of several lines would come back as several and is not kept."""
        if "\n" in string:
            return
        with contextlib.suppress(OSError, UnicodeDecodeError):
            kept = self._path.read_text().splitlines()[-_KEPT_QUESTIONS + 1 :] if self._path.exists() else []
            # Ollama creates the file 0600; the umask alone would let others read what was asked.
            descriptor = os.open(self._path, os.O_CREAT | os.O_WRONLY | os.O_TRUNC | os.O_NOFOLLOW, 0o600)
            with os.fdopen(descriptor, "w") as file:
                file.write("".join(f"{line}\n" for line in [*kept, string]))
