"""Engines that run a bundle's graph, by their names in the manifest."""

from __future__ import annotations

from pathlib import Path

from llmc.runtime.backends.base import Backend
from llmc.runtime.bundle.reader import Bundle
from llmc.runtime.errors import BackendError


def load_backend(
    name: str,
    engine: Path,
    num_blocks: int,
    threads: int | None = None,
    *,
    kv_dtype: str = "fp32",
    activation_group: int | None = None,
) -> Backend:
    """Loads `engine` with a KV cache of `num_blocks` blocks. Imports only the library it needs.

    kv_dtype: of the cache, as in the manifest. activation_group: with weights of int8 or int4, round
        activations to int8 too, so many with one scale; None: they stay fp32.
    Raises BackendError where the backend has neither.
    """
    if name == "openvino":
        from llmc.runtime.backends.openvino.backend import OpenVinoBackend

        return OpenVinoBackend(
            engine, num_blocks, threads, kv_dtype=kv_dtype, activation_group=activation_group
        )
    if name == "onnxruntime":
        if activation_group is not None:
            raise BackendError(
                "ONNX Runtime computes with fp32 activations here: `fast` would change nothing",
                "leave --fast out",
            )
        if kv_dtype != "fp32":
            raise BackendError(
                f"ONNX Runtime has no KV cache of {kv_dtype} here", "build the bundle with an fp32 KV cache"
            )
        from llmc.runtime.backends.onnxruntime import OnnxRuntimeBackend

        return OnnxRuntimeBackend(engine, num_blocks, threads)
    raise BackendError(f"there is no backend {name!r}", "known backends: openvino, onnxruntime")


def load_gpu_backend(
    bundle: Bundle, *, kv_memory: int | None, max_sequences: int, max_batch_tokens: int
) -> Backend:
    """Loads the TensorRT engine of a bundle, and sizes its KV cache by what the GPU has left.

    The arguments are those of `load_engine`. Raises BackendError, RequestError.
    """
    from llmc.runtime.backends.tensorrt import load

    return load.load(
        bundle, kv_memory=kv_memory, max_sequences=max_sequences, max_batch_tokens=max_batch_tokens
    )
