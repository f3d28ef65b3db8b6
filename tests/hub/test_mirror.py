"""The mirror: what is fetched, what is kept, what is served when upstream fails, and what a hostile upstream cannot do."""

import asyncio
import json
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace

import pytest

from corral.core.records import HostedModel, Visitor
from corral.core.registry import Right, StoredManifest, Visibility
from corral.core.transfer_ports import BlobToSend, RemoteManifest, RemoteRepository
from corral.hub.accounts import AccountRules, Accounts
from corral.hub.mirror import Mirror, MirroredRegistry
from corral.hub.mirror_blobs import MirrorLimits
from corral.hub.sharing import SharedWork, shared_work
from corral.wire.errors import CorralError
from corral.wire.manifest import MANIFEST_TYPE
from corral.wire.mirrors import parse_mirror_rule
from corral.wire.names import Digest, parse_content_digest
from corral.wire.registry import OCI_INDEX_TYPE, OCI_MANIFEST_TYPE
from corral.wire.repositories import parse_repository
from fakes import MemorySessions
from fakes_models import MemoryHosting
from fakes_registry import digest_of
from registry_hub import CONFIG, RegistryHub, a_manifest

UPSTREAM = "https://up.example"
RULES = ("library/*=https://up.example", "friends/*=https://up.example/ana", "docker.io/*=https://up.example/")
TINY = parse_repository("library/tiny")
WEIGHTS, MORE = b"weights" * 100, b"more weights"


@dataclass
class FakeUpstream:
    """A RegistryGateway before registries in memory. asked: how often for what. error: raised by everything. hold: what blobs
    wait for before their first byte; hold_answers: what everything else does. spoil: sent in the place of blobs."""

    manifests: dict[tuple[str, str], RemoteManifest] = field(default_factory=dict)
    blobs: dict[tuple[str, Digest], bytes] = field(default_factory=dict)
    asked: Counter[str] = field(default_factory=Counter)
    error: CorralError | None = None
    blob_error: CorralError | None = None
    hold: asyncio.Event | None = None
    hold_answers: asyncio.Event | None = None
    began: asyncio.Event = field(default_factory=asyncio.Event)
    spoil: dict[Digest, bytes] = field(default_factory=dict)
    open_reads: int = 0

    def push(self, path: str, body: bytes, *blobs: bytes, tag: str = "latest", media_type: str = MANIFEST_TYPE) -> Digest:
        """Have a manifest there under a tag, and blobs."""
        digest = digest_of(body)
        manifest = RemoteManifest(digest=digest, media_type=media_type, body=body)
        self.manifests |= {(path, tag): manifest, (path, str(digest)): manifest}
        self.blobs |= {(path, digest_of(blob)): blob for blob in blobs}
        return digest

    def push_model(self, path: str, *blobs: bytes, tag: str = "latest") -> Digest:
        """A model of those layers."""
        return self.push(path, a_manifest(*blobs), *blobs, CONFIG, tag=tag)

    async def manifest(self, repository: RemoteRepository, reference: str) -> RemoteManifest | None:
        assert repository.base_url == UPSTREAM
        self.asked[f"{repository.path}:{reference}"] += 1
        await asyncio.sleep(0)
        if self.hold_answers is not None:
            await self.hold_answers.wait()
        if self.error is not None:
            raise self.error
        return self.manifests.get((repository.path, reference))

    async def blob_size(self, repository: RemoteRepository, digest: Digest) -> int | None:
        self.asked[f"size {digest}"] += 1
        if self.error is not None:
            raise self.error
        content = self.blobs.get((repository.path, digest))
        return None if content is None else len(content)

    async def read_blob(self, repository: RemoteRepository, digest: Digest, *, first: int, count: int) -> AsyncIterator[bytes]:
        self.asked[str(digest)] += 1
        self.open_reads += 1
        try:
            self.began.set()
            if self.hold is not None:
                await self.hold.wait()
            if self.error is not None:
                raise self.error
            content = self.spoil.get(digest, self.blobs.get((repository.path, digest)))
            if content is None:
                raise CorralError("not_found", "404: no such blob")
            part = content[first : first + count] if digest not in self.spoil else content[first:]
            for start in range(0, len(part), 100):
                yield part[start : start + 100]
                if self.blob_error is not None:
                    raise self.blob_error
        finally:
            self.open_reads -= 1

    async def send_blob(self, repository: RemoteRepository, blob: BlobToSend, progress: object) -> None:
        raise AssertionError("a mirror pushes nothing")

    async def put_manifest(self, *arguments: object, **more: object) -> None:
        raise AssertionError("a mirror pushes nothing")


