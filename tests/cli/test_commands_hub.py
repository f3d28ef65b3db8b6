"""hub user, device, key and unhost on a hub's data in an empty home: what they grant, and what they say when they cannot."""

import asyncio
import contextlib
import io
import json
import os
import re
import shutil
import sqlite3
import sys
from datetime import datetime, timedelta
from pathlib import Path

import click.termui
import pytest

from corral.cli.app import run
from corral.main.services import open_hub_services, registry_services
from corral.settings import Settings
from corral.storage.locks import held_alone
from corral.wire.repositories import parse_repository
from fakes_local import FakeDeviceKeys
from fakes_registry import digest_of
from registry_hub import chunks, with_key

KEY = FakeDeviceKeys().key.public.authorized_key


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A home whose hub has the administrator alice and the account bob, to copy."""
    home = tmp_path_factory.mktemp("made")
    for name, *options in (("alice", "--admin"), ("bob",)):
        with pytest.MonkeyPatch.context() as patch:
            # The command reads the process's own standard input; there is no way to hand it another one.
            patch.setattr(sys, "stdin", io.StringIO("correct horse battery\n"))
            assert run(["hub", "user", "add", name, *options, "--password-stdin"], {"HOME": str(home)}) == 0
    return home


@pytest.fixture
def env(made: Path, tmp_path: Path) -> dict[str, str]:
    """A copy of that home."""
    shutil.copytree(made, tmp_path, dirs_exist_ok=True)
    return {"HOME": str(tmp_path)}


@pytest.mark.parametrize(
    "words",
    [
        ["user", "list"],
        ["user", "disable", "bob"],
        ["user", "delete", "bob"],
        ["key", "list", "bob"],
        ["quota", "bob", "1GB"],
        ["host", "alice/tiny"],
        ["gc"],
        ["scrub"],
        ["backup", "nowhere.tar"],
        ["rotate-keys"],
    ],
)
def test_command_where_no_hub_is_says_so_and_makes_nothing(
    words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    nowhere = tmp_path / "no" / "such"
    assert run(["hub", *words], {"HOME": str(tmp_path), "CORRAL_HOME": str(nowhere)}) == 1
    said = f"Error: there is no hub in {nowhere}\n→ start it with `corral hub serve`, or set CORRAL_HOME\n"
    assert capsys.readouterr().err == said
    assert not (tmp_path / "no").exists()


def test_first_account_makes_a_hub_and_says_where(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, said in (("alice", f"Made a new hub in {tmp_path / 'box'}.\nCreated alice.\n"), ("bob", "Created bob.\n")):
        monkeypatch.setattr(sys, "stdin", io.StringIO("correct horse battery\n"))
        assert (
            run(["hub", "user", "add", name, "--password-stdin"], {"HOME": str(tmp_path), "CORRAL_HOME": str(tmp_path / "box")})
            == 0
        )
        assert capsys.readouterr().err == said


def test_device_added_without_scopes_may_not_push(env: dict[str, str], capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["hub", "device", "add", "bob", "--name", "box", "--key", KEY], env) == 0
    capsys.readouterr()
    assert run(["hub", "device", "list", "bob", "--json"], env) == 0
    assert json.loads(capsys.readouterr().out)[0]["scopes"] == ["inference", "keys", "models:pull"]


def test_device_scopes_are_set_to_what_is_named(env: dict[str, str], capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["hub", "device", "add", "bob", "--name", "box", "--key", KEY], env) == 0
    for words, said in ((["inference", "models:push"], "inference, models:push"), (["none"], "nothing but say who it is")):
        capsys.readouterr()
        assert run(["hub", "device", "scope", "bob", "box", *words], env) == 0
        assert capsys.readouterr().err == f'"box" may: {said}.\n'
    assert run(["hub", "device", "scope", "bob", "box", "admin"], env) == 2
    assert run(["hub", "device", "scope", "bob", "desk", "inference"], env) == 1


def test_credentials_for_a_disabled_account_are_refused_with_the_next_step(
    env: dict[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["hub", "user", "disable", "bob"], env) == 0
    capsys.readouterr()
    for arguments in (["device", "add", "bob", "--name", "box", "--key", KEY], ["key", "create", "bob", "--name", "ci"]):
        assert run(["hub", *arguments], env) == 1
        assert capsys.readouterr().err == "Error: bob is disabled\n→ corral hub user enable bob\n"


def test_unhost_of_what_is_not_offered_says_where_to_look(env: dict[str, str], capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["hub", "unhost", "x"], env) == 1
    assert "→ http://localhost:11435/library shows what is" in capsys.readouterr().err


def test_t062_deleted_account_is_gone_with_its_credentials_and_its_name_stays_taken(
    env: dict[str, str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert run(["hub", "key", "create", "bob", "ci"], env) == 0
    capsys.readouterr()
    assert run(["hub", "user", "delete", "bob"], env) == 2
    assert "→ add --yes" in capsys.readouterr().err
    monkeypatch.setattr(sys, "stdin", _Terminal("alice\n"))
    assert run(["hub", "user", "delete", "bob"], env) == 1
    said = capsys.readouterr().err
    assert said.startswith("bob goes for good, with 0 models.\nType bob to delete it: ")
    assert "nothing was deleted" in said
    monkeypatch.setattr(sys, "stdin", _Terminal("Bob\n"))
    assert run(["hub", "user", "delete", "bob"], env) == 0
    assert capsys.readouterr().err.endswith("Deleted bob.\n")
    assert run(["hub", "key", "list", "bob"], env) == 1
    monkeypatch.setattr(sys, "stdin", io.StringIO("correct horse battery\n"))
    assert run(["hub", "user", "add", "Bob", "--password-stdin"], env) == 1
    assert "already in use" in capsys.readouterr().err


def test_only_administrator_is_not_deleted(env: dict[str, str], capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["hub", "user", "delete", "alice", "--yes"], env) == 1
    assert "alice is the only administrator" in capsys.readouterr().err


class _Terminal(io.StringIO):
    """Standard input that a person types at."""

    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize("words", [["ci"], ["--name", "ci"]])
def test_key_lives_until_it_is_revoked_unless_told_otherwise_m7(
    env: dict[str, str], capsys: pytest.CaptureFixture[str], words: list[str]
) -> None:
    assert run(["hub", "key", "create", "bob", *words], env) == 0
    assert run(["hub", "key", "create", "bob", "other", "--expires", "90d"], env) == 0
    capsys.readouterr()
    assert run(["hub", "key", "list", "bob", "--json"], env) == 0
    first, second = json.loads(capsys.readouterr().out)
    life = datetime.fromisoformat(second["expires_at"]) - datetime.fromisoformat(second["created_at"])
    assert (first["name"], first["expires_at"], round(life / timedelta(days=1))) == ("ci", None, 90)


def test_key_of_a_name_that_another_one_has_says_so(env: dict[str, str], capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["hub", "key", "create", "bob", "ci"], env) == 0
    assert "There is another" not in capsys.readouterr().err
    assert run(["hub", "key", "create", "bob", "ci"], env) == 0
    assert 'There is another key named "ci" (' in capsys.readouterr().err


@pytest.mark.parametrize("words", [[], ["ci", "--name", "ci"]])
def test_key_without_a_name_or_with_two_is_wrong_usage(
    env: dict[str, str], capsys: pytest.CaptureFixture[str], words: list[str]
) -> None:
    assert run(["hub", "key", "create", "bob", *words], env) == 2
    assert "→ corral hub key create bob ci" in capsys.readouterr().err


def test_key_of_an_upstream_is_kept_apart_and_forgotten_with_its_last_model(
    env: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def kept() -> dict[str, str]:
        return json.loads((tmp_path / ".corral/upstream-keys.json").read_text())

    def host(name: str, typed: str, *options: str) -> int:
        monkeypatch.setattr(sys, "stdin", io.StringIO(typed))
        return run(["hub", "host", name, "--upstream", "http://10.0.0.7:8000/", *options], env)

    assert host("big", "sk-provider\n", "--upstream-key-stdin") == 0
    assert host("small", "") == 0
    assert kept() == {"http://10.0.0.7:8000": "sk-provider"}
    assert b"sk-provider" not in b"".join(path.read_bytes() for path in (tmp_path / ".corral").glob("hub.db*"))
    assert run(["hub", "unhost", "big"], env) == 0
    assert kept() == {"http://10.0.0.7:8000": "sk-provider"}
    assert run(["hub", "unhost", "small"], env) == 0
    assert kept() == {}
    capsys.readouterr()
    for typed in ("\n", "sk é\n", "sk\tx\n"):
        assert host("big", typed, "--upstream-key-stdin") == 2
    assert "sk" not in capsys.readouterr().err.replace("asked", "")
    assert run(["hub", "host", "big", "--upstream-key-stdin"], env) == 2


@pytest.mark.parametrize(
    ("typed", "fault"),
    [
        ('"sk-provider"\n', "has quotes around it"),
        ("sk-pro\nvider\n", "has a line break in it"),
        ("sk-pro vider\n", "has a blank in it"),
        ("sk-pröv\n", "holds characters that no API key has"),
    ],
)
def test_damaged_key_of_an_upstream_is_not_kept_and_what_is_wrong_is_said(
    typed: str, fault: str, env: dict[str, str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    capsys.readouterr()
    monkeypatch.setattr(sys, "stdin", io.StringIO(typed))
    assert run(["hub", "host", "big", "--upstream", "http://10.0.0.7:8000", "--upstream-key-stdin"], env) == 2
    assert capsys.readouterr().err == (
        f"Error: what came on standard input {fault}\n→ pipe in the key alone, on one line and without quotes\n"
    )


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("10.0.0.7:8000", "--upstream is '10.0.0.7:8000'; it takes a server's address, such as http://10.0.0.7:8000"),
        ("ftp://h", "--upstream is 'ftp://h'; it takes a server's address, such as http://10.0.0.7:8000"),
        ("http://h/a b", "--upstream is 'http://h/a b'; it takes a server's address, such as http://10.0.0.7:8000"),
        ("http://", "--upstream is 'http://'; it takes a server's address, such as http://10.0.0.7:8000"),
        ("http://h?v=1", "--upstream is 'http://h?v=1'; it takes the server's address without ? and #"),
        ("http://u:pw@h", "--upstream takes the server's address without a user name or password"),
    ],
)
def test_model_is_not_offered_from_an_address_that_no_server_can_have(
    url: str, said: str, env: dict[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    capsys.readouterr()
    assert run(["hub", "host", "far", "--upstream", url], env) == 2
    assert capsys.readouterr().err.startswith(f"Error: {said}\n")
    assert run(["hub", "unhost", "far"], env) == 1


def test_address_of_an_upstream_may_end_as_openai_has_it(env: dict[str, str], tmp_path: Path) -> None:
    assert run(["hub", "host", "far", "--upstream", "https://h.example/llm/v1/"], env) == 0
    with contextlib.closing(sqlite3.connect(tmp_path / ".corral" / "hub.db")) as database:
        assert database.execute("SELECT upstream_url FROM hosted_models").fetchall() == [("https://h.example/llm",)]


def test_damaged_public_key_of_a_device_is_refused_with_what_is_wrong(
    env: dict[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    capsys.readouterr()
    assert run(["hub", "device", "add", "bob", "--name", "box", "--key", KEY[:-9]], env) == 1
    assert capsys.readouterr().err == (
        "Error: the key is cut off: 59 of 68 characters\n"
        "→ copy the one line of ~/.ollama/id_ed25519.pub on the device, whole and without quotes\n"
    )


def test_model_is_withdrawn_also_where_the_keys_of_upstreams_are_damaged_and_both_is_said(
    env: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["hub", "host", "far", "--upstream", "http://10.0.0.9:8080"], env) == 0
    keys = tmp_path / ".corral/upstream-keys.json"
    keys.write_text("{")
    keys.chmod(0o600)
    capsys.readouterr()
    assert run(["hub", "unhost", "far"], env) == 1
    assert capsys.readouterr().err == (
        f"Error: far is no longer offered, but no key was forgotten: {keys} is damaged\n"
        "→ remove it, and give its keys again: corral hub host … --upstream-key-stdin\n"
    )
    with contextlib.closing(sqlite3.connect(tmp_path / ".corral" / "hub.db")) as database:
        noted = [row[0] for row in database.execute("SELECT action FROM audit_log WHERE subject = 'far:latest' ORDER BY rowid")]
    assert noted == ["model.host", "model.unhost", "model.unhost_unfinished"]
    assert run(["hub", "unhost", "far"], env) == 1
    assert '"far" is not offered' in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["passwd", "carol"], "Error: there is no account named carol\n→ corral hub user list\n"),
        (["add", "Bob"], "Error: that name or e-mail address is already in use\n"),
        (["add", "b"], "Error: a name has 2 to 39 letters, digits, hyphens or underscores, and begins with a letter or digit\n"),
    ],
)
def test_name_that_will_not_do_is_told_before_a_password_is_asked_for(
    words: list[str], said: str, env: dict[str, str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    capsys.readouterr()
    monkeypatch.setattr(sys, "stdin", _Terminal(""))
    asked: list[str] = []
    # click reads a hidden answer from the terminal itself, which a test does not have.
    monkeypatch.setattr(click.termui, "hidden_prompt_func", lambda prompt: asked.append(prompt) or "correct horse battery")
    assert run(["hub", "user", *words], env) == 1
    assert (capsys.readouterr().err, asked) == (said, [])


def test_t114_what_is_offered_and_withdrawn_is_in_the_audit_log(env: dict[str, str], tmp_path: Path) -> None:
    def noted() -> list[tuple[str, str, str, str]]:
        with contextlib.closing(sqlite3.connect(tmp_path / ".corral" / "hub.db")) as database:
            query = "SELECT actor, action, subject, note FROM audit_log WHERE action LIKE 'model.%' ORDER BY rowid"
            return [tuple(row) for row in database.execute(query)]

    assert run(["hub", "host", "far", "--upstream", "http://user:hunter2@10.0.0.9:8080", "--private"], env) == 2
    assert noted() == []
    assert run(["hub", "host", "far", "--upstream", "http://10.0.0.9:8080", "--private"], env) == 0
    assert run(["hub", "unhost", "far"], env) == 0
    assert run(["hub", "unhost", "far"], env) == 1
    assert run(["hub", "host", "alice/nothing"], env) == 1
    assert [row[:3] for row in noted()] == [
        ("console", "model.host", "far:latest"),
        ("console", "model.unhost", "far:latest"),
        ("console", "model.host", "alice/nothing:latest"),
        ("console", "model.host_refused", "alice/nothing:latest"),
    ]
    assert noted()[0][3] == "private, run by 10.0.0.9:8080"


def test_gc_says_what_went_and_what_could_go(env: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    orphan = tmp_path / ".corral" / "blobs" / f"sha256-{'0' * 64}"
    orphan.parent.mkdir(mode=0o700, exist_ok=True)
    stray = orphan.parent / "uploads" / "left"
    stray.parent.mkdir(mode=0o700)
    stray.write_bytes(b"xyz")
    os.utime(stray, (0, 0))
    assert run(["hub", "gc", "--dry-run", "--json"], env) == 0
    found = json.loads(capsys.readouterr().out)
    assert found == {"uploads": 0, "links": 0, "repositories": 0, "blobs": 0, "size_bytes": 0, "files": 0, "dry_run": True}
    assert stray.exists()
    assert run(["hub", "gc"], env) == 0
    assert re.fullmatch(
        r"REMOVED +COUNT +SIZE *\nblobs +0 +0 B *\nlinks +0 *\nrepositories +0 *\nuploads +0 *\nfiles +\d+ *\n",
        capsys.readouterr().out,
    )


def test_gc_beside_another_says_so(env: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with held_alone(tmp_path / ".corral" / "collect.lock", otherwise=""):
        assert run(["hub", "gc"], env) == 1
    assert "another collection is under way" in capsys.readouterr().err


def test_quota_of_a_repository_is_set_by_an_existing_name_and_a_size(
    env: dict[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["hub", "quota", "alice/tiny", "lots"], env) == 2
    assert "'lots' is no size" in capsys.readouterr().err
    assert run(["hub", "quota", "alice/tiny", "20GB"], env) == 1
    assert "repository unknown" in capsys.readouterr().err


def test_quota_without_a_size_shows_it_and_what_is_used(env: dict[str, str], capsys: pytest.CaptureFixture[str]) -> None:
    capsys.readouterr()
    assert run(["hub", "quota", "Bob"], env) == 0
    assert capsys.readouterr().out == "account  bob\nquota    none\nused     0 B\n"
    assert run(["hub", "quota", "bob", "20GB"], env) == 0
    assert run(["hub", "quota", "bob"], env) == 0
    assert capsys.readouterr().out == "account  bob\nquota    20 GB\nused     0 B\n"
    assert run(["hub", "quota", "bob", ""], env) == 2
    assert run(["hub", "quota", "carol"], env) == 1
    assert run(["hub", "quota", "bob/tiny"], env) == 1
    assert "repository unknown" in capsys.readouterr().err


@pytest.mark.parametrize("words", [["add", "carol"], ["passwd", "bob"]])
def test_rule_for_passwords_is_told_before_one_is_asked_for(
    words: list[str], env: dict[str, str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    capsys.readouterr()
    monkeypatch.setattr(sys, "stdin", _Terminal(""))
    # click reads a hidden answer from the terminal itself, which a test does not have.
    monkeypatch.setattr(click.termui, "hidden_prompt_func", lambda prompt: "correct horse battery")
    assert run(["hub", "user", *words], env) == 0
    assert capsys.readouterr().err.startswith("A password needs at least 15 characters; several words are a good one.\n")


async def store(env: dict[str, str], count: int) -> None:
    """So many bytes in the repository bob/tiny."""
    settings = Settings.from_env(env)
    async with open_hub_services(settings) as services:
        bob = with_key(await services.accounts.named("bob"))
        uploads = registry_services(settings, services).registry
        await uploads.put_blob(parse_repository("bob/tiny"), bob, digest_of(b"x" * count), chunks(b"x" * count))


@pytest.mark.parametrize("name", ["bob", "bob/tiny"])
def test_quota_below_what_is_held_says_that_nothing_is_deleted(
    env: dict[str, str], name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    asyncio.run(store(env, 3000))
    assert run(["hub", "quota", name, "3KB"], env) == 0
    assert "deleted" not in capsys.readouterr().err
    assert run(["hub", "quota", name, "2KB"], env) == 0
    assert "It holds 3 KB: nothing of that is deleted, and only further pushes are refused." in capsys.readouterr().err
    # The default is a quota as well.
    said = {"bob": True, "bob/tiny": False}[name]
    assert run(["hub", "quota", name, "none"], {**env, "CORRAL_QUOTA": "1KB"}) == 0
    assert ("nothing of that is deleted" in capsys.readouterr().err) == said


def test_quota_of_an_account_is_set_shown_and_taken_back(env: dict[str, str], capsys: pytest.CaptureFixture[str]) -> None:
    def quotas() -> dict[str, int | None]:
        assert run(["hub", "user", "list", "--json"], env) == 0
        return {row["name"]: row["quota_bytes"] for row in json.loads(capsys.readouterr().out)}

    capsys.readouterr()
    assert run(["hub", "quota", "Bob", "20GB"], env) == 0
    assert capsys.readouterr().err == "bob may hold at most 20 GB.\n"
    assert quotas() == {"alice": None, "bob": 20_000_000_000}
    assert run(["hub", "quota", "bob", "none"], env) == 0
    assert capsys.readouterr().err == "bob may hold as much as CORRAL_QUOTA allows.\n"
    assert quotas() == {"alice": None, "bob": None}
    assert run(["hub", "quota", "carol", "1GB"], env) == 1
    assert capsys.readouterr().err == "Error: there is no account named carol\n→ corral hub user list\n"


def test_host_of_what_nobody_pushed_says_to_push_it(env: dict[str, str], capsys: pytest.CaptureFixture[str]) -> None:
    capsys.readouterr()
    assert run(["hub", "host", "alice/none"], env) == 1
    assert "is in no repository of this hub\n→ push it first (corral push)" in capsys.readouterr().err


def test_rotated_keys_are_new_and_the_former_ones_still_count(
    env: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    peppers, signing = tmp_path / ".corral" / "peppers.json", tmp_path / ".corral" / "registry-keys.json"
    before = json.loads(peppers.read_bytes()), json.loads(signing.read_bytes())
    capsys.readouterr()
    assert run(["hub", "rotate-keys"], env) == 0
    said = capsys.readouterr().err
    assert "Rotated the key of registry tokens" in said
    assert "at its next start" in said
    after = json.loads(peppers.read_bytes()), json.loads(signing.read_bytes())
    assert (after[0]["current"], after[1]["current"]) == ("p2", "t2")
    assert after[0]["peppers"]["p1"] == before[0]["peppers"]["p1"]
    assert after[1]["keys"]["t1"]["seed"] == before[1]["keys"]["t1"]["seed"]
    assert [former["secret"] for former in after[1]["former_tickets"]] == [before[1]["tickets"]]
    assert after[1]["tickets"] != before[1]["tickets"]
    # No secret is shown.
    assert not any(secret in said for secret in (*after[0]["peppers"].values(), after[1]["tickets"]))


def test_keys_are_rotated_by_one_at_a_time(env: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with held_alone(tmp_path / ".corral" / "rotate.lock", otherwise=""):
        assert run(["hub", "rotate-keys"], env) == 1
    assert "another rotation is under way" in capsys.readouterr().err
    assert json.loads((tmp_path / ".corral" / "peppers.json").read_bytes())["current"] == "p1"
