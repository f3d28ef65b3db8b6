"""Making, copying and removing models over a store in memory: what comes out, what is told, and what is refused how."""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator
from typing import Any

import msgspec
import pytest

from corral.core.records import Model
from corral.local.creating import ModelMaker
from corral.local.library import Library
from corral.wire import manifest
from corral.wire.create import CreateRequest, ProgressEvent
from corral.wire.errors import CorralError
from corral.wire.manifest import ADAPTER_LAYER, DRAFT_LAYER, MODEL_LAYER, PROJECTOR_LAYER, Manifest, ModelConfig
from corral.wire.names import ModelName, parse_name
from fakes_library import (
    ADAPTER,
    PROJECTOR,
    UNQUANTIZED,
    WEIGHTS,
    MemoryLibrary,
    ScriptedTools,
    digest_of,
    safetensors_bytes,
    shard,
)
from fakes_models import LLAMA, gguf_bytes

HUB = "https://hub.example"


class World:
    """A library in memory. pulled: names that were asked of a registry, which has those of `remote`."""

    def __init__(self) -> None:
        self.store = MemoryLibrary()
        self.tools = ScriptedTools()
        self.unloaded: list[str] = []
        self.pulled: list[str] = []
        self.remote: dict[str, bytes] = {}
        self.is_pruning = True

    @property
    def library(self) -> Library:
        maker = ModelMaker(self.store, self.store, self.tools, hub_url=lambda: HUB, pull=self.pull)
        return Library(self.store, self.store, maker, unload=self.unload, is_pruning=self.is_pruning)

    async def unload(self, model: Model) -> None:
        self.unloaded.append(model.name.short)

    async def pull(self, name: ModelName) -> AsyncGenerator[ProgressEvent, None]:
        self.pulled.append(name.short)
        yield ProgressEvent(status="pulling manifest")
        if name.short not in self.remote:
            raise CorralError("not_found", "pull model manifest: file does not exist", status=500)
        await self.store.put_manifest(name, self.remote[name.short])
        yield ProgressEvent(status="success")

    async def create(self, **fields: Any) -> list[str]:
        """The statuses."""
        request = msgspec.convert({"model": "mine", **fields}, CreateRequest)
        return [event.status async for event in self.library.create(request)]

    async def refusal(self, **fields: Any) -> tuple[int, str]:
        """Status and text of what is raised, once nothing was installed."""
        before = dict(self.store.manifests)
        with pytest.raises(CorralError) as caught:
            await self.create(**fields)
        assert self.store.manifests == before
        return caught.value.status, caught.value.message

    def sent(self, **files: bytes) -> dict[str, str]:
        """Files at the server. files: `tiny_gguf` for `tiny.gguf`."""
        return {name.replace("_", "."): str(self.store.put(content)) for name, content in files.items()}

    async def base(self, name: str = "base", **fields: Any) -> None:
        """An installed model."""
        await self.create(model=name, files=self.sent(tiny_gguf=WEIGHTS), **fields)

    def document(self, name: str = "mine") -> Manifest:
        return manifest.parse_manifest(self.store.manifests[parse_name(name)])

    def config(self, name: str = "mine") -> ModelConfig:
        found = self.document(name).config
        assert found is not None
        return manifest.parse_config(self.store.blobs[found.digest])

    def contents(self, kind: str, name: str = "mine") -> list[bytes]:
        """What the layers of a kind hold, in order."""
        layers = self.document(name).layers
        return [self.store.blobs[layer.digest] for layer in layers if layer.media_type.endswith(f".{kind}")]

    def kinds(self, name: str = "mine") -> list[str]:
        return [layer.media_type.rpartition(".")[2] for layer in self.document(name).layers]


@pytest.fixture
def world() -> World:
    return World()


# ── Out of files ─────────────────────────────────────────────────────────────────────────────────────────────────────


