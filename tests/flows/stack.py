"""One Corral installation for a test: its own home directory, free ports and real processes, driven through the real command.

Nothing here reaches into the program. A test sees what a person sees: what a command prints, what a port answers, what the pages
show and which processes are there.
"""

import codecs
import contextlib
import http.client
import io
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from flows import warm

PASSWORD = "correct horse battery staple"
MODEL = "smollm2:135m"
#: A request whose answer goes on until somebody ends it: greedily continued, counting has no end.
LONG = {
    "prompt": "1 2 3 4 5 6 7 8 9 10 11 12",
    "raw": True,
    "options": {"num_predict": 4000, "temperature": 0, "repeat_penalty": 1.0},
}
#: For `corral up`: so small a model may go on for ever, and one answer in ten to a greeting does. One thread computes: several
#: would wait for the one that has lost its core to another test, and burn theirs waiting.
BOUNDED = ("--parameter", "num_predict 200", "--parameter", "num_thread 1")
#: The same where nobody looks at how much it says.
BRIEF = (*BOUNDED, "--parameter", "num_predict 32")
#: How long anything may take before a test calls it stuck. Generous: the machine may be busy with other work.
PATIENCE_S = 60.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """What a server answered. headers: lower-case names."""

    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def lines(self) -> list[dict[str, Any]]:
        """The objects of an NDJSON body."""
        return [json.loads(line) for line in self.body.splitlines() if line]

    @property
    def text(self) -> str:
        """The model's words of a generate or chat answer, streamed or not."""
        return "".join(line.get("response") or line.get("message", {}).get("content", "") for line in self.lines)


def call(method: str, url: str, body: Any = None, *, key: str = "", headers: dict[str, str] | None = None) -> Answer:
    """One request, its answer read to the end. key: sent as Bearer."""
    with opened(method, url, body, key=key, headers=headers) as response:
        return Answer(status=response.status, headers={k.lower(): v for k, v in response.getheaders()}, body=response.read())


@contextlib.contextmanager
def opened(
    method: str, url: str, body: Any = None, *, key: str = "", headers: dict[str, str] | None = None
) -> Iterator[http.client.HTTPResponse]:
    """One request whose answer is read by the test, and dropped with the connection at the end."""
    parts = urlsplit(url)
    connection = http.client.HTTPConnection(parts.hostname or "", parts.port, timeout=PATIENCE_S)
    sent = {**({"Authorization": f"Bearer {key}"} if key else {}), **(headers or {})}
    try:
        data = body if isinstance(body, bytes) or body is None else json.dumps(body).encode()
        connection.request(method, parts.path + (f"?{parts.query}" if parts.query else ""), data, sent)
        yield connection.getresponse()
    finally:
        connection.close()


class Running:
    """A started command whose output can be waited for while it runs."""

    def __init__(self, arguments: Sequence[str], env: dict[str, str], cwd: Path) -> None:
        # Unbuffered: what is printed is seen before its line is full.
        self.process = subprocess.Popen(
            arguments, env=env, cwd=cwd, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, bufsize=0
        )
        self.output = ""
        self._grew = threading.Condition()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        decoder = io.IncrementalNewlineDecoder(codecs.getincrementaldecoder("utf-8")(), translate=True)
        while read := self.process.stdout.read(65536):
            with self._grew:
                self.output += decoder.decode(read)
                self._grew.notify_all()
        with self._grew:
            self._grew.notify_all()

    def wait_for(self, pattern: str, *, timeout_s: float = PATIENCE_S) -> re.Match[str]:
        """The first match in the lines it printed so far or prints yet. Fails when it ends or stays silent."""

        def lines() -> str:
            return self.output[: self.output.rfind("\n") + 1] if self._reader.is_alive() else self.output

        return self._first(lambda: re.search(pattern, lines()), pattern, timeout_s)

    def wait_for_words(self, pattern: str) -> re.Match[str]:
        """As `wait_for`, but a line that is not finished counts too."""
        return self._first(lambda: re.search(pattern, self.output), pattern, PATIENCE_S)

    def _first(self, search: Callable[[], re.Match[str] | None], pattern: str, timeout_s: float) -> re.Match[str]:
        with self._grew:
            self._grew.wait_for(lambda: search() or not self._reader.is_alive() or self.process.poll() is not None, timeout_s)
        if self.process.poll() is not None:
            self._reader.join(5)
        found = search()
        assert found, f"{pattern!r} was not printed (exit {self.process.poll()}):\n{self.output}"
        return found

    def finish(self, *, timeout_s: float = PATIENCE_S) -> int:
        """Its exit status, when it ends by itself."""
        status = self.process.wait(timeout_s)
        self._reader.join(5)
        if self.process.stdout:
            self.process.stdout.close()
        return status

    def end(self, how: signal.Signals = signal.SIGINT) -> int:
        """Its exit status after a signal, Ctrl-C unless said otherwise."""
        if self.process.poll() is None:
            self.process.send_signal(how)
        try:
            return self.finish(timeout_s=20)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.finish()
            raise AssertionError(f"it did not end within 20 s of {how.name}:\n{self.output}") from None


