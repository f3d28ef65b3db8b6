"""The pull-through mirror: repositories of other registries, fetched when somebody first asks, verified, kept and served.

Only what the operator's rules name is mirrored, and only into repositories that the mirror itself made; those are public, because
what is in them is. What happens when a manifest is asked for:

```
kept, by digest or asked upstream lately     served as it is
kept, but the tag may have moved             asked upstream; what upstream cannot say is answered from what is kept
not kept                                     asked upstream, answered at once, and kept with all its blobs in the background
```

A manifest can be stored only when its blobs are there, so until then it is answered from memory. A blob that is on its way is
waited for; it is served once it was verified, never before, so that nobody gets bytes that its digest does not prove (T94, T120).
Each blob is fetched once however many wait for it, and goes on arriving when they stop waiting.

Upstream is not trusted: everything it sends is bounded before it is read, a digest proves what it names, and a blob that others
pushed to this hub is fetched all the same, so that no upstream can publish it by knowing its digest. Whatever goes wrong there is
`upstream_failed` here, never a 401 or 404 of ours, and is not tried again for a while.
"""

import asyncio
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from corral.core.ports import AccountStore, Clock, Entropy
from corral.core.registry import NewManifest, RegistryFiles, RegistryStore, Repository, StoredManifest, Visibility
from corral.core.transfer_ports import RegistryGateway, RemoteManifest, RemoteRepository
from corral.hub.links import BlobLinks
from corral.hub.mirror_blobs import Kept, MirrorBlobs, MirrorLimits, Question, patience, told, trouble, url_of
from corral.hub.quotas import Quotas
from corral.hub.registry import BlobFacts, Registry, new_manifest
from corral.hub.repositories import Caller, Repositories, is_hub_namespace
from corral.hub.sharing import Remembered, SharedWork
from corral.hub.stubs import Stubs
from corral.hub.uploads import Uploads
from corral.wire.errors import CorralError
from corral.wire.mirrors import MirrorRule, upstream_of
from corral.wire.names import Digest, parse_content_digest
from corral.wire.repositories import RepositoryName, is_reserved_tag, is_tag

_ID_BYTES = 12
#: Indexes of indexes that are followed.
_MAX_LEVELS = 3
#: What the registry says of something that a mirror may have.
_ABSENCES = frozenset({"manifest_unknown", "name_unknown", "unauthorized"})

_log = logging.getLogger("corral.mirror")


@dataclass(frozen=True, slots=True)
class _Place:
    """A name that a rule allows: where it is upstream, and the repository here, None before anything was kept."""

    name: RepositoryName
    remote: RemoteRepository
    repository: Repository | None


@dataclass(slots=True)
class _Arrival:
    """A manifest whose blobs are being fetched. base_url: its upstream. answers: it and, of an index, those below it, by tag or
    digest as text. sizes: of the blobs."""

    base_url: str
    answers: dict[str, StoredManifest] = field(default_factory=dict)
    sizes: dict[Digest, int] = field(default_factory=dict)