async def test_model_of_a_gguf_file_has_its_facts_and_the_texts(world: World) -> None:
    statuses = await world.create(
        files=world.sent(tiny_gguf=WEIGHTS),
        system="Be brief.",
        template="{{ .Prompt }}",
        license=["MIT", "", "Mine"],
        parameters={"temperature": 0.5, "stop": ["a"], "seed": None},
        messages=[{"role": "user", "content": "hi"}],
        renderer="r",
        parser="p",
        requires="0.14.0",
    )
    weights = str(digest_of(WEIGHTS))
    assert statuses[:2] == ["parsing GGUF", f"using existing layer {weights}"]
    assert all(status.startswith("creating new layer sha256:") for status in statuses[2:-2])
    assert statuses[-2:] == ["writing manifest", "success"]
    assert world.kinds() == ["model", "template", "system", "license", "license", "params", "messages"]
    assert world.contents("model") == [WEIGHTS]
    assert world.contents("license") == [b"MIT", b"Mine"]
    assert world.contents("params") == [b'{"stop":["a"],"temperature":0.5}\n']
    assert world.contents("messages") == [b'[{"role":"user","content":"hi"}]\n']
    assert world.config() == ModelConfig(
        model_format="gguf",
        model_family="llama",
        model_families=("llama",),
        model_type="160",
        file_type="Q4_1",
        renderer="r",
        parser="p",
        requires="0.14.0",
    )


async def test_files_are_told_apart_by_what_they_say_of_themselves(world: World) -> None:
    await world.create(
        files=world.sent(b_gguf=WEIGHTS, a_gguf=PROJECTOR),
        adapters=world.sent(lora_gguf=ADAPTER),
        draft_files=world.sent(small_gguf=gguf_bytes({**LLAMA, "general.name": "draft"})),
    )
    types = [layer.media_type for layer in world.document().layers]
    assert types == [PROJECTOR_LAYER, MODEL_LAYER, DRAFT_LAYER, ADAPTER_LAYER]
    assert world.config().draft == {"model_format": "gguf", "architecture": "llama"}


async def test_gguf_is_known_by_its_content_too(world: World) -> None:
    await world.create(files=world.sent(weights=WEIGHTS))
    assert world.kinds() == ["model"]


async def test_info_goes_before_what_the_file_says(world: World) -> None:
    info = {
        "model_family": "mine",
        "base_name": "b",
        "parameter_size": "9B",
        "quantization_level": "Q9",
        "context_length": 5,
        "embedding_length": 6.0,
        "capabilities": ["vision", 7],
    }
    await world.create(files=world.sent(tiny_gguf=WEIGHTS), info=info)
    config = world.config()
    assert (config.model_family, config.model_families, config.model_type, config.file_type) == (
        "mine",
        ("mine", "llama"),
        "9B",
        "Q9",
    )
    assert (config.base_name, config.context_length, config.embedding_length) == ("b", 5, 6)
    assert config.capabilities == ("vision",)


DIGEST = "sha256:" + "0" * 64


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({}, "neither 'from' or 'files' was specified"),
        ({"model": "a//b", "from": "x"}, "invalid model name"),
        ({"model": "", "from": "x"}, "invalid model name"),
        ({"from": "a//b"}, "invalid model name"),
        ({"from": "x:cloud:local"}, "invalid model name"),
        ({"files": {}}, "unknown type"),
        ({"files": {"a.gguf": ""}}, "invalid digest format"),
        ({"files": {"a.gguf": "sha256:" + "0" * 63}}, "invalid digest format"),
        ({"files": {"a.gguf": DIGEST}}, f"the file a.gguf was not sent: blob {DIGEST} is not here"),
        ({"files": {"a.gguf": DIGEST}, "draft_quantize": "Q8_0"}, "--draft-quantize requires a DRAFT model"),
        ({"from": "x:cloud", "draft_files": {"a": DIGEST}}, "DRAFT cannot be used with remote models"),
        ({"from": "x", "remote_host": "http://[bad"}, "bad remote"),
        ({"from": "x:cloud", "info": {"model_family": 1}}, 'info field "model_family" must be a string'),
        ({"from": "x:cloud", "info": {"context_length": "1"}}, 'info field "context_length" must be a number'),
        ({"from": "x:cloud", "info": {"context_length": -1}}, 'info field "context_length" must be a non-negative integer'),
        ({"from": "x:cloud", "info": {"embedding_length": 1.5}}, 'info field "embedding_length" must be a non-negative integer'),
        ({"from": "x:cloud", "license": {"a": 1}}, "license must be a text or a list of texts"),
        ({"from": "x:cloud", "template": "{{ if }}"}, "template error: template: :1: missing value for if"),
    ],
)
async def test_what_cannot_be_made_is_refused_in_ollamas_words(world: World, fields: dict[str, Any], message: str) -> None:
    assert await world.refusal(**fields) == (400, message)


