"""Keeps resident memory low while an engine packs its weights: no free heap, no file pages (Linux).

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

_INTERVAL = 0.004  # seconds: packing reads some MB in that time
_LIBC = ctypes.CDLL(None)


@contextlib.contextmanager
def releasing(directory: Path) -> Iterator[None]:
    """Drops this process's resident pages of files below `directory`, again and again while the block runs
    and at its end. Free heap goes back before.

    Only of mappings that cannot be written: nothing is lost, a page that is read again comes back from the
    page cache. They must stay mapped until the end: other memory at these addresses would be lost. Does
    nothing about pages where there is no /proc.
    """
    found, ended = _mappings(directory), threading.Event()

    def work() -> None:
        while not ended.wait(_INTERVAL):
            _drop(found)

    if trim := getattr(_LIBC, "malloc_trim", None):  # glibc: reading and compiling leave some MB free
        trim(ctypes.c_size_t(0))
    thread = threading.Thread(target=work, name="llmc-file-pages", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
        _drop(found)


def _mappings(directory: Path) -> list[tuple[int, int]]:
    """First and last + 1 addresses of files below `directory` that are mapped and cannot be written."""
    maps, below, found = Path("/proc/self/maps"), f"{directory.resolve()}/", []
    if not maps.is_file():
        return []
    for line in maps.read_text().splitlines():
        addresses, permissions, _, _, _, *name = line.split(maxsplit=5)
        if name and name[0].startswith(below) and permissions.startswith("r--"):
            begin, end = (int(address, 16) for address in addresses.split("-"))
            found.append((begin, end))
    return found


def _drop(mappings: list[tuple[int, int]]) -> None:
    for begin, end in mappings:
        _LIBC.madvise(ctypes.c_void_p(begin), ctypes.c_size_t(end - begin), mmap.MADV_DONTNEED)
