"""The composition root: the only place that names concrete adapters and hands them to services and edges.

Each half is put together by a function of its own, whose imports stand inside it: a local server never loads the database, a hub
never loads the cloud relay, and an administration command loads neither HTTP server. That keeps starts short and memory small
(docs/performance.md, P14).
"""

import asyncio
import contextlib
import gc
import logging
import os
import socket
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import corral
from corral.settings import DEFAULT_HUB, Address, BadSetting, Settings
from corral.wire.errors import CorralError

if TYPE_CHECKING:
    from corral.clients.hub import HubClient
    from corral.clients.registry import RegistryClient
    from corral.core.ports import AuditLog, HubMemory, UsageStore
    from corral.core.transfer_ports import RegistryGateway
    from corral.edges.asgi import App, Endpoint
    from corral.engines.upstream import UpstreamEngine
    from corral.hub.accounts import Accounts
    from corral.hub.catalog import Catalog
    from corral.hub.collector import Collected, Collector
    from corral.hub.credentials import Credentials
    from corral.hub.describing import Describing
    from corral.hub.inference import HostedInference
    from corral.hub.mirror import Mirror
    from corral.hub.quotas import Quotas
    from corral.hub.registry import Registry
    from corral.hub.repositories import Repositories
    from corral.hub.sharing import SharedWork
    from corral.hub.tickets import Tickets
    from corral.hub.tokens import RegistryTokens
    from corral.hub.uploads import Uploads
    from corral.local.creating import Pull
    from corral.local.library import Library
    from corral.serving.runners import Runners
    from corral.storage.home import HomeModels
    from corral.storage.partials import BlobInbox
    from corral.storage.sql.engine import Database
    from corral.storage.sql.hosting import SqlHosting
    from corral.storage.sql.registry import SqlRegistry
    from corral.storage.uploads import UploadFiles
    from corral.wire.tokens import TokenKeys

_FLUSH_USES_EVERY_S = 60.0
_FOR_EVER_S = 1e9
#: What 0 stands for. Ollama answers one request at a time by default; slots share the weights, so four cost little.
_MAX_LOADED, _PARALLEL = 3, 4
#: Told to the supervisor or the terminal once a server answers.
OnReady = Callable[[dict[str, Any]], None]

_log = logging.getLogger("corral.server")


class SystemClock:
    """The machine's clocks."""

    def now(self) -> datetime:
        """Aware UTC."""
        return datetime.now(UTC)

    def monotonic_ns(self) -> int:
        """For durations only."""
        return time.monotonic_ns()


class SystemEntropy:
    """The kernel's random numbers."""

    def bytes(self, count: int) -> bytes:
        """count random bytes."""
        return os.urandom(count)


def set_up_process(settings: Settings) -> None:
    """What every server process does first: logs, and no core dumps, which would hold keys and prompts."""
    from corral.logs import set_up_logging

    set_up_logging(settings.debug)
    with contextlib.suppress(ImportError, ValueError, OSError):
        import resource

        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def check_free(host: str, port: int) -> None:
    """Raises: conflict when something listens there already; see edges.port."""
    from corral.edges.port import check_free

    check_free(host, port)


def device_name() -> str:
    """What this machine calls itself, for the connect page."""
    return socket.gethostname().partition(".")[0] or "device"


# ── The hub, as a device sees it ─────────────────────────────────────────────────────────────────────────────────────


def hub_memory(settings: Settings) -> "HubMemory":
    """Which hub was chosen, and what was agreed with each."""
    from corral.storage.hubstate import HubStateFile

    return HubStateFile(settings.home / ".ollama" / "corral.json")


@contextlib.asynccontextmanager
async def hub_client(settings: Settings, hub: str | Callable[[], str]) -> "AsyncIterator[HubClient]":
    """Signed requests to a hub, as this device. hub: its base URL, or where to ask for it each time."""
    from corral.clients.hub import HubClient, open_session
    from corral.storage.home import FileDeviceKeys

    entropy = SystemEntropy()
    async with open_session() as session:
        yield HubClient(
            (lambda: hub) if isinstance(hub, str) else hub,
            FileDeviceKeys(settings.home / ".ollama", entropy),
            memory=hub_memory(settings),
            clock=SystemClock(),
            entropy=entropy,
            session=session,
            device_name=device_name(),
            version=corral.__version__,
        )


