"""The checks of the door that need no store."""

import pytest

from corral.core.records import RequestFacts
from corral.hub.checks import signed_message, token_nonce
from corral.wire.errors import CorralError
from corral.wire.signing import request_challenge, token_challenge

HUB = "https://hub.example"


def facts_of(target: str) -> RequestFacts:
    return RequestFacts(method="GET", target=target, headers={}, body=b"", network="192.0.2.1", is_secure=True)


@pytest.mark.parametrize("path", ["/v2/token", "/v2%2Ftoken", "/v2%2ftoken"])
def test_t015_token_path_has_its_own_form_of_signature_however_it_is_spelled(path: str) -> None:
    target = f"{path}?nonce=0123456789abcdef"
    assert signed_message(facts_of(target), HUB) == token_challenge(HUB, target)


@pytest.mark.parametrize("path", ["/v2%252Ftoken", "/v2/token/", "/v2/tokens", "/api/me?x=/v2/token"])
def test_t015_other_paths_have_the_form_of_requests(path: str) -> None:
    assert signed_message(facts_of(path), HUB) == request_challenge("GET", path)


@pytest.mark.parametrize("length", [16, 64])
def test_t024_nonce_of_16_to_64_characters_is_taken_as_it_is(length: int) -> None:
    nonce = "n" * length
    assert token_nonce(facts_of(f"/v2/token?nonce={nonce}&scope=x")) == nonce


@pytest.mark.parametrize("query", ["", "nonce=", f"nonce={'n' * 15}", f"nonce={'n' * 65}", "&".join([f"nonce={'n' * 16}"] * 2)])
def test_t024_request_for_a_token_without_one_nonce_of_that_length_is_refused(query: str) -> None:
    with pytest.raises(CorralError) as refused:
        token_nonce(facts_of(f"/v2/token?{query}"))
    assert refused.value.code == "unauthorized"
