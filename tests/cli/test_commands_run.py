"""run against a scripted server: what is sent, and what a pipe gets to see."""

import io
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import corral
from corral.cli.answers import figures
from corral.cli.app import run
from corral.cli.commands_run import parse_format, parse_keep_alive, parse_think
from corral.cli.context import Failed
from fakes_cli import FakeServer, fake_server

SHOW = {"POST /api/show": (200, {"capabilities": ["completion"]})}
FINAL = {
    "response": "",
    "done": True,
    "total_duration": 1_500_000_000,
    "load_duration": 1_000_000,
    "prompt_eval_count": 10,
    "prompt_eval_duration": 100_000_000,
    "eval_count": 20,
    "eval_duration": 200_000_000,
}
STREAM = [{"response": "Hello"}, {"response": ", world"}, FINAL]


def env(server: FakeServer) -> dict[str, str]:
    return {"HOME": "/nonexistent", "OLLAMA_HOST": server.host}


@pytest.fixture
def stdin(monkeypatch: pytest.MonkeyPatch) -> io.StringIO:
    # The command reads the process's own standard input, which pytest closes; there is no way to hand it another one.
    piped = io.StringIO()
    monkeypatch.setattr(sys, "stdin", piped)
    return piped


def test_run_of_a_prompt_prints_the_words_alone(capsys: pytest.CaptureFixture[str], stdin: io.StringIO) -> None:
    with fake_server({**SHOW, "POST /api/generate": (200, STREAM)}) as server:
        assert run(["run", "m", "say", "hello"], env(server)) == 0
    captured = capsys.readouterr()
    assert captured.out == "Hello, world\n\n"
    assert captured.err == ""
    assert server.seen[-1].body == {"model": "m", "prompt": "say hello"}


def test_run_puts_piped_input_before_the_prompt(stdin: io.StringIO) -> None:
    stdin.write("the text\n")
    stdin.seek(0)
    with fake_server({**SHOW, "POST /api/generate": (200, STREAM)}) as server:
        assert run(["run", "m", "summarise"], env(server)) == 0
    assert server.seen[-1].body["prompt"] == "the text\n summarise"


def test_run_takes_what_is_piped_in_though_it_is_no_utf_8(monkeypatch: pytest.MonkeyPatch) -> None:
    piped = io.TextIOWrapper(io.BytesIO(b"caf\xe9\n"), encoding="utf-8")
    monkeypatch.setattr(sys, "stdin", piped)  # the command reads the process's own standard input
    with fake_server({**SHOW, "POST /api/generate": (200, STREAM)}) as server:
        assert run(["run", "m", "summarise"], env(server)) == 0
    assert server.seen[-1].body["prompt"] == "caf\ufffd\n summarise"


def test_run_sends_its_options(stdin: io.StringIO) -> None:
    with fake_server({**SHOW, "POST /api/generate": (200, STREAM)}) as server:
        arguments = ["run", "m", "--format", "json", "--think=high", "--keepalive", "10m", "hi"]
        assert run(arguments, env(server)) == 0
    assert server.seen[-1].body == {"model": "m", "prompt": "hi", "format": "json", "think": "high", "keep_alive": "10m"}


def test_run_bare_think_does_not_swallow_the_prompt(stdin: io.StringIO) -> None:
    with fake_server({**SHOW, "POST /api/generate": (200, STREAM)}) as server:
        assert run(["run", "m", "--think", "why"], env(server)) == 0
    assert server.seen[-1].body == {"model": "m", "prompt": "why", "think": True}


def test_run_brackets_thinking_and_can_hide_it(capsys: pytest.CaptureFixture[str], stdin: io.StringIO) -> None:
    stream = [{"thinking": "hm"}, {"response": "Yes"}, FINAL]
    with fake_server({**SHOW, "POST /api/generate": (200, stream)}) as server:
        run(["run", "m", "x"], env(server))
        assert capsys.readouterr().out == "Thinking...\nhm\n...done thinking.\n\nYes\n\n"
        run(["run", "m", "--hidethinking", "x"], env(server))
        assert capsys.readouterr().out == "Yes\n\n"


def test_run_verbose_prints_figures_to_standard_error(capsys: pytest.CaptureFixture[str], stdin: io.StringIO) -> None:
    with fake_server({**SHOW, "POST /api/generate": (200, STREAM)}) as server:
        run(["run", "m", "--verbose", "x"], env(server))
    captured = capsys.readouterr()
    assert captured.out == "Hello, world\n\n"
    assert "eval rate:            100.00 tokens/s\n" in captured.err


def test_figures_have_their_values_in_one_column() -> None:
    assert figures(FINAL).splitlines()[0] == "total duration:       1.5s"
    assert all(len(line.split(":")[0]) < 22 for line in figures(FINAL).splitlines())


