"""The registry's content: blobs, manifests, tags and referrers, each seen through one repository by one caller.

Uploads are a service of their own (uploads.py), and so is the question who may do what (repositories.py). What has been pushed is
kept and sent byte for byte; a manifest is only read to know what it names.
"""

import asyncio
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

from corral.core.ports import Clock
from corral.core.records import Principal
from corral.core.registry import NewManifest, RegistryFiles, RegistryStore, Repository, Right, StoredManifest
from corral.hub.hosting import may_use
from corral.hub.links import BlobLinks
from corral.hub.repositories import Caller, Repositories
from corral.hub.stubs import Stub, Stubs
from corral.hub.uploads import Uploads
from corral.wire.errors import CorralError
from corral.wire.manifest import MAX_MANIFEST_BYTES
from corral.wire.names import Digest, parse_content_digest
from corral.wire.registry import parse_image_manifest, referrers_index
from corral.wire.repositories import RepositoryName, is_reserved_tag, is_tag, parse_tag

#: Tags of one page, whatever a client asks for (T37).
MAX_TAGS = 1000
#: Referrers of one page, and the length of their manifests together: what a page repeats of each may be nearly all of it.
MAX_REFERRERS, MAX_REFERRERS_BYTES = 500, 4 << 20
#: Tags that one push of a manifest may set.
MAX_TAG_PARAMETERS = 64
#: A manifest longer than this is parsed in a thread: 16 MiB of JSON would hold up everybody else.
_PARSE_HERE_BYTES = 64 << 10


@dataclass(frozen=True, slots=True, kw_only=True)
class BlobFacts:
    """A blob to be sent. path: of its file; or content, of one that is made when it is asked for and has no repository_id."""

    digest: Digest
    size_bytes: int
    repository_id: str = ""
    path: str | None = None
    content: bytes | None = None


@dataclass(frozen=True, slots=True)
class TagPage:
    """Some of a repository's tags. last: where the next page begins behind, empty when there is none."""

    names: tuple[str, ...]
    last: str = ""


@dataclass(frozen=True, slots=True)
class ReferrerPage:
    """Some of the manifests with one subject, as an OCI index. last: as of tags."""

    index: bytes
    last: str = ""