class Stack:
    """A home directory, two ports and the environment that binds them. Starting it is the test's business. like: a home that an
    installation has left, of which this one gets a copy."""

    def __init__(self, folder: Path, *, like: Path | None = None, **environment: str) -> None:
        self.home = folder / "home"
        self.home.mkdir(parents=True)
        if like is not None:
            shutil.copytree(like, self.home, dirs_exist_ok=True, symlinks=True, copy_function=copy_or_link)
        local_port, hub_port = free_port(), free_port()
        self.local_url, self.hub_url = f"http://127.0.0.1:{local_port}", f"http://localhost:{hub_port}"
        self.opened_links = folder / "opened"
        browser = folder / "browser"
        browser.write_text(f'#!/bin/sh\necho "$1" >> {self.opened_links}\n')
        browser.chmod(0o755)
        self.env = {
            "PATH": os.environ["PATH"],
            "HOME": str(self.home),
            "LANG": "C.UTF-8",
            "BROWSER": str(browser),
            "OLLAMA_HOST": f"127.0.0.1:{local_port}",
            "CORRAL_HUB_LISTEN": f"127.0.0.1:{hub_port}",
            "CORRAL_PUBLIC_URL": self.hub_url,
            **({"PYTHONPATH": os.environ["PYTHONPATH"]} if "PYTHONPATH" in os.environ else {}),
            **environment,
        }
        self.up: Running | None = None
        self._begun: list[Running] = []

    def __enter__(self) -> "Stack":
        return self

    def __exit__(self, *_: object) -> None:
        """End what a test left running, however it failed."""
        for running in reversed(self._begun):
            running.end()

    def begin(self, *arguments: str, **environment: str) -> Running:
        """Start a corral command."""
        running = Running([*corral_command(), *arguments], {**self.env, **environment}, self.home)
        self._begun.append(running)
        return running

    def corral(self, *arguments: str, given: str = "", status: int = 0, **environment: str) -> subprocess.CompletedProcess[str]:
        """Run a corral command to its end and check its exit status, warm. given: its standard input."""
        env = {**self.env, **environment}
        done = warm.run(arguments, env=env, cwd=self.home, given=given, timeout_s=PATIENCE_S)
        assert done.returncode == status, f"corral {' '.join(arguments)}: exit {done.returncode}\n{done.stdout}\n{done.stderr}"
        return done

    def start(self, *arguments: str) -> Running:
        """`corral up` until both servers answer."""
        self.up = self.begin("up", *arguments)
        self.up.wait_for(r"local +http")
        for url in (f"{self.local_url}/api/version", f"{self.hub_url}/readyz"):
            wait_until(lambda url=url: answers(url), f"{url} to answer", watch=self.up)
        return self.up

    def stop(self) -> None:
        """End `corral up` if it runs."""
        if self.up is not None:
            self.up.end()
            self.up = None

    def generate(self, model: str, prompt: str = "Why is the sky blue?", *, at: str = "", key: str = "", **more: Any) -> Answer:
        """POST /api/generate with few tokens to wait for. at: a base URL, the local server when empty."""
        body = {"model": model, "prompt": prompt, "options": {"num_predict": 4, "temperature": 0, "seed": 1}, **more}
        return call("POST", f"{at or self.local_url}/api/generate", body, key=key)

    def add_account(self, name: str = "alice", *, admin: bool = True) -> None:
        """An account made by the administrator's command, without a browser."""
        flags = ["--email", f"{name}@example.org", "--password-stdin", *(["--admin"] if admin else [])]
        self.corral("hub", "user", "add", name, *flags, given=PASSWORD + "\n")

    def add_key(self, name: str = "alice", *scopes: str) -> str:
        """The text of a new API key, made by the administrator's command."""
        words = [word for scope in scopes or ("inference",) for word in ("--scope", scope)]
        return self.corral("hub", "key", "create", name, "--name", "test", *words).stdout.strip()

    def sign_in(self, name: str = "alice") -> str:
        """Connect this device without a browser. Returns the API key that did it."""
        key = self.add_key(name, "inference", "keys")
        self.corral("signin", "--api-key-stdin", given=key + "\n")
        return key


