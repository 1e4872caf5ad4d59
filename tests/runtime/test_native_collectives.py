"""Collectives that the native engine runs, through memory that the ranks share."""

from __future__ import annotations

import ctypes
import mmap
import signal
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from llmc.plugins.cpu import library
from llmc.runtime.batch import Batch
from llmc.runtime.errors import RankError
from llmc.runtime.native.executor import Executor
from llmc.runtime.native.program import View
from llmc.runtime.parallel.communicator import Communicator
from llmc.runtime.parallel.processes import ProcessCommunicator, mesh
from llmc.runtime.parallel.threads import thread_group
from support.native_programs import VOCABULARY, Builder, Built, steps

ISAS = library.candidates()
pytestmark = [
    pytest.mark.skipif(sys.platform != "linux", reason="Linux only"),
    pytest.mark.skipif(not ISAS, reason="the native engine does not run on this CPU"),
]
WIDTH = 80
ONE = Batch.pack([([5], 0, [0], True)])


def rank_program(rank: int, ranks: int, width: int = 37) -> Built:
    """Sums and gathered columns of numbers that each rank has, of magnitudes whose sum depends on the order.

    The first sum overwrites its input. The others read `width` or fewer columns, which no vector divides.
    """
    rng = np.random.default_rng(rank)
    table = np.ldexp(rng.standard_normal((VOCABULARY, WIDTH)), rng.integers(-9, 9, (VOCABULARY, WIDTH)))
    build = Builder(WIDTH, 0, table)
    x = View(0, 0, WIDTH)
    first = build.emit("all_reduce", WIDTH, build.emit("unary", WIDTH, x, function="neg"), ranks=ranks)
    second = build.emit("all_reduce", width, View(0, 3, width), ranks=ranks)
    third = build.emit("all_gather", 21 * ranks, View(0, 5, 21), ranks=ranks)
    result = build.emit("copy", WIDTH + width + 21 * ranks, first)
    for part, offset in ((second, WIDTH), (third, WIDTH + width)):
        build.emit("copy", result.width, part, out=result.buffer, offset=offset)
    wanted = build.emit("gather_rows", result.width, result, rows="logits")
    head = build.matrix(
        "head", VOCABULARY, result.width, "fp32", values=np.random.default_rng(9).random((50, result.width))
    )
    return build.finish(build.emit("linear", VOCABULARY, wanted, weights=(head,), rows="logits"))


def executor_of(
    built: Built, communicator: Communicator, threads: int = 1, isa: str | None = None
) -> Executor:
    return Executor(
        built[0],
        built[1],
        max_tokens=64,
        num_blocks=12,
        threads=threads,
        isa=isa,
        communicator=communicator,
    )


def together(communicators: Sequence[Communicator], run: Callable[[Communicator], object]) -> list[object]:
    """Return the result, or the exception, of `run` for each rank."""
    with ThreadPoolExecutor(len(communicators)) as pool:
        jobs = [pool.submit(run, communicator) for communicator in communicators]
        return [job.exception() or job.result() for job in jobs]


def logits(
    communicators: Sequence[Communicator], threads: int = 1, isa: str | None = None
) -> list[list[bytes]]:
    """Return the logits of each rank's steps."""

    def run(communicator: Communicator) -> list[bytes]:
        built = rank_program(communicator.rank, communicator.size)
        executor = executor_of(built, communicator, threads, isa)
        results = [executor.run(batch).tobytes() for batch in steps()]
        executor.close()
        return results

    return together(communicators, run)  # type: ignore[return-value]


def group(size: int, slot_bytes: int = 1 << 20, timeout: float = 600) -> list[ProcessCommunicator]:
    return [ProcessCommunicator(endpoint, timeout) for endpoint in mesh(size, slot_bytes)]


@pytest.mark.parametrize("slot_bytes", [mmap.PAGESIZE, 3 * mmap.PAGESIZE, 1 << 20])
@pytest.mark.parametrize("ranks", [2, 4])
def test_the_engine_adds_and_gathers_as_numpy_does(ranks: int, slot_bytes: int) -> None:
    """Of 60 rows, pages hold 12 or fewer. The communicators between threads use numpy."""
    wanted = logits(thread_group(ranks, 60))
    assert len(set(map(tuple, wanted))) == 1
    for threads in (1, 2, 3):
        assert logits(group(ranks, slot_bytes), threads) == wanted, threads


