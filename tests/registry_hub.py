"""A whole registry in memory, the people who use it, and what they send."""

import json
from collections.abc import AsyncIterator, Mapping, Sequence

from corral.core.policy import ALL_SCOPES
from corral.core.records import Account, Principal, Proof, Scope
from corral.core.registry import Upload
from corral.hub.links import BlobLinks
from corral.hub.quotas import Quotas
from corral.hub.registry import Registry
from corral.hub.repositories import Caller, Repositories
from corral.hub.stubs import Stubs
from corral.hub.uploads import MAX_OPEN_UPLOADS, Uploads
from corral.wire.errors import CorralError
from corral.wire.manifest import CONFIG_TYPE, MANIFEST_TYPE, MODEL_LAYER
from corral.wire.names import Digest
from corral.wire.repositories import RepositoryName
from fakes import FakeClock, MemoryAccounts, MemoryAudit, MemoryCredentials, SeededEntropy
from fakes_models import MemoryHosting
from fakes_registry import FakeRegistryFiles, FakeRegistryStore, digest_of

HUB = "https://hub.example"
TINY, OTHER = RepositoryName("alice", "tiny"), RepositoryName("bob", "other")
LIBRARY = RepositoryName("library", "llama")


class RegistryHub:
    """The registry's services over fakes. quota_bytes, max_repositories: of each account, 0 for none."""

    def __init__(
        self,
        *,
        quota_bytes: int = 0,
        max_repositories: int = 0,
        max_open: int = MAX_OPEN_UPLOADS,
        hosted: MemoryHosting | None = None,
    ) -> None:
        self.clock, self.entropy, self.audit = FakeClock(), SeededEntropy(), MemoryAudit()
        self.accounts = MemoryAccounts()
        self.credentials = MemoryCredentials(self.accounts)
        self.store = FakeRegistryStore(self.accounts)
        self.files = FakeRegistryFiles(self.clock)
        self.repositories = Repositories(
            store=self.store,
            accounts=self.accounts,
            audit=self.audit,
            clock=self.clock,
            entropy=self.entropy,
            max_per_account=max_repositories,
        )
        self.quotas = Quotas(store=self.store, files=self.files, accounts=self.accounts, default_bytes=quota_bytes)
        self.links = BlobLinks(
            repositories=self.repositories, quotas=self.quotas, store=self.store, files=self.files, clock=self.clock
        )
        self.uploads = Uploads(
            repositories=self.repositories,
            links=self.links,
            quotas=self.quotas,
            store=self.store,
            files=self.files,
            clock=self.clock,
            entropy=self.entropy,
            max_open=max_open,
        )
        self.stubs = Stubs(hosted or MemoryHosting(), public_url=HUB, clock=self.clock)
        self.registry = Registry(
            repositories=self.repositories,
            uploads=self.uploads,
            links=self.links,
            stubs=self.stubs,
            store=self.store,
            files=self.files,
            clock=self.clock,
        )

    # ── People ───────────────────────────────────────────────────────────────────────────────────────────────────────

    async def add(self, name: str, *, is_admin: bool = False) -> Principal:
        """An account, as it sends requests with an API key that may do everything."""
        account = Account(id=f"a-{name.lower()}", name=name, email="", is_admin=is_admin, created_at=self.clock.now())
        await self.accounts.add(account, "")
        return with_key(account)

    # ── What is pushed ───────────────────────────────────────────────────────────────────────────────────────────────

    async def push_blob(self, name: RepositoryName, caller: Caller, content: bytes, *, algorithm: str = "sha256") -> Digest:
        """A blob, in one request."""
        return await self.registry.put_blob(name, caller, digest_of(content, algorithm), chunks(content), length=len(content))

    async def push(self, name: RepositoryName, caller: Caller, *blobs: bytes, tag: str = "latest") -> Digest:
        """A model of those blobs under a tag; the digest of its manifest."""
        for content in blobs or (b"weights",):
            await self.push_blob(name, caller, content)
        await self.push_blob(name, caller, CONFIG)
        digest, _ = await self.registry.put_manifest(name, tag, caller, a_manifest(*blobs or (b"weights",)), MANIFEST_TYPE)
        return digest

    async def start(self, name: RepositoryName, caller: Caller) -> Upload:
        """A plain upload."""
        started = await self.registry.start_upload(name, caller)
        assert isinstance(started, Upload)
        return started


CONFIG = b'{"model_format":"gguf"}'


def with_key(account: Account, scopes: frozenset[Scope] = ALL_SCOPES) -> Principal:
    """Somebody with an API key."""
    return Principal(account=account, proof=Proof.API_KEY, credential_id=f"key-{account.name}", scopes=scopes)


def with_token(account: Account, grants: Mapping[str, Sequence[str]], scopes: frozenset[Scope] = ALL_SCOPES) -> Principal:
    """Somebody with a registry token that is good for those repositories and actions."""
    return Principal(
        account=account,
        proof=Proof.REGISTRY_TOKEN,
        credential_id=f"key-{account.name}",
        scopes=scopes,
        grants={name: frozenset(actions) for name, actions in grants.items()},
    )


async def chunks(*pieces: bytes) -> AsyncIterator[bytes]:
    """A request's body."""
    for piece in pieces:
        yield piece


async def broken(*pieces: bytes) -> AsyncIterator[bytes]:
    """A body that ends too early, as the edge reports it."""
    for piece in pieces:
        yield piece
    raise CorralError("canceled")


def a_manifest(*blobs: bytes, **members: object) -> bytes:
    """A model's manifest of those layers and `CONFIG`."""
    document = {
        "schemaVersion": 2,
        "mediaType": MANIFEST_TYPE,
        "config": {"mediaType": CONFIG_TYPE, "digest": str(digest_of(CONFIG)), "size": len(CONFIG)},
        "layers": [{"mediaType": MODEL_LAYER, "digest": str(digest_of(blob)), "size": len(blob)} for blob in blobs],
    }
    return json.dumps({**document, **members}).encode()
