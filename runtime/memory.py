"""Memory: what this machine has within its container's limit, what a verification needs, and huge pages."""

from __future__ import annotations

import mmap
import os

from llmc.runtime import cgroup

_BASE_BYTES = 900 << 20  # torch, transformers and an engine, without weights


def total_memory() -> int | None:
    """Return the machine's memory in bytes, or its container's limit. None: the system reports neither."""
    return _smaller(_meminfo("MemTotal"), cgroup.limits().memory)


def available_memory() -> int | None:
    """Return the bytes that are available without swapping and within the limit of the container.

    Returns None if the system does not report them.
    """
    return _smaller(_meminfo("MemAvailable"), cgroup.limits().available_memory)


def allocate(nbytes: int) -> mmap.mmap:
    """Return `nbytes` bytes of zeroed memory, in huge pages where the system has them.

    The memory is private: Linux has no huge pages for shared memory unless an administrator asks for them.
    """
    memory = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        memory.madvise(mmap.MADV_HUGEPAGE)
    return memory


def private_memory(pid: int) -> int:
    """Return the bytes of memory that only this process uses; 0 if the system does not report them."""
    try:
        with open(f"/proc/{pid}/statm") as file:
            _, resident, shared, *_ = map(int, file.read().split())
    except (OSError, ValueError):
        return 0
    return (resident - shared) * os.sysconf("SC_PAGE_SIZE")


def memory_needed(weight_bytes: int) -> int:
    """Estimate the bytes that a verification needs.

    weight_bytes: the size of all weights in fp32, for any dtype of the engine. First transformers holds them,
    then the engine, packed or widened, but never both at the same time. Pages of the engine's file are
    extra, and the kernel may drop them.
    """
    return _BASE_BYTES + int(weight_bytes * 1.25)


def _smaller(*sizes: int | None) -> int | None:
    return min((size for size in sizes if size is not None), default=None)


def _meminfo(field: str) -> int | None:
    try:
        with open("/proc/meminfo") as file:
            for line in file:
                name, _, kilobytes = line.partition(":")
                if name == field:
                    return int(kilobytes.split()[0]) << 10
    except OSError:
        return None
    return None
