"""An engine's log: hostile text, kept short."""

from corral.engines.process import EngineLog

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
        assert kept.allocated_bytes(on_accelerator=True) == 1180 * 2**20
        assert kept.allocated_bytes(on_accelerator=False) == round((92.10 + 0.5 + 18.64) * 2**20)


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
