"""Launches a plan through Triton's JIT: what the tests' `run_attention` does on the CPU, on a GPU.

Integers are not specialized (Triton would compile again for every 1 and every multiple of 16). With the
options of `compile_kernels` this makes it the code that is compiled ahead of time, byte for byte.
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
    """A launch with its arguments, in the order of the variant's signature; holds the tensors alive."""

    variant: Variant
    grid: tuple[int, int, int]
    arguments: dict[str, Any]


def bind(
    attention: Attention, plan: Plan, tensors: Mapping[str, Any], *,
    scale: float, k_scale: float = 1.0, v_scale: float = 1.0,
) -> list[Bound]:  # fmt: skip
    """The plan's launches on `tensors`, torch CUDA tensors under the kernels' argument names, `output` among
    them. Scratch is new memory, full of NaN; so is what stands for arguments that a variant does not read."""
    nothing = tensors["query"].new_full((1,), float("nan")).float()
    scratch = {name: nothing.new_full(shape, float("nan")) for name, shape in plan.scratch.items()}
    unused = dict.fromkeys(("partial_sums", "partial_top", "partial_total", "sinks"), nothing)
    given: dict[str, Any] = {
        **unused, **scratch, **tensors, "scale": float(scale), "softcap": float(attention.softcap),
        "window": int(attention.window), "k_scale": float(k_scale), "v_scale": float(v_scale),
        "num_splits": plan.num_splits, "num_sequences": len(tensors["past_lengths"]),
    }  # fmt: skip
    return [
        Bound(one.variant, one.grid, {name: given[name] for name in launch.signature(one.variant)})
        for one in plan.launches
    ]


@functools.cache
def kernel(name: str) -> Any:
    """The kernel, jitted again so that it takes its integers as they are."""
    import triton

    from llmc.plugins.paged_attention import kernels

    integers = [argument for argument, type_ in launch.ARGUMENTS[name].items() if type_ == "i32"]
    return triton.jit(getattr(kernels, name).fn, do_not_specialize=integers)


def run(bound: Bound, sm: int) -> None:
    """Launches on torch's current stream; the first launch of a variant compiles it."""
    config = launch.configure(bound.variant, sm)
    options = {"num_warps": config.num_warps, "num_stages": config.num_stages, "enable_fp_fusion": True}
    kernel(bound.variant.kernel)[bound.grid](**bound.arguments, **config.constants, **options)


def run_compiled(
    attention: Attention, dtype: str, kv_dtype: str | None, plan: Plan, tensors: Mapping[str, Any], *,
    scale: float, k_scale: float = 1.0, v_scale: float = 1.0, sm: int = 80,
) -> None:  # fmt: skip
    """Takes what `run_attention` of tests/support/triton_interpreter.py takes."""
    del dtype, kv_dtype  # the plan's variants know them
    for bound in bind(attention, plan, tensors, scale=scale, k_scale=k_scale, v_scale=v_scale):
        run(bound, sm)
