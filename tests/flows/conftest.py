"""Installations for the flow tests. Starting one costs seconds, so a module shares one where its tests allow it."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from flows.stack import BOUNDED, MODEL, Stack


@pytest.fixture(scope="session")
def home_with_model(tmp_path_factory: pytest.TempPathFactory, small_model: Path) -> Path:
    """A home that `corral up --model` has made and left: the small model on both sides, no account. For `Stack(like=…)`."""
    with Stack(tmp_path_factory.mktemp("first")) as stack:
        stack.start("--model", f"{MODEL}={small_model}", *BOUNDED)
    return stack.home


@pytest.fixture
def fresh(tmp_path: Path) -> Iterator[Stack]:
    """An installation that was never started, with an empty home. Ended with the test."""
    with Stack(tmp_path) as stack:
        yield stack


@pytest.fixture
def stocked(tmp_path: Path, home_with_model: Path) -> Iterator[Stack]:
    """An installation that was started before, with the small model and no account, and is not running. Ended with the test."""
    with Stack(tmp_path, like=home_with_model) as stack:
        yield stack


@pytest.fixture
def running(stocked: Stack) -> Stack:
    """A started installation with the small model and no account."""
    stocked.start()
    return stocked


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory, home_with_model: Path) -> Iterator[Stack]:
    """A started installation with the small model and the administrator alice, for the tests of one module."""
    with Stack(tmp_path_factory.mktemp("stack"), like=home_with_model) as stack:
        stack.start()
        stack.add_account("alice")
        yield stack
