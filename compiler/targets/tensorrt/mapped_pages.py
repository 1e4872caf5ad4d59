"""Gives back the memory of files that a library has mapped and will read again at most once or twice.

TensorRT's ONNX parser maps the weights, and a build copies them twice: with the file's own pages that is
three times the weights at the peak. Pages of a file that nobody writes can be dropped at any moment; whoever
needs one again gets it from the page cache.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import threading
from collections.abc import Iterator

_MADV_DONTNEED = 4  # Linux; for a private mapping that is only read, it forgets nothing
_PERIOD = 0.1  # seconds
_MAPS_BYTES = 4 << 20  # far more than any process's list of mappings


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
    return [span for line in _lines("/proc/self/maps") if (span := _read_only(line, suffix))]


def _read_only(line: bytes, suffix: str) -> tuple[int, int] | None:
    span, permissions, *rest = line.split(maxsplit=5)
    if permissions[1:2] != b"-" or len(rest) < 4 or not rest[3].endswith(suffix.encode()):
        return None
    first, last = (int(bound, 16) for bound in span.split(b"-"))
    return first, last - first


def _lines(path: str) -> Iterator[bytes]:
    """The lines of a file of the system, none if it is not there. All of them pass through one buffer, so
    that what is allocated does not depend on the lengths of the paths in them."""
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
