"""A restore that is killed, and disks that fail under it: the former hub, the restored one, or a sentence, never a mixture."""

import asyncio
import errno
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path

import pytest

from corral.wire.errors import CorralError
from registry_faults import Disk, Step, broken_from, failing, torn
from restore_faults import condition, former_of, make, put_back


@pytest.fixture(scope="module")
def directory() -> Iterator[Path]:
    """In memory where there is such a directory: a killed process takes nothing along that the kernel has."""
    memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=memory if os.access(memory, os.W_OK) else None) as name:
        yield Path(name)


@pytest.mark.flow
def test_r002_r013_restore_killed_at_every_step_leaves_one_hub_or_the_other_and_ends_when_done_again(directory: Path) -> None:
    script = Path(__file__).resolve().parent.parent / "restore_faults.py"
    environment = {"PYTHONPATH": os.pathsep.join(entry for entry in sys.path if entry), "PATH": os.environ["PATH"]}
    place = directory / "killed"
    place.mkdir()
    done = subprocess.run(
        [sys.executable, str(script), str(place)], capture_output=True, text=True, env=environment, timeout=240, check=False
    )
    assert done.returncode == 0, done.stderr
    found = [line.split()[1] for line in done.stdout.splitlines()]
    assert found == sorted(found, key=["former", "unfinished", "restored"].index)
    assert set(found) == {"former", "unfinished", "restored"}


@pytest.fixture(scope="module")
def made(directory: Path) -> Path:
    """What `make` made, in a directory in which there is room for more."""
    asyncio.run(make(directory))
    return directory


@pytest.mark.flow
@pytest.mark.parametrize(
    ("fault", "code"), [(failing, errno.EIO), (torn, errno.EIO), (broken_from, errno.EIO), (failing, errno.ENOSPC)]
)
async def test_r018_r003_restore_on_a_disk_that_fails_leaves_one_hub_or_the_other(
    made: Path, fault: Callable[[int, int], Step], code: int
) -> None:
    number, found, is_touched = 0, [], True
    while is_touched:
        number += 1
        with tempfile.TemporaryDirectory(dir=made) as place:
            home = Path(shutil.copytree(made / "hub", Path(place) / "hub", symlinks=True))
            disk = Disk(fault(number, code))
            outcome = await _outcome(put_back(home, made / "backup.tar", disk))
            assert outcome in ("", "unavailable", "storage_full", "invalid"), (number, disk.log[-1])
            found.append(await condition(home))
            assert (found[-1] == "restored") or outcome, (number, disk.log[number - 1])
            if found[-1] == "unfinished":
                await put_back(home, made / "backup.tar")
                assert await condition(home) == "restored"
                assert former_of(home) == (3, "p2")
            is_touched = disk.count >= number
    assert number > 20
    assert (outcome, found[-1]) == ("", "restored")
    assert {"former", "unfinished"} <= set(found)


async def _outcome(work: Awaitable[object]) -> str:
    """The code of the error that it ended with, if it did."""
    try:
        await work
    except CorralError as error:
        return error.code
    return ""
