"""Compile the sampling kernels to cubin and PTX, without a GPU."""

from __future__ import annotations

from pathlib import Path

from llmc.plugins.cuda.compile import Kernel, compile_source
from llmc.plugins.sampling.launch import ARGUMENTS, configure, variant


def compile_kernel(kernel: str, sm: int, cache: Path | None) -> Kernel:
    """Compile a kernel of `launch.ARGUMENTS`, or take it from the directory `cache`.

    Raises CompileError.
    """
    from llmc.plugins.sampling import kernels

    function, types = getattr(kernels, kernel), ARGUMENTS[kernel]
    return compile_source(function, variant(kernel), types, configure(kernel), sm, cache)
