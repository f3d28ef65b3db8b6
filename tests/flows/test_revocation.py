"""A revoked credential is refused on the very next request, and what it had running ends."""

import json
import time

from flows.stack import LONG, MODEL, PASSWORD, Stack, call, opened

CLOUD = f"{MODEL}-cloud"
#: Running streams look again every five seconds; the rest is for a busy machine.
STREAM_ENDS_WITHIN_S = 12


def test_t062_revoked_key_is_refused_on_the_next_request(shared: Stack) -> None:
    key, manager = shared.add_key(), shared.add_key("alice", "keys")
    for _ in range(5):
        assert shared.generate(MODEL, at=shared.hub_url, key=key).status == 200
    key_id = id_of(key)
    assert call("DELETE", f"{shared.hub_url}/api/keys/{key_id}", key=manager).status == 200
    refused = shared.generate(MODEL, at=shared.hub_url, key=key)
    assert refused.status == 401
    assert refused.json == {"error": "unauthorized"}


def test_t062_key_revoked_by_the_administrators_command_is_refused_at_once(shared: Stack) -> None:
    key = shared.add_key()
    shared.corral("hub", "key", "revoke", "alice", id_of(key))
    assert shared.generate(MODEL, at=shared.hub_url, key=key).status == 401


def test_t062_key_of_a_disabled_account_is_refused_until_it_is_enabled(shared: Stack) -> None:
    shared.add_account("bob", admin=False)
    key = shared.add_key("bob")
    shared.corral("hub", "user", "disable", "bob")
    assert shared.generate(MODEL, at=shared.hub_url, key=key).status == 401
    shared.corral("hub", "user", "enable", "bob")
    assert shared.generate(MODEL, at=shared.hub_url, key=key).status == 200


def test_revoked_device_is_refused_on_the_next_request(shared: Stack) -> None:
    shared.sign_in()
    assert shared.generate(CLOUD).status == 200
    (device,) = json.loads(shared.corral("devices", "list", "--json").stdout)
    shared.corral("devices", "revoke", device["id"])
    assert shared.generate(CLOUD).status == 401


def test_t062_stream_of_a_revoked_key_ends_with_an_error_line(shared: Stack) -> None:
    key = shared.add_key()
    body = {"model": MODEL, **LONG}
    with opened("POST", f"{shared.hub_url}/api/generate", body, key=key) as response:
        assert response.status == 200
        assert json.loads(response.readline())["done"] is False
        shared.corral("hub", "key", "revoke", "alice", id_of(key))
        began = time.monotonic()
        last = [line for line in response if line.strip()][-1]
    assert "error" in json.loads(last), last
    assert time.monotonic() - began < STREAM_ENDS_WITHIN_S


def test_changed_password_still_signs_in_and_the_old_one_does_not(shared: Stack) -> None:
    shared.add_account("carol", admin=False)
    shared.corral("hub", "user", "passwd", "carol", "--password-stdin", given=PASSWORD + " again\n")
    assert sign_in_status(shared, "carol", PASSWORD) >= 400
    assert sign_in_status(shared, "carol", PASSWORD + " again") == 303


def sign_in_status(stack: Stack, name: str, password: str) -> int:
    """What the sign-in form answers."""
    form = f"name={name}&password={password.replace(' ', '+')}".encode()
    headers = {"Content-Type": "application/x-www-form-urlencoded", "Sec-Fetch-Site": "same-origin"}
    return call("POST", f"{stack.hub_url}/signin", form, headers=headers).status


def id_of(key: str) -> str:
    """The public id inside a key's text."""
    return key.removeprefix("crlk_")[:10]
