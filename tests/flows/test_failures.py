"""What a person sees when something breaks: a hub that goes away, an engine that dies, a file that is not what it should be."""

import contextlib
import json
import os
import signal
import socket
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest

from flows.stack import (
    BOUNDED,
    LONG,
    MODEL,
    Running,
    Stack,
    answers,
    call,
    descendants,
    free_port,
    is_alive,
    listening_ports,
    opened,
    wait_until,
)

CLOUD = f"{MODEL}-cloud"


@pytest.fixture(scope="module")
def begun(tmp_path_factory: pytest.TempPathFactory, small_model: Path) -> Iterator[Stack]:
    """An installation with the small model, whose very first start was under a umask that hides nothing."""
    with Stack(tmp_path_factory.mktemp("stack")) as stack:
        before = os.umask(0)
        try:
            stack.start("--model", f"{MODEL}={small_model}", *BOUNDED)
        finally:
            os.umask(before)
        yield stack


@pytest.fixture
def running(begun: Stack) -> Stack:
    """That installation, started again where a test before has ended it."""
    if begun.up is None or begun.up.process.poll() is not None:
        begun.start()
    return begun


def test_hub_killed_in_the_middle_of_a_relayed_stream_ends_it_with_an_error_line(stocked: Stack) -> None:
    # Two commands, so that one can be killed without the other.
    hub, local = stocked.begin("hub", "serve"), stocked.begin("serve", CORRAL_HUB=stocked.hub_url)
    try:
        for url in (f"{stocked.hub_url}/readyz", f"{stocked.local_url}/api/version"):
            wait_until(lambda url=url: answers(url), f"{url} to answer")
        stocked.add_account()
        stocked.sign_in()
        with opened("POST", f"{stocked.local_url}/api/generate", {"model": CLOUD, **LONG}) as response:
            assert json.loads(response.readline())["done"] is False
            hub.end(signal.SIGKILL)
            last = [line for line in response if line.strip()][-1]
        assert "error" in json.loads(last), last
        refused = stocked.generate(CLOUD)
        assert refused.status in (502, 503), refused
        assert "Traceback" not in local.output
        assert stocked.generate(MODEL).status == 200
    finally:
        hub.end()
        local.end()


def test_t091_created_files_are_private_even_under_a_lax_umask(begun: Stack) -> None:
    assert stat.S_IMODE((begun.home / ".ollama/id_ed25519").stat().st_mode) == 0o600
    hub_home = begun.home / ".corral"
    below = list(hub_home.rglob("*"))
    assert {path.name for path in below} >= {"hub.db", "peppers.json", "registry-keys.json", "blobs"}
    assert [path for path in below if path.name.startswith("sha256-")]
    assert not [path for path in (hub_home, *below) if path.lstat().st_mode & 0o077]


def test_t097_engine_shows_no_secret_and_refuses_strangers(running: Stack) -> None:
    assert running.generate(MODEL).status == 200
    for pid in engines_of(running):
        environment = dict(item.partition("=")[::2] for item in Path(f"/proc/{pid}/environ").read_text().split("\0") if item)
        assert not [name for name in environment if name.startswith(("CORRAL_", "OLLAMA_")) and name != "CORRAL_ENGINE_KEY"]
        arguments = Path(f"/proc/{pid}/cmdline").read_text()
        secrets = [value for name, value in environment.items() if "KEY" in name and value]
        assert not [value for value in secrets if value in arguments]
        ports = listening_ports(pid)
        assert ports
        for address, port in ports:
            assert address == "127.0.0.1"
            assert call("POST", f"http://127.0.0.1:{port}/completion", {"prompt": "x"}).status == 401


def test_ctrl_c_while_signin_waits_ends_it_without_a_traceback(running: Stack) -> None:
    signin = running.begin("signin")
    signin.wait_for(r"/connect\?")
    assert signin.end(signal.SIGINT) in (1, 130, -signal.SIGINT)
    assert "Traceback" not in signin.output


def test_ctrl_c_while_run_streams_ends_it_without_a_traceback(running: Stack) -> None:
    story: Running = running.begin("run", MODEL, "Write a very long story about a very long road.")
    story.wait_for_words(r"\w+ \w+ \w+")
    story.end(signal.SIGINT)
    assert "Traceback" not in story.output


