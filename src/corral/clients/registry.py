"""A `RegistryGateway` over HTTP: a Corral hub, an Ollama registry, or any that speaks the OCI distribution protocol.

Reading: ranged requests, each of which starts at the registry, so that a signed address which has run out is simply replaced.
Registries differ in how they hand blobs out (206; 307 to where they are; 200 with a `Location`, for Ollama); all are understood.
Writing: HEAD, mount, an upload in parts by PATCH, each retried at the offset that the registry says it has, PUT, manifest. A part
may be redirected to a storage service (307, Ollama's own registry): then its bytes go there, without credentials.
Source: registry.md 1.2 to 1.6; ollama server/{upload,download}.go, fb30760; distribution-spec 1.1.
"""

import re
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from contextlib import aclosing
from dataclasses import dataclass, field
from functools import partial
from hashlib import md5, sha256, sha512
from typing import Final, TypeVar
from urllib.parse import quote, urlencode, urlsplit, urlunsplit

import aiohttp

from corral.clients.registry_transport import Call, RegistryTransport, Trouble, Unreachable, joined
from corral.core.ports import Entropy
from corral.core.registry import Visibility
from corral.core.transfer_ports import BlobToSend, Interrupted, RemoteManifest, RemoteRepository, Sleeper
from corral.wire.errors import CorralError
from corral.wire.manifest import MANIFEST_TYPE, MAX_MANIFEST_BYTES
from corral.wire.names import Digest, parse_content_digest
from corral.wire.registry import multipart_etag, part_size

T = TypeVar("T")

#: Ollama's order of preference first, since its own registry knows nothing else.
_ACCEPT: Final = ", ".join(
    (
        MANIFEST_TYPE,
        "application/vnd.oci.image.manifest.v1+json",
        "application/vnd.oci.image.index.v1+json",
        "application/vnd.docker.distribution.manifest.list.v2+json",
        "*/*;q=0.1",
    )
)
_OCTETS: Final = "application/octet-stream"
#: How often the same thing is tried without getting any further.
_TRIES: Final = 7
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.5, 32.0
#: What counts as getting further: a registry that hands out single bytes shall not be asked for ever.
_PROGRESS_BYTES: Final = 64 * 1024
_MAX_SIZE: Final = 2**63 - 1
_CONTENT_RANGE: Final = re.compile(r"bytes ([0-9]{1,19})-([0-9]{1,19})/(?:[0-9]{1,19}|\*)")
_UPLOAD_RANGE: Final = re.compile(r"(?:bytes=)?0-([0-9]{1,19})")
_RETRIED: Final = frozenset({408, 425, 429, 500, 502, 503, 504})


@dataclass(frozen=True, slots=True)
class _Found:
    """A blob that is there. size_bytes: None where the registry does not say."""

    size_bytes: int | None


@dataclass(slots=True)
class _Upload:
    """A blob on its way out. url: where the next request goes. offset: bytes that the registry has. md5s: of the parts that went
    to a storage service; None once one did not."""

    repository: RemoteRepository
    blob: BlobToSend
    progress: Callable[[int], None]
    url: str
    offset: int = 0
    md5s: list[bytes] | None = field(default_factory=list)


class _UploadLost(Exception):
    """The registry no longer knows the upload."""


