"""`corral run` as a person has it: a real terminal, a real model, real keys. It also makes the recording on the page about it."""

import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from flows.stack import MODEL, Stack, corral_command
from flows.terminal import Terminal

PAGE = Path(__file__).resolve().parents[2] / "docs/run-interactively.md"
_FIGURE = re.compile(r"^(?:total|load|prompt eval|eval) (?:duration|count|rate):.*$")


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory, small_model: Path) -> Iterator[Stack]:
    """A started installation with the small model, for the conversations of this module. Each leaves nothing installed."""
    with Stack(tmp_path_factory.mktemp("repl"), TERM="xterm-256color") as stack:
        stack.start("--model", f"{MODEL}={small_model}")
        yield stack


def conversation(stack: Stack, *arguments: str, model: str = MODEL, **environment: str) -> Terminal:
    return Terminal([*corral_command(), "run", model, *arguments], {**stack.env, **environment}, stack.home)


def masked(session: str) -> list[str]:
    """A recording without what differs from one machine and day to the other: answers, figures, digests, ages."""
    lines: list[str] = []
    is_answer = False
    for line in session.strip().splitlines():
        if line.startswith(">>> "):
            is_answer = not line.startswith(">>> /")
        elif is_answer and _FIGURE.match(line):
            line = re.sub(r"[0-9.]+(?:ns|µs|ms|m?s)?", "0", line)
        elif is_answer and not line.startswith("... "):
            line = "(words)"
        line = re.sub(r"\b[0-9a-f]{12}\b", "(digest)", line)
        line = re.sub(r"(?:About )?(?:an?|[0-9]+|Less than a) \w+ ago", "(age)", line)
        if not (line == "(words)" and lines[-1:] == [line]):
            lines.append(line.rstrip())
    return lines


def record(stack: Stack) -> str:
    """One conversation, as it stands on the screen at its end."""
    with conversation(stack) as terminal:
        terminal.say("/set parameter temperature 0")
        terminal.say("/set parameter num_predict 40")
        terminal.say("Why is the sky blue?")
        terminal.prompt()
        terminal.keys('"""Answer in one sentence.\r')
        terminal.wait_for(r"sentence\.\n\.\.\. *\Z")
        terminal.say_on('What is the capital of France?"""')
        for line in ("/set verbose", "Thank you!", "/set quiet", "/show parameters", "/show system"):
            terminal.say(line)
        terminal.say("/set system You are the captain of a pirate ship.")
        terminal.say("/save captain")
        terminal.say("/load captain")
        terminal.say("Who are you?")
        terminal.say("/set parameter num_predict -1")
        terminal.say("Write a very long story about a fox.", wait=False)
        terminal.wait_for(r"about a fox\.\n\S+ \S+")
        terminal.keys("\x03")
        for line in ("/list", "/clear", "/shwo", "/?"):
            terminal.say(line)
        terminal.say("/bye", wait=False)
        assert terminal.finish() == 0
    return f"$ corral run {MODEL}\n{terminal.screen.text.strip()}"


def test_page_shows_the_conversation_that_a_terminal_shows(stack: Stack) -> None:
    recorded = record(stack)
    stack.corral("rm", "captain")
    before, _, rest = PAGE.read_text().partition("writes it anew.\n\n```\n")
    shown, _, after = rest.partition("```\n")
    if os.environ.get("CORRAL_TEST_RECORD") == "1":
        PAGE.write_text(f"{before}writes it anew.\n\n```\n{recorded}\n```\n{after}")
    else:
        assert masked(shown) == masked(recorded), "→ CORRAL_TEST_RECORD=1 make test T=tests/flows/test_repl.py"


def test_ctrl_c_ends_an_answer_and_no_conversation(stack: Stack) -> None:
    with conversation(stack) as terminal:
        terminal.say("/set parameter temperature 0")
        terminal.say("Write a very long story about a fox.", wait=False)
        terminal.wait_for(r"about a fox\.\n\S+ \S+")
        terminal.keys("\x03")
        terminal.prompt()
        assert "^C" not in terminal.screen.text
        terminal.keys("dropped\x03")
        terminal.prompt()
        assert "Ctrl + d" not in terminal.screen.text
        terminal.keys("\x03")
        terminal.wait_for(r"Use Ctrl \+ d or /bye to exit\.")
        terminal.prompt()
        terminal.keys("\x04")
        assert terminal.finish() == 0


