"""What an engine process is started with: the settings, the arguments and the environment, all built from closed tables.

Nothing here starts anything. A value reaches llama.cpp only through a field of `Plan`, typed and ranged, so no option of a
request can become a flag (CVE-2026-28400 was `--log-file` in a model's options); environment variables pass only when they are on
the list, so an engine, which reads files that strangers made, never holds a secret of ours.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from corral.core.ports import LoadOptions
from corral.core.records import Model
from corral.wire.errors import CorralError

#: The name the engine gives the model in its answers; its default would be the path of the file.
ALIAS = "model"
#: llama.cpp's level that prints buffer sizes, which is how the memory on accelerators is known. Prompts are not printed at it.
_VERBOSITY = 4
#: Old prompts kept in main memory for reuse. llama.cpp's default is 8 GiB, which on a small machine is all there is.
_CACHE_RAM_MIB = 512
#: An input to be embedded has to fit one physical batch. Its buffers are touched only as far as they are used.
_MAX_EMBEDDING_BATCH = 8192

_MAX_CONTEXT = 2**31 - 1
_LIMITS: Mapping[str, tuple[int, int]] = {
    "num_ctx": (1, _MAX_CONTEXT),
    "parallel": (1, 256),
    "num_batch": (1, 1 << 20),
    "num_gpu": (0, 10_000),
    "main_gpu": (0, 127),
    "num_thread": (1, 1024),
}
#: What keys and values of the cache may be stored as. Source: llama.cpp common/arg.cpp kv_cache_types.
CACHE_TYPES = ("f16", "f32", "bf16", "q8_0", "q4_0", "q4_1", "iq4_nl", "q5_0", "q5_1")
#: These count and point badly with fewer tokens for a picture than that. Source: ollama llm/llama_server.go qwenVLServerArgs.
_IMAGE_TOKENS = {"qwen2vl": 1024, "qwen25vl": 1024, "qwen3vl": 1024, "qwen3vlmoe": 1024}

_ENVIRONMENT_NAMES = frozenset(
    {"PATH", "LANG", "LC_ALL", "LC_CTYPE", "LD_LIBRARY_PATH", "DYLD_LIBRARY_PATH", "TMPDIR", "TEMP", "TMP", "SYSTEMROOT"}
    | {"GPU_DEVICE_ORDINAL", "ONEAPI_DEVICE_SELECTOR", "LLAMA_ARG_FIT", "LLAMA_ARG_FIT_TARGET"}
)
_ENVIRONMENT_PREFIXES = ("CUDA_", "NVIDIA_", "HIP_", "HSA_", "ROCR_", "ROCM_", "GGML_", "VK_", "OMP_", "GOMP_", "KMP_")


@dataclass(frozen=True, slots=True, kw_only=True)
class Tuning:
    """How the operator wants every model run. cache_type: one of `CACHE_TYPES`, empty for llama.cpp's own. flash_attention: None
    lets llama.cpp decide."""

    cache_type: str = ""
    flash_attention: bool | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """A checked request to load a model. Paths are absolute. None lets llama.cpp decide. pooling: `mean`, or `model` for the
    model's own, or None when the runner is not for embeddings. keeps_projector_here: in main memory."""

    model: str
    num_ctx: int
    parallel: int
    batch: int | None = None
    physical_batch: int | None = None
    gpu_layers: int | None = None
    main_gpu: int | None = None
    threads: int | None = None
    use_mmap: bool | None = None
    pooling: str | None = None
    projector: str | None = None
    keeps_projector_here: bool = False
    image_tokens: int | None = None
    adapters: tuple[str, ...] = ()
    context_shift: bool = False
    cache_type: str | None = None
    flash_attention: bool | None = None


#: Everything as llama.cpp has it.
UNTUNED = Tuning()


