"""Launch plans for a step of `llmc.PagedAttention`: variants, tiles, grids, splits, scratch.

Nothing here imports torch, triton or CUDA at the top, so plans can be made, printed and tested anywhere.
A variant is one compiled kernel. Only `configure` chooses tiles. All tensors are contiguous and begin at
multiples of 16 bytes, because the kernels are compiled for that.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

import numpy as np

from llmc.plugins.cuda.config import Config
from llmc.plugins.cuda.gpus import SHARED_LIMIT, SMS
from llmc.plugins.paged_attention.spec import QUANTIZED_CACHES

DTYPES = ("fp16", "bf16")
FP8 = "fp8"  # in spec.QUANTIZED_CACHES
FP8_CONVERSION = 89  # the first SM with an instruction that widens E4M3 (PTX ISA, cvt)
MAX_HEAD_DIM = 256
MAX_GROUP = 64  # query heads of one key/value head
MAX_SPLITS = 64
MIN_KEYS_PER_SPLIT = 128  # with fewer, a split's start-up costs more than its share of the cache
_KEYS_PER_QUANTIZED_SPLIT = 1024  # the minimum, beyond two programs per multiprocessor
_SM90_DECODE = {  # (widest head, quantized cache) -> keys, warps, stages
    (64, False): (64, 4, 3), (128, False): (32, 4, 3), (256, False): (64, 8, 3),
    (64, True): (128, 2, 3), (128, True): (64, 2, 3), (256, True): (64, 4, 3),
}  # fmt: skip
_SWIZZLED = 64  # two-byte elements in the widest swizzle of shared memory
_CHUNK = 128  # sequences that a program compares at once to find its own

_STEP = dict.fromkeys(("query_start", "past_lengths", "block_indices", "block_begins"), "*i32")
_SCALARS = {"scale": "fp32", "softcap": "fp32", "window": "i32", "k_scale": "fp32", "v_scale": "fp32"}
_PARTIAL = {"partial_sums": "*fp32", "partial_top": "*fp32", "partial_total": "*fp32"}
_CACHES = {"key_cache": "*cache", "value_cache": "*cache"}
# Kernel -> its run-time arguments, in order. `*model` and `*cache` depend on the variant.
ARGUMENTS: dict[str, dict[str, str]] = {
    "write_kv": {"key": "*model", "value": "*model", **_CACHES, **_STEP}
    | {"num_sequences": "i32", "k_scale": "fp32", "v_scale": "fp32"},
    "prefill": {"output": "*model", "query": "*model", **_CACHES, **_STEP, "sinks": "*fp32"}
    | {"num_sequences": "i32", **_SCALARS},
    "decode": {"output": "*model", **_PARTIAL, "query": "*model", **_CACHES, **_STEP, "sinks": "*fp32"}
    | {"num_splits": "i32", **_SCALARS},
    "reduce": {"output": "*model", **_PARTIAL, "query_start": "*i32", "num_splits": "i32"},
}


#: In bytes. The kernels are compiled for tensors that begin at multiples of it.
ALIGNMENT = 16


@dataclass(frozen=True)
class Attention:
    """The attributes of one layer, as in `spec.py`, with the head sizes and whether it has sinks.

    Raises ValueError for head counts and sizes that the kernels do not support.
    """

    num_heads: int
    num_kv_heads: int
    #: The width of a query or key head.
    head_dim: int
    #: The width of a value head.
    v_head_dim: int
    #: The sliding window in tokens; 0: none.
    window: int = 0
    #: 0: none.
    softcap: float = 0.0
    #: Whether each head has an attention sink, a logit without a value.
    sinks: bool = False

    def __post_init__(self) -> None:
        if self.num_kv_heads < 1 or self.num_heads % self.num_kv_heads:
            raise ValueError(f"{self.num_heads} query heads do not share {self.num_kv_heads} key/value heads")
        if self.num_heads // self.num_kv_heads > MAX_GROUP:
            raise ValueError(f"more than {MAX_GROUP} query heads to a key/value head")
        if (
            not 1
            <= min(self.head_dim, self.v_head_dim)
            <= max(self.head_dim, self.v_head_dim)
            <= MAX_HEAD_DIM
        ):
            raise ValueError(
                f"head sizes {self.head_dim}, {self.v_head_dim}: 1 to {MAX_HEAD_DIM} are supported"
            )


@dataclass(frozen=True)
class Variant:
    """One kernel to compile. Fields that a kernel does not depend on have their defaults (`variant`)."""

    #: A key of ARGUMENTS.
    kernel: str
    #: The element type of activations, "fp16" or "bf16".
    dtype: str
    #: `dtype`, or a name in QUANTIZED_CACHES, whose codes are passed to the kernels as bytes.
    kv_dtype: str
    num_kv_heads: int
    #: Query heads per key/value head.
    group: int = 1
    head_dim: int = 0
    v_head_dim: int = 0
    has_window: bool = False
    has_sinks: bool = False
    has_softcap: bool = False

    def __str__(self) -> str:
        flags = [n for n in ("window", "sinks", "softcap") if getattr(self, f"has_{n}")]
        cache = [f"{self.kv_dtype}kv"] if self.kv_dtype in QUANTIZED_CACHES else []
        sizes = f"h{self.num_kv_heads}x{self.group}d{self.head_dim or self.v_head_dim}"
        if self.head_dim and self.head_dim != self.v_head_dim:
            sizes += f"v{self.v_head_dim}"
        return "-".join([self.kernel, self.dtype, *cache, sizes, *flags])


@dataclass(frozen=True)
class Launch:
    """One launch of a kernel."""

    variant: Variant
    #: Programs (thread blocks) along each axis.
    grid: tuple[int, int, int]


@dataclass(frozen=True)
class Plan:
    """The launches of one step, in order, on one stream."""

    launches: tuple[Launch, ...]
    #: How many programs share the cache of a decoding sequence.
    num_splits: int
    #: Argument name -> the shape of a float32 scratch tensor.
    scratch: Mapping[str, tuple[int, ...]]

    @property
    def scratch_bytes(self) -> int:
        """Bytes of all scratch tensors."""
        return sum(4 * int(np.prod(shape)) for shape in self.scratch.values())


def scratch_layout(plan: Plan) -> tuple[dict[str, int], int]:
    """Return the offset of each of a plan's scratch tensors by name, and their total size, in bytes."""
    offsets, end = {}, 0
    for name, shape in plan.scratch.items():
        offsets[name] = end
        end += -(-4 * math.prod(shape) // ALIGNMENT) * ALIGNMENT
    return offsets, end


def variant(kernel: str, attention: Attention, dtype: str, kv_dtype: str | None = None) -> Variant:
    """Return the variant of a kernel for a layer. kv_dtype: None for a cache in the model's dtype.

    Raises ValueError for an unknown dtype.
    """
    if dtype not in DTYPES:
        raise ValueError(f"activations of {dtype}: choose one of {', '.join(DTYPES)}")
    kv_dtype = kv_dtype or dtype
    if kv_dtype not in (dtype, *QUANTIZED_CACHES):
        known = " or ".join((dtype, *QUANTIZED_CACHES))
        raise ValueError(f"a cache of {kv_dtype} for activations of {dtype}: choose {known}")
    a = attention
    if kernel == "reduce":  # reads no cache
        return Variant(kernel, dtype, dtype, a.num_kv_heads, a.num_heads // a.num_kv_heads, 0, a.v_head_dim)
    whole = Variant(
        kernel, dtype, kv_dtype, a.num_kv_heads, a.num_heads // a.num_kv_heads, a.head_dim, a.v_head_dim,
        a.window > 0, a.sinks, a.softcap > 0,
    )  # fmt: skip
    if kernel == "write_kv":
        return replace(whole, group=1, has_window=False, has_sinks=False, has_softcap=False)
    return whole


def variants_for(
    layers: Iterable[Attention], dtypes: Iterable[tuple[str, str | None]]
) -> tuple[Variant, ...]:
    """Return every kernel that a model with these layers needs, once, for each (dtype, kv_dtype)."""
    pairs = list(dtypes)
    needed = [variant(k, layer, *pair) for layer in layers for pair in pairs for k in ARGUMENTS]
    return tuple(dict.fromkeys(needed))


def signature(v: Variant) -> dict[str, str]:
    """Return run-time argument -> Triton type. Triton appends two scratch pointers; pass null for both."""
    types = {"*model": f"*{v.dtype}", "*cache": "*u8" if v.kv_dtype in QUANTIZED_CACHES else f"*{v.dtype}"}
    return {name: types.get(type_, type_) for name, type_ in ARGUMENTS[v.kernel].items()}


def padded(size: int, least: int = 16) -> int:
    """Return the next power of two, at least `least`. Triton requires one, and tl.dot at least 16."""
    return max(least, 1 << (size - 1).bit_length())


def configure(v: Variant, sm: int) -> Config:
    """Return the tiles and constants of a variant. Raises ValueError for an SM without kernels."""
    if sm not in SHARED_LIMIT:
        raise ValueError(f"SM{sm}: kernels are made for {', '.join(f'SM{s}' for s in SMS)}")
    wide, v_wide = padded(v.head_dim or 1), padded(v.v_head_dim)
    sizes = {"V_HEAD_DIM": v.v_head_dim, "V_HEAD_DIM_PAD": v_wide}
    if v.kernel == "reduce":
        sizes |= {"HEADS": v.num_kv_heads * v.group, "MAX_SPLITS": MAX_SPLITS}
        return Config(sizes, num_warps=2 if v_wide <= 128 else 4, num_stages=2)
    sizes |= {"KV_HEADS": v.num_kv_heads, "HEAD_DIM": v.head_dim, "HEAD_DIM_PAD": wide}
    sizes |= {"FP8": 0 if v.kv_dtype != FP8 else 2 if sm >= FP8_CONVERSION else 1}
    if v.kernel == "write_kv":
        sizes |= {"KV_HEADS_PAD": padded(v.num_kv_heads, 1), "CHUNK": _CHUNK}
        return Config(sizes, num_warps=4, num_stages=2)
    sizes |= {"GROUP": v.group, "HAS_WINDOW": v.has_window, "HAS_SINKS": v.has_sinks}
    sizes |= {"HAS_SOFTCAP": v.has_softcap}
    widest = max(wide, v_wide)
    # SM90 and SM100, whose matrix products read both operands from shared memory.
    roomy = SHARED_LIMIT[sm] > 200_000
    if roomy:  # one swizzle for keys and values: ptxas 12.8 computes a wrong address with two (docs/gpu)
        sizes["HEAD_DIM_PAD"] = max(wide, min(v_wide, _SWIZZLED))
        sizes["V_HEAD_DIM_PAD"] = max(v_wide, min(wide, _SWIZZLED))
    quantized = v.kv_dtype in QUANTIZED_CACHES
    in_pairs = quantized and v.v_head_dim % 2 == 0 and not (roomy and v.kernel == "prefill")
    sizes |= {"VALUES_IN_PAIRS": in_pairs}
    if v.kernel == "decode":
        rows = padded(v.group)
        keys, warps, stages = _decode_tile(rows, max(64, widest), quantized, sm)
        return Config(sizes | {"ROWS": rows, "KEYS": keys}, num_warps=warps, num_stages=stages)
    rows, keys, warps, stages = 128, 64, 8, 2
    if sm == 90 and widest <= 64 and v.has_window:  # few keys a row: small tiles mask less (docs/gpu)
        rows, keys, warps, stages = 64, 32, 4, 3
    elif roomy and widest <= 64:
        warps, stages = 4, 3 if sm == 90 else 2
    elif sm == 90 and widest <= 128:
        keys, stages = 64 if quantized else 128, 3
    elif not roomy and widest > 64:  # without wgmma, larger tiles spill registers
        rows, keys = (128, 32) if widest <= 128 else (64, 32)
    sizes |= {"ROWS": rows, "KEYS": keys, "CHUNK": _CHUNK}
    return Config(sizes, num_warps=warps, num_stages=stages)


def _decode_tile(rows: int, widest: int, quantized: bool, sm: int) -> tuple[int, int, int]:
    """Return keys, warps and stages. Those of SM90 are measured (docs/gpu/README.md)."""
    if sm == 90 and rows == 16:
        return _SM90_DECODE[widest, quantized]
    return (64 if widest <= 128 else 32), 4, 2


def splits(
    sequences: int, num_kv_heads: int, longest: int, multiprocessors: int, kv_dtype: str | None = None
) -> int:
    """Return how many programs share a sequence's cache: enough for two on each multiprocessor.

    Decode of a long quantized cache is limited by instructions, so up to ten per multiprocessor share it.
    """
    programs = max(1, sequences * num_kv_heads)
    wanted = -(-2 * multiprocessors // programs)
    if kv_dtype in QUANTIZED_CACHES and wanted > 1:
        wanted = max(wanted, min(10 * multiprocessors // programs, longest // _KEYS_PER_QUANTIZED_SPLIT))
    return max(1, min(wanted, longest // MIN_KEYS_PER_SPLIT, MAX_SPLITS))


def plan(
    attention: Attention,
    dtype: str,
    kv_dtype: str | None,
    query_start: np.ndarray,
    past_lengths: np.ndarray,
    *,
    sm: int,
    multiprocessors: int,
    num_splits: int | None = None,
) -> Plan:
    """Plan the launches of a step from its lengths on the host.

    query_start, past_lengths: int32 [S+1] and [S], as in `spec.py`.
    sm, multiprocessors: the GPU's.
    num_splits: None for the number that `splits` chooses.
    The grids depend on the numbers of tokens and sequences and on whether there are prefills and decodes. The
    kernels find their sequences on the device, so a plan for a captured CUDA graph serves every step of the
    same shapes.
    Raises ValueError for lengths that contradict each other, and for more than MAX_SPLITS splits.
    """
    new = np.diff(query_start)
    tokens, count = int(query_start[-1]), len(new)
    if len(past_lengths) != count or count == 0 or int(query_start[0]) != 0 or (new < 0).any():
        raise ValueError("query_start begins with 0, does not fall, and has one entry more than past_lengths")
    heads, kv_heads = attention.num_heads, attention.num_kv_heads
    single = new == 1
    launches = []

    def add(kernel: str, *grid: int) -> None:
        launches.append(Launch(variant(kernel, attention, dtype, kv_dtype), (*grid, 1, 1)[:3]))  # type: ignore[arg-type]

    if tokens:
        add("write_kv", tokens)
    if (new > 1).any():
        tile_rows = configure(variant("prefill", attention, dtype, kv_dtype), sm).constants["ROWS"]
        tile_tokens = tile_rows // (heads // kv_heads)
        add("prefill", tokens // tile_tokens + count, kv_heads)
    if not single.any():
        return Plan(tuple(launches), 1, {})
    longest = int((past_lengths + new)[single].max())
    if attention.window:
        longest = min(longest, attention.window)
    if num_splits is None:
        num_splits = splits(int(single.sum()), kv_heads, longest, multiprocessors, kv_dtype)
    if not 1 <= num_splits <= MAX_SPLITS:
        raise ValueError(f"{num_splits} splits: 1 to {MAX_SPLITS} are possible")
    add("decode", count, kv_heads, num_splits)
    if num_splits == 1:
        return Plan(tuple(launches), 1, {})
    add("reduce", count, heads)
    rows = (count, heads, num_splits)
    scratch = {"partial_sums": (*rows, attention.v_head_dim), "partial_top": rows, "partial_total": rows}
    return Plan(tuple(launches), num_splits, scratch)
