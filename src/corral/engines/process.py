"""An engine's process: started from a list, watched, listened to, and ended for certain.

What it prints is hostile text (it may quote the model file): it is kept as a short ring of cut lines without control characters,
and never reaches our own output.
"""

import asyncio
import contextlib
import fcntl
import json
import os
import re
import signal
import sys
from collections import deque
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from corral.engines.machine import exhausted, is_exhausted, oom_kills
from corral.wire.errors import CorralError

_CHILD = Path(__file__).with_name("llama_child.py")
_KEPT_LINES, _RECENT_LINES, _LAST_WORDS, _LINE_CHARACTERS = 200, 20, 2, 400
_ANNOUNCEMENT_BYTES = 4096
_MIB = 1024 * 1024
#: An engine at work writes some fifty pieces of log per request. To be woken by each of them costs the server more than the whole
#: rest of the request, on cores that the engine computes on; so they wait in the pipe and are read together.
_LISTEN_EVERY_S = 0.25
_PIPE_BYTES = _MIB

# `0.00.071.143 E srv    load_model: …`: time since the start, level, text.
_LOG_PREFIX = re.compile(r"[0-9.]+ ([A-Z]) +")
# `load_tensors:        CUDA0 model buffer size =  1234.00 MiB`
_BUFFER = re.compile(r"(\w+): +([^\s:]+) +(\w+) +buffer size = +([0-9.]+) MiB")
# `load_tensors: offloaded 31/31 layers to GPU`
_OFFLOADED = re.compile(r"offloaded +([0-9]+)/([0-9]+) +layers to GPU")
# `common_params_fit_impl:   - CUDA0: 33 layers ( 2 overflowing), …`: of those, a part is in main memory after all.
_OVERFLOWING = re.compile(r"layers +\( *([0-9]+) overflowing\)")
#: What backends say when they got no memory. Source: ollama llm/status.go.
_NO_MEMORY = re.compile(
    rb"out of (device )?memory|(cuda|hip)Malloc failed|failed to allocate|allocation failed|(not enough|insufficient) memory"
    rb"|ErrorOutOf(Device|Host)?Memory|VK_ERROR_OUT_OF_DEVICE_MEMORY|std::bad_alloc",
    re.IGNORECASE,
)
#: After which it tries in another way by itself.
_RECOVERS = b"retrying without pipeline parallelism"
_PATH = re.compile(r"(?:/[^\s/'\"]+)+/([^\s/'\"]+)")


class EngineLog:
    """The last lines of what an engine printed, and the buffers it said it allocated."""

    def __init__(self) -> None:
        self._lines: deque[bytes] = deque(maxlen=_KEPT_LINES)
        self._rest = b""
        #: Lines so far: a loading engine that prints is alive.
        self.count = 0
        self._buffers: dict[tuple[str, str, str], float] = {}
        self._is_offloaded = False
        self._is_overflowing = False
        #: The weights are in memory and the context is allocated; what follows is the model's chat template.
        self.has_slots = False

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
            # What is tried out first is said again, in the same words, of the final load.
            part, device, kind, size_mib = found.groups()
            self._buffers[part, device, kind] = float(size_mib)
        elif b" layers " in line:
            self._note_layers(_printable(line))
        elif b"new slot" in line:
            self.has_slots = True
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

    def _note_layers(self, line: str) -> None:
        if found := _OFFLOADED.search(line):
            self._is_offloaded = int(found[1]) >= int(found[2])
        elif (found := _OVERFLOWING.search(line)) and int(found[1]):
            self._is_overflowing = True

    @property
    def is_out_of_memory(self) -> bool:
        """Whether the last lines say so."""
        recent = [line for line in self._lines if line][-_RECENT_LINES:]
        return any(_NO_MEMORY.search(line) and _RECOVERS not in line for line in recent)

    def memory_bytes(self, file_bytes: int) -> tuple[int, int]:
        """(all buffers, of which on accelerators); zeros when it said nothing of them. A model whose layers are all on
        accelerators counts as wholly there. file_bytes: of the weights. Source: ollama llm/llama_server.go MemorySize."""
        total = vram = of_file = mapped_here = 0.0
        for (_, device, kind), size_mib in self._buffers.items():
            is_here = device in ("CPU", "BLAS") or device.startswith("CPU_") or device.endswith("_Host")
            total += size_mib
            vram += 0 if is_here else size_mib
            if kind == "model" and (not is_here or device.endswith("_Mapped")):
                of_file += size_mib
                mapped_here += size_mib if is_here else 0
        # The part of the file that is mapped reaches from the first tensor kept here to the last: across those that are not.
        total -= min(mapped_here, max(0.0, of_file - file_bytes / _MIB))
        if self._is_offloaded and not self._is_overflowing:
            total = vram
        return round(total * _MIB), round(vram * _MIB)