def copy_or_link(source: str, target: str) -> None:
    """For a copy of a home: what is linked in it, as model files are, is linked once more."""
    if Path(source).stat().st_nlink > 1:
        Path(target).hardlink_to(source)
    else:
        shutil.copy2(source, target)


def corral_command() -> list[str]:
    """The installed console command, or the module where the package is only on the path."""
    script = Path(sys.executable).with_name("corral")
    return [str(script)] if script.exists() else [sys.executable, "-m", "corral"]


def free_port() -> int:
    """A port that was free a moment ago."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port: int = server.getsockname()[1]
        return port


def answers(url: str) -> bool:
    """Whether a server answers there with success."""
    try:
        return call("GET", url).status == 200
    except OSError:
        return False


def wait_until(is_so: Any, what: str, *, timeout_s: float = PATIENCE_S, watch: Running | None = None) -> None:
    """Ask again and again, shortly apart. watch: a command that must keep running meanwhile."""
    deadline = time.monotonic() + timeout_s
    while not is_so():
        if watch is not None and watch.process.poll() is not None:
            watch.finish()
            raise AssertionError(f"waited for {what}, but the command ended:\n{watch.output}")
        assert time.monotonic() < deadline, f"waited {timeout_s:.0f} s for {what}" + (f":\n{watch.output}" if watch else "")
        time.sleep(0.02)


def descendants(pid: int) -> dict[int, str]:
    """Process id -> command line of everything below a process."""
    parents: dict[int, list[int]] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError):
                parent = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
                parents.setdefault(parent, []).append(int(entry.name))
    found, queue = {}, [pid]
    while queue:
        for child in parents.get(queue.pop(), []):
            with contextlib.suppress(OSError):
                found[child] = Path(f"/proc/{child}/cmdline").read_text().replace("\0", " ").strip()
            queue.append(child)
    return found


def is_alive(pid: int) -> bool:
    """Whether a process still runs; one that only waits for its parent to notice its end does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def listening_ports(pid: int) -> list[tuple[str, int]]:
    """(address, port) of a process's listening TCP sockets."""
    inodes = set()
    for entry in Path(f"/proc/{pid}/fd").iterdir():
        target = str(entry.readlink()) if entry.is_symlink() else ""
        if target.startswith("socket:["):
            inodes.add(target[8:-1])
    found = []
    for line in Path("/proc/net/tcp").read_text().splitlines()[1:]:
        fields = line.split()
        if fields[3] == "0A" and fields[9] in inodes:
            address, _, port = fields[1].partition(":")
            found.append((socket.inet_ntoa(bytes.fromhex(address)[::-1]), int(port, 16)))
    return found
