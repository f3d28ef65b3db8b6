"""A hub's registry on a real disk, one push to it, disks that fail, and what must be true afterwards, whatever happened.

As a script it is a process that is killed at one point of a push after the other: `registry_faults.py HOME RESULTS FIRST COUNT`.
"""

import asyncio
import contextlib
import errno
import gc
import hashlib
import os
import signal
import sqlite3
import sys
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass, field
from functools import cache, cached_property, partial
from pathlib import Path
from random import Random
from typing import Any, cast

import pytest
from argon2 import PasswordHasher
from sqlalchemy.engine.default import DefaultDialect

from corral.core.records import Principal
from corral.core.registry import Upload
from corral.hub import passwords
from corral.hub.registry import Registry
from corral.main.services import HubServices, RegistryServices, open_hub_services, registry_services
from corral.settings import Settings
from corral.storage.sql import engine as engine_module
from corral.storage.sql.accounts import SqlAccounts
from corral.wire.errors import CorralError
from corral.wire.manifest import MANIFEST_TYPE
from corral.wire.names import Digest
from corral.wire.repositories import RepositoryName
from fakes_registry import digest_of
from identity_stores import account
from registry_hub import CONFIG, a_manifest, chunks, with_key

ADA = account("Ada")
#: What a push does to the disk, besides the database's commits.
_CALLS = ("pwrite", "fsync", "ftruncate", "replace", "unlink", "symlink", "write")
#: A block and a remainder, as one part; the second is short.
_PART_BYTES, _MORE_BYTES = (1 << 20) + 1234, 4321

#: The first moment at which a push is killed, and how many are drawn for one kill.
_EARLIEST_S, _DRAWS = 0.0005, 12

#: (number of the operation, its name, what does it, by half if it is told so) -> its result.
Step = Callable[[int, str, Callable[..., Any]], Any]


# ── The hub, and a push to it ────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class Hub:
    """The services on the data of one home."""

    home: Path
    services: HubServices
    parts: RegistryServices

    @property
    def registry(self) -> Registry:
        return self.parts.registry

    @property
    def caller(self) -> Principal:
        return with_key(ADA)


@contextlib.asynccontextmanager
async def opened(home: Path) -> AsyncIterator[Hub]:
    """A hub as a process has it; Ada has an account."""
    settings = Settings.from_env({"HOME": str(home), "CORRAL_HOME": str(home / "hub")})
    async with open_hub_services(settings) as services:
        with contextlib.suppress(CorralError):
            await SqlAccounts(services.database).add(ADA, "no password")
        yield Hub(home, services, registry_services(settings, services))


@dataclass
class Push:
    """One push of a model, the same for the same number, which is below 10,000. said: what was answered, to be held to it.
    say: told of each answer."""

    number: int
    say: Callable[[str], None] = lambda line: None
    said: list[str] = field(default_factory=list)

    @property
    def name(self) -> RepositoryName:
        return RepositoryName("Ada", f"m{self.number}")

    @cached_property
    def parts(self) -> tuple[bytes, bytes]:
        middle, end = self.number + _PART_BYTES, self.number + _PART_BYTES + _MORE_BYTES
        return _noise()[self.number : middle], _noise()[middle:end]

    @cached_property
    def weights(self) -> bytes:
        return b"".join(self.parts)

    @cached_property
    def digest(self) -> Digest:
        return digest_of(self.weights)

    @property
    def manifest(self) -> bytes:
        return a_manifest(self.weights)

    def answered(self, line: str) -> None:
        self.said.append(line)
        self.say(line)

    async def run(self, hub: Hub) -> None:
        """As stock clients do it. Raises: what the registry answers."""
        started = await hub.registry.start_upload(self.name, hub.caller)
        assert isinstance(started, Upload)
        first, second = self.parts
        await hub.registry.append(started.id, self.name, hub.caller, _pieces(first), length=len(first))
        self.answered(f"part {started.id} {len(first)}")
        await self.go_on(hub, started.id, second)

    async def go_on(self, hub: Hub, upload_id: str, rest: bytes) -> None:
        """From where the first part was accepted."""
        if rest:
            await hub.registry.append(upload_id, self.name, hub.caller, _pieces(rest), length=len(rest))
            self.answered(f"part {upload_id} {len(self.weights)}")
        await hub.registry.commit(upload_id, self.name, hub.caller, self.digest)
        self.answered(f"blob {self.digest}")
        await hub.registry.put_blob(self.name, hub.caller, digest_of(CONFIG), chunks(CONFIG), length=len(CONFIG))
        self.answered(f"blob {digest_of(CONFIG)}")
        await hub.registry.put_manifest(self.name, "latest", hub.caller, self.manifest, MANIFEST_TYPE)
        self.answered("manifest latest")


