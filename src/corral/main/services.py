"""The hub without its HTTP, on its data in CORRAL_HOME, and what administration commands do with it."""

import asyncio
import contextlib
import logging
import os
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

import corral
from corral.main.shared import SystemClock, SystemEntropy
from corral.settings import BadSetting, Settings
from corral.wire.errors import CorralError

if TYPE_CHECKING:
    from corral.core.ports import AuditLog, UsageStore
    from corral.core.records import Account, HostedModel
    from corral.core.registry import Repository
    from corral.core.scrubbing import HurtBlobs
    from corral.core.transfer_ports import RegistryGateway
    from corral.hub.accounts import Accounts
    from corral.hub.catalog import Catalog
    from corral.hub.collector import Collected, Collector
    from corral.hub.credentials import Credentials
    from corral.hub.describing import Describing
    from corral.hub.mirror import Mirror
    from corral.hub.quotas import Quotas, StorageUse
    from corral.hub.registry import Registry
    from corral.hub.repositories import Repositories
    from corral.hub.sharing import SharedWork
    from corral.hub.tickets import Tickets
    from corral.hub.tokens import RegistryTokens
    from corral.hub.uploads import Uploads
    from corral.storage.sql.engine import Database
    from corral.storage.sql.hosting import SqlHosting
    from corral.storage.sql.registry import SqlRegistry
    from corral.storage.uploads import UploadFiles
    from corral.storage.upstreamkeys import UpstreamKeys
    from corral.wire.secrets import Secret
    from corral.wire.tokens import TokenKeys


#: In CORRAL_HOME: held by everything that works on the data, alone by whoever puts other data in their place; what was taken
#: away for good; and what is there from the first to the last step of putting a backup in place.
HUB_LOCK, REVOCATION_LOG, UNFINISHED = "hub.lock", "revocations.log", "restore.unfinished"

_log = logging.getLogger("corral.server")


@dataclass(frozen=True, slots=True, kw_only=True)
class HubServices:
    """The hub without its HTTP: what pages, API and administration commands share."""

    accounts: "Accounts"
    credentials: "Credentials"
    tokens: "RegistryTokens"
    token_keys: "TokenKeys"
    hosted: "SqlHosting"
    upstream_keys: "UpstreamKeys"
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


def database_path(settings: Settings) -> Path:
    """Where the hub's database is. Raises: BadSetting."""
    url = settings.database_url
    if not url:
        return settings.corral_home / "hub.db"
    if not url.startswith("sqlite:///"):
        raise BadSetting("CORRAL_DATABASE_URL: this release keeps its database in SQLite; use sqlite:///path or leave it out")
    return Path(url.removeprefix("sqlite:///"))


def password_rule() -> str:
    """What a new password has to be, in words."""
    from corral.hub.passwords import RULE

    return RULE


def has_hub(settings: Settings) -> bool:
    """Whether a hub was ever set up where the settings say."""
    return database_path(settings).exists()


@contextlib.asynccontextmanager
async def open_existing_hub(settings: Settings) -> AsyncIterator[HubServices]:
    """As open_hub_services, of a hub that was set up before: a command for its administrator must not make an empty one out of a
    CORRAL_HOME that is misspelt. Raises: not_found."""
    if not has_hub(settings):
        where = database_path(settings) if settings.database_url else settings.corral_home
        raise CorralError("not_found", f"there is no hub in {where} → start it with `corral hub serve`, or set CORRAL_HOME")
    async with open_hub_services(settings) as services:
        yield services


