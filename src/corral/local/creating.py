"""Making a model: out of files that were sent before, out of an installed model, or as a stub of one that runs elsewhere.

Theory of operation. A model is a manifest over blobs, so making one is choosing layers: those of the base, then what the request
adds or replaces, then a config that describes them. Every blob is *held* from the moment it is chosen until the manifest names
it, so that nobody removes it in between. GGUF files are read by the bounded reader before they become layers (T105), names of
files are checked before a tool sees them (T108), and a tool gets safetensors whose header was checked, never a pickle (T109).

Differences from Ollama: a GGUF file stays as it is instead of being rewritten; no template is guessed, because the engine takes
the one inside the file; two models at once are refused (docs/divergences.md).
Source: ollama server/create.go, server/model.go, fb30760.
"""

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from hashlib import sha256

import msgspec

from corral.core.library import GgufFacts, LibraryBlobs, LibraryStore, ModelTools
from corral.wire import create, manifest
from corral.wire.create import UNQUANTIZED, WORKING_DIGEST, CreateRequest, ProgressEvent
from corral.wire.errors import CorralError
from corral.wire.gguf import format_parameters
from corral.wire.goprompt import check_template
from corral.wire.manifest import Layer, Manifest, ModelConfig
from corral.wire.names import Digest, ModelName, ModelReference, Source, parse_name, parse_reference

Events = AsyncGenerator[ProgressEvent, None]
#: Brings a model here from its registry; its events are passed on.
Pull = Callable[[ModelName], Events]

_GGUF_LAYERS = frozenset({manifest.MODEL_LAYER, manifest.PROJECTOR_LAYER, manifest.ADAPTER_LAYER, manifest.DRAFT_LAYER})
_MAGIC = b"GGUF"
#: How often the progress of a tool is told.
_REPORT_EVERY_S = 0.5


@dataclass(frozen=True, slots=True)
class _Part:
    """A layer of the model that is being made. facts: of a GGUF file. is_new: whether its blob was not there before."""

    layer: Layer
    facts: GgufFacts | None = None
    is_new: bool = False

    @property
    def status(self) -> str:
        """As Ollama tells of it."""
        return f"{'creating new' if self.is_new else 'using existing'} layer {self.layer.digest}"


@dataclass(slots=True)
class _Making:
    """A model that is being made: what was chosen so far, and what keeps it from being removed."""

    held: contextlib.ExitStack
    parts: list[_Part] = field(default_factory=list)
    config: ModelConfig = field(default_factory=ModelConfig)

    def without(self, media_type: str) -> list[_Part]:
        """The parts that are not of that type."""
        return [part for part in self.parts if part.layer.media_type != media_type]


@dataclass(frozen=True, slots=True)
class _Asked:
    """A request whose names and digests have been read."""

    request: CreateRequest
    name: ModelName
    files: Mapping[str, Digest]
    adapters: Mapping[str, Digest]
    draft_files: Mapping[str, Digest]
    licenses: list[str]


