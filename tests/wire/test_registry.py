"""The registry protocol's texts: each is read back by what reads it in the field; what is malformed gets a coded error."""

import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from hashlib import md5
from itertools import pairwise
from typing import Any, TypeVar

import pytest
from hypothesis import given
from hypothesis import strategies as st

from corral.wire.errors import CorralError
from corral.wire.manifest import MANIFEST_TYPE, MAX_LAYERS, MAX_MANIFEST_BYTES
from corral.wire.names import Digest
from corral.wire.registry import (
    DOCKER_LIST_TYPE,
    MAX_SCOPES,
    OCI_INDEX_TYPE,
    OCI_MANIFEST_TYPE,
    ByteRange,
    Challenge,
    challenge_header,
    multipart_etag,
    parse_challenge,
    parse_content_range,
    parse_image_manifest,
    parse_range,
    parse_scopes,
    part_size,
    parts,
    referrers_index,
    scope_text,
    token_request_url,
)
from corral.wire.repositories import parse_repository
from corral.wire.signing import DevicePrivateKey, authorization_header, token_challenge

A, B, C = Digest("a" * 64), Digest("b" * 64), Digest("c" * 128, "sha512")

NAMES = st.one_of(
    st.from_regex(r"\A[A-Za-z0-9_][A-Za-z0-9_-]{0,79}/[A-Za-z0-9_][A-Za-z0-9_.-]{0,79}\Z"),
    st.from_regex(r"\A[a-z0-9]{1,9}((\.|_|__|-{1,3})[a-z0-9]{1,9})?(/[a-z0-9]{1,9}((\.|_|__|-{1,3})[a-z0-9]{1,9})?){1,6}\Z"),
)
ACTIONS = st.sets(st.sampled_from(["pull", "push", "delete"]), min_size=1)
QUOTABLE = st.from_regex(r"\A[A-Za-z0-9.:/_-]{1,60}\Z")


Result = TypeVar("Result")


def refused(call: Callable[[], object]) -> str:
    with pytest.raises(CorralError) as caught:
        call()
    return caught.value.code


def read_or_refused(code: str, read: Callable[[], Result]) -> Result | None:
    """What was read, or None when it was refused with that code and no other."""
    try:
        return read()
    except CorralError as error:
        if error.code != code:
            raise
        return None


# ── Ranges and parts ─────────────────────────────────────────────────────────────────────────────────────────────────────
@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("bytes=500-1499", (500, 1499)),
        ("bytes=500-", (500, 2047)),
        ("bytes=-500", (1548, 2047)),
        ("bytes=0-0", (0, 0)),
        ("bytes=2047-2047", (2047, 2047)),
        ("bytes=0-9999", (0, 2047)),
        ("bytes=-9999", (0, 2047)),
        ("bytes=0-" + "9" * 40, (0, 2047)),
        ("Bytes=1-2", (1, 2)),
        (" bytes=1-2 ", (1, 2)),
    ],
)
def test_range_is_cut_at_the_end_of_the_blob(value: str, expected: tuple[int, int]) -> None:
    assert parse_range(value, 2048) == ByteRange(*expected)


@pytest.mark.parametrize(
    "value", ["", "lines=1-2", "bytes", "bytes 1-2", "bytes=0-0,-1", "bytes=0-1, 4-5", "bytes=" + "0-0," * 1000]
)
def test_f21_several_ranges_and_other_units_are_served_whole(value: str) -> None:
    assert parse_range(value, 2048) is None


@pytest.mark.parametrize(
    "value",
    [
        "bytes=500-0",
        "bytes=2048-",
        "bytes=2048-3000",
        "bytes=-0",
        "bytes=-",
        "bytes=",
        "bytes=a-b",
        "bytes=--5",
        "bytes=-5-",
        "bytes=+1-2",
        "bytes=1_0-20",
        "bytes=٣-٤",
        "bytes=1.5-2",
        "bytes=0x1-0x2",
        "bytes=" + "9" * 5000 + "-",
    ],
)
def test_f21_range_that_selects_nothing_is_416_with_the_size(value: str) -> None:
    with pytest.raises(CorralError) as caught:
        parse_range(value, 2048)
    assert caught.value.code == "range_invalid"
    assert caught.value.headers == {"Content-Range": "bytes */2048"}


