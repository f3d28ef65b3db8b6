"""Many at once, and many who leave: nothing leaks, limits hold, and who stays is served.

One installation with eight slots and room for 56 to wait. What is counted is what the kernel counts (processes, descriptors,
memory) and what callers see: afterwards exactly as many requests fit as before.
"""

import asyncio
import contextlib
import gzip
import json
import os
import random
import resource
import signal
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from flows.stack import LONG, MODEL, PATIENCE_S, Stack, call, descendants, listening_ports, wait_until

SLOTS, PLACES = 8, 56
#: One more than the last line after which somebody leaves.
TOKENS = 5
BUSY = {"error": "server busy, please try again.  maximum pending requests exceeded"}
#: Ollama's words for an engine that is lost in the middle of an answer.
BROKEN_OFF = "an error was encountered while running the model: "
needs_proc = pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="this system shows no processes as files")
pytestmark = needs_proc


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory, home_with_model: Path) -> Iterator[Stack]:
    """An installation with known limits, an account, and the model in memory on both sides' first use."""
    limits = {"OLLAMA_NUM_PARALLEL": str(SLOTS), "OLLAMA_MAX_QUEUE": str(PLACES), "OLLAMA_CONTEXT_LENGTH": "512"}
    with Stack(tmp_path_factory.mktemp("load"), like=home_with_model, **limits) as stack:
        stack.start()
        stack.add_account("alice")
        yield stack


# ── What is asked, and what becomes of it ────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """status: 0 for a request whose caller left before it was answered. lines: what arrived, one object each."""

    status: int
    lines: list[dict[str, Any]]

    @property
    def is_complete(self) -> bool:
        """Whether it is a whole answer: text, an end with its reason, and counts that can be."""
        *_, last = self.lines
        said = "".join(line["message"]["content"] for line in self.lines)
        counts = [last.get(name, 0) for name in ("prompt_eval_count", "eval_count", "total_duration", "eval_duration")]
        return (
            self.status == 200
            and [line["done"] for line in self.lines] == [False] * (len(self.lines) - 1) + [True]
            and (last["done_reason"] == "stop" or (last["done_reason"] == "length" and last["eval_count"] == TOKENS))
            and bool(said)
            and min(counts) > 0
        )


def chat(number: int) -> dict[str, Any]:
    """Without a system message of its own, the model's template would put one of 20 tokens in front."""
    messages = [{"role": "system", "content": "Count."}, {"role": "user", "content": f"{number}"}]
    return {"model": MODEL, "messages": messages, "options": {"num_predict": TOKENS, "temperature": 0, "seed": 0}}


class Callers:
    """Requests to one server, each over a connection of its own."""

    def __init__(self, session: aiohttp.ClientSession, url: str) -> None:
        self._session = session
        self._url = url

    async def ask(self, path: str, body: object, *, leaves_after: int | None = None) -> Outcome:
        """leaves_after: lines after which the caller hangs up."""
        lines: list[dict[str, Any]] = []
        async with self._session.post(self._url + path, json=body) as response:
            if response.status != 200:
                return Outcome(status=response.status, lines=[await response.json()])
            async for line in response.content:
                lines.append(json.loads(line))
                if len(lines) == leaves_after:
                    # The whole answer has not been read, so this ends the connection.
                    return Outcome(status=0, lines=lines)
        return Outcome(status=200, lines=lines)

    async def storm(self, count: int, *, leaving: int, seed: int) -> list[Outcome | None]:
        """So many chats at once, of which some leave at random moments: None for those who left without an answer."""
        dice = random.Random(seed)
        leavers = set(dice.sample(range(count), leaving))
        plans = {number: (dice.choice([None, 1, 2, 4]), dice.uniform(0, 2)) for number in leavers}

        async def one(number: int) -> Outcome | None:
            lines, seconds = plans.get(number, (None, PATIENCE_S * 2))
            if number in leavers and lines is not None:
                return await self.ask("/api/chat", chat(number), leaves_after=lines)
            try:
                async with asyncio.timeout(seconds):
                    return await self.ask("/api/chat", chat(number))
            except TimeoutError:
                return None

        return await asyncio.gather(*(one(number) for number in range(count)))

    @contextlib.asynccontextmanager
    async def streams(self, count: int) -> AsyncIterator[list[aiohttp.ClientResponse]]:
        """So many answers that go on for long, each of which has begun. They end with the block, unread."""
        body = {"model": MODEL, **LONG, "options": {**LONG["options"], "num_ctx": 512}}

        async def begin() -> aiohttp.ClientResponse:
            response = await self._session.post(f"{self._url}/api/generate", json=body)
            assert json.loads(await response.content.readline())["done"] is False
            return response

        begun = await asyncio.gather(*(begin() for _ in range(count)))
        try:
            yield begun
        finally:
            for response in begun:
                response.close()


