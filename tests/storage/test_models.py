"""From a manifest and its blobs to a model: what listings and `show` tell of it."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from corral.core.records import Capability, Model
from corral.storage.blobs import BlobFiles
from corral.storage.models import ModelBlobs, capabilities_of, facts_of
from corral.wire.errors import CorralError
from corral.wire.manifest import ModelConfig
from corral.wire.names import Digest, parse_name
from fakes import NOON
from fakes_models import LLAMA, GgufValue, gguf_bytes, manifest_bytes

NAME = parse_name("tiny:1b")
IMAGE = "application/vnd.ollama.image."
CONFIG = {
    "model_format": "gguf",
    "model_family": "llama",
    "model_families": ["llama"],
    "model_type": "160",
    "file_type": "Q4_1",
}
QWEN = "{{ range .Messages }}<think>{{ .Thinking }}</think>{{ end }}{{ .Suffix }}"


def quiet(done: int, total: int) -> None:
    """Nobody watches."""


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "models"


@pytest.fixture
def reader(root: Path, tmp_path: Path) -> ModelBlobs:
    return ModelBlobs(BlobFiles(root / "blobs", tmp_path / "cache"), tmp_path / "cache")


def read(
    reader: ModelBlobs, root: Path, layers: Mapping[str, bytes], config: Mapping[str, object] = CONFIG, **more: Any
) -> Model:
    body = manifest_bytes(root, config, {IMAGE + kind: content for kind, content in layers.items()})
    return reader.read(NAME, body, more.get("modified_at", NOON))


def with_(**changes: GgufValue) -> bytes:
    return gguf_bytes({**LLAMA, **{key.replace("__", "."): value for key, value in changes.items()}})


def test_model_tells_what_config_and_header_say(reader: ModelBlobs, root: Path) -> None:
    weights = gguf_bytes()
    model = read(reader, root, {"model": weights})
    details = model.details
    assert (details.format, details.family, details.families) == ("gguf", "llama", ("llama",))
    assert (details.parameter_size, details.quantization_level) == ("160", "Q4_1")
    assert (details.context_length, details.embedding_length, details.parent_model) == (8192, 32, "")
    assert (model.name, model.modified_at, model.is_stub) == (NAME, NOON, False)
    assert model.weights is not None
    assert Path(model.weights).read_bytes() == weights
    assert model.size_bytes == sum(path.stat().st_size for path in (root / "blobs").iterdir())


def test_metadata_is_ready_for_json(reader: ModelBlobs, root: Path) -> None:
    model = read(reader, root, {"model": with_(long=["x"] * 300, none=[])})
    assert model.metadata["general.parameter_count"] == 160
    assert model.metadata["llama.rope.freq_base"] == 1e-05
    assert (model.metadata["tokenizer.ggml.tokens"], model.metadata["long"], model.metadata["none"]) == (
        ["a", "b", "c"],
        None,
        [],
    )


def test_config_of_an_old_release_is_completed_from_the_header(reader: ModelBlobs, root: Path) -> None:
    details = read(reader, root, {"model": gguf_bytes()}, {"file_type": "unknown"}).details
    assert (details.format, details.family, details.parameter_size, details.quantization_level) == (
        "gguf",
        "llama",
        "160",
        "Q4_1",
    )


def test_layers_of_a_modelfile_are_read(reader: ModelBlobs, root: Path) -> None:
    model = read(
        reader,
        root,
        {
            "model": gguf_bytes(),
            "template": b"{{ .Prompt }}",
            "system": b"Be brief.",
            "params": b'{"stop":["<|im_end|>"],"temperature":0.5}\n',
            "messages": b'[{"role":"user","content":"hi"}]\n',
            "license": b"Apache-2.0",
            "projector": b"p",
            "adapter": b"a",
            "embed": b"ignored",
        },
    )
    assert (model.template, model.system, model.license) == ("{{ .Prompt }}", "Be brief.", "Apache-2.0")
    assert (model.parameters, model.messages) == ({"stop": ["<|im_end|>"], "temperature": 0.5}, (("user", "hi"),))
    assert model.projector is not None
    assert Path(model.projector).read_bytes() == b"p"
    assert [Path(path).read_bytes() for path in model.adapters] == [b"a"]


def test_template_of_the_old_layer_type_is_read(reader: ModelBlobs, root: Path) -> None:
    assert read(reader, root, {"prompt": b"{{ .Prompt }}"}).template == "{{ .Prompt }}"


def test_model_without_a_config_is_read(reader: ModelBlobs) -> None:
    model = reader.read(NAME, b'{"schemaVersion":2,"layers":null}', NOON)
    assert (model.weights, model.capabilities, model.size_bytes, model.metadata) == (None, frozenset(), 0, {})


# ── Stubs ────────────────────────────────────────────────────────────────────────────────────────────────────────────

STUB = {
    "model_family": "gptoss",
    "model_type": "116.8B",
    "file_type": "MXFP4",
    "remote_host": "https://ollama.com:443",
    "remote_model": "gpt-oss:120b",
    "capabilities": ["completion", "tools", "juggling"],
    "context_length": 131072,
    "embedding_length": 2880,
    "base_name": "gpt-oss",
}


def test_stub_tells_what_its_config_says(reader: ModelBlobs, root: Path) -> None:
    model = read(reader, root, {"system": b"Be brief."}, STUB)
    assert (model.is_stub, model.remote_host, model.remote_model) == (True, "https://ollama.com:443", "gpt-oss:120b")
    assert (model.weights, model.system, model.details.context_length) == (None, "Be brief.", 131072)
    assert model.capabilities == {Capability.COMPLETION, Capability.TOOLS, Capability.THINKING}
    assert model.metadata == {
        "general.architecture": "gptoss",
        "general.basename": "gpt-oss",
        "gptoss.context_length": 131072,
        "gptoss.embedding_length": 2880,
    }


def test_stub_without_a_family_has_no_metadata(reader: ModelBlobs, root: Path) -> None:
    assert read(reader, root, {}, {"remote_host": "h", "remote_model": "m"}).metadata == {}


def test_half_a_remote_is_no_stub(reader: ModelBlobs, root: Path) -> None:
    model = read(reader, root, {"model": gguf_bytes()}, {**CONFIG, "remote_host": "h"})
    assert (model.is_stub, model.remote_host) == (False, "")


# ── Capabilities ─────────────────────────────────────────────────────────────────────────────────────────────────────

C = Capability
CLIP = {"general.architecture": "clip", "clip.has_vision_encoder": True, "clip.has_audio_encoder": False}
CAPABILITIES: dict[str, tuple[dict[str, GgufValue], dict[str, bytes], dict[str, object], set[Capability]]] = {
    "plain": ({}, {}, {}, {C.COMPLETION}),
    "pooling": ({"llama.pooling_type": 1}, {}, {}, {C.EMBEDDING}),
    "own vision": ({"llama.vision.block_count": 2}, {}, {}, {C.COMPLETION, C.VISION}),
    "own hearing": ({"llama.audio.block_count": 2}, {}, {}, {C.COMPLETION, C.AUDIO}),
    "projector": ({}, {"projector": b"p"}, {}, {C.COMPLETION, C.VISION}),
    "projector that sees": ({}, {"projector": gguf_bytes(CLIP)}, {}, {C.COMPLETION, C.VISION}),
    "projector that hears": (
        {},
        {"projector": gguf_bytes({**CLIP, "clip.has_audio_encoder": True})},
        {},
        {
            C.COMPLETION,
            C.VISION,
            C.AUDIO,
        },
    ),
    "Jinja tools": ({"tokenizer.chat_template": "{% if tools %}"}, {}, {}, {C.COMPLETION, C.TOOLS}),
    "Jinja thinking": ({"tokenizer.chat_template": "<think></think>"}, {}, {}, {C.COMPLETION, C.THINKING}),
    "Go tools": ({}, {"template": b"{{ .Tools }}"}, {}, {C.COMPLETION, C.TOOLS}),
    "Go thinking and suffix": ({}, {"template": QWEN.encode()}, {}, {C.COMPLETION, C.THINKING, C.INSERT}),
    "markers for a gap": (
        {f"tokenizer.ggml.fim_{part}_token_id": 1 for part in ("pre", "suf", "mid")},
        {},
        {},
        {C.COMPLETION, C.INSERT},
    ),
    "one marker is none": ({"tokenizer.ggml.fim_pre_token_id": 1}, {}, {}, {C.COMPLETION}),
    "config": ({}, {}, {"capabilities": ["vision", "unheard-of"]}, {C.COMPLETION, C.VISION}),
    "parser": ({}, {}, {"parser": "qwen3-thinking"}, {C.COMPLETION, C.TOOLS, C.THINKING}),
    "parser without thinking": ({}, {}, {"parser": "qwen3-coder"}, {C.COMPLETION, C.TOOLS}),
    "parser unknown": ({}, {}, {"parser": "new"}, {C.COMPLETION}),
    "gpt-oss": ({}, {}, {"model_family": "gptoss"}, {C.COMPLETION, C.THINKING}),
}


@pytest.mark.parametrize("case", CAPABILITIES)
def test_capabilities_follow_ollamas_rules(reader: ModelBlobs, root: Path, case: str) -> None:
    metadata, layers, config, expected = CAPABILITIES[case]
    model = read(reader, root, {"model": gguf_bytes({**LLAMA, **metadata}), **layers}, {**CONFIG, **config})
    assert model.capabilities == expected


def test_nothing_is_known_of_a_model_without_weights() -> None:
    assert capabilities_of(ModelConfig(), None, template="") == frozenset()


# ── What is missing or damaged ───────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("weights", [b"", b"junk", gguf_bytes()[:100]])
def test_model_with_damaged_weights_is_listed_without_capabilities(reader: ModelBlobs, root: Path, weights: bytes) -> None:
    model = read(reader, root, {"model": weights})
    assert (model.capabilities, model.details.family, model.details.context_length) == (frozenset(), "llama", None)


def test_model_whose_weights_come_back_is_read_again(reader: ModelBlobs, root: Path) -> None:
    body = manifest_bytes(root, CONFIG, {IMAGE + "model": gguf_bytes()})
    weights = Path(reader.read(NAME, body, NOON).weights or "")
    fresh = ModelBlobs(BlobFiles(root / "blobs", root / "cache"), root / "cache")
    weights.rename(weights.with_suffix(".away"))
    assert fresh.read(NAME, body, NOON).capabilities == frozenset()
    weights.with_suffix(".away").rename(weights)
    assert fresh.read(NAME, body, NOON).capabilities == {Capability.COMPLETION}


@pytest.mark.parametrize(
    "layers", [{"params": b"{"}, {"params": b"[]"}, {"messages": b"{}"}, {"template": b"x" * ((1 << 20) + 1)}]
)
def test_model_with_a_damaged_layer_is_refused(reader: ModelBlobs, root: Path, layers: Mapping[str, bytes]) -> None:
    with pytest.raises(CorralError) as caught:
        read(reader, root, layers)
    assert caught.value.code in ("bad_request", "too_large")


def test_model_without_its_config_blob_is_refused(reader: ModelBlobs, root: Path) -> None:
    body = manifest_bytes(root, CONFIG, {})
    for path in (root / "blobs").iterdir():
        path.unlink()
    with pytest.raises(CorralError) as caught:
        reader.read(NAME, body, NOON)
    assert caught.value.code == "not_found"


def test_t115_message_about_weights_names_no_path(root: Path, tmp_path: Path) -> None:
    path = tmp_path / "readme.txt"
    path.write_bytes(b"hello, world")
    with pytest.raises(CorralError) as caught:
        facts_of(path, shown_as=path.name)
    assert caught.value.message == "readme.txt is not a usable GGUF file: it does not begin with GGUF"


# ── What is kept ─────────────────────────────────────────────────────────────────────────────────────────────────────


def notes(tmp_path: Path) -> list[Path]:
    return list((tmp_path / "cache" / "headers").iterdir())


def spoil(path: str | None) -> None:
    """Other content of the same length: whoever reads the header now finds junk."""
    assert path is not None
    Path(path).write_bytes(bytes(Path(path).stat().st_size))


def fresh(root: Path, tmp_path: Path) -> ModelBlobs:
    return ModelBlobs(BlobFiles(root / "blobs", tmp_path / "cache"), tmp_path / "cache")


def test_header_is_read_once_for_all_processes(reader: ModelBlobs, root: Path, tmp_path: Path) -> None:
    body = manifest_bytes(root, CONFIG, {IMAGE + "model": gguf_bytes()})
    first = reader.read(NAME, body, NOON)
    spoil(first.weights)
    assert fresh(root, tmp_path).read(NAME, body, NOON) == first


@pytest.mark.parametrize("note", [b"", b"{}", b'{"version":0}'])
def test_note_that_is_damaged_or_old_is_made_again(reader: ModelBlobs, root: Path, tmp_path: Path, note: bytes) -> None:
    digest = Digest(Path(read(reader, root, {"model": gguf_bytes()}).weights or "").name.removeprefix("sha256-"))
    (path,) = notes(tmp_path)
    whole = path.read_bytes()
    path.write_bytes(whole.replace(b'"version":1', b'"version":0') if note == b'{"version":0}' else note)
    assert fresh(root, tmp_path).facts(digest).architecture == "llama"
    assert path.read_bytes() == whole


def test_note_of_a_blob_with_another_size_does_not_count(reader: ModelBlobs, root: Path) -> None:
    weights = read(reader, root, {"model": gguf_bytes()}).weights or ""
    digest = Digest(Path(weights).name.removeprefix("sha256-"))
    Path(weights).write_bytes(b"cut")
    with pytest.raises(CorralError):
        reader.facts(digest)


def test_model_is_known_after_it_was_read_and_takes_name_and_time_of_the_asker(reader: ModelBlobs, root: Path) -> None:
    model = read(reader, root, {"model": gguf_bytes()})
    other = parse_name("other")
    known = reader.known(other, model.digest, NOON)
    assert known is not None
    assert (known.name, known.details) == (other, model.details)
    assert reader.known(NAME, Digest("0" * 64), NOON) is None


def test_only_so_many_models_are_kept(reader: ModelBlobs, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # The real bound is two thousand.
    monkeypatch.setattr("corral.storage.models._MAX_KEPT", 2)
    digests = [read(reader, root, {"system": bytes([65 + index])}).digest for index in range(3)]
    assert [reader.known(NAME, digest, NOON) is not None for digest in digests] == [False, True, True]


# ── Taking weights in ────────────────────────────────────────────────────────────────────────────────────────────────

NO_MODELS: dict[str, tuple[dict[str, GgufValue], str]] = {
    "projector": ({"general.architecture": "clip", "general.type": "mmproj"}, "encoder"),
    "adapter": ({"general.architecture": "llama", "general.type": "adapter"}, "adapter"),
    "part": ({**LLAMA, "split.count": 3}, "one of 3 parts"),
    "nameless": ({}, "architecture"),
}


@pytest.mark.parametrize("case", NO_MODELS)
def test_gguf_that_is_no_model_is_refused_with_its_reason(reader: ModelBlobs, root: Path, tmp_path: Path, case: str) -> None:
    metadata, reason = NO_MODELS[case]
    path = tmp_path / "file.gguf"
    path.write_bytes(gguf_bytes(metadata))
    with pytest.raises(CorralError) as caught:
        reader.import_gguf(path, quiet, current=None)
    assert caught.value.code == "bad_request"
    assert caught.value.message.startswith("file.gguf ")
    assert reason in caught.value.message
    assert not root.exists()


def test_import_describes_what_was_stored(reader: ModelBlobs, tmp_path: Path) -> None:
    path = tmp_path / "file.gguf"
    path.write_bytes(gguf_bytes())
    model = reader.read(NAME, reader.import_gguf(path, quiet, current=None), NOON)
    assert (model.details.parameter_size, model.details.quantization_level) == ("160", "Q4_1")
    assert model.capabilities == {Capability.COMPLETION}


def test_import_of_the_same_weights_keeps_the_current_manifest(reader: ModelBlobs, root: Path, tmp_path: Path) -> None:
    path = tmp_path / "file.gguf"
    path.write_bytes(gguf_bytes())
    current = manifest_bytes(root, CONFIG, {IMAGE + "model": gguf_bytes(), IMAGE + "system": b"Be brief."})
    for _ in range(2):
        assert reader.import_gguf(path, quiet, current=current) == current
    assert reader.import_gguf(path, quiet, current=b"junk") != current


def test_t115_file_that_cannot_be_read_is_refused(reader: ModelBlobs, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    with pytest.raises(CorralError, match="fifo is not a regular file"):
        reader.import_gguf(tmp_path / "fifo", quiet, current=None)
