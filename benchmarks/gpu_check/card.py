"""The GPU and the software that the check runs with."""

from __future__ import annotations

import functools
import subprocess
from dataclasses import dataclass


class Unusable(Exception):
    """This machine has no usable GPU. `message` states the fact, `hint` says what to do about it."""

    def __init__(self, message: str, hint: str) -> None:
        super().__init__(message)
        self.message, self.hint = message, hint


@dataclass(frozen=True)
class Card:
    """A GPU."""

    name: str
    #: Compute capability: 89 for 8.9.
    sm: int
    multiprocessors: int
    #: Device memory in bytes.
    memory: int
    #: The size of the L2 cache in bytes.
    l2: int
    #: Driver, power limit and maximum clocks, from nvidia-smi.
    settings: str


@functools.cache
def current() -> Card:
    """Return the first visible GPU. Raises Unusable if there is none, or if it has no kernels."""
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

    gpu = torch.cuda.get_device_properties(0)
    sm = gpu.major * 10 + gpu.minor
    if sm not in SMS:
        made_for = ", ".join(f"SM{known}" for known in SMS)
        raise Unusable(
            f"{gpu.name} is SM{sm}; the kernels are made for {made_for}",
            "choose another GPU with CUDA_VISIBLE_DEVICES",
        )
    return Card(
        name=gpu.name, sm=sm, multiprocessors=gpu.multi_processor_count, memory=gpu.total_memory,
        l2=int(getattr(gpu, "L2_cache_size", 0)), settings=_settings(str(getattr(gpu, "uuid", ""))),
    )  # fmt: skip


def _settings(uuid: str) -> str:
    query = "driver_version,power.limit,clocks.max.sm,clocks.max.memory"
    for selection in ([f"--id=GPU-{uuid}"] if uuid else []), []:
        try:
            answer = subprocess.run(
                ["nvidia-smi", *selection, f"--query-gpu={query}", "--format=csv,noheader"],
                capture_output=True, text=True, timeout=20, check=True,
            )  # fmt: skip
        except (OSError, subprocess.SubprocessError):
            continue
        return "driver " + answer.stdout.strip().partition("\n")[0]
    return "driver unknown (nvidia-smi did not answer)"
