"""Check the shapes of a quantized module's tensors, and find the shape of the weight and of its blocks."""

from __future__ import annotations

import math
from collections.abc import Mapping

from llmc.compiler.checkpoint.finding import Finding
from llmc.compiler.checkpoint.prequantized.module import Format, QuantizedModule, Role
from llmc.compiler.checkpoint.prequantized.scheme import DeclaredScheme
from llmc.compiler.checkpoint.safetensors import TensorRef


def lay_out(
    name: str, fmt: Format, tensors: Mapping[Role, TensorRef], scheme: DeclaredScheme | None
) -> QuantizedModule | Finding:
    """Return the module with its shape [out, in] and block, or a finding about the first wrong shape."""
    weight, scale = tensors["weight"], tensors["weight_scale"]
    rows, columns = weight.shape
    if fmt in ("nvfp4", "mxfp4"):
        columns *= 2
    elif fmt == "int4-awq":
        rows *= 2
    elif fmt in ("int4-packed", "int8-packed"):
        stored = tuple(int(dim) for dim in tensors["shape"].read().reshape(-1))
        words = math.ceil(stored[-1] * (4 if fmt == "int4-packed" else 8) / 32) if len(stored) == 2 else -1
        if len(stored) != 2 or (stored[0], words) != weight.shape:
            what = f"says {list(stored)}, but {fmt} {list(weight.shape)} has another shape"
            return Finding("shape", tensors["shape"].name, what)
        rows, columns = stored
    block = _block(fmt, (rows, columns), scale, scheme)
    if block is None:
        what = f"is {list(scale.shape)}, which does not divide the weight of {[rows, columns]}"
        if fmt == "fp8-block":
            want = scheme.block if scheme and scheme.block else (128, 128)
            need = _ceil((rows, columns), want)
            what = f"is {list(scale.shape)}; blocks of {list(want)} in {[rows, columns]} need {need}"
        return Finding("shape", scale.name, what)
    module = QuantizedModule(name, fmt, (rows, columns), block, dict(tensors))
    return _others(module) or module


def _block(
    fmt: Format, shape: tuple[int, int], scale: TensorRef, scheme: DeclaredScheme | None
) -> tuple[int, int] | None:
    """Return the rows and columns that share a scale; None if the scale's shape does not fit."""
    rows, columns = shape
    if fmt in ("fp8", "int8") and math.prod(scale.shape) == 1:
        return rows, columns
    if fmt in ("fp8-channel", "int8"):
        return (1, columns) if scale.shape in ((rows,), (rows, 1)) else None
    if fmt == "fp8-block":
        grid = scale.shape[::2] if len(scale.shape) == 4 and scale.shape[1::2] == (1, 1) else scale.shape
        block = scheme.block if scheme and scheme.block else (128, 128)
        return block if list(grid) == _ceil(shape, block) else None
    if len(scale.shape) != 2 or scale.shape[0] != rows or not scale.shape[1]:
        return None
    size = scheme.group_size if scheme and scheme.group_size else None
    if size and math.ceil(columns / size) == scale.shape[1]:
        return 1, min(size, columns)  # the last group of int4-packed may be short
    return None if columns % scale.shape[1] else (1, columns // scale.shape[1])


def _others(module: QuantizedModule) -> Finding | None:
    """Return a finding about the first tensor, other than weight and scale, that does not fit the module."""
    rows, columns = module.shape
    groups = math.ceil(columns / module.block[1])
    words = math.ceil(rows * (4 if module.format == "int4-packed" else 8) / 32)
    wanted = {"zero_point": (words, groups), "group_index": (columns,), "pre_quant_scale": (columns,)}
    for role, ref in module.tensors.items():
        if role in wanted and ref.shape != wanted[role]:
            return Finding("shape", ref.name, f"is {list(ref.shape)}, not {list(wanted[role])}")
        if role == "zero_point" and module.format not in ("int4-packed", "int8-packed"):
            return Finding("format", ref.name, f"is not part of {module.format}")
    if (index := module.tensors.get("group_index")) is not None and int(index.read().max()) >= groups:
        return Finding("value", index.name, f"names groups beyond the {groups} of the module")
    return None


def _ceil(shape: tuple[int, int], block: tuple[int, int]) -> list[int]:
    """Return the number of blocks along each axis."""
    return [math.ceil(size / step) for size, step in zip(shape, block, strict=True)]
