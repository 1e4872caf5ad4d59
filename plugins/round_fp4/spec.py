"""The specification of `llmc.RoundFP4`, which fake-quantizes the input of a layer to NVFP4.

    inputs    x             [T, K]     model dtype; K a multiple of 16
              global_scale  []         fp32, positive: the largest magnitude that calibration saw / (6 x 448)
    output    y             [T, K]     model dtype: x rounded to values that NVFP4 can hold

Double quantization (NVIDIA's `TRT_FP4DynamicQuantize`, block 16): a block of 16 columns gets the scale
s = E4M3(amax / 6 / global_scale), and each value becomes E2M1(x / (s x global_scale)) x s x global_scale.
Rounding is to nearest, ties to even, and saturates. A block whose scale rounds to 0 becomes 0.
"""

from __future__ import annotations

DOMAIN = "llmc"
NAME = "RoundFP4"
ABI_VERSION = 1
BLOCK = 16
E2M1_MAX = 6.0
