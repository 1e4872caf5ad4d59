"""Pages of mapped files: dropped from resident memory, and still there when they are read again."""

from __future__ import annotations

import mmap
import sys
from pathlib import Path

import pytest

from llmc.runtime.backends.openvino.file_pages import releasing
from support.waiting import wait_until

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="pages are found through /proc")
SIZE = 4 << 20


def resident(path: Path) -> int:
    """Bytes of this process's resident pages of a file."""
    total, inside = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if "-" in line.split(" ", 1)[0] and not line.startswith("VmFlags"):
            inside = line.endswith(str(path))
        elif inside and line.startswith("Rss:"):
            total += int(line.split()[1]) << 10
    return total


@pytest.fixture
def mapped(tmp_path: Path) -> tuple[Path, mmap.mmap]:
    path = tmp_path / "weights.bin"
    path.write_bytes(bytes(range(256)) * (SIZE // 256))
    with path.open("rb") as file:
        memory = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    assert memory[:] == path.read_bytes()
    assert resident(path) == SIZE
    return path, memory


def test_pages_are_dropped_and_come_back(mapped: tuple[Path, mmap.mmap], tmp_path: Path) -> None:
    path, memory = mapped
    with releasing(tmp_path / "elsewhere"):
        pass
    assert resident(path) == SIZE
    with releasing(tmp_path):
        pass
    assert resident(path) == 0
    assert memory[:] == path.read_bytes()


def test_while_a_block_runs_and_at_its_end(mapped: tuple[Path, mmap.mmap], tmp_path: Path) -> None:
    path, memory = mapped
    with releasing(tmp_path):
        assert memory[:] == path.read_bytes()
        wait_until(lambda: resident(path) == 0)
        assert memory[SIZE - 1] == 255
    assert resident(path) == 0


def test_mappings_that_can_be_written_are_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "private.bin"
    path.write_bytes(bytes(SIZE))
    with path.open("rb") as file:
        memory = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
    memory[5] = 7
    with releasing(tmp_path):
        pass
    assert memory[5] == 7