class ModelMaker:
    """Makes models. hub_url: the hub in use, for stubs of its models. pull: how a missing base gets here, if there is a way."""

    def __init__(
        self,
        store: LibraryStore,
        blobs: LibraryBlobs,
        tools: ModelTools,
        *,
        hub_url: Callable[[], str],
        pull: Pull | None = None,
    ) -> None:
        self._store = store
        self._blobs = blobs
        self._tools = tools
        self._hub_url = hub_url
        self._pull = pull

    async def make(self, request: CreateRequest) -> Events:
        """Make the model and install it under its name; events as Ollama's, without the last one. Raises: bad_request with
        Ollama's texts, not_found, not_supported, engine_failed, storage_full, unavailable, whatever the pull raises."""
        asked = _read(request)
        with contextlib.ExitStack() as held:
            making = _Making(held)
            async with contextlib.aclosing(self._base(asked, making)) as events:
                async for event in events:
                    yield event
            making.config = create.with_info(making.config, request.info)
            if not making.config.is_stub:
                async with contextlib.aclosing(self._quantized(asked, making)) as events:
                    async for event in events:
                        yield event
            _describe(making)
            await self._add_texts(asked, making)
            config = await self._put(making, manifest.CONFIG_TYPE, _config_bytes(making))
            for part in making.parts:
                yield ProgressEvent(status=part.status)
            yield ProgressEvent(status="writing manifest")
            layers = tuple(part.layer for part in making.parts)
            await self._store.put_manifest(asked.name, manifest.format_manifest(Manifest(config=config.layer, layers=layers)))

    # ── The base ─────────────────────────────────────────────────────────────────────────────────────────────────────

    async def _base(self, asked: _Asked, making: _Making) -> Events:
        request = asked.request
        if request.source:
            if self._is_remote(asked, making):
                return
            steps = [self._from_model(asked, making)]
        elif request.files is not None:
            making.config = _with_request(ModelConfig(), request)
            steps = [self._from_files(asked.files, making, manifest.MODEL_LAYER)]
        else:
            raise CorralError("bad_request", "neither 'from' or 'files' was specified")
        if request.draft_files is not None:
            steps.append(self._from_files(asked.draft_files, making, manifest.DRAFT_LAYER))
        if request.adapters is not None:
            steps.append(self._from_files(asked.adapters, making, manifest.ADAPTER_LAYER))
        for step in steps:
            async with contextlib.aclosing(step) as events:
                async for event in events:
                    yield event
        _check_parts(making)

    def _is_remote(self, asked: _Asked, making: _Making) -> bool:
        """Whether the model will be a stub; if so, its config says of what. Raises: bad_request."""
        request = asked.request
        reference = _reference(request.source)
        host = request.remote_host or (self._hub_url() if reference.source is Source.CLOUD else "")
        if not host:
            return False
        if request.draft_files:
            raise CorralError("bad_request", "DRAFT cannot be used with remote models")
        making.config = ModelConfig(
            remote_host=create.parse_remote_host(host),
            remote_model=reference.base,
            renderer=request.renderer,
            parser=request.parser,
            requires=request.requires,
        )
        return True

    async def _from_model(self, asked: _Asked, making: _Making) -> Events:
        name = parse_name(_reference(asked.request.source).base)
        found = await self._store.manifest(name)
        if found is None:
            if self._pull is None:
                raise CorralError("not_found", f"model '{name.short}' not found")
            async with contextlib.aclosing(self._pull(name)) as events:
                async for event in events:
                    # Ours is not done when the pull is.
                    if event.status != "success":
                        yield event
            found = await self._store.manifest(name)
        if found is None:
            raise CorralError("not_found", f"model '{name.short}' was removed while another was being made of it")
        spelled, body = found
        document = manifest.parse_manifest(body)
        making.held.enter_context(self._store.hold([layer.digest for layer in document.blobs]))
        for layer in document.layers:
            making.parts.append(await self._inherited(layer, spelled))
        base = ModelConfig()
        if document.config is not None:
            base = manifest.parse_config(await self._blobs.read_small(document.config.digest))
        making.config = _with_request(base, asked.request)

    async def _inherited(self, layer: Layer, base: ModelName) -> _Part:
        size_bytes = self._blobs.blob_size(layer.digest)
        if size_bytes is None:
            raise CorralError("not_found", f"model '{base.short}' lacks the blob {layer.digest}; pull it again")
        facts = await self._blobs.gguf_facts(layer.digest) if layer.media_type in _GGUF_LAYERS else None
        return _Part(msgspec.structs.replace(layer, size_bytes=size_bytes, source=base.short), facts)

    # ── Files ────────────────────────────────────────────────────────────────────────────────────────────────────────

    async def _from_files(self, files: Mapping[str, Digest], making: _Making, media_type: str) -> Events:
        """Layers of files that were sent. media_type: what they are to be; a model's files may also be its projector."""
        making.held.enter_context(self._store.hold(files.values()))
        for name, digest in files.items():
            if self._blobs.blob_size(digest) is None:
                raise CorralError("bad_request", f"the file {name} was not sent: blob {digest} is not here")
        if any(name.endswith(".safetensors") for name in files):
            steps = self._converted(files, making, media_type)
        elif await self._are_gguf(files):
            if media_type == manifest.ADAPTER_LAYER and len(files) > 1:
                raise CorralError("bad_request", "only one adapter is currently supported")
            steps = self._read_gguf(files, making, media_type)
        else:
            raise CorralError("bad_request", "unknown type")
        async with contextlib.aclosing(steps) as events:
            async for event in events:
                yield event

    async def _are_gguf(self, files: Mapping[str, Digest]) -> bool:
        for name, digest in files.items():
            if name.endswith(".gguf") or await self._blobs.read_head(digest, len(_MAGIC)) == _MAGIC:
                return True
        return False

    async def _read_gguf(self, files: Mapping[str, Digest], making: _Making, media_type: str) -> Events:
        shards: dict[str, Digest] = {}
        for name, digest in files.items():
            yield ProgressEvent(status="parsing GGUF")
            if await self._blobs.read_head(digest, len(_MAGIC)) != _MAGIC:
                raise CorralError("bad_request", "supplied file was not in GGUF format")
            facts = await self._checked(digest, name)
            count = facts.metadata.get("split.count")
            if isinstance(count, int) and count > 1:
                shards[name] = digest
            else:
                making.parts.append(self._gguf_part(digest, facts, media_type, name))
        if shards:
            digest = await self._merged(shards, making)
            making.parts.append(self._gguf_part(digest, await self._checked(digest, "the merged file"), media_type, "model"))

    async def _checked(self, digest: Digest, name: str) -> GgufFacts:
        try:
            return await self._blobs.gguf_facts(digest)
        except CorralError as error:
            raise CorralError(error.code, error.message.replace(f"blob {digest}", name)) from error

    def _gguf_part(self, digest: Digest, facts: GgufFacts, media_type: str, name: str) -> _Part:
        is_adapter = facts.kind == "adapter"
        if media_type == manifest.MODEL_LAYER and is_adapter:
            media_type = manifest.ADAPTER_LAYER
        elif media_type == manifest.MODEL_LAYER and facts.is_projector:
            media_type = manifest.PROJECTOR_LAYER
        elif is_adapter != (media_type == manifest.ADAPTER_LAYER):
            raise CorralError("bad_request", f"{name} is {'an adapter' if is_adapter else 'no adapter'}")
        elif facts.architecture == "unknown":
            raise CorralError("bad_request", f"{name} does not say which architecture it has")
        layer = Layer(media_type=media_type, digest=digest, size_bytes=self._blobs.blob_size(digest) or 0)
        return _Part(layer, facts)

    # ── Tools ────────────────────────────────────────────────────────────────────────────────────────────────────────

    async def _merged(self, shards: Mapping[str, Digest], making: _Making) -> Digest:
        named = {name: create.split_name(name) for name in shards}
        groups = {(split[0], split[2]) for split in named.values() if split is not None}
        numbers = sorted(split[1] for split in named.values() if split is not None)
        if len(groups) != 1 or None in named.values() or numbers != list(range(1, len(shards) + 1)):
            raise CorralError(
                "bad_request", "a split GGUF file needs all of its parts, called NAME-00001-of-0000N.gguf and so on"
            )
        ((_, count),) = groups
        if count != len(shards):
            raise CorralError("bad_request", f"a split GGUF file of {count} parts was given {len(shards)} of them")
        flat = {name.rpartition("/")[2]: digest for name, digest in shards.items()}
        with self._blobs.workshop(flat) as directory:
            target = f"{directory}/merged"
            await self._tools.merge(f"{directory}/{min(flat)}", target)
            digest, _ = await self._blobs.take_in(target)
        making.held.enter_context(self._store.hold([digest]))
        return digest

    async def _converted(self, files: Mapping[str, Digest], making: _Making, media_type: str) -> Events:
        for name, digest in files.items():
            if not create.may_lie_beside_safetensors(name):
                raise CorralError("bad_request", f"{name} cannot be converted; safetensors, JSON and text files can")
            if name.endswith(".safetensors"):
                await self._check_safetensors(digest)
        if media_type == manifest.DRAFT_LAYER:
            raise CorralError("not_supported", "a draft model is taken as a GGUF file only")
        is_adapter = media_type == manifest.ADAPTER_LAYER
        yield ProgressEvent(status="converting adapter" if is_adapter else "converting model")
        with self._blobs.workshop({f"files/{name}": digest for name, digest in files.items()}) as directory:
            target = f"{directory}/converted.gguf"
            if is_adapter:
                await self._tools.convert_adapter(f"{directory}/files", target, f"{directory}/files")
            else:
                await self._tools.convert(f"{directory}/files", target)
            digest, _ = await self._blobs.take_in(target)
        making.held.enter_context(self._store.hold([digest]))
        facts = await self._checked(digest, "the converted file")
        making.parts.append(self._gguf_part(digest, facts, media_type, "the converted file"))

    async def _check_safetensors(self, digest: Digest) -> None:
        size_bytes = self._blobs.blob_size(digest) or 0
        length = create.safetensors_header_size(await self._blobs.read_head(digest, 8), size_bytes)
        header = (await self._blobs.read_head(digest, 8 + length))[8:]
        await asyncio.to_thread(create.check_safetensors_header, header, size_bytes - 8 - length)

    async def _quantized(self, asked: _Asked, making: _Making) -> Events:
        request = asked.request
        wanted = {
            manifest.MODEL_LAYER: request.quantize or request.quantization,
            manifest.DRAFT_LAYER: request.draft_quantize,
        }
        for index, part in enumerate(making.parts):
            asked_kind = wanted.get(part.layer.media_type, "")
            if not asked_kind or part.facts is None:
                continue
            kind = create.quantization_of(asked_kind)
            if part.facts.quantization not in UNQUANTIZED:
                raise CorralError("bad_request", "quantization is only supported for F16, BF16 and F32 models", status=500)
            if part.facts.quantization == kind:
                continue
            async with contextlib.aclosing(self._quantize(part, kind, making, index)) as events:
                async for event in events:
                    yield event
            if part.layer.media_type == manifest.MODEL_LAYER:
                making.config = msgspec.structs.replace(making.config, file_type="")

    async def _quantize(self, part: _Part, kind: str, making: _Making, index: int) -> Events:
        assert part.facts is not None
        status = f"quantizing {part.facts.quantization} model to {kind}"
        done = 0.0

        def report(fraction: float) -> None:
            nonlocal done
            done = fraction

        total = part.layer.size_bytes
        with self._blobs.workshop({"model.gguf": part.layer.digest}) as directory:
            work = self._tools.quantize(f"{directory}/model.gguf", f"{directory}/quantized.gguf", kind, report)
            async with contextlib.aclosing(_while_working(work)) as ticks:
                async for _ in ticks:
                    yield ProgressEvent(status=status, digest=WORKING_DIGEST, total=total, completed=round(done * total))
            yield ProgressEvent(status=status, digest=WORKING_DIGEST, total=total, completed=total)
            yield ProgressEvent(status="verifying conversion")
            digest, _ = await self._blobs.take_in(f"{directory}/quantized.gguf")
        making.held.enter_context(self._store.hold([digest]))
        facts = await self._checked(digest, "the quantized file")
        size_bytes = self._blobs.blob_size(digest) or 0
        layer = Layer(media_type=part.layer.media_type, digest=digest, size_bytes=size_bytes)
        making.parts[index] = _Part(layer, facts, is_new=True)

    # ── Texts ────────────────────────────────────────────────────────────────────────────────────────────────────────

    async def _add_texts(self, asked: _Asked, making: _Making) -> None:
        """What the request says beside the weights: template and system replace, licences add up, parameters merge, messages
        replace."""
        request = asked.request
        if request.template:
            check_template(request.template)
            making.parts = [part for part in making.parts if part.layer.media_type != manifest.PROMPT_LAYER]
            await self._replace(making, manifest.TEMPLATE_LAYER, request.template.encode())
        if request.system:
            await self._replace(making, manifest.SYSTEM_LAYER, request.system.encode())
        for text in asked.licenses:
            making.parts.append(await self._put(making, manifest.LICENSE_LAYER, text.encode()))
        parameters = {name: value for name, value in request.parameters.items() if value is not None}
        if parameters:
            for part in making.parts:
                if part.layer.media_type == manifest.PARAMS_LAYER:
                    inherited = manifest.parse_params(await self._blobs.read_small(part.layer.digest))
                    parameters = {**inherited, **parameters}
            await self._replace(making, manifest.PARAMS_LAYER, manifest.format_params(parameters))
        if request.messages:
            await self._replace(making, manifest.MESSAGES_LAYER, msgspec.json.encode(request.messages) + b"\n")

    async def _replace(self, making: _Making, media_type: str, content: bytes) -> None:
        making.parts = [*making.without(media_type), await self._put(making, media_type, content)]

    async def _put(self, making: _Making, media_type: str, content: bytes) -> _Part:
        digest = Digest(sha256(content).hexdigest())
        making.held.enter_context(self._store.hold([digest]))
        is_new = self._blobs.blob_size(digest) is None
        digest, size_bytes = await self._blobs.put_bytes(content)
        return _Part(Layer(media_type=media_type, digest=digest, size_bytes=size_bytes), is_new=is_new)


