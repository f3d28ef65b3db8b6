"""What an engine is started with. Nothing that a request or a model says may become a flag or a variable."""

from dataclasses import replace

import pytest

from corral.core.ports import LoadOptions
from corral.engines.launch import ALLOWED_FLAGS, child_settings, llama_server_arguments, plan, scrubbed
from corral.wire.errors import CorralError
from fakes_engine import weights

EVERYTHING = LoadOptions(
    num_ctx=2048, parallel=4, num_batch=256, num_gpu=9, main_gpu=1, num_thread=3, use_mmap=False, embedding=True
)
FULL = weights(projector="/models/eye", adapters=("/models/one", "/models/two"))
EVIL_TEXTS = ["--log-file=/x", "4096\n--log-file", "$(id)", "-1", "", "/etc/passwd"]


def arguments(model: object = FULL, options: LoadOptions = EVERYTHING) -> list[str]:
    return llama_server_arguments(plan(model, options, threads=2), "/bin/llama-server", port=1234)  # type: ignore[arg-type]


@pytest.mark.parametrize("options", [LoadOptions(), EVERYTHING, LoadOptions(use_mmap=True)])
def test_t096_arguments_are_flags_of_the_list_and_harmless_values(options: LoadOptions) -> None:
    program, *words = arguments(options=options)
    assert program == "/bin/llama-server"
    flags = [word for word in words if word.startswith("-")]
    assert set(flags) <= ALLOWED_FLAGS
    values = [word for word in words if not word.startswith("-")]
    words_of_ours = ("127.0.0.1", "model", "mean", "none")
    assert all(value.isdigit() or value.startswith("/models/") or value in words_of_ours for value in values)


def test_arguments_say_what_was_asked() -> None:
    text = " ".join(arguments())
    for part in (
        "--model /models/tiny:1b",
        "--ctx-size 8192 --parallel 4",
        "--threads 3 --threads-batch 3",
        "--n-gpu-layers 9",
        "--split-mode none --main-gpu 1",
        "--pooling mean",
        "--mmproj /models/eye --lora /models/one --lora /models/two",
        "--embedding",
        "--no-mmap",
    ):
        assert part in text


@pytest.mark.parametrize("field", ["num_ctx", "parallel", "num_batch", "num_gpu", "main_gpu", "num_thread"])
@pytest.mark.parametrize("value", [*EVIL_TEXTS, -1, 10**12, 1.5, True, float("nan"), [4096]])
def test_t096_option_that_is_no_sane_number_is_refused(field: str, value: object) -> None:
    with pytest.raises(CorralError) as refused:
        plan(weights(), replace(LoadOptions(), **{field: value}), threads=2)  # type: ignore[arg-type]
    assert refused.value.status == 400


def test_context_that_is_too_large_for_all_slots_together_is_refused() -> None:
    with pytest.raises(CorralError, match="num_ctx"):
        plan(weights(), LoadOptions(num_ctx=2**30, parallel=2), threads=2)


@pytest.mark.parametrize("path", ["--log-file=/x", "-m", "relative/model", "", "/models/nul\0byte"])
@pytest.mark.parametrize("field", ["weights", "projector", "adapters"])
def test_t096_path_that_is_not_absolute_is_refused(field: str, path: str) -> None:
    model = replace(FULL, **{field: (path,) if field == "adapters" else path})  # type: ignore[arg-type]
    with pytest.raises(CorralError) as refused:
        plan(model, LoadOptions(), threads=2)
    assert refused.value.code == "bad_request"


def test_child_gets_the_same_without_a_flag() -> None:
    settings = child_settings(plan(FULL, EVERYTHING, threads=2), "s3cret")
    assert settings == {
        "model": "/models/tiny:1b",
        "key": "s3cret",
        "alias": "model",
        "verbosity": 4,
        "cache_ram_mib": 512,
        "n_ctx": 8192,
        "n_parallel": 4,
        "n_threads": 3,
        "n_batch": 2048,
        "n_ubatch": 2048,
        "n_gpu_layers": 9,
        "main_gpu": 1,
        "use_mmap": False,
        "pooling": "mean",
        "mmproj": "/models/eye",
        "adapters": ["/models/one", "/models/two"],
    }


def test_embedding_takes_texts_as_long_as_the_context_up_to_a_bound() -> None:
    for context, batch in ((512, 512), (8192, 8192), (100_000, 8192)):
        assert plan(weights(), LoadOptions(num_ctx=context, embedding=True), threads=2).physical_batch == batch
    assert plan(weights(), LoadOptions(num_ctx=4096), threads=2).physical_batch is None


def test_embedding_uses_the_pooling_that_the_model_names() -> None:
    bert = weights(metadata={"general.architecture": "bert", "bert.pooling_type": 2})
    assert plan(bert, LoadOptions(embedding=True), threads=2).pooling == "model"
    argv = llama_server_arguments(plan(bert, LoadOptions(embedding=True), threads=2), "/l", port=1)
    assert "--embedding" in argv
    assert "--pooling" not in argv


def test_threads_are_those_of_the_machine_unless_asked_otherwise() -> None:
    assert plan(weights(), LoadOptions(), threads=2).threads == 2
    assert plan(weights(), LoadOptions(num_thread=1), threads=2).threads == 1
    assert plan(weights(), LoadOptions(), threads=None).threads is None


def test_t097_environment_keeps_libraries_and_devices_and_nothing_else() -> None:
    kept = {
        "PATH": "/bin",
        "LD_LIBRARY_PATH": "/lib",
        "LANG": "C.UTF-8",
        "CUDA_VISIBLE_DEVICES": "0",
        "ROCR_VISIBLE_DEVICES": "1",
        "GGML_CUDA_NO_PINNED": "1",
        "OMP_NUM_THREADS": "2",
    }
    secret = dict.fromkeys(["CORRAL_HOME", "CORRAL_DATABASE_URL", "OLLAMA_API_KEY", "AWS_SECRET_ACCESS_KEY", "HF_TOKEN"], "x")
    meddling = dict.fromkeys(["LD_PRELOAD", "PYTHONPATH", "LLAMA_API_KEY", "LLAMA_ARG_HOST", "HOME", "path"], "x")
    assert scrubbed({**kept, **secret, **meddling}) == kept
