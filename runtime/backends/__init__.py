"""Engines that run a bundle's graph, by their names in the manifest."""

from __future__ import annotations

from importlib import import_module

from llmc.runtime.backends.base import Backend, EngineFile, LoadOptions
from llmc.runtime.backends.requirements import check_requirements
from llmc.runtime.errors import BackendError
from llmc.runtime.installation import install_hint

# Engine in the manifest -> the module of this package whose `load(engine, options)` loads it.
_LOADERS = {
    "openvino": "openvino.backend",
    "onnxruntime": "onnxruntime",
    "native": "native",
    "tensorrt-rtx": "tensorrt.load",
    "tensorrt": "tensorrt.load",
}


def load_backend(engine: EngineFile, options: LoadOptions) -> Backend:
    """Load an engine and allocate its KV cache. Imports only the library that the engine needs.

    Raises BackendError for an engine that cannot run here or that does not support the options, and
    RequestError for a KV cache that does not fit.
    """
    if engine.engine not in _LOADERS:
        raise BackendError(f"there is no backend {engine.engine!r}", f"known backends: {', '.join(_LOADERS)}")
    if engine.bundle is not None and engine.bundle.manifest.gpu is None:
        check_requirements(engine.bundle.manifest.target.requires, engine.bundle.name)
    try:
        module = import_module(f"{__name__}.{_LOADERS[engine.engine]}")
    except ModuleNotFoundError as error:
        if error.name not in ("openvino", "onnxruntime"):
            raise
        raise BackendError(
            f"the engine {engine.engine} needs {error.name}, which is not installed", install_hint(error.name)
        ) from error
    backend: Backend = module.load(engine, options)
    return backend
