"""The unmodified client packages against both servers: what they list, show, generate and embed, and the errors they raise.

Each package does its checks in one process; the tests look at its report, so that a failure names the check.
"""

from typing import Any

import pytest

from compat.clients.jobs import TOKENS
from compat.conftest import WAYS, Clients
from flows.stack import MODEL, Stack

Report = dict[str, Any]


@pytest.fixture(params=WAYS)
def way(request: pytest.FixtureRequest) -> str:
    """One way to a model."""
    return str(request.param)


@pytest.fixture(params=["ollama.py", "ollama.js"])
def ollama_report(request: pytest.FixtureRequest, clients: Clients, servers: Stack, key: str, way: str) -> Report:
    """What one ollama package saw on one way."""
    return clients.report(request.param, way, servers, key)


@pytest.fixture(params=["openai.py", "openai.js"])
def openai_report(request: pytest.FixtureRequest, clients: Clients, servers: Stack, key: str, way: str) -> Report:
    """What one openai package saw on one way."""
    return clients.report(request.param, way, servers, key)


@pytest.fixture(params=["openai.py"])
def openai_python_report(request: pytest.FixtureRequest, clients: Clients, servers: Stack, key: str, way: str) -> Report:
    """What the openai package saw on one way, with the routes that only its script uses."""
    return clients.report(request.param, way, servers, key)


@pytest.fixture(params=["anthropic.py"])
def anthropic_report(request: pytest.FixtureRequest, clients: Clients, servers: Stack, key: str, way: str) -> Report:
    """What the anthropic package saw on one way."""
    return clients.report(request.param, way, servers, key)


def holds_a_conversation(counts: list[list[int]]) -> bool:
    """Whether both answers came in pieces, and the second prompt held the first question and its answer."""
    (first_prompt, first_answer, first_pieces), (second_prompt, second_answer, second_pieces) = counts
    return (
        min(first_pieces, second_pieces) > 2
        and min(first_answer, second_answer) > 0
        and second_prompt >= first_prompt + first_answer
        and second_prompt > first_prompt + 4
    )


def test_ollama_list_names_the_model(ollama_report: Report) -> None:
    assert MODEL in ollama_report["list"]


def test_ollama_show_tells_what_the_model_can_do(ollama_report: Report) -> None:
    assert "completion" in ollama_report["show"]["capabilities"]


@pytest.mark.parametrize("check", ["generate", "chat"])
def test_ollama_answers_are_the_same_whole_and_streamed(ollama_report: Report, check: str) -> None:
    whole, streamed = ollama_report[check], ollama_report[f"{check}_streamed"]
    assert whole["done"] is True
    assert whole["text"]
    assert 0 < whole["eval_count"] <= TOKENS
    assert streamed["done"] is True
    assert streamed["parts"] > 1
    assert streamed["text"] == whole["text"]


def test_ollama_holds_a_streamed_conversation(ollama_report: Report) -> None:
    assert holds_a_conversation(ollama_report["conversation"])


def test_ollama_tells_how_likely_each_token_was(ollama_report: Report) -> None:
    for check, others in (("generate", 0), ("chat", 3)):
        count, alternatives, are_logarithms = ollama_report[f"{check}_logprobs"]
        assert count >= ollama_report[check]["eval_count"] - 1
        assert alternatives == [others]
        assert are_logarithms


def test_ollama_keeps_to_a_schema(ollama_report: Report) -> None:
    assert isinstance(ollama_report["structured"]["ok"], bool)


def test_ollama_embed_gives_one_vector_per_text(ollama_report: Report) -> None:
    assert ollama_report["embed"] == [576, 576]


def test_ollama_unknown_model_raises_404(ollama_report: Report) -> None:
    assert ollama_report["unknown_model"]["status"] == 404


def test_ollama_python_runs_in_parallel_and_embeds_the_old_way(clients: Clients, servers: Stack, key: str, way: str) -> None:
    report = clients.report("ollama.py", way, servers, key)
    assert report["chat_in_parallel"] == [True, True, True]
    assert report["embeddings"] == 576


def test_openai_models_are_listed_and_found(openai_report: Report) -> None:
    assert MODEL in openai_report["models"]
    # A relayed answer is the hub's own, and a hub names its models without `-cloud`.
    assert openai_report["model"] == MODEL


def test_openai_chat_is_the_same_whole_and_streamed(openai_report: Report) -> None:
    whole, streamed = openai_report["chat"], openai_report["chat_streamed"]
    assert whole["text"]
    assert whole["finish"] in ("stop", "length")
    assert streamed["text"] == whole["text"]
    assert streamed["finish"] == [whole["finish"]]
    assert streamed["tokens"] == [whole["tokens"]]


