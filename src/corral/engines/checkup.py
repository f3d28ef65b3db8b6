"""Whether the engine of this installation starts at all: asked of the engine, without a model."""

import asyncio
import contextlib
import re
from collections.abc import Mapping
from pathlib import Path

from corral.engines.launch import scrubbed
from corral.engines.process import EngineProcess
from corral.wire.errors import CorralError

_PATIENCE_S = 10.0
_ANSWER_BYTES = 64 * 1024
#: `version: 6527 (3c3635d2f)`. Source: llama.cpp common/arg.cpp.
_VERSION = re.compile(r"^version: ([0-9]+)", re.MULTILINE)


async def try_engine(llama_server: str, environment: Mapping[str, str]) -> str:
    """Start what would run models, have it load its libraries, and end it. llama_server, environment: as LlamaCppEngine. Returns
    what it is called. Raises: engine_failed, with its last words."""
    try:
        async with asyncio.timeout(_PATIENCE_S):
            if llama_server:
                return await _try_program(llama_server, scrubbed(environment))
            return await _try_library(scrubbed(environment))
    except TimeoutError as error:
        raise CorralError("engine_failed", f"the engine did not start within {_PATIENCE_S:.0f} s") from error


async def _try_library(environment: Mapping[str, str]) -> str:
    process = await EngineProcess.start({"devices": True}, environment)
    try:
        # The time limit is the caller's.
        if await process.announced(timeout_s=2 * _PATIENCE_S) is None:
            await process.ended(timeout_s=2 * _PATIENCE_S)
            raise CorralError("engine_failed", f"the engine does not start ({process.outcome}): {process.last_words()}")
    finally:
        await process.kill()
    return "llama.cpp, embedded"


async def _try_program(program: str, environment: Mapping[str, str]) -> str:
    name = Path(program).name
    pipe, nothing = asyncio.subprocess.PIPE, asyncio.subprocess.DEVNULL
    try:
        process = await asyncio.create_subprocess_exec(
            program, "--version", stdin=nothing, stdout=pipe, stderr=asyncio.subprocess.STDOUT, env=dict(environment), cwd="/"
        )
    except OSError as error:
        raise CorralError("engine_failed", f"{name} cannot be started: {error.strerror}") from error
    assert process.stdout is not None
    try:
        said = bytearray()
        while (data := await process.stdout.read(4096)) and len(said) < _ANSWER_BYTES:
            said += data
        status = await process.wait() if len(said) < _ANSWER_BYTES else 1
    finally:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        await process.wait()
    text = said.decode("utf-8", "replace")
    if status != 0:
        last = (text.strip().splitlines() or ["it said nothing"])[-1]
        raise CorralError("engine_failed", f"{name} does not start (exit status {status}): {last[:300]}")
    version = _VERSION.search(text)
    return f"{name} {version[1]}" if version else name
