"""What a model is predicted to need."""

import pytest

from corral.core.records import Capability, ModelDetails
from corral.engines.launch import CACHE_TYPES
from corral.serving.capacity import (
    KV_BYTES,
    automatic_context,
    context_for,
    fits,
    needed_bytes,
    slots_for,
    smaller_context,
)
from fakes_engine import weights

GIB = 1 << 30
LLAMA = {
    "general.architecture": "llama",
    "llama.block_count": 30,
    "llama.attention.head_count": 9,
    "llama.attention.head_count_kv": 3,
    "llama.embedding_length": 576,
    "llama.context_length": 8192,
}


def test_needed_bytes_are_weights_and_key_value_cache() -> None:
    # llama.cpp says of this very model (SmolLM2-135M) at 8192 tokens: "CPU KV buffer size = 180.00 MiB".
    model = weights(metadata=LLAMA, size_bytes=1000)
    assert needed_bytes(model, context=4096, slots=2) == 1000 + 180 * 2**20


def test_needed_bytes_use_the_lengths_of_keys_and_values_where_given() -> None:
    lengths = {"llama.attention.key_length": 128, "llama.attention.value_length": 64}
    model = weights(metadata={**LLAMA, **lengths}, size_bytes=0)
    assert needed_bytes(model, context=1, slots=1) == 30 * 3 * (128 + 64) * 2


@pytest.mark.parametrize("metadata", [{}, {"general.architecture": 7}, {**LLAMA, "llama.attention.head_count": [9, 9]}])
def test_needed_bytes_of_metadata_that_says_little_are_the_weights(metadata: dict[str, object]) -> None:
    assert needed_bytes(weights(metadata=metadata, size_bytes=5), context=4096, slots=4) == 5


def test_t105_needed_bytes_are_no_fewer_than_the_weights_whatever_the_metadata_says() -> None:
    hostile = {**LLAMA, "llama.block_count": -(2**31), "llama.attention.key_length": 2**63}
    assert needed_bytes(weights(metadata=hostile, size_bytes=5), context=4096, slots=4) == 5


@pytest.mark.parametrize(
    ("asked", "automatic", "expected"),
    [(None, 4096, 4096), (None, 2048, 2048), (None, 10**6, 8192), (512, 2048, 512), (10**6, 4096, 8192), (1, 4096, 4)],
)
def test_context_is_what_was_asked_within_training(asked: int | None, automatic: int, expected: int) -> None:
    assert context_for(weights(metadata=LLAMA), asked, automatic=automatic) == expected


def test_context_without_metadata_is_bounded_by_the_details_or_not_at_all() -> None:
    assert context_for(weights(metadata={}), 10**6, automatic=4096) == 10**6
    known = weights(metadata={}, details=ModelDetails(context_length=1000))
    assert context_for(known, None, automatic=4096) == 1000


def test_context_of_a_model_that_sees_is_at_least_2048() -> None:
    assert context_for(weights(metadata=LLAMA, projector="/eye"), 4, automatic=4096) == 2048


@pytest.mark.parametrize(
    ("memory", "context"), [(0, 4096), (23 * GIB - 1, 4096), (23 * GIB, 32_768), (47 * GIB - 1, 32_768), (47 * GIB, 262_144)]
)
def test_automatic_context_grows_with_the_memory_of_accelerators(memory: int, context: int) -> None:
    assert automatic_context(memory) == context


def test_smaller_context_is_the_next_automatic_one() -> None:
    assert [smaller_context(context) for context in (262_144, 100_000, 32_768, 5000, 4096, 512)] == [
        32_768,
        32_768,
        4096,
        4096,
        None,
        None,
    ]


def test_quantized_cache_needs_as_much_less() -> None:
    model = weights(metadata=LLAMA, size_bytes=0)
    assert needed_bytes(model, context=4096, slots=2, kv_bytes=KV_BYTES["q8_0"]) == 180 * 2**20 * 34 // 64
    assert needed_bytes(model, context=4096, slots=2, kv_bytes=KV_BYTES["f16"]) == 180 * 2**20
    assert set(KV_BYTES) == set(CACHE_TYPES)


def test_slots_are_halved_until_they_fit() -> None:
    model = weights(metadata=LLAMA, size_bytes=0)
    mib = 2**20
    assert slots_for(model, 4, context=4096, memory_bytes=0) == 4
    assert slots_for(model, 4, context=4096, memory_bytes=1000 * mib) == 4
    assert slots_for(model, 4, context=4096, memory_bytes=300 * mib) == 2
    assert slots_for(model, 4, context=4096, memory_bytes=1) == 1


def test_slots_of_models_that_only_embed_and_of_some_families_are_one() -> None:
    assert slots_for(weights(capabilities=frozenset({Capability.EMBEDDING})), 4, context=4, memory_bytes=0) == 1
    assert slots_for(weights(details=ModelDetails(family="qwen3vl")), 4, context=4, memory_bytes=0) == 1
    both = frozenset({Capability.EMBEDDING, Capability.COMPLETION})
    assert slots_for(weights(capabilities=both), 4, context=4, memory_bytes=0) == 4


def test_fits_leaves_a_fifth_of_the_memory_free() -> None:
    assert fits(400, 400, memory_bytes=1000)
    assert not fits(401, 400, memory_bytes=1000)
    assert fits(10**15, 0, memory_bytes=0)
