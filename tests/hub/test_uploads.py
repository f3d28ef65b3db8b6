"""Content on its way in: chunks, retries, commits, mounts, quotas, and whose upload is whose."""

import asyncio
from collections.abc import AsyncIterator
from dataclasses import replace
from datetime import timedelta

import pytest

from corral.core.records import Principal, Scope, Visitor
from corral.core.registry import Right, Upload, Visibility
from corral.hub.uploads import Mounted, range_of
from corral.wire.errors import CorralError
from corral.wire.names import Digest
from corral.wire.registry import ByteRange
from corral.wire.repositories import RepositoryName
from fakes_registry import digest_of
from identity_hub import error_of
from registry_hub import OTHER, TINY, RegistryHub, broken, chunks, with_key, with_token

EMPTY = digest_of(b"")


@pytest.fixture
def hub() -> RegistryHub:
    return RegistryHub()


@pytest.fixture
async def alice(hub: RegistryHub) -> Principal:
    return await hub.add("alice")


@pytest.fixture
async def bob(hub: RegistryHub) -> Principal:
    return await hub.add("bob")


async def patch(
    hub: RegistryHub, upload: Upload, caller: Principal, content: bytes, first: int | None = None, *, may_repeat: bool = False
) -> Upload:
    """A chunk with its Content-Range, as Ollama sends it, or without one."""
    where = None if first is None else ByteRange(first, first + len(content) - 1)
    return await hub.registry.append(
        upload.id, TINY, caller, chunks(content), byte_range=where, length=len(content), may_repeat=may_repeat
    )


async def is_there(hub: RegistryHub, digest: Digest, caller: Principal, name: RepositoryName = TINY) -> bool:
    """Whether the blob can be pulled."""
    try:
        await hub.registry.blob(name, digest, caller)
    except CorralError as error:
        if error.status != 404:
            raise
        return False
    return True


# ── Chunks and commits ───────────────────────────────────────────────────────────────────────────────────────────────


async def test_upload_in_chunks_becomes_a_blob(hub: RegistryHub, alice: Principal) -> None:
    upload = await hub.start(TINY, alice)
    assert range_of(upload) == "0-0"
    upload = await patch(hub, upload, alice, b"abc", 0)
    upload = await patch(hub, upload, alice, b"def", 3)
    assert (range_of(upload), upload.offset_bytes) == ("0-5", 6)
    assert not await is_there(hub, digest_of(b"abcdef"), alice)
    assert await hub.registry.commit(upload.id, TINY, alice, digest_of(b"abcdef")) == digest_of(b"abcdef")
    facts = await hub.registry.blob(TINY, digest_of(b"abcdef"), alice)
    assert (facts.size_bytes, facts.path) == (6, hub.files.path_of(digest_of(b"abcdef")))


async def test_streamed_upload_without_lengths_becomes_a_blob(hub: RegistryHub, alice: Principal) -> None:
    upload = await hub.start(TINY, alice)
    await hub.registry.append(upload.id, TINY, alice, chunks(b"ab", b"c"))
    digest = digest_of(b"abcdef", "sha512")
    assert await hub.registry.commit(upload.id, TINY, alice, digest, chunks(b"def")) == digest
    assert await is_there(hub, digest, alice)


async def test_commit_with_the_last_chunk_checks_where_it_belongs(hub: RegistryHub, alice: Principal) -> None:
    upload = await patch(hub, await hub.start(TINY, alice), alice, b"abc")
    wrong = hub.registry.commit(
        upload.id, TINY, alice, digest_of(b"abcdef"), chunks(b"def"), byte_range=ByteRange(4, 6), length=3
    )
    assert (await error_of(wrong)).code == "range_invalid"
    right = hub.registry.commit(
        upload.id, TINY, alice, digest_of(b"abcdef"), chunks(b"def"), byte_range=ByteRange(3, 5), length=3
    )
    assert await right == digest_of(b"abcdef")


async def test_empty_blob_needs_no_chunk(hub: RegistryHub, alice: Principal) -> None:
    upload = await hub.start(TINY, alice)
    await hub.registry.commit(upload.id, TINY, alice, EMPTY)
    assert (await hub.registry.blob(TINY, EMPTY, alice)).size_bytes == 0


async def test_blob_in_one_request(hub: RegistryHub, alice: Principal) -> None:
    assert await is_there(hub, await hub.push_blob(TINY, alice, b"all at once"), alice)
    assert await is_there(hub, await hub.push_blob(TINY, alice, b"all at once", algorithm="sha512"), alice)


