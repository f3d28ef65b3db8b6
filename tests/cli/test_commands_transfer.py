"""pull and push against a scripted server: what is sent, what a pipe sees, what failures say."""

import io
import sys

import pytest

from corral.cli.app import run
from fakes_cli import FakeServer, fake_server

DIGEST = "sha256:" + "ab" * 32
PULLED = [
    {"status": "pulling manifest"},
    {"status": "pulling abababababab", "digest": DIGEST, "total": 2_000_000},
    {"status": "pulling abababababab", "digest": DIGEST, "total": 2_000_000, "completed": 1_000_000},
    {"status": "pulling abababababab", "digest": DIGEST, "total": 2_000_000, "completed": 2_000_000},
    {"status": "verifying sha256 digest"},
    {"status": "writing manifest"},
    {"status": "success"},
]
PUSHED = [{"status": "retrieving manifest"}, {"status": "pushing manifest"}, {"status": "success"}]


def env(server: FakeServer) -> dict[str, str]:
    return {"HOME": "/nonexistent", "OLLAMA_HOST": server.host}


def test_pull_in_a_pipe_prints_one_line_for_each_thing_that_is_done(capsys: pytest.CaptureFixture[str]) -> None:
    with fake_server({"POST /api/pull": (200, PULLED)}) as server:
        assert run(["pull", "alice/tiny"], env(server)) == 0
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err == ("pulling manifest\npulling abababababab: 2 MB\nverifying sha256 digest\nwriting manifest\nsuccess\n")
    assert server.seen[0].body == {"model": "alice/tiny", "name": "alice/tiny", "insecure": False}


def test_pull_that_fails_ends_with_1_and_the_reason(capsys: pytest.CaptureFixture[str]) -> None:
    failed = [PULLED[0], {"error": "pull model manifest: file does not exist"}]
    with fake_server({"POST /api/pull": (200, failed)}) as server:
        assert run(["pull", "alice/tiny"], env(server)) == 1
    said = capsys.readouterr().err
    assert "Error: pull model manifest: file does not exist: alice/tiny" in said
    assert "corral signin" in said


def test_pull_whose_server_ended_early_is_no_success(capsys: pytest.CaptureFixture[str]) -> None:
    with fake_server({"POST /api/pull": (200, PULLED[:3])}) as server:
        assert run(["pull", "alice/tiny"], env(server)) == 1
    assert "what has arrived is kept" in capsys.readouterr().err


def test_pull_shows_no_control_characters_of_the_server(capsys: pytest.CaptureFixture[str]) -> None:
    with fake_server({"POST /api/pull": (200, [{"status": "\x1b[2Jpulling"}, {"status": "success"}])}) as server:
        assert run(["pull", "x"], env(server)) == 0
    assert "\x1b" not in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "sent"),
    [
        ([], {"insecure": False}),
        (["--insecure"], {"insecure": True}),
        (["--private"], {"insecure": False, "visibility": "private"}),
        (["--public"], {"insecure": False, "visibility": "public"}),
    ],
)
def test_push_sends_its_options(flags: list[str], sent: dict[str, object]) -> None:
    with fake_server({"POST /api/push": (200, PUSHED)}) as server:
        assert run(["push", *flags, "alice/tiny"], env(server)) == 0
    assert server.seen[0].body == {"model": "alice/tiny", "name": "alice/tiny", **sent}


@pytest.mark.parametrize(
    ("status", "line"),
    [
        (200, "It is public: everybody can pull it.\n"),
        (404, "It is private: only people you let in can pull it.\n"),
        (500, ""),
    ],
)
def test_push_ends_with_who_can_pull(status: int, line: str, capsys: pytest.CaptureFixture[str]) -> None:
    with fake_server({"POST /api/push": (200, PUSHED), "HEAD /alice/tiny": (status, None)}) as server:
        server.answers["GET /api/status"] = (200, {"hub": server.url})
        assert run(["push", "alice/tiny"], {**env(server), "OLLAMA_API_KEY": "crlk_x"}) == 0
    captured = capsys.readouterr()
    assert captured.out == f"\nYou can find your model at:\n\n\t{server.url}/alice/tiny\n"
    assert captured.err == "retrieving manifest\npushing manifest\nsuccess\n" + line
    # Asked as a stranger: with a key, everything of one's own would look public.
    assert "authorization" not in server.seen[-1].headers


@pytest.mark.parametrize(
    ("model", "me", "advice"),
    [
        ("alice/tiny", (401, {"error": "unauthorized"}), "private model is found only when you are signed in: corral signin\n"),
        ("alice/tiny", (200, {"name": "bob"}), "/library); if it is a private model, bob has to be let in by its owner\n"),
        ("other.test/alice/tiny", (200, {"name": "bob"}), "→ check the name\n"),
    ],
)
def test_pull_of_what_is_not_there_asks_nobody_to_sign_in_twice(
    model: str, me: tuple[int, object], advice: str, capsys: pytest.CaptureFixture[str]
) -> None:
    failed = [PULLED[0], {"error": "pull model manifest: file does not exist"}]
    with fake_server({"POST /api/pull": (200, failed), "POST /api/me": me}) as server:
        server.answers["GET /api/status"] = (200, {"hub": server.url})
        assert run(["pull", model], env(server)) == 1
    assert capsys.readouterr().err.endswith(advice)


