"""A hub that is backed up while people push to it, restored elsewhere and started: nothing acknowledged is missing and nothing
revoked is back (R13); and a backup that is ended in the middle leaves nothing behind."""

import hashlib
import itertools
import json
import os
import shutil
import signal
import subprocess
import tarfile
import threading
from base64 import b64encode
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from flows.stack import PASSWORD, Answer, Running, Stack, answers, call, corral_command, wait_until
from flows.test_revocation import id_of, sign_in_status

MANIFEST = "application/vnd.docker.distribution.manifest.v2+json"
CONFIG = b'{"model_format":"gguf"}'
MIB = 1 << 20


def digest_of(content: bytes) -> str:
    return f"sha256:{hashlib.sha256(content).hexdigest()}"


def asked(stack: Stack, method: str, path: str, body: bytes | None = None, *, key: str = "", **headers: str) -> Answer:
    """A request to the registry. key: alice's."""
    proof = {"Authorization": "Basic " + b64encode(f"alice:{key}".encode()).decode()} if key else {}
    sent = {**proof, **{name.replace("_", "-"): value for name, value in headers.items()}}
    return call(method, f"{stack.hub_url}/v2/{path}", body, headers=sent)


def push(stack: Stack, key: str, name: str, weights: bytes) -> None:
    """A model, all of it acknowledged."""
    for content in (weights, CONFIG):
        answer = asked(stack, "POST", f"alice/{name}/blobs/uploads/?digest={digest_of(content)}", content, key=key)
        assert answer.status == 201, answer.body
    layer = {"mediaType": "application/vnd.ollama.image.model", "digest": digest_of(weights), "size": len(weights)}
    config = {"mediaType": "application/vnd.docker.container.image.v1+json", "digest": digest_of(CONFIG), "size": len(CONFIG)}
    body = json.dumps({"schemaVersion": 2, "mediaType": MANIFEST, "config": config, "layers": [layer]}).encode()
    answer = asked(stack, "PUT", f"alice/{name}/manifests/latest", body, key=key, Content_Type=MANIFEST)
    assert answer.status == 201, answer.body


def pulled(stack: Stack, key: str, name: str) -> bytes:
    """The weights of a model, as its owner gets them."""
    answer = asked(stack, "GET", f"alice/{name}/manifests/latest", key=key, Accept=MANIFEST)
    assert answer.status == 200, (name, answer.body)
    return asked(stack, "GET", f"alice/{name}/blobs/{answer.json['layers'][0]['digest']}", key=key).body


def begun(stack: Stack) -> Running:
    """Its hub, once it answers."""
    running = stack.begin("hub", "serve")
    wait_until(lambda: answers(f"{stack.hub_url}/readyz"), "the hub to answer", watch=running)
    return running


@contextmanager
def serving(stack: Stack) -> Iterator[Running]:
    """The hub, until the block ends."""
    running = begun(stack)
    yield running
    running.end()


@dataclass
class Hub:
    """An installation with the account alice, whose hub runs. key: may pull and push."""

    stack: Stack
    key: str
    running: Running


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hub]:
    """One for the whole module: each test makes repositories and keys of its own."""
    with Stack(tmp_path_factory.mktemp("hub")) as stack:
        stack.add_account("alice")
        key = stack.add_key("alice", "models:pull", "models:push")
        yield Hub(stack, key, begun(stack))


@pytest.fixture
def elsewhere(tmp_path: Path) -> Iterator[Stack]:
    """Another machine, with nothing on it, whose hub keeps its data in `new`."""
    with Stack(tmp_path, CORRAL_HOME=str(tmp_path / "new")) as stack:
        yield stack


@dataclass
class Pushing:
    """Somebody who pushes one model after the other. done: what was acknowledged."""

    stack: Stack
    key: str
    done: dict[str, bytes] = field(default_factory=dict)
    grew: threading.Condition = field(default_factory=threading.Condition)
    is_over: bool = False

    def run(self, first: str) -> None:
        for number in itertools.count():
            if self.is_over:
                return
            weights = os.urandom(MIB + number)
            push(self.stack, self.key, f"{first}{number}", weights)
            with self.grew:
                self.done[f"{first}{number}"] = weights
                self.grew.notify_all()

    def wait_for(self, count: int) -> None:
        with self.grew:
            assert self.grew.wait_for(lambda: len(self.done) >= count, 60)

    @contextmanager
    def going_on(self) -> Iterator[None]:
        threads = [threading.Thread(target=self.run, args=(name,)) for name in ("a", "b")]
        for thread in threads:
            thread.start()
        try:
            yield
        finally:
            self.is_over = True
            for thread in threads:
                thread.join(60)


