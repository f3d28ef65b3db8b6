"""`/v2/…`: the registry as Ollama and OCI tools speak it. One visible route list; handlers only translate.

A repository may nest and may have components called `blobs`, `tags` or `uploads`, so a path is matched from its end and the name
takes what is left. Whoever gets an address from us gets it absolute and with the host as they spelled it (wire/hosts.py).
Sources: distribution-spec 1.1, "Endpoints" (end-1 … end-14); ollama server/{upload,download}.go and x/transfer, fb30760.
"""

from collections.abc import Callable, Mapping
from dataclasses import replace
from urllib.parse import quote, urlencode

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from corral.core.policy import REGISTRY
from corral.core.records import Principal
from corral.core.registry import Right, Upload, Visibility
from corral.edges.asgi import Dialect, Endpoint, admit, body_stream, endpoint, facts_of, maybe_caller, maybe_visitor
from corral.edges.blob_response import Blob, bare_response, blob_response
from corral.edges.forms import query_of
from corral.edges.registry_door import base_of
from corral.hub.registry import BlobFacts, Registry
from corral.hub.repositories import Caller, Repositories
from corral.hub.tickets import TicketKind, Tickets
from corral.hub.uploads import Mounted, range_of
from corral.wire.errors import CorralError
from corral.wire.hosts import other_spelling
from corral.wire.manifest import MAX_MANIFEST_BYTES
from corral.wire.names import Digest, parse_content_digest
from corral.wire.registry import OCI_INDEX_TYPE, ByteRange, parse_content_range
from corral.wire.repositories import RepositoryName, parse_repository

#: Sent by our own client with a manifest.
_VISIBILITY = "x-corral-visibility"
#: The digests of an empty blob.
_NOTHING = frozenset(
    {
        "sha256:e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855",
        "sha512:cf83e1357eefb8bdf1542850d66d8007d620e4050b5715dc83f4a921d36ce9ce"
        "47d0d13c5d85f2b0ff8318d2877eec2f63b931bd47417a81a538327af927da3e",
    }
)
_MAX_COUNT_DIGITS = 18
#: With what people pushed, under a media type that they chose: a browser shows none of it as a page of this hub (T81).
_INERT = {"Content-Security-Policy": "default-src 'none'; sandbox", "Content-Disposition": "attachment"}