def plan(model: Model, options: LoadOptions, *, threads: int | None, tuning: Tuning = UNTUNED) -> Plan:
    """Check everything a runner is loaded with. threads: unless the options say otherwise. Raises: bad_request."""
    if model.weights is None:
        raise CorralError("bad_request", f"{model.name.short} has no weights on this machine")
    for name in _LIMITS:
        _check_range(name, getattr(options, name))
    if options.num_ctx * options.parallel > _MAX_CONTEXT:
        raise CorralError("bad_request", f'option "num_ctx" is too large for {options.parallel} requests at a time')
    batch = _batch(options)
    return Plan(
        model=_absolute(model.weights),
        num_ctx=options.num_ctx,
        parallel=options.parallel,
        batch=batch,
        physical_batch=batch,
        gpu_layers=options.num_gpu,
        main_gpu=options.main_gpu,
        threads=threads if options.num_thread is None else options.num_thread,
        use_mmap=options.use_mmap,
        pooling=_pooling(model) if options.embedding else None,
        projector=None if model.projector is None else _absolute(model.projector),
        keeps_projector_here=model.projector is not None and _is_partly_here(model, options.num_gpu),
        image_tokens=None if model.projector is None else _IMAGE_TOKENS.get(str(model.metadata.get("general.architecture"))),
        adapters=tuple(map(_absolute, model.adapters)),
        context_shift=options.context_shift and not options.embedding,
        cache_type=_cache_type(tuning.cache_type),
        flash_attention=tuning.flash_attention,
    )


