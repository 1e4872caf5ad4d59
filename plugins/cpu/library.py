"""The compiled CPU engine: the choice of a library for this CPU, and the structures of program.h."""

from __future__ import annotations

import ctypes
import os
import platform
from functools import cache
from pathlib import Path

VERSION = 12
LIBRARIES = Path(__file__).parent / "lib"
COUNTER = 16  # int32 elements per counter: each group's counter has a cache line

# Library -> the flags that /proc/cpuinfo must list, the best first.
_AVX512VNNI = {"avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl", "avx512_vnni", "fma", "f16c"}
_NEEDS = {
    "x86_64-amx": _AVX512VNNI | {"gfni", "amx_tile", "amx_int8"},
    "x86_64-avx512vnni": _AVX512VNNI,
    "x86_64-avxvnni": {"avx2", "fma", "f16c", "bmi2", "avx_vnni"},
    "x86_64-avx2": {"avx2", "fma", "f16c", "bmi2"},
    "aarch64-i8mm": {"asimddp", "i8mm", "fphp", "asimdhp"},
    "aarch64-dotprod": {"asimddp", "fphp", "asimdhp"},
}

EMBED, GATHER, COPY, UNARY, BINARY, VECTOR, SCALAR, RMSNORM, LAYERNORM, ROPE, WRITE_KV = range(11)
GLU, ROUND, SLICE, SOFTMAX, SUM, TOP_K, SORTED_ROWS, SUM_CHOICES = range(11, 19)
EXPERT_BIAS, CLAMPED_SWIGLU, JOIN, GROUPED_TOP_K, QUANTIZE = range(19, 24)
LINEAR_INT, LINEAR_FLOAT, EXPERTS_INT, EXPERTS_FLOAT, SORT_ROWS = range(24, 29)
ATTENTION, ALL_REDUCE, ALL_GATHER = range(29, 32)
KINDS = {"fp32": 0, "fp16": 1, "bf16": 2, "fp8": 3}
CODES = {"int8": 0, "int4": 1, "fp4": 2}
CACHES = {"fp32": 0, "fp16": 1, "int8": 2}

# What a step ends with, as program.h has it.
FINISHED, PAUSED, STOPPED, DISAGREED = range(4)
NO_ITEM = -1
# What is wrong with a step, as check.c has it.
NO_FAULT, TOKEN_IDS, POSITIONS, BLOCKS, LOGIT_ROWS, CONTRADICTION = range(6)

_pointer = ctypes.c_void_p


class Instruction(ctypes.Structure):
    """`instruction` of program.h."""

    _fields_ = (
        ("op", ctypes.c_int32),
        ("per_logit", ctypes.c_int32),
        ("choices", ctypes.c_int32),
        *((name, _pointer) for name in ("out", "a", "b", "v", "v2", "w")),
        *((name, ctypes.c_int64) for name in ("out_stride", "a_stride", "b_stride")),
        *((name, _pointer) for name in ("q", "scales", "sums", "order", "keys", "values")),
        ("block_stride", ctypes.c_int64),
        ("n", ctypes.c_int32 * 8),
        ("x", ctypes.c_float * 2),
    )


class Group(ctypes.Structure):
    """`group` of program.h."""

    _fields_ = (("first", ctypes.c_int32), ("last", ctypes.c_int32))


class Call(ctypes.Structure):
    """`call` of program.h."""

    _fields_ = (
        *((name, ctypes.c_uint32) for name in ("operation", "number")),
        ("step", ctypes.c_uint64),
        *((name, ctypes.c_uint32) for name in ("rows", "width")),
    )


class Post(ctypes.Structure):
    """`post` of program.h."""

    _fields_ = (
        ("sent", ctypes.c_uint32),
        ("sleepers", ctypes.c_int32),
        ("calls", Call * 2),
        ("room", ctypes.c_uint8 * 72),
    )