@contextlib.asynccontextmanager
async def open_hub_services(settings: Settings) -> AsyncIterator[HubServices]:
    """The hub's services on its data in CORRAL_HOME, which several processes may have open at once."""
    from corral.hub.accounts import AccountRules, Accounts
    from corral.hub.credentials import Credentials
    from corral.hub.sightings import MemorySightings
    from corral.hub.tokens import RegistryTokens
    from corral.storage.describe import BoundedReader
    from corral.storage.locks import held_together
    from corral.storage.secretfile import ensure_private_dir, load_or_create_peppers, load_or_create_token_keys
    from corral.storage.sql.accounts import SqlAccounts
    from corral.storage.sql.audit import SqlAudit
    from corral.storage.sql.credentials import SqlCredentials
    from corral.storage.sql.engine import open_database
    from corral.storage.sql.hosting import SqlHosting
    from corral.storage.sql.revocations import catch_up
    from corral.storage.sql.sessions import SqlSessions
    from corral.storage.sql.usage import SqlUsage
    from corral.storage.upstreamkeys import UpstreamKeys

    clock, entropy, home = SystemClock(), SystemEntropy(), settings.corral_home
    ensure_private_dir(home)
    working = held_together(home / HUB_LOCK, otherwise=f"a backup is being restored in {home} → wait until that is done")
    async with contextlib.AsyncExitStack() as stack:
        stack.enter_context(working)
        if (home / UNFINISHED).exists():
            text = f"a backup was being restored in {home} and that was not finished → run `corral hub restore` again"
            raise CorralError("unavailable", text)
        database = await asyncio.to_thread(open_database, database_path(settings), log=home / REVOCATION_LOG)
        stack.push_async_callback(database.close)
        # What is made below CORRAL_HOME is for its owner alone, also by code that asks for no mode.
        stack.callback(os.umask, os.umask(0o077))
        taken = await catch_up(database, now=clock.now())
        if taken:
            _log.warning("the database was older than revocations.log: took away %d things again", len(taken))
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
            upstream_keys=UpstreamKeys(home / "upstream-keys.json"),
            usage=SqlUsage(database),
            audit=audit,
            database=database,
            clock=clock,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class RegistryServices:
    """The hub's registry without its HTTP."""

    repositories: "Repositories"
    registry: "Registry"
    catalog: "Catalog"
    describing: "Describing"
    uploads: "Uploads"
    quotas: "Quotas"
    collector: "Collector"
    tickets: "Tickets"
    store: "SqlRegistry"
    files: "UploadFiles"
    hurt_blobs: "HurtBlobs"


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
    from corral.storage.sql.scrubbing import SqlScrubbing
    from corral.storage.uploads import UploadFiles

    clock, entropy, home = services.clock, SystemEntropy(), settings.corral_home
    store, catalog, people = (
        SqlRegistry(services.database, clock=clock),
        SqlCatalog(services.database),
        SqlAccounts(services.database),
    )
    files = UploadFiles(home / "blobs", home / "cache")
    repositories = Repositories(
        store=store,
        accounts=people,
        audit=services.audit,
        clock=clock,
        entropy=entropy,
        max_per_account=settings.max_repositories,
    )
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
        quotas=quotas,
        collector=Collector(store=store, files=files, uploads=uploads, clock=clock, alone=alone),
        tickets=tickets,
        store=store,
        files=files,
        hurt_blobs=SqlScrubbing(services.database).hurt_blobs,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Mirroring:
    """What a mirror reaches other registries by, and the work that it does in the background."""

    gateway: "RegistryGateway"
    work: "SharedWork"


@contextlib.asynccontextmanager
async def mirroring_of(settings: Settings) -> "AsyncIterator[Mirroring | None]":
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
        transport = RegistryTransport(
            session, resolver, keys=None, clock=clock, entropy=entropy, user_agent=user_agent, proxies=settings.proxies
        )
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


async def set_quota(settings: Settings, name: str, quota_bytes: int | None) -> str:
    """How much an account or one repository may hold; None leaves that to the hub's default, or to the repository's account.
    Returns its name. Raises: not_found, name_invalid, name_unknown."""
    from corral.wire.repositories import parse_repository

    async with open_existing_hub(settings) as services:
        if "/" not in name:
            return (await services.accounts.set_quota(name, quota_bytes)).name
        repository = parse_repository(name)
        await registry_services(settings, services).repositories.set_quota(repository, quota_bytes)
    return str(repository)


async def storage_of(settings: Settings, name: str) -> "tuple[str, StorageUse]":
    """What an account or one repository takes up and may take up, and its name. Raises: not_found, name_invalid, name_unknown."""
    from corral.wire.repositories import parse_repository

    async with open_existing_hub(settings) as services:
        quotas = registry_services(settings, services).quotas
        if "/" in name:
            return await quotas.use_of_repository(parse_repository(name))
        account = await services.accounts.named(name)
        return account.name, await quotas.use_of(account.name)


async def belongings_of(settings: Settings, name: str) -> "tuple[Account, Sequence[Repository]]":
    """An account and its repositories, which go with it. Raises: not_found."""
    async with open_existing_hub(settings) as services:
        account = await services.accounts.named(name)
        return account, await registry_services(settings, services).store.repositories_of(account.name)


async def collect_garbage(settings: Settings, *, is_dry_run: bool) -> "Collected":
    """Remove what nobody needs any more from this machine's hub, whether or not it runs; or only look. Raises: conflict while
    the hub itself is at it."""
    async with open_existing_hub(settings) as services:
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
    async with open_existing_hub(settings) as services:
        now = services.clock.now()
        # One of two new peppers would be lost, and with it the API keys that were made with it.
        with held_alone(home / "rotate.lock", otherwise="another rotation is under way"):
            await services.audit.append(AuditEvent(at=now, actor=CONSOLE, action="hub.rotate_keys", subject=""))
            rotate_token_keys(home / "registry-keys.json", entropy, now=now)
            rotate_peppers(home / "peppers.json", entropy)


