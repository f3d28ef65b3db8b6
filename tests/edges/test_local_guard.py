"""The Host and Origin rules of the local server, and the refusal to listen publicly."""

import pytest

from corral.edges.local_guard import LocalGuard, require_safe_bind
from corral.wire.errors import CorralError

GUARD = LocalGuard(hostname="adas-macbook", hosts=["models.lan"])
EXTENSION = "chrome-extension://abcdefghijklmnop"


def status(
    *,
    method: str = "POST",
    path: str = "/api/chat",
    host: str | None = "localhost:11434",
    guard: LocalGuard = GUARD,
    **headers: str,
) -> int | None:
    """What the guard answers with, None when it lets pass. headers: `sec_fetch_site="…"`."""
    sent = {name.replace("_", "-"): [value] for name, value in headers.items()}
    if host is not None:
        sent["host"] = [host]
    return guard(method, path, sent).status


@pytest.mark.parametrize("method", ["GET", "HEAD", "POST", "DELETE", "OPTIONS"])
@pytest.mark.parametrize(
    "host",
    [
        "evil.com",
        "localhost.evil.com",
        "evil.local",
        "x.internal",
        "host.docker.internal",
        "127.0.0.1.nip.io",
        "localhost.",
        "a/b",
        "evil.localhost.com",
        "adas-macbook.evil.com",
        "0x7f.0.0.1",
        "2130706433",
        "127.1",
        "0177.0.0.1",
        "[::1",
        "::1",
        "[::ffff:evil]",
        "[127.0.0.1]",
        "[fe80::1%eth0]",
        "localhost:port",
        "localhost:1:2",
        "local\nhost",
        "localhost\n",
        " ",
    ],
)
def test_t086_host_that_a_page_could_own_is_refused(host: str, method: str) -> None:
    assert status(host=host, method=method) == 403


@pytest.mark.parametrize("method", ["GET", "HEAD", "POST", "OPTIONS"])
@pytest.mark.parametrize(
    "host",
    [
        "localhost:11434",
        "localhost",
        "LOCALHOST:80",
        "127.0.0.1",
        "127.0.0.1:11434",
        "[::1]",
        "[::1]:11434",
        "192.168.1.20:11434",
        "10.0.0.1",
        "0.0.0.0:11434",
        "Adas-MacBook:11434",
        "adas-macbook.local",
        "models.lan:11434",
    ],
)
def test_t086_own_names_and_addresses_are_served(host: str, method: str) -> None:
    assert status(host=host, method=method) is None


@pytest.mark.parametrize("host", [None, ""])
def test_t086_request_without_host_passes_only_without_a_browsers_headers(host: str | None) -> None:
    assert status(host=host) is None
    assert status(host=host, origin="http://localhost") == 403
    assert status(host=host, sec_fetch_site="none") == 403


def test_t086_two_hosts_or_origins_are_refused() -> None:
    assert GUARD("GET", "/", {"host": ["localhost", "evil.com"]}).status == 403
    assert GUARD("GET", "/", {"host": ["localhost"], "origin": ["http://localhost", "http://evil.com"]}).status == 403


def test_t086_machine_without_a_name_serves_no_nameless_host() -> None:
    assert status(host=".local", guard=LocalGuard(hostname="")) == 403


@pytest.mark.parametrize(
    "path", ["/api/delete", "/api/pull", "/api/create", "/api/push", "/api/signout", "/api/me", "/api/chat", "/"]
)
@pytest.mark.parametrize(
    "origin",
    [
        "http://evil.com",
        "https://evil.com",
        "null",
        "",
        "http://localhost.evil.com",
        "http://evil.com:11434",
        "http://127.0.0.1.nip.io",
        "http://localhost:11434@evil.com",
        "http://localhost/evil",
        "https://[::1].evil.com",
        "evil",
        "data:text/html",
        "ftp://localhost",
    ],
)
def test_t088_foreign_origin_is_refused(origin: str, path: str) -> None:
    assert status(path=path, origin=origin, content_type="text/plain") == 403


@pytest.mark.parametrize(
    "origin",
    [
        "http://localhost",
        "https://localhost:3000",
        "http://127.0.0.1:8080",
        "https://0.0.0.0",
        "http://[::1]:5173",
        "app://obsidian.md",
        "file://",
        "tauri://localhost",
        "vscode-webview://1a2b3c",
        "vscode-file://vscode-app",
        "http://LOCALHOST:3000",
    ],
)
def test_local_origin_is_admitted_and_echoed_exactly(origin: str) -> None:
    verdict = GUARD("POST", "/api/delete", {"host": ["localhost:11434"], "origin": [origin]})
    assert verdict.status is None
    assert verdict.headers == (("Access-Control-Allow-Origin", origin), ("Vary", "Origin"))