def _read(request: CreateRequest) -> _Asked:
    """The checks that need no disk, in Ollama's order. Raises: bad_request."""
    files, drafts = create.parse_files(request.files), create.parse_files(request.draft_files)
    if request.draft_quantize and not drafts:
        raise CorralError("bad_request", "--draft-quantize requires a DRAFT model")
    adapters = create.parse_files(request.adapters)
    return _Asked(request, parse_name(request.wanted), files, adapters, drafts, request.licenses)


def _reference(text: str) -> ModelReference:
    """What `from` names. Raises: bad_request with the one text that Ollama has for it."""
    try:
        reference = parse_reference(text)
        parse_name(reference.base)
    except CorralError as error:
        raise CorralError("bad_request", "invalid model name") from error
    return reference


def _with_request(base: ModelConfig, request: CreateRequest) -> ModelConfig:
    """The config of the base with what the request says instead."""
    named = {"renderer": request.renderer, "parser": request.parser, "requires": request.requires}
    return msgspec.structs.replace(base, **{name: text for name, text in named.items() if text})


def _check_parts(making: _Making) -> None:
    """Raises: bad_request unless there is one model at most, and one at all where GGUF files make it up."""
    models = [part for part in making.parts if part.layer.media_type == manifest.MODEL_LAYER]
    if len(models) > 1:
        raise CorralError(
            "bad_request", f"{len(models)} models were given; a model is made of one, its projector and its adapters"
        )
    has_others = any(part.facts is not None for part in making.parts)
    if not models and has_others:
        raise CorralError("bad_request", "no base model was found")


