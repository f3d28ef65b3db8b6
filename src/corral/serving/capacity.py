"""What a model needs: its context, how many requests it can serve at a time, and about how much memory that takes.

Predictions only: they decide how many slots to ask for and whether to make room first. What a runner really uses is measured.
"""

from collections.abc import Mapping

from corral.core.records import Capability, Model

AUTOMATIC_CONTEXT = 4096
_MIN_CONTEXT, _MIN_VISION_CONTEXT = 4, 2048
#: Of the memory there is, so much may be planned for. Source: ollama server/sched.go.
_USABLE_SHARE = 0.8
_KV_BYTES = 2  # half precision
#: Families that llama.cpp cannot serve several requests of at once. Source: ollama server/sched.go.
_ONE_AT_A_TIME = frozenset(
    "mllama qwen3vl qwen3vlmoe qwen35 qwen35moe qwen3next lfm2 lfm2moe nemotron_h nemotron_h_moe nemotron_h_omni".split()  # noqa: SIM905
)


def context_for(model: Model, asked: int | None, *, automatic: int) -> int:
    """Tokens per request: what was asked, else automatic, never more than the model was trained for. automatic: 0 for the
    default."""
    trained = _number(model.metadata, "context_length") or model.details.context_length or 0
    least = _MIN_VISION_CONTEXT if model.projector is not None else _MIN_CONTEXT
    wanted = max(asked or automatic or AUTOMATIC_CONTEXT, least)
    return min(wanted, trained) if trained > 0 else wanted


def slots_for(model: Model, wanted: int, *, context: int, memory_bytes: int) -> int:
    """Requests to serve at a time: as wanted, fewer when their contexts would not fit. memory_bytes: of the machine, 0 for
    unknown."""
    can_only_embed = Capability.EMBEDDING in model.capabilities and Capability.COMPLETION not in model.capabilities
    if can_only_embed or model.details.family in _ONE_AT_A_TIME:
        return 1
    slots = max(1, wanted)
    while slots > 1 and not fits(needed_bytes(model, context=context, slots=slots), 0, memory_bytes=memory_bytes):
        slots //= 2
    return slots


def needed_bytes(model: Model, *, context: int, slots: int) -> int:
    """Weights and key-value cache. Without metadata, the weights alone."""
    found = model.metadata
    heads = _number(found, "attention.head_count")
    width = _number(found, "embedding_length") // heads if heads else 0
    key, value = (_number(found, f"attention.{name}_length") or width for name in ("key", "value"))
    per_token = _number(found, "block_count") * (_number(found, "attention.head_count_kv") or heads) * (key + value) * _KV_BYTES
    return model.size_bytes + per_token * context * slots


def fits(needed: int, used: int, *, memory_bytes: int) -> bool:
    """Whether so much more fits beside what is used. Always true when the memory is unknown."""
    return memory_bytes <= 0 or needed + used <= memory_bytes * _USABLE_SHARE


def _number(metadata: Mapping[str, object], name: str) -> int:
    """A value of the model's architecture, 0 when it is missing or no number (some models give one per layer)."""
    found = metadata.get(f"{metadata.get('general.architecture', '')}.{name}")
    return found if isinstance(found, int) and not isinstance(found, bool) else 0
