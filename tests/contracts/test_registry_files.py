"""What every RegistryFiles promises: the ones on a disk, and the fake that the services' tests rely on."""

import asyncio
import errno
import os
import shutil
from collections.abc import AsyncIterator, Callable
from contextlib import aclosing
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from corral.core.registry import RegistryFiles
from corral.storage import uploads as uploads_module
from corral.storage.uploads import UploadFiles
from corral.wire.errors import CorralError
from corral.wire.names import Digest
from fakes import NOON, FakeClock
from fakes_registry import FakeRegistryFiles, digest_of
from identity_hub import error_of

LARGEST = 1 << 40


@dataclass(frozen=True)
class Disk:
    """Files of one kind. now: their time. restarted: as the next process has them; None for the fake, which has none."""

    files: RegistryFiles
    now: datetime
    restarted: Callable[[], RegistryFiles] | None = None


@pytest.fixture(params=["memory", "disk"])
def disk(request: pytest.FixtureRequest, tmp_path: Path) -> Disk:
    """Empty files of one kind."""
    if request.param == "memory":
        return Disk(FakeRegistryFiles(FakeClock()), NOON)

    def opened() -> RegistryFiles:
        return UploadFiles(tmp_path / "blobs", tmp_path / "cache")

    return Disk(opened(), datetime.now(UTC), opened)


@pytest.fixture
def files(disk: Disk) -> RegistryFiles:
    return disk.files


async def stream(*chunks: bytes) -> AsyncIterator[bytes]:
    for chunk in chunks:
        yield chunk


async def breaking(*chunks: bytes) -> AsyncIterator[bytes]:
    """What a client sends that goes away in the middle."""
    for chunk in chunks:
        yield chunk
    raise CorralError("canceled")


class Halting:
    """A client that sends something, and then nothing until it is told to. sent: set when the first chunks were taken."""

    def __init__(self, *chunks: bytes) -> None:
        self.chunks = chunks
        self.sent, self.go_on = asyncio.Event(), asyncio.Event()

    async def __aiter__(self) -> AsyncIterator[bytes]:
        for chunk in self.chunks:
            yield chunk
        self.sent.set()
        await self.go_on.wait()
        yield b"late"


async def append(files: RegistryFiles, *chunks: bytes, at: int = 0, upload: str = "u1", limit: int = LARGEST) -> int:
    return await files.append(upload, at, stream(*chunks), max_bytes=limit)


async def content_of(files: RegistryFiles, upload: str, size_bytes: int) -> Digest:
    """The digest of what an upload holds, as the answer to a wrong commit tells it."""
    error = await error_of(files.commit(upload, size_bytes, digest_of(b"\0 something else")))
    assert error.code == "digest_invalid"
    return Digest(error.message.split("sha256:")[1][:64])


# ── Whole uploads ────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("algorithm", ["sha256", "sha512"])
async def test_upload_committed_is_a_blob_of_its_digest(files: RegistryFiles, algorithm: str) -> None:
    digest = digest_of(b"weights", algorithm)
    assert files.size_of(digest) is None
    assert await append(files, b"wei", b"", b"ghts") == 7
    assert files.size_of(digest) is None
    await files.commit("u1", 7, digest)
    assert files.size_of(digest) == 7
    assert files.path_of(digest).endswith(f"/{algorithm}-{digest.hex}")


async def test_upload_in_parts_is_the_same_blob(files: RegistryFiles) -> None:
    parts = [os.urandom(3), os.urandom(3 << 20), os.urandom(1), os.urandom((1 << 20) + 1)]
    end = 0
    for part in parts:
        pieces = [part[start : start + 65_537] for start in range(0, len(part), 65_537)]
        assert await append(files, *pieces, at=end) == end + len(part)
        end += len(part)
    await files.commit("u1", end, digest_of(b"".join(parts)))
    assert files.size_of(digest_of(b"".join(parts))) == end


@pytest.mark.parametrize("appends", [0, 1])
async def test_upload_of_nothing_is_the_empty_blob(files: RegistryFiles, appends: int) -> None:
    for _ in range(appends):
        assert await append(files) == 0
    await files.commit("u1", 0, digest_of(b""))
    assert files.size_of(digest_of(b"")) == 0


