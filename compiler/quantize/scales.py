"""Choose the scale of each channel or block of a weight, from its largest magnitude or by a search.

Scales are rounded to their storage dtype before the codes are computed, so that the codes match the scale
that the engine multiplies by. The scale of an all-zero channel or block is 1.
"""

from __future__ import annotations

from collections.abc import Iterator

import ml_dtypes
import numpy as np

from llmc.passes.quantize.elements import nearest
from llmc.passes.quantize.formats import E2M1_MAX, E4M3_MAX, E4M3_SMALLEST, INT8_MAX, Format
from llmc.runtime.dtypes import numpy_dtype

# Factors of the scale of the largest magnitude: clipping the extremes can reduce the error of the rest. Ten
# factors from 0.96 to 0.6 take half as long again, and lose the same (model_zoo/llama/tales, 2026-11-27: mean
# KL 0.0053 with GPTQ, 0.0120 without).
_RATIOS = tuple(1 - 0.05 * step for step in range(1, 7))
# E4M3 scales around the nearest one. A step of the byte changes the scale by 1/16 to 1/8. Smaller scales
# clip. Scales up to 1.5 times as large map the largest weight of the block to 4 instead of 6, which makes the
# codes finer for weights between 2/3 of the largest and the largest ("Four Over Six").
_E4M3_STEPS = (1, -1, 2, -2, 3, -3, 4, -4, 5)
_SEARCHED = 1 << 18  # weights that a search works on at a time: arrays that the caches hold
_SMALLEST_NORMAL = np.float32(2.0**-126)  # the least divisor: fp32's smallest normal number
_LARGEST = {"int8": INT8_MAX, "e4m3": E4M3_MAX, "e2m1": E2M1_MAX * E4M3_MAX}


def global_scale(amax: float, fmt: Format) -> np.float32:
    """Return the fp32 scale of a matrix, or of fused layers, whose largest magnitude is `amax`.

    fp8: amax / 448. nvfp4: amax / (6 x 448), which makes the largest block scale 448, the largest E4M3
    (ModelOpt's weight_scale_2; compressed-tensors stores the inverse). int8, for activations: amax / 127.
    If `amax` is 0, the scale is 1.
    """
    limit = np.float32(_LARGEST[fmt.element])
    return np.maximum(np.float32(amax) / limit, _SMALLEST_NORMAL) if amax else np.float32(1)


def first_scales(blocks: np.ndarray, fmt: Format, global_scale: np.float32) -> np.ndarray:
    """Return the stored scales [out, n] of blocks [out, n, size], each the smallest that clips nothing.

    blocks: the weights, float32
    global_scale: the global scale of NVFP4, else 1. NVFP4's block scales are block_amax / (6 x global_scale),
        within 2^-9..448 and rounded to nearest as in ModelOpt, so they may clip a little.

    INT4's scale is max(largest / 7, -smallest / 8), because its codes are -8..7. Compared with amax / 7, this
    reduces the squared error by a tenth on model_zoo/llama/tales. llama.cpp's Q4_0 maps the largest magnitude
    to the code -8 with negative scales, which TensorRT refuses.
    """
    largest, smallest = _extremes(blocks)
    if fmt.element == "int4":
        scales = np.maximum(largest / np.float32(7), smallest / np.float32(-8))
    else:
        limit = {
            "int8": np.float32(INT8_MAX),
            "e4m3": np.float32(E4M3_MAX),
            "e2m1": np.float32(E2M1_MAX) * global_scale,
        }
        scales = np.maximum(largest, -smallest) / limit[fmt.element]
    zero = (largest == 0) & (smallest == 0)
    if fmt.scales == "F8_E8M0":
        scales = _power_of_two(np.maximum(scales, _SMALLEST_NORMAL))
    elif fmt.double_scaled:
        scales = np.clip(scales, E4M3_SMALLEST, E4M3_MAX).astype(ml_dtypes.float8_e4m3fn)
    else:
        scales = round_up(np.maximum(scales, _SMALLEST_NORMAL), fmt.scales)
    scales[zero] = 1
    return scales


