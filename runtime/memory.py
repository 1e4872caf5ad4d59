"""What comparing needs of the machine."""

from __future__ import annotations

_BASE_BYTES = 900 << 20  # torch, transformers and an engine, without weights


def memory_needed(weight_bytes: int) -> int:
    """Bytes that verification needs for weights of `weight_bytes` in fp32, whatever the engine's dtype: once
    for transformers, then once more, packed or widened, for the engine, plus slack.

    The two never live at the same time; the engine's copy comes on top of pages of its file, which the
    kernel may drop.
    """
    return _BASE_BYTES + int(weight_bytes * 1.25)


def available_memory() -> int | None:
    """Bytes that can be used without swapping, or None where the system does not say."""
    try:
        with open("/proc/meminfo") as file:
            for line in file:
                if line.startswith("MemAvailable:"):
                    return int(line.split()[1]) << 10
    except OSError:
        return None
    return None
