"""What every UsageStore does."""

from datetime import timedelta

from corral.core.records import Proof, UsageEntry
from fakes import NOON
from identity_stores import Stores


def entry(**changes: object) -> UsageEntry:
    values = {
        "account_id": "a1",
        "credential_id": "k1",
        "proof": Proof.API_KEY,
        "model": "smollm2:135m",
        "path": "/api/chat",
        "started_at": NOON,
        "duration_ns": 10**9,
        "prompt_tokens": 5,
        "eval_tokens": 7,
        "outcome": "ok",
        **changes,
    }
    return UsageEntry(**values)  # type: ignore[arg-type]


async def test_usage_is_summed_by_credential_and_model_largest_first(stores: Stores) -> None:
    await stores.usage.add([entry(), entry(outcome="canceled"), entry(model="big", prompt_tokens=100)])
    await stores.usage.add([entry(credential_id="k2", prompt_tokens=0, eval_tokens=0)])
    assert list(await stores.usage.totals("a1", since=NOON)) == [
        ("k1", "big", 1, 100, 7),
        ("k1", "smollm2:135m", 2, 10, 14),
        ("k2", "smollm2:135m", 1, 0, 0),
    ]


async def test_usage_before_the_time_or_of_others_is_left_out(stores: Stores) -> None:
    await stores.usage.add([entry(started_at=NOON - timedelta(microseconds=1)), entry(account_id="a2")])
    assert list(await stores.usage.totals("a1", since=NOON)) == []


async def test_usage_of_nothing_is_nothing(stores: Stores) -> None:
    await stores.usage.add([])
    assert list(await stores.usage.totals("a1", since=NOON)) == []


async def test_usage_beyond_32_bits_is_exact(stores: Stores) -> None:
    await stores.usage.add([entry(prompt_tokens=2**40), entry(prompt_tokens=2**40)])
    assert list(await stores.usage.totals("a1", since=NOON)) == [("k1", "smollm2:135m", 2, 2**41, 14)]
