"""up, serve and hub serve as real processes: when they speak, what they refuse, and how they end."""

import json
import os
import signal
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from flows.stack import Stack, answers, call, descendants, free_port, is_alive, wait_until

pytestmark = pytest.mark.flow


@pytest.fixture
def stack(tmp_path: Path) -> Iterator[Stack]:
    with Stack(tmp_path) as made:
        yield made


@pytest.fixture(scope="module")
def begun(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    """One installation with the administrator alice."""
    with Stack(tmp_path_factory.mktemp("begun")) as made:
        made.add_account("alice")
        yield made


@pytest.fixture
def running(begun: Stack) -> Stack:
    """Its `corral up`, started again where a test before has ended it."""
    if begun.up is None or begun.up.process.poll() is not None:
        begun.start()
    return begun


def test_serve_speaks_once_its_port_answers_and_ends_with_status_0(stack: Stack) -> None:
    running = stack.begin("serve", CORRAL_HUB=stack.hub_url)
    running.wait_for(r"local +http://localhost:\d+ +models in ~/.ollama/models\ncloud +http")
    assert answers(f"{stack.local_url}/api/version")
    assert running.end(signal.SIGTERM) == 0
    assert "Traceback" not in running.output


def test_hub_serve_prints_the_one_time_link_until_there_is_an_account(stack: Stack) -> None:
    running = stack.begin("hub", "serve")
    running.wait_for(r"hub +http://localhost:\d+ +data in ~/.corral\n")
    running.wait_for(rf"{stack.hub_url}/signup\?code=[0-9A-Z]{{4}}-[0-9A-Z]{{4}}\n")
    assert answers(f"{stack.hub_url}/readyz")
    stack.add_account()
    assert running.end(signal.SIGINT) == 0
    again = stack.begin("hub", "serve")
    again.wait_for(r"hub +http")
    assert again.end() == 0
    assert "signup" not in again.output


@pytest.mark.parametrize(
    ("command", "variable"), [(("serve",), "OLLAMA_HOST"), (("hub", "serve"), "CORRAL_HUB_LISTEN"), (("up",), "OLLAMA_HOST")]
)
def test_taken_port_is_named_with_what_to_do(stack: Stack, command: tuple[str, ...], variable: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        done = stack.corral(*command, status=1, **{variable: f"127.0.0.1:{port}"})
    assert done.stdout == ""
    message, advice = done.stderr.splitlines()
    assert message == f"Error: listen tcp 127.0.0.1:{port}: bind: address already in use"
    assert advice.startswith("→ ")
    assert variable in advice


def test_t087_serve_where_others_reach_it_is_refused_unless_allowed(stack: Stack) -> None:
    everywhere = f"0.0.0.0:{free_port()}"
    done = stack.corral("serve", status=1, OLLAMA_HOST=everywhere)
    assert "CORRAL_ALLOW_PUBLIC" in done.stderr
    assert done.stdout == ""
    running = stack.begin("serve", OLLAMA_HOST=everywhere, CORRAL_ALLOW_PUBLIC="1")
    running.wait_for(r"local +http")
    assert running.end() == 0


def test_t087_hub_where_others_reach_it_needs_its_public_address(stack: Stack) -> None:
    done = stack.corral("hub", "serve", status=2, CORRAL_HUB_LISTEN=f"0.0.0.0:{free_port()}", CORRAL_PUBLIC_URL="")
    assert "CORRAL_PUBLIC_URL" in done.stderr


def test_t017_public_hub_behind_an_unnamed_proxy_does_not_start(stack: Stack) -> None:
    done = stack.corral("hub", "serve", status=2, CORRAL_PUBLIC_URL="https://hub.example.org", CORRAL_TRUSTED_PROXIES="")
    assert "set CORRAL_TRUSTED_PROXIES=127.0.0.1" in done.stderr
    assert done.stdout == ""


def test_hub_serve_with_several_workers_is_refused_plainly(stack: Stack) -> None:
    assert "one worker" in stack.corral("hub", "serve", "--workers", "2", status=2).stderr


def test_up_points_its_local_server_at_its_hub(running: Stack) -> None:
    done = running.corral("whoami", status=1)
    assert done.stderr == f"Error: not signed in to {running.hub_url.removeprefix('http://')}\n→ corral signin\n"


def test_second_up_says_that_the_port_is_taken(running: Stack) -> None:
    done = running.corral("up", status=1)
    assert "address already in use" in done.stderr
    assert answers(f"{running.hub_url}/readyz")


def test_up_with_a_bad_model_option_starts_nothing(stack: Stack) -> None:
    assert "NAME=FILE" in stack.corral("up", "--model", "nonsense", status=2).stderr
    assert "unknown parameter 'colour'" in stack.corral("up", "--parameter", "colour red", status=2).stderr
    assert not (stack.home / ".corral").exists()


def test_tables_of_the_administrator_have_json(stack: Stack) -> None:
    stack.add_account("alice")
    (account,) = json.loads(stack.corral("hub", "user", "list", "--json").stdout)
    assert (account["name"], account["is_admin"], account["disabled_at"]) == ("alice", True, None)
    key = stack.add_key("alice", "inference", "keys")
    (row,) = json.loads(stack.corral("hub", "key", "list", "alice", "--json").stdout)
    assert row["scopes"] == ["inference", "keys"]
    assert key.startswith(row["prefix"])
    assert key not in stack.corral("hub", "key", "list", "alice").stdout


def test_password_comes_from_standard_input_or_a_terminal_alone(stack: Stack) -> None:
    done = stack.corral("hub", "user", "add", "bob", status=2)
    assert "--password-stdin" in done.stderr
    with pytest.raises(AssertionError, match="exit 2"):
        stack.corral("hub", "user", "add", "bob", "--password", "x" * 20)


def test_unknown_account_is_told_apart_from_a_fault(begun: Stack) -> None:
    done = begun.corral("hub", "key", "list", "nobody", status=1)
    assert done.stderr == "Error: there is no account named nobody\n→ corral hub user list\n"


def test_signin_at_a_hub_that_does_not_answer_names_it(stack: Stack) -> None:
    nowhere = f"http://127.0.0.1:{free_port()}"
    done = stack.corral("signin", "--hub", nowhere, status=1)
    assert nowhere in done.stderr
    assert "→ " in done.stderr


def test_signin_over_plain_http_to_another_machine_is_refused(stack: Stack) -> None:
    done = stack.corral("signin", "--hub", "http://hub.example.org", status=1)
    assert "https" in done.stderr


def test_output_that_is_no_terminal_has_no_escape_codes(running: Stack) -> None:
    shown = [running.corral(*words) for words in (("list",), ("ps",), ("hub", "user", "list"))]
    shown.append(running.corral("keys", "list", status=1))
    assert running.up is not None
    assert "\x1b" not in running.up.output + "".join(done.stdout + done.stderr for done in shown)


def test_signin_shows_link_and_fingerprint_and_notices_the_connection(running: Stack) -> None:
    waiting = running.begin("signin")
    link = waiting.wait_for(rf"Opening ({running.hub_url}/connect\?name=\S+)\n")[1]
    fingerprint = waiting.wait_for(r"fingerprint +(SHA256:\S{43})\n")[1]
    waiting.wait_for(r"Waiting for you to press Connect in the browser \(Ctrl-C to stop waiting\)…")
    wait_until(lambda: running.opened_links.exists() and running.opened_links.read_text().strip() == link, "the browser")
    public = (running.home / ".ollama/id_ed25519.pub").read_text().strip()
    # Stands for the button, which tests/flows press in a real browser.
    running.corral("hub", "device", "add", "alice", "--name", "here", "--key", public)
    assert waiting.finish() == 0
    assert waiting.output.endswith(f"Signed in to {running.hub_url.removeprefix('http://')} as alice.\n")
    again = running.corral("signin")
    assert again.stdout == f"Already signed in to {running.hub_url.removeprefix('http://')} as alice.\n"
    (device,) = json.loads(running.corral("devices", "list", "--json").stdout)
    assert (device["fingerprint"], device["current"]) == (fingerprint, True)
    assert json.loads((running.home / ".ollama/corral.json").read_text())["hub"] == running.hub_url
    # The last one given up is the right to change this.
    assert running.corral("devices", "scope", "here", "keys").stderr == '"here" may: keys.\n'
    assert running.corral("devices", "scope", "here", "none").stderr == '"here" may: nothing but say who it is.\n'
    assert "lacks the scope keys" in running.corral("devices", "list", status=1).stderr
    assert running.corral("signout").stdout.startswith("Signed out of ")
    assert running.corral("signout").stdout.startswith("Not signed in to ")


def test_signin_without_a_browser_prints_the_link_alone_and_stops_at_ctrl_c(running: Stack) -> None:
    running.opened_links.unlink(missing_ok=True)
    waiting = running.begin("signin", "--no-browser")
    waiting.wait_for(rf"Open this link in a browser:\n  {running.hub_url}/connect\?")
    waiting.wait_for("Waiting for you")
    assert waiting.end() == 130
    assert "Stopped waiting" in waiting.output
    assert "Traceback" not in waiting.output
    assert not running.opened_links.exists()


def test_keys_are_managed_with_an_api_key_where_no_device_is_connected(running: Stack) -> None:
    key = running.add_key("alice", "keys", "inference")
    made = running.corral("keys", "create", "ci", "--expires", "90d", OLLAMA_API_KEY=key)
    assert made.stdout.startswith("crlk_")
    assert made.stdout.count("\n") == 1
    assert 'Key "ci" for alice · inference · expires 20' in made.stderr
    listed = running.corral("keys", "list", OLLAMA_API_KEY=key).stdout
    assert "ci" in listed
    assert made.stdout.strip() not in listed
    assert running.corral("keys", "revoke", "nope", status=1, OLLAMA_API_KEY=key).stderr.endswith("→ corral keys list\n")
    assert running.corral("keys", "revoke", "ci", OLLAMA_API_KEY=key).stdout == ""


def test_model_of_an_upstream_is_offered_and_withdrawn(running: Stack) -> None:
    def offered() -> list[str]:
        return [model["name"] for model in call("GET", f"{running.hub_url}/api/tags").json["models"]]

    done = running.corral("hub", "host", "fixed", "--upstream", f"http://127.0.0.1:{free_port()}")
    assert done.stderr == "fixed is offered to everybody who is signed in or has an API key, to devices as fixed:cloud.\n"
    assert offered() == ["fixed:latest"]
    running.corral("hub", "unhost", "fixed")
    assert offered() == []
    assert '"fixed" is not offered' in running.corral("hub", "unhost", "fixed", status=1).stderr
    assert "no repository of this hub" in running.corral("hub", "host", "fixed", status=1).stderr
    assert "--upstream" in running.corral("hub", "host", "fixed", "--upstream-model", "x", status=2).stderr


@pytest.mark.parametrize("expires", ["tomorrow", "2020-01-01", "0d", "-5d"])
def test_expiry_that_makes_no_sense_is_wrong_usage(running: Stack, expires: str) -> None:
    assert "Error: " in running.corral("keys", "create", "x", "--expires", expires, status=2).stderr


# ── Ends of the whole, last so that few have to start it anew ────────────────────────────────────────────────────────


def test_up_prints_both_addresses_and_ends_both_with_status_0(running: Stack) -> None:
    assert running.up is not None
    assert running.up.output.splitlines()[:2] == [
        f"hub     {running.hub_url}      data in ~/.corral",
        f"local   {running.local_url.replace('127.0.0.1', 'localhost')}      models in ~/.ollama/models",
    ]
    children = list(descendants(running.up.process.pid))
    assert len(children) == 2
    assert running.up.end(signal.SIGTERM) == 0
    assert not any(is_alive(pid) for pid in children)


def test_up_ends_and_says_so_when_one_server_dies(running: Stack) -> None:
    assert running.up is not None
    hub = next(pid for pid, command in descendants(running.up.process.pid).items() if "hub serve" in command)
    others = [pid for pid in descendants(running.up.process.pid) if pid != hub]
    os.kill(hub, signal.SIGKILL)
    assert running.up.finish() == 1
    assert "Error: the hub ended: killed by SIGKILL" in running.up.output
    assert not any(is_alive(pid) for pid in others)


def test_servers_end_when_up_is_killed(running: Stack) -> None:
    assert running.up is not None
    children = list(descendants(running.up.process.pid))
    running.up.end(signal.SIGKILL)
    wait_until(lambda: not any(is_alive(pid) for pid in children), "both servers to end")