def test_r9_engine_killed_in_the_middle_of_a_stream_gives_an_error_line_and_is_started_again(running: Stack) -> None:
    with opened("POST", f"{running.local_url}/api/generate", {"model": MODEL, **LONG}) as response:
        assert json.loads(response.readline())["done"] is False
        for pid in engines_of(running):
            os.kill(pid, signal.SIGKILL)
        last = [line for line in response if line.strip()][-1]
    assert "error" in json.loads(last), last
    wait_until(lambda: running.generate(MODEL).status == 200, "the model to run again")


def test_r9_engine_killed_under_an_openai_stream_gives_an_error_event_and_no_done(running: Stack) -> None:
    messages = [{"role": "user", "content": "Count to ten thousand."}]
    body = {"model": MODEL, "messages": messages, "stream": True, "max_tokens": 4000}
    with opened("POST", f"{running.local_url}/v1/chat/completions", body) as response:
        assert response.readline().startswith(b"data: ")
        for pid in engines_of(running):
            os.kill(pid, signal.SIGKILL)
        rest = response.read()
    assert b'"error"' in rest
    assert b"[DONE]" not in rest


def test_second_up_starts_in_seconds_and_changes_nothing(running: Stack, small_model: Path) -> None:
    running.add_account()
    before = [model["digest"] for model in call("GET", f"{running.local_url}/api/tags").json["models"]]
    running.stop()
    up = running.start("--model", f"{MODEL}={small_model}")
    assert [model["digest"] for model in call("GET", f"{running.local_url}/api/tags").json["models"]] == before
    assert "/signup?code=" not in up.output


def test_ctrl_c_of_up_ends_everything_it_started(running: Stack) -> None:
    assert running.generate(MODEL).status == 200
    assert running.up is not None
    started = [running.up.process.pid, *descendants(running.up.process.pid)]
    assert running.up.end(signal.SIGINT) in (0, 130)
    assert "Traceback" not in running.up.output
    wait_until(lambda: not any(is_alive(pid) for pid in started), "every process to end", timeout_s=10)


def test_r19_killed_server_takes_its_engine_along(running: Stack) -> None:
    assert running.generate(MODEL).status == 200
    assert running.up is not None
    assert engines_of(running)
    started = descendants(running.up.process.pid)
    running.up.end(signal.SIGKILL)
    wait_until(lambda: not any(is_alive(pid) for pid in started), "the servers and the engine to die", timeout_s=10)


def test_r19_killed_up_takes_along_servers_that_are_stopped(running: Stack) -> None:
    assert running.generate(MODEL).status == 200
    assert running.up is not None
    started = descendants(running.up.process.pid)
    with stopped([pid for pid, command in started.items() if "--supervised" in command]):
        running.up.end(signal.SIGKILL)
        wait_until(lambda: not any(is_alive(pid) for pid in started), "the servers and the engine to die", timeout_s=10)


def test_second_sigterm_of_up_ends_a_running_stream_with_an_error_line(running: Stack) -> None:
    assert running.up is not None
    with opened("POST", f"{running.local_url}/api/generate", {"model": MODEL, **LONG}) as response:
        assert json.loads(response.readline())["done"] is False
        servers = [pid for pid, command in descendants(running.up.process.pid).items() if "--supervised" in command]
        with stopped(servers):
            running.up.process.send_signal(signal.SIGTERM)
            # The first lets what runs finish; the second does not wait for it.
            running.up.wait_for("Stopping")
            running.up.process.send_signal(signal.SIGTERM)
            wait_until(lambda: all(waiting_signals(pid) == 2 for pid in servers), "both signals to be passed on", timeout_s=10)
        last = [line for line in response if line.strip()][-1]
    assert "error" in json.loads(last), last
    assert running.up.finish() == 0


