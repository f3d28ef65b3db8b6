"""What is told of a pushed manifest, and that a file which was made to do harm does none."""

import json
import os
import struct
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from time import perf_counter

import msgspec
import pytest

from corral.core.catalog import Description, Facts, Kind
from corral.core.records import Capability
from corral.core.registry import StoredManifest
from corral.storage import describe, describe_child
from corral.storage.describe import BlobDescriber, BoundedReader
from corral.storage.models import facts_of
from corral.wire import gguf
from corral.wire.errors import CorralError
from corral.wire.manifest import MANIFEST_TYPE
from corral.wire.names import Digest
from fakes_models import ARRAY, LLAMA, STRING, U64, Raw, gguf_bytes, gguf_string, manifest_bytes, pairs, u64
from fakes_registry import digest_of

IMAGE = "application/vnd.ollama.image."
CONFIG = {"model_format": "gguf", "model_family": "llama", "model_type": "160", "file_type": "Q4_1"}
OCI = "application/vnd.oci.image.manifest.v1+json"


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "home"


@pytest.fixture
def describer(root: Path) -> BlobDescriber:
    return BlobDescriber(root / "blobs", root / "cache", BoundedReader())


async def described(
    describer: BlobDescriber, root: Path, layers: Mapping[str, bytes], config: Mapping[str, object] = CONFIG
) -> Description:
    body = manifest_bytes(root, config, {IMAGE + kind: content for kind, content in layers.items()})
    return await describer.describe(StoredManifest(digest=digest_of(body), media_type=MANIFEST_TYPE, body=body))


# ── What is told ─────────────────────────────────────────────────────────────────────────────────────────────────────


async def test_model_is_described_by_its_header_and_its_layers(describer: BlobDescriber, root: Path) -> None:
    weights = gguf_bytes()
    layers = {
        "model": weights,
        "template": b"{{ .Prompt }}{{ .Tools }}",
        "system": b"Be kind.",
        "license": b"Apache",
        "params": b'{"temperature": 0.5, "stop": ["a", "b"]}',
    }
    found = await described(describer, root, layers)
    assert found.facts == Facts(
        kind=Kind.MODEL,
        size_bytes=sum(map(len, layers.values())) + len(json.dumps(CONFIG)),
        family="llama",
        parameter_size="160",
        quantization="Q4_1",
        context_length=8192,
        capabilities=frozenset({Capability.COMPLETION, Capability.TOOLS}),
    )
    assert (found.template, found.system, found.license) == ("{{ .Prompt }}{{ .Tools }}", "Be kind.", "Apache")
    assert found.parameters == (("stop", "a"), ("stop", "b"), ("temperature", "0.5"))
    assert [layer.kind for layer in found.layers] == list(layers)
    assert found.layer_count == 5


async def test_template_of_the_header_is_told_where_there_is_no_other(describer: BlobDescriber, root: Path) -> None:
    weights = gguf_bytes({**LLAMA, "tokenizer.chat_template": "{{ messages }}"})
    assert (await described(describer, root, {"model": weights})).template == "{{ messages }}"


async def test_stub_is_described_by_its_config(describer: BlobDescriber, root: Path) -> None:
    config = {
        "model_family": "gptoss",
        "model_type": "116.8B",
        "file_type": "MXFP4",
        "remote_host": "https://ollama.com:443",
        "remote_model": "gpt-oss:120b",
        "capabilities": ["completion", "thinking"],
        "context_length": 131072,
    }
    facts = (await described(describer, root, {}, config)).facts
    assert (facts.kind, facts.family, facts.parameter_size, facts.context_length) == (Kind.STUB, "gptoss", "116.8B", 131072)


async def test_tensor_model_is_described_by_its_config(describer: BlobDescriber, root: Path) -> None:
    config = {"model_format": "safetensors", "model_family": "gemma3", "model_type": "4.3B", "capabilities": ["completion"]}
    found = await described(describer, root, {"tensor": b"weights", "json": b"{}"}, config)
    assert (found.facts.kind, found.facts.family, found.facts.parameter_size) == (Kind.MODEL, "gemma3", "4.3B")


