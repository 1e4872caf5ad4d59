"""The CPUs that this process may use: its affinity, within the quota of its container."""

from __future__ import annotations

import os
from pathlib import Path

from llmc.runtime import cgroup


def available_cpus() -> int:
    """Return the number of logical CPUs that this process may use."""
    quota = cgroup.limits().cpus
    return len(_affinity()) if quota is None else min(len(_affinity()), quota)


def default_threads(threads: int | None = None) -> int | None:
    """Return the number of threads of an engine: `threads` if given, else the quota of the container.

    Returns None if no quota is below the number of cores. The engine then uses one thread per core.
    """
    quota = cgroup.limits().cpus
    return quota if threads is None and quota is not None and quota < _cores() else threads


def engine_threads(threads: int | None = None) -> int:
    """Return `threads` if given, else one thread per physical core, at most the quota of the container."""
    return default_threads(threads) or _cores()


def limit_library_threads() -> None:
    """Have torch and numpy respect a CPU quota, here and in child processes. Call it before their import.

    By default these libraries start a thread for each core of the host, and the threads wait for each other.
    numpy's products get half of the cores: GPTQ computes them while a layer runs on all cores, and their idle
    threads spin. OMP_NUM_THREADS takes precedence if it is set.
    """
    if "OMP_NUM_THREADS" not in os.environ:
        os.environ.setdefault("OPENBLAS_NUM_THREADS", str(max(1, available_cpus() // 2)))
    if (threads := default_threads()) is not None:
        os.environ.setdefault("OMP_NUM_THREADS", str(threads))


def _affinity() -> set[int]:
    try:
        return os.sched_getaffinity(0)
    except AttributeError:  # not on macOS
        return set(range(os.cpu_count() or 1))


def _cores() -> int:
    """Return the number of physical cores that this process may use, not counting hardware threads."""
    cores = set()
    for cpu in _affinity():
        try:
            siblings = Path(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list").read_text()
        except OSError:
            siblings = str(cpu)
        cores.add(siblings)
    return len(cores)