# ── The hub ──────────────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True, slots=True, kw_only=True)
class HubServices:
    """The hub without its HTTP: what pages, API and administration commands share."""

    accounts: "Accounts"
    credentials: "Credentials"
    tokens: "RegistryTokens"
    token_keys: "TokenKeys"
    hosted: "SqlHosting"
    usage: "UsageStore"
    audit: "AuditLog"
    database: "Database"
    clock: SystemClock

    async def is_ready(self) -> bool:
        """Whether the database answers."""
        try:
            return bool(await self.database.read(lambda connection: connection.exec_driver_sql("SELECT 1").scalar_one()))
        except CorralError:
            return False


def _database_path(settings: Settings) -> Path:
    url = settings.database_url
    if not url:
        return settings.corral_home / "hub.db"
    if not url.startswith("sqlite:///"):
        raise BadSetting("CORRAL_DATABASE_URL: this release keeps its database in SQLite; use sqlite:///path or leave it out")
    return Path(url.removeprefix("sqlite:///"))


@contextlib.asynccontextmanager
async def open_hub_services(settings: Settings) -> AsyncIterator[HubServices]:
    """The hub's services on its data in CORRAL_HOME, which several processes may have open at once."""
    from corral.hub.accounts import AccountRules, Accounts
    from corral.hub.credentials import Credentials
    from corral.hub.sightings import MemorySightings
    from corral.hub.tokens import RegistryTokens
    from corral.storage.describe import BoundedReader
    from corral.storage.secretfile import ensure_private_dir, load_or_create_peppers, load_or_create_token_keys
    from corral.storage.sql.accounts import SqlAccounts
    from corral.storage.sql.audit import SqlAudit
    from corral.storage.sql.credentials import SqlCredentials
    from corral.storage.sql.engine import open_database
    from corral.storage.sql.hosting import SqlHosting
    from corral.storage.sql.sessions import SqlSessions
    from corral.storage.sql.usage import SqlUsage

    clock, entropy, home = SystemClock(), SystemEntropy(), settings.corral_home
    ensure_private_dir(home)
    database = await asyncio.to_thread(open_database, _database_path(settings))
    # What is made below CORRAL_HOME is for its owner alone, also by code that asks for no mode.
    umask = os.umask(0o077)
    try:
        audit = SqlAudit(database)
        accounts = Accounts(
            accounts=SqlAccounts(database),
            sessions=SqlSessions(database),
            audit=audit,
            clock=clock,
            entropy=entropy,
            rules=AccountRules(
                sign_up_open=settings.is_signup_open,
                reserved_names=frozenset(rule.namespace for rule in settings.mirrors),
            ),
        )
        token_keys = load_or_create_token_keys(home / "registry-keys.json", entropy, now=clock.now())
        tokens = RegistryTokens(token_keys, issuer=settings.public_url, clock=clock, entropy=entropy)
        credentials = Credentials(
            accounts=accounts,
            store=SqlCredentials(database),
            sightings=MemorySightings(),
            audit=audit,
            clock=clock,
            entropy=entropy,
            peppers=load_or_create_peppers(home / "peppers.json", entropy),
            tokens=tokens,
            public_url=settings.public_url,
        )
        yield HubServices(
            accounts=accounts,
            credentials=credentials,
            tokens=tokens,
            token_keys=token_keys,
            hosted=SqlHosting(database, home / "blobs", home / "cache", clock=clock, entropy=entropy, read_facts=BoundedReader()),
            usage=SqlUsage(database),
            audit=audit,
            database=database,
            clock=clock,
        )
    finally:
        os.umask(umask)
        await database.close()


@dataclass(frozen=True, slots=True, kw_only=True)
class RegistryServices:
    """The hub's registry without its HTTP."""

    repositories: "Repositories"
    registry: "Registry"
    catalog: "Catalog"
    describing: "Describing"
    uploads: "Uploads"
    collector: "Collector"
    tickets: "Tickets"
    store: "SqlRegistry"
    files: "UploadFiles"


