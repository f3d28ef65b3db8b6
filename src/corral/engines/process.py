"""An engine's process: started from a list, watched, listened to, and ended for certain.

What it prints is hostile text (it may quote the model file): it is kept as a short ring of cut lines without control characters,
and never reaches our own output.
"""

import asyncio
import contextlib
import json
import os
import re
import signal
import sys
from collections import deque
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from corral.engines.machine import exhausted, is_exhausted
from corral.wire.errors import CorralError

_CHILD = Path(__file__).with_name("llama_child.py")
_KEPT_LINES, _RECENT_LINES, _LAST_WORDS, _LINE_CHARACTERS = 200, 20, 2, 400
_ANNOUNCEMENT_BYTES = 4096
_MIB = 1024 * 1024

# `0.00.071.143 E srv    load_model: …`: time since the start, level, text.
_LOG_PREFIX = re.compile(r"[0-9.]+ ([A-Z]) +")
# `load_tensors:        CUDA0 model buffer size =  1234.00 MiB`
_BUFFER = re.compile(r"([^\s:]+) +(?:\w+ +)?buffer size = +([0-9.]+) MiB")
_PATH = re.compile(r"(?:/[^\s/'\"]+)+/([^\s/'\"]+)")


class EngineLog:
    """The last lines of what an engine printed, and the buffers it said it allocated."""

    def __init__(self) -> None:
        self._lines: deque[bytes] = deque(maxlen=_KEPT_LINES)
        self._rest = b""
        #: Lines so far: a loading engine that prints is alive.
        self.count = 0
        self._buffers: dict[str, float] = {}

    def feed(self, data: bytes) -> None:
        """Take what arrived, cut anywhere."""
        *lines, rest = (self._rest + data).split(b"\n")
        self._rest = rest[:_LINE_CHARACTERS]
        for line in lines:
            self._keep(line)

    def _keep(self, line: bytes) -> None:
        self.count += 1
        line = line[:_LINE_CHARACTERS]
        # An engine at work prints dozens of lines per request, and hardly any is ever looked at: they are cleaned when they are.
        if b"buffer size" in line and (found := _BUFFER.search(_printable(line))):
            device, size_mib = found.groups()
            self._buffers[device] = self._buffers.get(device, 0.0) + float(size_mib)
        if line:
            self._lines.append(line)

    def last_words(self) -> str:
        """What it said about its end: the first errors of the last lines, which name the cause, else the very last lines. Paths
        are cut to file names."""
        if self._rest:
            self.feed(b"\n")
        recent = [text for line in self._lines if (text := _printable(line))][-_RECENT_LINES:]
        errors = [line for line in recent if (found := _LOG_PREFIX.match(line)) and found[1] == "E"]
        chosen = errors[:_LAST_WORDS] or recent[-_LAST_WORDS:]
        return "; ".join(_PATH.sub(r"\1", _LOG_PREFIX.sub("", line, count=1)).strip() for line in chosen)

    def allocated_bytes(self, *, on_accelerator: bool) -> int:
        """The sum of the buffers, of the host or of everything that is none. `CUDA_Host` is the host's."""
        return round(
            sum(size for name, size in self._buffers.items() if on_accelerator != (name.startswith("CPU") or "Host" in name))
            * _MIB
        )


def _printable(line: bytes) -> str:
    return "".join(character for character in line.decode("utf-8", "replace") if character.isprintable())


class EngineProcess:
    """A started child. Whoever started it calls `kill`."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self._process = process
        self.log = EngineLog()
        self._listening = asyncio.create_task(self._listen())
        self._ending = asyncio.create_task(process.wait())
        self._announcing = asyncio.create_task(self._read_announcement())

    @classmethod
    async def start(cls, configuration: Mapping[str, Any], environment: Mapping[str, str]) -> "EngineProcess":
        """Start the child with this configuration, which it reads from stdin. Raises: engine_failed."""
        # -P and -E: neither the folder of the script nor PYTHONPATH may lend it modules. The root as working directory: it holds
        # no files that a relative name could mean.
        argv = [sys.executable, "-P", "-E", str(_CHILD)]
        pipe = asyncio.subprocess.PIPE
        try:
            process = await asyncio.create_subprocess_exec(
                *argv,
                stdin=pipe,
                stdout=pipe,
                stderr=pipe,
                env=dict(environment),
                start_new_session=True,
                cwd=Path(sys.executable).anchor,
            )
        except OSError as error:
            if is_exhausted(error):
                raise exhausted() from error
            raise CorralError("engine_failed", f"the engine could not be started: {error.strerror}") from error
        assert process.stdin is not None
        process.stdin.write(json.dumps({"parent": os.getpid(), **configuration}).encode() + b"\n")
        return cls(process)

    @property
    def pid(self) -> int:
        """The process id; the engine's own, also after it became a llama-server."""
        return self._process.pid

    @property
    def is_running(self) -> bool:
        """Whether it has not ended."""
        return self._process.returncode is None

    async def announced(self, *, timeout_s: float) -> dict[str, Any] | None:
        """What the child wrote to stdout once it was ready; None when it has not yet, or never will."""
        await asyncio.wait({self._announcing, self._ending}, timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED)
        return self._announcing.result() if self._announcing.done() else None

    async def ended(self, *, timeout_s: float) -> bool:
        """Wait for the end, so long."""
        await asyncio.wait({self._ending}, timeout=timeout_s)
        return self._ending.done()

    async def last_words(self) -> str:
        """What it said before it ended, for people."""
        if not self.is_running:
            # The pipe may still hold lines of a process that is gone.
            await asyncio.wait({self._listening}, timeout=1.0)
        return self.log.last_words() or "it said nothing"

    @property
    def outcome(self) -> str:
        """How it ended: `exit status 1`, `signal 9`."""
        code = self._process.returncode
        return f"signal {-code}" if code is not None and code < 0 else f"exit status {code}"

    @property
    def resident_bytes(self) -> int | None:
        """Its resident memory; None where the system does not tell."""
        try:
            pages = int(Path(f"/proc/{self.pid}/statm").read_text().split()[1])
        except (OSError, IndexError):
            return None
        return pages * os.sysconf("SC_PAGE_SIZE")

    async def kill(self) -> None:
        """End it at once, with whatever it started, and wait until it is gone. Safe to call twice."""
        if self.is_running:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                if hasattr(os, "killpg"):
                    os.killpg(self.pid, signal.SIGKILL)
                else:
                    self._process.kill()
        # Not `await self._ending`: if our caller is canceled, the task must go on.
        await asyncio.wait({self._ending})
        self._announcing.cancel()
        # The transport closes the pipes once they are read to their end; a grandchild that holds one must not keep us.
        await asyncio.wait({self._listening}, timeout=1.0)
        self._listening.cancel()
        await asyncio.gather(self._listening, self._announcing, return_exceptions=True)

    async def _listen(self) -> None:
        assert self._process.stderr is not None
        while data := await self._process.stderr.read(64 * 1024):
            self.log.feed(data)

    async def _read_announcement(self) -> dict[str, Any] | None:
        assert self._process.stdout is not None
        text = await self._process.stdout.read(_ANNOUNCEMENT_BYTES)
        try:
            return dict(json.loads(text)) if text else None
        except ValueError as error:
            raise CorralError("engine_failed", "the engine announced itself in words that are not understood") from error
