"""The sizes of the KV cache and of scratch memory, computed when everything else is on the GPU."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from llmc.plugins.paged_attention import launch
from llmc.plugins.paged_attention.launch import Attention
from llmc.runtime.bundle.manifest import Geometry, Precision
from llmc.runtime.errors import RequestError

# Left free for CUDA graphs and for kernels that CUDA and TensorRT load or compile later. Not measured yet.
_RESERVE_BYTES = 512 << 20
_RESERVE_SHARE = 0.03  # of the GPU's memory


def reserve(total: int) -> int:
    """Return how many of a GPU's `total` bytes the KV cache must leave free."""
    return max(_RESERVE_BYTES, int(total * _RESERVE_SHARE))


def cache_blocks(
    block_bytes: int, *, free: int, total: int, kv_memory: int | None, useful: int, most: int
) -> int:
    """Return how many KV blocks to allocate.

    block_bytes: the size of one block, all layers.
    free, total: the GPU's free and total bytes.
    kv_memory: the bytes that the user allows. None: everything but the reserve.
    useful: the number of blocks that can be in use.
    most: the number of blocks that the engine can address.
    Raises RequestError if not even one block fits, or if kv_memory is not available.
    """
    available = max(0, free - reserve(total))
    if kv_memory is not None and kv_memory > available:
        raise RequestError(
            f"{kv_memory} bytes of KV cache are asked for, the GPU has {available}: {free} are free of "
            f"{total}, {reserve(total)} are reserved for CUDA graphs",
            f"give at most {available} bytes with --kv-memory, or leave it out",
            "kv_memory",
        )
    budget = available if kv_memory is None else kv_memory
    blocks = min(useful, most, budget // block_bytes)
    if blocks < 1:
        raise RequestError(
            f"{budget} bytes of KV cache hold no block ({block_bytes} bytes)",
            f"give at least {block_bytes} bytes with --kv-memory"
            if kv_memory is not None
            else "the model leaves no room: free memory on the GPU, or lower max_sequences",
            "kv_memory" if kv_memory is not None else "",
        )
    return blocks


def geometry_of_rank(geometry: Geometry, kv_heads: Sequence[int], ranks: int) -> Geometry:
    """Return the geometry of the part that one of several ranks has.

    kv_heads: the KV heads that the rank has of each layer
    """
    layers = tuple(
        replace(layer, num_kv_heads=own) for layer, own in zip(geometry.layers, kv_heads, strict=True)
    )
    heads = [
        # Ranks that share a KV head have equal numbers of its heads.
        own * (geometry.num_heads // layer.num_kv_heads)
        if layer.num_kv_heads >= ranks
        else geometry.num_heads // ranks
        for layer, own in zip(geometry.layers, kv_heads, strict=True)
    ]
    return replace(geometry, num_heads=max(heads), num_kv_heads=max(kv_heads), layers=layers)


def scratch_bytes(
    geometry: Geometry,
    max_sequences: int,
    max_seq_len: int,
    precision: Precision,
    sm: int,
    multiprocessors: int,
) -> int:
    """Return the bytes of scratch for the splits of decode steps of up to `max_sequences` sequences."""
    kinds = {
        Attention(geometry.num_heads, layer.num_kv_heads, layer.head_dim, layer.v_head_dim, layer.window)
        for layer in geometry.layers
    }
    largest = 0
    for count in range(1, max_sequences + 1):
        start, past = longest_decode(count, max_seq_len)
        for kind in kinds:
            plan = launch.plan(
                kind, precision.dtype, precision.kv_dtype, start, past, sm=sm, multiprocessors=multiprocessors
            )
            largest = max(largest, launch.scratch_layout(plan)[1])
    return largest


def longest_decode(count: int, max_seq_len: int) -> tuple[np.ndarray, np.ndarray]:
    """Return query_start and past_lengths of a decode step of `count` sequences of maximum length.

    Its launches also serve every decode step with fewer or shorter sequences. See `step.py`.
    """
    return np.arange(count + 1, dtype=np.int32), np.full(count, max_seq_len - 1, np.int32)
