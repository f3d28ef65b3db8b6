"""Every LibraryStore and LibraryBlobs keeps these promises: the fake in memory and the home directory."""

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from corral.core.library import LibraryBlobs, LibraryStore
from corral.storage.home import HomeModels
from corral.wire.errors import CorralError
from corral.wire.manifest import CONFIG_TYPE, MODEL_LAYER, Layer, Manifest, format_manifest
from corral.wire.names import parse_name
from fakes_library import WEIGHTS, MemoryLibrary, digest_of

TINY = parse_name("Tiny:1b")


class Whole(LibraryStore, LibraryBlobs):
    """Both ports, for tests that need a blob and a manifest."""


@pytest.fixture(params=["memory", "home"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Whole:
    if request.param == "memory":
        return MemoryLibrary()  # type: ignore[return-value]
    return HomeModels(tmp_path / "models", tmp_path / "cache")  # type: ignore[return-value]


async def chunks(*parts: bytes) -> AsyncIterator[bytes]:
    for part in parts:
        yield part


async def manifest_of(store: Whole, weights: bytes = WEIGHTS, config: bytes = b"{}") -> bytes:
    """A manifest whose blobs are in the store."""
    digests = [(await store.put_bytes(content))[0] for content in (config, weights)]
    described = Layer(media_type=CONFIG_TYPE, digest=digests[0], size_bytes=len(config))
    layer = Layer(media_type=MODEL_LAYER, digest=digests[1], size_bytes=len(weights))
    return format_manifest(Manifest(config=described, layers=(layer,)))


async def test_manifest_is_kept_as_it_was_written_under_the_first_spelling(store: Whole) -> None:
    first, second = await manifest_of(store), await manifest_of(store, config=b'{"model_type":"x"}')
    assert await store.put_manifest(TINY, first) == TINY
    assert await store.put_manifest(parse_name("tiny:1B"), second) == TINY
    assert await store.manifest(parse_name("TINY:1b")) == (TINY, second)
    model = await store.get(parse_name("tiny:1B"))
    assert model is not None
    assert model.name == TINY
    assert model.weights is not None
    assert model.weights.endswith(digest_of(WEIGHTS).file_name)


async def test_nothing_has_a_name_that_was_never_given(store: Whole) -> None:
    assert await store.manifest(TINY) is None
    assert await store.get(TINY) is None
    assert await store.remove(TINY) is False


async def test_removed_manifest_is_gone_and_its_blobs_are_unnamed(store: Whole) -> None:
    await store.put_manifest(TINY, await manifest_of(store))
    weights, config = digest_of(WEIGHTS), digest_of(b"{}")
    assert await store.unnamed([weights, config]) == frozenset()
    assert await store.remove(parse_name("tiny:1B")) is True
    assert await store.get(TINY) is None
    assert await store.unnamed([weights, config]) == {weights, config}
    assert store.blob_size(weights) == len(WEIGHTS)


async def test_unused_blobs_are_removed_but_those_that_are_named_or_held(store: Whole) -> None:
    await store.put_manifest(TINY, await manifest_of(store))
    spare, held = [(await store.put_bytes(content))[0] for content in (b"spare", b"held")]
    every = [digest_of(WEIGHTS), digest_of(b"{}"), spare, held, digest_of(b"never there")]
    with store.hold([held]):
        with store.hold([held, held]):
            pass
        await store.remove_unused(every)
        assert [store.blob_size(digest) is not None for digest in every] == [True, True, False, True, False]
    await store.remove_unused(every)
    assert store.blob_size(held) is None


async def test_blob_that_arrives_has_its_digest_or_is_not_there(store: Whole) -> None:
    digest = digest_of(b"abc")
    await store.put_stream(chunks(b"a", b"", b"bc"), digest)
    assert store.blob_size(digest) == 3
    assert await store.read_head(digest, 2) == b"ab"
    assert await store.read_small(digest) == b"abc"
    with pytest.raises(CorralError) as caught:
        await store.put_stream(chunks(b"x"), digest_of(b"y"))
    assert caught.value.message == f'digest mismatch, expected "{digest_of(b"y")}", got "{digest_of(b"x")}"'
    assert store.blob_size(digest_of(b"y")) is None


async def test_what_is_not_there_is_not_found(store: Whole) -> None:
    absent = digest_of(b"absent")
    assert store.blob_size(absent) is None
    for asked in (store.read_small(absent), store.read_head(absent, 1), store.gguf_facts(absent)):
        with pytest.raises(CorralError) as caught:
            await asked
        assert caught.value.code == "not_found"


async def test_gguf_file_says_what_it_is_and_a_damaged_one_is_refused(store: Whole) -> None:
    digest, _ = await store.put_bytes(WEIGHTS)
    facts = await store.gguf_facts(digest)
    assert (facts.architecture, facts.kind, facts.quantization, facts.parameter_count) == ("llama", "", "Q4_1", 160)
    assert facts.is_projector is False
    assert facts.metadata["llama.context_length"] == 8192
    damaged, _ = await store.put_bytes(WEIGHTS[:-1])
    with pytest.raises(CorralError, match=f"blob {damaged} is not a usable GGUF file") as caught:
        await store.gguf_facts(damaged)
    assert caught.value.code == "bad_request"


async def test_workshop_holds_the_files_and_is_gone_afterwards(store: Whole) -> None:
    digest, _ = await store.put_bytes(b"abc")
    with store.workshop({"a.gguf": digest, "sub/b.json": digest}) as directory:
        place = Path(directory)
        assert [(place / name).read_bytes() for name in ("a.gguf", "sub/b.json")] == [b"abc", b"abc"]
        (place / "made").write_bytes(b"made")
        assert await store.take_in(f"{directory}/made") == (digest_of(b"made"), 4)
    assert not place.exists()
    assert store.blob_size(digest_of(b"made")) == 4


@pytest.mark.parametrize("files", [["../a"], ["/a"], ["a", "a/b"]])
async def test_t108_workshop_keeps_every_file_inside(store: Whole, files: list[str]) -> None:
    digest, _ = await store.put_bytes(b"abc")
    with pytest.raises(CorralError) as caught, store.workshop(dict.fromkeys(files, digest)):
        pass
    assert caught.value.code == "bad_request"


async def test_workshop_of_a_blob_that_is_not_there_is_not_found(store: Whole) -> None:
    with pytest.raises(CorralError) as caught, store.workshop({"a": digest_of(b"absent")}):
        pass
    assert caught.value.code == "not_found"
