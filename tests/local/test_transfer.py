"""Pull and push with a registry and a store in memory: the events, what is shared, what failures leave behind."""

import asyncio
import contextlib
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterable, Iterator
from dataclasses import dataclass, field
from hashlib import sha256

import msgspec
import pytest

from corral.core.registry import Visibility
from corral.core.transfer_ports import BlobToSend, Interrupted, MissingPart, RemoteManifest, RemoteRepository
from corral.local.transfer import Transfer
from corral.wire.create import ProgressEvent
from corral.wire.errors import CorralError
from corral.wire.manifest import CONFIG_TYPE, MANIFEST_TYPE, MODEL_LAYER, Layer, Manifest, format_manifest
from corral.wire.names import Digest, ModelName, parse_name

WEIGHTS, CONFIG = b"weights" * 1000, b'{"model_format":"gguf"}'
HUB = "http://localhost:11435"


def digest_of(content: bytes) -> Digest:
    return Digest(sha256(content).hexdigest())


def layer(content: bytes, media_type: str = MODEL_LAYER, source: str = "") -> Layer:
    return Layer(media_type=media_type, digest=digest_of(content), size_bytes=len(content), source=source)


def manifest_of(*contents: bytes, source: str = "") -> bytes:
    layers = tuple(layer(content, source=source) for content in contents)
    return format_manifest(Manifest(config=layer(CONFIG, CONFIG_TYPE), layers=layers))


@dataclass
class FakeGateway:
    """A registry in memory. gate: reading waits for it."""

    manifests: dict[tuple[str, str, str], bytes] = field(default_factory=dict)
    blobs: dict[Digest, bytes] = field(default_factory=dict)
    gate: asyncio.Event | None = None
    reads: list[tuple[Digest, int, int]] = field(default_factory=list)
    sent: list[BlobToSend] = field(default_factory=list)
    visibility: Visibility | None = None
    error: CorralError | None = None
    reading_error: CorralError | None = None
    asked: int = 0
    most_readers: int = 0
    readers: int = 0

    async def manifest(self, repository: RemoteRepository, reference: str) -> RemoteManifest | None:
        self.asked += 1
        if self.error:
            raise self.error
        body = self.manifests.get((repository.base_url, repository.path, reference))
        return None if body is None else RemoteManifest(digest=digest_of(body), media_type=MANIFEST_TYPE, body=body)

    async def blob_size(self, repository: RemoteRepository, digest: Digest) -> int | None:
        return len(self.blobs[digest]) if digest in self.blobs else None

    async def read_blob(
        self, repository: RemoteRepository, digest: Digest, *, first: int, count: int
    ) -> AsyncGenerator[bytes, None]:
        self.reads.append((digest, first, count))
        self.readers += 1
        self.most_readers = max(self.most_readers, self.readers)
        try:
            if self.gate is not None:
                await self.gate.wait()
            if self.reading_error is not None:
                raise self.reading_error
            if digest not in self.blobs:
                raise CorralError("not_found", "file does not exist")
            yield self.blobs[digest][first : first + count]
        finally:
            self.readers -= 1

    async def send_blob(self, repository: RemoteRepository, blob: BlobToSend, progress: Callable[[int], None]) -> None:
        self.sent.append(blob)
        content = b"".join([block async for block in blob.read(0, blob.size_bytes)])
        assert digest_of(content) == blob.digest
        self.blobs[blob.digest] = content
        progress(len(content))

    async def put_manifest(
        self, repository: RemoteRepository, reference: str, manifest: RemoteManifest, *, visibility: Visibility | None = None
    ) -> None:
        if self.error:
            raise self.error
        self.manifests[repository.base_url, repository.path, reference] = manifest.body
        self.visibility = visibility


