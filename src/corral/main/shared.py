"""What both servers are put together with: clocks, connections, engines, and the way to run until told to stop."""

import asyncio
import contextlib
import gc
import logging
import os
import socket
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import corral
from corral.settings import Address, Settings

if TYPE_CHECKING:
    from corral.clients.hub import HubClient
    from corral.core.ports import HubMemory
    from corral.edges.asgi import App
    from corral.serving.runners import Runners
    from corral.wire.signing import DevicePublicKey

#: What 0 stands for; models per accelerator. Ollama answers one request at a time by default; slots share the weights, so four
#: cost little.
_MAX_LOADED, _PARALLEL = 3, 4
_FOR_EVER_S = 1e9
#: More a process of macOS may not ask for.
_DESCRIPTORS = 10_240
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
    """What every server process does first: logs; no core dumps, which would hold keys and prompts; and as many descriptors as it
    is allowed, since the usual 1024 are for programs that call `select`."""
    from corral.logs import set_up_logging

    set_up_logging(settings.debug)
    with contextlib.suppress(ImportError, ValueError, OSError):
        import resource

        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        if 0 <= soft < _DESCRIPTORS:
            resource.setrlimit(resource.RLIMIT_NOFILE, (_DESCRIPTORS if hard < 0 else min(hard, _DESCRIPTORS), hard))


def check_free(host: str, port: int) -> None:
    """Raises: conflict when something listens there already; see edges.port."""
    from corral.edges.port import check_free

    check_free(host, port)


def device_name() -> str:
    """What this machine calls itself, for the connect page."""
    return socket.gethostname().partition(".")[0] or "device"


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
            proxies=settings.proxies,
        )


def signed_request(settings: Settings, method: str, path: str) -> tuple[str, str]:
    """(target, Authorization) of a request that carries this device's stock signature, as Ollama's own client makes it with
    OLLAMA_AUTH. path: without what an address has before it. Raises: invalid for a key that cannot be used. Source: ollama
    api/client.go do, fb30760."""
    from corral.storage.home import FileDeviceKeys
    from corral.wire.signing import authorization_header, request_challenge, signed_target

    key = FileDeviceKeys(settings.home / ".ollama", SystemEntropy()).load_or_create()
    route, _, query = path.partition("?")
    target = signed_target(route, query, int(SystemClock().now().timestamp()))
    return target, authorization_header(key, request_challenge(method, target))


def strong_signature(settings: Settings, method: str, url: str, headers: Mapping[str, str], *, body: bytes) -> dict[str, str]:
    """The headers by which this device signs one whole request for one server. url: as it is called. headers: those that are
    sent. Raises: invalid for a key that cannot be used."""
    from corral.storage.home import FileDeviceKeys
    from corral.wire.strong import NONCE_BYTES, sign_headers

    entropy = SystemEntropy()
    key, now = FileDeviceKeys(settings.home / ".ollama", entropy).load_or_create(), SystemClock().now().timestamp()
    return sign_headers(key, method, url, headers, body=body, now=now, nonce=entropy.bytes(NONCE_BYTES))


def device_public_key(settings: Settings) -> "DevicePublicKey":
    """What this device is known by. Raises: invalid for a key that cannot be used."""
    from corral.storage.home import FileDeviceKeys

    return FileDeviceKeys(settings.home / ".ollama", SystemEntropy()).load_or_create().public


@dataclass(frozen=True, slots=True, kw_only=True)
class Built:
    """One half, put together. facts: what people are told once it answers. release: ends engines and connections that running
    requests wait for, when a shutdown must not wait any longer."""

    app: "App"
    facts: Callable[[], Awaitable[dict[str, Any]]]
    release: Callable[[], Awaitable[None]]


async def run(
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
async def running_models(settings: Settings) -> "AsyncIterator[Runners]":
    """Models loaded by llama.cpp. Its processes end with the block."""
    from corral.engines.devices import Accelerators, find_accelerators
    from corral.engines.launch import Tuning
    from corral.engines.llamacpp import LlamaCppEngine, find_llama_server
    from corral.engines.machine import has_accelerator, usable_memory_bytes
    from corral.serving.capacity import KV_BYTES
    from corral.serving.runners import RunnerLimits, Runners

    llama_server = find_llama_server(settings.llama_server, settings.search_path)
    found = await find_accelerators(llama_server, settings.engine_environ) if has_accelerator() else Accelerators()
    engine = LlamaCppEngine(
        SystemEntropy(),
        llama_server=llama_server,
        environment=settings.engine_environ,
        stall_timeout_s=settings.load_timeout_s if settings.load_timeout_s > 0 else _FOR_EVER_S,
        tuning=Tuning(cache_type=settings.kv_cache_type, flash_attention=settings.flash_attention),
    )
    limits = RunnerLimits(
        keep_alive_s=settings.keep_alive_s,
        max_loaded=settings.max_loaded_models or _MAX_LOADED * max(1, found.count),
        max_queue=settings.max_queue,
        parallel=settings.num_parallel or _PARALLEL,
        context_length=settings.context_length,
        memory_bytes=usable_memory_bytes(),
        accelerator_bytes=max(0, found.memory_bytes - settings.gpu_overhead_bytes * found.count),
        kv_bytes=KV_BYTES[settings.kv_cache_type or "f16"],
    )
    runners = Runners(engine, SystemClock(), limits)
    try:
        yield runners
    finally:
        await runners.close()


@contextlib.asynccontextmanager
async def repeated(work: Callable[[], Awaitable[None]], *, every_s: float) -> AsyncIterator[None]:
    """Do the work again and again while the block runs, and once more at its end."""
    async with asyncio.TaskGroup() as background:
        task = background.create_task(repeat(work, every_s=every_s))
        try:
            yield
        finally:
            task.cancel()
            await work()


async def repeat(work: Callable[[], Awaitable[None]], *, every_s: float, first_s: float | None = None) -> None:
    """Do the work again and again. first_s: how long until the first time, where that is another pause."""
    pause_s = every_s if first_s is None else first_s
    while True:
        await asyncio.sleep(pause_s)
        pause_s = every_s
        try:
            await work()
        except Exception:  # noqa: BLE001 - the outermost loop of a background task: one failure does not end the series
            _log.exception("background work failed")


def shortened(path: Path, home: Path) -> str:
    """The path with `~` for the home directory."""
    return f"~/{path.relative_to(home)}" if path.is_relative_to(home) else str(path)