def registry_services(settings: Settings, services: HubServices, mirroring: "Mirroring | None" = None) -> RegistryServices:
    """The registry over a hub's services; what it keeps is among their data. mirroring: how other registries are reached, None
    where only what is here counts."""
    from corral.hub.catalog import Catalog
    from corral.hub.collector import Collector
    from corral.hub.describing import Describing
    from corral.hub.links import BlobLinks
    from corral.hub.mirror import MirroredRegistry
    from corral.hub.quotas import Quotas
    from corral.hub.registry import Registry
    from corral.hub.repositories import Repositories
    from corral.hub.stubs import Stubs
    from corral.hub.tickets import Tickets
    from corral.hub.uploads import Uploads
    from corral.storage.describe import BlobDescriber, BoundedReader
    from corral.storage.locks import held_alone
    from corral.storage.sql.accounts import SqlAccounts
    from corral.storage.sql.catalog import SqlCatalog
    from corral.storage.sql.credentials import SqlCredentials
    from corral.storage.sql.registry import SqlRegistry
    from corral.storage.uploads import UploadFiles

    clock, entropy, home = services.clock, SystemEntropy(), settings.corral_home
    store, catalog, people = (
        SqlRegistry(services.database, clock=clock),
        SqlCatalog(services.database),
        SqlAccounts(services.database),
    )
    files = UploadFiles(home / "blobs", home / "cache")
    repositories = Repositories(store=store, accounts=people, audit=services.audit, clock=clock, entropy=entropy)
    quotas = Quotas(store=store, files=files, accounts=people, default_bytes=settings.quota_bytes)
    links = BlobLinks(repositories=repositories, quotas=quotas, store=store, files=files, clock=clock)
    uploads = Uploads(
        repositories=repositories, links=links, quotas=quotas, store=store, files=files, clock=clock, entropy=entropy
    )
    build: Callable[..., Registry] = Registry
    if mirroring is not None:
        build = partial(MirroredRegistry, _mirror(settings, services, mirroring, store=store, files=files, quotas=quotas))
    registry = build(
        repositories=repositories,
        uploads=uploads,
        links=links,
        stubs=Stubs(services.hosted, public_url=settings.public_url, clock=clock),
        store=store,
        files=files,
        clock=clock,
    )
    keys = services.token_keys
    tickets = Tickets(
        keys.ticket_secret, credentials=SqlCredentials(services.database), clock=clock, previous=keys.former_ticket_secrets
    )
    alone = partial(held_alone, home / "collect.lock", otherwise="another collection is under way; try again when it is done")
    return RegistryServices(
        repositories=repositories,
        registry=registry,
        catalog=Catalog(store=catalog, registry=store, repositories=repositories),
        describing=Describing(catalog, BlobDescriber(home / "blobs", home / "cache", BoundedReader())),
        uploads=uploads,
        collector=Collector(store=store, files=files, uploads=uploads, clock=clock, alone=alone),
        tickets=tickets,
        store=store,
        files=files,
    )


async def set_quota(settings: Settings, name: str, quota_bytes: int | None) -> str:
    """How much an account or one repository may hold; None leaves that to the hub's default, or to the repository's account.
    Returns its name. Raises: not_found, name_invalid, name_unknown."""
    from corral.wire.repositories import parse_repository

    async with open_hub_services(settings) as services:
        if "/" not in name:
            return (await services.accounts.set_quota(name, quota_bytes)).name
        repository = parse_repository(name)
        await registry_services(settings, services).repositories.set_quota(repository, quota_bytes)
    return str(repository)


@dataclass(frozen=True, slots=True, kw_only=True)
class Mirroring:
    """What a mirror reaches other registries by, and the work that it does in the background."""

    gateway: "RegistryGateway"
    work: "SharedWork"


