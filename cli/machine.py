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

    #: Python's version.
    python: str
    system: str
    #: The name of the processor.
    cpu: str
    #: Logical CPUs that this process may use.
    cores: int
    #: Bytes; None: the system does not say.
    memory: int | None
    #: Bytes that can be used without swapping; None: the system does not say.
    available_memory: int | None
    #: The container's limit in bytes, if it has one; it is in the figures above.
    memory_limit: int | None
    #: The container's quota in CPUs, if it has one; it is in `cores`.
    cpu_quota: int | None

    @staticmethod
    def this() -> Machine:
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
    """Return the `name: value` lines of a file, the first line of each name."""
    fields: dict[str, str] = {}
    try:
        text = Path(path).read_text(errors="replace")
    except OSError:
        return fields
    for line in text.splitlines():
        name, _, value = line.partition(":")
        fields.setdefault(name.strip(), value.strip())
    return fields