def test_range_of_an_empty_blob_selects_nothing_or_the_whole() -> None:
    assert refused(lambda: parse_range("bytes=0-", 0)) == "range_invalid"
    assert parse_range("bytes=-5", 0) is None


@given(st.integers(1, 10**12), st.data())
def test_range_round_trips(size: int, data: st.DataObject) -> None:
    first = data.draw(st.integers(0, size - 1))
    last = data.draw(st.integers(first, size - 1))
    found = parse_range(f"bytes={ByteRange(first, last)}", size)
    assert found == ByteRange(first, last)
    assert found.length == last - first + 1


@given(st.text(max_size=60).map("bytes={}".format) | st.text(max_size=60), st.integers(0, 10**6))
def test_f21_any_range_lies_inside_or_is_refused(value: str, size: int) -> None:
    found = read_or_refused("range_invalid", lambda: parse_range(value, size))
    assert found is None or 0 <= found.first <= found.last < size


def test_t039_many_ranges_are_answered_quickly() -> None:
    start = time.process_time()
    for _ in range(1000):
        parse_range("bytes=" + "0-," * 1300, 10**9)
    assert time.process_time() - start < 0.5


@given(st.integers(0, 2**62), st.integers(1, 2**62))
def test_content_range_round_trips(first: int, length: int) -> None:
    chunk = ByteRange(first, first + length - 1)
    assert parse_content_range(str(chunk), length) == chunk
    assert parse_content_range(str(chunk), None) == chunk


@pytest.mark.parametrize(
    ("value", "length"),
    [
        ("5-2", 4),
        ("5-2", None),
        ("5-4", 0),
        ("bytes 0-5/6", 6),
        ("bytes=0-5", 6),
        ("0-5/6", 6),
        ("0-5", 5),
        ("0-5", 7),
        ("0-5", 0),
        ("-5", 5),
        ("5-", 5),
        ("", 0),
        ("0--1", 0),
        ("0-5,6-7", 8),
        ("٠-٥", 6),
        ("0-" + "9" * 5000, None),
    ],
)
def test_f22_t035_content_range_that_contradicts_is_refused(value: str, length: int | None) -> None:
    assert refused(lambda: parse_content_range(value, length)) == "size_invalid"


def test_f22_content_range_beyond_any_size_is_refused() -> None:
    assert refused(lambda: parse_content_range("0-" + "9" * 19, None)) == "range_invalid"


@pytest.mark.parametrize(
    ("size", "count", "step", "last"),
    [
        (0, 0, 100_000_000, None),
        (1, 1, 100_000_000, 1),
        (100_000_000, 1, 100_000_000, 100_000_000),
        (100_000_001, 2, 100_000_000, 1),
        (4_661_224_676, 17, 291_326_542, 4),
        (40_000_000_000, 40, 1_000_000_000, 1_000_000_000),
    ],
)
def test_parts_are_those_of_stock_clients(size: int, count: int, step: int, last: int | None) -> None:
    found = parts(size)
    assert (len(found), part_size(size)) == (count, step)
    assert [found[-1].length] == [last] if found else last is None


@given(st.integers(1, 10**11))
def test_parts_cover_the_blob_without_gap(size: int) -> None:
    found = parts(size)
    assert found[0].first == 0
    assert found[-1].last == size - 1
    assert all(left.last + 1 == right.first for left, right in pairwise(found))


def test_etag_is_that_of_a_multipart_upload() -> None:
    assert multipart_etag([]) == "d41d8cd98f00b204e9800998ecf8427e-0"
    one, two = md5(b"one").digest(), md5(b"two").digest()
    assert multipart_etag([one, two]) == md5(one + two).hexdigest() + "-2"


# ── Scopes ───────────────────────────────────────────────────────────────────────────────────────────────────────────────
@given(NAMES, ACTIONS)
def test_scope_round_trips(name: str, actions: set[str]) -> None:
    (found,) = parse_scopes([scope_text(name, actions)])
    assert (found.kind, found.repository, found.actions) == ("repository", name, actions)


def test_scope_text_has_one_order() -> None:
    assert scope_text("ana/m", {"push", "pull"}) == "repository:ana/m:pull,push"