@contextlib.asynccontextmanager
async def callers(url: str, key: str = "") -> AsyncIterator[Callers]:
    connector = aiohttp.TCPConnector(limit=0, force_close=True)
    timeout = aiohttp.ClientTimeout(total=PATIENCE_S * 3)
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    async with aiohttp.ClientSession(connector=connector, timeout=timeout, headers=headers) as session:
        yield Callers(session, url)


# ── What the kernel counts ───────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True, slots=True, kw_only=True)
class Held:
    """What the processes of an installation hold. descriptors: by process."""

    processes: frozenset[int]
    descriptors: dict[int, int]

    def is_no_more_than(self, other: "Held") -> bool:
        return self.processes == other.processes and all(
            count <= other.descriptors[pid] for pid, count in self.descriptors.items()
        )


def held(stack: Stack) -> Held:
    assert stack.up is not None
    pids = frozenset(descendants(stack.up.process.pid))
    return Held(processes=pids, descriptors={pid: len(list(Path(f"/proc/{pid}/fd").iterdir())) for pid in pids})


def server_of(stack: Stack, url: str) -> int:
    """The process that listens there."""
    assert stack.up is not None
    port = int(url.rpartition(":")[2])
    (found,) = [pid for pid in descendants(stack.up.process.pid) if port in [at for _, at in listening_ports(pid)]]
    return found


def engine_of(server: int) -> int:
    (found,) = [pid for pid, command in descendants(server).items() if "llama" in command]
    return found


def resident_mib(pid: int) -> float:
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * resource.getpagesize() / 2**20


async def until(is_so: Any, what: str) -> None:
    """As wait_until, while other requests go on."""
    await asyncio.to_thread(wait_until, is_so, what)


async def fills_up(caller: Callers) -> None:
    """Exactly the slots and the places can be taken, and no more: what anybody left behind would show here."""
    more = 8
    async with caller.streams(SLOTS):
        waiting = [asyncio.create_task(caller.ask("/api/chat", chat(number))) for number in range(PLACES + more)]
        refused: set[asyncio.Task[Outcome]] = set()
        while len(refused) < more:
            done, _ = await asyncio.wait(set(waiting) - refused, timeout=PATIENCE_S, return_when=asyncio.FIRST_COMPLETED)
            assert done, f"only {len(refused)} were refused"
            refused |= done
        outcomes = [task.result() for task in refused]
        assert [(outcome.status, outcome.lines) for outcome in outcomes] == [(503, [BUSY])] * more
        # All but two of those who wait leave without ever having been answered.
        staying = [task for task in waiting if task not in refused][:2]
        for task in set(waiting) - refused - set(staying):
            task.cancel()
        await asyncio.wait(set(waiting) - set(staying))
    assert all(outcome.is_complete for outcome in await asyncio.gather(*staying))


# ── Tests ────────────────────────────────────────────────────────────────────────────────────────────────────────────


async def test_r16_storm_of_64_chats_leaves_nothing_behind_and_serves_who_stays(loaded: Stack) -> None:
    async with callers(loaded.local_url) as caller:
        assert all(outcome and outcome.is_complete for outcome in await caller.storm(SLOTS, leaving=0, seed=0))
        before = held(loaded)
        server = server_of(loaded, loaded.local_url)
        outcomes = await caller.storm(64, leaving=24, seed=7)
        answered = [outcome for outcome in outcomes if outcome is not None and outcome.status]
        assert len(answered) >= 40
        assert [outcome for outcome in answered if not outcome.is_complete] == []
        await until(lambda: held(loaded).is_no_more_than(before), "descriptors and processes to be as before")
        (model,) = call("GET", f"{loaded.local_url}/api/ps").json["models"]
        assert model["context_length"] == 512
        size_mib = resident_mib(server)
        await caller.storm(32, leaving=24, seed=8)
        await fills_up(caller)
        await until(lambda: held(loaded).is_no_more_than(before), "descriptors and processes to be as before")
        assert resident_mib(server) - size_mib < 32


async def test_t096_hostile_options_are_refused_and_reach_no_engine(loaded: Stack) -> None:
    async with callers(loaded.local_url) as caller:
        hostile = ["--log-file=/x", "4096\n--log-file=/x", "$(id)", 10**12, -(10**12), [1], True]
        for name in ("num_ctx", "num_gpu", "main_gpu", "num_thread", "num_batch"):
            for value in hostile:
                outcome = await caller.ask("/api/chat", {**chat(1), "options": {name: value}})
                assert outcome.status in (400, 500), (name, value, outcome)
                assert name in outcome.lines[0]["error"]
        ignored = {"n_discard": -1, "log-file": "/x", "model": "/etc/passwd", "num_predict": TOKENS, "temperature": 0}
        assert (await caller.ask("/api/chat", {**chat(1), "options": ignored})).is_complete
        engine = engine_of(server_of(loaded, loaded.local_url))
        assert "log" not in Path(f"/proc/{engine}/cmdline").read_text()


