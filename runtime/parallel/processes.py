"""Ranks in processes of one machine: shared memory for the arrays, and sockets to wait for each other.

A collective copies the rank's array to its slot in the shared memory, sends one message to every other rank,
waits for one message of each, and reads all slots. The message describes the collective, so ranks that are
out of step notice it. A rank that ended is the end of a stream of messages. The kernel's locks of the
sockets order the accesses to the memory on every CPU.

Each rank has two slots, which it uses in turn. It writes to a slot again two messages later. The others have
read it by then, because they send their next message after that.

The memory and the sockets have no names. They are gone when the last process that has them ends.
"""

from __future__ import annotations

import math
import mmap
import os
import select
import socket
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np

from llmc.runtime.cpus import available_cpus
from llmc.runtime.errors import RankError
from llmc.runtime.parallel.communicator import (
    ALL_GATHER,
    ALL_REDUCE,
    HEADER_BYTES,
    Collective,
    Counter,
    RankEnded,
    check_parts,
    mismatch,
    no_answer,
)

#: The seconds that a rank waits for another one.
TIMEOUT = 60.0
SLOT_BYTES = 1 << 20  # longer arrays are exchanged in pieces
_SPIN = 100e-6  # seconds of polling before a rank blocks, because it takes about 50 us to wake up a process
_SLICE = 1.0  # seconds


@dataclass
class Endpoint:
    """The descriptors of one rank: of the memory that all share, and of a socket to every other rank."""

    rank: int
    size: int
    memory: int
    #: Rank -> the socket to it.
    links: Mapping[int, socket.socket]

    def descriptors(self) -> list[int]:
        """Return the descriptors for `of_descriptors`, the memory's first."""
        return [self.memory, *(link.fileno() for link in self.links.values())]

    @classmethod
    def of_descriptors(cls, rank: int, descriptors: list[int]) -> Endpoint:
        """Return the endpoint of `rank` in the process that inherited `descriptors`."""
        memory, *links = descriptors
        others = [other for other in range(len(links) + 1) if other != rank]
        sockets = {other: socket.socket(fileno=link) for other, link in zip(others, links, strict=True)}
        return cls(rank, len(descriptors), memory, sockets)

    def close(self) -> None:
        """Close the descriptors, which a process has for its children or has mapped."""
        os.close(self.memory)
        for link in self.links.values():
            link.close()


def mesh(size: int, slot_bytes: int = SLOT_BYTES) -> list[Endpoint]:
    """Return the endpoints of `size` ranks, at least two.

    Raises OSError if the system has no such memory (it is Linux's) or not enough.
    """
    slot_bytes -= slot_bytes % mmap.PAGESIZE
    links: list[dict[int, socket.socket]] = [{} for _ in range(size)]
    for first in range(size):
        for second in range(first + 1, size):
            links[first][second], links[second][first] = socket.socketpair(
                socket.AF_UNIX, socket.SOCK_SEQPACKET
            )
    memory = os.memfd_create("llmc-collectives", os.MFD_CLOEXEC)
    try:
        # A lack of memory is an error now. Without this call it would be a signal later.
        os.posix_fallocate(memory, 0, 2 * size * slot_bytes)
        return [Endpoint(rank, size, os.dup(memory), links[rank]) for rank in range(size)]
    finally:
        os.close(memory)


