"""The packed weights of a program: one safetensors file, read into memory once."""

from __future__ import annotations

import json
import mmap
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from llmc.runtime.errors import BundleError
from llmc.runtime.native.program import Program

_MAX_HEADER = 64 << 20


def read_weights(path: Path, program: Program) -> tuple[Mapping[str, np.ndarray], object]:
    """Read the matrices (uint8, packed) and constants (fp32) of `program`.

    The memory is in huge pages where the system has them, because a step reads all of it.
    Returns name -> array, and the memory, which must live as long as the arrays.
    Raises BundleError for a file that is damaged or does not fit the program.
    """
    with path.open("rb") as file:
        size = file.seek(0, 2)
        file.seek(0)
        length = int.from_bytes(file.read(8), "little")
        if not 2 <= length <= min(_MAX_HEADER, size - 8):
            raise BundleError(f"{path.name}: its header is damaged")
        begin = 8 + length
        try:
            header = json.loads(file.read(length))
            spans = {name: _span(entry) for name, entry in header.items() if not name.startswith("__")}
        except (ValueError, TypeError, KeyError, RecursionError, AttributeError) as error:
            raise BundleError(f"{path.name}: its header is damaged") from error
        memory = mmap.mmap(-1, size - begin + 64)  # the last vector may be read past its end
        if hasattr(mmap, "MADV_HUGEPAGE"):
            memory.madvise(mmap.MADV_HUGEPAGE)
        view = memoryview(memory)[: size - begin]
        position = 0
        while position < size - begin:
            count = file.readinto(view[position:])
            if not count:
                raise BundleError(f"{path.name}: the file became shorter while it was read")
            position += count
    data = np.frombuffer(memory, np.uint8, size - begin)
    arrays: dict[str, np.ndarray] = {}
    for name, matrix in program.matrices.items():
        arrays[name] = _take(path, data, spans, name, "U8", matrix.nbytes)
    for name, elements in program.constants.items():
        arrays[name] = _take(path, data, spans, name, "F32", elements * 4).view(np.float32)
    return arrays, memory


def _span(entry: Mapping[str, Any]) -> tuple[str, int, int]:
    dtype = entry["dtype"]
    first, last = entry["data_offsets"]
    if not isinstance(dtype, str) or type(first) is not int or type(last) is not int:
        raise ValueError("an entry of the header is malformed")
    return dtype, first, last


def _take(
    path: Path,
    data: np.ndarray,
    spans: Mapping[str, tuple[str, int, int]],
    name: str,
    dtype: str,
    nbytes: int,
) -> np.ndarray:
    actual_dtype, first, last = spans.get(name, ("", 0, 0))
    if actual_dtype != dtype or last - first != nbytes or not 0 <= first <= last <= len(data) or first % 64:
        raise BundleError(f"{path.name}: {name} is missing, misplaced or of another size than in the program")
    return data[first:last]
