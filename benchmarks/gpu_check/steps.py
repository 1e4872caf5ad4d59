"""The random tensors of a case, and the expected results of the kernels with their error bound."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from llmc.plugins.paged_attention import launch, reference
from llmc.plugins.paged_attention.launch import FP8
from llmc.plugins.paged_attention.spec import BLOCK_SIZE

from .cases import Case

MODEL = {"fp16": torch.float16, "bf16": torch.bfloat16}
ROUNDING = {"fp16": 2.0**-11, "bf16": 2.0**-8}  # the relative error of one rounding to the dtype
SCALES = {"key": 0.05, "value": 0.02}  # of FP8 caches
NAN_E4M3 = 0x7F
CACHES = ("key_cache", "value_cache")
_SPARE = 3  # blocks that no sequence uses

Tensors = dict[str, torch.Tensor]


def make(case: Case, seed: int) -> Tensors:
    """Return argument name -> CPU tensor. Caches have their stored form: E4M3 as bytes.

    Cache entries without a past token are NaN, and so are blocks that no sequence owns.
    """
    a, step = case.attention, case.step
    rng = np.random.default_rng(seed)
    tokens = sum(step.new)
    lengths = [p + n for p, n in zip(step.past, step.new, strict=True)]
    counts = [-(-length // BLOCK_SIZE) for length in lengths]
    blocks = sum(counts) + _SPARE
    free = rng.permutation(blocks).astype(np.int32)
    begins = np.cumsum([0, *counts]).astype(np.int32)
    table, spare = free[: begins[-1]].copy(), free[begins[-1]]
    for begin in begins[1:-1]:
        table[begin : begin + step.shared] = table[: step.shared]

    def normal(*size: int) -> torch.Tensor:
        return torch.from_numpy(rng.standard_normal(size, dtype=np.float32)).to(MODEL[case.dtype])

    tensors = {
        "query": normal(tokens, a.num_heads * a.head_dim),
        "key": normal(tokens, a.num_kv_heads * a.head_dim),
        "value": normal(tokens, a.num_kv_heads * a.v_head_dim),
        "key_cache": normal(blocks, a.num_kv_heads, BLOCK_SIZE, a.head_dim),
        "value_cache": normal(blocks, a.num_kv_heads, BLOCK_SIZE, a.v_head_dim),
    }
    used = torch.zeros(blocks, BLOCK_SIZE, dtype=torch.bool)
    for begin, past in zip(begins, step.past, strict=False):
        for n in range(past):
            used[int(table[begin + n // BLOCK_SIZE]), n % BLOCK_SIZE] = True
    for name in CACHES:
        tensors[name].swapaxes(1, 2)[~used] = float("nan")
        if case.kv_dtype == FP8:
            tensors[name] = to_e4m3(tensors[name], SCALES[name.removesuffix("_cache")])
    if step.forget:
        for begin, past in zip(begins, step.past, strict=False):
            table[begin : begin + max(0, past - a.window + 1) // BLOCK_SIZE] = spare
    for name, array in {
        "query_start": np.cumsum([0, *step.new]), "past_lengths": np.array(step.past),
        "block_indices": table, "block_begins": begins,
    }.items():  # fmt: skip
        tensors[name] = torch.from_numpy(array.astype(np.int32))
    if a.sinks:
        tensors["sinks"] = torch.from_numpy(rng.standard_normal(a.num_heads, dtype=np.float32))
    return tensors


def plan(case: Case, tensors: Tensors, sm: int, multiprocessors: int) -> launch.Plan:
    return launch.plan(
        case.attention, case.dtype, case.kv_dtype,
        tensors["query_start"].numpy(), tensors["past_lengths"].numpy(),
        sm=sm, multiprocessors=multiprocessors, num_splits=case.step.num_splits,
    )  # fmt: skip


def scales(case: Case) -> dict[str, float]:
    """Return the softmax scale, and the scales of an FP8 cache."""
    softmax = {"scale": case.attention.head_dim**-0.5}
    if case.kv_dtype != FP8:
        return softmax
    return softmax | {"k_scale": SCALES["key"], "v_scale": SCALES["value"]}


@dataclass(frozen=True)
class Expected:
    """The expected results of a step."""

    #: float64 [T, num_heads*Dv].
    output: np.ndarray
    #: The largest allowed error of each element, float64 [T, num_heads*Dv].
    bound: np.ndarray
    #: The caches in their stored form.
    caches: Tensors


def expected(case: Case, tensors: Tensors) -> Expected:
    """Compute the numpy reference on the same numbers, those of an FP8 cache included.

    A kernel rounds each softmax weight to the dtype (an error of u times the contribution of |values|) and
    then the output. 2**-15 covers float32 sums and exp2. docs/explanation/kernels.md derives the bound.
    """
    a = case.attention
    given: dict[str, Any] = {name: t.numpy() for name, t in tensors.items() if not t.is_floating_point()}
    caches = {}
    for name in ("query", "key", "value"):
        given[name] = tensors[name].float().numpy()
    if a.sinks:
        given["sinks"] = tensors["sinks"].numpy()
    for name, scale in SCALES.items():
        stored = tensors[f"{name}_cache"]
        new = tensors[name]
        if case.kv_dtype == FP8:
            new = to_e4m3(new, scale)
            given[name] = from_e4m3(new, scale).numpy()
            given[f"{name}_cache"] = from_e4m3(stored, scale).numpy()
        else:
            given[f"{name}_cache"] = stored.float().numpy().copy()
        caches[f"{name}_cache"] = _written(stored, new, tensors)
    options: dict[str, Any] = {
        "num_heads": a.num_heads, "num_kv_heads": a.num_kv_heads, "scale": a.head_dim**-0.5,
        "window": a.window, "softcap": a.softcap,
    }  # fmt: skip
    absolute = given | {name: np.abs(given[name]) for name in ("value", "value_cache")}
    absolute["key_cache"] = given["key_cache"].copy()
    answer = reference.paged_attention(**given, **options).astype(np.float64)
    reach = reference.paged_attention(**absolute, **options)
    u = ROUNDING[case.dtype]
    return Expected(answer, u * np.abs(answer) + (u + 2**-15) * reach + 1e-5, caches)


def to_e4m3(x: torch.Tensor, scale: float) -> torch.Tensor:
    """Return x / scale as E4M3 bytes, rounded to nearest even and saturated. NaN stays NaN."""
    scaled = (x.float() / torch.tensor(scale, dtype=torch.float32)).clamp(-448, 448)
    return scaled.to(torch.float8_e4m3fn).view(torch.uint8)


def from_e4m3(bits: torch.Tensor, scale: float) -> torch.Tensor:
    return bits.view(torch.float8_e4m3fn).float() * scale


def _written(stored: torch.Tensor, new: torch.Tensor, tensors: Tensors) -> torch.Tensor:
    """Return the cache after the entries of the new tokens, [T, num_kv_heads*D], were written."""
    cache = stored.clone()
    starts, past = tensors["query_start"].tolist(), tensors["past_lengths"].tolist()
    table, begins = tensors["block_indices"].tolist(), tensors["block_begins"].tolist()
    for s, before in enumerate(past):
        for t in range(starts[s], starts[s + 1]):
            position = before + t - starts[s]
            block = table[begins[s] + position // BLOCK_SIZE]
            cache[block, :, position % BLOCK_SIZE] = new[t].view(cache.shape[1], cache.shape[3])
    return cache
