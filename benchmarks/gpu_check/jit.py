"""Launch a plan through Triton's JIT on a GPU, as the tests' `run_attention` does on the CPU.

Integers are not specialized. Otherwise Triton would compile again for every 1 and every multiple of 16. With
the options of `compile_kernels`, the code is byte for byte that of the ahead-of-time kernels.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from llmc.plugins.paged_attention import launch
from llmc.plugins.paged_attention.launch import Attention, Plan, Variant


@dataclass(frozen=True)
class Bound:
    """A launch with its arguments. It keeps the tensors alive."""

    variant: Variant
    grid: tuple[int, int, int]
    #: In the order of the variant's signature.
    arguments: dict[str, Any]


def bind(
    attention: Attention, plan: Plan, tensors: Mapping[str, Any], *,
    scale: float, k_scale: float = 1.0, v_scale: float = 1.0,
) -> list[Bound]:  # fmt: skip
    """Return the plan's launches with their arguments.

    tensors: argument name -> torch CUDA tensor, `output` included.
    Scratch is new memory full of NaN. Arguments that a variant does not read are NaN, too.
    """
    nothing = tensors["query"].new_full((1,), float("nan")).float()
    scratch = {name: nothing.new_full(shape, float("nan")) for name, shape in plan.scratch.items()}
    unused = dict.fromkeys(("partial_sums", "partial_top", "partial_total", "sinks"), nothing)
    values: dict[str, Any] = {
        **unused, **scratch, **tensors, "scale": float(scale), "softcap": float(attention.softcap),
        "window": int(attention.window), "k_scale": float(k_scale), "v_scale": float(v_scale),
        "num_splits": plan.num_splits, "num_sequences": len(tensors["past_lengths"]),
    }  # fmt: skip
    return [
        Bound(
            planned.variant, planned.grid, {name: values[name] for name in launch.signature(planned.variant)}
        )
        for planned in plan.launches
    ]


@functools.cache
def kernel(name: str) -> Any:
    """Return the kernel, jitted again without specialization of its integers."""
    import triton

    from llmc.plugins.paged_attention import kernels

    integers = [argument for argument, type_ in launch.ARGUMENTS[name].items() if type_ == "i32"]
    return triton.jit(getattr(kernels, name).fn, do_not_specialize=integers)


def run(bound: Bound, sm: int) -> None:
    """Launch a kernel on torch's current stream. The first launch of a variant compiles it."""
    config = launch.configure(bound.variant, sm)
    options = {"num_warps": config.num_warps, "num_stages": config.num_stages, "enable_fp_fusion": True}
    kernel(bound.variant.kernel)[bound.grid](**bound.arguments, **config.constants, **options)


def run_compiled(
    attention: Attention, dtype: str, kv_dtype: str | None, plan: Plan, tensors: Mapping[str, Any], *,
    scale: float, k_scale: float = 1.0, v_scale: float = 1.0, sm: int = 80,
) -> None:  # fmt: skip
    """Launch all kernels of a plan. The arguments are those of the tests' `run_attention`."""
    del dtype, kv_dtype  # the plan's variants know them
    for bound in bind(attention, plan, tensors, scale=scale, k_scale=k_scale, v_scale=v_scale):
        run(bound, sm)
