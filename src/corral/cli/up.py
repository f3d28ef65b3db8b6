"""`corral up`: runs `corral hub serve` and `corral serve` as children and keeps them together.

Each child's standard input is a pipe that only this process holds open: when this process dies, however it dies, the pipe ends
and the child ends itself. Each child says on its standard output, in one line of JSON, that its port answers. What it writes to
standard error is passed on, with its name in front. The children are not in the terminal's process group, so Ctrl-C reaches this
process alone, which then ends them in order.
"""

import asyncio
import contextlib
import json
import signal
import sys
from asyncio.subprocess import PIPE, Process
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from corral.cli import render
from corral.cli.context import Environment, Failed
from corral.cli.starting import hub_port_advice, local_port_advice, taken_text, up_lines

#: Long enough for a first migration on a slow disk.
_READY_S = 60.0
#: A child drains for 30 seconds and then cuts what is left; past this it hangs.
_END_S = 45.0
_LAST_LINES = 8


class Supervisor:
    """Runs both servers until a signal comes or one of them ends."""

    def __init__(self, environment: Environment) -> None:
        self._environ = dict(environment.environ)
        self._settings = environment.settings
        self._children: list[_Child] = []

    async def run(self, models: Sequence[tuple[str, Path]], parameters: Sequence[str]) -> int:
        """Returns the exit status."""
        self._check_ports()
        with _signals() as signals:
            stopping = asyncio.create_task(signals.get())
            work = asyncio.create_task(self._start_and_watch(models, parameters))
            try:
                await asyncio.wait([stopping, work], return_when=asyncio.FIRST_COMPLETED)
                if not work.done():
                    render.say("Stopping… (Ctrl-C again stops at once)")
            finally:
                work.cancel()
                stopping.cancel()
                await self._end_all(signals)
            with contextlib.suppress(asyncio.CancelledError):
                return await work
        return 0

    def _check_ports(self) -> None:
        from corral.main.shared import check_free
        from corral.wire.errors import CorralError

        hub, local = self._settings.hub_listen, self._settings.local
        for address, advice in ((hub, hub_port_advice(self._settings)), (local, local_port_advice(self._settings))):
            try:
                check_free(address.host, address.port)
            except CorralError as error:
                raise Failed(taken_text(address), advice) from error

    async def _start_and_watch(self, models: Sequence[tuple[str, Path]], parameters: Sequence[str]) -> int:
        if models and (status := await self._install(models, parameters)) != 0:
            return status
        # The hub beside us is the one to use, unless the person names another.
        environ = {**self._environ, "CORRAL_HUB": self._settings.hub or self._settings.public_url}
        hub = asyncio.create_task(self._start("hub", "hub", "serve", environ=self._environ))
        local = asyncio.create_task(self._start("local", "serve", environ=environ))
        try:
            print(up_lines(await hub, await local), flush=True)
        finally:
            hub.cancel()
            local.cancel()
        return await self._watch()

    async def _install(self, models: Sequence[tuple[str, Path]], parameters: Sequence[str]) -> int:
        """Install models in a process of its own, which keeps this one small and writes its progress to the terminal itself."""
        arguments = [*(f"--parameter={text}" for text in parameters), *(f"{name}={path}" for name, path in models)]
        process = await asyncio.create_subprocess_exec(*_corral("install", *arguments), env=self._environ)
        try:
            return await process.wait()
        except asyncio.CancelledError:
            with contextlib.suppress(ProcessLookupError):
                process.terminate()
            await process.wait()
            raise

    async def _start(self, name: str, *arguments: str, environ: Mapping[str, str]) -> dict[str, Any]:
        """Start a child and return what it says about itself once it answers. Raises: Failed when it ends before."""
        process = await asyncio.create_subprocess_exec(
            *_corral(*arguments, "--supervised"), stdin=PIPE, stdout=PIPE, stderr=PIPE, env=environ, start_new_session=True
        )
        child = _Child(name, process)
        self._children.append(child)
        try:
            # Not wait_for: in Python 3.11 it loses a cancellation that comes together with the line.
            async with asyncio.timeout(_READY_S):
                return await child.ready()
        except TimeoutError as error:
            raise Failed(f"the {name} server did not answer within {_READY_S:.0f} s", "look at the lines above") from error

    async def _watch(self) -> int:
        """Wait until a child ends, which it should not, and say so."""
        ends = {asyncio.create_task(child.process.wait()): child for child in self._children}
        try:
            done, _ = await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in ends:
                task.cancel()
        child = ends[done.pop()]
        await child.drained()
        last = "".join(f"\n  {line}" for line in child.last_lines)
        render.say(f"{render.error_text(f'the {child.title} ended: {_how(child.process.returncode)}')}{last}")
        return 1

    async def _end_all(self, signals: "asyncio.Queue[int]") -> None:
        """Ask every child to end, ask again when the person does, and kill what hangs."""
        for child in self._children:
            child.signal(signal.SIGTERM)
        waiting = asyncio.gather(*(child.process.wait() for child in self._children))
        again = asyncio.create_task(self._pass_on(signals))
        try:
            async with asyncio.timeout(_END_S):
                await waiting
        except TimeoutError:
            for child in self._children:
                child.signal(signal.SIGKILL)
            await asyncio.gather(*(child.process.wait() for child in self._children))
        finally:
            again.cancel()
        for child in self._children:
            await child.drained()

    async def _pass_on(self, signals: "asyncio.Queue[int]") -> None:
        while True:
            await signals.get()
            for child in self._children:
                # Not SIGTERM again: a child that has not yet come to the first would see the two as one, and drain on.
                child.signal(signal.SIGINT)


