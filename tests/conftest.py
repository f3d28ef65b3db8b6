"""What every test may ask for: the small real model, and the rule that a continuous-integration run may skip nothing.

Quick tests (no sockets, no processes) need none of this: `make test T=tests ARGS="-m 'not engine and not flow'"` runs them alone.
"""

import gc
import os
import signal
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

# The same examples in every run, and no verdict about speed: a busy machine must not turn a right answer into a failure.
settings.register_profile("corral", deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("corral")

# A shell's background job starts with SIGINT ignored and hands that on to what the tests start, where Ctrl-C would do nothing.
signal.signal(signal.SIGINT, signal.default_int_handler)

# Collecting makes millions of objects that all stay. Looking through them for garbage again and again costs half of its time, and
# later every full collection would look through them once more; `pytest_collection_finish` sets them aside for good.
gc.disable()

ROOT = Path(__file__).resolve().parent.parent
MODEL_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
#: A program and its templates, which no package registry serves, so a run may do without; the tests that would use them are named
#: all the same.
ALLOWED_SKIP = ("no ollama program", "no ollama templates")
#: Folders whose tests are marked by where they stand, so that none is forgotten.
MARKED_FOLDERS = {"flows": ("flow",), "compat": ("flow", "compat")}

_skips: list[str] = []


@pytest.fixture(scope="session")
def small_model() -> Path:
    """A GGUF file of 98 MB that really answers. Skips by name when it was not fetched."""
    path = Path(os.environ.get("CORRAL_TEST_MODEL") or ROOT / ".cache" / MODEL_FILE)
    if not path.exists():
        pytest.skip(f"{MODEL_FILE} is not there; `make test` fetches it")
    return path


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark by folder and by fixture; leave the slow kinds for the end, so that a small mistake shows first."""
    for item in items:
        for name in MARKED_FOLDERS.get(item.path.relative_to(ROOT / "tests").parts[0], ()):
            item.add_marker(name)
        if "small_model" in getattr(item, "fixturenames", ()):
            item.add_marker("engine")
    items.sort(key=_slowness)


def pytest_collection_finish() -> None:
    """From here on the garbage collector works again, and only on what the tests make."""
    gc.freeze()
    gc.enable()


def _slowness(item: pytest.Item) -> int:
    return sum(1 for name in ("engine", "flow", "compat", "browser") if item.get_closest_marker(name))


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Remember skips for the end of the run."""
    if report.skipped and not hasattr(report, "wasxfail"):
        reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else ""
        if not any(allowed in reason for allowed in ALLOWED_SKIP):
            _skips.append(f"{report.nodeid}: {reason}")


def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    """With CORRAL_FORBID_SKIPS=1 a skipped test fails the run: on CI a missing program is a mistake of .ci/run."""
    if os.environ.get("CORRAL_FORBID_SKIPS") == "1" and _skips and exitstatus == 0:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Say which tests were skipped where that is forbidden."""
    if os.environ.get("CORRAL_FORBID_SKIPS") == "1" and _skips:
        terminalreporter.section("skipped, which CORRAL_FORBID_SKIPS forbids")
        for skip in _skips:
            terminalreporter.write_line(skip)
