"""authorize: what it writes, what it says, and that a key is told once."""

import json
from pathlib import Path
from typing import Any

import pytest

from corral.cli.app import run
from corral.main.authorizing import authorized_keys
from corral.settings import Settings
from corral.wire.apikeys import parse_api_key
from corral.wire.authorized_keys import key_digest
from corral.wire.signing import DevicePrivateKey
from fakes_cli import fake_server

KEY_TOLD = 'Key "ci" · use · every model · does not expire. It is shown once:\n'
NOT_ASKING = "The server that runs here asks nobody for a key.\n→ restart it with CORRAL_LOCAL_AUTH=remote\n"
SOMEWHERE = "It counts where the server runs with CORRAL_LOCAL_AUTH=remote.\n"
ADA, BOB = (DevicePrivateKey(bytes([number]) * 32).public for number in (1, 2))


class Shell:
    """One home directory, and the commands called in it."""

    def __init__(self, home: Path, capsys: pytest.CaptureFixture[str]) -> None:
        self.file = home / ".ollama" / "authorized_keys"
        self._environ = {"HOME": str(home), "CORRAL_LOCAL_AUTH": "remote"}
        self._capsys = capsys

    def __call__(self, *words: str, status: int = 0, **environ: str) -> tuple[str, str]:
        assert run(["authorize", *words], {**self._environ, **environ}) == status
        out, err = self._capsys.readouterr()
        return out, err

    @property
    def lines(self) -> list[str]:
        """Of the file, without the comments that it begins with."""
        return [line for line in self.file.read_text().splitlines() if not line.startswith("#")]


@pytest.fixture
def shell(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Shell:
    return Shell(tmp_path, capsys)


def test_device_is_added_with_what_it_may_do(shell: Shell) -> None:
    out, err = shell(
        *("add", f"{ADA.authorized_key} ada@laptop", "--rights", "read", "--models", "Llama*,qwen3:*", "--cloud"),
        *("--from", "192.168.0.0/16", "--expires", "2999-01-31"),
    )
    assert out == ""
    assert err == 'Added "ada@laptop" · read, cloud · llama*, qwen3:* · from 192.168.0.0/16 · expires 2999-01-31 00:00 UTC.\n'
    assert shell.lines == [
        f'rights=read,cloud,models="llama*,qwen3:*",expires="2999-01-31",from="192.168.0.0/16" {ADA.authorized_key} ada@laptop'
    ]
    assert shell.file.stat().st_mode & 0o777 == 0o600
    assert shell.file.parent.stat().st_mode & 0o777 == 0o700


def test_device_is_added_by_its_file_and_under_a_name_of_ones_own(shell: Shell, tmp_path: Path) -> None:
    (tmp_path / "id.pub").write_text(f"# mine\n{ADA.authorized_key} ada\n\n")
    assert (
        shell("add", str(tmp_path / "id.pub"), "--name", "ada's box")[1]
        == 'Added "ada\'s box" · use · every model · does not expire.\n'
    )
    shell("add", *BOB.authorized_key.split(), "bob")
    assert shell.lines == [f"{ADA.authorized_key} ada's box", f"{BOB.authorized_key} bob"]


def test_key_is_told_once_and_only_its_digest_is_kept(shell: Shell) -> None:
    out, err = shell("key", "--name", "ci", "--expires", "30d")
    made = parse_api_key(out.strip())
    assert made is not None
    assert err.startswith('Key "ci" · use · every model · expires ')
    assert err.endswith(" UTC. It is shown once:\n")
    assert out.strip()[5:] not in shell.file.read_text()
    (entry,) = authorized_keys(Settings.from_env({"HOME": str(shell.file.parent.parent)})).entries
    assert entry.digest == key_digest(made)


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        ((200, {"auth": "remote"}), ""),
        ((200, {"auth": "on"}), ""),
        ((401, {"error": "unauthorized"}), ""),
        (
            (200, {"auth": "off"}),
            NOT_ASKING,
        ),
        ((200, {}), SOMEWHERE),
        (None, SOMEWHERE),
    ],
)
def test_only_where_no_server_asks_it_is_said_how_one_does(shell: Shell, answer: tuple[int, Any] | None, said: str) -> None:
    with fake_server({"GET /api/status": answer} if answer else {}) as server:
        # The server has its own environment, so that this shell may know nothing of its setting.
        _, told = shell("key", "ci", CORRAL_LOCAL_AUTH="", OLLAMA_HOST=server.host)
    assert told.replace(KEY_TOLD, "") == said


def test_server_of_another_machine_is_not_asked_about_the_file_of_this_one(shell: Shell) -> None:
    # An address for documentation: whoever asked it would wait.
    told = shell("key", "ci", CORRAL_LOCAL_AUTH="", OLLAMA_HOST="192.0.2.1:11434")[1]
    assert told.startswith(SOMEWHERE)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (
            ["add", "ssh-rsa AAAA"],
            "that is a key of another kind; a device's begins with ssh-ed25519\n→ copy the one line of ~/.ol",
        ),
        (
            ["add", ADA.authorized_key[:50]],
            "the key is cut off: 38 of 68 characters\n→ copy the one line of ~/.ollama/id_ed25519.pub",
        ),
        (
            ["add", f"{ADA.authorized_key[:50]}\n{ADA.authorized_key[50:]} ada"],
            "the key has a line break or a blank in it\n→ copy",
        ),
        (["add", f"'{ADA.authorized_key}'"], "the key has quotes around it\n→ copy"),
        (["add", "x" * 5000], "the key is not of the form: ssh-ed25519 AAAA…\n→ copy"),
        (["add", "id_ed25519.pub"], "there is no file id_ed25519.pub\n→ give the key itself, in quotes, or its file\n"),
        (["add", ADA.authorized_key], "a key needs a name that can be shown\n→ --name NAME"),
        (["add", f"{ADA.authorized_key} \u202e"], "a key needs a name that can be shown\n→ --name NAME"),
        (["add", f"{ADA.authorized_key} ada", "--models", "[a-z]"], "models takes names in which * and ? may stand"),
        (["add", f"{ADA.authorized_key} ada", "--from", "box.lan"], "from takes addresses and networks"),
        (["remove", "nobody"], 'there is no key "nobody"\n→ corral authorize list'),
    ],
)
def test_what_cannot_be_is_refused_and_nothing_is_written(words: list[str], said: str, shell: Shell) -> None:
    out, err = shell(*words, status=1)
    assert (out, err.startswith(f"Error: {said}")) == ("", True), err
    assert not shell.file.exists()