async def test_blob_put_at_once_is_there(files: RegistryFiles) -> None:
    assert await files.put_bytes(b"{}") == digest_of(b"{}")
    assert await files.put_bytes(b"{}") == digest_of(b"{}")
    assert files.size_of(digest_of(b"{}")) == 2


async def test_f05_two_uploads_of_one_blob_are_both_committed(files: RegistryFiles) -> None:
    for upload in ("u1", "u2", "u3"):
        await append(files, b"same", upload=upload)
    await asyncio.gather(*(files.commit(upload, 4, digest_of(b"same")) for upload in ("u1", "u2", "u3")))
    assert files.size_of(digest_of(b"same")) == 4


# ── Digests that do not match ────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("algorithm", ["sha256", "sha512"])
async def test_f01_t035_wrong_digest_is_refused_each_time_and_nothing_is_placed(files: RegistryFiles, algorithm: str) -> None:
    wrong, right = digest_of(b"another", algorithm), digest_of(b"weights", algorithm)
    await append(files, b"weights")
    for _ in range(3):
        error = await error_of(files.commit("u1", 7, wrong))
        assert error.code == "digest_invalid"
        assert str(right) in error.message
    assert files.size_of(wrong) is None
    assert files.size_of(right) is None
    await files.commit("u1", 7, right)
    assert files.size_of(right) == 7


async def test_f01_upload_of_a_wrong_digest_goes_on(files: RegistryFiles) -> None:
    await append(files, b"wei")
    await error_of(files.commit("u1", 3, digest_of(b"weights")))
    await append(files, b"ghts", at=3)
    await files.commit("u1", 7, digest_of(b"weights"))
    assert files.size_of(digest_of(b"weights")) == 7


async def test_commit_of_more_than_is_there_is_refused(files: RegistryFiles) -> None:
    assert (await error_of(files.commit("u1", 7, digest_of(b"weights")))).code == "blob_upload_unknown"
    await append(files, b"weight")
    assert (await error_of(files.commit("u1", 7, digest_of(b"weights")))).code == "blob_upload_unknown"
    assert await append(files, b"s", at=6) == 7


async def test_commit_of_less_than_is_there_cuts_the_rest_off(files: RegistryFiles) -> None:
    # What a killed process had taken in but not acknowledged.
    await append(files, b"weights and more")
    await files.commit("u1", 7, digest_of(b"weights"))
    assert files.size_of(digest_of(b"weights")) == 7


async def test_f03_same_commit_again_is_answered_the_same_until_it_is_discarded(files: RegistryFiles) -> None:
    await append(files, b"weights")
    for _ in range(3):
        await files.commit("u1", 7, digest_of(b"weights"))
    await files.discard("u1")
    assert (await error_of(files.commit("u1", 7, digest_of(b"weights")))).code == "blob_upload_unknown"
    assert files.size_of(digest_of(b"weights")) == 7


async def test_f03_same_commit_again_is_answered_the_same_by_the_next_process(disk: Disk) -> None:
    if disk.restarted is None:
        return
    await append(disk.files, b"weights")
    await disk.files.commit("u1", 7, digest_of(b"weights"))
    await disk.restarted().commit("u1", 7, digest_of(b"weights"))
    await disk.files.remove_blob(digest_of(b"weights"))
    assert (await error_of(disk.restarted().commit("u1", 7, digest_of(b"weights")))).code == "blob_upload_unknown"


async def test_f11_commit_as_another_blob_that_is_there_is_refused(files: RegistryFiles) -> None:
    # Somebody's commit whose answer was lost, and who tries for another blob of that length.
    secret = await files.put_bytes(b"SECRETS")
    await append(files, b"weights")
    for _ in range(2):
        assert (await error_of(files.commit("u1", 7, secret))).code == "digest_invalid"
        await files.commit("u1", 7, digest_of(b"weights"))
        assert (await error_of(files.commit("u1", 7, secret))).code == "digest_invalid"


