"""Browsing: how far each visitor sees, what the page of a repository needs, and pulls that are counted in batches."""

import asyncio
from collections.abc import Mapping

import pytest

from corral.core.catalog import Description, Facts, Kind, Order, reach_of
from corral.core.records import Principal
from corral.core.registry import Right, Visibility
from corral.hub.catalog import PAGE_SIZE, TAGS_SHOWN, Catalog, words_of
from corral.wire.errors import CorralError
from corral.wire.names import Digest
from corral.wire.registry import RepositoryName
from fakes_catalog import MemoryCatalog
from registry_hub import LIBRARY, TINY, RegistryHub, with_key

LLAMA = Facts(kind=Kind.MODEL, family="llama", parameter_size="7B")


class Browsing(RegistryHub):
    """A registry in memory with a catalog over it."""

    def __init__(self) -> None:
        super().__init__()
        self.catalog_store = MemoryCatalog(self.store, self.accounts)
        self.catalog = Catalog(store=self.catalog_store, registry=self.store, repositories=self.repositories)

    async def put(self, name: RepositoryName, caller: Principal, *, tag: str = "latest", is_public: bool = False) -> Digest:
        """A described model in a repository, a second after the one before."""
        self.clock.advance(1)
        digest = await self.push(name, caller, f"{name}:{tag}".encode(), tag=tag)
        await self.catalog_store.describe(Description(digest=digest, facts=LLAMA))
        if is_public:
            await self.repositories.set_visibility(name, caller, Visibility.PUBLIC)
        return digest


@pytest.fixture
async def hub() -> Browsing:
    return Browsing()


@pytest.fixture
async def alice(hub: Browsing) -> Principal:
    return await hub.add("alice")


async def names(hub: Browsing, caller: Principal | None) -> list[str]:
    return [f"{entry.namespace}/{entry.name}" for entry in (await hub.catalog.browse(caller)).entries]


async def test_reach_is_the_accounts_own_namespace_and_the_library_for_administrators(hub: Browsing, alice: Principal) -> None:
    boss = await hub.add("Boss", is_admin=True)
    assert reach_of(None).namespaces == frozenset()
    assert (reach_of(alice).account_id, reach_of(alice).namespaces) == (alice.account.id, {"alice"})
    assert reach_of(boss).namespaces == {"boss", "library"}


async def test_t029_everybody_browses_as_far_as_they_may(hub: Browsing, alice: Principal) -> None:
    boss, bob = await hub.add("boss", is_admin=True), await hub.add("bob")
    await hub.put(TINY, alice)
    await hub.put(RepositoryName("alice", "open"), alice, is_public=True)
    await hub.put(LIBRARY, boss)
    assert await names(hub, None) == await names(hub, bob) == ["alice/open"]
    assert await names(hub, alice) == ["alice/open", "alice/tiny"]
    assert await names(hub, boss) == ["library/llama", "alice/open"]


async def test_search_takes_a_query_apart(hub: Browsing, alice: Principal) -> None:
    await hub.put(TINY, alice, tag="q4")
    for query, count in (("tiny", 1), ("ALICE/Tiny:q4", 1), ("  llama   7b ", 1), ("tiny zebra", 0), ("...", 0), ("x" * 9999, 0)):
        assert len((await hub.catalog.search(alice, query)).entries) == count, query
    assert (await hub.catalog.search(None, "tiny")).entries == ()


async def test_page_has_its_size_and_leads_on(hub: Browsing, alice: Principal) -> None:
    for number in range(PAGE_SIZE + 1):
        await hub.put(RepositoryName("alice", f"m{number}"), alice)
    first = await hub.catalog.browse(alice)
    second = await hub.catalog.browse(alice, after=first.after)
    assert (len(first.entries), len(second.entries), second.after) == (PAGE_SIZE, 1, "")


async def test_view_tells_what_a_page_shows(hub: Browsing, alice: Principal) -> None:
    digest = await hub.put(TINY, alice)
    await hub.put(TINY, alice, tag="big")
    view = await hub.catalog.view(RepositoryName("ALICE", "Tiny"), alice)
    assert view is not None
    assert (view.repository.path, view.rights, view.pulls) == ("alice/tiny", frozenset(Right), 0)
    assert [tag.name for tag in view.tags] == ["big", "latest"]
    assert view.chosen is not None
    assert (view.chosen.name, view.chosen.digest, view.more_tags) == ("latest", digest, "")
    assert len(view.descriptions) == 2


async def test_t029_view_is_none_for_what_may_not_be_seen(hub: Browsing, alice: Principal) -> None:
    bob = await hub.add("bob")
    await hub.put(TINY, alice)
    for caller in (None, bob):
        assert await hub.catalog.view(TINY, caller) is None
        assert not await hub.catalog.is_visible(TINY, caller)
    assert await hub.catalog.is_visible(TINY, alice)
    await hub.repositories.set_visibility(TINY, alice, Visibility.PUBLIC)
    view = await hub.catalog.view(TINY, None)
    assert view is not None
    assert view.rights == {Right.PULL}


