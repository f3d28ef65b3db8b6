"""Both servers' inference routes over one engine that a test tells what to say: whatever the routes promise, both are asked."""

import json
from dataclasses import dataclass, field
from typing import Any, Literal

from asgi_client import Answer, Caller
from corral.core.policy import CLIENT_PROOFS, PUBLIC, Access
from corral.core.records import Capability, Model, Principal, RequestFacts, Scope
from corral.edges.asgi import App, AppOptions
from corral.edges.inference_api import inference_endpoints
from corral.edges.local_api import LocalApi, local_app
from corral.edges.local_guard import LocalGuard
from corral.hub.hosting import Hosting
from corral.hub.inference import HostedInference
from corral.hub.metering import UsageMeter
from corral.hub.running import RunningRequests
from corral.local.cloud import CloudAccess, CloudSwitch
from corral.local.models import LocalModels
from corral.serving.inference import Inference
from corral.wire.errors import CorralError
from fakes import FakeClock, MemoryUsage
from fakes_inference import FakePool, FakeRunner, FakeUpstreams, a_caller, a_hosted, a_hosting, a_model
from fakes_local import FakeGateway, MemoryModels, stub_models

Kind = Literal["local", "hub"]
KINDS: tuple[Kind, ...] = ("local", "hub")
EVERYTHING = frozenset(Capability) - {Capability.IMAGE}


async def always(principal: Principal) -> bool:
    return True


async def authenticate(facts: RequestFacts) -> Principal | None:
    """A stand-in for the hub's door: the header is the account's name."""
    names = facts.headers.get("authorization")
    return a_caller(names[0]) if names else None


@dataclass
class ApiServer:
    """One of the two servers with one model, `m`. runner: answers every request. pool_fails: what lending it ends in."""

    kind: Kind = "local"
    runner: Any = field(default_factory=FakeRunner)
    model: Model = field(default_factory=lambda: a_model("m", capabilities=EVERYTHING))
    pool_fails: CorralError | None = None
    pool: FakePool = field(init=False)

    async def post(self, path: str, body: Any = None, *, raw: bytes | None = None, **options: Any) -> Answer:
        return await self.call("POST", path, raw if raw is not None else json.dumps(body).encode(), **options)

    async def call(self, method: str, path: str, body: bytes = b"", **options: Any) -> Answer:
        headers = {"authorization": "ada"} if self.kind == "hub" else {}
        app = await self.app()
        return await Caller(app, host="localhost:11434").request(
            method, path, headers={**headers, **options.pop("headers", {})}, body=body, **options
        )

    async def app(self) -> App:
        self.pool = FakePool(self.runner, fails=self.pool_fails)
        return self._local() if self.kind == "local" else await self._hub()

    def _local(self) -> App:
        cloud = CloudAccess(FakeGateway(), CloudSwitch(False, lambda: False), device_name="box", version="0.34.0")
        models = LocalModels(MemoryModels(self.model), Inference(self.pool, FakeClock()), stub_models())
        api = LocalApi(models=models, loaded=list, cloud=cloud, hub_url=lambda: "http://localhost:11435", version="0.34.0")
        return local_app(api, LocalGuard(hostname="box"))

    async def _hub(self) -> App:
        service = HostedInference(
            hosting=Hosting(await a_hosting(a_hosted("m", model=self.model))),
            runners=self.pool,
            usage=UsageMeter(MemoryUsage()),
            running=RunningRequests(always),
            clock=FakeClock(),
            upstreams=FakeUpstreams(),
            relay=None,
        )
        rows = inference_endpoints(service, Access(CLIENT_PROOFS, Scope.INFERENCE), PUBLIC)
        return App(rows, AppOptions(authenticate=authenticate))
