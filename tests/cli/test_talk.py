"""The conversation of `run` without a prompt, typed through prompt_toolkit's own pipe."""

from pathlib import Path
from typing import Any

import pytest
from prompt_toolkit.application import create_app_session
from prompt_toolkit.input import create_pipe_input
from prompt_toolkit.output import DummyOutput

from corral.cli.api import LocalApi
from corral.cli.context import Environment, Failed
from corral.cli.repl_state import ModelFacts, Session
from corral.cli.talk import talk
from fakes_cli import FakeServer, fake_server

LOADED = {"POST /api/generate": (200, {"done": True, "done_reason": "load"})}
CHAT = [{"message": {"role": "assistant", "content": "Hello"}}, {"message": {"content": "!"}, "done": True, "eval_count": 2}]


def converse(typed: str, home: Path, answers: dict[str, tuple[int, Any]], **session: Any) -> FakeServer:
    with fake_server({**LOADED, **answers}) as server, create_pipe_input() as keyboard:
        environment = Environment({"HOME": str(home), "OLLAMA_HOST": server.host})
        keyboard.send_text(typed)
        with create_app_session(input=keyboard, output=DummyOutput()):
            talk(environment, LocalApi(environment.settings), Session(**{"model": "m", **session}))
        return server


def chats(server: FakeServer) -> list[Any]:
    return [request.body["messages"] for request in server.seen if request.path == "/api/chat"]


def test_conversation_carries_what_was_said_and_clear_forgets_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    server = converse("one\rtwo\r/clear\rthree\r/bye\r", tmp_path, {"POST /api/chat": (200, CHAT)})
    said = {"role": "assistant", "content": "Hello!"}
    assert chats(server) == [
        [{"role": "user", "content": "one"}],
        [{"role": "user", "content": "one"}, said, {"role": "user", "content": "two"}],
        [{"role": "user", "content": "three"}],
    ]
    out = capsys.readouterr().out
    assert out.count("Hello!\n\n") == 3
    assert "Cleared session context" in out


def test_conversation_loads_the_model_first(tmp_path: Path) -> None:
    server = converse("/bye\r", tmp_path, {}, keep_alive="10m")
    assert [request.body for request in server.seen] == [{"model": "m", "keep_alive": "10m", "stream": False}]


def test_conversation_with_a_hosted_model_asks_whether_this_device_may_and_says_where_it_goes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    hub = {"GET /api/status": (200, {"hub": "http://hub.test:1"}), "POST /api/me": (200, {"name": "alice"})}
    server = converse("/bye\r", tmp_path, hub, model="m:1b-cloud")
    assert [request.path for request in server.seen] == ["/api/status", "/api/me"]
    assert capsys.readouterr().err == "Connecting to 'm:1b-cloud' on 'hub.test:1'\n"


