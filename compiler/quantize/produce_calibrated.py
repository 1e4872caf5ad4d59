"""Quantize a plan's matrices with the layers' inputs on a calibration text, a decoder layer at a time.

GPTQ quantizes the weights (`gptq.py`), after SmoothQuant if the format uses it (`smoothquant.py`). The static
scales of activations come from the clip range of the layer's input.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np

from llmc.compiler.calibrate.ranges import ClipRanges, ranges
from llmc.compiler.calibrate.run_layers import LayerInputs
from llmc.compiler.calibrate.table import CalibrationTable, Source
from llmc.compiler.checkpoint.safetensors import TensorRef
from llmc.compiler.quantize.gptq import gptq, hessian, output_error
from llmc.compiler.quantize.produce import (
    Produced,
    join,
    keep,
    largest_magnitude,
    round_to_nearest,
)
from llmc.compiler.quantize.round_to_nearest import dequantize, quantize
from llmc.compiler.quantize.smoothquant import smooth
from llmc.passes.quantize.matrix import QuantizedMatrix
from llmc.runtime.errors import UnsupportedError

_ONE = np.float32(1)
MOST_COLUMNS = 16384  # GPTQ factorizes [columns, columns] in fp64: 2 GiB; wider layers are rounded to nearest


def produce_calibrated(
    matrices: Sequence[QuantizedMatrix],
    tensors: Mapping[str, TensorRef],
    layer_inputs: Iterable[LayerInputs],
    source: Source,
    directory: Path,
    method: str,
    on_matrix: Callable[[int], None] = lambda done: None,
) -> Produced:
    """Quantize `matrices`, write the arrays to `directory`, and measure the ranges of activations.

    tensors: the checkpoint's tensors, by name
    layer_inputs: the inputs of the unquantized graph's decoder layers (`calibrate.run_layers`), read once
    source: the text and the model, for the table
    method: the calibration method
    on_matrix: called with the number of matrices that are done

    Smoothed matrices get the scale of their activations; `produce.add_input_scales` adds the others.
    Raises UnsupportedError for a smoothed matrix that is not in `layer_inputs`.
    """
    produced, remaining = Produced(), {matrix.modules: matrix for matrix in matrices}
    entries: dict[str, ClipRanges] = {}
    kv: dict[int, tuple[float, float]] = {}

    def write(matrix: QuantizedMatrix, arrays: Mapping[str, np.ndarray]) -> None:
        done = len(matrices) - len(remaining)
        keep(produced, matrix, arrays, directory / f"{done}.safetensors")
        on_matrix(done)

    for layer in layer_inputs:
        layer_entries, kv[layer.layer] = ranges(layer)
        entries |= layer_entries
        for modules in [modules for modules in layer.inputs if modules in remaining]:
            matrix = remaining.pop(modules)
            x = layer.inputs[modules]
            if matrix.format.smoothed:
                write(matrix, _smoothed(produced, matrix, tensors, x, method))
            elif matrix.columns > MOST_COLUMNS:
                write(matrix, round_to_nearest(produced, matrix, tensors))
            else:
                write(matrix, _rounded(produced, matrix, tensors, x))
            del x
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


def _rounded(
    produced: Produced,
    matrix: QuantizedMatrix,
    tensors: Mapping[str, TensorRef],
    x: np.ndarray,
    factor: np.ndarray | np.float32 = _ONE,
) -> dict[str, np.ndarray]:
    """Return the arrays of a matrix, quantized by GPTQ.

    x: the inputs of the layer after smoothing, float32 [tokens, in]
    factor: the smoothing factor of the input, float32 [in], by which the weights' columns are divided
    """
    moments = hessian(x)
    amax = largest_magnitude(matrix, tensors)
    pieces = []
    for module, name in zip(matrix.modules, matrix.weights, strict=True):
        rows = tensors[name].read().astype(np.float32) / factor
        pieces.append(gptq(rows, moments, matrix.format, name, amax=amax))
        produced.errors[module] = output_error(rows, dequantize(pieces[-1], matrix.format), moments)
    return join(pieces)


def _smoothed(
    produced: Produced, matrix: QuantizedMatrix, tensors: Mapping[str, TensorRef], x: np.ndarray, method: str
) -> dict[str, np.ndarray]:
    smoothing = smooth(matrix, tensors, x, method)
    if matrix.columns > MOST_COLUMNS:
        wide = [
            (tensors[name].read().astype(np.float32) / smoothing.pre_quant_scale, name)
            for name in matrix.weights
        ]
        arrays = join([quantize(rows, matrix.format, name) for rows, name in wide])
    else:
        arrays = _rounded(produced, matrix, tensors, x * smoothing.pre_quant_scale, smoothing.pre_quant_scale)
    return arrays | {"pre_quant_scale": smoothing.pre_quant_scale, "input_scale": smoothing.input_scale}
