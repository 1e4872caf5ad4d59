"""Loads a bundle's TensorRT engine, after checking that this machine can run it."""

from __future__ import annotations

from importlib import metadata
from typing import TYPE_CHECKING

from llmc.runtime.backends.tensorrt import checks
from llmc.runtime.backends.tensorrt.checks import Device, Step
from llmc.runtime.bundle.reader import Bundle
from llmc.runtime.errors import BackendError

if TYPE_CHECKING:
    from llmc.runtime.backends.tensorrt.backend import TensorRtBackend


def load(
    bundle: Bundle, *, kv_memory: int | None = None, max_sequences: int = 64, max_batch_tokens: int = 2048
) -> TensorRtBackend:
    """Loads the engine of a GPU bundle.

    kv_memory: bytes of GPU memory for the KV cache, by default what the engine leaves free, as far as
        max_sequences full contexts could use it.
    max_sequences, max_batch_tokens: what a step may hold; at most what the bundle was built for.
    Raises BackendError with every reason why the bundle cannot run here, found before the GPU is used;
    RequestError where the KV cache does not fit.
    """
    manifest, step = bundle.manifest, Step(max_batch_tokens, max_sequences)
    installed = {library: _version(library) for library in manifest.target.requires}
    installed["cuda-python"] = _version("cuda-bindings")
    device = _find_device() if installed["cuda-python"] else "without cuda-python no GPU can be found"
    reasons = checks.faults(manifest, bundle.path, device, installed, step)
    if reasons or isinstance(device, str):
        raise BackendError(
            f"{bundle.name} cannot run here: {'; '.join(reasons)}", checks.hint(manifest, device)
        )
    from llmc.runtime.backends.tensorrt.backend import TensorRtBackend

    return TensorRtBackend(manifest, bundle.path, device, step, kv_memory)


def _version(library: str) -> str | None:
    try:
        return metadata.version(library)
    except metadata.PackageNotFoundError:
        return None


def _find_device() -> Device | str:
    """The GPU, or why there is none."""
    from llmc.plugins.cuda.driver import CudaError
    from llmc.runtime.backends.tensorrt.cuda import probe

    try:
        return probe()
    except CudaError as error:
        return f"there is no GPU: {error}"
