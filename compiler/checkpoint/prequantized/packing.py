"""Codes of 4 and 8 bits, unpacked from bytes. The layouts are those of the checkpoints, not of engines.

E2M1: OCP Microscaling Formats 1.0, section 5.3.3. Packing: NVIDIA ModelOpt's unified export and
compressed-tensors' `nvfp4-pack-quantized` and `pack-quantized`.
"""

from __future__ import annotations

import numpy as np

_MAGNITUDES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
E2M1 = np.array([*_MAGNITUDES, *(-value for value in _MAGNITUDES)], np.float32)  # bit 3 is the sign


def unpack_nibbles(packed: np.ndarray) -> np.ndarray:
    """uint8 [rows, n] -> uint8 [rows, 2n] of 0..15: the low nibble of a byte comes first."""
    codes = np.empty((*packed.shape, 2), np.uint8)
    np.bitwise_and(packed, 15, out=codes[..., 0])
    np.right_shift(packed, 4, out=codes[..., 1])
    return codes.reshape(packed.shape[0], -1)


def unpack_int4_along_out(packed: np.ndarray) -> np.ndarray:
    """uint8 [out / 2, in] -> int8 [out, in] of -8..7 (ModelOpt's AWQ).

    Byte [r, c] holds row 2r in its low nibble and row 2r + 1 in its high one, as two's complement.
    """
    codes = np.stack([packed & 15, packed >> 4], axis=1).reshape(-1, packed.shape[1])
    return ((codes ^ 8).astype(np.int8) - 8).astype(np.int8)


def unpack_int32(packed: np.ndarray, bits: int, columns: int) -> np.ndarray:
    """int32 [rows, ceil(columns * bits / 32)] -> int8 [rows, columns], for 4 or 8 bits.

    The first value is in the lowest bits, and is stored with an offset of 2 ** (bits - 1).
    """
    data = np.ascontiguousarray(packed, "<i4").view(np.uint8)
    codes = unpack_nibbles(data) if bits == 4 else data
    return (codes[:, :columns].astype(np.int16) - (1 << (bits - 1))).astype(np.int8)