def _extremes(blocks: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the largest and the smallest value of blocks [out, n, size], each [out, n].

    Contiguous blocks are transposed, because reductions of long rows are faster.
    """
    if not blocks.flags.c_contiguous:
        return blocks.max(-1), blocks.min(-1)
    flat = blocks.reshape(-1, blocks.shape[-1])
    largest, smallest = np.empty(len(flat), flat.dtype), np.empty(len(flat), flat.dtype)
    count = max(1, _SEARCHED // flat.shape[1])
    for start in range(0, len(flat), count):
        part = slice(start, start + count)
        columns = np.ascontiguousarray(flat[part].T)
        largest[part], smallest[part] = columns.max(0), columns.min(0)
    return largest.reshape(blocks.shape[:-1]), smallest.reshape(blocks.shape[:-1])


def search_scales(blocks: np.ndarray, first: np.ndarray, fmt: Format, global_scale: np.float32) -> np.ndarray:
    """Return the scales around `first` with the least squared error in each block; the first on ties."""
    flat, chosen = blocks.reshape(-1, blocks.shape[-1]), np.empty_like(first.reshape(-1))
    count = max(1, _SEARCHED // flat.shape[1])
    for start in range(0, len(flat), count):
        part = slice(start, start + count)
        columns = np.ascontiguousarray(flat[part].T)  # operations on long rows are faster
        tried = first.reshape(-1)[part]
        tried = np.stack([tried, *candidates(tried, fmt)])
        factors = effective(tried, global_scale)
        errors = np.stack([_squared_error(columns, each, fmt) for each in factors])
        errors *= np.square(factors / factors[0])
        chosen[part] = np.take_along_axis(tried, errors.argmin(0)[None], 0)[0]
    return chosen.reshape(first.shape)


def candidates(first: np.ndarray, fmt: Format) -> Iterator[np.ndarray]:
    """Yield the stored scales around `first` that a search tries, in the shape and dtype of `first`."""
    if fmt.scales == "F8_E8M0":
        yield _power_of_two(np.maximum(first.astype(np.float32) / 2, _SMALLEST_NORMAL))  # clips the largest
        return
    if not fmt.double_scaled:
        for ratio in _RATIOS:
            yield round_up(
                np.maximum(first.astype(np.float32) * np.float32(ratio), _SMALLEST_NORMAL), fmt.scales
            )
        return
    # The bytes of positive E4M3 numbers sort like their values: 0x01 is 2^-9, 0x7E is 448.
    for step in _E4M3_STEPS:
        steps = np.clip(first.view(np.uint8).astype(np.int16) + step, 0x01, 0x7E)
        yield steps.astype(np.uint8).view(ml_dtypes.float8_e4m3fn)


def effective(scales: np.ndarray, global_scale: np.ndarray | np.float32) -> np.ndarray:
    """Return the fp32 multipliers of the codes: stored scales times the global scale of NVFP4 (else 1)."""
    return scales.astype(np.float32) * global_scale


def round_up(scales: np.ndarray, stored: str) -> np.ndarray:
    """Round positive fp32 scales up to the dtype `stored`, so that nothing clips. Overflow becomes inf."""
    with np.errstate(over="ignore"):
        narrow = scales.astype(numpy_dtype(stored))
    too_small = narrow.astype(np.float32) < scales
    bits = narrow.view(f"u{narrow.itemsize}")  # of positive numbers, which sort like their values
    bits += too_small
    return narrow


def _power_of_two(scales: np.ndarray) -> np.ndarray:
    """Round positive fp32 scales up to E8M0, so that nothing clips. Beyond 2^127 the scale is NaN."""
    fraction, exponent = np.frexp(scales)
    power = exponent - (fraction == 0.5)
    with np.errstate(over="ignore"):
        return np.ldexp(np.float32(1), power).astype(ml_dtypes.float8_e8m0fnu)


def _squared_error(columns: np.ndarray, factors: np.ndarray, fmt: Format) -> np.ndarray:
    """Return the squared error of blocks [size, n] in units of the multipliers `factors` [n]."""
    scaled = columns / factors
    scaled -= nearest(scaled, fmt.element)
    scaled *= scaled
    return scaled.sum(0)
