"""Cloud tags: what they say, for whom they exist, and that nothing of them is stored."""

import json
from hashlib import sha256

import pytest

from corral.core.records import Capability, HostedModel, Scope, Visitor
from corral.hub.stubs import cloud_stub, with_port
from corral.wire.errors import CorralError
from corral.wire.manifest import CONFIG_TYPE, MANIFEST_TYPE, parse_config, parse_manifest
from corral.wire.names import Digest
from corral.wire.repositories import RepositoryName
from fakes_inference import a_hosted, a_hosting
from fakes_models import MemoryHosting
from identity_hub import error_of
from registry_hub import HUB, RegistryHub, with_key, with_token

ELSEWHERE = a_hosted("gpt-oss:120b", upstream_url="http://10.0.0.9:8000", upstream_model="secret/name")
LATEST = a_hosted("tiny")
PRIVATE = a_hosted("alice/private:1b", is_public=False)
GPT, TINY, MINE = RepositoryName("library", "gpt-oss"), RepositoryName("library", "tiny"), RepositoryName("Alice", "Private")


@pytest.fixture
async def hosting() -> MemoryHosting:
    return await a_hosting(ELSEWHERE, LATEST, PRIVATE)


@pytest.fixture
def hub(hosting: MemoryHosting) -> RegistryHub:
    return RegistryHub(hosted=hosting)


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("https://hub.example", "https://hub.example:443"),
        ("http://hub.example", "http://hub.example:80"),
        ("http://127.0.0.1:8080", "http://127.0.0.1:8080"),
        ("https://[::1]:8443", "https://[::1]:8443"),
        ("https://[::1]", "https://[::1]:443"),
    ],
)
def test_remote_host_always_has_its_port(url: str, expected: str) -> None:
    assert with_port(url) == expected


def test_stub_says_where_the_model_runs_and_what_it_can_do() -> None:
    assert LATEST.model is not None
    stub = cloud_stub(LATEST, HUB)
    manifest, config = parse_manifest(stub.manifest.body), parse_config(stub.config)
    assert manifest.layers == ()
    assert manifest.config is not None
    assert (manifest.config.digest, manifest.config.size_bytes) == (stub.config_digest, len(stub.config))
    assert manifest.config.media_type == CONFIG_TYPE
    assert Digest(sha256(stub.manifest.body).hexdigest()) == stub.manifest.digest
    assert config.is_stub
    assert (config.remote_host, config.remote_model) == ("https://hub.example:443", "tiny")
    assert config.capabilities == tuple(str(one) for one in Capability if one in LATEST.model.capabilities)
    assert config.context_length == (LATEST.model.details.context_length or 0)


def test_stub_is_the_same_bytes_each_time_and_tells_nothing_of_an_upstream() -> None:
    first, second = cloud_stub(ELSEWHERE, HUB), cloud_stub(ELSEWHERE, HUB)
    assert first == second
    assert json.loads(first.config)["remote_model"] == "gpt-oss:120b"
    assert b"10.0.0.9" not in first.config
    assert b"secret" not in first.config


@pytest.mark.parametrize(
    ("name", "tag", "hosted"),
    [
        (GPT, "120b-cloud", ELSEWHERE),
        (RepositoryName("LIBRARY", "GPT-oss"), "120B-CLOUD", ELSEWHERE),
        (TINY, "cloud", LATEST),
        (TINY, "latest-cloud", LATEST),
    ],
)
async def test_cloud_tag_is_served_to_anybody_and_its_config_by_digest(
    hub: RegistryHub, name: RepositoryName, tag: str, hosted: HostedModel
) -> None:
    alice = await hub.add("alice")
    expected = cloud_stub(hosted, HUB)
    for caller in (None, Visitor(), alice, with_token(alice.account, {}), with_key(alice.account, frozenset())):
        assert await hub.registry.manifest(name, tag, caller) == expected.manifest
        assert await hub.registry.manifest(name, str(expected.manifest.digest), caller) == expected.manifest
        facts = await hub.registry.blob(name, expected.config_digest, caller)
        assert (facts.content, facts.size_bytes, facts.path) == (expected.config, len(expected.config), None)
    assert expected.manifest.media_type == MANIFEST_TYPE
    assert hub.files.blobs == {}


