"""Installed models by name: what is found, what is not, and in which words each route says so."""

from typing import Any

import pytest

from corral.local.models import LocalModels, RunsElsewhere
from corral.wire.errors import CorralError
from corral.wire.native import ChatRequest, EmbeddingsRequest, EmbedRequest, GenerateRequest
from fakes_local import FakeInference, MemoryModels, installed, stub, stub_models

REQUESTS = {"generate": GenerateRequest, "chat": ChatRequest, "embed": EmbedRequest, "embeddings": EmbeddingsRequest}


@pytest.fixture
def inference() -> FakeInference:
    return FakeInference()


@pytest.fixture
def models(inference: FakeInference) -> LocalModels:
    remote = stub(installed("big:1t"), host="http://localhost:11435", remote="big:1t")
    return LocalModels(MemoryModels(installed("llama3:8b"), installed("ada/own:latest"), remote), inference, stub_models())  # type: ignore[arg-type]


async def ask(models: LocalModels, verb: str, name: str) -> Any:
    """The answer of one route, its stream read to the end."""
    request = REQUESTS[verb](model=name)
    if verb in ("embed", "embeddings"):
        return await getattr(models, verb)(request, None)
    return [event async for event in getattr(models, verb)(request, None)]


@pytest.mark.parametrize("verb", REQUESTS)
@pytest.mark.parametrize("name", ["llama3:8b", "LLAMA3:8B", "llama3:8b:local", "registry.ollama.ai/library/llama3:8b"])
async def test_installed_model_runs_under_every_spelling(
    verb: str, name: str, models: LocalModels, inference: FakeInference
) -> None:
    answer = await ask(models, verb, name)
    assert inference.models == [installed("llama3:8b")]
    if verb == "generate":
        # Clients compare the name with the one they sent.
        assert {event.model for event in answer} == {name}


@pytest.mark.parametrize(
    ("verb", "name", "status", "message"),
    [
        ("generate", "", 404, "model '' not found"),
        ("chat", "", 400, "model is required"),
        ("embed", "", 404, "model '' not found"),
        ("embeddings", "", 400, "model is required"),
        ("generate", "gone", 404, "model 'gone' not found"),
        ("chat", "gone:1b:local", 404, "model 'gone:1b:local' not found"),
        ("embed", "gone", 404, 'model "gone" not found, try pulling it first'),
        ("embeddings", "gone", 404, 'model "gone" not found, try pulling it first'),
        *((verb, "a b", 400, "invalid model name") for verb in REQUESTS),
        *((verb, "../x", 400, "invalid model name") for verb in REQUESTS),
        *((verb, "x:cloud:local", 400, 'use either :local or :cloud, not both: "x:cloud:local"') for verb in REQUESTS),
    ],
)
async def test_model_that_is_not_there_is_told_in_ollamas_words(
    verb: str, name: str, status: int, message: str, models: LocalModels
) -> None:
    with pytest.raises(CorralError) as refused:
        await ask(models, verb, name)
    assert (refused.value.status, refused.value.message) == (status, message)


@pytest.mark.parametrize("verb", ["embed", "embeddings"])
async def test_stub_does_not_run_here(verb: str, models: LocalModels, inference: FakeInference) -> None:
    with pytest.raises(RunsElsewhere) as found:
        await ask(models, verb, "big:1t")
    assert found.value.stub.remote_model == "big:1t"
    assert found.value.message == "this server cannot run this remote model"
    assert inference.models == []


@pytest.mark.parametrize("verb", ["generate", "chat"])
async def test_stream_that_is_left_is_closed_at_once(verb: str, models: LocalModels, inference: FakeInference) -> None:
    events = getattr(models, verb)(REQUESTS[verb](model="llama3:8b"), None)
    await anext(events)
    assert inference.closed == 0
    await events.aclose()
    assert inference.closed == 1


async def test_tags_lists_stubs_too(models: LocalModels) -> None:
    assert [model.name.short for model in await models.tags(None)] == ["llama3:8b", "ada/own:latest", "big:1t"]


@pytest.mark.parametrize("name", ["ada/own", "ada/own:latest", "ada/OWN:local"])
async def test_show_finds_by_name_with_the_default_tag(name: str, models: LocalModels) -> None:
    assert (await models.show(name, None)).name.short == "ada/own:latest"


async def test_show_of_a_stub_gives_it(models: LocalModels) -> None:
    assert (await models.show("big:1t", None)).is_stub


@pytest.mark.parametrize(
    ("name", "status", "message"),
    [
        ("", 400, "model is required"),
        ("a b", 400, "invalid model name"),
        ("gone", 404, "model 'gone:latest' not found"),
        ("registry.ollama.ai/library/gone", 404, "model 'gone:latest' not found"),
        ("big:1t:local", 404, "model 'big:1t:local' not found"),
    ],
)
async def test_show_refuses_in_ollamas_words(name: str, status: int, message: str, models: LocalModels) -> None:
    with pytest.raises(CorralError) as refused:
        await models.show(name, None)
    assert (refused.value.status, refused.value.message) == (status, message)
