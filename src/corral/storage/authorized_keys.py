"""The `authorized_keys` file of a shared local server on disk: read whenever it changed, written whole or not at all.

Whoever can write the file decides who may use the server, so one that others than its owner can change, or that belongs to a
stranger, lets nobody in; as with sshd. Others may read it: it holds public keys and digests.
"""

import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from corral.core.ports import Clock
from corral.storage.locks import held_alone
from corral.storage.secretfile import ensure_private_dir, write_private
from corral.wire.authorized_keys import AuthorizedKeys, parse_authorized_keys
from corral.wire.errors import CorralError

#: Some ten thousand lines.
_MAX_BYTES = 4 * 1024 * 1024
#: The system's clock for files moves in steps; what was changed so shortly before it was read may change again unseen.
_SETTLED_NS = 2_000_000_000
_EMPTY = "nobody is let in yet → corral authorize add"


class AuthorizedKeysFile:
    """The file at `path`. A symbolic link is followed, and what it leads to is judged."""

    def __init__(self, path: Path, clock: Clock) -> None:
        self._path = path
        self._clock = clock
        self._state: object = None
        self._keys = AuthorizedKeys()

    def current(self) -> AuthorizedKeys:
        """What it says now; the same object for as long as that does not change. Costs one look at the file's state. Nothing is
        granted when it is not there or cannot be trusted, and the one complaint says why. Never raises."""
        try:
            found = self._path.stat()
            state: object = (found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns)
            changed_ns = max(found.st_mtime_ns, found.st_ctime_ns)
        except OSError as error:
            state, changed_ns = error.errno, 0
        if state != self._state:
            self._load()
            is_settled = self._clock.now().timestamp() * 1e9 - changed_ns > _SETTLED_NS
            self._state = state if is_settled else None
        return self._keys

    def read(self) -> bytes:
        """Its bytes; none when there is no such file. Raises: invalid for one that cannot be trusted or read; the message names
        the command that mends it."""
        try:
            path = self._path.resolve(strict=True)
            _refuse_changeable(path.parent, path.parent.stat())
            content = _content_of(path)
        except FileNotFoundError:
            return b""
        except (OSError, RuntimeError) as error:
            # RuntimeError: a link that leads to itself.
            reason = getattr(error, "strerror", None) or "it is a link that leads nowhere"
            raise CorralError("invalid", f"{self._path} cannot be read: {reason}") from error
        if len(content) > _MAX_BYTES:
            raise CorralError("invalid", f"{path} is too long to be what belongs there")
        return content

    @contextmanager
    def edited(self) -> Iterator["Edit"]:
        """What is set as the edit's `content` becomes the file, at once and durably, when the block ends well. One at a time.
        Raises: conflict while somebody else edits it, invalid as `read` and when it cannot be written."""
        ensure_private_dir(self._path.parent)
        target = self._path.resolve()
        lock = target.with_name(f".{target.name}.lock")
        with held_alone(lock, otherwise=f"{self._path} is being edited by another command; try again"):
            edit = Edit(self.read())
            before = edit.content
            yield edit
            if edit.content != before:
                owner = _owner_of(target)
                write_private(target, edit.content)
                if os.geteuid() == 0:
                    # An administrator who edits it for the user that runs the server must not take it away.
                    os.chown(target, *owner)

    def _load(self) -> None:
        try:
            content = self.read()
        except CorralError as error:
            found = AuthorizedKeys(complaints=(f"nobody is let in: {error.message}",))
        else:
            found = parse_authorized_keys(content)
            if not found.entries:
                found = AuthorizedKeys(complaints=(*found.complaints, _EMPTY))
        # Whoever tells of complaints tells of each object's once.
        if found != self._keys:
            self._keys = found


def _owner_of(target: Path) -> tuple[int, int]:
    """User and group that the file belongs to, or those of its directory when there is none yet."""
    try:
        found = target.stat()
    except FileNotFoundError:
        found = target.parent.stat()
    return found.st_uid, found.st_gid


class Edit:
    """A file's content while it is changed."""

    def __init__(self, content: bytes) -> None:
        self.content = content


def _content_of(path: Path) -> bytes:
    """One byte more than there may be, at most. Raises: invalid, OSError."""
    # O_NONBLOCK: opening a FIFO that somebody put here must not wait for a writer.
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK)
    try:
        # Asked of the open file and not of its path, which could point elsewhere a moment later.
        found = os.fstat(descriptor)
        if not stat.S_ISREG(found.st_mode):
            raise CorralError("invalid", f"{path} is not a regular file → move it away")
        _refuse_changeable(path, found)
        return os.read(descriptor, _MAX_BYTES + 1)
    finally:
        os.close(descriptor)


def _refuse_changeable(path: Path, found: os.stat_result) -> None:
    if found.st_uid not in (os.geteuid(), 0):
        raise CorralError("invalid", f"{path} belongs to another user → take it over with: sudo chown $(id -un) {path}")
    if found.st_mode & 0o022:
        raise CorralError("invalid", f"{path} can be changed by other users → close it with: chmod go-w {path}")