def test_conversation_with_a_stub_of_another_host_asks_nobody(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    facts = ModelFacts(remote_host="https://other.test:443", remote_model="big")
    converse("/bye\r", tmp_path, {"GET /api/status": (200, {})}, facts=facts)
    assert capsys.readouterr().err == "Connecting to 'big' on 'other.test:443'\n"


def test_conversation_with_a_hosted_model_without_signin_fails_before_the_first_question(tmp_path: Path) -> None:
    link = "http://localhost:11435/connect?name=x&key=y"
    refusal = {"error": "unauthorized", "signin_url": link}
    hub = {"GET /api/status": (200, {"hub": "http://localhost:11435"}), "POST /api/me": (401, refusal)}
    with pytest.raises(Failed, match="not signed in to localhost:11435") as failed:
        converse("hi\r", tmp_path, hub, model="m:1b-cloud")
    assert failed.value.advice == f"corral signin, or open {link}"


def test_failed_answer_leaves_the_conversation_as_it_was(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    broken = [{"message": {"content": "Hel"}}, {"error": "the engine is gone"}]
    server = converse("one\rtwo\r/bye\r", tmp_path, {"POST /api/chat": (200, broken)})
    assert [len(messages) for messages in chats(server)] == [1, 1]
    assert "Error: the engine is gone" in capsys.readouterr().err


def test_triple_quotes_hold_several_lines(tmp_path: Path) -> None:
    server = converse('"""one\rtwo"""\r/bye\r', tmp_path, {"POST /api/chat": (200, CHAT)})
    assert chats(server)[0][0]["content"] == "one\ntwo"


def test_commands_that_nobody_knows_are_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    server = converse("/nope\r/?\r\r\x04", tmp_path, {})
    out = capsys.readouterr().out
    assert "Unknown command '/nope'. Type /? for help" in out
    assert "/save <model>" in out
    assert chats(server) == []


def test_ctrl_c_at_the_prompt_says_how_to_leave(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    converse("\x03/bye\r", tmp_path, {})
    assert "Use Ctrl + d or /bye to exit." in capsys.readouterr().out


def test_history_is_ollamas_file_for_its_owner_alone(tmp_path: Path) -> None:
    history = tmp_path / ".ollama" / "history"
    history.parent.mkdir()
    history.write_text("".join(f"old {number}\n" for number in range(120)))
    history.chmod(0o600)
    converse("new\r/bye\r", tmp_path, {"POST /api/chat": (200, CHAT)})
    lines = history.read_text().splitlines()
    assert lines[-2:] == ["new", "/bye"]
    assert len(lines) == 100
    assert history.stat().st_mode & 0o777 == 0o600


def test_history_is_not_kept_when_switched_off(tmp_path: Path) -> None:
    (tmp_path / ".ollama").mkdir()
    with fake_server({**LOADED, "POST /api/chat": (200, CHAT)}) as server, create_pipe_input() as keyboard:
        environment = Environment({"HOME": str(tmp_path), "OLLAMA_HOST": server.host, "OLLAMA_NOHISTORY": "1"})
        keyboard.send_text("hi\r/bye\r")
        with create_app_session(input=keyboard, output=DummyOutput()):
            talk(environment, LocalApi(environment.settings), Session(model="m"))
    assert not (tmp_path / ".ollama" / "history").exists()


def test_verbose_conversation_prints_figures(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    converse("hi\r/bye\r", tmp_path, {"POST /api/chat": (200, CHAT)}, is_verbose=True)
    assert "eval count:           2 token(s)" in capsys.readouterr().err


def test_question_that_begins_with_a_path_goes_to_the_model(tmp_path: Path) -> None:
    server = converse("/etc/hosts is what?\r/bye\r", tmp_path, {"POST /api/chat": (200, CHAT)})
    assert len(chats(server)) == 1


def test_stored_conversation_is_shown_before_the_first_question(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    stored = ({"role": "system", "content": "s"}, {"role": "user", "content": "a\nb"}, {"role": "assistant", "content": "c"})
    converse("/bye\r", tmp_path, {}, facts=ModelFacts(messages=stored))
    assert capsys.readouterr().out == ">>> a\n... b\nc\n\n"


def test_t114_stored_conversation_holds_no_command_for_the_terminal(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    stored = ({"role": "user", "content": "\x1b]0;pwned\x07a\r\x9b2J"}, {"role": "assistant", "content": "b"})
    facts = ModelFacts(messages=stored, remote_host="https://x.test", remote_model="\x1b]0;pwned\x07big")
    converse("/bye\r", tmp_path, {"GET /api/status": (200, {})}, facts=facts)
    captured = capsys.readouterr()
    assert captured.out.startswith(">>> ]0;pwneda2J\n")
    assert not any(char in captured.out + captured.err for char in "\x1b\x07\r\x9b")


def test_settings_of_the_session_go_with_every_question(tmp_path: Path) -> None:
    typed = "/set parameter seed 1\r/set format json\r/set system Be brief.\rhi\r/bye\r"
    server = converse(typed, tmp_path, {"POST /api/chat": (200, CHAT)}, keep_alive="5m")
    assert server.seen[-1].body == {
        "model": "m",
        "format": "json",
        "keep_alive": "5m",
        "options": {"seed": 1},
        "messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "hi"}],
    }


def test_other_model_answers_after_load(tmp_path: Path) -> None:
    answers = {"POST /api/show": (200, {"capabilities": []}), "POST /api/chat": (200, CHAT)}
    server = converse("one\r/load n\rtwo\r/bye\r", tmp_path, answers)
    assert [(request.body["model"], len(request.body["messages"])) for request in server.seen if request.path == "/api/chat"] == [
        ("m", 1),
        ("n", 1),
    ]


@pytest.mark.parametrize(
    ("status", "body", "said"),
    [
        (
            404,
            {"error": "model 'm:latest' not found"},
            "not found\n→ /list shows what is installed, /load goes on with another model",
        ),
        (429, {"error": "too many requests"}, "too many requests\n→ wait a little and ask again"),
        (
            401,
            {"error": "unauthorized", "signin_url": "https://h.test/connect?x"},
            "not signed in to h.test\n→ corral signin, or open",
        ),
    ],
)
def test_refusal_brings_the_prompt_back(
    status: int, body: dict[str, str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    server = converse("one\rtwo\r/bye\r", tmp_path, {"POST /api/chat": (status, body)})
    assert [len(messages) for messages in chats(server)] == [1, 1]
    assert capsys.readouterr().err.count(said) == 2


def test_command_that_the_server_refuses_brings_the_prompt_back(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    converse("/show info\r/list\r/save x\r/bye\r", tmp_path, {"POST /api/show": (500, {"error": "broken"})})
    assert capsys.readouterr().err.count("Error: ") == 3


def test_pictures_go_with_the_question_and_a_file_of_another_kind_is_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "a.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    (tmp_path / "b.png").write_text("no picture")
    typed = f"what is {tmp_path}/a.png\rand {tmp_path}/b.png\r/bye\r"
    server = converse(typed, tmp_path, {"POST /api/chat": (200, CHAT)}, facts=ModelFacts(takes_media=True))
    assert chats(server) == [[{"role": "user", "content": "what is", "images": ["iVBORw0KGgo="]}]]
    err = capsys.readouterr().err
    assert f"Added image '{tmp_path}/a.png'" in err
    assert f"Error: couldn't process file '{tmp_path}/b.png'" in err


def test_ctrl_j_adds_a_line(tmp_path: Path) -> None:
    server = converse("one\ntwo\r/bye\r", tmp_path, {"POST /api/chat": (200, CHAT)})
    assert chats(server)[0][0]["content"] == "one\ntwo"


def test_keys_of_readline_move_and_delete(tmp_path: Path) -> None:
    # Two words, back by one, delete it to the end, to the beginning an X, one to the right, delete that character.
    server = converse("ab cd\x1bb\x0b\x01X\x06\x04\r/bye\r", tmp_path, {"POST /api/chat": (200, CHAT)})
    assert chats(server)[0][0]["content"] == "Xa "