async def test_f01_wrong_digest_is_refused_again_and_again_and_nothing_is_linked(hub: RegistryHub, alice: Principal) -> None:
    upload = await patch(hub, await hub.start(TINY, alice), alice, b"abc")
    for _ in range(3):
        assert (await error_of(hub.registry.commit(upload.id, TINY, alice, digest_of(b"xyz")))).code == "digest_invalid"
    assert hub.files.blobs == {}
    assert await hub.registry.commit(upload.id, TINY, alice, digest_of(b"abc")) == digest_of(b"abc")


async def test_f01_wrong_digest_with_a_last_chunk_leaves_the_upload_as_it_was(hub: RegistryHub, alice: Principal) -> None:
    upload = await patch(hub, await hub.start(TINY, alice), alice, b"abc")
    for _ in range(2):
        wrong = hub.registry.commit(upload.id, TINY, alice, digest_of(b"xyz"), chunks(b"def"), length=3)
        assert (await error_of(wrong)).code == "digest_invalid"
    assert (await hub.registry.status(upload.id, TINY, alice)).offset_bytes == 3
    await hub.registry.commit(upload.id, TINY, alice, digest_of(b"abcdef"), chunks(b"def"), length=3)


async def test_f01_blob_in_one_request_with_a_wrong_digest_leaves_nothing(hub: RegistryHub, alice: Principal) -> None:
    for _ in range(2):
        wrong = hub.registry.put_blob(TINY, alice, digest_of(b"xyz"), chunks(b"abc"), length=3)
        assert (await error_of(wrong)).code == "digest_invalid"
    assert hub.files.blobs == {}
    assert await hub.store.stored_bytes("alice") == 0


async def test_upload_begun_for_one_digest_is_not_committed_as_another(hub: RegistryHub, alice: Principal) -> None:
    upload = await hub.registry.start_upload(TINY, alice, expected=digest_of(b"abc"))
    assert isinstance(upload, Upload)
    await patch(hub, upload, alice, b"xyz")
    assert (await error_of(hub.registry.commit(upload.id, TINY, alice, digest_of(b"xyz")))).code == "digest_invalid"


async def test_f02_chunk_that_breaks_off_is_rolled_back_and_sent_again(hub: RegistryHub, alice: Principal) -> None:
    upload = await patch(hub, await hub.start(TINY, alice), alice, b"abc", 0)
    short = hub.registry.append(upload.id, TINY, alice, broken(b"de"), byte_range=ByteRange(3, 5), length=3, may_repeat=True)
    assert (await error_of(short)).code == "canceled"
    assert (await hub.registry.status(upload.id, TINY, alice)).offset_bytes == 3
    await patch(hub, upload, alice, b"def", 3, may_repeat=True)
    await hub.registry.commit(upload.id, TINY, alice, digest_of(b"abcdef"))


async def test_f02_last_chunk_that_breaks_off_is_rolled_back(hub: RegistryHub, alice: Principal) -> None:
    upload = await patch(hub, await hub.start(TINY, alice), alice, b"abc", 0)
    short = hub.registry.commit(upload.id, TINY, alice, digest_of(b"abcdef"), broken(b"de"), length=3)
    assert (await error_of(short)).code == "canceled"
    assert (await hub.registry.status(upload.id, TINY, alice)).offset_bytes == 3
    single = hub.registry.put_blob(TINY, alice, digest_of(b"abcdef"), broken(b"abc"), length=6)
    assert (await error_of(single)).code == "canceled"
    assert await hub.store.stored_bytes("alice") == 3


@pytest.mark.parametrize(("sent", "said"), [(b"abcd", 3), (b"ab", 3), (b"", 1)])
async def test_t035_body_of_another_length_than_its_range_is_refused(
    hub: RegistryHub, alice: Principal, sent: bytes, said: int
) -> None:
    upload = await hub.start(TINY, alice)
    wrong = hub.registry.append(upload.id, TINY, alice, chunks(sent), byte_range=ByteRange(0, said - 1))
    assert (await error_of(wrong)).code == "size_invalid"
    assert (await hub.registry.status(upload.id, TINY, alice)).offset_bytes == 0
    assert hub.files.upload_bytes(upload.id) == b""


