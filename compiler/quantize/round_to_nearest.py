"""Quantizes weights, a block of rows at a time, and dequantizes them as an engine does.

The arrays of consecutive blocks of rows, joined along their first axis, are those of the whole matrix.
Formats with a global scale need the largest magnitude of all rows (of all layers multiplied as one) first:
`absmax`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import numpy as np

from llmc.compiler.quantize import scales
from llmc.passes.quantize import elements
from llmc.passes.quantize.formats import STORED, Format
from llmc.runtime.errors import CheckpointError, UnsupportedError

SEARCHES = ("amax", "mse")


def absmax(chunks: Iterable[np.ndarray], name: str) -> float:
    """The largest magnitude in all `chunks` of the tensor `name`.

    Raises CheckpointError for NaN or infinity.
    """
    return max((float(np.abs(_checked(chunk, name)).max(initial=0)) for chunk in chunks), default=0.0)


def quantize(
    rows: np.ndarray, form: Format, name: str, *, amax: float | None = None, search: str = "amax"
) -> dict[str, np.ndarray]:
    """The arrays of `form.layout` for `rows` [any, in] of the weight `name`, given in any float dtype.

    `amax` is the `absmax` that the global scale of fp8 and nvfp4 comes from, that of `rows` by default;
    other formats do not look at it. `search` is how the scales of channels and blocks are chosen: "amax",
    the largest magnitude, or "mse", the least squared error among some around that. A format with nothing
    but a global scale has nothing to search.
    Raises CheckpointError for NaN or infinity; UnsupportedError when the shape does not fit the format
    (blocks are never padded: engines read the matrix as it is) or a scale does not fit its dtype.
    """
    if search not in SEARCHES or (search == "mse" and form.block == -1):
        raise ValueError(f"{form.name} has no search {search!r}")
    wide, over = prepare(rows, form, name, amax)
    if form.block == -1:
        return assemble(elements.encode(wide / over, form.codes), over, over, form)
    blocks = wide.reshape(len(wide), -1, form.block or wide.shape[1])
    chosen = first_scales(blocks, form, over, name)
    if search == "mse":
        chosen = scales.search_scales(blocks, chosen, form, over)
    array = elements.encode(blocks / scales.effective(chosen, over)[..., None], form.codes)
    return assemble(array.reshape(wide.shape), chosen, over, form)


def prepare(
    rows: np.ndarray, form: Format, name: str, amax: float | None = None
) -> tuple[np.ndarray, np.float32]:
    """`rows` in float32, and the global scale of `form` (1 where it has none), as `quantize` takes and
    raises."""
    if reason := form.why_not(rows.shape):
        raise UnsupportedError(f"tensor {name} cannot be stored as {form.name}: {reason}", _WAY_OUT)
    wide = _checked(rows, name)
    largest = float(np.abs(wide).max())
    if amax is not None and amax < largest:
        raise ValueError(f"amax {amax} of {name} is smaller than its weight {largest}")
    if not form.has_global_scale:
        return wide, np.float32(1)
    over = scales.global_scale(largest if amax is None else amax, form)
    if form.block == -1:
        stored = scales.round_up(np.atleast_1d(over), form.scales)
        _check_scales(stored, form, name)
        over = stored.astype(np.float32)[0]
    return wide, over


def first_scales(blocks: np.ndarray, form: Format, over: np.float32, name: str) -> np.ndarray:
    """`scales.first_scales`, checked. Raises UnsupportedError when one does not fit its dtype."""
    chosen = scales.first_scales(blocks, form, over)
    _check_scales(chosen, form, name)
    return chosen


def assemble(
    array: np.ndarray, chosen: np.ndarray | np.float32, over: np.float32, form: Format
) -> dict[str, np.ndarray]:
    """The arrays of `form.layout` from codes [rows, in] and stored scales [rows, blocks] (or the one)."""
    stored = np.asarray(chosen, STORED[form.scales])
    arrays = {
        "weight": elements.pack(array) if form.packed else array,
        "weight_scale": stored[:, 0] if form.block == 0 else stored,
    }
    if form.codes == "e2m1":
        arrays["weight_scale_2"] = np.asarray(over)
    return arrays


def dequantize(arrays: Mapping[str, np.ndarray], form: Format) -> np.ndarray:
    """float32 [rows, in]: code x scale, in float32, as DequantizeLinear computes it.

    NVFP4: weight_scale x weight_scale_2 is rounded to float32 first, the inner of the two DequantizeLinear;
    then code x that. INT4 with 16-bit scales is exact. An engine that dequantizes to 16 bits rounds these
    values once more.
    """
    weight = arrays["weight"]
    array = elements.decode(elements.unpack(weight, form.codes) if form.packed else weight, form.codes)
    factors = scales.effective(arrays["weight_scale"], arrays.get("weight_scale_2", np.float32(1)))
    if form.block == -1:
        return array * factors
    blocks = array.reshape(len(array), -1, form.block or array.shape[1])
    return (blocks * factors.reshape(len(array), -1, 1)).reshape(array.shape)


_WAY_OUT = "leave it unquantized with --exclude, or choose another format"


def _checked(array: np.ndarray, name: str) -> np.ndarray:
    wide = np.asarray(array, np.float32)
    if not np.isfinite(wide.sum(dtype=np.float64)):  # (the magnitude of fp32 sums cannot overflow fp64)
        value = "NaN" if np.isnan(wide).any() else "infinity"
        raise CheckpointError(
            f"tensor {name} has {value}", "the weights are damaged; download or write them again"
        )
    return wide


def _check_scales(stored: np.ndarray, form: Format, name: str) -> None:
    if not np.isfinite(np.asarray(stored, np.float32)).all():
        raise UnsupportedError(
            f"tensor {name} has weights so large that a scale of {form.name} does not fit {form.scales}",
            _WAY_OUT,
        )
