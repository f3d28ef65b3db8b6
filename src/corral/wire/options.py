"""What a request says about how to run: `options`, `keep_alive`, `think` and `format`.

Options are rebuilt from a closed table, never passed through: a name that is not in the table reaches no engine, whatever an
engine's own API would make of it (CVE-2026-21869 was a negative `n_discard` in a passed-through body).
Source: ollama api/types.go Options.FromMap, DefaultOptions, Duration, ThinkValue; llm/llama_server.go.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import msgspec

from corral.wire.errors import CorralError
from corral.wire.units import MAX_DURATION_S, format_nanoseconds, parse_duration, quoted

Think = bool | str | None

_INT32 = 2**31 - 1
_FLOAT32 = 3.4028234663852886e38
#: Ollama bounds open-ended generation to this many context windows.
_OPEN_ENDED_CONTEXTS = 10

#: name -> kind, of the options fixed when a runner is loaded. draft_num_predict is checked and has no engine setting yet.
_LOAD_KINDS = {
    "num_ctx": "integer",
    "num_batch": "integer",
    "num_gpu": "integer",
    "main_gpu": "integer",
    "use_mmap": "boolean",
    "num_thread": "integer",
    "draft_num_predict": "integer",
}
#: name -> (kind, Ollama's default, llama.cpp's name).
_SAMPLING: Mapping[str, tuple[str, object, str]] = {
    "temperature": ("float32", 0.8, "temperature"),
    "top_k": ("integer", 40, "top_k"),
    "top_p": ("float32", 0.9, "top_p"),
    "min_p": ("float32", 0.0, "min_p"),
    "typical_p": ("float32", 1.0, "typical_p"),
    "repeat_last_n": ("integer", 64, "repeat_last_n"),
    "repeat_penalty": ("float32", 1.0, "repeat_penalty"),
    "presence_penalty": ("float32", 0.0, "presence_penalty"),
    "frequency_penalty": ("float32", 0.0, "frequency_penalty"),
    "seed": ("seed", -1, "seed"),
    "stop": ("array", (), "stop"),
    "num_predict": ("integer", -1, "n_predict"),
    "num_keep": ("integer", 4, "n_keep"),
}
LOAD_OPTIONS = frozenset(_LOAD_KINDS)


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """Options after merging. load: those that were set and fix a runner, wire names. sampling: all others, llama.cpp's names;
    its n_predict still needs `bounded`."""

    load: dict[str, object] = field(default_factory=dict)
    sampling: dict[str, Any] = field(default_factory=dict)

    def bounded(self, context_length: int) -> dict[str, Any]:
        """The sampling values with n_predict cut to what Ollama allows for a context of so many tokens."""
        limit = _OPEN_ENDED_CONTEXTS * context_length
        wanted = self.sampling["n_predict"]
        if limit <= 0 or 0 <= wanted <= limit:
            return self.sampling
        return {**self.sampling, "n_predict": limit}


def merge_options(parameters: Mapping[str, object], requested: Mapping[str, object]) -> Options:
    """Ollama's precedence: request, else the model's parameters, else the default. Unknown names and nulls are skipped.

    Raises: bad_request with Ollama's text, and its status 500 for a wrong type; 400 for a number out of range.
    """
    load: dict[str, object] = {}
    sampling = {name: _copied(default) for _, default, name in _SAMPLING.values()}
    for source in (parameters, requested):
        for name, value in source.items():
            if value is None:
                continue
            if name in _SAMPLING:
                kind, _, engine_name = _SAMPLING[name]
                sampling[engine_name] = _CHECKS[kind](name, value)
            elif name in _LOAD_KINDS:
                load[name] = _CHECKS[_LOAD_KINDS[name]](name, value)
    load.pop("draft_num_predict", None)
    return Options(load=load, sampling=sampling)


def _copied(default: object) -> object:
    return list(default) if isinstance(default, tuple) else default


def _wrong_type(name: str, kind: str) -> CorralError:
    return CorralError("bad_request", f'option "{name}" must be of type {kind}', status=500)


def _number(name: str, value: object, kind: str) -> int | float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise _wrong_type(name, kind)
    return value


def _ranged_int(name: str, value: object, low: int, high: int) -> int:
    number = _number(name, value, "integer")
    # The bounds come first: int() of an infinite float raises, and comparing is exact for floats and for ints of any size.
    if not low <= number <= high:
        raise CorralError("bad_request", f'option "{name}" must be between {low} and {high}')
    return int(number)


def _integer(name: str, value: object) -> int:
    return _ranged_int(name, value, -_INT32 - 1, _INT32)


def _seed(name: str, value: object) -> int:
    """llama.cpp keeps 32 bits of a seed; all ones, which is -1, asks for a random one."""
    number = _ranged_int(name, value, -(2**63), 2**63)
    return -1 if number == -1 else number & 0xFFFFFFFF


def _float(name: str, value: object) -> float:
    number = _number(name, value, "float32")
    if not -_FLOAT32 <= number <= _FLOAT32:
        raise CorralError("bad_request", f'option "{name}" is out of range')
    return float(number)


def _boolean(name: str, value: object) -> bool:
    if not isinstance(value, bool):
        raise _wrong_type(name, "boolean")
    return value


def _strings(name: str, value: object) -> list[str]:
    if not isinstance(value, list | tuple):
        raise _wrong_type(name, "array")
    if not all(isinstance(item, str) for item in value):
        raise CorralError("bad_request", f'option "{name}" must be of an array of strings', status=500)
    return list(value)


_CHECKS: Mapping[str, Callable[[str, object], object]] = {
    "integer": _integer,
    "seed": _seed,
    "float32": _float,
    "boolean": _boolean,
    "array": _strings,
}


# ── keep_alive ───────────────────────────────────────────────────────────────────────────────────────────────────────

#: What any negative keep_alive becomes.
FOREVER = -1.0


def parse_keep_alive(value: object) -> float | None:
    """Seconds; FOREVER for anything negative; None when unset. value: a number of seconds or a Go duration such as `1h30m`.

    Raises: bad_request with the text of Go's time.ParseDuration.
    """
    if value is None:
        return None
    if isinstance(value, str):
        try:
            seconds = parse_duration(value)
        except ValueError as error:
            raise CorralError("bad_request", str(error)) from error
    elif isinstance(value, int | float) and not isinstance(value, bool):
        # An integer of any size is bounded before float() could overflow.
        seconds = float(min(value, MAX_DURATION_S)) if value >= 0 else FOREVER
    else:
        raise CorralError("bad_request", f"Unsupported type: '{_go_type(value)}'")
    return FOREVER if seconds < 0 else seconds


def format_duration(seconds: float) -> str:
    """A Go duration as Go writes it. seconds: FOREVER is the longest there is."""
    return format_nanoseconds(2**63 - 1 if seconds < 0 else min(round(seconds * 1e9), 2**63 - 1))


def _go_type(value: object) -> str:
    return {bool: "bool", list: "[]interface {}", dict: "map[string]interface {}"}.get(type(value), "unknown")


# ── think and format ─────────────────────────────────────────────────────────────────────────────────────────────────

_THINK_LEVELS = ("high", "medium", "low", "max")


def parse_think(value: object) -> Think:
    """True, False, a level, or None when unset. Raises: bad_request with Ollama's text."""
    if value is None or isinstance(value, bool):
        return value
    if not isinstance(value, str):
        raise CorralError("bad_request", 'think must be a boolean or string ("high", "medium", "low", "max", true, or false)')
    if value not in _THINK_LEVELS:
        allowed = 'must be "high", "medium", "low", "max", true, or false'
        raise CorralError("bad_request", f"invalid think value: {quoted(value)} ({allowed})")
    return value


