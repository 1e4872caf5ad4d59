"""Waiting for another thread or process on a machine that may be busy."""

import time
from collections.abc import Callable

LONG = 600  # seconds; only a process that hangs takes as long


def wait_until(reached: Callable[[], object]) -> None:
    """Return when `reached()` is true. Fail after LONG seconds."""
    end = time.monotonic() + LONG
    while not reached():
        assert time.monotonic() < end, "it never happened"
        time.sleep(0.005)
