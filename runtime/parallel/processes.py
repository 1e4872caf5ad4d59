"""Ranks in processes of one machine: shared memory for arrays, and sockets that notice the end of a process.

The native engine runs the collectives without Python (`plugins/collectives/cpu/collective.c`). While a rank
waits long for another one, the engine pauses from time to time, so that Python handles signals. The
communicator then looks whether the other rank has ended.

The memory and the sockets have no names. They are gone when the last process that has them ends.
"""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import os
import select
import socket
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from llmc.plugins.cpu import library
from llmc.runtime.cpus import available_cpus
from llmc.runtime.errors import RankError
from llmc.runtime.parallel.communicator import (
    ALL_GATHER,
    ALL_REDUCE,
    Collective,
    RankEnded,
    check_array,
    check_parts,
    mismatch,
    no_answer,
)
from llmc.runtime.parallel.transfers import SocketTransfers

#: The seconds that a rank waits for another one.
TIMEOUT = 60.0
SLOT_BYTES = 1 << 20  # of the two slots of a rank; longer arrays are exchanged in pieces
_TURNS = 16000  # of a loop before a rank sleeps, 0.2 to 0.8 ms: it takes long to wake up a process
_FEW_TURNS = 200  # if ranks share cores, because the other one may need this core
_SLICE = 0.1  # seconds between two looks at a rank that does not answer
_OPERATIONS = {library.ALL_REDUCE: ALL_REDUCE, library.ALL_GATHER: ALL_GATHER}


@dataclass
class Endpoint:
    """The descriptors of one rank: of its group's memory, and of sockets to other ranks."""

    #: The number in the group, and the size of the group.
    rank: int
    size: int
    memory: int
    #: Rank in the group -> the socket to it.
    links: Mapping[int, socket.socket]
    #: The number of the group's first rank among all.
    first: int = 0
    #: Rank of another group, among all -> the socket for transfers.
    transfers: Mapping[int, socket.socket] = field(default_factory=dict)

    @property
    def number(self) -> int:
        """The number among all ranks."""
        return self.first + self.rank

    def descriptors(self) -> list[int]:
        """Return all descriptors, which the process of the rank inherits."""
        return [self.memory, *(link.fileno() for link in (*self.links.values(), *self.transfers.values()))]

    def to_json(self) -> dict[str, Any]:
        """Return what `of_json` reads."""
        numbers = [
            {str(rank): link.fileno() for rank, link in links.items()}
            for links in (self.links, self.transfers)
        ]
        fields = {"rank": self.rank, "size": self.size, "memory": self.memory, "first": self.first}
        return fields | {"links": numbers[0], "transfers": numbers[1]}

    @classmethod
    def of_json(cls, fields: dict[str, Any]) -> Endpoint:
        """Return the endpoint in the process that inherited its descriptors."""
        for name in ("links", "transfers"):
            fields[name] = {int(rank): socket.socket(fileno=link) for rank, link in fields[name].items()}
        return cls(**fields)

    def close(self) -> None:
        """Close the descriptors, which a process has for its children or has mapped."""
        os.close(self.memory)
        for link in (*self.links.values(), *self.transfers.values()):
            link.close()


def pipeline(size: int, stages: int) -> list[Endpoint]:
    """Return the endpoints of `size` ranks that form `stages` groups. Raises OSError as `mesh` does."""
    members = size // stages
    endpoints: list[Endpoint] = []
    for first in range(0, size, members):
        endpoints += [replace(each, first=first, transfers={}) for each in mesh(members)]
    pairs = {(rank, rank + members) for rank in range(size - members)}
    if stages > 1:
        pairs.add((0, size - members))  # for the logits
    sockets: list[dict[int, socket.socket]] = [{} for _ in range(size)]
    for one, other in sorted(pairs):
        sockets[one][other], sockets[other][one] = socket.socketpair()
    return [replace(each, transfers=links) for each, links in zip(endpoints, sockets, strict=True)]


