"""Read matrices back from the native engine's tiles. `docs/reference/program.md` specifies them."""

from __future__ import annotations

import ml_dtypes
import numpy as np

from llmc.compiler.checkpoint.safetensors import TensorRef
from llmc.passes.quantize.elements import E2M1_VALUES
from llmc.runtime.native.program import TILE, Matrix

_TOGETHER = 1 << 18  # elements that are unpacked together: arrays that the caches hold
_TWICE_E2M1 = (2 * E2M1_VALUES).astype(np.int8)
_DTYPES = {
    "fp32": np.float32,
    "fp16": np.float16,
    "bf16": ml_dtypes.bfloat16,
    "fp8": ml_dtypes.float8_e4m3fn,
}


def read_rows(matrix: Matrix, stored: TensorRef, first: int, stop: int) -> np.ndarray:
    """Return rows `first` .. `stop` - 1 of a packed matrix, float32 [stop - first, columns]: code x scale.

    stored: the matrix in the weights file, U8 [matrix.nbytes]
    """
    begin, end = first // TILE, -(-stop // TILE)
    tile = matrix.nbytes // -(-matrix.rows // TILE)
    wide = np.empty(((end - begin) * TILE, matrix.columns), np.float32)
    together = max(1, _TOGETHER // (TILE * matrix.columns))
    for start in range(begin, end, together):
        last = min(start + together, end)
        tiles = stored.read(slice(start * tile, last * tile)).reshape(last - start, -1)
        _dequantize(matrix, tiles, wide[(start - begin) * TILE : (last - begin) * TILE])
    return wide[first - begin * TILE : stop - begin * TILE]


def _dequantize(matrix: Matrix, tiles: np.ndarray, out: np.ndarray) -> None:
    """Write the rows of tiles, uint8 [tiles, bytes], to `out`, float32 [32 * tiles, columns]."""
    if not matrix.scales:
        numbers = tiles.view(_DTYPES[matrix.element]).reshape(len(tiles), matrix.columns, TILE)
        out[:] = numbers.transpose(0, 2, 1).reshape(-1, matrix.columns)
        return
    blocks = matrix.columns // matrix.block
    parts = tiles.reshape(len(tiles), blocks, -1)
    size = TILE * (2 if matrix.scales == "fp16" else 4)  # bytes of the scales of a tile
    scales = np.ascontiguousarray(parts[..., :size]).view(_DTYPES[matrix.scales])  # [tiles, blocks, 32]
    stored = np.ascontiguousarray(parts[..., size:])
    if matrix.element == "fp8":
        codes = stored.view(_DTYPES["fp8"]).reshape(len(tiles), blocks, matrix.block, TILE)
        codes = codes.transpose(0, 3, 1, 2).astype(np.float32)
    else:  # lanes of four codes
        lanes = stored.view(np.uint32).reshape(len(tiles), blocks, -1, TILE)
        if matrix.element != "int8":
            lanes = np.stack([lanes & 0x0F0F0F0F, lanes >> 4 & 0x0F0F0F0F], axis=3).reshape(
                len(tiles), blocks, -1, TILE
            )
        codes = np.ascontiguousarray(lanes.transpose(0, 3, 1, 2)).view(np.uint8)
        if matrix.element == "fp4":
            codes = _TWICE_E2M1[codes]
        else:
            codes = (codes - np.uint8(8 if matrix.element == "int4" else 128)).view(np.int8)
    shape = len(tiles), TILE, blocks, matrix.block
    factors = scales.astype(np.float32).transpose(0, 2, 1)[..., None]
    np.multiply(codes.reshape(shape), factors, out=out.reshape(shape), dtype=np.float32)
