"""Memory for weights and caches."""

from __future__ import annotations

import ctypes
import sys
from pathlib import Path

import pytest

from llmc.runtime.memory import allocate


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/self/smaps")
def test_huge_pages_are_requested_for_private_memory() -> None:
    """Linux ignores the request for shared memory."""
    memory = allocate(8 << 20)
    address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    inside, permissions, flags = False, "", ""
    for line in Path("/proc/self/smaps").read_text().splitlines():
        first, _, rest = line.partition(" ")
        if not first.endswith(":"):
            begin, end = (int(number, 16) for number in first.split("-"))
            inside = begin <= address < end
            permissions = rest.split()[0] if inside else permissions
        elif first == "VmFlags:" and inside:
            flags = rest
    assert permissions == "rw-p"
    assert "hg" in flags.split()
