"""A secured local server for unmodified client packages: each sends its API key the way it always does."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from compat.conftest import Clients
from flows.stack import MODEL, Stack


@pytest.fixture(scope="module")
def secured(tmp_path_factory: pytest.TempPathFactory, small_model: Path) -> Iterator[tuple[Stack, str]]:
    """A server that asks everybody for a key, and a key that may run models."""
    with Stack(tmp_path_factory.mktemp("secured"), CORRAL_LOCAL_AUTH="on", OLLAMA_AUTH="1") as stack:
        stack.begin("serve").wait_for(r"local +http")
        stack.corral("authorize", "add", ".ollama/id_ed25519.pub", "--name", "here", "--rights", "manage")
        (stack.home / "Modelfile").write_text(f"FROM {small_model}\nPARAMETER num_predict 200\n")
        stack.corral("create", MODEL, "-f", "Modelfile")
        yield stack, stack.corral("authorize", "key", "sdk").stdout.strip()


@pytest.mark.parametrize("name", ["ollama.py", "ollama.js"])
def test_m2_ollama_package_is_let_in_by_its_key(name: str, clients: Clients, secured: tuple[Stack, str]) -> None:
    stack, key = secured
    report = clients[name].report(stack.local_url, MODEL, key, only=["list", "generate", "unknown_model"])
    assert MODEL in report["list"]
    assert report["generate"]["text"]
    assert report["unknown_model"]["status"] == 404


def test_m2_ollama_package_without_a_key_sees_a_401(clients: Clients, secured: tuple[Stack, str]) -> None:
    report = clients["ollama.py"].report(secured[0].local_url, MODEL, only=["list"])
    assert report["list"] == {"error": "unauthorized", "status": 401}


@pytest.mark.parametrize("name", ["openai.py", "openai.js"])
def test_m2_openai_package_is_let_in_by_its_key(name: str, clients: Clients, secured: tuple[Stack, str]) -> None:
    stack, key = secured
    assert clients[name].report(stack.local_url, MODEL, key, only=["chat"])["chat"]["text"]


def test_m2_anthropic_package_is_let_in_by_its_own_header(clients: Clients, secured: tuple[Stack, str]) -> None:
    stack, key = secured
    report = clients["anthropic.py"].report(stack.local_url, MODEL, key, only=["message"])
    assert report["message"]["text"]
