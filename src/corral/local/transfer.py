"""Pull and push: models between this machine and any registry, told in Ollama's own events.

Theory of operation. A pull reads the manifest once and goes by that very document, whatever happens to its tag meanwhile (T120).
Blobs are fetched one after another, each in ranges side by side; a blob that several pulls want is fetched once. A blob gets its
name only when it is verified, and the manifest is written last, so a model is listed when all of it is there. Whoever leaves a
pull leaves what has arrived for the next one. A push sends blobs first and the manifest, byte for byte as it is here, last.
Source: ollama server/{images,download,upload,routes}.go, fb30760.
"""

import asyncio
from collections.abc import AsyncGenerator, Callable, Iterator, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from functools import partial
from hashlib import sha256

from corral.core.registry import Visibility
from corral.core.transfer_ports import (
    BlobShelf,
    BlobToSend,
    InstalledManifests,
    Interrupted,
    MissingPart,
    PartialBlob,
    RegistryGateway,
    RemoteManifest,
    RemoteRepository,
)
from corral.wire.create import ProgressEvent
from corral.wire.errors import CorralError
from corral.wire.library import registry_url
from corral.wire.manifest import MANIFEST_TYPE, Layer, Manifest, parse_manifest
from corral.wire.names import Digest, ModelName, Source, cloud_tag, parse_name, parse_reference

Events = AsyncGenerator[ProgressEvent, None]

#: How many ranges of a blob are fetched at once: few at first, so that its beginning is there early and is hashed meanwhile; more
#: while it lasts, because one connection alone does not fill a long line.
_FIRST_RANGES, _MAX_RANGES, _ANOTHER_AFTER_S = 4, 16, 0.5
#: Failures after which what a registry sent of a blob is worth nothing.
_REFUSALS = frozenset({"upstream_failed", "digest_invalid", "too_large", "not_found", "bad_request"})


@dataclass(slots=True)
class _Download:
    """A blob on its way in, for all pulls that want it. waiting: how many those are."""

    size_bytes: int
    blob: PartialBlob | None = None
    task: asyncio.Task[None] | None = None
    waiting: int = 0

    @property
    def completed_bytes(self) -> int:
        return self.blob.completed_bytes if self.blob is not None else 0


@dataclass(slots=True)
class _Sent:
    """How much of a blob its registry has."""

    bytes: int = 0


