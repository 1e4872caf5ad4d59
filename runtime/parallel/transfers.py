"""Transfers between the ranks of different pipeline stages, over sockets.

A header before each array describes the transfer, so ranks that are out of step notice it. The receiver's own
array decides about all sizes.

Sending does not wait for the receiver. What the socket does not take at once is left to a thread, so that a
stage computes its next step while the next stage is still in the one before.
"""

from __future__ import annotations

import contextlib
import math
import queue
import select
import socket
import threading
from collections.abc import Mapping

import numpy as np

from llmc.runtime.bundle.strict_json import DAMAGED
from llmc.runtime.errors import RankError
from llmc.runtime.parallel.communicator import (
    HEADER_BYTES,
    Collective,
    RankEnded,
    mismatch,
    no_answer,
    transfer_of,
)

#: How many times as long a rank waits for another stage, which computes meanwhile, as in a collective.
PATIENCE = 10
_AHEAD = 8  # arrays for one rank that wait to be sent
_SLICE = 1.0  # seconds


class SocketTransfers:
    """The connections of a rank to ranks of other stages.

    rank: this rank, among all
    links: rank -> the connection to it, a stream, which is closed here
    timeout: the seconds to wait for another rank. The time that the process is stopped, as by Ctrl-Z, does
        not count.
    """

    def __init__(self, rank: int, links: Mapping[int, socket.socket], timeout: float) -> None:
        self._rank, self._timeout = rank, timeout
        self._links = {other: _Link(other, link, timeout) for other, link in links.items()}
        self._step = 0

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
        if (other := Collective.unpack(bytes(link.receive(HEADER_BYTES, call)))) != call:
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
        for link in self._links.values():
            link.close()


class _Link:
    """The connection to one rank."""

    def __init__(self, rank: int, link: socket.socket, timeout: float) -> None:
        self._rank, self._socket, self._timeout = rank, link, timeout
        link.settimeout(None)
        self._poll = select.poll()
        self._poll.register(link, select.POLLIN)
        self._waiting: queue.Queue[memoryview | None] = queue.Queue(_AHEAD)
        self._thread: threading.Thread | None = None
        self._lost = self._closed = False

    def send(self, data: bytes, call: Collective) -> None:
        """Send `data`, or leave what does not go at once to a thread."""
        self._check(call)
        rest = memoryview(data)
        if not self._waiting.unfinished_tasks:
            try:
                rest = rest[self._socket.send(rest, socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL) :]
            except BlockingIOError:
                pass
            except OSError as error:
                raise RankEnded(self._rank, str(call)) from error
        if not rest:
            return
        if self._thread is None:
            self._thread = threading.Thread(target=self._send_waiting, name="llmc-send", daemon=True)
            self._thread.start()
        try:
            self._waiting.put(rest, timeout=self._timeout)
        except queue.Full:
            raise no_answer(f"rank {self._rank}", self._timeout, call) from None

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
        if self._closed:
            return
        self._closed = True
        with contextlib.suppress(OSError):  # the other end may be gone
            self._socket.shutdown(socket.SHUT_RDWR)  # wakes up the thread
        if self._thread is not None:
            with contextlib.suppress(queue.Full):  # then the thread notices the end
                self._waiting.put_nowait(None)
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
        return any(self._poll.poll(1000 * self._timeout / slices) for _ in range(slices))
