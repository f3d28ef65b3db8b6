"""The hub's application over its services."""

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator
from typing import TYPE_CHECKING, Any

import corral
from corral.main.scrubbing import scrubbing
from corral.main.services import HubServices, RegistryServices, mirroring_of, open_hub_services, registry_services
from corral.main.shared import Built, OnReady, repeat, repeated, run, running_models, shortened
from corral.settings import Settings
from corral.wire.errors import CorralError

if TYPE_CHECKING:
    from corral.edges.asgi import Endpoint
    from corral.engines.upstream import UpstreamEngine
    from corral.hub.collector import Collector
    from corral.hub.inference import HostedInference
    from corral.hub.metering import UsageMeter
    from corral.hub.web_tools import WebTools
    from corral.serving.runners import Runners

_FLUSH_USES_EVERY_S = 60.0

_log = logging.getLogger("corral.server")


@contextlib.asynccontextmanager
async def build_hub(settings: Settings) -> AsyncIterator[Built]:
    """The hub's application over its services. Its background work runs until the block ends."""
    from corral.core.policy import CLIENT_PROOFS, PUBLIC, Access
    from corral.core.records import Scope
    from corral.edges.asgi import App, AppOptions, Dialect
    from corral.edges.hub_api import HubApi
    from corral.edges.inference_api import inference_endpoints
    from corral.edges.pages import Pages, security_headers
    from corral.edges.registry_door import REGISTRY_PREFIX, registry_challenge, registry_guard
    from corral.edges.web import web_endpoints
    from corral.edges.web_tools_api import WebToolsApi

    async with (
        open_hub_services(settings) as services,
        running_models(settings) as runners,
        _upstreams(services) as upstreams,
        _metering(services) as meter,
        _web_tools(settings, services, meter) as web_tools,
        _hosted(services, runners, upstreams, meter) as inference,
        mirroring_of(settings) as mirroring,
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
            quotas=registry.quotas,
            hurt_blobs=registry.hurt_blobs,
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
            confirm=services.credentials.confirm,
            guard=registry_guard(settings.public_url),
            challenge=registry_challenge(settings.public_url, services.tokens.service),
            error_page=Pages(public_url=settings.public_url, clock=services.clock, sign_up_open=settings.is_signup_open).error,
            fallback=fallback,
            trusted_proxies=settings.trusted_proxies,
            response_headers=security_headers(settings.public_url),
        )
        # The pages come last: the path of a model's page fits nearly everything.
        rows = [
            *api.endpoints(),
            *WebToolsApi(web_tools, lambda: inference.tags(None)).endpoints(),
            *inference_endpoints(inference, may_run, PUBLIC, upstreams=inference, web=web_tools),
            *_registry_endpoints(settings, services, registry),
            *web,
        ]
        flushing = repeated(services.credentials.flush_uses, every_s=_FLUSH_USES_EVERY_S)
        async with flushing, _collecting(registry.collector), scrubbing(settings, services), _cataloguing(registry):
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
    from corral.hub.collector import COLLECT_EVERY_S, COLLECT_FIRST_S

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
        task = background.create_task(repeat(collect, every_s=COLLECT_EVERY_S, first_s=COLLECT_FIRST_S))
        try:
            yield
        finally:
            task.cancel()


@contextlib.asynccontextmanager
async def _cataloguing(registry: RegistryServices) -> AsyncIterator[None]:
    """Describe what is pushed, and write down what is pulled, while the block runs."""
    from corral.hub.catalog import FLUSH_EVERY_S

    async with repeated(registry.catalog.flush, every_s=FLUSH_EVERY_S), asyncio.TaskGroup() as background:
        task = background.create_task(registry.describing.run())
        try:
            yield
        finally:
            task.cancel()


@contextlib.asynccontextmanager
async def _metering(services: HubServices) -> "AsyncIterator[UsageMeter]":
    """Usage entries on their way into the database."""
    from corral.hub.metering import FLUSH_EVERY_S, UsageMeter

    meter = UsageMeter(services.usage)
    async with repeated(meter.flush, every_s=FLUSH_EVERY_S):
        yield meter


@contextlib.asynccontextmanager
async def _hosted(
    services: HubServices, runners: "Runners", upstreams: "UpstreamEngine", meter: "UsageMeter"
) -> "AsyncIterator[HostedInference]":
    """Hosted inference on this hub's weights and at upstreams, metered into the database."""
    from corral.hub.hosting import Hosting
    from corral.hub.inference import HostedInference
    from corral.hub.running import RunningRequests

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
async def _web_tools(settings: Settings, services: HubServices, meter: "UsageMeter") -> "AsyncIterator[WebTools]":
    """Web search and fetch, as far as the operator set them up."""
    from corral.hub.web_tools import WebTools

    if not (settings.search_url or settings.is_web_fetch_on):
        # What goes out by itself takes a fifth of a second and 10 MB to import, and most hubs never do.
        yield WebTools(engine=None, fetcher=None, usage=meter, clock=services.clock)
        return
    from corral.clients.web import PageClient, PublicResolver, SearxngClient, open_page_session, open_search_session

    user_agent = f"corral/{corral.__version__}"
    resolver = PublicResolver(settings.web_fetch_networks)
    try:
        async with open_page_session(resolver) as pages, open_search_session() as searches:
            yield WebTools(
                engine=SearxngClient(searches, settings.search_url, user_agent=user_agent) if settings.search_url else None,
                fetcher=PageClient(pages, resolver, user_agent=user_agent) if settings.is_web_fetch_on else None,
                usage=meter,
                clock=services.clock,
            )
    finally:
        await resolver.close()


@contextlib.asynccontextmanager
async def _upstreams(services: HubServices) -> "AsyncIterator[UpstreamEngine]":
    from corral.engines.upstream import UpstreamEngine

    engine = UpstreamEngine(key_of=services.upstream_keys.of)
    try:
        yield engine
    finally:
        await engine.close()


async def _hub_facts(settings: Settings, services: HubServices) -> dict[str, Any]:
    from corral.wire.names import DEFAULT_TAG, cloud_tag, parse_name

    code = await services.accounts.new_setup_code()
    names = [parse_name(hosted.name) for hosted in await services.hosted.list()]
    return {
        "url": settings.public_url,
        "data": shortened(settings.corral_home, settings.home),
        "hosted": [(f"{name.repository}:{name.tag}", cloud_tag(name.short.removesuffix(f":{DEFAULT_TAG}"))) for name in names],
        "signup_url": f"{settings.public_url}/signup?code={code}" if code else "",
    }


async def run_hub(settings: Settings, on_ready: OnReady, stop: asyncio.Event) -> None:
    """Serve the hub until a signal or `stop`. Raises: conflict for a taken port."""
    await run(build_hub(settings), settings.hub_listen, on_ready, stop)
