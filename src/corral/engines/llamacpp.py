"""The engine that runs models: llama.cpp's server in a child process, either the one inside xllamacpp or a llama-server.

A child per loaded model, because llama.cpp reads files that strangers made and ends the process it runs in when it meets one it
cannot digest. It listens on loopback with a secret of its own, and dies with us (see llama_child.py).
"""

import asyncio
import os
import shutil
import socket
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from corral.core.ports import ChatCall, Chunk, CompletionCall, Entropy, Finish, LoadOptions, Runner
from corral.core.records import Model
from corral.engines.launch import UNTUNED, Plan, Tuning, child_settings, llama_server_arguments, plan, scrubbed
from corral.engines.llama_http import LlamaHttp
from corral.engines.machine import default_threads, exhausted, is_exhausted, physical_cores, thread_environment
from corral.engines.process import EngineLog, EngineProcess
from corral.wire.errors import CorralError
from corral.wire.secrets import Secret

_GGUF_MAGIC = b"GGUF"
_KEY_BYTES = 24
_PORT_ATTEMPTS = 3
_LOOK_EVERY_S = 0.05
#: What a load may still take once the weights are in memory. Usual are a few milliseconds and megabytes.
_TEMPLATE_S, _TEMPLATE_BYTES = 60.0, 512 * 1024 * 1024
_STUCK = "the engine does not get through the model's chat template"


def find_llama_server(configured: str, search_path: str) -> str:
    """The llama-server to run: the configured one, else the first on the search path, else empty, which stands for the one inside
    xllamacpp. Raises: invalid when the configured one is no program."""
    if configured:
        found = shutil.which(str(Path(configured).expanduser()), path=search_path)
        if found is None:
            raise CorralError(
                "invalid", f"CORRAL_LLAMA_SERVER names {Path(configured).name}, which is not a program that can be run"
            )
        return str(Path(found).absolute())
    found = shutil.which("llama-server", path=search_path)
    return str(Path(found).absolute()) if found else ""


class LlamaCppEngine:
    """An Engine. llama_server: path of a llama-server, or empty for xllamacpp. environment: what this process was started with;
    the little of it that an engine may see is handed on. stall_timeout_s: how long a load may go without any sign of progress.
    tuning: for every model."""

    def __init__(
        self,
        entropy: Entropy,
        *,
        llama_server: str = "",
        environment: Mapping[str, str] | None = None,
        stall_timeout_s: float = 300.0,
        tuning: Tuning = UNTUNED,
    ) -> None:
        self._entropy = entropy
        self._llama_server = llama_server
        self._environment = scrubbed(environment or {})
        self._stall_timeout_s = stall_timeout_s
        self._tuning = tuning

    async def load(self, model: Model, options: LoadOptions) -> Runner:
        """See Engine.load."""
        wanted = plan(model, options, threads=default_threads(), tuning=self._tuning)
        await asyncio.to_thread(_check_gguf, Path(wanted.model))
        try:
            return await self._load(wanted)
        except CorralError as error:
            # llama.cpp fits the layers into an accelerator before it makes room for the projector.
            if error.code != "out_of_memory" or wanted.projector is None or wanted.keeps_projector_here:
                raise
        return await self._load(replace(wanted, keeps_projector_here=True))

    async def _load(self, wanted: Plan) -> Runner:
        environment = {**thread_environment(wanted.threads, self._environment, cores=physical_cores()), **self._environment}
        if not self._llama_server:
            key = self._new_key()
            configuration = {"settings": child_settings(wanted, key.reveal())}
            return await self._started(wanted, configuration, environment, url="", key=key)
        for _ in range(_PORT_ATTEMPTS - 1):
            port = _free_port()
            try:
                return await self._start_server(wanted, environment, port)
            except CorralError as error:
                # llama-server cannot be handed a bound socket, so somebody may have been quicker. Any other failure stands.
                if error.code != "engine_failed" or _is_free(port):
                    raise
        return await self._start_server(wanted, environment, _free_port())

    async def _start_server(self, wanted: Plan, environment: dict[str, str], port: int) -> Runner:
        key = self._new_key()
        argv = llama_server_arguments(wanted, self._llama_server, port=port)
        configuration = {"argv": argv, "environment": {**environment, "LLAMA_API_KEY": key.reveal()}}
        return await self._started(wanted, configuration, environment, url=f"http://127.0.0.1:{port}", key=key)

    async def _started(
        self, wanted: Plan, configuration: Mapping[str, object], environment: dict[str, str], *, url: str, key: Secret
    ) -> Runner:
        process = await EngineProcess.start(configuration, environment)
        try:
            return await self._ready(process, wanted.model, url, key)
        except BaseException:
            await process.kill()
            raise

    def _new_key(self) -> Secret:
        return Secret(self._entropy.bytes(_KEY_BYTES).hex())

    async def _ready(self, process: EngineProcess, weights: str, url: str, key: Secret) -> "LlamaRunner":
        """Wait until the model is loaded."""
        loop = asyncio.get_running_loop()
        watch = _LoadWatch(self._stall_timeout_s, loop.time())
        file_bytes = await asyncio.to_thread(os.path.getsize, weights)
        runner = LlamaRunner(process, url, key, file_bytes=file_bytes) if url else None
        while process.is_running:
            if runner is not None:
                await process.ended(timeout_s=_LOOK_EVERY_S)
            elif (announced := await process.announced(timeout_s=_LOOK_EVERY_S)) is not None:
                runner = LlamaRunner(process, announced["url"], key, file_bytes=file_bytes)
            if runner is not None and await runner.is_healthy():
                return runner
            watch.look(process.log, process.resident_bytes or 0, loop.time())
        words = process.last_words()
        code = "out_of_memory" if process.is_out_of_memory else "engine_failed"
        raise CorralError(code, f"the engine ended while it loaded the model ({process.outcome}): {words}")


