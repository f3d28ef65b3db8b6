"""Debian's skopeo against a hub: an image and a model in and out, with an account and an API key. It copies layouts that are made
here from a few bytes."""

import hashlib
import json
import re
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

from flows.stack import PATIENCE_S, Stack, answers, call, wait_until

OCI_MANIFEST = "application/vnd.oci.image.manifest.v1+json"
OLLAMA_CONFIG = "application/vnd.docker.container.image.v1+json"


@dataclass(frozen=True, slots=True)
class Hub:
    """A hub, the API keys of its accounts, and a folder for what is copied."""

    stack: Stack
    keys: dict[str, str]
    folder: Path

    def image(self, repository: str) -> str:
        return f"docker://localhost:{urlsplit(self.stack.hub_url).port}/{repository}"

    def skopeo(self, *arguments: str, status: int = 0) -> str:
        """What skopeo printed."""
        command = ["skopeo", "--insecure-policy", *arguments]
        done = subprocess.run(
            command, env={**self.stack.env}, cwd=self.folder, capture_output=True, text=True, timeout=PATIENCE_S, check=False
        )
        assert (done.returncode != 0) == (status != 0), done.stderr
        return done.stdout + done.stderr

    def copy_in(self, source: str, repository: str, *, by: str = "alice", status: int = 0) -> str:
        words = ["--dest-tls-verify=false", "--dest-creds", f"{by}:{self.keys[by]}"]
        # Else it compresses what is not, and that is another image.
        return self.skopeo("copy", "--preserve-digests", *words, source, self.image(repository), status=status)

    def copy_out(self, repository: str, target: str, *, by: str = "alice", status: int = 0) -> str:
        words = ["--src-tls-verify=false", *(["--src-creds", f"{by}:{self.keys[by]}"] if by else [])]
        return self.skopeo("copy", "--preserve-digests", *words, self.image(repository), target, status=status)


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hub]:
    if shutil.which("skopeo") is None:
        pytest.skip("skopeo is not there; install Debian's package of that name")
    with Stack(tmp_path_factory.mktemp("tools")) as stack:
        keys = {}
        for name in ("alice", "bob"):
            stack.add_account(name, admin=name == "alice")
            keys[name] = stack.add_key(name, "models:pull", "models:push")
        running = stack.begin("hub", "serve")
        wait_until(lambda: answers(f"{stack.hub_url}/readyz"), "the hub to answer", watch=running)
        yield Hub(stack, keys, tmp_path_factory.mktemp("copies"))


def put(folder: Path, content: bytes) -> dict[str, Any]:
    """A blob of an OCI layout, and its descriptor without a media type."""
    sha256 = hashlib.sha256(content).hexdigest()
    target = folder / "blobs/sha256" / sha256
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_bytes(content)
    return {"digest": f"sha256:{sha256}", "size": len(content)}


def oci_layout(folder: Path) -> bytes:
    """An OCI layout with one image of one layer under the tag v1. Returns its manifest."""
    layer = bytes(range(256)) * 400
    diff = f"sha256:{hashlib.sha256(layer).hexdigest()}"
    config = {"architecture": "amd64", "os": "linux", "rootfs": {"type": "layers", "diff_ids": [diff]}, "config": {}}
    manifest = {
        "schemaVersion": 2,
        "mediaType": OCI_MANIFEST,
        "config": {
            "mediaType": "application/vnd.oci.image.config.v1+json",
            **put(folder, json.dumps(config).encode()),
        },
        "layers": [{"mediaType": "application/vnd.oci.image.layer.v1.tar", **put(folder, layer)}],
    }
    body = json.dumps(manifest).encode()
    named = {"mediaType": OCI_MANIFEST, **put(folder, body), "annotations": {"org.opencontainers.image.ref.name": "v1"}}
    (folder / "oci-layout").write_text('{"imageLayoutVersion":"1.0.0"}')
    (folder / "index.json").write_text(json.dumps({"schemaVersion": 2, "manifests": [named]}))
    return body


def model_directory(folder: Path) -> bytes:
    """A model as `dir:` has it: the manifest, and its blobs by their SHA-256. Returns the manifest. Its layers are of Ollama's
    types and the manifest of OCI's, since skopeo takes no others than Docker's own in one of Docker's."""

    def placed(content: bytes, media_type: str) -> dict[str, Any]:
        sha256 = hashlib.sha256(content).hexdigest()
        (folder / sha256).write_bytes(content)
        return {"mediaType": media_type, "digest": f"sha256:{sha256}", "size": len(content)}

    folder.mkdir(exist_ok=True)
    manifest = {
        "schemaVersion": 2,
        "mediaType": OCI_MANIFEST,
        "config": placed(b'{"model_format":"gguf","model_family":"llama"}\n', OLLAMA_CONFIG),
        "layers": [
            placed(b"GGUF" + bytes(100_000), "application/vnd.ollama.image.model"),
            placed(b"{{ .Prompt }}", "application/vnd.ollama.image.template"),
        ],
    }
    body = json.dumps(manifest).encode()
    (folder / "manifest.json").write_bytes(body)
    (folder / "version").write_text("Directory Transport Version: 1.1\n")
    return body