def template_kwargs(think: Think) -> dict[str, Any]:
    """What a chat template is told about thinking; nothing when it is unset. Source: llm/llama_server.go."""
    if think is None:
        return {}
    kwargs: dict[str, Any] = {"enable_thinking": think is not False}
    if isinstance(think, str):
        kwargs["reasoning_effort"] = think
    return kwargs


def response_format(value: object) -> dict[str, Any] | None:
    """`format` as llama.cpp's chat API takes it; None when unset. Raises: bad_request with Ollama's text and status 500."""
    match value:
        case None | "":
            return None
        case "json":
            return {"type": "json_object"}
        case dict():
            return {"type": "json_schema", "json_schema": {"name": "schema", "schema": value}}
        case _:
            shown = quoted(msgspec.json.encode(value).decode())
            raise CorralError(
                "bad_request", f'invalid format: {shown}; expected "json" or a valid JSON Schema object', status=500
            )


#: The schema that a raw completion with `format: "json"` is held to: any JSON object.
ANY_OBJECT: Mapping[str, Any] = {"type": "object"}


def completion_schema(value: object) -> dict[str, Any] | None:
    """`format` for a completion that passes no chat template. Raises: bad_request."""
    formatted = response_format(value)
    if formatted is None:
        return None
    schema: dict[str, Any] = formatted["json_schema"]["schema"] if "json_schema" in formatted else dict(ANY_OBJECT)
    return schema
