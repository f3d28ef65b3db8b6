"""Files that hold secrets: closed, whole, and refused when others could have read them."""

import json
import os
import stat
import threading
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path

import pytest

from corral.storage.secretfile import (
    create_private,
    ensure_private_dir,
    load_or_create_peppers,
    load_or_create_token_keys,
    read_private,
    rotate_peppers,
    rotate_token_keys,
    write_private,
)
from corral.wire.errors import CorralError
from corral.wire.tokens import GRACE_S, LIFETIME_S, TICKET_LIFETIME_S
from fakes import NOON, SeededEntropy


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "home" / "secret"


def mode_of(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def test_t091_file_made_under_any_umask_is_0600_in_0700(path: Path) -> None:
    for mask in (0o000, 0o277):
        before = os.umask(mask)
        try:
            write_private(path.parent.parent / f"{mask}" / "x" if mask == 0 else path, b"s")
        finally:
            os.umask(before)
    assert mode_of(path) == 0o600
    assert mode_of(path.parent.parent / "0" / "x") == 0o600
    assert mode_of(path.parent.parent / "0") == 0o700


def test_file_written_is_read_back_and_replaced(path: Path) -> None:
    assert read_private(path) is None
    write_private(path, b"one")
    assert read_private(path) == b"one"
    write_private(path, b"two")
    assert read_private(path) == b"two"
    assert [entry.name for entry in path.parent.iterdir()] == ["secret"]


def test_file_that_exists_is_not_created_again(path: Path) -> None:
    assert create_private(path, b"one")
    assert not create_private(path, b"two")
    assert read_private(path) == b"one"
    assert [entry.name for entry in path.parent.iterdir()] == ["secret"]


@pytest.mark.parametrize("mode", [0o644, 0o640, 0o604, 0o660, 0o601])
def test_t091_file_that_others_can_read_is_refused_with_the_command_that_closes_it(path: Path, mode: int) -> None:
    write_private(path, b"s")
    path.chmod(mode)
    with pytest.raises(CorralError, match=f"chmod 600 {path}") as error:
        read_private(path)
    assert error.value.code == "invalid"


def test_t091_link_fifo_and_directory_are_refused(path: Path, tmp_path: Path) -> None:
    write_private(tmp_path / "elsewhere", b"s")
    ensure_private_dir(path.parent)
    for make in (lambda: path.symlink_to(tmp_path / "elsewhere"), lambda: os.mkfifo(path, 0o600)):
        make()
        with pytest.raises(CorralError) as error:
            read_private(path)
        assert error.value.code == "invalid"
        path.unlink()
    path.mkdir(mode=0o700)
    with pytest.raises(CorralError):
        read_private(path)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a file away")
def test_t091_file_of_another_user_is_refused(path: Path) -> None:
    write_private(path, b"s")
    os.chown(path, 12345, 12345)
    with pytest.raises(CorralError, match="belongs to another user"):
        read_private(path)


@pytest.mark.parametrize("mode", [0o777, 0o775, 0o757, 0o720])
def test_t091_directory_that_others_may_change_is_refused_for_reading_and_writing(path: Path, mode: int) -> None:
    write_private(path, b"s")
    path.parent.chmod(mode)
    for doing in (
        lambda: read_private(path),
        lambda: write_private(path, b"t"),
        lambda: create_private(path.with_name("new"), b"t"),
        lambda: ensure_private_dir(path.parent),
    ):
        with pytest.raises(CorralError, match=f"chmod go-w {path.parent}$") as error:
            doing()
        assert error.value.code == "invalid"
    path.parent.chmod(0o755)
    assert read_private(path) == b"s"


def test_t091_directory_of_secrets_that_others_may_enter_is_refused_where_that_is_demanded(tmp_path: Path) -> None:
    ensure_private_dir(tmp_path / "home", is_closed=True)
    (tmp_path / "home").chmod(0o750)
    ensure_private_dir(tmp_path / "home")
    with pytest.raises(CorralError, match=f"chmod 700 {tmp_path / 'home'}$"):
        ensure_private_dir(tmp_path / "home", is_closed=True)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a directory away")
def test_t091_directory_of_another_user_is_refused(path: Path) -> None:
    write_private(path, b"s")
    os.chown(path.parent, 12345, 12345)
    for doing in (lambda: read_private(path), lambda: ensure_private_dir(path.parent)):
        with pytest.raises(CorralError, match="belongs to another user"):
            doing()


def test_file_in_a_directory_that_does_not_exist_is_none(tmp_path: Path) -> None:
    assert read_private(tmp_path / "nowhere" / "secret") is None


def test_file_longer_than_allowed_is_refused(path: Path) -> None:
    write_private(path, b"12345")
    assert read_private(path, max_bytes=5) == b"12345"
    with pytest.raises(CorralError, match="too long"):
        read_private(path, max_bytes=4)


def test_directory_that_is_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "home").write_text("x")
    with pytest.raises(CorralError) as error:
        write_private(tmp_path / "home" / "secret", b"s")
    assert error.value.code == "invalid"
    with pytest.raises(CorralError):
        ensure_private_dir(tmp_path / "home" / "below")