@dataclass
class FakePartial:
    store: "FakeStore"
    digest: Digest
    size_bytes: int
    content: bytearray
    is_closed: bool = False
    is_dropped: bool = False

    @property
    def completed_bytes(self) -> int:
        return self.store.kept_bytes

    def missing(self) -> list[MissingPart]:
        step = self.store.part_bytes
        return [
            MissingPart(number, first, min(step, self.size_bytes - first))
            for number, first in enumerate(range(0, self.size_bytes, step))
        ]

    async def write(self, number: int, chunk: bytes) -> None:
        first = number * self.store.part_bytes if number else 0
        self.content[first : first + len(chunk)] = chunk

    async def finish(self) -> None:
        if digest_of(bytes(self.content)) != self.digest:
            raise CorralError("digest_invalid", "digest mismatch, file must be downloaded again: want a, got b")
        self.store.blobs[self.digest] = bytes(self.content)

    async def keep(self) -> None:
        self.is_closed = True
        self.store.receiving.discard(self.digest)

    async def drop(self) -> None:
        self.is_dropped = not self.is_closed
        await self.keep()


@dataclass
class FakeStore:
    """Blobs and manifests of a machine."""

    blobs: dict[Digest, bytes] = field(default_factory=dict)
    installed: dict[ModelName, bytes] = field(default_factory=dict)
    partials: list[FakePartial] = field(default_factory=list)
    receiving: set[Digest] = field(default_factory=set)
    part_bytes: int = 1 << 40
    kept_bytes: int = 0
    held: set[Digest] = field(default_factory=set)
    removed: set[Digest] = field(default_factory=set)

    def blob_size(self, digest: Digest) -> int | None:
        return len(self.blobs[digest]) if digest in self.blobs else None

    async def receive(self, digest: Digest, size_bytes: int) -> FakePartial:
        if digest in self.receiving:
            raise CorralError("conflict", "another process is receiving it")
        assert digest in self.held
        self.receiving.add(digest)
        self.partials.append(FakePartial(self, digest, size_bytes, bytearray(min(size_bytes, 1 << 20))))
        return self.partials[-1]

    async def read_blob(self, digest: Digest, first: int, count: int) -> AsyncIterator[bytes]:
        yield self.blobs[digest][first : first + count]

    async def manifest(self, name: ModelName) -> tuple[ModelName, bytes] | None:
        return next(((own, body) for own, body in self.installed.items() if own.key == name.key), None)

    async def put_manifest(self, name: ModelName, body: bytes) -> ModelName:
        assert all(digest in self.blobs for digest in self.held), "the manifest comes last"
        self.installed[name] = body
        return name

    @contextlib.contextmanager
    def hold(self, digests: Iterable[Digest]) -> Iterator[None]:
        self.held |= set(digests)
        yield

    async def remove_unused(self, digests: Iterable[Digest]) -> None:
        self.removed |= set(digests)

    def install(self, name: str, body: bytes, *contents: bytes) -> None:
        self.installed[parse_name(name)] = body
        self.blobs |= {digest_of(content): content for content in contents}


@pytest.fixture
def gateway() -> FakeGateway:
    found = FakeGateway(blobs={digest_of(content): content for content in (WEIGHTS, CONFIG)})
    found.manifests[HUB, "alice/tiny", "latest"] = manifest_of(WEIGHTS)
    return found


@pytest.fixture
def store() -> FakeStore:
    return FakeStore()


def transfer_of(gateway: FakeGateway, store: FakeStore, *, hub: str = HUB, is_pruning: bool = True) -> Transfer:
    return Transfer(gateway, store, store, hub_url=lambda: hub, is_pruning=is_pruning, report_every_s=0.001)


async def told(events: AsyncIterator[ProgressEvent]) -> list[ProgressEvent]:
    return [event async for event in events]


async def failed(events: AsyncIterator[ProgressEvent]) -> tuple[list[str], CorralError]:
    statuses: list[str] = []
    try:
        async for event in events:
            statuses.append(event.status)
    except CorralError as error:
        return statuses, error
    raise AssertionError(f"it did not fail: {statuses}")


async def test_pull_tells_what_ollama_tells(gateway: FakeGateway, store: FakeStore) -> None:
    events = await told(transfer_of(gateway, store).pull("alice/tiny"))
    short, long = digest_of(WEIGHTS).hex[:12], str(digest_of(WEIGHTS))
    assert [msgspec.json.encode(event).decode() for event in events[:2]] == [
        '{"status":"pulling manifest"}',
        f'{{"status":"pulling {short}","digest":"{long}","total":7000,"completed":7000}}',
    ]
    assert [event.status for event in events[3:]] == ["verifying sha256 digest", "writing manifest", "success"]
    assert store.installed[parse_name("alice/tiny")] == manifest_of(WEIGHTS)