@pytest.mark.parametrize(
    ("model", "installed", "at_hub", "said"),
    [
        (
            "tiny",
            ["tiny:135m", "other:1b"],
            (404, None),
            "tiny has no tag latest here; there is tiny:135m\n→ corral run tiny:135m",
        ),
        ("tiny", [], (200, {"tags": ["135m"]}), "tiny has no tag latest here; there is tiny:135m\n→ corral run tiny:135m"),
        (
            "tiny:1b",
            ["Tiny:1B", "x.test/library/tiny:2b"],
            (200, {"tags": "1"}),
            "Error: pull model manifest: file does not exist: tiny:1b\n",
        ),
        ("tiny:1b", ["tiny:2b"], (200, {"tags": ["2b", "3b", 4, "\x1b["]}), "there are tiny:2b, tiny:3b\n→ corral run tiny:2b\n"),
        ("tiny", [], (200, {"tags": list("abcdef")}), "tiny:e and more\n→ corral run tiny:a\n"),
    ],
)
def test_run_of_a_tag_that_is_not_there_names_those_that_are(
    model: str,
    installed: list[str],
    at_hub: tuple[int, object],
    said: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO())  # the command reads its own standard input
    failed = [PULLED[0], {"error": "pull model manifest: file does not exist"}]
    tags = {"models": [{"name": name} for name in installed]}
    answers = {"POST /api/pull": (200, failed), "GET /api/tags": (200, tags), "GET /v2/library/tiny/tags/list": at_hub}
    with fake_server(answers) as server:
        server.answers["GET /api/status"] = (200, {"hub": server.url})
        assert run(["run", model, "hi"], env(server)) == 1
        asked = [seen for seen in server.seen if seen.path.startswith("/v2/")]
    assert said in capsys.readouterr().err
    assert all("authorization" not in seen.headers for seen in asked)


@pytest.mark.parametrize(
    ("hub", "advice"),
    [
        ("https://ollama.com", "→ check the address, or the network; to use a hub of your own: corral signin --hub URL\n"),
        ("https://hub.example", "→ check the address, or the network\n"),
    ],
)
def test_pull_from_a_registry_that_is_not_there_names_it(hub: str, advice: str, capsys: pytest.CaptureFixture[str]) -> None:
    text = f"could not reach the registry {hub}: its host name is not known"
    failed = [PULLED[0], {"error": f"pull model manifest: {text} → check the address, or the network"}]
    with fake_server({"POST /api/pull": (200, failed), "GET /api/status": (200, {"hub": hub})}) as server:
        assert run(["pull", "tiny"], env(server)) == 1
    assert capsys.readouterr().err == f"pulling manifest\nError: pull model manifest: {text}\n{advice}"


@pytest.mark.parametrize(
    ("model", "shown"),
    [
        ("alice/tiny", "http://hub.test:1/alice/tiny"),
        ("hub.test:1/alice/tiny:q8", "http://hub.test:1/alice/tiny:q8"),
        ("other.test/alice/tiny", "other.test/alice/tiny:latest"),
    ],
)
def test_push_ends_with_where_the_model_is(model: str, shown: str, capsys: pytest.CaptureFixture[str]) -> None:
    answers = {"POST /api/push": (200, PUSHED), "GET /api/status": (200, {"hub": "http://hub.test:1"})}
    with fake_server(answers) as server:
        assert run(["push", model], env(server)) == 0
    assert capsys.readouterr().out == f"\nYou can find your model at:\n\n\t{shown}\n"


@pytest.mark.parametrize(
    ("error", "said"),
    [
        ("unauthorized: access denied", "you are not authorized to push to this namespace, create the model under a namespace"),
        ("model 'x:latest' not found", "corral list shows what is installed"),
        ('403: {"errors":[{"code":"DENIED","message":"bob may not push here"}]}', "Error: bob may not push here\n"),
        (
            '403: {"errors":[{"code":"DENIED","message":"connect SHA256:x at http://h/connect"}]}',
            "Error: connect SHA256:x at http://h/connect\n→ corral signin\n",
        ),
        ("507: <html>", "Error: 507: <html>\n"),
    ],
)
def test_push_failure_is_told_in_words(error: str, said: str, capsys: pytest.CaptureFixture[str]) -> None:
    with fake_server({"POST /api/push": (200, [PUSHED[0], {"error": error}])}) as server:
        assert run(["push", "x"], env(server)) == 1
    assert said in capsys.readouterr().err


class FakeTerminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_push_that_is_refused_leaves_nothing_but_the_reason_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    refusal = '403: {"errors":[{"code":"DENIED","message":"connect SHA256:x at http://h/connect"}]}'
    terminal = FakeTerminal()
    monkeypatch.setattr(sys, "stderr", terminal)  # where a command talks; there is no way to hand it another one
    with fake_server({"POST /api/push": (200, [PUSHED[0], {"error": refusal}])}) as server:
        assert run(["push", "alice/tiny"], env(server)) == 1
    said = terminal.getvalue()
    behind = said.rpartition("retrieving manifest")[2]
    assert "\x1b[2K\x1b[A\r\x1b[2K" in behind.partition("Error:")[0]
    assert said.count("http://h/connect") == 1
