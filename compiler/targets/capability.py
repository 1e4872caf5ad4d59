"""The quantization formats that a target supports. They are checked before the trace.

    format                          cpu                SM, of tensorrt-rtx and tensorrt
    int8, int4, int4-block128       native, OpenVINO   SM80 and newer, portable engines too
    int8-smoothquant                native, OpenVINO   SM80 and newer, portable engines too
    nvfp4-weight-only               native, OpenVINO   SM100 and newer
    fp8, fp8-per-channel            native             SM89 and newer
    nvfp4                           native             SM100 and newer
    quantized KV caches             native, OpenVINO   SM80 and newer, portable engines too

ONNX Runtime runs all formats, but slowly, and holds all weights in fp32. OpenVINO quantizes activations to
int8, but not to E4M3 or E2M1. The CPU target has FP8 and NVFP4 so that the results of a GPU engine can be
computed without a GPU. The compute capabilities are those that TensorRT-RTX 1.7.1 builds for (it refuses FP8
for SM86 and FP4 for SM89). mxfp4 needs the same as nvfp4-weight-only.

`request.TARGETS` lists the KV caches of each target. Engines with FP8 caches can be built for every GPU
(2026-11-26): TensorRT passes the cache to llmc's plugin, whose kernels decode E4M3 with shifts if the GPU has
no instruction for it (before SM89).
"""

from __future__ import annotations

from collections.abc import Sequence

from llmc.passes.quantize.formats import Format, get_format
from llmc.runtime.errors import UnsupportedError

_OLDEST = {"int8": 80, "int4": 80, "e4m3": 89, "e2m1": 100}  # element type -> the oldest compute capability
PORTABLE = 80  # the oldest compute capability that a portable engine must run on


def check(name: str, target: str, sms: Sequence[int]) -> Format:
    """Return the format `name` if `target` supports it.

    sms: compute capabilities of the GPUs; empty: portable

    Raises RequestError for an unknown format, UnsupportedError, naming the nearest supported format, for one
    that the target does not support.
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
        f"{needed}, but the engine is for SM{oldest}"
        if sms
        else f"{needed}, but a portable engine must run on SM{PORTABLE}",
        f"use --quant {nearest(fmt, oldest)}, which runs there; or name newer GPUs only, as in --sm {names}",
        "quant",
    )


def check_prequantized(fmt: Format, module: str, target: str, sms: Sequence[int]) -> None:
    """Check that `target` supports the format of `module` of a pre-quantized checkpoint.

    Raises UnsupportedError, naming the module, if it does not.
    """
    if target == "cpu":
        return
    if fmt.element == "e4m3" and fmt.block > 0 and fmt.activations:
        raise UnsupportedError(
            f"module {module} is FP8 in blocks with static activation scales, which TensorRT does not build",
            "use --target cpu, or quantize the checkpoint with dynamic activation scales",
        )
    needed = max(_OLDEST[fmt.element], _OLDEST.get(fmt.activations, 0))
    if (oldest := min(sms, default=PORTABLE)) < needed:
        names = "89,120" if needed == _OLDEST["e4m3"] else "120"
        asked = f"the engine is for SM{oldest}" if sms else f"a portable engine must run on SM{PORTABLE}"
        raise UnsupportedError(
            f"module {module} is {fmt.name}, which needs SM{needed} or newer, but {asked}",
            f"name newer GPUs only, as in --sm {names}, or use --target cpu",
        )


def nearest(fmt: Format, oldest: int) -> str:
    """Return the name of the format closest in size that GPUs of compute capability `oldest` support."""
    if fmt.element == "e4m3":
        return "int8"
    return "int4" if oldest < _OLDEST["e2m1"] else fmt.name