def test_file_that_cannot_be_written_leaves_the_old_one(path: Path) -> None:
    write_private(path, b"one")
    path.unlink()
    path.mkdir(mode=0o700)
    with pytest.raises(CorralError, match="cannot be written"):
        write_private(path, b"two")
    assert [entry.name for entry in path.parent.iterdir()] == ["secret"]


# ── Peppers ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_peppers_are_made_once_and_read_again(path: Path) -> None:
    made = load_or_create_peppers(path, SeededEntropy(1))
    assert len(made.values[made.current_id]) == 32
    assert load_or_create_peppers(path, SeededEntropy(2)) == made
    assert mode_of(path) == 0o600


def test_t085_two_installations_share_no_pepper(tmp_path: Path) -> None:
    one = load_or_create_peppers(tmp_path / "one", SeededEntropy(1))
    two = load_or_create_peppers(tmp_path / "two", SeededEntropy(2))
    assert set(one.values.values()).isdisjoint(two.values.values())


def test_t091_two_starters_get_the_same_pepper(path: Path) -> None:
    together = threading.Barrier(4)

    def start(seed: int) -> object:
        together.wait()
        return load_or_create_peppers(path, SeededEntropy(seed)).values

    with ThreadPoolExecutor(4) as threads:
        found = list(threads.map(start, range(4)))
    assert found == [found[0]] * 4


def test_pepper_rotated_keeps_the_old_one(path: Path) -> None:
    old = load_or_create_peppers(path, SeededEntropy(1))
    new = rotate_peppers(path, SeededEntropy(2))
    assert new.current_id != old.current_id
    assert new.values[old.current_id] == old.values[old.current_id]
    assert load_or_create_peppers(path, SeededEntropy(3)) == new


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"junk",
        b"[]",
        b"{}",
        b'{"current": "p1"}',
        b'{"current": "p1", "peppers": []}',
        b'{"current": "p1", "peppers": {}}',
        b'{"current": "p2", "peppers": {"p1": "cHBwcHBwcHBwcHBwcHBwcHBwcHBwcHBwcHBwcHBwcHA="}}',
        b'{"current": "p1", "peppers": {"p1": "c2hvcnQ="}}',
        b'{"current": "p1", "peppers": {"p1": "not base64!"}}',
        b'{"current": "p1", "peppers": {"p1": 5}}',
        b"\xff\xfe",
        b"[" * 30_000,
    ],
)
def test_peppers_that_are_damaged_are_refused_and_not_replaced(path: Path, content: bytes) -> None:
    write_private(path, content)
    with pytest.raises(CorralError, match="is damaged") as error:
        load_or_create_peppers(path, SeededEntropy(1))
    assert error.value.code == "invalid"
    assert path.read_bytes() == content


# ── The keys that sign registry tokens ───────────────────────────────────────────────────────────────────────────────


def test_token_keys_are_made_once_closed_and_read_again(path: Path) -> None:
    made = load_or_create_token_keys(path, SeededEntropy(), now=NOON)
    assert (made.current_id, list(made.seeds), len(made.seeds["t1"]), len(made.ticket_secret)) == ("t1", ["t1"], 32, 32)
    assert made.seeds["t1"] != made.ticket_secret
    assert mode_of(path) == 0o600
    assert load_or_create_token_keys(path, SeededEntropy(1), now=NOON) == made
    assert str(made.seeds["t1"]) not in repr(made)


