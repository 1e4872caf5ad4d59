"""Read safetensors files lazily: the header is checked in full, tensor data is read on request.

Format (https://github.com/huggingface/safetensors#format): 8 bytes, little-endian, the length N of
the header; N bytes of JSON, `{"name": {"dtype", "shape", "data_offsets": [begin, end]}, ...}` with
an optional `__metadata__` of strings, padded with spaces; then the data, little-endian and row-major.
`data_offsets` are relative to the start of the data. They must cover it without overlaps and gaps.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from llmc.runtime.dtypes import DTYPES, numpy_dtype
from llmc.runtime.errors import CheckpointError

MAX_HEADER_BYTES = 100_000_000  # the limit of the reference implementation
MAX_RANK = 32  # numpy 1 supports no more dimensions
CHUNK_BYTES = 16 << 20  # the default size of the blocks in which a tensor is read
LFS_MARK = b"version https://git-lfs"


@dataclass(frozen=True)
class TensorRef:
    """The location of one tensor on disk."""

    name: str
    file: Path
    #: The dtype by its name in safetensors, such as "BF16" or "F8_E4M3".
    dtype: str
    shape: tuple[int, ...]
    #: The position of the data in bytes, from the start of the file.
    offset: int
    #: The size of the data in bytes.
    nbytes: int

    def read(self, rows: slice | None = None) -> np.ndarray:
        """Read the tensor, or some rows of it.

        rows: a slice of the first axis, with step 1; by default all rows. Only these bytes are read.

        Returns BF16 and F8 as `ml_dtypes` types (bfloat16, float8_e4m3fn, ...), and F4 and F6 as packed
        uint8, whose last axis counts bytes.
        Raises CheckpointError if the file cannot be read or has become shorter.
        """
        bits = DTYPES[self.dtype].bits
        shape, begin, nbytes = self.shape, self.offset, self.nbytes
        if rows is not None:
            if not shape or rows.step not in (None, 1):
                raise ValueError(f"{self.name} of shape {list(shape)} has no rows {rows}")
            first, stop, _ = rows.indices(shape[0])
            row_bytes = nbytes // shape[0] if shape[0] else 0
            shape = (max(stop - first, 0), *shape[1:])
            begin, nbytes = begin + first * row_bytes, shape[0] * row_bytes
        if bits < 8:
            if not shape or (shape[-1] * bits) % 8:
                raise CheckpointError(
                    f"{self.file}: rows of {self.name!r} ({self.dtype}, shape {list(self.shape)}) "
                    "do not end on a byte",
                    hint="store it as packed U8",
                )
            shape = (*shape[:-1], shape[-1] * bits // 8)
        try:
            data = np.fromfile(self.file, dtype=np.uint8, count=nbytes, offset=begin)
        except OSError as error:
            raise CheckpointError(f"{self.file}: cannot read {self.name!r}: {error}") from error
        if data.size != nbytes:
            raise CheckpointError(
                f"{self.file}: {self.name!r} ends after {data.size} of {nbytes} bytes",
                hint="the file changed while it was read; download it again",
            )
        return data.view(numpy_dtype(self.dtype)).reshape(shape)

    def iter_chunks(self, max_bytes: int = CHUNK_BYTES) -> Iterator[np.ndarray]:
        """Yield consecutive blocks of rows, each of at most `max_bytes` (but at least one row)."""
        if not self.shape or not self.nbytes:
            yield self.read()
            return
        step = max(1, max_bytes * self.shape[0] // self.nbytes)
        for first in range(0, self.shape[0], step):
            yield self.read(slice(first, first + step))


@dataclass(frozen=True)
class StackedTensor(TensorRef):
    """Tensors on disk as one with a new first axis, as transformers makes it of a layer's experts.

    file, offset: those of the first part. nbytes: of all parts.
    """

    #: For each index of the first axis, tensors of one dtype that are concatenated along their rows.
    parts: tuple[tuple[TensorRef, ...], ...] = ()

    @classmethod
    def of(cls, name: str, parts: Sequence[Sequence[TensorRef]]) -> StackedTensor:
        """Stack `parts`, matrices. Raises CheckpointError if they differ in their shapes or dtypes."""
        first, refs = parts[0][0], [part for each in parts for part in each]
        shapes = {tuple(part.shape for part in each) for each in parts}
        columns = {part.shape[1:] for part in refs if len(part.shape) == 2}
        if len({part.dtype for part in refs}) > 1 or len(shapes) > 1 or len(columns) != 1:
            other = [*{(part.dtype, part.shape): part for part in refs}.values()][-1]
            raise CheckpointError(
                f"{first.name} is {first.dtype} {list(first.shape)} and {other.name} is {other.dtype} "
                f"{list(other.shape)}; they cannot be one tensor {name}",
                hint="the checkpoint is damaged or incomplete; download it again",
            )
        shape = (len(parts), sum(part.shape[0] for part in parts[0]), *columns.pop())
        nbytes = sum(part.nbytes for part in refs)
        whole = tuple(tuple(each) for each in parts)
        return cls(name, first.file, first.dtype, shape, first.offset, nbytes, whole)

    def read(self, rows: slice | None = None) -> np.ndarray:
        """Read the stack, or `rows` of its first axis. See `TensorRef.read`."""
        chosen = self.parts if rows is None else self.parts[rows]
        if not chosen:
            return np.empty((0, *self.shape[1:]), numpy_dtype(self.dtype))
        return np.stack([np.concatenate([part.read() for part in each]) for each in chosen])

    def iter_chunks(self, max_bytes: int = CHUNK_BYTES) -> Iterator[np.ndarray]:
        """Yield consecutive blocks of rows of the parts: of the stack with its first two axes as one."""
        for each in self.parts:
            for part in each:
                yield from part.iter_chunks(max_bytes)


@dataclass(frozen=True)
class TransposedTensor(TensorRef):
    """A stack of matrices whose rows are the columns of those on disk.

    shape: [stack, columns on disk, rows on disk]
    """

    stored: TensorRef | None = None

    @classmethod
    def of(cls, stored: TensorRef) -> TransposedTensor:
        """Transpose the matrices of `stored`, a tensor of three dimensions."""
        count, rows, columns = stored.shape
        shape = (count, columns, rows)
        return cls(stored.name, stored.file, stored.dtype, shape, stored.offset, stored.nbytes, stored)

    def read(self, rows: slice | None = None) -> np.ndarray:
        """Read the stack, or `rows` of its first axis. See `TensorRef.read`."""
        assert self.stored is not None
        return np.ascontiguousarray(self.stored.read(rows).swapaxes(1, 2))

    def iter_chunks(self, max_bytes: int = CHUNK_BYTES) -> Iterator[np.ndarray]:
        """Yield the matrices one by one: a matrix on disk is read as a whole."""
        del max_bytes
        for index in range(self.shape[0]):
            yield self.read(slice(index, index + 1))


def read_header(path: Path | str) -> dict[str, TensorRef]:
    """Return every tensor of one safetensors file, by name. Raises CheckpointError for anything malformed."""
    file = Path(path)
    try:
        size = file.stat().st_size
        with file.open("rb") as stream:
            head = stream.read(8)
            refuse_lfs_pointer(file, head + stream.read(len(LFS_MARK)))
            length = int.from_bytes(head, "little")
            if len(head) < 8 or length > size - 8:
                raise _damaged(file, f"{size} bytes cannot hold its header: truncated, or not safetensors")
            if length > MAX_HEADER_BYTES:
                raise _damaged(file, f"a header of {length} bytes is over the limit of {MAX_HEADER_BYTES}")
            stream.seek(8)
            text = stream.read(length)
    except OSError as error:
        raise CheckpointError(f"{file}: cannot be read: {error.strerror or error}") from error
    header = _parse(file, text)
    data_start = 8 + length
    refs = [
        _tensor(file, name, entry, data_start) for name, entry in header.items() if name != "__metadata__"
    ]
    position = data_start
    for ref in sorted(refs, key=lambda ref: (ref.offset, ref.nbytes)):
        if ref.offset != position:
            fault = "overlaps the tensor before it" if ref.offset < position else "leaves a hole before it"
            raise _damaged(file, f"tensor {ref.name!r} {fault}")
        position += ref.nbytes
        if position > size:
            over = position - size
            raise _damaged(file, f"truncated: tensor {ref.name!r} ends {over} bytes after the file does")
    if position != size:
        raise _damaged(file, f"{size - position} bytes follow the last tensor")
    return {ref.name: ref for ref in refs}


def refuse_lfs_pointer(file: Path, start: bytes) -> None:
    """Raise CheckpointError when `start`, the first bytes of `file`, are those of a git-LFS pointer."""
    if start.startswith(LFS_MARK):
        raise CheckpointError(
            f"{file} is a git-LFS pointer, not the file itself",
            hint="run `git lfs pull` in the checkpoint's directory",
        )


def _damaged(file: Path, fact: str) -> CheckpointError:
    return CheckpointError(f"{file}: {fact}", hint="the file is damaged; download or write it again")


def _parse(file: Path, text: bytes) -> dict[str, Any]:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        keys = dict(pairs)
        if len(keys) != len(pairs):
            twice = Counter(key for key, _ in pairs).most_common(1)[0][0]
            raise _damaged(file, f"the header has the key {twice!r} twice")
        for key in keys:
            key.encode()  # raises UnicodeEncodeError, a ValueError, for lone surrogates
        return keys

    try:
        header = json.loads(text.decode(), object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:
        raise _damaged(file, f"the header is not valid JSON ({str(error)[:80]})") from error
    if not isinstance(header, dict):
        raise _damaged(file, "the header is not a JSON object")
    metadata = header.get("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise _damaged(file, "__metadata__ is not a map of strings")
    return header


def _tensor(file: Path, name: str, entry: Any, data_start: int) -> TensorRef:
    if not isinstance(entry, dict) or not {"dtype", "shape", "data_offsets"} <= entry.keys():
        raise _damaged(file, f"tensor {name!r} lacks dtype, shape or data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise CheckpointError(
            f"{file}: tensor {name!r} has the unknown dtype {str(dtype)[:40]!r}",
            hint=f"known: {', '.join(DTYPES)}",
        )
    if not _naturals(shape) or not _naturals(offsets) or len(offsets) != 2 or len(shape) > MAX_RANK:
        raise _damaged(file, f"tensor {name!r} has a malformed shape or data_offsets")
    begin, end = offsets
    if begin > end:
        raise _damaged(file, f"tensor {name!r} ends at {end}, before it begins at {begin}")
    needed = math.prod(shape) * DTYPES[dtype].bits
    if needed != 8 * (end - begin) or math.prod(size or 1 for size in shape) >= 2**63:
        raise _damaged(file, f"tensor {name!r} has {end - begin} bytes, {dtype} {shape} needs {needed // 8}")
    return TensorRef(name, file, dtype, tuple(shape), data_start + begin, end - begin)


def _naturals(value: Any) -> bool:
    return isinstance(value, list) and all(type(item) is int and 0 <= item < 2**63 for item in value)
