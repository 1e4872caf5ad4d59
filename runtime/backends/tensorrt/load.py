"""Check that this machine can run a bundle's TensorRT engine, then load it."""

from __future__ import annotations

from importlib import metadata
from typing import TYPE_CHECKING

from llmc.runtime.backends.base import EngineFile, LoadOptions
from llmc.runtime.backends.tensorrt import checks
from llmc.runtime.backends.tensorrt.checks import Device, Step
from llmc.runtime.errors import BackendError, RequestError

if TYPE_CHECKING:
    from llmc.runtime.backends.tensorrt.backend import TensorRtBackend


def load(engine: EngineFile, options: LoadOptions) -> TensorRtBackend:
    """Load the engine of a GPU bundle.

    The KV cache gets the GPU memory that remains, at most `kv_memory`, and no more than `max_sequences` full
    contexts can use.
    Raises BackendError with every reason why the bundle cannot run here, before anything is allocated on the
    GPU. Raises RequestError if the KV cache does not fit, or if `options.activation_group` is set (`fast`).
    Raises ValueError if `engine.bundle` is None.
    """
    bundle = engine.bundle
    if bundle is None:
        raise ValueError("a TensorRT engine is loaded from its bundle")
    if options.activation_group is not None:
        raise RequestError(
            f"{bundle.name} runs on a GPU; `fast` is about engines for the CPU", "leave --fast out", "fast"
        )
    manifest, step = bundle.manifest, Step(options.max_tokens, options.max_sequences)
    installed = {library: _version(library) for library in manifest.target.requires}
    installed["cuda-python"] = _version("cuda-bindings")
    device = _find_device() if installed["cuda-python"] else "without cuda-python no GPU can be found"
    reasons = checks.faults(manifest, bundle.path, device, installed, step)
    if reasons or isinstance(device, str):
        raise BackendError(
            f"{bundle.name} cannot run here: {'; '.join(reasons)}", checks.hint(manifest, device)
        )
    from llmc.runtime.backends.tensorrt.backend import TensorRtBackend

    return TensorRtBackend(manifest, bundle.path, device, step, options.kv_memory)


def _version(library: str) -> str | None:
    try:
        return metadata.version(library)
    except metadata.PackageNotFoundError:
        return None


def _find_device() -> Device | str:
    """Return the GPU, or the reason why there is none."""
    from llmc.plugins.cuda.driver import CudaError
    from llmc.runtime.backends.tensorrt.cuda import probe

    try:
        return probe()
    except CudaError as error:
        return f"there is no GPU: {error}"