class RegistryClient:
    """See `RegistryGateway`. sleep, entropy: for the pauses between tries."""

    def __init__(self, transport: RegistryTransport, *, sleep: Sleeper, entropy: Entropy) -> None:
        self._transport = transport
        self._sleep = sleep
        self._entropy = entropy

    # ── Reading ──────────────────────────────────────────────────────────────────────────────────────────────────────

    async def manifest(self, repository: RemoteRepository, reference: str) -> RemoteManifest | None:
        """By tag or digest; None when there is none. Raises: see RegistryGateway."""
        url = f"{_base(repository)}/manifests/{quote(reference, safe=':')}"
        call = Call(repository=repository, method="GET", url=url, headers={"Accept": _ACCEPT})
        return await self._tried(partial(self._reached, repository, partial(self._manifest, call, reference)))

    async def _manifest(self, call: Call, reference: str) -> RemoteManifest | None:
        async with self._transport.answer(call) as response:
            if response.status == 404:
                return None
            await self._check(response)
            body = await self._transport.read(response, MAX_MANIFEST_BYTES, what="manifest")
            announced = response.headers.get("Docker-Content-Digest", "")
            digest = Digest(sha256(body).hexdigest())
            for expected in (announced, reference if ":" in reference else ""):
                if expected:
                    digest = _checked_digest(body, expected)
            media_type = response.headers.get("Content-Type", "").partition(";")[0].strip() or MANIFEST_TYPE
            return RemoteManifest(digest=digest, media_type=media_type, body=body)

    async def blob_size(self, repository: RemoteRepository, digest: Digest) -> int | None:
        """Bytes, or None when the registry does not have the blob there. Raises: see RegistryGateway."""
        call = Call(repository=repository, method="HEAD", url=_blob_url(repository, digest))
        found = await self._tried(partial(self._head, call))
        if found is not None and found.size_bytes is None:
            raise CorralError("upstream_failed", "the registry does not say how long the blob is")
        return found.size_bytes if found is not None else None

    async def _head(self, call: Call) -> _Found | None:
        async with self._transport.answer(call) as response:
            if response.status == 404:
                return None
            await self._check(response)
            return _Found(_length_of(response))

    async def read_blob(
        self, repository: RemoteRepository, digest: Digest, *, first: int, count: int
    ) -> AsyncGenerator[bytes, None]:
        """Exactly those bytes as they arrive. Raises: see RegistryGateway."""
        position, end, failures, mark = first, first + count, 0, first
        while position < end:
            try:
                async with aclosing(self._range(repository, digest, position, end)) as chunks:
                    async for chunk in chunks:
                        position += len(chunk)
                        yield chunk
                if position < end:
                    raise Trouble("the answer ended early")
            except Trouble as trouble:
                if position - mark >= _PROGRESS_BYTES:
                    failures, mark = 0, position
                failures += 1
                await self._pause(failures, trouble)

    async def _range(self, repository: RemoteRepository, digest: Digest, first: int, end: int) -> AsyncGenerator[bytes, None]:
        """The bytes [first, end), or fewer if the answer breaks off."""
        url = _blob_url(repository, digest)
        headers = {"Range": f"bytes={first}-{end - 1}"}
        for _ in range(2):
            call = Call(repository=repository, method="GET", url=url, headers=headers)
            async with self._transport.answer(call) as response:
                await self._check(response)
                elsewhere = _direct_url(response) if response.status == 200 else None
                if elsewhere is None or elsewhere == url:
                    async for chunk in _between(response, first, end):
                        yield chunk
                    return
            url = elsewhere

    # ── Writing ──────────────────────────────────────────────────────────────────────────────────────────────────────

    async def send_blob(self, repository: RemoteRepository, blob: BlobToSend, progress: Callable[[int], None]) -> None:
        """Have the blob there. Raises: see RegistryGateway."""
        failures = 0
        while True:
            if await self._tried(partial(self._reached, repository, partial(self._is_there, repository, blob))):
                progress(blob.size_bytes)
                return
            try:
                upload = await self._tried(partial(self._begin, repository, blob, progress))
                if upload is not None:
                    await self._send_parts(upload)
                    await self._commit(upload)
                progress(blob.size_bytes)
                return
            except _UploadLost:
                failures += 1
                await self._pause(failures, Trouble("the registry forgot the upload"))

    async def _is_there(self, repository: RemoteRepository, blob: BlobToSend) -> bool:
        call = Call(repository=repository, method="HEAD", url=_blob_url(repository, blob.digest), writes=True)
        async with self._transport.answer(call) as response:
            # An answer to HEAD has no words; the upload is refused with some.
            if response.status not in (403, 404):
                await self._check(response)
            return response.status < 300

    async def _begin(self, repository: RemoteRepository, blob: BlobToSend, progress: Callable[[int], None]) -> _Upload | None:
        """An open upload; None when the registry had the blob elsewhere and mounted it."""
        url = f"{_base(repository)}/blobs/uploads/"
        if blob.mount_from:
            url += "?" + urlencode({"from": blob.mount_from, "mount": str(blob.digest)})
        call = Call(repository=repository, method="POST", url=url, writes=True)
        async with self._transport.answer(call) as response:
            await self._check(response)
            if response.status == 201:
                return None
            return _Upload(repository, blob, progress, _next_url(response, url, required=True))

    async def _send_parts(self, upload: _Upload) -> None:
        step, failures = part_size(upload.blob.size_bytes), 0
        while upload.offset < upload.blob.size_bytes:
            start = upload.offset
            count = min(step, upload.blob.size_bytes - start)
            try:
                await self._send_part(upload, count)
                failures = 0
            except Trouble as trouble:
                failures += 1
                await self._pause(failures, trouble)
                await self._ask_offset(upload, start, start + count)
            upload.progress(upload.offset)

    async def _send_part(self, upload: _Upload, count: int) -> None:
        first = upload.offset
        headers = {
            "Content-Type": _OCTETS,
            "Content-Range": f"{first}-{first + count - 1}",
            # Ollama's registry may then name a place for the bytes; a Corral hub takes a part that it has already.
            "X-Redirect-Uploads": "1",
        }
        call = Call(
            repository=upload.repository,
            method="PATCH",
            url=upload.url,
            headers=headers,
            body=partial(_reporting, upload, first, count),
            length=count,
            writes=True,
        )
        async with self._transport.answer(call) as response:
            if response.status == 416:
                raise Trouble("the registry has another part of the upload")
            if response.status != 307:
                await self._check(response, lost=upload)
                upload.url = _next_url(response, upload.url)
                upload.md5s = None
                upload.offset = _kept(response, first, first + count)
                return
            part_url = joined(upload.url, response.headers.get("Location", ""))
            session_url = _next_url(response, upload.url, name="Docker-Upload-Location")
        await self._send_redirected(upload, part_url, count)
        upload.url = session_url

    async def _send_redirected(self, upload: _Upload, part_url: str, count: int) -> None:
        """One part to where the registry wants it, without credentials."""
        digest = md5(usedforsecurity=False)
        call = Call(
            repository=upload.repository,
            method="PUT",
            url=part_url,
            headers={"Content-Type": _OCTETS},
            body=partial(_reporting, upload, upload.offset, count, digest.update),
            length=count,
            writes=True,
        )
        async with self._transport.answer(call) as response:
            await self._check(response)
        upload.offset += count
        if upload.md5s is not None:
            upload.md5s.append(digest.digest())

    async def _ask_offset(self, upload: _Upload, start: int, end: int) -> None:
        """Go on where the registry says it is, if it says so believably; else with the same part again."""
        call = Call(repository=upload.repository, method="GET", url=upload.url, writes=True)
        try:
            async with self._transport.answer(call) as response:
                if response.status == 404:
                    raise _UploadLost
                if response.status < 300:
                    upload.url = _next_url(response, upload.url)
                    kept = _UPLOAD_RANGE.fullmatch(response.headers.get("Range", ""))
                    # `0-0` stands for nothing as well as for one byte.
                    offset = int(kept[1]) + 1 if kept and kept[1] != "0" else 0
                    upload.offset = offset if offset <= end else start
        except Trouble:
            upload.offset = start

    async def _commit(self, upload: _Upload) -> None:
        query = {"digest": str(upload.blob.digest)}
        if upload.md5s:
            query["etag"] = multipart_etag(upload.md5s)
        call = Call(
            repository=upload.repository,
            method="PUT",
            url=_with_query(upload.url, query),
            headers={"Content-Type": _OCTETS},
            writes=True,
        )
        await self._tried(partial(self._put, call, upload))

    async def put_manifest(
        self, repository: RemoteRepository, reference: str, manifest: RemoteManifest, *, visibility: Visibility | None = None
    ) -> None:
        """Raises: see RegistryGateway."""
        headers = {"Content-Type": manifest.media_type}
        if visibility is not None:
            headers["X-Corral-Visibility"] = visibility.value
        call = Call(
            repository=repository,
            method="PUT",
            url=f"{_base(repository)}/manifests/{quote(reference, safe=':')}",
            headers=headers,
            body=partial(_once, manifest.body),
            length=len(manifest.body),
            writes=True,
        )
        await self._tried(partial(self._put, call))

    async def _put(self, call: Call, upload: _Upload | None = None) -> None:
        async with self._transport.answer(call) as response:
            await self._check(response, lost=upload)

    # ── Trying ───────────────────────────────────────────────────────────────────────────────────────────────────────

    async def _check(self, response: aiohttp.ClientResponse, *, lost: _Upload | None = None) -> None:
        """Raises: Trouble for an answer that another try may better, `_UploadLost`, and the refusal for any other of 300 up."""
        if response.status < 300:
            return
        if response.status == 404 and lost is not None:
            raise _UploadLost
        error = await self._transport.refusal(response)
        if response.status in _RETRIED:
            raise Trouble(error.message, _retry_after_s(response)) from error
        raise error

    async def _reached(self, repository: RemoteRepository, attempt: Callable[[], Awaitable[T]]) -> T:
        """For what a pull or push asks first: who is not there now is told of at once, by name, and not after all the tries.
        Raises: upstream_failed."""
        try:
            return await attempt()
        except Unreachable as trouble:
            text = f"could not reach the registry {repository.base_url}: {trouble.reason}"
            raise CorralError("upstream_failed", text) from trouble

    async def _tried(self, attempt: Callable[[], Awaitable[T]]) -> T:
        failures = 0
        while True:
            try:
                return await attempt()
            except Trouble as trouble:
                failures += 1
                await self._pause(failures, trouble)

    async def _pause(self, failures: int, trouble: Trouble) -> None:
        """Wait longer each time, never in step with others. Raises: upstream_failed after the last try."""
        if failures >= _TRIES:
            raise Interrupted(f"max retries exceeded: {trouble.reason}") from trouble
        jitter = 0.5 + int.from_bytes(self._entropy.bytes(2)) / 65536
        pause_s = min(_FIRST_PAUSE_S * 2.0 ** (failures - 1), _LONGEST_PAUSE_S) * jitter
        await self._sleep(max(pause_s, min(trouble.wait_s, _LONGEST_PAUSE_S)))


