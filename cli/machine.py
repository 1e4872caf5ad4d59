"""Facts about the machine, for measurements and bug reports."""

from __future__ import annotations

import os
import platform
from dataclasses import dataclass
from pathlib import Path

from llmc.runtime.memory import available_memory, total_memory


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
        affinity = getattr(os, "sched_getaffinity", None)
        return Machine(
            python=platform.python_version(),
            system=platform.platform(),
            cpu=_fields("/proc/cpuinfo").get("model name") or platform.processor() or platform.machine(),
            cores=len(affinity(0)) if affinity else os.cpu_count() or 1,
            memory=total_memory(),
            available_memory=available_memory(),
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
