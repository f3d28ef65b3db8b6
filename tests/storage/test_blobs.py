"""Content-addressed files: whole, durable and named after their content, or absent, whatever goes wrong."""

import asyncio
import contextlib
import errno
import os
import stat
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from datetime import timedelta
from hashlib import sha256
from pathlib import Path

import pytest

from corral.storage import blobs as blobs_module
from corral.storage.blobs import BlobFiles, in_thread, open_regular, write_atomically
from corral.wire.errors import CorralError
from corral.wire.names import Digest
from fakes import NOON

CONTENT = b"weights" * 1000


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "models" / "blobs"


@pytest.fixture
def store(root: Path, tmp_path: Path) -> BlobFiles:
    return BlobFiles(root, tmp_path / "cache")


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return file_with(tmp_path / "weights.gguf", CONTENT)


def file_with(path: Path, content: bytes, *, mode: int = 0o644) -> Path:
    path.write_bytes(content)
    path.chmod(mode)
    return path


def digest_of(content: bytes) -> Digest:
    return Digest(sha256(content).hexdigest())


def names(root: Path) -> list[str]:
    return sorted(path.name for path in root.iterdir()) if root.exists() else []


def quiet(done: int, total: int) -> None:
    """Nobody watches."""


async def pieces(*chunks: bytes) -> AsyncIterator[bytes]:
    for chunk in chunks:
        yield chunk


# ── Small blobs and streams ──────────────────────────────────────────────────────────────────────────────────────────


def test_blob_is_named_after_its_content_and_readable_by_all(store: BlobFiles, root: Path) -> None:
    old = os.umask(0o077)
    try:
        blob = store.put_bytes(CONTENT)
    finally:
        os.umask(old)
    assert (blob.digest, blob.size_bytes) == (digest_of(CONTENT), len(CONTENT))
    assert names(root) == [f"sha256-{digest_of(CONTENT).hex}"]
    assert stat.S_IMODE(store.path(blob.digest).stat().st_mode) == 0o644
    assert store.read(blob.digest, max_bytes=len(CONTENT)) == CONTENT


def test_blob_is_read_only_as_far_as_asked(store: BlobFiles) -> None:
    blob = store.put_bytes(CONTENT)
    with pytest.raises(CorralError) as caught:
        store.read(blob.digest, max_bytes=len(CONTENT) - 1)
    assert caught.value.code == "too_large"


def test_blob_that_is_absent_has_no_size_and_is_not_found(store: BlobFiles, root: Path) -> None:
    assert store.size_of(digest_of(b"")) is None
    (root / digest_of(b"").file_name).mkdir(parents=True)
    assert store.size_of(digest_of(b"")) is None
    with pytest.raises(CorralError) as caught:
        store.read(digest_of(b"x"), max_bytes=1)
    assert caught.value.code == "not_found"


async def test_stream_is_stored_whole(store: BlobFiles, monkeypatch: pytest.MonkeyPatch) -> None:
    # A block is 1 MiB otherwise.
    monkeypatch.setattr(blobs_module, "_BLOCK", 100)
    blob = await store.put_stream(pieces(b"a" * 99, b"b" * 200, b"", b"c"), expected=None, max_bytes=300)
    assert store.read(blob.digest, max_bytes=300) == b"a" * 99 + b"b" * 200 + b"c"


async def test_stream_with_another_digest_leaves_nothing(store: BlobFiles, root: Path) -> None:
    wanted = digest_of(b"other")
    with pytest.raises(CorralError) as caught:
        await store.put_stream(pieces(CONTENT), expected=wanted, max_bytes=10_000)
    assert caught.value.message == f'digest mismatch, expected "{wanted}", got "{digest_of(CONTENT)}"'
    assert names(root) == []


async def test_stream_that_is_too_long_leaves_nothing(store: BlobFiles, root: Path) -> None:
    with pytest.raises(CorralError) as caught:
        await store.put_stream(pieces(b"x" * 50, b"x" * 51), expected=None, max_bytes=100)
    assert caught.value.code == "too_large"
    assert names(root) == []