class Mirror:
    """What is kept here of other registries."""

    def __init__(
        self,
        rules: Sequence[MirrorRule],
        *,
        gateway: RegistryGateway,
        store: RegistryStore,
        files: RegistryFiles,
        quotas: Quotas,
        accounts: AccountStore,
        clock: Clock,
        entropy: Entropy,
        background: SharedWork,
        limits: MirrorLimits | None = None,
    ) -> None:
        self._rules = rules
        self._gateway = gateway
        self._store = store
        self._accounts = accounts
        self._clock = clock
        self._entropy = entropy
        self._limits = limits or MirrorLimits()
        self._shared = background
        self._remembered = Remembered(clock)
        self._arrivals: dict[tuple[str, Digest], _Arrival] = {}
        self._blobs = MirrorBlobs(
            gateway=gateway,
            store=store,
            files=files,
            quotas=quotas,
            clock=clock,
            entropy=entropy,
            background=background,
            limits=self._limits,
        )

    # ── What is asked of it ──────────────────────────────────────────────────────────────────────────────────────────

    async def manifest(self, name: RepositoryName, reference: str) -> StoredManifest | None:
        """The manifest of a mirrored repository, fetched if need be; None when there is none or the name is not mirrored, so that
        whoever asks goes on as without a mirror. Raises: upstream_failed, storage_full, busy, when nothing is kept either."""
        # Where a tag says where to run a model, it is this hub that answers.
        if is_reserved_tag(reference) or not (is_tag(reference) or ":" in reference):
            return None
        wanted = parse_content_digest(reference) if ":" in reference else reference
        place = await self._place_of(name)
        if place is None:
            return None
        kept = await self._store.manifest(place.repository.id, wanted) if place.repository else None
        if kept is not None and isinstance(wanted, Digest):
            return kept
        return self._arriving(place, reference) or await self._current(place, wanted, kept)

    async def have_blob(self, name: RepositoryName, digest: Digest) -> None:
        """Have a blob of a mirrored repository kept here before this returns, if its upstream has it. Waits for as long as it
        takes. Raises: upstream_failed, storage_full, busy."""
        place = await self._place_of(name)
        if place is None or place.repository is None:
            return
        kept = Kept(place.repository, place.remote)
        if await self._blobs.is_here(kept, digest):
            return
        size_bytes = self._arriving_size(kept, digest)
        if size_bytes is None:
            self._blobs.check_queue(kept.remote)
            async with patience(kept.remote, self._limits.answer_s):
                size_bytes = await self._blobs.size_of(kept, digest)
        if size_bytes is not None:
            await self._blobs.need(kept, digest, size_bytes)

    async def _place_of(self, name: RepositoryName) -> _Place | None:
        found = upstream_of(self._rules, name)
        if found is None or await self._is_somebodys(name.namespace):
            return None
        repository = await self._store.repository(name.namespace, name.name)
        if repository is not None:
            # In the spelling that it was first asked for in: there may be only one that upstream understands.
            name = RepositoryName(repository.namespace, repository.name)
            found = upstream_of(self._rules, name) or found
        remote = RemoteRepository(*found)
        if repository is not None and not _is_kept_from(repository, remote):
            return None
        return _Place(name, remote, repository)

    async def _is_somebodys(self, namespace: str) -> bool:
        """Whether an account has that name: what it pushes is its own affair, whatever the operator's rules say."""
        return not is_hub_namespace(namespace) and await self._accounts.by_name(namespace) is not None

    def _arriving(self, place: _Place, reference: str) -> StoredManifest | None:
        if place.repository is None:
            return None
        found = (arrival.answers.get(reference) for arrival in self._arrivals_of(place.repository))
        return next((manifest for manifest in found if manifest is not None), None)

    def _arriving_size(self, kept: Kept, digest: Digest) -> int | None:
        sizes = (arrival.sizes.get(digest) for arrival in self._arrivals_of(kept.repository))
        return next((size_bytes for size_bytes in sizes if size_bytes is not None), None)

    def _arrivals_of(self, repository: Repository) -> Iterator[_Arrival]:
        return (arrival for (repository_id, _), arrival in self._arrivals.items() if repository_id == repository.id)

    # ── Manifests ────────────────────────────────────────────────────────────────────────────────────────────────────

    async def _current(self, place: _Place, wanted: str | Digest, kept: StoredManifest | None) -> StoredManifest | None:
        """What upstream says now or said lately, and what is kept where it says nothing."""
        question = Question(str(place.name), str(wanted))
        try:
            # That something does not exist upstream is remembered as well, and does not make away with what is kept.
            if self._remembered.holds(question) or (kept is not None and self._remembered.holds(question.when_fresh)):
                return kept
            self._blobs.check_queue(place.remote)
            async with patience(place.remote, self._limits.answer_s if kept is None else self._limits.kept_answer_s):
                return await self._shared.do(question, lambda: self._ask(place, wanted, question)) or kept
        except CorralError as error:
            if kept is None:
                raise
            _log.warning("%s is served as it was kept: %s", place.name, error.message)
            self._remembered.note(question.when_fresh, self._limits.failed_s)
            return kept

    async def _ask(self, place: _Place, wanted: str | Digest, question: Question) -> StoredManifest | None:
        """What upstream has under that reference now. It is kept from here on, or on its way to be."""
        try:
            new = await self._fetch_manifest(place.remote, str(wanted))
            if new is None:
                self._remembered.note(question, self._limits.absent_s)
                return None
            kept = Kept(place.repository or await self._make_repository(place), place.remote)
            await self._welcome(kept, new, wanted, question)
        except CorralError as error:
            self._remembered.note(question, self._limits.failed_s, error)
            raise
        self._remembered.note(question.when_fresh, self._limits.fresh_s)
        return new.manifest

    async def _fetch_manifest(self, remote: RemoteRepository, reference: str) -> NewManifest | None:
        async with self._blobs.asking(remote):
            sent = await self._gateway.manifest(remote, reference)
            return None if sent is None else await asyncio.to_thread(_read, sent, reference)

    async def _make_repository(self, place: _Place) -> Repository:
        now = self._clock.now()
        repository = await self._store.add_repository(
            Repository(
                id="r" + self._entropy.bytes(_ID_BYTES).hex(),
                namespace=place.name.namespace,
                name=place.name.name,
                visibility=Visibility.PUBLIC,
                created_at=now,
                updated_at=now,
                mirrored_from=url_of(place.remote),
            )
        )
        if not _is_kept_from(repository, place.remote):
            raise CorralError("busy", f"{place.name} is being pushed here just now; try again", retry_after_s=1)
        return repository

    async def _welcome(self, kept: Kept, new: NewManifest, wanted: str | Digest, question: Question) -> None:
        """Begin to keep a manifest, unless it is kept already and only its tag has to be set."""
        tags = [wanted] if isinstance(wanted, str) else []
        digest = new.manifest.digest
        if await self._store.manifest(kept.repository.id, digest) is not None:
            await self._store.put_manifest(kept.repository.id, new, tags, now=self._clock.now())
            return
        answers = dict.fromkeys((str(digest), *tags), new.manifest)
        arrival = self._arrivals.get((kept.repository.id, digest))
        if arrival is not None:
            arrival.answers |= answers
            return
        # Per upstream: one that sends a byte now and then must not keep the others' models away for ever (T102).
        if sum(one.base_url == kept.remote.base_url for one in self._arrivals.values()) >= self._limits.models_at_once:
            raise CorralError("busy", "too many models are being fetched from their registry; try again", retry_after_s=30)
        self._check_sizes(kept.remote, [new])
        arrival = self._arrivals[kept.repository.id, digest] = _Arrival(kept.remote.base_url, answers, dict(new.blobs))
        self._shared.begin(("arrival", kept.repository.id, digest), lambda: self._keep(kept, new, arrival, question))

    async def _keep(self, kept: Kept, new: NewManifest, arrival: _Arrival, question: Question) -> None:
        """Fetch all that a manifest names, and store it with the tags it was asked for by."""
        try:
            below: dict[Digest, NewManifest] = {}
            await self._fetch_below(kept.remote, new, below, arrival)
            arrival.sizes |= {digest: size_bytes for one in below.values() for digest, size_bytes in one.blobs}
            await self._blobs.need_all(kept, arrival.sizes)
            for one in below.values():
                await self._store.put_manifest(kept.repository.id, one, [], now=self._clock.now())
            tags = [reference for reference in arrival.answers if is_tag(reference)]
            await self._store.put_manifest(kept.repository.id, new, tags, now=self._clock.now())
        except CorralError as error:
            shown = told(error, kept.remote)
            _log.warning("%s cannot be kept: %s", kept.repository.path, shown.message)
            self._remembered.forget(question.when_fresh)
            self._remembered.note(question, self._limits.failed_s, shown)
        finally:
            del self._arrivals[kept.repository.id, new.manifest.digest]

    async def _fetch_below(
        self, remote: RemoteRepository, new: NewManifest, found: dict[Digest, NewManifest], arrival: _Arrival, *, level: int = 1
    ) -> None:
        """The manifests below an index, each before the one that names it. They are answered from then on."""
        if new.children and level > _MAX_LEVELS:
            raise trouble(remote, f"it is an index of more than {_MAX_LEVELS} levels")
        if len(found) + len(new.children) > self._limits.max_manifests:
            raise trouble(remote, f"it is an index of more than {self._limits.max_manifests} manifests")
        for digest in new.children:
            if digest in found:
                continue
            child = await self._fetch_manifest(remote, str(digest))
            if child is None:
                raise trouble(remote, "a manifest that its index names is not there")
            await self._fetch_below(remote, child, found, arrival, level=level + 1)
            found[digest] = child
            arrival.answers[str(digest)] = child.manifest
            self._check_sizes(remote, [new, *found.values()])

    def _check_sizes(self, remote: RemoteRepository, manifests: Sequence[NewManifest]) -> None:
        limits = self._limits
        sizes = {digest: size_bytes for new in manifests for digest, size_bytes in new.blobs}
        index_bytes = sum(len(new.manifest.body) for new in manifests)
        if sum(sizes.values()) > limits.max_manifest_bytes:
            raise trouble(remote, f"it claims to have more than {limits.max_manifest_bytes} bytes")
        if index_bytes > limits.max_index_bytes:
            raise trouble(remote, f"its manifests have more than {limits.max_index_bytes} bytes")