def test_own_page_under_an_address_is_same_origin() -> None:
    assert status(host="192.168.1.20:11434", origin="http://192.168.1.20:11434") is None
    assert status(host="192.168.1.20:11434", origin="http://192.168.1.21:11434") == 403


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("/api/chat", None),
        ("/api/generate", None),
        ("/api/embed", None),
        ("/api/tags", None),
        ("/api/show", None),
        ("/api/version", None),
        ("/v1/audio/transcriptions", None),
        ("/v1/chat/completions", None),
        ("/v1/models/x", None),
        ("/api/delete", 403),
        ("/api/create", 403),
        ("/api/copy", 403),
        ("/api/pull", 403),
        ("/api/push", 403),
        ("/api/signout", 403),
        ("/api/me", 403),
        ("/api/user/keys/x", 403),
        ("/api/blobs/sha256:0", 403),
        ("/api/invented-later", 403),
        ("/api/chat/../delete", 403),
    ],
)
@pytest.mark.parametrize("scheme", ["chrome-extension", "moz-extension", "safari-web-extension"])
@pytest.mark.parametrize("method", ["POST", "OPTIONS"])
def test_t088_extension_may_ask_and_list_but_change_nothing(path: str, expected: int | None, scheme: str, method: str) -> None:
    wanted = 204 if method == "OPTIONS" and expected is None else expected
    assert status(path=path, origin=f"{scheme}://abcdef", method=method) == wanted


@pytest.mark.parametrize(
    ("pattern", "origin", "expected"),
    [
        ("https://chat.example.org", "https://chat.example.org", None),
        ("https://chat.example.org/", "https://chat.example.org", None),
        ("https://chat.example.org", "https://chat.example.org:8443", 403),
        ("https://chat.example.org", "http://chat.example.org", 403),
        ("https://*.example.org", "https://chat.example.org", None),
        ("https://*.example.org", "https://example.org", 403),
        ("https://*.example.org", "https://chat.example.org.evil.com", 403),
        ("http://10.0.0.1:*", "http://10.0.0.1:3000", None),
        ("chat.example.org", "http://chat.example.org", None),
        ("chat.example.org", "ftp://chat.example.org", 403),
        ("https://a.b", "https://aXb", 403),
        (EXTENSION, EXTENSION, None),
        ("*", "https://anything.example", None),
        ("*", "null", 403),
    ],
)
def test_configured_origin_is_admitted_everywhere(pattern: str, origin: str, expected: int | None) -> None:
    guard = LocalGuard(hostname="x", origins=[pattern])
    assert status(path="/api/delete", origin=origin, guard=guard) == expected


def test_t089_preflight_of_a_local_page_names_its_origin_and_what_it_may_send() -> None:
    verdict = GUARD("OPTIONS", "/api/chat", {"host": ["localhost"], "origin": ["http://localhost:3000"]})
    headers = dict(verdict.headers)
    assert verdict.status == 204
    assert headers["Access-Control-Allow-Origin"] == "http://localhost:3000"
    assert "x-stainless-retry-count" in headers["Access-Control-Allow-Headers"]
    assert "DELETE" in headers["Access-Control-Allow-Methods"]
    assert "Access-Control-Allow-Credentials" not in headers


@pytest.mark.parametrize("guard", [GUARD, LocalGuard(hostname="x", origins=["*"])])
def test_t089_no_answer_ever_allows_every_origin_or_credentials(guard: LocalGuard) -> None:
    for origin in ("http://localhost", "https://evil.com"):
        for method in ("OPTIONS", "POST"):
            verdict = guard(method, "/api/chat", {"host": ["localhost"], "origin": [origin]})
            assert dict(verdict.headers).get("Access-Control-Allow-Origin") in (None, origin)
            assert "Access-Control-Allow-Credentials" not in dict(verdict.headers)


def test_t089_preflight_from_a_foreign_page_is_told_nothing() -> None:
    verdict = GUARD("OPTIONS", "/api/chat", {"host": ["localhost"], "origin": ["https://evil.com"]})
    assert (verdict.status, verdict.headers) == (403, ())


def test_t087_evil_host_is_refused_whatever_the_server_listens_on() -> None:
    # The guard is not told what the server listens on, so it cannot be lax about it.
    assert status(host="evil.com") == 403


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "", "192.168.1.20", "models.lan", "fe80::1"])
def test_t087_public_bind_is_refused_with_what_to_do(host: str) -> None:
    with pytest.raises(CorralError, match="CORRAL_ALLOW_PUBLIC=1") as refused:
        require_safe_bind(host, allow_public=False)
    assert "OLLAMA_HOST" in refused.value.message
    require_safe_bind(host, allow_public=True)


@pytest.mark.parametrize("host", ["127.0.0.1", "::1", "localhost", "127.0.0.2"])
def test_t087_loopback_bind_needs_no_permission(host: str) -> None:
    require_safe_bind(host, allow_public=False)