async def test_stream_that_is_canceled_leaves_nothing(store: BlobFiles, root: Path) -> None:
    waiting = asyncio.Event()

    async def never_ending() -> AsyncIterator[bytes]:
        yield CONTENT
        waiting.set()
        await asyncio.Event().wait()

    task = asyncio.create_task(store.put_stream(never_ending(), expected=None, max_bytes=100_000))
    await waiting.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert names(root) == []


async def test_canceling_waits_for_the_thread_that_holds_the_files() -> None:
    started, stop, ended = threading.Event(), threading.Event(), threading.Event()

    def work() -> None:
        started.set()
        stop.wait(10)
        ended.set()

    task = asyncio.create_task(in_thread(work, on_cancel=stop.set))
    await asyncio.to_thread(started.wait, 10)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert ended.is_set()


# ── Files of this machine ────────────────────────────────────────────────────────────────────────────────────────────


def test_file_is_taken_in_without_a_copy(store: BlobFiles, source: Path) -> None:
    blob = store.put_file(source, quiet)
    assert (blob.digest, blob.size_bytes) == (digest_of(CONTENT), len(CONTENT))
    # A clone on a file system that has them, else the same file.
    assert store.path(blob.digest).read_bytes() == CONTENT
    assert store.path(blob.digest).stat().st_ino == source.stat().st_ino or _clones(source)


def _clones(source: Path) -> bool:
    other = source.with_name("clone")
    with source.open("rb") as original, other.open("wb") as target:
        return blobs_module._clone(original, target.fileno())


@pytest.mark.parametrize("mode", [0o600, 0o664, 0o646, 0o666, 0o440])
def test_file_that_others_may_write_or_not_read_is_copied(store: BlobFiles, tmp_path: Path, mode: int) -> None:
    source = file_with(tmp_path / "w", CONTENT, mode=mode)
    path = store.path(store.put_file(source, quiet).digest)
    assert path.stat().st_ino != source.stat().st_ino
    assert (path.read_bytes(), stat.S_IMODE(path.stat().st_mode)) == (CONTENT, 0o644)


@pytest.mark.parametrize("mode", [0o644, 0o640, 0o604, 0o622, 0o611])
def test_t091_file_open_to_others_is_copied_into_a_closed_store(root: Path, tmp_path: Path, mode: int) -> None:
    source = file_with(tmp_path / "w", CONTENT, mode=mode)
    store = BlobFiles(root, tmp_path / "cache", mode=blobs_module.CLOSED)
    path = store.path(store.put_file(source, quiet).digest)
    assert path.stat().st_ino != source.stat().st_ino
    assert (path.read_bytes(), stat.S_IMODE(path.stat().st_mode)) == (CONTENT, 0o600)
    assert stat.S_IMODE(source.stat().st_mode) == mode


@pytest.mark.parametrize("mode", [0o600, 0o400])
def test_file_closed_to_others_is_taken_into_a_closed_store_without_a_copy(root: Path, tmp_path: Path, mode: int) -> None:
    source = file_with(tmp_path / "w", CONTENT, mode=mode)
    store = BlobFiles(root, tmp_path / "cache", mode=blobs_module.CLOSED)
    path = store.path(store.put_file(source, quiet).digest)
    assert path.stat().st_ino == source.stat().st_ino or _clones(source)
    assert not stat.S_IMODE(path.stat().st_mode) & 0o077


def test_file_behind_a_symbolic_link_is_taken_in_itself(store: BlobFiles, source: Path, tmp_path: Path) -> None:
    link = tmp_path / "link"
    link.symlink_to(source)
    path = store.path(store.put_file(link, quiet).digest)
    assert not path.is_symlink()
    assert path.read_bytes() == CONTENT