# ── Addresses ────────────────────────────────────────────────────────────────────────────────────────────────────────


def _base(repository: RemoteRepository) -> str:
    return f"{repository.base_url}/v2/{quote(repository.path)}"


def _blob_url(repository: RemoteRepository, digest: Digest) -> str:
    return f"{_base(repository)}/blobs/{digest}"


def _with_query(url: str, added: dict[str, str]) -> str:
    """The URL with further parameters; those it has stay as they are, since they may be signed."""
    parts = urlsplit(url)
    return urlunsplit(parts._replace(query="&".join(filter(None, (parts.query, urlencode(added))))))


def _next_url(response: aiohttp.ClientResponse, url: str, *, name: str = "Location", required: bool = False) -> str:
    """Where an upload goes on. Raises: upstream_failed where one is required and none is named."""
    named = response.headers.get("Docker-Upload-Location") or (response.headers.get(name) if name == "Location" else None)
    if not named and required:
        raise CorralError("upstream_failed", "the registry does not say where the upload goes")
    return joined(str(response.url), named) if named else url


def _direct_url(response: aiohttp.ClientResponse) -> str | None:
    location = response.headers.get("Location")
    return joined(str(response.url), location) if location else None


# ── Answers and bodies ───────────────────────────────────────────────────────────────────────────────────────────────