@pytest.mark.parametrize("at", [0, 3, 7])
async def test_upload_that_was_committed_and_not_finished_goes_on(disk: Disk, at: int) -> None:
    content = b"weights"
    await append(disk.files, content)
    await disk.files.commit("u1", 7, digest_of(content))
    files = disk.restarted() if disk.restarted else disk.files
    assert (await error_of(append(files, b"x", at=8))).code == "blob_upload_unknown"
    assert await append(files, b"-more", at=at) == at + 5
    longer = content[:at] + b"-more"
    await files.commit("u1", at + 5, digest_of(longer))
    assert files.size_of(digest_of(content)) == 7
    assert files.size_of(digest_of(longer)) == at + 5


# ── Parts that fail ──────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("size", [3, (1 << 20) + 5, 3 << 20])
async def test_f02_part_cut_short_is_taken_back_and_can_be_sent_again(files: RegistryFiles, size: int) -> None:
    head, part = b"head", os.urandom(size)
    await append(files, head)
    for _ in range(2):
        half = [part[start : start + 65_536] for start in range(0, size // 2 + 1, 65_536)]
        assert (await error_of(files.append("u1", 4, breaking(*half), max_bytes=LARGEST))).code == "canceled"
        assert (await error_of(append(files, b"x", at=5))).code == "blob_upload_unknown"
    assert await append(files, part, at=4) == 4 + size
    await files.commit("u1", 4 + size, digest_of(head + part))


async def test_f02_part_whose_request_is_canceled_is_taken_back(files: RegistryFiles) -> None:
    await append(files, b"head")
    client = Halting(os.urandom(2 << 20))
    task = asyncio.create_task(files.append("u1", 4, aiter(client), max_bytes=LARGEST))
    await client.sent.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert await content_of(files, "u1", 4) == digest_of(b"head")
    assert await append(files, b"tail", at=4) == 8
    await files.commit("u1", 8, digest_of(b"headtail"))


async def test_f03_part_sent_again_after_it_was_accepted_replaces_it(files: RegistryFiles) -> None:
    await append(files, b"one")
    for _ in range(3):
        assert await append(files, b"two", at=3) == 6
    assert await append(files, b"TWO!", at=3) == 7
    await files.commit("u1", 7, digest_of(b"oneTWO!"))


async def test_part_behind_a_gap_is_refused(files: RegistryFiles) -> None:
    assert (await error_of(append(files, b"x", at=1))).code == "blob_upload_unknown"
    await append(files, b"one")
    assert (await error_of(append(files, b"x", at=4))).code == "blob_upload_unknown"
    assert await append(files, b"two", at=3) == 6


async def test_t035_upload_longer_than_it_may_become_is_refused_and_taken_back(files: RegistryFiles) -> None:
    assert await append(files, b"12345", limit=5) == 5
    for chunks in ((b"6",), (bytes(2 << 20), bytes(2 << 20))):
        error = await error_of(append(files, *chunks, at=5, limit=5 + (len(chunks) - 1) * (3 << 20)))
        assert error.code == "too_large"
    assert await append(files, b"67", at=5, limit=7) == 7
    await files.commit("u1", 7, digest_of(b"1234567"))


# ── Several at once ──────────────────────────────────────────────────────────────────────────────────────────────────


async def test_f04_of_two_writers_the_later_wins_and_the_earlier_gets_conflict(files: RegistryFiles) -> None:
    await append(files, b"head")
    client = Halting(b"earlier" * 200_000)
    earlier = asyncio.create_task(error_of(files.append("u1", 4, aiter(client), max_bytes=LARGEST)))
    await client.sent.wait()
    assert await append(files, b"later", at=4) == 9
    assert (await earlier).code == "conflict"
    await files.commit("u1", 9, digest_of(b"headlater"))


async def test_f04_of_many_writers_the_last_wins(files: RegistryFiles) -> None:
    await append(files, b"head")
    clients = [Halting(bytes([number]) * 100) for number in range(5)]
    tasks = []
    for client in clients:
        tasks.append(asyncio.create_task(error_of(files.append("u1", 4, aiter(client), max_bytes=LARGEST))))
    last = asyncio.create_task(append(files, b"last", at=4))
    assert await last == 8
    assert {(await task).code for task in tasks} == {"conflict"}
    await files.commit("u1", 8, digest_of(b"headlast"))


async def test_f04_commit_ends_a_writer(files: RegistryFiles) -> None:
    await append(files, b"head")
    client = Halting(b"tail")
    writing = asyncio.create_task(error_of(files.append("u1", 4, aiter(client), max_bytes=LARGEST)))
    await client.sent.wait()
    await files.commit("u1", 4, digest_of(b"head"))
    assert (await writing).code == "conflict"
    assert files.size_of(digest_of(b"head")) == 4


async def test_same_commits_at_once_are_all_answered_or_give_way(files: RegistryFiles) -> None:
    await append(files, b"weights")
    results = await asyncio.gather(*(files.commit("u1", 7, digest_of(b"weights")) for _ in range(4)), return_exceptions=True)
    assert {getattr(result, "code", "") for result in results} <= {"", "conflict"}
    assert results[-1] is None


async def test_uploads_do_not_disturb_each_other(files: RegistryFiles) -> None:
    contents = {f"u{number}": os.urandom(200_000 + number) for number in range(8)}
    halves = {upload: (content[:100_000], content[100_000:]) for upload, content in contents.items()}
    for at, half in ((0, 0), (100_000, 1)):
        await asyncio.gather(*(append(files, parts[half], at=at, upload=upload) for upload, parts in halves.items()))
    await asyncio.gather(*(files.commit(upload, len(content), digest_of(content)) for upload, content in contents.items()))
    assert {files.size_of(digest_of(content)) for content in contents.values()} == {200_000 + n for n in range(8)}


async def test_timeout_of_the_client_is_not_taken_for_another_writer(files: RegistryFiles) -> None:
    async def stalled() -> AsyncIterator[bytes]:
        yield b"some"
        raise TimeoutError

    with pytest.raises(TimeoutError):
        await files.append("u1", 0, stalled(), max_bytes=LARGEST)
    assert await append(files, b"x") == 1


# ── Removal ──────────────────────────────────────────────────────────────────────────────────────────────────────────


async def test_upload_discarded_is_gone_whatever_its_state(files: RegistryFiles) -> None:
    for _ in range(2):
        await files.discard("u1")
    await append(files, b"weights")
    await files.discard("u1")
    assert (await error_of(append(files, b"x", at=7))).code == "blob_upload_unknown"
    assert await append(files, b"new") == 3


async def test_upload_discarded_under_its_writer_ends_it(files: RegistryFiles) -> None:
    client = Halting(b"some")
    writing = asyncio.create_task(error_of(files.append("u1", 0, aiter(client), max_bytes=LARGEST)))
    await client.sent.wait()
    await files.discard("u1")
    assert (await writing).code == "conflict"
    assert (await error_of(append(files, b"x", at=4))).code == "blob_upload_unknown"


async def test_blob_removed_is_gone(files: RegistryFiles) -> None:
    digest = await files.put_bytes(b"{}")
    for _ in range(2):
        await files.remove_blob(digest)
        assert files.size_of(digest) is None


async def test_strays_are_removed_when_nobody_knows_them_and_they_are_old(disk: Disk) -> None:
    files = disk.files
    for upload in ("known", "stray"):
        await append(files, b"x", upload=upload)
    assert await files.remove_strays(["known"], now=disk.now) == 0
    later = disk.now + timedelta(hours=2)
    assert await files.remove_strays(["known"], now=later) == 1
    assert await files.remove_strays(["known"], now=later) == 0
    assert await append(files, b"y", at=1, upload="known") == 2
    assert (await error_of(append(files, b"y", at=1, upload="stray"))).code == "blob_upload_unknown"


async def test_blobs_on_disk_are_all_told_of_and_uploads_are_not(disk: Disk) -> None:
    files = disk.files
    contents = [bytes([number]) for number in range(5)]
    for content in contents:
        await files.put_bytes(content)
    await append(files, b"under way")
    await append(files, b"sha512", upload="u2")
    await files.commit("u2", 6, digest_of(b"sha512", "sha512"))
    found = {digest: changed_at async for digest, changed_at in files.blobs_on_disk()}
    assert found.keys() == {*(digest_of(content) for content in contents), digest_of(b"sha512", "sha512")}
    assert all(abs(changed_at - disk.now) < timedelta(minutes=5) for changed_at in found.values())


async def test_free_bytes_are_told(files: RegistryFiles) -> None:
    assert await files.free_bytes() > 0


# ── Only on a disk ───────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def on_disk(tmp_path: Path) -> UploadFiles:
    return UploadFiles(tmp_path / "blobs", tmp_path / "cache")


@pytest.mark.parametrize("upload", ["../u", "a/b", "..", ".", "", "a\0b", "a" * 65, "ü", "a b", "/etc/passwd", "%2e%2e"])
async def test_t033_t108_upload_id_that_is_none_of_ours_is_unknown_and_touches_nothing(
    on_disk: UploadFiles, tmp_path: Path, upload: str
) -> None:
    for doing in (
        append(on_disk, b"x", upload=upload),
        on_disk.commit(upload, 0, digest_of(b"")),
        on_disk.discard(upload),
    ):
        assert (await error_of(doing)).code == "blob_upload_unknown"
    assert list(tmp_path.iterdir()) == []


async def test_t108_upload_file_that_is_a_link_is_not_followed(on_disk: UploadFiles, tmp_path: Path) -> None:
    (tmp_path / "blobs/uploads").mkdir(parents=True)
    (tmp_path / "secret").write_bytes(b"secret")
    (tmp_path / "blobs/uploads/u1").symlink_to(tmp_path / "secret")
    assert (await error_of(append(on_disk, b"x"))).code == "unavailable"
    assert (tmp_path / "secret").read_bytes() == b"secret"


async def test_t091_files_of_the_hub_are_closed_to_others(on_disk: UploadFiles, tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        await append(on_disk, b"x")
        await append(on_disk, b"y", upload="u2")
        await on_disk.commit("u2", 1, digest_of(b"y"))
        await on_disk.put_bytes(b"z")
    finally:
        os.umask(before)
    modes = {path.name: path.stat().st_mode & 0o777 for path in (tmp_path / "blobs").rglob("*") if not path.is_symlink()}
    assert modes.pop("uploads") == 0o700
    assert set(modes.values()) == {0o600}
    assert len(modes) == 3


async def test_t094_blob_is_never_under_its_name_before_it_is_whole(on_disk: UploadFiles, tmp_path: Path) -> None:
    digest, seen = digest_of(b"weights"), []
    real = os.fsync

    def look(descriptor: int) -> None:
        seen.append(on_disk.size_of(digest))
        real(descriptor)

    # Patched to look at the directory at the moment in question.
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", look)
        await append(on_disk, b"wei")
        await append(on_disk, b"ghts", at=3)
        assert on_disk.size_of(digest) is None
        await on_disk.commit("u1", 7, digest)
    # Of the file, before it has its name; of the directory, once by whoever placed it and once for a blob that was there.
    assert seen[0] is None
    assert set(seen[1:]) == {7}


async def test_restart_reads_what_was_accepted_and_goes_on(disk: Disk) -> None:
    if disk.restarted is None:
        return
    first, second, third = os.urandom(3 << 20), os.urandom(5), os.urandom(100_000)
    await append(disk.files, first)
    await append(disk.files, second + b"not acknowledged", at=len(first))
    again = disk.restarted()
    end = len(first) + len(second)
    assert await append(again, third, at=end) == end + len(third)
    await disk.restarted().commit("u1", end + len(third), digest_of(first + second + third))
    assert again.size_of(digest_of(first + second + third)) == end + len(third)


@pytest.mark.parametrize("spoiled", [b"wei", b"weightZ"])
async def test_f24_commit_makes_a_spoiled_blob_whole(on_disk: UploadFiles, spoiled: bytes) -> None:
    path = Path(on_disk.path_of(await on_disk.put_bytes(b"weights")))
    path.write_bytes(spoiled)
    await append(on_disk, b"weights")
    await on_disk.commit("u1", 7, digest_of(b"weights"))
    assert path.read_bytes() == b"weights"


async def test_commit_leaves_no_file_of_the_upload(on_disk: UploadFiles, tmp_path: Path) -> None:
    for upload in ("u1", "u2"):
        await append(on_disk, b"weights", upload=upload)
        await on_disk.commit(upload, 7, digest_of(b"weights"))
        assert not (tmp_path / "blobs/uploads" / upload).exists()
        await on_disk.discard(upload)
    assert list((tmp_path / "blobs/uploads").iterdir()) == []
    assert len(list((tmp_path / "blobs").iterdir())) == 2


async def test_uploads_that_came_to_nothing_leave_nothing_in_memory(on_disk: UploadFiles) -> None:
    await error_of(append(on_disk, b"x", at=9))
    await append(on_disk, b"x", upload="u2")
    await on_disk.discard("u2")
    await append(on_disk, b"x", upload="u3")
    await on_disk.remove_strays([], now=datetime.now(UTC) + timedelta(hours=2))
    assert on_disk._uploads == {}


async def test_hashes_of_tiny_parts_are_not_all_remembered(on_disk: UploadFiles) -> None:
    for number in range(200):
        await append(on_disk, b"x", at=number)
    assert len(on_disk._uploads["u1"].hashes) <= 64
    assert await append(on_disk, b"y", at=3) == 4
    await on_disk.commit("u1", 4, digest_of(b"xxxy"))


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
async def test_f07_r003_full_disk_takes_the_part_back_and_reading_goes_on(
    on_disk: UploadFiles, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    digest = await on_disk.put_bytes(b"before")
    await append(on_disk, b"head")
    real = os.pwrite

    def full(descriptor: int, content: bytes, offset: int) -> int:
        # Half of the block still goes in, as it does on a real disk.
        if offset >= 1 << 20:
            raise OSError(code, os.strerror(code))
        return real(descriptor, bytes(content[: 1 + len(content) // 2]), offset)

    # Patched because no disk of a test can be full.
    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", full)
        assert (await error_of(append(on_disk, *[bytes(65_536)] * 40, at=4))).code == "storage_full"
    assert on_disk.size_of(digest) == 6
    assert await content_of(on_disk, "u1", 4) == digest_of(b"head")
    assert await append(on_disk, b"tail", at=4) == 8
    await on_disk.commit("u1", 8, digest_of(b"headtail"))


async def test_r018_upload_that_the_disk_could_not_keep_is_given_up(
    on_disk: UploadFiles, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def sync_fails() -> str:
        # Patched because no disk of a test fails. The next attempt would succeed, without what the first one lost.
        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", _fail)
            return (await error_of(on_disk.commit("u1", 7, digest_of(b"weights")))).code

    await append(on_disk, b"weights")
    assert await sync_fails() == "unavailable"
    assert (await error_of(on_disk.commit("u1", 7, digest_of(b"weights")))).code == "blob_upload_unknown"
    await append(on_disk, b"weights")
    await on_disk.commit("u1", 7, digest_of(b"weights"))
    assert on_disk.size_of(digest_of(b"weights")) == 7


def _fail(descriptor: int) -> None:
    raise OSError(errno.EIO, os.strerror(errno.EIO))


@pytest.mark.parametrize("fails", [False, True])
async def test_long_part_is_written_to_the_disk_while_it_arrives(
    on_disk: UploadFiles, monkeypatch: pytest.MonkeyPatch, fails: bool
) -> None:
    # Patched so that a part is long after 2 MiB, and to see what is synced.
    monkeypatch.setattr(uploads_module, "_SYNCED_AT_ONCE", 2 << 20)
    part, synced = os.urandom(10 << 20), []
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", _fail if fails else lambda descriptor: synced.append(os.fstat(descriptor).st_size))
        pieces = [part[start : start + 65_536] for start in range(0, len(part), 65_536)]
        if fails:
            assert (await error_of(append(on_disk, *pieces))).code == "unavailable"
        else:
            assert await append(on_disk, *pieces) == len(part)
    assert fails or len(synced) > 1
    assert (await error_of(append(on_disk, b"x", at=1 if fails else len(part) + 1))).code == "blob_upload_unknown"


async def test_free_bytes_are_those_of_the_file_system(on_disk: UploadFiles, tmp_path: Path) -> None:
    assert abs(await on_disk.free_bytes() - shutil.disk_usage(tmp_path).free) < 1 << 30


async def test_blobs_on_disk_need_no_thread_once_nobody_asks_any_more(on_disk: UploadFiles) -> None:
    await on_disk.put_bytes(b"{}")
    await on_disk.put_bytes(b"[]")
    async with aclosing(on_disk.blobs_on_disk()) as found:
        async for _ in found:
            break