@pytest.mark.parametrize("isa", ISAS)
def test_sums_have_the_same_bits_on_every_instruction_set(isa: str) -> None:
    assert logits(group(3), 2, isa) == logits(thread_group(3, 60), 1, ISAS[0])


def test_numbers_of_messages_wrap() -> None:
    ranks = group(2)
    for rank in ranks:
        posts = (library.Post * 2).from_address(rank.exchange.posts)
        posts[rank.rank].sent = (1 << 32) - 3
    assert logits(ranks) == logits(thread_group(2, 60))
    assert 0 < posts[0].sent < 1 << 31


@pytest.mark.parametrize("threads", [1, 2])
def test_a_rank_that_sleeps_is_woken(threads: int) -> None:
    """A lost call to wake up would cost a slice of 0.1 s."""
    ranks = group(2)
    for rank in ranks:
        rank.exchange.turns = 0

    def run(rank: Communicator) -> float:
        executor = executor_of(rank_program(rank.rank, 2), rank, threads)
        executor.run(ONE)
        begin = time.perf_counter()
        for _ in range(200):
            executor.run(ONE)
        return time.perf_counter() - begin

    assert max(together(ranks, run)) < 20  # type: ignore[type-var]  # of 600 collectives


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_ranks_in_different_collectives_are_an_error(threads: int) -> None:
    ranks = group(2)

    def run(rank: ProcessCommunicator) -> None:
        rank.begin_step(7)
        executor = executor_of(rank_program(rank.rank, 2, 37 - rank.rank), rank, threads)
        executor.run(ONE)

    errors = together(ranks, run)  # type: ignore[arg-type]
    assert all(isinstance(error, RankError) for error in errors)
    named = [error.message for error in errors if "disagree" in error.message]  # type: ignore[attr-defined]
    assert named
    assert "all_reduce 2 of step 7 (shape [1, 37])" in named[0]
    assert "all_reduce 2 of step 7 (shape [1, 36])" in named[0]


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_a_rank_that_does_not_answer_is_named(threads: int) -> None:
    rank, _ = group(2, timeout=0.05)
    executor = executor_of(rank_program(0, 2), rank, threads)
    rank.begin_step(3)
    message = r"rank 1 did not answer within 0.05 s in all_reduce 1 of step 3 \(shape \[1, 80\]\)"
    with pytest.raises(RankError, match=message):
        executor.run(ONE)
    with pytest.raises(RankError, match="rank 0 has left the group"):
        executor.run(ONE)
    for worker in executor._workers:
        worker.wait_for(0)  # all have left the step


@pytest.mark.parametrize("threads", [1, 3])
def test_a_rank_that_ended_is_named(threads: int) -> None:
    first, second, third = group(3)
    executor = executor_of(rank_program(0, 3), first, threads)
    third.close()
    with pytest.raises(RankError, match="rank 2 ended in all_reduce 1 of step 0"):
        executor.run(ONE)
    second.close()


@pytest.mark.parametrize("threads", [1, 3])
def test_an_interrupt_ends_the_wait_for_another_rank(threads: int) -> None:
    rank, _ = group(2)
    executor = executor_of(rank_program(0, 2), rank, threads)

    def interrupt(number: int, frame: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGALRM, interrupt)
    # Again after 5 s: an exception that is raised in a finalizer, while garbage is collected, is lost.
    signal.setitimer(signal.ITIMER_REAL, 0.2, 5)
    try:
        with pytest.raises(KeyboardInterrupt):
            executor.run(ONE)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    for worker in executor._workers:
        worker.wait_for(0)


def test_the_time_in_which_a_rank_is_stopped_does_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    """Between two looks 100 s pass, as after Ctrl-Z. They count as one slice."""
    clock = iter(range(0, 10_000, 100))
    monkeypatch.setattr("llmc.runtime.parallel.processes.time.perf_counter", lambda: next(clock))
    rank, _ = group(2, timeout=0.5)
    begin = time.monotonic()
    with pytest.raises(RankError, match=r"did not answer within 0\.5 s"):
        executor_of(rank_program(0, 2), rank).run(ONE)
    assert time.monotonic() - begin >= 0.5


def test_the_structures_are_those_of_c() -> None:
    """Ranks poll a post, which has two cache lines of its own."""
    assert ctypes.sizeof(library.Post) == 128