@pytest.mark.parametrize("name", ["../a.gguf", "/etc/passwd", "a/../../b", "a//b", ".", "", "a\\..\\b", "a\nb", "x" * 1025])
@pytest.mark.parametrize("field", ["files", "adapters", "draft_files"])
async def test_t108_file_names_that_do_not_stay_inside_are_refused(world: World, field: str, name: str) -> None:
    files = {"files": world.sent(a_gguf=WEIGHTS), field: {name: str(world.store.put(WEIGHTS))}}
    assert await world.refusal(**files) == (400, "file path must be relative")


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"a.gguf": b"no GGUF"}, "supplied file was not in GGUF format"),
        ({"a.json": b"{}"}, "unknown type"),
        ({"a.bin": b"\x80\x04pickle"}, "unknown type"),
        ({"a.gguf": WEIGHTS[:200]}, "a.gguf is not a usable GGUF file: it is cut short"),
        (
            {"a.gguf": WEIGHTS, "b.gguf": gguf_bytes(filler=b"x")},
            "2 models were given; a model is made of one, its projector and its adapters",
        ),
        ({"a.gguf": PROJECTOR}, "no base model was found"),
        ({"a.gguf": ADAPTER}, "no base model was found"),
        ({"a.gguf": gguf_bytes({"general.name": "x"})}, "a.gguf does not say which architecture it has"),
    ],
)
async def test_t105_files_that_cannot_be_run_are_refused(world: World, files: dict[str, bytes], message: str) -> None:
    sent = {name: str(world.store.put(content)) for name, content in files.items()}
    assert await world.refusal(files=sent) == (400, message)


async def test_t105_gguf_cut_at_any_byte_makes_no_model(world: World) -> None:
    for length in range(4, len(WEIGHTS), 7):
        status, _ = await world.refusal(files=world.sent(tiny_gguf=WEIGHTS[:length]))
        assert status == 400


async def test_adapters_are_one_file_and_adapters(world: World) -> None:
    weights = world.sent(tiny_gguf=WEIGHTS)
    two = world.sent(a_gguf=ADAPTER, b_gguf=ADAPTER)
    assert await world.refusal(files=weights, adapters=two) == (400, "only one adapter is currently supported")
    assert await world.refusal(files=weights, adapters=world.sent(a_gguf=WEIGHTS)) == (400, "a.gguf is no adapter")
    assert await world.refusal(files=weights, adapters={}) == (400, "unknown type")
    assert await world.refusal(files=weights, draft_files=world.sent(a_gguf=ADAPTER)) == (400, "a.gguf is an adapter")


# ── Tools ────────────────────────────────────────────────────────────────────────────────────────────────────────────


async def test_quantizing_tells_how_far_it_is_and_replaces_the_weights(world: World) -> None:
    world.tools.result = WEIGHTS
    request = CreateRequest(model="mine", files=world.sent(a_gguf=UNQUANTIZED), quantize="q4_k_m")
    events = [event async for event in world.library.create(request)]
    working = [event for event in events if event.digest]
    size = len(UNQUANTIZED)
    assert {event.status for event in working} == {"quantizing F16 model to Q4_K_M"}
    assert (working[-1].digest, working[-1].total, working[-1].completed) == ("0" * 19, size, size)
    assert "verifying conversion" in [event.status for event in events]
    assert world.tools.calls == [("quantize", ["model.gguf"], ("Q4_K_M",))]
    assert world.contents("model") == [WEIGHTS]
    assert world.config().file_type == "Q4_1"


@pytest.mark.parametrize(
    ("weights", "kind", "message"),
    [
        (UNQUANTIZED, "q3", "unsupported quantization type Q3 - supported types are F32, F16, Q4_K_S, Q4_K_M, Q8_0"),
        (WEIGHTS, "q8_0", "quantization is only supported for F16, BF16 and F32 models"),
    ],
)
async def test_quantizing_what_cannot_be_is_refused_with_500(world: World, weights: bytes, kind: str, message: str) -> None:
    assert await world.refusal(files=world.sent(a_gguf=weights), quantization=kind) == (500, message)


