"""Waiting for another thread or process on a machine that may be busy, and for the end of a process."""

import time
from collections.abc import Callable
from pathlib import Path

LONG = 600  # seconds; only a process that hangs takes as long


def wait_until(reached: Callable[[], object]) -> None:
    """Return when `reached()` is true. Fail after LONG seconds."""
    end = time.monotonic() + LONG
    while not reached():
        assert time.monotonic() < end, "it never happened"
        time.sleep(0.005)


def alive(process: int) -> bool:
    """Whether a process runs. A zombie, which waits for a parent to ask for its exit code, is dead."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False