def test_run_of_a_hosted_model_without_signin_says_where_and_how(capsys: pytest.CaptureFixture[str], stdin: io.StringIO) -> None:
    refusal = {"error": "unauthorized", "signin_url": "http://localhost:11435/connect?name=finch&key=c3No"}
    with fake_server({**SHOW, "POST /api/generate": (401, refusal)}) as server:
        assert run(["run", "m:1b-cloud", "hi"], env(server)) == 1
    assert capsys.readouterr().err == (
        "Error: not signed in to localhost:11435\n→ corral signin, or open http://localhost:11435/connect?name=finch&key=c3No\n"
    )


def test_run_ends_with_the_error_of_a_stream_that_broke(capsys: pytest.CaptureFixture[str], stdin: io.StringIO) -> None:
    stream = [{"response": "Hel"}, {"error": "an error was encountered while running the model: gone"}]
    with fake_server({**SHOW, "POST /api/generate": (200, stream)}) as server:
        assert run(["run", "m", "hi"], env(server)) == 1
    captured = capsys.readouterr()
    assert captured.out.startswith("Hel")
    assert "Error: an error was encountered while running the model" in captured.err


def test_run_of_an_embedding_model_prints_the_vector(capsys: pytest.CaptureFixture[str], stdin: io.StringIO) -> None:
    answers: dict[str, tuple[int, Any]] = {
        "POST /api/show": (200, {"capabilities": ["embedding"]}),
        "POST /api/embed": (200, {"embeddings": [[0.5, -0.5]]}),
    }
    with fake_server(answers) as server:
        assert run(["run", "m", "--dimensions", "2", "text"], env(server)) == 0
        assert json.loads(capsys.readouterr().out) == [0.5, -0.5]
        assert server.seen[-1].body == {"model": "m", "input": "text", "dimensions": 2}
        assert run(["run", "m"], env(server)) == 2
    assert "embedding models require input text" in capsys.readouterr().err


def test_run_of_a_model_that_is_not_here_pulls_it_first(capsys: pytest.CaptureFixture[str], stdin: io.StringIO) -> None:
    shown = iter([(404, {"error": "model 'x:latest' not found"}), SHOW["POST /api/show"]])
    pulled = [{"status": "pulling manifest"}, {"status": "success"}]
    with fake_server({"POST /api/pull": (200, pulled), "POST /api/generate": (200, STREAM)}) as server:
        server.vary["POST /api/show"] = lambda: next(shown)
        assert run(["run", "--insecure", "x", "hi"], env(server)) == 0
    captured = capsys.readouterr()
    assert captured.out == "Hello, world\n\n"
    assert captured.err == "pulling manifest\nsuccess\n"
    assert server.seen[1].body == {"model": "x", "name": "x", "insecure": True}


def test_run_of_a_model_that_nobody_has_says_so(capsys: pytest.CaptureFixture[str], stdin: io.StringIO) -> None:
    failed = [{"status": "pulling manifest"}, {"error": "pull model manifest: file does not exist"}]
    answers = {"POST /api/show": (404, {"error": "model 'x:latest' not found"}), "POST /api/pull": (200, failed)}
    with fake_server(answers) as server:
        assert run(["run", "x", "hi"], env(server)) == 1
    assert "Error: pull model manifest: file does not exist: x\n→ check the name" in capsys.readouterr().err


@pytest.mark.parametrize(("text", "value"), [("", None), ("true", True), ("false", False), ("max", "max")])
def test_think_is_a_truth_or_a_level(text: str, value: object) -> None:
    assert parse_think(text) == value


def test_think_of_another_word_is_wrong_usage() -> None:
    with pytest.raises(Failed, match="invalid value for --think"):
        parse_think("hard")


@pytest.mark.parametrize(("text", "value"), [("", None), ("json", "json"), ('{"type":"object"}', {"type": "object"})])
def test_format_is_json_or_a_schema(text: str, value: object) -> None:
    assert parse_format(text) == value


def test_format_of_another_text_is_wrong_usage() -> None:
    with pytest.raises(Failed):
        parse_format("yaml")


@pytest.mark.parametrize(
    ("status", "said"),
    [
        ({"hub": "http://hub.test:1"}, "the hub hub.test:1 does not offer 'x:1b-cloud'\n→ open http://hub.test:1/library"),
        ({}, "the hub does not offer 'x:1b-cloud'\n→ look at the hub's library"),
    ],
)
def test_run_of_a_cloud_model_that_is_not_offered_names_the_hub(
    status: object, said: str, capsys: pytest.CaptureFixture[str], stdin: io.StringIO
) -> None:
    answers = {"POST /api/show": (404, {"error": "model 'x:1b' not found"}), "GET /api/status": (200, status)}
    with fake_server(answers) as server:
        assert run(["run", "x:1b-cloud", "hi"], env(server)) == 1
    assert capsys.readouterr().err == f"Error: {said}\n"


