"""What every HostedStore promises: the one in the database, and the fake that unit tests rely on."""

import shutil
from collections.abc import AsyncIterator
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from corral.core.ports import HostedStore
from corral.core.records import Model
from corral.storage.sql.engine import open_database
from corral.storage.sql.hosting import SqlHosting
from corral.wire.errors import CorralError
from corral.wire.names import parse_name
from fakes import NOON, FakeClock, SeededEntropy
from fakes_models import MemoryHosting, gguf_bytes, hosted, model


@dataclass(frozen=True)
class Stable:
    """A store, and a model that is in one of its repositories but not offered."""

    store: HostedStore
    model: Model


@pytest.fixture(params=["memory", "sqlite"])
async def stable(request: pytest.FixtureRequest, empty_database: Path, tmp_path: Path) -> AsyncIterator[Stable]:
    """A store of one kind that offers nothing."""
    if request.param == "memory":
        kept = model("team/Tiny:1b")
        yield Stable(MemoryHosting(kept), kept)
        return
    (tmp_path / "home").mkdir(mode=0o700)
    shutil.copy(empty_database, tmp_path / "home" / "hub.db")
    database = open_database(tmp_path / "home" / "hub.db")
    store = SqlHosting(database, tmp_path / "blobs", tmp_path / "cache", clock=FakeClock(), entropy=SeededEntropy())
    (tmp_path / "tiny.gguf").write_bytes(gguf_bytes())
    published = await store.publish_gguf(
        parse_name("team/Tiny:1b"), tmp_path / "tiny.gguf", lambda done, total: None, is_public=True
    )
    await store.withdraw(published.name)
    assert published.model is not None
    yield Stable(store, published.model)
    await database.close()


async def test_hosted_store_offers_nothing_at_first(stable: Stable) -> None:
    assert list(await stable.store.list()) == []
    assert await stable.store.get("tiny:1b") is None


async def test_upstream_that_is_offered_is_found(stable: Stable) -> None:
    offer = hosted("big:70b", upstream_model="org/Big", is_public=False)
    await stable.store.offer(offer)
    assert await stable.store.get("big:70b") == offer
    assert list(await stable.store.list()) == [offer]


@pytest.mark.parametrize("name", ["BIG:70B", "library/big:70b"])
async def test_hosted_model_is_found_in_any_case(stable: Stable, name: str) -> None:
    await stable.store.offer(hosted("Big:70b"))
    found = await stable.store.get(name)
    assert found is not None
    assert found.name == "Big:70b"


@pytest.mark.parametrize("name", ["", "..", "a b", "big:", "/", "a/b/c/d/e", "\udcff"])
async def test_hosted_model_of_a_name_that_is_none_is_absent(stable: Stable, name: str) -> None:
    assert await stable.store.get(name) is None


async def test_weights_of_a_repository_are_offered_under_any_name(stable: Stable) -> None:
    await stable.store.offer(hosted("mine:latest", model=stable.model, upstream_url="", upstream_model=""))
    found = await stable.store.get("mine")
    assert found is not None
    assert (found.name, found.upstream_url, found.created_at) == ("mine:latest", "", NOON)
    assert found.model == stable.model


async def test_weights_of_a_repository_are_offered_by_their_own_name(stable: Stable) -> None:
    await stable.store.offer_stored(parse_name("TEAM/tiny:1B"), is_public=False, now=NOON)
    found = await stable.store.get("team/tiny:1b")
    assert found == hosted("TEAM/tiny:1B", model=stable.model, upstream_url="", upstream_model="", is_public=False)
    with pytest.raises(CorralError) as caught:
        await stable.store.offer_stored(parse_name("team/tiny:other"), is_public=True, now=NOON)
    assert caught.value.code == "not_found"
    assert len(await stable.store.list()) == 1


async def test_weights_of_no_repository_are_refused(stable: Stable) -> None:
    stranger = replace(stable.model, name=parse_name("team/other:1b"))
    with pytest.raises(CorralError) as caught:
        await stable.store.offer(hosted(model=stranger, upstream_url=""))
    assert caught.value.code == "not_found"
    assert list(await stable.store.list()) == []


async def test_offer_of_both_or_neither_is_refused(stable: Stable) -> None:
    for offer in (hosted(model=stable.model), hosted(upstream_url="")):
        with pytest.raises(CorralError) as caught:
            await stable.store.offer(offer)
        assert caught.value.code == "invalid"


async def test_offer_of_a_name_that_is_none_is_refused(stable: Stable) -> None:
    with pytest.raises(CorralError) as caught:
        await stable.store.offer(hosted("a b"))
    assert caught.value.code == "bad_request"


async def test_offer_replaces_what_had_the_name(stable: Stable) -> None:
    await stable.store.offer(hosted("tiny:1b", model=stable.model, upstream_url="", upstream_model=""))
    await stable.store.offer(hosted("TINY:1b", upstream_url="http://127.0.0.1:7"))
    (found,) = await stable.store.list()
    assert (found.name, found.model, found.upstream_url) == ("TINY:1b", None, "http://127.0.0.1:7")


async def test_hosted_models_are_listed_by_name(stable: Stable) -> None:
    for name in ("b:1", "C:1", "a:2", "a:1"):
        await stable.store.offer(hosted(name))
    assert [found.name for found in await stable.store.list()] == ["a:1", "a:2", "b:1", "C:1"]


async def test_hosted_model_that_is_withdrawn_is_gone(stable: Stable) -> None:
    await stable.store.offer(hosted("tiny:1b"))
    assert await stable.store.withdraw("Tiny:1B")
    assert not await stable.store.withdraw("tiny:1b")
    assert await stable.store.get("tiny:1b") is None
