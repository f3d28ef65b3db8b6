"""Pushing and pulling large blobs: the hub against Debian's docker-registry, and `pull` against curl.

One client for both sides: raw sockets, the content sent from a file by the kernel, answers counted and thrown away. Every push
has content of its own, so that nobody can skip it: the last bytes differ, and the digest of all before them is a kept hash state.
"""

import contextlib
import hashlib
import json
import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from threading import Event, Thread
from urllib.parse import urlsplit

from bench.figures import resident_mb
from bench.measure import Figure, compared, in_turn, limited, skipped
from flows.stack import Stack, call, free_port, wait_until

SIZES = (250_000_000, 500_000_000, 2_000_000_000)
_SUFFIX = 16
_PULLS = 3
_BLOCK = 1 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Registry:
    """Where a registry is. store: its blobs' directory, emptied between rounds so that the disk does not fill up. pid: of the
    process whose memory is looked at."""

    url: str
    repository: str
    store: Path
    key: str = ""
    pid: int = 0


class Content:
    """A file of a size; every `fresh` gives it another end and so another digest."""

    def __init__(self, path: Path, size: int) -> None:
        self.path, self.size = path, size
        block = os.urandom(_BLOCK)
        self._state = hashlib.sha256()
        left = size - _SUFFIX
        with path.open("wb") as file:
            while left:
                piece = block[:left]
                file.write(piece)
                self._state.update(piece)
                left -= len(piece)

    def fresh(self) -> str:
        """Change the content; its digest."""
        suffix = os.urandom(_SUFFIX)
        with self.path.open("r+b") as file:
            file.seek(self.size - _SUFFIX)
            file.truncate()
            file.write(suffix)
        state = self._state.copy()
        state.update(suffix)
        return f"sha256:{state.hexdigest()}"


def push(registry: Registry, content: Content, digest: str) -> float:
    """Seconds from the first request to the 201."""
    uploads = f"{registry.url}/v2/{registry.repository}/blobs/uploads/"
    began = time.perf_counter()
    started = call("POST", uploads, b"", key=registry.key)
    assert started.status == 202, started
    location = _send(started.headers["location"], content, registry.key)
    ended = call("PUT", f"{location}{'&' if '?' in location else '?'}digest={digest}", b"", key=registry.key)
    assert ended.status == 201, ended
    return time.perf_counter() - began


def _send(location: str, content: Content, key: str) -> str:
    """PATCH the whole content. The Location for what comes next."""
    parts = urlsplit(location)
    target = parts.path + (f"?{parts.query}" if parts.query else "")
    head = [f"PATCH {target} HTTP/1.1", f"Host: {parts.netloc}", "Content-Type: application/octet-stream"]
    head += [f"Content-Length: {content.size}", "Connection: close", *([f"Authorization: Bearer {key}"] if key else [])]
    with socket.create_connection((parts.hostname or "", parts.port or 80)) as connection, content.path.open("rb") as file:
        connection.sendall("\r\n".join([*head, "", ""]).encode())
        connection.sendfile(file)
        answer = b""
        while data := connection.recv(65536):
            answer += data
    assert answer.startswith(b"HTTP/1.1 202"), answer[:300]
    lines = answer.partition(b"\r\n\r\n")[0].decode().split("\r\n")[1:]
    fields = {name.lower(): value for name, _, value in (line.partition(": ") for line in lines)}
    return fields.get("location", location)


def pull(registry: Registry, digest: str, size: int) -> float:
    """Seconds until the whole blob is here."""
    parts = urlsplit(registry.url)
    head = [f"GET /v2/{registry.repository}/blobs/{digest} HTTP/1.1", f"Host: {parts.netloc}", "Connection: close"]
    head += [f"Authorization: Bearer {registry.key}"] if registry.key else []
    buffer, got = bytearray(_BLOCK), 0
    began = time.perf_counter()
    with socket.create_connection((parts.hostname or "", parts.port or 80)) as connection:
        connection.sendall("\r\n".join([*head, "", ""]).encode())
        while count := connection.recv_into(buffer):
            if not got:
                assert buffer.startswith(b"HTTP/1.1 200"), bytes(buffer[:300])
            got += count
    assert got >= size, got
    return time.perf_counter() - began


@contextlib.contextmanager
def docker_registry(folder: Path) -> Iterator[Registry | None]:
    """Debian's docker-registry on a store of its own; None where it is not installed."""
    program = shutil.which("docker-registry")
    if program is None:
        yield None
        return
    folder.mkdir()
    port, store = free_port(), folder / "store"
    configuration = {
        "version": "0.1",
        "log": {"level": "error", "accesslog": {"disabled": True}},
        "storage": {"filesystem": {"rootdirectory": str(store)}, "delete": {"enabled": True}},
        "http": {"addr": f"127.0.0.1:{port}"},
    }
    (folder / "config.yml").write_text(json.dumps(configuration))
    with subprocess.Popen(
        [program, "serve", str(folder / "config.yml")], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    ) as process:
        url = f"http://127.0.0.1:{port}"
        try:
            wait_until(lambda: _answers(url), "docker-registry to answer")
            yield Registry(url=url, repository="alice/big", store=store, pid=process.pid)
        finally:
            process.send_signal(signal.SIGTERM)


def _answers(url: str) -> bool:
    try:
        return call("GET", f"{url}/v2/").status == 200
    except OSError:
        return False


