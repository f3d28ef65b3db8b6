"""The local server's application."""

import asyncio
import contextlib
import logging
import socket
from collections.abc import AsyncIterator, Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import corral
from corral.main.shared import (
    Built,
    OnReady,
    SystemClock,
    SystemEntropy,
    device_name,
    hub_client,
    hub_memory,
    run,
    running_models,
    shortened,
)
from corral.settings import DEFAULT_HUB, Settings
from corral.wire.errors import CorralError

if TYPE_CHECKING:
    from corral.clients.hub import HubClient
    from corral.clients.registry import RegistryClient
    from corral.edges.asgi import Endpoint
    from corral.engines.upstream import UpstreamEngine
    from corral.local.creating import Pull
    from corral.local.door import LocalDoor
    from corral.local.library import Library
    from corral.serving.runners import Runners
    from corral.storage.home import HomeModels
    from corral.storage.partials import BlobInbox

#: A minute, from one network; more are answered 429 for a while. Right ones are not counted.
_WRONG_CREDENTIALS = 30

_log = logging.getLogger("corral.server")


@contextlib.asynccontextmanager
async def build_local(settings: Settings) -> AsyncIterator[Built]:
    """The local server's application. Raises: forbidden when it would listen where others can reach it."""
    from corral.edges.create_api import CreateApi
    from corral.edges.library_api import transfer_endpoints
    from corral.edges.local_api import LocalApi, local_app
    from corral.edges.local_cloud_api import LocalCloudApi
    from corral.edges.local_guard import LocalGuard, require_safe_bind
    from corral.local.background import background_work
    from corral.local.cloud import CloudAccess, CloudSwitch
    from corral.local.hub_cache import HubCache
    from corral.local.models import LocalModels
    from corral.local.stubs import Remotes, StubModels
    from corral.local.transfer import Transfer
    from corral.local.web_search import HubSearch
    from corral.serving.inference import Inference
    from corral.storage.hubstate import is_cloud_off
    from corral.wire.discovery import OLLAMA_VERSION

    is_secured = settings.local_auth != "off"
    require_safe_bind(settings.local.host, allow_public=settings.is_public_allowed, is_secured=is_secured)
    if not (is_secured or settings.local.is_loopback):
        _log.warning("whoever reaches %s may do everything here → CORRAL_LOCAL_AUTH=remote", settings.local.bind)
    memory, ollama_home = hub_memory(settings), settings.home / ".ollama"

    def hub_url() -> str:
        return settings.hub or memory.hub() or DEFAULT_HUB

    async with (
        hub_client(settings, hub_url) as gateway,
        registry_client(settings) as registry,
        running_models(settings) as runners,
        _remote_servers() as elsewhere,
        background_work() as background,
    ):
        store = _local_store(settings, runners.files_in_use)
        transfer = Transfer(registry, _inbox(settings), store, hub_url=hub_url, is_pruning=not settings.is_prune_off)
        await _tidy(store, settings)
        switch = CloudSwitch(by_env=settings.is_cloud_off, by_config=lambda: is_cloud_off(ollama_home / "server.json"))
        cache = HubCache(SystemClock(), background)
        cloud = CloudAccess(gateway, switch, device_name=device_name(), version=OLLAMA_VERSION, cache=cache)
        remotes = Remotes(settings.remotes)
        stubs = StubModels(cloud, gateway, elsewhere, remotes=remotes, hub_url=hub_url, clock=SystemClock())
        api = LocalApi(
            models=LocalModels(store, Inference(runners, SystemClock(), prefers_go=settings.prefers_go_template), stubs),
            loaded=runners.loaded,
            cloud=cloud,
            web=HubSearch(cloud),
            hub_url=hub_url,
            version=OLLAMA_VERSION,
            asks=settings.local_auth,
        )
        door = _door(settings) if is_secured else None
        guard = LocalGuard(hostname=socket.gethostname(), hosts=[settings.local.host], origins=settings.origins)
        facts = {
            "url": settings.local.url.replace("//127.0.0.1:", "//localhost:"),
            "url_elsewhere": settings.local.url_elsewhere(socket.gethostname()),
            "models": shortened(settings.models_dir, settings.home),
            "cloud": hub_url(),
            "asks": settings.local_auth,
            "keys": len(door.keys().entries) if door else 0,
            "keys_file": shortened(settings.authorized_keys, settings.home),
        }

        async def tell() -> dict[str, Any]:
            return facts

        async def release() -> None:
            # Relayed streams wait for the hub, the others for an engine.
            background.cancel()
            gateway.abandon()
            await elsewhere.close()
            await runners.close()

        _prepare_device_key(gateway)
        changes = CreateApi(_library(settings, store, runners, hub_url, transfer.pull_name))
        rows = [*changes.endpoints(), *transfer_endpoints(transfer), *LocalCloudApi(cloud).endpoints()]
        app = local_app(api, guard, rows, finish=_finishing(settings), door=door, trusted_proxies=settings.trusted_proxies)
        yield Built(app=app, facts=tell, release=release)


