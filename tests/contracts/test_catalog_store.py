"""What every CatalogStore promises: the one in the database, and the fake that the pages' tests rely on."""

import shutil
from collections.abc import AsyncIterator
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import pytest

from corral.core.catalog import CatalogPage, CatalogStore, Description, Facts, Kind, LayerFacts, Order, Reach
from corral.core.ports import AccountStore
from corral.core.records import Account, Capability
from corral.core.registry import NewManifest, RegistryStore, Repository, Right, StoredManifest, Visibility
from corral.storage.sql.accounts import SqlAccounts
from corral.storage.sql.catalog import SqlCatalog, match_of
from corral.storage.sql.engine import open_database
from corral.storage.sql.registry import SqlRegistry
from corral.wire.errors import CorralError
from corral.wire.names import Digest
from corral.wire.repositories import RepositoryName
from fakes import NOON, FakeClock, MemoryAccounts
from fakes_catalog import MemoryCatalog
from fakes_registry import FakeRegistryStore, digest_of
from identity_stores import account

ADA, BOB = account("Ada"), account("Bob")
VISITOR = Reach()
IMAGE = "application/vnd.oci.image.manifest.v1+json"
LLAMA = Facts(
    kind=Kind.MODEL,
    size_bytes=91_739_413,
    family="llama",
    parameter_size="134.52M",
    quantization="Q4_1",
    context_length=8192,
    capabilities=frozenset({Capability.COMPLETION, Capability.TOOLS}),
)


def reach(owner: Account, *more: str) -> Reach:
    """How far an account sees."""
    return Reach(account_id=owner.id, namespaces=frozenset({owner.name.lower(), *more}))


@dataclass
class Shelves:
    """A catalog and the stores beneath it. Ada and Bob are there."""

    catalog: CatalogStore
    registry: RegistryStore
    accounts: AccountStore
    minutes: int = 0

    async def put(
        self, path: str, *, tag: str = "latest", is_public: bool = True, body: bytes = b"", facts: Facts | None = LLAMA
    ) -> Repository:
        """A repository with one more tag, a minute after the last one; described and indexed."""
        self.minutes += 1
        now = NOON + timedelta(minutes=self.minutes)
        namespace, _, name = path.partition("/")
        visibility = Visibility.PUBLIC if is_public else Visibility.PRIVATE
        row = Repository(
            id=f"r{self.minutes:04}", namespace=namespace, name=name, visibility=visibility, created_at=now, updated_at=now
        )
        repository = await self.registry.add_repository(row)
        body = body or f"{path}:{tag}".encode()
        stored = StoredManifest(digest=digest_of(body), media_type=IMAGE, body=body)
        await self.registry.put_manifest(repository.id, NewManifest(manifest=stored), [tag], now=now)
        if facts is not None:
            await self.catalog.describe(Description(digest=stored.digest, facts=facts))
        while await self.catalog.refresh(limit=3):
            pass
        return repository

    async def names(self, seen: Reach, *words: str, order: Order = Order.NEWEST, namespace: str = "") -> list[str]:
        page = await self.catalog.page(seen, order=order, limit=50, words=words, namespace=namespace)
        return named(page)


def named(page: CatalogPage) -> list[str]:
    return [f"{entry.namespace}/{entry.name}" for entry in page.entries]


@pytest.fixture(params=["memory", "sqlite"])
async def shelves(request: pytest.FixtureRequest, empty_database: Path, tmp_path: Path) -> AsyncIterator[Shelves]:
    """An empty catalog of one kind."""
    if request.param == "memory":
        accounts = MemoryAccounts()
        registry = FakeRegistryStore(accounts)
        shelves = Shelves(MemoryCatalog(registry, accounts), registry, accounts)
        await _add_people(shelves)
        yield shelves
        return
    (tmp_path / "home").mkdir(mode=0o700)
    database = open_database(Path(shutil.copy(empty_database, tmp_path / "home" / "hub.db")))
    shelves = Shelves(SqlCatalog(database), SqlRegistry(database, clock=FakeClock()), SqlAccounts(database))
    await _add_people(shelves)
    yield shelves
    await database.close()


async def _add_people(shelves: Shelves) -> None:
    for person in (ADA, BOB):
        await shelves.accounts.add(person, "")


# ── Descriptions ─────────────────────────────────────────────────────────────────────────────────────────────────────


