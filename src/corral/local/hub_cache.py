"""What the hub said of its models, kept for a minute: given at once, and asked for again behind the caller's back.

Theory of operation. An answer is *fresh* for FRESH_S, then *stale* until it is BOUND_S old: a stale one is still given, and
starts one refresh. An older one is not given. So a model that was made private, changed or withdrawn, and an account whose device
was revoked at the hub, is shown for BOUND_S at the longest, and only until the next refresh where somebody asks. What may differ
between two accounts is never mixed up: an answer is kept for the hub, the device key and the session it was asked with, and a
session ends, with all that it kept, when the device signs out, when the hub does not know it any more, and when the hub names
another account than before.

Nothing is asked for before somebody asks, and nothing is written to disk. Source: ollama server/model_show_cache.go, fb30760,
which hydrates at start and keeps entries for ever (docs/divergences.md).
"""

from collections import OrderedDict
from collections.abc import Awaitable, Callable, Hashable, Mapping
from dataclasses import dataclass
from typing import Final

import msgspec

from corral.core.ports import Clock
from corral.local.background import Background
from corral.wire.errors import CorralError

FRESH_S: Final = 5.0
#: The documented bound: nothing older is ever shown.
BOUND_S: Final = 60.0
#: How long a refresh may take.
_REFRESH_S: Final = 3.0
_MAX_ENTRIES: Final = 256
#: Larger answers list tensors, and are hardly asked for twice.
_MAX_ENTRY_BYTES: Final = 256 * 1024
_MAX_BYTES: Final = 8 * 1024 * 1024
#: A request with any other member asks for something that depends on it.
_MEMBERS: Final = frozenset({"model", "name", "verbose"})

Fetch = Callable[[], Awaitable[bytes]]


@dataclass(frozen=True, slots=True)
class _Kept:
    body: bytes
    at_ns: int


def cacheable(fields: Mapping[str, msgspec.Raw]) -> bool | None:
    """Whether a show request is verbose, when its answer depends on nothing else but the model; None when it does."""
    names = {name.lower() for name in fields}
    # Of two spellings of one member, the hub may mean the other.
    if len(names) < len(fields) or not names <= _MEMBERS:
        return None
    raw = next((bytes(value) for name, value in fields.items() if name.lower() == "verbose"), b"false")
    return {b"true": True, b"false": False, b"null": False}.get(raw)


class HubCache:
    """Answers of the hub that are the same for every caller of this server. background: where refreshes run."""

    def __init__(self, clock: Clock, background: Background) -> None:
        self._clock = clock
        self._background = background
        self._kept: OrderedDict[Hashable, _Kept] = OrderedDict()
        self._size = 0
        self._session = 0
        self._account = ""
        self._refreshing: set[Hashable] = set()

    def forget(self) -> None:
        """End the session: whoever asks from now on may be somebody else. An answer still on its way is not kept."""
        self._session += 1
        self._account = ""
        self._kept.clear()
        self._size = 0

    def note_account(self, account_id: str) -> None:
        """The hub says whose device this is."""
        if self._account and self._account != account_id:
            self.forget()
        self._account = account_id

    async def get(self, who: Hashable, what: Hashable, fetch: Fetch) -> bytes:
        """The hub's answer. who: the hub and the key it is asked with. fetch: asks it. Raises: what fetch raises."""
        key = (self._session, who, what)
        kept = self._kept.get(key)
        age_s = BOUND_S if kept is None else (self._clock.monotonic_ns() - kept.at_ns) / 1e9
        if kept is None or age_s >= BOUND_S:
            return await self._fetch(key, fetch)
        self._kept.move_to_end(key)
        is_refreshed = age_s < FRESH_S or key in self._refreshing
        if not is_refreshed and self._background.begin(lambda: self._refresh(key, fetch), time_s=_REFRESH_S):
            self._refreshing.add(key)
        return kept.body

    async def _refresh(self, key: tuple[int, Hashable, Hashable], fetch: Fetch) -> None:
        try:
            await self._fetch(key, fetch)
        finally:
            self._refreshing.discard(key)

    async def _fetch(self, key: tuple[int, Hashable, Hashable], fetch: Fetch) -> bytes:
        asked_ns = self._clock.monotonic_ns()
        try:
            body = await fetch()
        except CorralError as error:
            if error.code == "unauthorized":
                self.forget()
            elif error.code not in ("upstream_failed", "unavailable"):
                # The hub has spoken, and it is not what it was.
                self._drop(key)
            raise
        if key[0] == self._session:
            # As old as the question: what changed while the answer travelled is not in it.
            self._keep(key, _Kept(body, asked_ns))
        return body

    def _keep(self, key: Hashable, kept: _Kept) -> None:
        self._drop(key)
        if len(kept.body) > _MAX_ENTRY_BYTES:
            return
        self._kept[key] = kept
        self._size += len(kept.body)
        while self._size > _MAX_BYTES or len(self._kept) > _MAX_ENTRIES:
            self._drop(next(iter(self._kept)))

    def _drop(self, key: Hashable) -> None:
        kept = self._kept.pop(key, None)
        self._size -= len(kept.body) if kept else 0