class Peak:
    """The most memory a process takes while the block runs."""

    def __init__(self, pid: int) -> None:
        self.mb = 0.0
        self._pid, self._over = pid, Event()
        self._thread = Thread(target=self._watch, daemon=True)

    def _watch(self) -> None:
        while not self._over.wait(0.05):
            self.mb = max(self.mb, resident_mb(self._pid))

    def __enter__(self) -> "Peak":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()


def p9(ours: Registry, folder: Path) -> Iterator[Figure]:
    """Push and pull of growing blobs, and the hub's memory meanwhile."""
    with docker_registry(folder / "docker") as peer:
        if peer is None:
            yield skipped("P9", "push and pull against docker-registry", "docker-registry is not installed")
            return
        memory: list[float] = []
        for size in SIZES:
            content = Content(folder / "content", size)
            times: dict[str, list[list[float]]] = {"push": [[], []], "pull": [[], []]}

            def both(
                number: int, registry: Registry, content: Content = content, times: dict[str, list[list[float]]] = times
            ) -> float:
                digest = content.fresh()
                times["push"][number].append(push(registry, content, digest))
                # One pull takes half a second or two, as the machine has it: a median of three of them says nothing.
                times["pull"][number].extend(pull(registry, digest, content.size) for _ in range(_PULLS))
                _empty(registry.store, content.size)
                return 0.0

            with Peak(ours.pid) as peak:
                in_turn([lambda: both(0, ours), lambda: both(1, peer)], rounds=5 if size == SIZES[-1] else 3)
            memory.append(peak.mb)
            for verb, goal in (("push", 0.75), ("pull", 1.0)):
                mine, theirs = times[verb]
                name = f"{verb} {size / 1e9:g} GB to the hub" if verb == "push" else f"pull {size / 1e9:g} GB from the hub"
                yield compared("P9", name, mine, theirs, unit="s", at_most=goal)
            content.path.unlink()
        yield limited("P9", "hub memory, 2 GB blobs", memory[-1], unit="MB", at_most=150)
        yield limited("P9", "hub memory, growth from 0.25 to 2 GB", memory[-1] - memory[0], unit="MB", at_most=20)


def _empty(store: Path, size: int) -> None:
    """Remove the large files of a round; what refers to them is not asked for again."""
    for path in store.rglob("*"):
        if path.is_file() and path.stat().st_size == size:
            path.unlink()


def p10(stack: Stack, ours: Registry, folder: Path) -> Iterator[Figure]:
    """A pull by the local server against curl and sha256sum of the same blob."""
    if shutil.which("curl") is None:
        yield skipped("P10", "local pull", "curl is not installed")
        return
    fetched = folder / "fetched"
    for size in SIZES:
        content = Content(folder / "content", size)
        digest = content.fresh()
        push(ours, content, digest)
        name = _push_manifest(ours, digest, size)
        content.path.unlink()
        blob = f"{ours.url}/v2/{ours.repository}/blobs/{digest}"

        def mine(name: str = name) -> float:
            began = time.perf_counter()
            done = call("POST", f"{stack.local_url}/api/pull", {"model": name, "insecure": True, "stream": False})
            taken = time.perf_counter() - began
            assert done.json == {"status": "success"}, done
            assert call("DELETE", f"{stack.local_url}/api/delete", {"model": name}).status == 200
            return taken

        def theirs(blob: str = blob) -> float:
            began = time.perf_counter()
            command = ["curl", "-sSf", "-o", str(fetched), "-H", f"Authorization: Bearer {ours.key}", blob]
            subprocess.run(command, check=True)
            subprocess.run(["sha256sum", str(fetched)], check=True, capture_output=True)
            taken = time.perf_counter() - began
            fetched.unlink()
            return taken

        taken, peers = in_turn([mine, theirs], rounds=5 if size == SIZES[-1] else 3)
        yield compared("P10", f"local pull of {size / 1e9:g} GB", taken, peers, unit="s", at_most=1.15)
        _empty(ours.store, size)


def _push_manifest(registry: Registry, digest: str, size: int) -> str:
    """A model with that blob as its weights; the name to pull it by."""
    config = b'{"model_format":"gguf","architecture":"amd64","os":"linux"}\n'
    named = f"sha256:{hashlib.sha256(config).hexdigest()}"
    uploads = f"{registry.url}/v2/{registry.repository}/blobs/uploads/?digest={named}"
    headers = {"Content-Type": "application/octet-stream"}
    assert call("POST", uploads, config, key=registry.key, headers=headers).status == 201
    layer = {"mediaType": "application/vnd.ollama.image.model", "digest": digest, "size": size}
    described = {"mediaType": "application/vnd.docker.container.image.v1+json", "digest": named, "size": len(config)}
    kind = "application/vnd.docker.distribution.manifest.v2+json"
    manifest = {"schemaVersion": 2, "mediaType": kind, "config": described, "layers": [layer]}
    tag = f"b{size}"
    url = f"{registry.url}/v2/{registry.repository}/manifests/{tag}"
    # Public, because the bench's device was connected for running models alone.
    headers = {"Content-Type": kind, "X-Corral-Visibility": "public"}
    assert call("PUT", url, manifest, key=registry.key, headers=headers).status == 201
    return f"{urlsplit(registry.url).netloc}/{registry.repository}:{tag}"
