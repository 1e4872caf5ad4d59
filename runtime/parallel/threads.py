"""Ranks in the threads of one process. Verification runs a bundle's ranks this way."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from queue import Empty, SimpleQueue

import numpy as np

from llmc.runtime.backends.base import RankBackend
from llmc.runtime.batch import Batch
from llmc.runtime.errors import RankError
from llmc.runtime.parallel.communicator import (
    ALL_GATHER,
    ALL_REDUCE,
    Collective,
    Counter,
    RankEnded,
    check_parts,
    mismatch,
    no_answer,
    transfer_of,
)

_SECONDS = 600  # ranks that share cores may compute long before the last one arrives


def thread_group(size: int, timeout: float = _SECONDS, stages: int = 1) -> list[ThreadCommunicator]:
    """Return the communicators of `size` ranks, each for a thread of its own.

    timeout: the seconds that a rank waits for another one.
    stages: the number of groups of consecutive ranks
    """
    members = size // stages
    inboxes: dict[tuple[int, int], _Inbox] = {
        (source, to): SimpleQueue() for source in range(size) for to in range(size)
    }
    result = []
    for first in range(0, size, members):
        group = _Group(members, timeout, first)
        result += [ThreadCommunicator(group, rank, inboxes) for rank in range(first, first + members)]
    return result


# What one rank has sent to another: (the transfer, its array); None: it has left.
_Inbox = SimpleQueue[tuple[Collective, np.ndarray] | None]


class _Group:
    """What the ranks share: the array and the call of each, and a barrier."""

    def __init__(self, size: int, timeout: float, first: int = 0) -> None:
        self.size, self.timeout, self.first = size, timeout, first
        self.arrays: list[np.ndarray] = [np.empty((0, 0), np.float32)] * size
        self.calls: list[Collective | None] = [None] * size
        self.barrier = threading.Barrier(size)
        self.left: int | None = None  # the first rank that left


class ThreadCommunicator:
    """A communicator between threads. See `Communicator`."""

    def __init__(self, group: _Group, rank: int, inboxes: Mapping[tuple[int, int], _Inbox]) -> None:
        self.rank, self.size = rank - group.first, group.size
        self._number, self._group, self._counter = rank, group, Counter()
        self._inboxes, self._step = inboxes, 0

    def begin_step(self, step: int) -> None:
        """Count the collectives of a new step from 1."""
        self._step = step
        self._counter.begin_step(step)

    def all_reduce(self, array: np.ndarray) -> None:
        """Replace `array`, float32 [rows, width], by its sum over the ranks, in their order."""
        call = self._enter(ALL_REDUCE, array)
        total = self._group.arrays[0].copy()
        with np.errstate(all="ignore"):  # infinite and NaN sums are the model's, as in a single rank
            for other in self._group.arrays[1:]:
                total += other
        self._wait(call)  # all have read the arrays, which may change now
        array[...] = total

    def all_gather(self, part: np.ndarray, whole: np.ndarray) -> None:
        """Write the parts of all ranks, in their order, to the columns of `whole`."""
        check_parts(part, whole, self.size)
        call = self._enter(ALL_GATHER, part)
        parts = np.concatenate(self._group.arrays, axis=1)
        self._wait(call)
        whole[...] = parts

    def send(self, array: np.ndarray, to: int, sequence: int) -> None:
        """See `Communicator`."""
        self._inboxes[self._number, to].put((transfer_of(array, sequence, self._step), array.copy()))

    def receive(self, array: np.ndarray, source: int, sequence: int) -> None:
        """See `Communicator`."""
        call, inbox = transfer_of(array, sequence, self._step), self._inboxes[source, self._number]
        try:
            found = inbox.get(timeout=self._group.timeout)
        except Empty:
            raise no_answer(f"rank {source}", self._group.timeout, call) from None
        if found is None:
            inbox.put(None)
            raise RankEnded(source, str(call))
        if found[0] != call:
            raise mismatch(call, self._number, found[0], source)
        array[...] = found[1]

    def watch(self, counters: np.ndarray) -> None:
        """Nothing is shown: a thread does not stop without the others."""

    def close(self) -> None:
        """Leave the group. Other ranks that wait for this one, now or later, get a RankError."""
        if self._group.left is None:
            self._group.left = self._number
        self._group.barrier.abort()
        for (source, _), inbox in self._inboxes.items():
            if source == self._number:
                inbox.put(None)

    def _enter(self, operation: int, array: np.ndarray) -> Collective:
        """Show `array` to the others, and wait until all ranks have called the same collective."""
        group = self._group
        call = self._counter.next(operation, array)
        group.arrays[self.rank] = array
        group.calls[self.rank] = call
        self._wait(call)
        for rank, other in enumerate(group.calls, group.first):
            if other != call:
                assert other is not None
                raise mismatch(call, self._number, other, rank)
        return call

    def _wait(self, call: Collective) -> None:
        try:
            self._group.barrier.wait(self._group.timeout)
        except threading.BrokenBarrierError:
            raise self._broken(call) from None

    def _broken(self, call: Collective) -> RankError:
        group = self._group
        if group.left is not None:
            return RankEnded(group.left, str(call))
        missing = [rank for rank, other in enumerate(group.calls, group.first) if other != call]
        who = f"rank {missing[0]}" if missing else "another rank"
        return no_answer(who, group.timeout, call)


class LockStepBackend:
    """The loaded ranks of a bundle as one backend. See `Backend`.

    ranks: the backend of each rank, loaded with its communicator
    group: these communicators, from `thread_group`
    """

    def __init__(self, ranks: Sequence[RankBackend], group: Sequence[ThreadCommunicator]) -> None:
        self._ranks, self._group = list(ranks), list(group)
        self.name, self.num_blocks, self.block_size = ranks[0].name, ranks[0].num_blocks, ranks[0].block_size
        self._steps = 0
        self._errors: list[BaseException] = []
        self._pool = ThreadPoolExecutor(len(self._ranks), "llmc-rank")

    def forward(self, batch: Batch) -> np.ndarray:
        """Run the step on all ranks. Return the logits of rank 0, which are valid until the next call.

        An error of a rank ends the step of the others. The first error is raised, and later calls fail.
        """
        self._steps += 1
        self._errors.clear()
        jobs = [self._pool.submit(self._forward, rank, batch) for rank in range(len(self._ranks))]
        try:
            wait(jobs)
        except BaseException:  # an interrupt
            self._leave()
            raise
        if self._errors:
            raise self._errors[0]
        return jobs[0].result()

    def close(self) -> None:
        """Close the backends of all ranks."""
        self._leave()
        self._pool.shutdown()
        for rank in self._ranks:
            rank.close()

    def _forward(self, rank: int, batch: Batch) -> np.ndarray:
        try:
            self._group[rank].begin_step(self._steps)
            return self._ranks[rank].forward(batch)
        except BaseException as error:
            self._errors.append(error)  # before the other ranks fail because of it
            self._group[rank].close()
            raise

    def _leave(self) -> None:
        for communicator in self._group:
            communicator.close()
