"""One hub mirrors another: what a stock client gets from the second while the first is there, when it lies, when it is gone."""

import gzip
import hashlib
import json
import os
import shutil
import signal
import subprocess
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from nacl.signing import SigningKey

from flows.stack import Running, Stack, answers, call, free_port, wait_until
from flows.stock_ollama import MANIFEST_TYPE, DeviceKey, Refused, StockOllama, model_of

pytestmark = pytest.mark.flow

ALICE, NOBODY = (DeviceKey(SigningKey(bytes([number]) * 32)) for number in (1, 3))


@dataclass
class Hub:
    """A hub process that can be ended and started again on the same data."""

    stack: Stack
    running: Running | None = None

    def start(self) -> None:
        self.running = self.stack.begin("hub", "serve")
        wait_until(lambda: answers(f"{self.stack.hub_url}/readyz"), "the hub to answer", watch=self.running)

    def kill(self) -> None:
        assert self.running is not None
        self.running.end(signal.SIGKILL)

    def as_(self, key: DeviceKey) -> StockOllama:
        return StockOllama(base=self.stack.hub_url, key=key)

    def blob_file(self, content: bytes) -> Path:
        """Where the hub keeps it."""
        name = f"sha256-{hashlib.sha256(content).hexdigest()}"
        found = [path for path in (self.stack.home / ".corral" / "blobs").rglob("*") if path.name == name]
        assert len(found) == 1
        return found[0]

    def files(self) -> set[str]:
        """All files of content, finished or not."""
        folders = [self.stack.home / ".corral" / name for name in ("blobs", "cache")]
        return {path.name for folder in folders for path in folder.rglob("*") if path.is_file()}

    def keeps(self, repository: str, tag: str = "latest") -> bool:
        """Whether the manifest is stored, which it is once all its blobs are."""
        client = self.as_(NOBODY)
        reply = client.once("GET", f"{client.base}/v2/{repository}/tags/list")
        return reply.status == 200 and tag in json.loads(reply.body)["tags"]


@pytest.fixture(scope="module")
def upstream(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hub]:
    """A hub whose administrator alice pushes to its library."""
    with Stack(tmp_path_factory.mktemp("upstream")) as stack:
        hub = Hub(stack)
        hub.start()
        stack.add_account("alice")
        scopes = [word for scope in ("models:pull", "models:push") for word in ("--scope", scope)]
        stack.corral("hub", "device", "add", "alice", "--name", "laptop", "--key", ALICE.authorized, *scopes)
        yield hub


class Hostile(BaseHTTPRequestHandler):
    """A registry that does something wrong in each repository, by its name."""

    protocol_version = "HTTP/1.1"

    def do_HEAD(self) -> None:
        self.answer(404, b"")

    def do_GET(self) -> None:
        # /v2/WHAT/manifests/REFERENCE
        what, kind = self.path.split("/")[2:4]
        if kind == "blobs":
            self.endless() if what == "endless-blob" else self.answer(200, b"other content")
            return
        host = self.headers["Host"]
        match what:
            case "bomb":
                self.answer(200, gzip.compress(bytes(1 << 26)), {"Content-Encoding": "gzip"})
            case "endless":
                self.endless()
            case "huge":
                self.answer(200, b"{", {"Content-Length": str(10 << 30)})
            case "loop":
                self.answer(302, b"", {"Location": self.path})
            case "metadata":
                self.answer(302, b"", {"Location": "http://169.254.169.254/latest/meta-data"})
            case "forever":
                self.answer(401, b"", {"WWW-Authenticate": f'Bearer realm="http://{host}/token/x/y",service="s",scope="x"'})
            case "elsewhere":
                self.answer(401, b"", {"WWW-Authenticate": 'Bearer realm="https://auth.example/token",service="s"'})
            case "traversal":
                self.answer(200, b'{"schemaVersion":2,"layers":[{"digest":"sha256:../../../x","size":1}]}')
            case "digest":
                self.answer(200, model_of(b"x")[1], {"Docker-Content-Digest": "sha256:" + "0" * 64})
            case "wrong-blob" | "endless-blob":
                self.answer(200, model_of(b"x" * 1000)[1])
            case "x":
                self.answer(200, b'{"token":"t"}')
            case _:
                self.answer(404, b"")

    def answer(self, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), "Content-Type": MANIFEST_TYPE, **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)
        if "Content-Length" in (headers or {}):
            self.close_connection = True

    def endless(self) -> None:
        self.send_response(200)
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        try:
            while True:
                self.wfile.write(b"10000\r\n" + b" " * 65536 + b"\r\n")
        except OSError:
            self.close_connection = True

    def log_message(self, *_: object) -> None:
        """Nothing: what fails is the test's affair."""


