"""What a model needs: its context, how many requests it can serve at a time, and about how much memory that takes.

Predictions only: they decide how many slots to ask for and whether to make room first. What a runner really uses is measured.
"""

from collections.abc import Mapping

from corral.core.records import Capability, Model

#: Tokens per request where nobody says: (memory of all accelerators from which on, tokens). A little below 48 and 24 GiB, which
#: no card has to the byte. Source: ollama server/routes.go Serve.
_TIERS = ((47 << 30, 262_144), (23 << 30, 32_768), (0, 4096))
_MIN_CONTEXT, _MIN_VISION_CONTEXT = 4, 2048
#: Of the memory there is, so much may be planned for. Source: ollama server/sched.go.
_USABLE_SHARE = 0.8
#: Bytes of one number of the key-value cache; quantized ones in blocks of 32 with a scale. Source: ggml-common.h.
KV_BYTES: Mapping[str, float] = {
    "f32": 4,
    "f16": 2,
    "bf16": 2,
    "q8_0": 34 / 32,
    "q5_1": 24 / 32,
    "q5_0": 22 / 32,
    "q4_1": 20 / 32,
    "q4_0": 18 / 32,
    "iq4_nl": 18 / 32,
}
#: These cannot forget the oldest part of a context.
_NO_SHIFT = "deepseek2"
#: Families that llama.cpp cannot serve several requests of at once. Source: ollama server/sched.go.
_ONE_AT_A_TIME = frozenset(
    "mllama qwen3vl qwen3vlmoe qwen35 qwen35moe qwen3next lfm2 lfm2moe nemotron_h nemotron_h_moe nemotron_h_omni".split()  # noqa: SIM905
)


def automatic_context(accelerator_bytes: int) -> int:
    """Tokens per request where nobody says. accelerator_bytes: of all accelerators together."""
    return next(tokens for least, tokens in _TIERS if accelerator_bytes >= least)


def smaller_context(context: int) -> int | None:
    """The next smaller of the automatic ones."""
    return next((tokens for _, tokens in _TIERS if tokens < context), None)


def can_shift(model: Model) -> bool:
    """Whether an answer may go on when its context is full, the oldest half of which is then forgotten."""
    return _NO_SHIFT not in (model.details.family, *model.details.families)


def context_for(model: Model, asked: int | None, *, automatic: int) -> int:
    """Tokens per request: what was asked, else automatic, never more than the model was trained for."""
    trained = _number(model.metadata, "context_length") or model.details.context_length or 0
    least = _MIN_VISION_CONTEXT if model.projector is not None else _MIN_CONTEXT
    wanted = max(asked or automatic, least)
    return min(wanted, trained) if trained > 0 else wanted


def slots_for(model: Model, wanted: int, *, context: int, memory_bytes: int, kv_bytes: float = 2) -> int:
    """Requests to serve at a time: as wanted, fewer when their contexts would not fit. memory_bytes: of the machine, 0 for
    unknown. kv_bytes: as `needed_bytes`."""
    can_only_embed = Capability.EMBEDDING in model.capabilities and Capability.COMPLETION not in model.capabilities
    if can_only_embed or model.details.family in _ONE_AT_A_TIME:
        return 1
    slots = max(1, wanted)
    while slots > 1 and not fits(
        needed_bytes(model, context=context, slots=slots, kv_bytes=kv_bytes), 0, memory_bytes=memory_bytes
    ):
        slots //= 2
    return slots


def needed_bytes(model: Model, *, context: int, slots: int, kv_bytes: float = 2) -> int:
    """Weights and key-value cache. Without metadata, the weights alone. kv_bytes: of one number of the cache."""
    found = model.metadata
    heads = _number(found, "attention.head_count")
    width = _number(found, "embedding_length") // heads if heads else 0
    key, value = (_number(found, f"attention.{name}_length") or width for name in ("key", "value"))
    per_token = _number(found, "block_count") * (_number(found, "attention.head_count_kv") or heads) * (key + value) * kv_bytes
    return model.size_bytes + round(per_token * context * slots)


def fits(needed: int, used: int, *, memory_bytes: int) -> bool:
    """Whether so much more fits beside what is used. Always true when the memory is unknown."""
    return memory_bytes <= 0 or needed + used <= memory_bytes * _USABLE_SHARE


def _number(metadata: Mapping[str, object], name: str) -> int:
    """A value of the model's architecture, 0 when it is missing or no count (some models give one per layer; a number below zero
    would make room where there is none)."""
    found = metadata.get(f"{metadata.get('general.architecture', '')}.{name}")
    return max(found, 0) if isinstance(found, int) and not isinstance(found, bool) else 0
