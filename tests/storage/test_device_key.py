"""The device key: made once, private from its first moment, and refused when somebody else could have read it (T91)."""

import os
import shutil
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

from corral.storage.home import FileDeviceKeys
from corral.wire.errors import CorralError
from corral.wire.signing import parse_authorized_key
from fakes import SeededEntropy

SEED = bytes(range(32))
#: Made for this test by ssh-keygen, with the passphrase "secret".
PROTECTED = b"""-----BEGIN OPENSSH PRIVATE KEY-----
b3BlbnNzaC1rZXktdjEAAAAACmFlczI1Ni1jdHIAAAAGYmNyeXB0AAAAGAAAABBTCbXlJs
mThcwDpQJWO6dqAAAAEAAAAAEAAAAzAAAAC3NzaC1lZDI1NTE5AAAAINoWypY+9VJ+zO2i
bnCE2B03BxJiDQrgQ9TfMHgJfaUhAAAAkPGu6Ks6mAIeEvrQw17sU/i62kCp04ywkDSljh
b7V061jYAi1+ttRlrekvNjnD9hcSPaSbmzqi9KCW+qOiNLsC0+TLLcg3goH0LJTwx6tMBE
/Atay23b3FUlmTD/POmiHVv9NZZaMW8SyJLOA6SY7msVfnXAxLggEegADJPgk142jaMsez
pEQhmjWvvYCLJThg==
-----END OPENSSH PRIVATE KEY-----
"""


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    return tmp_path / "home" / ".ollama"


@pytest.fixture
def keys(directory: Path) -> FileDeviceKeys:
    return FileDeviceKeys(directory, SeededEntropy())


