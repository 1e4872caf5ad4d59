"""Pack the weights of a program into tiles for the native engine. `docs/reference/program.md` specifies them.

A tile holds 32 rows of a matrix. Each row is summed in a SIMD lane of its own, so no sum crosses lanes.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType

import numpy as np

from llmc.compiler.bundle_writer import BundleWriter
from llmc.compiler.checkpoint.safetensors import TensorRef
from llmc.compiler.targets.native.constants import MatrixSource, evaluate, leaves
from llmc.compiler.targets.native.lower import Lowered
from llmc.compiler.weights.safetensors_writer import TensorEntry, write_safetensors
from llmc.runtime.native.program import TILE, Matrix, Program
from llmc.runtime.native.weights import WEIGHTS

_ROWS = 32 * TILE  # that are packed together


def write_packed(
    lowered: Lowered,
    work: BundleWriter,
    on_bytes: Callable[[int], None] = lambda done: None,
    made: Mapping[str, TensorRef] = MappingProxyType({}),
    file: str = WEIGHTS,
    names: Container[str] | None = None,
) -> int:
    """Write the weights file and return its size in bytes. The graph's initializers must have their data.

    on_bytes: called with the number of bytes written so far
    made: the codes and scales that the build made, by the names of their initializers. Their files are
        removed as soon as their matrices are packed.
    file: the name of the weights file
    names: the matrices and constants that it holds. None: all.

    A matrix is written as a U8 vector of tiles, a constant as an F32 vector.
    """
    program = _restricted(lowered.program, names) if names is not None else lowered.program
    entries: list[TensorEntry] = [(name, "U8", (matrix.nbytes,)) for name, matrix in program.matrices.items()]
    entries += [(name, "F32", (size,)) for name, size in program.constants.items()]
    constants = {name: lowered.constants[name].read() for name in program.constants}
    used_up = _files_used_up(program, lowered, made)
    work.check_disk_space(_needed_space(program, used_up))
    sizes = {name: matrix.nbytes for name, matrix in program.matrices.items()}
    sizes |= {name: 4 * size for name, size in program.constants.items()}
    done = 0

    def parts() -> Iterator[np.ndarray]:
        for name, _, _ in entries:
            matrix = program.matrices.get(name)
            yield from [constants[name]] if matrix is None else pack(matrix, lowered.matrices[name])

    def produce(name: str) -> Iterator[memoryview]:
        nonlocal done
        end = done + sizes[name]
        while done < end:
            view = next(packed).view(np.uint8)
            done += view.nbytes
            yield view.data
            on_bytes(done)
        for file in used_up.get(name, ()):
            file.unlink()

    with ThreadPoolExecutor(1) as thread:
        packed = _ahead(parts(), thread)
        sha256, nbytes, _ = write_safetensors(work.path(file), entries, produce)
    work.add_hash(file, sha256, nbytes)
    return nbytes


def _restricted(program: Program, names: Container[str]) -> Program:
    """Return the program with the matrices and constants in `names` only."""
    matrices = {name: matrix for name, matrix in program.matrices.items() if name in names}
    constants = {name: size for name, size in program.constants.items() if name in names}
    return replace(program, matrices=matrices, constants=constants)


def _ahead(arrays: Iterator[np.ndarray], thread: ThreadPoolExecutor) -> Iterator[np.ndarray]:
    """Yield `arrays`. The next one is computed in `thread` while the caller uses the one before."""
    following = thread.submit(next, arrays, None)
    while (array := following.result()) is not None:
        following = thread.submit(next, arrays, None)
        yield array


def _files_used_up(
    program: Program, lowered: Lowered, made: Mapping[str, TensorRef]
) -> Mapping[str, list[Path]]:
    """Return name of a matrix -> the files that no later matrix reads."""
    last: dict[Path, str] = {}
    for name in program.matrices:
        source = lowered.matrices[name]
        for value in (source.codes, source.scales, source.dequantized):
            for leaf in leaves(value) if value is not None else ():
                if (ref := made.get(leaf)) is not None:
                    last[ref.file] = name
    result: dict[str, list[Path]] = {}
    for file, name in last.items():
        result.setdefault(name, []).append(file)
    return result


def _needed_space(program: Program, used_up: Mapping[str, list[Path]]) -> int:
    """Return the largest number of bytes by which the bundle grows while its matrices are packed."""
    largest = growth = 0
    for name, matrix in program.matrices.items():
        growth += matrix.nbytes
        largest = max(largest, growth)
        growth -= sum(file.stat().st_size for file in used_up.get(name, ()))
    return largest


def pack(matrix: Matrix, source: MatrixSource) -> Iterator[np.ndarray]:
    """Yield the tiles of a matrix, uint8, a few at a time, [matrix.nbytes] together."""
    scales = None
    if source.dequantized is not None:
        data = evaluate(source.dequantized).astype(np.float32, copy=False)
    else:
        data = evaluate(source.codes)
        data = (data.T if source.transposed else data)[source.skip :]
        if source.heads is not None:
            data = source.heads.take(data)
        if source.scales is not None:
            scales = evaluate(source.scales)
            scales = scales.reshape(-1, 1) if scales.ndim < 2 else scales
            scales = np.broadcast_to(scales, (matrix.rows, matrix.columns // matrix.block))
    for first in range(0, matrix.rows, _ROWS):
        rows = slice(first, first + _ROWS)
        yield _pack_rows(matrix, data[rows], None if scales is None else scales[rows])


def _pack_rows(matrix: Matrix, data: np.ndarray, scales: np.ndarray | None) -> np.ndarray:
    if scales is None:
        return pack_floats(data)
    if matrix.element == "fp8":
        return pack_fp8(data, scales.astype(np.float32))
    scales = scales.astype(np.float16 if matrix.scales == "fp16" else np.float32)
    if matrix.element == "fp4":
        return pack_integers(data.view(np.int8), scales / 2, matrix)  # the scales of twice the values
    return pack_integers(data.astype(np.int8), scales, matrix)


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

    codes: int8 [rows, columns]; of fp4 the bits of E2M1
    scales: fp16 or fp32 [rows, columns / block]

    For every tile and block of columns, the 32 scales come first, then the codes.
    """
    step, zero = {"int8": (4, 128), "int4": (8, 8), "fp4": (8, 0)}[matrix.element]
    unsigned = _whole_tiles((codes.astype(np.int16) + zero).astype(np.uint8), zero)
    tiles, _, columns = unsigned.shape
    blocks = columns // matrix.block
    groups = unsigned.reshape(tiles, TILE, blocks, matrix.block // step, step)
    if step == 8:
        groups = groups[..., :4] | groups[..., 4:] << 4
    lanes = groups.transpose(0, 2, 3, 1, 4).reshape(tiles, blocks, -1)
    factors = np.ascontiguousarray(_whole_tiles(np.ascontiguousarray(scales)).transpose(0, 2, 1))
    head = factors.view(np.uint8).reshape(tiles, blocks, -1)
    return np.concatenate([head, lanes], axis=2).reshape(-1)


def _whole_tiles(array: np.ndarray, fill: int = 0) -> np.ndarray:
    """Return `array` [rows, columns] as [tiles, 32, columns]. The last tile is padded with `fill`."""
    rows, columns = array.shape
    tiles = -(-rows // TILE)
    if rows % TILE:
        array = np.concatenate([array, np.full((tiles * TILE - rows, columns), fill, array.dtype)])
    return array.reshape(tiles, TILE, columns)
