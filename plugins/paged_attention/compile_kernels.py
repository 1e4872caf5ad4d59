"""Compile variants of the attention kernels to cubin and PTX, without a GPU."""

from __future__ import annotations

from pathlib import Path

from llmc.plugins.cuda.compile import Kernel, compile_source
from llmc.plugins.paged_attention.launch import Variant, configure, signature


def compile_variant(variant: Variant, sm: int, cache: Path | None) -> Kernel:
    """Compile a kernel of `llmc.PagedAttention`, or take it from the directory `cache`.

    Raises CompileError.
    """
    from llmc.plugins.paged_attention import kernels

    function, config = getattr(kernels, variant.kernel), configure(variant, sm)
    return compile_source(function, str(variant), signature(variant), config, sm, cache)