def mode_of(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def openssh(key: ed25519.Ed25519PrivateKey | rsa.RSAPrivateKey | ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(Encoding.PEM, PrivateFormat.OpenSSH, NoEncryption())


def ours() -> bytes:
    return openssh(ed25519.Ed25519PrivateKey.from_private_bytes(SEED))


def put(directory: Path, content: bytes, *, mode: int = 0o600) -> Path:
    directory.mkdir(mode=0o700, parents=True)
    path = directory / "id_ed25519"
    path.write_bytes(content)
    path.chmod(mode)
    return path


def refusal(keys: FileDeviceKeys) -> str:
    """Both ways in refuse alike, and leave the file alone."""
    texts = set()
    for use in (keys.load, keys.load_or_create):
        with pytest.raises(CorralError) as caught:
            use()
        assert caught.value.code == "invalid"
        texts.add(caught.value.message)
    (text,) = texts
    return text


# ── Making ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_key_that_is_absent_is_none_and_nothing_is_made(keys: FileDeviceKeys, directory: Path) -> None:
    assert keys.load() is None
    assert not directory.exists()


def test_key_is_made_once_and_stays(keys: FileDeviceKeys, directory: Path) -> None:
    key = keys.load_or_create()
    again = FileDeviceKeys(directory, SeededEntropy(1))
    assert again.load_or_create() == again.load() == keys.load() == key


def test_public_key_lies_beside_it_in_the_form_ssh_uses(keys: FileDeviceKeys, directory: Path) -> None:
    key = keys.load_or_create()
    public = directory / "id_ed25519.pub"
    assert (parse_authorized_key(public.read_text()), mode_of(public)) == (key.public, 0o644)
    assert public.read_text().endswith("\n")


def test_public_key_that_is_there_is_not_replaced(keys: FileDeviceKeys, directory: Path) -> None:
    put(directory, ours())
    (directory / "id_ed25519.pub").write_text("mine")
    keys.load_or_create()
    assert (directory / "id_ed25519.pub").read_text() == "mine"


@pytest.mark.parametrize("umask", [0o000, 0o022, 0o077])
def test_t091_key_made_under_any_umask_is_private(keys: FileDeviceKeys, directory: Path, umask: int) -> None:
    old = os.umask(umask)
    try:
        keys.load_or_create()
    finally:
        os.umask(old)
    assert (mode_of(directory), mode_of(directory / "id_ed25519")) == (0o700, 0o600)
    assert mode_of(directory / "id_ed25519.pub") == 0o644
    assert sorted(path.name for path in directory.iterdir()) == ["id_ed25519", "id_ed25519.pub"]


def test_t091_directory_that_is_there_keeps_its_mode(keys: FileDeviceKeys, directory: Path) -> None:
    directory.mkdir(parents=True)
    directory.chmod(0o755)
    keys.load_or_create()
    assert mode_of(directory) == 0o755


def test_t091_starters_that_race_end_up_with_one_key(directory: Path) -> None:
    """Processes, each with other random bytes, let go at once."""
    program = (
        "import os, sys; from pathlib import Path; from corral.storage.home import FileDeviceKeys\n"
        "class Entropy:\n    def bytes(self, count): return os.urandom(count)\n"
        "print('ready', flush=True); sys.stdin.readline()\n"
        "print(FileDeviceKeys(Path(sys.argv[1]), Entropy()).load_or_create().public.fingerprint)"
    )
    starters = [
        subprocess.Popen([sys.executable, "-c", program, directory], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        for _ in range(4)
    ]
    for starter in starters:
        assert starter.stdout is not None
        assert starter.stdout.readline() == "ready\n"
    for starter in starters:
        assert starter.stdin is not None
        starter.stdin.write("\n")
        starter.stdin.flush()
    fingerprints = {starter.communicate()[0] for starter in starters}
    assert len(fingerprints) == 1
    assert fingerprints.pop().startswith("SHA256:")


def test_ssh_agrees_on_the_fingerprint(keys: FileDeviceKeys, directory: Path) -> None:
    program = shutil.which("ssh-keygen")
    if program is None:
        pytest.skip("ssh-keygen is not installed")
    key = keys.load_or_create()
    (directory / "id_ed25519.pub").unlink()  # so that it reads the private key
    printed = subprocess.run([program, "-lf", directory / "id_ed25519"], capture_output=True, text=True, check=True).stdout
    assert printed.split()[:2] == ["256", key.public.fingerprint]
    assert printed.rstrip().endswith("(ED25519)")


# ── Reading ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_key_that_ssh_or_ollama_made_is_read(keys: FileDeviceKeys, directory: Path) -> None:
    put(directory, ours())
    key = keys.load()
    assert key is not None
    assert key.seed == SEED
    assert str(SEED.hex()) not in repr(key)


def test_key_that_was_exchanged_is_noticed(keys: FileDeviceKeys, directory: Path) -> None:
    first = keys.load_or_create()
    (directory / "id_ed25519").write_bytes(ours())
    second = keys.load()
    assert second is not None
    assert (second.seed, second != first) == (SEED, True)


@pytest.mark.parametrize("mode", [0o644, 0o640, 0o604, 0o660, 0o601, 0o777])
def test_t091_key_that_others_may_touch_is_refused_with_the_command_that_mends_it(
    keys: FileDeviceKeys, directory: Path, mode: int
) -> None:
    path = put(directory, ours(), mode=mode)
    assert f"chmod 600 {path}" in refusal(keys)
    path.chmod(0o600)
    assert keys.load() is not None


def test_t091_key_that_becomes_readable_is_refused_though_it_was_read_before(keys: FileDeviceKeys, directory: Path) -> None:
    keys.load_or_create()
    (directory / "id_ed25519").chmod(0o644)
    assert "chmod 600" in refusal(keys)


def test_t091_symbolic_link_is_refused(keys: FileDeviceKeys, directory: Path) -> None:
    put(directory, ours()).rename(directory / "elsewhere")
    (directory / "id_ed25519").symlink_to(directory / "elsewhere")
    assert "is a symbolic link" in refusal(keys)


def test_t091_link_that_leads_nowhere_is_not_written_through(keys: FileDeviceKeys, directory: Path) -> None:
    directory.mkdir(parents=True)
    (directory / "id_ed25519").symlink_to(directory / "absent")
    assert "is a symbolic link" in refusal(keys)
    assert not (directory / "absent").exists()


@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir])
def test_t091_what_is_no_file_is_refused_at_once(
    keys: FileDeviceKeys, directory: Path, make: Callable[[Path, int], None]
) -> None:
    directory.mkdir(parents=True)
    make(directory / "id_ed25519", 0o600)
    assert "regular file" in refusal(keys) or "directory" in refusal(keys).lower()


def test_t091_key_of_another_user_is_refused(keys: FileDeviceKeys, directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = put(directory, ours())
    if os.geteuid() == 0:
        os.chown(path, 12345, 12345)
    else:
        # Only root may give a file away; for anybody else, be somebody else.
        monkeypatch.setattr(os, "geteuid", lambda: 12345)
    assert "belongs to another user" in refusal(keys)


def _truncated() -> bytes:
    return ours()[:200]


DAMAGED: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "is damaged"),
    "text": (b"hello", "is damaged"),
    "binary": (b"\0\xff" * 100, "is damaged"),
    "truncated": (_truncated(), "is damaged"),
    "half a line": (ours().replace(b"QyNTUxOQ", b"QyNT", 1), "is damaged"),
    "too long": (ours() + b"x" * 100_000, "too long"),
    "passphrase": (PROTECTED, "ssh-keygen -p"),
    "ECDSA": (openssh(ec.generate_private_key(ec.SECP256R1())), "is not an Ed25519 key"),
    "RSA": (openssh(rsa.generate_private_key(65537, 2048)), "is not an Ed25519 key"),
}


@pytest.mark.parametrize("case", DAMAGED)
def test_key_that_cannot_be_used_is_refused_and_kept(keys: FileDeviceKeys, directory: Path, case: str) -> None:
    content, reason = DAMAGED[case]
    path = put(directory, content)
    assert reason in refusal(keys)
    assert path.read_bytes() == content
    assert not (directory / "id_ed25519.pub").exists()


def test_t113_refusal_holds_nothing_of_the_key(keys: FileDeviceKeys, directory: Path) -> None:
    put(directory, _truncated())
    with pytest.raises(CorralError) as caught:
        keys.load()
    line = ours().splitlines()[2].decode()
    error: BaseException | None = caught.value
    while error is not None:
        assert line not in str(error)
        error = error.__cause__


def test_directory_that_cannot_be_made_is_said(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(CorralError) as caught:
        FileDeviceKeys(tmp_path / "file" / ".ollama", SeededEntropy()).load_or_create()
    assert caught.value.code == "invalid"
