"""Sequences as steps of the engine: several end to end, none with a past."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np

from llmc.plugins.paged_attention.spec import BLOCK_SIZE
from llmc.runtime.batch import Batch

# Attention's definition scores every token of a step against every other: longer steps cost more for each.
_TOKENS = 256


def steps(sequences: Sequence[Sequence[int]]) -> list[Batch]:
    """Consecutive sequences in steps of up to 256 tokens; a longer one is a step of its own."""
    grouped: list[list[Sequence[int]]] = []
    for ids in sequences:
        if grouped and sum(map(len, grouped[-1])) + len(ids) <= _TOKENS:
            grouped[-1].append(ids)
        else:
            grouped.append([ids])
    return [_batch(group) for group in grouped]


def _batch(sequences: Sequence[Sequence[int]]) -> Batch:
    lengths = [len(ids) for ids in sequences]
    begins = np.cumsum([0, *(-(-length // BLOCK_SIZE) for length in lengths)])
    return Batch(
        input_ids=_int32(token for ids in sequences for token in ids),
        position_ids=_int32(position for length in lengths for position in range(length)),
        query_start=_int32(np.cumsum([0, *lengths])),
        past_lengths=_int32([0] * len(lengths)),
        block_indices=_int32(range(begins[-1])),
        block_begins=_int32(begins),
        logits_index=_int32([]),
    )


def _int32(values: Iterable[int]) -> np.ndarray:
    return np.array(list(values), np.int32)
