"""SmoothQuant: scale large channels of a layer's input down, and the weight's columns up.

Xiao, Lin, Seznec, Wu, Demouth, Han 2022, arXiv:2211.10438. One scale for all of X wastes codes if a few
channels are much larger than the rest. So the layer computes (X / s) (W s)^T, which is the same, with

    s_j = max|X_j|^a / max|W_j|^(1 - a)

The input is multiplied by `pre_quant_scale` = 1 / s. Fused layers share s, and max|W_j| is over all of them.
The paper has a = 0.5; a larger a favors the inputs, a smaller one the weights. Here a few values of a are
tried for each matrix, and the one whose quantized inputs and weights change the output least is taken. Mean
KL and top-1 agreement with fp32 of model_zoo/llama/tales on 14,648 held-out tokens, without lm_head
(2026-11-26), by calibration method (max, mse):

    ranges by largest magnitude       by least squared error
    a = 0.5     0.0057  94.3 %        0.0030  96.3 %
    a = 0.75    0.0027  95.9 %        0.0027  96.4 %
    a = 0.85    0.0023  96.3 %        0.0028  96.6 %
    a = 1       0.0029  96.3 %
    searched    0.0023  96.5 %        0.0030  96.3 %       (0.9 for all; 0.8 or 0.9)
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from llmc.compiler.calibrate.ranges import clip_ranges
from llmc.compiler.checkpoint.safetensors import TensorRef
from llmc.compiler.quantize.produce import chunks, input_scale
from llmc.compiler.quantize.round_to_nearest import dequantize, quantize
from llmc.passes.quantize.fake_quantize import round_int8
from llmc.passes.quantize.matrix import QuantizedMatrix

STRENGTHS = (0.5, 0.6, 0.7, 0.8, 0.9)  # the values of a that are tried
_TOKENS = 512  # the number of calibration tokens that outputs are compared on
_SPAN = 2.0**12  # 1 / s is clipped to 1 / _SPAN.._SPAN, so that the scales of smoothed weights fit fp16


@dataclass(frozen=True)
class Smoothing:
    """The factors of a smoothed matrix, float32."""

    #: 1 / s, [in].
    pre_quant_scale: np.ndarray
    #: The scale of the smoothed input, 0-d.
    input_scale: np.ndarray


def smooth(
    matrix: QuantizedMatrix, tensors: Mapping[str, TensorRef], x: np.ndarray, method: str
) -> Smoothing:
    """Return the best smoothing of `matrix` for inputs `x`, float32 [tokens, in].

    tensors: the checkpoint's tensors, by name
    method: the calibration method, "max", "percentile" or "mse"

    input_scale is fp32, with a value that the dtype of the format's scales represents.
    Raises the errors of `quantize`.
    """
    fmt, refs = matrix.format, [tensors[name] for name in matrix.weights]
    columns = np.max([_largest(chunk) for ref in refs for chunk in chunks(ref)], axis=0)
    candidates = []
    for a in STRENGTHS:
        factor = pre_quant_scale(_largest(x), columns, a)
        amax = clip_ranges(x * factor, fmt.activations).amax(method)
        candidates.append(Smoothing(factor, input_scale(matrix, amax, fmt.scales).astype(np.float32)))
    sample = x[:: max(1, len(x) // _TOKENS)]
    errors = np.zeros(len(candidates))
    for ref in refs:
        rows = ref.read().astype(np.float32)
        exact = sample @ rows.T
        for index, smoothing in enumerate(candidates):
            rounded = round_int8(sample * smoothing.pre_quant_scale, float(smoothing.input_scale))
            weight = dequantize(quantize(rows / smoothing.pre_quant_scale, fmt, ref.name), fmt)
            errors[index] += np.square(rounded @ weight.T - exact).sum(dtype=np.float64)
    return candidates[int(errors.argmin())]


def pre_quant_scale(inputs: np.ndarray, columns: np.ndarray, a: float) -> np.ndarray:
    """Return 1 / s, float32 [in], and 1 where a magnitude is 0.

    inputs: the largest magnitude of each channel of the input, [in]
    columns: the largest magnitude of each column of the weights, [in]
    """
    used = (inputs > 0) & (columns > 0)
    x, w = (np.where(used, magnitudes, 1).astype(np.float64) for magnitudes in (inputs, columns))
    return np.clip(w ** (1 - a) / x**a, 1 / _SPAN, _SPAN).astype(np.float32)


def _largest(array: np.ndarray) -> np.ndarray:
    """Return the largest magnitude of each column, float32 [n], of an array [any, n] of any float dtype."""
    return np.maximum(array.max(0), -array.min(0)).astype(np.float32)
