"""What the services need from the outside, as Protocols shaped by their consumers.

Adapters in storage, engines and clients implement these; the fakes of the tests do too, and both pass the suites in
tests/contracts. Everything that may touch a disk, a socket or a child process is async.
"""

from collections.abc import AsyncIterator, Collection, Iterable, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, Protocol

from corral.core.records import (
    Account,
    ApiKey,
    AuditEvent,
    BrowserSession,
    Device,
    HostedModel,
    Model,
    Scope,
    Sighting,
    StoredApiKey,
    UsageEntry,
)
from corral.wire.names import ModelName
from corral.wire.signing import DevicePrivateKey, DevicePublicKey


class Clock(Protocol):
    """The time of day and a steady counter."""

    def now(self) -> datetime:
        """Aware UTC."""
        ...

    def monotonic_ns(self) -> int:
        """For durations only."""
        ...


class Entropy(Protocol):
    """Unpredictable bytes."""

    def bytes(self, count: int) -> bytes:
        """count random bytes."""
        ...


class AccountStore(Protocol):
    """Accounts and their passwords' hashes. Names are unique without regard to case, also against deleted accounts; e-mail
    addresses among live ones. A deleted account is found by nothing."""

    async def add(self, account: Account, password_hash: str) -> None:
        """Raises: conflict when the name was ever taken or the e-mail address is in use."""
        ...

    async def by_id(self, account_id: str) -> Account | None: ...

    async def by_name(self, name: str) -> Account | None: ...

    async def by_email(self, email: str) -> Account | None: ...

    async def list(self) -> Sequence[Account]:
        """Oldest first."""
        ...

    async def password_hash(self, account_id: str) -> str:
        """Empty for an account that does not exist."""
        ...

    async def set_password_hash(self, account_id: str, password_hash: str, *, now: datetime) -> None:
        """Of a new password; the former one is refused for good."""
        ...

    async def renew_password_hash(self, account_id: str, password_hash: str) -> None:
        """Of the same password."""
        ...

    async def set_disabled(self, account_id: str, disabled_at: datetime | None) -> None:
        """Change this and nothing else, so that two changes at once do not undo each other. Raises: conflict when nobody would
        be left who is an administrator and not disabled."""
        ...

    async def set_admin(self, account_id: str, is_admin: bool, *, now: datetime) -> None:
        """As `set_disabled`."""
        ...

    async def set_quota(self, account_id: str, quota_bytes: int | None) -> None: ...

    async def remove(self, account_id: str, *, now: datetime) -> bool:
        """Delete for good; only the name stays taken. False when there is no such account. Raises: conflict as
        `set_disabled`."""
        ...


class SessionStore(Protocol):
    """Browser sessions and one-time codes."""

    async def add(self, session: BrowserSession) -> None: ...

    async def get(self, session_id: str) -> tuple[BrowserSession, Account] | None:
        """The session with its owner, whatever their state."""
        ...

    async def update(self, session: BrowserSession) -> None:
        """Store last_used_at, authenticated_at and expires_at."""
        ...

    async def remove(self, session_id: str) -> None: ...

    async def remove_all(self, account_id: str, *, except_id: str = "") -> None: ...

    async def of_account(self, account_id: str, *, now: datetime) -> Sequence[BrowserSession]:
        """Those that have not expired, latest used first."""
        ...

    async def put_code(self, purpose: str, digest: str, *, expires_at: datetime) -> None:
        """Remember a one-time code of a purpose, replacing any other of that purpose. digest: SHA-256 hex of the code."""
        ...

    async def has_code(self, purpose: str, digest: str, *, now: datetime) -> bool:
        """Whether the code could be taken now."""
        ...

    async def take_code(self, purpose: str, digest: str, *, now: datetime) -> bool:
        """Use the code up. True for exactly one caller."""
        ...


class CredentialStore(Protocol):
    """Devices, API keys and the nonces of strong signatures. `device` and `api_key` are on every request's path: one indexed
    read."""

    async def device(self, key: DevicePublicKey) -> tuple[Device, Account] | None:
        """The live (not revoked) device with this key, and its owner."""
        ...

    async def api_key(self, public_id: str) -> StoredApiKey | None:
        """The key, revoked or not, with its owner."""
        ...

    async def devices_of(self, account_id: str) -> Sequence[Device]: ...

    async def devices_with(self, ids: Collection[str]) -> Sequence[Device]:
        """Those with these ids, revoked ones included, whoever owns them; in no order. For what was written down of them."""
        ...

    async def add_device(self, device: Device) -> None:
        """Raises: conflict when a live device has this key, whoever owns it."""
        ...

    async def revoke_device(self, account_id: str, device_id: str, *, now: datetime) -> bool:
        """False when the account has no such live device."""
        ...

    async def rename_device(self, account_id: str, device_id: str, name: str) -> bool: ...

    async def set_device_scopes(self, account_id: str, device_id: str, scopes: frozenset[Scope], *, now: datetime) -> bool:
        """False when the account has no such live device."""
        ...

    async def api_keys_of(self, account_id: str) -> Sequence[ApiKey]: ...

    async def add_api_key(self, key: ApiKey, *, hmac: bytes, pepper_id: str, max_live: int | None = None) -> None:
        """max_live: how many live keys the account has at most afterwards. Raises: conflict when it would have more."""
        ...

    async def replace_api_key(
        self, old: ApiKey, new: ApiKey, *, hmac: bytes, pepper_id: str, old_ends_at: datetime, max_live: int | None = None
    ) -> bool:
        """Add the successor of a key and end the old one, both or neither: revoked when old_ends_at is the successor's birth,
        else expiring then, or earlier if it did before. False when the old key is no longer live as it was read, or has a
        successor already: of two who replace it at once, one does. Raises: conflict as `add_api_key`."""
        ...

    async def revoke_api_key(self, account_id: str, key_id: str, *, now: datetime) -> bool:
        """Durable before it returns. False when the account has no such live key."""
        ...

    async def record_use(self, uses: Iterable[tuple[str, datetime, str]]) -> None:
        """One batch of (credential id, last use, network); skipped rows are no error."""
        ...

    async def use_nonce(self, nonce: str, *, now: datetime, expires_at: datetime) -> bool:
        """True for the first caller only, until expires_at."""
        ...