class Transfer:
    """Moves models. hub_url: the hub in use. is_pruning: whether blobs that a pull replaces are removed."""

    def __init__(
        self,
        registry: RegistryGateway,
        blobs: BlobShelf,
        manifests: InstalledManifests,
        *,
        hub_url: Callable[[], str],
        is_pruning: bool = True,
        report_every_s: float = 0.06,
    ) -> None:
        self._registry = registry
        self._blobs = blobs
        self._manifests = manifests
        self._hub_url = hub_url
        self._is_pruning = is_pruning
        self._report_every_s = report_every_s
        self._downloads: dict[Digest, _Download] = {}

    # ── Pull ─────────────────────────────────────────────────────────────────────────────────────────────────────────

    async def pull(self, requested: str, *, insecure: bool = False) -> Events:
        """Bring a model here; a cloud name brings its stub. Raises: bad_request before the first event; after it, with Ollama's
        status 500, not_found, unauthorized, forbidden, rate_limited, too_large, upstream_failed, digest_invalid, conflict,
        storage_full, unavailable."""
        name = _pull_name(requested)
        async with aclosing(self._pull(name, requested, insecure=insecure)) as events:
            async for event in _failing_late(events):
                yield event

    async def pull_name(self, name: ModelName) -> Events:
        """As `pull`, for somebody who has the name already."""
        async with aclosing(self.pull(str(name))) as events:
            async for event in events:
                yield event

    async def _pull(self, name: ModelName, requested: str, *, insecure: bool) -> Events:
        yield ProgressEvent(status="pulling manifest")
        installed = await self._manifests.manifest(name)
        if installed is not None:
            name = installed[0]
        replaced = _blobs_of(installed[1]) if installed is not None else ()
        remote, fetched, document = await self._remote_manifest(name, requested, insecure=insecure)
        with self._manifests.hold([layer.digest for layer in document.blobs]):
            async with aclosing(self._fetch_all(remote, document)) as events:
                async for event in events:
                    yield event
            yield ProgressEvent(status="writing manifest")
            await self._manifests.put_manifest(name, fetched.body)
        unused = set(replaced) - {layer.digest for layer in document.blobs}
        if unused and self._is_pruning:
            yield ProgressEvent(status="removing unused layers")
            try:
                await self._manifests.remove_unused(unused)
            except CorralError as error:
                yield ProgressEvent(status=f"couldn't remove unused layers: {error.message}")
        yield ProgressEvent(status="success")

    async def _remote_manifest(
        self, name: ModelName, requested: str, *, insecure: bool
    ) -> tuple[RemoteRepository, RemoteManifest, Manifest]:
        try:
            remote = self._repository(name, requested, insecure=insecure)
            fetched = await self._registry.manifest(remote, name.tag)
            if fetched is None:
                raise CorralError("not_found", "file does not exist")
            document = parse_manifest(fetched.body)
            if not document.blobs:
                raise CorralError("bad_request", "invalid manifest: it names no blobs")
        except CorralError as error:
            raise CorralError(error.code, f"pull model manifest: {error.message}", detail=error.detail) from error
        return remote, fetched, document

    async def _fetch_all(self, remote: RemoteRepository, document: Manifest) -> Events:
        done: set[Digest] = set()
        for layer in document.blobs:
            if layer.digest in done:
                continue
            done.add(layer.digest)
            try:
                async with aclosing(self._fetch(remote, layer)) as events:
                    async for event in events:
                        yield event
            except CorralError as error:
                if error.code == "digest_invalid":
                    # Ours is verified as soon as it is there; clients know the failure as one of this step.
                    yield ProgressEvent(status="verifying sha256 digest")
                raise
        yield ProgressEvent(status="verifying sha256 digest")

    async def _fetch(self, remote: RemoteRepository, layer: Layer) -> Events:
        """Have one blob here. Of another size than stated, it was cut by a crash, and is fetched again."""
        if self._blobs.blob_size(layer.digest) == layer.size_bytes:
            yield _event("pulling", layer, layer.size_bytes)
            return
        while (download := self._downloads.get(layer.digest)) is not None and not download.waiting:
            # Everybody left it a moment ago, and it still has its file open.
            assert download.task is not None
            await asyncio.wait([download.task])
        if download is None or download.size_bytes != layer.size_bytes:
            download = self._downloads[layer.digest] = _Download(layer.size_bytes)
            download.task = asyncio.create_task(self._download(remote, layer, download))
        assert download.task is not None
        download.waiting += 1
        try:
            while not download.task.done():
                await asyncio.wait([download.task], timeout=self._report_every_s)
                if not download.task.done():
                    yield _event("pulling", layer, download.completed_bytes)
            await download.task
            yield _event("pulling", layer, layer.size_bytes)
        finally:
            download.waiting -= 1
            if not download.waiting:
                await _ended(download.task)

    async def _download(self, remote: RemoteRepository, layer: Layer, download: _Download) -> None:
        try:
            blob = download.blob = await self._blobs.receive(layer.digest, layer.size_bytes)
            is_new = not blob.completed_bytes
            try:
                await self._fill(remote, layer.digest, blob)
                await blob.finish()
            except CorralError as error:
                # Of what was there before this registry was asked, nobody knows that it is wrong.
                if is_new and _is_refusal(error):
                    await blob.drop()
                raise
            finally:
                await blob.keep()
        finally:
            if self._downloads.get(layer.digest) is download:
                del self._downloads[layer.digest]

    async def _fill(self, remote: RemoteRepository, digest: Digest, blob: PartialBlob) -> None:
        """Fetch all that is missing."""
        missing = blob.missing()
        places = iter(missing)
        try:
            async with asyncio.TaskGroup() as group:
                working = [group.create_task(self._fill_parts(remote, digest, blob, places)) for _ in missing[:_FIRST_RANGES]]
                while len(working) < min(len(missing), _MAX_RANGES):
                    _, pending = await asyncio.wait(working, timeout=_ANOTHER_AFTER_S)
                    if not pending:
                        break
                    working.append(group.create_task(self._fill_parts(remote, digest, blob, places)))
        except BaseExceptionGroup as failed:
            raise _first_of(failed) from failed

    async def _fill_parts(
        self, remote: RemoteRepository, digest: Digest, blob: PartialBlob, places: Iterator[MissingPart]
    ) -> None:
        # All take from one iterator, so that each part has one writer.
        for part in places:
            async with aclosing(self._registry.read_blob(remote, digest, first=part.first, count=part.count)) as chunks:
                async for chunk in chunks:
                    await blob.write(part.number, chunk)

    # ── Push ─────────────────────────────────────────────────────────────────────────────────────────────────────────

    async def push(self, requested: str, *, insecure: bool = False, visibility: Visibility | None = None) -> Events:
        """Send an installed model to its registry. Raises: as `pull`."""
        name = parse_name(requested)
        async with aclosing(self._push(name, requested, insecure=insecure, visibility=visibility)) as events:
            async for event in _failing_late(events):
                yield event

    async def _push(self, name: ModelName, requested: str, *, insecure: bool, visibility: Visibility | None) -> Events:
        yield ProgressEvent(status="retrieving manifest")
        found = await self._manifests.manifest(name)
        if found is None:
            yield ProgressEvent(status="couldn't retrieve manifest")
            raise CorralError("not_found", f"model '{name.short}' not found")
        name, body = found
        document = parse_manifest(body)
        remote = self._repository(name, requested, insecure=insecure)
        with self._manifests.hold([layer.digest for layer in document.blobs]):
            for layer in {layer.digest: layer for layer in document.blobs}.values():
                async with aclosing(self._send(remote, layer, name)) as events:
                    async for event in events:
                        yield event
        yield ProgressEvent(status="pushing manifest")
        sent = RemoteManifest(digest=Digest(sha256(body).hexdigest()), media_type=document.media_type or MANIFEST_TYPE, body=body)
        await self._registry.put_manifest(remote, name.tag, sent, visibility=visibility)
        yield ProgressEvent(status="success")

    async def _send(self, remote: RemoteRepository, layer: Layer, name: ModelName) -> Events:
        if self._blobs.blob_size(layer.digest) != layer.size_bytes:
            raise CorralError("not_found", f"blob {layer.digest} of '{name.short}' is not here; pull or create it again")
        sent = _Sent()

        def report(count: int) -> None:
            sent.bytes = count

        blob = BlobToSend(
            digest=layer.digest,
            size_bytes=layer.size_bytes,
            read=partial(self._blobs.read_blob, layer.digest),
            mount_from=_mount_source(layer, name),
        )
        task = asyncio.create_task(self._registry.send_blob(remote, blob, report))
        try:
            while not task.done():
                await asyncio.wait([task], timeout=self._report_every_s)
                if not task.done():
                    yield _event("pushing", layer, sent.bytes)
            await task
            yield _event("pushing", layer, layer.size_bytes)
        finally:
            await _ended(task)

    def _repository(self, name: ModelName, requested: str, *, insecure: bool) -> RemoteRepository:
        base_url = registry_url(name, requested, hub=self._hub_url(), insecure=insecure)
        return RemoteRepository(base_url, name.repository)