@pytest.mark.parametrize("first", [0, 1, 2, 4, 10**12])
async def test_t035_gap_overlap_and_repeat_are_refused_with_what_is_there(hub: RegistryHub, alice: Principal, first: int) -> None:
    upload = await patch(hub, await hub.start(TINY, alice), alice, b"abc")
    for end in (hub.registry.append, hub.registry.commit):
        options = {"byte_range": ByteRange(first, first + 2), "length": 3}
        arguments = (chunks(b"def"),) if end == hub.registry.append else (digest_of(b"abcdef"), chunks(b"def"))
        error = await error_of(end(upload.id, TINY, alice, *arguments, **options))  # type: ignore[operator]
        assert (error.code, error.headers) == ("range_invalid", {"Range": "0-2"})
    await patch(hub, upload, alice, b"def", 3)
    assert hub.files.upload_bytes(upload.id) == b"abcdef"


# ── Answers that were lost ───────────────────────────────────────────────────────────────────────────────────────────


async def test_f03_repeat_of_the_last_chunk_succeeds_where_it_may(hub: RegistryHub, alice: Principal) -> None:
    upload = await patch(hub, await hub.start(TINY, alice), alice, b"abc", 0)
    await patch(hub, upload, alice, b"dXf", 3)
    upload = await patch(hub, upload, alice, b"def", 3, may_repeat=True)
    assert upload.offset_bytes == 6
    assert (await error_of(patch(hub, upload, alice, b"def", 3))).code == "range_invalid"
    await hub.registry.commit(upload.id, TINY, alice, digest_of(b"abcdef"))


async def test_f03_repeat_from_further_back_never_undoes_what_came_after_it(hub: RegistryHub, alice: Principal) -> None:
    upload = await patch(hub, await hub.start(TINY, alice), alice, b"abc", 0)
    upload = await patch(hub, upload, alice, b"def", 3)
    for first, content in ((0, b"abc"), (0, b"abcd"), (3, b"defg"), (3, b"de")):
        error = await error_of(patch(hub, upload, alice, content, first, may_repeat=True))
        assert (error.code, error.headers) == ("range_invalid", {"Range": "0-5"})
    assert hub.files.upload_bytes(upload.id) == b"abcdef"


async def test_f03_repeat_that_breaks_off_leaves_row_and_file_in_step(hub: RegistryHub, alice: Principal) -> None:
    upload = await patch(hub, await hub.start(TINY, alice), alice, b"abc", 0)
    short = hub.registry.append(upload.id, TINY, alice, broken(b"a"), byte_range=ByteRange(0, 2), length=3, may_repeat=True)
    assert (await error_of(short)).code == "canceled"
    assert (await hub.registry.status(upload.id, TINY, alice)).offset_bytes == 0
    assert hub.files.upload_bytes(upload.id) == b""
    await patch(hub, upload, alice, b"abc", 0, may_repeat=True)


async def test_f03_repeated_commit_is_answered_again(hub: RegistryHub, alice: Principal) -> None:
    upload = await patch(hub, await hub.start(TINY, alice), alice, b"abc")
    for _ in range(3):
        assert await hub.registry.commit(upload.id, TINY, alice, digest_of(b"abc")) == digest_of(b"abc")
        hub.clock.advance(14 * 60 / 3)
        await hub.uploads.purge()
    hub.clock.advance(2 * 60)
    assert await hub.uploads.purge() == 1
    assert (await error_of(hub.registry.commit(upload.id, TINY, alice, digest_of(b"abc")))).code == "blob_upload_unknown"
    assert await is_there(hub, digest_of(b"abc"), alice)


async def test_f03_finished_upload_takes_nothing_more(hub: RegistryHub, alice: Principal) -> None:
    upload = await patch(hub, await hub.start(TINY, alice), alice, b"abc")
    await hub.registry.commit(upload.id, TINY, alice, digest_of(b"abc"))
    for doing in (
        patch(hub, upload, alice, b"d"),
        hub.registry.commit(upload.id, TINY, alice, digest_of(b"xyz")),
        hub.registry.status(upload.id, TINY, alice),
        hub.registry.cancel(upload.id, TINY, alice),
    ):
        assert (await error_of(doing)).code == "blob_upload_unknown"


async def test_f03_repeated_commit_of_a_blob_that_was_deleted_is_not_answered(hub: RegistryHub, alice: Principal) -> None:
    upload = await patch(hub, await hub.start(TINY, alice), alice, b"abc")
    await hub.registry.commit(upload.id, TINY, alice, digest_of(b"abc"))
    await hub.registry.remove_blob(TINY, digest_of(b"abc"), alice)
    assert (await error_of(hub.registry.commit(upload.id, TINY, alice, digest_of(b"abc")))).code == "blob_upload_unknown"


# ── Several at once ──────────────────────────────────────────────────────────────────────────────────────────────────


