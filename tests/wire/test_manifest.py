"""Manifests, configs and the JSON layers: what is read, what Ollama would read back, and what is refused."""

import json
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from corral.wire import manifest
from corral.wire.errors import CorralError
from corral.wire.manifest import (
    CONFIG_TYPE,
    MANIFEST_TYPE,
    MODEL_LAYER,
    Layer,
    Manifest,
    ModelConfig,
    format_config,
    format_manifest,
    format_params,
    parse_config,
    parse_manifest,
    parse_messages,
    parse_params,
)
from corral.wire.names import Digest

A, B = Digest("a" * 64), Digest("b" * 64)
#: As `ollama create` writes it, the newline at the end included.
STOCK = (
    b'{"schemaVersion":2,"mediaType":"application/vnd.docker.distribution.manifest.v2+json","config":'
    b'{"mediaType":"application/vnd.docker.container.image.v1+json","digest":"sha256:' + b"a" * 64 + b'","size":487},"layers":'
    b'[{"mediaType":"application/vnd.ollama.image.model","digest":"sha256:' + b"b" * 64 + b'","size":4661224676,'
    b'"from":"library/llama3:latest"}]}\n'
)
DEEP = b"[" * 100_000


def test_stock_manifest_is_read_and_written_back_byte_for_byte() -> None:
    parsed = parse_manifest(STOCK)
    assert parsed.config == Layer(media_type=CONFIG_TYPE, digest=A, size_bytes=487)
    assert parsed.layers == (Layer(media_type=MODEL_LAYER, digest=B, size_bytes=4661224676, source="library/llama3:latest"),)
    assert (parsed.media_type, parsed.size_bytes) == (MANIFEST_TYPE, 4661224676 + 487)
    assert format_manifest(parsed) == STOCK


@pytest.mark.parametrize("layers", [b"null", b"[]"])
def test_manifest_of_a_stub_has_no_layers(layers: bytes) -> None:
    parsed = parse_manifest(b'{"schemaVersion":2,"config":{"digest":""},"layers":' + layers + b',"annotations":{"x":[1]}}')
    assert (parsed.layers, parsed.config, parsed.blobs) == ((), None, ())


def test_manifest_finds_layers_by_type() -> None:
    parsed = parse_manifest(STOCK)
    assert parsed.first(MODEL_LAYER) == parsed.layers[0]
    assert parsed.first("x") is None


def test_manifest_without_a_config_is_not_written() -> None:
    with pytest.raises(ValueError, match="config"):
        format_manifest(Manifest(config=None, layers=()))


T33_DIGESTS = [
    "sha256:../../x",
    "sha256:" + "a" * 63,
    "sha256:" + "a" * 65,
    "sha256:" + "A" * 64,
    "sha256:" + "a" * 64 + "\n",
    "sha512:" + "a" * 64,
    "sha256:" + "a" * 63 + "\\",
    "sha256:" + "a" * 63 + "\0",
    "sha256:%2e%2e",
    "sha256-" + "a" * 64,
]


@pytest.mark.parametrize("digest", T33_DIGESTS)
@pytest.mark.parametrize("place", ["config", "layer"])
def test_t033_digest_that_could_leave_the_store_is_refused(digest: str, place: str) -> None:
    row = {"mediaType": "x", "digest": digest, "size": 1}
    document = {"schemaVersion": 2, "config": row} if place == "config" else {"schemaVersion": 2, "layers": [row]}
    with pytest.raises(CorralError) as caught:
        parse_manifest(json.dumps(document).encode())
    assert (caught.value.code, caught.value.message) == ("bad_request", "invalid digest format")


MALFORMED = {
    "empty": b"",
    "not JSON": b"{",
    "not UTF-8": b'{"a":"\xff"}',
    "a list": b"[]",
    "a million brackets": DEEP,
    "a hundred thousand braces": b'{"a":' * 100_000,
    "NaN": b'{"x":NaN}',
    "1e999": b'{"x":1e999}',
    "5,000 digits": b'{"x":' + b"9" * 5000 + b"}",
    "half a surrogate pair": b'{"mediaType":"\\ud800"}',
    "a member twice": b'{"layers":[],"layers":[]}',
    "a digest twice": b'{"config":{"digest":"sha256:' + b"a" * 64 + b'","digest":"sha256:' + b"b" * 64 + b'"}}',
    "layers as text": b'{"layers":"x"}',
    "a layer that is null": b'{"layers":[null]}',
    "size as text": b'{"layers":[{"digest":"sha256:' + b"a" * 64 + b'","size":"1"}]}',
    "size with a fraction": b'{"layers":[{"digest":"sha256:' + b"a" * 64 + b'","size":1.5}]}',
    "negative size": b'{"layers":[{"digest":"sha256:' + b"a" * 64 + b'","size":-1}]}',
    "size of 2^63": b'{"layers":[{"digest":"sha256:' + b"a" * 64 + b'","size":9223372036854775808}]}',
    "another schema": b'{"schemaVersion":1}',
    "12,001 layers": b'{"layers":[' + b"{}," * 12_000 + b"{}]}",
}


