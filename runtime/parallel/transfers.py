"""Transfers between the ranks of different pipeline stages, over sockets.

A header before each array describes the transfer, so ranks that are out of step notice it. The receiver's own
array decides about all sizes.

Sending does not wait for the receiver. What the socket does not take at once is left to a thread, so that a
stage computes its next step while the next stage is still in the one before. Rank 0 limits the number of
arrays on their way: it waits for logits, even for none, before it begins more steps.

A rank may compute for long before it sends. So it sends a pulse each second in which it has made progress, or
waits for another rank for a limited time. A rank whose process is stopped sends none, nor one that hangs.
"""

from __future__ import annotations

import contextlib
import math
import queue
import select
import socket
import threading
import weakref
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from llmc.runtime.bundle.strict_json import DAMAGED
from llmc.runtime.errors import RankError
from llmc.runtime.parallel.communicator import (
    HEADER_BYTES,
    PULSE,
    Collective,
    RankEnded,
    mismatch,
    no_answer,
    transfer_of,
)

_SLICE = 1.0  # seconds
_PULSE = Collective(PULSE, 0, 0, 0, 0).pack()


class SocketTransfers:
    """The connections of a rank to ranks of other stages.

    rank: this rank, among all
    links: rank -> the connection to it, a stream, which is closed here
    timeout: the seconds that another rank may take to send an array or to make progress. The time that this
        process is stopped, as by Ctrl-Z, does not count.
    members: the number of ranks of a stage
    """

    def __init__(self, rank: int, links: Mapping[int, socket.socket], timeout: float, members: int) -> None:
        self._rank = rank
        self._progress = _Progress(np.zeros(0, np.int32))
        self._links = {
            other: _Link(other, link, timeout, self._progress, other < rank) for other, link in links.items()
        }
        self._step = 0
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        receiver = rank + members
        if receiver not in links and rank % members == 0:
            receiver = 0  # the first rank of the last stage sends logits
        if receiver in links:
            link, seconds = weakref.ref(self._links[receiver]), min(_SLICE, timeout / 4)
            arguments = (link, self._progress, self._stop, seconds)
            self._thread = threading.Thread(
                target=_send_pulses, args=arguments, name="llmc-pulse", daemon=True
            )
            self._thread.start()

    def watch(self, counters: np.ndarray) -> None:
        """See `Communicator.watch`."""
        self._progress.counters = counters

    def waits(self) -> None:
        """Show progress: this rank waits for another one, and not forever."""
        self._progress.waits += 1

    def begin_step(self, step: int) -> None:
        """Transfer arrays of another step from now on."""
        self._step = step

    def send(self, array: np.ndarray, to: int, sequence: int) -> None:
        """See `Communicator.send`."""
        call = transfer_of(array, sequence, self._step)
        self._link(to).send(call.pack() + array.tobytes(), call)

    def receive(self, array: np.ndarray, source: int, sequence: int) -> None:
        """See `Communicator.receive`."""
        call, link = transfer_of(array, sequence, self._step), self._link(source)
        while (header := bytes(link.receive(HEADER_BYTES, call))) == _PULSE:
            pass
        if (other := Collective.unpack(header)) != call:
            raise mismatch(call, self._rank, other, source)
        array[...] = np.frombuffer(link.receive(array.size * 4, call), np.float32).reshape(array.shape)

    def _link(self, rank: int) -> _Link:
        if rank not in self._links:
            raise RankError(
                f"the program of rank {self._rank} names rank {rank}, which is not connected", DAMAGED
            )
        return self._links[rank]

    def close(self) -> None:
        """Close the connections. Other ranks that wait for this one, now or later, get a RankError."""
        self._stop.set()
        if self._thread is not None:
            self._thread.join()
        for link in self._links.values():
            link.close()


@dataclass
class _Progress:
    """What changes while a rank computes, or waits for a limited time."""

    counters: np.ndarray
    waits: int = 0

    def sum(self) -> int:
        return self.waits + int(self.counters.sum())


