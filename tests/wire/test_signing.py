"""Device keys, the signed texts and the Authorization header, against vectors of independent signers and against junk."""

import base64
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from corral.wire import signing
from corral.wire.errors import CorralError
from corral.wire.signing import DevicePrivateKey, DevicePublicKey

VECTORS = Path(__file__).parent.parent / "vectors"
OURS: dict[str, Any] = json.loads((VECTORS / "signing-vectors.json").read_text())
GO: dict[str, Any] = json.loads((VECTORS / "signing-vectors-go.json").read_text())
HUB = "https://hub.example.org"
PRIVATE = {key["name"]: DevicePrivateKey(bytes.fromhex(key["seed_hex"])) for key in OURS["keys"]}

KEY = DevicePrivateKey(bytes(range(32)))
MESSAGE = signing.request_challenge("POST", "/api/me?ts=1790000000")
HEADER = signing.authorization_header(KEY, MESSAGE)

#: Points that verify signatures nobody made, or that have a second spelling (T12). Source: RFC 8032 and the list of libsodium.
WEAK_POINTS = [
    "0100000000000000000000000000000000000000000000000000000000000000",  # the neutral element
    "0000000000000000000000000000000000000000000000000000000000000000",  # order 4
    "ecffffffffffffffffffffffffffffffffffffffffffffffffffffffffffff7f",  # order 2
    "26e8958fc2b227b045c3f489f2ef98f0d5dfac05d3c63339b13802886d53fc05",  # order 8
    "c7176a703d4dd84fba3c0b760d10670f2a2053fa2c39ccc64ec7fd7792ac037a",  # order 8
    "edffffffffffffffffffffffffffffffffffffffffffffffffffffffffffff7f",  # zero, written as p
    "eeffffffffffffffffffffffffffffffffffffffffffffffffffffffffffff7f",  # one, written as p + 1
]


def parsed(text: str) -> signing.DeviceProof:
    return signing.parse_authorization(text)


def outcome(parse: Callable[[str], object], text: str) -> object:
    """What parsing gives, or the code of its error."""
    try:
        return parse(text)
    except CorralError as error:
        return error.code


# ── Vectors ──────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("vector", OURS["keys"], ids=lambda vector: vector["name"])
def test_t001_key_forms_match_the_vectors(vector: dict[str, str]) -> None:
    key = PRIVATE[vector["name"]].public
    assert key.raw.hex() == vector["public_key_hex"]
    assert key.authorized_key == vector["authorized_key"]
    assert key.fingerprint == vector["fingerprint"]
    assert key.encoded == vector["encoded_key"]
    assert signing.connect_url("", vector["connect_name"], key) == vector["connect_path"]
    assert signing.parse_authorized_key(vector["authorized_key"]) == key
    assert signing.parse_encoded_key(vector["encoded_key"]) == key


@pytest.mark.parametrize("case", OURS["cases"], ids=lambda case: f"{case['kind']} {case['note']}")
def test_t001_signatures_match_the_vectors(case: dict[str, str]) -> None:
    message = case["signed_text"].encode()
    assert signing.authorization_header(PRIVATE[case["key"]], message) == case["authorization"]
    assert parsed(case["authorization"]).key == PRIVATE[case["key"]].public
    signing.verify(parsed(case["authorization"]), message)


@pytest.mark.parametrize("vector", GO["vectors"], ids=lambda vector: f"{vector['Form']} {vector['Target'][:30]}")
def test_t001_signatures_of_a_go_signer_verify(vector: dict[str, str]) -> None:
    if vector["Form"] == "C":
        message = signing.token_challenge("https://hub.example", vector["Target"])
    else:
        message = signing.request_challenge(vector["Method"], vector["Target"])
    assert message.decode() == vector["Signed"]
    proof = parsed(vector["Authorization"])
    signing.verify(proof, message)
    assert proof.key.encoded == GO["encoded_key"]


def test_empty_body_constant_is_that_of_the_vectors() -> None:
    assert signing.token_challenge("", "").decode().split(",")[2] == OURS["empty_body_constant"]


# ── Signing and verifying ────────────────────────────────────────────────────────────────────────────────────────────

seeds = st.binary(min_size=32, max_size=32)
messages = st.binary(max_size=200)


