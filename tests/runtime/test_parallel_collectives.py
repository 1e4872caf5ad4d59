"""Collectives between threads, and between the sockets and the shared memory of processes."""

from __future__ import annotations

import mmap
import os
import sys
import threading
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest

from llmc.runtime.batch import Batch
from llmc.runtime.errors import BackendError, RankError
from llmc.runtime.parallel.processes import ProcessCommunicator, mesh
from llmc.runtime.parallel.threads import LockStepBackend, thread_group
from support.fake_ranks import STEP, FakeRank, expected
from support.groups import tcp_group, together

Group = Callable[..., Sequence[Any]]


def process_group(size: int, timeout: float = 600, slot_bytes: int = 1 << 20) -> list[ProcessCommunicator]:
    """The communicators of processes, which also work between threads."""
    return [ProcessCommunicator(endpoint, timeout) for endpoint in mesh(size, slot_bytes)]


GROUPS = [
    thread_group,
    *(
        pytest.param(group, marks=pytest.mark.skipif(sys.platform != "linux", reason="Linux only"))
        for group in (process_group, tcp_group)
    ),
]


def parts_of(size: int, shape: tuple[int, int]) -> list[np.ndarray]:
    """Numbers of very different magnitudes, whose sum depends on the order."""
    random = np.random.default_rng(size)
    return [
        np.ldexp(random.standard_normal(shape), random.integers(-30, 30, shape)).astype(np.float32)
        for _ in range(size)
    ]


def total_of(parts: Sequence[np.ndarray]) -> np.ndarray:
    total = parts[0]
    for part in parts[1:]:
        total = total + part
    return total


@pytest.mark.parametrize("group", GROUPS)
@pytest.mark.parametrize("size", [2, 4])
def test_sums_are_added_in_the_order_of_the_ranks(group: Group, size: int) -> None:
    parts = parts_of(size, (5, 48))
    arrays = [part.copy() for part in parts]
    ranks = group(size)

    def run(rank: Any) -> None:
        for _ in range(2):  # the second sum is of `size` equal arrays
            rank.all_reduce(arrays[rank.rank])

    assert together(ranks, run) == [None] * size
    once = total_of(parts)
    assert once.tobytes() != total_of(parts[::-1]).tobytes() or size == 2  # the order matters
    twice = total_of([once] * size)
    assert [array.tobytes() for array in arrays] == [twice.tobytes()] * size


@pytest.mark.parametrize("group", GROUPS)
def test_arrays_may_be_views(group: Group) -> None:
    """Columns of wider rows, as buffers of an engine are, and parts within the whole."""
    parts = parts_of(3, (4, 6))
    wide = [np.full((4, 40), 9, np.float32) for _ in parts]

    def run(rank: Any) -> None:
        row = wide[rank.rank]
        total, whole = row[:, 1:7], row[:, 10:28]
        part = whole[:, 6 * rank.rank : 6 * rank.rank + 6]
        total[...] = part[...] = parts[rank.rank]
        rank.all_reduce(total)
        rank.all_gather(part, whole)

    assert together(group(3), run) == [None] * 3
    for row in wide:
        np.testing.assert_array_equal(row[:, 1:7], total_of(parts))
        np.testing.assert_array_equal(row[:, 10:28], np.concatenate(parts, axis=1))
        assert (row[:, [0, *range(7, 10), *range(28, 40)]] == 9).all()


@pytest.mark.parametrize("shape", [(0, 7), (1, 3), (70, 33), (3, 2500), (2048, 1)])
@pytest.mark.parametrize("group", GROUPS)
def test_arrays_of_any_size(group: Group, shape: tuple[int, int]) -> None:
    """Slots of one page: most arrays are longer, and so are rows of 2500 numbers."""
    options = {"slot_bytes": mmap.PAGESIZE} if group is process_group else {}
    parts = parts_of(2, shape)
    arrays = [part.copy() for part in parts]
    wholes = [np.zeros((shape[0], 2 * shape[1]), np.float32) for _ in parts]

    def run(rank: Any) -> None:
        rank.all_gather(parts[rank.rank], wholes[rank.rank])
        rank.all_reduce(arrays[rank.rank])

    assert together(group(2, **options), run) == [None] * 2
    for array, whole in zip(arrays, wholes, strict=True):
        np.testing.assert_array_equal(array, total_of(parts))
        np.testing.assert_array_equal(whole, np.concatenate(parts, axis=1))


@pytest.mark.parametrize("group", GROUPS)
@pytest.mark.filterwarnings("error::RuntimeWarning")
def test_infinite_and_nan_sums_are_no_warning(group: Group) -> None:
    arrays = [np.array([[3e38, np.inf, np.nan]], np.float32), np.array([[3e38, -np.inf, 1]], np.float32)]
    assert together(group(2), lambda rank: rank.all_reduce(arrays[rank.rank])) == [None] * 2
    np.testing.assert_array_equal(arrays[1], [[np.inf, np.nan, np.nan]])