class _Child:
    """One server process and what it said."""

    def __init__(self, name: str, process: Process) -> None:
        self.title = {"hub": "hub", "local": "local server"}[name]
        self.process = process
        self.last_lines: deque[str] = deque(maxlen=_LAST_LINES)
        self._name = name
        self._is_ready = False
        self._reading = asyncio.create_task(self._read_errors())

    async def ready(self) -> dict[str, Any]:
        """What the child says when its port answers. Raises: Failed with the child's own words when it ends instead."""
        assert self.process.stdout is not None
        line = await self.process.stdout.readline()
        if not line:
            status = await self.process.wait()
            await self.drained()
            raise _Ended(status, "\n".join(self.last_lines) or f"the {self.title} ended before it answered: {_how(status)}")
        self._is_ready = True
        for early in self.last_lines:
            self._show(early)
        facts: dict[str, Any] = json.loads(line)
        return facts

    def signal(self, number: signal.Signals) -> None:
        """Send a signal, unless it has ended."""
        with contextlib.suppress(ProcessLookupError):
            self.process.send_signal(number)

    async def drained(self) -> None:
        """Return when everything it wrote has been read."""
        await self._reading

    async def _read_errors(self) -> None:
        assert self.process.stderr is not None
        while True:
            try:
                line = await self.process.stderr.readline()
            except ValueError:  # a line longer than the stream's limit: its rest follows
                continue
            if not line:
                return
            text = line.decode("utf-8", "replace").rstrip("\n")
            self.last_lines.append(text)
            if self._is_ready:
                self._show(text)

    def _show(self, line: str) -> None:
        render.say(f"{self._name:<8}{line}")


class _Ended(Failed):
    """A child that ended before it answered; its words are shown as they are."""

    def __init__(self, status: int, words: str) -> None:
        # The child's own text begins with `Error: ` and may end with an arrow: take it apart, so that it is shown once.
        message, _, advice = words.removeprefix("Error: ").partition("\n→ ")
        super().__init__(message, advice, status=status if status > 0 else 1)


def _corral(*arguments: str) -> list[str]:
    # -P: a module in the current directory must not be taken for one of ours.
    return [sys.executable, "-P", "-m", "corral", *arguments]


def _how(status: int | None) -> str:
    if status is not None and status < 0:
        with contextlib.suppress(ValueError):
            return f"killed by {signal.Signals(-status).name}"
    return f"exit status {status}"


@contextlib.contextmanager
def _signals() -> Iterator["asyncio.Queue[int]"]:
    """Signals that ask for an end, in the order they come."""
    loop = asyncio.get_running_loop()
    queue: asyncio.Queue[int] = asyncio.Queue()
    numbers = [signal.SIGTERM, signal.SIGINT, signal.SIGHUP]
    for number in numbers:
        loop.add_signal_handler(number, queue.put_nowait, number)
    try:
        yield queue
    finally:
        for number in numbers:
            loop.remove_signal_handler(number)
