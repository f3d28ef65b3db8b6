"""A pushed model that is offered straight from the blob store, and what becomes of the offer: services on real storage."""

import asyncio
import json
import shutil
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from corral.core.records import Principal
from corral.core.registry import Visibility
from corral.hub.collector import Collected
from corral.hub.hosting import Hosting
from corral.hub.links import LEASE
from corral.hub.registry import Registry
from corral.main.services import HubServices, RegistryServices, offer_repository, open_hub_services, registry_services
from corral.settings import Settings
from corral.wire.manifest import MANIFEST_TYPE, parse_manifest
from fakes_models import gguf_bytes
from fakes_registry import digest_of
from identity_hub import PASSWORD, error_of
from registry_hub import CONFIG, TINY, a_manifest, chunks, with_key

WEIGHTS = gguf_bytes()


@dataclass(frozen=True)
class Hub:
    """A hub without its HTTP, and alice, whose model it has."""

    services: HubServices
    built: RegistryServices
    alice: Principal

    @property
    def registry(self) -> Registry:
        return self.built.registry

    async def push(self, tag: str = "latest") -> str:
        """The model; its manifest's digest."""
        for content in (WEIGHTS, CONFIG):
            await self.registry.put_blob(TINY, self.alice, digest_of(content), chunks(content), length=len(content))
        digest, _ = await self.registry.put_manifest(TINY, tag, self.alice, a_manifest(WEIGHTS), MANIFEST_TYPE)
        return str(digest)

    async def offered(self) -> list[str]:
        """What `list` and `get` agree on."""
        names = [hosted.name for hosted in await self.services.hosted.list()]
        assert [name for name in names if await self.services.hosted.get(name)] == names
        return names


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What every test begins with: tables, the account, the model."""

    folder = tmp_path_factory.mktemp("home")
    settings = Settings.from_env({"HOME": str(folder)})

    async def make() -> None:
        async with open_hub_services(settings) as services:
            alice = await services.accounts.add("alice", email="", password=PASSWORD, is_admin=False)
            await Hub(services, registry_services(settings, services), with_key(alice)).push()

    asyncio.run(make())
    return folder


@pytest.fixture
async def hub(tmp_path: Path, home: Path) -> AsyncIterator[Hub]:
    shutil.copytree(home, tmp_path, dirs_exist_ok=True)
    settings = Settings.from_env({"HOME": str(tmp_path)})
    async with open_hub_services(settings) as services:
        yield Hub(services, registry_services(settings, services), with_key(await services.accounts.named("alice")))


async def test_pushed_model_is_offered_without_a_copy(hub: Hub) -> None:
    assert (await offer_repository(hub.services, "Alice/TINY", is_public=True)).name == "Alice/TINY:latest"
    hosted = await hub.services.hosted.get("alice/tiny")
    assert hosted is not None
    assert hosted.model is not None
    assert hosted.model.weights == (await hub.registry.blob(TINY, digest_of(WEIGHTS), hub.alice)).path
    assert len(list(Path(hosted.model.weights or "").parent.glob("sha256-*"))) == 2


async def test_t029_offering_a_model_of_a_private_repository_shows_it_to_nobody_else(hub: Hub) -> None:
    assert not (await offer_repository(hub.services, "alice/tiny", is_public=True)).is_public
    bob = with_key(await hub.services.accounts.add("bob", email="", password=PASSWORD, is_admin=False))
    hosting = Hosting(hub.services.hosted)
    for stranger in (None, bob):
        assert await hosting.list(stranger) == []
        assert await hosting.resolve("alice/tiny", stranger) is None
    assert await hosting.resolve("alice/tiny", hub.alice) is not None
    assert (await error_of(hub.registry.manifest(TINY, "cloud", None))).code == "unauthorized"
    await hub.built.repositories.set_visibility(TINY, hub.alice, Visibility.PUBLIC)
    assert await hosting.resolve("alice/tiny", bob) is not None
    await hub.built.repositories.set_visibility(TINY, hub.alice, Visibility.PRIVATE)
    assert await hosting.resolve("alice/tiny", bob) is None


async def test_what_holds_no_weights_is_not_offered(hub: Hub) -> None:
    await hub.registry.put_manifest(TINY, "empty", hub.alice, a_manifest(), MANIFEST_TYPE)
    assert (await error_of(offer_repository(hub.services, "alice/tiny:empty", is_public=True))).code == "invalid"
    assert await hub.offered() == []


async def test_offered_model_of_a_public_repository_has_a_stub_that_anybody_may_install(hub: Hub) -> None:
    assert (await error_of(hub.registry.manifest(TINY, "cloud", None))).code == "unauthorized"
    await hub.built.repositories.set_visibility(TINY, hub.alice, Visibility.PUBLIC)
    await offer_repository(hub.services, "alice/tiny", is_public=True)
    manifest = parse_manifest((await hub.registry.manifest(TINY, "cloud", None)).body)
    assert manifest.config is not None
    config = json.loads((await hub.registry.blob(TINY, manifest.config.digest, None)).content or b"")
    assert (config["remote_host"], config["remote_model"]) == ("http://localhost:11435", "alice/tiny")


async def test_deleted_tag_withdraws_what_is_hosted_by_it(hub: Hub) -> None:
    await hub.push("second")
    await offer_repository(hub.services, "alice/tiny", is_public=True)
    await offer_repository(hub.services, "alice/tiny:second", is_public=True)
    await hub.registry.remove_manifest(TINY, "latest", hub.alice)
    assert await hub.offered() == ["alice/tiny:second"]
    assert await hub.services.hosted.get("alice/tiny") is None
    # Whoever pushes the tag again does not offer it: that is the operator's to say.
    await hub.push()
    assert await hub.offered() == ["alice/tiny:second"]


async def test_deleted_manifest_withdraws_what_is_hosted_by_its_tags(hub: Hub) -> None:
    digest = await hub.push("second")
    for tag in ("latest", "second"):
        await offer_repository(hub.services, f"alice/tiny:{tag}", is_public=True)
    await hub.registry.remove_manifest(TINY, digest, hub.alice)
    assert await hub.offered() == []
    assert (await error_of(hub.registry.manifest(TINY, "cloud", hub.alice))).code == "manifest_unknown"


async def test_deleted_repository_withdraws_what_is_hosted_from_it(hub: Hub) -> None:
    await offer_repository(hub.services, "alice/tiny", is_public=True)
    await hub.built.repositories.remove(TINY, hub.alice)
    assert await hub.offered() == []
    assert await hub.services.hosted.get("alice/tiny") is None


async def test_t119_deleted_account_takes_its_hosted_models_along(hub: Hub) -> None:
    await hub.services.accounts.add("grace", email="", password=PASSWORD, is_admin=True)
    await offer_repository(hub.services, "alice/tiny", is_public=True)
    await hub.services.accounts.remove("alice")
    assert await hub.offered() == []
    assert (await error_of(hub.services.accounts.add("Alice", email="", password=PASSWORD, is_admin=False))).code == "conflict"


async def test_hosted_model_is_never_collected(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    await offer_repository(hub.services, "alice/tiny", is_public=True)
    later = hub.services.clock.now() + 2 * LEASE
    # The services' clock is the machine's; there is none to hand them here.
    monkeypatch.setattr(type(hub.services.clock), "now", lambda clock: later)
    assert await hub.built.collector.collect() == Collected(uploads=2)
    hosted = await hub.services.hosted.get("alice/tiny")
    assert hosted is not None
    assert hosted.model is not None
    assert Path(hosted.model.weights or "").exists()
    await hub.built.repositories.remove(TINY, hub.alice)
    assert (await hub.built.collector.collect()).size_bytes == len(WEIGHTS) + len(CONFIG)
    assert not Path(hosted.model.weights or "").exists()