def test_t085_two_installations_share_no_token_key(tmp_path: Path) -> None:
    one, other = (load_or_create_token_keys(tmp_path / str(seed) / "k", SeededEntropy(seed), now=NOON) for seed in (1, 2))
    assert one.seeds["t1"] != other.seeds["t1"]
    assert one.ticket_secret != other.ticket_secret


def test_token_key_rotated_keeps_the_old_one_until_its_tokens_are_dead(path: Path) -> None:
    old = load_or_create_token_keys(path, SeededEntropy(), now=NOON)
    new = rotate_token_keys(path, SeededEntropy(1), now=NOON)
    assert (new.current_id, list(new.seeds), new.seeds["t1"]) == ("t2", ["t1", "t2"], old.seeds["t1"])
    last = NOON + timedelta(seconds=LIFETIME_S + GRACE_S)
    assert load_or_create_token_keys(path, SeededEntropy(), now=last) == new
    assert b"former_tickets" in path.read_bytes()
    later = last + timedelta(seconds=1)
    assert list(load_or_create_token_keys(path, SeededEntropy(), now=later).seeds) == ["t2"]
    assert list(rotate_token_keys(path, SeededEntropy(2), now=later).seeds) == ["t2", "t3"]
    assert b'"t1"' not in path.read_bytes()


def test_ticket_secret_rotated_keeps_the_old_one_until_its_tickets_are_dead(path: Path) -> None:
    old = load_or_create_token_keys(path, SeededEntropy(), now=NOON)
    new = rotate_token_keys(path, SeededEntropy(1), now=NOON)
    assert new.ticket_secret != old.ticket_secret
    assert new.former_ticket_secrets == (old.ticket_secret,)
    last = NOON + timedelta(seconds=TICKET_LIFETIME_S)
    assert load_or_create_token_keys(path, SeededEntropy(), now=last).former_ticket_secrets == (old.ticket_secret,)
    later = last + timedelta(seconds=1)
    assert load_or_create_token_keys(path, SeededEntropy(), now=later).former_ticket_secrets == ()
    assert rotate_token_keys(path, SeededEntropy(2), now=later).former_ticket_secrets == (new.ticket_secret,)


def test_token_keys_of_before_a_ticket_secret_was_ever_rotated_are_read(path: Path) -> None:
    kept = load_or_create_token_keys(path, SeededEntropy(), now=NOON)
    document = json.loads(path.read_bytes())
    del document["former_tickets"]
    write_private(path, json.dumps(document).encode())
    assert load_or_create_token_keys(path, SeededEntropy(), now=NOON) == kept
    assert rotate_token_keys(path, SeededEntropy(1), now=NOON).former_ticket_secrets == (kept.ticket_secret,)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"[]",
        b'{"current": "t1", "keys": {}, "tickets": "AAAA"}',
        b'{"current": "t1", "keys": {"t1": {"seed": "AAAA"}}, "tickets": "%s"}' % (b"A" * 44),
        b'{"current": "t1", "keys": {"t1": {"seed": "%s="}}, "tickets": "AAAA"}' % (b"A" * 43),
        b'{"current": "x", "keys": {"x": {"seed": "%s="}}, "tickets": "%s"}' % (b"A" * 43, b"A" * 44),
        b'{"current": "t1", "keys": {"t1": {"seed": "%s="}, "t0": {"seed": "!"}}, "tickets": "%s"}' % (b"A" * 43, b"A" * 44),
        b'{"current": "t1", "keys": {"t1": {"seed": "%s="}}, "tickets": "%s", "former_tickets": [{"secret": "A"}]}'
        % (b"A" * 43, b"A" * 44),
    ],
)
def test_token_keys_that_are_damaged_are_refused_and_not_replaced(path: Path, content: bytes) -> None:
    write_private(path, content)
    with pytest.raises(CorralError, match="damaged") as refused:
        load_or_create_token_keys(path, SeededEntropy(), now=NOON)
    assert refused.value.code == "invalid"
    assert read_private(path) == content