@contextlib.asynccontextmanager
async def _mirroring(settings: Settings) -> "AsyncIterator[Mirroring | None]":
    """Connections to the registries that are mirrored, which are never told who this hub is; None where none is."""
    if not settings.mirrors:
        yield None
        return
    from corral.clients.reach import GuardedResolver
    from corral.clients.registry import RegistryClient
    from corral.clients.registry_transport import RegistryTransport, open_registry_session
    from corral.hub.sharing import shared_work

    clock, entropy, resolver = SystemClock(), SystemEntropy(), GuardedResolver()
    user_agent = f"corral/{corral.__version__} (mirror)"
    async with open_registry_session(resolver) as session, shared_work() as work:
        transport = RegistryTransport(session, resolver, keys=None, clock=clock, entropy=entropy, user_agent=user_agent)
        yield Mirroring(gateway=RegistryClient(transport, sleep=asyncio.sleep, entropy=entropy), work=work)


def _mirror(
    settings: Settings,
    services: HubServices,
    mirroring: Mirroring,
    *,
    store: "SqlRegistry",
    files: "UploadFiles",
    quotas: "Quotas",
) -> "Mirror":
    from corral.hub.mirror import Mirror
    from corral.storage.sql.accounts import SqlAccounts

    return Mirror(
        settings.mirrors,
        gateway=mirroring.gateway,
        store=store,
        files=files,
        quotas=quotas,
        accounts=SqlAccounts(services.database),
        clock=services.clock,
        entropy=SystemEntropy(),
        background=mirroring.work,
    )


async def collect_garbage(settings: Settings, *, is_dry_run: bool) -> "Collected":
    """Remove what nobody needs any more from this machine's hub, whether or not it runs; or only look. Raises: conflict while
    the hub itself is at it."""
    async with open_hub_services(settings) as services:
        collector = registry_services(settings, services).collector
        return await (collector.survey() if is_dry_run else collector.collect())


async def rotate_keys(settings: Settings) -> None:
    """Give this machine's hub new keys, for what it signs and hashes from its next start on. Raises: conflict while somebody else
    does the same."""
    from corral.core.records import AuditEvent
    from corral.hub.accounts import CONSOLE
    from corral.storage.locks import held_alone
    from corral.storage.secretfile import rotate_peppers, rotate_token_keys

    home, entropy = settings.corral_home, SystemEntropy()
    async with open_hub_services(settings) as services:
        now = services.clock.now()
        # One of two new peppers would be lost, and with it the API keys that were made with it.
        with held_alone(home / "rotate.lock", otherwise="another rotation is under way"):
            await services.audit.append(AuditEvent(at=now, actor=CONSOLE, action="hub.rotate_keys", subject=""))
            rotate_token_keys(home / "registry-keys.json", entropy, now=now)
            rotate_peppers(home / "peppers.json", entropy)


async def offer_upstream(services: HubServices, name: str, *, url: str, model: str, is_public: bool) -> str:
    """Offer a model that another server runs. url: its base, without `/v1`. Returns the name it is offered under."""
    from corral.core.records import HostedModel
    from corral.wire.names import parse_name

    shown = parse_name(name).short
    hosted = HostedModel(
        name=shown, upstream_url=url.rstrip("/"), upstream_model=model, is_public=is_public, created_at=services.clock.now()
    )
    await services.hosted.offer(hosted)
    return shown


async def offer_repository(services: HubServices, name: str, *, is_public: bool) -> str:
    """Offer a model of this hub's repositories. Returns the name it is offered under. Raises: not_found."""
    from corral.core.records import HostedModel, Model, ModelDetails
    from corral.wire.names import Digest, parse_name

    parsed, now = parse_name(name), services.clock.now()
    # The store looks the repository and tag up by name and takes nothing else from this.
    model = Model(
        name=parsed, digest=Digest("0" * 64), size_bytes=0, modified_at=now, details=ModelDetails(), capabilities=frozenset()
    )
    await services.hosted.offer(HostedModel(name=parsed.short, model=model, is_public=is_public, created_at=now))
    return parsed.short


