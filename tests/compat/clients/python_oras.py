"""What the unmodified `oras` package sees. See jobs.py; `model` is a repository and `key` one of alice's.

Pushes an artifact in both ways it knows, and pulls it again.
"""

import hashlib
import os
import tempfile
from pathlib import Path
from urllib.parse import urlsplit

import jobs
import oras.client

CONTENT = bytes(range(256)) * 5000


class Registry:
    """The checks of one job, in a folder of their own."""

    def __init__(self, job, folder):
        self.host, self.key, self.folder = urlsplit(job["url"]).netloc, job["key"], folder
        self.reference = f"{self.host}/{job['model']}"

    def client(self, password="", way="token"):
        """A client of alice, or of nobody when the password is empty. way: by which it proves who it is."""
        client = oras.client.OrasClient(hostname=self.host, insecure=True, auth_backend=way)
        if password:
            client.auth.set_basic_auth("alice", password)
        return client

    def push(self, tag, **options):
        """Push a file. What came of it."""
        (self.folder / "weights.bin").write_bytes(CONTENT)
        files = ["weights.bin:application/vnd.example.weights"]
        return self.client(self.key).push(f"{self.reference}:{tag}", files=files, quiet=True, **options).status_code

    def pull(self, tag):
        """Pull it. The digests of the files that came."""
        names = self.client(self.key).pull(f"{self.reference}:{tag}", outdir=str(self.folder / tag))
        return {Path(name).name: hashlib.sha256(Path(name).read_bytes()).hexdigest() for name in names}

    def stranger(self):
        """What somebody without an account is told."""
        try:
            self.client().pull(f"{self.reference}:whole")
        except Exception as error:  # noqa: BLE001 - whatever the package raises is the result
            return str(error)
        return "pulled"

    def checks(self):
        """Name -> check."""
        return {
            "sent": lambda: hashlib.sha256(CONTENT).hexdigest(),
            "push": lambda: self.push("whole"),
            "push_chunked": lambda: self.push("chunked", do_chunked=True, chunk_size=300_000),
            "pull": lambda: self.pull("whole"),
            "pull_chunked": lambda: self.pull("chunked"),
            "tags": lambda: self.client(self.key).get_tags(self.reference),
            # With a token, it would go on with the first it got, which is for looking.
            "delete": lambda: self.client(self.key, "basic").delete_tags(self.reference, ["chunked"]),
            "stranger": self.stranger,
        }


with tempfile.TemporaryDirectory() as name:
    os.chdir(name)
    jobs.serve(lambda job: Registry(job, Path(name)).checks(), {})
