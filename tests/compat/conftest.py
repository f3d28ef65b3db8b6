"""Servers for the unmodified clients, and the environments that `make test` installed them into."""

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from compat.report import Client
from flows.stack import BOUNDED, MODEL, Stack

HERE = Path(__file__).parent
CACHE = HERE.parent.parent / ".cache/compat"
CLOUD = f"{MODEL}-cloud"
#: Three ways to a model: run here, run at the hub through the local server, asked of the hub itself with an API key.
WAYS = ("local", "relayed", "hub")
#: Client -> its environment and script. Those that take longest to import come first: they start in this order.
SCRIPTS = {
    "litellm": ("frameworks", "python_litellm.py"),
    "llama-index": ("frameworks", "python_llama_index.py"),
    "anthropic.py": ("venv", "python_anthropic.py"),
    "langchain": ("frameworks", "python_langchain.py"),
    "openai.py": ("venv", "python_openai.py"),
    "llm": ("frameworks", "python_llm.py"),
    "ollama.py": ("venv", "python_ollama.py"),
    "oras": ("venv", "python_oras.py"),
    "ollama.js": ("node", "npm_ollama.mjs"),
    "openai.js": ("node", "npm_openai.mjs"),
}
#: litellm would otherwise fetch a list of prices when it is imported.
OFFLINE = {"LITELLM_LOCAL_MODEL_COST_MAP": "True"}


class Clients:
    """Every client by name, and what each saw on each way; a report is made once. early: those to start at once."""

    def __init__(self, folder: Path, early: set[str]) -> None:
        self._folder = folder
        self._running = {name: _started(name, folder) for name in SCRIPTS if name in early}
        self._reports: dict[tuple[str, str], dict[str, Any]] = {}

    def __getitem__(self, name: str) -> Client:
        """Skips when its environment is not there."""
        if name not in self._running:
            self._running[name] = _started(name, self._folder)
        client = self._running[name]
        if client is None:
            pytest.skip(f"the environment of {name} is not there; `make test` makes it, for JavaScript with nodejs and npm")
        return client

    def report(self, name: str, way: str, servers: Stack, key: str) -> dict[str, Any]:
        """What a client saw on one of WAYS. key: for the hub."""
        client = self[name]
        if (name, way) not in self._reports:
            url, given = (servers.hub_url, key) if way == "hub" else (servers.local_url, "")
            self._reports[name, way] = {**client.report(url, CLOUD if way == "relayed" else MODEL, given), "way": way}
        return self._reports[name, way]

    def close(self) -> None:
        """End them."""
        for client in filter(None, self._running.values()):
            client.close()


def _started(name: str, folder: Path) -> Client | None:
    environment, script = SCRIPTS[name]
    program = shutil.which("node") if environment == "node" else str(CACHE / environment / "bin/python")
    modules = CACHE / "node/node_modules" / name.removesuffix(".js")
    if program is None or not Path(program).exists() or (environment == "node" and not modules.exists()):
        return None
    home = folder / name
    home.mkdir()
    where = CACHE / "node" if environment == "node" else home
    return Client([program, str(HERE / "clients" / script)], where, HOME=str(home), **OFFLINE)


@pytest.fixture(scope="session")
def clients(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Clients]:
    """The clients, importing their packages while the servers start."""
    values = [
        value for item in request.session.items if (spec := getattr(item, "callspec", None)) for value in spec.params.values()
    ]
    running = Clients(tmp_path_factory.mktemp("clients"), {value for value in values if isinstance(value, str)})
    yield running
    running.close()


@pytest.fixture(scope="session")
def servers(tmp_path_factory: pytest.TempPathFactory, small_model: Path, clients: Clients) -> Iterator[Stack]:
    """A started installation, its device connected to alice's account, also for pushing."""
    with Stack(tmp_path_factory.mktemp("compat")) as stack:
        stack.start("--model", f"{MODEL}={small_model}", *BOUNDED)
        stack.add_account("alice")
        yield stack


@pytest.fixture(scope="session")
def key(servers: Stack) -> str:
    """An API key of alice for all that a client does."""
    text = servers.add_key("alice", "inference", "keys", "models:pull", "models:push")
    servers.corral("signin", "--api-key-stdin", given=text + "\n")
    return text
