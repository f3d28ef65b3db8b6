"""What the machine offers, read from copies of the kernel's files."""

import os
from pathlib import Path

import pytest

from corral.engines.machine import (
    default_threads,
    has_accelerator,
    oom_kills,
    physical_cores,
    thread_environment,
    usable_memory_bytes,
)


def put(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text + "\n")
    return root


@pytest.fixture
def here() -> set[int]:
    """The processors this test may use."""
    if not hasattr(os, "sched_getaffinity"):
        pytest.skip("this system does not tell")
    return os.sched_getaffinity(0)


def test_hyper_threads_of_one_core_count_once(tmp_path: Path, here: set[int]) -> None:
    siblings = {f"sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list": "0-127" for cpu in here}
    assert physical_cores(put(tmp_path, siblings)) == 1


def test_processors_without_topology_count_each(tmp_path: Path, here: set[int]) -> None:
    assert physical_cores(tmp_path) == len(here)


@pytest.mark.parametrize(
    ("quota", "threads"), [("max 100000", None), ("100000 100000", 1), ("50000 100000", 1), ("nonsense", None)]
)
def test_threads_are_cut_to_the_containers_quota(tmp_path: Path, here: set[int], quota: str, threads: int | None) -> None:
    assert default_threads(put(tmp_path, {"sys/fs/cgroup/cpu.max": quota})) == (threads or len(here))


def test_threads_are_cut_to_the_quota_of_our_own_group(tmp_path: Path) -> None:
    own = "system.slice/corral.service"
    files = {"proc/self/cgroup": f"0::/{own}", f"sys/fs/cgroup/{own}/cpu.max": "100000 100000"}
    assert default_threads(put(tmp_path, files)) == 1


def test_threads_that_fill_the_cores_are_pinned() -> None:
    assert thread_environment(2, {}, cores=2)["OMP_PROC_BIND"] == "true"


@pytest.mark.parametrize(
    ("threads", "given", "cores"),
    [(2, {}, 4), (1, {}, 1), (None, {}, None), (2, {"OMP_WAIT_POLICY": "passive"}, 2), (2, {"GOMP_SPINCOUNT": "1"}, 2)],
)
def test_other_threads_are_left_alone(threads: int | None, given: dict[str, str], cores: int | None) -> None:
    assert thread_environment(threads, given, cores=cores) == {}


@pytest.mark.parametrize(("told", "count"), [("nr_free_pages 12\noom_kill 3\ndrop_pagecache 0", 3), ("nr_free_pages 12", 0)])
def test_kills_for_want_of_memory_are_counted_by_the_kernel(tmp_path: Path, told: str, count: int) -> None:
    assert oom_kills(tmp_path) == 0
    assert oom_kills(put(tmp_path, {"proc/vmstat": told})) == count


def test_memory_is_the_machines_or_the_containers(tmp_path: Path) -> None:
    assert usable_memory_bytes(tmp_path) == 0
    put(tmp_path, {"proc/meminfo": "MemTotal:       1024 kB\nMemFree: 1 kB"})
    assert usable_memory_bytes(tmp_path) == 1024 * 1024
    put(tmp_path, {"sys/fs/cgroup/memory.max": "4096"})
    assert usable_memory_bytes(tmp_path) == 4096
    put(tmp_path, {"sys/fs/cgroup/memory.max": "max"})
    assert usable_memory_bytes(tmp_path) == 1024 * 1024


def test_memory_is_cut_to_what_the_groups_around_ours_allow(tmp_path: Path) -> None:
    files = {"proc/self/cgroup": "0::/user.slice/corral.service", "proc/meminfo": "MemTotal: 1024 kB"}
    put(tmp_path, {**files, "sys/fs/cgroup/user.slice/memory.max": "8192"})
    put(tmp_path, {"sys/fs/cgroup/user.slice/corral.service/memory.max": "max"})
    assert usable_memory_bytes(tmp_path) == 8192


def test_memory_is_cut_to_what_older_control_groups_allow(tmp_path: Path) -> None:
    put(tmp_path, {"proc/meminfo": "MemTotal: 1024 kB", "sys/fs/cgroup/memory/memory.limit_in_bytes": "4096"})
    assert usable_memory_bytes(tmp_path) == 4096
    put(tmp_path, {"sys/fs/cgroup/memory/memory.limit_in_bytes": "9223372036854771712"})
    assert usable_memory_bytes(tmp_path) == 1024 * 1024


@pytest.mark.parametrize("device", ["nvidiactl", "kfd", "dri/renderD128", "dxg"])
def test_accelerator_shows_by_its_device_file(tmp_path: Path, device: str) -> None:
    assert not has_accelerator(tmp_path, "linux")
    assert has_accelerator(put(tmp_path, {f"dev/{device}": ""}), "linux")


def test_accelerator_is_always_looked_for_on_a_mac(tmp_path: Path) -> None:
    assert has_accelerator(tmp_path, "darwin")
