"""What an engine is started with. Nothing that a request or a model says may become a flag or a variable."""

from dataclasses import replace

import pytest

from corral.core.ports import LoadOptions
from corral.engines.launch import (
    ALLOWED_FLAGS,
    CACHE_TYPES,
    Tuning,
    child_settings,
    llama_server_arguments,
    plan,
    scrubbed,
)
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
        "ctx_shift": False,
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


def test_answers_that_fill_the_context_go_on_but_not_where_texts_are_embedded() -> None:
    assert "--context-shift" in arguments(options=LoadOptions(context_shift=True))
    assert child_settings(plan(FULL, LoadOptions(context_shift=True), threads=2), "s3cret")["ctx_shift"] is True
    for options in (LoadOptions(), LoadOptions(context_shift=True, embedding=True)):
        assert "--context-shift" not in arguments(options=options)


@pytest.mark.parametrize("cache_type", CACHE_TYPES)
def test_cache_is_stored_as_the_operator_wants(cache_type: str) -> None:
    wanted = plan(FULL, LoadOptions(), threads=2, tuning=Tuning(cache_type=cache_type))
    text = " ".join(llama_server_arguments(wanted, "/l", port=1))
    assert f"--cache-type-k {cache_type} --cache-type-v {cache_type}" in text
    assert child_settings(wanted, "k")["cache_type"] == cache_type


def test_t096_cache_type_that_is_none_is_refused() -> None:
    with pytest.raises(CorralError, match="OLLAMA_KV_CACHE_TYPE"):
        plan(FULL, LoadOptions(), threads=2, tuning=Tuning(cache_type="q8_0 --log-file=/x"))


@pytest.mark.parametrize(("wanted", "said"), [(True, "--flash-attn on"), (False, "--flash-attn off"), (None, None)])
def test_flash_attention_is_as_the_operator_wants(wanted: bool | None, said: str | None) -> None:
    made = plan(FULL, LoadOptions(), threads=2, tuning=Tuning(flash_attention=wanted))
    text = " ".join(llama_server_arguments(made, "/l", port=1))
    assert said in text if said else "--flash-attn" not in text
    assert child_settings(made, "k").get("flash_attention") is wanted


@pytest.mark.parametrize(("layers", "is_here"), [(0, True), (29, True), (30, False), (99, False), (None, False)])
def test_projector_stays_in_main_memory_where_layers_do(layers: int | None, is_here: bool) -> None:
    model = weights(projector="/models/eye", metadata={"general.architecture": "llama", "llama.block_count": 30})
    made = plan(model, LoadOptions(num_gpu=layers), threads=2)
    assert ("--no-mmproj-offload" in llama_server_arguments(made, "/l", port=1)) is is_here
    assert child_settings(made, "k").get("mmproj_use_gpu") is (False if is_here else None)
    assert not plan(replace(model, projector=None), LoadOptions(num_gpu=layers), threads=2).keeps_projector_here


def test_pictures_have_the_tokens_that_a_family_needs() -> None:
    seeing = weights(projector="/models/eye", metadata={"general.architecture": "qwen25vl"})
    made = plan(seeing, LoadOptions(), threads=2)
    assert "--image-min-tokens 1024" in " ".join(llama_server_arguments(made, "/l", port=1))
    assert child_settings(made, "k")["image_min_tokens"] == 1024
    assert plan(FULL, LoadOptions(), threads=2).image_tokens is None


def test_embedding_takes_texts_as_long_as_the_context_up_to_a_bound() -> None:
    for context, batch in ((512, 512), (8192, 8192), (100_000, 8192)):
        assert plan(weights(), LoadOptions(num_ctx=context, embedding=True), threads=2).physical_batch == batch
    assert plan(weights(), LoadOptions(num_ctx=4096), threads=2).physical_batch is None


@pytest.mark.parametrize(
    ("asked", "is_embedding", "taken"), [(3, False, 4), (10, False, 12), (512, False, 512), (None, True, 12)]
)
def test_batch_is_shared_evenly_by_the_slots(asked: int | None, is_embedding: bool, taken: int) -> None:
    options = LoadOptions(num_ctx=10, num_batch=asked, parallel=4, embedding=is_embedding)
    assert plan(weights(), options, threads=2).physical_batch == taken


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
        "HIP_VISIBLE_DEVICES": "0",
        "GGML_VK_VISIBLE_DEVICES": "0",
        "GPU_DEVICE_ORDINAL": "0",
        "HSA_OVERRIDE_GFX_VERSION": "10.3.0",
        "LLAMA_ARG_FIT": "off",
        "LLAMA_ARG_FIT_TARGET": "512",
    }
    secret = dict.fromkeys(["CORRAL_HOME", "CORRAL_DATABASE_URL", "OLLAMA_API_KEY", "AWS_SECRET_ACCESS_KEY", "HF_TOKEN"], "x")
    meddling = dict.fromkeys(["LD_PRELOAD", "PYTHONPATH", "LLAMA_API_KEY", "LLAMA_ARG_HOST", "HOME", "path"], "x")
    assert scrubbed({**kept, **secret, **meddling}) == {**kept, "GGML_NO_BACKTRACE": "1"}
