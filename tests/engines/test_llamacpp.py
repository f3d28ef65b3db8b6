"""Engine processes: how they start, what they can see, how they end. On a pretended llama-server, and on the small real model."""

import asyncio
import contextlib
import json
import os
import signal
import struct
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import aclosing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

from corral.core.ports import ChatCall, CompletionCall, Finish, LoadOptions, Runner, Sampling
from corral.core.records import Model
from corral.engines.launch import ALLOWED_FLAGS, Tuning
from corral.engines.llamacpp import LlamaCppEngine, LlamaRunner, _LoadWatch, find_llama_server
from corral.engines.process import EngineLog
from corral.serving.runners import RunnerLimits, Runners
from corral.wire.errors import CorralError
from fakes import FakeClock, SeededEntropy
from fakes_engine import eventually, weights

PRETENDER = Path(__file__).with_name("pretend_llama_server.py")
SMALL = LoadOptions(num_ctx=512, parallel=1)
ENDLESS = CompletionCall(prompt="Hello", sampling=Sampling(values={"ignore_eos": True, "n_predict": 4000}))
CANARY = "canary-7f3a"
HUB_ENVIRONMENT = {
    "PATH": os.environ["PATH"],
    "CORRAL_DATABASE_URL": CANARY,
    "OLLAMA_API_KEY": CANARY,
    "LLAMA_API_KEY": CANARY,
    "HOME": f"/home/{CANARY}",
}
needs_proc = pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="this system shows no processes as files")


@pytest.fixture
def pretender(tmp_path: Path) -> str:
    """A program that can stand in for llama-server."""
    program = tmp_path / "llama-server"
    program.write_text(f'#!/bin/sh\nexec {sys.executable} {PRETENDER} "$@"\n')
    program.chmod(0o755)
    return str(program)


@pytest.fixture
def told(tmp_path: Path) -> Callable[..., Model]:
    """Makes a model whose file tells the pretender what to do."""

    def make(**what: Any) -> Model:
        path = tmp_path / "weights.gguf"
        path.write_bytes(b"GGUF" + json.dumps({"report": str(tmp_path / "report.json"), **what}).encode())
        return weights(weights=str(path))

    return make