@pytest.mark.parametrize(
    "values",
    [
        ["repository:ana/m:pull,push", "repository:bo/n:pull"],
        ["repository:ana/m:pull,push repository:bo/n:pull"],
        ["repository:ana/m:pull", "repository:ANA/M:push", "repository:bo/n:pull"],
        ["repository:ana/m:push,pull,fly repository:bo/n:pull,pull"],
    ],
)
def test_scopes_are_read_repeated_and_as_a_list(values: list[str]) -> None:
    found = parse_scopes(values)
    assert [(scope.repository, scope.actions) for scope in found] == [("ana/m", {"pull", "push"}), ("bo/n", {"pull"})]


def test_star_asks_for_every_action() -> None:
    (found,) = parse_scopes(["repository:ana/m:*"])
    assert found.actions == {"pull", "push", "delete"}


@pytest.mark.parametrize(
    "text",
    [
        "",
        " ",
        "*",
        ":",
        "::",
        "repository",
        "repository:ana/m",
        "repository:ana/m:",
        "repository:ana/m:fly",
        "repository:ana/m:PULL",
        "repository:../x:pull",
        "repository:ana/../x:pull",
        "repository:tiny:pull",
        "repository:*:pull",
        "repository:host:5000/ana/m:pull",
        "repository(plugin):ana/m:pull",
        "Repository:ana/m:pull",
        "registry:catalog:*",
        "repository:ana/m:pull\x00",
    ],
)
def test_t028_scope_of_nothing_we_know_is_ignored(text: str) -> None:
    assert parse_scopes([text]) == ()


def test_t028_scopes_beyond_the_limit_are_ignored() -> None:
    found = parse_scopes([f"repository:ana/m{number}:pull" for number in range(1000)])
    assert len(found) == MAX_SCOPES


@given(st.lists(st.text(max_size=80), max_size=5))
def test_t028_any_scopes_are_read_or_ignored(values: list[str]) -> None:
    for scope in parse_scopes(values):
        assert scope.actions
        parse_repository(scope.repository)


# ── Challenges ───────────────────────────────────────────────────────────────────────────────────────────────────────────
@dataclass
class Stock:
    """What Ollama's reader finds in a challenge, by the description of registry.md 1.1: behind the first `key=` anywhere one
    character is skipped, and the value ends at a quote that a comma or the end follows."""

    header: str

    def __getitem__(self, key: str) -> str:
        text = self.header.removeprefix("Bearer ")
        at = text.find(f"{key}=")
        if at < 0:
            return ""
        rest = text[at + len(key) + 2 :]
        ends = [place for place, letter in enumerate(rest) if letter == '"' and rest[place + 1 : place + 2] in (",", "")]
        return rest[: ends[0]] if ends else rest


def test_t023_challenge_has_the_exact_form() -> None:
    header = challenge_header(realm="https://hub.example/v2/token", service="hub.example", scope="repository:ns/m:pull")
    assert header == 'Bearer realm="https://hub.example/v2/token",service="hub.example",scope="repository:ns/m:pull"'


@given(QUOTABLE, QUOTABLE, NAMES, ACTIONS, st.sampled_from(["", "insufficient_scope", "invalid_token"]))
def test_t023_challenge_is_read_back_by_ollama_and_by_us(
    host: str, service: str, name: str, actions: set[str], error: str
) -> None:
    realm, scope = f"https://hub.example/{host}", scope_text(name, actions)
    header = challenge_header(realm=realm, service=service, scope=scope, error=error)
    stock = Stock(header)
    assert (stock["realm"], stock["service"], stock["scope"]) == (realm, service, scope)
    assert parse_challenge(header) == Challenge(realm, service, (scope,))


def test_challenge_without_scope_is_read_back_as_none() -> None:
    header = challenge_header(realm="http://127.0.0.1:5000/v2/token", service="corral")
    assert Stock(header)["scope"] == ""
    assert parse_challenge(header).scopes == ()


