"""What every Engine and its runners do: on the scripted one always, on llama.cpp when the small model is there."""

import struct
from collections.abc import AsyncIterator
from contextlib import aclosing
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import pytest_asyncio

from corral.core.ports import ChatCall, Chunk, CompletionCall, Engine, Finish, LoadOptions, Runner, Sampling
from corral.core.records import Model
from corral.engines.llamacpp import LlamaCppEngine
from corral.engines.scripted import ScriptedEngine
from corral.wire.errors import CorralError
from fakes import SeededEntropy
from fakes_engine import weights

# One loop and two runners for all of them: loading the real model takes a second.
pytestmark = pytest.mark.asyncio(loop_scope="module")

OPTIONS = LoadOptions(num_ctx=512, parallel=2)
QUESTION = ChatCall(
    messages=[{"role": "user", "content": "Why is the sky blue?"}],
    sampling=Sampling(values={"n_predict": 3, "temperature": 0.0, "seed": 1}),
)
ENDLESS = Sampling(values={"ignore_eos": True, "n_predict": 400})


@dataclass(frozen=True)
class Case:
    """An engine, a model it can load, one that it cannot, because its weights are something else, and one with markers for
    filling in the middle. plain: an engine for which the first has no such markers."""

    engine: Engine
    model: Model
    bad: Model
    filler: Model
    plain: Engine


def _scripted(path: Path) -> Case:
    pieces = [f" word{number}" for number in range(450)]
    plain = ScriptedEngine(pieces, has_markers=False)
    engine = ScriptedEngine(pieces, unreadable={str(path)})
    return Case(engine, weights(), weights("bad:1b", weights=str(path)), weights("filler:1b"), plain)


def _with_markers(weights_path: Path, target: Path) -> Path:
    """A copy of a GGUF file whose metadata names three tokens of its vocabulary as markers. The copy is four keys longer, the
    last of a length that leaves the data aligned."""
    keys = [f"tokenizer.ggml.fim_{part}_token_id".encode() for part in ("pre", "suf", "mid")]
    added = b"".join(struct.pack("<Q", len(key)) + key + struct.pack("<II", 4, token) for token, key in enumerate(keys, start=4))
    name = b"test.padding"
    added += struct.pack("<Q", len(name)) + name + struct.pack("<I", 8)
    text = b"x" * (-(len(added) + 8) % 32)
    added += struct.pack("<Q", len(text)) + text
    content = weights_path.read_bytes()
    magic, version, tensors, pairs = struct.unpack("<4sIQQ", content[:24])
    target.write_bytes(struct.pack("<4sIQQ", magic, version, tensors, pairs + 4) + added + content[24:])
    return target


@pytest.fixture(scope="module", params=["scripted", pytest.param("llamacpp", marks=pytest.mark.engine)])
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    bad = tmp_path_factory.mktemp("weights") / "bad.gguf"
    bad.write_text("this is a poem, not a model")
    if request.param == "scripted":
        return _scripted(bad)
    path: Path = request.getfixturevalue("small_model")
    good = weights("smollm2:135m", weights=str(path), size_bytes=path.stat().st_size)
    filler = replace(good, weights=str(_with_markers(path, bad.with_name("filler.gguf"))))
    engine = LlamaCppEngine(SeededEntropy())
    return Case(engine, good, replace(good, weights=str(bad)), filler, engine)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def runner(case: Case) -> AsyncIterator[Runner]:
    runner = await case.engine.load(case.model, OPTIONS)
    yield runner
    await runner.close()


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def embedder(case: Case) -> AsyncIterator[Runner]:
    runner = await case.engine.load(case.model, replace(OPTIONS, embedding=True))
    yield runner
    await runner.close()


async def answer(events: AsyncIterator[Chunk | Finish]) -> tuple[list[Chunk], Finish]:
    found = [event async for event in events]
    end = found.pop()
    assert isinstance(end, Finish)
    assert all(isinstance(event, Chunk) for event in found)
    return found, end  # type: ignore[return-value]


async def test_chat_gives_pieces_and_then_one_end_with_counts(runner: Runner) -> None:
    chunks, end = await answer(runner.chat(QUESTION))
    assert "".join(chunk.content for chunk in chunks)
    assert end.reason == "length"
    assert end.timings.eval_tokens == 3
    assert end.timings.prompt_tokens > 5
    assert end.timings.eval_ns > 0
    assert end.timings.prompt_ns > 0


async def test_chat_asked_again_counts_cached_tokens_of_the_prompt_as_well(runner: Runner) -> None:
    _, first = await answer(runner.chat(QUESTION))
    _, second = await answer(runner.chat(QUESTION))
    assert first.timings.prompt_tokens == second.timings.prompt_tokens


async def test_complete_continues_a_prompt_and_tells_probabilities(runner: Runner) -> None:
    call = CompletionCall(prompt="Once upon a time", sampling=Sampling(values={"n_predict": 2, "n_probs": 1}))
    chunks, end = await answer(runner.complete(call))
    assert end.timings.eval_tokens == 2
    logprobs = [item for chunk in chunks for item in chunk.logprobs]
    assert len(logprobs) == 2
    assert {"token", "logprob", "bytes", "top_logprobs"} <= logprobs[0].keys()


async def test_complete_takes_earlier_tokens_before_the_prompt(runner: Runner) -> None:
    tokens = await runner.tokenize("Once upon")
    sampling = Sampling(values={"n_predict": 1})
    _, alone = await answer(runner.complete(CompletionCall(prompt=" a time", sampling=sampling)))
    _, continued = await answer(runner.complete(CompletionCall(prompt=" a time", context=tokens, sampling=sampling)))
    assert continued.timings.prompt_tokens >= alone.timings.prompt_tokens + len(tokens) - 1


