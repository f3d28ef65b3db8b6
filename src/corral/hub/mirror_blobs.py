"""The blobs of a mirror: each fetched once, bounded, verified, and linked to the repository that it was fetched for.

Also the words of a mirror: what it is bounded by, what it asks, and how an upstream's failures are told.
"""

import asyncio
import contextlib
from collections import Counter, defaultdict
from collections.abc import AsyncGenerator, AsyncIterator, Iterator, Mapping
from dataclasses import dataclass
from datetime import timedelta
from urllib.parse import urlsplit

from corral.core.ports import Clock, Entropy
from corral.core.registry import RegistryFiles, RegistryStore, Repository, Visibility
from corral.core.transfer_ports import RegistryGateway, RemoteRepository
from corral.hub.quotas import Quotas, Reservation
from corral.hub.sharing import Remembered, SharedWork
from corral.wire.errors import CorralError
from corral.wire.names import Digest
from corral.wire.registry import ByteRange, parts
from corral.wire.text import one_line

_UPLOAD_ID_BYTES = 16
#: What goes wrong on this side and is told as it is.
_OWN_TROUBLE = frozenset({"storage_full", "forbidden", "busy", "unavailable", "upstream_failed", "name_unknown"})


@dataclass(frozen=True, slots=True, kw_only=True)
class MirrorLimits:
    """How often upstreams are asked, and how much is taken from them. fresh_s, absent_s, failed_s: for how long an answer holds
    that something is so, that it does not exist, and that it cannot be had. answer_s, kept_answer_s: how long somebody waits for
    an upstream that does not answer, where nothing is kept and where something is. lease: of a blob whose manifest is not stored
    yet. max_manifests, max_index_bytes: below an index. keep_free_bytes: of the disk, for what people push. models_at_once and
    those below it: per upstream. max_queue: questions that are asked or wait for their turn."""

    fresh_s: float = 900
    absent_s: float = 60
    failed_s: float = 30
    answer_s: float = 10
    kept_answer_s: float = 5
    max_blob_bytes: int = 1 << 40
    max_manifest_bytes: int = 4 << 40
    max_manifests: int = 200
    max_index_bytes: int = 32 << 20
    keep_free_bytes: int = 5 << 30
    models_at_once: int = 8
    blobs_at_once: int = 4
    questions_at_once: int = 16
    max_queue: int = 256
    lease: timedelta = timedelta(hours=48)


@dataclass(frozen=True, slots=True)
class Question:
    """Something that was asked of an upstream."""

    about: str
    wanted: str

    @property
    def when_fresh(self) -> tuple[str, "Question"]:
        """Under which it is remembered that what is kept is what upstream has."""
        return "fresh", self


@dataclass(frozen=True, slots=True)
class Kept:
    """A place whose repository exists."""

    repository: Repository
    remote: RemoteRepository


