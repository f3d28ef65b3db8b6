"""Limits on guessing: how many attempts fit into a moving window, told by the clock that the hub was given.

The arithmetic is that of `limits`; its own memory storage reads the machine's clock and starts timer threads, so what it
counts in is kept here. It holds a bounded number of keys: an attacker with many addresses must not be able to fill the
memory.
"""

from collections import OrderedDict, deque

from limits import RateLimitItem, RateLimitItemPerMinute
from limits.storage import MovingWindowSupport, Storage
from limits.strategies import MovingWindowRateLimiter

from corral.core.ports import Clock
from corral.wire.errors import CorralError


class Throttle:
    """Several limits that an attempt must all pass."""

    def __init__(self, clock: Clock, *, max_keys: int = 100_000) -> None:
        self._clock = clock
        self._storage = _ClockedStorage(clock, max_keys)
        self._limiter = MovingWindowRateLimiter(self._storage)

    def attempt(self, *attempts: tuple[RateLimitItem, tuple[str, ...]]) -> None:
        """Count one attempt against every limit, or against none when one of them is used up: else whoever goes on beyond
        a narrow limit uses up the wide one, which is everybody's. Counted before the work, not after a failure: parallel
        guesses would all pass otherwise. Raises: rate_limited, with the longest of the waits."""
        waits = [self._wait_s(limit, who) for limit, who in attempts if not self._limiter.test(limit, *who)]
        if waits:
            raise CorralError("rate_limited", f"too many attempts; try again in {max(waits)} s", retry_after_s=max(waits))
        for limit, who in attempts:
            self._limiter.hit(limit, *who)

    def _wait_s(self, limit: RateLimitItem, who: tuple[str, ...]) -> int:
        reset_at = self._limiter.get_window_stats(limit, *who).reset_time
        return max(1, round(reset_at - self._clock.now().timestamp()))

    def forgive(self, limit: RateLimitItem, who: tuple[str, ...]) -> None:
        """Forget the attempts counted for one key, after one that succeeded."""
        self._limiter.clear(limit, *who)


def per_minutes(amount: int, minutes: int) -> RateLimitItem:
    """So many attempts in any stretch of so many minutes."""
    return RateLimitItemPerMinute(amount, minutes)


class _ClockedStorage(Storage, MovingWindowSupport):
    """The times of attempts per key, oldest first. The least lately used key is forgotten when there are too many."""

    def __init__(self, clock: Clock, max_keys: int) -> None:
        super().__init__()
        self._clock = clock
        self._max_keys = max_keys
        self._times: OrderedDict[str, deque[float]] = OrderedDict()

    def acquire_entry(self, key: str, limit: int, expiry: int, amount: int = 1) -> bool:
        times = self._recent(key, expiry)
        if len(times) + amount > limit:
            return False
        times.extend([self._clock.now().timestamp()] * amount)
        self._times[key] = times
        self._times.move_to_end(key)
        while len(self._times) > self._max_keys:
            self._times.popitem(last=False)
        return True

    def get_moving_window(self, key: str, limit: int, expiry: int) -> tuple[float, int]:
        times = self._recent(key, expiry)
        return (times[0] if times else self._clock.now().timestamp()), len(times)

    def _recent(self, key: str, expiry: int) -> deque[float]:
        times = self._times.get(key) or deque()
        start = self._clock.now().timestamp() - expiry
        while times and times[0] <= start:
            times.popleft()
        return times

    def clear(self, key: str) -> None:
        self._times.pop(key, None)

    # What the other strategies of `limits` need; the moving window does not.
    @property
    def base_exceptions(self) -> type[Exception]:
        return ValueError

    def incr(self, key: str, expiry: float, amount: int = 1) -> int:
        raise NotImplementedError

    def get(self, key: str) -> int:
        raise NotImplementedError

    def get_expiry(self, key: str) -> float:
        raise NotImplementedError

    def check(self) -> bool:
        return True

    def reset(self) -> int | None:
        self._times.clear()
        return None