def test_skopeo_copies_an_image_in_and_out(hub: Hub) -> None:
    manifest = oci_layout(hub.folder / "image")
    hub.copy_in("oci:image:v1", "alice/image:v1")
    hub.copy_out("alice/image:v1", "oci:image-again:v1")
    [copied] = json.loads((hub.folder / "image-again/index.json").read_text())["manifests"]
    assert copied["digest"] == f"sha256:{hashlib.sha256(manifest).hexdigest()}"
    for blob in (hub.folder / "image/blobs/sha256").iterdir():
        assert (hub.folder / "image-again/blobs/sha256" / blob.name).read_bytes() == blob.read_bytes()


def test_skopeo_copies_a_model_in_and_out(hub: Hub) -> None:
    manifest = model_directory(hub.folder / "model")
    hub.copy_in("dir:model", "alice/model:latest")
    hub.copy_out("alice/model:latest", "dir:model-again")
    assert (hub.folder / "model-again/manifest.json").read_bytes() == manifest
    for part in (hub.folder / "model").iterdir():
        assert (hub.folder / "model-again" / part.name).read_bytes() == part.read_bytes()


def test_skopeo_copies_from_one_repository_to_another(hub: Hub) -> None:
    oci_layout(hub.folder / "mounted")
    hub.copy_in("oci:mounted:v1", "alice/first:v1")
    words = ["--src-tls-verify=false", "--dest-tls-verify=false", "--dest-creds", f"alice:{hub.keys['alice']}"]
    words += ["--src-creds", f"alice:{hub.keys['alice']}"]
    hub.skopeo("copy", *words, hub.image("alice/first:v1"), hub.image("alice/nested/second:v1"))
    listed = hub.skopeo("list-tags", "--tls-verify=false", "--creds", words[-1], hub.image("alice/nested/second"))
    assert json.loads(listed)["Tags"] == ["v1"]


def test_skopeo_deletes_an_image(hub: Hub) -> None:
    oci_layout(hub.folder / "gone")
    hub.copy_in("oci:gone:v1", "alice/gone:v1")
    credentials = ["--tls-verify=false", "--creds", f"alice:{hub.keys['alice']}"]
    hub.skopeo("delete", *credentials, hub.image("alice/gone:v1"))
    hub.skopeo("inspect", "--raw", *credentials, hub.image("alice/gone:v1"), status=1)


def untimed(said: str) -> str:
    """What skopeo says, without the second in which it did."""
    return re.sub(r'time="[^"]*"', "", said)


@pytest.mark.parametrize("by", ["bob", ""], ids=["another-account", "nobody"])
def test_t029_skopeo_of_a_stranger_finds_no_private_image(hub: Hub, by: str) -> None:
    oci_layout(hub.folder / "secret")
    hub.copy_in("oci:secret:v1", "alice/secret:v1")
    said = hub.copy_out("alice/secret:v1", "oci:stolen:v1", by=by, status=1)
    assert "name unknown" in said
    absent = hub.copy_out("alice/none:v1", "oci:stolen:v1", by=by, status=1)
    assert untimed(said).replace("secret", "none") == untimed(absent)


def test_skopeo_of_another_account_cannot_push(hub: Hub) -> None:
    oci_layout(hub.folder / "theirs")
    said = hub.copy_in("oci:theirs:v1", "alice/theirs:v1", by="bob", status=1)
    assert "may not push in alice/theirs" in said


def test_skopeo_pulls_what_is_public_without_an_account(hub: Hub) -> None:
    oci_layout(hub.folder / "public")
    hub.copy_in("oci:public:v1", "alice/public:v1")
    url, key = f"{hub.stack.hub_url}/v2/alice/public/manifests/v1", hub.keys["alice"]
    manifest = call("GET", url, key=key).body
    headers = {"Content-Type": OCI_MANIFEST, "X-Corral-Visibility": "public"}
    assert call("PUT", url, manifest, key=key, headers=headers).status == 201
    hub.copy_out("alice/public:v1", "oci:public-again:v1", by="")
