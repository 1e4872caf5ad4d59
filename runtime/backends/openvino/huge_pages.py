"""Moves resident memory into huge pages: reading all weights misses the TLB less often (Linux 6.1 or newer).

Decoding reads every weight once a token. Where the system gives huge pages only to those who ask, OpenVINO's
packed weights lie in pages of 4 KiB; docs/explanation/performance.md has what moving them is worth.
"""

from __future__ import annotations

import ctypes
from io import FileIO
from pathlib import Path

import numpy as np

_HUGE, _PAGE = 2 << 20, 4096
_MADV_COLLAPSE = 25  # include/uapi/asm-generic/mman-common.h, since Linux 6.1
_PRESENT = np.uint64(1 << 63)  # Documentation/admin-guide/mm/pagemap.rst
_FULL = 7 / 8  # of a huge page must be resident already: a cache that nobody has written stays unbacked


def collapse_resident() -> int:
    """Moves this process's anonymous memory into huge pages where it is resident; returns the bytes moved.

    The contents and addresses stay. Does nothing on systems that cannot, and stops where the process may not
    read what is resident (one that was root and is no more): it only ever changes speed.
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
    """The same for the mapping that a line of /proc/self/maps is about. Raises OSError."""
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