async def offer_upstream(
    services: HubServices, name: str, *, url: str, model: str, is_public: bool, key: "Secret | None" = None
) -> str:
    """Offer a model that another server runs. url: its base, as `parse_upstream_url` gives it. key: what that server wants to
    hear; None for what is kept already, or nothing. Returns the name it is offered under."""
    from corral.core.records import HostedModel
    from corral.wire.names import parse_name

    shown = parse_name(name).short
    hosted = HostedModel(name=shown, upstream_url=url, upstream_model=model, is_public=is_public, created_at=services.clock.now())
    note = f"{_openness(is_public)}, run by {urlsplit(url).netloc}{' with a key' if key else ''}"
    async with _audited(services, "model.host", shown, note=note):
        if key is not None:
            services.upstream_keys.put(url, key)
        await services.hosted.offer(hosted)
    return shown


async def offer_repository(services: HubServices, name: str, *, is_public: bool) -> "HostedModel":
    """Offer a model of this hub's repositories; what is in a private one is for its owner alone. Raises: not_found; invalid for
    what nothing here could run."""
    from corral.wire.names import parse_name

    parsed = parse_name(name)
    async with _audited(services, "model.host", parsed.short, note=_openness(is_public)):
        await services.hosted.offer_stored(parsed, is_public=is_public, now=services.clock.now())
        hosted = await services.hosted.get(parsed.short)
        if hosted is None or hosted.model is None:
            raise CorralError("conflict", f"{parsed.short} was withdrawn or deleted just now")
        if hosted.model.weights is None and not hosted.model.is_stub:
            await services.hosted.withdraw(parsed.short)
            raise CorralError("invalid", f"{parsed.short} holds no weights that this hub could run")
    return hosted


async def withdraw_model(services: HubServices, name: str) -> bool:
    """Offer a model no longer; False when it was not offered. The key of a server that runs no other is forgotten. Raises:
    bad_request; invalid and conflict when it is withdrawn, and that key is not forgotten."""
    from corral.wire.names import parse_name

    shown = parse_name(name).short
    if not await _is_offered(services, shown):
        return False
    async with _audited(services, "model.unhost", shown):
        was_offered = await services.hosted.withdraw(shown)
    try:
        services.upstream_keys.keep_only(await services.hosted.upstream_urls())
    except CorralError as error:
        # The model is gone all the same, which is what was asked for and what the audit log says.
        await _append(services, "model.unhost_unfinished", shown, note="withdrawn; the keys of upstreams were not looked through")
        raise CorralError(error.code, f"{name} is no longer offered, but no key was forgotten: {error.message}") from error
    return was_offered


async def _is_offered(services: HubServices, name: str) -> bool:
    try:
        return await services.hosted.get(name) is not None
    except CorralError as error:
        # It is offered, and what it is made of cannot be read: all the more reason to withdraw it.
        if error.code != "unavailable":
            raise
        return True


@contextlib.asynccontextmanager
async def _audited(services: HubServices, action: str, subject: str, *, note: str = "") -> AsyncIterator[None]:
    """Write down what the block does on the console before it does it, and that it was refused if it was."""
    await _append(services, action, subject, note=note)
    try:
        yield
    except CorralError as error:
        await _append(services, f"{action}_refused", subject, note=error.message)
        raise


async def _append(services: HubServices, action: str, subject: str, *, note: str) -> None:
    from corral.core.records import AuditEvent
    from corral.hub.accounts import CONSOLE

    await services.audit.append(AuditEvent(at=services.clock.now(), actor=CONSOLE, action=action, subject=subject, note=note))


def _openness(is_public: bool) -> str:
    return "public" if is_public else "private"


async def publish_model(
    settings: Settings, name: str, path: Path, progress: Callable[[int, int], None], *, parameters: Mapping[str, object]
) -> None:
    """Have a GGUF file in this machine's hub and offered under that name, public where it is new; quick when it is there.
    Raises: as install_model."""
    from corral.wire.names import parse_name

    async with open_hub_services(settings) as services:
        shown = parse_name(name).short
        # Every start of `corral up --model` comes by here, and is no news when it is offered already.
        is_new = not await _is_offered(services, shown)
        audited = _audited(services, "model.host", shown, note="from a file") if is_new else contextlib.nullcontext()
        async with audited:
            await services.hosted.publish_gguf(parse_name(name), path, progress, is_public=True, parameters=parameters)
