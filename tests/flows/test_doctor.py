"""`corral doctor` beside a real hub and a real local server: from nothing at all to all that can go wrong with a credential."""

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from flows.stack import PATIENCE_S, Stack, answers, wait_until

Rows = dict[str, dict[str, Any]]
#: A command on a machine whose clock is so far behind: there is one clock in the program.
_BEHIND = """
import sys
from datetime import timedelta
from corral.main import shared
now = shared.SystemClock.now
shared.SystemClock.now = lambda self: now(self) - timedelta(seconds=412)
sys.argv[0] = "corral"
from corral.cli.entry import main
main()
"""


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    """A started installation with the account alice and no model."""
    with Stack(tmp_path_factory.mktemp("stack")) as made:
        made.start()
        made.add_account("alice")
        yield made


def rows_of(stack: Stack, *words: str, status: int, **environment: str) -> Rows:
    """What `corral doctor … --json` finds, by check."""
    done = stack.corral("doctor", *words, "--json", status=status, **environment)
    assert done.stderr == ""
    return {row["check"]: row for row in json.loads(done.stdout)}


def problems(rows: Rows) -> dict[str, str]:
    """Check -> what to do."""
    return {name: row["fix"] for name, row in rows.items() if row["status"] == "problem"}


def sign_in_anew(stack: Stack, name: str = "alice") -> None:
    """Connect the device to that account, whatever a test before left."""
    stack.corral("signout")
    stack.sign_in(name)


def test_nothing_running_in_an_empty_home_is_told_and_left_empty(fresh: Stack) -> None:
    rows = rows_of(fresh, status=1, CORRAL_HUB=fresh.hub_url)
    assert problems(rows) == {"key file": "corral signin", "hub": "start both: corral up"}
    assert rows["engine"]["status"] == "ok"
    assert list(fresh.home.iterdir()) == []


def test_each_step_from_the_sign_in_to_a_revoked_device_is_explained(fresh: Stack) -> None:
    stack = fresh
    stack.start()
    stack.add_account()
    before = sorted(stack.home.rglob("*"))
    rows = rows_of(stack, status=1)
    assert problems(rows) == {"device": "corral signin"}
    assert rows["device"]["detail"].startswith("not connected to any account")
    assert sorted(stack.home.rglob("*")) == before

    stack.sign_in()
    said = stack.corral("doctor", "auth").stdout
    assert said.endswith("\nNo problems.\n")
    assert "\ndevice         connected to alice since 20" in said
    assert "\nrelay          the local server signs with this key\n" in said
    assert problems(rows_of(stack, status=0)) == {}

    (device,) = json.loads(stack.corral("devices", "list", "--json").stdout)
    stack.corral("devices", "scope", device["id"], "keys")
    assert "may not run models, may do: keys" in rows_of(stack, "auth", status=1)["device"]["detail"]
    stack.corral("devices", "revoke", device["id"])
    rows = rows_of(stack, "auth", status=1)
    assert problems(rows) == {"device": "corral signin"}
    assert rows["device"]["detail"].startswith("no longer connected to ")


def test_disabled_account_is_told_from_a_device_that_nobody_connected(stack: Stack) -> None:
    stack.add_account("carol", admin=False)
    sign_in_anew(stack, "carol")
    stack.corral("hub", "user", "disable", "carol")
    rows = rows_of(stack, "auth", status=1)
    assert "its account is disabled" in rows["device"]["detail"]
    stack.corral("hub", "user", "enable", "carol")
    assert problems(rows_of(stack, "auth", status=0)) == {}


