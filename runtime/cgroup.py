"""The limits of the container that this process runs in: Linux control groups, versions 1 and 2.

A container sees the memory and the CPUs of its host in /proc. Its limits are in files of its control group.
https://docs.kernel.org/admin-guide/cgroup-v2.html, https://docs.kernel.org/admin-guide/cgroup-v1/
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

_ESCAPED = re.compile(r"\\([0-7]{3})")  # blanks in a path of mountinfo


@dataclass(frozen=True)
class Limits:
    """The smallest limits of the control group and of those above it. None: there is no limit."""

    #: Memory in bytes.
    memory: int | None = None
    #: Memory in bytes that remains within the limits. File pages that the kernel can drop count as free.
    available_memory: int | None = None
    #: Number of CPUs, rounded up: a quota of 1.5 CPUs is 2.
    cpus: int | None = None


def limits(root: Path = Path("/")) -> Limits:
    """Return the limits of this process. root: where proc and sys are mounted, for tests."""
    memory, available, cpus = [], [], []
    for directory, version in _directories(root):
        for limit, used in _memory(directory, version):
            memory.append(limit)
            available.append(max(0, limit - used))
        if (quota := _quota(directory, version)) is not None:
            cpus.append(max(1, math.ceil(quota)))
    return Limits(min(memory, default=None), min(available, default=None), min(cpus, default=None))


def _directories(root: Path) -> Iterator[tuple[Path, int]]:
    """Yield the directories of this process's control groups and of all above them, with the version."""
    groups: dict[str, str] = {}  # controller -> path; "": version 2
    for line in _lines(root / "proc/self/cgroup"):
        number, _, controllers_path = line.partition(":")
        controllers, _, path = controllers_path.partition(":")
        groups |= dict.fromkeys(controllers.split(",") if number != "0" else [""], path)
    for line in _lines(root / "proc/self/mountinfo"):
        before, _, after = line.partition(" - ")
        fields, filesystem = before.split(), after.split()
        if len(fields) < 5 or len(filesystem) < 3 or filesystem[0] not in ("cgroup", "cgroup2"):
            continue
        version = 2 if filesystem[0] == "cgroup2" else 1
        options = [""] if version == 2 else filesystem[2].split(",")
        for controller in options:
            if controller not in groups or (version == 1 and controller not in ("memory", "cpu")):
                continue
            mount = root / _unescape(fields[4]).lstrip("/")
            inside = _relative(groups[controller], _unescape(fields[3]))
            yield from ((directory, version) for directory in _upwards(mount, inside))


def _relative(group: str, mounted: str) -> str:
    """Return the place of `group` below a mount of `mounted`.

    A container without a cgroup namespace mounts its group as the root, but /proc shows the host's path.
    """
    if group == mounted:
        return ""
    if group.startswith(mounted.rstrip("/") + "/"):
        return group[len(mounted.rstrip("/")) :].strip("/")
    return ""


def _upwards(mount: Path, inside: str) -> Iterator[Path]:
    parts = [part for part in inside.split("/") if part not in ("", ".", "..")]
    for count in range(len(parts), -1, -1):
        yield mount.joinpath(*parts[:count])


def _memory(directory: Path, version: int) -> Iterator[tuple[int, int]]:
    """Yield each limit of a group in bytes, with the bytes that it uses and cannot drop."""
    if version == 2:
        names, usage, cache = "memory.max memory.high", "memory.current", "inactive_file"
    else:
        names, usage, cache = "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"
    for name in names.split():
        limit = _number(directory / name)
        # Version 1 writes a number near 2^63 if there is no limit.
        if limit is not None and limit < 1 << 60:
            lines = (line.partition(" ") for line in _lines(directory / "memory.stat"))
            dropped = {field: figure for field, _, figure in lines}.get(cache, "0")
            used = (_number(directory / usage) or 0) - (int(dropped) if dropped.isdigit() else 0)
            yield limit, max(0, used)


def _quota(directory: Path, version: int) -> float | None:
    if version == 2:
        words = next(_lines(directory / "cpu.max"), "").split()
        quota, period = (int(word) if word.isdigit() else 0 for word in words) if len(words) == 2 else (0, 0)
    else:
        quota = _number(directory / "cpu.cfs_quota_us") or 0
        period = _number(directory / "cpu.cfs_period_us") or 0
    return quota / period if quota > 0 and period > 0 else None


def _number(file: Path) -> int | None:
    text = next(_lines(file), "").strip()
    return int(text) if text.isdigit() and len(text) < 20 else None


def _lines(file: Path) -> Iterator[str]:
    """Yield the lines of a file, none if it cannot be read."""
    try:
        text = file.read_text(errors="replace")
    except OSError:
        return
    yield from text.splitlines()


def _unescape(path: str) -> str:
    return _ESCAPED.sub(lambda match: chr(int(match[1], 8)), path)
