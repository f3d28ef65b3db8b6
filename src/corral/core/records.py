"""The things Corral keeps, as frozen values. Times are aware UTC; ids are random, opaque and never reused."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from enum import StrEnum

from corral.wire.authorized_keys import AuthorizedKey
from corral.wire.names import Digest, ModelName
from corral.wire.signing import DevicePublicKey


class Scope(StrEnum):
    """What a credential may be used for."""

    INFERENCE = "inference"
    PULL = "models:pull"
    PUSH = "models:push"
    KEYS = "keys"


class Proof(StrEnum):
    """How a request proved who sends it."""

    STOCK_SIGNATURE = "stock-signature"
    STRONG_SIGNATURE = "strong-signature"
    API_KEY = "api-key"
    SESSION = "session"
    REGISTRY_TOKEN = "registry-token"  # noqa: S105 - a kind of proof


@dataclass(frozen=True, slots=True, kw_only=True)
class Account:
    """A person or a team on this hub. name: as chosen, unique without regard to case. quota_bytes: of all its repositories, None
    where the hub's default counts."""

    id: str
    name: str
    email: str
    is_admin: bool
    created_at: datetime
    disabled_at: datetime | None = None
    quota_bytes: int | None = None

    @property
    def is_active(self) -> bool:
        """Whether the account may do anything at all."""
        return self.disabled_at is None


@dataclass(frozen=True, slots=True, kw_only=True)
class Device:
    """A connected installation. name: chosen by the device, never verified."""

    id: str
    account_id: str
    name: str
    key: DevicePublicKey
    scopes: frozenset[Scope]
    created_at: datetime
    last_used_at: datetime | None = None
    last_network: str = ""
    revoked_at: datetime | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class ApiKey:
    """A stored API key: everything but the secret. id: the public id inside the key's text. prefix: what listings show.
    successor_id: of the key that it was rotated into, else empty."""

    id: str
    account_id: str
    name: str
    prefix: str
    scopes: frozenset[Scope]
    created_at: datetime
    expires_at: datetime | None = None
    last_used_at: datetime | None = None
    revoked_at: datetime | None = None
    successor_id: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredApiKey:
    """One row read: the key, its owner, and what its text is checked against."""

    key: ApiKey
    owner: Account
    hmac: bytes
    pepper_id: str


@dataclass(frozen=True, slots=True, kw_only=True)
class BrowserSession:
    """A signed-in browser. id: SHA-256 hex of the cookie's value. csrf: the token its forms carry."""

    id: str
    account_id: str
    csrf: str
    created_at: datetime
    authenticated_at: datetime
    last_used_at: datetime
    expires_at: datetime
    user_agent: str = ""
    network: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sighting:
    """An unknown device that proved it holds its key: what a connect page needs to have seen. code: one-time, in the signin
    link."""

    key: DevicePublicKey
    code: str
    network: str
    first_seen_at: datetime
    last_seen_at: datetime


@dataclass(frozen=True, slots=True, kw_only=True)
class Principal:
    """Who sends a request and how that was proven. scopes: what this credential allows, already cut to what the owner may do.
    expires_at: of an API key that has one; what it makes must not outlive it. grants: of a registry token, repository ->
    actions; None for a credential that is not bound to repositories. authorized: the line of a local server's `authorized_keys`
    that lets the caller in; None on a hub."""

    account: Account
    proof: Proof
    credential_id: str
    scopes: frozenset[Scope]
    device: Device | None = None
    session: BrowserSession | None = None
    expires_at: datetime | None = None
    grants: Mapping[str, frozenset[str]] | None = None
    authorized: AuthorizedKey | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Visitor:
    """Somebody who proved nothing but holds a registry token for what is public. fingerprint: of a device key that signed for the
    token and is connected to no account, else empty. signin_url: where to connect it. key: that key itself."""

    fingerprint: str = ""
    signin_url: str = ""
    key: DevicePublicKey | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestFacts:
    """What authentication may look at, exactly as received.

    target: raw path and, behind `?`, raw query. headers: lower-case name -> every value sent under it. body: read before the
    check, because a strong signature covers it. network: the peer's address as text. is_secure: whether it came over TLS or
    loopback.
    """

    method: str
    target: str
    headers: dict[str, list[str]]
    body: bytes
    network: str
    is_secure: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class UsageEntry:
    """One request that ran a model. duration_ns: from admission to the last byte. outcome: `ok`, `canceled` or an error code."""

    account_id: str
    credential_id: str
    proof: Proof
    model: str
    path: str
    started_at: datetime
    duration_ns: int
    prompt_tokens: int
    eval_tokens: int
    outcome: str


@dataclass(frozen=True, slots=True, kw_only=True)
class AuditEvent:
    """Something that changed who may do what. action: `key.create`, `device.connect` … subject: an id, never a secret."""

    at: datetime
    actor: str
    action: str
    subject: str
    network: str = ""
    note: str = ""


class Capability(StrEnum):
    """What a model can do, in Ollama's words."""

    COMPLETION = "completion"
    TOOLS = "tools"
    INSERT = "insert"
    VISION = "vision"
    EMBEDDING = "embedding"
    THINKING = "thinking"
    AUDIO = "audio"
    IMAGE = "image"


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelDetails:
    """`details` of tags, ps and show. Empty text where unknown."""

    format: str = ""
    family: str = ""
    families: tuple[str, ...] = ()
    parameter_size: str = ""
    quantization_level: str = ""
    context_length: int | None = None
    embedding_length: int | None = None
    parent_model: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Model:
    """A model that can be listed, shown and run, wherever its manifest lives (a home directory or the hub's database).

    digest: of the manifest, as listings show it. size_bytes: all layers and the config. weights: path of the GGUF file, None for
    a stub. template, system: of the Modelfile layers, empty when absent. parameters: Modelfile PARAMETERs, wire names.
    metadata: GGUF key/values without arrays' contents; projector_metadata: the projector's. tensors: the tensor table as JSON, as
    /api/show lists it. draft: path of a small model that drafts for this one. licenses: each on its own, license all of them.
    remote_host, remote_model: set on a stub.
    """

    name: ModelName
    digest: Digest
    size_bytes: int
    modified_at: datetime
    details: ModelDetails
    capabilities: frozenset[Capability]
    weights: str | None = None
    projector: str | None = None
    adapters: tuple[str, ...] = ()
    template: str = ""
    chat_template: str = ""
    system: str = ""
    license: str = ""
    parameters: dict[str, object] = field(default_factory=dict)
    messages: tuple[tuple[str, str], ...] = ()
    metadata: dict[str, object] = field(default_factory=dict)
    remote_host: str = ""
    remote_model: str = ""
    licenses: tuple[str, ...] = ()
    draft: str | None = None
    renderer: str = ""
    parser: str = ""
    requires: str = ""
    tensors: bytes = b"[]"
    projector_metadata: dict[str, object] = field(default_factory=dict)

    @property
    def is_stub(self) -> bool:
        """Whether the model runs somewhere else."""
        return bool(self.remote_host)


@dataclass(frozen=True, slots=True, kw_only=True)
class HostedModel:
    """A model the hub offers for inference. name: what callers ask for, without `-cloud`.

    Either model is set (weights this hub runs) or upstream_url (an OpenAI-compatible server, without `/v1`).
    """

    name: str
    model: Model | None = None
    upstream_url: str = ""
    upstream_model: str = ""
    is_public: bool = True
    created_at: datetime