class Registry:
    """What clients of the registry do with content. Every verb asks for itself whether the caller may, and raises what
    `Repositories.find` does."""

    def __init__(
        self,
        *,
        repositories: Repositories,
        uploads: Uploads,
        links: BlobLinks,
        stubs: Stubs,
        store: RegistryStore,
        files: RegistryFiles,
        clock: Clock,
    ) -> None:
        self._repositories = repositories
        self._links = links
        self._stubs = stubs
        self._store = store
        self._files = files
        self._clock = clock
        # Content on its way in: the verbs of uploads.py, so that an edge needs one service.
        self.start_upload = uploads.start_upload
        self.put_blob = uploads.put_blob
        self.append = uploads.append
        self.commit = uploads.commit
        self.status = uploads.status
        self.cancel = uploads.cancel

    # ── Blobs ────────────────────────────────────────────────────────────────────────────────────────────────────────

    async def blob(self, name: RepositoryName, digest: Digest, caller: Caller) -> BlobFacts:
        """A blob of that repository, never of another one (F11). Whoever could push it again is told that it need not be: it is
        kept for the time of a push. Raises: blob_unknown."""
        stub = await self._stub_for(name, await self._stubs.holding(name, digest), caller)
        if stub is not None and digest == stub.config_digest:
            return BlobFacts(digest=digest, size_bytes=len(stub.config), content=stub.config)
        repository = await self._repositories.find_existing(name, Right.PULL, caller)
        size_bytes = await self._links.size_of(repository, digest)
        if size_bytes is None or not await self._is_kept(repository, digest, caller):
            raise CorralError("blob_unknown")
        return BlobFacts(digest=digest, size_bytes=size_bytes, repository_id=repository.id, path=self._files.path_of(digest))

    async def _is_kept(self, repository: Repository, digest: Digest, caller: Caller) -> bool:
        """Whether the blob stays for as long as a push that counts on it. Nothing is promised to whoever only pulls."""
        if not self._links.is_renewal_due(repository, digest) or not await self._repositories.may(repository, Right.PUSH, caller):
            return True
        return await self._links.renew(repository, digest)

    async def remove_blob(self, name: RepositoryName, digest: Digest, caller: Caller) -> None:
        """Take it out of this repository. Raises: blob_unknown; unsupported while a manifest here names it."""
        repository = await self._repositories.find_existing(name, Right.DELETE, caller)
        if not await self._store.unlink_blob(repository.id, digest):
            raise CorralError("blob_unknown")
        self._links.forget(repository, digest)

    # ── Manifests ────────────────────────────────────────────────────────────────────────────────────────────────────

    async def manifest(self, name: RepositoryName, reference: str, caller: Caller) -> StoredManifest:
        """By tag or digest; a cloud tag gives the stub of the hosted model. Raises: manifest_unknown, digest_invalid."""
        digest = _digest_of(reference)
        found = self._stubs.holding(name, digest) if digest else self._stubs.tagged(name, reference)
        stub = await self._stub_for(name, await found, caller)
        if stub is not None and digest in (None, stub.manifest.digest):
            return stub.manifest
        repository = await self._repositories.find_existing(name, Right.PULL, caller)
        if digest is None and not is_tag(reference):
            raise CorralError("manifest_unknown")
        manifest = await self._store.manifest(repository.id, digest or reference)
        if manifest is None:
            raise CorralError("manifest_unknown")
        return manifest

    async def put_manifest(
        self, name: RepositoryName, reference: str, caller: Caller, body: bytes, content_type: str, tags: Sequence[str] = ()
    ) -> tuple[Digest, Digest | None]:
        """Store a manifest under a tag or its digest, and under further tags, all at once. Gives its digest and its subject's.

        A blob that this repository lacks is taken from another one that the caller may pull from, since stock clients sometimes
        take it for sent. Raises: manifest_invalid, manifest_blob_unknown, digest_invalid, too_large, storage_full; forbidden for
        a quota.
        """
        is_new = await self._repositories.find_or_none(name, Right.PUSH, caller) is None
        digest = _digest_of(reference)
        named = _tags_to_set([*tags] if digest else [reference, *tags])
        new = await _parsed(body, content_type, digest)
        # Not made before: what cannot be read shall leave no repository behind.
        repository = await self._repositories.find(name, Right.PUSH, caller)
        try:
            await self._check_room(repository, new)
            await self._put(repository, new, named, caller)
        except CorralError:
            if is_new:
                await self._repositories.remove_unused(repository)
            raise
        return new.manifest.digest, new.subject

    async def _check_room(self, repository: Repository, new: NewManifest) -> None:
        """Manifests are in the database, whose disk must never fill up. One that is there may get another tag all the same."""
        try:
            await self._links.check_room(repository, len(new.manifest.body))
        except CorralError as error:
            if error.code not in ("forbidden", "storage_full"):
                raise
            if await self._store.manifest(repository.id, new.manifest.digest) is None:
                raise

    async def _put(self, repository: Repository, new: NewManifest, tags: Sequence[str], caller: Caller) -> None:
        try:
            await self._store.put_manifest(repository.id, new, tags, now=self._clock.now())
        except CorralError as error:
            if error.code != "manifest_blob_unknown":
                raise
            for digest, _ in new.blobs:
                is_here = await self._store.blob_size(repository.id, digest) is not None
                # The first one that cannot be had decides: nobody makes us look fifty thousand of them up.
                if not is_here and not await self._links.borrow(repository, digest, caller):
                    raise
            await self._store.put_manifest(repository.id, new, tags, now=self._clock.now())

    async def remove_manifest(self, name: RepositoryName, reference: str, caller: Caller) -> None:
        """By tag: the tag alone. By digest: the manifest with every tag on it. Raises: manifest_unknown, digest_invalid."""
        repository = await self._repositories.find_existing(name, Right.DELETE, caller)
        digest = _digest_of(reference)
        if digest is not None:
            is_gone = await self._store.remove_manifest(repository.id, digest)
        else:
            is_gone = await self._store.remove_tag(repository.id, reference)
        if not is_gone:
            raise CorralError("manifest_unknown")

    async def _stub_for(self, name: RepositoryName, stub: Stub | None, caller: Caller) -> Stub | None:
        """The stub if it exists for the caller: whoever may use a model may install its stub."""
        if stub is None or stub.hosted.is_public:
            return stub
        if not isinstance(caller, Principal) or not may_use(caller, stub.hosted):
            return None
        self._repositories.check_credential(name, Right.PULL, caller)
        return stub

    # ── Listings ─────────────────────────────────────────────────────────────────────────────────────────────────────

    async def tags(self, name: RepositoryName, caller: Caller, *, last: str = "", limit: int | None = None) -> TagPage:
        """Tags behind `last`, in the order of (lower case, as written). limit: at most `MAX_TAGS`, which None stands for as well;
        0 gives an empty page that is the end."""
        repository = await self._repositories.find_existing(name, Right.PULL, caller)
        count = MAX_TAGS if limit is None else min(limit, MAX_TAGS)
        if not count:
            return TagPage(())
        found = await self._store.tags(repository.id, after=last, limit=count + 1)
        names = tuple(tag.name for tag in found[:count])
        return TagPage(names, names[-1] if len(found) > count else "")

    async def referrers(
        self, name: RepositoryName, subject: Digest, caller: Caller, *, artifact_type: str = "", last: str = ""
    ) -> ReferrerPage:
        """The manifests with that subject, which need not exist; nor need the repository for whoever could make it.
        artifact_type: only those. last: behind which digest to begin."""
        repository = await self._repositories.find_or_none(name, Right.PULL, caller)
        if repository is None:
            return ReferrerPage(referrers_index(()))
        found, has_more = await self._store.referrers(
            repository.id,
            subject,
            artifact_type=artifact_type,
            after=last,
            limit=MAX_REFERRERS,
            max_bytes=MAX_REFERRERS_BYTES,
        )
        return ReferrerPage(referrers_index(found), str(found[-1].digest) if has_more else "")


