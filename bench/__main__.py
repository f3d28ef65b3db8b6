"""`make bench`: measures what was asked for (`P1 P5`, everything by default), prints one table, and writes it as JSON."""

import argparse
import json
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
# The tests' way of starting real processes serves the bench as well.
sys.path.insert(0, str(ROOT / "tests"))

from bench import catalog, credentials, figures, registry  # noqa: E402
from bench.measure import Figure, line, skipped, table  # noqa: E402
from flows.stack import MODEL, Running, Stack, answers, free_port, wait_until  # noqa: E402

MODEL_FILE = ROOT / ".cache/SmolLM2-135M-Instruct.Q4_1.gguf"
WITH_ENGINE = ("P1", "P2", "P3", "P4")
WITH_HUB = ("P5", "P6", "P7", "P8", "P15", "P16")
WITH_REGISTRY = ("P9", "P10")
#: On hubs of their own.
ALONE = ("P11", "P12", "P14")
#: Not taken here, and why.
NOT_HERE = {
    "P17": ("two workers against one", "a hub has one worker"),
}
ALL = (*WITH_ENGINE, *WITH_HUB, *WITH_REGISTRY, "P13", *ALONE, *NOT_HERE)


def main() -> int:
    """Returns 0 when everything was measured, whether or not it met its goal: a miss is for people to judge."""
    parser = argparse.ArgumentParser(prog="bench", description=__doc__)
    parser.add_argument("figures", nargs="*", help=f"some of {' '.join(ALL)}")
    parser.add_argument("--json", type=Path, default=None, help="where to write the figures")
    parser.add_argument("--model", type=Path, default=MODEL_FILE, help="the GGUF file to run")
    options = parser.parse_args()
    wanted = set(options.figures or ALL)
    if unknown := wanted - set(ALL):
        parser.error(f"there is no figure {', '.join(sorted(unknown))}")
    began, found = time.monotonic(), []
    for figure in measure(wanted, options.model):
        found.append(figure)
        # A run that is stopped has still shown what it took.
        print(f"{time.monotonic() - began:4.0f} s  {line(figure)}", file=sys.stderr, flush=True)
    print(table(found))
    print(f"{time.monotonic() - began:.0f} s", file=sys.stderr)
    path = options.json or ROOT / "bench/results" / time.strftime("%Y%m%d-%H%M%S.json")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps([asdict(figure) for figure in found], indent=2) + "\n")
    return 0


def measure(wanted: set[str], model: Path) -> Iterator[Figure]:
    """The figures, as they are found."""
    with tempfile.TemporaryDirectory(prefix="corral-bench-") as name:
        folder = Path(name)
        for number in sorted(wanted & set(NOT_HERE)):
            yield skipped(number, *NOT_HERE[number])
        if "P14" in wanted:
            yield from figures.p14(folder / "p14")
        if "P11" in wanted:
            yield from credentials.p11(folder / "p11")
        if "P12" in wanted:
            yield from catalog.p12(folder / "p12")
        if wanted - {*ALONE, *NOT_HERE}:
            with Servers(folder, model) as servers:
                yield from _on(servers, wanted, folder)
                if wanted & set(WITH_REGISTRY):
                    yield from _registry(servers, wanted, folder)


class Servers:
    """A hub and a local server, each in a process of its own, with an account, a connected device and the small model."""

    def __init__(self, folder: Path, model: Path) -> None:
        self.stack = Stack(folder / "all", OLLAMA_NUM_PARALLEL="4", PYTHONPATH=f"{ROOT}/src:{ROOT}/tests:{ROOT}")
        self.stack.corral("install", f"{MODEL}={model}")
        self._notes = {"hub": folder / "hub-engines", "local": folder / "local-engines"}
        self._running = [self._begin("hub", "hub", "serve"), self._begin("local", "serve")]

    def _begin(self, name: str, *arguments: str) -> Running:
        command = [sys.executable, "-m", "bench.tapped", str(self._notes[name]), *arguments]
        return Running(command, {**self.stack.env, "CORRAL_HUB": self.stack.hub_url}, self.stack.home)

    def __enter__(self) -> "Servers":
        for url, server in zip(
            (f"{self.stack.hub_url}/readyz", f"{self.stack.local_url}/api/version"), self._running, strict=True
        ):
            wait_until(lambda url=url: answers(url), url, watch=server)
        self.stack.add_account()
        self.stack.sign_in()
        return self

    def __exit__(self, *_: object) -> None:
        for server in self._running:
            server.end(signal.SIGTERM)

    def pid(self, name: str) -> int:
        """Of the hub's or the local server's process."""
        return self._running[("hub", "local").index(name)].process.pid

    def engine(self, name: str) -> figures.Engine:
        """The newest engine of a server."""
        note = json.loads(self._notes[name].read_text().splitlines()[-1])
        return figures.Engine(port=int(note["url"].rsplit(":", 1)[1]), key=note["key"])


def _on(servers: Servers, wanted: set[str], folder: Path) -> Iterator[Figure]:
    stack = servers.stack
    if "P13" in wanted:
        yield from figures.p13(stack)
    if "P8" in wanted:
        yield from figures.p8(stack)
    if "P15" in wanted:
        yield from credentials.p15(stack)
    if "P16" in wanted:
        yield from credentials.p16(stack, stack.add_key())
    if wanted & {"P5", "P6", "P7"}:
        port = free_port()
        with figures.started("bench.fixed_upstream", str(port), port=port):
            stack.corral("hub", "host", "fixed", "--upstream", f"http://127.0.0.1:{port}")
            key = stack.add_key()
            if wanted & {"P5", "P6"}:
                yield from figures.p5_p6(stack, key, "fixed", port)
            if "P7" in wanted:
                yield from figures.p7(stack, key, "fixed", port, folder / "litellm")
    if wanted & {"P1", "P2", "P3"}:
        assert stack.generate(MODEL).status == 200
        if wanted & {"P1", "P2"}:
            yield from figures.p1_p2(stack, servers.engine("local"))
        if "P3" in wanted:
            yield from figures.p3(stack, servers.engine("local"))
        stack.corral("stop", MODEL)
    if "P4" in wanted:
        assert stack.generate(f"{MODEL}-cloud").status == 200
        yield from figures.p4(stack, servers.engine("hub"))


def _registry(servers: Servers, wanted: set[str], folder: Path) -> Iterator[Figure]:
    stack = servers.stack
    ours = registry.Registry(
        url=stack.hub_url,
        repository="alice/big",
        store=stack.home / ".corral/blobs",
        key=stack.add_key("alice", "models:pull", "models:push"),
        pid=servers.pid("hub"),
    )
    if "P9" in wanted:
        yield from registry.p9(ours, folder)
    if "P10" in wanted:
        yield from registry.p10(stack, ours, folder)


if __name__ == "__main__":
    sys.exit(main())
