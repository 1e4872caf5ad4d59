"""The candidates that ranks exchange in place of rows of logits, and the tokens that follow from them."""

from __future__ import annotations

from typing import Any

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from llmc.runtime.errors import BackendError
from llmc.runtime.parallel.candidates import complete, merge, most_of, rows_of, select, slots, width
from llmc.runtime.sampling import SamplingParams, candidates_needed, sample

values = st.one_of(
    st.integers(-3, 3).map(float),
    st.floats(-20, 20, width=32),
    st.sampled_from([float("inf"), float("-inf"), float("nan")]),
)


@st.composite
def requests(draw: st.DrawFn) -> SamplingParams:
    if draw(st.booleans()):
        return SamplingParams()
    top_p, min_p = draw(st.sampled_from([1.0, 0.9, 0.4])), draw(st.sampled_from([0.0, 0.2]))
    return SamplingParams(temperature=0.7, top_k=draw(st.integers(1, 9)), top_p=top_p, min_p=min_p)


def token(logits: np.ndarray, params: SamplingParams, ids: np.ndarray | None = None) -> Any:
    try:
        return sample(logits, params, [], np.random.default_rng(4), ids)
    except BackendError as error:
        return error.message


@settings(max_examples=300, deadline=None)
@given(st.integers(1, 4), st.lists(values, min_size=80, max_size=80), requests(), st.integers(0, 3))
def test_the_candidates_of_parts_give_the_token_of_the_whole_row(
    ranks: int, logits: list[float], params: SamplingParams, more: int
) -> None:
    """more: another request of the step needs a larger k"""
    row = np.array([logits], np.float32)
    k = candidates_needed([params], 256) + more
    each = 80 // ranks
    row = row[:, : ranks * each]
    parts = [select(part, k, each * rank) for rank, part in enumerate(np.split(row, ranks, axis=1))]
    found = merge(np.concatenate(parts, axis=1), k)
    assert found.shape == (1, width(k))
    if complete(found):
        ((ids, kept),) = rows_of(found)
        assert ids is not None
        assert ids.dtype == np.int32
        assert token(kept, params, ids) == token(row[0], params)
    else:
        kth = -np.sort(-row[0])[k - 1]
        assert k > 1
        assert not np.isfinite(row.max()) or (row >= kth).sum() > slots(k) or any_part_ties(row, ranks, k)


def any_part_ties(row: np.ndarray, ranks: int, k: int) -> bool:
    parts = np.split(row[0], ranks)
    return any(
        not np.isfinite(part.max()) or (part >= -np.sort(-part)[k - 1]).sum() > slots(k) for part in parts
    )


def test_candidates_are_fewer_numbers_than_the_logits() -> None:
    for tokens in (1, 17, 18, 20, 64, 1000, 100_000):
        k = most_of(tokens)
        assert k == 0 or width(k) < tokens
        assert k <= tokens
    assert (most_of(18), most_of(20), most_of(100_000)) == (0, 1, 256)


def test_numbers_of_a_row_that_ties_too_often_are_not_sent() -> None:
    row = np.zeros((2, 40), np.float32)
    row[1] = np.arange(40)
    found = select(row, 3, first=100)
    assert not complete(found)
    ids, kept = rows_of(found)[1]
    assert ids is not None
    assert (ids.tolist(), kept.tolist()) == ([137, 138, 139], [37, 38, 39])