class RegistryApi:
    """Handlers over the registry's services. on_pull: told of each manifest that was fetched, stubs left out. on_push: of each
    that was stored."""

    def __init__(
        self,
        *,
        registry: Registry,
        repositories: Repositories,
        tickets: Tickets,
        public_url: str,
        on_pull: Callable[[RepositoryName], None] = lambda name: None,
        on_push: Callable[[], None] = lambda: None,
    ) -> None:
        self._on_pull = on_pull
        self._on_push = on_push
        self._registry = registry
        self._repositories = repositories
        self._tickets = tickets
        self._public_url = public_url

    def endpoints(self) -> list[Endpoint]:
        """Every route of the registry but the token's, which must stand before these."""
        uploads, session = "/v2/{name:path}/blobs/uploads/", "/v2/{name:path}/blobs/uploads/{upload_id}"
        blob, manifest = "/v2/{name:path}/blobs/{digest}", "/v2/{name:path}/manifests/{reference}"
        rows = [
            ("GET,HEAD", "/v2/", self.ping, False),  # end-1
            ("GET,HEAD", blob, self.get_blob, False),  # end-2
            ("DELETE", blob, self.delete_blob, False),  # end-10
            ("GET,HEAD", manifest, self.get_manifest, False),  # end-3
            ("PUT", manifest, self.put_manifest, True),  # end-7
            ("DELETE", manifest, self.delete_manifest, False),  # end-9
            ("POST", uploads, self.start_upload, True),  # end-4, end-11
            ("PUT", f"{session}/content", self.put_content, True),
            ("PATCH", session, self.patch_upload, True),  # end-5
            ("PUT", session, self.finish_upload, True),  # end-6
            ("GET,HEAD", session, self.upload_status, False),  # end-13
            ("DELETE", session, self.cancel_upload, False),  # end-14
            ("GET,HEAD", "/v2/{name:path}/tags/list", self.list_tags, False),  # end-8
            ("GET,HEAD", "/v2/{name:path}/referrers/{digest}", self.list_referrers, False),  # end-12
        ]
        return [
            endpoint(methods, path, handler, REGISTRY, dialect=Dialect.REGISTRY, streams_body=streams)
            for methods, path, handler, streams in rows
        ]

    async def ping(self, request: Request) -> Response:
        """Whether a credential is good: `docker login` asks nothing else."""
        if _caller(request) is None:
            raise CorralError("unauthorized")
        return bare_response(200, {"Content-Type": "application/json"}, b"{}")

    # ── Blobs ────────────────────────────────────────────────────────────────────────────────────────────────────────

    async def get_blob(self, request: Request) -> Response:
        """A blob, or where it is; see `_located`."""
        name, digest = _name(request), parse_content_digest(request.path_params["digest"])
        if "t" in request.query_params:
            return await self._get_by_ticket(request, name, digest)
        caller = _caller(request)
        found = await self._registry.blob(name, digest, caller)
        return await self._located(request, found, caller)

    async def delete_blob(self, request: Request) -> Response:
        """Take a blob out of the repository."""
        digest = parse_content_digest(request.path_params["digest"])
        await self._registry.remove_blob(_name(request), digest, _caller(request))
        return bare_response(202, {})

    async def _located(self, request: Request, found: BlobFacts, caller: Caller) -> Response:
        """A blob, for whoever may have it, with an address that needs no Authorization.

        Stock clients fetch a blob in parts from the address that this answer names, without their token, and from no address at
        all if it names none. Of two clients the first answer's content is never looked at: the one is spared it, and the other is
        sent to the same place by another name, since for another address of the same name it would only ask again. All others
        get the content. Source: ollama server/download.go getDirectURL, x/transfer/download.go resolve.
        """
        received = facts_of(request).headers
        if request.method == "HEAD" or "range" in received:
            return await blob_response(request, _blob(found), {})
        base = base_of(request, self._public_url)
        other = other_spelling(base)
        ticket = self._tickets.issue(TicketKind.BLOB, _name(request), found.digest, caller, size_bytes=found.size_bytes)
        agent = received.get("user-agent", [""])[0]
        target = f"{facts_of(request).target.partition('?')[0]}?t={ticket}"
        headers = {"Location": base + target, "Cache-Control": "no-store", "Vary": "User-Agent"}
        if agent.startswith("ollama-transfer/") and other:
            return bare_response(307, {**headers, "Location": other + target})
        if agent.startswith("ollama/"):
            return bare_response(200, headers)
        return await blob_response(request, _blob(found), headers)

    async def _get_by_ticket(self, request: Request, name: RepositoryName, digest: Digest) -> Response:
        """A blob at an address that was given out for it. A refusal has no body: stock clients do not look at the status here,
        and would take its text for the bytes they asked for."""
        try:
            ticket = request.query_params["t"]
            found = await self._tickets.blob(ticket, self._registry, name, digest)
            return await blob_response(request, _blob(found), {"Cache-Control": "no-store", "Referrer-Policy": "no-referrer"})
        except CorralError as error:
            return bare_response(error.status, error.headers)

    # ── Manifests ────────────────────────────────────────────────────────────────────────────────────────────────────

    async def get_manifest(self, request: Request) -> Response:
        """A manifest byte for byte, whatever kinds the client would accept: what it gets is what was pushed."""
        found = await self._registry.manifest(_name(request), request.path_params["reference"], _caller(request))
        headers = {
            "Content-Type": found.media_type,
            "Content-Length": str(len(found.body)),
            "Docker-Content-Digest": str(found.digest),
            "ETag": f'"{found.digest}"',
            "Cache-Control": "private, no-cache",
            **_INERT,
        }
        if request.method == "HEAD":
            return bare_response(200, headers)
        if not found.is_stub:  # who fetches one runs the model and does not pull it
            self._on_pull(_name(request))
        return bare_response(200, headers, found.body)

    async def put_manifest(self, request: Request) -> Response:
        """Store a manifest, under a tag or its digest and under every `?tag=`; our own client says who may see the repository."""
        name, caller, visibility = _name(request), _caller(request), _visibility(request)
        # Asked before the body is read: it may be long, and stays in memory.
        await self._repositories.find_or_none(name, Right.PUSH, caller)
        if visibility is Visibility.PRIVATE:
            await self._set_visibility(request, name, caller, visibility)
        body = await body_stream(request).read(MAX_MANIFEST_BYTES)
        reference, tags = request.path_params["reference"], query_of(request).fields.get("tag", ())
        content_type = facts_of(request).headers.get("content-type", [""])[0]
        digest, subject = await self._registry.put_manifest(name, reference, caller, body, content_type, tags)
        self._on_push()
        if visibility is Visibility.PUBLIC:
            await self._set_visibility(request, name, caller, visibility)
        headers = {"Location": f"{self._repository_url(request)}/manifests/{reference}", "Docker-Content-Digest": str(digest)}
        if subject is not None:
            headers["OCI-Subject"] = str(subject)
        if tags:
            headers["OCI-Tag"] = ", ".join(tags)
        return bare_response(201, headers)

    async def _set_visibility(self, request: Request, name: RepositoryName, caller: Caller, visibility: Visibility) -> None:
        if not isinstance(caller, Principal):
            return
        # A token that is good for pushing is enough for what its owner wants of the push. A collaborator's push counts as well,
        # and who sees the repository stays the owner's; what does not exist yet is private.
        self._repositories.check_credential(name, Right.PUSH, caller)
        try:
            await self._repositories.set_visibility(
                name, replace(caller, grants=None), visibility, network=facts_of(request).network
            )
        except CorralError as error:
            if error.code not in ("forbidden", "name_unknown"):
                raise

    async def delete_manifest(self, request: Request) -> Response:
        """Delete a tag, or a manifest with every tag on it."""
        await self._registry.remove_manifest(_name(request), request.path_params["reference"], _caller(request))
        return bare_response(202, {})

    # ── Uploads ──────────────────────────────────────────────────────────────────────────────────────────────────────

    async def start_upload(self, request: Request) -> Response:
        """Begin an upload, or spare it, or do it at once."""
        name, caller, headers = _name(request), _caller(request), facts_of(request).headers
        digest, mount = _digest_parameter(request, "digest"), _digest_parameter(request, "mount")
        _check_algorithm(request)
        stream = body_stream(request)
        if mount is not None:
            source = request.query_params.get("from")
            return self._begun(request, await self._registry.start_upload(name, caller, mount=mount, source=source))
        if digest is not None and headers.get("x-redirect-uploads") == ["2"]:
            size_bytes = _declared(headers)
            started = await self._registry.start_upload(name, caller, expected=digest, declared_bytes=size_bytes)
            return self._begun(request, started, name=name, caller=caller, size_bytes=size_bytes or 0)
        # Without a body, a digest is one of what comes later, except that of nothing.
        if digest is not None and (stream.declared_bytes != 0 or str(digest) in _NOTHING):
            stored = await self._registry.put_blob(name, caller, digest, stream, length=stream.declared_bytes)
            return self._stored(request, stored)
        return self._begun(request, await self._registry.start_upload(name, caller))

    async def patch_upload(self, request: Request) -> Response:
        """Add a chunk: where Content-Range says, or at the end."""
        stream, headers = body_stream(request), facts_of(request).headers
        upload = await self._registry.append(
            request.path_params["upload_id"],
            _name(request),
            _caller(request),
            stream,
            byte_range=_content_range(request),
            length=stream.declared_bytes,
            may_repeat="x-redirect-uploads" in headers,
        )
        return self._progress(request, 202, upload)

    async def put_content(self, request: Request) -> Response:
        """All of an upload, once or again, at the address given out for it. Its ticket is the credential."""
        name, upload_id, stream = _name(request), request.path_params["upload_id"], body_stream(request)
        caller = await self._tickets.redeem(request.query_params.get("t", ""), TicketKind.UPLOAD, name, upload_id)
        if isinstance(caller, Principal):
            admit(request, caller)
        length = stream.declared_bytes
        # Of an empty blob, stock clients do not say the length. Of any other they do: it can be sent again from its beginning.
        whole = ByteRange(0, length - 1) if length else None
        await self._registry.append(upload_id, name, caller, stream, byte_range=whole, length=length, may_repeat=True)
        return bare_response(201, {})

    async def finish_upload(self, request: Request) -> Response:
        """Make a blob of the upload, with the last chunk if there is one. The `etag` of stock clients is not looked at: the MD5
        sums it is made of cost more than the digest, which says more."""
        stream, digest = body_stream(request), _digest_parameter(request, "digest")
        if digest is None:
            raise CorralError("digest_invalid", "the end of an upload needs ?digest=")
        has_chunk = stream.declared_bytes != 0
        stored = await self._registry.commit(
            request.path_params["upload_id"],
            _name(request),
            _caller(request),
            digest,
            stream if has_chunk else None,
            byte_range=_content_range(request) if has_chunk else None,
            length=stream.declared_bytes,
        )
        return self._stored(request, stored)

    async def upload_status(self, request: Request) -> Response:
        """How far an upload is."""
        upload = await self._registry.status(request.path_params["upload_id"], _name(request), _caller(request))
        return self._progress(request, 204, upload)

    async def cancel_upload(self, request: Request) -> Response:
        """Give an upload up."""
        await self._registry.cancel(request.path_params["upload_id"], _name(request), _caller(request))
        return bare_response(204, {})

    def _begun(
        self,
        request: Request,
        started: Mounted | Upload,
        *,
        name: RepositoryName | None = None,
        caller: Caller = None,
        size_bytes: int = 0,
    ) -> Response:
        """name: set where the content may come to an address of its own, without Authorization. size_bytes: of it, if known."""
        if isinstance(started, Mounted):
            return self._stored(request, started.digest)
        if name is None:
            return self._progress(request, 202, started)
        ticket = self._tickets.issue(TicketKind.UPLOAD, name, started.id, caller, size_bytes=size_bytes)
        url = f"{self._repository_url(request)}/blobs/uploads/{started.id}/content?t={ticket}"
        return self._progress(request, 202, started, {"X-Direct-Upload-URL": url, "Cache-Control": "no-store"})

    def _progress(self, request: Request, status: int, upload: Upload, more: Mapping[str, str] | None = None) -> Response:
        location = f"{self._repository_url(request)}/blobs/uploads/{upload.id}"
        headers = {
            "Location": location,
            # Stock clients look for this one first.
            "Docker-Upload-Location": location,
            "Docker-Upload-UUID": upload.id,
            "Range": range_of(upload),
        }
        return bare_response(status, {**headers, **(more or {})})

    def _stored(self, request: Request, digest: Digest) -> Response:
        location = f"{self._repository_url(request)}/blobs/{digest}"
        return bare_response(201, {"Location": location, "Docker-Content-Digest": str(digest)})

    # ── Listings ─────────────────────────────────────────────────────────────────────────────────────────────────────

    async def list_tags(self, request: Request) -> Response:
        """The repository's tags, a page at a time."""
        name, last, limit = _name(request), request.query_params.get("last", ""), _limit(request)
        page = await self._registry.tags(name, _caller(request), last=last, limit=limit)
        body = msgspec.json.encode({"name": str(name), "tags": page.names})
        headers = {"Content-Type": "application/json"}
        if page.last:
            count = limit or len(page.names)
            headers["Link"] = f'</v2/{name}/tags/list?n={count}&last={quote(page.last, safe="")}>; rel="next"'
        return bare_response(200, headers, body)

    async def list_referrers(self, request: Request) -> Response:
        """The manifests that name this one as their subject, a page at a time."""
        name, subject, last = (
            _name(request),
            parse_content_digest(request.path_params["digest"]),
            _digest_parameter(request, "last"),
        )
        artifact_type = request.query_params.get("artifactType", "")
        page = await self._registry.referrers(
            name, subject, _caller(request), artifact_type=artifact_type, last=str(last) if last else ""
        )
        headers = {"Content-Type": OCI_INDEX_TYPE, **({"OCI-Filters-Applied": "artifactType"} if artifact_type else {})}
        if page.last:
            query = urlencode({"last": page.last, **({"artifactType": artifact_type} if artifact_type else {})})
            headers["Link"] = f'</v2/{name}/referrers/{subject}?{query}>; rel="next"'
        return bare_response(200, headers, page.index)

    def _repository_url(self, request: Request) -> str:
        return f"{base_of(request, self._public_url)}/v2/{request.path_params['name']}"