class SightingStore(Protocol):
    """Unknown devices seen lately: capped, forgetful, never on disk for long."""

    async def record(self, sighting: Sighting) -> Sighting:
        """Keep it, or refresh the one kept for this key (its code and first_seen_at stay). Raises: rate_limited for a network
        with too many."""
        ...

    async def find(self, key: DevicePublicKey, *, since: datetime) -> Sighting | None: ...

    async def forget(self, key: DevicePublicKey) -> None: ...


class UsageStore(Protocol):
    """Who used how much. Entries are written in batches off the request path."""

    async def add(self, entries: Sequence[UsageEntry]) -> None: ...

    async def totals(self, account_id: str, *, since: datetime) -> Sequence[tuple[str, str, int, int, int]]:
        """(credential id, model, requests, prompt tokens, eval tokens) since then."""
        ...


class AuditLog(Protocol):
    """Append-only record of changes of authority."""

    async def append(self, event: AuditEvent) -> None:
        """Raises: unavailable when it cannot be written; the change it describes must then not happen."""
        ...

    async def recent(self, *, limit: int = 100) -> Sequence[AuditEvent]: ...


class HostedStore(Protocol):
    """Models the hub offers, and the manifests and blobs behind them."""

    async def list(self) -> Sequence[HostedModel]: ...

    async def get(self, name: str) -> HostedModel | None:
        """name: short form with tag, no `-cloud`, any case."""
        ...

    async def offer(self, model: HostedModel) -> None:
        """Add or replace."""
        ...

    async def offer_stored(self, name: ModelName, *, is_public: bool, now: datetime) -> None:
        """Offer what a repository of this hub has under that name, by that name. Raises: not_found."""
        ...

    async def withdraw(self, name: str) -> bool: ...


class ModelStore(Protocol):
    """The models of one machine, in Ollama's own layout."""

    async def list(self) -> Sequence[Model]:
        """Newest first. Manifests that cannot be read are skipped."""
        ...

    async def get(self, name: ModelName) -> Model | None:
        """Compared without regard to case."""
        ...


class DeviceKeys(Protocol):
    """The key of this installation."""

    def load(self) -> DevicePrivateKey | None:
        """None when there is none. Raises: invalid for a file that is damaged, readable by others or not ours."""
        ...

    def load_or_create(self) -> DevicePrivateKey: ...


# ── The hub, as a device sees it ─────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True, slots=True, kw_only=True)
class HubTerms:
    """What was agreed with a hub, once. signature: `corral-v1` or `stock`. public_url: what a strong signature covers and what
    links begin with, without trailing slash."""

    signature: str
    public_url: str


class HubMemory(Protocol):
    """Which hub this installation uses, and the terms agreed with each. Small and local, hence not async."""

    def hub(self) -> str:
        """The base URL saved by the last sign-in, empty when there was none. Raises: invalid when the memory is damaged."""
        ...

    def choose_hub(self, hub: str) -> None: ...

    def terms(self, hub: str) -> HubTerms | None:
        """Raises: invalid when the memory is damaged: guessing would undo an agreement."""
        ...

    def keep_terms(self, hub: str, terms: HubTerms) -> None: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class HubCall:
    """A request for the hub, to be signed. path: raw, begins with `/`. query: raw, without `?`. headers: lower-case names, as
    they travel; what concerns the connection or the proof is added by the gateway."""

    method: str
    path: str
    query: str = ""
    headers: Sequence[tuple[str, str]] = ()
    body: bytes = b""


@dataclass(frozen=True, slots=True, kw_only=True)
class HubReply:
    """A whole answer. headers: lower-case names."""

    status: int
    headers: Sequence[tuple[str, str]]
    body: bytes


