"""The installed models of this machine, changed: made, copied, removed, and blobs taken in for making them.

The wording for what is wrong is Ollama's, route by route, because clients match on it. Source: ollama server/routes.go
(CopyHandler, DeleteHandler, HeadBlobHandler, CreateBlobHandler), server/create.go, fb30760.
"""

from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from contextlib import aclosing, suppress

from corral.core.library import LibraryBlobs, LibraryStore
from corral.core.records import Model
from corral.local.creating import ModelMaker
from corral.wire.create import CreateRequest, ProgressEvent, parse_blob_digest
from corral.wire.errors import CorralError
from corral.wire.manifest import parse_manifest
from corral.wire.names import Digest, ModelName, Source, cloud_tag, parse_name, parse_reference
from corral.wire.native import model_not_found, model_required
from corral.wire.units import quoted


class Library:
    """Changes to what is installed. unload: ends a model's runner, after the work in flight. is_pruning: whether blobs that a new
    manifest no longer names are removed (not with OLLAMA_NOPRUNE)."""

    def __init__(
        self,
        store: LibraryStore,
        blobs: LibraryBlobs,
        maker: ModelMaker,
        *,
        unload: Callable[[Model], Awaitable[None]],
        is_pruning: bool = True,
    ) -> None:
        self._store = store
        self._blobs = blobs
        self._maker = maker
        self._unload = unload
        self._is_pruning = is_pruning

    async def create(self, request: CreateRequest) -> AsyncGenerator[ProgressEvent, None]:
        """Make a model and tell how far it is; the last event's status is `success`. Raises: as `ModelMaker.make`."""
        former: tuple[Model | None, tuple[Digest, ...]] | None = None
        with suppress(CorralError):  # a name that is none is refused in its turn
            former = await self._installed(parse_name(request.wanted))
        async with aclosing(self._maker.make(request)) as events:
            async for event in events:
                yield event
        if former is not None:
            await self._retire(*former)
        yield ProgressEvent(status="success")

    async def copy(self, source: str, destination: str) -> None:
        """Have a model under another name too. Raises: bad_request, not_found with Ollama's texts."""
        from_name = _name(source, f"source {quoted(source)} is invalid")
        to_name = _name(destination, f"destination {quoted(destination)} is invalid")
        found = await self._store.manifest(from_name)
        if found is None:
            raise CorralError("not_found", f"model {quoted(source)} not found")
        spelled, body = found
        if spelled.key == to_name.key:
            return
        with self._store.hold(_digests_of(body)):
            former = await self._installed(to_name)
            await self._store.put_manifest(to_name, body)
        if former is not None:
            await self._retire(*former)

    async def delete(self, requested: str) -> None:
        """Remove a model, and the blobs that no other needs. Raises: bad_request, not_found with Ollama's texts."""
        if not requested:
            raise model_required()
        reference = parse_reference(requested)
        base = cloud_tag(reference.base) if reference.source is Source.CLOUD else reference.base
        name = _name(base, f"name {quoted(requested)} is invalid")
        former = await self._installed(name)
        if former is None or not await self._store.remove(name):
            raise model_not_found(requested)
        await self._retire(*former, is_final=True)

    def require_blob(self, text: str) -> None:
        """Raises: bad_request for what is no digest, not_found for a blob that is not here."""
        if self._blobs.blob_size(parse_blob_digest(text)) is None:
            raise CorralError("not_found", f"blob {quoted(text)} not found")

    async def put_blob(self, text: str, chunks: AsyncIterator[bytes]) -> bool:
        """Store a blob under its digest; False when it was here before, and nothing was read then. Raises: bad_request with
        Ollama's text on another digest, storage_full, unavailable."""
        digest = parse_blob_digest(text)
        if self._blobs.blob_size(digest) is not None:
            return False
        await self._blobs.put_stream(chunks, digest)
        return True

    async def _installed(self, name: ModelName) -> tuple[Model | None, tuple[Digest, ...]] | None:
        """What has that name now: the model and its blobs, nothing of either for one that cannot be read."""
        try:
            found = await self._store.manifest(name)
            return None if found is None else (await self._store.get(name), _digests_of(found[1]))
        except CorralError:
            return None, ()

    async def _retire(self, model: Model | None, digests: tuple[Digest, ...], *, is_final: bool = False) -> None:
        """A manifest is gone or replaced: end its runner if nothing else has those weights, and remove what nobody needs."""
        if not self._is_pruning and not is_final:
            return
        unnamed = await self._store.unnamed(digests)
        # What a runner still works with stays until the next start of the server.
        if model is not None and model.weights and any(model.weights.endswith(digest.file_name) for digest in unnamed):
            await self._unload(model)
        await self._store.remove_unused(unnamed)


def _digests_of(body: bytes) -> tuple[Digest, ...]:
    """What a manifest names; nothing for one that cannot be read."""
    try:
        return tuple(layer.digest for layer in parse_manifest(body).blobs)
    except CorralError:
        return ()


def _name(text: str, message: str) -> ModelName:
    try:
        return parse_name(text)
    except CorralError as error:
        raise CorralError("bad_request", message) from error
