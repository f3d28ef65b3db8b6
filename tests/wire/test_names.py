"""Model names, their suffixes and digests."""

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from corral.wire.errors import CorralError
from corral.wire.names import (
    Digest,
    ModelName,
    ModelReference,
    Source,
    cloud_tag,
    parse_digest,
    parse_name,
    parse_reference,
)

HOST, NAMESPACE, TAG = "registry.ollama.ai", "library", "latest"


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("m", ModelName(HOST, NAMESPACE, "m", TAG)),
        ("m:7b", ModelName(HOST, NAMESPACE, "m", "7b")),
        ("ns/m", ModelName(HOST, "ns", "m", TAG)),
        ("ns/m:7b-q4_1", ModelName(HOST, "ns", "m", "7b-q4_1")),
        ("host/ns/m", ModelName("host", "ns", "m", TAG)),
        ("localhost:5000/ns/m:t", ModelName("localhost:5000", "ns", "m", "t")),
        ("https://example.org/ns/m:t", ModelName("example.org", "ns", "m", "t")),
        ("Qwen2.5-Coder:7B", ModelName(HOST, NAMESPACE, "Qwen2.5-Coder", "7B")),
        ("_x", ModelName(HOST, NAMESPACE, "_x", TAG)),
    ],
)
def test_name_is_completed_with_the_defaults(text: str, name: ModelName) -> None:
    assert parse_name(text) == name


@pytest.mark.parametrize(
    "text",
    [
        "",
        "/",
        ":",
        "m:",
        ":t",
        "/m",
        "ns/",
        "..",
        "../m",
        "ns/..",
        "ns/../m",
        "a/b/c/d",
        ".m",
        "-m",
        "m/..:t",
        "m:..",
        "n.s/m",
        "m t",
        "m\n",
        "m:t\n",
        "m\x00",
        "m%2e",
        "a\\b",
        "é",
        "m:é",
        "x" * 81,
        "m:" + "x" * 81,
        "m@sha256:abc",
        "m:a:b",
        "://m:",
        "file://m",
        "https://ns/m",
        " m",
    ],
)
def test_t034_malformed_name_is_a_bad_request(text: str) -> None:
    with pytest.raises(CorralError) as error:
        parse_name(text)
    assert (error.value.code, error.value.message) == ("bad_request", "invalid model name")


def outcome(parse: object, text: str) -> object:
    """What parsing gives, or the code of its error."""
    try:
        return parse(text)  # type: ignore[operator]
    except CorralError as error:
        return error.code


@given(st.text(max_size=60) | st.text("ab./:-_%\\ \n", max_size=30))
@example("\ud800")
def test_t034_any_text_is_a_safe_name_or_a_bad_request(text: str) -> None:
    name = outcome(parse_name, text)
    if name == "bad_request":
        return
    assert isinstance(name, ModelName)
    for part in (name.host, name.namespace, name.model, name.tag):
        assert part not in ("", ".", "..")
        assert not set(part) & set("/\\\x00\n %")
    assert parse_name(str(name)) == name
    assert parse_name(name.short) == name


part = st.text("abcXYZ019", min_size=1, max_size=8)


@given(part, part, part, part)
def test_name_written_and_read_is_the_same(host: str, namespace: str, model: str, tag: str) -> None:
    name = ModelName(host, namespace, model, tag)
    assert parse_name(str(name)) == name
    assert parse_name(name.short) == name
    assert parse_name(str(name).upper()).key == name.key
    assert name.repository == f"{namespace}/{model}"


@pytest.mark.parametrize(
    ("text", "short"),
    [("m", "m:latest"), ("library/m:t", "m:t"), ("ns/m:t", "ns/m:t"), ("example.org/library/m:t", "example.org/library/m:t")],
)
def test_short_form_leaves_the_defaults_out_but_for_the_tag(text: str, short: str) -> None:
    assert parse_name(text).short == short


@pytest.mark.parametrize(
    ("text", "base", "source"),
    [
        ("m", "m", Source.UNSPECIFIED),
        ("m:7b", "m:7b", Source.UNSPECIFIED),
        ("m:cloud", "m", Source.CLOUD),
        ("m:CLOUD", "m", Source.CLOUD),
        ("m:7b-cloud", "m:7b", Source.CLOUD),
        ("m:7b-Cloud", "m:7b", Source.CLOUD),
        ("ns/m:7b:cloud", "ns/m:7b", Source.CLOUD),
        ("m:local", "m", Source.LOCAL),
        ("m:7b:local", "m:7b", Source.LOCAL),
        ("m:-cloud", "m:-cloud", Source.UNSPECIFIED),
        ("m-cloud", "m-cloud", Source.UNSPECIFIED),
        ("host:cloud/m", "host:cloud/m", Source.UNSPECIFIED),
        ("", "", Source.UNSPECIFIED),
        (" m\n", "m", Source.UNSPECIFIED),
        ("m: Cloud ", "m", Source.CLOUD),
        ("m: 7b-cloud", "m:7b", Source.CLOUD),
    ],
)
def test_reference_gives_up_its_suffix(text: str, base: str, source: Source) -> None:
    assert parse_reference(text) == ModelReference(base, source)


@pytest.mark.parametrize("text", ["m:cloud:local", "m:local:cloud", "m:cloud:cloud", "m:7b-cloud:local", "m:local:local"])
def test_reference_with_two_suffixes_is_a_bad_request(text: str) -> None:
    with pytest.raises(CorralError) as error:
        parse_reference(text)
    assert error.value.code == "bad_request"


@given(st.text(max_size=40) | st.text("m:/-clouda", max_size=30))
def test_any_text_is_a_reference_or_a_bad_request(text: str) -> None:
    found = outcome(parse_reference, text)
    assert found == "bad_request" or isinstance(found, ModelReference)


@pytest.mark.parametrize(
    ("base", "stub"), [("m", "m:cloud"), ("m:20b", "m:20b-cloud"), ("ns/m", "ns/m:cloud"), ("h:1/n/m", "h:1/n/m:cloud")]
)
def test_cloud_tag_is_undone_by_the_reference(base: str, stub: str) -> None:
    assert cloud_tag(base) == stub
    assert parse_reference(stub) == ModelReference(base, Source.CLOUD)


HEX = "0123456789abcdef" * 4


def test_digest_is_read_written_and_safe_as_a_file_name() -> None:
    digest = parse_digest(f"sha256:{HEX}")
    assert digest == Digest(HEX)
    assert str(digest) == f"sha256:{HEX}"
    assert digest.file_name == f"sha256-{HEX}"


@pytest.mark.parametrize(
    "text",
    [
        "",
        HEX,
        f"sha256-{HEX}",
        f"sha256:{HEX[:-1]}",
        f"sha256:{HEX}0",
        f"sha256:{HEX.upper()}",
        f"sha256:{HEX}\n",
        f"sha512:{HEX}",
        f"SHA256:{HEX}",
        "sha256:../../" + HEX[6:],
        "sha256:" + "\\" * 64,
        "sha256:" + "\x00" * 64,
        "sha256:" + "%2e" * 21 + "0",
        "sha256:" + "０" * 64,
    ],
)
def test_t033_malformed_digest_is_a_bad_request(text: str) -> None:
    with pytest.raises(CorralError) as error:
        parse_digest(text)
    assert (error.value.code, error.value.message) == ("bad_request", "invalid digest format")


@given(st.text(max_size=80))
def test_t033_any_text_is_a_digest_or_a_bad_request(text: str) -> None:
    assert outcome(parse_digest, text) == "bad_request"