class Mirrored(RegistryHub):
    """A registry with a mirror before it."""

    work: SharedWork
    mirror: Mirror
    mirrored: MirroredRegistry

    @asynccontextmanager
    async def opened(self, upstream: FakeUpstream, rules: Sequence[str], limits: MirrorLimits) -> AsyncIterator["Mirrored"]:
        async with shared_work() as work:
            self.work = work
            self.mirror = Mirror(
                [parse_mirror_rule(rule) for rule in rules],
                gateway=upstream,
                store=self.store,
                files=self.files,
                quotas=self.quotas,
                accounts=self.accounts,
                clock=self.clock,
                entropy=self.entropy,
                background=work,
                limits=limits,
            )
            self.mirrored = MirroredRegistry(
                self.mirror,
                repositories=self.repositories,
                uploads=self.uploads,
                links=self.links,
                stubs=self.stubs,
                store=self.store,
                files=self.files,
                clock=self.clock,
            )
            yield self

    async def pull(self, name: str = "library/tiny", reference: str = "latest") -> list[bytes]:
        """What a client without an account gets: the blobs of the model, in order."""
        repository = parse_repository(name)
        manifest = await self.mirrored.manifest(repository, reference, None)
        document = json.loads(manifest.body)
        return [
            await self.blob(name, parse_content_digest(layer["digest"])) for layer in (*document["layers"], document["config"])
        ]

    async def blob(self, name: str, digest: Digest) -> bytes:
        facts = await self.mirrored.blob(parse_repository(name), digest, None)
        content = self.files.blobs[digest]
        assert facts.size_bytes == len(content)
        return content

    async def kept(self, name: str = "library/tiny", reference: str = "latest") -> StoredManifest | None:
        """What is stored, whoever may see it."""
        repository = parse_repository(name)
        found = await self.store.repository(repository.namespace, repository.name)
        wanted = parse_content_digest(reference) if ":" in reference else reference
        return await self.store.manifest(found.id, wanted) if found else None

    async def settle(self) -> None:
        """Let what is under way come to its end."""
        # Nothing in public tells that background work is over: nobody but a test would wait for it.
        while tasks := list(self.work._tasks.values()):
            await asyncio.wait(tasks)

    def fingerprint(self) -> tuple[object, ...]:
        """All that is on the disk."""
        return dict(self.files.blobs), self.files.free, set(self.files._uploads)


@pytest.fixture
def upstream() -> FakeUpstream:
    found = FakeUpstream()
    found.push_model("library/tiny", WEIGHTS, MORE)
    return found


@pytest.fixture
async def hub(upstream: FakeUpstream) -> AsyncIterator[Mirrored]:
    hub = Mirrored(hosted=MemoryHosting())
    async with hub.opened(upstream, RULES, MirrorLimits(keep_free_bytes=1000)):
        yield hub


async def code_of(awaitable: object) -> str:
    with pytest.raises(CorralError) as caught:
        await awaitable  # type: ignore[misc]
    return caught.value.code


# ── What is fetched and kept ─────────────────────────────────────────────────────────────────────────────────────────
async def test_model_is_fetched_once_verified_kept_and_served(hub: Mirrored, upstream: FakeUpstream) -> None:
    assert await hub.pull() == [WEIGHTS, MORE, CONFIG]
    await hub.settle()
    assert await hub.pull() == [WEIGHTS, MORE, CONFIG]
    assert set(upstream.asked.values()) == {1}
    found = await hub.store.repository("library", "tiny")
    assert found is not None
    assert (found.visibility, found.mirrored_from) == (Visibility.PUBLIC, f"{UPSTREAM}/library/tiny")
    assert await hub.kept() == StoredManifest(
        digest=digest_of(a_manifest(WEIGHTS, MORE)), media_type=MANIFEST_TYPE, body=a_manifest(WEIGHTS, MORE)
    )


async def test_blobs_are_linked_by_their_manifest_and_survive_collection(hub: Mirrored) -> None:
    await hub.pull()
    await hub.settle()
    hub.clock.advance(60 * 24 * 3600)
    assert await hub.store.unnamed_links(now=hub.clock.now(), limit=100) == 0
    assert await hub.store.condemn_blobs(now=hub.clock.now(), limit=100) == []


@pytest.mark.parametrize(
    ("name", "path"), [("library/tiny", "library/tiny"), ("friends/tiny", "ana/tiny"), ("docker.io/a/b", "a/b")]
)
async def test_rule_says_where_upstream_it_is(hub: Mirrored, upstream: FakeUpstream, name: str, path: str) -> None:
    upstream.push_model(path, WEIGHTS)
    hub_blobs = await hub.pull(name)
    assert hub_blobs[0] == WEIGHTS
    await hub.settle()
    upstream.error = CorralError("upstream_failed")
    assert (await hub.pull(name))[0] == WEIGHTS


async def test_manifest_is_answered_before_its_blobs_are_here(hub: Mirrored, upstream: FakeUpstream) -> None:
    upstream.hold = asyncio.Event()
    manifest = await hub.mirrored.manifest(TINY, "latest", None)
    assert await hub.mirrored.manifest(TINY, str(manifest.digest), None) == manifest
    assert await hub.kept() is None
    upstream.hold.set()
    await hub.settle()
    assert await hub.kept() == manifest


async def test_many_who_wait_for_one_blob_cause_one_fetch(hub: Mirrored, upstream: FakeUpstream) -> None:
    upstream.hold = asyncio.Event()
    await hub.mirrored.manifest(TINY, "latest", None)
    readers = [asyncio.create_task(hub.blob("library/tiny", digest_of(WEIGHTS))) for _ in range(20)]
    await upstream.began.wait()
    upstream.hold.set()
    assert set(await asyncio.gather(*readers)) == {WEIGHTS}
    await hub.settle()
    assert upstream.asked[str(digest_of(WEIGHTS))] == 1