@pytest.mark.parametrize("service", ['a"b', "a\\b", "a\nb", "ä", "scope=x", "a,realm=b"])
def test_value_that_a_challenge_cannot_hold_is_refused(service: str) -> None:
    with pytest.raises(ValueError, match="service"):
        challenge_header(realm="https://hub.example/v2/token", service=service)


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ('bearer realm="https://a.example/t"', Challenge("https://a.example/t", "", ())),
        (
            'Bearer realm="https://a.example/t", service="a b" ,scope="repository:x/y:pull repository:z/w:pull"',
            Challenge("https://a.example/t", "a b", ("repository:x/y:pull", "repository:z/w:pull")),
        ),
        ("Bearer realm=https://a.example/t,service=s", Challenge("https://a.example/t", "s", ())),
        (r'Bearer REALM="https://a.example/t",service="\a\"b\\"', Challenge("https://a.example/t", 'a"b\\', ())),
        ('Bearer realm="https://[::1]:5000/t?a=b",', Challenge("https://[::1]:5000/t?a=b", "", ())),
    ],
)
def test_challenge_of_other_registries_is_read(value: str, expected: Challenge) -> None:
    assert parse_challenge(value) == expected


@pytest.mark.parametrize(
    "value",
    [
        "",
        "Bearer",
        "Bearer ",
        'Basic realm="https://a.example/t"',
        'Basic realm="a", Bearer realm="https://a.example/t"',
        'Bearer realm="https://a.example/t", Basic realm="b"',
        'Bearer realm="https://a.example/t",realm="https://b.example/t"',
        'Bearer realm="https://a.example/t",Realm="https://a.example/t"',
        'Bearer realm="https://a.example/t",scope="a",scope="b"',
        'Bearer service="s"',
        'Bearer realm=""',
        'Bearer realm="/v2/token"',
        'Bearer realm="ftp://a.example/t"',
        'Bearer realm="https:///t"',
        'Bearer realm="https://user@a.example/t"',
        'Bearer realm="https://a.example/t#x"',
        'Bearer realm="https://a.example:99999/t"',
        'Bearer realm="https://a.example:0/t"',
        'Bearer realm="https://a.example:x/t"',
        'Bearer realm="https://[::1/t"',
        'Bearer realm="https://a.example/ t"',
        'Bearer realm="https://a.example/ä"',
        'Bearer realm="https://a.example\\\\@b.example/t"',
        'Bearer realm="https://a.example/t" service="s"',
        'Bearer realm="https://a.example/t',
        "Bearer realm",
        'Bearer realm="https://a.example/t?' + "a=b&" * 51 + '"',
        'Bearer realm="https://a.example/' + "a" * 8192 + '"',
    ],
)
def test_t092_challenge_that_is_not_plain_is_refused(value: str) -> None:
    assert refused(lambda: parse_challenge(value)) == "upstream_failed"


@given(st.text(max_size=200).map('Bearer realm="https://a.example/t",{}'.format) | st.text(max_size=200))
def test_t092_any_challenge_is_read_or_refused(value: str) -> None:
    challenge = read_or_refused("upstream_failed", lambda: parse_challenge(value))
    if challenge is not None:
        assert token_request_url(challenge, ts=1, nonce="n").isascii()


def test_token_request_is_the_one_of_the_vector() -> None:
    url = "https://corral.example:8443"
    challenge = Challenge(f"{url}/v2/token", "corral", ("repository:ana/m:pull,push",))
    asked = token_request_url(challenge, ts=1_700_000_000, nonce="AAECAwQFBgcICQoLDA0ODw")
    assert asked == (
        f"{url}/v2/token?nonce=AAECAwQFBgcICQoLDA0ODw&scope=repository%3Aana%2Fm%3Apull%2Cpush&service=corral&ts=1700000000"
    )
    signed = authorization_header(DevicePrivateKey(bytes(range(32))), token_challenge(url, asked.removeprefix(url)))
    assert signed == (
        "AAAAC3NzaC1lZDI1NTE5AAAAIAOhB7/zzhC+HXDdGOdLwJln5NYwm6UNXx3chmQSVTG4:"
        "jmTXnqdcylo9cNUcJNbWHQm3QL+1B9xZMaPzONnEZr0qcZaWgrJx6S01v55vv11pIpcJIAOb7N+yAxQmBv17Bw=="
    )


