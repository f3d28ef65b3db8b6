"""The built-in `web_search` tool of OpenAI's responses and Anthropic's messages: how a model is shown it, and what happens when
it uses it. Pure.

A model sees an ordinary function with a query; a caller sees searches that the server ran. What was found is text of strangers
that goes into a prompt, so it is cut, kept to its lines, and cannot spell the marks that separate turns in a template
(security.md T122). Source: ollama middleware/web_search.go, openai/responses.go, anthropic/anthropic.go, fb30760.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from corral.wire.errors import CorralError
from corral.wire.native import ToolCall
from corral.wire.webpage import SearchResult, plain_result

NAME: Final = "web_search"
#: Searches in one answer.
MAX_SEARCHES: Final = 3
#: Results of one search.
RESULTS: Final = 5
#: Of a query, in characters: what the hub takes.
_MAX_QUERY: Final = 2000

#: The function that stands for the tool, as a native request has its tools.
FUNCTION: Final[Mapping[str, Any]] = {
    "type": "function",
    "function": {
        "name": NAME,
        "description": "Search the web for current information.",
        "parameters": {
            "type": "object",
            "required": ["query"],
            "properties": {"query": {"type": "string", "description": "The search query."}},
        },
    },
}


# ── What happens ─────────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True, slots=True)
class SearchBegun:
    """The model wants something searched for. number: 1 for the first search of an answer."""

    number: int
    query: str


@dataclass(frozen=True, slots=True)
class SearchDone:
    """What was found by the search that began last."""

    number: int
    query: str
    results: Sequence[SearchResult]


@dataclass(frozen=True, slots=True)
class SearchFailed:
    """The search that began last gave nothing, or was not even tried: the answer ends here. error_code: as Anthropic's dialect
    says it."""

    number: int
    query: str
    error_code: str
    error: "SearchError"


SearchEvent = SearchBegun | SearchDone | SearchFailed


class SearchError(CorralError):
    """Why a search of the server failed. response_code: as OpenAI's responses say it."""

    def __init__(self, message: str, *, status: int | None = None, retry_after_s: int | None = None) -> None:
        super().__init__("upstream_failed", message, status=status, retry_after_s=retry_after_s)
        self.response_code = {401: "authentication_error", 429: "rate_limit_exceeded"}.get(self.status, "api_error")

    @classmethod
    def of(cls, error: CorralError) -> "SearchError":
        """The same error, said as one of the search. In this form nobody looks for a link to sign in at, so it is in the text."""
        link = error.detail.get("signin_url")
        message = f"{error.message}; sign in at {link}" if isinstance(link, str) else error.message
        return cls(message, status=error.status, retry_after_s=error.retry_after_s)


# ── Reading calls and results ────────────────────────────────────────────────────────────────────────────────────────


def search_call(calls: Sequence[ToolCall]) -> ToolCall | None:
    """The first call of the tool, if there is any."""
    return next((call for call in calls if call.function.name == NAME), None)


def is_built_in(kind: object) -> bool:
    """Whether a declared tool's type means this tool: both dialects put a date behind it, and one a `_preview`."""
    return isinstance(kind, str) and kind.startswith(NAME)


def query_of(call: ToolCall) -> str:
    """What the model wants to know, on one line; empty when it does not say."""
    query = call.function.arguments.get("query")
    return " ".join(query[:_MAX_QUERY].split()) if isinstance(query, str) else ""


def plain_results(rows: Sequence[Any]) -> list[SearchResult]:
    """Another server's results within bounds; those that are none are left out."""
    found = [plain_result(row.get("title"), row.get("url"), row.get("content")) for row in rows if isinstance(row, dict)]
    return [result for result in found if result is not None][:RESULTS]


#: Where something begins that a template may write between turns, and that the engine would read as one token: `<|im_start|>`,
#: `</s>`, `<start_of_turn>`, `<｜User｜>`, `[INST]`.
_MARK: Final = re.compile(r"(<)(?=[|｜/a-zA-Z_])|(\[)(?=/?[A-Z_]+\])")


def results_text(results: Sequence[SearchResult]) -> str:
    """What the model reads of a search."""
    return "".join(_result_text(result) for result in results)


def _result_text(result: SearchResult) -> str:
    content = f"Content: {_harmless(result.content)}\n" if result.content else ""
    return f"Title: {_harmless(result.title)}\nURL: {_harmless(result.url)}\n{content}\n"


def _harmless(text: str) -> str:
    return _MARK.sub(r"\1\2 ", text)
