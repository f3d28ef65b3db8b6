"""What is said about keys that were pasted wrongly: the one thing that is wrong, and nothing of the key."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from corral.wire.apikeys import make_api_key
from corral.wire.pasted import fault_of_api_key, fault_of_public_key
from corral.wire.signing import DevicePrivateKey

API_KEY = make_api_key(bytes(range(64))).text.reveal()
PUBLIC = DevicePrivateKey(bytes(32)).public
LINE = PUBLIC.authorized_key


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("", "is empty"),
        ('""', "is empty"),
        (f'"{API_KEY}"', "has quotes around it"),
        (f"“{API_KEY}”", "has quotes around it"),
        (f"{API_KEY}'", "has quotes around it"),
        (f"{API_KEY[:30]}\r\n{API_KEY[30:]}", "has a line break in it"),
        (f"{API_KEY[:30]} {API_KEY[30:]}", "has a blank in it"),
        (API_KEY[:-1], "is cut off: 52 of 53 characters"),
        (f"{API_KEY}{API_KEY}", "is too long: 106 characters, not 53"),
        (f"{API_KEY[:-1]}-", "is damaged: one of its characters is not what it was"),
        (LINE, "is a public key, where an API key belongs"),
        ("any words", "is no API key of a Corral hub; those begin with crlk_"),
    ],
)
def test_fault_of_an_api_key_is_the_first_thing_to_mend(text: str, fault: str) -> None:
    assert fault_of_api_key(f" {text}\n") == fault


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("", "there is no key"),
        (f"'{LINE} ada'", "the key has quotes around it"),
        (f'ssh-ed25519 "{PUBLIC.blob_text}"', "the key has quotes around it"),
        (f"{LINE[:40]}\n{LINE[40:]} ada", "the key has a line break or a blank in it"),
        (LINE[:40], "the key is cut off: 28 of 68 characters"),
        (f"{LINE[:40]} ada@box", "the key is cut off: 28 of 68 characters"),
        (f"{LINE}AA", "the key is too long: 70 characters, not 68"),
        (f"{LINE[:-1]}-", "the key is not a valid ssh-ed25519 public key: one of its characters is not what it was"),
        ("ssh-ed25519", "the key is not whole: nothing follows ssh-ed25519"),
        (PUBLIC.blob_text, "the key is not whole: ssh-ed25519 is missing before it"),
        (PUBLIC.fingerprint, "that is the fingerprint of a key, not the key"),
        (API_KEY, "that is an API key, where the public key of a device belongs"),
        ("ecdsa-sha2-nistp256 AAAA", "that is a key of another kind; a device's begins with ssh-ed25519"),
        ("-----BEGIN OPENSSH PRIVATE KEY-----", "that is a private key, which belongs to nobody else"),
        ("hello", "the key is not of the form: ssh-ed25519 AAAA…"),
    ],
)
def test_fault_of_a_public_key_is_the_first_thing_to_mend(text: str, fault: str) -> None:
    assert fault_of_public_key(f" {text}\n") == fault


@given(st.text())
def test_any_text_has_a_fault_of_one_line(text: str) -> None:
    for fault in (fault_of_api_key(text), fault_of_public_key(text)):
        assert fault.isprintable()
        assert fault


@given(st.integers(1, len(API_KEY)), st.sampled_from(["\n", '"', " ", "", "x"]))
def test_no_fault_holds_anything_of_the_secret(at: int, put: str) -> None:
    fault = fault_of_api_key(API_KEY[:at] + put + API_KEY[at:-1])
    assert API_KEY[5:15] not in fault
    assert API_KEY[15:25] not in fault