async def test_manifest_waits_until_it_is_described(shelves: Shelves) -> None:
    await shelves.put("ada/tiny", body=b"{}", facts=None)
    (waiting,) = await shelves.catalog.undescribed(limit=10)
    assert (waiting.digest, waiting.media_type, waiting.body) == (digest_of(b"{}"), IMAGE, b"{}")
    await shelves.catalog.describe(Description(digest=waiting.digest, facts=LLAMA))
    assert list(await shelves.catalog.undescribed(limit=10)) == []


async def test_undescribed_are_at_most_as_many_as_asked_for(shelves: Shelves) -> None:
    for number in range(3):
        await shelves.put(f"ada/m{number}", facts=None)
    assert len(await shelves.catalog.undescribed(limit=2)) == 2


async def test_description_comes_back_as_it_was(shelves: Shelves) -> None:
    await shelves.put("ada/tiny", body=b"{}", facts=None)
    description = Description(
        digest=digest_of(b"{}"),
        facts=LLAMA,
        template="{{ .Prompt }}",
        system="Be kind.",
        license="Apache \N{COPYRIGHT SIGN}",
        parameters=(("stop", "</s>"), ("stop", "b"), ("temperature", "0.2")),
        layers=(LayerFacts("model", digest_of(b"w"), 5), LayerFacts("application/x", digest_of(b"v", "sha512"), 2**40)),
        layer_count=70,
        note="cut short",
    )
    await shelves.catalog.describe(description)
    assert await shelves.catalog.descriptions([digest_of(b"{}"), digest_of(b"nothing")]) == {digest_of(b"{}"): description}


async def test_description_of_a_manifest_that_is_gone_is_passed_over(shelves: Shelves) -> None:
    await shelves.catalog.describe(Description(digest=Digest("0" * 64), facts=LLAMA))
    assert await shelves.catalog.descriptions([Digest("0" * 64)]) == {}


async def test_bare_facts_come_back_as_they_were(shelves: Shelves) -> None:
    await shelves.put("ada/tiny", facts=Facts(kind=Kind.ARTIFACT))
    (entry,) = (await shelves.catalog.page(VISITOR, order=Order.NEWEST, limit=5)).entries
    assert entry.facts == Facts(kind=Kind.ARTIFACT)


# ── Listings ─────────────────────────────────────────────────────────────────────────────────────────────────────────


async def test_empty_catalog_has_an_empty_page(shelves: Shelves) -> None:
    assert await shelves.catalog.page(reach(ADA), order=Order.NEWEST, limit=5) == CatalogPage(entries=())


async def test_entry_tells_what_a_listing_shows(shelves: Shelves) -> None:
    repository = await shelves.put("Ada/Tiny")
    await shelves.catalog.add_pulls({RepositoryName("ada", "TINY"): 3})
    (entry,) = (await shelves.catalog.page(VISITOR, order=Order.NEWEST, limit=5)).entries
    assert (entry.repository_id, entry.namespace, entry.name) == (repository.id, "Ada", "Tiny")
    assert (entry.visibility, entry.pulls, entry.facts) == (Visibility.PUBLIC, 3, LLAMA)
    assert entry.updated_at == NOON + timedelta(minutes=1)


async def test_entry_shows_latest_or_else_the_tag_that_moved_last(shelves: Shelves) -> None:
    small, large = Facts(kind=Kind.MODEL, size_bytes=1), Facts(kind=Kind.MODEL, size_bytes=2)
    await shelves.put("ada/a", tag="old", facts=small)
    await shelves.put("ada/a", tag="new", facts=large)
    await shelves.put("ada/b", tag="latest", facts=small)
    await shelves.put("ada/b", tag="new", facts=large)
    await shelves.registry.add_repository(
        Repository(id="rx", namespace="ada", name="c", visibility=Visibility.PUBLIC, created_at=NOON, updated_at=NOON)
    )
    page = await shelves.catalog.page(VISITOR, order=Order.NEWEST, limit=5)
    assert [(entry.name, entry.facts) for entry in page.entries] == [("b", small), ("a", large), ("c", None)]


async def test_t029_listing_shows_what_is_public_and_what_is_ones_own(shelves: Shelves) -> None:
    await shelves.put("ada/private", is_public=False)
    await shelves.put("ada/public")
    await shelves.put("bob/private", is_public=False)
    assert await shelves.names(VISITOR) == ["ada/public"]
    assert await shelves.names(reach(ADA)) == ["ada/public", "ada/private"]
    assert await shelves.names(reach(BOB)) == ["bob/private", "ada/public"]
    assert await shelves.names(VISITOR, namespace="ada") == ["ada/public"]
    assert await shelves.names(reach(ADA), namespace="BOB") == []


