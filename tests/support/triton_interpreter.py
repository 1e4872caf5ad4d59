"""The Triton kernels, run by Triton's interpreter on the CPU.

TRITON_INTERPRET=1 must be set before triton is imported.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from llmc.plugins.paged_attention import launch
from llmc.plugins.paged_attention.launch import Attention, Plan
from llmc.plugins.sampling import launch as sampling

_SOMETIMES_UNUSED = ("partial_sums", "partial_top", "partial_total", "sinks")


def run_attention(
    attention: Attention, dtype: str, kv_dtype: str | None, plan: Plan, tensors: Mapping[str, Any], *,
    scale: float, k_scale: float = 1.0, v_scale: float = 1.0, sm: int = 80,
) -> None:  # fmt: skip
    """Run a plan of `llmc.PagedAttention`. A program takes milliseconds.

    tensors: torch CPU tensors by the kernels' argument names, `output` included; an FP8 cache is uint8. The
        outputs and caches are written in place.
    """
    from llmc.plugins.paged_attention import kernels

    _patch_interpreter()
    nothing = tensors["query"].float().new_full((1,), float("nan"))
    scalars = {
        "scale": scale, "softcap": attention.softcap, "window": attention.window, "k_scale": k_scale,
        "v_scale": v_scale, "num_splits": plan.num_splits, "num_sequences": len(tensors["past_lengths"]),
    }  # fmt: skip
    scratch = {name: nothing.new_full(shape, float("nan")) for name, shape in plan.scratch.items()}
    for one in plan.launches:
        given: dict[str, Any] = {**dict.fromkeys(_SOMETIMES_UNUSED, nothing), **scratch, **scalars}
        given |= tensors
        arguments = {name: given[name] for name in launch.signature(one.variant)}
        kernel = getattr(kernels, one.variant.kernel)
        kernel[one.grid](**arguments, **launch.configure(one.variant, sm).constants)


def run_sampling(
    logits: Any, k: int, chunk: int = sampling.CHUNK, capacity: int = sampling.CAPACITY
) -> list[sampling.Row | None]:
    """Run the sampling kernels on `logits`, a torch CPU tensor float32 [N, vocab].

    chunk, capacity: sizes; smaller ones than the kernels have give more parts, and sooner too many ties
    """
    from llmc.plugins.sampling import kernels

    rows, vocab = logits.shape
    shares = sampling.parts(vocab, chunk)
    sizes = {"CHUNK": chunk, "CAPACITY": capacity, "TILE": min(chunk, sampling.TILE)}
    sizes["PARTS"] = 1 << (shares - 1).bit_length()
    result = logits.new_full((rows, sampling.width(k, capacity)), -7).int()
    given: dict[str, Any] = {"logits": logits, "vocab": vocab, "k": k, "parts": shares, "result": result}
    for name, size in sampling.scratch(rows, vocab, chunk, capacity).items():
        numbers = logits.new_full((size // 4,), -7)
        given[name] = numbers.long() if name == "partial" else numbers.int()
    for name, grid in sampling.launches(rows, vocab, k):
        constants = {constant: sizes[constant] for constant in sampling.configure(name).constants}
        grid = (shares, *grid[1:]) if "CHUNK" in constants else grid
        getattr(kernels, name)[grid](**{a: given[a] for a in sampling.ARGUMENTS[name]}, **constants)
    return sampling.read(result.numpy(), k)


def _patch_interpreter() -> None:
    """Correct the arithmetic of Triton 3.9's interpreter for bfloat16.

    It multiplies bfloat16 matrices by their bits and truncates float32 to bfloat16. A GPU multiplies numbers
    and rounds to nearest even. Bits of a bfloat16 are the upper half of a float32.
    """
    import triton.language as tl
    from triton.runtime import interpreter

    builder = interpreter.InterpreterBuilder
    if getattr(builder, "llmc_mended", False):
        return
    dot, trunc = builder.create_dot, builder.create_fp_trunc

    def widen(x: Any) -> Any:
        if x.dtype.scalar != tl.bfloat16:
            return x
        return interpreter.TensorHandle((x.data.astype(np.uint32) << 16).view(np.float32), tl.float32)

    def right_dot(self: Any, a: Any, b: Any, *rest: Any) -> Any:
        return dot(self, widen(a), widen(b), *rest)

    def right_trunc(self: Any, x: Any, to: Any) -> Any:
        if to.scalar != tl.bfloat16 or x.dtype.scalar != tl.float32:
            return trunc(self, x, to)
        bits = np.ascontiguousarray(x.data).view(np.uint32).astype(np.uint64)
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        rounded = np.where(np.isnan(x.data), (bits >> 16) | 0x40, rounded)
        return interpreter.TensorHandle(rounded.astype(np.uint16), tl.bfloat16)

    builder.create_dot, builder.create_fp_trunc, builder.llmc_mended = right_dot, right_trunc, True
