"""The registry over real sockets: connections that break, answers that come before a body ends, and blobs in parts."""

import hashlib
import http.client
import os
import socket
import threading
from base64 import b64encode
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from flows.stack import PATIENCE_S, Answer, Running, Stack, answers, call, wait_until

MIB = 1 << 20
BLOB = os.urandom(MIB) * 24 + os.urandom(12_345)
DIGEST = f"sha256:{hashlib.sha256(BLOB).hexdigest()}"
OLLAMA = {"User-Agent": "ollama/0.34.0 (amd64 linux) Go/go1.26"}


@dataclass(frozen=True, slots=True)
class Registry:
    """A hub process, and alice's API key."""

    stack: Stack
    running: Running
    key: str

    @property
    def address(self) -> tuple[str, int]:
        return "127.0.0.1", urlsplit(self.stack.hub_url).port or 0

    @property
    def proof(self) -> dict[str, str]:
        return {"Authorization": "Basic " + b64encode(f"alice:{self.key}".encode()).decode()}

    def call(self, method: str, path: str, body: bytes | None = None, **headers: str) -> Answer:
        """A request of alice."""
        sent = {**self.proof, **{name.replace("_", "-"): value for name, value in headers.items()}}
        return call(method, self.stack.hub_url + path, body, headers=sent)

    def begin_upload(self) -> str:
        """The path of a new upload."""
        return urlsplit(self.call("POST", "/v2/alice/tiny/blobs/uploads/").headers["location"]).path

    def head(self, method: str, path: str, **headers: str) -> bytes:
        """The beginning of a request of alice, as it travels."""
        sent = {"Host": f"localhost:{self.address[1]}", **self.proof, **headers}
        lines = [f"{method} {path} HTTP/1.1", *(f"{name.replace('_', '-')}: {value}" for name, value in sent.items())]
        return "\r\n".join([*lines, "", ""]).encode()

    def connect(self) -> socket.socket:
        return socket.create_connection(self.address, timeout=PATIENCE_S)


@pytest.fixture(scope="module")
def registry(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Registry]:
    with Stack(tmp_path_factory.mktemp("registry")) as stack:
        stack.add_account("alice")
        key = stack.add_key("alice", "models:pull", "models:push")
        running = stack.begin("hub", "serve")
        wait_until(lambda: answers(f"{stack.hub_url}/readyz"), "the hub to answer", watch=running)
        registry = Registry(stack, running, key)
        assert registry.call("POST", f"/v2/alice/tiny/blobs/uploads/?digest={DIGEST}", BLOB).status == 201
        yield registry


def status_of(answer: bytes) -> int:
    """The status of an answer as it arrived."""
    return int(answer.split(b" ", 2)[1])


def read_all(connection: socket.socket) -> bytes:
    """What arrives until the other side ends. Raises: OSError when the connection is reset."""
    received = b""
    while part := connection.recv(MIB):
        received += part
    return received