def _batch(options: LoadOptions) -> int | None:
    """Tokens at a time, None for llama.cpp's own number. It ends itself while loading when its slots do not share them evenly."""
    batch = options.num_batch
    if options.embedding:
        batch = max(batch or 0, min(options.num_ctx, _MAX_EMBEDDING_BATCH))
    return batch and -(-batch // options.parallel) * options.parallel


def _is_partly_here(model: Model, gpu_layers: int | None) -> bool:
    """Whether some layers were asked to stay in main memory: then the accelerator has none to spare for a projector."""
    layers = model.metadata.get(f"{model.metadata.get('general.architecture', '')}.block_count")
    return gpu_layers is not None and (gpu_layers == 0 or (isinstance(layers, int) and gpu_layers < layers))


def _cache_type(name: str) -> str | None:
    if name and name not in CACHE_TYPES:
        raise CorralError("bad_request", f"OLLAMA_KV_CACHE_TYPE is none of {', '.join(CACHE_TYPES)}")
    return name or None


def _check_range(name: str, value: int | None) -> None:
    low, high = _LIMITS[name]
    if value is None:
        return
    if isinstance(value, bool) or not isinstance(value, int):
        raise CorralError("bad_request", f'option "{name}" must be of type integer')
    if not low <= value <= high:
        raise CorralError("bad_request", f'option "{name}" must be between {low} and {high}')


def _absolute(path: str) -> str:
    # A relative path could begin with `-`, and the engine does not run in our directory. NUL would end the argument early.
    if not Path(path).is_absolute() or "\0" in path:
        raise CorralError("bad_request", f"{Path(path).name} is not given by an absolute path")
    return path


def _pooling(model: Model) -> str:
    architecture = model.metadata.get("general.architecture", "")
    return "model" if f"{architecture}.pooling_type" in model.metadata else "mean"


def child_settings(plan: Plan, key: str) -> dict[str, Any]:
    """What engines/llama_child.py takes. key: the secret of this launch."""
    optional = {
        "n_threads": plan.threads,
        "n_batch": plan.batch,
        "n_ubatch": plan.physical_batch,
        "n_gpu_layers": plan.gpu_layers,
        "main_gpu": plan.main_gpu,
        "use_mmap": plan.use_mmap,
        "pooling": plan.pooling,
        "mmproj": plan.projector,
        "mmproj_use_gpu": False if plan.keeps_projector_here else None,
        "image_min_tokens": plan.image_tokens,
        "adapters": list(plan.adapters) or None,
        "cache_type": plan.cache_type,
        "flash_attention": plan.flash_attention,
    }
    return {
        "model": plan.model,
        "key": key,
        "alias": ALIAS,
        "verbosity": _VERBOSITY,
        "cache_ram_mib": _CACHE_RAM_MIB,
        # llama.cpp divides the context among its slots.
        "n_ctx": plan.num_ctx * plan.parallel,
        "n_parallel": plan.parallel,
        "ctx_shift": plan.context_shift,
        **{name: value for name, value in optional.items() if value is not None},
    }


#: Every flag that is ever given to llama-server. Source: ollama-surface 8.1, llama.cpp tools/server/README.md.
ALLOWED_FLAGS = frozenset(
    {
        "--model",
        "--host",
        "--port",
        "--alias",
        "--offline",
        "--no-webui",
        "--no-slots",
        "--jinja",
        "--log-verbosity",
        "--cache-ram",
    }
    | {
        "--ctx-size",
        "--parallel",
        "--threads",
        "--threads-batch",
        "--batch-size",
        "--ubatch-size",
        "--n-gpu-layers",
        "--main-gpu",
    }
    | {"--split-mode", "--no-mmap", "--embedding", "--pooling", "--mmproj", "--no-mmproj-offload", "--image-min-tokens", "--lora"}
    | {"--context-shift", "--cache-type-k", "--cache-type-v", "--flash-attn"}
)
#: None: llama-server's own default, which needs no flag.
_ON_OFF = {None: None, True: "on", False: "off"}


def llama_server_arguments(plan: Plan, program: str, *, port: int) -> list[str]:
    """argv for a llama-server. Every flag is of `ALLOWED_FLAGS`; every value is a number, a word of ours or an absolute path. The
    key is not here: argument lists are public, so it goes by `LLAMA_API_KEY`."""
    flags: list[tuple[str, object]] = [
        ("--model", plan.model),
        ("--host", "127.0.0.1"),
        ("--port", port),
        ("--alias", ALIAS),
        ("--log-verbosity", _VERBOSITY),
        ("--cache-ram", _CACHE_RAM_MIB),
        ("--ctx-size", plan.num_ctx * plan.parallel),
        ("--parallel", plan.parallel),
        ("--threads", plan.threads),
        ("--threads-batch", plan.threads),
        ("--batch-size", plan.batch),
        ("--ubatch-size", plan.physical_batch),
        ("--n-gpu-layers", plan.gpu_layers),
        ("--split-mode", None if plan.main_gpu is None else "none"),
        ("--main-gpu", plan.main_gpu),
        ("--pooling", "mean" if plan.pooling == "mean" else None),
        ("--mmproj", plan.projector),
        ("--image-min-tokens", plan.image_tokens),
        ("--cache-type-k", plan.cache_type),
        ("--cache-type-v", plan.cache_type),
        ("--flash-attn", _ON_OFF[plan.flash_attention]),
        *(("--lora", path) for path in plan.adapters),
    ]
    argv = [program, "--offline", "--no-webui", "--no-slots", "--jinja"]
    argv += [word for flag, value in flags if value is not None for word in (flag, str(value))]
    switches = {
        "--embedding": plan.pooling is not None,
        # Mapping is llama-server's default, and not every build has a flag to ask for it.
        "--no-mmap": plan.use_mmap is False,
        "--no-mmproj-offload": plan.keeps_projector_here,
        "--context-shift": plan.context_shift,
    }
    return argv + [flag for flag, is_on in switches.items() if is_on]


def scrubbed(environment: Mapping[str, str]) -> dict[str, str]:
    """The variables that an engine may see: where its libraries and devices are, and how its threads behave; and one
    of ours, by which an engine that ends itself says why last, not a list of addresses that a debugger took seconds to make."""
    kept = {
        name: value for name, value in environment.items() if name in _ENVIRONMENT_NAMES or name.startswith(_ENVIRONMENT_PREFIXES)
    }
    return {"GGML_NO_BACKTRACE": "1", **kept}
