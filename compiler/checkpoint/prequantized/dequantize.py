"""Dequantize the weight of a module to float32, a block of rows at a time.

    fp8, fp8-channel, fp8-block, int8    code * weight_scale
    mxfp4                                code * weight_scale
    nvfp4 (ModelOpt)                     code * (weight_scale * weight_scale_2)
    nvfp4 (compressed-tensors)           code * (weight_scale / weight_global_scale)
    int4-awq                             code * weight_scale
    int4-packed, int8-packed             (code - zero_point) * weight_scale

Despite its name, DeepSeek's `weight_scale_inv` is a multiplier too. The formulas are those of the packages
that write the formats. The packages evaluate them in the scale's dtype, which may be bfloat16; here it is
always float32. AWQ's `pre_quant_scale` is a factor of the activations and is not applied.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from llmc.compiler.checkpoint.prequantized.module import QuantizedModule
from llmc.compiler.checkpoint.prequantized.packing import unpack_int4_along_out, unpack_int32
from llmc.passes.quantize.elements import decode, unpack


def dequantize(module: QuantizedModule, rows: slice | None = None) -> np.ndarray:
    """Return the dequantized weight, float32 [rows, in].

    rows: the rows to return, with step 1; by default all. Only these rows are read.
    """
    first, stop, _ = (rows or slice(None)).indices(module.shape[0])
    if stop <= first:
        return np.empty((0, module.shape[1]), np.float32)
    codes = _codes(module, first, stop)
    scale = _scale(module, first, stop)
    if module.tensors.get("zero_point") is not None:
        codes -= spread(module, zero_points(module, first, stop))
    with np.errstate(invalid="ignore", over="ignore"):  # bad scales give NaN and inf, not warnings
        codes *= spread(module, scale)
    return codes


def iter_rows(module: QuantizedModule, max_bytes: int) -> Iterator[np.ndarray]:
    """Yield the dequantized weight in float32 blocks of rows, each of at most `max_bytes` or two rows."""
    step = max(2, max_bytes // (4 * module.shape[1]) // 2 * 2)
    for first in range(0, module.shape[0], step):
        yield dequantize(module, slice(first, first + step))


def _codes(module: QuantizedModule, first: int, stop: int) -> np.ndarray:
    """Return the codes of rows first..stop as float32, before any scale."""
    weight, columns = module.tensors["weight"], module.shape[1]
    if module.format == "int4-awq":
        pairs = weight.read(slice(first // 2, -(-stop // 2)))
        return unpack_int4_along_out(pairs)[first % 2 :][: stop - first].astype(np.float32)
    stored = weight.read(slice(first, stop))
    if module.format in ("nvfp4", "mxfp4"):
        return decode(unpack(stored, "e2m1"), "e2m1")
    if module.format in ("int4-packed", "int8-packed"):
        return unpack_int32(stored, code_bits(module), columns).astype(np.float32)
    return stored.astype(np.float32)


def _scale(module: QuantizedModule, first: int, stop: int) -> np.ndarray:
    """Return the scales of rows first..stop for each group of columns, float32 [rows or 1, groups]."""
    ref, (height, _) = module.tensors["weight_scale"], module.block
    if ref.shape and ref.shape[0] > 1:  # otherwise there is one row of scales for all rows
        needed = slice(first // height, -(-stop // height))
        stored = ref.read(needed).astype(np.float32)
        stored = stored.reshape(stored.shape[0], -1)
        scale = np.repeat(stored, height, axis=0)[first - needed.start * height :][: stop - first]
    else:
        scale = ref.read().astype(np.float32).reshape(1, -1)
    with np.errstate(all="ignore"):
        if (tensor := module.tensors.get("global_scale")) is not None:
            scale = scale * tensor.read().astype(np.float32).reshape(-1)[0]
        if (tensor := module.tensors.get("inverse_global_scale")) is not None:
            scale = scale / tensor.read().astype(np.float32).reshape(-1)[0]
    return scale


def zero_points(module: QuantizedModule, first: int, stop: int) -> np.ndarray:
    """Return the zero points of rows first..stop, int8 [rows, groups].

    The tensor is packed along the rows: int32 [ceil(out * bits / 32), groups].
    """
    in_word = 32 // code_bits(module)
    begin = first // in_word
    words = module.tensors["zero_point"].read(slice(begin, -(-stop // in_word)))
    points = unpack_int32(words.T, code_bits(module), words.shape[0] * in_word).T
    return points[first - begin * in_word :][: stop - first]


def spread(module: QuantizedModule, values: np.ndarray) -> np.ndarray:
    """Repeat each group's value for its columns: [rows, groups] -> [rows, in]. [rows, 1] is unchanged."""
    if values.shape[1] == 1:
        return values
    columns, width = module.shape[1], module.block[1]
    if (ref := module.tensors.get("group_index")) is not None:
        group = ref.read()
        if (group >= 0).all():  # -1: uninitialized, the groups are in order
            return values[:, group]
    return np.repeat(values, width, axis=1)[:, :columns]


def code_bits(module: QuantizedModule) -> int:
    """Return the bits per code of a module in the format int4-packed or int8-packed."""
    return 4 if module.format == "int4-packed" else 8
