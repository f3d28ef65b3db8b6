"""Files that hold secrets: 0600, in a directory 0700, never half written, refused when somebody else could have read them.

Used for the peppers of the API keys, the keys that sign registry tokens, and whatever else must not be seen. A file is written
beside its place and then linked or renamed into it, so that a reader finds the whole content or none, and of two starters exactly
one creates it.
"""

import base64
import contextlib
import json
import os
import stat
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import Any

from corral.core.ports import Entropy
from corral.wire.apikeys import Peppers
from corral.wire.errors import CorralError
from corral.wire.tokens import GRACE_S, LIFETIME_S, TICKET_LIFETIME_S, TokenKeys

_PEPPER_BYTES = 32
_SEED_BYTES = 32
_MAX_BYTES = 64 * 1024


def ensure_private_dir(path: Path, *, is_closed: bool = False) -> None:
    """Create the directory, 0700, with its parents. One that exists keeps its mode.

    is_closed: whether others must not even look into it. Raises: invalid when it is not a directory, belongs to somebody else,
    can be changed by others, or is not as closed as demanded; the message names the command that mends it.
    """
    try:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        os.close(_open_dir(path, is_closed=is_closed))
    except FileExistsError as error:
        raise CorralError("invalid", f"{path} is in the way: a directory belongs there") from error
    except OSError as error:
        raise CorralError("invalid", f"{path} cannot be created or opened: {error.strerror}") from error


def _open_dir(path: Path, *, is_closed: bool = False) -> int:
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        # Whoever may change the directory may put another file in the place of one that is closed to him.
        found = os.fstat(descriptor)
        _refuse_foreign(path, found)
        if found.st_mode & 0o022:
            raise CorralError("invalid", f"{path} can be changed by other users → close it with: chmod go-w {path}")
        if is_closed and found.st_mode & 0o077:
            raise CorralError("invalid", f"{path} is open to other users → close it with: chmod 700 {path}")
    except CorralError:
        os.close(descriptor)
        raise
    return descriptor


def read_private(path: Path, *, max_bytes: int = _MAX_BYTES) -> bytes | None:
    """The content, or None when there is no such file. Raises: invalid for a file that is no regular file, belongs to somebody
    else, can be read by others, or is longer than max_bytes; the message names the command that mends it."""
    try:
        descriptor = _open_in_closed_dir(path)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise CorralError("invalid", f"{path} cannot be read: {error.strerror}") from error
    try:
        # Asked of the open file and not of its path, which could point elsewhere a moment later.
        refuse_exposed(path, os.fstat(descriptor))
        content = os.read(descriptor, max_bytes + 1)
    finally:
        os.close(descriptor)
    if len(content) > max_bytes:
        raise CorralError("invalid", f"{path} is too long to be what belongs there")
    return content


def _open_in_closed_dir(path: Path) -> int:
    directory = _open_dir(path.parent)
    try:
        # O_NONBLOCK: opening a FIFO that somebody put here must not wait for a writer.
        return os.open(path.name, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK, dir_fd=directory)
    finally:
        os.close(directory)


def _refuse_foreign(path: Path, found: os.stat_result) -> None:
    if found.st_uid not in (os.geteuid(), 0):
        raise CorralError("invalid", f"{path} belongs to another user → take it over with: sudo chown $(id -un) {path}")


def refuse_exposed(path: Path, found: os.stat_result) -> None:
    """Raises: invalid for a file that is no regular file, belongs to somebody else, or is open to others."""
    if not stat.S_ISREG(found.st_mode):
        raise CorralError("invalid", f"{path} is not a regular file → move it away and start again")
    _refuse_foreign(path, found)
    if found.st_mode & 0o077:
        raise CorralError("invalid", f"{path} can be read by other users → close it with: chmod 600 {path}")


def create_private(path: Path, content: bytes) -> bool:
    """Create the file, durably. False, and nothing changed, when it exists already. Raises: invalid when it cannot be written."""
    with _written_beside(path, content) as temporary:
        try:
            os.link(temporary, path)
        except FileExistsError:
            return False
    _sync_dir(path.parent)
    return True


def write_private(path: Path, content: bytes) -> None:
    """Create or replace the file, durably; a reader sees the old content or the new. Raises: invalid when that fails."""
    with _written_beside(path, content) as temporary:
        temporary.replace(path)
    _sync_dir(path.parent)


@contextlib.contextmanager
def _written_beside(path: Path, content: bytes) -> Iterator[Path]:
    ensure_private_dir(path.parent)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.{base64.b32encode(os.urandom(5)).decode()}")
    try:
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        with os.fdopen(descriptor, "wb") as file:
            # Whatever the umask was.
            os.fchmod(descriptor, 0o600)
            file.write(content)
            file.flush()
            os.fsync(descriptor)
        yield temporary
    except OSError as error:
        raise CorralError("invalid", f"{path} cannot be written: {error.strerror}") from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()


