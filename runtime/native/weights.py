"""The packed weights of a program: one safetensors file, read into memory once."""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from llmc.runtime.bundle.strict_json import DAMAGED
from llmc.runtime.cpus import available_cpus
from llmc.runtime.errors import BundleError
from llmc.runtime.memory import allocate
from llmc.runtime.native.program import Program

WEIGHTS = "weights/packed.safetensors"  # beside the program
# The same for one of several ranks, for some of them (such as 0+4-7), and for all.
RANK_WEIGHTS, SHARED_WEIGHTS = "weights/packed.rank{}.safetensors", "weights/packed.shared.safetensors"
_SOME_WEIGHTS = "weights/packed.ranks{}.safetensors"
_SOME = re.compile(r"weights/packed\.ranks([0-9+-]+)\.safetensors")
_MAX_HEADER = 64 << 20
_MAX_THREADS = 8
_PAGE = 2 << 20  # bytes of a huge page


class WeightsFile:
    """A weights file that threads read into memory while other parts of an engine are loaded.

    The memory is in huge pages where the system has them, because a step reads all of it.
    Raises OSError, and BundleError for a damaged header.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        with path.open("rb") as file:
            size = file.seek(0, 2)
            file.seek(0)
            length = int.from_bytes(file.read(8), "little")
            if not 2 <= length <= min(_MAX_HEADER, size - 8):
                raise BundleError(f"{path.name}: its header is damaged")
            self._begin = 8 + length
            try:
                header = json.loads(file.read(length))
                self._spans = {
                    name: _span(entry) for name, entry in header.items() if not name.startswith("__")
                }
            except (ValueError, TypeError, KeyError, RecursionError, AttributeError) as error:
                raise BundleError(f"{path.name}: its header is damaged") from error
        self._size = size - self._begin
        self._memory = allocate(self._size + 64)  # the last vector may be read past its end
        self._error: OSError | BundleError | None = None
        readers = min(_MAX_THREADS, available_cpus())
        part = -(-self._size // (readers * _PAGE)) * _PAGE
        self._threads = [
            threading.Thread(target=self._read, args=(first, min(first + part, self._size)), daemon=True)
            for first in range(0, self._size, part or 1)
        ]
        for thread in self._threads:
            thread.start()

    @property
    def names(self) -> Collection[str]:
        """The names of the tensors in the file."""
        return self._spans.keys()

    def arrays(self, program: Program) -> tuple[Mapping[str, np.ndarray], object]:
        """Return the matrices (uint8, packed) and constants (fp32) of `program`, when they are read.

        Returns name -> array, and the memory, which must live as long as the arrays.
        Raises BundleError for a file that cannot be read, is damaged, or does not fit the program.
        """
        data = np.frombuffer(self._memory, np.uint8, self._size)
        arrays: dict[str, np.ndarray] = {}
        for name, matrix in program.matrices.items():
            arrays[name] = self._take(data, name, "U8", matrix.nbytes)
        for name, elements in program.constants.items():
            arrays[name] = self._take(data, name, "F32", elements * 4).view(np.float32)
        for thread in self._threads:
            thread.join()
        if isinstance(self._error, OSError):
            raise _unreadable(self._path, self._error) from self._error
        if self._error is not None:
            raise self._error
        return arrays, self._memory

    def _read(self, first: int, last: int) -> None:
        """Read some bytes. It takes few calls, as this thread gets Python's lock only between them."""
        try:
            with self._path.open("rb", buffering=0) as file:
                file.seek(self._begin + first)
                while first < last:
                    count = file.readinto(memoryview(self._memory)[first:last])
                    if not count:
                        raise BundleError(f"{self._path.name}: the file became shorter while it was read")
                    first += count
        except (OSError, BundleError) as error:
            self._error = error

    def _take(self, data: np.ndarray, name: str, dtype: str, nbytes: int) -> np.ndarray:
        actual_dtype, first, last = self._spans.get(name, ("", 0, 0))
        if (
            actual_dtype != dtype
            or last - first != nbytes
            or not 0 <= first <= last <= len(data)
            or first % 64
        ):
            raise BundleError(
                f"{self._path.name}: {name} is missing, misplaced or of another size than in the program",
                DAMAGED,
            )
        return data[first:last]


class RankWeights:
    """The weights of one of several ranks: its own, and those that several have."""

    def __init__(self, own: WeightsFile, shared: Sequence[WeightsFile]) -> None:
        self._own, self._shared = own, shared

    def arrays(self, program: Program) -> tuple[Mapping[str, np.ndarray], object]:
        """Return the arrays of all files. See `WeightsFile.arrays`."""
        arrays: dict[str, np.ndarray] = {}
        memories = []
        holder = {name: file for file in self._shared for name in file.names}
        for file in (self._own, *self._shared):
            part = replace(
                program,
                matrices={n: m for n, m in program.matrices.items() if holder.get(n, self._own) is file},
                constants={n: c for n, c in program.constants.items() if holder.get(n, self._own) is file},
            )
            found, memory = file.arrays(part)
            arrays.update(found)
            memories.append(memory)
        return arrays, memories


Weights = WeightsFile | RankWeights


def start_reading(program: Path, rank: int | None = None) -> Weights:
    """Start to read the weights of the program in the file `program`. Raises BundleError.

    rank: of several ranks; None: it is the only one
    """
    if rank is None:
        return _start(program.parent / WEIGHTS)
    own = _start(program.parent / RANK_WEIGHTS.format(rank))
    directory = Path(SHARED_WEIGHTS).parent
    names = [
        f"{directory}/{path.name}" for path in sorted((program.parent / directory).glob("packed.ranks*"))
    ]
    some = [program.parent / name for name in names if is_of(name, rank)]
    return RankWeights(own, [_start(path) for path in (*some, program.parent / SHARED_WEIGHTS)])


def weights_file(ranks: Sequence[int], size: int) -> str:
    """Return the name of the weights file for some, ascending, of `size` ranks."""
    if len(ranks) == 1:
        return RANK_WEIGHTS.format(ranks[0])
    if len(ranks) == size:
        return SHARED_WEIGHTS
    runs: list[list[int]] = []
    for rank in ranks:
        if runs and runs[-1][1] == rank - 1:
            runs[-1][1] = rank
        else:
            runs.append([rank, rank])
    return _SOME_WEIGHTS.format("+".join(f"{a}-{b}" if a < b else f"{a}" for a, b in runs))


def is_of(name: str, rank: int) -> bool:
    """Return whether a rank, but not all ranks, has what is in the weights file `name`."""
    if not (match := _SOME.fullmatch(name)):
        return name == RANK_WEIGHTS.format(rank)
    for run in match[1].split("+"):
        first, _, last = run.partition("-")
        if first.isdigit() and (last or first).isdigit() and int(first) <= rank <= int(last or first):
            return True
    return False


def _start(path: Path) -> WeightsFile:
    try:
        return WeightsFile(path)
    except OSError as error:
        raise _unreadable(path, error) from error


def _unreadable(path: Path, error: OSError) -> BundleError:
    hint = DAMAGED if isinstance(error, FileNotFoundError) else ""
    return BundleError(f"cannot read weights/{path.name}: {error.strerror or error}", hint)


def _span(entry: Mapping[str, Any]) -> tuple[str, int, int]:
    dtype = entry["dtype"]
    first, last = entry["data_offsets"]
    if not isinstance(dtype, str) or type(first) is not int or type(last) is not int:
        raise ValueError("an entry of the header is malformed")
    return dtype, first, last
