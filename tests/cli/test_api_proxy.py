"""Commands that ask a server themselves, behind a proxy: what goes by it, and what it gets to see."""

import json
import socket
import ssl
import threading
from base64 import b64encode
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from cryptography import x509

from certificates import self_signed
from corral.cli.api import LocalApi, ServerApi
from corral.cli.context import Failed
from corral.settings import Settings
from corral.wire.proxies import ProxyRules
from corral.wire.secrets import Secret

HOST = "hub.example"
KEY = Secret("crlk_x")


class Quiet(BaseHTTPRequestHandler):
    """A handler that logs nothing."""

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - the name of the base class
        pass


class Hub(Quiet):
    """Answers everything, and tells what it was asked."""

    def do_GET(self) -> None:
        told = {"path": self.path, "host": self.headers["Host"], "key": self.headers.get("Authorization", "")}
        body = json.dumps(told | {"proxy": self.headers.get("Proxy-Authorization", "")}).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


class Tunnel(Quiet):
    """A proxy. refuses: connects nobody; else everybody to the one hub there is. heard: (target, headers) of each request."""

    refuses = False
    hub_port = 0
    heard: list[tuple[str, dict[str, str]]]

    def do_CONNECT(self) -> None:
        self.heard.append((self.path, {name.lower(): value for name, value in self.headers.items()}))
        if self.refuses:
            self.send_error(403)
            return
        self.send_response(200)
        self.end_headers()
        with socket.create_connection(("127.0.0.1", self.hub_port)) as hub:
            there = threading.Thread(target=_pour, args=(self.connection, hub))
            there.start()
            _pour(hub, self.connection)
            there.join()

    do_GET = do_POST = do_HEAD = do_CONNECT  # noqa: N815 - the names that the base class looks for


def _pour(source: socket.socket, into: socket.socket) -> None:
    try:
        while data := source.recv(65536):
            into.sendall(data)
        into.shutdown(socket.SHUT_WR)
    except OSError:
        pass


@pytest.fixture
def certificate(tmp_path: Path) -> Path:
    """A certificate for the hub, with its key."""
    return self_signed(tmp_path, x509.DNSName(HOST))


def _listening(handler: type[BaseHTTPRequestHandler], context: ssl.SSLContext | None = None) -> Iterator[ThreadingHTTPServer]:
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        if context is not None:
            server.socket = context.wrap_socket(server.socket, server_side=True)
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield server
        server.shutdown()
        thread.join()


@pytest.fixture
def hub(certificate: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[ThreadingHTTPServer]:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate)
    # What the TLS library trusts; no name of the hub's is known on this machine.
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
    yield from _listening(Hub, context)


@pytest.fixture
def tunnel(hub: ThreadingHTTPServer) -> Iterator[type[Tunnel]]:
    class Own(Tunnel):
        hub_port = hub.server_port
        port = 0

    Own.heard = []
    for server in _listening(Own):
        Own.port = server.server_port
        yield Own


@pytest.fixture
def no_names(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is looked up: patched, so that no test asks a name server."""

    def unknown(*arguments: object, **options: object) -> object:
        raise socket.gaierror(socket.EAI_NONAME, "no such name")

    monkeypatch.setattr(socket, "getaddrinfo", unknown)


def rules(tunnel: type[Tunnel], *exceptions: str) -> ProxyRules:
    return ProxyRules(https=f"http://ada:hun%40ter2@127.0.0.1:{vars(tunnel)['port']}", exceptions=exceptions)


def test_hub_is_asked_through_the_proxy_which_sees_no_key(tunnel: type[Tunnel]) -> None:
    told = ServerApi.of_hub(f"https://{HOST}", KEY, rules(tunnel)).get("/api/user?x=1")
    assert told == {"path": "/api/user?x=1", "host": HOST, "key": "Bearer crlk_x", "proxy": ""}
    ((target, headers),) = tunnel.heard
    assert target == f"{HOST}:443"
    assert headers["proxy-authorization"] == "Basic " + b64encode(b"ada:hun@ter2").decode()
    assert "authorization" not in headers


def test_stranger_asks_through_the_proxy_too(tunnel: type[Tunnel]) -> None:
    assert ServerApi.of_stranger(f"https://{HOST}:8443", rules(tunnel)).get("/x")["key"] == ""
    assert [target for target, _ in tunnel.heard] == [f"{HOST}:8443"]


def test_server_at_ollama_host_is_asked_through_the_proxy(tunnel: type[Tunnel], tmp_path: Path) -> None:
    environ = {"HOME": str(tmp_path), "OLLAMA_HOST": f"https://{HOST}", "https_proxy": rules(tunnel).https}
    assert LocalApi(Settings.from_env(environ)).get("/api/tags")["path"] == "/api/tags"
    assert [target for target, _ in tunnel.heard] == [f"{HOST}:443"]


def test_certificate_is_checked_behind_the_proxy(tunnel: type[Tunnel]) -> None:
    with pytest.raises(Failed, match=r"TLS certificate of https://other\.example") as failed:
        ServerApi.of_hub("https://other.example", KEY, rules(tunnel)).get("/x")
    assert "SSL_CERT_FILE" in failed.value.advice


def test_proxy_that_refuses_is_named_without_its_password(tunnel: type[Tunnel]) -> None:
    tunnel.refuses = True
    with pytest.raises(Failed, match="the proxy did not let it through") as refused:
        ServerApi.of_hub(f"https://{HOST}", KEY, rules(tunnel)).get("/x")
    assert "HTTPS_PROXY" in refused.value.advice
    assert "ter2" not in f"{refused.value} {refused.value.advice}"


def test_hub_on_this_machine_is_asked_directly(tunnel: type[Tunnel], hub: ThreadingHTTPServer) -> None:
    # Its certificate is for another name, which shows that it was reached.
    with pytest.raises(Failed, match="TLS certificate"):
        ServerApi.of_hub(f"https://127.0.0.1:{hub.server_port}", KEY, rules(tunnel)).get("/x")
    assert tunnel.heard == []


@pytest.mark.usefixtures("no_names")
def test_hub_that_is_excepted_is_asked_directly(tunnel: type[Tunnel]) -> None:
    with pytest.raises(Failed, match="could not connect"):
        ServerApi.of_hub("https://hub.invalid", KEY, rules(tunnel, "hub.invalid")).get("/x")
    assert tunnel.heard == []


def test_proxy_that_wants_tls_itself_is_refused_in_words(tunnel: type[Tunnel]) -> None:
    with pytest.raises(Failed, match="proxies of http:// only"):
        ServerApi.of_hub(f"https://{HOST}", KEY, ProxyRules(https="https://proxy.example")).get("/x")


@pytest.mark.usefixtures("no_names")
def test_plain_http_never_goes_by_a_proxy(tunnel: type[Tunnel], tmp_path: Path) -> None:
    environ = {"HOME": str(tmp_path), "OLLAMA_HOST": "http://server.invalid", "http_proxy": rules(tunnel).https}
    with pytest.raises(Failed, match="could not connect"):
        LocalApi(Settings.from_env(environ)).get("/api/tags")
    assert tunnel.heard == []
