"""The child's own protocol: one line of configuration in, one line out, and an end when its parent's end of stdin closes."""

import asyncio
import json
import os
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from corral.core.ports import LoadOptions
from corral.engines import process
from corral.engines.launch import child_settings, plan
from fakes_engine import eventually, weights

CHILD = str(Path(process.__file__).with_name("llama_child.py"))
PRETENDER = str(Path(__file__).with_name("pretend_llama_server.py"))
#: Runs the child as on a system whose kernel cannot tie it to its parent.
UNGUARDED = f"import runpy, sys; sys.platform = 'other'; runpy.run_path({CHILD!r}, run_name='__main__')"


@asynccontextmanager
async def child(configuration: dict[str, Any], *arguments: str) -> AsyncIterator[asyncio.subprocess.Process]:
    """The child, configured. Killed at the end if it still runs."""
    pipe = asyncio.subprocess.PIPE
    command = [sys.executable, "-P", "-E", *(arguments or (CHILD,))]
    started = await asyncio.create_subprocess_exec(*command, stdin=pipe, stdout=pipe, stderr=pipe)
    assert started.stdin is not None
    started.stdin.write(json.dumps({"parent": os.getpid(), **configuration}).encode() + b"\n")
    try:
        yield started
    finally:
        if started.returncode is None:
            started.kill()
        await started.communicate()


async def test_child_of_another_parent_ends_at_once() -> None:
    if sys.platform != "linux":
        pytest.skip("only Linux tells the parent apart")
    async with child({"parent": 1, "settings": {}}) as started:
        assert await asyncio.wait_for(started.wait(), 10) == 1


async def test_child_that_is_told_nonsense_says_so_in_one_line() -> None:
    async with child({"settings": {"model": "/x"}}) as started:
        out, err = await started.communicate()
    assert started.returncode == 1
    assert out == b""
    assert err.decode().strip() == "KeyError: 'key'"


async def test_child_announces_itself_and_ends_when_stdin_does(small_model: Path) -> None:
    wanted = plan(weights(weights=str(small_model)), LoadOptions(num_ctx=256), threads=1)
    async with child({"settings": child_settings(wanted, "k")}) as started:
        assert started.stdout is not None
        assert started.stdin is not None
        announced = json.loads(await asyncio.wait_for(started.stdout.read(4096), 60))
        assert announced["url"].startswith("http://127.0.0.1:")
        started.stdin.close()
        assert await asyncio.wait_for(started.wait(), 10) == 0


async def test_r19_child_without_the_kernels_help_watches_over_its_llama_server(tmp_path: Path) -> None:
    report, model = tmp_path / "report.json", tmp_path / "model.gguf"
    model.write_bytes(b"GGUF" + json.dumps({"report": str(report), "hang": True}).encode())
    argv = [sys.executable, PRETENDER, "--model", str(model), "--port", "0"]
    async with child({"argv": argv, "environment": {}}, "-c", UNGUARDED) as started:

        async def has_started() -> bool:
            return report.exists() and report.read_text().endswith("}")

        await eventually(has_started)
        pid = json.loads(report.read_text())["pid"]
        assert pid != started.pid
        assert started.stdin is not None
        started.stdin.close()
        assert await asyncio.wait_for(started.wait(), 10) != 0
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)
