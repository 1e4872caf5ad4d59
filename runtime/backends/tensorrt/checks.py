"""Checks that this machine can run a bundle, before anything is loaded on the GPU.

The functions are pure. They depend on the manifest, the bundle's files, the GPU's properties and the versions
of libraries.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from llmc.plugins.operator import unsupported
from llmc.plugins.paged_attention.launch import ARGUMENTS as ATTENTION
from llmc.plugins.sampling import launch as sampling
from llmc.runtime.bundle.manifest import KernelFile, Manifest

MODULES = {"tensorrt-rtx": "tensorrt_rtx", "tensorrt": "tensorrt"}  # engine in the manifest -> Python module
_CUDA = (13, 0)  # the version that TensorRT 11 and TensorRT-RTX 1.7 are built with: their wheels are cu13
_PORTABLE_FROM = 80  # TensorRT-RTX without named GPUs: "Ampere and newer"
_DATA_CENTRE = {90: "Hopper", 100: "Blackwell", 103: "Blackwell"}  # TensorRT-RTX has no code for these
# From this SM on, Triton's PTX targets sm_90a, sm_120a, ..., which newer GPUs cannot run (PTX ISA, .target).
_ONE_SM_ONLY = 90
_MAGIC = {"tensorrt-rtx": b"vtrt"}  # the first bytes of engine files, as seen in 1.7.1
_HEADER = 4096


@dataclass(frozen=True)
class Device:
    """A GPU."""

    #: The name that the driver reports.
    name: str
    #: Compute capability: 89 for 8.9.
    sm: int
    #: The newest CUDA version that the driver supports, such as (13, 0).
    cuda: tuple[int, int]
    #: Number of streaming multiprocessors.
    multiprocessors: int
    #: Maximum shared memory of a thread block, in bytes.
    shared_memory: int


@dataclass(frozen=True)
class Step:
    """The limits of a step that the caller asks for."""

    #: Maximum number of tokens.
    max_tokens: int
    #: Maximum number of sequences.
    max_sequences: int


def faults(
    manifest: Manifest,
    directory: Path,
    device: Device | str,
    installed: Mapping[str, str | None],
    step: Step,
) -> list[str]:
    """Return the reasons why the bundle in `directory` cannot run here, one sentence each.

    device: the GPU, or the reason why there is none. installed: library -> version, or None if it is not
    installed, for the libraries in the manifest's `target.requires` and for cuda-python.
    """
    return [
        *_library_faults(manifest, installed),
        *unsupported((operator.name, operator.abi) for operator in manifest.operators),
        *([device] if isinstance(device, str) else _device_faults(manifest, directory, device)),
        *_engine_faults(manifest, directory),
        *_step_faults(manifest, step),
    ]


def hint(manifest: Manifest, device: Device | str) -> str:
    """Return the command that builds the bundle for this GPU, or a sentence if no command would help."""
    if isinstance(device, str):
        return "GPU engines need an NVIDIA GPU and driver; build with `--target cpu` to run without"
    target = manifest.target.name
    command = f"llmc build {manifest.source.name} --target {target}"
    if target == "tensorrt-rtx" and device.sm in _DATA_CENTRE:
        return (
            f"build for it where it is: llmc build {manifest.source.name} --target tensorrt --sm {device.sm}"
        )
    return f"build it for this GPU: {command} --sm {device.sm}"


def choose_kernels(kernels: Collection[KernelFile], device: Device) -> tuple[KernelFile, ...]:
    """Return the attention kernels: one file per variant, all for the same SM, because tiles depend on it.

    Cubins for this GPU's SM come first, then PTX for it, then PTX for the newest older SM.
    Returns () if no set is complete.
    """
    return _complete_set([k for k in kernels if k.variant.split("-")[0] in ATTENTION], device)


def choose_sampling_kernels(kernels: Collection[KernelFile], device: Device) -> tuple[KernelFile, ...]:
    """Return the sampling kernels, by the same rule. Returns () if the bundle has no complete set."""
    variants = {sampling.variant(kernel) for kernel in sampling.ARGUMENTS}
    chosen = _complete_set([k for k in kernels if k.variant in variants], device)
    return chosen if len(chosen) == len(variants) else ()


def _complete_set(kernels: Collection[KernelFile], device: Device) -> tuple[KernelFile, ...]:
    variants = {kernel.variant for kernel in kernels}
    sets: dict[tuple[bool, int], dict[str, KernelFile]] = {}
    for kernel in kernels:
        exact = kernel.sm == device.sm
        newer = kernel.kind == "ptx" and kernel.sm < min(device.sm, _ONE_SM_ONLY)
        if (exact or newer) and kernel.shared_memory <= device.shared_memory:
            sets.setdefault((kernel.kind == "cubin", kernel.sm), {})[kernel.variant] = kernel
    complete = [key for key, files in sets.items() if files.keys() == variants]
    return tuple(sets[max(complete)].values()) if complete else ()


def _library_faults(manifest: Manifest, installed: Mapping[str, str | None]) -> Iterator[str]:
    for library, wanted in manifest.target.requires.items():
        version = installed.get(library)
        if version is None:
            yield f"{library} is not installed (pip install {library}=={wanted})"
        elif version != wanted:
            yield f"{library} is {version}, the engine needs {wanted} (pip install {library}=={wanted})"
    if installed.get("cuda-python") is None:
        yield f"cuda-python is not installed (pip install 'cuda-python=={_CUDA[0]}.*')"


def _device_faults(manifest: Manifest, directory: Path, device: Device) -> Iterator[str]:
    gpu, target = manifest.gpu, manifest.target.name
    assert gpu is not None
    here = f"this GPU, {device.name}, is SM{device.sm}"
    if target == "tensorrt-rtx" and device.sm in _DATA_CENTRE:
        family = _DATA_CENTRE[device.sm]
        yield f"{here}: TensorRT-RTX has no code for data-centre {family}, the target tensorrt has"
    elif gpu.compute_capabilities and device.sm not in gpu.compute_capabilities:
        yield f"{here}, the engine is for " + ", ".join(f"SM{sm}" for sm in gpu.compute_capabilities)
    elif device.sm < _PORTABLE_FROM and not gpu.compute_capabilities:
        yield f"{here}, the engine is for SM{_PORTABLE_FROM} and newer"
    needed = _CUDA
    chosen = choose_kernels(gpu.kernels, device)
    if not chosen:
        available = sorted({f"{kernel.kind} for SM{kernel.sm}" for kernel in gpu.kernels})
        yield f"the bundle has no complete set of attention kernels for SM{device.sm}: " + (
            ", ".join(available) or "it has none"
        )
    for kernel in (*chosen, *choose_sampling_kernels(gpu.kernels, device)):
        try:
            with open(directory / kernel.file, "rb") as file:
                header = file.read(_HEADER)
        except OSError as error:
            yield f"{kernel.file} cannot be read: {error.strerror}"
            continue
        needed = max(needed, cuda_of_ptx(header) if kernel.kind == "ptx" else _CUDA)
    if device.cuda < needed:
        has, wants = (".".join(map(str, version)) for version in (device.cuda, needed))
        yield f"the GPU's driver knows CUDA {has}, the engine and its kernels need {wants}: update the driver"


def _engine_faults(manifest: Manifest, directory: Path) -> Iterator[str]:
    for engine in manifest.engines:
        path, listed = directory / engine.file, manifest.files[engine.file].bytes
        try:
            with open(path, "rb") as file:
                magic = file.read(4)
            size = path.stat().st_size
        except OSError as error:
            yield f"{engine.file} cannot be read: {error.strerror}"
            continue
        if size != listed:
            yield f"{engine.file} has {size} of its {listed} bytes"
        elif magic != _MAGIC.get(manifest.target.name, magic):
            yield f"{engine.file} is no engine of {manifest.target.name}: it begins with {magic!r}"


def _step_faults(manifest: Manifest, step: Step) -> Iterator[str]:
    gpu = manifest.gpu
    assert gpu is not None
    if step.max_tokens > gpu.max_tokens:
        yield f"steps of {step.max_tokens} tokens are asked for, the engine takes {gpu.max_tokens}"
    max_sequences = min(gpu.max_sequences, gpu.max_logits)
    if step.max_sequences > max_sequences:
        yield f"{step.max_sequences} sequences at once are asked for, the engine takes {max_sequences}"


def cuda_of_ptx(header: bytes) -> tuple[int, int]:
    """Return the CUDA version that a PTX file needs. (0, 0): every version that TensorRT supports is enough.

    PTX ISA 9.x came with CUDA 13.x, and earlier ISAs with older CUDA versions (PTX ISA, release notes).
    """
    match = re.search(rb"^\.version (\d+)\.(\d+)", header, re.MULTILINE)
    major, minor = (int(match[1]), int(match[2])) if match else (0, 0)
    return (major + 4, minor) if major >= 9 else (0, 0)