class HubStream(Protocol):
    """An answer that is still arriving. Whoever opened it closes it."""

    @property
    def status(self) -> int: ...

    @property
    def headers(self) -> Sequence[tuple[str, str]]:
        """As received; lower-case names."""
        ...

    def chunks(self) -> AsyncIterator[bytes]:
        """The body as it arrives, not decoded. Raises: upstream_failed when it ends too early."""
        ...

    async def read(self, limit_bytes: int) -> bytes:
        """The body, cut off at the limit. Raises: upstream_failed."""
        ...

    async def close(self) -> None:
        """Give the connection back, or end it when the body was not read to its end. Safe to call twice."""
        ...


class HubGateway(Protocol):
    """Signed requests to the hub in use. All of it raises: upstream_failed when the hub cannot be reached, forbidden when it must
    not be signed for, invalid when this device's key or memory is damaged, clock_skew when the clock is too far off to sign."""

    async def signin_base(self) -> str:
        """The hub's public URL, which signin links begin with; without trailing slash."""
        ...

    def device_key(self) -> DevicePublicKey: ...

    async def send(self, call: HubCall) -> HubReply:
        """For small answers: the body is cut off at 1 MiB."""
        ...

    async def open_stream(self, call: HubCall) -> HubStream:
        """Returns as soon as status and headers are there. Redirects are answers like any other."""
        ...


# ── Running a model ──────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadOptions:
    """What fixes a runner at load time. num_ctx: tokens per slot. parallel: slots. context_shift: an answer that fills its
    context goes on, and the oldest half is forgotten. None means: the engine decides."""

    num_ctx: int = 4096
    parallel: int = 1
    num_batch: int | None = None
    num_gpu: int | None = None
    main_gpu: int | None = None
    num_thread: int | None = None
    use_mmap: bool | None = None
    embedding: bool = False
    context_shift: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """Options of one request, in llama.cpp's own names and units; only those that were asked for."""

    values: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class ChatCall:
    """A chat for the engine's own template. messages, tools: OpenAI shapes. response_format, think: as the engine takes them."""

    messages: Sequence[dict[str, Any]]
    tools: Sequence[dict[str, Any]] = ()
    response_format: dict[str, Any] | None = None
    template_kwargs: dict[str, Any] = field(default_factory=dict)
    sampling: Sampling = Sampling()


@dataclass(frozen=True, slots=True, kw_only=True)
class CompletionCall:
    """A prompt sent as it is. context: tokens that go before it. suffix: when set, what stands between prompt and suffix is asked
    for; the engine puts the model's own markers around them. preserved_tokens: special tokens whose text is wanted in the answer,
    where an engine would leave them out. media: files to be seen or heard where `[img-0]`, `[img-1]` … stand in the prompt."""

    prompt: str
    suffix: str = ""
    context: Sequence[int] = ()
    grammar_schema: dict[str, Any] | None = None
    sampling: Sampling = Sampling()
    preserved_tokens: Sequence[str] = ()
    media: Sequence[bytes] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Timings:
    """What the engine counted. prompt_tokens includes cached ones. Durations in ns."""

    prompt_tokens: int = 0
    prompt_ns: int = 0
    eval_tokens: int = 0
    eval_ns: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Chunk:
    """A piece of an answer. tool_calls: complete calls, OpenAI shape. logprobs: OpenAI token objects."""

    content: str = ""
    thinking: str = ""
    tool_calls: Sequence[dict[str, Any]] = ()
    logprobs: Sequence[dict[str, Any]] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Finish:
    """The end of an answer. reason: `stop` or `length`."""

    reason: str
    timings: Timings


class Runner(Protocol):
    """A loaded model. Closing an iterator early stops the generation."""

    def chat(self, call: ChatCall) -> AsyncIterator[Chunk | Finish]:
        """Raises: bad_request with the engine's words; engine_failed when the engine is gone."""
        ...

    def complete(self, call: CompletionCall) -> AsyncIterator[Chunk | Finish]:
        """Raises: as chat; bad_request with status 501 for a suffix when the model has no markers for it."""
        ...

    async def embed(self, texts: Sequence[str]) -> tuple[list[list[float]], int]:
        """One vector per text, as the engine gives it, and the tokens read."""
        ...

    async def tokenize(self, text: str, *, add_special: bool = True) -> list[int]: ...

    async def apply_template(self, call: ChatCall) -> str: ...

    async def is_healthy(self) -> bool: ...

    async def close(self) -> None:
        """End the engine process. Safe to call twice."""
        ...

    @property
    def memory_bytes(self) -> tuple[int, int]:
        """(all memory, of which on an accelerator)."""
        ...


class Engine(Protocol):
    """Starts runners."""

    async def load(self, model: Model, options: LoadOptions) -> Runner:
        """Start and wait until ready. Canceling it ends the process. Raises: bad_request when the weights are not readable as
        GGUF, out_of_memory, engine_failed with the engine's last words otherwise."""
        ...


class UpstreamRelay(Protocol):
    """Requests passed on, byte by byte, to the servers that run hosted models. Addresses are the operator's, never a caller's."""

    async def open_stream(self, base_url: str, path: str, body: bytes) -> HubStream:
        """POST a JSON body. base_url: without `/v1`. Returns as soon as status and headers are there; redirects are answers like
        any other. The upstream's own key is added here; nothing of the caller's request travels but the body. Raises:
        upstream_failed."""
        ...
