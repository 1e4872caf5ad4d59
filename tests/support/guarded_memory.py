"""Memory between pages that nobody may touch: an access outside it ends the process."""

from __future__ import annotations

import ctypes
import dataclasses
import mmap
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import numpy as np

from llmc.runtime.batch import Batch
from llmc.runtime.native import executor
from llmc.runtime.native.plan import Plan
from llmc.runtime.native.program import Program

PAGE = mmap.PAGESIZE
_LINE = 64  # the engine reads whole vectors: an array of weights may be read up to a multiple of 64 bytes
_libc = ctypes.CDLL(None, use_errno=True)


def guarded(nbytes: int, at_end: bool = True) -> memoryview:
    """Return zeroed memory before (`at_end`) or after a page that cannot be touched."""
    pages = -(-nbytes // PAGE) * PAGE
    memory = mmap.mmap(-1, pages + 2 * PAGE)
    _protect(memory, 0)
    _protect(memory, PAGE + pages)
    begin = PAGE + (pages - nbytes if at_end else 0)
    return memoryview(memory)[begin : begin + nbytes]


def _protect(memory: mmap.mmap, begin: int) -> None:
    address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    if _libc.mprotect(ctypes.c_void_p(address + begin), PAGE, 0):
        raise OSError(ctypes.get_errno(), "mprotect")


def guarded_weights(weights: Mapping[str, np.ndarray], at_end: bool = True) -> dict[str, np.ndarray]:
    """Return the arrays, each in guarded memory of its own."""
    result = {}
    for name, array in weights.items():
        memory = guarded(-(-array.nbytes // _LINE) * _LINE, at_end)
        result[name] = np.frombuffer(memory, array.dtype, array.size)
        result[name][:] = array.reshape(-1)
    return result


def guarded_batch(batch: Batch, at_end: bool = True) -> Batch:
    """Return the step, each of its arrays in guarded memory of its own."""
    arrays = {}
    for field in dataclasses.fields(Batch):
        array = getattr(batch, field.name)
        if array.size:
            arrays[field.name] = np.frombuffer(guarded(array.nbytes, at_end), array.dtype).reshape(
                array.shape
            )
            arrays[field.name][:] = array
    return dataclasses.replace(batch, **arrays)


@contextmanager
def guarded_executors(max_tokens: int, at_end: bool = True) -> Iterator[None]:
    """Give every buffer, and the KV cache, of executors that are made inside guarded memory of its own.

    max_tokens: of the executors, a multiple of 64, so that buffers are whole pages.
    """
    assert max_tokens % 64 == 0
    make_plan, allocate = executor.plan, executor.allocate
    guards: list[int] = []  # the bytes where the pages between the buffers begin

    def plan(program: Program, digits: int) -> Plan:
        result = make_plan(program, digits)
        offset, unit = 0, PAGE // 64
        guards.clear()
        for place in [*result.buffers.values(), *result.digits.values()]:
            guards.append(offset * max_tokens)
            place.offset = offset + unit
            offset = -(-(place.offset + place.row_bytes) // unit) * unit
        guards.append(offset * max_tokens)
        result.row_bytes = offset + unit
        return result

    def memory(nbytes: int) -> memoryview:
        if not guards:  # the KV cache
            return guarded(-(-nbytes // _LINE) * _LINE, at_end)
        arena = mmap.mmap(-1, nbytes)
        for begin in guards:
            _protect(arena, begin)
        guards.clear()
        return memoryview(arena)

    executor.plan, executor.allocate = plan, memory  # type: ignore[assignment]
    try:
        yield
    finally:
        executor.plan, executor.allocate = make_plan, allocate
