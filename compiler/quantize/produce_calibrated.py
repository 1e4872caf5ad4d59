"""Quantize a plan's matrices with the layers' inputs on a calibration text, a decoder layer at a time.

GPTQ quantizes the weights (`gptq.py`), after SmoothQuant if the format uses it (`smoothquant.py`). The static
scales of activations come from the clip range of the layer's input.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np

from llmc.compiler.calibrate.ranges import ClipRanges
from llmc.compiler.calibrate.statistics import LayerStatistics, second_moment
from llmc.compiler.calibrate.table import CalibrationTable, Source
from llmc.compiler.checkpoint.safetensors import TensorRef
from llmc.compiler.quantize.gptq import gptq
from llmc.compiler.quantize.produce import (
    Produced,
    join,
    keep,
    largest_magnitude,
    round_to_nearest,
)
from llmc.compiler.quantize.round_to_nearest import dequantize, quantize
from llmc.compiler.quantize.second_moment import factorize, output_error
from llmc.compiler.quantize.smoothquant import smooth
from llmc.passes.quantize.matrix import QuantizedMatrix
from llmc.runtime.errors import UnsupportedError

_ONE = np.float32(1)
_LEAST_DAMPING = 0.01
_DAMPING_OF_FEW_TOKENS = 0.15  # times columns / tokens
MOST_COLUMNS = 16384  # GPTQ factorizes [columns, columns] in fp64: 2 GiB; wider layers are rounded to nearest


def produce_calibrated(
    matrices: Sequence[QuantizedMatrix],
    tensors: Mapping[str, TensorRef],
    statistics: Iterable[LayerStatistics],
    source: Source,
    directory: Path,
    method: str,
    most_columns: int = MOST_COLUMNS,
    on_matrix: Callable[[int], None] = lambda done: None,
) -> Produced:
    """Quantize `matrices`, write the arrays to `directory`, and measure the ranges of activations.

    tensors: the checkpoint's tensors, by name
    statistics: those of the decoder layers of the unquantized graph, read once, with the inputs of smoothed
        matrices and the second moments of the others that GPTQ quantizes
    source: the text and the model, for the table
    method: the calibration method
    most_columns: matrices with more columns are rounded to nearest
    on_matrix: called with the number of matrices that are done

    Smoothed matrices get the scale of their activations; `produce.add_input_scales` adds the others.
    Raises UnsupportedError for a smoothed matrix that is in no decoder layer.
    """
    produced, remaining = Produced(), {matrix.modules: matrix for matrix in matrices}
    entries: dict[str, ClipRanges] = {}
    kv: dict[int, tuple[float, float]] = {}

    def write(matrix: QuantizedMatrix, arrays: Mapping[str, np.ndarray]) -> None:
        done = len(matrices) - len(remaining)
        keep(produced, matrix, arrays, directory / f"{done}.safetensors")
        on_matrix(done)

    for layer in statistics:
        entries |= layer.ranges
        kv[layer.layer] = layer.kv
        for modules in [modules for modules in remaining if modules[0] in layer.ranges]:
            matrix = remaining.pop(modules)
            if matrix.format.smoothed:
                x = layer.inputs[modules]
                write(matrix, _smoothed(produced, matrix, tensors, x, method, most_columns))
                del x
            elif matrix.columns <= most_columns:
                moment = layer.moments[modules]
                write(matrix, _rounded(produced, matrix, tensors, moment, source.tokens))
            else:
                write(matrix, round_to_nearest(produced, matrix, tensors))
        del layer
    for matrix in list(remaining.values()):  # the matrices outside of the decoder layers
        if matrix.format.smoothed:
            raise UnsupportedError(
                f"{matrix.modules[0]} is in no decoder layer: calibration does not see its inputs",
                f"leave it unquantized: --exclude {matrix.modules[0]}",
            )
        del remaining[matrix.modules]
        write(matrix, round_to_nearest(produced, matrix, tensors))
    produced.table = CalibrationTable(entries, kv, source)
    return produced


def damping(columns: int, tokens: int) -> float:
    """Return GPTQ's damping for the inputs of a layer, measured on `tokens` tokens."""
    return max(_LEAST_DAMPING, _DAMPING_OF_FEW_TOKENS * columns / tokens)


def _rounded(
    produced: Produced,
    matrix: QuantizedMatrix,
    tensors: Mapping[str, TensorRef],
    moment: np.ndarray,
    tokens: int,
    factor: np.ndarray | np.float32 = _ONE,
) -> dict[str, np.ndarray]:
    """Return the arrays of a matrix, quantized by GPTQ.

    moment: the second moment of the layer's inputs after smoothing, float32 [in, in]
    tokens: the number of tokens that it was measured on
    factor: the smoothing factor of the input, float32 [in], by which the weights' columns are divided
    """
    factors = factorize(moment, matrix.weights[0], damping(matrix.columns, tokens))
    amax = largest_magnitude(matrix, tensors)
    pieces = []
    for module, name in zip(matrix.modules, matrix.weights, strict=True):
        rows = tensors[name].read().astype(np.float32) / factor
        pieces.append(gptq(rows, factors, matrix.format, name, amax=amax))
        produced.errors[module] = output_error(rows, dequantize(pieces[-1], matrix.format), moment)
    return join(pieces)


def _smoothed(
    produced: Produced,
    matrix: QuantizedMatrix,
    tensors: Mapping[str, TensorRef],
    x: np.ndarray,
    method: str,
    most_columns: int,
) -> dict[str, np.ndarray]:
    smoothing = smooth(matrix, tensors, x, method)
    if matrix.columns > most_columns:
        wide = [
            (tensors[name].read().astype(np.float32) / smoothing.pre_quant_scale, name)
            for name in matrix.weights
        ]
        arrays = join([quantize(rows, matrix.format, name) for rows, name in wide])
    else:
        factor = smoothing.pre_quant_scale
        arrays = _rounded(produced, matrix, tensors, second_moment(x * factor), len(x), factor)
    return arrays | {"pre_quant_scale": smoothing.pre_quant_scale, "input_scale": smoothing.input_scale}
