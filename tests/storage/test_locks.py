"""Locks between processes."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from corral.storage.locks import held_alone, held_together
from corral.wire.errors import CorralError


def test_lock_is_held_by_one_at_a_time(tmp_path: Path) -> None:
    path = tmp_path / "x.lock"
    with held_alone(path, otherwise="somebody is at it"):
        with pytest.raises(CorralError, match="somebody is at it") as refused, held_alone(path, otherwise="somebody is at it"):
            pass
        assert refused.value.code == "conflict"
    with held_alone(path, otherwise=""):
        pass
    assert path.stat().st_mode & 0o777 == 0o600


def test_lock_is_held_by_several_together_or_by_one_alone(tmp_path: Path) -> None:
    path = tmp_path / "x.lock"
    with held_together(path, otherwise=""), held_together(path, otherwise=""):
        with pytest.raises(CorralError) as refused, held_alone(path, otherwise="they are at it"):
            pass
        assert (refused.value.code, refused.value.message) == ("conflict", "they are at it")
    with held_alone(path, otherwise=""), pytest.raises(CorralError) as refused, held_together(path, otherwise="one is at it"):
        pass
    assert (refused.value.code, refused.value.message) == ("unavailable", "one is at it")


def test_lock_is_let_go_when_its_holder_is_killed(tmp_path: Path) -> None:
    path = tmp_path / "x.lock"
    code = (
        "import sys, pathlib, time\n"
        "from corral.storage.locks import held_alone\n"
        "with held_alone(pathlib.Path(sys.argv[1]), otherwise=''):\n"
        "    print('held', flush=True)\n"
        "    time.sleep(60)\n"
    )
    holder = subprocess.Popen([sys.executable, "-c", code, str(path)], stdout=subprocess.PIPE, env=os.environ.copy())
    assert holder.stdout is not None
    with holder:
        assert holder.stdout.readline() == b"held\n"
        with pytest.raises(CorralError), held_alone(path, otherwise="held"):
            pass
        holder.kill()
        holder.wait()
    with held_alone(path, otherwise="held"):
        pass


def test_lock_that_cannot_be_made_is_unavailable(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "elsewhere")
    for path in (tmp_path / "no" / "x.lock", tmp_path / "link"):
        with pytest.raises(CorralError) as refused, held_alone(path, otherwise=""):
            pass
        assert refused.value.code == "unavailable"
