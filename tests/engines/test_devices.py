"""What an engine says it could compute on."""

import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from corral.engines.devices import Accelerators, find_accelerators, parse_devices

LISTED = """\
ggml_cuda_init: found 2 CUDA devices:
Available devices:
  CUDA0: NVIDIA GeForce RTX 4090 (24217 MiB, 23500 MiB free)
  CUDA1: NVIDIA (odd) card (8192 MiB, 12 MiB free)
  BLAS: OpenBLAS (0 MiB, 0 MiB free)
"""
MIB = 2**20


def test_devices_are_counted_and_their_memory_summed() -> None:
    assert parse_devices(LISTED) == Accelerators(count=2, memory_bytes=(24217 + 8192) * MIB)


@pytest.mark.parametrize("text", ["", "Available devices:\n", "  CPU: AMD EPYC (24000 MiB, 1 MiB free)\n", "(1 MiB, 1 MiB free)"])
def test_machine_without_accelerators_has_none(text: str) -> None:
    assert parse_devices(text) == Accelerators()


@pytest.fixture
def lister(tmp_path: Path) -> Callable[[str], str]:
    """Makes a program that runs a line of Python."""

    def make(line: str) -> str:
        program = tmp_path / "llama-server"
        program.write_text(f"#!{sys.executable}\nimport os, sys\n{line}\n")
        program.chmod(0o755)
        return str(program)

    return make


async def test_llama_server_is_asked_without_secrets(lister: Callable[[str], str]) -> None:
    program = lister(f"assert sys.argv[1:] == ['--list-devices'] and 'OLLAMA_API_KEY' not in os.environ\nprint({LISTED!r})")
    found = await find_accelerators(program, {"OLLAMA_API_KEY": "x", "PATH": "/bin"})
    assert found.count == 2


@pytest.mark.parametrize("line", ["sys.exit(1)", "print('x' * 100_000)", "os.close(1)"])
async def test_llama_server_that_does_not_tell_has_none(lister: Callable[[str], str], line: str) -> None:
    assert await find_accelerators(lister(line), {}) == Accelerators()


async def test_llama_server_that_is_not_there_has_none(tmp_path: Path) -> None:
    assert await find_accelerators(str(tmp_path / "gone"), {}) == Accelerators()


@pytest.mark.engine
async def test_built_in_engine_is_asked_in_a_child() -> None:
    pytest.importorskip("xllamacpp")
    found = await find_accelerators("", {})
    assert (found.count == 0) == (found.memory_bytes == 0)
