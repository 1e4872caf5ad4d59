"""Rope of a Hugging Face checkpoint in the form that llama.cpp uses for Llama.

transformers rotates the pairs (j, j + D/2) of a head of D values. llama.cpp rotates the pairs (2j, 2j + 1) of
a Llama model, so the rows of its q and k weights are in another order.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np


def rope_parameters(config: dict[str, Any]) -> dict[str, Any]:
    """Return "rope_theta", "rope_type" and what belongs to the type, from either form of config.json."""
    found = dict(config.get("rope_parameters") or config.get("rope_scaling") or {})
    found.setdefault("rope_theta", config.get("rope_theta", 10000.0))
    found.setdefault("rope_type", found.get("type", "default"))
    return found


def interleave_pairs(weight: np.ndarray, heads: int) -> np.ndarray:
    """Return the weight [heads * D, ...] of q or k, with rows j and j + D/2 of each head at 2j and 2j + 1."""
    halves = weight.reshape(heads, 2, -1, *weight.shape[1:])
    return np.ascontiguousarray(halves.swapaxes(1, 2)).reshape(weight.shape)


def frequency_divisors(rope: dict[str, Any], head_dim: int) -> np.ndarray:
    """Return what the rope type "llama3" divides the D/2 frequencies by, as float32 [D/2].

    Wavelengths below original_max_position_embeddings / high_freq_factor are kept. Those above
    original_max_position_embeddings / low_freq_factor are stretched by `factor`. Between them the inverse of
    the divisor is interpolated, linearly in the number of periods that the original context holds.
    """
    low, high = rope["low_freq_factor"], rope["high_freq_factor"]
    wavelengths = 2 * math.pi * rope["rope_theta"] ** (np.arange(0, head_dim, 2) / head_dim)
    periods = rope["original_max_position_embeddings"] / wavelengths
    kept = np.clip((periods - low) / (high - low), 0, 1)
    return (1 / (kept + (1 - kept) / rope["factor"])).astype(np.float32)
