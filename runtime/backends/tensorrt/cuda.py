"""One GPU, through cuda-python's driver API: its properties, memory, a stream and graphs."""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Callable
from typing import Any

import numpy as np
from cuda.bindings import driver

from llmc.plugins.cuda.driver import CudaError, call
from llmc.runtime.backends.tensorrt.checks import Device

_ALIGNMENT = 256  # bytes; TensorRT requires it of its tensors


def probe(ordinal: int = 0) -> Device:
    """Return the properties of the GPU. Allocates nothing on it. Raises CudaError if there is none."""
    call(driver.cuInit, 0)
    handle = call(driver.cuDeviceGet, ordinal)
    attributes = driver.CUdevice_attribute

    def ask(attribute: Any) -> int:
        return int(call(driver.cuDeviceGetAttribute, attribute, handle))

    major = ask(attributes.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR)
    minor = ask(attributes.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR)
    version = int(call(driver.cuDriverGetVersion))
    return Device(
        name=call(driver.cuDeviceGetName, 256, handle).split(b"\0")[0].decode(),
        sm=10 * major + minor,
        cuda=(version // 1000, version % 1000 // 10),
        multiprocessors=ask(attributes.CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT),
        shared_memory=ask(attributes.CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN),
    )


def count_gpus() -> int:
    """Return the number of GPUs that this process may use. Raises CudaError without a driver."""
    call(driver.cuInit, 0)
    return int(call(driver.cuDeviceGetCount))


class Cuda:
    """A GPU's primary context, which TensorRT uses too, with one stream.

    Any method may raise CudaError. Call `make_current` first in each thread, also before `close`.
    Allocations live until `close`, which frees them in reverse order.
    """

    def __init__(self, ordinal: int = 0) -> None:
        call(driver.cuInit, 0)
        device = call(driver.cuDeviceGet, ordinal)
        self._owned = contextlib.ExitStack()
        self._context = call(driver.cuDevicePrimaryCtxRetain, device)
        self._owned.callback(call, driver.cuDevicePrimaryCtxRelease, device)
        try:
            self.make_current()
            stream = call(driver.cuStreamCreate, int(driver.CUstream_flags.CU_STREAM_NON_BLOCKING))
            self._owned.callback(call, driver.cuStreamDestroy, stream)
        except BaseException:
            self.close()
            raise
        self.stream = int(stream)

    def make_current(self) -> None:
        """Make the context current in this thread. Steps may be called from any thread."""
        call(driver.cuCtxSetCurrent, self._context)

    def free_memory(self) -> tuple[int, int]:
        """Return the free bytes of the device and its total bytes."""
        free, total = call(driver.cuMemGetInfo)
        return int(free), int(total)

    def allocate(self, nbytes: int) -> int:
        """Allocate device memory with undefined contents. Return its address."""
        address = call(driver.cuMemAlloc, max(1, nbytes))
        self._owned.callback(call, driver.cuMemFree, address)
        return int(address)

    def pinned(self, nbytes: int) -> np.ndarray:
        """Allocate pinned host memory, uint8, for asynchronous copies. It must not be used after `close`."""
        address = int(call(driver.cuMemHostAlloc, max(1, nbytes), 0))
        self._owned.callback(call, driver.cuMemFreeHost, address)
        return np.ctypeslib.as_array((ctypes.c_uint8 * nbytes).from_address(address))

    def upload(self, source: np.ndarray, target: int) -> None:
        """Start to copy `source`, contiguous and in pinned memory, to the address `target`."""
        call(driver.cuMemcpyHtoDAsync, target, source.ctypes.data, source.nbytes, self.stream)

    def download(self, source: int, target: np.ndarray) -> None:
        """Start to copy from the address `source` to `target`, contiguous and in pinned memory."""
        call(driver.cuMemcpyDtoHAsync, target.ctypes.data, source, target.nbytes, self.stream)

    def wait(self) -> None:
        """Wait until everything on the stream is done."""
        call(driver.cuStreamSynchronize, self.stream)

    def is_done(self) -> bool:
        """Return whether everything on the stream is done."""
        status, *_ = driver.cuStreamQuery(self.stream)
        if status == driver.CUresult.CUDA_ERROR_NOT_READY:
            return False
        call(driver.cuStreamQuery, self.stream)
        return True

    def capture(self, record: Callable[[], None]) -> Graph:
        """Capture the work that `record` puts on the stream as a graph, without running it.

        `record` must not wait, allocate, or copy from memory that is not pinned. Its exceptions propagate.
        """
        mode = driver.CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_THREAD_LOCAL
        call(driver.cuStreamBeginCapture, self.stream, mode)
        try:
            record()
        except BaseException:
            with contextlib.suppress(CudaError):  # cuStreamEndCapture reports the invalid capture
                call(driver.cuGraphDestroy, call(driver.cuStreamEndCapture, self.stream))
            raise
        graph = call(driver.cuStreamEndCapture, self.stream)
        try:
            executable = call(driver.cuGraphInstantiate, graph, 0)
        finally:
            call(driver.cuGraphDestroy, graph)
        try:  # if the GPU lacks memory for the graph, this raises, not the first launch
            call(driver.cuGraphUpload, executable, self.stream)
        except CudaError:
            call(driver.cuGraphExecDestroy, executable)
            raise
        return Graph(executable, self.stream)

    def close(self) -> None:
        """Free everything. A second call does nothing. Continues after an error, and raises the last one."""
        self._owned.close()


class Graph:
    """Work for the GPU that one call starts. It must be closed before the memory that it uses is freed."""

    def __init__(self, executable: Any, stream: int) -> None:
        self._executable, self._stream = executable, stream

    def launch(self) -> None:
        """Run the graph on its stream. Raises CudaError."""
        call(driver.cuGraphLaunch, self._executable, self._stream)

    def close(self) -> None:
        """Destroy the graph."""
        call(driver.cuGraphExecDestroy, self._executable)


def aligned_offsets(sizes: list[int]) -> tuple[list[int], int]:
    """Return the offsets of arrays of these sizes in one allocation, and its total size. All are in bytes.

    Offsets are multiples of 256 bytes, which TensorRT requires.
    """
    offsets, end = [], 0
    for size in sizes:
        offsets.append(end)
        end += -(-size // _ALIGNMENT) * _ALIGNMENT
    return offsets, end
