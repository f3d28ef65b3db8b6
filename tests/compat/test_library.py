"""What the `ollama` packages do to the local server's models: make, copy, publish, bring back, give tools, remove.

Each step is one of the packages' own examples, written anew for a small model; the real examples were run by hand
(docs/compatibility.md).
"""

from typing import Any

import pytest

from compat.conftest import Clients
from flows.stack import MODEL, Stack

#: What each package publishes and removes again.
PUBLISHED = {"ollama.py": "alice/python:latest", "ollama.js": "alice/javascript:latest"}
_reports: dict[str, dict[str, Any]] = {}


@pytest.fixture(params=list(PUBLISHED))
def library(request: pytest.FixtureRequest, clients: Clients, servers: Stack, key: str) -> dict[str, Any]:
    """What one package saw."""
    assert key
    name = request.param
    if name not in _reports:
        _reports[name] = clients[name].report(servers.local_url, MODEL, publish_as=PUBLISHED[name])
    return {**_reports[name], "name": name}


def test_create_gives_a_model_the_abilities_of_its_template(library: dict[str, Any]) -> None:
    created = library["create"]
    assert created["last"] == "success"
    if library["name"] == "ollama.py":
        assert created["can"] == [["completion"], ["completion", "tools"], ["completion", "thinking"]]
        assert created["status"] == "success"
        assert "SYSTEM Be brief." in created["modelfile"]
        assert "PARAMETER num_predict 4" in created["modelfile"]
    else:
        assert created["can"] == ["completion", "thinking", "tools"]


def test_tools_are_called_with_arguments_and_refused_without_the_ability(library: dict[str, Any]) -> None:
    tools = library["tools"]
    assert (tools["name"], tools["arguments"]) == ("get_weather", {"city": "Oslo"})
    assert tools["refused"]["status"] == 400
    assert tools["refused"]["error"] == f"registry.ollama.ai/library/{MODEL} does not support tools"
    assert tools.get("after", True) is True


def test_thoughts_come_apart_and_only_from_models_that_think(library: dict[str, Any]) -> None:
    thinking = library["thinking"]
    whole, streamed = thinking["thoughts"]
    assert whole
    assert streamed == whole
    assert thinking["refused"] == {"error": f'"{MODEL}" does not support thinking', "status": 400}
    if library["name"] == "ollama.py":
        assert thinking["generated"] == [whole, ""]
        assert not thinking["off"][0]
        assert thinking["off"][1]


def test_pushed_model_is_pulled_back_from_the_hub_and_runs(library: dict[str, Any]) -> None:
    pushed, pulled = library["push"], library["pull"]
    assert pulled["was_gone"] is True
    if library["name"] == "ollama.py":
        assert (pushed["last"], pushed["is_whole"]) == ("success", True)
        assert (pulled["last"], pulled["is_whole"]) == ("success", True)
        assert pulled["answer"]
    else:
        assert (pushed, pulled["last"]) == ("success", "success")


def test_ps_tells_what_runs_and_until_when(library: dict[str, Any]) -> None:
    assert library["ps"]["name"]
    assert library["ps"]["size"] > 98_000_000
    assert library["ps"]["until"].startswith("20")


def test_deleted_models_are_gone_and_deleting_again_is_404(library: dict[str, Any]) -> None:
    assert MODEL in library["delete"]["left"]
    assert not {PUBLISHED[library["name"]], "talker:latest", "caller:latest", "able:latest"} & set(library["delete"]["left"])
    assert library["delete"]["again"]["status"] == 404


@pytest.mark.parametrize("name", ["ollama.js"])
def test_streams_that_are_left_free_their_slots(clients: Clients, servers: Stack, name: str) -> None:
    assert clients[name]
    if name not in _reports:
        _reports[name] = clients[name].report(servers.local_url, MODEL, publish_as=PUBLISHED[name])
    assert _reports[name]["leave"] == {"ends": ["AbortError"] * 9, "after": True}


@pytest.mark.parametrize("name", ["openai.js"])
def test_openai_streams_that_are_left_free_their_slots(clients: Clients, servers: Stack, name: str) -> None:
    report = clients[name].report(servers.local_url, MODEL, leaves=True)
    assert report["leave"]["left"] == 9
    assert report["leave"]["after"] in ("stop", "length")
