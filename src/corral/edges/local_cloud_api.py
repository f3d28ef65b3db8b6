"""Routes of the local server that are answered by the hub whatever models are installed: web search, web fetch, recommendations.

Source: ollama server/routes.go webExperimentalProxyHandler, ModelRecommendationsExperimentalHandler, fb30760.
"""

from starlette.requests import Request
from starlette.responses import Response

from corral.core.local_rights import check_cloud, may_use_cloud
from corral.core.policy import READS, USES
from corral.edges.asgi import Endpoint, body_of, endpoint, facts_of, json_response, maybe_caller
from corral.edges.local_api import relayed_response
from corral.local.cloud import CloudAccess
from corral.wire.errors import CorralError
from corral.wire.recommendations import RECOMMENDATIONS_PATH, recommendations_body


class LocalCloudApi:
    """The handlers."""

    def __init__(self, cloud: CloudAccess) -> None:
        self._cloud = cloud

    def endpoints(self) -> list[Endpoint]:
        """Every route."""
        return [
            endpoint("POST", "/api/experimental/web_search", self.web_search, USES, cancel_on_disconnect=True),
            endpoint("POST", "/api/experimental/web_fetch", self.web_fetch, USES, cancel_on_disconnect=True),
            endpoint("GET", RECOMMENDATIONS_PATH, self.recommendations, READS),
        ]

    async def web_search(self, request: Request) -> Response:
        """Search the web at the hub, signed by this device."""
        return await self._passed_on(request, "/api/web_search", "web search is unavailable")

    async def web_fetch(self, request: Request) -> Response:
        """Have the hub fetch a web page, signed by this device."""
        return await self._passed_on(request, "/api/web_fetch", "web fetch is unavailable")

    async def recommendations(self, request: Request) -> Response:
        """Models that the hub recommends; none to a caller who may not use it."""
        if not may_use_cloud(maybe_caller(request)):
            return json_response(recommendations_body([]))
        return json_response(recommendations_body(await self._cloud.recommendations()))

    async def _passed_on(self, request: Request, path: str, operation: str) -> Response:
        check_cloud(maybe_caller(request))
        facts, body = facts_of(request), body_of(request)
        if not body.strip():
            raise CorralError("bad_request", "missing request body")
        self._cloud.require_on(operation)
        query = facts.target.partition("?")[2]
        answer = await self._cloud.relay("POST", path, query=query, headers=facts.headers, body=body)
        return await relayed_response(answer, path)