def _door(settings: Settings) -> "LocalDoor":
    """What asks callers for a credential. What is wrong with the file is told now, not when the first of them fails."""
    from corral.hub.networks import network_of
    from corral.hub.replay import Alarms, ReplayGuard
    from corral.hub.throttle import Throttle, per_minutes
    from corral.local.door import LocalDoor
    from corral.storage.authorized_keys import AuthorizedKeysFile

    clock = SystemClock()
    guesses, limit = Throttle(clock), per_minutes(_WRONG_CREDENTIALS, 1)
    door = LocalDoor(
        AuthorizedKeysFile(settings.authorized_keys, clock).current,
        where=shortened(settings.authorized_keys, settings.home),
        admits_this_machine=settings.local_auth == "remote",
        clock=clock,
        replay=ReplayGuard(clock),
        guess=lambda network: guesses.attempt((limit, ("guess", network_of(network)))),
        is_news=Alarms(clock).is_news,
    )
    door.keys()
    if settings.local_auth == "remote" and settings.local.is_loopback:
        _log.warning(
            "%s is reached from this machine alone, whose programs need no credential; behind a proxy or a tunnel "
            "→ CORRAL_LOCAL_AUTH=on",
            settings.local.bind,
        )
    return door


def _finishing(settings: Settings) -> "Callable[[Endpoint], Endpoint]":
    """What is done to each route: with OLLAMA_DEBUG_LOG_REQUESTS, prompts are written down."""
    if not settings.logs_requests:
        return lambda row: row
    from corral.edges.request_log import noted
    from corral.storage.requestlog import RequestLog

    log = RequestLog()
    _log.warning("requests are written to %s: prompts, and scripts that ask again", log.directory)
    return lambda row: noted(row, log, SystemClock().now)


@contextlib.asynccontextmanager
async def _remote_servers() -> "AsyncIterator[UpstreamEngine]":
    """Servers of OLLAMA_REMOTES, which are told nothing of who asks."""
    from corral.engines.upstream import UpstreamEngine

    engine = UpstreamEngine()
    try:
        yield engine
    finally:
        await engine.close()


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
            device_name=device_name(),
            proxies=settings.proxies,
        )
        yield RegistryClient(transport, sleep=asyncio.sleep, entropy=entropy)


async def install_model(
    settings: Settings, name: str, path: Path, progress: Callable[[int, int], None], *, parameters: Mapping[str, object]
) -> None:
    """Have a GGUF file installed on this machine under that name; quick when it is so already. progress: (bytes done, bytes in
    all), called from a thread. parameters: PARAMETERs of a model that is new. Raises: bad_request for what is not GGUF."""
    from corral.wire.names import parse_name

    await _local_store(settings).install_gguf(parse_name(name), path, progress, parameters=parameters)


def _local_store(settings: Settings, in_use: Callable[[], Iterable[str]] = tuple) -> "HomeModels":
    from corral.storage.home import HomeModels
    from corral.storage.secretfile import ensure_private_dir

    ollama_home = settings.home / ".ollama"
    # Made here, before anything below it: what is made on the way to a cache has the mode of the umask, and the key lies here.
    ensure_private_dir(ollama_home)
    return HomeModels(settings.models_dir, ollama_home / "cache" / "corral", in_use=in_use)


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
    await run(build_local(settings), settings.local, on_ready, stop)
