"""The GPU kernels in a bundle: the attention variants that the model needs, and the sampling kernels.

GPUs that llmc knows get machine code (cubin), which the driver loads unchanged. Other GPUs get PTX, which the
driver compiles when it loads it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from llmc.compiler.bundle_writer import BundleWriter
from llmc.compiler.progress import Progress
from llmc.compiler.targets.base import Resolved
from llmc.passes import edit
from llmc.passes.geometry import attention_nodes
from llmc.plugins.cuda.gpus import SMS
from llmc.plugins.paged_attention import launch
from llmc.plugins.paged_attention.launch import Attention, Variant
from llmc.plugins.sampling import launch as sampling
from llmc.runtime.bundle.manifest import KernelFile
from llmc.runtime.cache_directory import cache_directory
from llmc.runtime.errors import BuildError, UnsupportedError
from llmc.runtime.installation import install_hint

if TYPE_CHECKING:
    import onnx_ir as ir

    from llmc.plugins.cuda.compile import Kernel

_PORTABLE = (80, 86, 89, 120)  # the GPUs in SMS that a portable TensorRT-RTX engine runs on
# The PTX for GPUs that are not in SMS. It runs on SM89 and all newer GPUs. Triton's code for SM90 and newer
# runs on that GPU only (sm_90a).
_PTX = 89


def check(sms: Iterable[int]) -> None:
    """Check the compute capabilities. Raises UnsupportedError if the kernels do not support one."""
    for sm in sms:
        if sm < min(SMS):
            raise UnsupportedError(
                f"llmc has no attention kernels for SM{sm}", f"the oldest GPU it knows is SM{min(SMS)}", "sms"
            )


def codes(sms: tuple[int, ...]) -> list[tuple[int, Literal["cubin", "ptx"]]]:
    """Return the codes to compile: pairs of a compute capability and "cubin" or "ptx".

    sms: the compute capabilities of the target; empty for a portable engine
    """
    found: list[tuple[int, Literal["cubin", "ptx"]]] = [
        (sm, "cubin") for sm in (sms or _PORTABLE) if sm in SMS
    ]
    if not sms or any(sm not in SMS for sm in sms):
        found.append((_PTX, "ptx"))
    return found


def compile_into(
    models: Sequence[ir.Model], resolved: Resolved, writer: BundleWriter, progress: Progress
) -> tuple[KernelFile, ...]:
    """Write every kernel that `models` need to the bundle, compiled or from the cache of earlier builds.

    models: the graph of each rank

    Raises BuildError if Triton is missing or cannot compile a kernel.
    """
    try:
        from llmc.plugins.cuda.compile import CompileError
        from llmc.plugins.paged_attention.compile_kernels import compile_variant
        from llmc.plugins.sampling.compile_kernels import compile_kernel

        compilers: dict[str, Callable[[int, Path | None], Kernel]]
        compilers = {str(v): partial(compile_variant, v) for v in attention_variants(models, resolved)}
        compilers |= {sampling.variant(name): partial(compile_kernel, name) for name in sampling.ARGUMENTS}
        jobs = [(variant, sm, kind) for variant in compilers for sm, kind in codes(resolved.sms)]
        files, cache = [], cache_directory("kernels")
        for done, (variant, sm, kind) in enumerate(jobs):
            progress.bar(done, len(jobs))
            files.append(_write(compilers[variant](sm, cache), variant, sm, kind, writer))
    except ModuleNotFoundError as error:
        raise BuildError(f"the GPU kernels need {error.name}", install_hint("kernels")) from error
    except CompileError as error:
        raise BuildError(f"a GPU kernel cannot be compiled: {error}", "please report this") from error
    return tuple(files)


def attention_variants(models: Sequence[ir.Model], resolved: Resolved) -> tuple[Variant, ...]:
    """Return every attention kernel that the models need, for their dtype and that of their KV cache."""
    attention = list(dict.fromkeys(each for model in models for each in layers(model)))
    return launch.variants_for(attention, [(resolved.dtype, resolved.kv_dtype)])


def layers(model: ir.Model) -> list[Attention]:
    """Return the attention layers of a canonical or lowered graph, as the kernels' parameters."""
    attention = []
    for node in attention_nodes(model):
        key_cache, value_cache = edit.dims(edit.operand(node, 3)), edit.dims(edit.operand(node, 4))
        attention.append(
            Attention(
                num_heads=int(edit.attribute(node, "num_heads")),
                num_kv_heads=key_cache[1],
                head_dim=key_cache[3],
                v_head_dim=value_cache[3],
                window=int(edit.attribute(node, "window")),
                softcap=float(edit.attribute(node, "softcap")),
            )
        )
    return attention


def _write(
    kernel: Kernel, variant: str, sm: int, kind: Literal["cubin", "ptx"], writer: BundleWriter
) -> KernelFile:
    file = f"kernels/sm{sm}/{variant}.{kind}"
    writer.path(file).write_bytes(kernel.cubin if kind == "cubin" else kernel.ptx)
    return KernelFile(
        variant=variant,
        sm=sm,
        kind=kind,
        file=file,
        entry=kernel.name,
        shared_memory=kernel.shared_memory,
        num_warps=kernel.num_warps,
        registers=kernel.registers,
    )