class MirroredRegistry(Registry):
    """A registry that looks to a mirror for what it does not have, and for where tags point now."""

    def __init__(
        self,
        mirror: Mirror,
        *,
        repositories: Repositories,
        uploads: Uploads,
        links: BlobLinks,
        stubs: Stubs,
        store: RegistryStore,
        files: RegistryFiles,
        clock: Clock,
    ) -> None:
        super().__init__(
            repositories=repositories, uploads=uploads, links=links, stubs=stubs, store=store, files=files, clock=clock
        )
        self._mirror = mirror

    async def manifest(self, name: RepositoryName, reference: str, caller: Caller) -> StoredManifest:
        """As in any registry. Raises also: upstream_failed, storage_full, busy."""
        if is_tag(reference):
            return await self._mirror.manifest(name, reference) or await super().manifest(name, reference, caller)
        try:
            return await super().manifest(name, reference, caller)
        except CorralError as error:
            # unauthorized: nobody needs a token for what is mirrored.
            found = await self._mirror.manifest(name, reference) if error.code in _ABSENCES else None
            if found is None:
                raise
            return found

    async def blob(self, name: RepositoryName, digest: Digest, caller: Caller) -> BlobFacts:
        """As in any registry; waits for a blob that is being fetched. Raises also: upstream_failed, storage_full, busy."""
        try:
            return await super().blob(name, digest, caller)
        except CorralError as error:
            if error.code != "blob_unknown":
                raise
        await self._mirror.have_blob(name, digest)
        return await super().blob(name, digest, caller)


def _read(sent: RemoteManifest, reference: str) -> NewManifest:
    """The manifest that an upstream sent. Its own media type counts, since some registries send any manifest as plain text; the
    header does where it has none. Raises: manifest_invalid, digest_invalid, too_large."""
    digest = parse_content_digest(reference) if ":" in reference else None
    try:
        return new_manifest(sent.body, "", digest)
    except CorralError:
        return new_manifest(sent.body, sent.media_type, digest)


def _is_kept_from(repository: Repository, remote: RemoteRepository) -> bool:
    """Whether the mirror made the repository, and still keeps it: its owner may have closed it, its rule may have changed."""
    is_same = repository.mirrored_from.lower() == url_of(remote).lower()
    return is_same and repository.visibility is Visibility.PUBLIC