@given(seeds, messages)
def test_t022_what_was_signed_verifies(seed: bytes, message: bytes) -> None:
    key = DevicePrivateKey(seed)
    signing.verify(parsed(signing.authorization_header(key, message)), message)


@given(messages, messages)
def test_t022_another_message_does_not_verify(message: bytes, other: bytes) -> None:
    if message == other:
        return
    with pytest.raises(CorralError, match="unauthorized"):
        signing.verify(parsed(signing.authorization_header(KEY, message)), other)


@given(
    st.sampled_from(["GET", "POST", "DELETE", "HEAD"]),
    st.sampled_from(["GET", "POST", "DELETE", "HEAD"]),
    st.text("ab/%2F?&=ts1", max_size=12),
    st.text("ab/%2F?&=ts1", max_size=12),
)
def test_t022_another_method_path_or_time_does_not_verify(method: str, method2: str, target: str, target2: str) -> None:
    if (method, target) == (method2, target2):
        return
    proof = parsed(signing.authorization_header(KEY, signing.request_challenge(method, target)))
    with pytest.raises(CorralError, match="unauthorized"):
        signing.verify(proof, signing.request_challenge(method2, target2))


@given(st.integers(0, 64 * 8 - 1))
def test_t002_one_flipped_bit_of_the_signature_does_not_verify(bit: int) -> None:
    proof = parsed(HEADER)
    flipped = bytearray(proof.signature)
    flipped[bit // 8] ^= 1 << bit % 8
    with pytest.raises(CorralError) as error:
        signing.verify(signing.DeviceProof(proof.key, bytes(flipped)), MESSAGE)
    assert error.value.code == "unauthorized"


@given(st.integers(0, 32 * 8 - 1))
def test_t002_one_flipped_bit_of_the_key_does_not_verify(bit: int) -> None:
    proof = parsed(HEADER)
    flipped = bytearray(proof.key.raw)
    flipped[bit // 8] ^= 1 << bit % 8
    with pytest.raises(CorralError) as error:
        signing.verify(signing.DeviceProof(DevicePublicKey(bytes(flipped)), proof.signature), MESSAGE)
    assert error.value.code == "unauthorized"


def test_t011_signature_with_s_not_reduced_does_not_verify() -> None:
    order = 2**252 + 27742317777372353535851937790883648493
    proof = parsed(HEADER)
    s = int.from_bytes(proof.signature[32:], "little") + order
    with pytest.raises(CorralError, match="unauthorized"):
        signing.verify(signing.DeviceProof(proof.key, proof.signature[:32] + s.to_bytes(32, "little")), MESSAGE)


@pytest.mark.parametrize("point", WEAK_POINTS)
def test_t012_weak_key_is_refused_in_a_header_and_as_a_stored_key(point: str) -> None:
    key = DevicePublicKey(bytes.fromhex(point))
    # R of order 1 and s = 0 satisfies the equation for the weak keys when nobody looks at the key itself.
    forged = bytes.fromhex(WEAK_POINTS[0]) + bytes(32)
    with pytest.raises(CorralError) as in_header:
        signing.verify(signing.DeviceProof(key, forged), MESSAGE)
    with pytest.raises(CorralError) as authorized:
        signing.parse_authorized_key(key.authorized_key)
    with pytest.raises(CorralError) as encoded:
        signing.parse_encoded_key(key.encoded)
    assert (in_header.value.code, authorized.value.code, encoded.value.code) == ("unauthorized", "bad_request", "bad_request")


def test_private_key_shows_its_fingerprint_only() -> None:
    assert repr(KEY) == f"DevicePrivateKey({KEY.public.fingerprint})"
    assert KEY.seed.hex() not in repr(KEY)


# ── The header ───────────────────────────────────────────────────────────────────────────────────────────────────────


def test_header_is_157_characters_and_reads_back() -> None:
    assert len(HEADER) == 157
    assert parsed(HEADER) == signing.DeviceProof(KEY.public, KEY.sign(MESSAGE))


_LAST = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/"


def test_t011_only_the_canonical_spelling_of_a_signature_is_read() -> None:
    # The last character before the padding carries two bits of the value and four of nothing: sixteen spellings.
    place = _LAST.index(HEADER[-3]) & 0b110000
    spellings = [HEADER[:-3] + _LAST[place | spare] + "==" for spare in range(16)]
    assert [text for text in spellings if outcome(parsed, text) != "unauthorized"] == [HEADER]


def blob(kind: bytes = b"ssh-ed25519", key: bytes = bytes(32), *, length: int | None = None) -> bytes:
    return len(kind).to_bytes(4) + kind + (len(key) if length is None else length).to_bytes(4) + key


@pytest.mark.parametrize(
    "wrong",
    [
        blob(b"ssh-rsa0000"),
        blob(b"ssh-ed25518"),
        blob(b"sk-ssh-ed25519@openssh.com"),
        blob(b"ssh-ed25519-cert-v01@openssh.com"),
        blob(key=bytes(31)),
        blob(key=bytes(33)),
        blob() + b"\x00",
        blob(length=2**32 - 1),
        b"",
    ],
)
def test_t013_other_key_blobs_are_refused(wrong: bytes) -> None:
    text = base64.b64encode(wrong).decode()
    with pytest.raises(CorralError) as header:
        parsed(f"{text}:{HEADER.split(':')[1]}")
    with pytest.raises(CorralError) as stored:
        signing.parse_authorized_key(f"ssh-ed25519 {text}")
    assert (header.value.code, stored.value.code) == ("unauthorized", "bad_request")


@pytest.mark.parametrize(
    "header",
    [
        "",
        ":",
        "a:b:c",
        HEADER[:-1],
        HEADER + "=",
        HEADER + "\n",
        " " + HEADER,
        HEADER.replace(":", " :"),
        HEADER.replace(":", "::"),
        HEADER.replace(":", "\x00"),
        f"Bearer {HEADER}",
        f"{HEADER},{HEADER}",
        HEADER.replace("A", "а"),  # a Cyrillic letter
        HEADER.replace("A", "-", 1),
        "A" * 9000,
        ":".join(reversed(HEADER.split(":"))),
    ],
)
def test_t014_malformed_header_is_unauthorized(header: str) -> None:
    with pytest.raises(CorralError) as error:
        parsed(header)
    assert error.value.code == "unauthorized"
    assert error.value.detail == {}


@given(st.text(max_size=200) | st.text("AZaz09+/=:", min_size=150, max_size=160))
@example("\ud800" * 157)
def test_t014_any_text_is_read_or_unauthorized(text: str) -> None:
    found = outcome(parsed, text)
    assert found == "unauthorized" or isinstance(found, signing.DeviceProof)


@given(st.text(max_size=120))
@example("ssh-ed25519")
@example("ssh-ed25519 \x00")
@example("\ud800 \ud800")
def test_t020_any_text_is_a_key_or_a_bad_request(text: str) -> None:
    for parse in (signing.parse_authorized_key, signing.parse_encoded_key):
        with pytest.raises(CorralError) as error:
            parse(text)
        assert error.value.code == "bad_request"


def test_t020_encoded_key_has_one_spelling() -> None:
    text = KEY.public.encoded
    assert signing.parse_encoded_key(text) == KEY.public
    for other in (text + "=", text + "==", text + "\n", text[:-1], f" {text}"):
        assert outcome(signing.parse_encoded_key, other) == "bad_request"
    # Two bits of the last character belong to nothing; the other four make another key.
    same = [text[:-1] + letter for letter in _LAST if outcome(signing.parse_encoded_key, text[:-1] + letter) == KEY.public]
    assert same == [text]


def test_authorized_key_with_comment_and_spaces_is_read() -> None:
    assert signing.parse_authorized_key(f"  {KEY.public.authorized_key}  ada@laptop \n") == KEY.public


@pytest.mark.parametrize(
    ("header", "is_device"),
    [
        (HEADER, True),
        ("a:b", True),
        (":", True),
        ("Bearer a:b", False),
        ("Bearer crlk_x", False),
        ("", False),
        ("Basic QQ==", False),
    ],
)
def test_header_that_claims_to_be_a_device_is_told_from_others(header: str, is_device: bool) -> None:
    assert signing.looks_like_device_header(header) is is_device


# ── The time ─────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("query", ["ts=1790000000", "a=1&ts=1790000000", "ts=1790000000&b=ts%3D1", "xts=1&ts=1790000000"])
def test_ts_is_read_wherever_it_stands(query: str) -> None:
    assert signing.parse_ts(query) == 1_790_000_000


@pytest.mark.parametrize(
    "query",
    [
        "",
        "ts",
        "ts=",
        "TS=1790000000",
        "ts=1790000000&ts=1790000000",
        "ts=1790000000&ts=",
        "ts=1_79000000",
        "ts=+179000000",
        "ts= 179000000",
        "ts=179000000 ",
        "ts=1790000000\n",
        "ts=-179000000",
        "ts=1790000.00",
        "ts=17900000000000000000",
        "ts=１７９００００００００",
        "ts=179000000",
        "ts=1790000000;a=1",
        "ts=%31790000000",
    ],
)
def test_t005_ts_malformed_absent_or_twice_is_unauthorized(query: str) -> None:
    with pytest.raises(CorralError) as error:
        signing.parse_ts(query)
    assert error.value.code == "unauthorized"


@given(st.text(max_size=40) | st.text("ts=&0123456789", max_size=40))
def test_t005_any_query_gives_ten_digits_or_unauthorized(query: str) -> None:
    found = outcome(signing.parse_ts, query)
    assert found == "unauthorized" or (isinstance(found, int) and 0 <= found < 10**10)


@pytest.mark.parametrize("offset", [-300, -299, 0, 299, 300])
def test_t004_time_within_the_window_passes(offset: int) -> None:
    signing.check_window(1_790_000_000, 1_790_000_000 + offset)


@pytest.mark.parametrize(
    ("offset", "text"),
    [
        (301, "request time is 301 s behind the server; check this machine's clock"),
        (-412, "request time is 412 s ahead of the server; check this machine's clock"),
    ],
)
def test_t004_time_outside_the_window_is_403_with_the_offset(offset: int, text: str) -> None:
    with pytest.raises(CorralError) as error:
        signing.check_window(1_790_000_000, 1_790_000_000 + offset)
    assert (error.value.code, error.value.status, error.value.message) == ("clock_skew", 403, text)


# ── The target ───────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("query", "target"),
    [
        ("", "/p?ts=17"),
        ("z=1&a=2", "/p?a=2&ts=17&z=1"),
        ("a=2&a=1", "/p?a=2&a=1&ts=17"),
        ("ts=3&b=1&ts=4", "/p?b=1&ts=17"),
    ],
)
def test_signed_target_is_sorted_as_go_sorts_and_has_one_ts(query: str, target: str) -> None:
    assert signing.signed_target("/p", query, 17) == target


@given(st.text(max_size=30), st.binary(min_size=32, max_size=32))
def test_connect_url_holds_nothing_that_ends_its_parts(name: str, raw: bytes) -> None:
    name = name.encode("utf-8", "replace").decode()
    url = signing.connect_url("https://hub", name, DevicePublicKey(raw))
    assert url.isascii()
    assert " " not in url
    assert url.count("?") == 1
    assert url.count("#") == 0
    assert url.endswith(f"&key={DevicePublicKey(raw).encoded}")


# ── Adding a device without a browser ────────────────────────────────────────────────────────────────────────────────


def enrolled(signature: bytes | str, message: bytes) -> object:
    """None when the signature proves it, else the code of the refusal."""
    text = signature if isinstance(signature, str) else base64.b64encode(signature).decode()
    try:
        signing.verify_enrollment(DevicePrivateKey(b"f" * 32).public, text, message)
    except CorralError as error:
        return error.code
    return None


def test_t047_enrollment_is_proven_by_the_devices_signature_over_its_own_text_only() -> None:
    key, message = DevicePrivateKey(b"f" * 32), signing.enrollment_challenge(HUB, "0123456789", 1767225600)
    assert message == b"corral-v1 add-device,https://hub.example.org,0123456789,1767225600"
    assert enrolled(key.sign(message), message) is None
    for other in (
        signing.enrollment_challenge(HUB, "0123456780", 1767225600),
        signing.enrollment_challenge(HUB, "0123456789", 1767225601),
        signing.enrollment_challenge("https://hub.example.com", "0123456789", 1767225600),
        signing.request_challenge("POST", "/api/me?ts=1767225600"),
    ):
        assert enrolled(key.sign(other), message) == "forbidden"
    assert enrolled(DevicePrivateKey(b"w" * 32).sign(message), message) == "forbidden"


@given(st.text())
def test_t047_any_other_text_is_no_proof(text: str) -> None:
    assert enrolled(text, signing.enrollment_challenge(HUB, "0123456789", 1767225600)) == "forbidden"
