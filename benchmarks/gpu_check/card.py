"""The GPU and the software that the check runs with."""

from __future__ import annotations

import functools
import subprocess
from dataclasses import dataclass


class Unusable(Exception):
    """There is nothing here to check. `message` states the fact, `hint` says what to do about it."""

    def __init__(self, message: str, hint: str) -> None:
        super().__init__(message)
        self.message, self.hint = message, hint


@dataclass(frozen=True)
class Card:
    """memory and l2 in bytes; `settings`: driver, power limit and highest clocks, as nvidia-smi says."""

    name: str
    sm: int
    multiprocessors: int
    memory: int
    l2: int
    settings: str


@functools.cache
def current() -> Card:
    """The first visible GPU. Raises Unusable where there is none, or none that the kernels are made for."""
    try:
        import numpy  # noqa: F401
        import torch
        import triton  # noqa: F401
    except ImportError as error:
        raise Unusable(
            f"gpu-check needs {error.name}, which cannot be imported",
            "run it with a Python that has torch and triton: make gpu-check PYTHON=...",
        ) from None
    if not torch.cuda.is_available() or torch.version.hip:
        raise Unusable(
            "there is no CUDA GPU that torch can use",
            "run `make gpu-check` on a machine with an NVIDIA GPU, its driver, and torch built for CUDA",
        )
    from llmc.plugins.cuda.gpus import SMS

    found = torch.cuda.get_device_properties(0)
    sm = found.major * 10 + found.minor
    if sm not in SMS:
        made_for = ", ".join(f"SM{known}" for known in SMS)
        raise Unusable(
            f"{found.name} is SM{sm}; the kernels are made for {made_for}",
            "choose another GPU with CUDA_VISIBLE_DEVICES",
        )
    return Card(
        name=found.name, sm=sm, multiprocessors=found.multi_processor_count, memory=found.total_memory,
        l2=int(getattr(found, "L2_cache_size", 0)), settings=_settings(str(getattr(found, "uuid", ""))),
    )  # fmt: skip


def _settings(uuid: str) -> str:
    query = "driver_version,power.limit,clocks.max.sm,clocks.max.memory"
    for which in ([f"--id=GPU-{uuid}"] if uuid else []), []:
        try:
            answer = subprocess.run(
                ["nvidia-smi", *which, f"--query-gpu={query}", "--format=csv,noheader"],
                capture_output=True, text=True, timeout=20, check=True,
            )  # fmt: skip
        except (OSError, subprocess.SubprocessError):
            continue
        return "driver " + answer.stdout.strip().partition("\n")[0]
    return "driver unknown (nvidia-smi did not answer)"
