"""Loads compiled kernels into a CUDA context and launches them; the attention's by plans (`launch.plan`).

Through cuda-python's driver API: no toolkit, no compiler. Importing this needs no GPU.
"""

from __future__ import annotations

import ctypes
import math
import struct
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from cuda.bindings import driver

from llmc.plugins.paged_attention import launch
from llmc.plugins.paged_attention.launch import ARGUMENTS, Attention, Launch, Plan

_ALIGNMENT = 16  # bytes; the kernels are compiled for tensors that begin at multiples of it
_DEFAULT_SHARED = 48 << 10  # dynamic shared memory that needs no permission (CUDA C++ programming guide)
_PACKED = {"i32": "i4x", "fp32": "f4x"}  # every argument in 8 bytes of its own; others are pointers


class CudaError(RuntimeError):
    """A CUDA call failed. The message names the call and says what the driver says."""


def call(function: Callable[..., tuple[Any, ...]], *arguments: Any) -> Any:
    """Calls a function of `cuda.bindings.driver`; returns its result, a tuple of several, None for none.

    Raises CudaError if the call fails, or if this machine has no NVIDIA driver.
    """
    name = getattr(function, "__name__", str(function))
    try:
        status, *results = function(*arguments)
    except RuntimeError as error:  # cuda-python finds no libcuda, or not this function in it
        raise CudaError(f"{name}: {str(error).splitlines()[0]}") from error
    if status != driver.CUresult.CUDA_SUCCESS:
        words = [text(status)[1] for text in (driver.cuGetErrorName, driver.cuGetErrorString)]
        said = ": ".join(word.decode() for word in words if word)
        raise CudaError(f"{name} failed: {said or f'error {int(status)}'}")
    return tuple(results) if len(results) > 1 else results[0] if results else None


@dataclass(frozen=True)
class KernelImage:
    """A compiled kernel. variant: its name, for attention `str` of a `launch.Variant`; image: a cubin, or PTX
    as text."""

    variant: str
    entry: str
    image: bytes
    shared_memory: int
    num_warps: int


class _Kernel:
    """A loaded kernel and a place for its arguments, which the driver copies at every launch."""

    def __init__(self, image: KernelImage, arguments: Mapping[str, str]) -> None:
        self._names = tuple(arguments)
        types = [*arguments.values(), "*scratch", "*scratch"]  # both null
        self.module = call(driver.cuModuleLoadData, image.image + b"\0")  # PTX ends with a zero
        self._function = call(driver.cuModuleGetFunction, self.module, image.entry.encode())
        call(driver.cuFuncLoad, self._function)  # else the first launch loads it, perhaps in a capture
        if image.shared_memory > _DEFAULT_SHARED:
            attribute = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
            call(driver.cuFuncSetAttribute, self._function, attribute, image.shared_memory)
        self._threads, self._shared = 32 * image.num_warps, image.shared_memory
        self._format = struct.Struct("=" + "".join(_PACKED.get(type_, "Q") for type_ in types))
        self._values = ctypes.create_string_buffer(self._format.size)
        first = ctypes.addressof(self._values)
        self._pointers = (ctypes.c_void_p * len(types))(*range(first, first + self._format.size, 8))

    def launch(self, grid: tuple[int, int, int], arguments: Mapping[str, float], stream: int) -> None:
        self._format.pack_into(self._values, 0, *(arguments[name] for name in self._names), 0, 0)
        pointers = ctypes.addressof(self._pointers)
        threads, shared = (self._threads, 1, 1), self._shared
        call(driver.cuLaunchKernel, self._function, *grid, *threads, shared, stream, pointers, 0)


class Kernels:
    """Kernels by variant, in the CUDA context that was current when they were loaded."""

    def __init__(
        self, images: Iterable[KernelImage], arguments: Mapping[str, Mapping[str, str]] = ARGUMENTS
    ) -> None:
        """arguments: kernel -> its run-time arguments and their types, as `launch.ARGUMENTS`; a variant's
        name begins with its kernel's. Raises CudaError for an image that the driver refuses; then none stays
        loaded."""
        self._kernels: dict[str, _Kernel] = {}
        try:
            for image in images:
                self._kernels[image.variant] = _Kernel(image, arguments[image.variant.split("-")[0]])
        except BaseException:
            self.close()
            raise

    def launch(self, what: Launch, arguments: Mapping[str, float], stream: int) -> None:
        """Puts one launch of a plan on `stream`: see `put`."""
        self.put(str(what.variant), what.grid, arguments, stream)

    def put(
        self, variant: str, grid: tuple[int, int, int], arguments: Mapping[str, float], stream: int
    ) -> None:
        """Puts one kernel on `stream` (a CUstream's number). `arguments` by name, more than it takes perhaps:
        pointers are addresses on the device. Raises CudaError."""
        kernel = self._kernels.get(variant)
        if kernel is None:
            raise CudaError(f"the bundle has no kernel {variant}: build it again")
        kernel.launch(grid, arguments, stream)

    def close(self) -> None:
        while self._kernels:
            call(driver.cuModuleUnload, self._kernels.popitem()[1].module)