@pytest.mark.parametrize("name", MALFORMED)
def test_t106_malformed_manifest_is_refused(name: str) -> None:
    with pytest.raises(CorralError) as caught:
        parse_manifest(MALFORMED[name])
    assert caught.value.code == "bad_request"


@pytest.mark.parametrize("parse", [parse_config, parse_params, parse_messages])
@pytest.mark.parametrize("content", [b"", b'"x"', b"1", DEEP, b'{"a":1,"a":2}', b"\xff"])
def test_t106_malformed_config_and_layers_are_refused(parse: Callable[[bytes], object], content: bytes) -> None:
    with pytest.raises(CorralError) as caught:
        parse(content)
    assert caught.value.code == "bad_request"


def test_document_that_is_too_long_is_refused_unread(monkeypatch: pytest.MonkeyPatch) -> None:
    # The real limit is 16 MiB.
    monkeypatch.setattr(manifest, "MAX_MANIFEST_BYTES", 10)
    with pytest.raises(CorralError) as caught:
        parse_manifest(STOCK)
    assert caught.value.code == "too_large"


@given(st.binary(max_size=60))
def test_t106_any_bytes_are_read_or_refused(content: bytes) -> None:
    for parse in (parse_manifest, parse_config, parse_params, parse_messages):
        try:
            parse(content)
        except CorralError as error:
            code = error.code
            assert code == "bad_request"  # several parsers, most of which refuse


def test_config_is_written_as_ollama_reads_it() -> None:
    config = ModelConfig(
        model_format="gguf", model_family="llama", model_families=("llama",), model_type="134.52M", file_type="Q4_1"
    )
    written = format_config(config, [B])
    assert json.loads(written) == {
        "model_format": "gguf",
        "model_family": "llama",
        "model_families": ["llama"],
        "model_type": "134.52M",
        "file_type": "Q4_1",
        "architecture": "amd64",
        "os": "linux",
        "rootfs": {"type": "layers", "diff_ids": [str(B)]},
    }
    assert parse_config(written) == config


def test_config_without_values_still_has_the_members_ollama_always_writes() -> None:
    shown = ("model_format", "model_family", "model_families", "model_type", "file_type")
    assert set(json.loads(format_config(ModelConfig(), []))) == {*shown, "architecture", "os", "rootfs"}


def test_config_of_a_stub_is_read() -> None:
    config = parse_config(
        b'{"model_format":"","model_families":null,"remote_host":"https://ollama.com:443","remote_model":"gpt-oss:120b",'
        b'"capabilities":["tools"],"context_length":131072,"draft":{"x":1},"architecture":"amd64"}'
    )
    assert config.is_stub
    assert (config.remote_model, config.capabilities, config.context_length) == ("gpt-oss:120b", ("tools",), 131072)


@pytest.mark.parametrize(
    ("draft", "expected"),
    [
        (
            b'{"model_format":"safetensors","architecture":"llama","tensor_prefix":"draft.","config":"draft/config.json"}',
            {"model_format": "safetensors", "architecture": "llama", "tensor_prefix": "draft.", "config": "draft/config.json"},
        ),
        (b'{"model_format":"gguf","later":{"a":[1]}}', {"model_format": "gguf", "later": {"a": [1]}}),
        (b"null", {}),
        (b'"gguf"', {}),
        (b"[1]", {}),
    ],
)
def test_config_with_a_draft_of_any_shape_is_read(draft: bytes, expected: dict[str, object]) -> None:
    config = parse_config(b'{"model_format":"gguf","draft":' + draft + b"}")
    assert (config.model_format, config.draft) == ("gguf", expected)
    assert parse_config(format_config(config, [])) == config


@pytest.mark.parametrize("content", [b'{"remote_host":"x"}', b'{"remote_model":"x"}', b"{}"])
def test_config_with_half_a_remote_is_no_stub(content: bytes) -> None:
    assert not parse_config(content).is_stub


def test_params_are_one_blob_whatever_their_order() -> None:
    assert format_params({"b": 1, "a": ["x"]}) == format_params({"a": ["x"], "b": 1}) == b'{"a":["x"],"b":1}\n'
    assert parse_params(b'{"stop":["a","b"],"temperature":0.5,"seed":null}') == {"stop": ["a", "b"], "temperature": 0.5}


def test_messages_are_read_with_what_they_lack() -> None:
    assert parse_messages(b'[{"role":"user","content":"hi","images":[1]},{"role":"assistant","content":null}]') == (
        ("user", "hi"),
        ("assistant", ""),
    )