async def test_many_who_ask_for_one_tag_cause_one_question(hub: Mirrored, upstream: FakeUpstream) -> None:
    found = await asyncio.gather(*(hub.mirrored.manifest(TINY, "latest", None) for _ in range(20)))
    assert len({manifest.digest for manifest in found}) == 1
    assert upstream.asked["library/tiny:latest"] == 1


async def test_manifest_asked_for_by_digest_and_then_by_tag_is_kept_under_both(hub: Mirrored, upstream: FakeUpstream) -> None:
    upstream.hold = asyncio.Event()
    digest = digest_of(a_manifest(WEIGHTS, MORE))
    assert (await hub.mirrored.manifest(TINY, str(digest), None)).digest == digest
    assert (await hub.mirrored.manifest(TINY, "latest", None)).digest == digest
    upstream.hold.set()
    await hub.settle()
    kept = await hub.kept()
    assert kept is not None
    assert kept == await hub.mirror.manifest(TINY, str(digest))
    await hub.mirror.have_blob(TINY, digest_of(WEIGHTS))
    assert upstream.asked[str(digest_of(WEIGHTS))] == 1


async def test_repository_is_asked_for_in_the_spelling_that_was_found(hub: Mirrored, upstream: FakeUpstream) -> None:
    await hub.pull()
    await hub.settle()
    hub.clock.advance(901)
    assert (await hub.pull("Library/TINY"))[0] == WEIGHTS
    assert upstream.asked["library/tiny:latest"] == 2


async def test_fetch_goes_on_when_whoever_asked_has_gone(hub: Mirrored, upstream: FakeUpstream) -> None:
    upstream.hold = asyncio.Event()
    await hub.mirrored.manifest(TINY, "latest", None)
    reader = asyncio.create_task(hub.blob("library/tiny", digest_of(WEIGHTS)))
    await upstream.began.wait()
    reader.cancel()
    with pytest.raises(asyncio.CancelledError):
        await reader
    upstream.hold.set()
    await hub.settle()
    assert await hub.kept() is not None


async def test_what_is_under_way_ends_with_the_hub(upstream: FakeUpstream) -> None:
    upstream.hold = asyncio.Event()
    hub = Mirrored()
    async with hub.opened(upstream, RULES, MirrorLimits(keep_free_bytes=0)):
        await hub.mirrored.manifest(TINY, "latest", None)
        await upstream.began.wait()
    assert upstream.open_reads == 0
    assert hub.fingerprint()[2] == set()


async def test_client_goes_on_after_a_restart_of_the_hub(upstream: FakeUpstream) -> None:
    hub = Mirrored()
    upstream.hold = asyncio.Event()
    async with hub.opened(upstream, RULES, MirrorLimits(keep_free_bytes=0)):
        await hub.mirrored.manifest(TINY, "latest", None)
        await upstream.began.wait()
    upstream.hold = None
    async with hub.opened(upstream, RULES, MirrorLimits(keep_free_bytes=0)):
        assert await hub.blob("library/tiny", digest_of(MORE)) == MORE
        assert await code_of(hub.blob("library/tiny", digest_of(b"unknown"))) == "blob_unknown"
        assert await code_of(hub.blob("library/tiny", digest_of(b"unknown"))) == "blob_unknown"
    assert upstream.asked[f"size {digest_of(b'unknown')}"] == 1


async def test_f24_blob_whose_file_was_lost_is_fetched_again(hub: Mirrored, upstream: FakeUpstream) -> None:
    await hub.pull()
    await hub.settle()
    await hub.files.remove_blob(digest_of(WEIGHTS))
    assert await hub.blob("library/tiny", digest_of(WEIGHTS)) == WEIGHTS