def _name(request: Request) -> RepositoryName:
    return parse_repository(request.path_params["name"])


def _caller(request: Request) -> Caller:
    return maybe_caller(request) or maybe_visitor(request)


def _blob(found: BlobFacts) -> Blob:
    source = found.content if found.content is not None else found.path
    assert source is not None
    return Blob(digest=found.digest, size_bytes=found.size_bytes, source=source)


def _digest_parameter(request: Request, name: str) -> Digest | None:
    text = request.query_params.get(name)
    return None if text is None else parse_content_digest(text)


def _check_algorithm(request: Request) -> None:
    """end-4c: a hint only, since the digest comes at the end. Raises: digest_invalid."""
    if request.query_params.get("digest-algorithm", "sha256") not in ("sha256", "sha512"):
        raise CorralError("digest_invalid", "the digests here are sha256 and sha512")


def _content_range(request: Request) -> ByteRange | None:
    values = facts_of(request).headers.get("content-range", [])
    if len(values) > 1:
        raise CorralError("size_invalid", "more than one Content-Range")
    return parse_content_range(values[0], body_stream(request).declared_bytes) if values else None


def _declared(headers: Mapping[str, list[str]]) -> int | None:
    """What a stock client says that it will send."""
    text = headers.get("x-content-length", [""])[0]
    return int(text) if text.isascii() and text.isdecimal() and len(text) <= _MAX_COUNT_DIGITS else None


def _limit(request: Request) -> int | None:
    """How many tags are wanted. Raises: bad_request."""
    text = request.query_params.get("n")
    if text is None:
        return None
    if not (text.isascii() and text.isdecimal()):
        raise CorralError("bad_request", "n is a number of tags")
    return int(text[:_MAX_COUNT_DIGITS])


def _visibility(request: Request) -> Visibility | None:
    values = facts_of(request).headers.get(_VISIBILITY, [])
    if not values:
        return None
    try:
        return Visibility(values[0])
    except ValueError as error:
        raise CorralError("bad_request", "X-Corral-Visibility is private or public") from error