def test_up_on_a_taken_port_names_it_and_leaves_nothing_behind(fresh: Stack) -> None:
    for variable, form in (("OLLAMA_HOST", "127.0.0.1:{}"), ("CORRAL_HUB_LISTEN", "127.0.0.1:{}")):
        with socket.create_server(("127.0.0.1", 0)) as taken:
            port = taken.getsockname()[1]
            done = fresh.corral("up", status=1, **{variable: form.format(port)})
        assert str(port) in done.stderr
        assert "→" in done.stderr
        assert "Traceback" not in done.stderr


def test_model_file_that_is_not_gguf_is_refused_in_words(fresh: Stack) -> None:
    junk = fresh.home / "junk.gguf"
    junk.write_bytes(b"PK\x03\x04 this is a zip file, not a model" * 100)
    done = fresh.corral("up", "--model", f"junk={junk}", status=1)
    assert "GGUF" in done.stderr
    assert "Traceback" not in done.stderr


def test_model_file_that_is_not_there_is_refused_in_words(fresh: Stack) -> None:
    done = fresh.corral("up", "--model", f"gone={fresh.home / 'gone.gguf'}", status=1)
    assert "gone.gguf" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("kind", ["damaged", "readable by others", "a link"])
def test_t091_unusable_device_key_is_refused_with_the_mending_command(fresh: Stack, kind: str) -> None:
    folder = fresh.home / ".ollama"
    folder.mkdir(mode=0o700)
    key = folder / "id_ed25519"
    key.write_text("-----BEGIN OPENSSH PRIVATE KEY-----\nnot base64 at all\n-----END OPENSSH PRIVATE KEY-----\n")
    key.chmod(0o644 if kind == "readable by others" else 0o600)
    if kind == "a link":
        key.rename(folder / "elsewhere")
        key.symlink_to(folder / "elsewhere")
    before = key.read_text()
    done = fresh.begin("serve", CORRAL_HUB=fresh.hub_url)
    try:
        # A server that could not sign may still serve local models; either way it says so and leaves the file alone.
        done.wait_for("id_ed25519")
        assert "Traceback" not in done.output
        assert key.read_text() == before
    finally:
        done.end()


def test_unreachable_hub_is_told_as_such_and_local_models_run_on(stocked: Stack) -> None:
    nowhere = f"http://127.0.0.1:{free_port()}"
    local = stocked.begin("serve", CORRAL_HUB=nowhere)
    try:
        wait_until(lambda: answers(f"{stocked.local_url}/api/version"), "the local server", watch=local)
        assert stocked.generate(CLOUD).status in (502, 503)
        assert stocked.generate(MODEL).status == 200
        done = stocked.corral("signin", status=1, CORRAL_HUB=nowhere)
        assert nowhere.partition("://")[2] in done.stderr
        assert "Traceback" not in done.stderr
    finally:
        local.end()


def test_commands_without_a_local_server_say_how_to_start_it(fresh: Stack) -> None:
    done = fresh.corral("list", status=1)
    assert "corral" in done.stderr
    assert "Traceback" not in done.stderr


@contextlib.contextmanager
def stopped(pids: list[int]) -> Iterator[None]:
    """Processes that come to nothing for a while, so that what is sent to them finds them all at once."""
    for pid in pids:
        os.kill(pid, signal.SIGSTOP)
    try:
        # Until then a thread may still take a signal.
        wait_until(lambda: all(state == "T" for pid in pids for state in states(pid)), "every thread to stop", timeout_s=10)
        yield
    finally:
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGCONT)


def states(pid: int) -> list[str]:
    """Of each thread, in the kernel's letters."""
    return [path.read_text().rpartition(")")[2].split()[0] for path in Path(f"/proc/{pid}/task").glob("*/stat")]


def waiting_signals(pid: int) -> int:
    """How many different signals a process has not come to yet. Of one kind there is never more than one."""
    status = Path(f"/proc/{pid}/status").read_text()
    (mask,) = [line.split()[1] for line in status.splitlines() if line.startswith("ShdPnd:")]
    return int(mask, 16).bit_count()


def engines_of(stack: Stack) -> list[int]:
    """The processes below `corral up` that hold a model."""
    assert stack.up is not None
    found = [pid for pid, command in descendants(stack.up.process.pid).items() if "llama" in command]
    assert found, f"no engine among {descendants(stack.up.process.pid)}"
    return found
