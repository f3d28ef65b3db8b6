"""The line in which one types: prompt_toolkit, and what it is told. Imported only when a person is at the terminal.

prompt_toolkit is used for the line alone (editing, history, paste, completion); everything else is printed plainly, so that what
was said can be scrolled and copied like any other text.
"""

import contextlib
import shlex
import shutil
import subprocess
import sys
import tempfile
import termios
from collections.abc import Callable, Iterable, Iterator
from enum import Enum
from pathlib import Path

from prompt_toolkit import PromptSession
from prompt_toolkit.application import get_app, get_app_session, run_in_terminal
from prompt_toolkit.buffer import Buffer
from prompt_toolkit.completion import CompleteEvent, Completer, Completion
from prompt_toolkit.document import Document
from prompt_toolkit.enums import EditingMode
from prompt_toolkit.formatted_text import ANSI
from prompt_toolkit.history import History
from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent
from prompt_toolkit.layout.processors import TabsProcessor
from prompt_toolkit.output import Output
from prompt_toolkit.output.vt100 import Vt100_Output
from prompt_toolkit.shortcuts import CompleteStyle

from corral.cli.repl_history import HistoryFile

PROMPT, CONTINUATION = ">>> ", "... "
_PLACEHOLDER = ANSI("\x1b[90mSend a message (/? for help)\x1b[0m")


class Left(Enum):
    """Why there is no text: Ctrl-C on an empty line, Ctrl-C that dropped what was typed, Ctrl-D."""

    INTERRUPTED = "interrupted"
    DROPPED = "dropped"
    ENDED = "ended"


class Terminal:
    """Asks for one text after the other. is_open: whether a text goes on behind Enter; complete: what the text before the cursor
    may become at its last word; editor: its command line."""

    def __init__(
        self,
        history: HistoryFile,
        *,
        editor: str,
        is_open: Callable[[str], bool],
        complete: Callable[[str], list[str]],
    ) -> None:
        self._editor = editor
        self._is_open = is_open
        self._session: PromptSession[str | Left] = PromptSession(
            PROMPT,
            history=_History(history),
            multiline=True,
            prompt_continuation=CONTINUATION,
            placeholder=_placeholder,
            completer=_Completer(complete),
            complete_while_typing=False,
            complete_style=CompleteStyle.READLINE_LIKE,
            input_processors=[TabsProcessor(tabstop=8, char1=" ", char2=" ")],
            key_bindings=self._keys(),
            editing_mode=EditingMode.EMACS,
            enable_suspend=True,
            enable_open_in_editor=False,
            output=_plain_output(),
        )

    def read(self) -> str | Left:
        """The next text, or why there is none."""
        return self._session.prompt()

    def _keys(self) -> KeyBindings:
        keys = KeyBindings()
        keys.add("enter")(self._enter)
        keys.add("c-c")(_interrupt)
        keys.add("c-d")(_end_or_delete)
        keys.add("c-g")(self._edit)
        keys.add("c-j")(lambda event: event.current_buffer.insert_text("\n"))
        return keys

    def _enter(self, event: KeyPressEvent) -> None:
        buffer = event.current_buffer
        if self._is_open(buffer.text):
            buffer.insert_text("\n")
        else:
            buffer.validate_and_handle()

    async def _edit(self, event: KeyPressEvent) -> None:
        buffer = event.current_buffer
        text = await run_in_terminal(lambda: edited(self._editor, buffer.text), in_executor=True)
        if text is not None:
            buffer.document = Document(text)


def _placeholder() -> ANSI:
    """What stands in an empty line while it waits, and not in what is left of it."""
    return ANSI("") if get_app().is_done else _PLACEHOLDER


def _interrupt(event: KeyPressEvent) -> None:
    event.app.exit(result=Left.DROPPED if event.current_buffer.text else Left.INTERRUPTED)


def _end_or_delete(event: KeyPressEvent) -> None:
    buffer: Buffer = event.current_buffer
    if buffer.text:
        buffer.delete()
    else:
        event.app.exit(result=Left.ENDED)


def _plain_output() -> Output:
    output = get_app_session().output
    if isinstance(output, Vt100_Output):
        # There is no menu that would need to know how much room is left, and an answer to that question that comes late stands
        # among what is typed.
        output.enable_cpr = False
    return output


class _Completer(Completer):
    def __init__(self, complete: Callable[[str], list[str]]) -> None:
        self._complete = complete

    def get_completions(self, document: Document, complete_event: CompleteEvent) -> Iterable[Completion]:
        text = document.text_before_cursor
        last = text.split(" ")[-1]
        for word in self._complete(text):
            yield Completion(word, start_position=-len(last))


class _History(History):
    """The file's questions, and this conversation's own of any kind, which are in memory until it ends."""

    def __init__(self, file: HistoryFile) -> None:
        super().__init__()
        self._file = file

    def load_history_strings(self) -> Iterable[str]:
        """Newest first, as prompt_toolkit wants them."""
        return reversed(self._file.questions())

    def store_string(self, string: str) -> None:
        """Write it down where it is wanted."""
        self._file.add(string)


def edited(editor: str, text: str) -> str | None:
    """The text after somebody edited it; None when that did not work, which has been said."""
    try:
        words = shlex.split(editor)
    except ValueError:
        words = editor.split()
    program = shutil.which(words[0]) if words else None
    if program is None:
        name = words[0] if words else editor
        print(f'error: editor "{name}" not found, set OLLAMA_EDITOR to the path of your preferred editor', file=sys.stderr)
        return None
    with tempfile.TemporaryDirectory(prefix="corral-") as folder:
        path = Path(folder) / "prompt.txt"
        path.write_text(text)
        try:
            status = subprocess.run([program, *words[1:], str(path)], check=False).returncode  # noqa: S603 - the person's own editor
            if status:
                print(f"error: editor exited with status {status}", file=sys.stderr)
                return None
            return path.read_text().rstrip("\n")
        except (OSError, UnicodeDecodeError) as error:
            print(f"error: {error}", file=sys.stderr)
            return None


@contextlib.contextmanager
def quiet_keyboard() -> Iterator[None]:
    """While an answer comes, what is typed ahead is not shown within it, and its Enter stays one for the next prompt."""
    try:
        before = termios.tcgetattr(sys.stdin.fileno())
    except (OSError, ValueError, termios.error):
        yield
        return
    changed = [*before]
    changed[0] &= ~(termios.ICRNL | termios.INLCR)
    changed[3] &= ~(termios.ECHO | termios.ICANON)
    try:
        termios.tcsetattr(sys.stdin.fileno(), termios.TCSANOW, changed)
        yield
    finally:
        termios.tcsetattr(sys.stdin.fileno(), termios.TCSANOW, before)
