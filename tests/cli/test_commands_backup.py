"""hub backup and hub restore on a hub's data: what is kept, what stays revoked, and that whatever fails changes nothing."""

import asyncio
import contextlib
import errno
import io
import json
import os
import re
import shutil
import sqlite3
import subprocess
import sys
import tarfile
import threading
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any, TypeVar

import pytest

from corral.cli.app import run
from corral.core.records import BrowserSession, Principal, Scope
from corral.core.registry import Upload, Visibility
from corral.main import backup
from corral.main.services import HubServices, RegistryServices, open_hub_services, registry_services
from corral.settings import Settings
from corral.storage.locks import held_alone
from corral.storage.sql.sessions import SqlSessions
from corral.wire.errors import CorralError
from corral.wire.manifest import MANIFEST_TYPE
from fakes_registry import digest_of
from registry_faults import Disk, failing
from registry_hub import CONFIG, TINY, a_manifest, chunks, with_key
from tooling import tool_module

T = TypeVar("T")
PASSWORD = "nine green bottles on a wall"
WEIGHTS = b"weights of a model" * 1000
SHA512 = b"weights of another model" * 1000
NAME = r"corral-hub-\d{8}T\d{6}Z\.tar"


def on_hub(home: Path, work: Callable[[HubServices, RegistryServices], Coroutine[Any, Any, T]]) -> T:
    """Do something with the services of the hub in a home."""

    async def go() -> T:
        settings = Settings.from_env(env(home))
        async with open_hub_services(settings) as services:
            return await work(services, registry_services(settings, services))

    return asyncio.run(go())


def documented(command: str) -> set[str]:
    """The fields that the reference names, without those inside others."""
    _, fields, _ = tool_module("make_reference").JSON_SHAPES[command]
    return {word.strip() for word in re.sub(r" \(.*?\)", "", fields).split(",")}


def env(home: Path) -> dict[str, str]:
    return {"HOME": str(home.parent), "CORRAL_HOME": str(home)}


async def caller(services: HubServices) -> Principal:
    return with_key(await services.accounts.named("alice"))


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, str]]:
    """A hub with people, keys, a model and a session, and the secrets that were given out."""
    home = tmp_path_factory.mktemp("made") / "hub"

    async def make(services: HubServices, built: RegistryServices) -> dict[str, str]:
        secrets = {"password": PASSWORD}
        for name, is_admin in (("alice", True), ("bob", False)):
            account = await services.accounts.add(name, email="", password=PASSWORD, is_admin=is_admin)
            _, text = await services.credentials.create_key(
                account, name="ci", scopes=frozenset({Scope.INFERENCE}), expires_at=None
            )
            secrets[name] = text.reveal()
            session, cookie = await services.accounts.open_session(account, network="", user_agent="a browser")
            secrets[f"cookie of {name}"], secrets[f"form token of {name}"] = cookie.reveal(), session.csrf
        alice = await caller(services)
        for content, algorithm in ((WEIGHTS, "sha256"), (SHA512, "sha512"), (CONFIG, "sha256")):
            digest = digest_of(content, algorithm)
            await built.registry.put_blob(TINY, alice, digest, chunks(content), length=len(content))
        await built.registry.put_manifest(TINY, "latest", alice, a_manifest(WEIGHTS), MANIFEST_TYPE)
        started = await built.registry.start_upload(TINY, alice)
        assert isinstance(started, Upload)
        return secrets

    return home, on_hub(home, make)