def _sync_dir(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


# ── The peppers of the API keys ──────────────────────────────────────────────────────────────────────────────────────


def load_or_create_peppers(path: Path, entropy: Entropy) -> Peppers:
    """The peppers of this hub, made at the first start. Two starters end up with the same ones.

    Raises: invalid for a damaged file; making a new one instead would silently turn every API key away.
    """
    content = read_private(path)
    if content is None:
        create_private(path, _format_peppers(Peppers(current_id="p1", values={"p1": entropy.bytes(_PEPPER_BYTES)})))
        content = read_private(path)
    return _parse_peppers(path, content or b"")


def rotate_peppers(path: Path, entropy: Entropy) -> Peppers:
    """Add a pepper for keys made from now on. Keys made before keep theirs."""
    old = load_or_create_peppers(path, entropy)
    new_id = f"p{len(old.values) + 1}"
    peppers = Peppers(current_id=new_id, values={**old.values, new_id: entropy.bytes(_PEPPER_BYTES)})
    write_private(path, _format_peppers(peppers))
    return peppers


def _format_peppers(peppers: Peppers) -> bytes:
    values = {name: base64.b64encode(value).decode() for name, value in peppers.values.items()}
    return json.dumps({"current": peppers.current_id, "peppers": values}, indent=1).encode()


def _parse_peppers(path: Path, content: bytes) -> Peppers:
    try:
        read = json.loads(content)
        values = {str(name): base64.b64decode(text, validate=True) for name, text in read["peppers"].items()}
        current = str(read["current"])
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CorralError(
            "invalid", f"{path} is damaged; restore it from a backup, or remove it and make new API keys"
        ) from error
    if current not in values or any(len(value) < _PEPPER_BYTES for value in values.values()):
        raise CorralError("invalid", f"{path} is damaged; restore it from a backup, or remove it and make new API keys")
    return Peppers(current_id=current, values=values)


# ── The keys that sign registry tokens ───────────────────────────────────────────────────────────────────────────────


def load_or_create_token_keys(path: Path, entropy: Entropy, *, now: datetime) -> TokenKeys:
    """The signing keys of this hub, made at the first start. Two starters end up with the same ones. Former keys and secrets are
    left out once every token and ticket by them has expired.

    Raises: invalid for a damaged file. Removing it costs no more than that every registry client fetches a new token.
    """
    content = read_private(path)
    if content is None:
        first = {"t1": {"seed": _new_seed(entropy)}}
        create_private(path, _format_token_keys("t1", first, tickets=_new_seed(entropy), former_tickets=[]))
        content = read_private(path)
    return _parse_token_keys(path, content or b"", now=now)


def rotate_token_keys(path: Path, entropy: Entropy, *, now: datetime) -> TokenKeys:
    """Sign tokens and tickets with new keys from the next start on. Those by the former ones stay good until they expire, which
    is counted from now: a process that goes on without the new keys makes some that end with it."""
    old = load_or_create_token_keys(path, entropy, now=now)
    read = json.loads(read_private(path) or b"")
    former = [entry for entry in read.get("former_tickets", []) if entry["retired_at"] >= _oldest_ticket(now)]
    former.append({"secret": read["tickets"], "retired_at": int(now.timestamp())})
    kept = {name: entry for name, entry in read["keys"].items() if name in old.seeds}
    kept[old.current_id]["retired_at"] = int(now.timestamp())
    # An id is not given out again, so that a token never meets another key than its own.
    new_id = f"t{int(old.current_id[1:]) + 1}"
    kept[new_id] = {"seed": _new_seed(entropy)}
    write_private(path, _format_token_keys(new_id, kept, tickets=_new_seed(entropy), former_tickets=former))
    return load_or_create_token_keys(path, entropy, now=now)


def _new_seed(entropy: Entropy) -> str:
    return base64.b64encode(entropy.bytes(_SEED_BYTES)).decode()


def _format_token_keys(
    current: str, keys: dict[str, dict[str, Any]], *, tickets: str, former_tickets: list[dict[str, Any]]
) -> bytes:
    document = {"current": current, "keys": keys, "tickets": tickets, "former_tickets": former_tickets}
    return json.dumps(document, indent=1).encode()


def _oldest_ticket(now: datetime) -> float:
    return now.timestamp() - TICKET_LIFETIME_S


def _parse_token_keys(path: Path, content: bytes, *, now: datetime) -> TokenKeys:
    oldest = now.timestamp() - LIFETIME_S - GRACE_S
    try:
        read = json.loads(content)
        current, tickets = str(read["current"]), base64.b64decode(read["tickets"], validate=True)
        seeds = {
            str(name): base64.b64decode(entry["seed"], validate=True)
            for name, entry in read["keys"].items()
            if name == current or int(entry["retired_at"]) >= oldest
        }
        former = tuple(
            base64.b64decode(entry["secret"], validate=True)
            # Files of before the first rotation of a ticket secret have no such list.
            for entry in read.get("former_tickets", [])
            if int(entry["retired_at"]) >= _oldest_ticket(now)
        )
        is_sound = int(current[1:]) > 0 and current in seeds and all(len(one) >= _SEED_BYTES for one in (tickets, *former))
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise _damaged_token_keys(path) from error
    if not is_sound or any(len(seed) != _SEED_BYTES for seed in seeds.values()):
        raise _damaged_token_keys(path)
    return TokenKeys(current_id=current, seeds=seeds, ticket_secret=tickets, former_ticket_secrets=former)


def _damaged_token_keys(path: Path) -> CorralError:
    return CorralError("invalid", f"{path} is damaged; remove it, and a new one is made when the hub starts")
