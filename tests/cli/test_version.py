"""`--version`: what it says of which server, and by both of its ways."""

import socket
import threading

import pytest

import corral
from corral.cli import entry
from corral.cli.app import run
from fakes_cli import fake_server

OURS = corral.__version__


@pytest.mark.parametrize(
    ("answer", "text"),
    [
        ((200, {"version": "0.34.0", "corral": OURS}), f"corral version is {OURS}\n"),
        ((200, {"version": "0.34.0", "corral": "9.9"}), f"corral version is 9.9\nWarning: client version is {OURS}\n"),
        ((200, {"version": "0.34.0"}), f"ollama version is 0.34.0\nWarning: client version is {OURS}\n"),
        ((200, {"version": OURS}), f"ollama version is {OURS}\nWarning: client version is {OURS}\n"),
        (
            (200, [b'{"version": "1\\u001b[2J"}']),
            f"ollama version is 1[2J\nWarning: client version is {OURS}\n",
        ),
        (
            (404, {"error": "x"}),
            f"Warning: could not connect to a running Corral instance\nWarning: client version is {OURS}\n",
        ),
        (
            (200, [b"<html>"]),
            f"Warning: could not connect to a running Corral instance\nWarning: client version is {OURS}\n",
        ),
    ],
    ids=("same", "other", "ollama", "ollama of our number", "hostile", "none", "stranger"),
)
@pytest.mark.parametrize("option", ["-v", "--version"])
def test_version_is_the_servers(option: str, answer: tuple[int, object], text: str, capsys: pytest.CaptureFixture[str]) -> None:
    with fake_server({"GET /api/version": answer}) as server:
        environ = {"HOME": "/nonexistent", "OLLAMA_HOST": server.host}
        assert entry.begin([option], environ) == 0
        assert capsys.readouterr().out == text
        # As part of a longer line, it is click's to find.
        assert run([option, "list"], environ) == 0
        assert capsys.readouterr().out == text


def test_version_without_a_server_warns(capsys: pytest.CaptureFixture[str]) -> None:
    assert entry.begin(["--version"], {"HOME": "/nonexistent", "OLLAMA_HOST": "127.0.0.1:9"}) == 0
    assert capsys.readouterr() == (
        f"Warning: could not connect to a running Corral instance\nWarning: client version is {OURS}\n",
        "",
    )


def test_version_with_a_bad_setting_is_told_as_every_error(capsys: pytest.CaptureFixture[str]) -> None:
    assert entry.begin(["--version"], {"HOME": "/x", "OLLAMA_HOST": "ho st"}) == 2
    assert capsys.readouterr().err.startswith("Error: OLLAMA_HOST is 'ho st'")


def test_version_does_not_wait_for_a_server_that_says_nothing(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("corral.cli.version._TIMEOUT_S", 0.05)  # a constant of seconds would make the test as slow
    with socket.create_server(("127.0.0.1", 0)) as silent:
        held: list[socket.socket] = []
        thread = threading.Thread(target=lambda: held.append(silent.accept()[0]))
        thread.start()
        assert entry.begin(["--version"], {"HOME": "/x", "OLLAMA_HOST": f"127.0.0.1:{silent.getsockname()[1]}"}) == 0
        thread.join()
        held[0].close()
    assert capsys.readouterr().out.startswith("Warning: could not connect")
