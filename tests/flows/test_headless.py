"""Connecting a device without a browser: by an API key with the scope `keys`, and by the administrator."""

import json

from flows.stack import MODEL, Stack

CLOUD = f"{MODEL}-cloud"


def test_signin_with_an_api_key_connects_this_device(shared: Stack) -> None:
    assert shared.generate(CLOUD).status == 401
    key = shared.add_key("alice", "inference", "keys")
    done = shared.corral("signin", "--api-key-stdin", given=f"{key}\n")
    assert "alice" in done.stdout + done.stderr
    assert key not in done.stdout + done.stderr
    assert shared.generate(CLOUD).status == 200
    assert json.loads(shared.corral("devices", "list", "--json").stdout)[0]["fingerprint"].startswith("SHA256:")
    shared.corral("signout")
    assert shared.generate(CLOUD).status == 401


def test_signin_with_a_key_that_lacks_the_scope_fails_and_says_so(shared: Stack) -> None:
    key = shared.add_key("alice", "inference")
    done = shared.corral("signin", "--api-key-stdin", given=f"{key}\n", status=1)
    assert f"→ create one with the scope keys on {shared.hub_url}/settings/keys" in done.stderr
    assert key not in done.stderr
    assert shared.generate(CLOUD).status == 401


def test_signin_with_junk_for_a_key_fails_and_does_not_repeat_it(shared: Stack) -> None:
    done = shared.corral("signin", "--api-key-stdin", given="not-a-key-at-all\n", status=1)
    assert "not-a-key-at-all" not in done.stderr
    assert "Traceback" not in done.stderr


def test_device_added_by_the_administrator_runs_hosted_models_until_revoked(shared: Stack) -> None:
    public = (shared.home / ".ollama" / "id_ed25519.pub").read_text().strip()
    shared.corral("hub", "device", "add", "alice", "--name", "build-box", "--key", public)
    assert shared.generate(CLOUD).status == 200
    (device,) = json.loads(shared.corral("hub", "device", "list", "alice", "--json").stdout)
    assert device["name"] == "build-box"
    shared.corral("hub", "device", "revoke", "alice", device["id"])
    assert shared.generate(CLOUD).status == 401


def test_keys_made_rotated_and_revoked_at_the_command_line(shared: Stack) -> None:
    shared.sign_in()
    made = shared.corral("keys", "create", "ci", "--scope", "inference", "--expires", "90d")
    key = made.stdout.strip()
    assert key.startswith("crlk_")
    assert key not in made.stderr
    assert shared.generate(MODEL, at=shared.hub_url, key=key).status == 200
    (row,) = [row for row in json.loads(shared.corral("keys", "list", "--json").stdout) if row["name"] == "ci"]
    assert row["expires_at"]
    renewed = shared.corral("keys", "rotate", row["id"]).stdout.strip()
    assert shared.generate(MODEL, at=shared.hub_url, key=key).status == 401
    assert shared.generate(MODEL, at=shared.hub_url, key=renewed).status == 200
    live = [row for row in json.loads(shared.corral("keys", "list", "--json").stdout) if not row["revoked_at"]]
    (row,) = [row for row in live if renewed.startswith(row["prefix"])]
    shared.corral("keys", "revoke", row["id"])
    assert shared.generate(MODEL, at=shared.hub_url, key=renewed).status == 401
    shared.corral("signout")