@pytest.mark.parametrize(
    ("challenge", "query"),
    [
        (Challenge("http://h/t", "s", ()), "nonce=n&scope=&service=s&ts=7"),
        (Challenge("http://h/t", "", ("b", "a")), "nonce=n&scope=b&scope=a&service=&ts=7"),
        (
            Challenge("http://h/t?z=1&a=x+y&service=own&e", "s~ é*", ()),
            "a=x+y&e=&nonce=n&scope=&service=own&service=s~+%C3%A9%2A&ts=7&z=1",
        ),
        (Challenge("http://h/t?q=%ff%2F", "s", ()), "nonce=n&q=%FF%2F&scope=&service=s&ts=7"),
    ],
)
def test_token_request_is_encoded_as_go_does(challenge: Challenge, query: str) -> None:
    assert token_request_url(challenge, ts=7, nonce="n") == f"http://h/t?{query}"


# ── Manifests ────────────────────────────────────────────────────────────────────────────────────────────────────────────
def descriptor(digest: Digest | str = A, size: object = 7, **members: object) -> dict[str, object]:
    return {"mediaType": "application/x", "digest": str(digest), "size": size, **members}


def image(**members: object) -> dict[str, object]:
    document = {
        "schemaVersion": 2,
        "mediaType": OCI_MANIFEST_TYPE,
        "config": descriptor(A),
        "layers": [descriptor(B, 9)],
    }
    return {**document, **members}


def index(**members: object) -> dict[str, object]:
    return {"schemaVersion": 2, "mediaType": OCI_INDEX_TYPE, "manifests": [descriptor(A)], **members}


def encoded(document: object) -> bytes:
    return json.dumps(document).encode()


def test_stock_manifest_names_its_blobs_with_the_config_last() -> None:
    body = encoded(image(mediaType=MANIFEST_TYPE, layers=[descriptor(B, 9, **{"from": "library/x:latest"})]))
    manifest = parse_image_manifest(body, MANIFEST_TYPE)
    assert manifest.media_type == MANIFEST_TYPE
    assert [(blob.digest, blob.size_bytes) for blob in manifest.blobs] == [(B, 9), (A, 7)]
    assert manifest.children == ()


def test_stub_without_layers_is_read() -> None:
    manifest = parse_image_manifest(encoded(image(layers=None, mediaType=MANIFEST_TYPE)), MANIFEST_TYPE)
    assert [blob.digest for blob in manifest.blobs] == [A]


def test_config_without_digest_is_none() -> None:
    manifest = parse_image_manifest(encoded(image(config={"mediaType": "", "digest": "", "size": 0})), OCI_MANIFEST_TYPE)
    assert manifest.config is None
    assert [blob.digest for blob in manifest.blobs] == [B]


def test_index_names_its_children() -> None:
    manifest = parse_image_manifest(encoded(index(manifests=[descriptor(A), descriptor(C), descriptor(A)])), OCI_INDEX_TYPE)
    assert [child.digest for child in manifest.children] == [A, C]
    assert manifest.blobs == ()


@pytest.mark.parametrize(
    "media_type",
    [
        "application/vnd.oci.image.layer.nondistributable.v1.tar",
        "application/vnd.oci.image.layer.nondistributable.v1.tar+gzip",
        "application/vnd.docker.image.rootfs.foreign.diff.tar.gzip",
    ],
)
def test_layer_that_is_not_distributed_need_not_be_here(media_type: str) -> None:
    foreign = descriptor(B, mediaType=media_type, urls=["https://e.example/b"])
    manifest = parse_image_manifest(encoded(image(layers=[foreign])), OCI_MANIFEST_TYPE)
    assert [blob.digest for blob in manifest.blobs] == [A]
    assert manifest.layers[0].urls
    without_urls = parse_image_manifest(encoded(image(layers=[foreign | {"urls": []}])), OCI_MANIFEST_TYPE)
    assert [blob.digest for blob in without_urls.blobs] == [B, A]


@pytest.mark.parametrize("media_type", ["application/vnd.ollama.image.system", "application/vnd.oci.image.layer.v1.tar", ""])
def test_t031_other_layers_must_be_here_with_urls_as_well(media_type: str) -> None:
    layer = descriptor(B, mediaType=media_type, urls=["https://e.example/b"])
    manifest = parse_image_manifest(encoded(image(layers=[layer])), OCI_MANIFEST_TYPE)
    assert [blob.digest for blob in manifest.blobs] == [B, A]


def test_blob_named_twice_is_one() -> None:
    manifest = parse_image_manifest(encoded(image(layers=[descriptor(A), descriptor(A)])), OCI_MANIFEST_TYPE)
    assert [blob.digest for blob in manifest.blobs] == [A]


