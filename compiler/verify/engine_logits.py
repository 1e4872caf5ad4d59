"""Compute an engine's logits of given tokens, in ragged steps that test its packing, or in plain chunks."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from llmc.plugins.paged_attention.spec import BLOCK_SIZE
from llmc.runtime.backends.base import Backend
from llmc.runtime.batch import Batch

_CHUNKS = ((37, 5, 32), (9, 1, 1), (1, 32, 0))  # first steps: the tokens of each sequence
_SINGLE_STEPS = 20  # following steps, with one token of each sequence
_LATER_CHUNK = 32  # tokens of each sequence in all steps after those
_PLAIN_CHUNK = 64  # 64 rows of a vocabulary of 150,000 are 39 MB


def blocks_for(sequences: Sequence[Sequence[int]], block_size: int = BLOCK_SIZE) -> int:
    """Return the number of KV blocks that all `sequences` need."""
    return sum(-(-len(ids) // block_size) for ids in sequences)


def ragged(backend: Backend, sequences: Sequence[Sequence[int]]) -> list[np.ndarray]:
    """Return the logits of each sequence, float32 [len, vocabulary].

    All sequences run together, in chunks of different sizes, with KV blocks in random order.
    """
    blocks = iter(np.random.default_rng(1).permutation(backend.num_blocks).tolist())
    size = backend.block_size
    tables = [[next(blocks) for _ in range(-(-len(ids) // size))] for ids in sequences]
    past = [0] * len(sequences)
    rows: list[list[np.ndarray]] = [[] for _ in sequences]
    step = 0
    while any(done < len(ids) for done, ids in zip(past, sequences, strict=True)):
        later = 1 if step < len(_CHUNKS) + _SINGLE_STEPS else _LATER_CHUNK
        wanted = _CHUNKS[step] if step < len(_CHUNKS) else (later,) * len(sequences)
        chunks = [
            (s, min(count, len(sequences[s]) - past[s]))
            for s, count in enumerate(wanted)
            if count and past[s] < len(sequences[s])
        ]
        step += 1
        if not chunks:
            continue
        logits = backend.forward(_batch(sequences, past, tables, chunks, size))
        start = 0
        for s, count in chunks:
            rows[s].append(logits[start : start + count].copy())
            past[s] += count
            start += count
    return [np.concatenate(row) for row in rows]


def in_chunks(backend: Backend, ids: Sequence[int]) -> Iterator[np.ndarray]:
    """Yield the logits of one sequence in chunks, float32 [n, vocabulary].

    A chunk is valid until the next one is requested.
    """
    table = list(range(-(-len(ids) // backend.block_size)))
    for start in range(0, len(ids), _PLAIN_CHUNK):
        count = min(_PLAIN_CHUNK, len(ids) - start)
        yield backend.forward(_batch([ids], [start], [table], [(0, count)], backend.block_size))


def _batch(
    sequences: Sequence[Sequence[int]],
    past: list[int],
    tables: list[list[int]],
    chunks: list[tuple[int, int]],
    size: int,
) -> Batch:
    """Return a step that computes logits for every token.

    past: tokens of each sequence that are in the cache
    tables: block table of each sequence
    chunks: (index of the sequence, number of its tokens in this step)
    size: tokens in a KV block
    """
    rows = []
    for s, count in chunks:
        end = past[s] + count
        rows.append((sequences[s][past[s] : end], past[s], tables[s][: -(-end // size)], range(count)))
    return Batch.pack(rows)
