"""Ranks in processes of one or several machines: a TCP connection between every two ranks.

A collective sends the rank's array to every other rank, and receives theirs. A header before each array
describes the collective, so ranks that are out of step notice it. All arrays have the shape of the rank's own
array: what another rank sends decides about no size.
"""

from __future__ import annotations

import math
import select
import socket
import time
from collections.abc import Mapping

import numpy as np

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
from llmc.runtime.parallel.processes import TIMEOUT
from llmc.runtime.parallel.transfers import SocketTransfers

_SPIN = 100e-6  # seconds of polling before a rank blocks, because it takes about 50 us to wake up a process
_SLICE = 1.0  # seconds


class TcpCommunicator:
    """A communicator between processes. See `Communicator`.

    rank: among all ranks
    links: rank -> the connection to it, which the communicator closes
    timeout: the seconds that a collective waits without any progress. The time that the process is stopped,
        as by Ctrl-Z, does not count.
    spin: poll for a moment before waiting, which is faster unless ranks share cores
    members: the number of ranks in a group; None: all
    """

    def __init__(
        self,
        rank: int,
        links: Mapping[int, socket.socket],
        timeout: float = TIMEOUT,
        spin: bool = False,
        members: int | None = None,
    ) -> None:
        self.size = members or len(links) + 1
        self.rank, self._number = rank % self.size, rank
        self._counter = Counter()
        ours = {
            other: link for other, link in sorted(links.items()) if other // self.size == rank // self.size
        }
        self._peers = {link.fileno(): _Peer(other, link) for other, link in ours.items()}
        others = {other: link for other, link in links.items() if other not in ours}
        self._transfers = SocketTransfers(rank, others, timeout, self.size)
        self._timeout, self._spin = timeout, _SPIN if spin else 0.0
        self._closed = False

    def all_reduce(self, array: np.ndarray) -> None:
        """Replace `array`, float32 [rows, width], by its sum over the ranks, in their order."""
        first, second, *others = self._exchange(self._counter.next(ALL_REDUCE, array), array)
        with np.errstate(all="ignore"):  # infinite and NaN sums are the model's, as in a single rank
            np.add(first, second, out=array)
            for other in others:
                np.add(array, other, out=array)

    def all_gather(self, part: np.ndarray, whole: np.ndarray) -> None:
        """Write the parts of all ranks, in their order, to the columns of `whole`."""
        check_parts(part, whole, self.size)
        parts = self._exchange(self._counter.next(ALL_GATHER, part), part)
        np.concatenate(parts, axis=1, out=whole)

    def begin_step(self, step: int) -> None:
        """Count the collectives of a new step from 1."""
        self._counter.begin_step(step)
        self._transfers.begin_step(step)

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
        """Close the connections. Other ranks that wait for this one, now or later, get a RankError."""
        self._closed = True
        self._transfers.close()
        for peer in self._peers.values():
            peer.link.close()

    def _exchange(self, call: Collective, array: np.ndarray) -> list[np.ndarray]:
        """Send `array` to all ranks. Return the arrays of all, in their order."""
        if self._closed:
            raise RankError(f"rank {self._number} has left the group", "load the bundle again")
        message = call.pack() + array.tobytes()
        try:
            self._transfer(message, call)
        except RankError:
            self.close()  # the others stop waiting, too
            raise
        received: dict[int, bytes | bytearray] = {peer.rank: peer.received for peer in self._peers.values()}
        received[self._number] = message
        return [
            np.frombuffer(received[rank], np.float32, offset=HEADER_BYTES).reshape(array.shape)
            for rank in sorted(received)
        ]

    def _transfer(self, message: bytes, call: Collective) -> None:
        """Send `message` to all ranks and receive theirs, whichever of them can go on."""
        poll = select.poll()
        for number, peer in self._peers.items():
            peer.begin(message)
            peer.send(call)
            poll.register(number, peer.events)
        waiting = set(self._peers)
        while waiting:
            if not (ready := self._wait(poll)):
                late = min(self._peers[number].rank for number in waiting)
                raise no_answer(f"rank {late}", self._timeout, call)
            for number, _ in ready:
                peer = self._peers[number]
                before = peer.events
                peer.send(call)
                peer.receive(call, self._number)
                if not peer.events:
                    poll.unregister(number)
                    waiting.remove(number)
                elif peer.events != before:
                    poll.modify(number, peer.events)

    def _wait(self, poll: select.poll) -> list[tuple[int, int]]:
        """Wait until a connection can go on. Return [] if none does in time."""
        end = time.perf_counter() + self._spin
        while time.perf_counter() < end:
            if ready := poll.poll(0):
                return ready
        # A process that is stopped, as by Ctrl-Z, loses one of these waits, not all its time.
        slices = math.ceil(self._timeout / _SLICE)
        for _ in range(slices):
            self._transfers.waits()
            if ready := poll.poll(1000 * self._timeout / slices):
                return ready
        return []


class _Peer:
    """The connection to another rank, and how far the message of either side has come."""

    def __init__(self, rank: int, link: socket.socket) -> None:
        self.rank, self.link = rank, link
        self.received = bytearray()
        self._message = b""
        self._sent = self._arrived = 0

    def begin(self, message: bytes) -> None:
        """Prepare to send `message`, and to receive one that begins and ends as it does."""
        self._message, self.received = message, bytearray(len(message))
        self._sent = self._arrived = 0

    @property
    def events(self) -> int:
        """What to wait for: the events of `poll`, 0 if both messages are through."""
        sending = select.POLLOUT if self._sent < len(self._message) else 0
        return sending | (select.POLLIN if self._arrived < len(self._message) else 0)

    def send(self, call: Collective) -> None:
        """Send what the connection takes now. Raises RankEnded."""
        try:
            while self._sent < len(self._message):
                rest = memoryview(self._message)[self._sent :]
                self._sent += self.link.send(rest, socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL)
        except BlockingIOError:
            return
        except OSError as error:
            if self._arrived >= HEADER_BYTES:
                raise RankEnded(self.rank, str(call)) from error
            self._sent = len(self._message)  # its last message may say why; `receive` finds the end

    def receive(self, call: Collective, own: int) -> None:
        """Receive what has arrived. Raises RankError if the rank ended or is in another collective."""
        try:
            while self._arrived < len(self.received):
                view = memoryview(self.received)[self._arrived :]
                count = self.link.recv_into(view, 0, socket.MSG_DONTWAIT)
                if not count:
                    raise RankEnded(self.rank, str(call))
                begun = self._arrived >= HEADER_BYTES
                self._arrived += count
                header = bytes(self.received[:HEADER_BYTES])
                if not begun and self._arrived >= HEADER_BYTES and header != self._message[:HEADER_BYTES]:
                    raise mismatch(call, own, Collective.unpack(header), self.rank)
        except BlockingIOError:
            return
        except OSError as error:
            raise RankEnded(self.rank, str(call)) from error