@cache
def _noise() -> bytes:
    return Random(0).randbytes(10_000 + _PART_BYTES + _MORE_BYTES)


async def _pieces(content: bytes) -> AsyncIterator[bytes]:
    for start in range(0, len(content), 65_536):
        yield content[start : start + 65_536]


# ── What must be true ────────────────────────────────────────────────────────────────────────────────────────────────


async def check_answers(hub: Hub, push: Push) -> None:
    """What was answered is true: parts are there to go on from, blobs and the tag are whole."""
    blobs = {line.split()[1] for line in push.said if line.startswith("blob")}
    for text in blobs:
        await _check_blob(hub, push, text)
    if "manifest latest" in push.said:
        stored = await hub.registry.manifest(push.name, "latest", hub.caller)
        assert stored.body == push.manifest
    parts = [line.split() for line in push.said if line.startswith("part")]
    if parts and str(push.digest) not in blobs:
        await _check_upload(hub, push, parts[-1][1], int(parts[-1][2]))


async def _check_blob(hub: Hub, push: Push, text: str) -> None:
    digest, wanted = {str(push.digest): (push.digest, push.weights)}.get(text, (digest_of(CONFIG), CONFIG))
    facts = await hub.registry.blob(push.name, digest, hub.caller)
    assert facts.size_bytes == len(wanted)
    assert Path(facts.path or "").read_bytes() == wanted


async def _check_upload(hub: Hub, push: Push, upload_id: str, end: int) -> None:
    """The client goes on where it was told it may."""
    push.said = [line for line in push.said if not line.startswith("part")]
    offset = len(push.weights)
    # Unknown when it was finished and only the answer did not come through: then the commit is answered again.
    with contextlib.suppress(CorralError):
        offset = (await hub.registry.status(upload_id, push.name, hub.caller)).offset_bytes
    assert offset >= end
    await push.go_on(hub, upload_id, push.weights[offset:])


def check_data(home: Path, *, may_lack_uploads: bool = False) -> None:
    """Nothing is half visible: links have files, files the content of their names, manifests blobs, tags manifests.

    may_lack_uploads: whether what arrived of an open upload may be gone."""
    blobs = home / "hub/blobs"
    with contextlib.closing(sqlite3.connect(home / "hub/hub.db")) as connection:
        links = connection.execute("SELECT b.digest, b.size_bytes FROM repository_blobs l JOIN blobs b USING (digest)").fetchall()
        unnamed = connection.execute(
            "SELECT count(*) FROM repository_manifests r"
            " JOIN manifest_blobs m ON m.manifest_digest = r.digest AND m.kind = 'blob'"
            " LEFT JOIN repository_blobs l ON l.repository_id = r.repository_id AND l.digest = m.digest WHERE l.digest IS NULL"
        ).fetchone()
        dangling = connection.execute(
            "SELECT count(*) FROM tags t LEFT JOIN repository_manifests r"
            " ON r.repository_id = t.repository_id AND r.digest = t.manifest_digest WHERE r.digest IS NULL"
        ).fetchone()
        longer = [
            upload_id
            for upload_id, end in connection.execute("SELECT id, offset_bytes FROM uploads WHERE finished_as IS NULL")
            if end and not may_lack_uploads and _length_of(blobs / "uploads", upload_id) < end
        ]
        assert connection.execute("PRAGMA integrity_check").fetchone() == ("ok",)
    assert (unnamed, dangling, longer) == ((0,), (0,), [])
    for digest, size_bytes in links:
        assert (blobs / digest.replace(":", "-")).stat().st_size == size_bytes
    for path in blobs.glob("sha256-*"):
        if not path.name.endswith(".tmp"):
            assert path.name == f"sha256-{hashlib.sha256(path.read_bytes()).hexdigest()}"