def _describe(making: _Making) -> None:
    """Have the config say what its GGUF files are, where nobody said otherwise."""
    for part in making.parts:
        facts, config = part.facts, making.config
        if facts is None:
            continue
        if part.layer.media_type == manifest.MODEL_LAYER:
            making.config = msgspec.structs.replace(
                config,
                model_format=config.model_format or "gguf",
                model_family=config.model_family or facts.architecture,
                model_families=tuple(dict.fromkeys([*config.model_families, facts.architecture])),
                model_type=config.model_type or format_parameters(facts.parameter_count),
                file_type=config.file_type or facts.quantization,
            )
        elif part.layer.media_type == manifest.DRAFT_LAYER:
            making.config = msgspec.structs.replace(config, draft={"model_format": "gguf", "architecture": facts.architecture})


def _config_bytes(making: _Making) -> bytes:
    return manifest.format_config(making.config, [part.layer.digest for part in making.parts])


async def _while_working(work: Awaitable[None]) -> AsyncGenerator[None, None]:
    """Tick while the work is under way. Raises: what it raises; leaving early cancels it."""
    task = asyncio.ensure_future(work)
    try:
        while not task.done():
            yield
            await asyncio.wait({task}, timeout=_REPORT_EVERY_S)
        await task
    finally:
        if not task.done():
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