def test_keys_pressed_during_an_answer_wait_for_the_prompt(stack: Stack) -> None:
    with conversation(stack) as terminal:
        terminal.say("/set parameter num_predict 40")
        terminal.say("Why is the sky blue?", wait=False)
        terminal.wait_for(r"blue\?\n\S+ \S+")
        terminal.keys("/set verbose\rtyped ahead")
        terminal.wait_for(r"\n\n>>> /set verbose\nSet 'verbose' mode\.\n>>> typed ahead\Z")
        terminal.keys("\x03")
        terminal.say("/bye", wait=False)
        assert terminal.finish() == 0


def test_questions_come_back_in_the_next_conversation(stack: Stack) -> None:
    with conversation(stack, "--keepalive", "10m") as terminal:
        terminal.say("/set nohistory")
        terminal.say("/set parameter seed 42")
        terminal.say("/set history")
        terminal.say("/set parameter seed 43")
        terminal.say("/bye", wait=False)
        assert terminal.finish() == 0
    history = stack.home / ".ollama" / "history"
    assert history.read_text().splitlines()[-3:] == ["/set nohistory", "/set parameter seed 43", "/bye"]
    assert history.stat().st_mode & 0o777 == 0o600
    with conversation(stack) as terminal:
        terminal.prompt()
        terminal.keys("\x1b[A")
        terminal.wait_for(r">>> /bye\Z")
        terminal.keys("\x1b[A")
        terminal.wait_for(r">>> /set parameter seed 43\Z")
        terminal.keys("\x15\x04")
        assert terminal.finish() == 0


def test_what_is_pasted_keeps_its_lines_and_is_not_sent(stack: Stack) -> None:
    with conversation(stack) as terminal:
        terminal.prompt()
        terminal.keys("\x1b[200~/usr\rand\tmore\x1b[201~")
        terminal.wait_for(r">>> /usr\n\.\.\. and +more\Z")
        terminal.keys("\nthird")
        terminal.wait_for(r"\n\.\.\. third\Z")
        terminal.keys("\x03")
        terminal.say("/bye", wait=False)
        assert terminal.finish() == 0


def test_tab_completes_commands_and_models(stack: Stack) -> None:
    with conversation(stack) as terminal:
        terminal.prompt()
        terminal.keys("/lo\t")
        terminal.wait_for(r">>> /load\Z")
        terminal.keys(" smol\t")
        terminal.wait_for(rf">>> /load {MODEL}\Z")
        terminal.keys("\x03")
        terminal.say("/bye", wait=False)
        assert terminal.finish() == 0


def test_editor_writes_the_message(stack: Stack) -> None:
    editor = stack.home / "editor"
    editor.write_text('#!/bin/sh\nprintf \'%s\\nsecond\\n\' "$(cat "$1")" > "$1"\n')
    editor.chmod(0o755)
    with conversation(stack, OLLAMA_EDITOR=str(editor)) as terminal:
        terminal.prompt()
        terminal.keys("first\x07")
        terminal.wait_for(r">>> first\n\.\.\. second\Z")
        terminal.keys("\x03")
        terminal.say("/bye", wait=False)
        assert terminal.finish() == 0
    with conversation(stack, OLLAMA_EDITOR="nothing-of-that-name") as terminal:
        terminal.prompt()
        terminal.keys("kept\x07")
        terminal.wait_for(r'error: editor "nothing-of-that-name" not found, set OLLAMA_EDITOR')
        terminal.wait_for(r">>> kept\Z")
        terminal.keys("\x03")
        terminal.say("/bye", wait=False)
        assert terminal.finish() == 0


