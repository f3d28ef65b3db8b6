"""Partial downloads: Ollama's form on the disk, resuming, and that nothing unverified gets a blob's name."""

import errno
import json
import os
from hashlib import sha256
from pathlib import Path

import pytest

from corral.storage import partials
from corral.storage.blobs import BlobFiles
from corral.storage.partials import BlobInbox
from corral.wire.errors import CorralError
from corral.wire.names import Digest
from corral.wire.registry import ByteRange

CONTENT = bytes(range(256)) * 4000


def digest_of(content: bytes) -> Digest:
    return Digest(sha256(content).hexdigest())


def small_parts(size_bytes: int) -> list[ByteRange]:
    return [ByteRange(first, min(first + 100_000, size_bytes) - 1) for first in range(0, size_bytes, 100_000)]


@pytest.fixture(autouse=True)
def smaller(monkeypatch: pytest.MonkeyPatch) -> None:
    # Parts have 100 MB at least, which is no size for a unit test.
    monkeypatch.setattr(partials, "parts", small_parts)
    monkeypatch.setattr(partials, "_BLOCK", 16_384)
    monkeypatch.setattr(partials, "_NOTE_EVERY", 32_768)


@pytest.fixture
def inbox(tmp_path: Path) -> BlobInbox:
    return BlobInbox(BlobFiles(tmp_path / "blobs", tmp_path / "cache"))


def notes(tmp_path: Path, digest: Digest) -> list[dict[str, int]]:
    found = sorted((tmp_path / "blobs").glob(f"{digest.file_name}-partial-*"), key=lambda path: int(path.name.split("-")[-1]))
    return [json.loads(path.read_text()) for path in found]


async def fetch(inbox: BlobInbox, content: bytes, *, until: int | None = None) -> partials.PartialFile:
    """Write what is missing of a blob, part by part; of every part only `until` bytes."""
    blob = await inbox.receive(digest_of(content), len(content))
    for part in blob.missing():
        end = part.first + (part.count if until is None else min(part.count, until))
        for offset in range(part.first, end, 10_000):
            await blob.write(part.number, content[offset : min(offset + 10_000, end)])
    return blob


async def test_blob_that_arrived_whole_has_its_name_and_nothing_else_is_left(inbox: BlobInbox, tmp_path: Path) -> None:
    blob = await fetch(inbox, CONTENT)
    assert blob.completed_bytes == len(CONTENT)
    await blob.finish()
    await blob.keep()
    assert [path.name for path in (tmp_path / "blobs").iterdir()] == [digest_of(CONTENT).file_name]
    assert inbox.blob_size(digest_of(CONTENT)) == len(CONTENT)
    assert b"".join([block async for block in inbox.read_blob(digest_of(CONTENT), 5, 100_000)]) == CONTENT[5:100_005]


async def test_blob_of_no_bytes_is_received(inbox: BlobInbox) -> None:
    blob = await inbox.receive(digest_of(b""), 0)
    assert blob.missing() == []
    await blob.finish()
    assert inbox.blob_size(digest_of(b"")) == 0


async def test_notes_have_ollamas_form(inbox: BlobInbox, tmp_path: Path) -> None:
    blob = await fetch(inbox, CONTENT, until=40_000)
    await blob.keep()
    found = notes(tmp_path, digest_of(CONTENT))
    assert found[1] == {"N": 1, "Offset": 100_000, "Size": 100_000, "Completed": 40_000}
    assert sum(note["Size"] for note in found) == len(CONTENT)
    assert (tmp_path / "blobs" / f"{digest_of(CONTENT).file_name}-partial").stat().st_size == len(CONTENT)


async def test_download_that_was_kept_goes_on_where_it_was(inbox: BlobInbox) -> None:
    await (await fetch(inbox, CONTENT, until=40_000)).keep()
    again = await inbox.receive(digest_of(CONTENT), len(CONTENT))
    assert again.missing()[0].first == 40_000
    assert again.missing()[1].first == 140_000
    await again.keep()
    await (await fetch(inbox, CONTENT)).finish()


async def test_download_of_a_killed_process_goes_on_from_its_notes(inbox: BlobInbox) -> None:
    blob = await fetch(inbox, CONTENT, until=60_000)
    os.close(blob._descriptor)  # type: ignore[arg-type]  # as the end of a process does
    again = await inbox.receive(digest_of(CONTENT), len(CONTENT))
    assert 32_768 <= again.missing()[0].first <= 60_000
    await again.keep()
    await (await fetch(inbox, CONTENT)).finish()


async def test_download_that_ollama_began_goes_on(inbox: BlobInbox, tmp_path: Path) -> None:
    path = tmp_path / "blobs" / digest_of(CONTENT).file_name
    path.parent.mkdir()
    half = len(CONTENT) // 2
    Path(f"{path}-partial").write_bytes(CONTENT[:half].ljust(len(CONTENT), b"\0"))
    Path(f"{path}-partial-0").write_text(json.dumps({"N": 0, "Offset": 0, "Size": half, "Completed": half}) + "\n")
    rest = {"N": 1, "Offset": half, "Size": len(CONTENT) - half, "Completed": 0}
    Path(f"{path}-partial-1").write_text(json.dumps(rest) + "\n")
    blob = await inbox.receive(digest_of(CONTENT), len(CONTENT))
    assert [(part.number, part.first) for part in blob.missing()] == [(1, half)]
    await blob.write(1, CONTENT[half:])
    await blob.finish()