def _digest_of(reference: str) -> Digest | None:
    """The digest that a reference is, None for a tag, which holds no colon. Raises: digest_invalid."""
    return parse_content_digest(reference) if ":" in reference else None


def _tags_to_set(names: Sequence[str]) -> list[str]:
    if len(names) > MAX_TAG_PARAMETERS:
        raise CorralError("manifest_invalid", f"at most {MAX_TAG_PARAMETERS} tags can be set at once")
    tags = list(dict.fromkeys(parse_tag(name) for name in names))
    for tag in tags:
        if is_reserved_tag(tag):
            text = f"the tag {tag} cannot be pushed: clients read it as where to run the model"
            raise CorralError("manifest_invalid", text)
    return tags


async def _parsed(body: bytes, content_type: str, digest: Digest | None) -> NewManifest:
    """What is to be stored. digest: what the body must have, None where it is only to be named by tags."""
    if len(body) > MAX_MANIFEST_BYTES:
        raise CorralError("too_large", f"a manifest has at most {MAX_MANIFEST_BYTES} bytes")
    if len(body) > _PARSE_HERE_BYTES:
        return await asyncio.to_thread(new_manifest, body, content_type, digest)
    return new_manifest(body, content_type, digest)


def new_manifest(body: bytes, content_type: str, digest: Digest | None) -> NewManifest:
    """A manifest ready to be stored. digest: what the body must have, if anything. Raises: digest_invalid, manifest_invalid,
    too_large."""
    algorithm = digest.algorithm if digest else "sha256"
    actual = Digest(hashlib.new(algorithm, body).hexdigest(), algorithm)
    if digest not in (None, actual):
        raise CorralError("digest_invalid", f"the manifest has the digest {actual}, not {digest}")
    parsed = parse_image_manifest(body, content_type)
    return NewManifest(
        manifest=StoredManifest(digest=actual, media_type=parsed.media_type, body=body),
        blobs=tuple((blob.digest, blob.size_bytes) for blob in parsed.blobs),
        children=tuple(child.digest for child in parsed.children),
        subject=parsed.subject.digest if parsed.subject else None,
        artifact_type=parsed.referrer_type,
        annotations=parsed.annotations_json,
    )
