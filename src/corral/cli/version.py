"""`--version`: what the running server is, and what this command is when that is something else.

It must cost little more than an empty Python (P13), so a plain socket asks, and neither click nor http.client is imported.
Source: ollama cmd/cmd.go versionHandler, fb30760.
"""

import json
import socket
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import corral

if TYPE_CHECKING:
    from corral.settings import Address

_TIMEOUT_S = 2.0
_MAX_BYTES = 64 * 1024


def version_text(environ: Mapping[str, str]) -> str:
    """The lines of `--version`. Raises: BadSetting."""
    from corral.settings import Settings

    settings = Settings.from_env(environ)
    answer = _asked_by_tls(settings) if settings.local.scheme == "https" else _asked(settings.local)
    lines = []
    if not answer:
        lines.append("Warning: could not connect to a running Corral instance")
    # Ollama's own server tells its version alone; ours also which Corral it is.
    name, server = ("corral", answer["corral"]) if "corral" in answer else ("ollama", answer.get("version"))
    if server:
        lines.append(f"{name} version is {_plain(server)}")
    if (name, server) != ("corral", corral.__version__):
        lines.append(f"Warning: client version is {corral.__version__}")
    return "\n".join(lines) + "\n"


def _asked(address: "Address") -> dict[str, Any]:
    """What `GET /api/version` answers; empty when nobody does, or something else than a version."""
    host = address.url.partition("://")[2].partition("/")[0]
    request = f"GET {address.path}/api/version HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n\r\n"
    target = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(address.host, address.host)  # noqa: S104 - asked, not listened on
    answer = b""
    try:
        with socket.create_connection((target, address.port), _TIMEOUT_S) as connection:
            connection.sendall(request.encode("ascii", "replace"))
            while len(answer) < _MAX_BYTES and (block := connection.recv(4096)):
                answer += block
    except OSError:
        return {}
    head, _, body = answer.partition(b"\r\n\r\n")
    if head.split(b" ", 2)[1:2] != [b"200"]:
        return {}
    # From brace to brace: what frames a short body that came in chunks lies outside.
    return _object(body[body.find(b"{") : body.rfind(b"}") + 1])


def _asked_by_tls(settings: Any) -> dict[str, Any]:
    from corral.cli.api import LocalApi
    from corral.cli.context import Failed

    try:
        answer = LocalApi(settings, timeout_s=_TIMEOUT_S).get("/api/version")
    except Failed:
        return {}
    return answer if isinstance(answer, dict) else {}


def _object(text: bytes) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}


def _plain(version: Any) -> str:
    # Whatever listens there may not write on the terminal as it likes.
    return "".join(char for char in str(version)[:64] if char.isprintable())