# ── Connections that break ───────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("is_chunked", [False, True], ids=["announced", "chunked"])
def test_f02_body_that_breaks_off_is_taken_back_and_may_come_again(registry: Registry, is_chunked: bool) -> None:
    path = registry.begin_upload()
    assert registry.call("PATCH", path, BLOB[:1000]).headers["range"] == "0-999"
    length = {"Transfer-Encoding": "chunked"} if is_chunked else {"Content-Length": str(MIB)}
    content = b"%x\r\n%s\r\n" % (MIB // 2, BLOB[: MIB // 2]) if is_chunked else BLOB[: MIB // 2]
    with registry.connect() as connection:
        connection.sendall(registry.head("PATCH", path, **length) + content)
    wait_until(lambda: registry.call("GET", path).headers["range"] == "0-999", "the part to be taken back")
    again = registry.call("PATCH", path, BLOB[1000:], content_range=f"1000-{len(BLOB) - 1}")
    assert (again.status, again.headers["range"]) == (202, f"0-{len(BLOB) - 1}")
    assert registry.call("PUT", f"{path}?digest={DIGEST}").status == 201


def test_f02_single_upload_that_breaks_off_leaves_nothing(registry: Registry) -> None:
    content = os.urandom(MIB)
    digest = f"sha256:{hashlib.sha256(content).hexdigest()}"
    target = f"/v2/alice/broken/blobs/uploads/?digest={digest}"
    with registry.connect() as connection:
        connection.sendall(registry.head("POST", target, Content_Length=str(MIB)) + content[:-1])
        connection.shutdown(socket.SHUT_WR)
        assert b" 201 " not in read_all(connection)
    assert registry.call("HEAD", f"/v2/alice/broken/blobs/{digest}").status == 404
    assert registry.call("POST", target, content).status == 201


def test_t062_part_under_way_when_its_key_is_revoked_counts_for_nothing(registry: Registry) -> None:
    path, key = registry.begin_upload(), registry.stack.add_key("alice", "models:pull", "models:push")
    proof = "Basic " + b64encode(f"alice:{key}".encode()).decode()
    head = registry.head("PATCH", path, Authorization=proof, Content_Length=str(MIB), Expect="100-continue")
    with registry.connect() as connection:
        connection.sendall(head)
        assert status_of(connection.recv(65536)) == 100
        connection.sendall(BLOB[: MIB // 2])
        registry.stack.corral("hub", "key", "revoke", "alice", key.removeprefix("crlk_")[:10])
        connection.sendall(BLOB[MIB // 2 : MIB])
        assert status_of(connection.recv(65536)) == 401
    assert registry.call("GET", path).headers["range"] == "0-0"


# ── Answers that come before the body ends ───────────────────────────────────────────────────────────────────────────


def refused_while_sending(registry: Registry, head: bytes, total_bytes: int) -> bytes:
    """What arrives while that many bytes are sent behind the head, by a client that reads at the same time."""
    with registry.connect() as connection:
        received: list[bytes] = []
        reader = threading.Thread(target=lambda: received.append(connection.recv(65536)))
        reader.start()
        connection.sendall(head)
        block = b"x" * MIB
        try:
            for _ in range(total_bytes // MIB):
                connection.sendall(block)
        except OSError:
            assert total_bytes > 64 * MIB, "the server ended the connection before it read what it drains"
        reader.join(PATIENCE_S)
    return received[0]


@pytest.mark.parametrize(("megabytes", "path"), [(50, "/v2/alice/tiny/blobs/uploads/x"), (100, "/v2/alice/tiny/blobs/uploads/x")])
def test_f26_stranger_who_sends_a_part_sees_the_challenge(registry: Registry, megabytes: int, path: str) -> None:
    head = registry.head("PATCH", path, Authorization="", Content_Length=str(megabytes * MIB))
    answer = refused_while_sending(registry, head.replace(b"Authorization: \r\n", b""), megabytes * MIB)
    assert status_of(answer) == 401
    assert b'realm="http://localhost:' in answer


def test_f26_whoever_reads_only_afterwards_sees_the_answer_too(registry: Registry) -> None:
    path, size = registry.begin_upload(), 40 * MIB
    with registry.connect() as connection:
        headers = {"Content_Range": f"7-{size + 6}", "Content_Length": str(size)}
        connection.sendall(registry.head("PATCH", path, **headers) + b"x" * size)
        answer = connection.recv(65536)
        assert status_of(answer) == 416
        # What was drained leaves a connection that can be used again.
        connection.sendall(registry.head("GET", path))
        assert status_of(connection.recv(65536)) == 204


def test_f26_manifest_that_is_too_large_sees_413(registry: Registry) -> None:
    size = 20 * MIB
    head = registry.head("PUT", "/v2/alice/tiny/manifests/x", Content_Type="application/json", Content_Length=str(size))
    assert status_of(refused_while_sending(registry, head, size)) == 413


def test_f26_client_that_waits_for_100_gets_the_refusal_instead(registry: Registry) -> None:
    headers = {"Content_Length": str(MIB), "Expect": "100-continue"}
    with registry.connect() as connection:
        connection.sendall(registry.head("PATCH", "/v2/alice/tiny/blobs/uploads/none", **headers))
        assert status_of(connection.recv(65536)) == 404


# ── Blobs ────────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_head_tells_every_length_and_leaves_the_connection_usable(registry: Registry) -> None:
    connection = http.client.HTTPConnection(*registry.address, timeout=PATIENCE_S)
    headers = {**registry.proof, "Host": f"localhost:{registry.address[1]}", "Accept-Encoding": "gzip"}
    lengths = []
    for path in (f"blobs/{DIGEST}", "manifests/none", f"blobs/{DIGEST}", "tags/list"):
        connection.request("HEAD", f"/v2/alice/tiny/{path}", headers=headers)
        response = connection.getresponse()
        lengths.append((response.status, response.getheader("Content-Length"), response.read()))
        assert response.getheader("Content-Encoding") is None
    connection.close()
    assert lengths[0] == lengths[2] == (200, str(len(BLOB)), b"")
    assert [status for status, _, _ in lengths] == [200, 404, 200, 200]


def test_whole_blob_arrives_as_it_was_pushed_for_everybody(registry: Registry) -> None:
    whole = registry.call("GET", f"/v2/alice/tiny/blobs/{DIGEST}")
    by_ticket = call("GET", whole.headers["location"])
    for answer in (whole, by_ticket):
        assert answer.headers["content-length"] == str(len(BLOB))
        assert hashlib.sha256(answer.body).hexdigest() == DIGEST.removeprefix("sha256:")
        assert "content-encoding" not in answer.headers


def test_t039_sixteen_ranges_at_once_without_authorization(registry: Registry) -> None:
    located = registry.call("GET", f"/v2/alice/tiny/blobs/{DIGEST}", **OLLAMA)
    assert (located.status, located.body) == (200, b"")
    url, step = located.headers["location"], len(BLOB) // 16 + 1

    def part(first: int) -> bytes:
        last = min(first + step, len(BLOB)) - 1
        answer = call("GET", url, headers={"Range": f"bytes={first}-{last}"})
        assert (answer.status, answer.headers["content-range"]) == (206, f"bytes {first}-{last}/{len(BLOB)}")
        return answer.body

    with ThreadPoolExecutor(16) as pool:
        parts = list(pool.map(part, range(0, len(BLOB), step)))
    assert len(parts) == 16
    assert b"".join(parts) == BLOB


def test_t039_a_thousand_ranges_cost_nothing(registry: Registry) -> None:
    ranges = "bytes=" + ",".join(f"{n}-" for n in range(1000))
    answer = registry.call("GET", f"/v2/alice/tiny/blobs/{DIGEST}", Range=ranges)
    assert (answer.status, len(answer.body)) == (200, len(BLOB))


def test_r07_readers_that_take_nothing_are_not_buffered_for(registry: Registry) -> None:
    located = registry.call("GET", f"/v2/alice/tiny/blobs/{DIGEST}", **OLLAMA)
    target = located.headers["location"].partition(f":{registry.address[1]}")[2]
    request = f"GET {target} HTTP/1.1\r\nHost: localhost:{registry.address[1]}\r\n\r\n".encode()
    before = memory_of(registry)
    readers = [registry.connect() for _ in range(16)]
    try:
        for reader in readers:
            reader.sendall(request)
            assert reader.recv(12) == b"HTTP/1.1 200"
        wait_until(lambda: answers(f"{registry.stack.hub_url}/readyz"), "the hub to answer others")
        # 24 MiB each, were they read ahead; a few blocks each, and what allocators keep.
        assert memory_of(registry) - before < 16 * 3 * MIB
    finally:
        for reader in readers:
            reader.close()


def memory_of(registry: Registry) -> int:
    """Bytes of the hub process."""
    for line in Path(f"/proc/{registry.running.process.pid}/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) * 1024
    raise AssertionError


# ── Requests that nobody honest sends ────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("head", "statuses"),
    [
        (
            "PUT /v2/alice/tiny/manifests/x HTTP/1.1\r\nHost: {host}\r\nContent-Length: 5\r\nTransfer-Encoding: chunked\r\n",
            {400},
        ),
        ("PATCH /v2/alice/tiny/blobs/uploads/x HTTP/1.1\r\nHost: {host}\r\nContent-Length: 5\r\nContent-Length: 6\r\n", {400}),
        ("GET /v2/ HTTP/1.1\r\nHost: {host}\r\nHost: evil.example\r\n", {400}),
        ("GET /v2/ HTTP/1.1\r\n", {400}),
        ("GET /v2/ HTTP/1.1\r\nHost: evil.example\r\n", {421}),
        ("GET http://evil.example/v2/ HTTP/1.1\r\nHost: {host}\r\n", {400}),
        ("GET /v2//x HTTP/1.1\r\nHost: {host}\r\n", {400}),
        ("GET /v2/alice/%2e%2e/x/manifests/y HTTP/1.1\r\nHost: {host}\r\n", {400}),
        ("TRACE /v2/ HTTP/1.1\r\nHost: {host}\r\n", {405}),
        ("dispatch /v2/ HTTP/1.1\r\nHost: {host}\r\n", {400}),
        ("GET /v2/ HTTP/1.1\r\nHost: {host}\r\nX-Long: {long}\r\n", {400, 431}),
    ],
)
def test_t110_malformed_request_is_refused(registry: Registry, head: str, statuses: set[int]) -> None:
    text = head.format(host=f"localhost:{registry.address[1]}", long="x" * 65_536) + "\r\n"
    with registry.connect() as connection:
        connection.sendall(text.encode())
        answer = connection.recv(65536)
    assert status_of(answer) in statuses
    assert b"evil" not in answer