async def test_pull_of_what_is_there_fetches_nothing(gateway: FakeGateway, store: FakeStore) -> None:
    store.install("alice/tiny", manifest_of(WEIGHTS), WEIGHTS, CONFIG)
    events = await told(transfer_of(gateway, store).pull("alice/tiny"))
    assert gateway.reads == []
    assert [event.completed for event in events if event.digest] == [7000, len(CONFIG)]


async def test_pull_fetches_a_blob_again_that_a_crash_cut(gateway: FakeGateway, store: FakeStore) -> None:
    store.blobs[digest_of(WEIGHTS)] = WEIGHTS[:10]
    await told(transfer_of(gateway, store).pull("alice/tiny"))
    assert store.blobs[digest_of(WEIGHTS)] == WEIGHTS


async def test_pull_keeps_the_spelling_that_is_installed(gateway: FakeGateway, store: FakeStore) -> None:
    gateway.manifests[HUB, "Alice/Tiny", "Latest"] = manifest_of(WEIGHTS)
    store.install("Alice/Tiny:Latest", manifest_of(CONFIG))
    await told(transfer_of(gateway, store).pull("alice/tiny"))
    assert list(store.installed) == [parse_name("Alice/Tiny:Latest")]


async def test_pull_removes_what_it_replaces(gateway: FakeGateway, store: FakeStore) -> None:
    store.install("alice/tiny", manifest_of(b"old"), b"old", CONFIG)
    events = await told(transfer_of(gateway, store).pull("alice/tiny"))
    assert [event.status for event in events[-2:]] == ["removing unused layers", "success"]
    assert store.removed == {digest_of(b"old")}


async def test_pull_removes_nothing_where_pruning_is_off(gateway: FakeGateway, store: FakeStore) -> None:
    store.install("alice/tiny", manifest_of(b"old"), b"old", CONFIG)
    await told(transfer_of(gateway, store, is_pruning=False).pull("alice/tiny"))
    assert store.removed == set()


@pytest.mark.parametrize(
    ("asked", "tag"), [("m:cloud", "cloud"), ("m:20b-cloud", "20b-cloud"), ("m:20b:cloud", "20b-cloud"), ("m:8b:local", "8b")]
)
async def test_pull_of_a_cloud_name_brings_its_stub(asked: str, tag: str, gateway: FakeGateway, store: FakeStore) -> None:
    stub = f'{{"schemaVersion":2,"config":{{"digest":"{digest_of(CONFIG)}","size":{len(CONFIG)}}},"layers":null}}'.encode()
    gateway.manifests[HUB, "library/m", tag] = stub
    await told(transfer_of(gateway, store).pull(asked))
    assert store.installed[parse_name(f"m:{tag}")] == stub


async def test_pull_of_what_is_no_name_is_refused_before_anything(gateway: FakeGateway, store: FakeStore) -> None:
    for asked in ("", "../x", "a/b/c/d/e", "x@sha256:0"):
        statuses, error = await failed(transfer_of(gateway, store).pull(asked))
        assert (statuses, error.status, error.message) == ([], 400, "invalid model name")


async def test_pull_of_an_unknown_model_says_what_ollama_says(gateway: FakeGateway, store: FakeStore) -> None:
    statuses, error = await failed(transfer_of(gateway, store).pull("nobody/nothing"))
    assert statuses == ["pulling manifest"]
    assert (error.status, error.message) == (500, "pull model manifest: file does not exist")


