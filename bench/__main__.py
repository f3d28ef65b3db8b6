"""`make bench`: measures what was asked for (`P1 P5`, everything by default), prints one table, and writes it as JSON."""

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
# The tests' way of starting real processes serves the bench as well.
sys.path.insert(0, str(ROOT / "tests"))

from bench import figures  # noqa: E402
from bench.engine import engine_below  # noqa: E402
from bench.measure import Figure, table  # noqa: E402
from flows.stack import MODEL, Stack, descendants, free_port  # noqa: E402

MODEL_FILE = ROOT / ".cache/SmolLM2-135M-Instruct.Q4_1.gguf"
WITH_ENGINE = ("P1", "P2", "P3", "P4")
WITH_HUB = ("P5", "P6", "P8")
ALL = (*WITH_ENGINE, *WITH_HUB, "P13", "P14")


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
        print(f"{figure.number:4} {figure.name}", file=sys.stderr, flush=True)
    print(table(found))
    print(f"{time.monotonic() - began:.0f} s", file=sys.stderr)
    path = options.json or ROOT / "bench/results" / time.strftime("%Y%m%d-%H%M%S.json")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps([asdict(figure) for figure in found], indent=2) + "\n")
    return 0


def measure(wanted: set[str], model: Path) -> Iterator[Figure]:
    """The figures, as they are found."""
    with tempfile.TemporaryDirectory(prefix="corral-bench-") as name, ExitStack() as stack:
        folder = Path(name)
        if wanted & {"P14"}:
            yield from figures.p14(folder / "p14")
        if wanted - {"P14"}:
            installed = Stack(folder / "all", OLLAMA_NUM_PARALLEL="4")
            installed.start("--model", f"{MODEL}={model}")
            stack.callback(installed.stop)
            installed.add_account()
            installed.sign_in()
            yield from _on(installed, wanted, folder)


def _on(installed: Stack, wanted: set[str], folder: Path) -> Iterator[Figure]:
    assert installed.up is not None
    children = descendants(installed.up.process.pid)
    hub, local = (next(pid for pid, command in children.items() if words in command) for words in ("hub serve", "corral serve"))
    if "P13" in wanted:
        yield from figures.p13(installed)
    if wanted & {"P1", "P2", "P3"}:
        assert installed.generate(MODEL).status == 200
        engine = engine_below(local)
        if wanted & {"P1", "P2"}:
            yield from figures.p1_p2(installed, engine)
        if "P3" in wanted:
            yield from figures.p3(installed, engine)
        # The two engines must not share the cores while the other is measured.
        installed.corral("stop", MODEL)
    if "P4" in wanted:
        assert installed.generate(f"{MODEL}-cloud").status == 200
        yield from figures.p4(installed, engine_below(hub))
    if "P8" in wanted:
        yield from figures.p8(installed)
    if wanted & {"P5", "P6"}:
        port = free_port()
        with figures.started("bench.fixed_upstream", str(port), port=port):
            installed.corral("hub", "host", "fixed", "--upstream", f"http://127.0.0.1:{port}")
            yield from figures.p5_p6(installed, installed.add_key(), "fixed", port)


if __name__ == "__main__":
    sys.exit(main())
