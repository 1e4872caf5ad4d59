"""What the driver asks of a target, in this order: check, lower, finish."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from llmc.compiler.bundle_writer import BundleWriter
from llmc.compiler.checkpoint.safetensors import TensorRef
from llmc.compiler.progress import Progress
from llmc.compiler.request import BuildRequest
from llmc.runtime.bundle.manifest import Gpu, Target, Verification

if TYPE_CHECKING:
    import onnx_ir as ir

    from llmc.compiler.driver import Plan

GRAPH_FILE = "rank0.onnx"  # beside weights/: ONNX allows external data below the graph's directory only
PhaseClock = Callable[[str], AbstractContextManager[None]]


@dataclass(frozen=True)
class Finished:
    """What a target made of the graph and the weights that the driver wrote.

    engine_file: what the runtime loads. weights_file: False when the engine holds them itself.
    """

    engine_file: str
    verification: Verification
    weights_file: bool = True
    weights_note: str = ""
    gpu: Gpu | None = None


class TargetCompiler(Protocol):
    """One target of `llmc build`."""

    def check(self, request: BuildRequest, dtype: str) -> tuple[int, ...]:
        """Before anything is traced: whether this machine can build for that.

        Returns the compute capabilities of the GPUs that it builds for, which `request` need not name; none
        for a CPU and for a portable engine. Raises UnsupportedError where it never could, BuildError where
        something is missing.
        """
        ...

    def head_format(self, fmt: str) -> str | None:
        """The format that lm_head gets where the layers get `fmt`; None: it stays as it is."""
        ...

    def lower(self, model: ir.Model, dtype: str, tensors: Mapping[str, TensorRef]) -> Target:
        """Turns a canonical graph, which computes in `dtype`, into the target's. In place.

        `tensors`: the checkpoint's. Returns which engine will run it, and why.
        """
        ...

    def finish(self, plan: Plan, writer: BundleWriter, progress: Progress, phase: PhaseClock) -> Finished:
        """Proves and completes the engine; the bundle has the graph (GRAPH_FILE) and the weights."""
        ...


def target_compiler(name: str) -> TargetCompiler:
    """The target called `name`. Imports what only that one needs."""
    if name == "cpu":
        from llmc.compiler.targets.cpu import CpuTarget

        return CpuTarget()
    from llmc.compiler.targets.tensorrt.target import FLAVORS, TensorRTTarget

    return TensorRTTarget(FLAVORS[name])
