"""Find the bf16 matrices that are exactly fp16 times a power of two.

bf16 has 8 significant bits. fp16 has 11, and represents 8 of them for magnitudes from 2^-17 (its subnormals
are multiples of 2^-24) to below 2^16. So if the nonzero weights of a matrix lie within 32 binary orders of
the largest, the power of two that moves the largest below 2^16 makes the matrix fp16 without losing a bit.
OpenVINO widens fp16 faster than bf16 (docs/explanation/performance.md).
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from llmc.compiler.checkpoint.safetensors import TensorRef

_HIGHEST, _LOWEST = 15, -17  # exponents at which fp16 has 8 significant bits
_MAGNITUDE, _FRACTION_BITS, _BIAS, _INFINITY = 0x7FFF, 7, 127, 0x7F80  # bf16


def exponent(refs: Iterable[TensorRef]) -> int | None:
    """Return the power of two for the bf16 tensors of one matrix; None if fp16 cannot hold them exactly."""
    largest, smallest = 0, _INFINITY  # as bits, which sort like the magnitudes
    for ref in refs:
        for chunk in ref.iter_chunks():
            bits = chunk.view(np.uint16) & np.uint16(_MAGNITUDE)
            largest = max(largest, int(bits.max(initial=0)))
            # The subtraction wraps zeros around to the largest number, so that they are ignored.
            smallest = min(smallest, int((bits - np.uint16(1)).min(initial=_INFINITY)) + 1)
    if not largest:
        return 0
    highest, lowest = (bits >> _FRACTION_BITS for bits in (largest, smallest))
    if largest >= _INFINITY or not lowest or highest - lowest > _HIGHEST - _LOWEST:
        return None
    return _HIGHEST - (highest - _BIAS)
