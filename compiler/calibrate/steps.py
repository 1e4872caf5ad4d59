"""Pack calibration sequences into engine steps. Every sequence begins in its step: nothing is cached."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import count, islice

from llmc.plugins.paged_attention.spec import BLOCK_SIZE
from llmc.runtime.batch import Batch

# The reference attention scores every token of a step against every other: longer steps cost more per token.
_TOKENS = 256


def steps(sequences: Sequence[Sequence[int]]) -> list[Batch]:
    """Pack consecutive sequences into steps of up to 256 tokens. A longer sequence is a step of its own."""
    grouped: list[list[Sequence[int]]] = []
    for ids in sequences:
        if grouped and sum(map(len, grouped[-1])) + len(ids) <= _TOKENS:
            grouped[-1].append(ids)
        else:
            grouped.append([ids])
    return [_batch(group) for group in grouped]


def _batch(sequences: Sequence[Sequence[int]]) -> Batch:
    blocks = count()
    tables = [list(islice(blocks, -(-len(ids) // BLOCK_SIZE))) for ids in sequences]
    return Batch.pack((ids, 0, table, False) for ids, table in zip(sequences, tables, strict=True))