async def install_model(settings: Settings, name: str, path: Path, progress: Callable[[int, int], None]) -> None:
    """Have a GGUF file installed on this machine under that name; quick when it is so already. progress: (bytes done, bytes in
    all), called from a thread. Raises: bad_request for what is not GGUF."""
    from corral.wire.names import parse_name

    await _local_store(settings).install_gguf(parse_name(name), path, progress)


async def publish_model(settings: Settings, name: str, path: Path, progress: Callable[[int, int], None]) -> None:
    """Have a GGUF file in this machine's hub, public and offered under that name; quick when it is so already. Raises: as
    install_model."""
    from corral.wire.names import parse_name

    async with open_hub_services(settings) as services:
        await services.hosted.publish_gguf(parse_name(name), path, progress, is_public=True)


def _local_store(settings: Settings, in_use: Callable[[], Iterable[str]] = tuple) -> "HomeModels":
    from corral.storage.home import HomeModels
    from corral.storage.secretfile import ensure_private_dir

    ollama_home = settings.home / ".ollama"
    # Made here, before anything below it: what is made on the way to a cache has the mode of the umask, and the key lies here.
    ensure_private_dir(ollama_home)
    return HomeModels(settings.models_dir, ollama_home / "cache" / "corral", in_use=in_use)


@dataclass(frozen=True, slots=True, kw_only=True)
class Built:
    """One half, put together. facts: what people are told once it answers. release: ends engines and connections that running
    requests wait for, when a shutdown must not wait any longer."""

    app: "App"
    facts: Callable[[], Awaitable[dict[str, Any]]]
    release: Callable[[], Awaitable[None]]


@contextlib.asynccontextmanager
async def build_hub(settings: Settings) -> AsyncIterator[Built]:
    """The hub's application over its services. Its background work runs until the block ends."""
    from corral.core.policy import CLIENT_PROOFS, PUBLIC, Access
    from corral.core.records import Scope
    from corral.edges.asgi import App, AppOptions, Dialect
    from corral.edges.hub_api import HubApi
    from corral.edges.inference_api import inference_endpoints
    from corral.edges.pages import error_page, security_headers
    from corral.edges.registry_door import REGISTRY_PREFIX, registry_challenge, registry_guard
    from corral.edges.web import web_endpoints

    async with (
        open_hub_services(settings) as services,
        _runners(settings) as runners,
        _upstreams() as upstreams,
        _hosted(services, runners, upstreams) as inference,
        _mirroring(settings) as mirroring,
    ):

        async def release() -> None:
            await runners.close()
            await upstreams.close()
            if mirroring is not None:
                mirroring.work.cancel()

        api = HubApi(
            credentials=services.credentials,
            usage=services.usage,
            clock=services.clock,
            public_url=settings.public_url,
            is_ready=services.is_ready,
        )
        registry = registry_services(settings, services, mirroring)
        web = web_endpoints(
            accounts=services.accounts,
            credentials=services.credentials,
            hosting=services.hosted,
            repositories=registry.repositories,
            registry=registry.registry,
            catalog=registry.catalog,
            usage=services.usage,
            audit=services.audit,
            public_url=settings.public_url,
            clock=services.clock,
            sign_up_open=settings.is_signup_open,
        )
        await services.hosted.remove_stale()
        may_run = Access(CLIENT_PROOFS, Scope.INFERENCE)

        def fallback(path: str) -> Dialect:
            if path.startswith(REGISTRY_PREFIX):
                return Dialect.REGISTRY
            return Dialect.NATIVE if path.startswith(("/api/", "/v1/")) else Dialect.HTML

        options = AppOptions(
            authenticate=services.credentials.authenticate,
            guard=registry_guard(settings.public_url),
            challenge=registry_challenge(settings.public_url, services.tokens.service),
            error_page=error_page,
            fallback=fallback,
            trusted_proxies=settings.trusted_proxies,
            response_headers=security_headers(settings.public_url),
        )
        inference_rows = inference_endpoints(inference, may_run, PUBLIC, upstreams=inference)
        # The pages come last: the path of a model's page fits nearly everything.
        rows = [*api.endpoints(), *inference_rows, *_registry_endpoints(settings, services, registry), *web]
        flushing = _repeated(services.credentials.flush_uses, every_s=_FLUSH_USES_EVERY_S)
        async with flushing, _collecting(registry.collector), _cataloguing(registry):
            yield Built(app=App(rows, options), facts=lambda: _hub_facts(settings, services), release=release)