async def test_blob_of_several_parts_is_fetched_in_order(
    hub: Mirrored, upstream: FakeUpstream, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Real parts have a hundred million bytes.
    monkeypatch.setattr("corral.wire.registry._MIN_PART_BYTES", 64)
    assert (await hub.pull())[0] == WEIGHTS
    assert upstream.asked[str(digest_of(WEIGHTS))] == -(-len(WEIGHTS) // 64)


async def test_empty_blob_is_kept_like_any_other(hub: Mirrored, upstream: FakeUpstream) -> None:
    upstream.push_model("library/empty", b"")
    assert await hub.pull("library/empty") == [b"", CONFIG]


async def test_index_is_kept_with_all_below_it(hub: Mirrored, upstream: FakeUpstream) -> None:
    children = [a_manifest(WEIGHTS, mediaType=OCI_MANIFEST_TYPE), a_manifest(MORE, mediaType=OCI_MANIFEST_TYPE)]
    for child in children:
        upstream.push("library/multi", child, WEIGHTS, MORE, CONFIG, tag="x", media_type=OCI_MANIFEST_TYPE)
    inner = an_index(children[:1])
    upstream.push("library/multi", inner, tag="x", media_type=OCI_INDEX_TYPE)
    digest = upstream.push("library/multi", an_index([inner, *children]), tag="latest", media_type=OCI_INDEX_TYPE)
    manifest = await hub.mirrored.manifest(parse_repository("library/multi"), "latest", None)
    assert (manifest.digest, manifest.media_type) == (digest, OCI_INDEX_TYPE)
    await hub.settle()
    upstream.error = CorralError("upstream_failed")
    assert await hub.pull("library/multi", str(digest_of(children[1]))) == [MORE, CONFIG]


def an_index(children: Sequence[bytes]) -> bytes:
    listed = [{"mediaType": OCI_MANIFEST_TYPE, "digest": str(digest_of(child)), "size": len(child)} for child in children]
    return json.dumps({"schemaVersion": 2, "mediaType": OCI_INDEX_TYPE, "manifests": listed}).encode()


async def test_manifest_sent_as_plain_text_is_what_it_says_itself(hub: Mirrored, upstream: FakeUpstream) -> None:
    upstream.push("library/text", a_manifest(WEIGHTS), WEIGHTS, CONFIG, media_type="text/plain; charset=utf-8")
    manifest = await hub.mirrored.manifest(parse_repository("library/text"), "latest", None)
    assert manifest.media_type == MANIFEST_TYPE


# ── Tags that move ───────────────────────────────────────────────────────────────────────────────────────────────────
async def test_tag_that_moved_upstream_moves_here_after_a_while(hub: Mirrored, upstream: FakeUpstream) -> None:
    await hub.pull()
    await hub.settle()
    upstream.push_model("library/tiny", b"new weights")
    assert (await hub.pull())[0] == WEIGHTS
    hub.clock.advance(901)
    assert (await hub.pull())[0] == b"new weights"
    await hub.settle()
    kept = await hub.kept()
    assert kept is not None
    assert kept.digest == digest_of(a_manifest(b"new weights"))


async def test_tag_that_moved_back_points_at_what_is_kept(hub: Mirrored, upstream: FakeUpstream) -> None:
    for content in (WEIGHTS, MORE, WEIGHTS):
        upstream.push_model("library/tiny", content)
        hub.clock.advance(901)
        assert (await hub.pull())[0] == content
        await hub.settle()
    assert upstream.asked[str(digest_of(WEIGHTS))] == 1
    kept = await hub.kept()
    assert kept is not None
    assert kept.digest == digest_of(a_manifest(WEIGHTS))


async def test_t120_tag_that_moves_while_blobs_arrive_ends_at_the_later_manifest(hub: Mirrored, upstream: FakeUpstream) -> None:
    upstream.hold = asyncio.Event()
    old = await hub.mirrored.manifest(TINY, "latest", None)
    new = upstream.push_model("library/tiny", b"new weights")
    # Somebody asks by digest, which is no question of what the tag points at.
    assert (await hub.mirrored.manifest(TINY, str(new), None)).digest == new
    assert (await hub.mirrored.manifest(TINY, "latest", None)).digest == old.digest
    upstream.hold.set()
    await hub.settle()
    hub.clock.advance(901)
    assert (await hub.mirrored.manifest(TINY, "latest", None)).digest == new
    assert (await hub.mirrored.manifest(TINY, str(old.digest), None)).digest == old.digest


async def test_tag_that_is_gone_upstream_is_served_as_it_was_kept(hub: Mirrored, upstream: FakeUpstream) -> None:
    await hub.pull()
    await hub.settle()
    del upstream.manifests["library/tiny", "latest"]
    hub.clock.advance(901)
    assert (await hub.pull())[0] == WEIGHTS


# ── An upstream that fails ───────────────────────────────────────────────────────────────────────────────────────────
@pytest.mark.parametrize("code", ["unauthorized", "forbidden", "rate_limited", "too_large", "upstream_failed", "not_found"])
async def test_upstream_that_fails_is_502_for_what_is_not_kept(hub: Mirrored, upstream: FakeUpstream, code: str) -> None:
    upstream.error = CorralError(code, "500: <b>\n\x1b[31mno")
    with pytest.raises(CorralError) as caught:
        await hub.mirrored.manifest(TINY, "latest", None)
    assert (caught.value.code, caught.value.status) == ("upstream_failed", 502)
    assert caught.value.message.isprintable()
    assert "up.example" in caught.value.message


async def test_upstream_that_fails_is_asked_again_only_after_a_while(hub: Mirrored, upstream: FakeUpstream) -> None:
    upstream.error = CorralError("upstream_failed")
    for _ in range(5):
        assert await code_of(hub.pull()) == "upstream_failed"
    assert upstream.asked.total() == 1
    upstream.error = None
    hub.clock.advance(31)
    assert (await hub.pull())[0] == WEIGHTS


async def test_what_is_kept_is_served_while_upstream_fails(hub: Mirrored, upstream: FakeUpstream) -> None:
    await hub.pull()
    await hub.settle()
    upstream.error = CorralError("upstream_failed")
    hub.clock.advance(901)
    assert await hub.pull() == [WEIGHTS, MORE, CONFIG]
    assert await code_of(hub.pull(reference="other")) == "upstream_failed"


async def test_upstream_that_does_not_answer_is_not_waited_for(upstream: FakeUpstream) -> None:
    hub = Mirrored()
    async with hub.opened(upstream, RULES, MirrorLimits(answer_s=0.001, kept_answer_s=0.001, keep_free_bytes=0)):
        upstream.hold_answers = asyncio.Event()
        with pytest.raises(CorralError, match="does not answer") as caught:
            await hub.mirrored.manifest(TINY, "latest", None)
        assert caught.value.code == "upstream_failed"
        # The question goes on, and what it brings is kept.
        upstream.hold_answers.set()
        await hub.settle()
        assert await hub.kept() is not None


async def test_what_is_kept_is_served_while_upstream_does_not_answer(upstream: FakeUpstream) -> None:
    hub = Mirrored()
    async with hub.opened(upstream, RULES, MirrorLimits(kept_answer_s=0.001, keep_free_bytes=0)):
        await hub.pull()
        await hub.settle()
        hub.clock.advance(901)
        new = upstream.push_model("library/tiny", b"new weights")
        upstream.hold_answers = asyncio.Event()
        assert [(await hub.pull())[0] for _ in range(3)] == [WEIGHTS] * 3
        upstream.hold_answers.set()
        await hub.settle()
        kept = await hub.kept()
    assert kept is not None
    assert kept.digest == new
    assert upstream.asked["library/tiny:latest"] == 2


async def test_what_does_not_exist_upstream_is_asked_for_once(hub: Mirrored, upstream: FakeUpstream) -> None:
    stranger = Visitor()
    for _ in range(3):
        assert await code_of(hub.mirrored.manifest(TINY, "none", stranger)) == "name_unknown"
    assert upstream.asked.total() == 1
    assert await hub.store.repository("library", "tiny") is None


async def test_t093_blob_that_breaks_off_is_an_error_and_leaves_nothing(hub: Mirrored, upstream: FakeUpstream) -> None:
    before = hub.fingerprint()
    upstream.blob_error = CorralError("upstream_failed", "the connection broke")
    assert await code_of(hub.pull()) == "upstream_failed"
    await hub.settle()
    assert hub.fingerprint() == before
    assert await hub.kept() is None
    assert upstream.open_reads == 0


async def test_blob_is_waited_for_again_after_a_while(hub: Mirrored, upstream: FakeUpstream) -> None:
    upstream.blob_error = CorralError("upstream_failed")
    assert await code_of(hub.pull()) == "upstream_failed"
    await hub.settle()
    assert await code_of(hub.pull()) == "upstream_failed"
    upstream.blob_error = None
    hub.clock.advance(31)
    assert (await hub.pull())[0] == WEIGHTS


# ── A hostile upstream ───────────────────────────────────────────────────────────────────────────────────────────────
@pytest.mark.parametrize("sent", [b"other", b"x" * len(WEIGHTS), WEIGHTS + b"x", b""])
async def test_t094_content_that_its_digest_does_not_prove_is_never_served(
    hub: Mirrored, upstream: FakeUpstream, sent: bytes
) -> None:
    upstream.spoil[digest_of(WEIGHTS)] = sent
    assert await code_of(hub.pull()) == "upstream_failed"
    await hub.settle()
    assert digest_of(WEIGHTS) not in hub.files.blobs
    assert digest_of(sent) not in hub.files.blobs
    assert await hub.kept() is None


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b'{"schemaVersion":1}',
        b'{"layers":[{"digest":"sha256:../../x","size":1}]}',
        a_manifest(WEIGHTS, manifests=[]),
        a_manifest(WEIGHTS).replace(b'"size": 700', b'"size": -1'),
        b"[" * 100_000,
    ],
)
async def test_t093_manifest_that_is_none_is_an_error_and_leaves_nothing(
    hub: Mirrored, upstream: FakeUpstream, body: bytes
) -> None:
    upstream.push("library/bad", body)
    before = hub.fingerprint()
    assert await code_of(hub.pull("library/bad")) == "upstream_failed"
    await hub.settle()
    assert hub.fingerprint() == before
    assert await hub.store.repository("library", "bad") is None


