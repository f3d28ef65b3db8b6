"""What a pushed manifest is, read from its blobs. Files that strangers wrote are read by a child process with narrow limits.

One child at a time, for one file: it is handed the open file and nothing else, and what it answers is taken for a stranger's word
too. The small documents of a manifest (config, template, licence …) are read here, each up to a limit. Everything blocks; async
callers use threads.
"""

import asyncio
import subprocess
import sys
import threading
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import msgspec

from corral.core.catalog import Description, Facts, Kind, LayerFacts
from corral.core.records import Model
from corral.core.registry import StoredManifest
from corral.storage.blobs import CLOSED, BlobFiles, open_regular
from corral.storage.models import ModelBlobs, WeightFacts
from corral.wire.errors import CorralError
from corral.wire.manifest import CONFIG_TYPE, MAX_CONFIG_BYTES, MODEL_LAYER, ModelConfig, parse_config
from corral.wire.names import DEFAULT_HOST, DEFAULT_NAMESPACE, DEFAULT_TAG, ModelName
from corral.wire.registry import Descriptor, ImageManifest, parse_image_manifest
from corral.wire.text import one_line

_CHILD = Path(__file__).with_name("describe_child.py")
_PATIENCE_S = 5.0
#: More than the child itself would send.
_ANSWER_BYTES = 17 << 20

_MODEL_LAYERS = "application/vnd.ollama.image."
_MAX_TEXT = 64 << 10
_MAX_PARAMETERS, _MAX_VALUE = 100, 400
_MAX_LAYERS, _MAX_KIND = 50, 100
#: That a database holds.
_LARGEST = (1 << 63) - 1
#: A description knows neither what its model is called nor since when.
_TIMELESS = datetime.fromtimestamp(0, UTC)
_NAMELESS = ModelName(DEFAULT_HOST, DEFAULT_NAMESPACE, "model", DEFAULT_TAG)


class _Answer(msgspec.Struct, frozen=True):
    facts: WeightFacts | None = None
    refused: str = ""


class BoundedReader:
    """Reads GGUF headers in a child process. patience_s: of the wall clock, the child's start included."""

    def __init__(self, *, patience_s: float = _PATIENCE_S) -> None:
        self._patience_s = patience_s
        self._turn = threading.Lock()

    def __call__(self, path: Path, *, shown_as: str) -> WeightFacts:
        """What the file says of itself. Raises: not_found, bad_request; unavailable when no child can be started."""
        with open_regular(path, shown_as=shown_as) as file, self._turn:
            said = self._ask(file)
        try:
            answer = msgspec.json.decode(said, type=_Answer)
        except msgspec.DecodeError as error:
            text = f"{shown_as} cannot be read within {self._patience_s:.0f} s and 512 MiB of memory"
            raise CorralError("bad_request", text) from error
        if answer.facts is None:
            raise CorralError("bad_request", f"{shown_as} is {answer.refused[:_MAX_VALUE]}")
        return answer.facts

    def _ask(self, file: Any) -> bytes:
        """The child's answer, empty when it was ended before it gave one."""
        # -I -S: neither the folder of the script nor an environment nor installed packages lend it modules.
        argv = [sys.executable, "-I", "-S", "-B", str(_CHILD)]
        silence, pipe = subprocess.DEVNULL, subprocess.PIPE
        try:
            child = subprocess.Popen(argv, stdin=file, stdout=pipe, stderr=silence, env={}, cwd=_CHILD.anchor)  # noqa: S603
        except OSError as error:
            raise CorralError("unavailable", f"no process could be started to read a model: {error.strerror}") from error
        with child:
            clock = threading.Timer(self._patience_s, child.kill)
            clock.start()
            try:
                assert child.stdout is not None
                return child.stdout.read(_ANSWER_BYTES)
            finally:
                clock.cancel()
                child.kill()


