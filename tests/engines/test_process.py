"""An engine's log: hostile text, kept short."""

import os
import shutil
import signal
from pathlib import Path

import pytest

from corral.engines.process import EngineLog, EngineProcess

MIB = 2**20
LOADED = b"""\
0.00.601.169 I load_tensors:   CPU_Mapped model buffer size =    92.10 MiB
0.00.601.170 I load_tensors:        CUDA0 model buffer size =  1000.00 MiB
0.00.605.193 I llama_context:  CUDA_Host  output buffer size =     0.50 MiB
0.00.605.366 I llama_kv_cache:      CUDA0 KV buffer size =   180.00 MiB
0.00.767.533 I sched_reserve:        CPU compute buffer size =    18.64 MiB
"""
_BLOB = b"/home/me/.ollama/blobs/sha256-ab"
FAILED = (
    b"0.00.044.034 E llama_model_load: error loading model: tensor 'x' data is not within the file bounds of " + _BLOB + b"\n"
    b"0.00.044.124 E llama_model_load_from_file_impl: failed to load model\n"
    b"0.00.071.143 E srv    load_model: failed to load model, '" + _BLOB + b"'\n"
    b"0.00.073.921 I srv          init: exiting\n"
)


def log(*pieces: bytes) -> EngineLog:
    kept = EngineLog()
    for piece in pieces:
        kept.feed(piece)
    return kept


def test_buffers_are_summed_by_where_they_are() -> None:
    for cut in range(0, len(LOADED), 7):
        kept = log(LOADED[:cut], LOADED[cut:])
        total, vram = kept.memory_bytes(2000 * MIB)
        assert (total, vram) == (round((92.10 + 1000 + 0.5 + 180 + 18.64) * MIB), 1180 * MIB)


def test_buffers_of_the_final_load_replace_those_of_a_trial() -> None:
    assert log(LOADED, LOADED).memory_bytes(2000 * MIB) == log(LOADED).memory_bytes(2000 * MIB)


def test_file_that_is_mapped_past_what_an_accelerator_holds_counts_once() -> None:
    assert log(LOADED).memory_bytes(1050 * MIB)[0] == round((1050 + 0.5 + 180 + 18.64) * MIB)


def test_model_whose_layers_are_all_on_an_accelerator_is_wholly_there() -> None:
    offloaded = b"0.00.6 I load_tensors: offloaded 31/31 layers to GPU\n"
    assert log(LOADED, offloaded).memory_bytes(2000 * MIB) == (1180 * MIB, 1180 * MIB)
    overflowing = b"0.00.6 I common_params_fit_impl:   - CUDA0: 31 layers ( 2 overflowing),  100 MiB used\n"
    partly = log(LOADED, offloaded, overflowing).memory_bytes(2000 * MIB)
    assert partly[0] > partly[1] == 1180 * MIB
    some = b"0.00.6 I load_tensors: offloaded 30/31 layers to GPU\n"
    assert log(LOADED, some).memory_bytes(2000 * MIB)[0] > 1180 * MIB


def test_engine_that_says_nothing_of_its_buffers_has_none() -> None:
    assert log(b"0.00.1 I srv: hello\n").memory_bytes(5) == (0, 0)


@pytest.mark.parametrize(
    "line",
    [
        "ggml_backend_cuda_buffer_type_alloc_buffer: allocating 852.89 MiB on device 0: cudaMalloc failed: out of memory",
        "alloc_tensor_range: failed to allocate CPU buffer of size 96636764160",
        "ggml_vulkan: Device memory allocation of size 1 failed. vk::Device::allocateMemory: ErrorOutOfDeviceMemory",
        "terminate called after throwing an instance of 'std::bad_alloc'",
    ],
)
def test_want_of_memory_is_told_from_other_ends(line: str) -> None:
    assert log(f"0.00.6 E {line}\n".encode(), b"0.00.7 I srv: exiting\n").is_out_of_memory
    assert not log(FAILED).is_out_of_memory
    assert not log(
        b"E sched_reserve: failed to allocate compute buffers, retrying without pipeline parallelism\n"
    ).is_out_of_memory
    assert not log(f"0.00.6 E {line}\n".encode(), b"0.00.7 I srv: serving\n" * 100).is_out_of_memory


def test_last_words_are_the_first_errors_without_folders() -> None:
    assert log(LOADED, FAILED).last_words() == (
        "llama_model_load: error loading model: tensor 'x' data is not within the file bounds of sha256-ab; "
        "llama_model_load_from_file_impl: failed to load model"
    )


def test_last_words_without_errors_are_the_last_lines_even_unfinished() -> None:
    assert log(b"one\ntwo\nImportError: libgomp.so.1: cannot open").last_words() == "two; ImportError: libgomp.so.1: cannot open"
    assert log().last_words() == ""


def test_lines_are_cut_and_hold_no_control_characters() -> None:
    words = log(b"\x1b[31mred\x07\r\xff" + b"x" * 10_000 + b"\n").last_words()
    assert words.startswith("[31mred\ufffdx")
    assert len(words) <= 400


def test_endless_line_is_not_kept() -> None:
    kept = EngineLog()
    for _ in range(1000):
        kept.feed(b"y" * 65536)
    assert len(kept.last_words()) <= 400


def test_lines_are_counted_and_only_the_last_are_kept() -> None:
    kept = log(b"line\n" * 5000)
    assert kept.count == 5000
    assert len(kept._lines) <= 200


@pytest.mark.parametrize(("after", "outcome"), [(8, "signal 9, for want of memory"), (7, "signal 9")])
async def test_process_that_the_kernel_kills_has_ended_for_want_of_memory(tmp_path: Path, after: int, outcome: str) -> None:
    """A kill leaves no words behind: only the kernel's own count tells it from anybody else's."""
    counts = tmp_path / "proc/vmstat"
    counts.parent.mkdir()
    counts.write_text("oom_kill 7\n")
    argv = [shutil.which("sleep") or "", "600"]
    process = await EngineProcess.start({"argv": argv, "environment": {}}, {}, root=tmp_path)
    try:
        counts.write_text(f"oom_kill {after}\n")
        os.kill(process.pid, signal.SIGKILL)
        assert await process.ended(timeout_s=60)
        assert (process.outcome, process.is_out_of_memory) == (outcome, after > 7)
    finally:
        await process.kill()
