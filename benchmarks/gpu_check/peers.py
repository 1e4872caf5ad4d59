"""Other attention kernels on the same step: torch's, and those of FlashInfer and flash-attn if installed.

Each entry of PEERS prepares its inputs and returns the call to time, which returns [T, num_heads, Dv].
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import torch

from llmc.plugins.paged_attention.launch import FP8
from llmc.plugins.paged_attention.spec import BLOCK_SIZE

from .work import Workload

Tensors = dict[str, torch.Tensor]
Call = Callable[[], torch.Tensor]
_FLASH_ATTN_PAGE = 256  # tokens; page sizes of its caches are multiples of this
_WORKSPACE = 256 << 20  # bytes, for FlashInfer


def missing(name: str) -> str:
    """Return why a peer cannot be imported, or ""."""
    try:
        importlib.import_module(MODULES[name])
    except Exception as error:  # a wheel for another torch fails in its own ways
        return f"{type(error).__name__}: {error}"
    return ""


def cannot(name: str, w: Workload) -> str:
    """Return why a peer does not compute this workload, or ""."""
    if w.attention.window or w.attention.sinks:
        return "not asked for windows and sinks"
    if w.kv_dtype == FP8:
        return "not asked for FP8 caches"
    if name == "flash-attn" and w.context % _FLASH_ATTN_PAGE:
        return f"its pages have {_FLASH_ATTN_PAGE} tokens"
    if name != "flashinfer" and w.cache_bytes > torch.cuda.mem_get_info()[0] - (2 << 30):
        return "its own copy of the cache does not fit this card"
    return ""


def arranged(w: Workload, t: Tensors, name: str) -> torch.Tensor:
    """Return a cache without pages, [batch, num_kv_heads, context, width]. All pages must be full."""
    pool = t[name]
    per_sequence = w.context // BLOCK_SIZE
    table = t["block_indices"].view(w.batch, per_sequence).long()
    out = pool.new_empty((w.batch, pool.shape[1], per_sequence, BLOCK_SIZE, pool.shape[3]))
    for s in range(w.batch):
        out[s] = pool[table[s]].transpose(0, 1)
    return out.view(w.batch, pool.shape[1], w.context, pool.shape[3])


def sdpa(w: Workload, t: Tensors) -> Call:
    """Return a call of torch's scaled_dot_product_attention, which chooses the kernel."""
    a = w.attention
    query = t["query"].view(w.batch, w.new, a.num_heads, a.head_dim).transpose(1, 2)
    key, value = arranged(w, t, "key_cache"), arranged(w, t, "value_cache")
    causal = w.new > 1  # a single token sees everything; is_causal would align it with the first key

    def call() -> torch.Tensor:
        result = torch.nn.functional.scaled_dot_product_attention(
            query, key, value, is_causal=causal, enable_gqa=True
        )
        return result.transpose(1, 2)

    return call


def flashinfer(w: Workload, t: Tensors) -> Call:
    """Return a call of FlashInfer's paged kernels, on llmc's pool."""
    library: Any = importlib.import_module(MODULES["flashinfer"])
    a = w.attention
    workspace = torch.empty(_WORKSPACE, dtype=torch.uint8, device=t["query"].device)
    last_page = torch.full_like(t["past_lengths"], (w.context - 1) % BLOCK_SIZE + 1)
    query = t["query"].view(-1, a.num_heads, a.head_dim)
    pages = (t["block_begins"], t["block_indices"], last_page)
    sizes = (a.num_heads, a.num_kv_heads, a.head_dim, BLOCK_SIZE)
    if w.kind == "decode":
        wrapper = library.BatchDecodeWithPagedKVCacheWrapper(workspace, "HND", use_tensor_cores=True)
        wrapper.plan(*pages, *sizes, q_data_type=query.dtype, kv_data_type=query.dtype)
    else:
        wrapper = library.BatchPrefillWithPagedKVCacheWrapper(workspace, "HND")
        wrapper.plan(t["query_start"], *pages, *sizes, causal=True, q_data_type=query.dtype)
    return lambda: wrapper.run(query, (t["key_cache"], t["value_cache"]))


def flash_attn(w: Workload, t: Tensors) -> Call:
    """Return a call of flash-attn 2 with a block table, on a copy of the cache in pages of 256 tokens."""
    library: Any = importlib.import_module(MODULES["flash-attn"])
    a = w.attention
    per_sequence = w.context // _FLASH_ATTN_PAGE

    def paged(name: str) -> torch.Tensor:
        whole = arranged(w, t, name).transpose(1, 2).contiguous()
        return whole.view(w.batch * per_sequence, _FLASH_ATTN_PAGE, a.num_kv_heads, -1)

    key, value = paged("key_cache"), paged("value_cache")
    table = torch.arange(len(key), dtype=torch.int32, device=key.device).view(w.batch, per_sequence)
    query = t["query"].view(-1, a.num_heads, a.head_dim)
    lengths = t["past_lengths"] + w.new
    if w.kind == "decode":
        return lambda: library.flash_attn_with_kvcache(
            query.unsqueeze(1), key, value, cache_seqlens=lengths, block_table=table, causal=True
        )
    starts = torch.arange(w.batch + 1, dtype=torch.int32, device=key.device) * w.context
    return lambda: library.flash_attn_varlen_func(
        query, key, value, t["query_start"], starts, w.new, w.context, causal=True, block_table=table
    )


MODULES = {"torch sdpa": "torch", "flashinfer": "flashinfer", "flash-attn": "flash_attn"}
PEERS: dict[str, Callable[[Workload, Tensors], Call]] = {
    "torch sdpa": sdpa, "flashinfer": flashinfer, "flash-attn": flash_attn,
}  # fmt: skip
