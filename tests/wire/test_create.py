"""The rules of making models that need no disk."""

from pathlib import PurePosixPath

import pytest
from hypothesis import given
from hypothesis import strategies as st

from corral.wire.create import (
    CreateRequest,
    check_safetensors_header,
    is_local_path,
    may_lie_beside_safetensors,
    parse_blob_digest,
    parse_files,
    parse_remote_host,
    quantization_of,
    safetensors_header_size,
    split_name,
    with_info,
)
from corral.wire.errors import CorralError
from corral.wire.manifest import ModelConfig

HEX = "0" * 64


@given(st.text(st.sampled_from(list("a./\\ \0\n~-")), max_size=12) | st.text(max_size=30))
def test_t108_a_local_path_stays_below_any_directory(text: str) -> None:
    if is_local_path(text):
        path = PurePosixPath("/base") / text
        assert path.is_relative_to("/base")
        assert ".." not in path.parts
        assert str(path) == f"/base/{text}"
        assert "\\" not in text


@pytest.mark.parametrize("text", ["a.gguf", "sub/dir/a b.gguf", "a:q4.gguf", "~", ".hidden", "ä"])
def test_ordinary_names_are_local_paths(text: str) -> None:
    assert is_local_path(text)


def test_files_come_in_the_order_of_their_names() -> None:
    assert list(parse_files({"b": f"sha256:{HEX}", "a": f"sha256-{HEX}"})) == ["a", "b"]
    assert parse_files(None) == {}


@pytest.mark.parametrize("text", ["sha256:x", f"sha256_{HEX}", f"sha256--{HEX[1:]}", f"sha256:{HEX}-", HEX])
def test_t033_digest_has_one_of_two_forms(text: str) -> None:
    with pytest.raises(CorralError, match="invalid digest format"):
        parse_blob_digest(text)


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("m-00002-of-00003.gguf", ("m", 2, 3)),
        ("dir/m-x-00001-of-00001.gguf", ("m-x", 1, 1)),
        ("m-2-of-3.gguf", None),
        ("m.gguf", None),
    ],
)
def test_name_of_a_part_says_which_it_is(name: str, parts: tuple[str, int, int] | None) -> None:
    assert split_name(name) == parts


@pytest.mark.parametrize(
    ("name", "may"), [("a.safetensors", True), ("x/tokenizer.model", True), ("a.py", False), ("a.bin", False)]
)
def test_t109_what_may_lie_beside_safetensors(name: str, may: bool) -> None:
    assert may_lie_beside_safetensors(name) is may


@pytest.mark.parametrize(
    ("head", "size"), [(b"", 0), (b"\1" * 7, 100), (b"\xff" * 8, 2**62), (b"\1" + b"\0" * 7, 100), (b"\x09" + b"\0" * 7, 16)]
)
def test_t109_safetensors_header_that_cannot_be_is_refused(head: bytes, size: int) -> None:
    with pytest.raises(CorralError, match="safetensors"):
        safetensors_header_size(head, size)


@pytest.mark.parametrize(
    "header",
    [
        b"[]",
        b"{",
        b'{"a":1}',
        b'{"a":{}}',
        b'{"a":{"data_offsets":[0]}}',
        b'{"a":{"data_offsets":[0,9]}}',
        b'{"a":{"data_offsets":[2,1]}}',
        b'{"a":{"data_offsets":[-1,1]}}',
        b'{"a":{"data_offsets":[true,true]}}',
        b'{"a":{"data_offsets":[0,1]},"a":{"data_offsets":[0,1]}}',
    ],
)
def test_t109_tensor_outside_of_the_file_is_refused(header: bytes) -> None:
    with pytest.raises(CorralError):
        check_safetensors_header(header, 8)


def test_safetensors_header_of_an_ordinary_file_passes() -> None:
    header = b'{"__metadata__":{"format":"pt"},"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}'
    assert safetensors_header_size(len(header).to_bytes(8, "little"), 8 + len(header) + 8) == len(header)
    check_safetensors_header(header, 8)


@given(st.text(max_size=40))
def test_any_remote_host_is_an_address_or_refused(text: str) -> None:
    try:
        kept = parse_remote_host(text)
    except CorralError as error:
        assert error.message == "bad remote"  # noqa: PT017 - either outcome is right
    else:
        assert parse_remote_host(kept) == kept


def test_info_without_anything_changes_nothing() -> None:
    config = ModelConfig(model_family="a", capabilities=("tools",))
    assert with_info(config, {"model_family": "", "context_length": 0, "capabilities": "vision"}) == config
    assert with_info(config, {"capabilities": ["vision", "tools", "", None]}).capabilities == ("tools", "vision")


@pytest.mark.parametrize("value", [True, None, "1", [1]])
def test_info_number_that_is_none_is_refused(value: object) -> None:
    with pytest.raises(CorralError, match="must be a number"):
        with_info(ModelConfig(), {"context_length": value})


@pytest.mark.parametrize("value", [-1, 0.5, float("inf"), 1e300, 2**64])
def test_info_number_that_counts_nothing_is_refused(value: float) -> None:
    with pytest.raises(CorralError, match="must be a non-negative integer"):
        with_info(ModelConfig(), {"context_length": value})


@pytest.mark.parametrize(
    ("given_license", "texts"), [(None, []), ("MIT", ["MIT"]), ("", []), (["a", "", None, "b"], ["a", "b"]), ([], [])]
)
def test_license_is_one_text_or_several(given_license: object, texts: list[str]) -> None:
    assert CreateRequest(license=given_license).licenses == texts


def test_quantization_is_one_of_ollamas() -> None:
    assert quantization_of("q4_k_m") == "Q4_K_M"
    with pytest.raises(CorralError) as caught:
        quantization_of("Q2_K")
    assert caught.value.status == 500
