"""Check that this machine can run a bundle's TensorRT engine, then load it."""

from __future__ import annotations

import os
from importlib import metadata
from typing import TYPE_CHECKING

from llmc.runtime.backends.base import EngineFile, LoadOptions
from llmc.runtime.backends.tensorrt import checks
from llmc.runtime.backends.tensorrt.checks import Device, Step
from llmc.runtime.backends.tensorrt.nccl import Nccl
from llmc.runtime.backends.tensorrt.stages import Place, Rank
from llmc.runtime.bundle.reader import Bundle
from llmc.runtime.errors import BackendError, RequestError
from llmc.runtime.parallel.launch import local_rank_of

if TYPE_CHECKING:
    from llmc.runtime.backends.tensorrt.backend import TensorRtBackend


def load(engine: EngineFile, options: LoadOptions) -> TensorRtBackend:
    """Load the engine of a GPU bundle.

    The KV cache gets the GPU memory that remains, at most `kv_memory`, and no more than `max_sequences` full
    contexts can use.
    Raises BackendError with every reason why the bundle cannot run here, before anything is allocated on the
    GPU. Raises RequestError if the KV cache does not fit, or if `options.activation_group` is set (`fast`).
    Raises ValueError if `engine.bundle` is None.
    Several ranks have a GPU each. All load at the same time, and agree on the number of KV blocks.
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
    place = Place(engine.rank, manifest.parallel.tp, manifest.parallel.pp)
    gpu = _gpu_of(place, bundle) if options.communicator and installed["cuda-python"] else 0
    device = _find_device(gpu) if installed["cuda-python"] else "without cuda-python no GPU can be found"
    reasons = checks.faults(manifest, bundle.path, device, installed, step)
    if reasons or isinstance(device, str):
        raise BackendError(
            f"{bundle.name} cannot run here: {'; '.join(reasons)}", checks.hint(manifest, device)
        )
    from llmc.runtime.backends.tensorrt.backend import TensorRtBackend

    rank = Rank(options.communicator, Nccl(), gpu, place) if options.communicator else None
    return TensorRtBackend(manifest, bundle.path, device, step, options.kv_memory, rank)


def _version(library: str) -> str | None:
    try:
        return metadata.version(library)
    except metadata.PackageNotFoundError:
        return None


def _gpu_of(place: Place, bundle: Bundle) -> int:
    """Return the number of this rank's GPU: its number among the ranks of this machine.

    Raises BackendError if this machine has fewer GPUs, RankError for a malformed environment.
    """
    from llmc.plugins.cuda.driver import CudaError
    from llmc.runtime.backends.tensorrt.cuda import count_gpus

    try:
        count = count_gpus()
    except CudaError:
        return 0  # `checks` has the words for it
    local = local_rank_of(os.environ)
    if local is None:  # rank 0 started the others here
        local, needed = place.number, place.size
    elif count == 1:  # the launcher has shown each process its own
        return 0
    else:
        needed = local + 1
    if needed > count:
        raise BackendError(
            f"{bundle.name} has {place.size} ranks with a GPU each: {needed} are needed here, "
            f"and this process sees {count}",
            "run it where there are enough, or on several machines with torchrun, mpirun or srun; "
            "CUDA_VISIBLE_DEVICES may hide some",
        )
    return local


def _find_device(gpu: int) -> Device | str:
    """Return the GPU, or the reason why there is none."""
    from llmc.plugins.cuda.driver import CudaError
    from llmc.runtime.backends.tensorrt.cuda import probe

    try:
        return probe(gpu)
    except CudaError as error:
        return f"there is no GPU: {error}"