def _registry_endpoints(settings: Settings, services: HubServices, built: RegistryServices) -> "list[Endpoint]":
    from corral.edges.registry_api import RegistryApi
    from corral.edges.token_api import token_endpoints

    api = RegistryApi(
        registry=built.registry,
        repositories=built.repositories,
        tickets=built.tickets,
        public_url=settings.public_url,
        on_pull=built.catalog.count_pull,
        on_push=built.describing.notify,
    )
    tokens = token_endpoints(tokens=services.tokens, credentials=services.credentials, grantable=built.repositories.grantable)
    return [*tokens, *api.endpoints()]


@contextlib.asynccontextmanager
async def _collecting(collector: "Collector") -> AsyncIterator[None]:
    """Collect now and then while the block runs. Not once more at its end: nobody should wait for that."""
    from corral.hub.collector import COLLECT_EVERY_S

    async def collect() -> None:
        try:
            collected = await collector.collect()
        except CorralError as error:
            # Somebody runs `corral hub gc`, which does the same.
            if error.code != "conflict":
                raise
            return
        if not collected.is_empty:
            _log.info("collected %d blobs of %d bytes, %d uploads", collected.blobs, collected.size_bytes, collected.uploads)

    async with asyncio.TaskGroup() as background:
        task = background.create_task(_repeat(collect, every_s=COLLECT_EVERY_S))
        try:
            yield
        finally:
            task.cancel()


@contextlib.asynccontextmanager
async def _cataloguing(registry: RegistryServices) -> AsyncIterator[None]:
    """Describe what is pushed, and write down what is pulled, while the block runs."""
    from corral.hub.catalog import FLUSH_EVERY_S

    async with _repeated(registry.catalog.flush, every_s=FLUSH_EVERY_S), asyncio.TaskGroup() as background:
        task = background.create_task(registry.describing.run())
        try:
            yield
        finally:
            task.cancel()


@contextlib.asynccontextmanager
async def _hosted(services: HubServices, runners: "Runners", upstreams: "UpstreamEngine") -> "AsyncIterator[HostedInference]":
    """Hosted inference on this hub's weights and at upstreams, metered into the database."""
    from corral.hub.hosting import Hosting
    from corral.hub.inference import HostedInference
    from corral.hub.metering import FLUSH_EVERY_S, UsageMeter
    from corral.hub.running import RunningRequests

    meter = UsageMeter(services.usage)
    async with _repeated(meter.flush, every_s=FLUSH_EVERY_S):
        yield HostedInference(
            hosting=Hosting(services.hosted),
            runners=runners,
            usage=meter,
            running=RunningRequests(services.credentials.is_live),
            clock=services.clock,
            upstreams=upstreams,
            relay=upstreams,
        )


@contextlib.asynccontextmanager
async def _upstreams() -> "AsyncIterator[UpstreamEngine]":
    from corral.engines.upstream import UpstreamEngine

    engine = UpstreamEngine()
    try:
        yield engine
    finally:
        await engine.close()


@contextlib.asynccontextmanager
async def _runners(settings: Settings) -> "AsyncIterator[Runners]":
    """Models loaded by llama.cpp. Its processes end with the block."""
    from corral.engines.llamacpp import LlamaCppEngine, find_llama_server
    from corral.engines.machine import usable_memory_bytes
    from corral.serving.runners import RunnerLimits, Runners

    engine = LlamaCppEngine(
        SystemEntropy(),
        llama_server=find_llama_server(settings.llama_server, settings.search_path),
        environment=settings.engine_environ,
        stall_timeout_s=settings.load_timeout_s if settings.load_timeout_s > 0 else _FOR_EVER_S,
    )
    limits = RunnerLimits(
        keep_alive_s=settings.keep_alive_s,
        max_loaded=settings.max_loaded_models or _MAX_LOADED,
        max_queue=settings.max_queue,
        parallel=settings.num_parallel or _PARALLEL,
        context_length=settings.context_length,
        memory_bytes=usable_memory_bytes(),
    )
    runners = Runners(engine, SystemClock(), limits)
    try:
        yield runners
    finally:
        await runners.close()


