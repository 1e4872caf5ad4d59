"""Huge pages for resident memory, for fewer TLB misses when all weights are read (Linux 6.1 or newer).

Decoding reads every weight once per token. Where the system gives huge pages only on request, OpenVINO's
packed weights are in pages of 4 KiB. docs/explanation/performance.md lists the speedup.
"""

from __future__ import annotations

import ctypes
from io import FileIO
from pathlib import Path

import numpy as np

_HUGE, _PAGE = 2 << 20, 4096
_MADV_COLLAPSE = 25  # include/uapi/asm-generic/mman-common.h, since Linux 6.1
_PRESENT = np.uint64(1 << 63)  # Documentation/admin-guide/mm/pagemap.rst
_FULL = 7 / 8  # the share of a huge page that must be resident, so that an unwritten cache gets no memory


def collapse_resident() -> int:
    """Move this process's resident anonymous memory into huge pages. Return the number of bytes moved.

    Contents and addresses do not change. The function does nothing on systems without support, and stops if
    the process may not read /proc/self/pagemap, for example after it dropped root privileges.
    """
    moved = 0
    try:
        maps = Path("/proc/self/maps").read_text()
        with Path("/proc/self/pagemap").open("rb", buffering=0) as pagemap:
            for line in maps.splitlines():
                moved += _collapse(line, pagemap)
    except OSError:
        pass
    return moved


def _collapse(line: str, pagemap: FileIO) -> int:
    """Move one mapping, given by its line of /proc/self/maps. Return the bytes moved. Raises OSError."""
    addresses, permissions, _, _, _, *name = line.split(maxsplit=5)
    if not permissions.startswith("rw") or (name and name[0] != "[heap]"):
        return 0
    begin, end = (int(address, 16) for address in addresses.split("-"))
    begin, end = -(-begin // _HUGE) * _HUGE, end // _HUGE * _HUGE
    if begin >= end:
        return 0
    libc, moved = ctypes.CDLL(None), 0
    pagemap.seek(begin // _PAGE * 8)
    entries = np.frombuffer(pagemap.read((end - begin) // _PAGE * 8), np.uint64)
    resident = ((entries & _PRESENT) != 0).reshape(-1, _HUGE // _PAGE).mean(axis=1)
    for index in np.flatnonzero(resident >= _FULL):
        address = ctypes.c_void_p(begin + int(index) * _HUGE)
        if libc.madvise(address, ctypes.c_size_t(_HUGE), _MADV_COLLAPSE) == 0:
            moved += _HUGE
    return moved