@pytest.fixture(scope="module")
def hostile() -> Iterator[str]:
    with ThreadingHTTPServer(("127.0.0.1", 0), Hostile) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


@pytest.fixture(scope="module")
def mirror(upstream: Hub, hostile: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hub]:
    rules = f"library/*={upstream.stack.hub_url},friends/*={upstream.stack.hub_url}/alice,hostile/*={hostile}/"
    with Stack(tmp_path_factory.mktemp("mirror"), CORRAL_MIRROR=rules) as stack:
        hub = Hub(stack)
        hub.start()
        yield hub


def publish(hub: Hub, repository: str, *layers: bytes, tag: str = "latest", visibility: str = "public") -> bytes:
    """Push a model there as alice; its manifest."""
    client = hub.as_(ALICE)
    blobs, manifest = model_of(*layers)
    for blob in blobs:
        client.upload(repository, blob)
    headers = {"Content-Type": MANIFEST_TYPE, "X-Corral-Visibility": visibility}
    client.control("PUT", f"{client.base}/v2/{repository}/manifests/{tag}", headers, manifest)
    return manifest


def test_model_is_pulled_through_the_mirror_and_kept_when_its_registry_is_gone(upstream: Hub, mirror: Hub) -> None:
    # Two parts for the client, and for the mirror.
    weights = os.urandom(1 << 20) * 96
    manifest = publish(upstream, "library/tiny", weights, b"adapter")
    body, blobs = mirror.as_(NOBODY).pull("library/tiny", "latest")
    assert body == manifest
    assert set(blobs.values()) >= {weights, b"adapter"}
    wait_until(lambda: mirror.keeps("library/tiny"), "the manifest to be kept")
    upstream.kill()
    try:
        again, _ = mirror.as_(NOBODY).pull("library/tiny", "latest")
        with pytest.raises(Refused, match=r"^502: .*which this hub mirrors"):
            mirror.as_(NOBODY).pull("library/other", "latest")
    finally:
        upstream.start()
    assert again == manifest


def test_private_and_missing_models_of_the_registry_are_unknown_here(upstream: Hub, mirror: Hub) -> None:
    publish(upstream, "library/secret", b"secret weights", visibility="private")
    for name in ("library/secret", "library/none", "friends/none"):
        with pytest.raises(Refused, match="file does not exist"):
            mirror.as_(NOBODY).pull(name, "latest")
        assert not mirror.keeps(name)


def test_rule_with_a_path_fetches_from_another_namespace(upstream: Hub, mirror: Hub) -> None:
    manifest = publish(upstream, "alice/tuned", b"tuned weights")
    body, _ = mirror.as_(NOBODY).pull("friends/tuned", "latest")
    assert body == manifest
    wait_until(lambda: mirror.keeps("friends/tuned"), "the manifest to be kept")
    with pytest.raises(Refused):
        mirror.as_(NOBODY).pull("alice/tuned", "latest")


