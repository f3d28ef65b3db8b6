"""Web search and fetch for the hub's accounts, as ollama.com offers them: asked for by a tool, answered with text.

Whoever may run models may search. Each account has a limit by the minute, all together one of requests at a time, and every
request leaves a usage entry. What comes back is text for a model; nothing here reads it (security.md T122).
"""

import asyncio
import contextlib
from collections import Counter
from collections.abc import AsyncIterator, Iterator, Sequence
from typing import Final

from corral.core.ports import Clock
from corral.core.records import Principal, UsageEntry
from corral.core.web import FetchedPage, PageFetcher, SearchEngine
from corral.hub.metering import UsageMeter
from corral.hub.throttle import Throttle, per_minutes
from corral.wire.errors import CorralError
from corral.wire.web_search import RESULTS
from corral.wire.webpage import SearchResult, WebPage, page_of_html, page_of_text, parse_page_address

SEARCH, FETCH = "web_search", "web_fetch"
#: Of each account, for either.
_PER_MINUTE: Final = 60
#: Of all accounts together. More wait for a moment, and then are turned away.
_AT_ONCE: Final = 32
_WAIT_S: Final = 10.0
#: Of one account, so that a few who fetch pages that never end do not take every place.
_AT_ONCE_EACH: Final = 8
_HTML: Final = frozenset({"text/html", "application/xhtml+xml"})
_TEXT: Final = frozenset({"application/json", "application/xml", "application/rss+xml", "application/atom+xml"})


class WebTools:
    """Searches and fetches. engine, fetcher: None where the operator set up none."""

    def __init__(self, *, engine: SearchEngine | None, fetcher: PageFetcher | None, usage: UsageMeter, clock: Clock) -> None:
        self._engine = engine
        self._fetcher = fetcher
        self._usage = usage
        self._clock = clock
        self._throttle = Throttle(clock)
        self._places = asyncio.Semaphore(_AT_ONCE)
        self._of_account: Counter[str] = Counter()

    async def search(self, caller: Principal, query: str, count: int) -> Sequence[SearchResult]:
        """At most so many results. Raises: not_supported where there is no engine; rate_limited, busy, upstream_failed."""
        if self._engine is None:
            raise CorralError("not_supported", "web search is not set up on this hub; its administrator sets CORRAL_SEARCH_URL")
        async with self._used(caller, SEARCH):
            return (await self._engine.search(query, count))[:count]

    async def search_for(self, caller: Principal | None, query: str) -> Sequence[SearchResult]:
        """What a model that this account runs wants to know. Raises: unauthorized; as search."""
        if caller is None:
            raise CorralError("unauthorized")
        return await self.search(caller, query, RESULTS)

    async def fetch(self, caller: Principal, url: str) -> WebPage:
        """A page as text. Raises: bad_request; not_supported where pages are not fetched; rate_limited, busy, upstream_failed."""
        if self._fetcher is None:
            raise CorralError("not_supported", "web fetch is not set up on this hub; its administrator sets CORRAL_WEB_FETCH=on")
        address = parse_page_address(url)
        async with self._used(caller, FETCH):
            return await asyncio.to_thread(_read, await self._fetcher.fetch(address))

    @contextlib.asynccontextmanager
    async def _used(self, caller: Principal, tool: str) -> AsyncIterator[None]:
        self._throttle.attempt((per_minutes(_PER_MINUTE, 1), (tool, caller.account.id)))
        started_at, started_ns, outcome = self._clock.now(), self._clock.monotonic_ns(), "ok"
        try:
            with self._share(caller.account.id):
                async with self._place():
                    yield
        except CorralError as error:
            outcome = error.code
            raise
        except asyncio.CancelledError:
            outcome = "canceled"
            raise
        finally:
            self._usage.record(
                UsageEntry(
                    account_id=caller.account.id,
                    credential_id=caller.credential_id,
                    proof=caller.proof,
                    model=tool,
                    path=f"/api/{tool}",
                    started_at=started_at,
                    duration_ns=self._clock.monotonic_ns() - started_ns,
                    prompt_tokens=0,
                    eval_tokens=0,
                    outcome=outcome,
                )
            )

    @contextlib.contextmanager
    def _share(self, account_id: str) -> Iterator[None]:
        if self._of_account[account_id] >= _AT_ONCE_EACH:
            text = f"this account has {_AT_ONCE_EACH} searches under way; wait for one to end"
            raise CorralError("rate_limited", text, retry_after_s=5)
        self._of_account[account_id] += 1
        try:
            yield
        finally:
            self._of_account[account_id] -= 1
            if not self._of_account[account_id]:
                del self._of_account[account_id]

    @contextlib.asynccontextmanager
    async def _place(self) -> AsyncIterator[None]:
        try:
            async with asyncio.timeout(_WAIT_S):
                await self._places.acquire()
        except TimeoutError:
            raise CorralError("busy", "too many searches are under way; try again in a moment", retry_after_s=5) from None
        try:
            yield
        finally:
            self._places.release()


def _read(page: FetchedPage) -> WebPage:
    """The page as text. Raises: upstream_failed for what is none."""
    if page.media_type in _HTML:
        return page_of_html(page.text, str(page.address))
    if page.media_type.startswith("text/") or page.media_type in _TEXT:
        return page_of_text(page.text)
    raise CorralError("upstream_failed", "the page is neither HTML nor text")
