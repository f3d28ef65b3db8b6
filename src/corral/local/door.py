"""The one place where a secured local server finds out who sends a request.

Accepted are the stock signature, as `ollama` sends it with OLLAMA_AUTH; the strong one, as our own commands send it where others
can read along; and an API key as Bearer, in `x-api-key`, too, where Anthropic's SDK sends it. All are looked up in
`authorized_keys`, which is read anew whenever it changed. The order for a signature is the hub's: form → time → signature → only
then the look-up, so that a stranger cannot find out which keys are known; whatever is wrong about a credential has the one answer
`unauthorized`, and the reason stands in the log. Only whoever has proven to hold a key hears that its line does not fit.

The stock signature covers neither body nor host (W1, W6): on a line that others can read, the marks and counters here leave a
thief a minute, and docs/share-a-box.md says what closes that. The strong one covers both. The host it covers is the one that the
request names, which the guard has held to be ours or an address: of two servers that know a device, one could pass such a
request on to the other, unchanged and once. Source: security.md 1.3, 1.4; hub.door.
"""

import logging
from collections import OrderedDict
from collections.abc import Callable, Sequence
from datetime import datetime
from typing import Final, Protocol

from corral.core.local_rights import comes_from_here, lines_of_device, lines_of_digest, why_not_in_force
from corral.core.ports import Clock
from corral.core.records import Account, Principal, Proof, RequestFacts
from corral.wire import signing, strong
from corral.wire.apikeys import parse_api_key
from corral.wire.authorized_keys import AuthorizedKey, AuthorizedKeys, key_digest, short_digest
from corral.wire.errors import CorralError
from corral.wire.signing import DevicePublicKey

#: Where Anthropic's SDK puts its key into a header of its own.
_ANTHROPIC: Final = "/v1/messages"
_MAX_COMPLAINTS: Final = 20
_NOBODY: Final = "a request without an API key or a signature"
#: Neither term is named: where a line counts from, and until when, is its administrator's to say.
UNFIT: Final = "unauthorized: this key is known here, but its line in authorized_keys does not apply to this request"
#: Longer than any strong signature is taken for, whatever the clocks.
_NONCE_NS: Final = 4 * strong.MAX_AGE_S * 10**9

_log = logging.getLogger("corral.server")


class Replay(Protocol):
    """hub.replay.ReplayGuard."""

    def check_mark(self, key: bytes, ts: int) -> None: ...

    def count(self, key: bytes, message: bytes) -> int: ...

    @property
    def uses_per_minute(self) -> int: ...


class Nonces:
    """Which strong signatures were used already. Only those of known devices come here, so nobody else can fill it."""

    def __init__(self, clock: Clock, *, capacity: int = 100_000) -> None:
        self._clock = clock
        self._capacity = capacity
        self._used: OrderedDict[tuple[bytes, str], int] = OrderedDict()

    def use(self, key: bytes, nonce: str) -> bool:
        """Whether it was not used before; it is now. Raises: unavailable when there is no room to remember it."""
        now = self._clock.monotonic_ns()
        while self._used and now - next(iter(self._used.values())) > _NONCE_NS:
            self._used.popitem(last=False)
        if (key, nonce) in self._used:
            return False
        if len(self._used) >= self._capacity:
            raise CorralError("unavailable", "too many signed requests; try again in a minute", retry_after_s=60)
        self._used[key, nonce] = now
        return True


