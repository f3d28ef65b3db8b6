"""The RFC 9421 form: what it covers, and that nothing but a whole, fresh, single signature passes."""

import base64
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from hashlib import sha512
from urllib.parse import quote

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from http_message_signatures import HTTPMessageSigner, HTTPMessageVerifier, algorithms
from http_message_signatures.exceptions import HTTPMessageSignaturesException
from http_message_signatures.resolvers import MappingKeyResolver
from hypothesis import given, settings
from hypothesis import strategies as st

from corral.wire import strong
from corral.wire.errors import CorralError
from corral.wire.signing import DevicePrivateKey, DevicePublicKey

KEY = DevicePrivateKey(bytes(range(32)))
NOW = 1_790_000_000.0
URL = "https://hub.example/api/keys?a=1&b=%2F"
BODY = b'{"name": "ci"}'
Headers = dict[str, str]


@dataclass
class PreparedRequest:
    """What the package reads a request from."""

    method: str
    url: str
    headers: Headers


def signed(
    key: DevicePrivateKey = KEY,
    *,
    method: str = "POST",
    url: str = URL,
    body: bytes = BODY,
    now: float = NOW,
    nonce: bytes = bytes(16),
) -> Headers:
    """Headers as a hub receives them: lower-case names."""
    sent = {"Content-Type": "application/json"}
    added = strong.sign_headers(key, method, url, sent, body=body, now=NOW, nonce=nonce)
    return {name.lower(): value for name, value in (sent | added).items()}


GOOD = signed()


def verify(headers: Headers, *, method: str = "POST", url: str = URL, body: bytes = BODY, now: float = NOW) -> strong.StrongProof:
    return strong.verify_headers(method, url, headers, body=body, now=now)


def refused(headers: Headers, **changes: object) -> CorralError:
    with pytest.raises(CorralError) as error:
        verify(headers, **changes)  # type: ignore[arg-type]
    assert error.value.code == "unauthorized"
    return error.value


def test_t019_good_signature_gives_key_and_nonce() -> None:
    proof = verify(signed())
    assert proof == strong.StrongProof(KEY.public, "AAAAAAAAAAAAAAAAAAAAAA")


def test_t019_good_signature_without_body_or_content_type_passes() -> None:
    added = strong.sign_headers(KEY, "GET", URL, {}, body=b"", now=NOW, nonce=bytes(16))
    headers = {name.lower(): value for name, value in added.items()}
    assert verify(headers, method="GET", body=b"").key == KEY.public


@pytest.mark.parametrize(
    "changes",
    [
        {"body": b'{"name": "cd"}'},
        {"body": b""},
        {"method": "GET"},
        {"url": "https://evil.example/api/keys?a=1&b=%2F"},
        {"url": "http://hub.example/api/keys?a=1&b=%2F"},
        {"url": "https://hub.example/api/keys?b=%2F&a=1"},
        {"url": "https://hub.example/api/keys?a=1&b=%2f"},
        {"url": "https://hub.example/api/keys"},
        {"url": "https://hub.example/api/Keys?a=1&b=%2F"},
    ],
)
def test_t019_changed_body_host_method_or_query_is_refused(changes: dict[str, object]) -> None:
    refused(signed(), **changes)


def test_t019_changed_content_type_is_refused() -> None:
    refused(signed() | {"content-type": "text/plain"})


def test_t019_content_type_added_behind_the_signature_is_refused() -> None:
    added = strong.sign_headers(KEY, "POST", URL, {}, body=BODY, now=NOW, nonce=bytes(16))
    refused({name.lower(): value for name, value in added.items()} | {"content-type": "application/json"})


@pytest.mark.parametrize("name", ["signature", "signature-input", "content-digest"])
def test_t019_missing_header_is_refused(name: str) -> None:
    headers = signed()
    del headers[name]
    refused(headers)


@pytest.mark.parametrize(
    "edit",
    [
        lambda text: text.replace('"content-digest"', ""),
        lambda text: text.replace('"@target-uri"', ""),
        lambda text: text.replace('"@method"', ""),
        lambda text: text.replace("tag=", "x-tag="),
        lambda text: text.replace("corral-v1", "corral-v2"),
        lambda text: text.replace("ed25519", "hmac-sha256"),
        lambda text: text.replace("ed25519", "none"),
        lambda text: text.replace("created=1790000000", "created=1790000001"),
        lambda text: text.replace("created=1790000000;", ""),
        lambda text: text.replace('nonce="', 'nonce="A'),
        lambda text: f"{text}, other={text.partition('=')[2]}",
        lambda text: text.replace("corral=", "other="),
        lambda text: "",
        lambda text: "corral=()",
        lambda text: "corral",
        lambda text: "=;=",
        lambda text: text * 2,
        lambda text: text.replace(KEY.public.blob_text, DevicePrivateKey(bytes(32)).public.blob_text),
        lambda text: text.replace(KEY.public.blob_text, "junk"),
        lambda text: text.replace(KEY.public.blob_text, DevicePublicKey(bytes(32)).blob_text),
        lambda text: text.replace(f'keyid="{KEY.public.blob_text}"', "keyid=1"),
        lambda text: text.replace(f';keyid="{KEY.public.blob_text}"', ""),
    ],
)
def test_t019_edited_signature_input_is_refused(edit: Callable[[str], str]) -> None:
    headers = signed()
    edited = edit(headers["signature-input"])
    assert edited != headers["signature-input"]
    refused(headers | {"signature-input": edited})