@pytest.mark.parametrize("config", [{"architecture": "amd64", "os": "linux", "rootfs": {"type": "layers"}}, {"model_type": 7}])
async def test_container_image_is_no_model(describer: BlobDescriber, root: Path, config: Mapping[str, object]) -> None:
    body = manifest_bytes(root, config, {"application/vnd.docker.image.rootfs.diff.tar.gzip": b"layer"})
    found = await describer.describe(StoredManifest(digest=digest_of(body), media_type=MANIFEST_TYPE, body=body))
    assert (found.facts.kind, found.layers[0].kind) == (Kind.ARTIFACT, "application/vnd.docker.image.rootfs.diff.tar.gzip")


@pytest.mark.parametrize("document", [{"schemaVersion": 2}, {"schemaVersion": 2, "layers": []}, {"schemaVersion": 2, "x": [1]}])
async def test_empty_manifest_is_no_model(describer: BlobDescriber, document: Mapping[str, object]) -> None:
    body = json.dumps({**document, "mediaType": OCI}).encode()
    found = await describer.describe(StoredManifest(digest=digest_of(body), media_type=OCI, body=body))
    assert found == Description(digest=digest_of(body), facts=Facts(kind=Kind.ARTIFACT))


async def test_manifest_that_cannot_be_parsed_any_more_is_told_as_such(describer: BlobDescriber) -> None:
    body = b'{"schemaVersion": 2, "layers": 7}'
    found = await describer.describe(StoredManifest(digest=digest_of(body), media_type=OCI, body=body))
    assert found.facts.kind is Kind.UNREADABLE
    assert "layers" in found.note


async def test_texts_and_rows_are_cut_at_what_a_page_can_bear(describer: BlobDescriber, root: Path) -> None:
    params = json.dumps({"stop": ["s" * 1000] * 500}).encode()
    layers = {"license": b"L" * 200_000, "template": b"T" * 200_000, "params": params, "system": b"S" * 200_000}
    found = await described(describer, root, layers)
    assert {len(text) for text in (found.license, found.template, found.system)} == {64 << 10}
    assert len(found.parameters) == 100
    assert {len(value) for _, value in found.parameters} == {400}


async def test_t081_words_that_would_turn_their_row_around_are_written_out(describer: BlobDescriber, root: Path) -> None:
    turned = "a\u202eb\u001b[31m"
    config = {**CONFIG, "model_family": turned, "model_type": turned, "file_type": turned}
    layers = {"model": gguf_bytes(), "params": json.dumps({turned: turned}).encode(), turned: b"x"}
    found = await described(describer, root, layers, config)
    facts, inert = found.facts, "a\\u202eb\\u001b[31m"
    assert {facts.family, facts.parameter_size, facts.quantization, *found.parameters[0], found.layers[-1].kind} == {inert}


async def test_many_layers_are_counted_and_some_told(describer: BlobDescriber, root: Path) -> None:
    body = json.dumps(
        {
            "schemaVersion": 2,
            "mediaType": MANIFEST_TYPE,
            "layers": [{"mediaType": IMAGE + "tensor", "digest": str(Digest(f"{n:064x}")), "size": 1} for n in range(70)],
        }
    ).encode()
    found = await describer.describe(StoredManifest(digest=digest_of(body), media_type=MANIFEST_TYPE, body=body))
    assert (len(found.layers), found.layer_count, found.facts.size_bytes) == (50, 70, 70)


# ── What cannot be read (T105, case 17) ──────────────────────────────────────────────────────────────────────────────

HUGE = 2**63
HOSTILE = {
    "nothing": (b"", "too short"),
    "cut in the magic": (gguf_bytes()[:3], "too short"),
    "cut in the middle": (gguf_bytes()[:200], "cut short"),
    "2^63 key/values": (b"GGUF" + struct.pack("<IQQ", 3, 0, HUGE), "key/values"),
    "2^63 tensors": (b"GGUF" + struct.pack("<IQQ", 3, HUGE, 0), "tensors"),
    "a text of 4 GB": (b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + gguf_string("a") + struct.pack("<IQ", STRING, 2**32), "text"),
    "an array in an array": (
        b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + pairs({"a": Raw(ARRAY, struct.pack("<IQ", ARRAY, 1) + u64(0))}),
        "array of arrays",
    ),
    "zero heads": (gguf_bytes({**LLAMA, "llama.attention.head_count": 0}), "zero"),
    "weights beyond the end": (gguf_bytes()[:-1], "behind the end"),
}


