"""Steps that are split by tokens."""

from __future__ import annotations

import random

import numpy as np
import pytest

from llmc.runtime.batch import STEP_INPUTS, Batch


@pytest.mark.parametrize("seed", range(20))
def test_the_parts_of_a_step_are_its_chunks_cut(seed: int) -> None:
    """Compared with steps that are packed from the parts of the chunks."""
    numbers = random.Random(seed)
    chunks = []
    for _ in range(numbers.randint(1, 5)):
        count, past = numbers.randint(1, 70), numbers.choice([0, numbers.randint(0, 90)])
        wanted = sorted(numbers.sample(range(count), numbers.randint(0, count)))
        table = [numbers.randrange(50) for _ in range(-(-(past + count) // 32))]
        chunks.append(([numbers.randrange(90) for _ in range(count)], past, table, wanted))
    size, total = numbers.randint(1, 40), sum(len(ids) for ids, *_ in chunks)
    parts = list(Batch.pack(chunks).split_tokens(size))
    assert len(parts) == -(-total // size)
    for begin, part in zip(range(0, total, size), parts, strict=True):
        rows, start = [], 0
        for ids, past, table, wanted in chunks:
            first, last = (min(max(place - start, 0), len(ids)) for place in (begin, begin + size))
            if first < last:
                places = [place - first for place in wanted if first <= place < last]
                rows.append((ids[first:last], past + first, table, places))
            start += len(ids)
        expected = Batch.pack(rows)
        for name in STEP_INPUTS:
            got = getattr(part, name)
            assert got.dtype == np.int32
            np.testing.assert_array_equal(got, getattr(expected, name), name)