@pytest.mark.parametrize(
    "words",
    [
        ["key"],
        ["key", "a", "--name", "b"],
        ["key", "a", "--rights", "admin"],
        ["key", "a", "--expires", "soon"],
        ["add"],
        ["list", "x"],
    ],
)
def test_wrong_usage_is_told_as_such(words: list[str], shell: Shell) -> None:
    assert shell(*words, status=2)[0] == ""
    assert not shell.file.exists()


def test_private_key_is_never_taken_for_a_public_one(shell: Shell, tmp_path: Path) -> None:
    (tmp_path / "id").write_text("-----BEGIN OPENSSH PRIVATE KEY-----\nb3BlbnNzaA\n-----END OPENSSH PRIVATE KEY-----\n")
    _, err = shell("add", str(tmp_path / "id"), status=1)
    assert "is a private key" in err
    assert "b3Blb" not in err


def test_key_and_name_that_are_there_are_not_added_again(shell: Shell) -> None:
    shell("add", f"{ADA.authorized_key} ada")
    assert shell("add", f"{ADA.authorized_key} other", status=1)[1] == (
        f'Error: that key is there already, as "ada"\n→ corral authorize remove {ADA.fingerprint}\n'
    )
    assert 'there is a key "ada" already' in shell("key", "ada", status=1)[1]
    assert len(shell.lines) == 1


def test_list_shows_what_counts_and_warns_of_what_does_not(shell: Shell) -> None:
    shell("add", f"{ADA.authorized_key} ada", "--models", "llama*")
    key = shell("key", "ci", "--rights", "read", "--cloud")[0].strip()
    shell.file.write_text(shell.file.read_text() + "rihgts=read ssh-ed25519 AAAA eve\n")
    out, err = shell("list")
    assert [line.split("    ")[0].split()[0] for line in out.splitlines()] == ["NAME", "ada", "ci"]
    assert ADA.fingerprint in out
    assert err.startswith(f"Warning: {shell.file}: line 5 grants nothing")
    rows = json.loads(shell("list", "--json")[0])
    assert rows[0] == {
        "name": "ada",
        "fingerprint": ADA.fingerprint,
        "kind": "device",
        "rights": "use",
        "cloud": False,
        "models": ["llama*"],
        "from": [],
        "expires_at": None,
        "line": 3,
    }
    assert (rows[1]["kind"], rows[1]["rights"], rows[1]["cloud"]) == ("api-key", "read", True)
    assert key[5:] not in out


def test_list_of_nobody_is_a_table_without_rows(shell: Shell) -> None:
    assert shell("list")[0].splitlines()[0].split() == ["NAME", "RIGHTS", "MODELS", "FROM", "EXPIRES", "FINGERPRINT"]
    assert json.loads(shell("list", "--json")[0]) == []


def test_expired_line_is_listed_as_such(shell: Shell) -> None:
    shell.file.parent.mkdir(mode=0o700)
    shell.file.write_text(f"expires=2001-01-01 {ADA.authorized_key} ada\n")
    assert "years ago" in shell("list")[0]
    assert "expired" in shell("list")[0]


@pytest.mark.parametrize("word", ["ada", ADA.fingerprint])
def test_key_is_removed_wherever_it_stands_and_all_else_stays(word: str, shell: Shell) -> None:
    shell.file.parent.mkdir(mode=0o700)
    kept = f"# mine\nnot understood\n{BOB.authorized_key} bob\n"
    shell.file.write_text(f"{ADA.authorized_key} ada\n{kept}rights=read {ADA.authorized_key} ada at home\n")
    assert shell("remove", word)[1] == f'Removed "ada" ({ADA.fingerprint}).\n'
    assert shell.file.read_text() == kept


def test_name_of_several_keys_is_not_guessed(shell: Shell) -> None:
    shell.file.parent.mkdir(mode=0o700)
    shell.file.write_text(f"{ADA.authorized_key} x\n{BOB.authorized_key} x\n")
    assert ADA.fingerprint in shell("remove", "x", status=1)[1]
    assert len(shell.lines) == 2


def test_another_file_is_used_where_one_is_named(shell: Shell, tmp_path: Path) -> None:
    (tmp_path / "etc").mkdir(mode=0o755)
    shell("key", "ci", CORRAL_AUTHORIZED_KEYS=str(tmp_path / "etc" / "keys"))
    assert (tmp_path / "etc" / "keys").exists()
    assert not shell.file.exists()


def test_file_that_others_can_write_is_not_added_to(shell: Shell) -> None:
    shell("key", "ci")
    shell.file.chmod(0o660)
    assert "close it with: chmod go-w" in shell("key", "more", status=1)[1]
    assert len(shell.lines) == 1
