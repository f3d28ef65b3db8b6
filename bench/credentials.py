"""The hub's door under what a shared hub meets: very many keys, a key that was just revoked, callers who are slow or do nothing.

Keys are written straight into the database, as `POST /api/keys` leaves them: a million requests would take an hour and show
nothing else. Those that are asked with are real ones, hashed under the hub's own pepper.
"""

import contextlib
import http.client
import json
import random
import signal
import sqlite3
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from urllib.parse import urlsplit

from bench import load
from bench.figures import started
from bench.measure import Figure, compared, in_turn, limited
from corral.storage.secretfile import load_or_create_peppers
from corral.wire.apikeys import ENTROPY_BYTES, ApiKeyText, api_key_hmac, make_api_key
from flows.stack import Stack, answers, wait_until

#: Keys of a hub; each account has ten.
SIZES = (1_000, 100_000, 1_000_000)
#: Of them, how many are asked with, each once before the first comes again.
_ASKED = 2_000
_SPREAD = 0x9E3779B97F
_REVOCATIONS = 100
_IDLE, _SLOW = 500, 200


class _Chance:
    """Entropy for keys that guard nothing."""

    def __init__(self, seed: int) -> None:
        self._random = random.Random(seed)

    def bytes(self, count: int) -> bytes:
        """So many bytes."""
        return self._random.randbytes(count)


def p11(folder: Path) -> Iterator[Figure]:
    """The check of an API key among ever more of them."""
    with contextlib.ExitStack() as stopping:
        hubs = [stopping.enter_context(_hub(folder / str(size), size)) for size in SIZES]
        few, *many = in_turn([_median_ms(stack, keys) for stack, keys in hubs], rounds=7)
        for size, taken in zip(SIZES[1:], many, strict=True):
            yield compared("P11", f"API key, {size:,} keys against {SIZES[0]:,}", taken, few, unit="ms", at_most=1.2)


@contextlib.contextmanager
def _hub(folder: Path, size: int) -> Iterator[tuple[Stack, list[str]]]:
    """A running hub with so many keys, and some of them."""
    with Stack(folder) as stack:
        stack.add_account("alice")
        keys = _fill(stack.home / ".corral", size)
        server = stack.begin("hub", "serve")
        wait_until(lambda: answers(f"{stack.hub_url}/readyz"), stack.hub_url, watch=server)
        yield stack, keys
        server.end(signal.SIGTERM)


def _median_ms(stack: Stack, keys: list[str]) -> Callable[[], float]:
    plan = load.Plan(port=_port(stack), requests=[_asking(stack, key) for key in keys], count=len(keys))
    return lambda: statistics.median(load.run(plan).check().whole) * 1000


def _port(stack: Stack) -> int:
    return int(stack.hub_url.rsplit(":", 1)[1])


def _asking(stack: Stack, key: str) -> str:
    return load.request_bytes("POST", f"{stack.hub_url}/api/me", None, {"Authorization": f"Bearer {key}"})


def _fill(home: Path, size: int) -> list[str]:
    """Accounts and keys; returns the text of some, spread among them."""
    chance, now = _Chance(size), int(time.time() * 1_000_000)
    peppers = load_or_create_peppers(home / "peppers.json", chance)
    pepper = peppers.values[peppers.current_id]
    made = [make_api_key(chance.bytes(ENTROPY_BYTES)) for _ in range(_ASKED if size > _ASKED else size)]
    # Every number once, but in no order.
    others = (f"{number * _SPREAD % 2**40:010x}" for number in range(size - len(made)))

    def row(public_id: str, owner: int, digest: bytes) -> tuple[object, ...]:
        return public_id, f"a{owner}", "ci", "crlk_0000", "inference", digest, peppers.current_id, now, ""

    def digest(key: ApiKeyText) -> bytes:
        return api_key_hmac(key, pepper)

    with contextlib.closing(sqlite3.connect(home / "hub.db")) as connection, connection:
        accounts = ((f"a{number}", f"user{number}", f"user{number}", "", "", 0, now) for number in range(size // 10))
        columns = "id, name, name_key, email, password_hash, is_admin, created_at"
        connection.executemany(f"INSERT INTO accounts ({columns}) VALUES (?, ?, ?, ?, ?, ?, ?)", accounts)
        rows = [row(key.public_id, number % (size // 10), digest(key)) for number, key in enumerate(made)]
        rows += [row(public_id, number % (size // 10), bytes(32)) for number, public_id in enumerate(others)]
        # In the order of the index, which would otherwise be built all over the file.
        rows.sort(key=lambda each: str(each[0]))
        columns = "id, account_id, name, prefix, scopes, hmac, pepper_id, created_at, last_network"
        connection.executemany(f"INSERT INTO api_keys ({columns}) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)", rows)
    return [key.text.reveal() for key in made]


def p15(stack: Stack) -> Iterator[Figure]:
    """Requests that a revoked key still gets through once its revocation was answered."""
    parts, passed = urlsplit(stack.hub_url), 0
    manager = {"Authorization": f"Bearer {stack.add_key('alice', 'inference', 'keys')}"}

    def call(connection: http.client.HTTPConnection, method: str, path: str, headers: dict[str, str], body: str = "") -> bytes:
        connection.request(method, path, body, headers | {"Content-Type": "application/json"})
        answer = connection.getresponse()
        content = answer.read()
        return content if answer.status < 300 else b""

    with contextlib.ExitStack() as closing:
        ours, theirs = (
            closing.enter_context(contextlib.closing(http.client.HTTPConnection(parts.hostname or "", parts.port, timeout=60)))
            for _ in range(2)
        )
        for number in range(_REVOCATIONS):
            made = json.loads(call(ours, "POST", "/api/keys", manager, json.dumps({"name": f"k{number}"})))
            bearer = {"Authorization": f"Bearer {made['key']}"}
            assert call(theirs, "POST", "/api/me", bearer), "a new key is refused"
            assert call(ours, "DELETE", f"/api/keys/{made['id']}", manager)
            passed += bool(call(theirs, "POST", "/api/me", bearer))
    yield limited("P15", f"let in after revocation, of {_REVOCATIONS}", passed, unit="requests", at_most=0)


def p16(stack: Stack, key: str) -> Iterator[Figure]:
    """How long others wait while many connections are idle, or bring a byte now and then."""
    port = _port(stack)
    plan = load.Plan(port=port, requests=[_asking(stack, key)], connections=4, seconds=2.0)

    def median_ms() -> float:
        return statistics.median(load.run(plan).check().whole) * 1000

    def among_others() -> float:
        with started("bench.idlers", str(port), str(_IDLE), str(_SLOW)):
            return median_ms()

    mine, peer = in_turn([among_others, median_ms])
    yield compared("P16", f"beside {_IDLE} idle and {_SLOW} slow connections", mine, peer, unit="ms", at_most=1.2)