def mesh(size: int, slot_bytes: int = SLOT_BYTES) -> list[Endpoint]:
    """Return the endpoints of a group of `size` ranks.

    slot_bytes: of each of the two slots of a rank; at least a page

    Raises OSError if the system has no such memory (it is Linux's) or not enough.
    """
    slot_bytes -= slot_bytes % mmap.PAGESIZE
    links: list[dict[int, socket.socket]] = [{} for _ in range(size)]
    for first in range(size):
        for second in range(first + 1, size):
            links[first][second], links[second][first] = socket.socketpair()
    memory = os.memfd_create("llmc-collectives", os.MFD_CLOEXEC)
    try:
        # A lack of memory is an error now. Without this call it would be a signal later.
        os.posix_fallocate(memory, 0, _posts_bytes(size) + 2 * size * slot_bytes)
        return [Endpoint(rank, size, os.dup(memory), links[rank]) for rank in range(size)]
    finally:
        os.close(memory)


def _posts_bytes(size: int) -> int:
    """Return the bytes before the slots, whole pages."""
    return -(-size * ctypes.sizeof(library.Post) // mmap.PAGESIZE) * mmap.PAGESIZE


class ProcessCommunicator:
    """A communicator between processes. See `Communicator`.

    endpoint: the descriptors of this rank, which the communicator closes
    timeout: the seconds that a collective waits for another rank. The time that the process is stopped, as by
        Ctrl-Z, does not count.
    threads: the number of threads of each rank
    """

    def __init__(self, endpoint: Endpoint, timeout: float = TIMEOUT, threads: int = 1) -> None:
        self.rank, self.size = endpoint.rank, endpoint.size
        #: The memory that all ranks share; None after `close`.
        self.memory: mmap.mmap | None = mmap.mmap(endpoint.memory, 0)
        os.close(endpoint.memory)
        begin = _posts_bytes(self.size)
        address = ctypes.addressof(ctypes.c_char.from_buffer(self.memory))
        self._timeout, self._slice = timeout, min(_SLICE, timeout)
        #: What the engine needs for collectives.
        self.exchange = library.Exchange(
            self.rank,
            self.size,
            posts=address,
            slots=address + begin,
            capacity=(len(self.memory) - begin) // (2 * self.size * 4),
            turns=_TURNS if self.size * threads <= available_cpus() else _FEW_TURNS,
        )
        self.exchange.slice[1] = int(1e9 * self._slice)
        self._links, self._first, self._number = endpoint.links, endpoint.first, endpoint.number
        self._transfers = SocketTransfers(endpoint.number, endpoint.transfers, timeout, self.size)

    def begin_step(self, step: int) -> None:
        """Count the collectives of a new step from 1."""
        self.exchange.step, self.exchange.number = step, 0
        self._transfers.begin_step(step)

    @contextlib.contextmanager
    def begin(self, step: library.Step) -> Iterator[None]:
        """Let threads run `step`, a step of the native engine with collectives, one of them with `run`.

        All threads leave the step after an exception, which may be RankError, see `all_reduce`.
        """
        if self.memory is None or self.exchange.stop:
            raise RankError(f"rank {self._number} has left the group", "load the bundle again")
        step.exchange = ctypes.addressof(self.exchange)
        try:
            yield
        except BaseException as error:
            self.exchange.stop = library.STOPPED
            if isinstance(error, RankError):
                self.close()  # the others stop waiting, too
            raise

    def run(self, engine: ctypes.CDLL, step: library.Step) -> None:
        """Run a step in this thread. Raises RankError as `all_reduce` does."""
        position, patience = library.Position(0, library.NO_ITEM), _Patience(self._slice)
        while outcome := engine.llmc_resume(ctypes.byref(step), ctypes.byref(position)):
            if outcome != library.PAUSED:
                raise self._disagreement()
            self._look(patience)

    def all_reduce(self, array: np.ndarray) -> None:
        """Replace `array`, float32 [rows, width], by its sum over the ranks, in their order."""
        check_array(ALL_REDUCE, array)
        data = np.ascontiguousarray(array)
        self._run_one(library.ALL_REDUCE, data, data)
        array[...] = data

    def all_gather(self, part: np.ndarray, whole: np.ndarray) -> None:
        """Write the parts of all ranks, in their order, to the columns of `whole`."""
        check_parts(part, whole, self.size)
        check_array(ALL_GATHER, part)
        data = np.empty(whole.shape, np.float32)
        self._run_one(library.ALL_GATHER, np.ascontiguousarray(part), data)
        whole[...] = data

    def send(self, array: np.ndarray, to: int, sequence: int) -> None:
        """See `Communicator`."""
        self._transfers.send(array, to, sequence)

    def receive(self, array: np.ndarray, source: int, sequence: int) -> None:
        """See `Communicator`."""
        self._transfers.receive(array, source, sequence)

    def watch(self, counters: np.ndarray) -> None:
        """See `Communicator`."""
        self._transfers.watch(counters)

    def close(self) -> None:
        """Close the sockets. Other ranks that wait for this one, now or later, get a RankError."""
        self._transfers.close()
        for link in self._links.values():
            link.close()
        self.memory = None  # nothing else keeps the shared memory mapped

    def _run_one(self, operation: int, part: np.ndarray, whole: np.ndarray) -> None:
        """Run a collective as a step of its own. part, whole: contiguous arrays that it reads and writes."""
        rows, width = part.shape
        code = library.Instruction(op=operation, out=whole.ctypes.data, a=part.ctypes.data)
        code.a_stride, code.out_stride, code.n[0] = width, whole.shape[1], width
        group = library.Group(0, 1)
        counters = np.zeros((2, library.COUNTER), np.int32)
        step = library.Step(rows, threads=1, num_groups=1)
        step.code, step.groups = ctypes.addressof(code), ctypes.addressof(group)
        step.next, step.done = (counter.ctypes.data for counter in counters)
        with self.begin(step):
            self.run(library.load(), step)

    def _posts(self) -> ctypes.Array[library.Post]:
        assert self.memory is not None
        return (library.Post * self.size).from_buffer(self.memory)

    def _call(self, post: library.Post, message: int) -> Collective:
        call = post.calls[message % 2]
        operation = _OPERATIONS.get(call.operation, call.operation)
        return Collective(operation, call.number, call.step, call.rows, call.width)

    def _look(self, patience: _Patience) -> None:
        """Raise RankError if a rank that this one waits for has ended, or does not answer in time."""
        ended = [rank for rank, link in self._links.items() if _has_ended(link)]
        posts = self._posts()  # after that: a rank that ended sends no more
        message = posts[self.rank].sent
        late = [rank for rank in self._links if (posts[rank].sent - message) % (1 << 32) >> 31]
        call = self._call(posts[self.rank], message)
        if gone := [rank for rank in late if rank in ended]:
            raise RankEnded(self._first + gone[0], str(call))
        if late:
            self._transfers.waits()
        if patience.wait(message if late else None) >= self._timeout:
            raise no_answer(f"rank {self._first + late[0]}", self._timeout, call)

    def _disagreement(self) -> RankError:
        posts = self._posts()
        message = posts[self.rank].sent
        calls = [self._call(post, message) for post in posts]
        mine = calls[self.rank]
        other = next(rank for rank, call in enumerate(calls) if call != mine)
        return mismatch(mine, self._number, calls[other], self._first + other)


class _Patience:
    """How long a rank has waited for the answers to a message.

    most: the most seconds between two looks that count, because the process may have been stopped meanwhile
    """

    def __init__(self, most: float) -> None:
        self._most, self._seconds, self._last = most, 0.0, 0.0
        self._message: int | None = None

    def wait(self, message: int | None) -> float:
        """Return the seconds since the first look with `message`. None: the rank waits for no other one."""
        now = time.perf_counter()
        waits = message is not None and message == self._message
        self._seconds = self._seconds + min(now - self._last, self._most) if waits else 0.0
        self._message, self._last = message, now
        return self._seconds


def _has_ended(link: socket.socket) -> bool:
    poll = select.poll()
    poll.register(link, 0)
    return bool(poll.poll(0))