def test_t094_content_that_was_changed_upstream_is_never_served(upstream: Hub, mirror: Hub) -> None:
    weights = os.urandom(1 << 20)
    publish(upstream, "library/rotten", weights)
    file = upstream.blob_file(weights)
    file.chmod(0o600)
    file.write_bytes(weights[:-1] + bytes([weights[-1] ^ 1]))
    with pytest.raises(Refused, match=r"^502: "):
        mirror.as_(NOBODY).pull("library/rotten", "latest")
    assert not mirror.keeps("library/rotten")
    assert not list((mirror.stack.home / ".corral" / "blobs").rglob(f"*{hashlib.sha256(weights).hexdigest()}*"))


def test_r001_mirror_that_was_killed_goes_on_after_its_restart(upstream: Hub, mirror: Hub) -> None:
    weights = os.urandom(1 << 20) * 32
    manifest = publish(upstream, "library/large", weights)
    client = mirror.as_(NOBODY)
    assert client.control("GET", f"{client.base}/v2/library/large/manifests/latest").body == manifest
    mirror.kill()
    mirror.start()
    body, blobs = mirror.as_(NOBODY).pull("library/large", "latest")
    assert body == manifest
    assert weights in blobs.values()
    wait_until(lambda: mirror.keeps("library/large"), "the manifest to be kept")


@pytest.mark.parametrize(
    "name",
    ["bomb", "endless", "huge", "loop", "metadata", "forever", "elsewhere", "traversal", "digest", "wrong-blob", "endless-blob"],
)
def test_t093_t120_registry_that_misbehaves_is_an_error_and_leaves_nothing(mirror: Hub, name: str) -> None:
    before = mirror.files()
    # With a token that is good: a mirror's trouble must never look like a lack of rights.
    with pytest.raises(Refused, match=r"^502: |unexpected status code 502"):
        mirror.as_(NOBODY).pull(f"hostile/{name}", "latest")
    assert not mirror.keeps(f"hostile/{name}")
    wait_until(lambda: mirror.files() == before, "what was fetched to be gone")


def test_manifest_and_blob_are_served_without_any_token(upstream: Hub, mirror: Hub) -> None:
    manifest = publish(upstream, "library/open", b"open weights")
    found = call("GET", f"{mirror.stack.hub_url}/v2/library/open/manifests/latest")
    assert (found.status, found.body) == (200, manifest)
    digest = json.loads(manifest)["layers"][0]["digest"]
    assert call("GET", f"{mirror.stack.hub_url}/v2/library/open/blobs/{digest}").body == b"open weights"


def test_nobody_can_take_the_name_of_a_mirrored_namespace(mirror: Hub) -> None:
    refused = mirror.stack.corral("hub", "user", "add", "friends", "--password-stdin", given="correct horse\n", status=1)
    assert "reserved" in refused.stderr


def test_real_ollama_pulls_through_the_mirror(upstream: Hub, mirror: Hub, tmp_path: Path) -> None:
    program = os.environ.get("CORRAL_TEST_OLLAMA") or shutil.which("ollama")
    if not program:
        pytest.skip("no ollama program: put it on the PATH or name it in CORRAL_TEST_OLLAMA")
    # More than one part.
    weights = os.urandom(1 << 20) * 96
    manifest = publish(upstream, "library/real", weights)
    port = free_port()
    env = {"PATH": os.environ["PATH"], "HOME": str(tmp_path), "OLLAMA_HOST": f"127.0.0.1:{port}"}
    server = Running([program, "serve"], env, tmp_path)
    name = f"{urlsplit(mirror.stack.hub_url).netloc}/library/real"
    try:
        wait_until(lambda: answers(f"http://127.0.0.1:{port}/api/version"), "ollama to answer", watch=server)
        arguments = [program, "pull", "--insecure", name]
        done = subprocess.run(arguments, env=env, capture_output=True, text=True, timeout=120, check=False, cwd=tmp_path)
    finally:
        server.end(signal.SIGTERM)
    assert done.returncode == 0, done.stderr
    models = tmp_path / ".ollama/models"
    assert (models / "manifests" / name / "latest").read_bytes() == manifest
    assert (models / "blobs" / f"sha256-{hashlib.sha256(weights).hexdigest()}").read_bytes() == weights