async def _between(response: aiohttp.ClientResponse, first: int, end: int) -> AsyncIterator[bytes]:
    """The bytes [first, end) of a whole or partial answer. Raises: upstream_failed when it is about others."""
    at = 0
    if response.status == 206:
        stated = _CONTENT_RANGE.fullmatch(response.headers.get("Content-Range", ""))
        if stated is None or int(stated[1]) != first or int(stated[2]) >= end:
            raise CorralError("upstream_failed", "the registry answers with another range than was asked for")
        at = first
    elif (length := _length_of(response)) is not None and length < end:
        raise CorralError("upstream_failed", "the registry has fewer bytes of the blob than its manifest says")
    async for chunk in response.content.iter_any():
        useful = chunk[max(0, first - at) : end - at]
        at += len(chunk)
        if useful:
            yield useful
        if at >= end:
            return


def _length_of(response: aiohttp.ClientResponse) -> int | None:
    text = response.headers.get("Content-Length", "")
    if not text.isascii() or not text.isdecimal() or len(text) > 19 or int(text) > _MAX_SIZE:
        return None
    return int(text)


def _kept(response: aiohttp.ClientResponse, first: int, end: int) -> int:
    """How far an upload is after a part that was accepted; what a registry says beyond belief is not believed."""
    kept = _UPLOAD_RANGE.fullmatch(response.headers.get("Range", ""))
    return int(kept[1]) + 1 if kept and first < int(kept[1]) + 1 < end else end


def _retry_after_s(response: aiohttp.ClientResponse) -> float:
    text = response.headers.get("Retry-After", "")
    return float(text) if text.isascii() and text.isdecimal() and len(text) < 6 else 0.0


def _checked_digest(body: bytes, expected: str) -> Digest:
    """The expected digest, if it is the body's. Raises: upstream_failed (T120)."""
    try:
        digest = parse_content_digest(expected)
    except CorralError as error:
        raise CorralError("upstream_failed", "the registry names a digest that is none") from error
    found = (sha512 if digest.algorithm == "sha512" else sha256)(body).hexdigest()
    if found != digest.hex:
        raise CorralError("upstream_failed", f"the registry's manifest is not {digest}, as it says")
    return digest


async def _reporting(
    upload: _Upload, first: int, count: int, also: Callable[[bytes], None] = lambda _: None
) -> AsyncIterator[bytes]:
    sent = first
    async for block in upload.blob.read(first, count):
        yield block
        also(block)
        sent += len(block)
        upload.progress(sent)


async def _once(body: bytes) -> AsyncIterator[bytes]:
    yield body
