"""Quantize a plan's matrices, one at a time, to files of codes and scales.

This module rounds to nearest. With a calibration text, `produce_calibrated.py` quantizes the weights and
measures the ranges of static activations on the layers' inputs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from llmc.compiler.calibrate.table import CalibrationTable
from llmc.compiler.checkpoint.safetensors import TensorRef, read_header
from llmc.compiler.quantize import scales
from llmc.compiler.quantize.round_to_nearest import absmax, dequantize, quantize
from llmc.compiler.weights.safetensors_writer import write_safetensors
from llmc.passes.quantize.matrix import QuantizedMatrix
from llmc.runtime.cpus import available_cpus
from llmc.runtime.dtypes import BY_NUMPY

_CHUNK_BYTES = 1 << 19  # of a tensor that are rounded together: arrays that the caches hold


@dataclass
class Produced:
    """The quantized arrays of a build, and their errors."""

    #: Name of the initializer -> its data on disk.
    tensors: dict[str, TensorRef] = field(default_factory=dict)
    #: Module -> relative error of its output, for modules that were quantized with calibration.
    errors: dict[str, float] = field(default_factory=dict)
    #: Module -> relative error of its weight, for modules that were rounded to nearest.
    weight_errors: dict[str, float] = field(default_factory=dict)
    #: The ranges of activations, from calibration.
    table: CalibrationTable | None = None


def produce(
    matrices: Sequence[QuantizedMatrix],
    tensors: Mapping[str, TensorRef],
    directory: Path,
    on_matrix: Callable[[int], None] = lambda done: None,
) -> Produced:
    """Round the weights of `matrices` to nearest and write the arrays to `directory`.

    tensors: the checkpoint's tensors, by name
    on_matrix: called with the number of matrices that are done
    """
    produced = Produced()

    def make(index: int) -> Produced:
        part = Produced()
        arrays = round_to_nearest(part, matrices[index], tensors)
        keep(part, matrices[index], arrays, directory / f"{index}.safetensors")
        return part

    with ThreadPoolExecutor(available_cpus()) as pool:
        for index, part in enumerate(pool.map(make, range(len(matrices)))):
            produced.tensors |= part.tensors
            produced.weight_errors |= part.weight_errors
            on_matrix(index + 1)
    return produced


def round_to_nearest(
    produced: Produced, matrix: QuantizedMatrix, tensors: Mapping[str, TensorRef]
) -> dict[str, np.ndarray]:
    """Round a matrix to nearest and return the arrays of its format's layout.

    4-bit blocks get the scale with the least squared error, other formats that of the largest magnitude.
    Adds the relative error of each weight to `produced`: |W - dequantized| / |W| (Frobenius norms).
    """
    fmt = matrix.format
    amax = largest_magnitude(matrix, tensors)
    search = "mse" if fmt.packed else "amax"
    pieces = []
    for module, name in zip(matrix.modules, matrix.weights, strict=True):
        error_energy = weight_energy = 0.0
        for rows in chunks(tensors[name]):
            pieces.append(quantize(rows, fmt, name, amax=amax, search=search))
            wide = np.asarray(rows, np.float32)
            error_energy += _energy(wide - dequantize(pieces[-1], fmt))
            weight_energy += _energy(wide)
        produced.weight_errors[module] = math.sqrt(error_energy / weight_energy) if weight_energy else 0.0
    return join(pieces)


def _energy(array: np.ndarray) -> float:
    return float(np.square(array).sum(dtype=np.float64))


def largest_magnitude(matrix: QuantizedMatrix, tensors: Mapping[str, TensorRef]) -> float | None:
    """Return the largest magnitude of all fused layers; None for formats without a global scale."""
    if not matrix.format.has_global_scale:
        return None
    return max(absmax(chunks(tensors[name]), name) for name in matrix.weights)


def join(pieces: Sequence[Mapping[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """Concatenate the arrays of consecutive blocks of rows. 0-d global scales are equal in all of them."""
    return {
        name: array if array.ndim == 0 else np.concatenate([piece[name] for piece in pieces])
        for name, array in pieces[0].items()
    }


def keep(produced: Produced, matrix: QuantizedMatrix, arrays: Mapping[str, np.ndarray], file: Path) -> None:
    """Write the arrays of a matrix to `file`, and add them to `produced.tensors`."""
    named = {matrix.initializer(array): value for array, value in arrays.items()}
    entries = [(name, BY_NUMPY[value.dtype.name].safetensors, value.shape) for name, value in named.items()]
    write_safetensors(file, entries, lambda name: [_bytes(named[name])])
    produced.tensors |= read_header(file)


def _bytes(array: np.ndarray) -> memoryview:
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8).data


def add_input_scales(
    produced: Produced, matrices: Sequence[QuantizedMatrix], method: str, dtype: str, directory: Path
) -> None:
    """Add the scales of static activations, from the ranges in `produced.table`.

    Smoothed matrices are skipped: they have their scales already.

    method: the calibration method, "max", "percentile" or "mse"
    dtype: the dtype of FP8's scales

    Raises RequestError for a table of another model.
    """
    assert produced.table is not None
    for index, matrix in enumerate(matrices):
        if matrix.format.activations and not matrix.format.smoothed:
            amax = max(produced.table.amax(module, method) for module in matrix.modules)
            scale = input_scale(matrix, amax, dtype)
            keep(produced, matrix, {"input_scale": scale}, directory / f"{index}.input.safetensors")


def input_scale(matrix: QuantizedMatrix, amax: float, dtype: str) -> np.ndarray:
    """Return the scale of activations with the clip range `amax`, 0-d.

    dtype: the dtype of the scale, "F32", "F16" or "BF16"; for NVFP4 it is always fp32
    """
    global_scale = np.atleast_1d(scales.global_scale(amax, matrix.format))
    return (global_scale if matrix.format.double_scaled else scales.round_up(global_scale, dtype))[0].reshape(
        ()
    )


def chunks(ref: TensorRef) -> Iterator[np.ndarray]:
    """Return an iterator over consecutive blocks of rows of a tensor, [n, in], in its dtype.

    The rows of a stack of experts are those of all experts.
    """
    return (block.reshape(-1, block.shape[-1]) for block in ref.iter_chunks(_CHUNK_BYTES))
