"""Pack the weights of a program into tiles for the native engine. `docs/reference/program.md` specifies them.

A tile holds 32 rows of a matrix. Each row is summed in a SIMD lane of its own, so no sum crosses lanes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import onnx_ir as ir

from llmc.compiler.bundle_writer import BundleWriter
from llmc.compiler.targets.native.constants import MatrixSource, evaluate
from llmc.compiler.targets.native.lower import Lowered
from llmc.compiler.weights.safetensors_writer import TensorEntry, write_safetensors
from llmc.runtime.native.program import TILE, Matrix

PACKED_FILE = "weights/packed.safetensors"


def write_packed(lowered: Lowered, work: BundleWriter, on_bytes: Callable[[int], None]) -> int:
    """Write PACKED_FILE and return its size in bytes. The graph's initializers must have their data.

    on_bytes: called with the number of bytes written so far

    A matrix is written as a U8 vector of tiles, a constant as an F32 vector.
    """
    program = lowered.program
    entries: list[TensorEntry] = [(name, "U8", (matrix.nbytes,)) for name, matrix in program.matrices.items()]
    entries += [(name, "F32", (size,)) for name, size in program.constants.items()]
    work.check_disk_space(sum(matrix.nbytes for matrix in program.matrices.values()))
    done = 0

    def produce(name: str) -> Iterator[memoryview]:
        nonlocal done
        if name in program.matrices:
            data = pack(program.matrices[name], lowered.matrices[name])
        else:
            data = lowered.constants[name].read()
        view = data.view(np.uint8)
        done += view.nbytes
        yield view.data
        on_bytes(done)

    sha256, nbytes, _ = write_safetensors(work.path(PACKED_FILE), entries, produce)
    work.add_hash(PACKED_FILE, sha256, nbytes)
    return nbytes


def pack(matrix: Matrix, source: MatrixSource) -> np.ndarray:
    """Return the tiles of a matrix, uint8 [matrix.nbytes]."""
    if source.dequantized is not None:
        return pack_floats(evaluate(source.dequantized).astype(np.float32))
    data = evaluate(source.codes)
    if source.scales is None:
        return pack_floats((data.T if source.transposed else data)[source.skip :])
    scales = evaluate(source.scales)
    scales = np.broadcast_to(
        scales.reshape(-1, 1) if scales.ndim < 2 else scales, (matrix.rows, _blocks(matrix))
    )
    if matrix.element == "fp8":
        return pack_fp8(data, scales.astype(np.float32))
    if data.dtype == ir.DataType.FLOAT4E2M1.numpy():
        data, scales = data.astype(np.float32) * 2, scales.astype(np.float32) / 2
    dtype = np.float16 if matrix.scales == "fp16" else np.float32
    return pack_integers(data.astype(np.int8), scales.astype(dtype), matrix)


def pack_floats(data: np.ndarray) -> np.ndarray:
    """Return the tiles [tiles, columns, 32 rows] of a matrix as bytes, uint8 and flat.

    data: [rows, columns], in a dtype of 2 or 4 bytes. The last tile is padded with zeros.
    """
    data = np.ascontiguousarray(data)
    bits = data.view({2: np.uint16, 4: np.uint32}[data.dtype.itemsize])
    tiles = _whole_tiles(bits)
    return np.ascontiguousarray(tiles.transpose(0, 2, 1)).reshape(-1).view(np.uint8)


def pack_fp8(codes: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """Return the tiles of a matrix of E4M3 as bytes, uint8 and flat: 32 scales, then [columns, 32 rows].

    codes: float8_e4m3fn [rows, columns]
    scales: float32 [rows, 1]
    """
    tiles = _whole_tiles(np.ascontiguousarray(codes).view(np.uint8)).transpose(0, 2, 1)
    factors = np.ascontiguousarray(_whole_tiles(np.ascontiguousarray(scales))).view(np.uint8)
    return np.concatenate([factors.reshape(len(tiles), -1), tiles.reshape(len(tiles), -1)], axis=1).reshape(
        -1
    )


def pack_integers(codes: np.ndarray, scales: np.ndarray, matrix: Matrix) -> np.ndarray:
    """Return the tiles of a quantized matrix as bytes, uint8 and flat.

    codes: int8 [rows, columns]
    scales: fp16 or fp32 [rows, columns / block]

    For every tile and block of columns, the 32 scales come first, then the codes.
    """
    step, zero = (8, 8) if matrix.element == "int4" else (4, 128)
    unsigned = _whole_tiles((codes.astype(np.int16) + zero).astype(np.uint8), zero)
    tiles, _, columns = unsigned.shape
    blocks = columns // matrix.block
    groups = unsigned.reshape(tiles, TILE, blocks, matrix.block // step, step)
    if matrix.element == "int4":
        groups = groups[..., :4] | groups[..., 4:] << 4
    lanes = groups.transpose(0, 2, 3, 1, 4).reshape(tiles, blocks, -1)
    factors = np.ascontiguousarray(_whole_tiles(np.ascontiguousarray(scales)).transpose(0, 2, 1))
    head = factors.view(np.uint8).reshape(tiles, blocks, -1)
    return np.concatenate([head, lanes], axis=2).reshape(-1)


def _blocks(matrix: Matrix) -> int:
    return matrix.columns // matrix.block


def _whole_tiles(array: np.ndarray, fill: int = 0) -> np.ndarray:
    """Return `array` [rows, columns] as [tiles, 32, columns]. The last tile is padded with `fill`."""
    rows, columns = array.shape
    tiles = -(-rows // TILE)
    if rows % TILE:
        array = np.concatenate([array, np.full((tiles * TILE - rows, columns), fill, array.dtype)])
    return array.reshape(tiles, TILE, columns)
