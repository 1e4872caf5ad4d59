"""Waiting for what another thread or process does, on a machine that may be busy."""

import time
from collections.abc import Callable

LONG = 600  # seconds: what only a hanging process takes


def wait_until(reached: Callable[[], object]) -> None:
    """Returns when `reached()` is true. Fails after LONG seconds."""
    end = time.monotonic() + LONG
    while not reached():
        assert time.monotonic() < end, "it never happened"
        time.sleep(0.005)