async def _hub_facts(settings: Settings, services: HubServices) -> dict[str, Any]:
    from corral.wire.names import DEFAULT_TAG, cloud_tag, parse_name

    code = await services.accounts.new_setup_code()
    names = [parse_name(hosted.name) for hosted in await services.hosted.list()]
    return {
        "url": settings.public_url,
        "data": _shortened(settings.corral_home, settings.home),
        "hosted": [(f"{name.repository}:{name.tag}", cloud_tag(name.short.removesuffix(f":{DEFAULT_TAG}"))) for name in names],
        "signup_url": f"{settings.public_url}/signup?code={code}" if code else "",
    }


async def run_hub(settings: Settings, on_ready: OnReady, stop: asyncio.Event) -> None:
    """Serve the hub until a signal or `stop`. Raises: conflict for a taken port."""
    await _run(build_hub(settings), settings.hub_listen, on_ready, stop)


# ── The local server ─────────────────────────────────────────────────────────────────────────────────────────────────


@contextlib.asynccontextmanager
async def build_local(settings: Settings) -> AsyncIterator[Built]:
    """The local server's application. Raises: forbidden when it would listen where others can reach it."""
    from corral.edges.create_api import CreateApi
    from corral.edges.library_api import transfer_endpoints
    from corral.edges.local_api import LocalApi, local_app
    from corral.edges.local_guard import LocalGuard, require_safe_bind
    from corral.local.cloud import CloudAccess, CloudSwitch
    from corral.local.models import LocalModels
    from corral.local.transfer import Transfer
    from corral.serving.inference import Inference
    from corral.storage.hubstate import is_cloud_off
    from corral.wire.discovery import OLLAMA_VERSION

    require_safe_bind(settings.local.host, allow_public=settings.is_public_allowed)
    memory, ollama_home = hub_memory(settings), settings.home / ".ollama"

    def hub_url() -> str:
        return settings.hub or memory.hub() or DEFAULT_HUB

    async with (
        hub_client(settings, hub_url) as gateway,
        registry_client(settings) as registry,
        _runners(settings) as runners,
    ):
        store = _local_store(settings, runners.files_in_use)
        transfer = Transfer(registry, _inbox(settings), store, hub_url=hub_url, is_pruning=not settings.is_prune_off)
        await _tidy(store, settings)
        switch = CloudSwitch(by_env=settings.is_cloud_off, by_config=lambda: is_cloud_off(ollama_home / "server.json"))
        api = LocalApi(
            models=LocalModels(store, Inference(runners, SystemClock(), prefers_go=settings.prefers_go_template)),
            loaded=runners.loaded,
            cloud=CloudAccess(gateway, switch, device_name=device_name(), version=OLLAMA_VERSION),
            hub_url=hub_url,
            version=OLLAMA_VERSION,
        )
        guard = LocalGuard(hostname=socket.gethostname(), hosts=[settings.local.host], origins=settings.origins)
        facts = {
            "url": settings.local.url.replace("//127.0.0.1:", "//localhost:"),
            "models": _shortened(settings.models_dir, settings.home),
            "cloud": hub_url(),
        }

        async def tell() -> dict[str, Any]:
            return facts

        async def release() -> None:
            # Relayed streams wait for the hub, the others for an engine.
            gateway.abandon()
            await runners.close()

        _prepare_device_key(gateway)
        changes = CreateApi(_library(settings, store, runners, hub_url, transfer.pull_name))
        rows = [*changes.endpoints(), *transfer_endpoints(transfer)]
        yield Built(app=local_app(api, guard, rows), facts=tell, release=release)


