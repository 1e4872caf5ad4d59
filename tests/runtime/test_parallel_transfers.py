"""Transfers between the ranks of pipeline stages: in threads, and over the sockets of processes."""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest

from llmc.runtime.errors import RankError
from llmc.runtime.parallel.processes import ProcessCommunicator, pipeline
from llmc.runtime.parallel.threads import thread_group
from support.groups import tcp_group, together
from support.waiting import LONG

Ranks = Callable[..., Sequence[Any]]


def threads(size: int, stages: int, timeout: float = 60) -> Sequence[Any]:
    return thread_group(size, timeout, stages)


def processes(size: int, stages: int, timeout: float = 60) -> Sequence[Any]:
    return [ProcessCommunicator(endpoint, timeout) for endpoint in pipeline(size, stages)]


def tcp(size: int, stages: int, timeout: float = 60) -> Sequence[Any]:
    return tcp_group(size, timeout, size // stages)


KINDS = [
    threads,
    *(
        pytest.param(kind, marks=pytest.mark.skipif(sys.platform != "linux", reason="Linux only"))
        for kind in (processes, tcp)
    ),
]


def array(seed: int, rows: int, width: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((rows, width)).astype(np.float32)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rows", [1, 3000])
def test_a_ring_of_stages_passes_arrays_on(kind: Ranks, rows: int) -> None:
    """Rank 0 sends all arrays before it receives one. They are larger than the buffers of sockets."""
    count, stages = 6, 3
    ranks = kind(stages, stages)
    results: list[np.ndarray] = []

    def run(number: int) -> None:
        rank, wide = ranks[number], np.zeros((rows, 90), np.float32)
        view = wide[:, 7:71]
        for step in range(1, count + 1):
            rank.begin_step(step)
            if number:
                rank.receive(view, number - 1, 0)
                view += number
            else:
                view[...] = array(step, rows, 64)
            rank.send(view, (number + 1) % stages, 0)
        for step in range(1, count + 1) if number == 0 else ():
            rank.begin_step(step)
            rank.receive(view, stages - 1, 0)
            results.append(view.copy())
        assert not wide[:, :7].any()
        assert not wide[:, 71:].any()

    assert together(range(stages), run) == [None] * stages
    for step, got in enumerate(results, 1):
        np.testing.assert_array_equal(got, array(step, rows, 64) + np.float32(1) + np.float32(2))
    for rank in ranks:
        rank.close()


@pytest.mark.parametrize("kind", KINDS)
def test_collectives_are_of_a_stage(kind: Ranks) -> None:
    """Two stages of two ranks: what the first one sums goes to the second one, which sums it again."""
    ranks = kind(4, 2)
    results = [np.zeros((2, 5), np.float32) for _ in ranks]

    def run(number: int) -> None:
        rank, mine = ranks[number], results[number]
        assert (rank.rank, rank.size) == (number % 2, 2)
        rank.begin_step(1)
        if number < 2:
            mine[...] = array(number, 2, 5)
            rank.all_reduce(mine)
            rank.send(mine, number + 2, 0)
        else:
            rank.receive(mine, number - 2, 0)
            mine *= number
            rank.all_reduce(mine)

    assert together(range(4), run) == [None] * 4
    total = array(0, 2, 5) + array(1, 2, 5)
    np.testing.assert_array_equal(results[1], total)
    for result in results[2:]:
        np.testing.assert_array_equal(result, total * 2 + total * 3)


@pytest.mark.parametrize(
    ("step", "sequence", "shape"), [(2, 0, (3, 4)), (1, 1, (3, 4)), (1, 0, (2, 4)), (1, 0, (3, 5))]
)
@pytest.mark.parametrize("kind", KINDS)
def test_another_transfer_is_an_error(kind: Ranks, step: int, sequence: int, shape: tuple[int, int]) -> None:
    first, second = kind(2, 2)
    first.begin_step(1)
    second.begin_step(step)
    first.send(np.zeros((3, 4), np.float32), 1, 0)
    with pytest.raises(RankError, match="the ranks disagree: rank 1 is in transfer") as error:
        second.receive(np.zeros(shape, np.float32), 0, sequence)
    assert "rank 0 in transfer 0 of step 1 (shape [3, 4])" in error.value.message


@pytest.mark.parametrize("kind", KINDS)
def test_a_rank_that_leaves_is_named(kind: Ranks) -> None:
    """Also if it left in the middle of an array, and by the rank that sends to it."""
    first, second = kind(2, 2)
    first.begin_step(5)
    second.begin_step(5)
    first.close()
    with pytest.raises(RankError, match=r"rank 0 ended in transfer 0 of step 5 \(shape \[1, 2\]\)"):
        second.receive(np.zeros((1, 2), np.float32), 0, 0)
    with pytest.raises(RankError, match="rank 0 ended in transfer 1 of step 5"):
        second.receive(np.zeros((1, 2), np.float32), 0, 1)
    if kind is threads:
        return
    with pytest.raises(RankError, match="rank 0 ended in transfer 2"):  # noqa: PT012
        for _ in range(20):
            second.send(np.zeros((1000, 1000), np.float32), 0, 2)
            threading.Event().wait(0.01)


@pytest.mark.parametrize("kind", KINDS)
def test_a_rank_that_sends_nothing_is_named(kind: Ranks) -> None:
    first, _ = kind(2, 2, timeout=0.01)
    first.begin_step(4)
    with pytest.raises(RankError, match=r"rank 1 did not answer within 0\.01 s in transfer 3 of step 4"):
        first.receive(np.zeros((1, 2), np.float32), 1, 3)


@pytest.mark.skipif(sys.platform != "linux", reason="Linux only")
@pytest.mark.parametrize("kind", [processes, tcp])
def test_ranks_wait_for_one_that_computes_and_for_no_other(kind: Ranks) -> None:
    """Rank 2 waits for rank 1, which waits for rank 0. It computes for longer than the timeout."""
    timeout = 0.6
    ranks = kind(3, 3, timeout)
    counters = np.zeros(3, np.int32)
    ranks[0].watch(counters)
    for rank in ranks:
        rank.begin_step(1)
    rows = [np.zeros((1, 2), np.float32) for _ in ranks]

    def run(number: int) -> None:
        if number:
            ranks[number].receive(rows[number], number - 1, 0)
        else:
            for _ in range(12):
                time.sleep(timeout / 8)
                counters[1] += 1
        if number < 2:
            ranks[number].send(rows[number] + 1, number + 1, 0)

    assert together(range(3), run) == [None] * 3
    assert rows[2].tolist() == [[2, 2]]
    begun = time.perf_counter()
    with pytest.raises(RankError, match=r"rank 0 did not answer within 0\.6 s in transfer 0 of step 1"):
        ranks[1].receive(rows[1], 0, 0)  # it computes nothing any more
    assert time.perf_counter() - begun < LONG
    for rank in ranks:
        rank.close()


@pytest.mark.skipif(sys.platform != "linux", reason="Linux only")
@pytest.mark.parametrize("kind", [processes, tcp])
def test_ranks_do_not_wait_for_each_other_forever(kind: Ranks) -> None:
    ranks = kind(2, 2, timeout=0.2)

    def run(number: int) -> None:
        ranks[number].begin_step(1)
        ranks[number].receive(np.zeros((1, 2), np.float32), 1 - number, 0)

    assert any(isinstance(error, RankError) for error in together(range(2), run))
    for rank in ranks:
        rank.close()


@pytest.mark.skipif(sys.platform != "linux", reason="Linux only")
@pytest.mark.parametrize("kind", [processes, tcp])
def test_sending_does_not_wait(kind: Ranks) -> None:
    threads = threading.active_count()
    first, second = kind(2, 2, timeout=0.02)
    first.begin_step(1)
    for number in range(40):  # far more than the socket holds
        first.send(np.full((500, 1000), number, np.float32), 1, number)
    second.begin_step(1)
    got = np.zeros((500, 1000), np.float32)
    for number in range(20):
        second.receive(got, 0, number)
        assert (got == number).all()
    first.close()  # although its thread waits for the other rank
    second.close()
    assert threading.active_count() == threads


@pytest.mark.parametrize("kind", KINDS)
def test_other_arrays_are_refused(kind: Ranks) -> None:
    first, _ = kind(2, 2)
    for wrong in (np.zeros((2, 2)), np.zeros(4, np.float32)):
        with pytest.raises(ValueError, match="not of float32"):
            first.send(wrong, 1, 0)
        with pytest.raises(ValueError, match="not of float32"):
            first.receive(wrong, 1, 0)


@pytest.mark.skipif(sys.platform != "linux", reason="Linux only")
def test_nothing_is_left_of_closed_stages() -> None:
    before = os.listdir("/proc/self/fd"), os.listdir("/dev/shm")
    ranks = processes(4, 2)
    ranks[0].send(np.zeros((1, 4), np.float32), 2, 0)
    ranks[2].receive(np.zeros((1, 4), np.float32), 0, 0)
    for rank in ranks:
        rank.close()
    assert (os.listdir("/proc/self/fd"), os.listdir("/dev/shm")) == before


@pytest.mark.skipif(sys.platform != "linux", reason="Linux only")
def test_a_rank_that_is_no_neighbour_is_refused() -> None:
    first = processes(3, 3)[0]
    with pytest.raises(RankError, match="the program of rank 0 names rank 7, which is not connected"):
        first.send(np.zeros((1, 4), np.float32), 7, 0)
    with pytest.raises(RankError, match="names rank 7"):
        first.receive(np.zeros((1, 4), np.float32), 7, 0)
