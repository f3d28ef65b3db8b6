"""Models made, copied and removed with the real command, and read by the real Ollama where there is one."""

import contextlib
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from flows.stack import PATIENCE_S, Running, Stack, answers, call, free_port, wait_until

MODELFILE = """\
FROM {weights}
SYSTEM \"""You are a pirate.
Say "arr".\"""
PARAMETER temperature 0
PARAMETER num_predict 4
PARAMETER num_thread 1
PARAMETER stop <|im_end|>
LICENSE Apache-2.0
MESSAGE user hi
MESSAGE assistant arr
"""


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    """A running local server."""
    with Stack(tmp_path_factory.mktemp("library")) as stack:
        running = stack.begin("serve")
        wait_until(lambda: answers(f"{stack.local_url}/api/version"), "the local server", watch=running)
        yield stack


@pytest.fixture
def local(server: Stack) -> Stack:
    """That server with nothing installed."""
    for name in names(server):
        assert call("DELETE", f"{server.local_url}/api/delete", {"model": name}).status == 200
    return server


def write_modelfile(stack: Stack, weights: Path, text: str = MODELFILE) -> None:
    (stack.home / "Modelfile").write_text(text.format(weights=weights))


def names(stack: Stack, url: str = "") -> list[str]:
    return sorted(row["name"] for row in call("GET", f"{url or stack.local_url}/api/tags").json["models"])


def blobs(stack: Stack) -> set[str]:
    return {path.name for path in (stack.home / ".ollama" / "models" / "blobs").iterdir()}


def test_model_is_made_shown_run_copied_and_removed(local: Stack, small_model: Path) -> None:
    write_modelfile(local, small_model)
    made = local.corral("create", "pirate")
    assert made.stderr.splitlines()[-1] == "success"
    assert local.corral("create", "pirate").stderr.count("copying") == 0
    modelfile = local.corral("show", "pirate", "--modelfile").stdout
    assert '\nSYSTEM """You are a pirate.\nSay "arr"."""\n' in modelfile
    assert "\nPARAMETER stop <|im_end|>\n" in modelfile
    assert "\nTEMPLATE" not in modelfile
    shown = local.corral("show", "pirate", "-v").stdout
    assert "Apache-2.0" in shown
    assert "token_embd.weight" in shown
    assert local.corral("run", "pirate", "who are you?").stdout.strip()

    assert local.corral("cp", "pirate", "crew/Mate:2").stdout == "copied 'pirate' to 'crew/Mate:2'\n"
    assert names(local) == ["crew/Mate:2", "pirate:latest"]
    (local.home / "again").write_text(modelfile)
    local.corral("create", "CREW/mate:2", "-f", "again")
    assert names(local) == ["crew/Mate:2", "pirate:latest"]
    digests = {row["name"]: row["digest"] for row in call("GET", f"{local.local_url}/api/tags").json["models"]}
    assert digests["crew/Mate:2"] == digests["pirate:latest"]

    assert local.corral("rm", "pirate").stdout == "deleted 'pirate'\n"
    assert local.corral("run", "crew/mate:2", "hello").stdout.strip()
    local.corral("rm", "crew/mate:2")
    assert names(local) == []
    assert not blobs(local)
    assert not list((local.home / ".ollama" / "models" / "manifests").iterdir())
    assert "model 'pirate' not found" in local.corral("rm", "pirate", status=1).stderr


def test_model_of_a_model_keeps_its_weights(local: Stack, small_model: Path) -> None:
    write_modelfile(local, small_model)
    local.corral("create", "base")
    write_modelfile(local, small_model, "FROM base\nSYSTEM Be brief.\n")
    local.corral("create", "mine")
    local.corral("rm", "base")
    shown = call("POST", f"{local.local_url}/api/show", {"model": "mine"}).json
    assert shown["system"] == "Be brief."
    assert shown["details"]["parent_model"] == "base:latest"
    assert shown["license"] == "Apache-2.0"
    assert local.corral("run", "mine", "hello").stdout.strip()


def test_blob_of_a_killed_upload_is_not_there_and_the_next_attempt_works(local: Stack, small_model: Path) -> None:
    write_modelfile(local, small_model)
    creating = local.begin("create", "pirate")
    wait_until(lambda: blobs_or_none(local), "the upload to begin", watch=creating)
    creating.process.kill()
    creating.finish()
    wait_until(lambda: not [name for name in blobs(local) if name.endswith(".tmp")] or names(local), "the upload to be given up")
    local.corral("create", "pirate")
    assert names(local) == ["pirate:latest"]