@contextlib.asynccontextmanager
async def registry_client(settings: Settings) -> "AsyncIterator[RegistryClient]":
    """Any registry, as this device."""
    from corral.clients.hub import user_agent
    from corral.clients.reach import GuardedResolver
    from corral.clients.registry import RegistryClient
    from corral.clients.registry_transport import RegistryTransport, open_registry_session
    from corral.storage.home import FileDeviceKeys

    clock, entropy, resolver = SystemClock(), SystemEntropy(), GuardedResolver()
    async with open_registry_session(resolver) as session:
        transport = RegistryTransport(
            session,
            resolver,
            keys=FileDeviceKeys(settings.home / ".ollama", entropy),
            clock=clock,
            entropy=entropy,
            user_agent=user_agent(corral.__version__),
        )
        yield RegistryClient(transport, sleep=asyncio.sleep, entropy=entropy)


def _inbox(settings: Settings) -> "BlobInbox":
    from corral.storage.blobs import BlobFiles
    from corral.storage.partials import BlobInbox

    return BlobInbox(BlobFiles(settings.models_dir / "blobs", settings.home / ".ollama" / "cache" / "corral"))


def _library(
    settings: Settings, store: "HomeModels", runners: "Runners", hub_url: Callable[[], str], pull: "Pull | None" = None
) -> "Library":
    """What changes the installed models. pull: brings one here that another is to be made of."""
    from corral.engines.llama_tools import LlamaTools
    from corral.local.creating import ModelMaker
    from corral.local.library import Library

    tools = LlamaTools(settings.search_path, settings.engine_environ)
    maker = ModelMaker(store, store, tools, hub_url=hub_url, pull=pull)
    return Library(store, store, maker, unload=runners.unload, is_pruning=not settings.is_prune_off)


async def _tidy(store: "HomeModels", settings: Settings) -> None:
    """What a start clears away: leavings of killed processes, and blobs that no model needs."""
    now = SystemClock().now()
    await store.remove_stale(now)
    if settings.is_prune_off:
        return
    try:
        if await store.prune(now) is None:
            _log.warning("a manifest cannot be read, so no unused blobs were removed")
    except CorralError as error:
        _log.warning("unused blobs were not removed: %s", error.message)


def _prepare_device_key(gateway: "HubClient") -> None:
    """Make the device's key at the first start, as `ollama serve` does. One that cannot be used is told of and left as it is:
    models of this machine run without it."""
    try:
        gateway.device_key()
    except CorralError as error:
        _log.warning("hosted models cannot be used: %s", error.message)


async def run_local(settings: Settings, on_ready: OnReady, stop: asyncio.Event) -> None:
    """Serve models of this machine until a signal or `stop`. Raises: conflict for a taken port."""
    await _run(build_local(settings), settings.local, on_ready, stop)


# ── What both share ──────────────────────────────────────────────────────────────────────────────────────────────────


async def _run(
    building: contextlib.AbstractAsyncContextManager[Built], address: Address, on_ready: OnReady, stop: asyncio.Event
) -> None:
    from corral.edges.listen import serve

    # Asked first: a second server must not touch the database or the engine of the first.
    check_free(address.host, address.port)
    async with building as built:
        facts = await built.facts()
        # What was made until now stays for as long as the process, so the collector need not walk it again and again.
        gc.freeze()
        await serve(built.app, address.host, address.port, on_ready=lambda: on_ready(facts), release=built.release, stop=stop)


@contextlib.asynccontextmanager
async def _repeated(work: Callable[[], Awaitable[None]], *, every_s: float) -> AsyncIterator[None]:
    """Do the work again and again while the block runs, and once more at its end."""
    async with asyncio.TaskGroup() as background:
        task = background.create_task(_repeat(work, every_s=every_s))
        try:
            yield
        finally:
            task.cancel()
            await work()


async def _repeat(work: Callable[[], Awaitable[None]], *, every_s: float) -> None:
    while True:
        await asyncio.sleep(every_s)
        try:
            await work()
        except Exception:  # noqa: BLE001 - the outermost loop of a background task: one failure does not end the series
            _log.exception("background work failed")


def _shortened(path: Path, home: Path) -> str:
    """The path with `~` for the home directory."""
    return f"~/{path.relative_to(home)}" if path.is_relative_to(home) else str(path)
