"""Which hub a command asks, and what it says when nobody chose one."""

import io
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from corral import settings
from corral.cli.api import LocalApi
from corral.cli.app import run
from corral.cli.context import Environment
from corral.wire.apikeys import make_api_key
from corral.wire.strong import TAG
from fakes_cli import FakeServer, fake_server

NOBODY = "127.0.0.1:9"


@pytest.mark.parametrize("command", ["whoami", "signin"])
def test_default_hub_out_of_reach_says_how_to_choose_another(
    command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    # The default is a constant; the real one is not to be asked by a test.
    monkeypatch.setattr(settings, "DEFAULT_HUB", f"http://{NOBODY}")
    assert run([command], {"HOME": str(tmp_path), "OLLAMA_HOST": NOBODY}) == 1
    assert capsys.readouterr().err == (
        f"Error: could not reach the hub http://{NOBODY}: connection refused; no other hub was chosen\n"
        "→ to use a hub of your own: corral signin --hub URL (corral up starts one)\n"
    )


def test_default_hub_of_the_local_server_out_of_reach_says_so_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(settings, "DEFAULT_HUB", f"http://{NOBODY}")
    with fake_server({"GET /api/status": (200, {"hub": f"http://{NOBODY}"})}) as server:
        assert run(["whoami"], {"HOME": str(tmp_path), "OLLAMA_HOST": server.host}) == 1
    assert capsys.readouterr().err.endswith("→ to use a hub of your own: corral signin --hub URL (corral up starts one)\n")


def test_chosen_hub_out_of_reach_gets_no_such_advice(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["whoami", "--hub", f"http://{NOBODY}"], {"HOME": str(tmp_path), "OLLAMA_HOST": NOBODY}) == 1
    assert "no other hub" not in capsys.readouterr().err


@pytest.mark.parametrize("command", ["signin", "whoami"])
def test_empty_hub_is_wrong_usage(command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run([command, "--hub", ""], {"HOME": str(tmp_path), "OLLAMA_HOST": NOBODY}) == 2
    said = f'Error: invalid argument for "--hub" flag: it is empty; give a hub\'s address\n→ corral {command} --help\n'
    assert capsys.readouterr().err == said


KEY = make_api_key(bytes(range(64))).text.reveal()
STRANGER = {"error": "unauthorized"}


@contextmanager
def hub_answering_keys(status: int, answer: object) -> Iterator[FakeServer]:
    """A hub to which this device is not connected, and what it answers an API key."""
    with fake_server({}) as server:

        def me() -> tuple[int, object]:
            is_key = server.seen[-1].headers.get("authorization", "").startswith("Bearer ")
            return (status, answer) if is_key else (401, STRANGER)

        # With the stronger signature the path stays as it is.
        discovery = {"corral": "1", "public_url": server.url, "signatures": [TAG, "stock"]}
        server.answers["GET /.well-known/corral"] = (200, discovery)
        server.vary["POST /api/me"] = server.vary["GET /api/keys"] = me
        yield server


def by_key(server: FakeServer, home: Path) -> dict[str, str]:
    return {"HOME": str(home), "OLLAMA_HOST": NOBODY, "CORRAL_HUB": server.url, "OLLAMA_API_KEY": "crlk_x"}


def test_whoami_with_a_key_shows_its_account(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with hub_answering_keys(200, {"name": "alice", "email": "a@b.test"}) as server:
        assert run(["whoami"], by_key(server, tmp_path)) == 0
        said = capsys.readouterr().out
        assert said == f"account    alice (a@b.test)\nhub        {server.url}\nsigned in  by API key (OLLAMA_API_KEY)\n"


@pytest.mark.parametrize("words", [["whoami"], ["keys", "list"]])
def test_key_that_a_hub_refuses_is_named(words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with hub_answering_keys(401, STRANGER) as server:
        assert run(words, by_key(server, tmp_path)) == 1
        assert capsys.readouterr().err == (
            f"Error: {server.host} refused the API key in OLLAMA_API_KEY: it is wrong, expired or revoked\n"
            f"→ take another one from {server.url}/settings/keys\n"
        )


@pytest.mark.parametrize(
    ("key", "said"),
    [
        ("", "asks for an API key\n→ put one into OLLAMA_API_KEY, or sign: OLLAMA_AUTH=1\n"),
        ("crlk_x", "refused the API key in OLLAMA_API_KEY: it is wrong, expired or revoked\n"),
    ],
)
@pytest.mark.parametrize(("words", "asked"), [(["show", "m"], "POST /api/show"), (["pull", "m"], "POST /api/pull")])
def test_server_that_wants_a_key_is_understood(
    words: list[str], asked: str, key: str, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with fake_server({asked: (401, STRANGER)}) as server:
        assert run(words, {"HOME": "/nonexistent", "OLLAMA_HOST": server.host, "OLLAMA_API_KEY": key}) == 1
        assert capsys.readouterr().err.startswith(f"Error: {server.host} {said}")


@pytest.mark.parametrize("auth", ["", "1"])
def test_key_whose_line_does_not_fit_is_not_advised_to_be_added_again(auth: str) -> None:
    environ = {"HOME": "/nonexistent", "OLLAMA_HOST": "http://192.0.2.2:11434", "OLLAMA_AUTH": auth}
    error = LocalApi(Environment(environ).settings)._refusal(401, {"error": "x", "is_known": True}, "")
    assert error.message == "192.0.2.2:11434 knows this key, but its line there does not apply to this request"
    assert error.advice.endswith("corral authorize list")
    assert "add" not in error.advice.split()


@pytest.mark.parametrize("key", ["", "crlk_x"])
def test_server_elsewhere_by_plain_http_is_told_of_no_key_that_would_not_be_sent(key: str) -> None:
    environ = {"HOME": "/nonexistent", "OLLAMA_HOST": "http://192.0.2.2:11434", "OLLAMA_API_KEY": key}
    error = LocalApi(Environment(environ).settings)._refusal(401, {}, "")
    assert error.message == "192.0.2.2:11434 asks for an API key, and over plain http it gets none"
    assert error.advice == "sign: OLLAMA_AUTH=1, or give OLLAMA_HOST its https address"


def test_key_is_no_subject_where_a_hub_behind_the_server_asks_to_sign_in(capsys: pytest.CaptureFixture[str]) -> None:
    refusal = {**STRANGER, "signin_url": "http://hub.test/connect?name=x"}
    with fake_server({"POST /api/show": (401, refusal)}) as server:
        assert run(["show", "m"], {"HOME": "/nonexistent", "OLLAMA_HOST": server.host, "OLLAMA_API_KEY": "crlk_x"}) == 1
    assert capsys.readouterr().err == "Error: not signed in to hub.test\n→ corral signin\n"


@pytest.mark.parametrize(
    ("pasted", "fault"),
    [
        (f'"{KEY}"', "has quotes around it"),
        (f"{KEY[:20]}\n{KEY[20:]}\n", "has a line break in it"),
        (KEY[:-5], "is cut off: 48 of 53 characters"),
        ("sk-elsewhere", "is no API key of a Corral hub; those begin with crlk_"),
    ],
)
def test_damaged_key_to_sign_in_with_is_not_sent_and_what_is_wrong_is_said(
    pasted: str, fault: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    # The command reads the process's own standard input; there is no way to hand it another one.
    monkeypatch.setattr(sys, "stdin", io.StringIO(pasted))
    with hub_answering_keys(200, {"name": "alice"}) as hub:
        environ = {"HOME": str(tmp_path), "OLLAMA_HOST": NOBODY}
        assert run(["signin", "--api-key-stdin", "--hub", hub.url], environ) == 1
    assert capsys.readouterr().err == (
        f"Error: what came on standard input {fault}\n"
        f"→ pipe in all of it, alone and without quotes; a new one is made on {hub.url}/settings/keys\n"
    )
    assert not [request for request in hub.seen if "authorization" in request.headers]


def test_key_to_sign_in_with_may_have_blanks_around_it_and_notes_behind_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO(f"  {KEY} \nuser: alice\n"))
    with hub_answering_keys(200, {"name": "alice"}) as hub:
        hub.answers["POST /api/user/keys"] = (200, {})
        run(["signin", "--api-key-stdin", "--hub", hub.url], {"HOME": str(tmp_path), "OLLAMA_HOST": NOBODY})
    (sent,) = [request for request in hub.seen if request.path == "/api/user/keys"]
    assert sent.headers["authorization"] == f"Bearer {KEY}"


@pytest.mark.parametrize(
    "words",
    [["pull", "x"], ["push", "a/x"], ["cp", "x", "y"], ["rm", "x"], ["create", "x", "-f"], ["run", "x", "hi"]],
    ids=" ".join,
)
def test_command_that_installs_says_of_a_hub_that_it_is_one(
    words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "Modelfile").write_text("FROM other\n")
    arguments = [*words, str(tmp_path / "Modelfile")] if words[-1] == "-f" else words
    monkeypatch.setattr(sys, "stdin", io.StringIO(""))
    with fake_server({"GET /.well-known/corral": (200, {"corral": "1", "public_url": "https://hub.test"})}) as hub:
        assert run(arguments, {"HOME": str(tmp_path), "OLLAMA_HOST": hub.host}) == 1
    said = f"Error: {hub.host} is a hub, which installs no models\n→ unset OLLAMA_HOST, or set it to a local server's address\n"
    assert capsys.readouterr().err.endswith(said)


def test_server_of_plain_http_asked_by_https_is_told_apart_from_a_wrong_certificate(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with fake_server({}) as server:
        assert run(["list"], {"HOME": str(tmp_path), "OLLAMA_HOST": f"https://{server.host}"}) == 1
    said = f"Error: https://{server.host} does not speak TLS as it should\n→ if it speaks http, its address begins with http://\n"
    assert capsys.readouterr().err == said