async def test_pull_passes_a_refusal_on(gateway: FakeGateway, store: FakeStore) -> None:
    gateway.error = CorralError("forbidden", "403: no")
    _, error = await failed(transfer_of(gateway, store).pull("alice/tiny"))
    assert (error.code, error.status, error.message) == ("forbidden", 500, "pull model manifest: 403: no")


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"[]",
        b'{"schemaVersion":2}',
        b'{"schemaVersion":2,"config":{"digest":""},"layers":[]}',
        b'{"schemaVersion":2,"layers":[{"digest":"sha256:../../../etc/passwd","size":1}]}',
        b'{"schemaVersion":2,"layers":[{"digest":"sha256-' + b"0" * 64 + b'","size":1}]}',
        b'{"schemaVersion":2,"layers":[{"digest":"sha256:' + b"0" * 64 + b'","size":-1}]}',
        b'{"schemaVersion":2,"layers":[{"digest":"sha256:' + b"A" * 64 + b'","size":1}]}',
    ],
)
async def test_t033_t093_manifest_that_is_none_leaves_the_store_alone(
    body: bytes, gateway: FakeGateway, store: FakeStore
) -> None:
    gateway.manifests[HUB, "alice/tiny", "latest"] = body
    statuses, error = await failed(transfer_of(gateway, store).pull("alice/tiny"))
    assert statuses == ["pulling manifest"]
    assert error.message.startswith("pull model manifest: invalid ")
    assert store == FakeStore()


async def test_t094_wrong_bytes_end_the_pull_before_the_manifest(gateway: FakeGateway, store: FakeStore) -> None:
    gateway.blobs[digest_of(WEIGHTS)] = b"w" * len(WEIGHTS)
    statuses, error = await failed(transfer_of(gateway, store).pull("alice/tiny"))
    assert statuses[-1] == "verifying sha256 digest"
    assert error.message.startswith("digest mismatch, file must be downloaded again: want ")
    assert store.installed == {}
    assert store.receiving == set()


@pytest.mark.parametrize(
    ("error", "kept_bytes", "is_dropped"),
    [
        (CorralError("upstream_failed", "the registry answers with another range than was asked for"), 0, True),
        (CorralError("not_found", "file does not exist"), 0, True),
        # What an honest registry sent before stays, whatever the next one does.
        (CorralError("upstream_failed", "the registry answers with another range than was asked for"), 5, False),
        (Interrupted("max retries exceeded: the answer ended early"), 0, False),
        (CorralError("unauthorized", "unauthorized: access denied"), 0, False),
        (CorralError("storage_full"), 0, False),
    ],
)
async def test_t093_refused_pull_leaves_nothing_and_one_that_can_go_on_stays(
    gateway: FakeGateway, store: FakeStore, error: CorralError, kept_bytes: int, is_dropped: bool
) -> None:
    gateway.reading_error, store.kept_bytes = error, kept_bytes
    _, told_error = await failed(transfer_of(gateway, store).pull("alice/tiny"))
    assert told_error.code == error.code
    assert [(partial.is_dropped, partial.is_closed) for partial in store.partials] == [(is_dropped, True)]


async def test_two_pulls_of_one_blob_share_a_download(gateway: FakeGateway, store: FakeStore) -> None:
    gateway.gate = asyncio.Event()
    transfer = transfer_of(gateway, store)
    pulls = [asyncio.create_task(told(transfer.pull("alice/tiny"))) for _ in range(3)]
    while not gateway.reads:
        await asyncio.sleep(0)
    gateway.gate.set()
    for events in await asyncio.gather(*pulls):
        assert events[-1].status == "success"
    assert len([read for read in gateway.reads if read[0] == digest_of(WEIGHTS)]) == 1


async def test_pull_that_is_left_stops_and_keeps_what_it_has(gateway: FakeGateway, store: FakeStore) -> None:
    gateway.gate = asyncio.Event()
    transfer = transfer_of(gateway, store)
    events = transfer.pull("alice/tiny")
    assert (await anext(events)).status == "pulling manifest"
    assert (await anext(events)).completed == 0
    await events.aclose()
    assert [partial.is_closed for partial in store.partials] == [True]
    assert gateway.readers == 0
    gateway.gate.set()
    assert (await told(transfer.pull("alice/tiny")))[-1].status == "success"


async def test_pull_that_is_left_does_not_stop_another(gateway: FakeGateway, store: FakeStore) -> None:
    gateway.gate = asyncio.Event()
    transfer = transfer_of(gateway, store)
    leaving = transfer.pull("alice/tiny")
    await anext(leaving)
    await anext(leaving)
    staying = asyncio.create_task(told(transfer.pull("alice/tiny")))
    while transfer._downloads[digest_of(WEIGHTS)].waiting < 2:
        await asyncio.sleep(0)
    await leaving.aclose()
    gateway.gate.set()
    assert (await staying)[-1].status == "success"
    assert len(store.partials) == 2  # the weights once, the config once