# ── Names ────────────────────────────────────────────────────────────────────────────────────────────────────────────


def _pull_name(requested: str) -> ModelName:
    """The name to pull under: a cloud name's is that of its stub's tag. Raises: bad_request."""
    reference = parse_reference(requested)
    return parse_name(cloud_tag(reference.base) if reference.source is Source.CLOUD else reference.base)


def _mount_source(layer: Layer, name: ModelName) -> str:
    """The repository that a layer says it came from, when it is of the same registry; it may be a file's name as well."""
    try:
        source = parse_name(layer.source)
    except CorralError:
        return ""
    is_other = source.key.repository != name.key.repository
    return source.repository if source.host.lower() == name.host.lower() and is_other else ""


def _blobs_of(body: bytes) -> Sequence[Digest]:
    """What an installed manifest names; nothing when it cannot be read, since a pull mends it."""
    try:
        return [layer.digest for layer in parse_manifest(body).blobs]
    except CorralError:
        return ()


def _is_refusal(error: CorralError) -> bool:
    """Whether a registry misbehaved or has nothing to give, so that asking it again for the rest would come to the same."""
    return error.code in _REFUSALS and not isinstance(error, Interrupted)


# ── Events and tasks ─────────────────────────────────────────────────────────────────────────────────────────────────


def _event(doing: str, layer: Layer, completed: int) -> ProgressEvent:
    return ProgressEvent(
        status=f"{doing} {layer.digest.hex[:12]}", digest=str(layer.digest), total=layer.size_bytes, completed=completed
    )


async def _failing_late(events: Events) -> Events:
    """The events, whose failure is answered with 500 where it is a status at all: Ollama has no other once it began."""
    try:
        async for event in events:
            yield event
    except CorralError as error:
        raise CorralError(error.code, error.message, detail=error.detail, status=500) from error


def _first_of(group: BaseExceptionGroup[BaseException]) -> BaseException:
    """The failure to tell of; a fault in the program goes before an error of the registry."""
    found: list[BaseException] = []
    for failure in group.exceptions:
        found.append(_first_of(failure) if isinstance(failure, BaseExceptionGroup) else failure)
    return next((failure for failure in found if not isinstance(failure, CorralError)), found[0])


async def _ended(task: asyncio.Task[None]) -> None:
    """Cancel a task unless it is done, and wait for its end: what it has open must be closed when this returns."""
    task.cancel()
    await asyncio.wait([task])
    if not task.cancelled():
        task.exception()  # nobody asks any more; unasked for, it would be logged
