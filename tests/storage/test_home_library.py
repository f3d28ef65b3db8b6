"""What the model store keeps and what it removes, and how it treats what others left in it."""

import errno
import os
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from corral.storage.home import HomeModels
from corral.wire.errors import CorralError
from corral.wire.inventory import show_body, tags_entry
from corral.wire.names import Digest, parse_name
from fakes_library import WEIGHTS, digest_of
from fakes_models import LLAMA, gguf_bytes, put_blob, put_model

TINY = parse_name("tiny:1b")
#: Files get their ctime from the machine's clock, so the server's is ahead of it.
LATER = datetime.now(UTC) + timedelta(hours=2)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "models"


@pytest.fixture
def home(root: Path, tmp_path: Path) -> HomeModels:
    return HomeModels(root, tmp_path / "cache")


def blobs(root: Path) -> set[str]:
    return {path.name for path in (root / "blobs").iterdir()}


def blob_path(root: Path, digest: Digest) -> Path:
    return root / "blobs" / digest.file_name


# ── Pruning ──────────────────────────────────────────────────────────────────────────────────────────────────────────


async def test_prune_removes_old_blobs_that_no_manifest_names(home: HomeModels, root: Path) -> None:
    put_model(root, weights=WEIGHTS)
    before = blobs(root)
    put_blob(root, b"spare")
    assert await home.prune(datetime.now(UTC)) == 0
    assert await home.prune(LATER) == 1
    assert blobs(root) == before


async def test_prune_keeps_what_is_held_or_loaded(root: Path, tmp_path: Path) -> None:
    held, loaded = put_blob(root, b"held"), put_blob(root, b"loaded")
    home = HomeModels(root, tmp_path / "cache", in_use=lambda: [str(blob_path(root, loaded))])
    with home.hold([held]):
        assert await home.prune(LATER) == 0
    assert await home.prune(LATER) == 1
    assert blobs(root) == {loaded.file_name}
    await home.remove_unused([loaded])
    assert blobs(root) == {loaded.file_name}


async def test_prune_leaves_what_is_no_blob_to_those_who_made_it(home: HomeModels, root: Path) -> None:
    put_blob(root, b"spare")
    names = {"sha256-123456", f"sha256-{'0' * 64}-partial", f"sha256-{'0' * 64}-partial-3", "README"}
    for name in names:
        (root / "blobs" / name).touch()
    (root / "blobs" / f"sha256-{'1' * 64}").mkdir()
    await home.prune(LATER)
    assert blobs(root) >= names


async def test_prune_removes_nothing_while_a_manifest_cannot_be_read(home: HomeModels, root: Path) -> None:
    path = put_model(root, weights=WEIGHTS)
    spare = put_blob(root, b"spare")
    path.with_name("broken").write_bytes(b"{")
    assert await home.prune(LATER) is None
    assert spare.file_name in blobs(root)


@pytest.mark.parametrize("level", ["manifests", "library"])
async def test_nothing_is_removed_or_listed_while_a_directory_of_manifests_cannot_be_read(
    home: HomeModels, root: Path, monkeypatch: pytest.MonkeyPatch, level: str
) -> None:
    put_model(root, weights=WEIGHTS)
    scan = os.scandir

    def failing(path: Path) -> Any:
        if Path(path).name == level:
            raise OSError(errno.EMFILE, "Too many open files")
        return scan(path)

    with monkeypatch.context() as patched:
        patched.setattr(os, "scandir", failing)
        for refused in (home.list(), home.get(TINY), home.prune(LATER), home.remove_unused([digest_of(WEIGHTS)])):
            with pytest.raises(CorralError, match="the model store cannot be read: Too many open files") as caught:
                await refused
            assert caught.value.code == "unavailable"
    assert digest_of(WEIGHTS).file_name in blobs(root)
    assert await home.get(TINY) is not None


async def test_prune_keeps_what_a_linked_part_of_the_tree_names(home: HomeModels, root: Path, tmp_path: Path) -> None:
    path = put_model(root, weights=WEIGHTS)
    elsewhere = tmp_path / "elsewhere"
    (root / "manifests" / "registry.ollama.ai").rename(elsewhere)
    (root / "manifests" / "registry.ollama.ai").symlink_to(elsewhere)
    assert await home.prune(LATER) == 0
    assert digest_of(WEIGHTS).file_name in blobs(root)
    # A link that leads nowhere may be a disk that is not there today.
    (elsewhere / path.relative_to(root / "manifests" / "registry.ollama.ai")).unlink()
    (root / "manifests" / "registry.ollama.ai").unlink()
    (root / "manifests" / "registry.ollama.ai").symlink_to(tmp_path / "unplugged")
    assert await home.prune(LATER) is None
    assert digest_of(WEIGHTS).file_name in blobs(root)


