"""Which hub a command asks, and what it says when nobody chose one."""

from pathlib import Path

import pytest

from corral import settings
from corral.cli.app import run

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
        "→ start one with `corral up`, or name it with --hub URL\n"
    )


def test_chosen_hub_out_of_reach_gets_no_such_advice(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["whoami", "--hub", f"http://{NOBODY}"], {"HOME": str(tmp_path), "OLLAMA_HOST": NOBODY}) == 1
    assert "no other hub" not in capsys.readouterr().err
