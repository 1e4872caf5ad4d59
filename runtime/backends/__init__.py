"""Engines that run a bundle's graph. The name in the manifest is the module's name."""

from __future__ import annotations

from pathlib import Path

from llmc.runtime.backends.base import Backend
from llmc.runtime.errors import BackendError


def load_backend(name: str, engine: Path, num_blocks: int, threads: int | None = None) -> Backend:
    """Loads `engine` with a KV cache of `num_blocks` blocks. Imports only the library it needs."""
    if name == "openvino":
        from llmc.runtime.backends.openvino import OpenVinoBackend

        return OpenVinoBackend(engine, num_blocks, threads)
    if name == "onnxruntime":
        from llmc.runtime.backends.onnxruntime import OnnxRuntimeBackend

        return OnnxRuntimeBackend(engine, num_blocks, threads)
    raise BackendError(f"there is no backend {name!r}", "known backends: openvino, onnxruntime")