def scratch_layout(plan: Plan) -> tuple[dict[str, int], int]:
    """Where a plan's scratch tensors lie behind each other: offset by name, and bytes in all."""
    offsets, end = {}, 0
    for name, shape in plan.scratch.items():
        offsets[name] = end
        end += -(-4 * math.prod(shape) // _ALIGNMENT) * _ALIGNMENT
    return offsets, end


class AttentionLauncher:
    """Launches the attention of every layer of a step, in the order in which TensorRT comes to them.

    All layers share one piece of scratch memory: they run one after the other, each needs the one before.
    """

    def __init__(
        self, kernels: Kernels, sm: int, multiprocessors: int, scratch: int, scratch_bytes: int
    ) -> None:
        """sm: what the kernels were compiled for, which decides their tiles; it may be older than the GPU.
        scratch, scratch_bytes: device memory for splits of long contexts; with less there are fewer."""
        self._kernels, self._sm, self._multiprocessors = kernels, sm, multiprocessors
        self._scratch, self._scratch_bytes = scratch, scratch_bytes
        self._lengths: tuple[np.ndarray, np.ndarray] | None = None
        self._plans: dict[tuple[Attention, str, str | None], Plan] = {}

    def begin(self, query_start: np.ndarray, past_lengths: np.ndarray) -> None:
        """The step's lengths on the host, int32 [S+1] and [S]: launches follow from them until the next step.

        For a CUDA graph give those of the largest step it shall serve: S sequences of one new token and the
        longest past. Grids and splits then cover every step of these shapes.
        """
        self._lengths = (query_start, past_lengths)
        self._plans.clear()

    def launch(
        self, attention: Attention, dtype: str, scale: float, tensors: Mapping[str, int], tokens: int,
        sequences: int, stream: int, kv_scales: tuple[float, float] | None = None,
    ) -> None:  # fmt: skip
        """One layer. `tensors`: argument name -> device address, of the operator's inputs and its `output`;
        tokens, sequences: the rows of `query` and of `past_lengths`, which may include padding; kv_scales:
        of an FP8 cache's keys and values, None for a cache in the model's dtype.

        Raises CudaError; ValueError for tensors that do not fit the step or the kernels.
        """
        if self._lengths is None:
            raise ValueError("attention before the first step")
        query_start, past_lengths = self._lengths
        if sequences != len(past_lengths) or tokens < query_start[-1]:
            raise ValueError(
                f"a step of {query_start[-1]} tokens, {len(past_lengths)} sequences does not fit tensors of "
                f"{tokens} and {sequences}"
            )
        if misaligned := [name for name, address in tensors.items() if address % _ALIGNMENT]:
            raise ValueError(f"{misaligned[0]} does not begin at a multiple of {_ALIGNMENT} bytes")
        kind = (attention, dtype, launch.FP8 if kv_scales else None)
        plan = self._plans.get(kind)
        if plan is None:
            plan = self._plans[kind] = self._plan(*kind)
        key_scale, value_scale = kv_scales or (1.0, 1.0)
        arguments: dict[str, float] = {"sinks": 0, "partial_sums": 0, "partial_top": 0, "partial_total": 0}
        arguments |= {name: self._scratch + at for name, at in scratch_layout(plan)[0].items()}
        arguments |= {
            "num_sequences": sequences,
            "num_splits": plan.num_splits,
            "k_scale": key_scale,
            "v_scale": value_scale,
        }
        arguments |= {"scale": scale, "softcap": attention.softcap, "window": attention.window, **tensors}
        for one in plan.launches:
            self._kernels.launch(one, arguments, stream)

    def _plan(self, attention: Attention, dtype: str, kv_dtype: str | None) -> Plan:
        """The plan whose scratch fits: a step of many short prompts and a long decode would want much."""
        assert self._lengths is not None
        start, past = self._lengths
        make = partial(launch.plan, sm=self._sm, multiprocessors=self._multiprocessors)
        plan = make(attention, dtype, kv_dtype, start, past)
        needed = scratch_layout(plan)[1]
        if needed > self._scratch_bytes:
            padding = 3 * _ALIGNMENT * plan.num_splits
            fewer = max(1, plan.num_splits * self._scratch_bytes // (needed + padding))
            plan = make(attention, dtype, kv_dtype, start, past, num_splits=fewer)
        return plan
