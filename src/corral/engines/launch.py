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

_ENVIRONMENT_NAMES = frozenset(
    {"PATH", "LANG", "LC_ALL", "LC_CTYPE", "LD_LIBRARY_PATH", "DYLD_LIBRARY_PATH", "TMPDIR", "TEMP", "TMP", "SYSTEMROOT"}
)
_ENVIRONMENT_PREFIXES = ("CUDA_", "NVIDIA_", "HIP_", "HSA_", "ROCR_", "ROCM_", "GGML_", "VK_", "OMP_", "GOMP_", "KMP_")


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """A checked request to load a model. Paths are absolute. threads: None lets llama.cpp decide. pooling: `mean`, or `model` for
    the model's own, or None when the runner is not for embeddings."""

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
    adapters: tuple[str, ...] = ()


def plan(model: Model, options: LoadOptions, *, threads: int | None) -> Plan:
    """Check everything a runner is loaded with. threads: unless the options say otherwise. Raises: bad_request."""
    if model.weights is None:
        raise CorralError("bad_request", f"{model.name.short} has no weights on this machine")
    for name in _LIMITS:
        _check_range(name, getattr(options, name))
    if options.num_ctx * options.parallel > _MAX_CONTEXT:
        raise CorralError("bad_request", f'option "num_ctx" is too large for {options.parallel} requests at a time')
    batch = physical = options.num_batch
    if options.embedding:
        batch = physical = max(options.num_batch or 0, min(options.num_ctx, _MAX_EMBEDDING_BATCH))
    return Plan(
        model=_absolute(model.weights),
        num_ctx=options.num_ctx,
        parallel=options.parallel,
        batch=batch,
        physical_batch=physical,
        gpu_layers=options.num_gpu,
        main_gpu=options.main_gpu,
        threads=threads if options.num_thread is None else options.num_thread,
        use_mmap=options.use_mmap,
        pooling=_pooling(model) if options.embedding else None,
        projector=None if model.projector is None else _absolute(model.projector),
        adapters=tuple(map(_absolute, model.adapters)),
    )


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
        "adapters": list(plan.adapters) or None,
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
    | {"--split-mode", "--no-mmap", "--embedding", "--pooling", "--mmproj", "--lora"}
)


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
        *(("--lora", path) for path in plan.adapters),
    ]
    argv = [program, "--offline", "--no-webui", "--no-slots", "--jinja"]
    argv += [word for flag, value in flags if value is not None for word in (flag, str(value))]
    if plan.pooling is not None:
        argv.append("--embedding")
    if plan.use_mmap is False:
        # Mapping is llama-server's default, and not every build has a flag to ask for it.
        argv.append("--no-mmap")
    return argv


def scrubbed(environment: Mapping[str, str]) -> dict[str, str]:
    """The variables that an engine may see: where its libraries and devices are, and how its threads behave."""
    return {
        name: value for name, value in environment.items() if name in _ENVIRONMENT_NAMES or name.startswith(_ENVIRONMENT_PREFIXES)
    }