async def test_t094_wrong_bytes_never_get_the_name_and_are_dropped(inbox: BlobInbox, tmp_path: Path) -> None:
    wrong = b"x" + CONTENT[1:]
    blob = await inbox.receive(digest_of(CONTENT), len(CONTENT))
    for part in blob.missing():
        await blob.write(part.number, wrong[part.first : part.first + part.count])
    with pytest.raises(CorralError, match="digest mismatch, file must be downloaded again: want sha256:") as refused:
        await blob.finish()
    assert refused.value.code == "digest_invalid"
    assert list((tmp_path / "blobs").iterdir()) == []


async def test_t094_unfinished_blob_is_not_finished(inbox: BlobInbox) -> None:
    blob = await fetch(inbox, CONTENT, until=40_000)
    with pytest.raises(CorralError, match="digest mismatch"):
        await blob.finish()


@pytest.mark.parametrize(
    "note",
    [
        "",
        "{",
        '{"N":0,"Offset":0,"Size":-5,"Completed":0}',
        '{"N":0,"Offset":7,"Size":1024000,"Completed":0}',
        '{"N":0,"Offset":0,"Size":1024000,"Completed":1024001}',
        '{"N":5,"Offset":0,"Size":1024000,"Completed":0}',
        '{"N":0,"Offset":0,"Size":99999999999999999999,"Completed":0}',
    ],
)
async def test_damaged_notes_make_the_download_begin_anew(inbox: BlobInbox, tmp_path: Path, note: str) -> None:
    path = tmp_path / "blobs" / digest_of(CONTENT).file_name
    path.parent.mkdir()
    Path(f"{path}-partial").write_bytes(bytes(len(CONTENT)))
    Path(f"{path}-partial-0").write_text(note)
    Path(f"{path}-partial-77").write_text(note)
    await (await fetch(inbox, CONTENT)).finish()
    assert [path.name for path in (tmp_path / "blobs").iterdir()] == [digest_of(CONTENT).file_name]


async def test_what_is_there_of_another_size_is_dropped(inbox: BlobInbox) -> None:
    other = await inbox.receive(digest_of(CONTENT), 5_000)
    await other.write(0, bytes(4_000))
    await other.keep()
    await (await fetch(inbox, CONTENT)).finish()


async def test_second_receiver_of_a_blob_gets_conflict(inbox: BlobInbox) -> None:
    first = await inbox.receive(digest_of(CONTENT), len(CONTENT))
    with pytest.raises(CorralError) as refused:
        await inbox.receive(digest_of(CONTENT), len(CONTENT))
    assert refused.value.code == "conflict"
    await first.keep()


async def test_disk_that_is_too_small_is_told_before_the_download(inbox: BlobInbox) -> None:
    with pytest.raises(CorralError) as refused:
        await inbox.receive(digest_of(CONTENT), 1 << 40)
    assert refused.value.code == "storage_full"


async def test_link_in_the_place_of_a_partial_is_not_followed(inbox: BlobInbox, tmp_path: Path) -> None:
    (tmp_path / "blobs").mkdir()
    victim = tmp_path / "victim"
    victim.write_bytes(b"precious")
    (tmp_path / "blobs" / f"{digest_of(CONTENT).file_name}-partial").symlink_to(victim)
    with pytest.raises(CorralError):
        await inbox.receive(digest_of(CONTENT), len(CONTENT))
    assert victim.read_bytes() == b"precious"


async def test_disk_that_fills_up_keeps_what_is_there(inbox: BlobInbox, monkeypatch: pytest.MonkeyPatch) -> None:
    pwrite, left = os.pwrite, [250_000]

    def filling(descriptor: int, block: bytes, offset: int) -> int:
        # Only the kernel can fill a disk; notes are written with it too.
        left[0] -= len(block)
        if left[0] < 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        return pwrite(descriptor, block, offset)

    monkeypatch.setattr(os, "pwrite", filling)
    blob = await inbox.receive(digest_of(CONTENT), len(CONTENT))
    first, second, third, *_ = blob.missing()
    for part in (first, second):
        await blob.write(part.number, CONTENT[part.first : part.first + part.count])
    with pytest.raises(CorralError) as refused:
        await blob.write(third.number, CONTENT[third.first : third.first + third.count])
    assert refused.value.code == "storage_full"
    await blob.keep()
    monkeypatch.undo()
    again = await inbox.receive(digest_of(CONTENT), len(CONTENT))
    assert again.completed_bytes == 200_000
    await again.keep()


async def test_t093_dropped_download_leaves_nothing(inbox: BlobInbox, tmp_path: Path) -> None:
    blob = await fetch(inbox, CONTENT, until=40_000)
    await blob.drop()
    await blob.keep()
    assert list((tmp_path / "blobs").iterdir()) == []
    done = await fetch(inbox, CONTENT)
    await done.finish()
    await done.drop()
    assert inbox.blob_size(digest_of(CONTENT)) == len(CONTENT)


async def test_t093_blob_that_cannot_fit_leaves_nothing(inbox: BlobInbox, tmp_path: Path) -> None:
    with pytest.raises(CorralError) as refused:
        await inbox.receive(digest_of(CONTENT), 1 << 60)
    assert refused.value.code == "storage_full"
    assert list((tmp_path / "blobs").iterdir()) == []


async def test_t094_name_appears_only_when_the_content_is_whole(inbox: BlobInbox, tmp_path: Path) -> None:
    path = tmp_path / "blobs" / digest_of(CONTENT).file_name
    blob = await inbox.receive(digest_of(CONTENT), len(CONTENT))
    for part in blob.missing():
        await blob.write(part.number, CONTENT[part.first : part.first + part.count])
        assert not path.exists()
    await blob.finish()
    assert path.read_bytes() == CONTENT
    assert path.stat().st_mode & 0o777 == 0o644