async def test_quantizing_to_what_it_is_does_nothing(world: World) -> None:
    await world.create(files=world.sent(a_gguf=UNQUANTIZED), quantize="F16")
    assert world.contents("model") == [UNQUANTIZED]


async def test_draft_model_is_quantized_on_its_own(world: World) -> None:
    world.tools.result = WEIGHTS
    await world.create(files=world.sent(a_gguf=UNQUANTIZED), draft_files=world.sent(d_gguf=UNQUANTIZED), draft_quantize="Q8_0")
    assert world.contents("model") == [UNQUANTIZED]
    assert world.contents("draft") == [WEIGHTS]
    assert world.config().file_type == "F16"


async def test_a_tool_that_is_not_there_is_named(world: World) -> None:
    assert await world.refusal(files=world.sent(a_gguf=UNQUANTIZED), quantize="Q8_0") == (501, "quantize needs a program")
    assert await world.refusal(files=world.sent(a_safetensors=safetensors_bytes())) == (501, "convert needs a program")


async def test_parts_of_a_split_file_are_merged(world: World) -> None:
    world.tools.result = WEIGHTS
    names = {f"dir/m-0000{number}-of-00002.gguf": str(world.store.put(shard(number))) for number in (1, 2)}
    await world.create(files=names)
    assert world.tools.calls == [
        ("merge", ["m-00001-of-00002.gguf", "m-00002-of-00002.gguf"], ("m-00001-of-00002.gguf",)),
    ]
    assert world.contents("model") == [WEIGHTS]


@pytest.mark.parametrize(
    ("names", "says"),
    [
        (["m-00001-of-00002.gguf"], "needs all of its parts|was given 1"),
        (["m-00001-of-00002.gguf", "n-00002-of-00002.gguf"], "needs all of its parts"),
        (["a.gguf", "b.gguf"], "needs all of its parts"),
        (["m-00001-of-00003.gguf", "m-00002-of-00003.gguf"], "of 3 parts was given 2"),
    ],
)
async def test_split_file_without_all_of_its_parts_is_refused(world: World, names: list[str], says: str) -> None:
    world.tools.result = WEIGHTS
    sent = {name: str(world.store.put(shard(number))) for number, name in enumerate(names, start=1)}
    with pytest.raises(CorralError, match=says) as caught:
        await world.create(files=sent)
    assert caught.value.status == 400
    assert not world.tools.calls


async def test_safetensors_are_converted_with_what_lies_beside_them(world: World) -> None:
    world.tools.result = WEIGHTS
    files = {"model.safetensors": safetensors_bytes(), "config.json": b"{}", "sub/tokenizer.model": b"t"}
    statuses = await world.create(files={name: str(world.store.put(content)) for name, content in files.items()})
    assert statuses[0] == "converting model"
    assert world.tools.calls == [("convert", sorted(files), ())]
    world.tools.result = ADAPTER
    statuses = await world.create(**{"from": "mine"}, adapters=world.sent(a_safetensors=safetensors_bytes()))
    assert statuses[0] == "converting adapter"
    assert world.kinds() == ["model", "adapter"]


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"1234567",
        safetensors_bytes(length=2**63),
        safetensors_bytes(length=1),
        safetensors_bytes(end=9),
        safetensors_bytes(end=-1),
    ],
)
async def test_t109_safetensors_that_lie_about_their_length_are_refused(world: World, content: bytes) -> None:
    world.tools.result = WEIGHTS
    status, message = await world.refusal(files={"model.safetensors": str(world.store.put(content))})
    assert status == 400
    assert "safetensors" in message
    assert not world.tools.calls


@pytest.mark.parametrize("name", ["model.py", "pytorch_model.bin", "a.pkl", "a.pth"])
async def test_t109_nothing_that_could_run_goes_to_the_converter(world: World, name: str) -> None:
    world.tools.result = WEIGHTS
    files = {"model.safetensors": str(world.store.put(safetensors_bytes())), name: str(world.store.put(b"import os"))}
    status, message = await world.refusal(files=files)
    assert (status, message.split()[0]) == (400, name)
    assert not world.tools.calls


