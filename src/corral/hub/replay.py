"""What one process remembers about signatures that were already used, and which alarms it raised. Bounded, forgetful.

A stock signature covers neither body nor nonce, and Ed25519 is deterministic: two honest calls to one path in one second
carry the same signature, so equal signatures cannot simply be refused (W2). Two rules stand in: a request more than a minute
older than the newest one of its device is refused, which shrinks what a thief can use from ten minutes to one, and one signed
text may be used only so many times a minute.
"""

from collections import OrderedDict
from typing import TypeVar

from corral.core.ports import Clock
from corral.wire.errors import CorralError

#: How far a request may lie behind the newest one of its device.
MARK_SLACK_S = 60
#: A device whose clock was set back is let in again after this time.
MARK_LAPSE_S = 600
K = TypeVar("K")
V = TypeVar("V")
_WINDOW_NS = 60 * 10**9


class ReplayGuard:
    """High-water marks per device and counters per signed text. uses_per_minute: how often one signed text may be used; a
    batch of embeddings honestly sends hundreds within a second. capacity: how many marks and how many counters are kept."""

    def __init__(self, clock: Clock, *, uses_per_minute: int = 600, capacity: int = 100_000) -> None:
        self._clock = clock
        self._capacity = capacity
        self._uses_per_minute = uses_per_minute
        # device key -> (highest ts, the mark: that ts or the time it was first seen if that was earlier, steady time of it)
        self._marks: OrderedDict[bytes, tuple[int, float, int]] = OrderedDict()
        # device key and signed text -> (start of its minute, uses since)
        self._uses: OrderedDict[tuple[bytes, bytes], tuple[int, int]] = OrderedDict()

    def check_mark(self, key: bytes, ts: int) -> None:
        """Refuse a time well before the newest seen, else let the newest be this one. Equal and slightly older times pass:
        several processes may share a device. Raises: stale_signature."""
        now = self._clock.monotonic_ns()
        highest, mark, seen_at = self._marks.get(key, (0, 0, 0))
        if now - seen_at >= MARK_LAPSE_S * 10**9:
            highest, mark = 0, 0
        if ts < mark - MARK_SLACK_S:
            raise CorralError("stale_signature")
        # Only a newer time moves the mark: a replayed request must not keep it from lapsing (T10).
        if ts > highest:
            # Never above our own time: one call from a clock that ran ahead would refuse the device's right ones.
            _put(self._marks, key, (ts, min(ts, self._clock.now().timestamp()), now), self._capacity)

    def count(self, key: bytes, message: bytes) -> int:
        """Count a use of a signed text and tell how many uses its minute has seen. Counted by what was signed, never by the
        text of the signature, which has several spellings (T11)."""
        now = self._clock.monotonic_ns()
        started, uses = self._uses.get((key, message), (now, 0))
        if now - started >= _WINDOW_NS:
            started, uses = now, 0
        _put(self._uses, (key, message), (started, uses + 1), self._capacity)
        return uses + 1

    @property
    def uses_per_minute(self) -> int:
        """The cap."""
        return self._uses_per_minute


class Alarms:
    """Which alarms were raised lately, so that one that goes on does not fill the audit log. capacity: how many are kept."""

    def __init__(self, clock: Clock, *, quiet_s: int = 600, capacity: int = 10_000) -> None:
        self._clock = clock
        self._quiet_ns = quiet_s * 10**9
        self._capacity = capacity
        self._raised: OrderedDict[tuple[str, str], int] = OrderedDict()

    def is_news(self, action: str, subject: str) -> bool:
        """Whether this alarm was quiet for a while; it is taken as raised then."""
        now = self._clock.monotonic_ns()
        last = self._raised.get((action, subject))
        if last is not None and now - last < self._quiet_ns:
            return False
        _put(self._raised, (action, subject), now, self._capacity)
        return True


def _put(kept: OrderedDict[K, V], key: K, value: V, capacity: int) -> None:
    kept[key] = value
    kept.move_to_end(key)
    if len(kept) > capacity:
        kept.popitem(last=False)
