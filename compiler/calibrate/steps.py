"""Packs calibration sequences into steps of the engine. No sequence has a past."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import count, islice

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
    blocks = count()
    tables = [list(islice(blocks, -(-len(ids) // BLOCK_SIZE))) for ids in sequences]
    return Batch.pack((ids, 0, table, False) for ids, table in zip(sequences, tables, strict=True))
