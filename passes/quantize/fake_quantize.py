"""Fake quantization of activations in INT8, FP8 and NVFP4, as engines compute it.

The functions use numpy, in float32 throughout. The reference of a build and the oracle of TensorRT's graphs
share these definitions. All roundings are to nearest, ties to even, and saturate.
"""

from __future__ import annotations

import ml_dtypes
import numpy as np

from llmc.passes.quantize.elements import decode, encode
from llmc.passes.quantize.formats import E2M1_MAX, E4M3_MAX

E2M1_BLOCK = 16


def round_int8(x: np.ndarray, scale: float) -> np.ndarray:
    """Fake-quantize to INT8 with one static scale: clip(rint(x / scale), -128, 127) x scale.

    x: any shape. scale: positive, the calibrated input's amax / 127. There is one code below -amax, as in
    ONNX's QuantizeLinear, TensorRT and OpenVINO. Returns float32.
    """
    step = np.float32(scale)
    return np.clip(np.rint(np.asarray(x, np.float32) / step), np.float32(-128), np.float32(127)) * step


def round_e4m3(x: np.ndarray, scale: float) -> np.ndarray:
    """Fake-quantize to FP8 with one static scale: E4M3(clip(x / scale, -448, 448)) x scale.

    x: any shape. scale: positive, the calibrated input's amax / 448 (ModelOpt's `input_scale`).
    Returns float32.
    """
    step = np.float32(scale)
    return decode(encode(np.asarray(x, np.float32) / step, "e4m3"), "e4m3") * step


def round_e2m1(x: np.ndarray, global_scale: float) -> np.ndarray:
    """Fake-quantize to NVFP4 with dynamic block scales ("dynamic double quantization").

    Blocks of 16 values along the last axis share the scale E4M3(amax / 6 / global_scale), at most 448. A
    value becomes E2M1(x / s) x s, where s is that scale x global_scale. A block whose scale rounds to 0
    becomes 0.
    x: [..., n]. global_scale: positive, the calibrated input's amax / (6 x 448) (ModelOpt's `input_scale`).
    Returns float32 [..., n].
    Source: TensorRT's IDynamicQuantizeLayer and `TRT_FP4DynamicQuantize`.
    Raises ValueError if n is not a multiple of 16.
    """
    if x.shape[-1] % E2M1_BLOCK:
        raise ValueError(f"{x.shape[-1]} values are not a multiple of the block of {E2M1_BLOCK}")
    blocks = np.asarray(x, np.float32).reshape(*x.shape[:-1], -1, E2M1_BLOCK)
    global_factor = np.float32(global_scale)
    exact_scales = np.abs(blocks).max(-1, keepdims=True) / np.float32(E2M1_MAX) / global_factor
    scales = (
        np.minimum(exact_scales, np.float32(E4M3_MAX)).astype(ml_dtypes.float8_e4m3fn).astype(np.float32)
        * global_factor
    )
    with np.errstate(divide="ignore", invalid="ignore"):  # division by a scale of 0: replaced below
        codes = encode(np.where(scales > 0, blocks / scales, np.float32(0)), "e2m1")
    return (decode(codes, "e2m1") * scales).reshape(x.shape)