@pytest.mark.parametrize("words", [(), ("llama",)])
async def test_t029_collaborator_sees_the_repository_and_nothing_else_of_its_owner(
    shelves: Shelves, words: tuple[str, ...]
) -> None:
    repository = await shelves.put("ada/shared", is_public=False)
    await shelves.put("ada/secret", is_public=False)
    await shelves.registry.set_collaborator(repository.id, BOB.id, Right.PULL)
    assert await shelves.names(reach(BOB), *words) == ["ada/shared"]
    assert await shelves.names(reach(BOB), *words, namespace="ada") == ["ada/shared"]
    assert await shelves.names(reach(BOB), *words, namespace="bob") == []
    await shelves.registry.set_collaborator(repository.id, BOB.id, None)
    assert await shelves.names(reach(BOB), *words) == []


async def test_listing_shows_a_public_one_that_lets_somebody_in_once(shelves: Shelves) -> None:
    repository = await shelves.put("ada/shared")
    await shelves.registry.set_collaborator(repository.id, BOB.id, Right.PUSH)
    for words in ((), ("shared",)):
        assert await shelves.names(reach(BOB), *words) == ["ada/shared"]


@pytest.mark.parametrize("words", [(), ("private",)])
async def test_t029_change_of_visibility_counts_at_once(shelves: Shelves, words: tuple[str, ...]) -> None:
    repository = await shelves.put("ada/private", is_public=False)
    assert await shelves.names(VISITOR, *words) == []
    await shelves.registry.change_repository(repository.id, visibility=Visibility.PUBLIC)
    assert await shelves.names(VISITOR, *words) == ["ada/private"]
    await shelves.registry.change_repository(repository.id, visibility=Visibility.PRIVATE)
    assert await shelves.names(VISITOR, *words) == []
    assert await shelves.names(reach(ADA), *words) == ["ada/private"]


@pytest.mark.parametrize("words", [(), ("tiny",)])
async def test_t119_what_a_disabled_account_has_is_gone_for_everybody(shelves: Shelves, words: tuple[str, ...]) -> None:
    shared = await shelves.put("ada/tiny", is_public=False)
    await shelves.put("ada/tiny-public")
    await shelves.registry.set_collaborator(shared.id, BOB.id, Right.PULL)
    await shelves.accounts.set_disabled(ADA.id, NOON)
    assert await shelves.names(VISITOR, *words) == []
    assert await shelves.names(reach(BOB), *words) == []
    await shelves.accounts.set_disabled(ADA.id, None)
    assert len(await shelves.names(reach(BOB), *words)) == 2


async def test_library_needs_no_account_and_its_private_ones_are_the_admins(shelves: Shelves) -> None:
    await shelves.put("library/llama")
    await shelves.put("library/secret", is_public=False)
    assert await shelves.names(VISITOR) == ["library/llama"]
    assert await shelves.names(reach(ADA, "library")) == ["library/secret", "library/llama"]


@pytest.mark.parametrize("words", [(), ("llama",)])
async def test_listing_begins_with_what_was_pushed_last_or_pulled_most(shelves: Shelves, words: tuple[str, ...]) -> None:
    for name in ("a", "b", "c"):
        await shelves.put(f"ada/{name}")
    await shelves.put("ada/a", tag="second")
    await shelves.catalog.add_pulls({RepositoryName("ada", "b"): 2, RepositoryName("ada", "c"): 5, RepositoryName("ada", "x"): 1})
    assert await shelves.names(VISITOR, *words) == ["ada/a", "ada/c", "ada/b"]
    assert await shelves.names(VISITOR, *words, order=Order.MOST_PULLED) == ["ada/c", "ada/b", "ada/a"]


@pytest.mark.parametrize("words", [(), ("llama",)])
@pytest.mark.parametrize("order", list(Order))
@pytest.mark.parametrize("limit", [1, 2, 3, 7])
async def test_pages_of_a_listing_hold_everything_once(
    shelves: Shelves, words: tuple[str, ...], order: Order, limit: int
) -> None:
    for number in range(7):
        await shelves.put(f"{('ada', 'bob')[number % 2]}/m{number}", is_public=number % 3 > 0)
    await shelves.catalog.add_pulls({RepositoryName("ada", "m2"): 1, RepositoryName("bob", "m5"): 1})
    whole = await shelves.names(reach(ADA), *words, order=order)
    found: list[str] = []
    after = ""
    while True:
        page = await shelves.catalog.page(reach(ADA), order=order, limit=limit, words=words, after=after)
        found += named(page)
        after = page.after
        if not after:
            break
    assert found == whole
    assert len(set(found)) == len(found) == 6


