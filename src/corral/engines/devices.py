"""Which accelerators an engine would find, asked of the engine itself: it alone knows what its build can use.

Source: `llama-server --list-devices`, llama.cpp common/arg.cpp; ggml_backend_dev_type.
"""

import asyncio
import contextlib
import re
from collections.abc import Mapping
from dataclasses import dataclass

from corral.engines.launch import scrubbed
from corral.engines.process import EngineProcess
from corral.wire.errors import CorralError

_PATIENCE_S = 20.0
_ANSWER_BYTES = 64 * 1024
# `  CUDA0: NVIDIA GeForce RTX 4090 (24217 MiB, 23500 MiB free)`
_DEVICE = re.compile(r"^ +(\S+): .*\(([0-9]{1,9}) MiB, [0-9]+ MiB free\) *$", re.MULTILINE)
_MIB = 1024 * 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class Accelerators:
    """What is there beside the processor: how many, and their memory together."""

    count: int = 0
    memory_bytes: int = 0


async def find_accelerators(llama_server: str, environment: Mapping[str, str]) -> Accelerators:
    """llama_server, environment: as LlamaCppEngine. None are found where the engine does not tell: models still load, with the
    cautious defaults of a machine without."""
    try:
        async with asyncio.timeout(_PATIENCE_S):
            if llama_server:
                return parse_devices(await _listed(llama_server, scrubbed(environment)))
            return await _asked(scrubbed(environment))
    except (TimeoutError, CorralError, OSError):
        return Accelerators()


def parse_devices(text: str) -> Accelerators:
    """What llama-server lists; processors and their helpers (`BLAS`) are not among what counts."""
    found = [int(size_mib) for name, size_mib in _DEVICE.findall(text) if not name.startswith(("CPU", "BLAS"))]
    return Accelerators(count=len(found), memory_bytes=sum(found) * _MIB)


async def _listed(llama_server: str, environment: Mapping[str, str]) -> str:
    pipe, nothing = asyncio.subprocess.PIPE, asyncio.subprocess.DEVNULL
    process = await asyncio.create_subprocess_exec(
        llama_server, "--list-devices", stdin=nothing, stdout=pipe, stderr=nothing, env=dict(environment), cwd="/"
    )
    assert process.stdout is not None
    try:
        said = bytearray()
        while (data := await process.stdout.read(4096)) and len(said) < _ANSWER_BYTES:
            said += data
        return said.decode("utf-8", "replace")
    finally:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        await process.wait()


async def _asked(environment: Mapping[str, str]) -> Accelerators:
    process = await EngineProcess.start({"devices": True}, environment)
    try:
        told = await process.announced(timeout_s=_PATIENCE_S)
    finally:
        await process.kill()
    devices = (told or {}).get("devices", [])
    own = [size for kind, size in devices if kind == "GPU"]
    # What shares main memory counts only where there is nothing better, which is how llama.cpp chooses, too.
    used = own or [size for kind, size in devices if kind == "IGPU"]
    return Accelerators(count=len(used), memory_bytes=sum(used))