def _length_of(uploads: Path, upload_id: str) -> int:
    """Of what is there of an upload; of its blob, where that is what became of the file."""
    with contextlib.suppress(FileNotFoundError):
        return (uploads / upload_id).stat().st_size
    with contextlib.suppress(FileNotFoundError):
        return (uploads / f"{upload_id}.placed").stat().st_size
    return 0


# ── Disks that fail ──────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass
class Disk:
    """Counts what is done to the disk and to the database, and lets a step decide what comes of it."""

    step: Step
    count: int = 0
    log: list[str] = field(default_factory=list)

    @contextlib.contextmanager
    def installed(self) -> Iterator["Disk"]:
        """Patched, because no test can have a real disk fail at the operation it wants."""
        with pytest.MonkeyPatch.context() as patch:
            for name in _CALLS:
                patch.setattr(os, name, self._wrapped(name, getattr(os, name)))
            patch.setattr(DefaultDialect, "do_commit", self._wrapped("commit", DefaultDialect.do_commit))
            yield self

    def _wrapped(self, name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            self.count += 1
            self.log.append(name)

            def run(half: bool = False) -> Any:
                if half and name == "pwrite":
                    descriptor, content, offset = args
                    return real(descriptor, content[: len(content) // 2], offset)
                return real(*args, **kwargs)

            return self.step(self.count, name, run)

        return call


def untouched(number: int, name: str, call: Callable[..., Any]) -> Any:
    """Everything works."""
    return call()


def failing(at: int, code: int = errno.EIO) -> Step:
    """Operation number `at` does nothing and says so."""

    def step(number: int, name: str, call: Callable[..., Any]) -> Any:
        if number == at:
            raise _error(name, code)
        return call()

    return step


def torn(at: int, code: int = errno.EIO) -> Step:
    """Operation number `at` is done, a write by half, and says that it failed."""

    def step(number: int, name: str, call: Callable[..., Any]) -> Any:
        if number == at:
            call(half=True)
            raise _error(name, code)
        return call()

    return step


def broken_from(at: int, code: int = errno.EIO) -> Step:
    """From operation number `at` on nothing works."""

    def step(number: int, name: str, call: Callable[..., Any]) -> Any:
        if number >= at:
            raise _error(name, code)
        return call()

    return step


def _error(name: str, code: int) -> Exception:
    if name == "commit":
        return sqlite3.OperationalError("database or disk is full" if code == errno.ENOSPC else "disk I/O error")
    return OSError(code, os.strerror(code))


# ── The process that is killed ───────────────────────────────────────────────────────────────────────────────────────


def killed_at(at: int) -> Step:
    """Killed before an operation if the number is even, behind it if it is odd."""

    def step(number: int, name: str, call: Callable[..., Any]) -> Any:
        if 2 * number == at:
            os.kill(os.getpid(), signal.SIGKILL)
        try:
            return call()
        finally:
            if 2 * number + 1 == at:
                os.kill(os.getpid(), signal.SIGKILL)

    return step


async def _one_life(home: Path, results: Path, before: Push | None, push: Push, point: float) -> tuple[int, float]:
    """What one process does: hold the one before to what it answered, push again what that wanted to push, and begin its own.
    Returns the operations and seconds that took. point: where it ends; a whole number is an operation, a fraction a time."""
    async with opened(home) as hub:
        if before is not None:
            await check_answers(hub, before)
            await before.run(hub)
            await check_answers(hub, before)
        (results / f"{push.number}.checked").touch()
        said, write = os.open(results / f"{push.number}.said", os.O_CREAT | os.O_WRONLY, 0o600), os.write
        push.say = lambda line: write(said, f"{line}\n".encode())
        with Disk(killed_at(int(point))).installed() as disk:
            if point < 1:
                signal.setitimer(signal.ITIMER_REAL, point)
            started = time.perf_counter()
            await push.run(hub)
            signal.setitimer(signal.ITIMER_REAL, 0)
        return disk.count, time.perf_counter() - started


def in_child(work: Callable[[], Any]) -> int:
    """Fork, and do it there, as warm as this process is. The status it ended with."""
    # A thread would be missing in the child, and with it whatever it was about to let go.
    assert threading.active_count() == 1
    child = os.fork()
    if child == 0:
        # The default for SIGALRM ends a process as SIGKILL does, without a word.
        work()
        os._exit(0)
    return os.waitpid(child, 0)[1]


def live_cheaply() -> None:
    """Patched, because every life would make a hash that no password has and put the same statements together as the one before;
    neither is part of what is killed. Nothing is open when a process forks: whoever closes a database empties its engines."""
    passwords.PasswordHasher = partial(_cheap, PasswordHasher)
    for name in ("_write_engine", "_read_engine"):
        setattr(engine_module, name, cache(getattr(engine_module, name)))


def _cheap(make: Callable[..., PasswordHasher], **cost: Any) -> PasswordHasher:
    return make(**{**cost, "time_cost": 1, "memory_cost": 8})


def share() -> None:
    """What this process holds, it goes on sharing with its children: the garbage collector would write on every page of it."""
    gc.disable()
    gc.freeze()


class _Lives:
    """One process after the other, each killed in its own push, after it held the one before to what that was answered."""

    def __init__(self, home: Path, results: Path, random: Random, first: int) -> None:
        self._home, self._results, self._random = home, results, random
        self._number, self._before = first, cast(Push | None, None)

    def end_at(self, point: float) -> None:
        """A moment behind the end of the push kills nothing, so an earlier one is drawn: how long a push takes depends on what
        else the machine does."""
        for _ in range(_DRAWS):
            if self._one(point):
                return
            if point >= 1:
                sys.exit(f"a push without operation {point / 2}")
            point = self._random.uniform(_EARLIEST_S, point)
        sys.exit(f"no kill within {point} s")

    def _one(self, point: float) -> bool:
        """Whether it was killed."""
        self._number += 1
        life = partial(_one_life, self._home, self._results, self._before, Push(self._number), point)
        status = in_child(lambda: asyncio.run(life()))
        is_killed = os.WIFSIGNALED(status) and os.WTERMSIG(status) in (signal.SIGKILL, signal.SIGALRM)
        if (status and not is_killed) or not (self._results / f"{self._number}.checked").exists():
            sys.exit(f"push {self._number} at {point} ended with {status}")
        # A line that was cut off was not said.
        lines = (self._results / f"{self._number}.said").read_text().splitlines(keepends=True)
        self._before = Push(self._number, said=[line.rstrip() for line in lines if line.endswith("\n")])
        print(self._number, f"{point:.4g}", "killed" if is_killed else "ended", len(self._before.said), flush=True)
        return is_killed


def main() -> None:
    """Die at COUNT points, of which two thirds, or as many as there are, lie before and behind operations.

    The others are moments.
    """
    home, results, first, count = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])
    live_cheaply()
    # The first time everything is imported, and statements are put together; the second time shows how long a push takes.
    for number in (first, first + 1):
        operations, seconds = asyncio.run(_one_life(home, results, None, Push(number), 1))
    share()
    random = Random(first)
    points: list[float] = random.sample(range(2, 2 * operations + 2), min(2 * operations, 2 * count // 3))
    points += [random.uniform(_EARLIEST_S, min(0.9, seconds)) for _ in range(count - len(points))]
    random.shuffle(points)
    lives = _Lives(home, results, random, first + 1)
    for point in points:
        lives.end_at(point)


if __name__ == "__main__":
    main()
