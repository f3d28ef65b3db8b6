"""OLLAMA_AUTH: commands sign for the server at OLLAMA_HOST, as Ollama's own client does."""

import http.client
import io
import json
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest

from corral.cli.api import LocalApi
from corral.cli.context import Failed
from corral.settings import Settings
from corral.wire.errors import CorralError
from corral.wire.signing import parse_authorization, request_challenge, verify
from corral.wire.strong import verify_headers

Heard = list[tuple[str, str, str]]


@pytest.fixture
def server() -> Iterator[tuple[int, Heard]]:
    heard: Heard = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            self.rfile.read(int(self.headers.get("Content-Length", 0)))
            heard.append((self.command, self.path, self.headers.get("Authorization", "")))
            body = json.dumps({"done": True}).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        do_GET = do_HEAD = do_POST  # noqa: N815 - the names that the base class looks for

        def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - the name of the base class
            pass

    with HTTPServer(("127.0.0.1", 0), Handler) as listening:
        thread = threading.Thread(target=listening.serve_forever, args=(0.01,))
        thread.start()
        yield listening.server_port, heard
        listening.shutdown()
        thread.join()


def api(home: Path, host: str, **environ: str) -> LocalApi:
    return LocalApi(Settings.from_env({"HOME": str(home), "OLLAMA_HOST": host, **environ}))


def test_every_kind_of_request_is_signed_for_its_path(tmp_path: Path, server: tuple[int, Heard]) -> None:
    port, heard = server
    signing = api(tmp_path, f"http://127.0.0.1:{port}/below", OLLAMA_AUTH="1", OLLAMA_API_KEY="crlk_x")
    signing.get("/api/tags?b=1&a=2")
    assert list(signing.stream("/api/chat", {})) == [{"done": True}]
    signing.upload("/api/blobs/sha256:x", [b"x"], 1)
    assert signing.has("/")
    assert [target.partition("ts=")[0] for _, target, _ in heard] == [
        "/below/api/tags?a=2&b=1&",
        "/below/api/chat?",
        "/below/api/blobs/sha256:x?",
        "/below/?",
    ]
    for method, target, header in heard:
        proof = parse_authorization(header)
        assert proof is not None
        # Without the prefix: whoever put it there takes it away again.
        verify(proof, request_challenge(method, target.removeprefix("/below")))


def test_nothing_is_signed_unless_asked_for(tmp_path: Path, server: tuple[int, Heard]) -> None:
    port, heard = server
    api(tmp_path, f"127.0.0.1:{port}").get("/api/tags")
    assert heard == [("GET", "/api/tags", "")]
    assert not (tmp_path / ".ollama").exists()


class Elsewhere(http.client.HTTPConnection):
    """A connection that remembers what is sent, and answers."""

    def __init__(self) -> None:
        super().__init__("192.0.2.1", 11434)
        self.sent: list[tuple[str, str, bytes | None, dict[str, str]]] = []

    def request(self, method: str, url: str, body: Any = None, headers: Any = (), **_: Any) -> None:
        self.sent.append((method, url, body, dict(headers)))

    def getresponse(self) -> Any:
        class Response(io.BytesIO):
            status = 200

        return Response(b"{}")


def test_t017_over_plain_http_to_another_machine_only_the_strong_signature_is_sent(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    signing, there = api(tmp_path, "http://192.0.2.1:11434", OLLAMA_AUTH="1", OLLAMA_API_KEY="crlk_x"), Elsewhere()
    # Patched because no test may reach out to another machine.
    monkeypatch.setattr(signing, "_connect", lambda: there)
    signing.post("/api/show?x=1", {"model": "m"})
    ((method, target, body, headers),) = there.sent
    assert (target, headers["Host"]) == ("/api/show?x=1", "192.0.2.1:11434")
    assert "Authorization" not in headers
    lowered = {name.lower(): value for name, value in headers.items()}
    url, now = f"http://192.0.2.1:11434{target}", time.time()
    assert body is not None
    proof = verify_headers(method, url, lowered, body=body, now=now)
    assert proof.key.authorized_key in (tmp_path / ".ollama" / "id_ed25519.pub").read_text()
    for wrong in ({"url": url + "2"}, {"body": body + b" "}, {"method": "DELETE"}):
        with pytest.raises(CorralError):
            verify_headers(**{"method": method, "url": url, "body": body, **wrong}, headers=lowered, now=now)  # type: ignore[arg-type]


def test_t017_file_that_no_signature_can_cover_is_not_sent_over_plain_http(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    signing = api(tmp_path, "http://192.0.2.1:11434", OLLAMA_AUTH="1")
    # Patched because no test may reach out to another machine.
    monkeypatch.setattr(signing, "_connect", Elsewhere)
    with pytest.raises(Failed, match="over plain http"):
        signing.upload("/api/blobs/sha256:x", [b"x"], 1)
