"""What the unmodified `oras` package sees: one JSON object of check -> result. Runs in an environment of its own.

Usage: python_oras.py BASE_URL REPOSITORY, with alice's API key in OLLAMA_API_KEY. Pushes an artifact in both ways it knows, and
pulls it again.
"""

import hashlib
import json
import os
import sys
import tempfile
from pathlib import Path
from urllib.parse import urlsplit

import oras.client

BASE, REPOSITORY = sys.argv[1:]
HOST = urlsplit(BASE).netloc
CONTENT = bytes(range(256)) * 5000


def registry(password="", way="token"):
    """A client of alice, or of nobody when the password is empty. way: by which it proves who it is."""
    client = oras.client.OrasClient(hostname=HOST, insecure=True, auth_backend=way)
    if password:
        client.auth.set_basic_auth("alice", password)
    return client


def push(folder, tag, **options):
    """Push a file. What came of it."""
    client = registry(os.environ["OLLAMA_API_KEY"])
    (folder / "weights.bin").write_bytes(CONTENT)
    files = ["weights.bin:application/vnd.example.weights"]
    return client.push(f"{HOST}/{REPOSITORY}:{tag}", files=files, quiet=True, **options).status_code


def pull(folder, tag):
    """Pull it. The digests of the files that came."""
    client = registry(os.environ["OLLAMA_API_KEY"])
    names = client.pull(f"{HOST}/{REPOSITORY}:{tag}", outdir=str(folder / tag))
    return {Path(name).name: hashlib.sha256(Path(name).read_bytes()).hexdigest() for name in names}


def stranger(tag):
    """What somebody without an account is told."""
    try:
        registry().pull(f"{HOST}/{REPOSITORY}:{tag}")
    except Exception as error:  # noqa: BLE001 - whatever the package raises is the result
        return str(error)
    return "pulled"


with tempfile.TemporaryDirectory() as name:
    folder = Path(name)
    os.chdir(folder)
    report = {
        "sent": hashlib.sha256(CONTENT).hexdigest(),
        "push": push(folder, "whole"),
        "push_chunked": push(folder, "chunked", do_chunked=True, chunk_size=300_000),
        "pull": pull(folder, "whole"),
        "pull_chunked": pull(folder, "chunked"),
        "tags": registry(os.environ["OLLAMA_API_KEY"]).get_tags(f"{HOST}/{REPOSITORY}"),
        # With a token, it would go on with the first it got, which is for looking.
        "delete": registry(os.environ["OLLAMA_API_KEY"], "basic").delete_tags(f"{HOST}/{REPOSITORY}", ["chunked"]),
        "stranger": stranger("whole"),
    }
print(json.dumps(report))