@pytest.mark.parametrize(
    ("document", "content_type", "media_type"),
    [
        (image(mediaType=None), OCI_MANIFEST_TYPE, OCI_MANIFEST_TYPE),
        (image(), "", OCI_MANIFEST_TYPE),
        (image(), f"{OCI_MANIFEST_TYPE}; charset=utf-8", OCI_MANIFEST_TYPE),
        ({"anything": [1.5, {"deep": True}]}, "application/vnd.example+json", "application/vnd.example+json"),
        (
            {"blobs": [descriptor(B)]},
            "application/vnd.oci.artifact.manifest.v1+json",
            "application/vnd.oci.artifact.manifest.v1+json",
        ),
        (index(manifests=[], mediaType=DOCKER_LIST_TYPE), DOCKER_LIST_TYPE, DOCKER_LIST_TYPE),
    ],
)
def test_manifest_of_any_kind_is_read(document: dict[str, object], content_type: str, media_type: str) -> None:
    assert parse_image_manifest(encoded(document), content_type).media_type == media_type


def test_artifact_of_the_first_drafts_has_its_blobs_as_layers() -> None:
    manifest = parse_image_manifest(
        encoded({"blobs": [descriptor(B)], "artifactType": "t/x"}), "application/vnd.oci.artifact.manifest.v1+json"
    )
    assert ([blob.digest for blob in manifest.blobs], manifest.referrer_type) == ([B], "t/x")


@pytest.mark.parametrize(
    ("document", "referrer_type"),
    [
        (image(artifactType="application/sbom", subject=descriptor(C)), "application/sbom"),
        (image(subject=descriptor(C)), "application/x"),
        (index(subject=descriptor(C)), ""),
        (index(subject=descriptor(C), artifactType="application/sbom"), "application/sbom"),
    ],
)
def test_referrer_has_its_own_type_or_that_of_its_config(document: dict[str, Any], referrer_type: str) -> None:
    manifest = parse_image_manifest(encoded(document), document["mediaType"])
    assert manifest.referrer_type == referrer_type
    assert manifest.subject is not None
    assert manifest.subject.digest == C


def test_large_annotations_are_kept() -> None:
    annotations = {f"key{number}": "x" * 10_000 for number in range(390)}
    manifest = parse_image_manifest(encoded(image(annotations=annotations)), OCI_MANIFEST_TYPE)
    assert json.loads(manifest.annotations_json) == annotations


def test_f15_manifest_beyond_16_mib_is_refused_unread() -> None:
    assert refused(lambda: parse_image_manifest(b"[" * (MAX_MANIFEST_BYTES + 1), OCI_MANIFEST_TYPE)) == "too_large"


def nested(levels: int) -> dict[str, object]:
    document: dict[str, object] = {}
    for _ in range(levels - 1):
        document = {"x": document}
    return document


def test_f15_manifest_is_read_at_32_levels_and_refused_beyond() -> None:
    assert parse_image_manifest(encoded(nested(32)), "application/x").blobs == ()
    assert refused(lambda: parse_image_manifest(encoded(nested(33)), "application/x")) == "manifest_invalid"


