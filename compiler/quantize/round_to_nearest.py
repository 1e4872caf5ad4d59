"""Round weights to nearest, a block of rows at a time, and dequantize them as an engine does.

Concatenating the arrays of consecutive blocks of rows along their first axis gives those of the whole matrix.
Formats with a global scale need the largest magnitude of all rows of all fused layers first: see `absmax`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import numpy as np

from llmc.compiler.quantize import scales
from llmc.passes.quantize import elements
from llmc.passes.quantize.formats import Format
from llmc.runtime.dtypes import numpy_dtype
from llmc.runtime.errors import CheckpointError, UnsupportedError

SEARCHES = ("amax", "mse")


def absmax(chunks: Iterable[np.ndarray], name: str) -> float:
    """Return the largest magnitude in all `chunks` of the tensor `name`.

    Raises CheckpointError for NaN or infinity.
    """
    return max((float(np.abs(_checked(chunk, name)).max(initial=0)) for chunk in chunks), default=0.0)


def quantize(
    rows: np.ndarray, fmt: Format, name: str, *, amax: float | None = None, search: str = "amax"
) -> dict[str, np.ndarray]:
    """Return the arrays of `fmt.layout` for rows of a weight.

    rows: any number of rows, [n, in], of any float dtype
    fmt: the format to quantize to
    name: the weight's name, for errors
    amax: the `absmax` of the whole weight, for the global scale of fp8 and nvfp4; by default that of `rows`
    search: how the scales of channels and blocks are chosen: "amax", by the largest magnitude, or "mse", by
        the least squared error of the candidates around that scale; formats with one scale for the whole
        matrix support "amax" only

    Raises CheckpointError for NaN or infinity; UnsupportedError if the shape does not fit the format (blocks
    are never padded, because engines read the matrix in place) or if a scale does not fit its dtype.
    """
    if search not in SEARCHES or (search == "mse" and fmt.block == -1):
        raise ValueError(f"{fmt.name} has no search {search!r}")
    wide, global_scale = prepare(rows, fmt, name, amax)
    if fmt.block == -1:
        return assemble(elements.encode(wide / global_scale, fmt.element), global_scale, global_scale, fmt)
    blocks = wide.reshape(len(wide), -1, fmt.block or wide.shape[1])
    chosen = first_scales(blocks, fmt, global_scale, name)
    if search == "mse":
        chosen = scales.search_scales(blocks, chosen, fmt, global_scale)
    array = elements.encode(blocks / scales.effective(chosen, global_scale)[..., None], fmt.element)
    return assemble(array.reshape(wide.shape), chosen, global_scale, fmt)


def prepare(
    rows: np.ndarray, fmt: Format, name: str, amax: float | None = None
) -> tuple[np.ndarray, np.float32]:
    """Return `rows` in float32, and the global scale of `fmt` (1 if it has none).

    The arguments and the errors are those of `quantize`.
    """
    if reason := fmt.why_not(rows.shape):
        raise UnsupportedError(f"tensor {name} cannot be stored as {fmt.name}: {reason}", _WAY_OUT)
    wide = _checked(rows, name)
    largest = float(np.abs(wide).max())
    if amax is not None and amax < largest:
        raise ValueError(f"amax {amax} of {name} is smaller than its weight {largest}")
    if not fmt.has_global_scale:
        return wide, np.float32(1)
    global_scale = scales.global_scale(largest if amax is None else amax, fmt)
    if fmt.block == -1:
        stored = scales.round_up(np.atleast_1d(global_scale), fmt.scales)
        _check_scales(stored, fmt, name)
        global_scale = stored.astype(np.float32)[0]
    return wide, global_scale


def first_scales(blocks: np.ndarray, fmt: Format, global_scale: np.float32, name: str) -> np.ndarray:
    """Return `scales.first_scales`, checked. Raises UnsupportedError if a scale does not fit its dtype."""
    chosen = scales.first_scales(blocks, fmt, global_scale)
    _check_scales(chosen, fmt, name)
    return chosen


def assemble(
    array: np.ndarray, chosen: np.ndarray | np.float32, global_scale: np.float32, fmt: Format
) -> dict[str, np.ndarray]:
    """Return the arrays of `fmt.layout` from codes [rows, in] and stored scales [rows, blocks] or 0-d."""
    stored = np.asarray(chosen, numpy_dtype(fmt.scales))
    arrays = {
        "weight": elements.pack(array) if fmt.packed else array,
        "weight_scale": stored[:, 0] if fmt.block == 0 else stored,
    }
    if fmt.double_scaled:
        arrays["weight_scale_2"] = np.asarray(global_scale)
    return arrays


def dequantize(arrays: Mapping[str, np.ndarray], fmt: Format) -> np.ndarray:
    """Return the weight, float32 [rows, in]: code x scale in float32, as DequantizeLinear computes it.

    The weight of a packed format may also be int8 [rows, in], unpacked (`Parameter.packed`).

    NVFP4: weight_scale x weight_scale_2 is rounded to float32 first, by the inner DequantizeLinear, and is
    then multiplied by the code. INT4 with 16-bit scales is exact. An engine that dequantizes to 16 bits
    rounds these values once more.
    """
    weight = arrays["weight"]
    packed = fmt.packed and weight.dtype == np.uint8
    codes = elements.unpack(weight, fmt.element) if packed else weight
    array = elements.decode(codes, fmt.element) if packed else codes.astype(np.float32, order="C")
    factors = scales.effective(arrays["weight_scale"], arrays.get("weight_scale_2", np.float32(1)))
    blocks = array.reshape(len(array), -1, fmt.block if fmt.block > 0 else array.shape[1])
    blocks *= factors if fmt.block == -1 else factors.reshape(len(array), -1, 1)
    return array


_WAY_OUT = "leave it unquantized with --exclude, or choose another format"


def _checked(array: np.ndarray, name: str) -> np.ndarray:
    wide = np.asarray(array, np.float32)
    if not np.isfinite(wide.sum(dtype=np.float64)):  # a sum of fp32 values cannot overflow fp64
        value = "NaN" if np.isnan(wide).any() else "infinity"
        raise CheckpointError(
            f"tensor {name} has {value}", "the weights are damaged; download or write them again"
        )
    return wide


def _check_scales(stored: np.ndarray, fmt: Format, name: str) -> None:
    if not np.isfinite(np.asarray(stored, np.float32)).all():
        raise UnsupportedError(
            f"tensor {name} has weights too large for {fmt.name}: a scale does not fit {fmt.scales}",
            _WAY_OUT,
        )
