"""Stream tensors into a safetensors file, in one pass with bounded memory, and hash it.

Every tensor starts at a multiple of 64 bytes (a cache line, and the widest vector load), so that an
engine can memory-map the file and use it in place. safetensors allows no holes, so a gap of up to 63 bytes
is itself a U8 tensor of zeros called `__pad_N`, where N is its offset. Sorting by size was rejected: it does
not align the tensors after the first odd size, and it loses the caller's order, in which the engine reads.
Nearly all weight matrices are multiples of 64 bytes, so most files have no padding.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from llmc.compiler.checkpoint.safetensors import MAX_HEADER_BYTES
from llmc.runtime.dtypes import DTYPES
from llmc.runtime.errors import BuildError

if TYPE_CHECKING:
    from typing_extensions import Buffer

ALIGNMENT = 64
MAX_CHUNK_BYTES = 64 * 2**20
_PAD = "__pad_"

TensorEntry = tuple[str, str, Sequence[int]]  # name, safetensors dtype, shape
Span = tuple[int, int]  # offset from the start of the file, bytes


def write_safetensors(
    path: Path,
    entries: Iterable[TensorEntry],
    producer: Callable[[str], Iterable[Buffer]],
    *,
    alignment: int = ALIGNMENT,
    metadata: Mapping[str, str] | None = None,
) -> tuple[str, int, dict[str, Span]]:
    """Write the tensors `entries` to the new file `path`, in order.

    producer: returns the little-endian bytes of the tensor with a given name, in any number of C-contiguous
        buffers. It is called once per entry, in order, and its buffers are not kept. (An `ml_dtypes`
        array is not a plain buffer: pass `array.view(numpy.uint8)`.)
    alignment: the alignment of each tensor in bytes; 1 writes no padding between tensors
    metadata: the header's `__metadata__`

    Returns the file's SHA-256, its size, and the span of each tensor, as ONNX external data wants it.
    Raises BuildError if the entries do not make a valid file, or if a producer yields too many or too few
    bytes; OSError if writing fails.
    """
    tensors = list(entries)
    header, sizes = _header(tensors, alignment, metadata)
    digest, spans, position = hashlib.sha256(), {}, len(header)
    with open(path, "xb", buffering=0) as file:
        _write(file, digest, header)
        for name, _, _ in tensors:
            pad = -position % alignment
            _write(file, digest, bytes(pad))
            spans[name] = (position + pad, sizes[name])
            position += pad + sizes[name]
            _write_tensor(file, digest, name, sizes[name], producer(name))
    return digest.hexdigest(), position, spans


def write_sparse_safetensors(
    path: Path, entries: Iterable[TensorEntry], metadata: Mapping[str, str] | None = None
) -> None:
    """Write a file whose tensors are all zeros, which take no space on the disk.

    Raises BuildError if the entries do not make a valid file; OSError if writing fails.
    """
    header, sizes = _header(list(entries), 1, metadata)
    with open(path, "xb") as file:
        file.write(header)
        file.truncate(len(header) + sum(sizes.values()))


def _header(
    tensors: list[TensorEntry], alignment: int, metadata: Mapping[str, str] | None
) -> tuple[bytes, dict[str, int]]:
    """Return the header, with its length prefix and padded with spaces, and the size of each tensor."""
    layout: dict[str, Mapping[str, object]] = {"__metadata__": metadata} if metadata else {}
    sizes: dict[str, int] = {}
    end = 0

    def place(name: str, dtype: str, shape: Sequence[int], nbytes: int) -> None:
        nonlocal end
        layout[name] = {
            "dtype": dtype,
            "shape": [int(size) for size in shape],
            "data_offsets": [end, end + nbytes],
        }
        end += nbytes

    for name, dtype, shape in tensors:
        if name in sizes or name.startswith(_PAD) or name in ("", "__metadata__"):
            raise BuildError(f"tensor {name!r}: the name is {'used twice' if name in sizes else 'reserved'}")
        sizes[name] = _nbytes(name, dtype, shape)
        if pad := -end % alignment:
            place(f"{_PAD}{end}", "U8", [pad], pad)
        place(name, dtype, shape, sizes[name])
    text = json.dumps(layout, separators=(",", ":")).encode("ascii")
    text += b" " * (-(8 + len(text)) % max(8, alignment))
    if len(text) > MAX_HEADER_BYTES:
        hint = "spread the tensors over several files"
        raise BuildError(
            f"{len(sizes)} tensors need a safetensors header over {MAX_HEADER_BYTES} bytes", hint
        )
    return len(text).to_bytes(8, "little") + text, sizes


def _nbytes(name: str, dtype: str, shape: Sequence[int]) -> int:
    if dtype not in DTYPES:
        raise BuildError(f"tensor {name!r}: dtype {dtype!r} is none of {', '.join(DTYPES)}")
    if any(size < 0 for size in shape):
        raise BuildError(f"tensor {name!r}: negative size in shape {list(shape)}")
    nbits = math.prod(shape) * DTYPES[dtype].bits
    if nbits % 8:
        raise BuildError(f"tensor {name!r}: {dtype} {list(shape)} does not fill whole bytes")
    return nbits // 8


def _write_tensor(
    file: BinaryIO, digest: hashlib._Hash, name: str, nbytes: int, buffers: Iterable[Buffer]
) -> None:
    written = 0
    for buffer in buffers:
        view = memoryview(buffer)
        if not view.nbytes:
            continue
        written += view.nbytes
        if written > nbytes:
            break
        view = view.cast("B")
        for start in range(0, len(view), MAX_CHUNK_BYTES):
            _write(file, digest, view[start : start + MAX_CHUNK_BYTES])
    if written != nbytes:
        relation = "more than" if written > nbytes else f"{written} of"
        raise BuildError(f"tensor {name!r}: its producer yielded {relation} {nbytes} bytes")


def _write(file: BinaryIO, digest: hashlib._Hash, data: bytes | memoryview) -> None:
    digest.update(data)
    remaining = memoryview(data)
    while remaining:
        remaining = remaining[file.write(remaining) :]  # a write may be partial
