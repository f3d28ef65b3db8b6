"""What this machine offers an engine: processor cores and how its threads should share them, and memory.

llama.cpp meets a barrier several hundred times per token. Measured on two cores with SmolLM2-135M (tokens per second, one stream;
with one other process that keeps a core busy; with two engines at once):

    one thread                          50      40      -
    two threads, OpenMP's defaults      77       7      -      (a waiting thread spins on the core that the other one needs)
    two threads, OMP_WAIT_POLICY=passive 31     25      -
    two threads, pinned, short spin     86-119  40-52   42 each

So: one thread per physical core we may use, pinned to it, spinning for about 50 µs before it sleeps. Pinning is right only when
the threads fill the cores they are pinned to: two half-sized engines would be put on the same half.
"""

import contextlib
import errno
import os
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

from corral.wire.errors import CorralError

#: What libgomp spins before it sleeps; its default is a hundred times longer.
_SPINS = "3000"
_EXHAUSTED = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ENOBUFS, errno.EAGAIN, errno.EADDRNOTAVAIL})


def physical_cores(root: Path = Path("/")) -> int | None:
    """Cores this process may run on, hyper-threads counted once. None where the system does not tell."""
    if not hasattr(os, "sched_getaffinity"):
        return None
    return len({_siblings(cpu, root) for cpu in os.sched_getaffinity(0)})


def default_threads(root: Path = Path("/")) -> int | None:
    """Threads for an engine that is told nothing: one per core, cut to the container's quota. None lets llama.cpp decide."""
    cores = physical_cores(root)
    if cores is None:
        return None
    quota = min(_quotas(root), default=float(cores))
    return max(1, min(cores, round(quota)))


def has_accelerator(root: Path = Path("/"), platform: str = sys.platform) -> bool:
    """Whether there may be something that llama.cpp computes on beside the processor: worth asking it, which takes a moment."""
    return platform == "darwin" or any((root / "dev" / name).exists() for name in ("nvidiactl", "kfd", "dri/renderD128", "dxg"))


def usable_memory_bytes(root: Path = Path("/")) -> int:
    """Main memory that models may be planned into, cut to what control groups allow; 0 for unknown."""
    try:
        lines = (root / "proc/meminfo").read_text().splitlines()
    except OSError:
        return 0
    found = [int(line.split()[1]) * 1024 for line in lines if line.startswith("MemTotal:")]
    # Version 1 writes "no limit" as a number larger than any memory.
    for name in ("memory.max", "memory/memory.limit_in_bytes"):
        found += [int(text) for text in _of_groups(root, name) if text.isdigit()]
    return min(found, default=0)


def oom_kills(root: Path = Path("/")) -> int:
    """How many processes the kernel has killed for want of memory; 0 where it does not tell."""
    try:
        lines = (root / "proc/vmstat").read_text().splitlines()
    except OSError:
        return 0
    return sum(int(line.split()[1]) for line in lines if line.startswith("oom_kill "))


def is_exhausted(error: OSError) -> bool:
    """Whether the machine, or what it allows us, ran out of something (descriptors, processes, memory, ports). That passes, and
    is no fault of an engine's."""
    return error.errno in _EXHAUSTED


def exhausted() -> CorralError:
    """What the caller is told then."""
    return CorralError("unavailable", "this machine is out of resources at the moment; try again later", retry_after_s=5)


def thread_environment(threads: int | None, given: Mapping[str, str], *, cores: int | None) -> dict[str, str]:
    """OpenMP settings for an engine of so many threads on so many physical cores; empty when the operator set any of their
    own."""
    if threads is None or threads < 2 or threads != cores or any(name.startswith(("OMP_", "GOMP_", "KMP_")) for name in given):
        return {}
    return {"OMP_PROC_BIND": "true", "OMP_PLACES": "cores", "GOMP_SPINCOUNT": _SPINS}


def _siblings(cpu: int, root: Path) -> str:
    """A text that is equal for the hyper-threads of one core."""
    try:
        return (root / f"sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list").read_text().strip()
    except OSError:
        return str(cpu)


def _quotas(root: Path) -> Iterator[float]:
    """Cores' worth of time that control groups allow."""
    for text in _of_groups(root, "cpu.max"):
        quota, _, period = text.partition(" ")
        if quota.isdigit() and period.isdigit() and int(period):
            yield int(quota) / int(period)


def _of_groups(root: Path, name: str) -> Iterator[str]:
    """A setting of our control group and of those around it, each of which binds. Inside a container its own group is mounted as
    the root."""
    own = Path(_own_group(root))
    for group in (own, *own.parents):
        with contextlib.suppress(OSError):
            yield (root / "sys/fs/cgroup" / group / name).read_text().strip()


def _own_group(root: Path) -> str:
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return ""
    return next((line[3:].strip("/") for line in lines if line.startswith("0::")), "")
