"""Element types: rounding and saturation of scaled values, and packing of 4-bit codes.

All round to nearest, ties to even, and saturate, as ONNX's QuantizeLinear does (int8 there at -128).
INT8: -127..127. The code -128 is not used, so that a scale of amax / 127 is exact at both ends.
INT4: -8..7. All sixteen codes are used, because one code is 1/16 of the range (see `first_scales` in
`compiler/quantize/scales.py`).
E4M3: OCP 8-bit Floating Point Specification (OFP8) 1.0: bias 7, no infinity, largest 448 (saturating mode).
E2M1: OCP Microscaling Formats (MX) Specification 1.0, FP4: 0, 0.5, 1, 1.5, 2, 3, 4, 6, sign in bit 3.
"""

from __future__ import annotations

import ml_dtypes
import numpy as np

from llmc.passes.quantize.formats import E2M1_MAX, E4M3_MAX

# The value of each code.
E2M1_VALUES = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6], np.float32)
_INT_RANGES = {"int8": (-127, 127), "int4": (-8, 7)}


def encode(values: np.ndarray, element: str) -> np.ndarray:
    """Encode float32 values: int8 for "int8" and "int4", float8_e4m3fn for "e4m3", uint8 for "e2m1"."""
    if element in _INT_RANGES:
        return np.clip(np.rint(values), *_INT_RANGES[element]).astype(np.int8)
    if element == "e4m3":
        return np.clip(values, -E4M3_MAX, E4M3_MAX).astype(ml_dtypes.float8_e4m3fn)
    return np.clip(values, -E2M1_MAX, E2M1_MAX).astype(ml_dtypes.float4_e2m1fn).view(np.uint8)


def decode(array: np.ndarray, element: str) -> np.ndarray:
    """Return the exact float32 values of codes from `encode`."""
    return E2M1_VALUES[array] if element == "e2m1" else array.astype(np.float32)


def nearest(values: np.ndarray, element: str) -> np.ndarray:
    """Round float32 values to those of the nearest codes: `decode(encode(values))`."""
    if element in _INT_RANGES:
        rounded = np.rint(values)
        return np.clip(rounded, *_INT_RANGES[element], out=rounded)
    return decode(encode(values, element), element)


def pack(array: np.ndarray) -> np.ndarray:
    """Pack 4-bit codes [..., n], n even, to uint8 [..., n / 2]. The first of each pair is the low nibble."""
    nibbles = array.view(np.uint8) & 0xF
    return nibbles[..., 0::2] | nibbles[..., 1::2] << 4


def unpack(packed: np.ndarray, element: str) -> np.ndarray:
    """Unpack the result of `pack` to codes [..., n]: int8 for "int4", uint8 for "e2m1"."""
    array = np.empty((*packed.shape[:-1], 2 * packed.shape[-1]), np.uint8)
    array[..., 0::2] = packed & 0xF
    array[..., 1::2] = packed >> 4
    if element == "int4":  # extend the sign
        return (array ^ 8).view(np.int8) - np.int8(8)
    return array
