"""Pull and push from the command line, over real sockets: between machines by way of a hub, and with a download that is killed.

With a real `ollama` program at hand (`CORRAL_TEST_OLLAMA`, or on the PATH), it goes on with our downloads and we with its, and it
lists and runs what we pulled.
"""

import hashlib
import http.server
import json
import os
import re
import shutil
import signal
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from flows.stack import MODEL, Stack, answers, call, free_port, opened, wait_until

pytestmark = pytest.mark.flow

SIZE = 30_000_000
WEIGHTS = bytes(range(256)) * (SIZE // 256) + b"\0" * (SIZE % 256)
CONFIG = b'{"model_format":"gguf","model_family":"llama"}\n'
MANIFEST_TYPE = "application/vnd.docker.distribution.manifest.v2+json"


def digest_of(content: bytes) -> str:
    return f"sha256:{hashlib.sha256(content).hexdigest()}"


class SlowRegistry:
    """A registry with one model, `a/b`, that hands out the first `until` bytes of the weights and then waits. served: the first
    byte of each range of the weights that was asked for."""

    def __init__(self) -> None:
        self.until = 20_000_000
        self.served: list[int] = []
        self.ended = threading.Event()
        layer = {"mediaType": "application/vnd.ollama.image.model", "digest": digest_of(WEIGHTS), "size": len(WEIGHTS)}
        config = {
            "mediaType": "application/vnd.docker.container.image.v1+json",
            "digest": digest_of(CONFIG),
            "size": len(CONFIG),
        }
        document = {"schemaVersion": 2, "mediaType": MANIFEST_TYPE, "config": config, "layers": [layer]}
        self.manifest = json.dumps(document).encode()
        registry = self

        class Handler(http.server.BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                registry.answer(self)

            do_HEAD = do_GET  # noqa: N815 - the name that http.server looks for

            def log_message(self, *_: object) -> None: ...

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.thread = threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
        self.thread.start()
        self.host = f"127.0.0.1:{self.server.server_address[1]}"

    def answer(self, request: http.server.BaseHTTPRequestHandler) -> None:
        content = self.manifest if "/manifests/" in request.path else CONFIG
        if digest_of(WEIGHTS) in request.path:
            content = WEIGHTS
        wanted = re.fullmatch(r"bytes=(\d+)-(\d+)", request.headers.get("Range", ""))
        first, last = (int(wanted[1]), int(wanted[2])) if wanted else (0, len(content) - 1)
        request.send_response(206 if wanted else 200)
        if wanted:
            request.send_header("Content-Range", f"bytes {first}-{last}/{len(content)}")
        # What the stock client wants to see.
        request.send_header("Location", f"http://{self.host}{request.path}")
        request.send_header("Content-Type", MANIFEST_TYPE)
        request.send_header("Content-Length", str(last - first + 1))
        request.end_headers()
        if request.command == "HEAD":
            return
        try:
            if content is WEIGHTS and wanted:
                self.served.append(first)
                request.wfile.write(content[first : min(last + 1, max(first, self.until))])
                if self.until <= last:
                    self.ended.wait(60)
                    return
                first = max(first, self.until) if self.until < first else last + 1
            request.wfile.write(content[first : last + 1])
        except OSError:
            pass

    def close(self) -> None:
        self.ended.set()
        self.server.shutdown()
        self.server.server_close()
        self.thread.join()


@pytest.fixture
def slow() -> Iterator[SlowRegistry]:
    registry = SlowRegistry()
    yield registry
    registry.close()


@pytest.fixture
def local(tmp_path: Path) -> Iterator[Stack]:
    with Stack(tmp_path) as stack:
        yield stack


def serve(stack: Stack) -> Any:
    running = stack.begin("serve")
    wait_until(lambda: answers(f"{stack.local_url}/api/version"), "the local server", watch=running)
    return running


def blobs(stack: Stack) -> Path:
    return stack.home / ".ollama/models/blobs"


def completed(stack: Stack) -> int:
    """What the note of the weights' only part says."""
    note = blobs(stack) / f"{digest_of(WEIGHTS).replace(':', '-')}-partial-0"
    try:
        return int(json.loads(note.read_text())["Completed"])
    except (OSError, ValueError):
        return 0


def begin_pull(stack: Stack, slow: SlowRegistry, *, at: str = "") -> None:
    """Pull until there are 16 MB of the weights, and leave."""
    body = {"model": f"{slow.host}/a/b", "insecure": True}
    with opened("POST", f"{at or stack.local_url}/api/pull", body) as response:
        while True:
            event = json.loads(response.readline())
            assert "error" not in event, event
            if event.get("total") == SIZE and event.get("completed", 0) >= 16_000_000:
                return


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory, home_with_model: Path) -> Iterator[Stack]:
    """An installation whose device alice connected, for pushing as well, and the model `alice/tiny` in it, which says little."""
    with Stack(tmp_path_factory.mktemp("hub"), like=home_with_model) as stack:
        stack.start()
        stack.add_account("alice")
        key = stack.add_key("alice", "inference", "keys", "models:pull", "models:push")
        stack.corral("signin", "--api-key-stdin", given=key + "\n")
        (stack.home / "Modelfile").write_text(f"FROM {MODEL}\nPARAMETER num_predict 4\n")
        stack.corral("create", "alice/tiny")
        yield stack


def test_private_model_goes_to_the_hub_and_comes_back_signed(hub: Stack) -> None:
    pushed = hub.corral("push", "alice/tiny", "--private")
    assert pushed.stdout == f"\nYou can find your model at:\n\n\t{hub.hub_url}/alice/tiny\n"
    assert "\x1b" not in pushed.stderr
    assert "success" in pushed.stderr.splitlines()
    before = hub.corral("list", "--json").stdout
    hub.corral("rm", "alice/tiny")
    pulled = hub.corral("pull", "alice/tiny")
    assert pulled.stderr.splitlines()[0] == "pulling manifest"
    digest = {row["name"]: row["digest"] for row in json.loads(before)}["alice/tiny:latest"]
    assert {row["name"]: row["digest"] for row in json.loads(hub.corral("list", "--json").stdout)}["alice/tiny:latest"] == digest


def test_stranger_gets_what_is_public_by_running_it_and_nothing_else(hub: Stack, local: Stack) -> None:
    hub.corral("push", "alice/tiny", "--private")
    serve(local)
    name = f"{hub.hub_url.removeprefix('http://')}/alice/tiny"
    refused = local.corral("pull", name, status=1)
    assert "Error: pull model manifest: file does not exist" in refused.stderr
    hub.corral("push", "alice/tiny", "--public")
    ran = local.corral("run", name, "Say hello")
    assert ran.stdout.strip()
    assert "success" in ran.stderr
    hub.corral("push", "alice/tiny", "--private")


def test_push_that_is_not_allowed_says_why(hub: Stack, local: Stack) -> None:
    hub.corral("cp", MODEL, "bob/tiny")
    assert "Error: " in hub.corral("push", "bob/tiny", status=1).stderr
    hub.corral("rm", "bob/tiny")


def test_download_of_a_killed_server_goes_on_where_it_was(local: Stack, slow: SlowRegistry) -> None:
    running = serve(local)
    puller = local.begin("pull", f"{slow.host}/a/b")
    wait_until(lambda: completed(local) >= 16_000_000, "16 MB")
    running.end(signal.SIGKILL)
    puller.finish()
    assert slow.served == [0]
    slow.until = SIZE
    serve(local)
    local.corral("pull", f"{slow.host}/a/b")
    assert slow.served[1] >= 16_000_000
    assert sorted(path.name for path in blobs(local).iterdir()) == sorted(
        digest_of(content).replace(":", "-") for content in (WEIGHTS, CONFIG)
    )


def test_download_that_somebody_left_goes_on_where_it_was(local: Stack, slow: SlowRegistry) -> None:
    serve(local)
    begin_pull(local, slow)
    slow.until = SIZE
    local.corral("pull", f"{slow.host}/a/b")
    assert slow.served[1] >= 16_000_000


# ── With the real ollama ─────────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def ollama(local: Stack) -> Iterator[Stack]:
    """A real ollama server on the same models; its address is the stack's `hub_url`, which nothing else uses here."""
    program = os.environ.get("CORRAL_TEST_OLLAMA") or shutil.which("ollama")
    if not program:
        pytest.skip("no ollama program: put it on the PATH or name it in CORRAL_TEST_OLLAMA")
    port = free_port()
    local.hub_url = f"http://127.0.0.1:{port}"
    env = {"PATH": os.environ["PATH"], "HOME": str(local.home), "OLLAMA_HOST": f"127.0.0.1:{port}", "OLLAMA_NOPRUNE": "1"}
    with subprocess.Popen([program, "serve"], env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        wait_until(lambda: answers(f"{local.hub_url}/api/version"), "the real ollama")
        yield local
        process.terminate()


def test_real_ollama_goes_on_with_a_download_that_we_began(ollama: Stack, slow: SlowRegistry) -> None:
    serve(ollama)
    begin_pull(ollama, slow)
    wait_until(lambda: completed(ollama) >= 16_000_000, "the note")
    slow.until = SIZE
    pulled = call("POST", f"{ollama.hub_url}/api/pull", {"model": f"{slow.host}/a/b", "insecure": True, "stream": False})
    assert pulled.json == {"status": "success"}
    assert slow.served[1] >= 16_000_000


def test_we_go_on_with_a_download_that_the_real_ollama_began(ollama: Stack, slow: SlowRegistry) -> None:
    begin_pull(ollama, slow, at=ollama.hub_url)
    wait_until(lambda: completed(ollama) >= 16_000_000, "the note")
    slow.until = SIZE
    serve(ollama)
    ollama.corral("pull", f"{slow.host}/a/b")
    assert slow.served[-1] >= 16_000_000


def test_real_ollama_lists_what_we_pulled_and_shows_the_same_digest(ollama: Stack, hub: Stack) -> None:
    hub.corral("push", "alice/tiny", "--public")
    serve(ollama)
    name = f"{hub.hub_url.removeprefix('http://')}/alice/tiny"
    ollama.corral("pull", name)
    theirs, ours = (call("GET", f"{url}/api/tags").json["models"] for url in (ollama.hub_url, ollama.local_url))
    assert [(model["name"], model["digest"]) for model in theirs] == [(model["name"], model["digest"]) for model in ours]
    shown = call("POST", f"{ollama.hub_url}/api/show", {"model": name})
    assert shown.status == 200
    assert shown.json["details"]["quantization_level"] == "Q4_1"
    hub.corral("push", "alice/tiny", "--private")
