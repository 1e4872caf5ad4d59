"""Read matrices back from the native engine's tiles. `docs/reference/program.md` specifies them."""

from __future__ import annotations

import ml_dtypes
import numpy as np

from llmc.compiler.checkpoint.safetensors import TensorRef
from llmc.runtime.native.program import TILE, Matrix

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
    tiles = stored.read(slice(begin * tile, end * tile)).reshape(end - begin, -1)
    return _dequantize(matrix, tiles)[first - begin * TILE : stop - begin * TILE]


def _dequantize(matrix: Matrix, tiles: np.ndarray) -> np.ndarray:
    """Return the rows of tiles, uint8 [tiles, bytes], as float32 [32 * tiles, columns]."""
    if not matrix.scales:
        numbers = tiles.view(_DTYPES[matrix.element]).reshape(len(tiles), matrix.columns, TILE)
        return numbers.transpose(0, 2, 1).reshape(-1, matrix.columns).astype(np.float32)
    blocks = matrix.columns // matrix.block
    parts = tiles.reshape(len(tiles), blocks, -1)
    size = TILE * (2 if matrix.scales == "fp16" else 4)  # bytes of the scales of a tile
    scales = np.ascontiguousarray(parts[..., :size]).view(_DTYPES[matrix.scales])  # [tiles, blocks, 32]
    codes = np.ascontiguousarray(parts[..., size:])
    if matrix.element == "fp8":
        values = codes.view(_DTYPES["fp8"]).astype(np.float32).reshape(len(tiles), blocks, matrix.block, TILE)
        values = values.transpose(0, 3, 1, 2)
    else:
        lanes = codes.reshape(len(tiles), blocks, -1, TILE, 4)
        if matrix.element == "int4":
            lanes = np.concatenate([lanes & 15, lanes >> 4], axis=-1)
        zero = 8 if matrix.element == "int4" else 128
        values = (lanes.astype(np.float32) - zero).transpose(0, 3, 1, 2, 4)
    values = values.reshape(len(tiles), TILE, blocks, matrix.block)
    wide = values * scales.astype(np.float32).transpose(0, 2, 1)[..., None]
    return wide.reshape(-1, matrix.columns)
