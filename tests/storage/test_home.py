"""Models in Ollama's layout: what is found, what is passed over, and that what we install is what Ollama would read."""

import asyncio
import errno
import json
import os
import shutil
import stat
import threading
from hashlib import sha256
from pathlib import Path

import pytest

from corral.core.records import Capability, Model
from corral.storage.home import HomeModels
from corral.wire.errors import CorralError
from corral.wire.names import parse_name
from fakes import NOON
from fakes_models import LLAMA, gguf_bytes, put_model

TINY = parse_name("tiny:1b")
WEIGHTS = gguf_bytes()


def quiet(done: int, total: int) -> None:
    """Nobody watches."""


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "models"


@pytest.fixture
def home(root: Path, tmp_path: Path) -> HomeModels:
    return HomeModels(root, tmp_path / "cache")


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return file_with(tmp_path / "tiny.gguf", WEIGHTS)


def file_with(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


def manifest_path(root: Path, name: str = "tiny:1b") -> Path:
    parts = parse_name(name)
    return root / "manifests" / parts.host / parts.namespace / parts.model / parts.tag


async def names(home: HomeModels) -> list[str]:
    return [model.name.short for model in await home.list()]


# ── Listing ──────────────────────────────────────────────────────────────────────────────────────────────────────────


async def test_list_of_an_absent_directory_is_empty_and_makes_none(home: HomeModels, root: Path) -> None:
    assert list(await home.list()) == []
    assert await home.get(TINY) is None
    assert not root.exists()


async def test_list_is_newest_first(home: HomeModels, root: Path) -> None:
    for name, age in (("old", 30), ("new", 10), ("ns/mid:2", 20), ("hub.example:5000/ns/m:3", 40)):
        os.utime(put_model(root, name), (2e9 - age, 2e9 - age))
    assert await names(home) == ["new:latest", "ns/mid:2", "old:latest", "hub.example:5000/ns/m:3"]


async def test_model_has_the_digest_and_time_of_its_manifest(home: HomeModels, root: Path) -> None:
    path = put_model(root, weights=WEIGHTS)
    os.utime(path, ns=(0, 1_790_000_000_123_456_789))
    (model,) = await home.list()
    assert model.digest.hex == sha256(path.read_bytes()).hexdigest()
    assert model.modified_at == NOON.replace(microsecond=123456)
    assert model.capabilities == {Capability.COMPLETION}


async def test_bad_manifests_are_passed_over(home: HomeModels, root: Path) -> None:
    put_model(root, "good")
    for index, content in enumerate((b"", b"{", b"[]", b'{"config":{"digest":"sha256:../../x"}}', b"[" * 100_000)):
        file_with(manifest_path(root, "good").with_name(f"bad{index}"), content)
    gone = json.loads(put_model(root, "gone", config={"model_family": "gone"}).read_bytes())["config"]["digest"]
    (root / "blobs" / gone.replace(":", "-")).unlink()
    assert await names(home) == ["good:latest"]


async def test_what_is_no_manifest_is_passed_over(home: HomeModels, root: Path) -> None:
    good = put_model(root, "good")
    library = good.parent.parent
    for path in (
        library / ".hidden/tag",
        good.with_name("-dash"),
        good.with_name("ta\ng"),
        good.with_name("t" * 81),
        library / "file",
    ):
        path.parent.mkdir(exist_ok=True)
        shutil.copy(good, path)
    shutil.copytree(good.parent, library / "deep" / "deeper")
    shutil.copytree(library, library.parent / "name.space")
    os.mkfifo(good.with_name("fifo"))
    good.with_name("directory").mkdir()
    assert await names(home) == ["good:latest"]


async def test_t034_links_do_not_lead_out_of_the_tree(home: HomeModels, root: Path, tmp_path: Path) -> None:
    good, outside = put_model(root, "good"), tmp_path / "outside"
    shutil.copytree(good.parent, outside / "model")
    good.with_name("link").symlink_to(outside / "model" / "latest")
    (good.parent.parent / "linked").symlink_to(outside / "model")
    (good.parent.parent.parent / "ns").symlink_to(outside)
    (root / "manifests" / "host").symlink_to(outside)
    assert await names(home) == ["good:latest"]
    for name in ("good:link", "linked", "ns/model", "host/model/latest"):
        assert await home.get(parse_name(name)) is None


async def test_models_directory_may_itself_be_a_link(home: HomeModels, root: Path, tmp_path: Path) -> None:
    put_model(tmp_path / "elsewhere", "good")
    root.symlink_to(tmp_path / "elsewhere")
    assert await names(home) == ["good:latest"]


async def test_file_that_is_no_directory_holds_no_models(home: HomeModels, root: Path) -> None:
    root.mkdir()
    (root / "manifests").touch()
    assert await names(home) == []


async def test_manifest_that_changes_is_read_again(home: HomeModels, root: Path) -> None:
    put_model(root, config={"model_type": "1B"})
    before = (await home.list())[0]
    path = put_model(root, config={"model_type": "2B"})
    os.utime(path, ns=(5, 5))
    after = (await home.list())[0]
    assert (before.details.parameter_size, after.details.parameter_size) == ("1B", "2B")
    path.unlink()
    assert await names(home) == []


async def test_manifest_that_did_not_change_is_not_read_again(home: HomeModels, root: Path) -> None:
    path = put_model(root)
    (before,) = await home.list()
    found = path.stat()
    with path.open("r+b") as file:
        file.write(b"x")
    os.utime(path, ns=(found.st_atime_ns, found.st_mtime_ns))
    assert list(await home.list()) == [before]
    assert await home.get(TINY) == before


# ── One model ────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("name", ["Tiny:1B", "tiny:1b", "REGISTRY.ollama.ai/Library/TINY:1b"])
async def test_get_compares_without_regard_to_case(home: HomeModels, root: Path, name: str) -> None:
    put_model(root, "Tiny:1b")
    model = await home.get(parse_name(name))
    assert model is not None
    assert model.name.short == "Tiny:1b"


async def test_get_prefers_the_spelling_asked_for(home: HomeModels, root: Path) -> None:
    put_model(root, "tiny:1b", config={"model_type": "small"})
    put_model(root, "TINY:1b", config={"model_type": "large"})
    found = [await home.get(parse_name(name)) for name in ("tiny:1b", "TINY:1b")]
    assert [model.details.parameter_size for model in found if model] == ["small", "large"]


async def test_get_looks_behind_every_spelling_of_a_directory(home: HomeModels, root: Path) -> None:
    put_model(root, "Tiny:2b")
    put_model(root, "tiny:1b")
    found = await home.get(parse_name("tiny:2b"))
    assert found is not None
    assert found.name.short == "Tiny:2b"


async def test_get_follows_what_happens_to_the_file(home: HomeModels, root: Path) -> None:
    path = put_model(root, config={"model_type": "1B"})
    before = await home.get(TINY)
    put_model(root, config={"model_type": "2B"})
    os.utime(path, ns=(5, 5))
    after = await home.get(TINY)
    assert before is not None
    assert after is not None
    assert (before.details.parameter_size, after.details.parameter_size) == ("1B", "2B")
    path.unlink()
    assert await home.get(TINY) is None


async def test_get_of_a_damaged_model_says_so(home: HomeModels, root: Path) -> None:
    put_model(root).write_bytes(b"{")
    with pytest.raises(CorralError) as caught:
        await home.get(TINY)
    assert caught.value.code == "invalid"
    assert caught.value.message.startswith("model 'tiny:1b' is damaged: ")


async def test_get_of_a_manifest_without_end_is_refused(home: HomeModels, root: Path) -> None:
    with put_model(root).open("r+b") as file:
        file.truncate((16 << 20) + 1)
    with pytest.raises(CorralError, match="longer than"):
        await home.get(TINY)


# ── Installing ───────────────────────────────────────────────────────────────────────────────────────────────────────


async def test_install_writes_what_ollama_reads(home: HomeModels, root: Path, source: Path) -> None:
    model = await home.install_gguf(TINY, source, quiet)
    body = manifest_path(root).read_bytes()
    document = json.loads(body)
    (layer,) = document["layers"]
    config = (root / "blobs" / document["config"]["digest"].replace(":", "-")).read_bytes()
    assert body.endswith(b"}\n")
    assert list(document) == ["schemaVersion", "mediaType", "config", "layers"]
    assert document["config"] == {
        "mediaType": "application/vnd.docker.container.image.v1+json",
        "digest": f"sha256:{sha256(config).hexdigest()}",
        "size": len(config),
    }
    assert layer == {
        "mediaType": "application/vnd.ollama.image.model",
        "digest": f"sha256:{sha256(WEIGHTS).hexdigest()}",
        "size": len(WEIGHTS),
    }
    assert json.loads(config) == {
        "model_format": "gguf",
        "model_family": "llama",
        "model_families": ["llama"],
        "model_type": "160",
        "file_type": "Q4_1",
        "architecture": "amd64",
        "os": "linux",
        "rootfs": {"type": "layers", "diff_ids": [layer["digest"]]},
    }
    assert Path(model.weights or "").read_bytes() == WEIGHTS
    assert model == await home.get(TINY)


async def test_install_makes_files_that_other_users_can_read(home: HomeModels, root: Path, source: Path) -> None:
    old = os.umask(0o077)
    try:
        await home.install_gguf(TINY, source, quiet)
    finally:
        os.umask(old)
    files = [path for path in root.rglob("*") if path.is_file()]
    assert len(files) == 3
    assert {stat.S_IMODE(path.stat().st_mode) for path in files} == {0o644}


async def test_install_leaves_nothing_but_blobs_and_manifest(home: HomeModels, root: Path, source: Path) -> None:
    await home.install_gguf(TINY, source, quiet)
    assert sorted(path.name for path in root.iterdir()) == ["blobs", "manifests"]
    assert [path.name for path in (root / "manifests").iterdir()] == ["registry.ollama.ai"]
    assert all(len(path.name) == len("sha256-") + 64 for path in (root / "blobs").iterdir())


async def test_install_again_changes_nothing_and_reads_nothing(
    home: HomeModels, root: Path, source: Path, tmp_path: Path
) -> None:
    first = await home.install_gguf(TINY, source, quiet)
    before = manifest_path(root).stat()
    told: list[int] = []
    again = await HomeModels(root, tmp_path / "cache").install_gguf(TINY, source, lambda done, _: told.append(done))
    assert (again, told, manifest_path(root).stat()) == (first, [], before)


async def test_install_notices_a_changed_file(home: HomeModels, source: Path) -> None:
    first = await home.install_gguf(TINY, source, quiet)
    source.write_bytes(gguf_bytes({**LLAMA, "llama.context_length": 4096}))
    os.utime(source, ns=(1, 1))
    second = await home.install_gguf(TINY, source, quiet)
    assert (first.details.context_length, second.details.context_length) == (8192, 4096)
    assert (await home.get(TINY)) == second


async def test_install_keeps_what_a_modelfile_added_to_the_same_weights(home: HomeModels, root: Path, source: Path) -> None:
    put_model(root, weights=WEIGHTS, layers={"system": b"Be brief."})
    assert (await home.install_gguf(TINY, source, quiet)).system == "Be brief."


async def test_install_gives_parameters_to_what_is_new_and_leaves_what_was_there(home: HomeModels, source: Path) -> None:
    assert (await home.install_gguf(TINY, source, quiet, parameters={"num_predict": 9})).parameters == {"num_predict": 9}
    assert (await home.install_gguf(TINY, source, quiet, parameters={"num_predict": 7})).parameters == {"num_predict": 9}
    assert (await home.install_gguf(TINY, source, quiet)).parameters == {"num_predict": 9}


async def test_install_replaces_other_weights_of_that_name(home: HomeModels, root: Path, source: Path) -> None:
    put_model(root, weights=gguf_bytes({**LLAMA, "llama.context_length": 1}), layers={"system": b"Be brief."})
    model = await home.install_gguf(TINY, source, quiet)
    assert (model.system, model.details.context_length) == ("", 8192)


@pytest.mark.parametrize("damage", ["manifest", "config"])
async def test_install_mends_a_damaged_model(home: HomeModels, root: Path, source: Path, damage: str) -> None:
    await home.install_gguf(TINY, source, quiet)
    config = json.loads(manifest_path(root).read_bytes())["config"]["digest"]
    if damage == "manifest":
        manifest_path(root).write_bytes(b"{")
    else:
        (root / "blobs" / config.replace(":", "-")).unlink()
    mended = HomeModels(root, root.parent / "cache")
    assert (await mended.install_gguf(TINY, source, quiet)).details.family == "llama"


async def test_install_keeps_the_spelling_a_name_has(home: HomeModels, root: Path, source: Path) -> None:
    put_model(root, "Tiny:1B", weights=b"other")
    model = await home.install_gguf(parse_name("tiny:1b"), source, quiet)
    other = await home.install_gguf(parse_name("TINY:new"), source, quiet)
    assert (model.name.short, other.name.short) == ("Tiny:1B", "Tiny:new")
    assert [path.name for path in manifest_path(root, "Tiny").parent.parent.iterdir()] == ["Tiny"]


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04", WEIGHTS[:-1]])
async def test_install_of_what_is_not_gguf_says_so_and_leaves_nothing(
    home: HomeModels, root: Path, tmp_path: Path, content: bytes
) -> None:
    with pytest.raises(CorralError) as caught:
        await home.install_gguf(TINY, file_with(tmp_path / "x.gguf", content), quiet)
    assert caught.value.code == "bad_request"
    assert caught.value.message.startswith("x.gguf is not a usable GGUF file: ")
    assert not root.exists()


async def test_install_of_an_absent_file_is_not_found(home: HomeModels, tmp_path: Path) -> None:
    with pytest.raises(CorralError) as caught:
        await home.install_gguf(TINY, tmp_path / "no.gguf", quiet)
    assert (caught.value.code, caught.value.message) == ("not_found", "no.gguf: no such file")


async def test_r003_install_on_a_full_disk_says_so_and_shows_nothing(
    home: HomeModels, root: Path, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(_descriptor: int, _content: object) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    source.chmod(0o600)  # so that it has to be copied
    with monkeypatch.context() as patch:
        patch.setattr(os, "write", full)  # a test has no disk to fill
        with pytest.raises(CorralError) as caught:
            await home.install_gguf(TINY, source, quiet)
    assert caught.value.code == "storage_full"
    assert (await names(home), list((root / "blobs").iterdir())) == ([], [])
    assert (await home.install_gguf(TINY, source, quiet)).name == TINY


async def test_install_that_is_canceled_leaves_nothing(
    home: HomeModels, root: Path, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("corral.storage.blobs._BLOCK", 100)  # 1 MiB otherwise
    reached, canceled = threading.Event(), threading.Event()

    def wait(_done: int, _total: int) -> None:
        reached.set()
        canceled.wait(10)

    task = asyncio.create_task(home.install_gguf(TINY, source, wait))
    await asyncio.to_thread(reached.wait, 10)
    task.cancel()
    for _ in range(3):  # turns of the loop until the task has seen it
        await asyncio.sleep(0)
    canceled.set()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert (await names(home), list((root / "blobs").iterdir())) == ([], [])


async def test_t034_install_does_not_write_through_a_link(home: HomeModels, root: Path, source: Path, tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (root / "manifests").mkdir(parents=True)
    (root / "manifests" / "registry.ollama.ai").symlink_to(outside)
    with pytest.raises(CorralError) as caught:
        await home.install_gguf(TINY, source, quiet)
    assert caught.value.code == "invalid"
    assert list(outside.iterdir()) == []


async def test_install_into_a_directory_that_is_a_file_is_unavailable(home: HomeModels, root: Path, source: Path) -> None:
    root.touch()
    with pytest.raises(CorralError) as caught:
        await home.install_gguf(TINY, source, quiet)
    assert caught.value.code == "unavailable"


async def test_r019_stale_files_are_removed_at_a_start(home: HomeModels, root: Path, source: Path) -> None:
    await home.install_gguf(TINY, source, quiet)
    (root / "blobs" / "sha256-x.tmp").touch()
    await home.remove_stale(NOON.replace(year=2200))
    assert not (root / "blobs" / "sha256-x.tmp").exists()


# ── The small real model ─────────────────────────────────────────────────────────────────────────────────────────────


async def test_real_model_is_installed_and_described(home: HomeModels, small_model: Path) -> None:
    model: Model = await home.install_gguf(parse_name("smollm2:135m"), small_model, quiet)
    details = model.details
    assert (details.family, details.parameter_size, details.quantization_level) == ("llama", "134.52M", "Q4_1")
    assert (details.context_length, details.embedding_length) == (8192, 576)
    assert model.capabilities == {Capability.COMPLETION}
    assert "<|im_start|>" in model.chat_template
    assert model.metadata["general.parameter_count"] == 134_515_008
    assert model.size_bytes > small_model.stat().st_size
