"""Facts about the machine, for measurements and bug reports."""

from __future__ import annotations

import platform
from dataclasses import dataclass
from pathlib import Path

from llmc.runtime import cgroup
from llmc.runtime.cpus import available_cpus
from llmc.runtime.memory import available_memory, total_memory


@dataclass(frozen=True)
class Machine:
    """The machine that this process runs on."""

    #: The version of Python.
    python: str
    #: The operating system and its version.
    system: str
    #: The name of the processor.
    cpu: str
    #: The number of logical CPUs that this process may use.
    cores: int
    #: The size of the memory in bytes; None if it is not known.
    memory: int | None
    #: The memory that can be used without swapping, in bytes; None if it is not known.
    available_memory: int | None
    #: The container's memory limit in bytes, if it has one. `memory` and `available_memory` respect it.
    memory_limit: int | None
    #: The container's CPU quota, if it has one. `cores` respects it.
    cpu_quota: int | None

    @staticmethod
    def current() -> Machine:
        """Return the machine that this process runs on."""
        limits = cgroup.limits()
        return Machine(
            python=platform.python_version(),
            system=platform.platform(),
            cpu=_fields("/proc/cpuinfo").get("model name") or platform.processor() or platform.machine(),
            cores=available_cpus(),
            memory=total_memory(),
            available_memory=available_memory(),
            memory_limit=limits.memory,
            cpu_quota=limits.cpus,
        )


def _fields(path: str) -> dict[str, str]:
    """Return the `name: value` lines of a file. The first line of each name counts."""
    fields: dict[str, str] = {}
    try:
        text = Path(path).read_text(errors="replace")
    except OSError:
        return fields
    for line in text.splitlines():
        name, _, value = line.partition(":")
        fields.setdefault(name.strip(), value.strip())
    return fields
