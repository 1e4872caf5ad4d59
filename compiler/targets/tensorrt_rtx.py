"""The target `tensorrt-rtx`: a TensorRT engine built without a GPU, for the GPUs that are named.

TensorRT-RTX compiles for a list of compute capabilities, or, without one, portably for Ampere and newer.
It has none for data-centre Hopper and Blackwell (SM90, SM100): those need the target `tensorrt`.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from llmc.compiler.progress import Progress
from llmc.compiler.targets import tensorrt_build
from llmc.compiler.targets.tensorrt_build import BuiltEngine, EngineJob, EngineLimits
from llmc.compiler.targets.tensorrt_lower import lower_for_tensorrt, serialize
from llmc.runtime.errors import BuildError, UnsupportedError

if TYPE_CHECKING:
    import onnx_ir as ir

__all__ = ["build_engine", "check", "lower_for_tensorrt", "parse_sms", "serialize"]

LIBRARY = "tensorrt_rtx"
PACKAGE = "tensorrt-rtx"
GRAPH_FILE = "rank0.onnx"  # what TensorRT reads; beside weights/, as for the CPU
PLAN_FILE = "rank0.plan"
COMPUTE_CAPABILITIES = (75, 80, 86, 89, 120, 121)
_BF16_FROM = 80


def parse_sms(text: str) -> tuple[int, ...]:
    """`--sm 86,89,120` -> (86, 89, 120); an empty text means the portable engine.

    Raises BuildError for what is no number, UnsupportedError for a GPU that TensorRT-RTX has no code for.
    """
    parts = [part.strip().lower().removeprefix("sm").lstrip("_") for part in text.split(",") if part.strip()]
    if bad := [part for part in parts if not part.isdigit()]:
        raise BuildError(
            f"--sm {text}: {bad[0]!r} is not a compute capability", "write them as in --sm 86,89,120"
        )
    sms = tuple(sorted({int(part) for part in parts}))
    if unknown := [sm for sm in sms if sm not in COMPUTE_CAPABILITIES]:
        known = ", ".join(map(str, COMPUTE_CAPABILITIES))
        raise UnsupportedError(f"TensorRT-RTX builds no engine for SM{unknown[0]}", f"it knows SM {known}")
    return sms


def check(dtype: str, sms: Sequence[int]) -> None:
    """Before anything is built: raises UnsupportedError where dtype and GPUs do not fit, BuildError where
    TensorRT-RTX is not installed."""
    if old := [sm for sm in sms if sm < _BF16_FROM and dtype == "bf16"]:
        raise UnsupportedError(f"SM{old[0]} has no bf16", "build with --dtype fp16, or without this GPU")
    if not tensorrt_build.is_installed(LIBRARY):
        raise BuildError("the target tensorrt-rtx needs TensorRT-RTX", f"pip install {PACKAGE}")


def build_engine(
    model: ir.Model,
    graph: Path,
    plan: Path,
    limits: EngineLimits,
    progress: Progress,
    sms: Sequence[int] = (),
) -> BuiltEngine:
    """Writes the engine of a lowered `model`, whose file is `graph`, to `plan`.

    Raises UnsupportedError and BuildError as `tensorrt_build.build` does.
    """
    job = EngineJob(LIBRARY, str(graph), str(plan), tensorrt_build.profile(model, limits), tuple(sms))
    return tensorrt_build.build(job, progress)