@pytest.fixture
def home(made: tuple[Path, dict[str, str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of that hub, and a current directory that is empty."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    return Path(shutil.copytree(made[0], tmp_path / "hub"))


@pytest.fixture
def secrets(made: tuple[Path, dict[str, str]]) -> dict[str, str]:
    return made[1]


@pytest.fixture(scope="module")
def backed_up(made: tuple[Path, dict[str, str]], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with that hub after a backup was made, and with the backup."""
    place = tmp_path_factory.mktemp("backed_up")
    home = Path(shutil.copytree(made[0], place / "hub"))
    assert run(["hub", "backup", str(place / "backup.tar")], env(home)) == 0
    return place


@pytest.fixture
def archive(backed_up: Path, home: Path) -> Path:
    """A backup of the hub, which knows of it."""
    shutil.rmtree(home)
    shutil.copytree(backed_up, home.parent, dirs_exist_ok=True)
    return home.parent / "backup.tar"


def contents(directory: Path) -> dict[str, bytes]:
    """What is in a home, but for locks, which hold nothing."""
    return {
        str(path.relative_to(directory)): path.read_bytes()
        for path in directory.rglob("*")
        if path.is_file() and path.suffix != ".lock"
    }


def unpacked(archive: Path) -> dict[str, bytes]:
    with tarfile.open(archive) as tar:
        return {entry.name: (tar.extractfile(entry) or io.BytesIO()).read() for entry in tar.getmembers()}


def repacked(archive: Path, change: Callable[[dict[str, bytes]], object]) -> Path:
    """The archive with other content, and a manifest that says so: made by somebody who knows how."""
    members = unpacked(archive)
    said = json.loads(members.pop("manifest.json"))
    change(members)
    for one in said["members"]:
        one["size_bytes"] = len(members[one["name"]])
        one["digest"] = str(digest_of(members[one["name"]], one["digest"].partition(":")[0]))
    path = archive.with_name("other.tar")
    with tarfile.open(path, "w", format=tarfile.GNU_FORMAT) as tar:
        for name, content in {"manifest.json": json.dumps(said).encode(), **members}.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


def with_database(archive: Path, tmp_path: Path, *statements: str) -> Path:
    """The archive with something done to its database."""
    path = tmp_path / "changed.db"
    path.write_bytes(unpacked(archive)["hub.db"])
    with contextlib.closing(sqlite3.connect(path)) as connection:
        for statement in statements:
            connection.execute(statement)
        connection.commit()
    return repacked(archive, lambda members: members.update({"hub.db": path.read_bytes()}))


async def facts(services: HubServices, built: RegistryServices) -> dict[str, Any]:
    """What a hub knows and may."""
    alice = await caller(services)
    accounts = await services.accounts.list()
    return {
        "accounts": [(one.name, one.is_admin, one.is_active) for one in accounts],
        "keys": [(key.name, key.revoked_at is None) for one in accounts for key in await services.credentials.keys_of(one)],
        "weights": (await built.registry.blob(TINY, digest_of(WEIGHTS), alice)).size_bytes,
        "sha512": (await built.registry.blob(TINY, digest_of(SHA512, "sha512"), alice)).size_bytes,
    }


# ── Backing up ───────────────────────────────────────────────────────────────────────────────────────────────────────


def test_backup_is_named_by_the_time_and_says_what_it_holds(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["hub", "backup"], env(home)) == 0
    said = capsys.readouterr()
    (path,) = Path.cwd().iterdir()
    assert re.fullmatch(NAME, path.name)
    assert said.out == f"{path}\n"
    assert path.stat().st_mode & 0o777 == 0o600
    first, *rest = said.err.splitlines()
    assert re.fullmatch(r"2 accounts, a database of \d+ KB, 3 blobs of 42 KB: \d+ KB in all\.", first)
    assert rest[0].split(": ")[1] == first.rpartition(": ")[2].removesuffix(" in all."), "one and the same size"
    assert [line.partition(":")[0] for line in rest] == [
        "backing up",
        "It holds password hashes and what API keys are checked with",
    ]


def test_backup_of_a_hub_that_runs_is_made_beside_it(home: Path, tmp_path: Path) -> None:
    async def back_up(services: HubServices, _: RegistryServices) -> None:
        done = asyncio.to_thread(run, ["hub", "backup", str(tmp_path / "a.tar")], env(home))
        assert await done == 0
        assert [event.action for event in await services.audit.recent(limit=1)] == ["hub.backup"]

    on_hub(home, back_up)
    members = unpacked(tmp_path / "a.tar")
    assert list(members)[:3] == ["manifest.json", "hub.db", "peppers.json"]
    blobs = {digest_of(WEIGHTS), digest_of(CONFIG), digest_of(SHA512, "sha512")}
    assert set(list(members)[3:]) == {f"blobs/{digest.file_name}" for digest in blobs}


def test_backup_as_json_says_what_the_reference_says(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["hub", "backup", "--json", "x.tar"], env(home)) == 0
    said = json.loads(capsys.readouterr().out)
    assert said.keys() == documented("hub backup")
    assert said["size_bytes"] == Path("x.tar").stat().st_size
    assert (said["file"], said["blobs"], said["has_blobs"], said["damaged"]) == (str(Path.cwd() / "x.tar"), 3, True, [])


def test_backup_to_standard_output_is_the_archive_alone(home: Path, capfdbinary: pytest.CaptureFixture[bytes]) -> None:
    assert run(["hub", "backup", "-"], env(home)) == 0
    out = capfdbinary.readouterr().out
    with tarfile.open(fileobj=io.BytesIO(out)) as tar:
        assert len(tar.getnames()) == 6
    assert list(Path.cwd().iterdir()) == []
    assert not list(home.glob(".corral-*"))


def test_archive_and_json_do_not_share_standard_output(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["hub", "backup", "-", "--json"], env(home)) == 2
    assert "cannot be both, the archive and JSON" in capsys.readouterr().err


def test_backup_without_blobs_is_small_and_goes_on_while_content_is_collected(home: Path) -> None:
    with held_alone(home / "collect.lock", otherwise=""):
        assert run(["hub", "backup", "--without-blobs", "x.tar"], env(home)) == 0
    assert list(unpacked(Path("x.tar"))) == ["manifest.json", "hub.db", "peppers.json"]


def test_backup_waits_for_a_collection_and_not_for_ever(
    home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with contextlib.ExitStack() as collecting:
        collecting.enter_context(held_alone(home / "collect.lock", otherwise=""))
        # Patched because nobody should wait a minute for this.
        with monkeypatch.context() as patch:
            patch.setattr(backup, "_PATIENCE_S", 0.0)
            assert run(["hub", "backup", "x.tar"], env(home)) == 1
            assert "content is being collected and that does not end; try again later" in capsys.readouterr().err
        threading.Timer(1, collecting.close).start()
        assert run(["hub", "backup", "x.tar"], env(home)) == 0


def test_older_backup_is_replaced_and_nothing_else_is(
    home: Path, archive: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = archive.stat().st_ino
    assert run(["hub", "backup", str(archive)], env(home)) == 0
    assert archive.stat().st_ino != before
    (tmp_path / "model.gguf").write_bytes(b"GGUF precious")
    (tmp_path / "link.tar").symlink_to(archive)
    (tmp_path / "nowhere.tar").symlink_to(tmp_path / "missing")
    os.mkfifo(tmp_path / "fifo")
    for name, why in (
        ("model.gguf", "is there already and is no backup"),
        ("link.tar", "is there already and is no backup"),
        ("nowhere.tar", "leads nowhere"),
        ("fifo", "is there already and is no backup"),
        ("no/such.tar", "there is no directory"),
    ):
        capsys.readouterr()
        assert run(["hub", "backup", str(tmp_path / name)], env(home)) == 1
        assert why in capsys.readouterr().err
    assert (tmp_path / "model.gguf").read_bytes() == b"GGUF precious"


def test_backup_into_a_directory_that_is_not_there_makes_no_file_of_its_name(
    home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["hub", "backup", "nightly/"], env(home)) == 1
    assert capsys.readouterr().err == "Error: there is no directory nightly/\n→ mkdir nightly/, and back up again\n"
    assert run(["hub", "backup", "nightly"], env(home)) == 1
    advice = "→ mkdir nightly, and back up again; a new file is named with its ending, nightly.tar\n"
    assert capsys.readouterr().err == f"Error: there is no directory nightly\n{advice}"
    assert list(Path.cwd().iterdir()) == []


def test_r003_backup_that_a_disk_does_not_take_leaves_nothing(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with Disk(failing(0)).installed() as disk:
        assert run(["hub", "backup", "first.tar"], env(home)) == 0
    placed = len(disk.log) - disk.log[::-1].index("replace")
    for number in (placed - 1, placed):
        with Disk(failing(number, errno.ENOSPC)).installed():
            assert run(["hub", "backup", "x.tar"], env(home)) == 1
        assert "no space left for the backup; free some and try again" in capsys.readouterr().err
        assert [path.name for path in Path.cwd().iterdir()] == ["first.tar"]


def test_r003_backup_that_has_no_room_is_not_begun(
    home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    # Patched because no test has a disk of a chosen size.
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**9, 10**9, 5000))
    assert run(["hub", "backup", "x.tar"], env(home)) == 1
    assert re.search(r"takes [\d,]+ bytes, and .* has room for 5,000\n→ free some", capsys.readouterr().err)
    assert list(Path.cwd().iterdir()) == []


def test_damaged_blob_ends_the_backup_and_is_left_out_once_it_is_known(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    digest = digest_of(WEIGHTS)
    (home / "blobs" / digest.file_name).write_bytes(WEIGHTS[:-1] + b"X")
    assert run(["hub", "backup", "x.tar"], env(home)) == 1
    assert f"blob {str(digest)[:19]} is damaged on this disk\n→ corral hub scrub" in capsys.readouterr().err
    assert list(Path.cwd().iterdir()) == []
    assert run(["hub", "scrub"], env(home)) == 1
    capsys.readouterr()
    assert run(["hub", "backup", "x.tar", "--json"], env(home)) == 0
    said = capsys.readouterr()
    assert f"Warning: {str(digest)[:19]} is damaged and left out" in said.err
    assert json.loads(said.out)["damaged"] == [str(digest)]
    assert f"blobs/{digest.file_name}" not in unpacked(Path("x.tar"))


def test_blob_that_is_missing_for_no_reason_ends_the_backup(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (home / "blobs" / digest_of(WEIGHTS).file_name).unlink()
    assert run(["hub", "backup", "x.tar"], env(home)) == 1
    assert "belongs to a model and is not there\n→ corral hub scrub" in capsys.readouterr().err
    assert list(Path.cwd().iterdir()) == []
    assert run(["hub", "backup", "--without-blobs", "x.tar"], env(home)) == 0


def test_what_a_killed_backup_left_is_removed_by_the_next(home: Path, tmp_path: Path) -> None:
    left, foreign = tmp_path / "here" / ".corral-abcdefgh", tmp_path / "here" / ".corral-file"
    left.mkdir()
    (left / "archive").write_bytes(b"half")
    foreign.write_bytes(b"not ours")
    assert run(["hub", "backup", "x.tar"], env(home)) == 0
    assert {path.name for path in Path.cwd().iterdir()} == {"x.tar", ".corral-file"}


def test_t053_t113_no_secret_that_was_given_out_is_in_a_backup(home: Path, archive: Path, secrets: dict[str, str]) -> None:
    async def revoke(services: HubServices, _: RegistryServices) -> None:
        await services.accounts.set_password("bob", PASSWORD + " again")

    on_hub(home, revoke)
    assert run(["hub", "backup", "again.tar"], env(home)) == 0
    whole = [
        archive.read_bytes(),
        Path("again.tar").read_bytes(),
        *unpacked(archive).values(),
        *unpacked(Path("again.tar")).values(),
    ]
    for name, secret in secrets.items():
        # Of an API key the id is no secret: what follows it is.
        part = secret[15:47] if secret.startswith("crlk_") else secret
        assert not any(part.encode() in content for content in whole), name


def test_t053_backup_holds_no_session_and_nothing_that_was_deleted(home: Path, archive: Path, tmp_path: Path) -> None:
    async def hashes(services: HubServices, _: RegistryServices) -> list[str]:
        rows = await services.database.read(lambda one: one.exec_driver_sql("SELECT password_hash FROM accounts").all())
        ids = await services.database.read(lambda one: one.exec_driver_sql("SELECT id FROM sessions").all())
        return [str(row[0]) for row in (*rows, *ids)]

    async def delete(services: HubServices, _: RegistryServices) -> None:
        await services.accounts.remove("bob")

    before = on_hub(home, hashes)
    on_hub(home, delete)
    left = set(on_hub(home, hashes))
    assert run(["hub", "backup", "again.tar"], env(home)) == 0
    database = unpacked(Path("again.tar"))["hub.db"]
    assert not any(gone.encode() in database for gone in before if gone not in left)
    path = tmp_path / "copy.db"
    path.write_bytes(unpacked(archive)["hub.db"])
    with contextlib.closing(sqlite3.connect(path)) as connection:
        for table in ("sessions", "codes", "nonces", "uploads WHERE finished_as IS NULL"):
            assert connection.execute(f"SELECT count(*) FROM {table}").fetchone() == (0,)


# ── Restoring ────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_hub_is_restored_into_an_empty_home(
    home: Path, archive: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    new = tmp_path / "new"
    assert run(["hub", "restore", str(archive)], env(new)) == 0
    said = capsys.readouterr()
    assert said.out == ""
    assert f"Restored 2 accounts, 3 blobs of 42 KB into {new}.\n" in said.err
    assert on_hub(new, facts) == on_hub(home, facts)
    assert {path.stat().st_mode & 0o777 for path in new.rglob("*") if path.is_file()} == {0o600}
    assert {path.stat().st_mode & 0o777 for path in (new, new / "blobs")} == {0o700}
    assert not [path for path in new.rglob("*") if path.name.endswith(".tmp") or path.name.startswith(".corral")]


def test_backup_is_restored_from_standard_input(archive: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # The command reads the process's own standard input; there is no way to hand it another one.
    with archive.open("rb") as source:
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(source))
        assert run(["hub", "restore", "-"], env(tmp_path / "new")) == 0
    assert on_hub(tmp_path / "new", facts)["sha512"] == len(SHA512)


def test_r013_sessions_of_before_end_and_keys_go_on(archive: Path, tmp_path: Path, secrets: dict[str, str]) -> None:
    new = tmp_path / "new"
    # One that somebody packed again, with a session in it.
    smuggled = with_database(
        archive,
        tmp_path,
        "INSERT INTO sessions SELECT 'x' || id, id, 'c', 0, 0, 0, 9999999999999999, '', '' FROM accounts",
    )
    for number, one in enumerate((archive, smuggled)):
        assert run(["hub", "restore", str(one)], env(new / str(number))) == 0

        async def look(services: HubServices, _: RegistryServices) -> tuple[list[BrowserSession], bool]:
            alice = await services.accounts.named("alice")
            kept = await SqlSessions(services.database).of_account(alice.id, now=services.clock.now())
            assert await services.accounts.session(secrets["cookie of alice"]) is None
            stored = [key for key in await services.credentials.keys_of(alice) if key.id in secrets["alice"]]
            return list(kept), bool(stored) and stored[0].revoked_at is None

        assert on_hub(new / str(number), look) == ([], True)


def test_home_that_is_not_empty_is_left_alone(
    home: Path, archive: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "etc").mkdir(mode=0o700)
    (tmp_path / "etc" / "passwd").write_text("root")
    for place in (home, tmp_path / "etc"):
        before = contents(place)
        assert run(["hub", "restore", str(archive)], env(place)) == 1
        assert f"{place} is not empty\n→ set CORRAL_HOME to another one, or add --replace" in capsys.readouterr().err
        assert contents(place) == before


def test_restore_while_the_hub_runs_is_refused(home: Path, archive: Path, capsys: pytest.CaptureFixture[str]) -> None:
    async def put_back(_: HubServices, __: RegistryServices) -> int:
        return await asyncio.to_thread(run, ["hub", "restore", "--replace", str(archive)], env(home))

    assert on_hub(home, put_back) == 1
    assert f"a hub runs on {home}, or a command works on its data\n→ stop it, and restore again" in capsys.readouterr().err


def test_restore_while_something_else_has_the_database_open_is_refused(
    home: Path, archive: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    # A hub of an older release does not hold the lock. Another process: locks of the own one do not count.
    code = (
        "import sqlite3, sys\n"
        "connection = sqlite3.connect(sys.argv[1])\n"
        "connection.execute('SELECT 1 FROM accounts').fetchall()\n"
        "print(flush=True)\n"
        "input()\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code, str(home / "hub.db")], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as other:
        assert other.stdout is not None
        other.stdout.readline()
        assert run(["hub", "restore", "--replace", str(archive)], env(home)) == 1
        other.communicate(b"\n")
    assert f"something has {home}/hub.db open\n→ stop the hub" in capsys.readouterr().err


def test_hub_does_not_start_while_a_backup_is_restored(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with held_alone(home / "hub.lock", otherwise=""):
        assert run(["hub", "user", "list"], env(home)) == 1
    assert f"a backup is being restored in {home}\n→ wait until that is done" in capsys.readouterr().err


def test_r013_what_was_revoked_since_the_backup_stays_revoked(
    home: Path, archive: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    async def change(services: HubServices, built: RegistryServices) -> None:
        alice, bob = await services.accounts.named("alice"), await services.accounts.named("bob")
        (key,) = await services.credentials.keys_of(bob)
        await services.credentials.revoke_key(bob, key.id)
        (old,) = await services.credentials.keys_of(alice)
        await services.credentials.rotate_key(alice, old.id, overlap_s=0)
        await services.accounts.set_disabled("bob", True)
        await services.accounts.set_password("alice", PASSWORD + " again")

    on_hub(home, change)
    former = contents(home)["peppers.json"]
    assert run(["hub", "restore", "--replace", "--json", str(archive)], env(home)) == 0
    said = capsys.readouterr()
    done = json.loads(said.out)
    assert done.keys() == documented("hub restore")
    assert sorted((one["kind"], one["name"], one["owner"]) for one in done["taken_again"]) == [
        ("account", "bob", ""),
        ("key", "ci", "alice"),
        ("key", "ci", "bob"),
        ("password", "alice", ""),
    ]
    assert "works again" not in said.err
    assert not done["is_forgetful"]
    for line in (
        "Taken away again, as it was since the backup: 2 API keys, 1 account locked out, 1 password.",
        "alice set another password since, which is in no backup → corral hub user passwd alice",
        "bob was locked out since; to let in again → corral hub user enable bob",
        'alice\'s API key "ci" was revoked or rotated since; where it is still needed → alice makes a new one',
    ):
        assert line in said.err
    found = on_hub(home, facts)
    assert (found["keys"], found["accounts"]) == ([("ci", False), ("ci", False)], [("alice", True, True), ("bob", False, False)])
    assert Path(done["former"]).stat().st_mode & 0o777 == 0o600
    assert contents(home)[Path(done["former"]).name.replace("hub.db", "peppers.json")] == former
    # The former database is whole, and may be put back.
    with contextlib.closing(sqlite3.connect(done["former"])) as connection:
        assert connection.execute("SELECT count(*) FROM api_keys").fetchone() == (3,)


def test_r013_database_copied_back_by_hand_does_not_bring_a_key_back(home: Path, archive: Path) -> None:
    async def revoke(services: HubServices, _: RegistryServices) -> None:
        bob = await services.accounts.named("bob")
        await services.credentials.revoke_key(bob, (await services.credentials.keys_of(bob))[0].id)

    on_hub(home, revoke)
    (home / "hub.db").write_bytes(unpacked(archive)["hub.db"])
    assert on_hub(home, facts)["keys"] == [("ci", True), ("ci", False)]


def test_r013_log_that_was_brought_to_a_new_machine_is_heeded(
    home: Path, archive: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    async def hide(services: HubServices, built: RegistryServices) -> None:
        alice = await caller(services)
        for visibility in (Visibility.PUBLIC, Visibility.PRIVATE):
            await built.repositories.set_visibility(TINY, alice, visibility)
        await services.accounts.set_disabled("bob", True)

    on_hub(home, hide)
    new = tmp_path / "new"
    new.mkdir(mode=0o700)
    shutil.copy(home / "revocations.log", new)
    assert run(["hub", "restore", str(archive)], env(new)) == 0
    assert "works again" not in capsys.readouterr().err
    assert on_hub(new, facts)["accounts"][1] == ("bob", False, False)


def test_r013_new_machine_without_a_log_says_what_that_means(
    archive: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    new = tmp_path / "new"
    assert run(["hub", "restore", str(archive)], env(new)) == 0
    assert f"There was no {new}/revocations.log, so what was revoked since the backup works again\n→" in capsys.readouterr().err
    assert run(["hub", "restore", "--replace", str(archive)], env(new)) == 0
    assert "works again" not in capsys.readouterr().err


@pytest.mark.parametrize("left", [[], ["hub.lock"], ["hub.lock", "blobs/sha256-0.tmp"]])
def test_restore_after_one_that_failed_or_was_killed_finds_the_home_empty(left: list[str], archive: Path, tmp_path: Path) -> None:
    new = tmp_path / "new"
    assert run(["hub", "restore", str(cut(archive, tmp_path, -2000))], env(new)) == 1
    assert [path.name for path in new.iterdir()] == ["hub.lock"]
    (new / "blobs").mkdir(mode=0o700)
    for name in left:
        (new / name).touch(mode=0o600)
    assert run(["hub", "restore", str(archive)], env(new)) == 0


def test_r013_keys_that_sign_registry_tokens_are_new_after_a_restore(home: Path, archive: Path) -> None:
    before = (home / "registry-keys.json").read_bytes()
    assert "registry-keys.json" not in unpacked(archive)
    assert run(["hub", "restore", "--replace", str(archive)], env(home)) == 0
    on_hub(home, facts)
    assert (home / "registry-keys.json").read_bytes() != before


def test_restore_says_which_blobs_are_missing(home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["hub", "backup", "--without-blobs", "x.tar"], env(home)) == 0
    new = tmp_path / "new"
    capsys.readouterr()
    assert run(["hub", "restore", "x.tar"], env(new)) == 0
    assert f"3 blobs of its models are not here → copy what is missing into {new}/blobs" in capsys.readouterr().err
    shutil.copytree(home / "blobs", new / "blobs", dirs_exist_ok=True)
    assert on_hub(new, facts) == on_hub(home, facts)


def test_blobs_that_are_there_stay_and_missing_ones_come_back(home: Path, archive: Path) -> None:
    kept, gone = home / "blobs" / digest_of(WEIGHTS).file_name, home / "blobs" / digest_of(CONFIG).file_name
    before = kept.stat().st_ino
    gone.unlink()
    assert run(["hub", "restore", "--replace", str(archive)], env(home)) == 0
    assert kept.stat().st_ino == before
    assert gone.read_bytes() == CONFIG


def test_restore_over_a_damaged_database_keeps_it_as_it_is(home: Path, archive: Path) -> None:
    (home / "hub.db").write_bytes(b"not a database at all" * 1000)
    (home / "hub.db-wal").write_bytes(b"nor a log")
    for path in home.glob("hub.db*"):
        path.chmod(0o600)
    assert run(["hub", "restore", "--replace", str(archive)], env(home)) == 0
    (former,) = [path for path in home.glob("hub.db.before-*") if not path.name.endswith("-wal")]
    assert former.read_bytes().startswith(b"not a database")
    assert former.with_name(f"{former.name}-wal").read_bytes() == b"nor a log"
    assert on_hub(home, facts)["weights"] == len(WEIGHTS)


BAD: dict[str, Callable[[Path, Path], Path]] = {
    "cut off": lambda archive, tmp: cut(archive, tmp, -2000),
    "its database is none": lambda archive, tmp: repacked(archive, lambda members: members.update({"hub.db": b"x" * 9000})),
    "its database is empty": lambda archive, tmp: repacked(archive, lambda members: members.update({"hub.db": b""})),
    "its database is damaged": lambda archive, tmp: repacked(
        archive,
        lambda members: members.update({"hub.db": members["hub.db"][:20_000] + bytes(60_000) + members["hub.db"][80_000:]}),
    ),
    "its database is cut off": lambda archive, tmp: repacked(
        archive, lambda members: members.update({"hub.db": members["hub.db"][:100_000]})
    ),
    "its database is of no hub": lambda archive, tmp: with_database(archive, tmp, "DROP TABLE alembic_version"),
    "its database has no revision": lambda archive, tmp: with_database(archive, tmp, "DELETE FROM alembic_version"),
    "its database has an unknown revision": lambda archive, tmp: with_database(
        archive, tmp, "UPDATE alembic_version SET version_num = '0000'"
    ),
    "its database is of a newer Corral": lambda archive, tmp: with_database(
        archive, tmp, "UPDATE alembic_version SET version_num = '9999'"
    ),
    "its database says it is older": lambda archive, tmp: with_database(
        archive, tmp, "UPDATE alembic_version SET version_num = '0002'"
    ),
    "its database lacks a table": lambda archive, tmp: with_database(archive, tmp, "DROP TABLE nonces"),
    "its database lacks a column": lambda archive, tmp: with_database(
        archive, tmp, "ALTER TABLE audit_log RENAME COLUMN note TO remark"
    ),
    "its database has a view": lambda archive, tmp: with_database(
        archive, tmp, "DROP TABLE sessions", "CREATE VIEW sessions AS SELECT * FROM accounts"
    ),
    "its peppers are damaged": lambda archive, tmp: repacked(archive, lambda members: members.update({"peppers.json": b"{}"})),
}


def cut(archive: Path, tmp_path: Path, end: int) -> Path:
    path = tmp_path / "cut.tar"
    path.write_bytes(archive.read_bytes()[:end])
    return path


@pytest.mark.parametrize("what", BAD)
def test_r013_backup_that_is_bad_changes_nothing(
    what: str, home: Path, archive: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bad = BAD[what](archive, tmp_path)
    on_hub(home, facts)
    before = contents(home)
    assert run(["hub", "restore", "--replace", str(bad)], env(home)) == 1
    said = capsys.readouterr().err
    assert "fault of corral" not in said
    assert re.search(r"Error: (the|this) .*backup", said) or "peppers.json is damaged" in said
    assert contents(home) == before
    assert run(["hub", "restore", str(bad)], env(tmp_path / "new")) == 1
    assert contents(tmp_path / "new") == {}


@pytest.mark.parametrize("content", [b"", b"FROM ./tiny.gguf\n", b"GGUF" + bytes(9000), b"\x1f\x8b" + bytes(600)])
def test_restore_of_what_is_no_backup_says_that(content: bytes, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "Modelfile").write_bytes(content)
    assert run(["hub", "restore", str(tmp_path / "Modelfile")], env(tmp_path / "new")) == 1
    said = "Error: this is no backup of a hub\n→ give a file that `corral hub backup` made, not compressed\n"
    assert capsys.readouterr().err == said


def test_r003_restore_that_has_no_room_is_not_begun(
    home: Path, archive: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    # Patched because no test has a disk of a chosen size.
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**9, 10**9, 5000))
    assert run(["hub", "restore", str(archive)], env(tmp_path / "new")) == 1
    assert re.search(r"takes [\d,]+ bytes, and .*/new has room for 5,000\n→ free some", capsys.readouterr().err)
    assert contents(tmp_path / "new") == {}


def test_former_databases_of_one_second_have_names_of_their_own(home: Path, archive: Path) -> None:
    for _ in range(3):
        assert run(["hub", "restore", "--replace", str(archive)], env(home)) == 0
    assert len([path for path in home.glob("hub.db.before-*") if not path.name.endswith("-wal")]) == 3


def test_hub_that_is_left_without_an_administrator_says_so(home: Path, archive: Path, capsys: pytest.CaptureFixture[str]) -> None:
    async def hand_over(services: HubServices, _: RegistryServices) -> None:
        await services.accounts.promote("bob")
        await services.accounts.demote("alice")

    on_hub(home, hand_over)
    assert run(["hub", "restore", "--replace", str(archive)], env(home)) == 0
    said = capsys.readouterr().err
    assert "alice was an administrator then; to make one again → corral hub user promote alice" in said
    assert "Nobody is an administrator now → corral hub user promote NAME" in said


def test_file_that_is_not_there_is_said_not_to_be(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["hub", "restore", str(tmp_path / "none.tar")], env(tmp_path / "new")) == 1
    assert f"Error: No such file or directory: {tmp_path}/none.tar" in capsys.readouterr().err
    assert not (tmp_path / "new").exists()


def test_t091_home_that_others_may_enter_is_refused(archive: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "new").mkdir(mode=0o755)
    assert run(["hub", "restore", str(archive)], env(tmp_path / "new")) == 1
    assert f"chmod 700 {tmp_path}/new" in capsys.readouterr().err


def test_restore_that_was_not_finished_is_finished_by_doing_it_again(
    home: Path, archive: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (home / "restore.unfinished").touch(mode=0o600)
    for words in (["user", "list"], ["backup", "x.tar"]):
        assert run(["hub", *words], env(home)) == 1
        assert "that was not finished\n→ run `corral hub restore` again" in capsys.readouterr().err
    assert run(["hub", "restore", str(archive)], env(home)) == 0
    assert on_hub(home, facts)["weights"] == len(WEIGHTS)


def test_home_with_its_database_elsewhere_is_backed_up_and_restored(home: Path, archive: Path, tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    settings = {**env(tmp_path / "new"), "CORRAL_DATABASE_URL": f"sqlite:///{elsewhere}/other.db"}
    assert run(["hub", "restore", str(archive)], settings) == 0
    assert {path.name for path in elsewhere.iterdir()} == {"other.db"}
    assert not (tmp_path / "new" / "hub.db").exists()
    assert run(["hub", "backup", "x.tar"], settings) == 0
    assert run(["hub", "restore", str(archive)], settings) == 1
    with pytest.raises(CorralError), held_alone(tmp_path / "no" / "such", otherwise=""):
        pass