@pytest.mark.parametrize("name", HOSTILE)
async def test_t105_f17_file_that_cannot_be_read_is_not_described(describer: BlobDescriber, root: Path, name: str) -> None:
    content, reason = HOSTILE[name]
    started = perf_counter()
    found = await described(describer, root, {"model": content, "license": b"mine"})
    assert perf_counter() - started < 5
    assert found.facts.kind is Kind.UNREADABLE
    assert reason in found.note
    assert str(root) not in found.note
    assert [layer.kind for layer in found.layers] == ["model", "license"]


@pytest.mark.parametrize("said", [HUGE, 2**70, -1, -(2**70)])
async def test_t105_number_that_no_database_holds_is_not_told(describer: BlobDescriber, root: Path, said: int) -> None:
    # Kept, it would have ended the description of everything that was pushed before it, again and again.
    found = await described(describer, root, {"model": gguf_bytes()}, {**CONFIG, "context_length": said})
    assert found.facts.context_length == 8192
    weights = gguf_bytes({**LLAMA, "llama.context_length": Raw(U64, u64(said % 2**64))})
    found = await described(describer, root, {"model": weights})
    assert found.facts.context_length is None or found.facts.context_length < HUGE
    stub = {"remote_host": "https://other.example", "remote_model": "tiny", "context_length": said}
    found = await described(describer, root, {}, stub)
    assert (found.facts.kind, found.facts.context_length) == (Kind.STUB, None)


async def test_t105_layers_elsewhere_that_claim_more_than_a_database_holds_are_told(describer: BlobDescriber) -> None:
    elsewhere = "application/vnd.oci.image.layer.nondistributable.v1.tar"
    layers = [{"mediaType": elsewhere, "digest": str(Digest(f"{n:064x}")), "size": HUGE - 1, "urls": ["u"]} for n in range(3)]
    body = json.dumps({"schemaVersion": 2, "mediaType": OCI, "layers": layers}).encode()
    found = await describer.describe(StoredManifest(digest=digest_of(body), media_type=OCI, body=body))
    assert (found.facts.kind, found.facts.size_bytes) == (Kind.ARTIFACT, HUGE - 1)


@pytest.mark.parametrize("kind", ["template", "params", "system", "license"])
async def test_f17_text_layer_that_is_no_text_of_reason_is_not_read(describer: BlobDescriber, root: Path, kind: str) -> None:
    found = await described(describer, root, {"model": gguf_bytes(), kind: b" " * ((1 << 20) + 1)})
    assert found.facts.kind is Kind.UNREADABLE
    assert "is longer than 1048576 bytes" in found.note


@pytest.mark.parametrize("params", [b"[]", b"{", b"\xff", b'{"a": NaN}', b"[" * 100_000])
async def test_damaged_parameters_are_told(describer: BlobDescriber, root: Path, params: bytes) -> None:
    found = await described(describer, root, {"model": gguf_bytes(), "params": params})
    assert (found.facts.kind, "params" in found.note) == (Kind.UNREADABLE, True)


async def test_weights_that_are_gone_are_told(describer: BlobDescriber, root: Path) -> None:
    weights = gguf_bytes()
    body = manifest_bytes(root, CONFIG, {IMAGE + "model": weights})
    (root / "blobs" / digest_of(weights).file_name).unlink()
    found = await describer.describe(StoredManifest(digest=digest_of(body), media_type=MANIFEST_TYPE, body=body))
    assert (found.facts.kind, "no such file" in found.note) == (Kind.UNREADABLE, True)


# ── The child ────────────────────────────────────────────────────────────────────────────────────────────────────────


def put(tmp_path: Path, content: bytes = b"") -> Path:
    path = tmp_path / "file.gguf"
    path.write_bytes(content or gguf_bytes())
    return path