def blobs_or_none(stack: Stack) -> set[str]:
    return blobs(stack) if (stack.home / ".ollama" / "models" / "blobs").exists() else set()


# ── With the real Ollama on the same directory ───────────────────────────────────────────────────────────────────────


@pytest.fixture
def ollama() -> str:
    program = os.environ.get("CORRAL_TEST_OLLAMA") or shutil.which("ollama")
    if not program:
        pytest.skip("no ollama program: put it on the PATH or name it in CORRAL_TEST_OLLAMA")
    return program


@contextlib.contextmanager
def served_by_ollama(stack: Stack, program: str) -> Iterator[dict[str, str]]:
    """The real server on the same models; yields the environment of its command."""
    env = {**stack.env, "OLLAMA_HOST": f"127.0.0.1:{free_port()}", "OLLAMA_NO_CLOUD": "1"}
    running = Running([program, "serve"], env, stack.home)
    try:
        url = f"http://{env['OLLAMA_HOST']}"
        wait_until(lambda: answers(f"{url}/api/version"), "the real Ollama", watch=running)
        yield env
    finally:
        running.process.terminate()
        running.finish()


def tell(program: str, env: dict[str, str], *arguments: str) -> str:
    done = subprocess.run([program, *arguments], env=env, capture_output=True, text=True, timeout=PATIENCE_S, check=False)
    assert done.returncode == 0, f"ollama {' '.join(arguments)}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def test_ollama_reads_copies_and_removes_what_we_made(local: Stack, small_model: Path, ollama: str) -> None:
    write_modelfile(local, small_model)
    local.corral("create", "crew/Pirate:2")
    with served_by_ollama(local, ollama) as env:
        url = f"http://{env['OLLAMA_HOST']}"
        ours, theirs = (call("GET", f"{base}/api/tags").json["models"] for base in (local.local_url, url))
        for row in ("name", "size", "digest", "capabilities"):
            assert theirs[0][row] == ours[0][row]
        shown_here, shown_there = (
            call("POST", f"{base}/api/show", {"model": "crew/pirate:2"}).json for base in (local.local_url, url)
        )
        for field in ("system", "license", "template", "details", "messages", "capabilities"):
            assert shown_there[field] == shown_here[field]
        assert sorted(shown_there["parameters"].splitlines()) == sorted(shown_here["parameters"].splitlines())
        assert 'SYSTEM """You are a pirate.' in tell(ollama, env, "show", "crew/pirate:2", "--modelfile")
        tell(ollama, env, "cp", "crew/pirate:2", "mate")
        assert names(local) == ["crew/Pirate:2", "mate:latest"]
        local.corral("rm", "crew/pirate:2")
        assert names(local, url) == ["mate:latest"]
        tell(ollama, env, "rm", "mate")
    assert names(local) == []
    assert not blobs(local)


def test_we_read_and_run_what_ollama_made(local: Stack, small_model: Path, ollama: str) -> None:
    write_modelfile(local, small_model)
    local.corral("create", "base")
    with served_by_ollama(local, ollama) as env:
        (local.home / "theirs").write_text(
            'FROM base\nSYSTEM "Be\nbrief."\nPARAMETER num_predict 3\nMESSAGE user hi\nMESSAGE assistant yo\n'
        )
        tell(ollama, env, "create", "theirs", "-f", str(local.home / "theirs"))
    shown = call("POST", f"{local.local_url}/api/show", {"model": "theirs"}).json
    assert shown["system"] == "Be\nbrief."
    assert shown["messages"] == [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}]
    assert "num_predict" in shown["parameters"]
    assert local.corral("run", "theirs", "hello").stdout.strip()
    local.corral("rm", "theirs")
    assert names(local) == ["base:latest"]


def test_ollamas_own_command_makes_models_with_our_server(local: Stack, small_model: Path, ollama: str) -> None:
    write_modelfile(local, small_model)
    env = {**local.env, "HOME": str(local.home)}
    tell(ollama, env, "create", "pirate", "-f", str(local.home / "Modelfile"))
    assert "pirate:latest" in tell(ollama, env, "list")
    assert "Apache-2.0" in tell(ollama, env, "show", "pirate", "--license")
    tell(ollama, env, "cp", "pirate", "mate")
    assert tell(ollama, env, "rm", "pirate", "mate") == "deleted 'pirate'\ndeleted 'mate'\n"
    assert names(local) == []
