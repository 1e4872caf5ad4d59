"""The weights of a bundle for the native engine, read as docs/reference/program.md describes their tiles."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import ml_dtypes
import numpy as np

from llmc.compiler.checkpoint.safetensors import read_header
from llmc.runtime.native.program import Matrix, Program

_FLOATS = {"fp32": np.float32, "fp16": np.float16, "bf16": ml_dtypes.bfloat16}
_SCALES = {"fp16": np.float16, "fp32": np.float32}


@dataclass(frozen=True)
class Unpacked:
    """A matrix of the program: numbers, or codes with scales."""

    element: str
    #: [rows, columns]: floats, or int8 codes.
    values: np.ndarray
    #: [rows, blocks], or None for floats.
    scales: np.ndarray | None = None

    @property
    def exact(self) -> np.ndarray:
        """The matrix in fp64."""
        wide = self.values.astype(np.float64)
        if self.scales is None:
            return wide
        return wide * np.repeat(self.scales.astype(np.float64), wide.shape[1] // self.scales.shape[1], axis=1)


def read_program(bundle: Path) -> Program:
    return Program.from_json((bundle / "rank0.program.json").read_bytes())


def read_packed(bundle: Path) -> tuple[dict[str, Unpacked], dict[str, np.ndarray]]:
    """Return the matrices and the constants of a bundle's program."""
    program = read_program(bundle)
    header = read_header(bundle / "weights/packed.safetensors")
    stored = {name: ref.read() for name, ref in header.items() if not name.startswith("__pad_")}
    assert stored.keys() == program.matrices.keys() | program.constants.keys()
    matrices = {name: unpack(matrix, stored[name]) for name, matrix in program.matrices.items()}
    return matrices, {name: stored[name] for name in program.constants}


def unpack(matrix: Matrix, packed: np.ndarray) -> Unpacked:
    """Return a matrix from its tiles of 32 rows, uint8 and flat. Missing rows of the last tile must be 0."""
    tiles, columns = -(-matrix.rows // 32), matrix.columns
    if matrix.element in _FLOATS:
        values = packed.view(_FLOATS[matrix.element]).reshape(tiles, columns, 32).transpose(0, 2, 1)
        return Unpacked(matrix.element, _rows(matrix, values))
    blocks = columns // matrix.block
    parts = packed.reshape(tiles, blocks, -1)  # the scales of 32 rows, then their codes
    dtype = np.dtype(_SCALES[matrix.scales])
    head = 32 * dtype.itemsize
    scales = np.ascontiguousarray(parts[..., :head]).view(dtype)  # [tiles, blocks, 32]
    codes = parts[..., head:]
    if matrix.element == "fp8":
        values = np.ascontiguousarray(codes).view(ml_dtypes.float8_e4m3fn)
        values = values.reshape(tiles, columns, 32).transpose(0, 2, 1)
    else:
        lanes = codes.reshape(tiles, blocks, -1, 32, 4)
        if matrix.element != "int8":
            lanes = np.concatenate([lanes & 15, lanes >> 4], axis=-1)
        if matrix.element == "fp4":  # the scales are those of twice the values
            values = lanes.view(ml_dtypes.float4_e2m1fn).astype(np.float32) * 2
        else:
            values = lanes.astype(np.int16) - (8 if matrix.element == "int4" else 128)
        values = values.astype(np.int8).transpose(0, 3, 1, 2, 4)
    return Unpacked(matrix.element, _rows(matrix, values), _rows(matrix, scales.transpose(0, 2, 1)))


def _rows(matrix: Matrix, tiles: np.ndarray) -> np.ndarray:
    """Return the rows of an array [tiles, 32, ...] as [rows, columns]."""
    rows = tiles.reshape(len(tiles) * 32, -1)
    assert not rows[matrix.rows :].astype(np.float32).any()
    return rows[: matrix.rows]
