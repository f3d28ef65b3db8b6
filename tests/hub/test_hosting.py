"""Which hosted models exist for whom, and what is told of them."""

from dataclasses import replace

import pytest

from corral.core.records import HostedModel
from corral.hub.hosting import Hosting, may_use, runnable_model, shown_model
from corral.wire.errors import CorralError
from fakes_inference import a_caller, a_hosted, a_hosting

PUBLIC = a_hosted("smollm2:135m")
MINE = a_hosted("ada/secret:1b", is_public=False)
LIBRARY = a_hosted("hidden:1b", is_public=False)
ELSEWHERE = a_hosted("big:70b", upstream_url="http://10.0.0.9:8000", upstream_model="meta/big")


@pytest.fixture
async def hosting() -> Hosting:
    return Hosting(await a_hosting(PUBLIC, MINE, LIBRARY, ELSEWHERE))


@pytest.mark.parametrize(
    "requested",
    [
        "smollm2:135m",
        "smollm2:135m-cloud",
        "SmolLM2:135M-CLOUD",
        "smollm2:135m:cloud",
        "library/smollm2:135m",
        "https://registry.ollama.ai/library/smollm2:135m",
    ],
)
async def test_model_is_found_by_any_spelling_of_its_name(hosting: Hosting, requested: str) -> None:
    assert await hosting.resolve(requested, a_caller()) == PUBLIC


@pytest.mark.parametrize(
    "requested", ["smollm2", "smollm2:135m:local", "evil.example/library/smollm2:135m", "other/smollm2:135m"]
)
async def test_model_of_another_name_is_absent(hosting: Hosting, requested: str) -> None:
    assert await hosting.resolve(requested, a_caller()) is None


async def test_malformed_name_is_refused(hosting: Hosting) -> None:
    with pytest.raises(CorralError, match="invalid model name"):
        await hosting.resolve("../etc", a_caller())


@pytest.mark.parametrize(
    ("hosted", "caller", "sees"),
    [
        (PUBLIC, None, True),
        (PUBLIC, a_caller(), True),
        (MINE, None, False),
        (MINE, a_caller("ada"), True),
        (MINE, a_caller("ADA"), True),
        (MINE, a_caller("bob"), False),
        (MINE, a_caller("root", is_admin=True), False),
        (LIBRARY, a_caller("ada"), False),
        (LIBRARY, a_caller("root", is_admin=True), True),
        (LIBRARY, None, False),
    ],
)
def test_model_exists_for_whom_it_is_meant(hosted: HostedModel, caller: object, sees: bool) -> None:
    assert may_use(caller, hosted) is sees  # type: ignore[arg-type]


async def test_listing_and_finding_agree(hosting: Hosting) -> None:
    for caller in (None, a_caller("ada"), a_caller("bob"), a_caller("root", is_admin=True)):
        listed = await hosting.list(caller)
        found = [hosted for hosted in (MINE, ELSEWHERE, LIBRARY, PUBLIC) if await hosting.resolve(hosted.name, caller)]
        assert list(listed) == found


def test_shown_model_tells_nothing_of_this_machine() -> None:
    assert PUBLIC.model is not None
    kept = replace(PUBLIC, model=replace(PUBLIC.model, projector="/models/p", adapters=("/models/a",)))
    shown = shown_model(kept)
    assert (shown.weights, shown.projector, shown.adapters) == (None, None, ())
    assert runnable_model(kept) == kept.model


def test_shown_model_of_an_upstream_tells_nothing_of_it() -> None:
    shown, run = shown_model(ELSEWHERE), runnable_model(ELSEWHERE)
    assert "10.0.0.9" not in repr(shown)
    assert "meta/big" not in repr(shown)
    assert (run.remote_host, run.remote_model) == ("http://10.0.0.9:8000", "meta/big")
    assert shown.name.short == "big:70b"
