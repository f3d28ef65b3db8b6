"""What the hub's web search and fetch need from outside, shaped by hub.web_tools."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from corral.wire.webpage import PageAddress, SearchResult


class SearchEngine(Protocol):
    """A search engine that the operator chose."""

    async def search(self, query: str, count: int) -> Sequence[SearchResult]:
        """The best results, at most so many. Raises: upstream_failed."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class FetchedPage:
    """What an address led to. address: where it was in the end. media_type: lower case, without parameters. text: decoded, cut
    off where it is too long."""

    address: PageAddress
    media_type: str
    text: str


class PageFetcher(Protocol):
    """Reads public web pages, and nothing else that this machine can reach."""

    async def fetch(self, address: PageAddress) -> FetchedPage:
        """Raises: upstream_failed, in words that do not tell what is inside the operator's network; bad_request for a redirect to
        what is no page's address."""
        ...
