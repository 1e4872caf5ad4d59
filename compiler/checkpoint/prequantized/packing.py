"""Unpack the 4- and 8-bit codes of checkpoints, in the layouts of ModelOpt's AWQ and compressed-tensors."""

from __future__ import annotations

import numpy as np

from llmc.passes.quantize.elements import unpack


def unpack_int4_along_out(packed: np.ndarray) -> np.ndarray:
    """Unpack ModelOpt's AWQ: uint8 [out / 2, in] -> int8 [out, in] of -8..7.

    Byte [r, c] has row 2r in its low nibble and row 2r + 1 in its high nibble, as two's complement.
    """
    codes = np.stack([packed & 15, packed >> 4], axis=1).reshape(-1, packed.shape[1])
    return ((codes ^ 8).astype(np.int8) - 8).astype(np.int8)


def unpack_int32(packed: np.ndarray, bits: int, columns: int) -> np.ndarray:
    """Unpack 4- or 8-bit codes: int32 [rows, ceil(columns * bits / 32)] -> int8 [rows, columns].

    The first value is in the lowest bits. Every value is stored with an offset of 2 ** (bits - 1).
    """
    data = np.ascontiguousarray(packed, "<i4").view(np.uint8)
    codes = unpack(data, "e2m1") if bits == 4 else data
    return (codes[:, :columns].astype(np.int16) - (1 << (bits - 1))).astype(np.int8)
