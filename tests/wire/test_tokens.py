"""The strict reading of registry tokens: one header per key, canonical text, our own signature, and a time."""

import base64
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from nacl import bindings

from corral.wire.errors import CorralError
from corral.wire.tokens import TokenClaims, TokenKeys, check_claims, header_text, looks_like_token, public_keys, read_token

SEED = bytes(range(32))
KEYS = public_keys(TokenKeys(current_id="t1", seeds={"t1": SEED, "t2": bytes(32)}, ticket_secret=bytes(32)))
CLAIMS: dict[str, Any] = {
    "iss": "https://hub.example",
    "sub": "ada",
    "aud": "corral",
    "iat": 1000,
    "nbf": 1000,
    "exp": 4600,
    "jti": "x",
    "access": [{"type": "repository", "name": "ada/tiny", "actions": ["pull"]}],
    "corral": {"kind": "key", "id": "k"},
}


def text_of(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).decode().rstrip("=")


def token(claims: object = CLAIMS, *, header: str = "", seed: bytes = SEED) -> str:
    """A signed token."""
    signed = f"{header or header_text('t1')}.{text_of(json.dumps(claims).encode())}"
    return f"{signed}.{text_of(bindings.crypto_sign(signed.encode(), bindings.crypto_sign_seed_keypair(seed)[1])[:64])}"


def claims_of(**changes: object) -> TokenClaims:
    return read_token(token(CLAIMS | changes), KEYS)


def test_token_of_ours_is_read() -> None:
    claims = read_token(token(), KEYS)
    assert (claims.sub, claims.exp, claims.corral.id, claims.corral.key) == ("ada", 4600, "k", "")
    assert [(entry.name, entry.actions) for entry in claims.access] == [("ada/tiny", ["pull"])]


def test_header_is_written_as_other_libraries_write_it() -> None:
    assert base64.urlsafe_b64decode(header_text("t1") + "==") == b'{"typ":"JWT","alg":"Ed25519","kid":"t1"}'


@pytest.mark.parametrize(
    "header", [b"{}", b'{"alg":"none"}', b'{"typ":"JWT","alg":"Ed25519","kid":"t3"}', b'{"alg":"Ed25519","typ":"JWT","kid":"t1"}']
)
def test_t027_header_that_is_not_ours_to_the_letter_is_unauthorized(header: bytes) -> None:
    with pytest.raises(CorralError, match="unauthorized"):
        read_token(token(header=text_of(header)), KEYS)


def test_t027_token_of_one_key_under_the_name_of_another_is_unauthorized() -> None:
    with pytest.raises(CorralError, match="unauthorized"):
        read_token(token(header=header_text("t2")), KEYS)


@given(st.integers(0, 63), st.integers(1, 255))
def test_t027_any_other_signature_is_unauthorized(place: int, change: int) -> None:
    signed, _, text = token().rpartition(".")
    signature = bytearray(base64.urlsafe_b64decode(text + "=="))
    signature[place] ^= change
    with pytest.raises(CorralError, match="unauthorized"):
        read_token(f"{signed}.{text_of(bytes(signature))}", KEYS)


@given(st.text(max_size=100) | st.builds("{}.{}.{}".format, st.just(header_text("t1")), st.text(), st.text()))
def test_any_text_is_refused_with_one_code(text: str) -> None:
    with pytest.raises(CorralError) as refused:
        read_token(text, KEYS)
    assert refused.value.code == "unauthorized"


@pytest.mark.parametrize("bits", range(1, 16))
def test_t027_other_spelling_of_the_signature_is_unauthorized(bits: int) -> None:
    alphabet = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_"
    text = token()
    # The last character carries two bits of the signature; a lax decoder ignores the other four.
    other = text[:-1] + alphabet[alphabet.index(text[-1]) ^ bits]
    assert base64.urlsafe_b64decode(other.rpartition(".")[2] + "==") == base64.urlsafe_b64decode(text.rpartition(".")[2] + "==")
    with pytest.raises(CorralError, match="unauthorized"):
        read_token(other, KEYS)


@pytest.mark.parametrize(
    ("now", "leeway_s", "is_good"),
    [(999, 0, False), (1000, 0, True), (4599, 0, True), (4600, 0, False), (4600, 300, True), (4900, 300, False)],
)
def test_t027_time_of_a_token_is_its_own(now: float, leeway_s: int, is_good: bool) -> None:
    def check() -> None:
        check_claims(claims_of(), issuer="https://hub.example", service="corral", now=now, leeway_s=leeway_s)

    if is_good:
        check()
    else:
        with pytest.raises(CorralError) as refused:
            check()
        assert refused.value.code == "unauthorized"


@pytest.mark.parametrize("changes", [{"iss": "https://hub.example/"}, {"iss": ""}, {"aud": "other"}])
def test_t027_token_for_somewhere_else_is_unauthorized(changes: dict[str, object]) -> None:
    with pytest.raises(CorralError) as refused:
        check_claims(claims_of(**changes), issuer="https://hub.example", service="corral", now=2000)
    assert refused.value.code == "unauthorized"


def test_token_and_api_key_are_told_apart() -> None:
    assert looks_like_token(token())
    assert not looks_like_token("crlk_" + "a" * 48)