async def test_draft_model_is_not_converted(world: World) -> None:
    fields = {"files": world.sent(tiny_gguf=WEIGHTS), "draft_files": world.sent(a_safetensors=safetensors_bytes())}
    assert (await world.refusal(**fields))[0] == 501


async def test_leaving_while_a_tool_works_ends_the_tool(world: World) -> None:
    ended = asyncio.Event()

    async def quantize(*_: object) -> None:
        try:
            await asyncio.Event().wait()
        finally:
            ended.set()

    world.tools.quantize = quantize  # type: ignore[method-assign]  # the real one would need a program
    request = CreateRequest(model="mine", files=world.sent(a_gguf=UNQUANTIZED), quantize="Q8_0")
    events = world.library.create(request)
    statuses = [(await anext(events)).status for _ in range(2)]
    assert statuses == ["parsing GGUF", "quantizing F16 model to Q8_0"]
    await asyncio.sleep(0)
    await events.aclose()
    assert ended.is_set()
    assert world.store.manifests == {}


# ── Out of a model ───────────────────────────────────────────────────────────────────────────────────────────────────


async def test_model_of_a_model_inherits_and_replaces(world: World) -> None:
    await world.base(
        system="old",
        template="{{ .Prompt }}",
        license="MIT",
        parameters={"temperature": 1, "stop": ["a"]},
        messages=[{"role": "user", "content": "old"}],
        renderer="r",
        parser="p",
    )
    fields = {"system": "new", "license": "Mine", "parameters": {"temperature": 2}, "parser": "q"}
    statuses = await world.create(**{"from": "BASE"}, **fields)
    assert statuses[0] == f"using existing layer {digest_of(WEIGHTS)}"
    assert world.contents("system") == [b"new"]
    assert world.contents("template") == [b"{{ .Prompt }}"]
    assert world.contents("license") == [b"MIT", b"Mine"]
    assert world.contents("params") == [b'{"stop":["a"],"temperature":2}\n']
    assert world.contents("messages") == [b'[{"role":"user","content":"old"}]\n']
    assert (world.config().renderer, world.config().parser, world.config().model_family) == ("r", "q", "llama")
    assert world.document().layers[0].source == "base:latest"


async def test_model_of_a_stub_is_a_stub(world: World) -> None:
    await world.create(model="far", **{"from": "gpt:20b-cloud"}, info={"capabilities": ["tools"], "context_length": 9})
    assert world.config("far").remote_host == f"{HUB}:443"
    assert world.config("far").remote_model == "gpt:20b"
    assert world.config("far").capabilities == ("tools",)
    await world.create(**{"from": "far"}, system="Be brief.")
    assert world.config() == world.config("far")
    assert world.contents("system") == [b"Be brief."]


@pytest.mark.parametrize(
    ("given", "kept"),
    [
        ("http://10.0.0.1", "http://10.0.0.1:11434"),
        ("ollama.com", "https://ollama.com:443"),
        ("https://hub.example", "https://hub.example:443"),
        ("hub:8080/a/../b/", "http://hub:8080/b"),
        ("/p", "http://localhost:11434/p"),
        ("http://[::1]:1", "http://[::1]:1"),
    ],
)
async def test_remote_host_is_kept_as_a_whole_address(world: World, given: str, kept: str) -> None:
    await world.create(**{"from": "x"}, remote_host=given)
    assert world.config().remote_host == kept


@pytest.mark.parametrize("host", ["http://user:secret@hub", "http://ho st", "http://h:99999", "http://h?x=1"])
async def test_remote_host_that_is_none_is_refused(world: World, host: str) -> None:
    assert await world.refusal(**{"from": "x"}, remote_host=host) == (400, "bad remote")


async def test_missing_base_is_pulled_first(world: World) -> None:
    await world.base()
    world.remote["there:1b"] = world.store.manifests.pop(parse_name("base"))
    statuses = await world.create(**{"from": "there:1b"})
    assert statuses[0] == "pulling manifest"
    assert statuses.count("success") == 1
    assert world.kinds() == ["model"]