async def test_prune_gives_blobs_the_names_they_have_today(home: HomeModels, root: Path) -> None:
    put_model(root, weights=WEIGHTS)
    digest = digest_of(WEIGHTS)
    blob_path(root, digest).rename(root / "blobs" / str(digest))
    await home.prune(LATER)
    assert digest.file_name in blobs(root)
    model = await home.get(TINY)
    assert model is not None
    assert model.capabilities


async def test_prune_removes_empty_directories_of_manifests(home: HomeModels, root: Path) -> None:
    put_model(root)
    (root / "manifests" / "host" / "ns" / "gone").mkdir(parents=True)
    await home.prune(LATER)
    assert sorted(path.name for path in (root / "manifests").iterdir()) == ["registry.ollama.ai"]


async def test_prune_of_an_absent_directory_makes_none(home: HomeModels, root: Path) -> None:
    assert await home.prune(LATER) == 0
    assert not root.exists()


# ── Removing ─────────────────────────────────────────────────────────────────────────────────────────────────────────


async def test_remove_takes_empty_directories_with_it_and_no_others(home: HomeModels, root: Path) -> None:
    put_model(root, "ns/only:1")
    put_model(root, "tiny:1b")
    other = put_model(root, "tiny:2b")
    assert await home.remove(parse_name("NS/only:1")) is True
    assert await home.remove(TINY) is True
    assert [path for path in (root / "manifests").rglob("*") if path.is_file()] == [other]
    assert not list((root / "manifests").rglob("ns"))
    assert await home.get(TINY) is None


async def test_unused_blobs_of_a_damaged_manifest_are_kept(home: HomeModels, root: Path) -> None:
    path = put_model(root, weights=WEIGHTS)
    path.write_bytes(path.read_bytes()[:-2])
    await home.remove_unused([digest_of(WEIGHTS)])
    assert digest_of(WEIGHTS).file_name in blobs(root)


async def test_t034_nothing_is_written_or_removed_through_a_link(home: HomeModels, root: Path, tmp_path: Path) -> None:
    body = put_model(root, "good").read_bytes()
    outside = tmp_path / "outside"
    outside.mkdir()
    (root / "manifests" / "registry.ollama.ai" / "ns").symlink_to(outside)
    with pytest.raises(CorralError, match="symbolic link"):
        await home.put_manifest(parse_name("ns/model"), body)
    (outside / "model").mkdir()
    (outside / "model" / "latest").write_bytes(body)
    assert await home.remove(parse_name("ns/model")) is False
    assert (outside / "model" / "latest").exists()


async def test_manifest_that_is_a_link_is_replaced_and_not_followed(home: HomeModels, root: Path, tmp_path: Path) -> None:
    path = put_model(root)
    body, outside = path.read_bytes(), tmp_path / "outside"
    outside.write_bytes(b"mine")
    path.unlink()
    path.symlink_to(outside)
    await home.put_manifest(TINY, body)
    assert outside.read_bytes() == b"mine"
    assert not path.is_symlink()
    assert path.read_bytes() == body


# ── Workshops ────────────────────────────────────────────────────────────────────────────────────────────────────────


async def test_workshop_of_a_killed_server_is_removed_when_it_is_old(home: HomeModels, root: Path) -> None:
    for name, age_s in (("corral-workshop-old", 7200), ("corral-workshop-new", 0)):
        (root / name).mkdir(parents=True)
        os.utime(root / name, (datetime.now(UTC).timestamp() - age_s,) * 2)
    await home.remove_stale(datetime.now(UTC))
    assert [path.name for path in root.iterdir()] == ["corral-workshop-new"]


async def test_a_tool_cannot_spoil_a_blob_by_replacing_its_file(home: HomeModels, root: Path) -> None:
    digest = put_blob(root, b"abc")
    with home.workshop({"a": digest}) as directory:
        Path(directory, "a").unlink()
        Path(directory, "a").write_bytes(b"spoiled")
    assert blob_path(root, digest).read_bytes() == b"abc"


# ── Large vocabularies ───────────────────────────────────────────────────────────────────────────────────────────────


async def test_a_vocabulary_of_250000_costs_nothing_once_it_is_known(root: Path, tmp_path: Path) -> None:
    tokens = [f"token{number:06d}" for number in range(250_000)]
    weights = gguf_bytes({**LLAMA, "tokenizer.ggml.tokens": tokens, "tokenizer.ggml.token_type": [1] * len(tokens)})
    put_model(root, weights=weights)
    assert len(await HomeModels(root, tmp_path / "cache").list()) == 1
    known_ms = []
    for _ in range(3):
        # As after a start of the server: what is known lies on the disk.
        home = HomeModels(root, tmp_path / "cache")
        began = time.perf_counter()
        (model,) = await home.list()
        shown = show_body(model)
        known_ms.append((time.perf_counter() - began) * 1000)
        assert shown["model_info"]["tokenizer.ggml.tokens"] is None
        assert tags_entry(model)["details"]["family"] == "llama"
    assert min(known_ms) < 50
