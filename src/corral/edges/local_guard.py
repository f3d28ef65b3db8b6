"""What keeps web pages out of a local server that asks nobody for credentials. Pure: headers in, a verdict out.

The local server runs for whoever can reach it, so a stranger's web page must not be able to make a browser reach it. Two things
give such a page away. One that had its own host name resolved to this machine (DNS rebinding) still sends that name as `Host`; so
only IP literals and this machine's own names are served: rebinding needs a name. Any other page sends its `Origin` with whatever
could change something; so an origin that is neither local nor configured is refused before anything is read.

Differences from Ollama: the Host check is not given up when the server listens on more than loopback, and not every `.internal`
and `.local` name is admitted; browser extensions may ask and list without being named in OLLAMA_ORIGINS, but not change
anything (docs/divergences.md). Source: ollama server/routes.go, envconfig/config.go; security.md 5.
"""

import ipaddress
import re
from collections.abc import Iterable

from corral.edges.asgi import GuardVerdict
from corral.wire.discovery import is_loopback_host
from corral.wire.errors import CorralError

_HOST = re.compile(r"(?:\[(?P<v6>[0-9A-Fa-f:.]+)\]|(?P<name>[A-Za-z0-9_.-]+))(?::[0-9]{1,5})?")
_ORIGIN = re.compile(r"(?P<scheme>[a-z][a-z0-9+.-]*)://(?P<host>\[[0-9a-f:.]+\]|[a-z0-9_.-]*)(?P<port>:[0-9]{1,5})?")
_LOCAL_HOSTS = frozenset({"localhost", "127.0.0.1", "0.0.0.0", "[::1]"})  # noqa: S104 - as an origin, not to listen on
#: Desktop applications that show web pages. Source: ollama envconfig/config.go AllowedOrigins.
_APP_SCHEMES = frozenset({"app", "file", "tauri", "vscode-webview", "vscode-file"})
_EXTENSION_SCHEMES = frozenset({"chrome-extension", "moz-extension", "ms-browser-extension", "safari-web-extension"})
#: What an extension may do: ask and list. A path that is not here may change something, also one that is added later.
_HARMLESS_PATHS = frozenset(
    {
        "/",
        "/api/version",
        "/api/status",
        "/api/tags",
        "/api/ps",
        "/api/show",
        "/api/generate",
        "/api/chat",
        "/api/embed",
        "/api/embeddings",
        "/v1/audio/transcriptions",
        "/v1/chat/completions",
        "/v1/completions",
        "/v1/embeddings",
        "/v1/messages",
        "/v1/messages/count_tokens",
        "/v1/models",
        "/v1/responses",
    }
)
_STAINLESS = (
    "arch async custom-poll-interval helper-method lang os package-version "
    "poll-helper retry-count runtime runtime-version timeout"
)
_ALLOWED_HEADERS = ", ".join(
    ["Authorization", "Content-Type", "User-Agent", "Accept", "X-Requested-With", "OpenAI-Beta"]
    + [f"x-stainless-{name}" for name in _STAINLESS.split()]
)
_PREFLIGHT = (
    ("Access-Control-Allow-Methods", "GET,POST,PUT,PATCH,DELETE,HEAD,OPTIONS"),
    ("Access-Control-Allow-Headers", _ALLOWED_HEADERS),
    ("Access-Control-Max-Age", "43200"),
)
_REFUSED = GuardVerdict(status=403)
_PASSED = GuardVerdict()


class LocalGuard:
    """The Host and Origin rules of one local server; an `asgi.Guard`.

    hostname: of this machine; it and `<hostname>.local` are served. hosts: more names to serve, as the one in OLLAMA_HOST.
    origins: of OLLAMA_ORIGINS, with `*` for any text; `*` alone admits every origin but `null`.
    """

    def __init__(self, *, hostname: str, hosts: Iterable[str] = (), origins: Iterable[str] = ()) -> None:
        own = hostname.lower()
        self._hosts = {"localhost", own, f"{own}.local", *(host.lower() for host in hosts)} - {"", ".local"}
        self._patterns = [_origin_pattern(origin) for origin in origins]

    def __call__(self, method: str, path: str, headers: dict[str, list[str]]) -> GuardVerdict:
        """Refuse with 403, answer a preflight with 204, or let pass with the CORS headers to add."""
        origins = headers.get("origin", [])
        if len(origins) > 1 or not self._serves_host(headers):
            return _REFUSED
        if not origins:
            return _PASSED
        origin = origins[0]
        if not self._admits(origin, path, headers["host"][0]):
            return _REFUSED
        echo = (("Access-Control-Allow-Origin", origin), ("Vary", "Origin"))
        if method == "OPTIONS":
            return GuardVerdict(status=204, headers=(*echo, *_PREFLIGHT))
        return GuardVerdict(headers=echo)

    def _serves_host(self, headers: dict[str, list[str]]) -> bool:
        hosts = headers.get("host", [])
        if len(hosts) > 1:
            return False
        if not hosts or not hosts[0]:
            # Old tools send none; browsers always do, so whatever shows a browser's headers is forged.
            return "origin" not in headers and not any(name.startswith("sec-fetch-") for name in headers)
        match = _HOST.fullmatch(hosts[0])
        if match is None:
            return False
        if match["v6"]:
            return _is_address(match["v6"], 6)
        return match["name"].lower() in self._hosts or _is_address(match["name"], 4)

    def _admits(self, origin: str, path: str, host: str) -> bool:
        lowered = origin.lower()
        match = _ORIGIN.fullmatch(lowered)
        if match is None:
            return False
        if any(pattern.fullmatch(lowered) for pattern in self._patterns):
            return True
        if match["scheme"] in ("http", "https"):
            # The server's own pages; the host has been checked above.
            return match["host"] in _LOCAL_HOSTS or f"{match['host']}{match['port'] or ''}" == host.lower()
        if match["scheme"] in _EXTENSION_SCHEMES:
            return path in _HARMLESS_PATHS or path.startswith("/v1/models/")
        return match["scheme"] in _APP_SCHEMES


def _is_address(text: str, version: int) -> bool:
    try:
        return ipaddress.ip_address(text).version == version
    except ValueError:
        return False


def _origin_pattern(text: str) -> re.Pattern[str]:
    """`http://*.example.org` -> an expression for lower-case origins. A pattern without a scheme means http and https."""
    expression = ".*".join(re.escape(part) for part in text.lower().removesuffix("/").split("*"))
    return re.compile(expression if "://" in text or text == "*" else f"https?://{expression}")


def require_safe_bind(host: str, *, allow_public: bool, is_secured: bool = False) -> None:
    """Refuse to listen where others can reach a server that asks for no credentials. host: a name or an IP literal without
    brackets. Raises: forbidden, with what to do."""
    if allow_public or is_secured or is_loopback_host(host):
        return
    raise CorralError(
        "forbidden",
        f"listening on {host or 'every address'} would let anyone who can reach this machine use its models and its signed-in "
        "account: the local server asks for no credentials. Have it ask, with CORRAL_LOCAL_AUTH=remote, or set "
        "OLLAMA_HOST=127.0.0.1; CORRAL_ALLOW_PUBLIC=1 lets everybody in all the same",
    )