def _send_pulses(
    link: weakref.ref[_Link], progress: _Progress, stop: threading.Event, seconds: float
) -> None:
    """Send a pulse after every `seconds` with progress, until `stop`, or until nobody uses the link."""
    before = progress.sum()
    while not stop.wait(seconds):
        if (found := link()) is None:
            return
        if (now := progress.sum()) != before:
            found.pulse()
        before = now
        del found


class _Link:
    """The connection to one rank.

    progress: of this rank
    shows: whether this rank's waits for the other one are progress. Those of rank 0 for the last stage are
        not: it has sent everything before, so no rank waits for it.
    """

    def __init__(
        self, rank: int, link: socket.socket, timeout: float, progress: _Progress, shows: bool
    ) -> None:
        self._rank, self._socket, self._timeout = rank, link, timeout
        self._progress, self._shows = progress, shows
        link.settimeout(None)
        self._poll = select.poll()
        self._poll.register(link, select.POLLIN)
        self._waiting: queue.Queue[memoryview | None] = queue.Queue()
        self._lock = threading.Lock()  # of what is sent next
        self._thread: threading.Thread | None = None
        self._lost = self._closed = False

    def send(self, data: bytes, call: Collective) -> None:
        """Send `data`, or leave what does not go at once to a thread."""
        self._check(call)
        with self._lock:
            try:
                self._send(memoryview(data))
            except OSError as error:
                raise RankEnded(self._rank, str(call)) from error

    def pulse(self) -> None:
        """Send a pulse, unless the other rank has yet to read an array."""
        with self._lock, contextlib.suppress(OSError):  # the next transfer notices the end of the other rank
            if not (self._closed or self._lost or self._waiting.unfinished_tasks):
                self._send(memoryview(_PULSE))

    def _send(self, rest: memoryview) -> None:
        if not self._waiting.unfinished_tasks:
            with contextlib.suppress(BlockingIOError):
                rest = rest[self._socket.send(rest, socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL) :]
        if not rest:
            return
        if self._thread is None:
            self._thread = threading.Thread(target=self._send_waiting, name="llmc-send", daemon=True)
            self._thread.start()
        self._waiting.put(rest)

    def receive(self, count: int, call: Collective) -> bytearray:
        """Return the next `count` bytes. Raises RankError if the rank ended or does not send them in time."""
        self._check(call)
        data = bytearray(count)
        view = memoryview(data)
        while view:
            if not self._arrives():
                raise no_answer(f"rank {self._rank}", self._timeout, call)
            try:
                received = self._socket.recv_into(view, 0, socket.MSG_DONTWAIT)
            except BlockingIOError:
                continue
            except OSError as error:
                raise RankEnded(self._rank, str(call)) from error
            if not received:
                raise RankEnded(self._rank, str(call))
            view = view[received:]
        return data

    def close(self) -> None:
        with self._lock:
            if self._closed:
                return
            self._closed = True
        with contextlib.suppress(OSError):  # the other end may be gone
            self._socket.shutdown(socket.SHUT_RDWR)  # wakes up the thread
        if self._thread is not None:
            self._waiting.put(None)
            self._thread.join()
        self._socket.close()

    def _check(self, call: Collective) -> None:
        if self._closed:
            raise RankError("this rank has left the group", "load the bundle again")
        if self._lost:
            raise RankEnded(self._rank, str(call))

    def _send_waiting(self) -> None:
        while (data := self._waiting.get()) is not None:
            try:
                if not self._lost:
                    self._socket.sendall(data, socket.MSG_NOSIGNAL)
            except OSError:
                self._lost = True
            self._waiting.task_done()
            if self._closed:
                return

    def _arrives(self) -> bool:
        # A process that is stopped, as by Ctrl-Z, loses one of these waits, not all its time.
        slices = math.ceil(self._timeout / _SLICE)
        for _ in range(slices):
            self._progress.waits += self._shows
            if self._poll.poll(1000 * self._timeout / slices):
                return True
        return False
