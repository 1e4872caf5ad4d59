"""The memory of this machine, and how much of it a verification needs."""

from __future__ import annotations

_BASE_BYTES = 900 << 20  # torch, transformers and an engine, without weights


def total_memory() -> int | None:
    """Bytes of the machine, or None where the system does not say."""
    return _meminfo("MemTotal")


def available_memory() -> int | None:
    """Bytes that can be used without swapping, or None where the system does not say."""
    return _meminfo("MemAvailable")


def memory_needed(weight_bytes: int) -> int:
    """Estimate the bytes that a verification needs.

    weight_bytes: of all weights in fp32, whatever the engine's dtype. transformers holds them once, and then
    the engine holds them again, packed or widened; the two never live at the same time. Pages of the engine's
    file come on top, and the kernel may drop those.
    """
    return _BASE_BYTES + int(weight_bytes * 1.25)


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