async def test_missing_base_that_no_registry_has_is_told_as_the_pull_tells_it(world: World) -> None:
    assert await world.refusal(**{"from": "nowhere"}) == (500, "pull model manifest: file does not exist")


async def test_missing_base_without_a_way_to_pull_is_404(world: World) -> None:
    maker = ModelMaker(world.store, world.store, world.tools, hub_url=lambda: HUB)
    library = Library(world.store, world.store, maker, unload=world.unload)
    with pytest.raises(CorralError, match="model 'nowhere:latest' not found") as caught:
        await anext(library.create(CreateRequest(model="mine", source="nowhere")))
    assert caught.value.status == 404


async def test_base_that_lacks_a_blob_or_is_damaged_makes_nothing(world: World) -> None:
    await world.base()
    world.store.blobs[digest_of(WEIGHTS)] = WEIGHTS[:100]
    assert (await world.refusal(**{"from": "base"}))[0] == 400
    del world.store.blobs[digest_of(WEIGHTS)]
    status, message = await world.refusal(**{"from": "base"})
    assert (status, message) == (404, f"model 'base:latest' lacks the blob {digest_of(WEIGHTS)}; pull it again")


async def test_remaking_a_model_keeps_its_spelling_and_removes_what_nobody_needs(world: World) -> None:
    await world.base("Mine", system="old")
    old_config = world.document("Mine").config
    await world.create(model="mine", files=world.sent(other_gguf=UNQUANTIZED))
    assert list(world.store.manifests) == [parse_name("Mine")]
    assert old_config is not None
    assert not {digest_of(WEIGHTS), digest_of(b"old"), old_config.digest} & world.store.blobs.keys()
    assert world.unloaded == ["Mine:latest"]


async def test_remaking_a_model_without_pruning_keeps_everything(world: World) -> None:
    world.is_pruning = False
    await world.base("mine", system="old")
    await world.create(files=world.sent(other_gguf=UNQUANTIZED))
    assert {digest_of(WEIGHTS), digest_of(b"old")} <= world.store.blobs.keys()


async def test_remaking_a_model_of_itself_keeps_the_weights(world: World) -> None:
    await world.base("mine")
    await world.create(**{"from": "mine"}, system="new")
    assert world.kinds() == ["model", "system"]
    assert world.contents("model") == [WEIGHTS]
    assert world.unloaded == []


async def test_blobs_are_kept_while_a_model_is_made_of_them(world: World) -> None:
    request = CreateRequest(model="mine", files=world.sent(tiny_gguf=WEIGHTS), system="new")
    async for _ in world.library.create(request):
        await world.store.remove_unused(list(world.store.blobs))
    assert world.contents("model") == [WEIGHTS]
    assert world.contents("system") == [b"new"]


# ── Copies ───────────────────────────────────────────────────────────────────────────────────────────────────────────


async def test_copy_is_the_same_manifest(world: World) -> None:
    await world.base()
    await world.library.copy("BASE", "ns/copy:1")
    assert world.store.manifests[parse_name("ns/copy:1")] == world.store.manifests[parse_name("base")]


async def test_copy_onto_itself_and_onto_another(world: World) -> None:
    await world.base()
    await world.create(files=world.sent(other_gguf=UNQUANTIZED))
    await world.library.copy("base", "Base")
    assert list(world.store.manifests) == [parse_name("base"), parse_name("mine")]
    await world.library.copy("base", "MINE")
    assert world.contents("model") == [WEIGHTS]
    assert digest_of(UNQUANTIZED) not in world.store.blobs


@pytest.mark.parametrize(
    ("source", "destination", "status", "message"),
    [
        ("a//b", "c", 400, 'source "a//b" is invalid'),
        ("", "c", 400, 'source "" is invalid'),
        ("base", "a b", 400, 'destination "a b" is invalid'),
        ("a\x00\u2028é", "c", 400, 'source "a\\x00\\u2028é" is invalid'),
        ("none", "c", 404, 'model "none" not found'),
    ],
)
async def test_copy_is_refused_in_ollamas_words(world: World, source: str, destination: str, status: int, message: str) -> None:
    with pytest.raises(CorralError) as caught:
        await world.library.copy(source, destination)
    assert (caught.value.status, caught.value.message) == (status, message)