@pytest.mark.parametrize("item", [b"[],", b"{},", b"1,", b'"",'])
def test_f15_manifest_of_millions_of_values_is_refused_quickly(item: bytes) -> None:
    body = b'{"x":[' + item * (15_000_000 // len(item)) + b"0]}"
    start = time.process_time()
    assert refused(lambda: parse_image_manifest(body, OCI_MANIFEST_TYPE)) == "manifest_invalid"
    assert time.process_time() - start < 0.5


def test_f15_manifest_of_too_many_descriptors_is_refused() -> None:
    listed = [descriptor(A)] * MAX_LAYERS
    assert len(parse_image_manifest(encoded(image(layers=listed)), OCI_MANIFEST_TYPE).layers) == MAX_LAYERS
    with pytest.raises(CorralError) as caught:
        parse_image_manifest(encoded(image(layers=[*listed, descriptor(A)])), OCI_MANIFEST_TYPE)
    assert caught.value.code == "manifest_invalid"
    assert caught.value.message == "invalid manifest: it refers to more than 12000 blobs and manifests"


BAD_DIGESTS = [
    "",
    "sha256:../../x",
    "sha256:" + "A" * 64,
    "sha256:" + "a" * 63,
    "sha256:" + "a" * 65,
    "sha256:" + "a" * 64 + "\n",
    "sha256-" + "a" * 64,
    "sha512:" + "a" * 64,
    "md5:" + "a" * 32,
    "sha256:%2e%2e",
    "sha256:" + "a" * 63 + "\x00",
    "a" * 64,
]


@pytest.mark.parametrize("digest", BAD_DIGESTS)
@pytest.mark.parametrize("place", ["config", "layers", "manifests", "subject"])
def test_f08_t033_digest_that_is_none_is_refused(digest: str, place: str) -> None:
    wrong = descriptor(digest)
    document = {"config": image(config=wrong), "layers": image(layers=[wrong]), "manifests": index(manifests=[wrong])}
    body = encoded(document.get(place, image(subject=wrong)))
    content_type = OCI_INDEX_TYPE if place == "manifests" else OCI_MANIFEST_TYPE
    assert refused(lambda: parse_image_manifest(body, content_type)) == "manifest_invalid"


@pytest.mark.parametrize("size", [-1, 2**63, 2**70, 1.0, 1.5, True, "7", None, [], 1e300])
def test_f15_size_that_is_none_is_refused(size: object) -> None:
    assert (
        refused(lambda: parse_image_manifest(encoded(image(layers=[descriptor(B, size)])), OCI_MANIFEST_TYPE))
        == "manifest_invalid"
    )


VALID = encoded(image())
MALFORMED = {
    "empty": b"",
    "not an object": b"[]",
    "not JSON": b"{",
    "not UTF-8": b'{"x":"\xff"}',
    "half a pair": b'{"x":"\\ud800"}',
    "NaN": b'{"x":NaN}',
    "infinite": b'{"x":1e999}',
    "5,000 digits": b'{"x":' + b"9" * 5000 + b"}",
    "deep": b'{"x":' * 100_000,
    "deep lists": b'{"x":' + b"[" * 900 + b"]" * 900 + b"}",
    "config twice": VALID[:-1] + b',"config":{}}',
    "layers twice": VALID[:-1] + b',"layers":[]}',
    "null and layers": VALID[:-1] + b',"layers":null}',
    "digest twice": VALID.replace(b'"size": 9', b'"size": 9, "digest": "sha256:' + b"c" * 64 + b'"'),
    "annotation twice": VALID[:-1] + b',"annotations":{"a":"1","a":"2"}}',
    "schema 1": encoded(image(schemaVersion=1)),
    "schema as text": encoded(image(schemaVersion="2")),
    "image with manifests": encoded(image(manifests=[])),
    "image of manifests only": encoded({"mediaType": OCI_MANIFEST_TYPE, "manifests": [descriptor()]}),
    "another mediaType": encoded(image(mediaType=MANIFEST_TYPE)),
    "annotations of numbers": encoded(image(annotations={"a": 1})),
    "annotations as list": encoded(image(annotations=[])),
    "layers as object": encoded(image(layers={})),
    "null layer": encoded(image(layers=[None])),
    "layer as text": encoded(image(layers=["x"])),
    "config as text": encoded(image(config="x")),
    "config with size only": encoded(image(config={"size": 5})),
    "two sizes": encoded(image(layers=[descriptor(A, 8)])),
    "two sizes of layers": encoded(image(layers=[descriptor(B, 8), descriptor(B, 9)])),
    "urls as text": encoded(image(layers=[descriptor(B, urls="x")])),
    "mediaType as number": encoded(image(mediaType=5)),
}


@pytest.mark.parametrize("name", MALFORMED)
def test_f15_t036_malformed_manifest_is_refused(name: str) -> None:
    assert refused(lambda: parse_image_manifest(MALFORMED[name], OCI_MANIFEST_TYPE)) == "manifest_invalid"


@pytest.mark.parametrize("members", [{"config": descriptor()}, {"layers": []}, {"blobs": []}])
def test_t036_index_with_parts_of_an_image_is_refused(members: dict[str, object]) -> None:
    for document in (index(**members), {"mediaType": OCI_INDEX_TYPE, **members}):
        assert refused(lambda document=document: parse_image_manifest(encoded(document), OCI_INDEX_TYPE)) == "manifest_invalid"


def test_f16_oci_manifest_as_ollama_pushes_it_keeps_its_own_type() -> None:
    assert parse_image_manifest(VALID, MANIFEST_TYPE).media_type == OCI_MANIFEST_TYPE


@pytest.mark.parametrize(
    ("document", "content_type"),
    [
        (image(mediaType=MANIFEST_TYPE), OCI_MANIFEST_TYPE),
        (image(mediaType=DOCKER_LIST_TYPE), MANIFEST_TYPE),
        (image(mediaType=OCI_MANIFEST_TYPE.upper()), MANIFEST_TYPE),
        (image(mediaType="application/x"), MANIFEST_TYPE),
        (index(), MANIFEST_TYPE),
        (index(mediaType=OCI_MANIFEST_TYPE), MANIFEST_TYPE),
        (image(), DOCKER_LIST_TYPE),
        (image(), f"{MANIFEST_TYPE}; charset=utf-8"),
    ],
)
def test_f16_other_types_than_ollamas_may_not_differ(document: dict[str, object], content_type: str) -> None:
    assert refused(lambda: parse_image_manifest(encoded(document), content_type)) == "manifest_invalid"


@pytest.mark.parametrize("content_type", [OCI_INDEX_TYPE, "application/json", "x", "a/b\r\nX-Y: z", "a/" + "b" * 200])
def test_f16_media_type_other_than_the_content_type_is_refused(content_type: str) -> None:
    assert refused(lambda: parse_image_manifest(VALID, content_type)) == "manifest_invalid"


@pytest.mark.parametrize("content_type", ["", ";", "json", "a b/c", "a/b\r\nX-Y: z", "ä/b", "*/*"])
def test_manifest_without_a_usable_media_type_is_refused(content_type: str) -> None:
    assert refused(lambda: parse_image_manifest(b"{}", content_type)) == "manifest_invalid"


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=9),
        lambda inner: (
            st.lists(inner, max_size=3)
            | st.dictionaries(
                st.sampled_from(["config", "layers", "manifests", "subject", "digest", "size", "annotations", "x"]),
                inner,
                max_size=4,
            )
        ),
        max_leaves=12,
    ),
    st.sampled_from([OCI_MANIFEST_TYPE, OCI_INDEX_TYPE, "application/x", "", "?"]),
)
def test_f15_any_document_is_read_or_refused(document: object, content_type: str) -> None:
    manifest = read_or_refused("manifest_invalid", lambda: parse_image_manifest(encoded(document), content_type))
    assert manifest is None or manifest.media_type == content_type


