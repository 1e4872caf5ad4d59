"""The reference implementation of `llmc.HeadLinear` in numpy, one head at a time."""

from __future__ import annotations

import numpy as np


def head_linear(
    x: np.ndarray, w: np.ndarray, *, heads: int, begin: int, rows: int, transposed: bool
) -> np.ndarray:
    """Return the output, float64 [T, H*N]. Shapes are as in `spec.py`."""
    each = w.reshape(heads, -1, w.shape[1]).astype(np.float64)[:, begin : begin + rows]
    inputs = x.reshape(len(x), heads, x.shape[1] // heads).astype(np.float64)
    outputs = [inputs[:, head] @ (matrix if transposed else matrix.T) for head, matrix in enumerate(each)]
    return np.concatenate(outputs, axis=1)
