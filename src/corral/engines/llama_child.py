"""The child process that holds a model. Run as a file, never imported by the rest: only the standard library and xllamacpp are
here.

Its whole configuration comes as one line of JSON on stdin, so that neither a secret nor anything a user made is in an argument
list or an environment of ours. stdin then stays open as a life line: when it ends, the parent is gone and so are we. Three forms:

- `{"parent": pid, "settings": {...}}` runs llama.cpp's server inside this process and writes `{"url": ...}` to stdout once it is
  ready;
- `{"parent": pid, "argv": [...], "environment": {...}}` becomes the given llama-server, under the same guards;
- `{"parent": pid, "devices": true}` writes `{"devices": [[type, bytes], ...]}`, what llama.cpp could use here, and ends.

Everything else this process says goes to stderr, whichever stream llama.cpp meant it for.
"""

import contextlib
import ctypes
import json
import os
import signal
import subprocess
import sys
import threading
from typing import IO, Any, NoReturn

_PR_SET_PDEATHSIG = 1


def main() -> None:
    """Read the configuration, take the guards, serve until stdin ends."""
    announce = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    life_line = sys.stdin.buffer
    configuration = json.loads(life_line.readline())
    is_guarded = _guard(configuration["parent"])
    if "argv" in configuration:
        announce.close()
        _become(configuration["argv"], configuration["environment"], life_line, is_guarded=is_guarded)
    if "devices" in configuration:
        json.dump({"devices": _devices()}, announce)
        announce.close()
        return
    server = _serve(configuration["settings"])
    json.dump({"url": server.listening_address}, announce)
    announce.close()
    _await_end(life_line)


def _guard(parent: int) -> bool:
    """No core dumps, which would hold prompts; and death with the parent, however it dies. True when the kernel sees to the
    latter."""
    with contextlib.suppress(ImportError, ValueError, OSError):
        import resource

        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if sys.platform != "linux":
        return False
    is_set: bool = ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0) == 0
    # The parent may have died before the line above; then nobody would ever send the signal.
    if os.getppid() != parent:
        os._exit(1)
    return is_set


def _become(argv: list[str], environment: dict[str, str], life_line: IO[bytes], *, is_guarded: bool) -> NoReturn:
    """Turn into llama-server. The guards of this process survive exec; where there are none, stay and watch over it instead."""
    if is_guarded:
        os.execve(argv[0], argv, environment)  # noqa: S606  # the list comes from our parent's allow-list
    with subprocess.Popen(argv, env=environment, stdin=subprocess.DEVNULL) as server:  # noqa: S603
        threading.Thread(target=_end_with, args=(life_line, server), daemon=True).start()
        sys.exit(server.wait())


def _end_with(life_line: IO[bytes], server: "subprocess.Popen[bytes]") -> None:
    while life_line.read(4096):
        pass
    server.kill()


def _await_end(life_line: IO[bytes]) -> NoReturn:
    while life_line.read(4096):
        pass
    # Not sys.exit: a server that is decoding would be waited for.
    os._exit(0)


def _devices() -> list[tuple[str, int]]:
    """(`GPU`, `IGPU`, `CPU` or `ACCEL`; memory in bytes) of every device."""
    import xllamacpp

    return [(device["type"].name.rpartition("_")[2], device["memory_total"]) for device in xllamacpp.get_device_info()]


def _serve(settings: dict[str, Any]) -> Any:
    """A running server. Raises: RuntimeError when the model cannot be loaded."""
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path = settings["model"]
    params.hostnames = ["127.0.0.1"]
    params.port = 0
    params.api_keys = [settings["key"]]
    params.model_alias = {settings["alias"]}
    # A page has no business here, and the default origin `*` would let it read what the key check lets through.
    params.ui, params.cors_origins, params.endpoint_slots, params.offline = False, "null", False, True
    params.verbosity = settings["verbosity"]
    params.n_ctx, params.n_parallel, params.kv_unified = settings["n_ctx"], settings["n_parallel"], False
    params.ctx_shift = settings["ctx_shift"]
    params.cache_ram_mib = settings["cache_ram_mib"]
    # It reads the file's vocabulary once more to see how much of the model fits a GPU: a quarter of the time a small one takes.
    params.fit_params = any(kind != "CPU" for kind, _ in _devices())
    _set_optional(params, settings, xllamacpp)
    return xllamacpp.Server(params)


def _set_optional(params: Any, settings: dict[str, Any], xllamacpp: Any) -> None:
    if threads := settings.get("n_threads"):
        params.cpuparams.n_threads = params.cpuparams_batch.n_threads = threads
    for name in ("n_batch", "n_ubatch", "n_gpu_layers", "mmproj_use_gpu", "image_min_tokens"):
        if name in settings:
            setattr(params, name, settings[name])
    if "main_gpu" in settings:
        params.split_mode, params.main_gpu = xllamacpp.llama_split_mode.LLAMA_SPLIT_MODE_NONE, settings["main_gpu"]
    if "use_mmap" in settings:
        modes = xllamacpp.llama_load_mode
        params.load_mode = modes.LLAMA_LOAD_MODE_MMAP if settings["use_mmap"] else modes.LLAMA_LOAD_MODE_NONE
    if "pooling" in settings:
        params.embedding = True
        if settings["pooling"] == "mean":
            params.pooling_type = xllamacpp.llama_pooling_type.LLAMA_POOLING_TYPE_MEAN
    if "cache_type" in settings:
        kind = getattr(xllamacpp.ggml_type, f"GGML_TYPE_{settings['cache_type'].upper()}")
        params.cache_type_k = params.cache_type_v = kind
    if "flash_attention" in settings:
        modes = xllamacpp.llama_flash_attn_type
        is_on = settings["flash_attention"]
        params.flash_attn_type = modes.LLAMA_FLASH_ATTN_TYPE_ENABLED if is_on else modes.LLAMA_FLASH_ATTN_TYPE_DISABLED
    if "mmproj" in settings:
        params.mmproj.path = settings["mmproj"]
    if "adapters" in settings:
        params.lora_adapters = [_adapter(path, xllamacpp) for path in settings["adapters"]]


def _adapter(path: str, xllamacpp: Any) -> Any:
    adapter = xllamacpp.CommonAdapterLoraInfo()
    adapter.path, adapter.scale = path, 1.0
    return adapter


if __name__ == "__main__":
    try:
        main()
    except (RuntimeError, ImportError, OSError, ValueError, KeyError) as failure:
        # One line, which the parent may show: a traceback would be longer and say less.
        sys.exit(f"{type(failure).__name__}: {failure}")
