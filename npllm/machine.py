"""What this machine has: memory, cores, CPU features, BLAS threads."""

from __future__ import annotations

import contextlib
import gc
import math
import os
import sys
from collections.abc import Callable
from pathlib import Path

# The environment's name for the folder that compiled kernels are kept in.
CACHE_VARIABLE = "NPLLM_CACHE"

# Where Linux tells what a container may take.
CONTROL_GROUPS = Path("/sys/fs/cgroup")


def gibibytes(size: float) -> str:
    """`size` bytes as text: 1.5 GiB, 12 MiB."""
    if size >= 1 << 30:
        return f"{size / (1 << 30):.1f} GiB"
    return f"{size / (1 << 20):.0f} MiB"


def cache_root() -> Path | None:
    """`NPLLM_CACHE`, else npllm in XDG_CACHE_HOME or ~/.cache; None where there is no home."""
    if asked := os.environ.get(CACHE_VARIABLE):
        return Path(os.path.expanduser(asked))
    if base := os.environ.get("XDG_CACHE_HOME"):
        return Path(base) / "npllm"
    with contextlib.suppress(RuntimeError):
        return Path.home() / ".cache" / "npllm"
    return None


def available_memory() -> int:
    """Bytes that a new allocation can use without swapping: the system's estimate, within the limits of the control group
    and of the process (ulimit -d, ulimit -v)."""
    limits = [_meminfo("MemAvailable"), _control_group(), *_process_limits()]
    known = [limit for limit in limits if limit is not None]
    return min(known) if known else sys.maxsize


def available_for(needed: int, available: Callable[[], int]) -> int:
    """What `available` tells; where that is less than needed, what it tells once garbage in cycles is collected."""
    told = available()
    if needed <= told:
        return told
    gc.collect()
    return available()


def total_memory() -> int | None:
    """Bytes of physical memory, or None where the system does not say."""
    return _meminfo("MemTotal")


def _meminfo(key: str) -> int | None:
    if (size := _kibibytes(Path("/proc/meminfo"), key)) is not None:
        return size
    with contextlib.suppress(AttributeError, ValueError, OSError):
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return None


def _kibibytes(path: Path, key: str) -> int | None:
    """The entry `key: 123 kB` of one of the system's tables, in bytes."""
    with contextlib.suppress(OSError):
        for line in path.read_text().splitlines():
            if line.startswith(key + ":"):
                return int(line.split()[1]) * 1024
    return None


def _process_limits() -> list[int]:
    """What each limit that is set on this process leaves."""
    try:
        import resource
    except ImportError:
        return []
    left = []
    for limit, key in ((resource.RLIMIT_DATA, "VmData"), (resource.RLIMIT_AS, "VmSize")):
        most = resource.getrlimit(limit)[0]
        # Asked for where there is a limit only: each new cache asks.
        if most != resource.RLIM_INFINITY and (used := _kibibytes(Path("/proc/self/status"), key)) is not None:
            left.append(max(0, most - used))
    return left


def _control_group() -> int | None:
    """What the container may still take (cgroup v2, else v1); file pages that can be dropped do not count as taken."""
    places = [
        ("memory.max", "memory.current", "memory.stat", "inactive_file"),
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes", "memory/memory.stat", "total_inactive_file"),
    ]
    for limit, usage, statistics, droppable in places:
        try:
            counts = dict(line.split() for line in (CONTROL_GROUPS / statistics).read_text().splitlines())
            used = int((CONTROL_GROUPS / usage).read_text()) - int(counts.get(droppable, 0))
            return max(0, int((CONTROL_GROUPS / limit).read_text()) - used)
        except (OSError, ValueError):
            continue
    return None


def cores() -> int:
    """Cores that this process may keep busy: those it may run on, and no more than its control group has time for."""
    affinity = getattr(os, "sched_getaffinity", None)
    count = len(affinity(0)) if affinity else os.cpu_count() or 1
    share = _processor_share()
    return count if share is None else max(1, min(count, math.ceil(share)))


def _processor_share() -> float | None:
    """Cores' worth of time that the container may take (cgroup v2, else v1)."""
    for places in (("cpu.max",), ("cpu/cpu.cfs_quota_us", "cpu/cpu.cfs_period_us")):
        try:
            quota, period = " ".join((CONTROL_GROUPS / place).read_text() for place in places).split()
            return int(quota) / int(period) if int(quota) > 0 else None
        except (OSError, ValueError):  # no such group; "max"
            continue
    return None


def default_threads() -> int:
    """Threads where the user names none: OMP_NUM_THREADS, else NUMBA_NUM_THREADS, else all cores."""
    for variable in ("OMP_NUM_THREADS", "NUMBA_NUM_THREADS"):
        asked = os.environ.get(variable, "")
        if asked.isdigit() and int(asked):
            return min(int(asked), cores())
    return cores()


def cpu_name() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    import platform

    return platform.processor() or platform.machine()