def test_cloud_model_is_talked_with_once_this_device_is_connected(stack: Stack) -> None:
    arguments = [*corral_command(), "run", f"{MODEL}-cloud"]
    host = stack.hub_url.removeprefix("http://")
    with Terminal(arguments, stack.env, stack.home) as terminal:
        assert terminal.finish() == 1
        said = terminal.screen.text.replace("\n", "")
        assert f"Error: not signed in to {host}→ corral signin, or open {stack.hub_url}/connect?name=" in said
    stack.add_account()
    stack.sign_in()
    with Terminal(arguments, stack.env, stack.home) as terminal:
        terminal.prompt()
        assert re.match(rf"Connecting to '\S+' on '{re.escape(host)}'\n>>> ", terminal.screen.text)
        terminal.say("/set parameter num_predict 8")
        assert "Error" not in terminal.say("Why is the sky blue?")
        terminal.say("/bye", wait=False)
        assert terminal.finish() == 0


def test_server_that_goes_away_ends_no_conversation(stack: Stack) -> None:
    stack.corral("cp", MODEL, "lost")
    with conversation(stack, model="lost") as terminal:
        terminal.say("/set parameter num_predict 8")
        terminal.say("My name is Ann.")
        stack.stop()
        assert "Error: could not connect to" in terminal.say("What is my name?")
        stack.start()
        assert "Error" not in terminal.say("What is my name?")
        terminal.say("/save ann")
        terminal.say("/load gone")
        assert "MESSAGE user My name is Ann." in stack.corral("show", "--modelfile", "ann").stdout
        stack.corral("rm", "ann", "lost")
        assert "Error: model 'lost' not found" in terminal.say("Are you there?").replace("404 Not Found: ", "")
        terminal.say("/bye", wait=False)
        assert terminal.finish() == 0


def test_pipes_get_words_and_no_escape_codes(stack: Stack) -> None:
    (stack.home / "Modelfile").write_text(f"FROM {MODEL}\nPARAMETER num_predict 20\n")
    stack.corral("create", "brief")
    done = stack.corral(
        "run", "brief", "--verbose", "Answer in one word.", given="What is the capital of France?\n", TERM="xterm-256color"
    )
    stack.corral("rm", "brief")
    assert "\x1b" not in done.stdout + done.stderr
    assert done.stdout.endswith("\n\n")
    assert done.stdout.strip()
    assert [line.split(":")[0] for line in done.stderr.splitlines()] == [
        *("total duration", "load duration"),
        *("prompt eval count", "prompt eval duration", "prompt eval rate"),
        *("eval count", "eval duration", "eval rate"),
    ]


#: What both programs answer in the same words.
_SAME = (
    "/set parameter temperature 0",
    "/set parameter num_predict 12",
    "/set parameter foo 1",
    "/set parameter temperature abc def",
    "/set parameter seed 1.5",
    "/set parameter stop a b",
    "/set verbose",
    "/set quiet",
    "/set wordwrap",
    "/set nowordwrap",
    "/set format",
    "/set format xml",
    "/set format json",
    "/set noformat",
    "/set think",
    "/set think high",
    "/set nothink",
    "/set foo",
    "/show parameters",
    "/show system",
    "/show license",
    "/show info",
    "/show foo",
    "/set system Be brief.",
    "/show system",
    "/save one/two/three/four/five",
    "/save",
    "/load",
    "/load nothing-of-that-name",
    "/clear",
    "/list",
    "/nope",
)


@pytest.mark.parametrize("piece", [_SAME[:16], _SAME[16:]], ids=["first", "second"])
def test_commands_are_answered_as_ollama_answers_them(stack: Stack, piece: tuple[str, ...]) -> None:
    program = os.environ.get("CORRAL_TEST_OLLAMA") or shutil.which("ollama")
    if not program:
        pytest.skip("no ollama program")
    with (
        conversation(stack) as ours,
        Terminal([program, "run", MODEL], {**stack.env, "OLLAMA_NOHISTORY": "1"}, stack.home) as theirs,
    ):
        for line in piece:
            assert ours.say(line).split() == theirs.say(line).split()
        for terminal in (ours, theirs):
            terminal.say("/bye", wait=False)
            assert terminal.finish() == 0