@pytest.mark.parametrize("after", ["x", "1", "1.", ".r", "-1.r", "1.r;", "99999999999999999999.r", "1. r", "\u0663.r"])
async def test_piece_of_nobodys_listing_is_refused(shelves: Shelves, after: str) -> None:
    with pytest.raises(CorralError) as caught:
        await shelves.catalog.page(VISITOR, order=Order.NEWEST, limit=5, after=after)
    assert caught.value.code == "bad_request"


async def test_pulls_are_counted_in_any_case(shelves: Shelves) -> None:
    repository = await shelves.put("Ada/Tiny")
    assert await shelves.catalog.pulls(repository.id) == 0
    await shelves.catalog.add_pulls({RepositoryName("ada", "TINY"): 2})
    await shelves.catalog.add_pulls({RepositoryName("Ada", "Tiny"): 1})
    await shelves.catalog.add_pulls({})
    assert await shelves.catalog.pulls(repository.id) == 3
    assert await shelves.catalog.pulls("nothing") == 0


# ── Search ───────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("words", "found"),
    [
        (("smol",), True),
        (("SMOLLM2",), True),
        (("lm2",), False),
        (("ada",), True),
        (("smollm2-135m",), True),
        (("135m",), True),
        (("llama",), True),
        (("q4_1",), True),
        (("tool",), True),
        (("smol", "tools", "q4"), True),
        (("smol", "zebra"), False),
        (("smol/", "ada:"), True),
        (("",), False),
        (("\N{GREEK SMALL LETTER ALPHA}",), False),
    ],
)
async def test_search_finds_what_begins_a_word_of_its_name_tags_or_facts(
    shelves: Shelves, words: tuple[str, ...], found: bool
) -> None:
    await shelves.put("ada/SmolLM2", tag="135m")
    assert await shelves.names(VISITOR, *words) == (["ada/SmolLM2"] if found else [])


_NO_WORDS = (
    '"',
    "'",
    '""',
    "*",
    "a*",
    "NEAR(a b)",
    "words:a",
    "scope : public",
    "a OR b",
    "NOT",
    "-a",
    "^a",
    "(",
    ")",
    "{a}",
    "+",
)


@pytest.mark.parametrize("word", [*_NO_WORDS, "\x00a", "a\udcffb"])
async def test_t057_words_are_only_ever_words(shelves: Shelves, word: str) -> None:
    await shelves.put("ada/secret", is_public=False)
    assert await shelves.names(VISITOR, word) == []
    assert await shelves.names(VISITOR, word, order=Order.MOST_PULLED) == []


async def test_search_follows_tags_and_names_that_go(shelves: Shelves) -> None:
    repository = await shelves.put("ada/tiny", tag="oldtag")
    await shelves.put("ada/tiny", tag="newtag")
    assert await shelves.names(VISITOR, "oldtag") == await shelves.names(VISITOR, "newtag") == ["ada/tiny"]
    await shelves.registry.remove_tag(repository.id, "oldtag")
    await shelves.catalog.refresh(limit=5)
    assert await shelves.names(VISITOR, "oldtag") == []
    await shelves.registry.remove_repository(repository.id)
    assert await shelves.names(VISITOR, "tiny") == await shelves.names(VISITOR) == []


async def test_repository_is_found_by_its_name_before_anything_is_known_of_it(shelves: Shelves) -> None:
    await shelves.registry.add_repository(
        Repository(id="rx", namespace="ada", name="empty", visibility=Visibility.PUBLIC, created_at=NOON, updated_at=NOON)
    )
    assert await shelves.names(VISITOR, "empty") == ["ada/empty"]


async def test_search_in_a_namespace_stays_there(shelves: Shelves) -> None:
    for path in ("ada/tiny", "bob/tiny", "adamant/tiny"):
        await shelves.put(path)
    assert await shelves.names(VISITOR, "tiny", namespace="Ada") == ["ada/tiny"]


def test_match_of_too_many_words_is_cut() -> None:
    assert match_of(["a"] * 20).count('"a"*') == 8