def test_api_key_is_explained_and_never_shown(stack: Stack) -> None:
    sign_in_anew(stack)
    made = stack.corral("keys", "create", "ci", "--expires", "90d").stdout.strip()
    done = stack.corral("doctor", "auth", OLLAMA_API_KEY=made)
    assert made[9:] not in done.stdout
    assert f"\nOLLAMA_API_KEY {made[:9]}…  valid · inference · expires in " in done.stdout
    stack.corral("keys", "revoke", "ci")
    assert " revoked on 20" in rows_of(stack, "auth", status=1, OLLAMA_API_KEY=made)["OLLAMA_API_KEY"]["detail"]

    stack.add_account("bob", admin=False)
    of_bob = stack.add_key("bob")
    rows = rows_of(stack, "auth", status=1, OLLAMA_API_KEY=of_bob)
    assert problems(rows) == {"OLLAMA_API_KEY": "unset OLLAMA_API_KEY"}
    rows = rows_of(stack, "auth", status=1, OLLAMA_API_KEY=f"{of_bob}x")
    assert rows["OLLAMA_API_KEY"]["detail"] == "set, but it is too long: 54 characters, not 53"
    # Without the device's list, the key says what it can: that it is refused.
    stack.corral("signout")
    rows = rows_of(stack, "auth", status=1, OLLAMA_API_KEY=made)
    assert "revoked, expired, or of another hub" in rows["OLLAMA_API_KEY"]["detail"]


def test_key_that_may_not_run_models_is_told_so_without_a_list(stack: Stack) -> None:
    stack.corral("signout")
    made = stack.add_key("alice", "push")
    detail = rows_of(stack, "auth", status=1, OLLAMA_API_KEY=made)["OLLAMA_API_KEY"]["detail"]
    assert detail == f"{made[:9]}…  valid · runs no models"


def test_clock_behind_the_hubs_is_one_problem_and_hides_no_other_fact(stack: Stack) -> None:
    sign_in_anew(stack)
    done = subprocess.run(
        [sys.executable, "-c", _BEHIND, "doctor", "auth"],
        env=stack.env,
        cwd=stack.home,
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
        check=False,
    )
    assert done.returncode == 1, done.stderr
    assert " s behind the hub  ✗\n  → set this machine's clock (the hub refuses signatures older than 300 s): " in done.stdout
    assert "\ndevice         connected to alice since 20" in done.stdout
    assert done.stdout.endswith("\n1 problem.\n")


def test_server_of_another_home_is_told_by_its_key(stack: Stack, tmp_path: Path) -> None:
    sign_in_anew(stack)
    with Stack(tmp_path, CORRAL_HUB=stack.hub_url) as other:
        running = other.begin("serve")
        wait_until(lambda: answers(f"{other.local_url}/api/version"), "the other server to answer", watch=running)
        rows = rows_of(stack, "auth", status=1, OLLAMA_HOST=other.env["OLLAMA_HOST"])
        assert list(problems(rows)) == ["relay"]
        fingerprint = rows_of(other, "auth", status=1)["fingerprint"]["detail"]
        assert f"signs with another key {fingerprint}, which is not connected" in rows["relay"]["detail"]
        stack.add_account("dora", admin=False)
        other.corral("signin", "--api-key-stdin", given=stack.add_key("dora", "inference", "keys") + "\n")
        rows = rows_of(stack, "auth", status=1, OLLAMA_HOST=other.env["OLLAMA_HOST"])
        assert "runs cloud models as dora" in rows["relay"]["detail"]
        assert "this command acts as alice" in rows["relay"]["detail"]
        # The same server as seen from its own home.
        assert problems(rows_of(other, "auth", status=0)) == {}


def test_wrong_places_are_named(stack: Stack) -> None:
    sign_in_anew(stack)
    hub_host, local_host = stack.env["CORRAL_HUB_LISTEN"], stack.env["OLLAMA_HOST"]
    rows = rows_of(stack, "auth", status=1, OLLAMA_HOST=hub_host)
    assert problems(rows)["relay"].startswith("unset OLLAMA_HOST")
    rows = rows_of(stack, "auth", status=1, CORRAL_HUB=local_host)
    assert problems(rows)["hub"] == f"name that one with --hub {stack.hub_url}"
    rows = rows_of(stack, "auth", status=0, OLLAMA_HOST="127.0.0.1:9")
    assert rows["relay"]["status"] == "skipped"
    rows = rows_of(stack, "auth", status=1, CORRAL_HUB=stack.hub_url, OLLAMA_NO_CLOUD="1", OLLAMA_HOST="127.0.0.1:9")
    assert problems(rows) == {"relay": "unset OLLAMA_NO_CLOUD and restart the local server"}