async def test_t120_manifest_of_another_digest_is_refused(hub: Mirrored, upstream: FakeUpstream) -> None:
    wanted = digest_of(b"wanted")
    upstream.manifests["library/tiny", str(wanted)] = upstream.manifests["library/tiny", "latest"]
    assert await code_of(hub.mirrored.manifest(TINY, str(wanted), None)) == "upstream_failed"


async def test_t093_size_that_is_a_lie_is_an_error(hub: Mirrored, upstream: FakeUpstream) -> None:
    body = a_manifest(WEIGHTS).replace(b'"size": 700', b'"size": 701')
    upstream.push("library/liar", body, WEIGHTS, CONFIG)
    assert await code_of(hub.pull("library/liar")) == "upstream_failed"
    await hub.settle()
    assert await hub.kept("library/liar") is None


@pytest.mark.parametrize("size", [2**62, 2**63 - 1, 1 << 41])
async def test_t093_size_beyond_the_limits_is_refused_unread(hub: Mirrored, upstream: FakeUpstream, size: int) -> None:
    body = a_manifest(WEIGHTS).replace(b'"size": 700', f'"size": {size}'.encode())
    upstream.push("library/huge", body, WEIGHTS, CONFIG)
    assert await code_of(hub.pull("library/huge")) == "upstream_failed"
    await hub.settle()
    assert upstream.asked[str(digest_of(WEIGHTS))] == 0


