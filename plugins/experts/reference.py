"""The reference implementation of `llmc.Experts` in numpy, one token and one expert at a time.

It is simple rather than fast. Every other implementation is compared with it.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np


def experts(
    x: np.ndarray,
    ids: np.ndarray,
    weights: np.ndarray,
    gate_up: np.ndarray,
    down: np.ndarray,
    *,
    num_experts: int,
    activation: Callable[[np.ndarray], np.ndarray],
) -> np.ndarray:
    """Return the output, float64 [T, D]. Shapes are as in `spec.py`."""
    wide = x.astype(np.float64)
    gate_ups = gate_up.reshape(num_experts, -1, x.shape[1])
    downs = down.reshape(num_experts, x.shape[1], -1)
    output = np.zeros_like(wide)
    for token, (chosen, factors) in enumerate(zip(ids, weights, strict=True)):
        for expert, factor in zip(chosen, factors, strict=True):
            gate, up = np.split(gate_ups[expert] @ wide[token], 2)
            output[token] += factor * (downs[expert] @ (activation(gate) * up))
    return output


def top_k(x: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the k largest numbers of each row in falling order, and their columns, int64. Both are [T, k].

    Of equal numbers, the one in the lowest column comes first, as in ONNX's TopK.
    """
    columns = np.argsort(-x, axis=1, kind="stable")[:, :k]
    return np.take_along_axis(x, columns, axis=1), columns