def test_t019_two_signatures_are_refused() -> None:
    one, two = signed(), signed(DevicePrivateKey(bytes(32)))
    both = dict(one)
    for name in ("signature", "signature-input"):
        both[name] = f"{one[name]}, {two[name].replace('corral=', 'second=', 1)}"
    refused(both)


@pytest.mark.parametrize("age", [-5, 0, 60])
def test_t019_age_within_a_minute_passes(age: int) -> None:
    verify(signed(), now=NOW + age)


@pytest.mark.parametrize(("age", "where"), [(3600, "behind"), (-3600, "ahead of")])
def test_clock_that_is_an_hour_off_is_told_so(age: int, where: str) -> None:
    with pytest.raises(CorralError, match=f"3600 s {where} the server") as error:
        verify(signed(), now=NOW + age)
    assert error.value.code == "clock_skew"


@pytest.mark.parametrize("age", [61, 299, -6, -30])
def test_t019_signature_61_s_old_or_from_the_future_is_refused(age: int) -> None:
    assert "clock" in refused(signed(), now=NOW + age).message


@pytest.mark.parametrize("nonce", [b"", bytes(5), bytes(60)])
def test_t019_nonce_too_short_or_too_long_is_refused(nonce: bytes) -> None:
    refused(signed(nonce=nonce))


def test_t019_signature_of_another_key_under_this_key_id_is_refused() -> None:
    ours, theirs = signed(), signed(DevicePrivateKey(bytes(32)))
    refused(ours | {"signature": theirs["signature"]})


@given(st.integers(0, 85))
@settings(max_examples=20)
def test_t002_changed_character_of_the_signature_is_refused(place: int) -> None:
    headers = signed()
    start = headers["signature"].index(":") + 1
    characters = list(headers["signature"])
    characters[start + place] = "A" if characters[start + place] != "A" else "B"
    refused(headers | {"signature": "".join(characters)})


@given(
    st.text(max_size=60) | st.text('corral=();:"@method,sig 1?*', max_size=60),
    st.text(max_size=60) | st.text("corral=:AB, ", max_size=60),
    st.text(max_size=60) | st.text("sha-256=:AB, 512", max_size=60),
)
@settings(max_examples=100)
def test_t019_any_headers_are_refused_and_nothing_else_happens(given_input: str, signature: str, digest: str) -> None:
    refused({"signature-input": given_input, "signature": signature, "content-digest": digest})
    refused(GOOD | {"signature-input": given_input})
    refused(GOOD | {"signature": signature})


@given(st.text('sha-256=:AB, 512;"?1', max_size=60))
@settings(max_examples=50)
def test_t019_any_content_digest_is_refused(digest: str) -> None:
    refused(GOOD | {"content-digest": digest})


@given(
    st.binary(max_size=64),
    st.sampled_from(["GET", "POST", "DELETE"]),
    st.lists(st.sampled_from(["a", "/", "%2F", "?", "&b=1", "..", "é"])).map("".join),
)
@settings(max_examples=25)
def test_t022_what_was_signed_verifies(body: bytes, method: str, path: str) -> None:
    url = f"https://hub.example/{quote(path, safe='/%?&=')}"
    assert verify(signed(method=method, url=url, body=body), method=method, url=url, body=body).key == KEY.public


@given(
    st.binary(max_size=64),
    st.sampled_from(["GET", "POST", "DELETE", "X"]),
    st.sampled_from(
        ["https://hub.example", "http://localhost:11435", "http://127.0.0.1:1", "http://[::1]:11435", "HTTPS://Hub.example"]
    ),
    st.text("aZ09/%2F?&=.~!$'()*+,;:@-_", max_size=12),
    st.none() | st.text(" !;=/x\t~", max_size=8),
)
@settings(max_examples=150)
def test_t022_one_spelling_that_is_written_and_read_here_is_the_packages_own(
    body: bytes, method: str, base: str, path: str, content_type: str | None
) -> None:
    url = f"{base}/{path}"
    sent = {} if content_type is None else {"Content-Type": content_type}
    ours, theirs = (_outcome(signer, method, url, sent, body) for signer in (strong.sign_headers, _sign_by_package))
    assert ours == theirs
    if ours is not None:
        headers = {name.lower(): value for name, value in (sent | ours).items()}
        assert verify(headers, method=method, url=url, body=body).key == KEY.public
        _verify_by_package(method, url, headers, body)


