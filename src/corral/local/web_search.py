"""Web searches for models of this machine, which are done at the hub and signed by this device.

The hub's answer is text of strangers in the words of another server, so it is read as if nobody had looked at it before
(security.md T122). Source: ollama middleware/openai.go webSearch, fb30760.
"""

from collections.abc import Sequence
from http import HTTPStatus
from typing import Any, Final

import msgspec

from corral.core.local_rights import check_cloud
from corral.core.records import Principal
from corral.local.cloud import CloudAccess, bounded, object_of
from corral.wire.errors import CorralError
from corral.wire.text import one_line
from corral.wire.web_search import RESULTS, plain_results
from corral.wire.webpage import SearchResult

_MAX_ANSWER_BYTES: Final = 2 * 1024 * 1024
_MAX_ERROR_CHARACTERS: Final = 500
_CODES: Final = {403: "forbidden", 429: "rate_limited", 501: "not_supported", 503: "unavailable"}


class HubSearch:
    """Searches at the hub."""

    def __init__(self, cloud: CloudAccess) -> None:
        self._cloud = cloud

    async def search_for(self, caller: Principal | None, query: str) -> Sequence[SearchResult]:
        """What is found. Raises: forbidden for a caller who may not use the hub, cloud_disabled, unauthorized with a link to sign
        in at, upstream_failed, and what the hub answers."""
        check_cloud(caller)
        self._cloud.require_on("web search is unavailable")
        body = msgspec.json.encode({"query": query, "max_results": RESULTS})
        answer = await self._cloud.relay("POST", "/api/web_search", headers={}, body=body)
        try:
            told = object_of(await bounded(answer, name="answer to a web search", max_bytes=_MAX_ANSWER_BYTES))
        finally:
            await answer.close()
        if answer.status != HTTPStatus.OK:
            raise _refusal(answer.status, told)
        rows = told.get("results")
        if not isinstance(rows, list):
            raise CorralError("upstream_failed", "the hub's answer to a web search is not understood")
        return plain_results(rows)


def _refusal(status: int, told: dict[str, Any]) -> CorralError:
    text = told.get("error")
    words = one_line(text[:_MAX_ERROR_CHARACTERS]) if isinstance(text, str) else f"the hub answered {status}"
    return CorralError(_CODES.get(status, "upstream_failed"), words)