async def test_gap_between_prompt_and_suffix_is_filled(case: Case) -> None:
    runner = await case.engine.load(case.filler, OPTIONS)
    sampling = Sampling(values={"n_predict": 3, "n_probs": 1, "ignore_eos": True})
    _, alone = await answer(runner.complete(CompletionCall(prompt="def f(x):", sampling=sampling)))
    call = CompletionCall(prompt="def f(x):", suffix="return y", sampling=sampling)
    chunks, end = await answer(runner.complete(call))
    assert (end.reason, end.timings.eval_tokens) == ("length", 3)
    assert end.timings.prompt_tokens > alone.timings.prompt_tokens
    assert len([item for chunk in chunks for item in chunk.logprobs]) == 3
    await runner.close()


async def test_suffix_for_a_model_without_markers_is_refused_with_501(case: Case) -> None:
    runner = await case.plain.load(case.model, OPTIONS)
    with pytest.raises(CorralError) as refused:
        await answer(runner.complete(CompletionCall(prompt="def f(x):", suffix="return y")))
    assert (refused.value.code, refused.value.status) == ("bad_request", 501)
    await runner.close()


async def test_prompt_beyond_the_context_is_refused_and_the_runner_stays_well(runner: Runner) -> None:
    with pytest.raises(CorralError) as refused:
        await answer(runner.complete(CompletionCall(prompt="word " * 600, sampling=ENDLESS)))
    assert (refused.value.code, refused.value.status) == ("bad_request", 400)
    assert "600" not in refused.value.message or "context" in refused.value.message
    assert await runner.is_healthy()


async def test_unknown_option_is_ignored(runner: Runner) -> None:
    values = {"n_predict": 1, "n_discard": -1, "--log-file": "/x", "slot_save_path": "/x"}
    _, end = await answer(runner.complete(CompletionCall(prompt="Hello", sampling=Sampling(values=values))))
    assert end.timings.eval_tokens == 1


async def test_closing_an_answer_early_leaves_a_runner_that_answers(runner: Runner) -> None:
    for _ in range(3):
        async with aclosing(runner.complete(CompletionCall(prompt="Hello", sampling=ENDLESS))) as events:  # type: ignore[type-var]
            async for _ in events:
                break
    await answer(runner.chat(QUESTION))


async def test_tokens_of_more_text_are_more(runner: Runner) -> None:
    assert await runner.tokenize("", add_special=False) == []
    few, many = await runner.tokenize("Hello"), await runner.tokenize("Hello, wide world of words")
    assert 0 < len(few) < len(many)


async def test_template_holds_the_message(runner: Runner) -> None:
    rendered = await runner.apply_template(QUESTION)
    assert "Why is the sky blue?" in rendered
    assert rendered != "Why is the sky blue?"


async def test_embedding_without_having_been_loaded_for_it_is_refused(runner: Runner) -> None:
    with pytest.raises(CorralError) as refused:
        await runner.embed(["Hello"])
    assert (refused.value.code, refused.value.status) == ("bad_request", 501)


async def test_embedder_gives_a_vector_per_text_in_order_and_counts(embedder: Runner) -> None:
    vectors, tokens = await embedder.embed(["Hello there", "Goodbye", "Hello there"])
    assert len(vectors) == 3
    assert len({len(vector) for vector in vectors}) == 1
    assert vectors[0] == pytest.approx(vectors[2], abs=1e-3)
    assert vectors[0] != pytest.approx(vectors[1], abs=1e-3)
    assert tokens > 3


async def test_embedder_also_answers_and_takes_texts_as_long_as_its_context(embedder: Runner) -> None:
    _, end = await answer(embedder.chat(QUESTION))
    assert end.timings.eval_tokens == 3
    text = "word " * 90
    vectors, _ = await embedder.embed([text])
    assert len(vectors) == 1


async def test_runner_tells_its_memory(runner: Runner, case: Case) -> None:
    everything, accelerator = runner.memory_bytes
    assert everything > case.model.size_bytes
    assert 0 <= accelerator <= everything


@pytest.mark.parametrize("options", [LoadOptions(num_batch=3, parallel=4), LoadOptions(num_ctx=10, parallel=4, embedding=True)])
async def test_batch_that_slots_cannot_share_evenly_loads_all_the_same(case: Case, options: LoadOptions) -> None:
    runner = await case.engine.load(case.model, options)
    try:
        assert await runner.tokenize("Hello")
    finally:
        await runner.close()


async def test_closed_runner_is_gone_for_good(case: Case) -> None:
    runner = await case.engine.load(case.model, OPTIONS)
    assert await runner.is_healthy()
    await runner.close()
    await runner.close()
    assert not await runner.is_healthy()
    with pytest.raises(CorralError) as gone:
        await answer(runner.chat(QUESTION))
    assert gone.value.code == "engine_failed"


async def test_weights_that_are_something_else_are_refused_without_naming_a_path(case: Case) -> None:
    with pytest.raises(CorralError) as refused:
        await case.engine.load(case.bad, OPTIONS)
    assert (refused.value.code, refused.value.status) == ("bad_request", 400)
    assert "GGUF" in refused.value.message
    assert "/" not in refused.value.message


async def test_model_without_weights_is_refused(case: Case) -> None:
    with pytest.raises(CorralError) as refused:
        await case.engine.load(replace(case.model, weights=None), OPTIONS)
    assert refused.value.code == "bad_request"