class LocalDoor:
    """Authenticates requests to a secured local server.

    keys: the file as it is now; quick, asked for every request. where: what the log calls it. admits_this_machine: requests of
    programs on this machine need no credential. guess: called with a network for every wrong credential; raises rate_limited.
    is_news: (what, about whom) -> whether that was not logged lately.
    """

    def __init__(
        self,
        keys: Callable[[], AuthorizedKeys],
        *,
        where: str,
        admits_this_machine: bool,
        clock: Clock,
        replay: Replay,
        guess: Callable[[str], None],
        is_news: Callable[[str, str], bool],
    ) -> None:
        self._keys = keys
        self._where = where
        self.admits_this_machine = admits_this_machine
        self._clock = clock
        self._replay = replay
        self._guess = guess
        self._is_news = is_news
        self._nonces = Nonces(clock)
        self._told: AuthorizedKeys | None = None

    def keys(self) -> AuthorizedKeys:
        """The file as it is now. What is wrong with it is logged once for each state of it."""
        keys = self._keys()
        if keys is not self._told:
            self._told = keys
            for complaint in keys.complaints[:_MAX_COMPLAINTS]:
                _log.warning("%s: %s", self._where, complaint)
            if len(keys.complaints) > _MAX_COMPLAINTS:
                _log.warning("%s: %d more lines grant nothing", self._where, len(keys.complaints) - _MAX_COMPLAINTS)
        return keys

    def asks(self, network: str, headers: dict[str, list[str]]) -> bool:
        """Whether a request from there must show a credential."""
        return not (self.admits_this_machine and comes_from_here(network, headers))

    def turns_away(self, network: str, headers: dict[str, list[str]]) -> bool:
        """The same of a request that shows none, which the log tells of."""
        is_asked = self.asks(network, headers)
        if is_asked:
            self._note(_NOBODY, network, "callers from there need one")
        return is_asked

    async def authenticate(self, facts: RequestFacts) -> Principal | None:
        """Who sends this; None for a program of this machine where those need not say. What such a one shows is not looked at:
        SDKs send a key because they must. Raises: unauthorized, clock_skew, stale_signature, two_credentials, rate_limited."""
        if not self.asks(facts.network, facts.headers):
            return None
        try:
            proof, presented = _presented(facts)
        except CorralError as error:
            if error.code == "unauthorized":
                self._note(_NOBODY, facts.network, "callers from there need one")
            raise
        match proof:
            case Proof.API_KEY:
                entry = self._by_key(presented, facts)
            case Proof.STRONG_SIGNATURE:
                entry = self._by_strong_signature(facts)
            case _:
                entry = self._by_signature(presented, facts)
        return Principal(
            account=_account(entry, self._clock.now()),
            proof=proof,
            credential_id=entry.fingerprint,
            scopes=frozenset(),
            authorized=entry,
        )

    async def confirm(self, principal: Principal) -> None:
        """Once more, when a body has come that took its time. Raises: unauthorized when the line that let its sender in is gone,
        has other terms, or has expired."""
        entry, now = principal.authorized, self._clock.now()
        if entry is not None and (entry.terms.expires_at is None or now < entry.terms.expires_at):
            # Not by the line's number, which any line above it changes.
            for line in self.keys().entries:
                if (line.fingerprint, line.terms) == (entry.fingerprint, entry.terms):
                    return
        raise CorralError("unauthorized")

    def _by_key(self, text: str, facts: RequestFacts) -> AuthorizedKey:
        key = parse_api_key(text)
        if key is None:
            raise self._refused("something that is no API key of Corral's", facts)
        digest = key_digest(key)
        return self._fitting(lines_of_digest(self.keys(), digest), f"the API key {short_digest(digest)}", facts)

    def _by_signature(self, header: str, facts: RequestFacts) -> AuthorizedKey:
        message, now = signing.request_challenge(facts.method, facts.target), self._clock.now()
        try:
            proof = signing.parse_authorization(header)
            ts = signing.parse_ts(facts.target.partition("?")[2])
            signing.check_window(ts, now.timestamp())
            signing.verify(proof, message)
        except CorralError as error:
            if error.code != "unauthorized":
                raise
            raise self._refused("a signature that is wrong", facts) from error
        entry = self._line_of(proof.key, facts)
        self._check_replay(proof.key, ts, message)
        return entry

    def _by_strong_signature(self, facts: RequestFacts) -> AuthorizedKey:
        # By the scheme that our commands use it with. Whoever stands between us and a caller by https must be trusted anyway.
        url, now = f"http://{facts.headers['host'][0]}{facts.target}", self._clock.now()
        headers = {name: ", ".join(values) for name, values in facts.headers.items()}
        try:
            proof = strong.verify_headers(facts.method, url, headers, body=facts.body, now=now.timestamp())
        except CorralError as error:
            if error.code != "unauthorized":
                raise
            raise self._refused("a strong signature that is wrong", facts) from error
        entry = self._line_of(proof.key, facts)
        if not self._nonces.use(proof.key.raw, proof.nonce):
            raise self._refused(f"a signature of {entry.fingerprint} that was used before", facts)
        return entry

    def _line_of(self, key: DevicePublicKey, facts: RequestFacts) -> AuthorizedKey:
        return self._fitting(lines_of_device(self.keys(), key), f"the device {key.fingerprint}", facts)

    def _fitting(self, lines: Sequence[AuthorizedKey], who: str, facts: RequestFacts) -> AuthorizedKey:
        """The first line whose terms fit; of a key that the caller has proven to hold. Raises: unauthorized, rate_limited."""
        now, reasons = self._clock.now(), []
        for entry in lines:
            reason = why_not_in_force(entry, network=facts.network, now=now)
            if not reason:
                return entry
            reasons.append(f"line {entry.number} of {self._where} {reason}")
        refused = self._refused(who, facts, "; ".join(reasons[:_MAX_COMPLAINTS]))
        if reasons:
            refused = CorralError("unauthorized", UNFIT, detail={"is_known": True})
        raise refused

    def _check_replay(self, key: DevicePublicKey, ts: int, message: bytes) -> None:
        self._replay.check_mark(key.raw, ts)
        if self._replay.count(key.raw, message) > self._replay.uses_per_minute:
            text = "this signed request was sent too often; sign again with the current time"
            raise CorralError("rate_limited", text, retry_after_s=1)

    def _refused(self, who: str, facts: RequestFacts, why: str = "") -> CorralError:
        """The one answer, and a line in the log that tells an administrator what to add or to mend. Raises: rate_limited."""
        self._guess(facts.network)
        self._note(who, facts.network, why or f"no line of {self._where} lets it in now")
        return CorralError("unauthorized")

    def _note(self, who: str, network: str, why: str) -> None:
        if self._is_news(who, network):
            _log.warning("refused %s from %s: %s", who, network, why)


