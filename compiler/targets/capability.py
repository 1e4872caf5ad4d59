"""Which formats a target computes in, by its GPUs. Consulted before anything is traced.

    format                          cpu            tensorrt-rtx, tensorrt
    int8, int4, int4-block128       OpenVINO       SM80 and newer, portable engines too
    int8-smoothquant                OpenVINO       SM80 and newer, portable engines too
    nvfp4-weight-only               OpenVINO       SM100 and newer
    fp8, fp8-per-channel            ONNX Runtime   SM89 and newer
    nvfp4                           ONNX Runtime   SM100 and newer
    quantized KV caches             OpenVINO       SM80 and newer, portable engines too

OpenVINO quantizes activations to int8, not to E4M3 or E2M1. ONNX Runtime does so exactly, slowly, and
holds all weights in fp32: these formats are on the CPU so that a GPU engine's numbers can be had without a
GPU. The compute capabilities are those that TensorRT-RTX 1.7.1 builds for (it refuses FP8 for SM86, FP4 for
SM89). mxfp4 is as nvfp4-weight-only. `request.TARGETS` has the caches of each target.
FP8 caches build for all of them (2026-11-26): TensorRT passes them to our plugin, whose kernels read E4M3 by
shifts where the GPU has no instruction for it (before SM89).
"""

from __future__ import annotations

from collections.abc import Sequence

from llmc.passes.quantize.formats import Format, get_format
from llmc.runtime.errors import UnsupportedError

_OLDEST = {"int8": 80, "int4": 80, "e4m3": 89, "e2m1": 100}  # by the element type of the weight
PORTABLE = 80  # what an engine for no particular GPU must run on


def check(name: str, target: str, sms: Sequence[int]) -> Format:
    """Return the format `name`, if `target` computes in it.

    sms: compute capabilities of the GPUs; none: portable

    Raises RequestError for an unknown format, UnsupportedError naming the nearest format that would do.
    """
    fmt = get_format(name)
    if target == "cpu":
        return fmt
    oldest = min(sms, default=PORTABLE)
    if oldest >= _OLDEST[fmt.element]:
        return fmt
    needed = f"{name} needs SM{_OLDEST[fmt.element]} or newer"
    names = "89,120" if fmt.element == "e4m3" else "120"
    raise UnsupportedError(
        f"{needed}, and SM{oldest} is asked for"
        if sms
        else f"{needed}, and a portable engine must run on SM{PORTABLE}",
        f"--quant {nearest(fmt, oldest)} runs there; or name newer GPUs only, as in --sm {names}",
    )


def check_prequantized(fmt: Format, module: str, target: str, sms: Sequence[int]) -> None:
    """Check that `target` computes with `module` in the format of a pre-quantized checkpoint.

    Raises UnsupportedError.
    """
    if target == "cpu":
        return
    if fmt.element == "e4m3" and fmt.block > 0 and fmt.activations:
        raise UnsupportedError(
            f"module {module} is FP8 in blocks with static inputs, which TensorRT does not build",
            "--target cpu computes with it; or quantize it with dynamic inputs",
        )
    needed = max(_OLDEST[fmt.element], _OLDEST.get(fmt.activations, 0))
    if (oldest := min(sms, default=PORTABLE)) < needed:
        names = "89,120" if needed == _OLDEST["e4m3"] else "120"
        asked = f"SM{oldest} is asked for" if sms else f"a portable engine must run on SM{PORTABLE}"
        raise UnsupportedError(
            f"module {module} is {fmt.name}, which needs SM{needed} or newer, and {asked}",
            f"name newer GPUs only, as in --sm {names}; or --target cpu",
        )


def nearest(fmt: Format, oldest: int) -> str:
    """Return the name of the format nearest in size that GPUs from SM`oldest` on compute in."""
    if fmt.element == "e4m3":
        return "int8"
    return "int4" if oldest < _OLDEST["e2m1"] else fmt.name