class Gate:
    """A body that stops half-way until it is told to go on."""

    def __init__(self, first: bytes, rest: bytes) -> None:
        self._first, self._rest = first, rest
        self.reached, self.go_on = asyncio.Event(), asyncio.Event()

    async def body(self) -> AsyncIterator[bytes]:
        yield self._first
        self.reached.set()
        await self.go_on.wait()
        yield self._rest


async def test_f04_later_writer_wins_and_nothing_is_mixed(hub: RegistryHub, alice: Principal) -> None:
    upload = await hub.start(TINY, alice)
    gate = Gate(b"XX", b"X")
    slow = asyncio.create_task(
        hub.registry.append(upload.id, TINY, alice, gate.body(), byte_range=ByteRange(0, 2), length=3, may_repeat=True)
    )
    await gate.reached.wait()
    await patch(hub, upload, alice, b"abc", 0, may_repeat=True)
    gate.go_on.set()
    assert (await error_of(slow)).code == "conflict"
    assert hub.files.upload_bytes(upload.id) == b"abc"
    assert (await hub.registry.status(upload.id, TINY, alice)).offset_bytes == 3


async def test_f04_writer_that_is_overtaken_while_it_is_written_down_does_not_count(
    hub: RegistryHub, alice: Principal, monkeypatch: pytest.MonkeyPatch
) -> None:
    upload, append = await hub.start(TINY, alice), hub.files.append
    written, go_on = asyncio.Event(), asyncio.Event()

    async def pausing(*arguments: object, **options: object) -> int:
        end = await append(*arguments, **options)  # type: ignore[arg-type]
        if not written.is_set():
            written.set()
            await go_on.wait()
        return end

    monkeypatch.setattr(hub.files, "append", pausing)
    slow = asyncio.create_task(patch(hub, upload, alice, b"XYZ", 0))
    await written.wait()
    short = hub.registry.append(upload.id, TINY, alice, broken(b"ab"), byte_range=ByteRange(0, 2), length=3)
    assert (await error_of(short)).code == "canceled"
    go_on.set()
    # Its bytes were cut off by the later one: what the row says must not count them.
    assert (await error_of(slow)).code == "conflict"
    assert (await hub.registry.status(upload.id, TINY, alice)).offset_bytes == 0


async def test_f04_commit_ends_a_writer_that_is_still_at_it(hub: RegistryHub, alice: Principal) -> None:
    upload = await patch(hub, await hub.start(TINY, alice), alice, b"abc")
    gate = Gate(b"d", b"e")
    slow = asyncio.create_task(hub.registry.append(upload.id, TINY, alice, gate.body(), length=2))
    await gate.reached.wait()
    await hub.registry.commit(upload.id, TINY, alice, digest_of(b"abc"))
    gate.go_on.set()
    assert (await error_of(slow)).code == "conflict"
    assert hub.files.blobs[digest_of(b"abc")] == b"abc"


async def test_f05_one_blob_pushed_by_two_at_once_is_one_file_and_two_links(
    hub: RegistryHub, alice: Principal, bob: Principal
) -> None:
    digests = await asyncio.gather(
        hub.push_blob(TINY, alice, b"same"), hub.push_blob(OTHER, bob, b"same"), hub.push_blob(TINY, alice, b"same")
    )
    assert set(digests) == {digest_of(b"same")}
    assert len(hub.files.blobs) == 1
    assert await is_there(hub, digest_of(b"same"), alice)
    assert await is_there(hub, digest_of(b"same"), bob, OTHER)


async def test_commit_sent_twice_at_once_is_answered_twice(hub: RegistryHub, alice: Principal) -> None:
    upload = await patch(hub, await hub.start(TINY, alice), alice, b"abc")
    both = [hub.registry.commit(upload.id, TINY, alice, digest_of(b"abc")) for _ in range(2)]
    assert await asyncio.gather(*both) == [digest_of(b"abc")] * 2


