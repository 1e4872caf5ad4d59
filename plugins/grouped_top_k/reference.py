"""The reference implementation of `llmc.GroupedTopK` in numpy, one row at a time."""

from __future__ import annotations

import numpy as np


def grouped_top_k(
    x: np.ndarray, choice: np.ndarray, *, groups: int, kept: int, scored: int, k: int
) -> tuple[np.ndarray, np.ndarray]:
    """Return the values [T, k], and the ids, int64 [T, k]. Shapes are as in `spec.py`."""
    ids = np.empty((len(x), k), np.int64)
    size = x.shape[1] // groups
    for row, numbers in enumerate(choice):
        scores = [np.sort(group)[::-1][:scored].sum() for group in numbers.reshape(groups, size)]
        best = np.argsort(-np.array(scores), kind="stable")[:kept]
        columns = np.sort(best[:, None] * size + np.arange(size), axis=None)
        ids[row] = columns[np.argsort(-numbers[columns], kind="stable")[:k]]
    return np.take_along_axis(x, ids, axis=1), ids
