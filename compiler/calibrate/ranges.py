"""Clip ranges of activations, from which static scales are computed.

Magnitudes are counted in a histogram. A bin is the float32 bit pattern without its last 12 bits: the
exponent and 11 bits of mantissa, a relative width of 2^-11. 100 million magnitudes need one pass and 4 MB;
the search for a scale then reads only the histogram.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from llmc.compiler.calibrate.run_layers import LayerInputs
from llmc.compiler.request import METHODS
from llmc.passes.quantize.elements import decode, encode
from llmc.passes.quantize.formats import E4M3_MAX, INT8_MAX
from llmc.runtime.errors import RequestError

PERCENTILE = 99.99
_DROPPED_BITS = 12  # of the 23 bits of float32's mantissa
_BINS = 1 << (31 - _DROPPED_BITS)
_CHUNK = 1 << 22  # elements
_LARGEST = {"e4m3": E4M3_MAX, "int8": INT8_MAX}
_RATIOS = 2.0 ** (-np.arange(0, 97) / 16)  # clip range / largest magnitude: 1 down to 1/64


@dataclass(frozen=True)
class ClipRanges:
    """Clip ranges of the inputs of a linear layer, one for each method; 0 if the inputs are all zeros."""

    #: The largest magnitude.
    max: float
    #: The 99.99th percentile of the magnitudes.
    percentile: float
    #: The range with the least squared error for E4M3 codes at scale range / 448, or int8 at range / 127.
    mse: float

    def amax(self, method: str) -> float:
        """Return the clip range by `method`, one of METHODS. Raises RequestError for an unknown method."""
        if method not in METHODS:
            raise RequestError(f"there is no calibration method {method!r}", f"known: {', '.join(METHODS)}")
        return getattr(self, method)


def ranges(layer: LayerInputs) -> tuple[dict[str, ClipRanges], tuple[float, float]]:
    """Return the clip ranges of a decoder layer and the largest magnitudes of its keys and values.

    The first value is linear layer -> its clip ranges, the second (amax of keys, amax of values).

    Fused linear layers share their input, and so their clip ranges.
    """
    entries: dict[str, ClipRanges] = {}
    for modules, x in layer.inputs.items():
        entries |= dict.fromkeys(modules, clip_ranges(x))
    return entries, (_largest(layer.keys), _largest(layer.values))


def clip_ranges(x: np.ndarray, element: str = "e4m3") -> ClipRanges:
    """Return the clip ranges of finite float32 inputs of any shape. element: "e4m3" or "int8"."""
    largest = _largest(x)
    if not largest:
        return ClipRanges(0.0, 0.0, 0.0)
    counts = _histogram(x)
    bins = np.flatnonzero(counts)
    counts = counts[bins]
    # The middle of a bin represents all its magnitudes.
    bits = (bins.astype(np.uint32) << _DROPPED_BITS) + np.uint32(1 << (_DROPPED_BITS - 1))
    magnitudes = np.minimum(bits.view(np.float32), np.float32(largest))
    rank = np.searchsorted(np.cumsum(counts), counts.sum() * (PERCENTILE / 100))
    return ClipRanges(largest, float(magnitudes[rank]), _least_error(magnitudes, counts, largest, element))


def _histogram(x: np.ndarray) -> np.ndarray:
    counts = np.zeros(_BINS, np.int64)
    flat = np.ascontiguousarray(x, np.float32).reshape(-1)
    for first in range(0, flat.size, _CHUNK):
        bits = flat[first : first + _CHUNK].view(np.uint32) & np.uint32(0x7FFFFFFF)
        counts += np.bincount(bits >> _DROPPED_BITS, minlength=_BINS)
    return counts


def _least_error(magnitudes: np.ndarray, counts: np.ndarray, largest: float, element: str) -> float:
    errors = []
    for clip in largest * _RATIOS:
        scale = np.float32(clip / _LARGEST[element])
        rounded = decode(encode(magnitudes / scale, element), element) * scale
        errors.append(counts @ np.square((rounded - magnitudes).astype(np.float64)))
    return float(largest * _RATIOS[np.argmin(errors)])


def _largest(x: np.ndarray) -> float:
    return float(max(x.max(initial=0), -x.min(initial=0)))