# ── Removing ─────────────────────────────────────────────────────────────────────────────────────────────────────────


async def test_delete_removes_the_model_and_all_that_only_it_needs(world: World) -> None:
    world.is_pruning = False  # OLLAMA_NOPRUNE is not about what is deleted
    await world.base(system="shared")
    await world.create(files=world.sent(other_gguf=UNQUANTIZED), system="shared")
    await world.library.delete("Base")
    assert list(world.store.manifests) == [parse_name("mine")]
    assert set(world.store.blobs) == {layer.digest for layer in world.document().blobs}
    assert world.unloaded == ["base:latest"]


async def test_delete_of_one_of_two_names_keeps_weights_and_runner(world: World) -> None:
    await world.base()
    await world.library.copy("base", "twin")
    before = set(world.store.blobs)
    await world.library.delete("base")
    assert set(world.store.blobs) == before
    assert world.unloaded == []


async def test_delete_leaves_what_a_runner_still_works_with(world: World) -> None:
    await world.base()
    world.store.in_use = {digest_of(WEIGHTS)}
    await world.library.delete("base")
    assert set(world.store.blobs) == {digest_of(WEIGHTS)}


@pytest.mark.parametrize(
    ("requested", "stub"), [("gpt:cloud", "gpt:cloud"), ("gpt:20b-cloud", "gpt:20b-cloud"), ("m:local", "m")]
)
async def test_delete_takes_source_suffixes_as_pull_does(world: World, requested: str, stub: str) -> None:
    await world.create(model=stub, **{"from": "gpt:cloud"})
    await world.library.delete(requested)
    assert world.store.manifests == {}


async def test_delete_of_a_damaged_manifest_works(world: World) -> None:
    world.store.manifests[parse_name("broken")] = b"{"
    await world.library.delete("broken")
    assert world.store.manifests == {}


@pytest.mark.parametrize(
    ("requested", "status", "message"),
    [
        ("", 400, "model is required"),
        ("a b", 400, 'name "a b" is invalid'),
        ("m:local:cloud", 400, 'use either :local or :cloud, not both: "m:local:cloud"'),
        ("Nope:1b", 404, "model 'Nope:1b' not found"),
    ],
)
async def test_delete_is_refused_in_ollamas_words(world: World, requested: str, status: int, message: str) -> None:
    with pytest.raises(CorralError) as caught:
        await world.library.delete(requested)
    assert (caught.value.status, caught.value.message) == (status, message)


# ── Blobs ────────────────────────────────────────────────────────────────────────────────────────────────────────────


async def chunks(*parts: bytes) -> AsyncIterator[bytes]:
    for part in parts:
        yield part


async def test_blob_is_stored_once(world: World) -> None:
    digest = digest_of(b"abc")
    assert await world.library.put_blob(str(digest), chunks(b"a", b"bc")) is True
    assert await world.library.put_blob(f"sha256-{digest.hex}", chunks(b"never read")) is False
    world.library.require_blob(str(digest))
    assert world.store.blobs == {digest: b"abc"}


async def test_blob_with_another_digest_is_refused_in_ollamas_words(world: World) -> None:
    asked, found = digest_of(b"abc"), digest_of(b"abd")
    with pytest.raises(CorralError) as caught:
        await world.library.put_blob(str(asked), chunks(b"abd"))
    assert (caught.value.status, caught.value.message) == (400, f'digest mismatch, expected "{asked}", got "{found}"')
    with pytest.raises(CorralError, match=f'blob "{asked}" not found'):
        world.library.require_blob(str(asked))


@pytest.mark.parametrize(
    "text", ["sha256:../../x", "sha256:" + "A" * 64, "sha256:" + "0" * 63, "sha512:" + "0" * 128, "sha256:" + "0" * 64 + "\n", ""]
)
async def test_t033_what_is_no_digest_is_refused(world: World, text: str) -> None:
    with pytest.raises(CorralError, match=r"^invalid digest format$"):
        await world.library.put_blob(text, chunks())
    with pytest.raises(CorralError, match=r"^invalid digest format$"):
        world.library.require_blob(text)