async def test_rights_of_a_collaborator_are_those_given(hub: Browsing, alice: Principal) -> None:
    bob = await hub.add("bob")
    await hub.put(TINY, alice)
    await hub.repositories.set_collaborator(TINY, alice, "bob", Right.PUSH)
    view = await hub.catalog.view(TINY, bob)
    assert view is not None
    assert view.rights == {Right.PULL, Right.PUSH}


@pytest.mark.parametrize(
    ("tags", "asked", "chosen"),
    [
        (["latest", "a"], "", "latest"),
        (["a", "b"], "", "b"),
        (["b", "a"], "", "a"),
        (["a", "b"], "a", "a"),
        (["Q4", "b"], "q4", "q4"),
        (["a"], "none", None),
        (["a"], "../a", None),
        (["a"], "sha256:" + "0" * 64, None),
    ],
)
async def test_view_chooses_the_tag_that_was_asked_for_or_stands_for_it(
    hub: Browsing, alice: Principal, tags: list[str], asked: str, chosen: str | None
) -> None:
    for tag in tags:
        await hub.put(TINY, alice, tag=tag)
    view = await hub.catalog.view(TINY, alice, tag=asked)
    assert (view.chosen.name if view and view.chosen else None) == chosen


async def test_view_of_a_repository_without_a_tag_has_none(hub: Browsing, alice: Principal) -> None:
    await hub.put(TINY, alice)
    await hub.registry.remove_manifest(TINY, "latest", alice)
    view = await hub.catalog.view(TINY, alice)
    assert view is not None
    assert (view.tags, view.chosen, dict(view.descriptions)) == ((), None, {})


async def test_view_of_many_tags_comes_in_pieces(hub: Browsing, alice: Principal) -> None:
    for number in range(TAGS_SHOWN + 5):
        await hub.put(TINY, alice, tag=f"v{number:03}")
    first = await hub.catalog.view(TINY, alice)
    assert first is not None
    second = await hub.catalog.view(TINY, alice, after=first.more_tags)
    assert second is not None
    assert (len(first.tags), len(second.tags), second.more_tags) == (TAGS_SHOWN, 5, "")
    far = await hub.catalog.view(TINY, alice, tag="v103")
    assert far is not None
    assert far.chosen is not None
    assert (far.chosen.name, far.chosen.digest in far.descriptions) == ("v103", True)


# ── Pulls ────────────────────────────────────────────────────────────────────────────────────────────────────────────


async def test_pulls_are_shown_at_once_and_written_in_batches(hub: Browsing, alice: Principal) -> None:
    await hub.put(TINY, alice)
    for spelling in ("tiny", "Tiny", "TINY"):
        hub.catalog.count_pull(RepositoryName("alice", spelling))
    view = await hub.catalog.view(TINY, alice)
    assert view is not None
    assert view.pulls == 3
    assert (await hub.catalog.browse(alice)).entries[0].pulls == 0
    await hub.catalog.flush()
    await hub.catalog.flush()
    (entry,) = (await hub.catalog.browse(alice, order=Order.MOST_PULLED)).entries
    assert entry.pulls == 3


class _Away(MemoryCatalog):
    """A store that does not take counts; slow to say so."""

    is_away = True

    async def add_pulls(self, counts: Mapping[RepositoryName, int]) -> None:
        await asyncio.sleep(0)
        if self.is_away:
            raise CorralError("unavailable")
        await super().add_pulls(counts)


async def test_r004_pulls_wait_while_the_database_is_away(hub: Browsing, alice: Principal) -> None:
    await hub.put(TINY, alice)
    store = _Away(hub.store, hub.accounts)
    catalog = Catalog(store=store, registry=hub.store, repositories=hub.repositories)
    catalog.count_pull(TINY)
    flushing = asyncio.create_task(catalog.flush())
    await asyncio.sleep(0)
    catalog.count_pull(TINY)
    await flushing
    store.is_away = False
    await catalog.flush()
    found = await hub.store.repository("alice", "tiny")
    assert found is not None
    assert await store.pulls(found.id) == 2


async def test_pulls_of_names_without_end_take_bounded_memory(hub: Browsing) -> None:
    for number in range(11_000):
        hub.catalog.count_pull(RepositoryName("x", f"m{number}"))
    assert len(hub.catalog._pulls) == 10_000


def test_words_of_a_query_are_letters_and_digits_in_lower_case() -> None:
    assert words_of("SmolLM2:135M  q4_1 \N{GREEK CAPITAL LETTER ALPHA}!") == [
        "smollm2",
        "135m",
        "q4",
        "1",
        "\N{GREEK SMALL LETTER ALPHA}",
    ]


def test_principal_of_a_key_has_the_reach_of_its_account(alice: Principal) -> None:
    assert reach_of(with_key(alice.account)) == reach_of(alice)