class ProcessCommunicator:
    """A communicator between processes. See `Communicator`.

    endpoint: the descriptors of this rank, which the communicator closes
    timeout: the seconds that a collective waits for another rank. The time that the process is stopped, as by
        Ctrl-Z, does not count.
    """

    def __init__(self, endpoint: Endpoint, timeout: float = TIMEOUT) -> None:
        self.rank, self.size = endpoint.rank, endpoint.size
        self._counter = Counter()
        self.begin_step = self._counter.begin_step
        numbers = np.frombuffer(mmap.mmap(endpoint.memory, 0), np.float32)
        os.close(endpoint.memory)
        #: The slots of all ranks, for even and for odd messages.
        self._slots = numbers.reshape(2, self.size, -1)
        self._capacity, self._turn = self._slots.shape[2], 0
        spin = _SPIN if self.size <= available_cpus() else 0.0  # ranks that share a core wait for each other
        self._peers = [_Peer(rank, link, timeout, spin) for rank, link in endpoint.links.items()]
        self._closed = False

    def all_reduce(self, array: np.ndarray) -> None:
        """Replace `array`, float32 [rows, width], by its sum over the ranks, in their order."""
        call = self._counter.next(ALL_REDUCE, array)
        for rows, columns in self._pieces(*array.shape):
            piece = array[rows, columns]
            first, second, *others = self._exchange(call, piece)
            with np.errstate(all="ignore"):  # infinite and NaN sums are the model's, as in a single rank
                np.add(first, second, out=piece)
                for other in others:
                    np.add(piece, other, out=piece)

    def all_gather(self, part: np.ndarray, whole: np.ndarray) -> None:
        """Write the parts of all ranks, in their order, to the columns of `whole`."""
        check_parts(part, whole, self.size)
        call = self._counter.next(ALL_GATHER, part)
        width = part.shape[1]
        for rows, columns in self._pieces(*part.shape):
            for rank, other in enumerate(self._exchange(call, part[rows, columns])):
                begin = rank * width
                whole[rows, begin + columns.start : begin + columns.stop] = other

    def close(self) -> None:
        """Close the sockets. Other ranks that wait for this one, now or later, get a RankError."""
        self._closed = True
        for peer in self._peers:
            peer.link.close()
        self._slots = np.empty((2, self.size, 0), np.float32)  # nothing else keeps the shared memory mapped

    def _pieces(self, rows: int, width: int) -> Iterator[tuple[slice, slice]]:
        """Yield the rows and columns of pieces that fit a slot; one piece of an array without elements."""
        capacity = self._capacity
        if rows * width <= capacity:
            yield slice(0, rows), slice(0, width)
            return
        columns = min(width, capacity)
        count = capacity // columns
        for row in range(0, rows, count):
            for column in range(0, width, columns):
                yield slice(row, min(row + count, rows)), slice(column, min(column + columns, width))

    def _exchange(self, call: Collective, piece: np.ndarray) -> list[np.ndarray]:
        """Return the pieces of all ranks, in their order. They are valid until the next exchange."""
        if self._closed:
            raise RankError(f"rank {self.rank} has left the group", "load the bundle again")
        slots = self._slots[self._turn]
        self._turn = 1 - self._turn
        pieces = [slot[: piece.size].reshape(piece.shape) for slot in slots]
        np.copyto(pieces[self.rank], piece)
        message = call.pack()
        try:
            for peer in self._peers:
                peer.send(message, call)
            for peer in self._peers:
                if (answer := peer.receive(call)) != message:
                    raise mismatch(call, self.rank, Collective.unpack(answer), peer.rank)
        except RankError:
            self.close()  # the others stop waiting, too
            raise
        return pieces


class _Peer:
    """The socket to another rank."""

    def __init__(self, rank: int, link: socket.socket, timeout: float, spin: float) -> None:
        self.rank, self.link = rank, link
        self._timeout, self._spin = timeout, spin
        self._poll = select.poll()
        self._poll.register(link, select.POLLIN)

    def send(self, message: bytes, call: Collective) -> None:
        """Send a message, which never waits: there are at most two that the other rank has not read."""
        try:
            self.link.send(message, socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL)
        except ConnectionError as error:
            raise self._gone(call) from error

    def receive(self, call: Collective) -> bytes:
        """Return the next message. Raises RankError if the rank ended or does not answer in time."""
        if not self._arrives():
            raise no_answer(f"rank {self.rank}", self._timeout, call)
        try:
            message = self.link.recv(HEADER_BYTES, socket.MSG_DONTWAIT)
        except ConnectionError as error:
            raise self._gone(call) from error
        if not message:
            raise self._gone(call)
        return message

    def _arrives(self) -> bool:
        """Wait for a message or the end of the rank."""
        poll = self._poll.poll
        end = time.perf_counter() + self._spin
        while time.perf_counter() < end:
            if poll(0):
                return True
        # A process that is stopped, as by Ctrl-Z, loses one of these waits, not all its time.
        slices = math.ceil(self._timeout / _SLICE)
        return any(poll(1000 * self._timeout / slices) for _ in range(slices))

    def _gone(self, call: Collective) -> RankEnded:
        return RankEnded(self.rank, str(call))