async def test_t095_t106_hostile_bodies_are_refused_at_once_and_cost_no_memory(loaded: Stack) -> None:
    server = server_of(loaded, loaded.local_url)
    before_mib = resident_mib(server)
    bomb = gzip.compress(bytes(64 * 2**20))
    bodies = [
        (bomb, {"Content-Encoding": "gzip"}),
        (bomb, {"Content-Encoding": "zstd"}),
        (b'{"model":"x","options":{"seed":NaN}}', {}),
        (b'{"model":"x","options":{"seed":' + b"9" * 5000 + b"}}", {}),
        (b'{"model":"x","messages":' + b"[" * 100_000, {}),
        (b'{"model":"\\ud800"}', {}),
    ]
    for body, headers in bodies:
        for path in ("/api/chat", "/v1/chat/completions"):
            answer = await asyncio.to_thread(call, "POST", loaded.local_url + path, body, headers=headers)
            assert answer.status == 400, (body[:50], answer)
    assert resident_mib(server) - before_mib < 32


async def test_r8_callers_who_hang_up_free_their_slots_at_once(loaded: Stack) -> None:
    async with callers(loaded.local_url) as caller:
        async with caller.streams(SLOTS):
            pass
        # Each of the answers would have gone on for minutes.
        async with asyncio.timeout(PATIENCE_S / 2):
            outcomes = await caller.storm(SLOTS, leaving=0, seed=1)
        assert all(outcome and outcome.is_complete for outcome in outcomes)


async def test_r9_engine_killed_under_eight_streams_ends_each_with_the_error_and_is_started_again(loaded: Stack) -> None:
    async with callers(loaded.local_url) as caller:
        async with caller.streams(SLOTS) as streams:
            killed = engine_of(server_of(loaded, loaded.local_url))
            os.kill(killed, signal.SIGKILL)
            for stream in streams:
                *_, last = [json.loads(line) async for line in stream.content]
                assert list(last) == ["error"]
                assert last["error"].startswith(BROKEN_OFF)
        outcome = await caller.ask("/api/chat", chat(1))
        assert outcome.is_complete, outcome
        assert engine_of(server_of(loaded, loaded.local_url)) != killed


async def test_r15_server_out_of_descriptors_says_so_and_goes_on_when_there_are_some(loaded: Stack) -> None:
    server = server_of(loaded, loaded.local_url)
    async with callers(loaded.local_url) as caller:
        assert (await caller.ask("/api/chat", chat(1))).is_complete
        engine = engine_of(server)
        before = resource.prlimit(server, resource.RLIMIT_NOFILE)
        async with caller.streams(1):
            # One more can be opened: the caller's connection, so that none is left for the engine's.
            used = max(int(entry.name) for entry in Path(f"/proc/{server}/fd").iterdir()) + 2
            resource.prlimit(server, resource.RLIMIT_NOFILE, (used, before[1]))
            try:
                outcomes = await asyncio.gather(
                    *(caller.ask("/api/chat", chat(number)) for number in range(4)), return_exceptions=True
                )
            finally:
                resource.prlimit(server, resource.RLIMIT_NOFILE, before)
        refused = [outcome for outcome in outcomes if isinstance(outcome, Outcome) and outcome.status != 200]
        assert [outcome.status for outcome in refused] == [503] * len(refused)
        assert refused or [outcome for outcome in outcomes if isinstance(outcome, BaseException)]
        assert (await caller.ask("/api/chat", chat(2))).is_complete
        assert (server_of(loaded, loaded.local_url), engine_of(server)) == (server, engine)


async def test_r16_storm_at_the_hub_with_an_api_key_leaves_nothing_behind(loaded: Stack) -> None:
    key = loaded.add_key("alice", "inference")
    async with callers(loaded.hub_url, key) as caller:
        assert all(outcome and outcome.is_complete for outcome in await caller.storm(SLOTS, leaving=0, seed=0))
        before = held(loaded)
        outcomes = await caller.storm(16, leaving=8, seed=9)
        answered = [outcome for outcome in outcomes if outcome is not None and outcome.status]
        assert len(answered) >= 8
        assert [outcome for outcome in answered if not outcome.is_complete] == []
        await until(lambda: held(loaded).is_no_more_than(before), "descriptors and processes to be as before")
