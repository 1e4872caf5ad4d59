"""What a measurement or a bug report must say about the machine."""

from __future__ import annotations

import os
import platform
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Machine:
    """cores: logical CPUs that this process may use; memory in bytes, None where the system does not say."""

    python: str
    system: str
    cpu: str
    cores: int
    memory: int | None
    available_memory: int | None

    @staticmethod
    def this() -> Machine:
        memory = _fields("/proc/meminfo")
        affinity = getattr(os, "sched_getaffinity", None)
        return Machine(
            python=platform.python_version(),
            system=platform.platform(),
            cpu=_fields("/proc/cpuinfo").get("model name") or platform.processor() or platform.machine(),
            cores=len(affinity(0)) if affinity else os.cpu_count() or 1,
            memory=_bytes(memory.get("MemTotal")),
            available_memory=_bytes(memory.get("MemAvailable")),
        )


def _fields(path: str) -> dict[str, str]:
    """`name: value` lines; the first of each name."""
    fields: dict[str, str] = {}
    try:
        text = Path(path).read_text(errors="replace")
    except OSError:
        return fields
    for line in text.splitlines():
        name, _, value = line.partition(":")
        fields.setdefault(name.strip(), value.strip())
    return fields


def _bytes(kilobytes: str | None) -> int | None:
    return int(kilobytes.split()[0]) << 10 if kilobytes else None
