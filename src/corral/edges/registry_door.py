"""What stands before every answer of the registry: whose name it is called by, and how a client is told to prove who it is.

A registry answers only under its own names. Its realm and its addresses follow the caller's spelling of the host, because stock
clients compare it character by character, so a name that is not ours must not get that far (T23, F25).
"""

from collections.abc import Callable

from starlette.requests import Request
from starlette.types import Scope

from corral.core.registry import Right
from corral.edges.asgi import Guard, GuardVerdict, facts_of
from corral.edges.forms import query_of
from corral.wire.errors import CorralError
from corral.wire.hosts import called_url
from corral.wire.registry import challenge_header, scope_text
from corral.wire.repositories import parse_repository

REGISTRY_PREFIX = "/v2/"
_TOKEN_PATH = "/v2/token"  # noqa: S105 - a path
_API_VERSION = ("Docker-Distribution-API-Version", "registry/2.0")
_PULLING, _PUSHING = frozenset({str(Right.PULL)}), frozenset({str(Right.PULL), str(Right.PUSH)})
_DELETING = frozenset({str(Right.DELETE)})


def base_of(request: Request, public_url: str) -> str:
    """The hub's base URL as this caller spells it."""
    return called_url(public_url, facts_of(request).headers["host"][0]) or public_url


def registry_guard(public_url: str) -> Guard:
    """Refuses registry requests under a name that is not the hub's, and marks every answer as a registry's."""

    def guard(method: str, path: str, headers: dict[str, list[str]]) -> GuardVerdict:
        hosts = headers.get("host", [""])
        if not hosts[0]:
            raise CorralError("bad_request", "exactly one valid Host header is needed")
        if not path.startswith(REGISTRY_PREFIX):
            return GuardVerdict()
        if called_url(public_url, hosts[0]) is None:
            raise CorralError("misdirected", f"this registry is at {public_url}; set CORRAL_PUBLIC_URL if that is not so")
        return GuardVerdict(headers=(_API_VERSION,))

    return guard


def registry_challenge(public_url: str, service: str) -> Callable[[Scope, CorralError], str]:
    """The WWW-Authenticate of a 401: where to get a token, and for what. service: the token endpoint's name for us."""

    def challenge(scope: Scope, error: CorralError) -> str:
        request = Request(scope)
        is_refused = "authorization" in facts_of(request).headers
        return challenge_header(
            realm=base_of(request, public_url) + _TOKEN_PATH,
            service=service,
            scope=error.detail.get("scope") or _wanted_scopes(request),
            error=error.detail.get("error") or ("invalid_token" if is_refused else ""),
        )

    return challenge


def _wanted_scopes(request: Request) -> str:
    """What a token is needed for: this request, and what follows it."""
    name = request.scope.get("path_params", {}).get("name")
    if name is None:
        return ""
    scopes = [(name, _actions(request))]
    if request.method == "POST":
        scopes += [(source, _PULLING) for source in query_of(request).fields.get("from", ())]
    return " ".join(scope_text(str(repository), actions) for text, actions in scopes if (repository := _repository(text)))


def _repository(text: str) -> object | None:
    """None for what is no name here: stock clients name files and other registries' repositories as the source of a mount."""
    try:
        return parse_repository(text)
    except CorralError:
        return None


def _actions(request: Request) -> frozenset[str]:
    parameters = request.scope["path_params"]
    is_upload = "upload_id" in parameters
    if request.method == "DELETE" and not is_upload:
        return _DELETING
    # Whoever looks for a blob is about to push it. Asked for both now, clients need not come for another token, and those work
    # that never do (oras-py goes on with the first one). Who may not push is given less.
    is_look = request.method == "HEAD" and "digest" in parameters
    return _PUSHING if is_upload or is_look or request.method not in ("GET", "HEAD") else _PULLING
