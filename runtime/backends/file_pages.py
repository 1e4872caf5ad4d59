"""Keeps a mapped weight file out of the resident memory while an engine copies from it (Linux).

OpenVINO maps the file and packs each matrix into its own layout when it first multiplies with it. Without
this the file's pages stay resident beside the packed copy: twice the weights, as long as the process lives.
"""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import threading
from collections.abc import Iterator
from pathlib import Path

_INTERVAL = 0.02  # seconds: the disk or page cache delivers some tens of MB in that time


def release(directory: Path) -> int:
    """Drops this process's resident pages of files below `directory`; returns the bytes of those mappings.

    Only of mappings that cannot be written: nothing is lost, a page that is read again comes back from the
    page cache. Does nothing where there is no /proc.
    """
    maps, below, total = Path("/proc/self/maps"), f"{directory.resolve()}/", 0
    if not maps.is_file():
        return 0
    libc = ctypes.CDLL(None)
    for line in maps.read_text().splitlines():
        addresses, permissions, _, _, _, *name = line.split(maxsplit=5)
        if name and name[0].startswith(below) and permissions.startswith("r--"):
            begin, end = (int(address, 16) for address in addresses.split("-"))
            libc.madvise(ctypes.c_void_p(begin), ctypes.c_size_t(end - begin), mmap.MADV_DONTNEED)
            total += end - begin
    return total


@contextlib.contextmanager
def releasing(directory: Path) -> Iterator[None]:
    """Drops the pages again and again while the block runs, and at its end."""
    ended = threading.Event()

    def work() -> None:
        while not ended.wait(_INTERVAL):
            release(directory)

    thread = threading.Thread(target=work, name="llmc-file-pages", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
        release(directory)