class MirrorBlobs:
    """Blobs on their way from upstreams."""

    def __init__(
        self,
        *,
        gateway: RegistryGateway,
        store: RegistryStore,
        files: RegistryFiles,
        quotas: Quotas,
        clock: Clock,
        entropy: Entropy,
        background: SharedWork,
        limits: MirrorLimits,
    ) -> None:
        self._gateway = gateway
        self._store = store
        self._files = files
        self._quotas = quotas
        self._clock = clock
        self._entropy = entropy
        self._shared = background
        self._limits = limits
        self._remembered = Remembered(clock)
        # Per upstream: a slow one must not hold up the others.
        self._streams = defaultdict[str, asyncio.Semaphore](lambda: asyncio.Semaphore(limits.blobs_at_once))
        self._questions = defaultdict[str, asyncio.Semaphore](lambda: asyncio.Semaphore(limits.questions_at_once))
        self._queued = Counter[str]()

    @contextlib.asynccontextmanager
    async def asking(self, remote: RemoteRepository) -> AsyncIterator[None]:
        """Around a question to an upstream: not too many at once, and its failures told as such."""
        self._queued[remote.base_url] += 1
        try:
            async with self._questions[remote.base_url]:
                with upstream_trouble(remote):
                    yield
        finally:
            self._queued[remote.base_url] -= 1

    def check_queue(self, remote: RemoteRepository) -> None:
        """Refuse a client's question while an upstream has more of them than it answers: anybody may ask for any name, and a
        question goes on for minutes when whoever asked has long gone (T102). Raises: busy."""
        if self._queued[remote.base_url] >= self._limits.max_queue:
            raise CorralError("busy", "too many questions wait for the registry behind this mirror; try again", retry_after_s=5)

    async def is_here(self, kept: Kept, digest: Digest) -> bool:
        """Whether the repository has the blob."""
        size_bytes = await self._store.blob_size(kept.repository.id, digest)
        # A file that was lost is fetched anew.
        return size_bytes is not None and self._files.size_of(digest) == size_bytes

    async def size_of(self, kept: Kept, digest: Digest) -> int | None:
        """How long a blob is upstream of which nothing is known here: after a restart, clients go on where they were."""
        question = Question(kept.repository.id, f"size of {digest}")
        if self._remembered.holds(question):
            return None
        return await self._shared.do(question, lambda: self._fetch_size(kept.remote, digest, question))

    async def _fetch_size(self, remote: RemoteRepository, digest: Digest, question: Question) -> int | None:
        try:
            async with self.asking(remote):
                size_bytes = await self._gateway.blob_size(remote, digest)
        except CorralError as error:
            self._remembered.note(question, self._limits.failed_s, error)
            raise
        if size_bytes is None:
            self._remembered.note(question, self._limits.absent_s)
        return size_bytes

    async def need_all(self, kept: Kept, sizes: Mapping[Digest, int]) -> None:
        """Wait until all of them are here, a few at a time and in order; the first failure ends it."""
        waiting = iter(list(sizes.items()))
        failures: list[CorralError] = []

        async def work() -> None:
            for digest, size_bytes in waiting:
                try:
                    await self.need(kept, digest, size_bytes)
                except CorralError as error:
                    failures.append(error)
                if failures:
                    return

        async with asyncio.TaskGroup() as workers:
            for _ in range(self._limits.blobs_at_once):
                workers.create_task(work())
        if failures:
            raise failures[0]

    async def need(self, kept: Kept, digest: Digest, size_bytes: int) -> None:
        """Wait until the blob is here, fetched by us or by somebody who began before."""
        if await self.is_here(kept, digest) or await self._take_mirrored(kept, digest, size_bytes):
            return
        # Per repository: what one of them fails to give must not be held against another.
        question = Question(url_of(kept.remote), str(digest))
        self._remembered.holds(question)
        await self._shared.do(question, lambda: self._fetch_blob(kept, digest, size_bytes, question))

    async def _take_mirrored(self, kept: Kept, digest: Digest, size_bytes: int) -> bool:
        """Link a blob that another mirrored repository has. What people pushed here is not taken: an upstream that knows its
        digest would make it public."""
        if self._files.size_of(digest) != size_bytes:
            return False
        sources = await self._store.sources_of(digest)
        if not any(source.mirrored_from and source.visibility is Visibility.PUBLIC for source in sources):
            return False
        return await self._store.link_blob(kept.repository.id, digest, until=self._clock.now() + self._limits.lease)

    async def _fetch_blob(self, kept: Kept, digest: Digest, size_bytes: int, question: Question) -> None:
        try:
            if size_bytes > self._limits.max_blob_bytes:
                raise trouble(kept.remote, f"a blob of {size_bytes} bytes is more than this hub takes")
            async with self._streams[kept.remote.base_url]:
                spare = self._limits.keep_free_bytes
                async with self._quotas.reserved(kept.repository, size_bytes, keep_free_bytes=spare) as room:
                    await self._receive(kept, digest, size_bytes, room)
                    room.keep()
        except CorralError as error:
            shown = told(error, kept.remote)
            self._remembered.note(question, self._limits.failed_s, shown)
            raise shown from error

    async def _receive(self, kept: Kept, digest: Digest, size_bytes: int, room: Reservation) -> None:
        upload_id = self._entropy.bytes(_UPLOAD_ID_BYTES).hex()
        try:
            # In parts: each is on the disk before the next is asked for.
            for part in parts(size_bytes):
                async with contextlib.aclosing(self._bytes_of(kept.remote, digest, part)) as chunks:
                    counted = room.counted(chunks)
                    end = await self._files.append(upload_id, part.first, counted, max_bytes=part.last + 1)
                if end != part.last + 1:
                    raise trouble(kept.remote, "a blob is shorter than its manifest says")
            until = self._clock.now() + self._limits.lease
            await self._store.lease_blob(digest, size_bytes, until=until)
            await self._files.commit(upload_id, size_bytes, digest)
            if not await self._store.link_blob(kept.repository.id, digest, until=until, size_bytes=size_bytes):
                raise CorralError("busy", "that content is being deleted; try again", retry_after_s=1)
        finally:
            await self._files.discard(upload_id)

    async def _bytes_of(self, remote: RemoteRepository, digest: Digest, part: ByteRange) -> AsyncGenerator[bytes, None]:
        chunks = self._gateway.read_blob(remote, digest, first=part.first, count=part.length)
        try:
            with upstream_trouble(remote):
                async for chunk in chunks:
                    yield chunk
        finally:
            # Left open, its connection would stay until the collector finds it.
            if isinstance(chunks, AsyncGenerator):
                await chunks.aclose()


def url_of(remote: RemoteRepository) -> str:
    """As `mirrored_from` has it."""
    return f"{remote.base_url}/{remote.path}"


def trouble(remote: RemoteRepository, reason: str) -> CorralError:
    """An upstream's failure, with its host and what it said on one line."""
    host = urlsplit(remote.base_url).netloc
    return CorralError("upstream_failed", f"the registry {host}, which this hub mirrors, failed: {one_line(reason)[:300]}")


@contextlib.contextmanager
def upstream_trouble(remote: RemoteRepository) -> Iterator[None]:
    """Have whatever an upstream refuses told as its failure."""
    # A 401 of ours would send stock clients for a token again and again, a 404 would deny what is only out of reach.
    try:
        yield
    except CorralError as error:
        raise trouble(remote, error.message) from error


@contextlib.asynccontextmanager
async def patience(remote: RemoteRepository, seconds: float) -> AsyncIterator[None]:
    """Wait for an upstream that long: gateways try again for a minute and more. What was asked goes on without whoever asked."""
    try:
        async with asyncio.timeout(seconds):
            yield
    except TimeoutError as error:
        raise trouble(remote, "it does not answer") from error


def told(error: CorralError, remote: RemoteRepository) -> CorralError:
    """What a failure of fetching is to whoever waits for it: their own trouble as it is, ours with upstream's content as
    upstream's."""
    return error if error.code in _OWN_TROUBLE else trouble(remote, error.message)
