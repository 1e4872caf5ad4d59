"""Compiles the sampling kernels to cubin and PTX, without a GPU, with the cache of the attention kernels."""

from __future__ import annotations

from pathlib import Path

from llmc.plugins.paged_attention.compile_kernels import Kernel, compile_source
from llmc.plugins.sampling.launch import ARGUMENTS, configure, variant


def compile_kernel(kernel: str, sm: int, cache: Path) -> Kernel:
    """A kernel of `launch.ARGUMENTS`, from `cache` (a directory), or compiled and put there.

    Raises CompileError.
    """
    from llmc.plugins.sampling import kernels

    function, types = getattr(kernels, kernel), ARGUMENTS[kernel]
    return compile_source(function, variant(kernel), types, configure(kernel), sm, cache)
