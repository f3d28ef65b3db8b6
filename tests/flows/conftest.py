"""Installations for the flow tests. Starting one costs seconds, so a module shares one where its tests allow it."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from flows.stack import BOUNDED, MODEL, Stack


@pytest.fixture
def fresh(tmp_path: Path) -> Iterator[Stack]:
    """An installation that was never started, with an empty home. Ended with the test."""
    with Stack(tmp_path) as stack:
        yield stack


@pytest.fixture
def running(fresh: Stack, small_model: Path) -> Stack:
    """A started installation with the small model and no account."""
    fresh.start("--model", f"{MODEL}={small_model}", *BOUNDED)
    return fresh


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory, small_model: Path) -> Iterator[Stack]:
    """A started installation with the small model and the administrator alice, for the tests of one module."""
    with Stack(tmp_path_factory.mktemp("stack")) as stack:
        stack.start("--model", f"{MODEL}={small_model}", *BOUNDED)
        stack.add_account("alice")
        yield stack
