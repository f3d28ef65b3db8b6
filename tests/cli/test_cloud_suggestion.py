"""A name with nothing to pull, and the cloud's model of that name."""

import io
import sys
from typing import Any

import pytest

from corral.cli.api import LocalApi
from corral.cli.cloud_suggestion import pull_or_suggest, suggested_name
from corral.cli.commands_transfer import pull_model
from corral.cli.context import Environment, Failed
from fakes_cli import FakeServer, fake_server

MISSING: dict[str, tuple[int, Any]] = {
    "POST /api/pull": (200, [{"status": "pulling manifest"}, {"error": "pull model manifest: file does not exist"}])
}
OFFERED = {**MISSING, "POST /api/show": (200, {"capabilities": ["completion"]})}


class FakeTerminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def pull(answers: dict[str, tuple[int, Any]], model: str = "x", *, insecure: bool = False) -> tuple[str, FakeServer]:
    with fake_server(answers) as server:
        if answers is OFFERED:
            pulls = iter([MISSING["POST /api/pull"], (200, [{"status": "success"}])])
            server.vary["POST /api/pull"] = lambda: next(pulls)
        api = LocalApi(Environment({"HOME": "/nonexistent", "OLLAMA_HOST": server.host}).settings)
        pulled = pull_or_suggest(api, model, lambda name: pull_model(api, name, insecure=insecure), insecure=insecure, verb="run")
        return pulled, server


@pytest.mark.parametrize(
    ("model", "suggested"),
    [
        ("kimi", "kimi:cloud"),
        ("alice/kimi", "alice/kimi:cloud"),
        ("kimi:latest", ""),
        ("kimi:1b", ""),
        ("kimi:cloud", ""),
        ("kimi:local", ""),
        ("hub.example.org/alice/kimi", ""),
        ("localhost:5000/alice/kimi", ""),
        ("registry.ollama.ai/library/kimi", "registry.ollama.ai/library/kimi:cloud"),
        ("not a name", ""),
    ],
)
def test_only_a_plain_name_has_a_cloud_name(model: str, suggested: str) -> None:
    assert suggested_name(model) == suggested


def test_pull_that_works_asks_nothing() -> None:
    model, server = pull({"POST /api/pull": (200, [{"status": "success"}])})
    assert (model, [request.path for request in server.seen]) == ("x", ["/api/pull"])


def test_without_a_terminal_the_cloud_model_is_advised(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO())  # the command reads its own standard input
    with pytest.raises(Failed, match="file does not exist: x") as failed:
        pull(OFFERED)
    assert failed.value.advice == '"x:cloud" is available as a cloud model: corral run x:cloud'


@pytest.mark.parametrize(("answer", "pulled"), [("\n", "x:cloud"), ("y\n", "x:cloud"), ("n\n", "")])
def test_on_a_terminal_it_is_asked_for(
    answer: str, pulled: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "stdin", FakeTerminal(answer))
    monkeypatch.setattr(sys, "stdout", FakeTerminal())
    if not pulled:
        with pytest.raises(Failed, match="file does not exist: x"):
            pull(OFFERED)
    else:
        model, server = pull(OFFERED)
        assert (model, server.seen[-1].body["model"]) == (pulled, pulled)
    assert 'Did you mean "x:cloud"?' in capsys.readouterr().err


def test_question_stands_alone_on_the_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    """What was begun for the first name is gone from the screen by then."""
    screen = FakeTerminal()
    monkeypatch.setattr(sys, "stdin", FakeTerminal("y\n"))
    monkeypatch.setattr(sys, "stdout", FakeTerminal())
    monkeypatch.setattr(sys, "stderr", screen)
    pull(OFFERED)
    before = screen.getvalue().partition("Did you mean")[0]
    assert "pulling manifest" in before
    assert before.endswith("\x1b[?25h" + "\r\x1b[2K\x1b[A" + "\r\x1b[2K")


@pytest.mark.parametrize(
    ("answers", "model", "insecure"),
    [
        (MISSING, "x", False),
        (OFFERED, "x", True),
        (OFFERED, "x:1b", False),
        ({**OFFERED, "POST /api/pull": (200, [{"error": "pull model manifest: 500: broken"}])}, "x", False),
    ],
)
def test_nothing_is_suggested_where_there_is_nothing_to_suggest(
    answers: dict[str, tuple[int, Any]], model: str, insecure: bool
) -> None:
    with pytest.raises(Failed) as failed:
        pull(answers, model, insecure=insecure)
    assert "cloud" not in failed.value.advice
