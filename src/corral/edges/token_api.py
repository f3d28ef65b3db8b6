"""`/v2/token`: where registry clients fetch their tokens, with a device's signature, an account and API key, or nothing.

Source: distribution docs, spec/auth/token.md (GET) and spec/auth/oauth.md (POST). Asking for more than one may have is no error:
the token is good for what remains, and the registry says later what was missing.
"""

from collections.abc import Awaitable, Callable, Sequence
from datetime import UTC

from starlette.requests import Request
from starlette.responses import Response

from corral.core.policy import PUBLIC, REGISTRY_TOKENS
from corral.core.records import Principal, Visitor
from corral.core.registry import Grant
from corral.edges.asgi import Dialect, Endpoint, endpoint, facts_of, json_response, maybe_caller, maybe_visitor
from corral.edges.forms import MAX_FORM_BYTES, query_of, read_form
from corral.hub.checks import TOKEN_PATH
from corral.hub.credentials import Credentials
from corral.hub.tokens import RegistryTokens
from corral.wire.errors import CorralError
from corral.wire.registry import ScopeRequest, parse_scopes, scope_text

#: (caller, what is asked for) -> the actions of it that the caller may have now.
Grantable = Callable[[Principal | None, ScopeRequest], Awaitable[frozenset[str]]]


class TokenApi:
    """Handlers of the token endpoint."""

    def __init__(self, *, tokens: RegistryTokens, credentials: Credentials, grantable: Grantable) -> None:
        self._tokens = tokens
        self._credentials = credentials
        self._grantable = grantable

    def endpoints(self) -> list[Endpoint]:
        """GET proves who asks by its headers, POST by its form."""
        registry, limit = Dialect.REGISTRY, MAX_FORM_BYTES
        return [
            endpoint("GET", TOKEN_PATH, self.get_token, REGISTRY_TOKENS, dialect=registry),
            endpoint("POST", TOKEN_PATH, self.post_token, PUBLIC, dialect=registry, max_body_bytes=limit),
        ]

    async def get_token(self, request: Request) -> Response:
        """A token for whoever signed, showed an account and API key, or nothing. `service`, `account`, `client_id` and
        `offline_token` change nothing: there is one service, the credential says the account, and no token outlives its hour."""
        return await self._token(maybe_caller(request) or maybe_visitor(request), query_of(request).fields.get("scope", ()))

    async def post_token(self, request: Request) -> Response:
        """The same by a form with `grant_type=password`. Raises: two_credentials, unsupported, unauthorized."""
        if maybe_caller(request) or maybe_visitor(request):
            raise CorralError("two_credentials")
        form = read_form(request)
        if form.text("grant_type") != "password":
            # 400 and not 405: docker takes that for an endpoint without POST and asks again by GET.
            raise CorralError("unsupported", "the only grant_type here is password, with an API key as the password", status=400)
        caller = await self._credentials.by_named_key(form.text("username"), form.text("password"), facts_of(request))
        return await self._token(caller, form.fields.get("scope", ()))

    async def _token(self, caller: Principal | Visitor | None, asked: Sequence[str]) -> Response:
        principal = caller if isinstance(caller, Principal) else None
        grants = [Grant(scope.repository, await self._grantable(principal, scope)) for scope in parse_scopes(asked)]
        granted = [grant for grant in grants if grant.actions]
        issued = self._tokens.issue(caller, granted)
        text = issued.text.reveal()
        response = json_response(
            {
                "token": text,
                "access_token": text,
                "expires_in": issued.expires_in_s,
                "issued_at": issued.issued_at.astimezone(UTC).isoformat().replace("+00:00", "Z"),
                "scope": " ".join(scope_text(grant.repository, grant.actions) for grant in granted),
            }
        )
        response.headers["Cache-Control"] = "no-store"
        return response


def token_endpoints(*, tokens: RegistryTokens, credentials: Credentials, grantable: Grantable) -> list[Endpoint]:
    """The routes of the token endpoint. grantable: see `hub.repositories`."""
    return TokenApi(tokens=tokens, credentials=credentials, grantable=grantable).endpoints()
