"""Release the memory of files that a library has memory-mapped.

TensorRT's ONNX parser memory-maps the weights, and a build copies them twice. With the mapped pages, the peak
is three times the size of the weights. Pages of a file that is only read can be dropped at any time. When one
is needed again, it comes from the page cache.
"""

from __future__ import annotations

import _thread
import contextlib
import ctypes
import os
from collections.abc import Callable, Iterable, Iterator

_MADV_DONTNEED = 4  # madvise(2) on Linux; a private mapping that is only read loses no data
_PERIOD = 0.1  # seconds
_MAPS_BYTES = 4 << 20  # far more than any process's list of mappings


@contextlib.contextmanager
def kept_small(suffix: str) -> Iterator[None]:
    """Drop the pages of memory-mapped files whose names end with `suffix`, periodically while the block runs.

    Only Linux is supported; on other systems nothing happens. The block's allocations get the same addresses
    in every run: the thread allocates nothing once the block has begun, and no thread allocates in order to
    wait, as `threading.Thread.start` and `threading.Event.wait` do if the other thread is late.
    """
    ranges = _mapped(suffix)
    if not ranges:
        yield
        return
    madvise = ctypes.CDLL(None).madvise
    madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    starting, running, ending = (_thread.allocate_lock() for _ in range(3))

    def drop() -> None:
        _drop(madvise, ranges)
        starting.release()
        while not running.acquire(timeout=_PERIOD):
            _drop(madvise, ranges)
        ending.release()

    for lock in (starting, running, ending):
        lock.acquire()
    _thread.start_new_thread(drop, ())
    starting.acquire()
    try:
        yield
    finally:
        running.release()
        ending.acquire()


def _drop(madvise: Callable[[int, int, int], int], ranges: Iterable[tuple[int, int]]) -> None:
    for address, length in ranges:
        madvise(address, length, _MADV_DONTNEED)


def _mapped(suffix: str) -> list[tuple[int, int]]:
    """Return (address, size in bytes) of every read-only mapping of a file whose name ends with `suffix`."""
    return [span for line in _lines("/proc/self/maps") if (span := _read_only(line, suffix))]


def _read_only(line: bytes, suffix: str) -> tuple[int, int] | None:
    span, permissions, *rest = line.split(maxsplit=5)
    if permissions[1:2] != b"-" or len(rest) < 4 or not rest[3].endswith(suffix.encode()):
        return None
    first, last = (int(bound, 16) for bound in span.split(b"-"))
    return first, last - first


def _lines(path: str) -> Iterator[bytes]:
    """Yield the lines of a file in /proc, or none if it does not exist.

    One buffer holds them all, so that allocations do not depend on the lengths of the paths.
    """
    if not os.path.exists(path):
        return
    buffer, used = bytearray(_MAPS_BYTES), 0
    with open(path, "rb", buffering=0) as file, memoryview(buffer) as view:
        while used < len(buffer) and (count := file.readinto(view[used:])):
            used += count
    start = 0
    while (end := buffer.find(b"\n", start, used)) >= 0:
        yield bytes(buffer[start:end])
        start = end + 1
