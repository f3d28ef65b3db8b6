"""The checks of the door that need no store."""

import pytest

from corral.core.records import RequestFacts
from corral.hub.checks import signed_message
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