def test_run_of_a_cloud_model_keeps_its_stub(capsys: pytest.CaptureFixture[str], stdin: io.StringIO) -> None:
    answers = {
        **SHOW,
        "GET /api/tags": (200, {"models": [{"name": "other:cloud"}]}),
        "POST /api/pull": (500, {"error": "no such stub"}),
        "POST /api/generate": (200, STREAM),
    }
    with fake_server(answers) as server:
        assert run(["run", "m:1b:cloud", "hi"], env(server)) == 0
        assert [request.path for request in server.seen] == ["/api/show", "/api/tags", "/api/pull", "/api/generate"]
        assert server.seen[2].body == {"model": "m:1b-cloud", "name": "m:1b-cloud", "stream": False}
        server.answers["GET /api/tags"] = (200, {"models": [{"name": "M:1b-cloud"}]})
        assert run(["run", "m:1b:cloud", "hi"], env(server)) == 0
        assert [request.path for request in server.seen[4:]] == ["/api/show", "/api/tags", "/api/generate"]
    assert capsys.readouterr().err == ""


def test_run_of_a_model_that_can_think_asks_for_it(stdin: io.StringIO) -> None:
    show = {"POST /api/show": (200, {"capabilities": ["completion", "thinking"]})}
    with fake_server({**show, "POST /api/generate": (200, STREAM)}) as server:
        run(["run", "m", "hi"], env(server))
        run(["run", "m", "--think=false", "hi"], env(server))
    assert [request.body["think"] for request in server.seen if request.path == "/api/generate"] == [True, False]


def test_run_of_a_model_that_makes_pictures_is_refused(capsys: pytest.CaptureFixture[str], stdin: io.StringIO) -> None:
    with fake_server({"POST /api/show": (200, {"capabilities": ["image"]})}) as server:
        assert run(["run", "m", "a cat"], env(server)) == 1
    assert capsys.readouterr().err == "Error: image generation models are not currently supported\n"


@pytest.mark.parametrize(("text", "value"), [("", ""), ("5m", "5m"), ("-1", -1.0), ("30", 30.0), ("-1s", "-1s")])
def test_keep_alive_is_a_duration_or_seconds(text: str, value: object) -> None:
    assert parse_keep_alive(text) == value


def test_keep_alive_of_another_text_is_wrong_usage() -> None:
    with pytest.raises(Failed, match='invalid value for --keepalive: "soon"'):
        parse_keep_alive("soon")


SEEING = {"POST /api/show": (200, {"capabilities": ["completion", "vision"]}), "POST /api/generate": (200, STREAM)}


@pytest.mark.parametrize(
    ("words", "piped", "prompt", "count"),
    [
        (["what is", "{path}"], "", "what is", 1),
        (["what is {path}?"], "page", "page what is ?", 1),
        ([], "what is {path}?", "what is ?", 1),
        (["summarise"], "see {path}", "see {path} summarise", 0),
    ],
)
def test_run_sends_pictures_that_the_person_named(
    words: list[str], piped: str, prompt: str, count: int, tmp_path: Path, capsys: pytest.CaptureFixture[str], stdin: io.StringIO
) -> None:
    path = tmp_path / "a.png"
    path.write_bytes(b"\x89PNG\r\n\x1a\n")
    stdin.write(piped.format(path=path))
    stdin.seek(0)
    with fake_server(SEEING) as server:
        assert run(["run", "m", *(word.format(path=path) for word in words)], env(server)) == 0
    body = server.seen[-1].body
    assert (body["prompt"], len(body.get("images", []))) == (prompt.format(path=path), count)
    assert capsys.readouterr().err == (f"Added image '{path}'\n" if count else "")


def test_run_of_a_model_that_does_not_see_sends_the_path_as_text(tmp_path: Path, stdin: io.StringIO) -> None:
    (tmp_path / "a.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    with fake_server({**SHOW, "POST /api/generate": (200, STREAM)}) as server:
        run(["run", "m", f"what is {tmp_path}/a.png"], env(server))
    assert server.seen[-1].body == {"model": "m", "prompt": f"what is {tmp_path}/a.png"}


def test_run_imports_nothing_that_only_a_conversation_needs(stdin: io.StringIO) -> None:
    code = (
        "import sys, io; sys.stdin = io.StringIO(); from corral.cli.app import run; "
        "run(sys.argv[1:], {'OLLAMA_HOST': '127.0.0.1:9'}); print(*sys.modules)"
    )
    source = str(Path(corral.__file__).parent.parent)
    done = subprocess.run(
        [sys.executable, "-c", code, "run", "m", "hi"], env={"PYTHONPATH": source}, capture_output=True, text=True, check=True
    )
    assert {"prompt_toolkit", "asyncio", "msgspec", "rich", "subprocess"} & set(done.stdout.split()) == set()
