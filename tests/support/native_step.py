"""Steps of the native engine as files, for `native_step.c`, which runs them on another instruction set."""

from __future__ import annotations

import ctypes
import struct
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from llmc.plugins.cpu import build, library
from llmc.runtime.batch import Batch
from llmc.runtime.native.executor import Executor
from support.native_programs import Built

_POINTERS = ("out", "a", "b", "v", "v2", "w", "q", "scales", "sums", "order", "keys", "values")
_HEADER = struct.Struct("6q")
_PAGE = 4096
SOURCE = Path(__file__).with_suffix(".c")


def compile_runner(name: str, folder: Path) -> Path:
    """Compile `native_step.c` with the engine for the library `name`, as one static program."""
    command = build.compiler(name, "musl")
    assert command is not None
    flags = ["-O3", "-std=gnu11", "-static", "-fno-math-errno", "-D__MM_MALLOC_H", f"-I{build.HERE}"]
    path = folder / name
    subprocess.run([*command, *flags, str(SOURCE), "-o", str(path)], check=True)
    return path


class _Recorder:
    """A library that copies the memory of each step before it runs the step."""

    def __init__(self, executor: Executor) -> None:
        self._executor, self._library = executor, executor.library
        self.llmc_check = self._library.llmc_check
        self.images: list[bytes] = []

    def llmc_run(self, step: Any) -> None:
        self.images.append(_image(self._executor, step._obj))
        self._library.llmc_run(step)


def recorded_steps(
    built: Built, steps: Sequence[Batch], **options: Any
) -> Iterator[tuple[bytes, np.ndarray]]:
    """Run steps on this machine. Yield the file of each, and its logits."""
    program, weights, _ = built
    executor = Executor(program, weights, max_tokens=64, num_blocks=12, threads=1, **options)
    recorder = _Recorder(executor)
    executor.library = recorder  # type: ignore[assignment]
    for batch in steps:
        logits = executor.run(batch).copy()
        yield recorder.images.pop(), logits
    executor.close()


def _image(executor: Executor, step: library.Step) -> bytes:
    image = bytearray(_PAGE)  # the header
    moved: list[tuple[int, int, int]] = []  # begin, end, and where it lies in the image

    def add(address: int, nbytes: int) -> int:
        place = len(image)
        image.extend(ctypes.string_at(address, nbytes))
        image.extend(bytes(-len(image) % _PAGE))
        moved.append((address, address + nbytes, place))
        return place

    def move(pointer: int | None) -> int:
        if not pointer:
            return 0
        return next(place + pointer - begin for begin, end, place in moved if begin <= pointer < end)

    for memory in (executor._arena, executor._cache):
        add(ctypes.addressof(ctypes.c_char.from_buffer(memory)), len(memory))
    for array in executor._weights.values():
        padded = np.zeros(-(-array.nbytes // 64) * 64 + 64, np.uint8)  # it may be read up to whole vectors
        padded[: array.nbytes] = array.view(np.uint8)
        moved.append((array.ctypes.data, array.ctypes.data + array.nbytes, len(image)))
        image.extend(padded.tobytes() + bytes(-padded.nbytes % _PAGE))
    lengths = {
        "input_ids": step.tokens,
        "position_ids": step.tokens,
        "query_start": step.sequences + 1,
        "past_lengths": step.sequences,
        "block_indices": 0,
        "block_begins": step.sequences + 1,
        "logits_index": step.logits,
        "slot": step.tokens,
        "next": step.num_groups * library.COUNTER,
        "done": step.num_groups * library.COUNTER,
        "merged": 0,  # one thread splits nothing
        "parts": 0,
    }
    begins = ctypes.cast(step.block_begins, ctypes.POINTER(ctypes.c_int32))
    lengths["block_indices"] = begins[step.sequences]
    copy = library.Step.from_buffer_copy(step)
    for name, length in lengths.items():
        setattr(copy, name, add(getattr(step, name), 4 * length) if length else 0)
    code = type(executor._code).from_buffer_copy(executor._code)
    for instruction in code:
        for name in _POINTERS:
            setattr(instruction, name, move(getattr(instruction, name)))
    copy.code = add(ctypes.addressof(code), ctypes.sizeof(code))
    copy.groups = add(step.groups, ctypes.sizeof(executor._groups))
    copy.times = 0
    place = add(ctypes.addressof(copy), ctypes.sizeof(copy))
    address, stride = executor._find(executor._program.logits, 0)
    image[: _HEADER.size] = _HEADER.pack(
        len(image), place, len(code), move(address), stride, executor._program.vocab_size
    )
    return bytes(image)
