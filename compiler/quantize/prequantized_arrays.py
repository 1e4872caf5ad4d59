"""Rearrange the codes and scales of a pre-quantized checkpoint for an engine. No value changes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np

from llmc.compiler.checkpoint.prequantized.dequantize import code_bits, spread, zero_points
from llmc.compiler.checkpoint.prequantized.module import QuantizedModule
from llmc.compiler.checkpoint.prequantized.packing import unpack_int4_along_out, unpack_int32
from llmc.compiler.quantize.prequantized_form import PrequantizedModule
from llmc.compiler.quantize.produce import Produced, join, keep
from llmc.passes.quantize.elements import pack
from llmc.passes.quantize.formats import Format
from llmc.passes.quantize.matrix import QuantizedMatrix
from llmc.runtime.dtypes import numpy_dtype
from llmc.runtime.errors import CheckpointError


def produce_prequantized(
    matrices: Sequence[QuantizedMatrix],
    modules: Mapping[str, PrequantizedModule],
    directory: Path,
    on_matrix: Callable[[int], None] = lambda done: None,
) -> Produced:
    """Write the codes, scales and input scales of `matrices` from the checkpoint to `directory`.

    matrices: the graph's quantized matrices
    modules: the checkpoint's quantized modules, by name
    on_matrix: called with the number of matrices that are done
    Raises CheckpointError for scales that are not finite and positive.
    """
    produced = Produced()
    for index, matrix in enumerate(matrices):
        on_matrix(index)
        parts = [modules[name] for name in matrix.modules]
        arrays = join([arrays_of(part, matrix.format) for part in parts])
        if (scale := parts[0].input_scale) is not None:
            arrays["input_scale"] = np.asarray(scale)
        keep(produced, matrix, arrays, directory / f"{index}.safetensors")
    return produced


def arrays_of(stored: PrequantizedModule, fmt: Format) -> dict[str, np.ndarray]:
    """Return the arrays of `fmt.layout` for one module. fmt: the format of the matrix that contains it."""
    module = stored.module
    if fmt.double_scaled:
        arrays = {"weight": module.tensors["weight"].read(), "weight_scale": _read_scales(module)}
        assert stored.global_scale is not None
        return arrays | {"weight_scale_2": np.asarray(stored.global_scale)}
    if module.format == "mxfp4":
        return {"weight": module.tensors["weight"].read(), "weight_scale": _read_scales(module)}
    codes = _codes(module)
    return {
        "weight": pack(codes) if fmt.packed else codes,
        "weight_scale": _scales(module, fmt).astype(numpy_dtype(fmt.scales)),
    }


def _codes(module: QuantizedModule) -> np.ndarray:
    """Return the codes minus their zero points, int8 or float8_e4m3fn [out, in]."""
    stored, (rows, columns) = module.tensors["weight"].read(), module.shape
    if module.format == "int4-awq":
        return unpack_int4_along_out(stored)
    if module.format not in ("int4-packed", "int8-packed"):
        return stored
    codes = unpack_int32(stored, code_bits(module), columns)
    if "zero_point" in module.tensors:
        codes = codes - spread(module, zero_points(module, 0, rows))  # fits int8: see prequantized_form.py
    return codes


def _scales(module: QuantizedModule, fmt: Format) -> np.ndarray:
    """Return the scales in the shape of `fmt.layout` and the checkpoint's dtype. Values are only repeated."""
    stored, (height, width), (rows, columns) = _read_scales(module), module.block, module.shape
    if fmt.block == -1:
        return stored.reshape(())
    grid = stored.reshape(-(-rows // height), -1)
    by_row = np.repeat(grid, height, axis=0)[:rows]
    if fmt.block == 0:
        return by_row[:, 0]
    return by_row[:, np.arange(0, columns, fmt.block) // width]


def _read_scales(module: QuantizedModule) -> np.ndarray:
    ref = module.tensors["weight_scale"]
    scales = ref.read()
    wide = scales.astype(np.float32)
    if not (np.isfinite(wide).all() and (wide > 0).all()):
        raise CheckpointError(
            f"tensor {ref.name} has scales that are not finite and positive",
            "run `llmc check CHECKPOINT` to count them",
        )
    return scales