async def test_t093_index_without_end_is_refused(hub: Mirrored, upstream: FakeUpstream) -> None:
    body = a_manifest(WEIGHTS)
    upstream.push("library/deep", body, WEIGHTS, CONFIG, tag="x")
    for level in range(5):
        body = an_index([body])
        upstream.push("library/deep", body, tag=f"level-{level}", media_type=OCI_INDEX_TYPE)
    await hub.mirrored.manifest(parse_repository("library/deep"), "level-4", None)
    await hub.settle()
    assert await hub.kept("library/deep", "level-4") is None
    assert await code_of(hub.mirrored.manifest(parse_repository("library/deep"), "level-4", None)) == "upstream_failed"


async def test_t093_index_of_many_manifests_is_refused(hub: Mirrored, upstream: FakeUpstream) -> None:
    children = [a_manifest(WEIGHTS, annotations={"n": str(number)}) for number in range(300)]
    for child in children:
        upstream.push("library/wide", child, WEIGHTS, CONFIG, tag="x")
    upstream.push("library/wide", an_index(children), media_type=OCI_INDEX_TYPE)
    await hub.mirrored.manifest(parse_repository("library/wide"), "latest", None)
    await hub.settle()
    assert await hub.kept("library/wide") is None
    assert upstream.asked.total() == 1


async def test_t093_index_of_large_manifests_is_refused(upstream: FakeUpstream) -> None:
    hub = Mirrored()
    children = [a_manifest(WEIGHTS, annotations={"n": "x" * 400 + str(number)}) for number in range(3)]
    for child in children:
        upstream.push("library/wide", child, WEIGHTS, CONFIG, tag="x")
    upstream.push("library/wide", an_index(children), media_type=OCI_INDEX_TYPE)
    async with hub.opened(upstream, RULES, MirrorLimits(max_index_bytes=2000, keep_free_bytes=0)):
        await hub.mirrored.manifest(parse_repository("library/wide"), "latest", None)
        await hub.settle()
    assert await hub.kept("library/wide") is None


async def test_index_that_names_what_is_not_there_is_not_kept(hub: Mirrored, upstream: FakeUpstream) -> None:
    upstream.push("library/hole", an_index([b"missing"]), media_type=OCI_INDEX_TYPE)
    await hub.mirrored.manifest(parse_repository("library/hole"), "latest", None)
    await hub.settle()
    assert await hub.kept("library/hole") is None


async def test_t031_upstream_cannot_publish_what_was_pushed_here_privately(hub: Mirrored, upstream: FakeUpstream) -> None:
    secret = b"private weights"
    alice = await hub.add("alice")
    await hub.push(parse_repository("alice/secret"), alice, secret)
    upstream.push("library/thief", a_manifest(secret), CONFIG)
    assert await code_of(hub.pull("library/thief")) == "upstream_failed"
    await hub.settle()
    assert await hub.kept("library/thief") is None
    upstream.push("library/honest", a_manifest(secret), secret, CONFIG)
    assert await hub.pull("library/honest") == [secret, CONFIG]
    assert upstream.asked[str(digest_of(secret))] == 2


async def test_blob_that_another_mirrored_repository_has_is_not_fetched_again(hub: Mirrored, upstream: FakeUpstream) -> None:
    upstream.push_model("library/other", WEIGHTS)
    await hub.pull()
    await hub.settle()
    assert (await hub.pull("library/other"))[0] == WEIGHTS
    assert upstream.asked[str(digest_of(WEIGHTS))] == 1


async def test_too_many_models_at_once_are_put_off(upstream: FakeUpstream) -> None:
    hub = Mirrored()
    upstream.hold = asyncio.Event()
    upstream.push_model("library/other", MORE)
    async with hub.opened(upstream, RULES, MirrorLimits(models_at_once=1, keep_free_bytes=0)):
        await hub.mirrored.manifest(TINY, "latest", None)
        assert await code_of(hub.pull("library/other")) == "busy"


class SlowBeside(FakeUpstream):
    """An upstream beside one that answers and then sends nothing."""

    async def manifest(self, repository: RemoteRepository, reference: str) -> RemoteManifest | None:
        return await super().manifest(replace(repository, base_url=UPSTREAM), reference)

    async def read_blob(self, repository: RemoteRepository, digest: Digest, *, first: int, count: int) -> AsyncIterator[bytes]:
        if repository.base_url != UPSTREAM:
            await asyncio.Event().wait()
        async for chunk in super().read_blob(repository, digest, first=first, count=count):
            yield chunk