async def test_canceled_request_still_writes_down_what_it_stored(
    hub: RegistryHub, alice: Principal, monkeypatch: pytest.MonkeyPatch
) -> None:
    upload, advance = await hub.start(TINY, alice), hub.store.advance_upload
    begun, go_on = asyncio.Event(), asyncio.Event()

    async def pausing(*arguments: object, **options: object) -> None:
        begun.set()
        await go_on.wait()
        await advance(*arguments, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(hub.store, "advance_upload", pausing)
    request = asyncio.create_task(patch(hub, upload, alice, b"abc"))
    await begun.wait()
    request.cancel()
    go_on.set()
    with pytest.raises(asyncio.CancelledError):
        await request
    assert (await hub.registry.status(upload.id, TINY, alice)).offset_bytes == 3


# ── Whose upload ─────────────────────────────────────────────────────────────────────────────────────────────────────


async def test_f10_upload_of_another_account_or_repository_is_unknown(hub: RegistryHub, alice: Principal, bob: Principal) -> None:
    upload = await patch(hub, await hub.start(TINY, alice), alice, b"abc")
    await hub.repositories.set_collaborator(TINY, alice, "bob", Right.PUSH)
    other = RepositoryName("alice", "other")
    await hub.repositories.find(other, Right.PUSH, alice)
    for name, caller in ((TINY, bob), (other, alice)):
        for doing in (
            hub.registry.status(upload.id, name, caller),
            hub.registry.append(upload.id, name, caller, chunks(b"d"), length=1),
            hub.registry.commit(upload.id, name, caller, digest_of(b"abc")),
            hub.registry.cancel(upload.id, name, caller),
            hub.registry.status("0" * 32, name, caller),
        ):
            assert (await error_of(doing)).code == "blob_upload_unknown"
    assert hub.files.upload_bytes(upload.id) == b"abc"


async def test_upload_goes_on_only_while_its_account_may_push(hub: RegistryHub, alice: Principal, bob: Principal) -> None:
    await hub.repositories.find(TINY, Right.PUSH, alice)
    await hub.repositories.set_collaborator(TINY, alice, "bob", Right.PUSH)
    upload = await hub.start(TINY, bob)
    assert (await patch(hub, upload, with_token(bob.account, {"alice/tiny": ["push"]}), b"a")).offset_bytes == 1
    await hub.repositories.set_collaborator(TINY, alice, "bob", Right.PULL)
    assert (await error_of(patch(hub, upload, bob, b"b"))).code == "forbidden"
    assert (await error_of(hub.registry.start_upload(TINY, None))).code == "unauthorized"
    assert (await error_of(hub.registry.start_upload(TINY, Visitor()))).code == "forbidden"


async def test_canceled_upload_is_gone_with_its_bytes(hub: RegistryHub, alice: Principal) -> None:
    upload = await patch(hub, await hub.start(TINY, alice), alice, b"abc")
    await hub.registry.cancel(upload.id, TINY, alice)
    assert hub.files.upload_bytes(upload.id) is None
    assert (await error_of(hub.registry.status(upload.id, TINY, alice))).code == "blob_upload_unknown"


async def test_upload_to_a_repository_that_was_removed_does_not_make_it_again(hub: RegistryHub, alice: Principal) -> None:
    upload = await hub.start(TINY, alice)
    await hub.repositories.remove(TINY, alice)
    assert (await error_of(patch(hub, upload, alice, b"abc"))).code == "name_unknown"
    assert await hub.store.repository("alice", "tiny") is None


async def test_idle_uploads_are_purged_and_those_in_use_are_not(hub: RegistryHub, alice: Principal) -> None:
    idle, used = await hub.start(TINY, alice), await hub.start(TINY, alice)
    hub.clock.advance(timedelta(hours=23).total_seconds())
    await patch(hub, used, alice, b"abc")
    hub.clock.advance(timedelta(hours=2).total_seconds())
    assert await hub.uploads.purge() == 1
    assert await hub.store.upload(idle.id) is None
    assert (await hub.registry.status(used.id, TINY, alice)).offset_bytes == 3


async def test_f18_open_uploads_of_an_account_are_limited(bob: Principal) -> None:
    hub = RegistryHub(max_open=2)
    alice = await hub.add("alice")
    open_ones = [await hub.start(TINY, alice) for _ in range(2)]
    for doing in (hub.registry.start_upload(TINY, alice), hub.push_blob(TINY, alice, b"x")):
        error = await error_of(doing)
        assert (error.status, error.code) == (429, "rate_limited")
        assert error.retry_after_s
    await hub.registry.cancel(open_ones[0].id, TINY, alice)
    await hub.start(TINY, alice)


# ── Skipping and mounting ────────────────────────────────────────────────────────────────────────────────────────────


async def test_upload_of_what_is_there_is_skipped(hub: RegistryHub, alice: Principal) -> None:
    digest = await hub.push_blob(TINY, alice, b"abc")
    assert await hub.registry.start_upload(TINY, alice, expected=digest) == Mounted(digest)
    started = await hub.registry.start_upload(TINY, alice, expected=digest_of(b"new"))
    assert isinstance(started, Upload)
    assert started.expected == digest_of(b"new")


async def test_blob_is_mounted_from_a_repository_that_the_caller_may_pull_from(
    hub: RegistryHub, alice: Principal, bob: Principal
) -> None:
    digest = await hub.push_blob(TINY, alice, b"base")
    new = RepositoryName("alice", "derived")
    assert await hub.registry.start_upload(new, alice, mount=digest, source="Alice/TINY") == Mounted(digest)
    assert await is_there(hub, digest, alice, new)
    assert isinstance(await hub.registry.start_upload(OTHER, bob, mount=digest, source="alice/tiny"), Upload)
    await hub.repositories.set_visibility(TINY, alice, Visibility.PUBLIC)
    assert await hub.registry.start_upload(OTHER, bob, mount=digest, source="alice/tiny") == Mounted(digest)


async def test_blob_is_mounted_without_a_source_from_what_is_public_or_ones_own(
    hub: RegistryHub, alice: Principal, bob: Principal
) -> None:
    digest = await hub.push_blob(TINY, alice, b"base")
    assert await hub.registry.start_upload(RepositoryName("alice", "b"), alice, mount=digest) == Mounted(digest)
    assert isinstance(await hub.registry.start_upload(OTHER, bob, mount=digest), Upload)
    assert isinstance(await hub.registry.start_upload(OTHER, bob, expected=digest), Upload)
    await hub.repositories.set_visibility(TINY, alice, Visibility.PUBLIC)
    assert await hub.registry.start_upload(OTHER, bob, expected=digest) == Mounted(digest)


async def test_t032_mount_by_a_token_that_cannot_read_the_source_gives_an_upload(hub: RegistryHub, alice: Principal) -> None:
    digest = await hub.push_blob(TINY, alice, b"base")
    new = RepositoryName("alice", "derived")
    for caller in (
        with_token(alice.account, {"alice/derived": ["pull", "push"]}),
        with_key(alice.account, frozenset({Scope.PUSH})),
    ):
        for source in ("alice/tiny", None):
            assert isinstance(await hub.registry.start_upload(new, caller, mount=digest, source=source), Upload)
        assert isinstance(await hub.registry.start_upload(new, caller, expected=digest), Upload)
    assert not await is_there(hub, digest, alice, new)
    both = with_token(alice.account, {"alice/derived": ["pull", "push"], "alice/tiny": ["pull"]})
    assert await hub.registry.start_upload(new, both, mount=digest, source="alice/tiny") == Mounted(digest)


@pytest.mark.parametrize("source", ["library/x.gguf", "registry.ollama.ai/library/x", "../x", "x", "", "bob/private", "no/such"])
async def test_f23_mount_from_what_is_not_here_gives_an_upload_and_no_noise(
    hub: RegistryHub, alice: Principal, bob: Principal, source: str
) -> None:
    digest = await hub.push_blob(RepositoryName("bob", "private"), bob, b"base")
    assert isinstance(await hub.registry.start_upload(TINY, alice, mount=digest, source=source), Upload)
    assert await hub.audit.recent() == []


async def test_f24_blob_whose_file_is_lost_is_neither_skipped_nor_mounted_and_heals(hub: RegistryHub, alice: Principal) -> None:
    digest = await hub.push_blob(TINY, alice, b"abc")
    del hub.files.blobs[digest]
    assert isinstance(await hub.registry.start_upload(TINY, alice, expected=digest), Upload)
    new = RepositoryName("alice", "new")
    assert isinstance(await hub.registry.start_upload(new, alice, mount=digest, source="alice/tiny"), Upload)
    await hub.push_blob(TINY, alice, b"abc")
    assert await is_there(hub, digest, alice)


# ── Room ─────────────────────────────────────────────────────────────────────────────────────────────────────────────


async def test_f07_quota_is_checked_before_anything_is_read() -> None:
    hub = RegistryHub(quota_bytes=10)
    alice = await hub.add("alice")
    await hub.push_blob(TINY, alice, b"12345678")
    unread = chunks(b"never read")
    for doing in (
        hub.registry.start_upload(TINY, alice, declared_bytes=3),
        hub.registry.put_blob(TINY, alice, digest_of(b"abc"), unread, length=3),
    ):
        error = await error_of(doing)
        assert (error.status, error.code) == (403, "forbidden")
        assert "quota" in error.message
        assert "denied" not in error.message
    assert [piece async for piece in unread] == [b"never read"]
    upload = await hub.start(TINY, alice)
    assert (await error_of(patch(hub, upload, alice, b"abc"))).code == "forbidden"
    assert (await patch(hub, upload, alice, b"ab")).offset_bytes == 2


async def test_f07_streamed_upload_is_stopped_at_the_quota_and_rolled_back() -> None:
    hub = RegistryHub(quota_bytes=10)
    alice = await hub.add("alice")
    upload = await hub.start(TINY, alice)
    await hub.registry.append(upload.id, TINY, alice, chunks(b"1234"))
    long = hub.registry.append(upload.id, TINY, alice, chunks(b"5678", b"90", b"x"))
    assert (await error_of(long)).code == "forbidden"
    assert hub.files.upload_bytes(upload.id) == b"1234"
    await hub.registry.append(upload.id, TINY, alice, chunks(b"567890"))


async def test_f07_full_disk_is_told_before_anything_is_read(hub: RegistryHub, alice: Principal) -> None:
    hub.files.free = (256 << 20) + 2
    for doing in (
        hub.registry.start_upload(TINY, alice, declared_bytes=3),
        hub.registry.put_blob(TINY, alice, digest_of(b"abc"), chunks(b"abc"), length=3),
    ):
        assert (await error_of(doing)).code == "storage_full"
    await hub.push_blob(TINY, alice, b"ab")


async def test_f07_stream_of_unknown_length_leaves_the_headroom_of_the_disk(hub: RegistryHub, alice: Principal) -> None:
    upload = await hub.start(TINY, alice)
    await patch(hub, upload, alice, b"abc")

    async def endless() -> AsyncIterator[bytes]:
        while hub.files.free > 0:
            hub.files.free -= 1 << 20
            yield b"x" * (1 << 20)

    hub.files.free = (256 << 20) + (4 << 20)
    assert (await error_of(hub.registry.append(upload.id, TINY, alice, endless()))).code == "storage_full"
    # It is looked at every eight megabytes.
    assert hub.files.free > (256 - 9) << 20
    assert hub.files.upload_bytes(upload.id) == b"abc"


async def test_f07_parallel_pushes_do_not_each_use_up_the_same_disk(hub: RegistryHub, alice: Principal) -> None:
    hub.files.free = (256 << 20) + 100
    gates = [Gate(b"x" * 20, b"y" * 20) for _ in range(5)]
    uploads = [await hub.start(TINY, alice) for _ in gates]
    tasks = [
        asyncio.create_task(hub.registry.append(upload.id, TINY, alice, gate.body(), length=40))
        for upload, gate in zip(uploads, gates, strict=True)
    ]
    await gates[0].reached.wait()
    # What has arrived is the disk's own affair: only what is awaited counts besides.
    hub.files.free -= 40
    for gate in gates:
        gate.go_on.set()
    outcomes = await asyncio.gather(*tasks, return_exceptions=True)
    refused = [outcome.code for outcome in outcomes if isinstance(outcome, CorralError)]
    assert refused == ["storage_full"] * 3
    hub.files.free = (256 << 20) + 40
    await hub.registry.append(uploads[-1].id, TINY, alice, chunks(b"z" * 40), length=40)


async def test_t040_parallel_mounts_do_not_exceed_the_quota() -> None:
    hub = RegistryHub(quota_bytes=100)
    alice, bob = await hub.add("alice"), await hub.add("bob")
    digests = [await hub.push_blob(OTHER, bob, bytes([number]) * 30) for number in range(3)]
    await hub.repositories.set_visibility(OTHER, bob, Visibility.PUBLIC)
    await hub.push_blob(TINY, alice, b"x" * 35)
    # A mount takes no room on the disk.
    hub.files.free = (256 << 20) + 1
    mounts = [hub.registry.start_upload(TINY, alice, mount=digest, source=str(OTHER)) for digest in digests]
    outcomes = await asyncio.gather(*mounts, return_exceptions=True)
    assert sum(isinstance(outcome, Mounted) for outcome in outcomes) == 2
    assert await hub.store.stored_bytes("alice") == 95


async def test_t040_parallel_pushes_do_not_exceed_the_quota() -> None:
    hub = RegistryHub(quota_bytes=100)
    alice = await hub.add("alice")
    gates = [Gate(b"x" * 20, b"y" * 20) for _ in range(5)]
    uploads = [await hub.start(TINY, alice) for _ in gates]
    tasks = [
        asyncio.create_task(hub.registry.append(upload.id, TINY, alice, gate.body(), length=40))
        for upload, gate in zip(uploads, gates, strict=True)
    ]
    for gate in gates:
        gate.go_on.set()
    outcomes = await asyncio.gather(*tasks, return_exceptions=True)
    assert sum(isinstance(outcome, Upload) for outcome in outcomes) == 2
    assert await hub.store.stored_bytes("alice") == 80
    assert await hub.push_blob(TINY, alice, b"z" * 20)


async def test_t040_streams_without_a_length_count_while_they_arrive() -> None:
    hub = RegistryHub(quota_bytes=100)
    alice = await hub.add("alice")
    gates = [Gate(b"x" * 30, b"y" * 30) for _ in range(3)]
    uploads = [await hub.start(TINY, alice) for _ in gates]
    tasks = [
        asyncio.create_task(hub.registry.append(upload.id, TINY, alice, gate.body()))
        for upload, gate in zip(uploads, gates, strict=True)
    ]
    for gate in gates:
        await gate.reached.wait()
    for gate in gates:
        gate.go_on.set()
    outcomes = await asyncio.gather(*tasks, return_exceptions=True)
    assert all(isinstance(outcome, Upload) or outcome.code == "forbidden" for outcome in outcomes)  # type: ignore[union-attr]
    assert 60 <= await hub.store.stored_bytes("alice") <= 100


async def test_quota_of_a_repository_holds_within_that_of_its_account(hub: RegistryHub, alice: Principal) -> None:
    await hub.repositories.find(TINY, Right.PUSH, alice)
    await hub.repositories.set_quota(TINY, 5)
    error = await error_of(hub.push_blob(TINY, alice, b"123456"))
    assert "alice/tiny" in error.message
    await hub.push_blob(RepositoryName("alice", "other"), alice, b"123456")
    digest = digest_of(b"123456")
    assert (await error_of(hub.registry.start_upload(TINY, alice, mount=digest, source="alice/other"))).code == "forbidden"


async def test_quota_of_an_account_counts_instead_of_the_default() -> None:
    hub = RegistryHub(quota_bytes=3)
    alice, bob = await hub.add("alice"), await hub.add("bob")
    await hub.accounts.set_quota(alice.account.id, 5)
    await hub.push_blob(TINY, alice, b"12345")
    assert (
        "its quota is 5 B, 5 B of it taken" in (await error_of(hub.push_blob(RepositoryName("Alice", "b"), alice, b"6"))).message
    )
    assert (
        "its quota is 3 B, 0 B of it taken" in (await error_of(hub.push_blob(RepositoryName("bob", "b"), bob, b"1234"))).message
    )
    await hub.accounts.set_quota(bob.account.id, 0)
    assert (await error_of(hub.push_blob(RepositoryName("bob", "b"), bob, b"1"))).code == "forbidden"


async def test_quota_of_an_account_needs_no_default(hub: RegistryHub, alice: Principal) -> None:
    await hub.accounts.set_quota(alice.account.id, 2)
    assert (await error_of(hub.push_blob(TINY, alice, b"123"))).code == "forbidden"
    await hub.accounts.set_quota(alice.account.id, None)
    await hub.push_blob(TINY, alice, b"123")


async def test_library_has_no_quota_of_an_account() -> None:
    hub = RegistryHub(quota_bytes=1)
    root = await hub.add("root", is_admin=True)
    await hub.push_blob(RepositoryName("library", "llama"), root, b"weights")


async def test_broken_store_breaks_the_request(hub: RegistryHub, alice: Principal, monkeypatch: pytest.MonkeyPatch) -> None:
    async def fails(*arguments: object, **options: object) -> None:
        raise CorralError("unavailable")

    upload = await patch(hub, await hub.start(TINY, alice), alice, b"abc")
    monkeypatch.setattr(hub.store, "lease_blob", fails)
    assert (await error_of(hub.registry.commit(upload.id, TINY, alice, digest_of(b"abc")))).code == "unavailable"
    monkeypatch.undo()
    monkeypatch.setattr(hub.store, "add_upload", fails)
    assert (await error_of(hub.registry.start_upload(TINY, alice))).code == "unavailable"
    monkeypatch.undo()
    assert replace(upload, finished_as=None) == await hub.registry.status(upload.id, TINY, alice)


async def test_r01_commit_that_failed_behind_its_rename_is_finished_by_the_next(
    hub: RegistryHub, alice: Principal, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def fails(*arguments: object, **options: object) -> None:
        raise CorralError("unavailable")

    upload = await patch(hub, await hub.start(TINY, alice), alice, b"abc")
    monkeypatch.setattr(hub.store, "finish_upload", fails)
    assert (await error_of(hub.registry.commit(upload.id, TINY, alice, digest_of(b"abc")))).code == "unavailable"
    assert not await is_there(hub, digest_of(b"abc"), alice)
    monkeypatch.undo()
    await hub.registry.commit(upload.id, TINY, alice, digest_of(b"abc"))
    assert await is_there(hub, digest_of(b"abc"), alice)
