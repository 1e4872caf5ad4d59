"""Gives back the memory of files that a library has mapped and will read again at most once or twice.

TensorRT's ONNX parser maps the weights, and a build copies them twice: with the file's own pages that is
three times the weights at the peak. Pages of a file that nobody writes can be dropped at any moment; whoever
needs one again gets it from the page cache.
"""

from __future__ import annotations

import contextlib
import ctypes
import threading
from collections.abc import Iterator
from pathlib import Path

_MADV_DONTNEED = 4  # Linux; for a private mapping that is only read, it forgets nothing
_PERIOD = 0.1  # seconds


@contextlib.contextmanager
def kept_small(suffix: str) -> Iterator[None]:
    """Drops the pages of files mapped now whose names end with `suffix`, again and again in the block.

    Does nothing where the system is not Linux. Once the block has begun, the thread that does it asks for no
    memory: what the block allocates lies at the same addresses every time.
    """
    ranges = _mapped(suffix)
    if not ranges:
        yield
        return
    madvise = ctypes.CDLL(None).madvise
    madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    started, over = threading.Event(), threading.Event()

    def drop() -> None:
        while not over.is_set():
            for address, length in ranges:
                madvise(address, length, _MADV_DONTNEED)
            started.set()
            over.wait(_PERIOD)

    thread = threading.Thread(target=drop, daemon=True)
    thread.start()
    started.wait()
    try:
        yield
    finally:
        over.set()
        thread.join()


def _mapped(suffix: str) -> list[tuple[int, int]]:
    """(address, bytes) of every mapping of such a file that cannot be written through."""
    maps = Path("/proc/self/maps")
    found = []
    for line in maps.read_text().splitlines() if maps.is_file() else []:
        span, permissions, *rest = line.split(maxsplit=5)
        if permissions[1] == "-" and len(rest) == 4 and rest[3].endswith(suffix):
            first, last = (int(bound, 16) for bound in span.split("-"))
            found.append((first, last - first))
    return found
