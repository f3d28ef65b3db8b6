"""What local servers ask the hub for beside models: web search, web fetch, and which models it recommends.

The first two are for whoever may run models, and are called under /api/experimental on a local server. The last is for anybody,
and tells what anybody may see. Source: ollama server/routes.go webExperimentalProxyHandler, server/model_recommendations.go,
docs/capabilities/web-search.mdx, fb30760.
"""

from collections.abc import Awaitable, Callable, Sequence

from starlette.requests import Request
from starlette.responses import Response

from corral.core.policy import CLIENT_PROOFS, PUBLIC, Access
from corral.core.records import Capability, Model, Scope
from corral.edges.asgi import Endpoint, body_of, caller_of, endpoint, json_response
from corral.hub.web_tools import WebTools
from corral.wire.names import DEFAULT_TAG, cloud_tag
from corral.wire.native import decode
from corral.wire.recommendations import RECOMMENDATIONS_PATH, Recommendation, recommendations_body
from corral.wire.webpage import FetchRequest, search_request

_MAX_BODY_BYTES = 16 * 1024
_MAX_RECOMMENDATIONS = 20


class WebToolsApi:
    """The hub's handlers. public_models: the hosted models that anybody may use."""

    def __init__(self, tools: WebTools, public_models: Callable[[], Awaitable[Sequence[Model]]]) -> None:
        self._tools = tools
        self._public_models = public_models

    def endpoints(self) -> list[Endpoint]:
        """Every route."""
        access = Access(CLIENT_PROOFS, Scope.INFERENCE)
        return [
            endpoint("POST", "/api/web_search", self.search, access, max_body_bytes=_MAX_BODY_BYTES, cancel_on_disconnect=True),
            endpoint("POST", "/api/web_fetch", self.fetch, access, max_body_bytes=_MAX_BODY_BYTES, cancel_on_disconnect=True),
            endpoint("GET", RECOMMENDATIONS_PATH, self.recommendations, PUBLIC),
        ]

    async def search(self, request: Request) -> Response:
        """Search the web, by the engine that the operator chose."""
        asked = search_request(body_of(request))
        return json_response({"results": await self._tools.search(caller_of(request), asked.query, asked.count)})

    async def fetch(self, request: Request) -> Response:
        """A public web page as text, with its title and links."""
        asked = decode(body_of(request), FetchRequest)
        return json_response(await self._tools.fetch(caller_of(request), asked.url))

    async def recommendations(self, request: Request) -> Response:
        """Models of this hub that anybody may run."""
        models = (await self._public_models())[:_MAX_RECOMMENDATIONS]
        return json_response(recommendations_body([recommendation_of(model) for model in models]))


def recommendation_of(model: Model) -> Recommendation:
    """A hosted model as clients list it. An answer can be as long as what the model may look back at, and no longer."""
    details = model.details
    facts = [details.family, details.parameter_size, details.quantization_level]
    able = [str(capability) for capability in Capability if capability in model.capabilities]
    length = details.context_length or 0
    return Recommendation(
        model=cloud_tag(model.name.short.removesuffix(f":{DEFAULT_TAG}")),
        description=", ".join([" ".join(fact for fact in facts if fact), *able]).removeprefix(", "),
        context_length=length,
        max_output_tokens=length,
    )
