"""What a memory of hubs must do, asked of the file and of the fake."""

from pathlib import Path

import pytest

from corral.core.ports import HubMemory, HubTerms
from corral.storage.hubstate import HubStateFile
from fakes_local import MemoryHubs

ONE, TWO = "http://localhost:11435", "https://hub.example.org"
STRONG = HubTerms(signature="corral-v1", public_url=ONE)
STOCK = HubTerms(signature="stock", public_url=TWO)


@pytest.fixture(params=["file", "fake"])
def memory(request: pytest.FixtureRequest, tmp_path: Path) -> HubMemory:
    return HubStateFile(tmp_path / "corral.json") if request.param == "file" else MemoryHubs()


def test_memory_begins_empty(memory: HubMemory) -> None:
    assert (memory.hub(), memory.terms(ONE)) == ("", None)


def test_chosen_hub_replaces_the_one_before_and_forgets_no_terms(memory: HubMemory) -> None:
    memory.keep_terms(ONE, STRONG)
    memory.choose_hub(ONE)
    memory.choose_hub(TWO)
    assert (memory.hub(), memory.terms(ONE)) == (TWO, STRONG)


def test_terms_are_kept_for_each_hub_and_replaced_when_agreed_anew(memory: HubMemory) -> None:
    memory.keep_terms(ONE, STRONG)
    memory.keep_terms(TWO, STOCK)
    assert (memory.terms(ONE), memory.terms(TWO)) == (STRONG, STOCK)
    weaker = HubTerms(signature="stock", public_url=ONE)
    memory.keep_terms(ONE, weaker)
    assert memory.terms(ONE) == weaker
    assert memory.hub() == ""
