"""The unmodified client packages against both servers: what they list, show, generate and embed, and the errors they raise.

Each package runs its checks in one process per server; the tests look at the report, so that a failure names the check.
"""

from typing import Any

import pytest

from compat.report import Client
from flows.stack import MODEL, Stack

CLOUD = f"{MODEL}-cloud"
#: Three ways to a model: run here, run at the hub through the local server, asked of the hub itself with an API key.
WAYS = ("local", "relayed", "hub")
_reports: dict[tuple[str, str], dict[str, Any]] = {}


@pytest.fixture(params=[("ollama.py", way) for way in WAYS] + [("ollama.js", way) for way in WAYS], ids="-".join)
def ollama_report(request: pytest.FixtureRequest, servers: Stack, python_client: Client, node_client: Client) -> dict[str, Any]:
    """What one ollama package saw on one way."""
    package, way = request.param
    run, script = (python_client, "python_ollama.py") if package == "ollama.py" else (node_client, "npm_ollama.mjs")
    return report_of(run, script, way, servers)


@pytest.fixture(params=WAYS)
def openai_report(request: pytest.FixtureRequest, servers: Stack, python_client: Client) -> dict[str, Any]:
    """What the openai package saw on one way."""
    return report_of(python_client, "python_openai.py", request.param, servers)


@pytest.fixture(params=WAYS)
def anthropic_report(request: pytest.FixtureRequest, servers: Stack, python_client: Client) -> dict[str, Any]:
    """What the anthropic package saw on one way."""
    return report_of(python_client, "python_anthropic.py", request.param, servers)


def report_of(run: Client, script: str, way: str, servers: Stack) -> dict[str, Any]:
    """The report of a client, made once."""
    if (script, way) not in _reports:
        url, key = (servers.hub_url, servers.add_key()) if way == "hub" else (servers.local_url, "")
        report = run(script, url, CLOUD if way == "relayed" else MODEL, key)
        _reports[script, way] = {**report, "way": way}
    return _reports[script, way]


def test_ollama_list_names_the_model(ollama_report: dict[str, Any]) -> None:
    assert MODEL in ollama_report["list"]


def test_ollama_show_tells_what_the_model_can_do(ollama_report: dict[str, Any]) -> None:
    assert "completion" in ollama_report["show"]["capabilities"]


@pytest.mark.parametrize("check", ["generate", "chat"])
def test_ollama_answers_are_the_same_whole_and_streamed(ollama_report: dict[str, Any], check: str) -> None:
    whole, streamed = ollama_report[check], ollama_report[f"{check}_streamed"]
    assert whole["done"] is True
    assert whole["text"]
    assert 0 < whole["eval_count"] <= 12
    assert streamed["done"] is True
    assert streamed["parts"] > 1
    assert streamed["text"] == whole["text"]


def test_ollama_embed_gives_one_vector_per_text(ollama_report: dict[str, Any]) -> None:
    assert ollama_report["embed"] == [576, 576]


def test_ollama_unknown_model_raises_404(ollama_report: dict[str, Any]) -> None:
    assert ollama_report["unknown_model"]["status"] == 404


def test_ollama_python_runs_in_parallel_and_keeps_a_schema(servers: Stack, python_client: Client) -> None:
    for way in WAYS:
        report = report_of(python_client, "python_ollama.py", way, servers)
        assert report["chat_in_parallel"] == [True, True, True]
        assert isinstance(report["structured"]["ok"], bool)
        assert report["embeddings"] == 576


def test_openai_models_are_listed_and_found(openai_report: dict[str, Any]) -> None:
    assert MODEL in openai_report["models"]
    # A relayed answer is the hub's own, and a hub names its models without `-cloud`.
    assert openai_report["model"] == MODEL


def test_openai_chat_is_the_same_whole_and_streamed(openai_report: dict[str, Any]) -> None:
    whole, streamed = openai_report["chat"], openai_report["chat_streamed"]
    assert whole["text"]
    assert whole["finish"] in ("stop", "length")
    assert streamed["text"] == whole["text"]
    assert streamed["finish"] == [whole["finish"]]
    assert streamed["tokens"] == [whole["tokens"]]


def test_openai_unknown_model_raises_not_found(openai_report: dict[str, Any]) -> None:
    assert openai_report["unknown_model"] == {"error": "NotFoundError", "status": 404}


def test_openai_completion_is_the_same_whole_and_streamed(openai_report: dict[str, Any]) -> None:
    whole, streamed = openai_report["completion"], openai_report["completion_streamed"]
    assert whole["text"]
    assert whole["finish"] in ("stop", "length")
    assert (streamed["text"], streamed["tokens"]) == (whole["text"], whole["tokens"])
    assert streamed["chunks"] > 2


def test_openai_embeddings_are_the_same_packed_and_as_numbers(openai_report: dict[str, Any]) -> None:
    assert openai_report["embeddings"] == {"sizes": [576, 576], "is_same": True}


def test_openai_response_is_the_same_whole_and_streamed(openai_report: dict[str, Any]) -> None:
    whole, streamed = openai_report["response"], openai_report["response_streamed"]
    assert whole["text"]
    assert 0 < whole["tokens"] <= 12
    assert (streamed["text"], streamed["status"], whole["status"]) == (whole["text"], "completed", "completed")
    assert (streamed["first"], streamed["last"]) == ("response.created", "response.completed")


def test_anthropic_message_is_the_same_whole_and_streamed(anthropic_report: dict[str, Any]) -> None:
    whole, streamed = anthropic_report["message"], anthropic_report["streamed"]
    assert whole["text"]
    assert whole["stop"] in ("end_turn", "max_tokens")
    assert 0 < whole["out"] <= 12
    assert (streamed["text"], streamed["stop"], streamed["out"]) == (whole["text"], whole["stop"], whole["out"])
    assert (streamed["first"], streamed["last"]) == ("message_start", "message_stop")


def test_anthropic_holds_a_streamed_conversation(anthropic_report: dict[str, Any]) -> None:
    assert [bool(said) for said in anthropic_report["conversation"]] == [True, True, True]


def test_anthropic_sends_results_of_tools_and_asks_any_model_to_think(anthropic_report: dict[str, Any]) -> None:
    assert anthropic_report["blocks"] == "assistant"


def test_anthropic_counts_tokens_as_the_engine_does(anthropic_report: dict[str, Any]) -> None:
    few, many = anthropic_report["count"]
    assert few == anthropic_report["message"]["in"]
    assert many > few + 20


def test_anthropic_errors_are_the_packages_own(anthropic_report: dict[str, Any]) -> None:
    assert anthropic_report["unknown_model"] == {"error": "NotFoundError", "status": 404}
    assert anthropic_report["no_messages"] == {"error": "BadRequestError", "status": 400}


@pytest.mark.parametrize(
    ("script", "error"),
    [
        ("python_ollama.py", "unauthorized"),
        ("npm_ollama.mjs", "unauthorized"),
        ("python_openai.py", "AuthenticationError"),
        ("python_anthropic.py", "AuthenticationError"),
    ],
)
def test_revoked_key_raises_the_packages_own_401(
    servers: Stack, python_client: Client, node_client: Client, script: str, error: str
) -> None:
    key = servers.add_key()
    servers.corral("hub", "key", "revoke", "alice", key.removeprefix("crlk_")[:10])
    run = node_client if script.endswith("mjs") else python_client
    report = run(script, servers.hub_url, MODEL, key)
    for check in ("message", "streamed") if "anthropic" in script else ("chat", "chat_streamed"):
        assert report[check]["status"] == 401
        assert error in report[check]["error"]
