"""Release of free heap and file pages while an engine packs its weights (Linux).

OpenVINO maps the file and packs each matrix into its own layout at the first multiplication. Without
this module the file's pages would stay resident beside the packed copy and double the memory of the weights.
"""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import threading
from collections.abc import Iterator
from pathlib import Path

_INTERVAL = 0.004  # seconds; packing reads a few MB in this time
_LIBC = ctypes.CDLL(None)


@contextlib.contextmanager
def releasing(directory: Path) -> Iterator[None]:
    """Release free heap, then drop resident pages of files below `directory` while the block runs.

    Pages are dropped at intervals and once more at the end. Only read-only mappings are affected, so nothing
    is lost: the page cache returns a page that is read again. The mappings must exist until the end, because
    the contents of any other memory at these addresses would be lost. Without /proc no pages are dropped.
    """
    mappings, ended = _mappings(directory), threading.Event()

    def work() -> None:
        while not ended.wait(_INTERVAL):
            _drop(mappings)

    if trim := getattr(_LIBC, "malloc_trim", None):  # glibc: reading and compiling leave a few MB free
        trim(ctypes.c_size_t(0))
    thread = threading.Thread(target=work, name="llmc-file-pages", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
        _drop(mappings)


def _mappings(directory: Path) -> list[tuple[int, int]]:
    """Return the addresses (begin, end) of read-only mappings of files below `directory`."""
    maps, below, mappings = Path("/proc/self/maps"), f"{directory.resolve()}/", []
    if not maps.is_file():
        return []
    for line in maps.read_text().splitlines():
        addresses, permissions, _, _, _, *name = line.split(maxsplit=5)
        if name and name[0].startswith(below) and permissions.startswith("r--"):
            begin, end = (int(address, 16) for address in addresses.split("-"))
            mappings.append((begin, end))
    return mappings


def _drop(mappings: list[tuple[int, int]]) -> None:
    for begin, end in mappings:
        _LIBC.madvise(ctypes.c_void_p(begin), ctypes.c_size_t(end - begin), mmap.MADV_DONTNEED)
