"""What every ModelStore promises: the one over a disk in Ollama's layout, and the fake that unit tests rely on."""

import os
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import pytest

from corral.core.ports import ModelStore
from corral.storage.home import HomeModels
from corral.wire.names import parse_name
from fakes import NOON
from fakes_local import MemoryModels
from fakes_models import model, put_model


@dataclass(frozen=True)
class Shelf:
    """A store and the way to put a model of some age (seconds) into it."""

    store: ModelStore
    add: Callable[[str, int], None]


@pytest.fixture(params=["memory", "home"])
def shelf(request: pytest.FixtureRequest, tmp_path: Path) -> Shelf:
    """An empty store of one kind."""
    if request.param == "memory":
        memory = MemoryModels()

        def remember(name: str, age_s: int) -> None:
            made = model(name, modified_at=NOON - timedelta(seconds=age_s))
            memory.models[made.name.key] = made

        return Shelf(memory, remember)

    def write(name: str, age_s: int) -> None:
        moment = (NOON - timedelta(seconds=age_s)).timestamp()
        os.utime(put_model(tmp_path, name), (moment, moment))

    return Shelf(HomeModels(tmp_path, tmp_path / "cache"), write)


async def test_model_store_is_empty_at_first(shelf: Shelf) -> None:
    assert list(await shelf.store.list()) == []
    assert await shelf.store.get(parse_name("tiny:1b")) is None


async def test_models_are_listed_newest_first(shelf: Shelf) -> None:
    for name, age_s in (("old", 30), ("new", 10), ("ns/mid:2", 20)):
        shelf.add(name, age_s)
    assert [found.name.short for found in await shelf.store.list()] == ["new:latest", "ns/mid:2", "old:latest"]


@pytest.mark.parametrize("name", ["Tiny:1B", "tiny:1b", "library/TINY:1b"])
async def test_model_is_found_in_any_case_and_keeps_its_spelling(shelf: Shelf, name: str) -> None:
    shelf.add("Tiny:1B", 0)
    found = await shelf.store.get(parse_name(name))
    assert found is not None
    assert (found.name.short, found.modified_at) == ("Tiny:1B", NOON)


@pytest.mark.parametrize("name", ["tiny", "ns/tiny:1b", "hub.example/library/tiny:1b", "tiny:1"])
async def test_model_is_not_found_by_part_of_its_name(shelf: Shelf, name: str) -> None:
    shelf.add("tiny:1b", 0)
    assert await shelf.store.get(parse_name(name)) is None
