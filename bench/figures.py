"""The figures themselves. Each function measures one row of docs/performance.md on servers that it is given or starts."""

import json
import os
import re
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nacl.bindings import crypto_sign_open

from bench import load
from bench.measure import Figure, compared, in_turn, limited, quantile, skipped
from corral.main.shared import SystemEntropy
from corral.storage.home import FileDeviceKeys
from corral.wire import signing
from flows.stack import MODEL, Running, Stack, answers, corral_command, free_port, wait_until

ROOT = Path(__file__).resolve().parent.parent
PROMPT = "Write a long story about a harbour, its master and the sea. Describe everything in detail."
TOKENS = 96
#: Both sides say all of it, so that both run the same chain of samplers.
_SAMPLING = {"temperature": 0, "seed": 7, "top_k": 40, "top_p": 0.9, "min_p": 0.0, "repeat_penalty": 1.1, "repeat_last_n": 64}


@dataclass(frozen=True, slots=True, kw_only=True)
class Engine:
    """Where an engine listens, and what it wants to hear."""

    port: int
    key: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Side:
    """One way to ask for the same tokens."""

    port: int
    request: str

    def tokens_per_second(self, streams: int) -> float:
        """Tokens of all streams over the time they took together."""
        plan = load.Plan(port=self.port, requests=[self.request], connections=streams, count=streams, keep=True)
        outcome = load.run(plan).check()
        tokens = [tokens_of(body) for body in outcome.bodies]
        assert all(count > TOKENS // 2 for count in tokens), f"the answers are too short to measure: {tokens}"
        return sum(tokens) / outcome.seconds

    def first_token_ms(self, count: int) -> list[float]:
        """Milliseconds to the first text of several requests in a row."""
        plan = load.Plan(port=self.port, requests=[self.request], count=count, first=r'"(?:response|content)":"[^"]')
        return [value * 1000 for value in load.run(plan).check().first]


def tokens_of(body: str) -> int:
    """How many tokens an answer says it holds, ours or the engine's."""
    counts = re.findall(r'"(?:eval_count|completion_tokens)":(\d+)', body)
    return int(counts[-1]) if counts else 0


def ours(base_url: str, model: str, *, tokens: int = TOKENS) -> Side:
    """Our server, asked as people ask it."""
    body = {"model": model, "prompt": PROMPT, "options": {**_SAMPLING, "num_predict": tokens}}
    port = int(base_url.rsplit(":", 1)[1])
    return Side(port=port, request=load.request_bytes("POST", f"{base_url}/api/generate", body))


def directly(engine: Engine, *, tokens: int = TOKENS) -> Side:
    """The engine process itself, asked for the same."""
    body = {"messages": [{"role": "user", "content": PROMPT}], "n_predict": tokens, "stream": True, **_SAMPLING}
    body["stream_options"] = {"include_usage": True}
    url = f"http://127.0.0.1:{engine.port}/v1/chat/completions"
    # llama.cpp's server ends the connection after a stream, said or unsaid.
    headers = {"Authorization": f"Bearer {engine.key}", "Connection": "close"}
    return Side(port=engine.port, request=load.request_bytes("POST", url, body, headers))


def p1_p2(stack: Stack, engine: Engine) -> Iterator[Figure]:
    """Tokens per second of the local server."""
    mine, peer = ours(stack.local_url, MODEL), directly(engine)
    one, one_peer = in_turn([lambda: mine.tokens_per_second(1), lambda: peer.tokens_per_second(1)], rounds=9)
    yield compared("P1", "local generate, 1 stream", one, one_peer, unit="tok/s", at_least=0.98)
    four, four_peer = in_turn([lambda: mine.tokens_per_second(4), lambda: peer.tokens_per_second(4)], rounds=9)
    yield compared("P2", "local generate, 4 streams", four, four_peer, unit="tok/s", at_least=0.97)
    yield compared("P2", "4 streams against our own 1", four, one, unit="tok/s", at_least=1.3)


def p3(stack: Stack, engine: Engine) -> Iterator[Figure]:
    """Time to the first token of a warm model."""
    yield from _first_token(
        "P3", "local first token", ours(stack.local_url, MODEL, tokens=2), directly(engine, tokens=2), limits=(2, 5)
    )


def p4(stack: Stack, engine: Engine) -> Iterator[Figure]:
    """A hosted model through everything."""
    model = f"{MODEL}-cloud"
    mine, peer = ours(stack.local_url, model), directly(engine)
    speed, speed_peer = in_turn([lambda: mine.tokens_per_second(1), lambda: peer.tokens_per_second(1)], rounds=9)
    yield compared("P4", "-cloud generate, 1 stream", speed, speed_peer, unit="tok/s", at_least=0.95)
    sides = ours(stack.local_url, model, tokens=2), directly(engine, tokens=2)
    yield from _first_token("P4", "-cloud first token", *sides, limits=(8, 0))


def _first_token(number: str, name: str, mine: Side, peer: Side, *, limits: tuple[float, float]) -> Iterator[Figure]:
    each: tuple[list[float], list[float]] = ([], [])

    def take(side: Side, into: list[float]) -> Callable[[], float]:
        def measure() -> float:
            taken = side.first_token_ms(20)
            into.extend(taken)
            return statistics.median(taken)

        return measure

    in_turn([take(mine, each[0]), take(peer, each[1])], rounds=7)
    for share, limit in zip((0.5, 0.99), limits, strict=True):
        if limit:
            added = quantile(each[0], share) - quantile(each[1], share)
            label = "median" if share == 0.5 else f"p{share * 100:.0f}"
            yield limited(number, f"{name}, added at {label}", added, unit="ms", at_most=limit, peer=quantile(each[1], share))


def p5_p6(stack: Stack, key: str, model: str, upstream_port: int) -> Iterator[Figure]:
    """The hub in front of an upstream that answers at once, against a relay that does nothing but pass on."""
    relay_port = free_port()
    with started("bench.bare_relay", str(relay_port), f"http://127.0.0.1:{upstream_port}", port=relay_port):
        hub, relay = stack.hub_url, f"http://127.0.0.1:{relay_port}"

        def rate(url: str, **more: Any) -> Callable[[], float]:
            return _chats_per_second(url, key, model, **more)

        def latency_ms(url: str) -> Callable[[], float]:
            return lambda: statistics.median(load.run(_chats(url, key, model, connections=1)).check().whole) * 1000

        for warm in (hub, relay):
            load.run(_chats(warm, key, model, connections=4))
        mine, peer = in_turn([rate(hub), rate(relay)])
        yield compared("P5", "hub unary, 16 connections", mine, peer, unit="req/s", at_least=0.6)
        mine, peer = in_turn([latency_ms(hub), latency_ms(relay)])
        added = statistics.median(one - two for one, two in zip(mine, peer, strict=True))
        yield limited("P5", "hub unary, added at median, 1 connection", added, unit="ms", at_most=1, peer=statistics.median(peer))
        mine, peer = in_turn([rate(hub, stream=True), rate(relay, stream=True)])
        yield compared("P6", "hub streams of 64 chunks, 16 connections", mine, peer, unit="req/s", at_least=0.7)


def _chats(url: str, key: str, model: str, *, connections: int, **more: Any) -> load.Plan:
    """One question again and again. more: further members of its body."""
    body = {"model": model, "messages": [{"role": "user", "content": "Why is the sky blue?"}], **more}
    request = load.request_bytes("POST", f"{url}/v1/chat/completions", body, {"Authorization": f"Bearer {key}"})
    return load.Plan(port=int(url.rsplit(":", 1)[1]), requests=[request], connections=connections, seconds=2.0)


def _chats_per_second(url: str, key: str, model: str, **more: Any) -> Callable[[], float]:
    return lambda: load.run(_chats(url, key, model, connections=16, **more)).check().rate


def p7(stack: Stack, key: str, model: str, upstream_port: int, folder: Path) -> Iterator[Figure]:
    """P5 against LiteLLM's proxy, which checks one key from its configuration and writes nothing down."""
    program = os.environ.get("BENCH_LITELLM") or shutil.which("litellm")
    name = "hub unary, against LiteLLM's proxy"
    if program is None:
        yield skipped("P7", name, "no litellm program; name one, of litellm[proxy], in BENCH_LITELLM")
        return
    folder.mkdir()
    model_list = [
        {
            "model_name": model,
            "litellm_params": {"model": "openai/fixed", "api_base": f"http://127.0.0.1:{upstream_port}/v1", "api_key": "none"},
        }
    ]
    # JSON is YAML.
    (folder / "config.yaml").write_text(json.dumps({"model_list": model_list, "general_settings": {"master_key": key}}))
    port = free_port()
    command = [program, "--config", str(folder / "config.yaml"), "--host", "127.0.0.1", "--port", str(port), "--num_workers", "1"]
    quiet = {**os.environ, "HOME": str(folder), "LITELLM_LOG": "ERROR"}
    with subprocess.Popen(command, env=quiet, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        try:
            peer_url = f"http://127.0.0.1:{port}"
            wait_until(lambda: answers(f"{peer_url}/health/liveliness"), "LiteLLM's proxy", timeout_s=120)
            sides = [_chats_per_second(url, key, model) for url in (stack.hub_url, peer_url)]
            for warm in sides:
                warm()
            mine, peer = in_turn(sides)
        finally:
            process.terminate()
    yield compared("P7", name, mine, peer, unit="req/s", at_least=25)


def p8(stack: Stack) -> Iterator[Figure]:
    """Signed requests per second against bare verifications per second. Every request carries a signature of its own."""
    private = FileDeviceKeys(stack.home / ".ollama", SystemEntropy()).load()
    assert private is not None
    hub_port = int(stack.hub_url.rsplit(":", 1)[1])

    def signed_rate() -> float:
        requests = []
        for number in range(4000):
            target = f"/api/me?n={number}&ts={int(time.time())}"
            header = signing.authorization_header(private, signing.request_challenge("POST", target))
            requests.append(load.request_bytes("POST", stack.hub_url + target, None, {"Authorization": header}))
        plan = load.Plan(port=hub_port, requests=requests, connections=16, count=len(requests))
        return load.run(plan).check().rate

    def bare_rate() -> float:
        message = signing.request_challenge("POST", f"/api/me?ts={int(time.time())}")
        signed, key = private.sign(message) + message, private.public.raw
        began, count = time.perf_counter(), 10_000
        for _ in range(count):
            crypto_sign_open(signed, key)
        return count / (time.perf_counter() - began)

    mine, peer = in_turn([signed_rate, bare_rate])
    yield compared("P8", "signed /api/me, 16 connections", mine, peer, unit="/s", at_least=0.2)


def p13(stack: Stack) -> Iterator[Figure]:
    """How long a short command takes."""

    def seconds(command: list[str]) -> Callable[[], float]:
        def once() -> float:
            began = time.perf_counter()
            subprocess.run(command, env=stack.env, check=True, capture_output=True)
            return (time.perf_counter() - began) * 1000

        return once

    corral, python = corral_command(), sys.executable
    for name, ours_, peers, limit in (
        ("corral --version", [*corral, "--version"], [python, "-c", "pass"], 6.0),
        ("corral list", [*corral, "list"], [python, "-c", "import aiohttp"], 1.2),
    ):
        once_mine, once_peer = seconds(ours_), seconds(peers)
        once_mine(), once_peer()
        mine, peer = in_turn([once_mine, once_peer], rounds=11)
        yield compared("P13", name, mine, peer, unit="ms", at_most=limit)


def p14(folder: Path) -> Iterator[Figure]:
    """Start-up and idle memory of each server, started alone on a home that has been used once."""
    stack = Stack(folder)
    for name, arguments, port, limits in (
        ("local server", ["serve"], int(stack.local_url.rsplit(":", 1)[1]), (1.0, 90.0)),
        ("hub", ["hub", "serve"], int(stack.hub_url.rsplit(":", 1)[1]), (1.5, 120.0)),
    ):
        taken: list[tuple[float, float]] = []
        for _ in range(6):
            began = time.perf_counter()
            server = stack.begin(*arguments)
            wait_for_port(port, server)
            seconds = time.perf_counter() - began
            # Let what runs once after the start be over: this is the idle server.
            time.sleep(1.0)
            taken.append((seconds, resident_mb(server.process.pid)))
            server.end(signal.SIGTERM)
        # The first start makes the home; a person waits for it once.
        start, memory = (statistics.median(values) for values in zip(*taken[1:], strict=True))
        yield limited("P14", f"{name}: port open after", start, unit="s", at_most=limits[0])
        yield limited("P14", f"{name}: idle memory", memory, unit="MB", at_most=limits[1])


def wait_for_port(port: int, server: Running) -> None:
    """Return as soon as something listens."""

    def is_open() -> bool:
        with socket.socket() as probe:
            return probe.connect_ex(("127.0.0.1", port)) == 0

    deadline = time.monotonic() + 30
    while not is_open():
        assert server.process.poll() is None, server.output
        assert time.monotonic() < deadline, server.output
        time.sleep(0.005)


def resident_mb(pid: int) -> float:
    """Resident memory of a process."""
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 1e6


@contextmanager
def started(module: str, *arguments: str, port: int = 0) -> Iterator[None]:
    """A helper process of the bench, until the end of the block. port: where it listens; 0 for one that says when it is ready."""
    with ExitStack() as stack:
        process = subprocess.Popen([sys.executable, "-m", module, *arguments], cwd=ROOT, stdout=None if port else subprocess.PIPE)
        stack.callback(process.wait)
        stack.callback(process.terminate)
        if process.stdout is not None:
            assert process.stdout.readline(), f"{module} ended"
            yield
            return

        def is_open() -> bool:
            with socket.socket() as probe:
                return probe.connect_ex(("127.0.0.1", port)) == 0

        wait_until(is_open, f"{module} to listen")
        yield