@given(st.binary(max_size=200))
def test_f15_any_bytes_are_read_or_refused(body: bytes) -> None:
    manifest = read_or_refused("manifest_invalid", lambda: parse_image_manifest(body, OCI_MANIFEST_TYPE))
    assert manifest is None or manifest.media_type == OCI_MANIFEST_TYPE


# ── Referrers ────────────────────────────────────────────────────────────────────────────────────────────────────────────
@dataclass(frozen=True)
class Listed:
    digest: Digest
    media_type: str
    size_bytes: int
    artifact_type: str = ""
    annotations: bytes = b"{}"


SBOM = Listed(A, OCI_MANIFEST_TYPE, 5, "application/sbom", b'{"k":"\xc3\xa4"}')
PLAIN = Listed(B, OCI_INDEX_TYPE, 6)


def test_referrers_are_an_index_of_what_they_state() -> None:
    assert json.loads(referrers_index([SBOM, PLAIN])) == {
        "schemaVersion": 2,
        "mediaType": OCI_INDEX_TYPE,
        "manifests": [
            {
                "mediaType": OCI_MANIFEST_TYPE,
                "digest": str(A),
                "size": 5,
                "artifactType": "application/sbom",
                "annotations": {"k": "ä"},
            },
            {"mediaType": OCI_INDEX_TYPE, "digest": str(B), "size": 6},
        ],
    }


def test_referrers_of_nothing_are_an_empty_list() -> None:
    assert json.loads(referrers_index([]))["manifests"] == []


def test_referrers_are_read_back_as_an_index() -> None:
    assert [child.digest for child in parse_image_manifest(referrers_index([SBOM, PLAIN]), OCI_INDEX_TYPE).children] == [A, B]
