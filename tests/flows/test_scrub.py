"""A disk that changes a blob: found by `corral hub scrub`, told of, not served any more, and healed by a push (F24)."""

import asyncio
import json
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any, TypeVar

import pytest

from corral.core.records import Principal
from corral.main.services import HubServices, RegistryServices, open_hub_services, registry_services
from corral.settings import Settings
from corral.wire.errors import CorralError
from corral.wire.manifest import MANIFEST_TYPE
from fakes_registry import digest_of
from flows.stack import Stack
from identity_hub import PASSWORD
from registry_hub import CONFIG, TINY, a_manifest, chunks, with_key

T = TypeVar("T")
WEIGHTS = b"weights of a model" * 1000


def on_hub(stack: Stack, work: Callable[[HubServices, RegistryServices], Coroutine[Any, Any, T]]) -> T:
    """Do something with the services of the installation's hub, which does not run."""

    async def run() -> T:
        settings = Settings.from_env(stack.env)
        async with open_hub_services(settings) as services:
            return await work(services, registry_services(settings, services))

    return asyncio.run(run())


async def alice_of(services: HubServices) -> Principal:
    return with_key(await services.accounts.named("alice"))


async def push(services: HubServices, built: RegistryServices) -> None:
    alice = await alice_of(services)
    for content in (WEIGHTS, CONFIG):
        await built.registry.put_blob(TINY, alice, digest_of(content), chunks(content), length=len(content))
    for tag in ("v1", "v2"):
        await built.registry.put_manifest(TINY, tag, alice, a_manifest(WEIGHTS), MANIFEST_TYPE)


async def pulled(services: HubServices, built: RegistryServices) -> int | str:
    """How long the weights are for whoever pulls them, or the code of the refusal."""
    alice = await alice_of(services)
    try:
        return (await built.registry.blob(TINY, digest_of(WEIGHTS), alice)).size_bytes
    except CorralError as error:
        return error.code


async def audited(services: HubServices, _: RegistryServices) -> list[tuple[str, str, str]]:
    events = [event for event in await services.audit.recent() if event.action.startswith("blob.")]
    return [(event.actor, event.action, event.note) for event in sorted(events, key=lambda event: event.at)]


@pytest.fixture
def stack(fresh: Stack) -> Stack:
    async def prepare(services: HubServices, built: RegistryServices) -> None:
        await services.accounts.add("alice", email="", password=PASSWORD, is_admin=False)
        await push(services, built)

    on_hub(fresh, prepare)
    return fresh


def test_f24_rotten_blob_is_found_named_and_healed_by_a_push(stack: Stack) -> None:
    digest = digest_of(WEIGHTS)
    path = Path(stack.env["HOME"]) / ".corral/blobs" / digest.file_name
    said = stack.corral("hub", "scrub")
    assert "Read 2 blobs of 18 KB: 0 damaged." in said.stderr
    path.write_bytes(WEIGHTS[:5000] + b"X" + WEIGHTS[5001:])
    assert on_hub(stack, pulled) == len(WEIGHTS)
    # ── it is found
    said = stack.corral("hub", "scrub", status=1)
    assert said.stdout.splitlines()[1].split() == [
        path.name[:19],
        "18",
        "KB",
        *said.stdout.split()[7:8],
        "alice/tiny:v1,",
        "alice/tiny:v2",
    ]
    assert "Read 2 blobs of 18 KB: 1 damaged." in said.stderr
    assert "Error: 1 blob is damaged\n→ push the models again" in said.stderr
    assert on_hub(stack, pulled) == "blob_unknown"
    assert on_hub(stack, audited) == [("console", "blob.damaged", "alice/tiny:v1, alice/tiny:v2")]
    hurt = json.loads(stack.corral("hub", "scrub", "--json", "--rate", "10MB", status=1).stdout)
    assert (hurt["damaged"], [(blob["digest"], blob["models"]) for blob in hurt["hurt"]]) == (
        0,
        [(str(digest), ["alice/tiny:v1", "alice/tiny:v2"])],
    )
    # ── and healed
    on_hub(stack, push)
    assert on_hub(stack, pulled) == len(WEIGHTS)
    assert "Read 2 blobs of 18 KB: 0 damaged, 1 healed." in stack.corral("hub", "scrub").stderr
    assert on_hub(stack, audited)[1:] == [("console", "blob.healed", "")]
    assert path.read_bytes() == WEIGHTS
    assert list((path.parent / "damaged").iterdir()) == []


@pytest.mark.parametrize("rate", ["lots", "0", "-1"])
def test_rate_that_is_none_is_refused(fresh: Stack, rate: str) -> None:
    assert f"{rate!r} is no size" in fresh.corral("hub", "scrub", "--rate", rate, status=2).stderr
