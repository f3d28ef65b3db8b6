"""The listing and the search page of a hub with many models, against the same of one with few.

The rows are written straight into the database, the way the registry and the describing of pushes leave them; pushing a hundred
thousand models would take hours and show nothing else.
"""

import contextlib
import http.client
import random
import signal
import sqlite3
import statistics
import time
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

from bench.measure import Figure, compared, in_turn
from flows.stack import Stack, answers, wait_until

SIZES = (100, 10_000, 100_000)
#: page -> its address. A search that finds less than a page among few models would be compared with a shorter page.
PAGES = {
    "listing": "/library",
    "listing by pulls": "/library?order=pulled",
    "search, half match": "/search?q=instruct",
    "search, a sixth matches": "/search?q=7b+tools",
    "search, few match": "/search?q=model-77",
}
_REQUESTS = 15
_FAMILIES = ("llama", "qwen", "gemma", "phi", "mistral", "smollm", "deepseek", "granite", "falcon", "olmo")
_PARAMETERS = ("135m", "1b", "3b", "7b", "13b", "70b")


def p12(folder: Path) -> Iterator[Figure]:
    """Medians of requests to hubs of every size, in turn."""
    with contextlib.ExitStack() as stopping:
        hubs = [stopping.enter_context(_hub(folder / str(size), size)) for size in SIZES]
        for name, path in PAGES.items():
            few, *many = in_turn([lambda url=hub.hub_url, path=path: _median_ms(url, path) for hub in hubs], rounds=7)
            for size, taken in zip(SIZES[1:], many, strict=True):
                yield compared("P12", f"{name}, {size:,} models against {SIZES[0]}", taken, few, unit="ms", at_most=1.5)


@contextlib.contextmanager
def _hub(folder: Path, size: int) -> Iterator[Stack]:
    """A running hub with so many models."""
    with Stack(folder) as stack:
        stack.add_account("alice")
        _fill(stack.home / ".corral/hub.db", size)
        server = stack.begin("hub", "serve")
        wait_until(lambda: answers(f"{stack.hub_url}/readyz"), stack.hub_url, watch=server)
        _median_ms(stack.hub_url, "/library")
        yield stack
        server.end(signal.SIGTERM)


def _median_ms(url: str, path: str) -> float:
    """Of some requests on one connection."""
    parts, taken = urlsplit(url), []
    connection = http.client.HTTPConnection(parts.hostname or "", parts.port, timeout=60)
    with contextlib.closing(connection):
        for _ in range(_REQUESTS):
            began = time.perf_counter()
            connection.request("GET", path)
            answer = connection.getresponse()
            body = answer.read()
            taken.append((time.perf_counter() - began) * 1000)
            assert answer.status == 200, body
    return statistics.median(taken)


def _fill(path: Path, size: int) -> None:
    """Repositories of a hundred accounts, each with one described tag."""
    choose, now = random.Random(size), int(time.time() * 1_000_000)
    with contextlib.closing(sqlite3.connect(path)) as connection, connection:
        # Each entry is written once, with all its words; the triggers would write it when it is made and again when it is known.
        (trigger,) = connection.execute("SELECT sql FROM sqlite_master WHERE name = 'tr_repositories_entered'").fetchone()
        connection.execute("DROP TRIGGER tr_repositories_entered")
        for number in range(100):
            account = (f"a{number}", f"user{number}", f"user{number}", "", "", 0, now)
            columns = "id, name, name_key, email, password_hash, is_admin, created_at"
            connection.execute(f"INSERT INTO accounts ({columns}) VALUES (?, ?, ?, ?, ?, ?, ?)", account)
        for number in range(size):
            _add_model(connection, number, choose, now + number)
        connection.execute("UPDATE catalog_entries SET is_stale = 0")
        connection.execute(trigger)


def _add_model(connection: sqlite3.Connection, number: int, choose: random.Random, moment: int) -> None:
    repository_id, digest = f"r{number:024x}", f"sha256:{number:064x}"
    owner, family, parameters = f"user{number % 100}", choose.choice(_FAMILIES), choose.choice(_PARAMETERS)
    kind = "instruct" if number % 2 else "base"
    name = f"{family}-{parameters}-{kind}-model-{number}"
    visibility = "private" if number % 10 == 0 else "public"
    row = (repository_id, owner, name, owner, name, visibility, moment, moment, choose.randrange(10_000))
    columns = "id, namespace, name, namespace_key, name_key, visibility, created_at, updated_at, pulls"
    connection.execute(f"INSERT INTO repositories ({columns}) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)", row)
    connection.execute("INSERT INTO manifests (digest, media_type, body, created_at) VALUES (?, '', '{}', ?)", (digest, moment))
    described = "version = 1, kind = 'model', size_bytes = 1, quantization = 'Q4_K_M', capabilities = 'completion tools'"
    connection.execute(
        f"UPDATE descriptions SET {described}, family = ?, parameter_size = ? WHERE digest = ?", (family, parameters, digest)
    )
    scope = ("public " if visibility == "public" else "") + "n" + owner.encode().hex()
    words = f"{owner} {name} latest {family} {parameters} Q4_K_M completion tools"
    entry = "INSERT INTO catalog_entries (repository_id, scope, words, is_stale) VALUES (?, ?, ?, 0)"
    connection.execute(entry, (repository_id, scope, words))
    tag = "INSERT INTO tags (repository_id, tag_key, tag, manifest_digest, updated_at) VALUES (?, 'latest', 'latest', ?, ?)"
    connection.execute(tag, (repository_id, digest, moment))