def _presented(facts: RequestFacts) -> tuple[Proof, str]:
    """The one credential of a request. Raises: unauthorized for none and for a scheme that is not ours, two_credentials."""
    authorizations = facts.headers.get("authorization", [])
    # SDKs send an empty x-api-key when they were given a bearer token instead.
    keys = [value for value in facts.headers.get("x-api-key", []) if value] if _is_anthropic(facts.target) else []
    is_strong = strong.is_strong(facts.headers)
    if len(authorizations) + len(keys) + is_strong > 1:
        raise CorralError("two_credentials")
    if is_strong:
        return Proof.STRONG_SIGNATURE, ""
    if keys:
        return Proof.API_KEY, keys[0]
    if not authorizations:
        raise CorralError("unauthorized")
    if signing.looks_like_device_header(authorizations[0]):
        return Proof.STOCK_SIGNATURE, authorizations[0]
    scheme, _, rest = authorizations[0].partition(" ")
    if scheme.lower() != "bearer":
        raise CorralError("unauthorized")
    return Proof.API_KEY, rest.strip()


def _is_anthropic(target: str) -> bool:
    path = target.partition("?")[0]
    return path == _ANTHROPIC or path.startswith(f"{_ANTHROPIC}/")


def _account(entry: AuthorizedKey, now: datetime) -> Account:
    """Whoever holds the line. A local server has no accounts; the name is what logs call the caller."""
    return Account(id=entry.fingerprint, name=entry.name, email="", is_admin=False, created_at=now)
