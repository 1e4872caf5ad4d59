"""Moves resident memory into huge pages: reading all weights misses the TLB less often (Linux 6.1 or newer).

Decoding reads every weight once a token. Where the system gives huge pages only to those who ask, OpenVINO's
packed weights lie in pages of 4 KiB; docs/performance.md has what moving them is worth.
"""

from __future__ import annotations

import ctypes
from pathlib import Path

import numpy as np

_HUGE, _PAGE = 2 << 20, 4096
_MADV_COLLAPSE = 25  # include/uapi/asm-generic/mman-common.h, since Linux 6.1
_PRESENT = np.uint64(1 << 63)  # Documentation/admin-guide/mm/pagemap.rst
_FULL = 7 / 8  # of a huge page must be resident already: a cache that nobody has written stays unbacked


def collapse_resident() -> int:
    """Moves this process's anonymous memory into huge pages where it is resident; returns the bytes moved.

    The contents and addresses stay. Does nothing on systems that cannot: it only ever changes speed.
    """
    maps, pagemap = Path("/proc/self/maps"), Path("/proc/self/pagemap")
    if not maps.is_file() or not pagemap.is_file():
        return 0
    libc, moved = ctypes.CDLL(None), 0
    with pagemap.open("rb", buffering=0) as file:
        for line in maps.read_text().splitlines():
            addresses, permissions, _, _, _, *name = line.split(maxsplit=5)
            if not permissions.startswith("rw") or (name and name[0] != "[heap]"):
                continue
            begin, end = (int(address, 16) for address in addresses.split("-"))
            begin, end = -(-begin // _HUGE) * _HUGE, end // _HUGE * _HUGE
            if begin >= end:
                continue
            file.seek(begin // _PAGE * 8)
            entries = np.frombuffer(file.read((end - begin) // _PAGE * 8), np.uint64)
            resident = ((entries & _PRESENT) != 0).reshape(-1, _HUGE // _PAGE).mean(axis=1)
            for index in np.flatnonzero(resident >= _FULL):
                address = ctypes.c_void_p(begin + int(index) * _HUGE)
                if libc.madvise(address, ctypes.c_size_t(_HUGE), _MADV_COLLAPSE) == 0:
                    moved += _HUGE
    return moved