def _printable(line: bytes) -> str:
    return "".join(character for character in line.decode("utf-8", "replace") if character.isprintable())


class _LogPipe:
    """Our end of the pipe that an engine prints to. Read when somebody asks, and now and then lest it fills up."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self._loop = asyncio.get_running_loop()
        self._log = EngineLog()
        self._timer: asyncio.TimerHandle | None = None
        self._is_open = True
        self._loop.add_reader(descriptor, self._heard)

    @classmethod
    @contextlib.contextmanager
    def opened(cls) -> Iterator[tuple["_LogPipe", int]]:
        """Our end, and the end for the child, which is closed here afterwards."""
        ours, theirs = os.pipe()
        os.set_blocking(ours, False)
        with contextlib.suppress(AttributeError, OSError):
            fcntl.fcntl(ours, fcntl.F_SETPIPE_SZ, _PIPE_BYTES)
        log = cls(ours)
        try:
            yield log, theirs
        except BaseException:
            log.close()
            raise
        finally:
            os.close(theirs)

    def read(self) -> EngineLog:
        """The log, with all that was printed up to now. After `close`, as it was then."""
        while self._is_open:
            try:
                data = os.read(self._descriptor, 64 * 1024)
            except BlockingIOError:
                break
            if not data:
                self.close()
            self._log.feed(data)
        return self._log

    def close(self) -> None:
        """Read what is there and hear no more. Safe to call twice."""
        if self._is_open:
            self._is_open = False
            with contextlib.suppress(BlockingIOError):
                while data := os.read(self._descriptor, 64 * 1024):
                    self._log.feed(data)
            if self._timer is not None:
                self._timer.cancel()
            self._loop.remove_reader(self._descriptor)
            os.close(self._descriptor)

    def _heard(self) -> None:
        self._loop.remove_reader(self._descriptor)
        self._timer = self._loop.call_later(_LISTEN_EVERY_S, self._listen)

    def _listen(self) -> None:
        self._timer = None
        self.read()
        if self._is_open:
            self._loop.add_reader(self._descriptor, self._heard)


class EngineProcess:
    """A started child. Whoever started it calls `kill`. root: where the kernel's own files are."""

    def __init__(self, process: asyncio.subprocess.Process, log: "_LogPipe", root: Path) -> None:
        self._process = process
        self._log_pipe = log
        self._root = root
        self._oom_kills = oom_kills(root)
        self._ending = asyncio.create_task(process.wait())
        self._announcing = asyncio.create_task(self._read_announcement())

    @classmethod
    async def start(
        cls, configuration: Mapping[str, Any], environment: Mapping[str, str], *, root: Path = Path("/")
    ) -> "EngineProcess":
        """Start the child with this configuration, which it reads from stdin. Raises: engine_failed."""
        # -P and -E: neither the folder of the script nor PYTHONPATH may lend it modules. The root as working directory: it holds
        # no files that a relative name could mean.
        argv = [sys.executable, "-P", "-E", str(_CHILD)]
        pipe = asyncio.subprocess.PIPE
        try:
            with _LogPipe.opened() as (log, its_end):
                process = await asyncio.create_subprocess_exec(
                    *argv,
                    stdin=pipe,
                    stdout=pipe,
                    stderr=its_end,
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
        return cls(process, log, root)

    @property
    def log(self) -> EngineLog:
        """What it printed up to now."""
        return self._log_pipe.read()

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

    def last_words(self) -> str:
        """What it said before it ended, for people."""
        return self.log.last_words() or "it said nothing"

    @property
    def is_out_of_memory(self) -> bool:
        """Whether it ended for want of memory: it said so, or the kernel chose a process to kill while it ran."""
        is_chosen = self._process.returncode == -signal.SIGKILL and oom_kills(self._root) > self._oom_kills
        return is_chosen or self.log.is_out_of_memory

    @property
    def outcome(self) -> str:
        """How it ended: `exit status 1`, `signal 9`, `signal 9, for want of memory`."""
        code = self._process.returncode
        if code is None or code >= 0:
            return f"exit status {code}"
        return f"signal {-code}{', for want of memory' if self.is_out_of_memory else ''}"

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
        self._log_pipe.close()
        self._announcing.cancel()
        await asyncio.gather(self._announcing, return_exceptions=True)

    async def _read_announcement(self) -> dict[str, Any] | None:
        assert self._process.stdout is not None
        text = await self._process.stdout.read(_ANNOUNCEMENT_BYTES)
        try:
            return dict(json.loads(text)) if text else None
        except ValueError as error:
            raise CorralError("engine_failed", "the engine announced itself in words that are not understood") from error
