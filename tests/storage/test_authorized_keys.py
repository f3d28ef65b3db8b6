"""authorized_keys on disk: read when it changed, trusted only where nobody else can write, replaced whole."""

import os
import threading
from datetime import UTC, datetime
from pathlib import Path

import pytest

from corral.storage.authorized_keys import AuthorizedKeysFile
from corral.wire.errors import CorralError
from corral.wire.signing import DevicePrivateKey
from fakes import FakeClock

ADA, BOB = (DevicePrivateKey(bytes([number]) * 32).public.authorized_key for number in (1, 2))


class LaterClock(FakeClock):
    """Long after any file was written, so that every state counts as settled."""

    def __init__(self) -> None:
        super().__init__(datetime(2999, 1, 1, tzinfo=UTC))


@pytest.fixture
def path(tmp_path: Path) -> Path:
    tmp_path.chmod(0o700)
    return tmp_path / "authorized_keys"


def write(path: Path, text: str, mode: int = 0o600) -> None:
    path.write_text(text)
    path.chmod(mode)


def names(file: AuthorizedKeysFile) -> list[str]:
    return [entry.comment for entry in file.current().entries]


def test_changes_count_at_the_next_look(path: Path) -> None:
    file = AuthorizedKeysFile(path, LaterClock())
    assert names(file) == []
    write(path, f"{ADA} ada\n{BOB} bob\n")
    assert names(file) == ["ada", "bob"]
    write(path, f"{BOB} bob\n")
    assert names(file) == ["bob"]
    path.unlink()
    assert names(file) == []


def test_unchanged_file_is_read_once_and_stays_the_same_object(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(path, f"{ADA} ada\n")
    file = AuthorizedKeysFile(path, LaterClock())
    first, reads = file.current(), []
    # Patched because that nothing is read cannot be seen otherwise.
    monkeypatch.setattr(file, "read", lambda: reads.append(1))
    assert file.current() is first
    assert reads == []


def test_change_within_the_same_tick_of_the_file_systems_clock_is_seen(path: Path) -> None:
    now = datetime.now(UTC)
    write(path, f"{ADA} ada\n")
    file = AuthorizedKeysFile(path, FakeClock(now))
    assert names(file) == ["ada"]
    state = path.stat()
    # Same length, same inode, and its times set back: nothing that a look at the state would tell.
    path.write_text(f"{BOB} bob\n")
    os.utime(path, ns=(state.st_atime_ns, state.st_mtime_ns))
    assert names(file) == ["bob"]


def test_same_content_in_a_new_state_is_the_same_object(path: Path) -> None:
    write(path, "bad\n")
    file = AuthorizedKeysFile(path, LaterClock())
    first = file.current()
    write(path, "bad\n", 0o640)
    assert file.current() is first


@pytest.mark.parametrize("mode", [0o620, 0o602, 0o666])
def test_file_that_others_can_change_lets_nobody_in_until_it_is_closed(path: Path, mode: int) -> None:
    write(path, f"{ADA} ada\n", mode)
    file = AuthorizedKeysFile(path, LaterClock())
    found = file.current()
    assert found.entries == ()
    assert found.complaints == (f"nobody is let in: {path} can be changed by other users → close it with: chmod go-w {path}",)
    path.chmod(0o644)
    assert names(file) == ["ada"]


def test_directory_that_others_can_change_lets_nobody_in(path: Path) -> None:
    write(path, f"{ADA} ada\n")
    path.parent.chmod(0o777)
    assert "can be changed by other users" in AuthorizedKeysFile(path, LaterClock()).current().complaints[0]
    path.parent.chmod(0o700)


def test_file_of_another_user_lets_nobody_in(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(path, f"{ADA} ada\n")
    os.chown(path, 12345, -1) if os.geteuid() == 0 else None
    if os.geteuid() != 0:
        # Patched because only an administrator can give a file away.
        monkeypatch.setattr(os, "geteuid", lambda: 12345)
    assert "belongs to another user" in AuthorizedKeysFile(path, LaterClock()).current().complaints[0]


@pytest.mark.parametrize("what", ["directory", "fifo", "long", "loop"])
def test_what_is_no_such_file_lets_nobody_in_and_blocks_nobody(path: Path, what: str) -> None:
    match what:
        case "directory":
            path.mkdir()
        case "fifo":
            os.mkfifo(path, 0o600)
        case "long":
            path.touch(0o600)
            os.truncate(path, 5 * 1024 * 1024)
        case "loop":
            path.symlink_to(path)
    found = AuthorizedKeysFile(path, LaterClock()).current()
    assert found.entries == ()
    assert "nobody is let in" in found.complaints[0]


def test_link_is_followed_and_what_it_leads_to_is_judged(path: Path) -> None:
    target = path.parent / "real"
    target.mkdir(mode=0o700)
    write(target / "keys", f"{ADA} ada\n")
    path.symlink_to(target / "keys")
    file = AuthorizedKeysFile(path, LaterClock())
    assert names(file) == ["ada"]
    (target / "keys").chmod(0o666)
    assert names(file) == []


def test_edit_makes_a_closed_file_and_keeps_a_link(path: Path) -> None:
    target = path.parent / "real"
    path.symlink_to(target)
    file = AuthorizedKeysFile(path, LaterClock())
    with file.edited() as edit:
        edit.content = f"{ADA} ada\n".encode()
    assert path.is_symlink()
    assert target.stat().st_mode & 0o777 == 0o600
    assert names(file) == ["ada"]


def test_edit_that_fails_changes_nothing(path: Path) -> None:
    write(path, f"{ADA} ada\n")
    file = AuthorizedKeysFile(path, LaterClock())

    def fail() -> None:
        with file.edited() as edit:
            edit.content = b""
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert names(file) == ["ada"]


def test_second_edit_at_the_same_time_is_refused(path: Path) -> None:
    file, told = AuthorizedKeysFile(path, LaterClock()), []

    def also() -> None:
        try:
            with AuthorizedKeysFile(path, LaterClock()).edited():
                pass
        except CorralError as error:
            told.append(error.code)

    with file.edited():
        other = threading.Thread(target=also)
        other.start()
        other.join()
    assert told == ["conflict"]


def test_edit_by_an_administrator_leaves_the_file_to_its_owner(path: Path) -> None:
    if os.geteuid() != 0:
        pytest.skip("only an administrator can give a file away")
    write(path, f"{ADA} ada\n")
    # The file is of group 12345; an owner other than ourselves would be refused here, as it is for the server.
    os.chown(path, -1, 12345)
    with AuthorizedKeysFile(path, LaterClock()).edited() as edit:
        edit.content += b"# more\n"
    assert path.stat().st_gid == 12345