def reported(tmp_path: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((tmp_path / "report.json").read_text())
    return found


def is_alive(pid: int) -> bool:
    """Whether the process runs; one that only waits to be counted does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


async def died(pid: int) -> None:
    async def is_dead() -> bool:
        return not is_alive(pid)

    await eventually(is_dead)


# ── Finding a llama-server ───────────────────────────────────────────────────────────────────────────────────────────


def test_llama_server_is_the_configured_one_then_the_one_on_the_path(tmp_path: Path, pretender: str) -> None:
    other = tmp_path / "other"
    other.write_text("#!/bin/sh\n")
    other.chmod(0o755)
    assert find_llama_server(str(other), str(tmp_path)) == str(other)
    assert find_llama_server("", str(tmp_path)) == pretender
    assert find_llama_server("", str(tmp_path / "empty")) == ""
    assert find_llama_server("", "") == ""


def test_llama_server_that_is_no_program_is_refused(tmp_path: Path) -> None:
    text = tmp_path / "text"
    text.write_text("hello")
    for wrong in (text, tmp_path / "missing", tmp_path):
        with pytest.raises(CorralError) as refused:
            find_llama_server(str(wrong), "")
        assert "CORRAL_LLAMA_SERVER" in refused.value.message


# ── A llama-server ───────────────────────────────────────────────────────────────────────────────────────────────────


async def test_llama_server_is_started_asked_and_ended(pretender: str, told: Callable[..., Model]) -> None:
    engine = LlamaCppEngine(SeededEntropy(), llama_server=pretender)
    runner = await engine.load(told(slow=3), SMALL)
    assert isinstance(runner, LlamaRunner)
    assert await runner.tokenize("x") == [1, 2, 3]
    await runner.close()
    assert not is_alive(runner.pid)


async def test_t096_t097_llama_server_sees_listed_flags_a_scrubbed_environment_and_its_key_in_no_argument(
    pretender: str, told: Callable[..., Model], tmp_path: Path
) -> None:
    engine = LlamaCppEngine(SeededEntropy(), llama_server=pretender, environment=HUB_ENVIRONMENT)
    runner = await engine.load(told(), SMALL)
    try:
        found = reported(tmp_path)
    finally:
        await runner.close()
    key = SeededEntropy().bytes(24).hex()
    assert {word for word in found["argv"] if word.startswith("-")} <= ALLOWED_FLAGS
    assert found["environment"]["LLAMA_API_KEY"] == key
    assert not [word for word in found["argv"] if key in word]
    assert CANARY not in str(found["environment"])


async def test_failed_load_tells_the_last_words_without_folders(pretender: str, told: Callable[..., Model]) -> None:
    engine = LlamaCppEngine(SeededEntropy(), llama_server=pretender)
    model = told(say=["0.0 I srv: hello", f"0.1 E srv: failed to load {Path(__file__)}: no such tensor"], status=3)
    with pytest.raises(CorralError) as failed:
        await engine.load(model, SMALL)
    assert failed.value.code == "engine_failed"
    assert failed.value.message == (
        "the engine ended while it loaded the model (exit status 3): srv: failed to load test_llamacpp.py: no such tensor"
    )


async def test_load_for_want_of_memory_is_tried_again_with_the_projector_in_main_memory(
    pretender: str, told: Callable[..., Model], tmp_path: Path
) -> None:
    engine = LlamaCppEngine(SeededEntropy(), llama_server=pretender)
    model = told(say=["0.1 E ggml_backend_cuda: cudaMalloc failed: out of memory"], status=1)
    with pytest.raises(CorralError) as failed:
        await engine.load(replace(model, projector="/models/eye"), SMALL)
    assert (failed.value.code, failed.value.status) == ("out_of_memory", 500)
    assert "--no-mmproj-offload" in reported(tmp_path)["argv"]
    with pytest.raises(CorralError) as failed:
        await engine.load(model, SMALL)
    assert failed.value.code == "out_of_memory"
    assert "--no-mmproj-offload" not in reported(tmp_path)["argv"]


@needs_proc
async def test_canceled_load_ends_the_process(pretender: str, told: Callable[..., Model], tmp_path: Path) -> None:
    engine = LlamaCppEngine(SeededEntropy(), llama_server=pretender)
    task = asyncio.create_task(engine.load(told(hang=True), SMALL))
    await eventually(has_reported(tmp_path))
    pid = reported(tmp_path)["pid"]
    assert is_alive(pid)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert not is_alive(pid)


def has_reported(tmp_path: Path) -> Callable[[], Any]:
    async def ask() -> bool:
        path = tmp_path / "report.json"
        return path.exists() and path.read_text().endswith("}")

    return ask


@needs_proc
async def test_load_without_any_progress_is_given_up(pretender: str, told: Callable[..., Model], tmp_path: Path) -> None:
    engine = LlamaCppEngine(SeededEntropy(), llama_server=pretender, stall_timeout_s=0.5)
    with pytest.raises(CorralError, match="timed out waiting"):
        await engine.load(told(hang=True), SMALL)
    assert not is_alive(reported(tmp_path)["pid"])


def test_load_watch_gives_up_on_silence_but_not_while_memory_grows() -> None:
    watch, log = _LoadWatch(10, 0), EngineLog()
    for second in range(0, 100, 9):
        watch.look(log, second << 30, second)
    with pytest.raises(CorralError, match="timed out waiting"):
        watch.look(log, 99 << 30, 110)


@pytest.mark.parametrize(("growth_mib", "seconds"), [(600, 1), (1, 61)])
def test_t107_load_watch_gives_up_on_a_template_that_takes_too_much(growth_mib: int, seconds: int) -> None:
    watch, log = _LoadWatch(1000, 0), EngineLog()
    log.feed(b"0.02.234.989 I slot   load_model: id  0 | task -1 | new slot, n_ctx = 256\n")
    watch.look(log, 5 << 30, 100)
    watch.look(log, (5 << 30) + (100 << 20), 110)
    with pytest.raises(CorralError, match="chat template"):
        watch.look(log, (5 << 30) + (growth_mib << 20), 100 + seconds)


@pytest.fixture
def no_descriptors() -> Iterator[Callable[[], contextlib.AbstractContextManager[None]]]:
    """Inside the block, this process may open nothing more."""
    resource = pytest.importorskip("resource")
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)

    @contextlib.contextmanager
    def exhaust() -> Iterator[None]:
        held = os.open(os.devnull, os.O_RDONLY)
        resource.setrlimit(resource.RLIMIT_NOFILE, (held, hard))
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
            os.close(held)

    yield exhaust
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


async def test_r15_machine_out_of_descriptors_is_told_to_the_caller_and_kills_no_engine(
    pretender: str, told: Callable[..., Model], no_descriptors: Callable[[], contextlib.AbstractContextManager[None]]
) -> None:
    engine = LlamaCppEngine(SeededEntropy(), llama_server=pretender)
    model = told()
    runner = await engine.load(model, SMALL)
    try:
        with no_descriptors():
            for attempt in (runner.tokenize("x"), engine.load(model, SMALL), LlamaCppEngine(SeededEntropy()).load(model, SMALL)):
                with pytest.raises(CorralError) as failed:
                    await attempt
                assert (failed.value.status, failed.value.retry_after_s) == (503, 5)
            assert await runner.is_healthy()
        assert await runner.tokenize("x") == [1, 2, 3]
    finally:
        await runner.close()


#: Loads a model, says which process holds it, and waits.
PARENT = """
import asyncio, sys
from pathlib import Path
from corral.core.ports import LoadOptions
from corral.engines.llamacpp import LlamaCppEngine
from fakes import SeededEntropy
from fakes_engine import weights

async def main():
    engine = LlamaCppEngine(SeededEntropy(), llama_server=sys.argv[1])
    runner = await engine.load(weights(weights=sys.argv[2]), LoadOptions(num_ctx=512))
    print(runner.pid, flush=True)
    await asyncio.sleep(600)

asyncio.run(main())
"""


async def orphaned(llama_server: str, weights_path: str) -> int:
    """The engine's process after its parent was killed."""
    search = os.pathsep.join([str(Path(__file__).parent.parent), *sys.path])
    command = [sys.executable, "-c", PARENT, llama_server, weights_path]
    with subprocess.Popen(command, stdout=subprocess.PIPE, env={**os.environ, "PYTHONPATH": search}, text=True) as parent:
        try:
            assert parent.stdout is not None
            pid = int(await asyncio.to_thread(parent.stdout.readline))
            assert is_alive(pid)
        finally:
            parent.kill()
    return pid


@needs_proc
async def test_r19_llama_server_dies_with_its_parent(pretender: str, told: Callable[..., Model]) -> None:
    model = told()
    assert model.weights is not None
    await died(await orphaned(pretender, model.weights))


# ── The real engine ──────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture(scope="module")
def real(small_model: Path) -> Model:
    return weights("smollm2:135m", weights=str(small_model), size_bytes=small_model.stat().st_size)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def runner(real: Model) -> AsyncIterator[LlamaRunner]:
    """An engine for the tests that leave it as it was."""
    loaded = await LlamaCppEngine(SeededEntropy(), environment=HUB_ENVIRONMENT).load(real, SMALL)
    assert isinstance(loaded, LlamaRunner)
    yield loaded
    await loaded.close()


@needs_proc
async def test_r19_engine_dies_with_its_parent(real: Model) -> None:
    assert real.weights is not None
    await died(await orphaned("", real.weights))


@pytest.mark.asyncio(loop_scope="module")
async def test_r8_closed_answer_frees_its_slot_within_two_seconds(runner: LlamaRunner) -> None:
    async with aclosing(runner.complete(ENDLESS)) as events:  # type: ignore[type-var]
        await anext(events)
    async with asyncio.timeout(2):
        call = CompletionCall(prompt="Hello", sampling=Sampling(values={"n_predict": 1}))
        assert [event async for event in runner.complete(call)]


async def kill_while_answering(runner: Runner) -> None:
    """Raises what the answer raises."""
    assert isinstance(runner, LlamaRunner)
    async with aclosing(runner.complete(ENDLESS)) as events:  # type: ignore[type-var]
        await anext(events)
        os.kill(runner.pid, signal.SIGKILL)
        async for _ in events:
            pass
    raise AssertionError("the answer should have failed")


@needs_proc
async def test_r9_engine_killed_in_the_middle_of_an_answer_is_an_engine_failure(real: Model) -> None:
    runner = await LlamaCppEngine(SeededEntropy()).load(real, SMALL)
    try:
        with pytest.raises(CorralError, match="signal 9") as failed:
            await kill_while_answering(runner)
        assert failed.value.code == "engine_failed"
        assert not await runner.is_healthy()
    finally:
        await runner.close()


@needs_proc
async def test_r9_killed_engine_is_started_again_and_held_back_when_it_keeps_dying(real: Model) -> None:
    clock = FakeClock()
    runners = Runners(LlamaCppEngine(SeededEntropy()), clock, RunnerLimits(parallel=1, context_length=512))

    async def killed() -> None:
        async with runners.use(real) as lease:
            await kill_while_answering(lease.runner)

    try:
        for _ in range(2):
            with pytest.raises(CorralError, match="signal 9"):
                await killed()
        with pytest.raises(CorralError) as held:
            await killed()
        assert (held.value.code, held.value.retry_after_s) == ("unavailable", 1)
        clock.advance(1)
        async with runners.use(real) as lease:
            assert await lease.runner.tokenize("Hello")
    finally:
        await runners.close()


@needs_proc
@pytest.mark.asyncio(loop_scope="module")
async def test_t097_engine_has_no_secret_of_ours_and_its_own_in_no_argument(runner: LlamaRunner, real: Model) -> None:
    process = Path(f"/proc/{runner.pid}")
    environment, arguments = (process / "environ").read_text(), (process / "cmdline").read_text()
    assert CANARY not in environment
    key = SeededEntropy().bytes(24).hex()
    assert key not in environment + arguments
    assert Path(str(real.weights)).name not in arguments
    limits = [line.split() for line in (process / "limits").read_text().splitlines()]
    assert ["Max", "core", "file", "size", "0", "0", "bytes"] in limits
    assert (process / "cwd").readlink() == Path("/")


@needs_proc
@pytest.mark.asyncio(loop_scope="module")
async def test_t097_engine_listens_on_loopback_only_and_refuses_calls_without_its_key(runner: LlamaRunner) -> None:
    (port,) = listening(runner.pid)
    url = f"http://127.0.0.1:{port}"
    for path in ("/v1/models", "/props", "/slots", "/metrics", "/completion", "/v1/chat/completions", "/lora-adapters", "/"):
        for headers in ({}, {"Authorization": "Bearer wrong"}, {"X-Api-Key": "wrong"}):
            assert await asyncio.to_thread(status_of, url + path, headers) in (401, 404), path
    assert await asyncio.to_thread(status_of, url + "/health", {}) == 200
    key = {"Authorization": f"Bearer {SeededEntropy().bytes(24).hex()}"}
    assert await asyncio.to_thread(status_of, url + "/v1/models", key) == 200
    for path in ("/slots", "/metrics", "/props"):
        assert await asyncio.to_thread(status_of, url + path, key, b"{}") != 200, path


def status_of(url: str, headers: dict[str, str], body: bytes | None = None) -> int:
    request = urllib.request.Request(url, data=body, headers={**headers, "Origin": "http://evil.example"})
    try:
        with urllib.request.urlopen(request, timeout=5) as response:
            assert response.headers.get("Access-Control-Allow-Origin") != "*"
            return int(response.status)
    except urllib.error.HTTPError as error:
        with error:
            return error.code


def listening(pid: int) -> list[int]:
    """The process's listening TCP ports; all of them are on 127.0.0.1."""
    sockets = set()
    for entry in Path(f"/proc/{pid}/fd").iterdir():
        with contextlib.suppress(OSError):
            sockets.add(str(entry.readlink()))
    found = []
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/{pid}/net/{table}").read_text().splitlines()[1:]:
            fields = line.split()
            if f"socket:[{fields[9]}]" in sockets and fields[3] == "0A":
                address, _, port = fields[1].partition(":")
                assert address == "0100007F"
                found.append(int(port, 16))
    return found


@needs_proc
async def test_canceled_load_of_real_weights_ends_the_process(real: Model) -> None:
    before = children()
    task = asyncio.create_task(LlamaCppEngine(SeededEntropy()).load(real, SMALL))

    async def has_started() -> bool:
        return bool(children() - before)

    await eventually(has_started)
    (pid,) = children() - before
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert not is_alive(pid)


def children() -> set[int]:
    """Processes started by this one."""
    return {int(pid) for task in Path("/proc/self/task").iterdir() for pid in (task / "children").read_text().split()}


def with_template(source: Path, target: Path, template: str) -> Path:
    """A copy of a GGUF file with another chat template, filled with blanks to the length of its own."""
    content = source.read_bytes()
    begin = content.index(b"tokenizer.chat_template") + len(b"tokenizer.chat_template") + 4
    (length,) = struct.unpack("<Q", content[begin : begin + 8])
    target.write_bytes(content[: begin + 8] + template.encode().ljust(length) + content[begin + 8 + length :])
    return target


@needs_proc
@pytest.mark.parametrize(
    "template",
    ["{% for i in range(1000000000) %}x{% endfor %}", "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}"],
)
async def test_t107_template_that_takes_all_memory_ends_the_load_and_the_process(
    real: Model, tmp_path: Path, template: str
) -> None:
    before = children()
    hostile = with_template(Path(str(real.weights)), tmp_path / "hostile.gguf", template)
    with pytest.raises(CorralError) as failed:
        await LlamaCppEngine(SeededEntropy()).load(replace(real, weights=str(hostile)), SMALL)
    assert failed.value.code == "engine_failed"
    assert children() == before


@pytest.mark.parametrize("template", ["{{ messages.__class__.__mro__ }}", "{{ self.__init__.__globals__ }}", "{{ lipsum }}"])
async def test_t107_template_reaches_nothing_of_python(real: Model, tmp_path: Path, template: str) -> None:
    hostile = with_template(Path(str(real.weights)), tmp_path / "hostile.gguf", template)
    try:
        loaded = await LlamaCppEngine(SeededEntropy()).load(replace(real, weights=str(hostile)), SMALL)
    except CorralError:
        return  # refused is as good
    try:
        rendered = await loaded.apply_template(ChatCall(messages=[{"role": "user", "content": "x"}]))
    finally:
        await loaded.close()
    assert rendered.strip() == ""


async def test_answer_that_fills_its_context_goes_on_where_it_may(real: Model) -> None:
    for shift, said in ((True, 40), (False, 16)):
        runner = await LlamaCppEngine(SeededEntropy()).load(real, LoadOptions(num_ctx=256, context_shift=shift))
        try:
            # A prompt that leaves little of the context: reading it takes a third of the time that saying as much does.
            long = (await runner.tokenize("one two three four five six seven eight ") * 30)[:240]
            sampling = Sampling(values={"ignore_eos": True, "n_predict": 40})
            *_, end = [event async for event in runner.complete(CompletionCall(prompt="", context=long, sampling=sampling))]
            assert isinstance(end, Finish)
            assert end.reason == "length"
            assert end.timings.eval_tokens == said if shift else end.timings.eval_tokens <= said
            # A prompt of tokens alone is read as it is.
            tokens = await runner.tokenize("The sky is")
            one = CompletionCall(prompt="", context=tokens, sampling=Sampling(values={"n_predict": 1}))
            *_, end = [event async for event in runner.complete(one)]
            assert isinstance(end, Finish)
            assert end.timings.prompt_tokens == len(tokens)
        finally:
            await runner.close()


async def test_cache_of_another_type_and_flash_attention_are_taken(real: Model) -> None:
    plain, tuned = LlamaCppEngine(SeededEntropy()), Tuning(cache_type="q8_0", flash_attention=True)
    sizes = []
    for engine in (plain, LlamaCppEngine(SeededEntropy(), tuning=tuned)):
        runner = await engine.load(real, SMALL)
        try:
            call = CompletionCall(prompt="Hello", sampling=Sampling(values={"n_predict": 1}))
            assert [event async for event in runner.complete(call)]
            sizes.append(runner.memory_bytes[0])
        finally:
            await runner.close()
    # 512 tokens, 30 layers, 3 heads of 64 for keys and values each: 11.25 MiB, or 34/64 of it.
    assert sizes[0] - sizes[1] == pytest.approx(11.25 * 2**20 * 30 / 64, rel=0.5)


async def test_weights_that_are_cut_short_are_refused_in_llamas_words(real: Model, tmp_path: Path) -> None:
    short = tmp_path / "short.gguf"
    with Path(str(real.weights)).open("rb") as file:
        short.write_bytes(file.read(3_000_000))
    with pytest.raises(CorralError) as failed:
        await LlamaCppEngine(SeededEntropy()).load(replace(real, weights=str(short)), SMALL)
    assert failed.value.code == "engine_failed"
    assert "corrupted or incomplete" in failed.value.message
    assert str(tmp_path) not in failed.value.message