class _LoadWatch:
    """Whether a load still gets anywhere. As long as anything moves (a line of the log, memory), it is alive, however slow the
    disk. Not so behind the weights, where the engine tries out the template that came with them: one that never ends would take
    all memory there is, and look alive."""

    def __init__(self, stall_timeout_s: float, now_s: float) -> None:
        self._stall_timeout_s = stall_timeout_s
        self._seen = (-1, -1)
        self._seen_at_s = now_s
        self._read: tuple[int, float] | None = None

    def look(self, log: EngineLog, resident_bytes: int, now_s: float) -> None:
        """Once in a while. Raises: engine_failed when it is time to give up."""
        if (log.count, resident_bytes) != self._seen:
            self._seen, self._seen_at_s = (log.count, resident_bytes), now_s
        elif now_s - self._seen_at_s > self._stall_timeout_s:
            raise CorralError("engine_failed", f"timed out waiting for the engine to start: {log.last_words()}")
        if not log.has_slots:
            return
        if self._read is None:
            self._read = (resident_bytes, now_s)
        bytes_then, then_s = self._read
        if resident_bytes - bytes_then > _TEMPLATE_BYTES or now_s - then_s > _TEMPLATE_S:
            raise CorralError("engine_failed", _STUCK)


def _free_port() -> int:
    try:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            return int(probe.getsockname()[1])
    except OSError as error:
        raise exhausted() from error


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        # As servers do: a port that only old connections linger on counts as free.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
        return True


def _check_gguf(path: Path) -> None:
    """llama.cpp would refuse such a file as well, but with words that help nobody. Raises: bad_request."""
    try:
        with path.open("rb") as file:
            magic = file.read(len(_GGUF_MAGIC))
    except OSError as error:
        if is_exhausted(error):
            raise exhausted() from error
        raise CorralError(
            "bad_request", f"the model's weights ({path.name}) cannot be read: {os.strerror(error.errno or 0)}"
        ) from error
    if magic != _GGUF_MAGIC:
        raise CorralError("bad_request", f"the model's weights ({path.name}) are not a GGUF file; pull or create the model again")


class LlamaRunner:
    """A Runner: one child process with one model, and the calls to it. file_bytes: of its weights."""

    def __init__(self, process: EngineProcess, url: str, key: Secret, *, file_bytes: int) -> None:
        self._process = process
        self._file_bytes = file_bytes
        self._http = LlamaHttp(url, key, self._explain, stop=self._give_up)
        self._is_given_up = False

    @property
    def pid(self) -> int:
        """The engine's process."""
        return self._process.pid

    def chat(self, call: ChatCall) -> AsyncIterator[Chunk | Finish]:
        """See Runner.chat."""
        return self._http.chat(call)

    def complete(self, call: CompletionCall) -> AsyncIterator[Chunk | Finish]:
        """See Runner.complete."""
        return self._http.complete(call)

    async def embed(self, texts: Sequence[str]) -> tuple[list[list[float]], int]:
        """See Runner.embed."""
        return await self._http.embed(texts)

    async def tokenize(self, text: str, *, add_special: bool = True) -> list[int]:
        """See Runner.tokenize."""
        return await self._http.tokenize(text, add_special=add_special)

    async def apply_template(self, call: ChatCall) -> str:
        """See Runner.apply_template."""
        return await self._http.apply_template(call)

    async def is_healthy(self) -> bool:
        """Whether the process lives and answers."""
        return self._process.is_running and await self._http.is_healthy()

    async def close(self) -> None:
        """See Runner.close."""
        await self._process.kill()

    @property
    def memory_bytes(self) -> tuple[int, int]:
        """What the engine's log says it allocated; its resident memory, should it say nothing."""
        total, accelerator = self._process.log.memory_bytes(self._file_bytes)
        return (total, accelerator) if total else (self._process.resident_bytes or self._file_bytes, 0)

    async def _give_up(self) -> None:
        self._is_given_up = True
        await self._process.kill()

    async def _explain(self) -> CorralError:
        """What became of the engine that gives no answer. A process that has just died needs a moment until its end is known."""
        if not await self._process.ended(timeout_s=1.0):
            return CorralError("engine_failed", "the engine stopped answering")
        if self._is_given_up:
            return CorralError("engine_failed", _STUCK)
        code = "out_of_memory" if self._process.is_out_of_memory else "engine_failed"
        return CorralError(code, f"the engine ended ({self._process.outcome})")
