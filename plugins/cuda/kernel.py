"""Load compiled kernels into the current CUDA context and launch them."""

from __future__ import annotations

import ctypes
import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from cuda.bindings import driver

from llmc.plugins.cuda.driver import CudaError, call

# Bytes of dynamic shared memory that a kernel gets without an attribute (CUDA C++ programming guide).
_DEFAULT_SHARED = 48 << 10
_PACKED = {"i32": "i4x", "fp32": "f4x"}  # each argument takes 8 bytes; other types are pointers


@dataclass(frozen=True)
class KernelImage:
    """A compiled kernel, as a bundle stores it."""

    #: The name in the bundle, which begins with the kernel's: "decode-bf16-h8x4d64".
    variant: str
    #: The name in the image.
    entry: str
    #: A cubin, or PTX as text.
    image: bytes
    #: Dynamic shared memory in bytes.
    shared_memory: int
    #: Warps per thread block.
    num_warps: int


class _Kernel:
    """A loaded kernel and a buffer for its arguments, which the driver copies at every launch."""

    def __init__(self, image: KernelImage, arguments: Mapping[str, str]) -> None:
        self._names = tuple(arguments)
        types = [*arguments.values(), "*scratch", "*scratch"]  # Triton's scratch buffers, both null
        self.module = call(driver.cuModuleLoadData, image.image + b"\0")  # PTX ends with a zero
        self._function = call(driver.cuModuleGetFunction, self.module, image.entry.encode())
        # Otherwise the first launch loads the kernel, perhaps during a capture.
        call(driver.cuFuncLoad, self._function)
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
    """Loaded kernels, by variant, in the CUDA context that was current when they were loaded."""

    def __init__(self, images: Iterable[KernelImage], arguments: Mapping[str, Mapping[str, str]]) -> None:
        """Load the images.

        arguments: kernel -> its run-time arguments and their Triton types, in order.
        Raises CudaError if the driver rejects an image. No kernel stays loaded then.
        """
        self._kernels: dict[str, _Kernel] = {}
        try:
            for image in images:
                self._kernels[image.variant] = _Kernel(image, arguments[image.variant.split("-")[0]])
        except BaseException:
            self.close()
            raise

    def launch(
        self, variant: str, grid: tuple[int, int, int], arguments: Mapping[str, float], stream: int
    ) -> None:
        """Launch one kernel on `stream` (the address of a CUstream).

        arguments: name -> value. Names that the kernel lacks are ignored. Pointers are device addresses.
        Raises CudaError if the bundle has no such kernel, or the launch fails.
        """
        kernel = self._kernels.get(variant)
        if kernel is None:
            raise CudaError(f"the bundle has no kernel {variant}: build it again")
        kernel.launch(grid, arguments, stream)

    def close(self) -> None:
        """Unload all kernels. Raises CudaError."""
        while self._kernels:
            call(driver.cuModuleUnload, self._kernels.popitem()[1].module)