async def test_t102_upstream_that_sends_nothing_does_not_keep_another_s_models_away() -> None:
    hub, upstream = Mirrored(), SlowBeside()
    upstream.push_model("library/tiny", WEIGHTS)
    upstream.push_model("slow", MORE)
    rules = (*RULES, "slow.example/*=https://slow.example/")
    async with hub.opened(upstream, rules, MirrorLimits(models_at_once=1, keep_free_bytes=0)):
        await hub.mirrored.manifest(parse_repository("slow.example/slow"), "latest", None)
        assert (await hub.pull())[0] == WEIGHTS


async def test_t102_questions_to_an_upstream_that_does_not_answer_do_not_pile_up(upstream: FakeUpstream) -> None:
    hub = Mirrored()
    upstream.hold_answers = asyncio.Event()
    async with hub.opened(upstream, RULES, MirrorLimits(answer_s=0.01, questions_at_once=1, max_queue=3)):
        codes = [await code_of(hub.pull(f"library/name-{number}")) for number in range(5)]
        assert codes == ["upstream_failed"] * 3 + ["busy"] * 2
        upstream.hold_answers.set()
        await hub.settle()
        assert (await hub.pull())[0] == WEIGHTS


async def test_r003_mirror_stops_before_the_disk_is_full(hub: Mirrored) -> None:
    hub.files.free = 1000 + len(WEIGHTS) - 1
    assert await code_of(hub.pull()) == "storage_full"
    await hub.settle()
    assert digest_of(WEIGHTS) not in hub.files.blobs


async def test_r003_blobs_that_arrive_together_leave_what_is_kept_free(upstream: FakeUpstream) -> None:
    hub, upstream.hold = Mirrored(), asyncio.Event()
    # Any two of them would fit.
    hub.files.free = (1 << 30) + len(WEIGHTS) + len(MORE) + len(CONFIG) - 1
    async with hub.opened(upstream, RULES, MirrorLimits(keep_free_bytes=1 << 30)):
        await hub.mirrored.manifest(TINY, "latest", None)
        await upstream.began.wait()
        assert await code_of(hub.blob("library/tiny", digest_of(CONFIG))) == "storage_full"
        upstream.hold.set()
        await hub.settle()
    assert {digest_of(WEIGHTS), digest_of(MORE)} == hub.files.blobs.keys()


async def test_size_that_upstream_cannot_tell_is_502(upstream: FakeUpstream) -> None:
    hub = Mirrored()
    async with hub.opened(upstream, RULES, MirrorLimits(keep_free_bytes=0)):
        await hub.pull()
        await hub.settle()
        upstream.error = CorralError("unauthorized", "401: sign in")
        for _ in range(2):
            assert await code_of(hub.blob("library/tiny", digest_of(b"unknown"))) == "upstream_failed"
    assert upstream.asked[f"size {digest_of(b'unknown')}"] == 1


