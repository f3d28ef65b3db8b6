"""llama.cpp's programs: how they are found, what they are given, what they may not see, and how they end."""

import asyncio
import os
from pathlib import Path
from typing import Any

import pytest

from corral.engines.llama_tools import LlamaTools
from corral.wire.errors import CorralError

#: Writes what it was given, and its environment, into its target, which is the first argument behind the source.
RECORDS = '#!/bin/sh\nprintf "%s\\n" "$0" "$@" > "$TMPDIR/arguments"\nenv > "$TMPDIR/environment"\npwd > "$TMPDIR/place"\n'


@pytest.fixture
def programs(tmp_path: Path) -> Path:
    folder = tmp_path / "programs"
    folder.mkdir()
    return folder


@pytest.fixture
def work(tmp_path: Path) -> Path:
    folder = tmp_path / "work"
    folder.mkdir()
    return folder


@pytest.fixture
def tools(programs: Path) -> LlamaTools:
    environment = {"PATH": os.environ["PATH"], "OLLAMA_API_KEY": "secret", "HOME": "/root", "CUDA_VISIBLE_DEVICES": "0"}
    return LlamaTools(str(programs), environment)


def install(programs: Path, name: str, script: str) -> None:
    path = programs / name
    path.write_text(script)
    path.chmod(0o755)


async def test_quantize_gives_the_program_three_arguments_and_reads_its_progress(
    tools: LlamaTools, programs: Path, work: Path
) -> None:
    install(programs, "llama-quantize", RECORDS + 'echo "[   1/   4] a"; printf "[   3/   4] b\\r"; cp "$1" "$2"\n')
    (work / "in").write_bytes(b"weights")
    seen: list[float] = []
    await tools.quantize(f"{work}/in", f"{work}/out", "Q8_0", seen.append)
    assert (work / "out").read_bytes() == b"weights"
    assert (work / "arguments").read_text().split("\n")[1:-1] == [f"{work}/in", f"{work}/out", "Q8_0"]
    assert seen[-1] == 0.75
    assert (work / "place").read_text().strip() == str(work)


async def test_t109_programs_see_no_secret_and_no_network_of_models(tools: LlamaTools, programs: Path, work: Path) -> None:
    install(programs, "convert_hf_to_gguf.py", RECORDS + 'touch "$2"\n')
    await tools.convert(f"{work}/files", f"{work}/out")
    environment = dict(line.split("=", 1) for line in (work / "environment").read_text().splitlines())
    assert "secret" not in environment.values()
    assert environment["HOME"] == str(work)
    assert environment["HF_HUB_OFFLINE"] == "1"
    assert environment["CUDA_VISIBLE_DEVICES"] == "0"
    assert (work / "arguments").read_text().split("\n")[1:-1] == [
        "--outfile",
        f"{work}/out",
        "--outtype",
        "auto",
        f"{work}/files",
    ]


async def test_parts_are_merged_and_adapters_converted_over_their_base(tools: LlamaTools, programs: Path, work: Path) -> None:
    install(programs, "llama-gguf-split", 'for last; do :; done; printf "%s" "$*" > "$last"\n'.join(["#!/bin/sh\n", ""]))
    await tools.merge(f"{work}/m-00001-of-00002.gguf", f"{work}/out")
    assert (work / "out").read_text() == f"--merge {work}/m-00001-of-00002.gguf {work}/out"
    install(programs, "convert-lora-to-gguf", '#!/bin/sh\nprintf "%s" "$*" > "$2"\n')
    await tools.convert_adapter(f"{work}/files", f"{work}/adapter", f"{work}/base")
    assert (work / "adapter").read_text() == f"--outfile {work}/adapter --base {work}/base {work}/files"


async def test_program_that_is_not_there_is_named(tools: LlamaTools, work: Path) -> None:
    with pytest.raises(CorralError, match="llama-quantize, which is not on this server's PATH") as caught:
        await tools.quantize(f"{work}/in", f"{work}/out", "Q8_0", lambda _: None)
    assert caught.value.code == "not_supported"


@pytest.mark.parametrize(
    ("script", "says"),
    [
        (
            "echo one; echo \"error: '/secret/place/model.gguf' is bad\"; exit 3",
            "llama-gguf-split failed: one; error: 'model.gguf' is bad",
        ),
        ("exit 3", "llama-gguf-split failed: it ended with 3"),
        ("printf '\\033[31mbad\\033[0m'; exit 1", "llama-gguf-split failed: [31mbad[0m"),
        ("exit 0", "llama-gguf-split failed: it ended with 0"),
    ],
)
async def test_program_that_fails_is_quoted_without_paths_and_controls(
    tools: LlamaTools, programs: Path, work: Path, script: str, says: str
) -> None:
    install(programs, "llama-gguf-split", f"#!/bin/sh\n{script}\n")
    with pytest.raises(CorralError) as caught:
        await tools.merge(f"{work}/in", f"{work}/out")
    assert (caught.value.code, caught.value.message) == ("engine_failed", says)


async def test_program_that_never_stops_talking_is_not_remembered(tools: LlamaTools, programs: Path, work: Path) -> None:
    install(programs, "llama-gguf-split", "#!/bin/sh\nhead -c 3000000 /dev/zero; echo; echo last; exit 1\n")
    with pytest.raises(CorralError) as caught:
        await tools.merge(f"{work}/in", f"{work}/out")
    assert caught.value.message.endswith("last")
    assert len(caught.value.message) < 1000


async def test_canceling_ends_the_program_and_what_it_started(tools: LlamaTools, programs: Path, work: Path) -> None:
    script = '#!/bin/sh\nsleep 1000 & echo $! > "$TMPDIR/child.new"; mv "$TMPDIR/child.new" "$TMPDIR/child"; wait\n'
    install(programs, "llama-gguf-split", script)
    running = asyncio.create_task(tools.merge(f"{work}/in", f"{work}/out"))
    while not (work / "child").exists():
        await asyncio.sleep(0.01)
    running.cancel()
    with pytest.raises(asyncio.CancelledError):
        await running
    child = int((work / "child").read_text())
    async with asyncio.timeout(20):
        while is_running(child):
            await asyncio.sleep(0.01)


async def test_canceling_while_the_program_starts_ends_what_it_started(
    tools: LlamaTools, programs: Path, work: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = '#!/bin/sh\nsleep 1000 & echo $! > "$TMPDIR/child.new"; mv "$TMPDIR/child.new" "$TMPDIR/child"; wait\n'
    install(programs, "llama-gguf-split", script)
    start, is_told = asyncio.create_subprocess_exec, asyncio.Event()

    async def slowly(*arguments: str, **options: Any) -> asyncio.subprocess.Process:
        process = await start(*arguments, **options)
        while not (work / "child").exists():
            await asyncio.sleep(0.01)
        is_told.set()
        await asyncio.sleep(0)
        return process

    monkeypatch.setattr(asyncio, "create_subprocess_exec", slowly)
    running = asyncio.create_task(tools.merge(f"{work}/in", f"{work}/out"))
    await is_told.wait()
    running.cancel()
    with pytest.raises(asyncio.CancelledError):
        await running
    async with asyncio.timeout(20):
        while is_running(int((work / "child").read_text())):
            await asyncio.sleep(0.01)


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False
