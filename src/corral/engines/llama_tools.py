"""llama.cpp's programs for making GGUF files (`ModelTools`): looked for on the search path, run as children that hold no secret.

They read files that strangers made. So they get nothing of our environment but where libraries and devices are, a home directory
of their own, no network for the libraries that would fetch a model's own code, and no arguments that a caller chose.
"""

import asyncio
import contextlib
import os
import re
import shutil
import signal
from collections import deque
from collections.abc import Callable, Mapping
from pathlib import Path

from corral.engines.launch import scrubbed
from corral.wire.errors import CorralError

_QUANTIZE, _SPLIT = ("llama-quantize",), ("llama-gguf-split",)
_CONVERT = ("convert_hf_to_gguf.py", "convert_hf_to_gguf", "convert-hf-to-gguf")
_CONVERT_ADAPTER = ("convert_lora_to_gguf.py", "convert_lora_to_gguf", "convert-lora-to-gguf")
#: `[  42/ 200] blk.4.attn_q.weight …`
_PROGRESS = re.compile(rb"\[\s*([0-9]{1,9})/\s*([0-9]{1,9})\]")
_PATH = re.compile(r"(?:/[^\s/'\"]+)+/([^\s/'\"]+)")
_KEPT_LINES, _LINE_BYTES = 20, 400
#: Libraries for models fetch code that a config names, unless they are told not to.
_OFFLINE = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "PYTHONNOUSERSITE": "1"}


class LlamaTools:
    """The programs on a search path. environment: all variables, of which the programs get a few."""

    def __init__(self, search_path: str, environment: Mapping[str, str]) -> None:
        self._search_path = search_path
        self._environment = scrubbed(environment)

    async def quantize(self, source: str, target: str, kind: str, progress: Callable[[float], None]) -> None:
        """kind: `Q4_K_M` … progress: between 0 and 1. Raises: not_supported, engine_failed."""
        program = self._find(_QUANTIZE, "quantizing a model")
        await self._run([program, source, target, kind], target, progress)

    async def merge(self, first: str, target: str) -> None:
        """One GGUF file out of its parts. Raises: not_supported, engine_failed."""
        program = self._find(_SPLIT, "a GGUF file of several parts")
        await self._run([program, "--merge", first, target], target)

    async def convert(self, directory: str, target: str) -> None:
        """A GGUF file out of safetensors. Raises: not_supported, engine_failed."""
        program = self._find(_CONVERT, "converting safetensors")
        await self._run([program, "--outfile", target, "--outtype", "auto", directory], target)

    async def convert_adapter(self, directory: str, target: str, base: str) -> None:
        """A GGUF adapter out of safetensors. base: holds the base model's config.json. Raises: not_supported, engine_failed."""
        program = self._find(_CONVERT_ADAPTER, "converting an adapter")
        await self._run([program, "--outfile", target, "--base", base, directory], target)

    def _find(self, names: tuple[str, ...], purpose: str) -> str:
        for name in names:
            if found := shutil.which(name, path=self._search_path):
                return str(Path(found).absolute())
        raise CorralError(
            "not_supported",
            f"{purpose} needs llama.cpp's {names[0]}, which is not on this server's PATH; install it and try again",
        )

    async def _run(self, arguments: list[str], target: str, progress: Callable[[float], None] = lambda _: None) -> None:
        """Run a program to its end; its files are made in the target's directory. Canceling ends it and all its children."""
        place = str(Path(target).parent)
        starting = asyncio.create_task(
            asyncio.create_subprocess_exec(
                *arguments,
                stdin=asyncio.subprocess.DEVNULL,
                stdout=asyncio.subprocess.PIPE,
                stderr=asyncio.subprocess.STDOUT,
                cwd=place,
                env={**self._environment, **_OFFLINE, "HOME": place, "TMPDIR": place},
                start_new_session=True,
            )
        )
        try:
            # Canceled in the middle of it, asyncio would end the program alone, which may have started others by then.
            process = await asyncio.shield(starting)
            last_words = await _listen(process, progress)
            status = await process.wait()
        finally:
            await _end(starting)
        if status != 0 or not await asyncio.to_thread(os.path.isfile, target):
            raise CorralError("engine_failed", f"{Path(arguments[0]).name} failed: {last_words or f'it ended with {status}'}")


async def _end(starting: "asyncio.Task[asyncio.subprocess.Process]") -> None:
    """End a program, which may be starting yet, with its whole group: what it started must not outlive it either."""
    with contextlib.suppress(OSError):
        process = await starting
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        await process.wait()


async def _listen(process: asyncio.subprocess.Process, progress: Callable[[float], None]) -> str:
    """Follow what a program prints until it closes its output; its last words, without paths."""
    assert process.stdout is not None
    kept: deque[bytes] = deque(maxlen=_KEPT_LINES)
    rest = b""
    while data := await process.stdout.read(64 * 1024):
        *lines, rest = re.split(rb"[\r\n]+", rest[:_LINE_BYTES] + data)
        kept.extend(line[:_LINE_BYTES] for line in lines if line.strip())
        # The bar is redrawn on one line, which may not have ended.
        if steps := _PROGRESS.findall(rest or (lines[-1] if lines else b"")):
            done, total = map(int, steps[-1])
            progress(min(done / total, 1.0) if total else 0.0)
    if rest.strip():
        kept.append(rest[:_LINE_BYTES])
    words = [line.decode("utf-8", "replace") for line in kept]
    shown = "; ".join("".join(char for char in line if char.isprintable()).strip() for line in words[-2:])
    return _PATH.sub(r"\1", shown)
