"""The candidates for the next token of each row, which ranks exchange in place of whole rows of logits.

A rank has the logits of some tokens of the vocabulary. It selects the k largest of each row, and all that tie
with the last of them. They are in a row of an array, float32 [N, width(k)]:

    count, logits [slots(k)], token ids [slots(k)]       count and token ids are int32, ids ascending

Greedy decoding, k = 1, needs the first of the largest logits only. Otherwise a few slots are spare, for ties.
If more logits tie, or the largest one is no finite number, the count is 0: the row is needed whole. The k
largest of a whole row are among those of its parts, so the selection of the parts' candidates is that of the
whole row.
"""

from __future__ import annotations

import math

import numpy as np

from llmc.runtime.sampling import largest

MOST = 256  # candidates of a row
_SPARE = 8  # slots for ties


def slots(k: int) -> int:
    """Return the most candidates that a row has."""
    return 1 if k == 1 else k + _SPARE


def width(k: int) -> int:
    """Return the number of columns of an array of candidates."""
    return 1 + 2 * slots(k)


def most_of(tokens: int) -> int:
    """Return the largest k that is worth it: fewer numbers than the logits of `tokens` tokens. 0: none is."""
    return max(0, min(MOST, tokens // 2 - _SPARE - 1))


def select(logits: np.ndarray, k: int, first: int = 0) -> np.ndarray:
    """Return the candidates of each row.

    logits: float32 [N, V], V >= k
    first: the token id of the first column
    """
    found = np.zeros((len(logits), width(k)), np.float32)
    for row, values in zip(found, logits, strict=True):
        _fill(row, values, k, None, first)
    return found


def merge(parts: np.ndarray, k: int) -> np.ndarray:
    """Return the candidates of whole rows.

    parts: those of each rank, side by side, float32 [N, ranks * width(k)]
    """
    found = np.zeros((len(parts), width(k)), np.float32)
    for row, candidates in zip(found, parts, strict=True):
        ranks = candidates.reshape(-1, width(k))
        if all(len(ids) for ids, _ in map(_read, ranks)):
            ids, values = (np.concatenate(arrays) for arrays in zip(*map(_read, ranks), strict=True))
            _fill(row, values, k, ids)
    return found


def complete(candidates: np.ndarray) -> bool:
    """Return whether no row is needed whole."""
    return bool(candidates[:, :1].view(np.int32).all())


def rows_of(candidates: np.ndarray) -> list[tuple[np.ndarray | None, np.ndarray]]:
    """Return the token ids, int32, and the logits of each row."""
    return list(map(_read, candidates))


def _read(row: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    numbers, room = row.view(np.int32), len(row) // 2
    count = int(numbers[0])
    return numbers[1 + room : 1 + room + count], row[1 : 1 + count]


def _fill(row: np.ndarray, values: np.ndarray, k: int, ids: np.ndarray | None, first: int = 0) -> None:
    """Write the candidates among `values` to a row. ids: None: `first` and those that follow it"""
    if k == 1:
        kept = np.array([values.argmax()])
    elif not math.isfinite(values.max()):
        return
    else:
        kept = largest(values, k)
    count, room = len(kept), len(row) // 2
    if count <= room:
        row[1 : 1 + count] = values[kept]
        numbers = row.view(np.int32)
        numbers[0] = count
        numbers[1 + room : 1 + room + count] = kept + first if ids is None else ids[kept]
