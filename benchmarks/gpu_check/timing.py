"""GPU time in seconds, measured with events on torch's current stream."""

from __future__ import annotations

import statistics
from collections.abc import Callable

import torch

# The GPU sleeps (1 to 2 ms) before every timed call, so that all launches are queued when the time starts and
# none waits for Python.
_SLEEP_CYCLES = 2_000_000


class L2:
    """Flushes the L2 cache by reading more than it holds. Reading leaves no dirty lines to evict."""

    def __init__(self, size: int) -> None:
        self._other = torch.zeros(max(4 * size, 256 << 20) // 4, dtype=torch.float32, device="cuda")
        self._sum = torch.zeros((), dtype=torch.float32, device="cuda")

    def flush(self) -> None:
        torch.sum(self._other, dim=0, out=self._sum)


def seconds(call: Callable[[], object], *, repeats: int, l2: L2 | None = None, warmup: int = 3) -> float:
    """Return the median time of a call's kernels, including the gaps between them.

    l2: flushed before each call.
    """
    for _ in range(warmup):
        call()
    marks = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(repeats)]
    for begin, end in marks:
        if l2 is not None:
            l2.flush()
        torch.cuda._sleep(_SLEEP_CYCLES)
        begin.record()
        call()
        end.record()
    torch.cuda.synchronize()
    return statistics.median(begin.elapsed_time(end) for begin, end in marks) / 1e3