def test_file_on_another_file_system_is_copied(store: BlobFiles, source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # A test cannot mount one.
    monkeypatch.setattr(os, "link", _raiser(OSError(errno.EXDEV, "other device")))
    path = store.path(store.put_file(source, quiet).digest)
    assert path.stat().st_ino != source.stat().st_ino or _clones(source)
    assert path.read_bytes() == CONTENT


def test_progress_is_told_to_the_end(store: BlobFiles, source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blobs_module, "_BLOCK", 3000)
    told: list[tuple[int, int]] = []
    store.put_file(source, lambda done, total: told.append((done, total)))
    assert told == [(3000, 7000), (6000, 7000), (7000, 7000), (7000, 7000)]


def test_file_known_from_before_is_not_read_again(store: BlobFiles, root: Path, source: Path, tmp_path: Path) -> None:
    first = store.put_file(source, quiet)
    told: list[int] = []
    again = BlobFiles(root, tmp_path / "cache")
    assert again.known(source) == first.digest
    assert again.put_file(source, lambda done, _: told.append(done)) == first
    assert told == [len(CONTENT)]


def test_file_is_unknown_once_its_blob_is_gone(store: BlobFiles, source: Path) -> None:
    store.path(store.put_file(source, quiet).digest).unlink()
    assert store.known(source) is None
    assert store.known(source.with_name("absent")) is None


@pytest.mark.parametrize("note", [b"", b"{", b"{}", b'{"size":7000,"mtime_ns":1,"digest":"../../x"}'])
def test_note_that_is_damaged_is_made_again(store: BlobFiles, source: Path, tmp_path: Path, note: bytes) -> None:
    blob = store.put_file(source, quiet)
    (path,) = (tmp_path / "cache" / "sources").iterdir()
    path.write_bytes(note)
    assert store.known(source) is None
    assert store.put_file(source, quiet) == blob
    assert store.known(source) == blob.digest


def test_file_that_changed_is_noticed_and_the_blob_it_spoiled_removed(store: BlobFiles, source: Path, root: Path) -> None:
    first = store.put_file(source, quiet)
    changed = b"other!!" * 1000
    with source.open("r+b") as file:
        file.write(changed)
    os.utime(source, ns=(1, 1))
    second = store.put_file(source, quiet)
    assert second.digest == digest_of(changed)
    assert store.path(second.digest).read_bytes() == changed
    assert store.size_of(first.digest) is None or store.path(first.digest).read_bytes() == CONTENT
    assert not [name for name in names(root) if name.endswith(".tmp")]


def test_file_that_changes_while_it_is_read_is_refused(store: BlobFiles, source: Path, root: Path) -> None:
    def touch(_done: int, _total: int) -> None:
        os.utime(source, ns=(1, 1))

    with pytest.raises(CorralError) as caught:
        store.put_file(source, touch)
    assert caught.value.code == "conflict"
    assert names(root) == []


def test_file_exchanged_before_the_link_is_made_is_not_mixed_up(
    store: BlobFiles, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    link = os.link

    def exchange_and_link(origin: Path, target: Path) -> None:
        file_with(source.with_name("new"), b"x" * len(CONTENT)).replace(source)
        link(origin, target)

    # The moment between opening and linking cannot be met otherwise.
    monkeypatch.setattr(os, "link", exchange_and_link)
    blob = store.put_file(source, quiet)
    assert store.path(blob.digest).read_bytes() == CONTENT


def test_t108_what_is_no_regular_file_is_refused_at_once(store: BlobFiles, tmp_path: Path, root: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    for path in (tmp_path / "fifo", Path("/dev/zero"), Path("/dev/null"), tmp_path):
        with pytest.raises(CorralError) as caught:
            store.put_file(path, quiet)
        assert caught.value.code == "bad_request"
    assert names(root) == []


def test_file_that_is_not_there_is_not_found(store: BlobFiles, tmp_path: Path) -> None:
    with pytest.raises(CorralError) as caught:
        store.put_file(tmp_path / "no.gguf", quiet)
    assert (caught.value.code, caught.value.message) == ("not_found", "no.gguf: no such file")


def test_t033_link_is_refused_where_links_are_not_followed(source: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(source)
    with pytest.raises(CorralError) as caught:
        open_regular(tmp_path / "link", shown_as="it", flags=os.O_NOFOLLOW)
    assert caught.value.code == "bad_request"


def test_blob_cut_short_by_a_crash_is_replaced(store: BlobFiles, source: Path, root: Path) -> None:
    root.mkdir(parents=True)
    store.path(digest_of(CONTENT)).write_bytes(CONTENT[:10])
    assert store.put_file(source, quiet).digest == digest_of(CONTENT)
    assert store.path(digest_of(CONTENT)).read_bytes() == CONTENT


async def test_many_takers_of_one_file_end_up_with_one_blob(store: BlobFiles, source: Path, root: Path) -> None:
    blobs = await asyncio.gather(*(asyncio.to_thread(store.put_file, source, quiet) for _ in range(8)))
    assert set(blobs) == {blobs[0]}
    assert names(root) == [digest_of(CONTENT).file_name]


# ── When the disk refuses ────────────────────────────────────────────────────────────────────────────────────────────


def _raiser(error: Exception) -> Callable[..., object]:
    def refuse(*_args: object, **_more: object) -> object:
        raise error

    return refuse


@contextlib.contextmanager
def failing_at(nth: int, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Let the nth call that changes the disk fail as a full disk does; gives the names of the calls made."""
    made: list[str] = []

    def counted(name: str, real: Callable[..., object]) -> Callable[..., object]:
        def call(*args: object, **more: object) -> object:
            made.append(name)
            if len(made) == nth:
                raise OSError(errno.ENOSPC, "No space left on device")
            return real(*args, **more)

        return call

    # A disk that is full at one exact call cannot be had otherwise.
    with monkeypatch.context() as patch:
        for name in ("write", "fsync", "fchmod", "link"):
            patch.setattr(os, name, counted(name, getattr(os, name)))
        for name in ("replace", "mkdir"):
            patch.setattr(Path, name, counted(name, getattr(Path, name)))
        yield made


@pytest.mark.parametrize("mode", [0o644, 0o600])
def test_r018_disk_full_at_any_call_leaves_the_whole_blob_or_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mode: int
) -> None:
    for nth in range(1, 50):
        root = tmp_path / str(nth) / "blobs"
        store = BlobFiles(root, tmp_path / str(nth) / "cache")
        source = file_with(tmp_path / f"{nth}.gguf", CONTENT, mode=mode)
        error = None
        with failing_at(nth, monkeypatch) as made:
            try:
                store.put_file(source, quiet)
            except CorralError as refused:
                error = refused
        assert error is None or error.code == "storage_full"
        assert names(root) in ([], [digest_of(CONTENT).file_name])
        assert error is not None or store.path(digest_of(CONTENT)).read_bytes() == CONTENT
        assert store.put_file(source, quiet).digest == digest_of(CONTENT)
        if len(made) < nth:
            return
    pytest.fail("it never came to an end")


def test_r003_disk_full_while_writing_says_so_and_leaves_nothing(
    store: BlobFiles, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A test has no disk to fill.
    monkeypatch.setattr(os, "write", _raiser(OSError(errno.ENOSPC, "No space left on device")))
    with pytest.raises(CorralError) as caught:
        store.put_bytes(CONTENT)
    assert (caught.value.code, caught.value.status) == ("storage_full", 507)
    assert names(root) == []


def test_directory_that_cannot_be_written_is_unavailable(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(CorralError) as caught:
        BlobFiles(tmp_path / "file" / "blobs", tmp_path / "cache").put_bytes(CONTENT)
    assert caught.value.code == "unavailable"
    assert str(tmp_path) not in caught.value.message


def test_cache_that_cannot_be_written_costs_only_time(root: Path, tmp_path: Path, source: Path) -> None:
    (tmp_path / "file").touch()
    store = BlobFiles(root, tmp_path / "file")
    assert store.put_file(source, quiet) == store.put_file(source, quiet)
    assert store.known(source) is None


def test_atomic_write_replaces_a_file_and_leaves_no_other(tmp_path: Path) -> None:
    for content in (b"one", b"two"):
        write_atomically(tmp_path / "a" / "b" / "tag", content, beside=tmp_path)
    assert (tmp_path / "a" / "b" / "tag").read_bytes() == b"two"
    assert names(tmp_path) == ["a"]


def test_r019_files_of_killed_processes_are_removed_after_an_hour(store: BlobFiles, root: Path, source: Path) -> None:
    blob = store.put_file(source, quiet)
    left = file_with(root / "sha256-abc.tmp", b"half")
    changed = NOON.fromtimestamp(left.stat().st_ctime, NOON.tzinfo)
    assert store.remove_stale(changed + timedelta(minutes=59)) == 0
    assert store.remove_stale(changed + timedelta(minutes=61)) == 1
    assert names(root) == [blob.digest.file_name]
    assert BlobFiles(root / "absent", root).remove_stale(NOON) == 0
