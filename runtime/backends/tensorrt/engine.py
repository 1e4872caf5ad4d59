"""A deserialized TensorRT engine: loading it, its tensors, and contexts to run it in.

`tensorrt_rtx` and `tensorrt` have the same classes. Features of `tensorrt_rtx` alone are looked up by name.
"""

from __future__ import annotations

import contextlib
import importlib
import mmap
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from llmc.plugins.collectives import tensorrt_plugin as collective_plugins
from llmc.plugins.collectives.tensorrt_plugin import use_collectives
from llmc.plugins.paged_attention.tensorrt_plugin import Launcher, register, use_launcher
from llmc.runtime.backends.tensorrt.bindings import Tensor
from llmc.runtime.backends.tensorrt.checks import Device
from llmc.runtime.backends.tensorrt.nccl import NcclCollectives
from llmc.runtime.backends.tensorrt.runtime_cache import RuntimeCacheFile
from llmc.runtime.errors import BackendError

_KEPT_MESSAGES = 8


class LoadedEngine:
    """A deserialized engine. It needs a current CUDA context, even when it is closed."""

    def __init__(self, module: str, plan: Path, plan_sha256: str, gpu: Device) -> None:
        """Load the engine file with the Python module of its TensorRT.

        plan_sha256, gpu: with TensorRT's version, the key of the kernels that an earlier start compiled.
        Raises BackendError.
        """
        self._trt = importlib.import_module(module)
        register(self._trt)
        collective_plugins.register(self._trt)
        self._log = _logger(self._trt)
        self._runtime = self._trt.Runtime(self._log)
        with open(plan, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            self._engine = self._runtime.deserialize_cuda_engine(data)
        if self._engine is None:
            raise self._error(f"cannot load {plan.name}", "check the bundle with `llmc inspect --verify`")
        self._cache: Any = None  # compiled kernels, shared by all contexts (TensorRT-RTX)
        self._cache_file = RuntimeCacheFile(plan_sha256, gpu.sm, gpu.name, self._trt.__version__)

    @property
    def activation_bytes(self) -> int:
        """Bytes of device memory that a context needs for the largest step of the engine."""
        return int(self._engine.device_memory_size_v2)

    def tensors(self) -> Iterator[Tensor]:
        """Yield all inputs and outputs. Raises BackendError for a tensor that must be in host memory."""
        trt, engine = self._trt, self._engine
        for index in range(engine.num_io_tensors):
            name = engine.get_tensor_name(index)
            if engine.get_tensor_location(name) != trt.TensorLocation.DEVICE:
                raise BackendError(f"the engine wants {name} in host memory", "build the bundle again")
            is_input = engine.get_tensor_mode(name) == trt.TensorIOMode.INPUT
            most = tuple(engine.get_tensor_profile_shape(name, 0)[2]) if is_input else ()
            shape = tuple(engine.get_tensor_shape(name))
            yield Tensor(name, is_input, engine.get_tensor_dtype(name).name, shape, most)

    def context(self, memory: int, *, one_shape: bool) -> Context:
        """Create a context that works in the `activation_bytes` at the address `memory`.

        Contexts may share this memory if only one of them runs at a time.
        one_shape: whether TensorRT-RTX compiles kernels for the first shape that it sees. Otherwise it runs
        general kernels, which take every shape.
        Raises BackendError.
        """
        trt = self._trt
        config = self._engine.create_runtime_config()
        config.set_execution_context_allocation_strategy(trt.ExecutionContextAllocationStrategy.USER_MANAGED)
        strategies = getattr(trt, "DynamicShapesKernelSpecializationStrategy", None)
        if strategies is not None:
            chosen = strategies.EAGER if one_shape else strategies.NONE
            config.dynamic_shapes_kernel_specialization_strategy = chosen
            if self._cache is None:
                self._cache = self._load_compiled(config)
            config.set_runtime_cache(self._cache)
        self._log.errors.clear()  # earlier errors are not the cause of this one
        context = self._engine.create_execution_context(config)
        if context is None:
            raise self._error("cannot make an execution context", "free memory on the GPU")
        context.set_device_memory(memory, self.activation_bytes)
        return Context(self, context)

    def _load_compiled(self, config: Any) -> Any:
        """Return a runtime cache with the kernels that earlier starts compiled, if TensorRT accepts them.

        TensorRT rejects those of another GPU, driver or version. The cache is then empty.
        """
        cache = config.create_runtime_cache()
        compiled = self._cache_file.read()
        if compiled:
            cache.deserialize(compiled)
        return cache

    def keep_compiled(self) -> None:
        """Write the kernels that were compiled to disk, for the next start. Needs a current CUDA context."""
        compiled = None if self._cache is None else self._cache.serialize()
        if compiled is not None:
            self._cache_file.write(bytes(compiled))

    def close(self) -> None:
        """Free the engine. All contexts must be gone."""
        self._cache = self._engine = self._runtime = None

    def _error(self, failure: str, hint: str) -> BackendError:
        reason = "; ".join(self._log.errors) or "it gave no reason"
        self._log.errors.clear()
        return BackendError(f"TensorRT {self._trt.__version__} {failure}: {reason}", hint)


class Context:
    """An execution context with the addresses and shapes of its tensors."""

    def __init__(self, engine: LoadedEngine, context: Any) -> None:
        self._engine, self._context = engine, context

    def bind(self, addresses: Mapping[str, int], shapes: Mapping[str, Iterable[int]]) -> None:
        """Set addresses of tensors and shapes of inputs. Raises BackendError if TensorRT refuses one."""
        self._engine._log.errors.clear()
        for name, address in addresses.items():
            if not self._context.set_tensor_address(name, address):
                raise self._engine._error(f"refuses the address of {name}", "please report this")
        for name, shape in shapes.items():
            if not self._context.set_input_shape(name, tuple(shape)):
                raise self._engine._error(f"refuses {name} of shape {list(shape)}", "please report this")

    def run(self, launcher: Launcher, stream: int, collectives: NcclCollectives | None = None) -> None:
        """Put a run of the engine on the stream. The attention plugin calls `launcher`.

        collectives: those of one of several ranks

        Raises BackendError. Errors of `launcher` and `collectives` propagate.
        """
        self._engine._log.errors.clear()
        with contextlib.ExitStack() as lent:
            lent.enter_context(use_launcher(launcher))
            if collectives is not None:
                collectives.begin()
                lent.enter_context(use_collectives(collectives))
            if not self._context.execute_async_v3(stream):
                raise self._engine._error("cannot run the step", "set LLMC_TRACEBACK=1 for where it failed")
        if collectives is not None:
            collectives.end()

    def can_be_captured(self, stream: int) -> bool:
        """Return whether runs of this context can become a CUDA graph. For TensorRT it is always true."""
        ask = getattr(self._context, "is_stream_capturable", None)
        return ask is None or bool(ask(stream))


def _logger(trt: Any) -> Any:
    class Logger(trt.ILogger):
        """A logger that keeps the last errors, for the messages of BackendError."""

        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.errors: deque[str] = deque(maxlen=_KEPT_MESSAGES)

        def log(self, severity: Any, message: str) -> None:
            if severity <= trt.ILogger.ERROR:
                self.errors.append(" ".join(message.split()))  # errors are one line

    return Logger()