class BlobDescriber:
    """A Describer over the hub's blobs. cache_dir: keeps what headers say, for whoever runs the models."""

    def __init__(self, blobs_dir: Path, cache_dir: Path, reader: BoundedReader) -> None:
        self._blobs = BlobFiles(blobs_dir, cache_dir, mode=CLOSED)
        self._models = ModelBlobs(self._blobs, cache_dir, reader)

    async def describe(self, stored: StoredManifest) -> Description:
        """In a thread. What a manifest or a blob is wrong in is told in the description. Raises: unavailable."""
        return await asyncio.to_thread(self._describe, stored)

    def _describe(self, stored: StoredManifest) -> Description:
        try:
            image = parse_image_manifest(stored.body, stored.media_type)
        except CorralError as error:
            return Description(digest=stored.digest, facts=Facts(kind=Kind.UNREADABLE), note=error.message)
        try:
            return self._described(stored, image)
        except CorralError as error:
            if error.code == "unavailable":
                raise
            return _bare(stored, image, Kind.UNREADABLE, note=error.message)

    def _described(self, stored: StoredManifest, image: ImageManifest) -> Description:
        is_model = any(layer.media_type.startswith(_MODEL_LAYERS) for layer in image.layers)
        config = self._config_of(image, is_model=is_model)
        if not is_model and not config.is_stub:
            return _bare(stored, image, Kind.ARTIFACT)
        for layer in image.layers:
            if layer.media_type == MODEL_LAYER and not config.is_stub:
                # Asked for here already, where a refusal is heard: further down it would only leave gaps.
                self._models.facts(layer.digest)
        model = self._models.read(_NAMELESS, stored.body, _TIMELESS)
        return _description_of(stored, image, model)

    def _config_of(self, image: ImageManifest, *, is_model: bool) -> ModelConfig:
        """What the config says, if it is a model's. That of a container has the same type and says other things."""
        if image.config is None or image.config.media_type != CONFIG_TYPE:
            return ModelConfig()
        try:
            return parse_config(self._blobs.read(image.config.digest, max_bytes=MAX_CONFIG_BYTES))
        except CorralError:
            if is_model:
                raise
            return ModelConfig()


def _bare(stored: StoredManifest, image: ImageManifest, kind: Kind, *, note: str = "") -> Description:
    return Description(
        digest=stored.digest,
        facts=Facts(kind=kind, size_bytes=_size_of(image)),
        layers=_layers_of(image),
        layer_count=len(image.layers),
        note=note,
    )


def _description_of(stored: StoredManifest, image: ImageManifest, model: Model) -> Description:
    details = model.details
    return Description(
        digest=stored.digest,
        facts=Facts(
            kind=Kind.STUB if model.is_stub else Kind.MODEL,
            size_bytes=_size_of(image),
            family=_shown(details.family),
            parameter_size=_shown(details.parameter_size),
            quantization=_shown(details.quantization_level),
            context_length=details.context_length,
            capabilities=model.capabilities,
        ),
        template=(model.template or model.chat_template)[:_MAX_TEXT],
        system=model.system[:_MAX_TEXT],
        license=model.license[:_MAX_TEXT],
        parameters=_parameters_of(model),
        layers=_layers_of(image),
        layer_count=len(image.layers),
    )


def _parameters_of(model: Model) -> tuple[tuple[str, str], ...]:
    """One row per value of a list, as a Modelfile has them."""
    rows = [
        (_shown(name), one_line(str(item)[:_MAX_VALUE]))
        for name, value in sorted(model.parameters.items())
        for item in (value if isinstance(value, list | tuple) else (value,))
    ]
    return tuple(rows[:_MAX_PARAMETERS])


def _size_of(image: ImageManifest) -> int:
    blobs = (*image.layers, *([image.config] if image.config else ()))
    total: int = sum({blob.digest: blob.size_bytes for blob in blobs}.values())
    # Nobody checks what is said of layers that are elsewhere.
    return min(total, _LARGEST)


def _layers_of(image: ImageManifest) -> tuple[LayerFacts, ...]:
    return tuple(LayerFacts(_kind_of(layer), layer.digest, layer.size_bytes) for layer in image.layers[:_MAX_LAYERS])


def _kind_of(layer: Descriptor) -> str:
    return _shown(layer.media_type.removeprefix(_MODEL_LAYERS))


def _shown(text: str) -> str:
    """A word of a stranger's, which stands in a row with others: it may not turn that row around (T81)."""
    return one_line(text[:_MAX_KIND])
