"""Resident memory moves into huge pages; what it holds stays, and what nobody has written stays unbacked."""

from __future__ import annotations

import platform
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from llmc.runtime.backends.openvino.huge_pages import collapse_resident

MIB = 1 << 20


def linux(major: int, minor: int) -> bool:
    return sys.platform == "linux" and tuple(map(int, platform.release().split(".")[:2])) >= (major, minor)


def huge_bytes() -> int:
    with open("/proc/self/smaps_rollup") as file:
        line = next(line for line in file if line.startswith("AnonHugePages:"))
    return int(line.split()[1]) << 10


def resident_bytes() -> int:
    with open("/proc/self/status") as file:
        line = next(line for line in file if line.startswith("RssAnon:"))
    return int(line.split()[1]) << 10


@pytest.mark.skipif(not linux(6, 1), reason="MADV_COLLAPSE came with Linux 6.1")
def test_written_memory_moves_and_untouched_memory_stays_away() -> None:
    collapse_resident()  # what the test process has anyway
    written = np.arange(32 * MIB // 8)
    untouched = np.zeros(256 * MIB, np.uint8)
    before, resident = huge_bytes(), resident_bytes()
    moved = collapse_resident()
    assert moved >= 28 * MIB  # its ends do not fill huge pages
    assert huge_bytes() > before or huge_bytes() >= 28 * MIB
    assert resident_bytes() < resident + 16 * MIB
    assert np.array_equal(written, np.arange(32 * MIB // 8))
    assert not untouched[:: 4 * MIB].any()


def test_a_process_that_may_not_read_its_page_map_moves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """As one that was started as root and has given that up."""
    really, refused = Path.open, []

    def refuse(path: Path, *args: Any, **options: Any) -> Any:
        if path.name == "pagemap":
            refused.append(path)
            raise PermissionError(13, "Permission denied", str(path))
        return really(path, *args, **options)

    monkeypatch.setattr(Path, "open", refuse)
    assert collapse_resident() == 0
    assert refused or sys.platform != "linux"