def _outcome(signer: Callable[..., Headers], method: str, url: str, sent: Headers, body: bytes) -> Headers | None:
    try:
        return signer(KEY, method, url, sent, body=body, now=NOW, nonce=bytes(16))
    except CorralError:
        return None


def _sign_by_package(
    key: DevicePrivateKey, method: str, url: str, sent: Headers, *, body: bytes, now: float, nonce: bytes
) -> Headers:
    message = PreparedRequest(method, url, {name.lower(): value for name, value in sent.items()})
    signer = HTTPMessageSigner(signature_algorithm=algorithms.ED25519, key_resolver=_resolver(key))
    covered = ["@method", "@target-uri", *message.headers]
    try:
        signer.sign(
            message,
            key_id=key.public.blob_text,
            created=datetime.fromtimestamp(now, UTC),
            nonce=base64.urlsafe_b64encode(nonce).decode().rstrip("="),
            label="corral",
            tag=strong.TAG,
            covered_component_ids=covered,
            body=body,
        )
    except HTTPMessageSignaturesException as error:
        raise CorralError("bad_request") from error
    return {name: value for name, value in message.headers.items() if name != "content-type"}


def _verify_by_package(method: str, url: str, headers: Headers, body: bytes) -> None:
    verifier = HTTPMessageVerifier(signature_algorithm=algorithms.ED25519, key_resolver=_resolver(KEY))
    verifier.verify(PreparedRequest(method, url, dict(headers)), max_age=None, expect_tag=strong.TAG, body=body)


def _resolver(key: DevicePrivateKey) -> MappingKeyResolver:
    private = Ed25519PrivateKey.from_private_bytes(key.seed)
    identity = key.public.blob_text
    return MappingKeyResolver(public_keys={identity: private.public_key()}, private_keys={identity: private})


@pytest.mark.parametrize(
    "edit",
    [
        lambda text: text.replace('" "', '"  "', 1),
        lambda text: text.replace(";created", "; created"),
        lambda text: text.replace(';alg="ed25519"', ""),
        lambda text: text.replace("corral=", "other="),
        lambda text: text.replace('("@method" "@target-uri"', '("@target-uri" "@method"'),
    ],
)
def test_other_spelling_of_the_standard_is_read_when_it_was_signed(edit: Callable[[str], str]) -> None:
    headers = signed()
    spelling = edit(headers["signature-input"])
    assert spelling != headers["signature-input"]
    label, _, parameters = spelling.partition("=")
    # What is signed is the canonical serialisation, whatever the spelling in the header (RFC 9421 2.5 and 4.1).
    canonical = parameters.replace("  ", " ").replace("; ", ";")
    covered = {
        "@method": "POST",
        "@target-uri": URL,
        "content-type": "application/json",
        "content-digest": headers["content-digest"],
    }
    names = canonical[1 : canonical.index(")")].replace('"', "").split()
    base = "\n".join([*(f'"{name}": {covered[name]}' for name in names), f'"@signature-params": {canonical}'])
    signature = f"{label}=:{base64.b64encode(KEY.sign(base.encode())).decode()}:"
    assert verify(headers | {"signature-input": spelling, "signature": signature}).key == KEY.public


def test_other_digests_of_the_standard_are_read_when_they_were_signed() -> None:
    headers = signed()
    both = f"{headers['content-digest']}, sha-512=:{base64.b64encode(sha512(BODY).digest()).decode()}:"
    parameters = headers["signature-input"].partition("=")[2]
    lines = ['"@method": POST', f'"@target-uri": {URL}', '"content-type": application/json', f'"content-digest": {both}']
    base = "\n".join([*lines, f'"@signature-params": {parameters}'])
    signature = f"corral=:{base64.b64encode(KEY.sign(base.encode())).decode()}:"
    assert verify(headers | {"content-digest": both, "signature": signature}).key == KEY.public
    refused(headers | {"content-digest": both})


@pytest.mark.parametrize(
    "url", ["https://hub.example/%", "https:///x", "/api/me", "https://hub.example/\n", "https://hub.example/é"]
)
def test_url_that_cannot_be_signed_is_a_bad_request_and_never_verifies(url: str) -> None:
    with pytest.raises(CorralError) as error:
        signed(url=url)
    assert error.value.code == "bad_request"
    refused(signed(), url=url)


@pytest.mark.parametrize(
    ("headers", "is_strong"),
    [({}, False), ({"authorization": "x"}, False), ({"signature": ""}, True), ({"signature-input": ""}, True)],
)
def test_claim_of_a_strong_signature_is_seen(headers: Headers, is_strong: bool) -> None:
    assert strong.is_strong(headers) is is_strong
