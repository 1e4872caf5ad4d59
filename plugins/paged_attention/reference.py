"""The reference implementation of `llmc.PagedAttention` in numpy, one sequence and one head at a time.

It is simple rather than fast. Every other implementation is compared with it.
"""

from __future__ import annotations

import numpy as np

from llmc.plugins.paged_attention.spec import BLOCK_SIZE, E4M3_MAX


def paged_attention(
    query: np.ndarray,
    key: np.ndarray,
    value: np.ndarray | None,
    key_cache: np.ndarray,
    value_cache: np.ndarray | None,
    query_start: np.ndarray,
    past_lengths: np.ndarray,
    block_indices: np.ndarray,
    block_begins: np.ndarray,
    *,
    num_heads: int,
    num_kv_heads: int,
    scale: float,
    window: int = 0,
    softcap: float = 0.0,
    chunk: int = 0,
    key_scale: float = 1.0,
    value_scale: float = 1.0,
    sinks: np.ndarray | None = None,
    value_width: int = 0,
) -> np.ndarray:
    """Write the new keys and values into the caches in place, and return the output.

    Shapes are as in `spec.py`. The arithmetic is float64. Caches may be `ml_dtypes.float8_e4m3fn`.
    chunk: 0, or a query sees only the keys of its own chunk of `chunk` positions.
    key_scale, value_scale: the scales of such caches.
    value_width: of latent attention, which has no value and value_cache (None)
    sinks: float [num_heads], logits without a value. Each takes a share of its head's softmax.
    Returns [T, num_heads*Dv] in the query's dtype.
    """
    tokens = query.shape[0]
    queries = query.reshape(tokens, num_heads, -1).astype(np.float64)
    keys = _entries(key.reshape(tokens, num_kv_heads, -1), key_cache, key_scale)
    if value is None or value_cache is None:
        values, value_cache = keys[..., :value_width], key_cache[..., :value_width]
    else:
        values = _entries(value.reshape(tokens, num_kv_heads, -1), value_cache, value_scale)
    output = np.zeros((tokens, num_heads, values.shape[-1]))
    for s, past in enumerate(past_lengths):
        table = block_indices[block_begins[s] : block_begins[s + 1]]
        start, end = query_start[s], query_start[s + 1]
        if start == end:  # padding, which may have no blocks
            continue
        for t in range(start, end):
            position = past + t - start
            block, offset = table[position // BLOCK_SIZE], position % BLOCK_SIZE
            key_cache[block, :, offset] = keys[t]
            value_cache[block, :, offset] = values[t]
        length = past + end - start
        all_keys, all_values = (
            np.concatenate([cache[b] for b in table], axis=1)[:, :length].astype(np.float64) * factor
            for cache, factor in ((key_cache, key_scale), (value_cache, value_scale))
        )
        for t in range(start, end):
            position = past + t - start
            first = max(0, position - window + 1) if window > 0 else 0
            first = max(first, position // chunk * chunk) if chunk > 0 else first
            for h in range(num_heads):
                g = h // (num_heads // num_kv_heads)
                scores = all_keys[g, first : position + 1] @ queries[t, h] * scale
                if softcap > 0:
                    scores = softcap * np.tanh(scores / softcap)
                sink = -np.inf if sinks is None else float(sinks[h])
                top = max(scores.max(), sink)
                weights = np.exp(scores - top)
                total = weights.sum() + np.exp(sink - top)
                output[t, h] = weights @ all_values[g, first : position + 1] / total
    return output.reshape(tokens, -1).astype(query.dtype)


def _entries(x: np.ndarray, cache: np.ndarray, scale: float) -> np.ndarray:
    """Return the cache entries for `x`: `x` itself, or its E4M3 codes."""
    if cache.dtype.itemsize > 1:
        return x
    codes = np.clip(x.astype(np.float32) / np.float32(scale), -E4M3_MAX, E4M3_MAX)
    return codes.astype(cache.dtype)
