"""Servers for the unmodified clients, and the environments that `make test` installed them into."""

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from compat.report import Client, report_by
from flows.stack import MODEL, Stack

HERE = Path(__file__).parent
CACHE = HERE.parent.parent / ".cache/compat"


@pytest.fixture(scope="session")
def servers(tmp_path_factory: pytest.TempPathFactory, small_model: Path) -> Iterator[Stack]:
    """A started installation, its device connected to alice's account."""
    with Stack(tmp_path_factory.mktemp("compat")) as stack:
        stack.start("--model", f"{MODEL}={small_model}")
        stack.add_account("alice")
        stack.sign_in("alice")
        yield stack


@pytest.fixture(scope="session")
def python_client() -> Client:
    """Runs a Python script of clients/ against the packages of requirements.lock."""
    python = CACHE / "venv/bin/python"
    if not python.exists():
        pytest.skip("the clients' environment is not there; `make test` makes it")

    def run(script: str, url: str, model: str, key: str) -> dict[str, Any]:
        env = dict.fromkeys(("OPENAI_API_KEY", "ANTHROPIC_API_KEY"), key or "unused")
        if key:
            env["OLLAMA_API_KEY"] = key
        return report_by([str(python), str(HERE / "clients" / script), url, model], env, HERE)

    return run


@pytest.fixture(scope="session")
def node_client() -> Client:
    """Runs a script of clients/ against the packages of package-lock.json."""
    node = shutil.which("node")
    if node is None or not (CACHE / "node/node_modules/ollama").exists():
        pytest.skip("node, npm or the client's package is not there; install nodejs and npm, then `make test`")

    def run(script: str, url: str, model: str, key: str) -> dict[str, Any]:
        return report_by([node, str(HERE / "clients" / script), url, model, *([key] if key else [])], {}, CACHE / "node")

    return run