class Exchange(ctypes.Structure):
    """`exchange` of program.h."""

    _fields_ = (
        *((name, ctypes.c_int32) for name in ("rank", "ranks")),
        *((name, _pointer) for name in ("posts", "slots")),
        ("capacity", ctypes.c_int64),
        ("slice", ctypes.c_int64 * 2),
        ("step", ctypes.c_uint64),
        ("number", ctypes.c_uint32),
        *((name, ctypes.c_int32) for name in ("turns", "stop")),
    )


class Position(ctypes.Structure):
    """`position` of program.h."""

    _fields_ = (("group", ctypes.c_int32), ("item", ctypes.c_int32))


class Step(ctypes.Structure):
    """`step` of program.h."""

    _fields_ = (
        *((name, ctypes.c_int32) for name in ("tokens", "sequences", "logits", "threads", "num_groups")),
        *(
            (name, _pointer)
            for name in (
                "input_ids",
                "position_ids",
                "query_start",
                "past_lengths",
                "block_indices",
                "block_begins",
                "logits_index",
                "code",
                "groups",
                "slot",
                "next",
                "done",
                "merged",
                "parts",
            )
        ),
        ("part_floats", ctypes.c_int64),
        ("times", _pointer),
        ("exchange", _pointer),
    )


def cpu_flags() -> set[str]:
    """Return the CPU's features, as /proc/cpuinfo names them. Empty if the system does not list them."""
    try:
        text = Path("/proc/cpuinfo").read_text("ascii", "replace")
    except OSError:
        return set()
    for line in text.splitlines():
        name, _, value = line.partition(":")
        if name.strip() in ("flags", "Features"):
            return set(value.split())
    return set()


def candidates() -> list[str]:
    """Return the libraries that this CPU can run, the best first, whether or not they were compiled."""
    flags, machine = cpu_flags(), platform.machine()
    return [name for name, needs in _NEEDS.items() if name.startswith(f"{machine}-") and needs <= flags]


def choose() -> str:
    """Return the best compiled library for this CPU. Raises OSError, saying why, if there is none."""
    names = candidates()
    if not names:
        raise OSError("it needs a CPU with AVX2, FMA and F16C, or with NEON dot products and fp16, on Linux")
    compiled = [name for name in names if (LIBRARIES / f"{name}.so").is_file()]
    if not compiled:
        raise OSError("this installation of llmc was built without a C compiler")
    return compiled[0]


@cache
def load(name: str | None = None) -> ctypes.CDLL:
    """Load the engine's library: `name`, or the best one for this CPU.

    Raises OSError if this CPU has no library, or if the library was not compiled or is of another version.
    """
    path = LIBRARIES / f"{name or choose()}.so"
    if not path.is_file():
        raise OSError(f"{path} was not compiled: run plugins/cpu/build.py")
    library = ctypes.CDLL(str(path))
    if error := library.llmc_prepare():
        raise OSError(error, f"the system does not allow what {path.name} needs: {os.strerror(error)}")
    library.llmc_check.argtypes = [ctypes.POINTER(Step), *[ctypes.c_int32] * 4]
    library.llmc_run.argtypes = [ctypes.POINTER(Step)]
    library.llmc_resume.argtypes = [ctypes.POINTER(Step), ctypes.POINTER(Position)]
    for measurement in (library.llmc_ticks, library.llmc_float_products, library.llmc_integer_products):
        measurement.restype = ctypes.c_int64
    library.llmc_float_products.argtypes = library.llmc_integer_products.argtypes = [ctypes.c_int64]
    library.llmc_read.argtypes = [_pointer, ctypes.c_int64]
    structures = (Instruction, Step, Exchange, Post)
    sizes = [getattr(library, f"llmc_{each.__name__.lower()}_bytes")() for each in structures]
    if [library.llmc_version(), *sizes] != [VERSION, *map(ctypes.sizeof, structures)]:
        raise OSError(f"{path.name} is of another version of llmc: install llmc again")
    return library