def test_child_reads_what_the_reader_reads(tmp_path: Path) -> None:
    path = put(tmp_path, gguf_bytes({**LLAMA, "a": float("inf"), "b": [1, 2], "c": list(range(300)), "d": "\N{SNOWMAN}"}))
    told = [json.loads(msgspec.json.encode(read(path, shown_as="x"))) for read in (BoundedReader(), facts_of)]
    assert told[0] == told[1]


def test_child_has_nothing_but_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    child = tmp_path / "child.py"
    child.write_text(
        "import json, os, sys\n"
        "told = [sorted(os.environ.keys() - {'LC_CTYPE'}), sys.argv[1:], os.getcwd(), sys.flags.isolated,"
        " sorted(map(int, os.listdir('/proc/self/fd')))[:-1], os.read(0, 4).decode()]\n"
        "print(json.dumps({'refused': json.dumps(told)}))\n"
    )
    monkeypatch.setattr(describe, "_CHILD", child)
    inherited = os.open("/dev/null", os.O_RDONLY)
    os.set_inheritable(inherited, True)
    try:
        with pytest.raises(CorralError) as caught:
            BoundedReader()(put(tmp_path), shown_as="x")
    finally:
        os.close(inherited)
    assert json.loads(caught.value.message.removeprefix("x is ")) == [[], [], "/", 1, [0, 1, 2], "GGUF"]


@pytest.mark.parametrize(
    "program",
    [
        "while True: pass",
        "import time; time.sleep(60)",
        "import sys\nwhile True: sys.stdout.write('x' * 65536)",
        "print('no json')",
        'print(\'{"facts": {"architecture": 7}}\')',
        "import os; os.abort()",
        "raise SystemExit(1)",
    ],
)
def test_t105_child_that_goes_wrong_is_ended_and_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, program: str) -> None:
    child = tmp_path / "child.py"
    child.write_text(program)
    monkeypatch.setattr(describe, "_CHILD", child)
    started = perf_counter()
    with pytest.raises(CorralError) as caught:
        BoundedReader(patience_s=0.5)(put(tmp_path), shown_as="x")
    assert perf_counter() - started < 5
    assert (caught.value.code, "cannot be read within" in caught.value.message) == ("bad_request", True)


def test_child_that_cannot_be_started_is_a_passing_trouble(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", str(tmp_path / "nothing"))
    with pytest.raises(CorralError) as caught:
        BoundedReader()(put(tmp_path), shown_as="x")
    assert caught.value.code == "unavailable"


async def test_description_that_could_not_be_tried_is_not_one(
    describer: BlobDescriber, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "executable", str(root / "nothing"))
    with pytest.raises(CorralError) as caught:
        await described(describer, root, {"model": gguf_bytes()})
    assert caught.value.code == "unavailable"


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux holds a process to RLIMIT_AS")
@pytest.mark.parametrize(
    ("work", "ending"),
    [
        ("bytearray(600 << 20)", "MemoryError"),
        ("open('/tmp/corral-describe-test', 'wb', buffering=0).write(b'x')", "OSError"),
    ],
)
def test_t105_limits_of_the_child_hold(work: str, ending: str) -> None:
    head = "import runpy, signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN)"
    program = f"{head}\nrunpy.run_path({describe_child.__file__!r})['_limit_this_process']()\n{work}"
    done = subprocess.run([sys.executable, "-I", "-c", program], capture_output=True, text=True, timeout=30, check=False)
    assert done.returncode == 1
    assert ending in done.stderr


def test_t105_header_of_much_text_is_refused_by_the_child(tmp_path: Path) -> None:
    text = "\x01" * (gguf.MAX_STRING_BYTES // 4)  # six bytes each as JSON
    with pytest.raises(CorralError, match="too much text"):
        BoundedReader()(put(tmp_path, gguf_bytes({**LLAMA, "a": text})), shown_as="x")


def test_header_of_a_real_model_takes_the_child_little_time(small_model: Path) -> None:
    started = perf_counter()
    facts = BoundedReader()(small_model, shown_as="x")
    assert (facts.architecture, facts.quantization) == ("llama", "Q4_1")
    assert perf_counter() - started < 2