@pytest.mark.parametrize("group", GROUPS)
def test_ranks_in_different_collectives_are_an_error(group: Group) -> None:
    def run(rank: Any) -> None:
        rank.begin_step(7)
        rank.all_reduce(np.zeros((1, 4), np.float32))
        if rank.rank == 0:
            rank.all_reduce(np.zeros((2, 8), np.float32))
        else:
            rank.all_gather(np.zeros((2, 4), np.float32), np.zeros((2, 8), np.float32))

    errors = together(group(2), run)
    assert all(isinstance(error, RankError) for error in errors)
    named = [error.message for error in errors if "disagree" in error.message]
    assert named  # the other one may see that this one has left
    assert "all_reduce 2 of step 7 (shape [2, 8])" in named[0]
    assert "all_gather 2 of step 7 (shape [2, 4])" in named[0]


@pytest.mark.parametrize("group", GROUPS)
def test_ranks_with_different_shapes_are_an_error(group: Group) -> None:
    errors = together(group(2), lambda rank: rank.all_reduce(np.zeros((1, 4 + rank.rank), np.float32)))
    assert all(isinstance(error, RankError) for error in errors)
    assert any("shape [1, 4]" in error.message and "shape [1, 5]" in error.message for error in errors)


@pytest.mark.parametrize("group", GROUPS)
def test_a_rank_that_leaves_ends_the_wait_of_the_others(group: Group) -> None:
    ranks = group(3)

    def run(rank: Any) -> None:
        if rank.rank == 1:
            rank.close()
        else:
            rank.all_reduce(np.zeros((1, 4), np.float32))

    first, _, third = together(ranks, run)
    assert isinstance(first, RankError)
    assert isinstance(third, RankError)
    assert "rank 1 ended in all_reduce 1" in first.message
    for rank in ranks:
        with pytest.raises(RankError):
            rank.all_reduce(np.zeros((1, 4), np.float32))


@pytest.mark.parametrize("group", GROUPS)
def test_a_rank_that_does_not_answer_is_named(group: Group) -> None:
    ranks = group(2, timeout=0.01)
    ranks[0].begin_step(3)
    with pytest.raises(RankError, match=r"rank 1 did not answer within 0.01 s in all_gather 1 of step 3"):
        ranks[0].all_gather(np.zeros((1, 4), np.float32), np.zeros((1, 8), np.float32))


@pytest.mark.parametrize("group", GROUPS)
def test_other_arrays_are_refused(group: Group) -> None:
    rank, _ = group(2)
    for array in (np.zeros((2, 2)), np.zeros(4, np.float32)):
        with pytest.raises(ValueError, match="not of float32"):
            rank.all_reduce(array)
    with pytest.raises(ValueError, match="all_gather of 2 parts"):
        rank.all_gather(np.zeros((2, 2), np.float32), np.zeros((2, 3), np.float32))


@pytest.mark.skipif(sys.platform != "linux", reason="Linux only")
def test_nothing_is_left_of_a_closed_group() -> None:
    before = os.listdir("/proc/self/fd"), os.listdir("/dev/shm")
    ranks = process_group(4)
    together(ranks, lambda rank: rank.all_reduce(np.zeros((1, 4), np.float32)))
    for rank in ranks:
        rank.close()
    assert (os.listdir("/proc/self/fd"), os.listdir("/dev/shm")) == before


class Failing(FakeRank):
    def forward(self, batch: Batch) -> np.ndarray:
        raise BackendError("out of range")


def test_ranks_in_lock_step_are_one_backend(tmp_path: Any) -> None:
    (tmp_path / "plan").write_text("{}")
    group = thread_group(3)
    ranks = [FakeRank(str(tmp_path / "plan"), rank.rank, rank) for rank in group]
    backend = LockStepBackend(ranks, group)
    for step in (1, 2, 3):
        np.testing.assert_array_equal(backend.forward(STEP), expected(3, step, STEP))
    assert (backend.name, backend.num_blocks, backend.block_size) == ("fake", 4, 32)
    before = threading.active_count()
    backend.close()
    assert threading.active_count() == before - 3


@pytest.mark.parametrize("failing", [0, 2])
def test_the_error_of_a_rank_ends_the_step_of_all(tmp_path: Any, failing: int) -> None:
    (tmp_path / "plan").write_text("{}")
    group = thread_group(3)
    kinds = [Failing if rank == failing else FakeRank for rank in range(3)]
    ranks = [kind(str(tmp_path / "plan"), rank.rank, rank) for kind, rank in zip(kinds, group, strict=True)]
    backend = LockStepBackend(ranks, group)
    with pytest.raises(BackendError, match=r"^out of range$"):
        backend.forward(STEP)
    with pytest.raises(BackendError):
        backend.forward(STEP)
    backend.close()
