"""Cases of the registry that are about connections: half open ones, requests inside of others, and other names of the hub."""

import hashlib
import os
from collections.abc import Iterator
from urllib.parse import urlsplit

import pytest

from flows.stack import Stack, answers, call, wait_until
from flows.test_registry_http import MIB, Registry, read_all, status_of

BLOB = os.urandom(MIB) * 3 + b"end"
DIGEST = f"sha256:{hashlib.sha256(BLOB).hexdigest()}"


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


@pytest.mark.parametrize("method", ["PATCH", "PUT"])
def test_f04_retry_wins_while_the_old_connection_is_still_half_open(registry: Registry, method: str) -> None:
    path = registry.begin_upload()
    part = {"Content_Range": f"0-{len(BLOB) - 1}", "Content_Length": str(len(BLOB)), "X_Redirect_Uploads": "1"}
    target = path if method == "PATCH" else f"{path}?digest={DIGEST}"
    with registry.connect() as connection:
        # Other bytes than those that come again: none of them may be left.
        connection.sendall(registry.head(method, target, **part) + b"y" * MIB)
        again = registry.call("PATCH", path, BLOB, content_range=f"0-{len(BLOB) - 1}", x_redirect_uploads="1")
        assert (again.status, again.headers["range"]) == (202, f"0-{len(BLOB) - 1}")
        connection.sendall(b"y" * (len(BLOB) - MIB))
        assert status_of(connection.recv(65536)) in (409, 416)
    assert registry.call("PUT", f"{path}?digest={DIGEST}").status == 201


def test_f22_request_inside_a_body_of_two_lengths_is_never_answered(registry: Registry) -> None:
    path = registry.begin_upload()
    inner = registry.head("DELETE", path)
    with registry.connect() as connection:
        head = registry.head("PATCH", path, Content_Length=str(len(inner) + 5), Transfer_Encoding="chunked")
        connection.sendall(head + b"0\r\n\r\n" + inner)
        # Ends, because the server closes the connection.
        answer = read_all(connection)
    # The HTTP layer goes by the chunks and hides the other length from us; whatever it makes of them, that is all of it.
    assert status_of(answer) in (202, 400)
    assert answer.count(b"HTTP/1.1 ") == 1
    shown = registry.call("GET", path)
    assert (shown.status, shown.headers["range"]) == (204, "0-0")


@pytest.mark.parametrize(("host", "other"), [("localhost", "Localhost"), ("127.0.0.1", "localhost")])
def test_tensor_pull_is_sent_to_the_same_server_by_another_name(registry: Registry, host: str, other: str) -> None:
    """The client of tensor models compares host and port, takes no body from an answer that redirects, and sends no token on."""
    url = f"http://{host}:{registry.address[1]}/v2/alice/tiny/blobs/{DIGEST}"
    first = call("GET", url, headers={**registry.proof, "User-Agent": "ollama-transfer/1.0"})
    assert (first.status, first.headers["content-length"]) == (307, "0")
    location = urlsplit(first.headers["location"])
    assert location.netloc == f"{other}:{registry.address[1]}"
    whole = call("GET", first.headers["location"], headers={"User-Agent": "ollama-transfer/1.0"})
    assert (whole.status, whole.body == BLOB) == (200, True)
    rest = call("GET", first.headers["location"], headers={"User-Agent": "ollama-transfer/1.0", "Range": "bytes=100-"})
    assert (rest.status, rest.body == BLOB[100:]) == (206, True)