@pytest.mark.parametrize("tag", ["120b", "cloud", "7b-cloud", "-cloud", "120b-cloud-cloud", "local", "120b:cloud"])
async def test_other_tags_are_no_stubs(hub: RegistryHub, tag: str) -> None:
    root = await hub.add("root", is_admin=True)
    error = await error_of(hub.registry.manifest(GPT, tag, root))
    assert error.status in (400, 404)


async def test_nested_repository_is_not_mistaken_for_another_registry(hub: RegistryHub) -> None:
    name = RepositoryName("registry.ollama.ai", "library/gpt-oss")
    assert await hub.stubs.tagged(name, "120b-cloud") is None
    assert await hub.stubs.holding(name, cloud_stub(ELSEWHERE, HUB).config_digest) is None


async def test_stub_of_a_private_model_exists_for_whoever_may_use_it(hub: RegistryHub) -> None:
    alice, bob = await hub.add("alice"), await hub.add("bob")
    stub = cloud_stub(PRIVATE, HUB)
    for doing in (
        lambda caller: hub.registry.manifest(MINE, "1b-cloud", caller),
        lambda caller: hub.registry.manifest(MINE, str(stub.manifest.digest), caller),
        lambda caller: hub.registry.blob(MINE, stub.config_digest, caller),
    ):
        await doing(alice)
        await doing(with_token(alice.account, {"alice/private": ["pull"]}))
        assert (await error_of(doing(None))).code == "unauthorized"
        assert (await error_of(doing(with_token(alice.account, {})))).code == "unauthorized"
        assert (await error_of(doing(with_key(alice.account, frozenset({Scope.INFERENCE}))))).code == "forbidden"
        for stranger in (bob, Visitor()):
            assert (await error_of(doing(stranger))).code == "name_unknown"


async def test_stub_of_a_withdrawn_model_is_gone_at_once(hub: RegistryHub, hosting: MemoryHosting) -> None:
    stub = cloud_stub(ELSEWHERE, HUB)
    await hub.registry.blob(GPT, stub.config_digest, None)
    await hosting.withdraw(ELSEWHERE.name)
    for doing in (
        hub.registry.manifest(GPT, "120b-cloud", None),
        hub.registry.manifest(GPT, str(stub.manifest.digest), None),
        hub.registry.blob(GPT, stub.config_digest, None),
    ):
        assert (await error_of(doing)).code == "unauthorized"


async def test_stub_that_changed_is_not_served_under_its_old_digest(hub: RegistryHub, hosting: MemoryHosting) -> None:
    before = cloud_stub(LATEST, HUB)
    await hub.registry.blob(TINY, before.config_digest, None)
    await hosting.offer(a_hosted("tiny", upstream_url="http://10.0.0.9:8000", upstream_model="m"))
    assert (await error_of(hub.registry.blob(TINY, before.config_digest, None))).code == "unauthorized"
    after = await hub.registry.manifest(TINY, "cloud", None)
    assert after.digest != before.manifest.digest


async def test_newly_hosted_model_is_found_by_digest_after_its_tag(hub: RegistryHub, hosting: MemoryHosting) -> None:
    await error_of(hub.registry.blob(TINY, Digest("0" * 64), None))
    new = a_hosted("new:1b", upstream_url="http://10.0.0.9:8000", upstream_model="m")
    await hosting.offer(new)
    name = RepositoryName("library", "new")
    await hub.registry.manifest(name, "1b-cloud", None)
    assert (await hub.registry.blob(name, cloud_stub(new, HUB).config_digest, None)).content


async def test_model_that_cannot_be_read_breaks_the_request_and_not_the_answer(
    hub: RegistryHub, hosting: MemoryHosting, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def damaged(name: str) -> HostedModel | None:
        raise CorralError("unavailable")

    monkeypatch.setattr(hosting, "get", damaged)
    assert (await error_of(hub.registry.manifest(TINY, "cloud", None))).code == "unavailable"