async def test_pull_that_fails_may_be_tried_again(gateway: FakeGateway, store: FakeStore) -> None:
    del gateway.blobs[digest_of(CONFIG)]
    transfer = transfer_of(gateway, store)
    _, error = await failed(transfer.pull("alice/tiny"))
    assert (error.status, error.message) == (500, "file does not exist")
    gateway.blobs[digest_of(CONFIG)] = CONFIG
    assert (await told(transfer.pull("alice/tiny")))[-1].status == "success"


async def test_push_tells_what_ollama_tells_and_sends_the_manifest_as_it_is(gateway: FakeGateway, store: FakeStore) -> None:
    body = manifest_of(WEIGHTS) + b" "
    gateway.blobs.clear()
    store.install("alice/tiny", body, WEIGHTS, CONFIG)
    events = await told(transfer_of(gateway, store).push("Alice/TINY", visibility=Visibility.PUBLIC))
    statuses = list(dict.fromkeys(event.status for event in events))
    shorts = [f"pushing {digest_of(content).hex[:12]}" for content in (WEIGHTS, CONFIG)]
    assert statuses == ["retrieving manifest", *shorts, "pushing manifest", "success"]
    assert gateway.manifests[HUB, "alice/tiny", "latest"] == body
    assert gateway.visibility is Visibility.PUBLIC


async def test_push_of_what_is_not_installed_says_so(gateway: FakeGateway, store: FakeStore) -> None:
    statuses, error = await failed(transfer_of(gateway, store).push("alice/none"))
    assert statuses == ["retrieving manifest", "couldn't retrieve manifest"]
    assert (error.status, error.message) == (500, "model 'alice/none:latest' not found")


async def test_push_of_a_model_without_its_weights_says_so(gateway: FakeGateway, store: FakeStore) -> None:
    store.install("alice/tiny", manifest_of(WEIGHTS), CONFIG)
    _, error = await failed(transfer_of(gateway, store).push("alice/tiny"))
    assert "is not here" in error.message


@pytest.mark.parametrize(
    ("source", "mounted"),
    [("bob/base:1b", "bob/base"), ("alice/tiny", ""), ("other.test/bob/base", ""), ("/tmp/x.gguf", ""), ("", "")],
)
async def test_push_mounts_from_the_same_registry_only(source: str, mounted: str, gateway: FakeGateway, store: FakeStore) -> None:
    store.install("alice/tiny", manifest_of(WEIGHTS, source=source), WEIGHTS, CONFIG)
    await told(transfer_of(gateway, store).push("alice/tiny"))
    assert gateway.sent[0].mount_from == mounted


async def test_t120_pull_goes_by_the_manifest_it_read_first(gateway: FakeGateway, store: FakeStore) -> None:
    gateway.gate = asyncio.Event()
    pull = asyncio.create_task(told(transfer_of(gateway, store).pull("alice/tiny")))
    while not gateway.reads:
        await asyncio.sleep(0)
    gateway.manifests[HUB, "alice/tiny", "latest"] = manifest_of(b"another")
    gateway.gate.set()
    await pull
    assert store.installed[parse_name("alice/tiny")] == manifest_of(WEIGHTS)
    assert gateway.asked == 1


async def test_blob_is_fetched_in_ranges_side_by_side_each_once(gateway: FakeGateway, store: FakeStore) -> None:
    store.part_bytes = 100
    gateway.gate = asyncio.Event()
    pull = asyncio.create_task(told(transfer_of(gateway, store).pull("alice/tiny")))
    while gateway.readers < 4:
        await asyncio.sleep(0)
    gateway.gate.set()
    assert (await pull)[-1].status == "success"
    assert gateway.most_readers == 4
    assert sorted(first for digest, first, _ in gateway.reads if digest == digest_of(WEIGHTS)) == list(range(0, 7000, 100))
