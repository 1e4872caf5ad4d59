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
    gate_up_bias: np.ndarray | None = None,
    down_bias: np.ndarray | None = None,
    *,
    num_experts: int,
    gated: Callable[[np.ndarray], np.ndarray],
) -> np.ndarray:
    """Return the output, float64 [T, D]. Shapes are as in `spec.py`.

    gated: makes [I] of an expert's gates and ups [2 * I]: `of_halves` or `clamped_swiglu`
    """
    wide = x.astype(np.float64)
    gate_ups = gate_up.reshape(num_experts, -1, x.shape[1])
    downs = down.reshape(num_experts, x.shape[1], -1)
    biases = [
        np.zeros((num_experts, 1)) if bias is None else bias.reshape(num_experts, -1).astype(np.float64)
        for bias in (gate_up_bias, down_bias)
    ]
    output = np.zeros_like(wide)
    for token, (chosen, factors) in enumerate(zip(ids, weights, strict=True)):
        for expert, factor in zip(chosen, factors, strict=True):
            hidden = gated(gate_ups[expert] @ wide[token] + biases[0][expert])
            output[token] += factor * (downs[expert] @ hidden + biases[1][expert])
    return output


def of_halves(activation: Callable[[np.ndarray], np.ndarray]) -> Callable[[np.ndarray], np.ndarray]:
    """Return the function activation(gates) * ups of gates that come before the ups."""

    def gated(hidden: np.ndarray) -> np.ndarray:
        gate, up = np.split(hidden, 2)
        return activation(gate) * up

    return gated


def clamped_swiglu(limit: float, alpha: float) -> Callable[[np.ndarray], np.ndarray]:
    """Return the activation "clamped_swiglu" of gates and ups that alternate."""

    def gated(hidden: np.ndarray) -> np.ndarray:
        gate, up = np.minimum(hidden[::2], limit), np.clip(hidden[1::2], -limit, limit)
        return (up + 1) * gate / (1 + np.exp(-alpha * gate))

    return gated


def top_k(x: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the k largest numbers of each row in falling order, and their columns, int64. Both are [T, k].

    Of equal numbers, the one in the lowest column comes first, as in ONNX's TopK.
    """
    columns = np.argsort(-x, axis=1, kind="stable")[:, :k]
    return np.take_along_axis(x, columns, axis=1), columns