def test_r013_hub_backed_up_under_load_is_restored_elsewhere_and_runs(hub: Hub, elsewhere: Stack, tmp_path: Path) -> None:
    revoked = hub.stack.add_key("alice", "models:pull")
    archive, new = tmp_path / "hub.tar", tmp_path / "new"
    pushing = Pushing(hub.stack, hub.key)
    with pushing.going_on():
        pushing.wait_for(6)
        acknowledged = dict(pushing.done)
        hub.stack.corral("hub", "backup", str(archive))
        # It held nobody up, and nobody held it up.
        pushing.wait_for(len(acknowledged) + 6)
    assert asked(hub.stack, "GET", "alice/a0/manifests/latest", key=revoked).status == 200
    hub.stack.corral("hub", "key", "revoke", "alice", id_of(revoked))
    refused = hub.stack.corral("hub", "restore", "--replace", str(archive), status=1)
    assert "a hub runs on" in refused.stderr
    # ── on a machine that has the archive, and the log
    new.mkdir(mode=0o700)
    shutil.copy(hub.stack.home / ".corral/revocations.log", new)
    done = json.loads(elsewhere.corral("hub", "restore", "--json", str(archive)).stdout)
    assert (done["accounts"], done["missing_blobs"], [one["kind"] for one in done["taken_again"]]) == (1, 0, ["key"])
    with serving(elsewhere) as running:
        assert asked(elsewhere, "GET", "alice/a0/manifests/latest", key=revoked).status == 401
        assert sign_in_status(elsewhere, "alice", PASSWORD) == 303
        for name, weights in acknowledged.items():
            assert pulled(elsewhere, hub.key, name) == weights
        assert asked(elsewhere, "GET", "alice/a0/manifests/latest").status == 401
        push(elsewhere, hub.key, "after", b"pushed after the restore")
        assert pulled(elsewhere, hub.key, "after") == b"pushed after the restore"
    assert "Traceback" not in running.output
    assert ": 0 damaged." in elsewhere.corral("hub", "scrub").stderr


def test_backup_goes_through_a_pipe_into_another_home(hub: Hub, elsewhere: Stack) -> None:
    weights = os.urandom(3 * MIB)
    push(hub.stack, hub.key, "tiny", weights)
    writer = subprocess.Popen([*corral_command(), "hub", "backup", "-"], env=hub.stack.env, stdout=subprocess.PIPE)
    reader = [*corral_command(), "hub", "restore", "-"]
    with writer:
        done = subprocess.run(reader, env=elsewhere.env, stdin=writer.stdout, check=False, timeout=60)
    assert (writer.returncode, done.returncode) == (0, 0)
    with serving(elsewhere):
        assert pulled(elsewhere, hub.key, "tiny") == weights


def test_reader_that_leaves_makes_a_backup_fail(hub: Hub) -> None:
    process = subprocess.Popen(
        [*corral_command(), "hub", "backup", "-"], env=hub.stack.env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    with process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        said = process.stderr.read()
    assert process.returncode == 1
    assert "Error: the backup cannot be written: Broken pipe" in said
    assert not list((hub.stack.home / ".corral").glob(".corral-*"))


def test_r013_restore_in_place_keeps_a_key_revoked_that_the_running_hub_revoked(hub: Hub, tmp_path: Path) -> None:
    manager, lost = hub.stack.add_key("alice", "keys"), hub.stack.add_key("alice", "models:pull", "models:push")
    archive = tmp_path / "hub.tar"
    hub.stack.corral("hub", "backup", str(archive))
    push(hub.stack, lost, "lost", b"weights")
    # By a request, and not by a command: both write the log.
    assert call("DELETE", f"{hub.stack.hub_url}/api/keys/{id_of(lost)}", key=manager).status == 200
    hub.running.end()
    restored = hub.stack.corral("hub", "restore", "--replace", str(archive))
    assert "Taken away again, as it was since the backup: 1 API key." in restored.stderr
    hub.running = begun(hub.stack)
    assert asked(hub.stack, "GET", "alice/lost/tags/list", key=lost).status == 401
    assert call("GET", f"{hub.stack.hub_url}/api/keys", key=manager).status == 200


def test_backup_that_is_ended_in_the_middle_leaves_nothing(hub: Hub, tmp_path: Path) -> None:
    push(hub.stack, hub.key, "large", bytes(256 * MIB))
    target = tmp_path / "backups"
    target.mkdir()
    for how, status in ((signal.SIGINT, 130), (signal.SIGKILL, -signal.SIGKILL)):
        running = hub.stack.begin("hub", "backup", str(target))
        wait_until(lambda: list(target.glob(".corral-*/archive")), "the archive to be begun", watch=running)
        running.process.send_signal(how)
        assert running.finish() == status, running.output
        left = list(target.iterdir())
        # Whoever is killed cannot clear away; what it leaves is no backup by its name, and goes with the next one.
        assert all(path.name.startswith(".corral-") for path in left)
        assert (not left) is (how is signal.SIGINT)
    hub.stack.corral("hub", "backup", str(target))
    (archive,) = target.iterdir()
    with tarfile.open(archive) as tar:
        assert tar.getnames()[0] == "manifest.json"