async def test_repository_that_is_pushed_while_upstream_answers_is_left_alone(
    hub: Mirrored, upstream: FakeUpstream, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = await hub.add("root", is_admin=True)
    ask = upstream.manifest

    async def manifest(repository: RemoteRepository, reference: str) -> RemoteManifest | None:
        await hub.push(TINY, root, b"our own")
        return await ask(repository, reference)

    # No other seam lies between the question and its answer.
    monkeypatch.setattr(upstream, "manifest", manifest)
    assert await code_of(hub.mirrored.manifest(TINY, "latest", None)) == "busy"
    assert await code_of(hub.blob("library/tiny", digest_of(WEIGHTS))) == "unauthorized"


async def test_blob_of_what_is_not_mirrored_is_unknown(hub: Mirrored, upstream: FakeUpstream) -> None:
    alice = await hub.add("alice")
    await hub.push(parse_repository("alice/tiny"), alice, WEIGHTS)
    await hub.repositories.set_visibility(parse_repository("alice/tiny"), alice, Visibility.PUBLIC)
    assert await code_of(hub.blob("alice/tiny", digest_of(b"unknown"))) == "blob_unknown"
    assert await code_of(hub.mirrored.manifest(parse_repository("alice/tiny"), str(digest_of(b"x")), None)) == "manifest_unknown"
    assert upstream.asked.total() == 0


async def test_failure_of_our_own_is_told_as_such(hub: Mirrored, monkeypatch: pytest.MonkeyPatch) -> None:
    async def commit(*_: object) -> None:
        raise RuntimeError("a bug")

    # A fault that no fake has: what must not end with it is everything else in the background.
    monkeypatch.setattr(hub.files, "commit", commit)
    assert await code_of(hub.pull()) == "internal"
    await hub.settle()


# ── What is not mirrored ─────────────────────────────────────────────────────────────────────────────────────────────
async def test_nothing_is_mirrored_without_rules(upstream: FakeUpstream) -> None:
    hub = Mirrored()
    async with hub.opened(upstream, (), MirrorLimits()):
        assert await code_of(hub.mirrored.manifest(TINY, "latest", Visitor())) == "name_unknown"
    assert upstream.asked.total() == 0


@pytest.mark.parametrize(
    ("name", "reference"),
    [("ana/tiny", "latest"), ("library/tiny", "local"), ("library/tiny", "120b-cloud"), ("library/tiny", ".bad")],
)
async def test_what_no_rule_allows_is_not_asked_for(hub: Mirrored, upstream: FakeUpstream, name: str, reference: str) -> None:
    assert await code_of(hub.mirrored.manifest(parse_repository(name), reference, Visitor())) == "name_unknown"
    assert upstream.asked.total() == 0


@pytest.mark.parametrize("digest", ["sha256:../../x", "sha256:" + "A" * 64, "md5:" + "a" * 32])
async def test_t033_digest_that_is_none_is_not_asked_for(hub: Mirrored, upstream: FakeUpstream, digest: str) -> None:
    assert await code_of(hub.mirrored.manifest(TINY, digest, None)) == "digest_invalid"
    assert upstream.asked.total() == 0


@pytest.mark.parametrize("visibility", list(Visibility))
async def test_what_was_pushed_here_is_never_replaced(hub: Mirrored, upstream: FakeUpstream, visibility: Visibility) -> None:
    root = await hub.add("root", is_admin=True)
    await hub.push(TINY, root, b"our own")
    await hub.repositories.set_visibility(TINY, root, visibility)
    assert (await hub.mirrored.manifest(TINY, "latest", root)).body == a_manifest(b"our own")
    assert await code_of(hub.mirrored.manifest(TINY, "other", root)) == "manifest_unknown"
    assert upstream.asked.total() == 0


async def test_namespace_of_an_account_is_not_mirrored(hub: Mirrored, upstream: FakeUpstream) -> None:
    upstream.push_model("ana/tiny", WEIGHTS)
    await hub.add("friends")
    assert await code_of(hub.mirrored.manifest(parse_repository("friends/tiny"), "latest", Visitor())) == "name_unknown"
    assert upstream.asked.total() == 0


async def test_mirrored_repository_that_was_closed_is_left_alone(hub: Mirrored, upstream: FakeUpstream) -> None:
    root = await hub.add("root", is_admin=True)
    await hub.pull()
    await hub.settle()
    await hub.repositories.set_visibility(TINY, root, Visibility.PRIVATE)
    hub.clock.advance(901)
    asked = upstream.asked.total()
    assert await code_of(hub.mirrored.manifest(TINY, "latest", Visitor())) == "name_unknown"
    assert upstream.asked.total() == asked


async def test_mirrored_repository_of_another_upstream_is_served_but_not_mixed(hub: Mirrored, upstream: FakeUpstream) -> None:
    await hub.pull()
    await hub.settle()
    asked = upstream.asked.total()
    async with hub.opened(upstream, ["library/*=https://elsewhere.example"], MirrorLimits()):
        assert (await hub.pull())[0] == WEIGHTS
        assert await code_of(hub.mirrored.manifest(TINY, "other", None)) == "manifest_unknown"
    assert upstream.asked.total() == asked


async def test_push_to_a_mirrored_repository_is_refused(hub: Mirrored) -> None:
    root = await hub.add("root", is_admin=True)
    await hub.pull()
    with pytest.raises(CorralError, match="is a mirror of") as caught:
        await hub.push(TINY, root, b"our own")
    assert caught.value.code == "forbidden"


@pytest.mark.parametrize("name", ["library/tiny", "friends/tiny"])
async def test_administrator_can_delete_what_is_mirrored_and_have_it_fetched_anew(
    hub: Mirrored, upstream: FakeUpstream, name: str
) -> None:
    upstream.push_model("ana/tiny", WEIGHTS)
    root, ana = await hub.add("root", is_admin=True), await hub.add("ana")
    await hub.pull(name)
    await hub.settle()
    assert await code_of(hub.repositories.find(parse_repository(name), Right.DELETE, ana)) == "forbidden"
    await hub.repositories.remove(parse_repository(name), root)
    assert (await hub.pull(name))[0] == WEIGHTS


async def test_hosted_model_s_cloud_tag_is_answered_here(hub: Mirrored, upstream: FakeUpstream) -> None:
    hosting = MemoryHosting()
    hub = Mirrored(hosted=hosting)
    await hosting.offer(
        HostedModel(
            name="tiny", upstream_url="http://127.0.0.1:1", upstream_model="x", is_public=True, created_at=hub.clock.now()
        )
    )
    async with hub.opened(upstream, RULES, MirrorLimits()):
        manifest = await hub.mirrored.manifest(TINY, "cloud", None)
        document = json.loads(manifest.body)
        facts = await hub.mirrored.blob(TINY, parse_content_digest(document["config"]["digest"]), None)
    assert facts.content is not None
    assert upstream.asked.total() == 0


async def test_t119_name_of_a_mirrored_namespace_is_not_given_to_an_account(hub: Mirrored) -> None:
    await hub.add("root", is_admin=True)
    accounts = Accounts(
        accounts=hub.accounts,
        sessions=MemorySessions(hub.accounts),
        audit=hub.audit,
        clock=hub.clock,
        entropy=hub.entropy,
        rules=AccountRules(sign_up_open=True, reserved_names=frozenset({"friends"})),
    )
    with pytest.raises(CorralError, match="reserved"):
        await accounts.sign_up("Friends", "", "correct horse battery")