def test_openai_holds_a_streamed_conversation(openai_report: Report) -> None:
    assert holds_a_conversation(openai_report["conversation"])


def test_openai_unknown_model_raises_not_found(openai_report: Report) -> None:
    assert (openai_report["unknown_model"]["error"], openai_report["unknown_model"]["status"]) == ("NotFoundError", 404)


def test_openai_response_is_complete(openai_report: Report) -> None:
    whole = openai_report["response"]
    assert whole["text"]
    assert 0 < whole["tokens"] <= TOKENS
    assert whole["status"] == "completed"


def test_openai_completion_is_the_same_whole_and_streamed(openai_python_report: Report) -> None:
    whole, streamed = openai_python_report["completion"], openai_python_report["completion_streamed"]
    assert whole["text"]
    assert whole["finish"] in ("stop", "length")
    assert (streamed["text"], streamed["tokens"]) == (whole["text"], whole["tokens"])
    assert streamed["chunks"] > 2


def test_openai_embeddings_are_the_same_packed_and_as_numbers(openai_python_report: Report) -> None:
    assert openai_python_report["embeddings"] == {"sizes": [576, 576], "is_same": True}


def test_openai_response_is_the_same_streamed(openai_python_report: Report) -> None:
    whole, streamed = openai_python_report["response"], openai_python_report["response_streamed"]
    assert (streamed["text"], streamed["status"]) == (whole["text"], "completed")
    assert (streamed["first"], streamed["last"]) == ("response.created", "response.completed")


def test_anthropic_message_is_the_same_whole_and_streamed(anthropic_report: Report) -> None:
    whole, streamed = anthropic_report["message"], anthropic_report["streamed"]
    assert whole["text"]
    assert whole["stop"] in ("end_turn", "max_tokens")
    assert 0 < whole["out"] <= TOKENS
    assert (streamed["text"], streamed["stop"], streamed["out"]) == (whole["text"], whole["stop"], whole["out"])
    assert (streamed["first"], streamed["last"]) == ("message_start", "message_stop")


def test_anthropic_holds_a_streamed_conversation(anthropic_report: Report) -> None:
    assert [bool(said) for said in anthropic_report["conversation"]] == [True, True, True]


def test_anthropic_sends_results_of_tools_and_asks_any_model_to_think(anthropic_report: Report) -> None:
    assert anthropic_report["blocks"] == "assistant"


def test_anthropic_counts_tokens_as_the_engine_does(anthropic_report: Report) -> None:
    few, many = anthropic_report["count"]
    assert few == anthropic_report["message"]["in"]
    assert many > few + 20


def test_anthropic_errors_are_the_packages_own(anthropic_report: Report) -> None:
    assert anthropic_report["unknown_model"] == {"error": "NotFoundError", "status": 404}
    assert anthropic_report["no_messages"] == {"error": "BadRequestError", "status": 400}


@pytest.mark.parametrize("name", ["litellm", "llama-index", "langchain", "llm"])
def test_framework_holds_a_streamed_conversation(clients: Clients, servers: Stack, key: str, way: str, name: str) -> None:
    assert holds_a_conversation(clients.report(name, way, servers, key)["conversation"])


@pytest.mark.parametrize("name", ["langchain"])
def test_langchain_embeds(clients: Clients, servers: Stack, key: str, way: str, name: str) -> None:
    assert clients.report(name, way, servers, key)["embed"] == [576, 576]


@pytest.mark.parametrize("name", ["llm"])
def test_llm_finds_the_model_in_the_list(clients: Clients, servers: Stack, key: str, name: str) -> None:
    for way in ("local", "hub"):
        assert MODEL in clients.report(name, way, servers, key)["models"]


@pytest.fixture(scope="module")
def revoked(servers: Stack) -> str:
    """A key that is no longer good."""
    text = servers.add_key()
    servers.corral("hub", "key", "revoke", "alice", text.removeprefix("crlk_")[:10])
    return text


@pytest.mark.parametrize(
    ("name", "error"),
    [
        ("ollama.py", "unauthorized"),
        ("ollama.js", "unauthorized"),
        ("openai.py", "AuthenticationError"),
        ("openai.js", "AuthenticationError"),
        ("anthropic.py", "AuthenticationError"),
        ("langchain", "unauthorized"),
    ],
)
def test_revoked_key_raises_the_packages_own_401(servers: Stack, clients: Clients, revoked: str, name: str, error: str) -> None:
    checks = {"anthropic.py": ("message", "streamed"), "langchain": ("conversation",)}.get(name, ("chat", "chat_streamed"))
    report = clients[name].report(servers.hub_url, MODEL, revoked, only=checks)
    for check in checks:
        assert report[check]["status"] == 401
        assert error in report[check]["error"]
