"""A stand-in for NCCL: a library compiled by cc, whose collectives meet in a hub that checks them.

The hub runs in the process of the test. Ranks are threads of it or other processes. A collective of all ranks
of a communicator must be the same operation, with the same number of elements and the same type: real NCCL
would mix up data, or wait forever. A Send and its Recv must have the same numbers, too. A Send waits for its
Recv, which real NCCL does for large arrays. Sums are rounded after each addition, in the order of the ranks.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import subprocess
import threading
from collections.abc import Callable
from multiprocessing.connection import Client, Connection, Listener, wait
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

_LIBRARY = r"""
#include <stddef.h>
#include <stdint.h>
typedef uint64_t U; typedef struct { char internal[128]; } Id;
static int (*event)(const char *, const U *);
void stand_in(void *f) { event = f; }
#define SAY(name, ...) U a[] = {__VA_ARGS__}; return event(name, a)
int ncclGetVersion(int *v) { *v = 23203; return 0; }
int ncclGetUniqueId(Id *id) { SAY("id", (U)id); }
int ncclCommInitRank(void **c, int n, Id id, int rank) { SAY("init", (U)c, n, (U)&id, rank); }
int ncclAllReduce(const void *s, void *r, size_t n, int t, int op, void *c, void *st) {
  SAY("AllReduce", (U)s, (U)r, n, t, (U)c, (U)st, op); }
int ncclAllGather(const void *s, void *r, size_t n, int t, void *c, void *st) {
  SAY("AllGather", (U)s, (U)r, n, t, (U)c, (U)st, 0); }
int ncclSend(const void *s, size_t n, int t, int peer, void *c, void *st) {
  SAY("Send", (U)s, 0, n, t, (U)c, (U)st, peer); }
int ncclRecv(void *r, size_t n, int t, int peer, void *c, void *st) {
  SAY("Recv", 0, (U)r, n, t, (U)c, (U)st, peer); }
int ncclCommGetAsyncError(void *c, int *e) { SAY("ask", (U)c, (U)e); }
int ncclCommAbort(void *c) { SAY("abort", (U)c); }
const char *ncclGetErrorString(int e) { return e == 5 ? "invalid usage" : "as it was told to"; }
"""
DTYPES = {6: np.dtype(np.float16), 7: np.dtype(np.float32), 9: np.dtype(ml_dtypes.bfloat16)}
FAILED, MISMATCH = 3, 5


def compile_library(compiler: str, folder: Path) -> None:
    """Compile libnccl.so.2 into `folder` with a C compiler."""
    (folder / "nccl.c").write_text(_LIBRARY)
    command = [compiler, "-shared", "-fPIC", "-o", str(folder / "libnccl.so.2"), str(folder / "nccl.c")]
    subprocess.run(command, check=True)


class Call(NamedTuple):
    """What a rank calls."""

    name: str
    count: int
    dtype: str
    #: Of a transfer; 0 for collectives.
    peer: int


class Hub:
    """Where the ranks meet.

    calls: the collectives that all ranks of a communicator called, and transfers, as "Send 0 to 1"
    wrong: the calls of each rank where they differed
    """

    def __init__(self) -> None:
        self._listener = Listener(family="AF_UNIX")
        self.address = str(self._listener.address)
        self.calls: list[tuple[str, int, str]] = []
        self.wrong: list[list[Any]] = []
        self._thread = threading.Thread(target=self._accept, daemon=True)
        self._thread.start()

    def _accept(self) -> None:
        """Let the ranks of each communicator meet."""
        groups: dict[bytes, dict[int, Connection]] = {}
        while True:
            try:
                connection = self._listener.accept()
                identity, rank, size = connection.recv()
            except (EOFError, OSError):
                return
            ranks = groups.setdefault(identity, {})
            ranks[rank] = connection
            if len(ranks) == size:
                del groups[identity]
                threading.Thread(target=self._serve, args=(ranks,), daemon=True).start()

    def _serve(self, ranks: dict[int, Connection]) -> None:
        """Serve the ranks of a communicator. Each waits for the answer to its call."""
        number = {connection: rank for rank, connection in ranks.items()}
        calls: dict[int, tuple[Call, bytes]] = {}
        for connection in ranks.values():
            connection.send("all are here")
        try:
            while True:
                for connection in wait(list(number)):
                    calls[number[connection]] = connection.recv()  # type: ignore[index]
                while answers := self._answers(calls, len(ranks)):  # two transfers may wait
                    for rank, answer in answers.items():
                        del calls[rank]
                        with contextlib.suppress(OSError):  # it has gone
                            ranks[rank].send(answer)
        except (EOFError, OSError):
            for connection in ranks.values():
                connection.close()

    def _answers(self, calls: dict[int, tuple[Call, bytes]], size: int) -> dict[int, bytes | None]:
        """Return what the calls of some ranks give; None: they do not fit."""
        for rank, (call, data) in calls.items():
            if call.name != "Send" or call.peer not in calls:
                continue
            other = calls[call.peer][0]
            if (other.name, other.peer) == ("Recv", rank):
                if (call.count, call.dtype) != (other.count, other.dtype):
                    self.wrong.append([call, other])
                    return {rank: None, call.peer: None}
                self.calls.append((f"Send {rank} to {call.peer}", call.count, call.dtype))
                return {rank: b"", call.peer: data}
        if len(calls) < size:
            return {}
        given = [calls[rank] for rank in range(size)]
        found = [call for call, _ in given]
        if any(call != found[0] or call.name in ("Send", "Recv") for call in found):
            self.wrong.append(found)
            return dict.fromkeys(range(size))
        self.calls.append(found[0][:3])
        return dict.fromkeys(range(size), _combined(found[0], [data for _, data in given]))

    def close(self) -> None:
        self._listener.close()


def _combined(call: Call, parts: list[bytes]) -> bytes:
    name, _, dtype, _ = call
    if name == "AllGather":
        return b"".join(parts)
    kind = next(kind for kind in DTYPES.values() if kind.name == dtype)
    total, *others = (np.frombuffer(part, kind) for part in parts)
    for other in others:
        total = (total.astype(np.float32) + other.astype(np.float32)).astype(kind)
    return total.tobytes()


class StandInNccl:
    """The library in Python. A process has one, for all its ranks."""

    def __init__(
        self,
        file: Path,
        address: str = "",
        submit: Callable[[Callable[[], None]], None] = lambda work: work(),
        on_hang: Callable[[bool], None] | None = None,
    ) -> None:
        """file: the library. address: of the hub. submit: puts work on the stream

        on_hang: told whether work on the stream waits for a rank that has gone, as with real NCCL. None: such
            collectives fail.
        """
        self.address, self._submit, self.on_hang = address, submit, on_hang
        self.log: list[str] = []
        self.asked = 0  # the error that NCCL has found
        self.wrong = False  # whether it changes a bit of each sum
        self._ranks: dict[int, Connection] = {}  # handle of a communicator -> the connection to the hub
        self._last, self._lock = 0, threading.Lock()
        self.size = 0
        self._kind = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_char_p, ctypes.POINTER(ctypes.c_uint64))
        self._callback = self._kind(self._event)
        ctypes.CDLL(str(file)).stand_in(self._callback)

    def _event(self, name: bytes, given: Any) -> int:
        what = name.decode()
        self.log.append(what)
        if what in ("AllReduce", "AllGather", "Send", "Recv"):
            return self._collective(what, *given[:7])
        return getattr(self, f"_{what}")(given)

    def _id(self, given: Any) -> int:
        identity = self.address.encode() + b" " + os.urandom(4).hex().encode()
        ctypes.memmove(given[0], identity.ljust(128, b"\0"), 128)
        return 0

    def _init(self, given: Any) -> int:
        place, self.size, address, rank = given[:4]
        identity = ctypes.string_at(address)
        connection = Client(identity.decode().partition(" ")[0], family="AF_UNIX")
        connection.send((identity, rank, self.size))
        assert connection.recv() == "all are here"
        with self._lock:
            self._last += 1
            self._ranks[handle := self._last] = connection
        ctypes.c_uint64.from_address(place).value = handle
        return 0

    def _ask(self, given: Any) -> int:
        ctypes.c_int.from_address(given[1]).value = self.asked
        return 0

    def _abort(self, given: Any) -> int:
        self._ranks.pop(given[0]).close()
        if self.on_hang:
            self.on_hang(False)
        return 0

    def _collective(
        self, name: str, source: int, target: int, count: int, dtype: int, handle: int, stream: int, op: int
    ) -> int:
        transfers = name in ("Send", "Recv")
        assert stream == 34
        assert transfers or op == 0
        connection, kind = self._ranks[handle], DTYPES[dtype]
        status: list[int] = []  # empty while a graph is recorded

        def work() -> None:
            data = b"" if name == "Recv" else ctypes.string_at(source, count * kind.itemsize)
            try:
                connection.send((Call(name, count, kind.name, op if transfers else 0), data))
                answer = connection.recv()
            except (EOFError, OSError):
                status.append(0 if self.on_hang else FAILED)
                if self.on_hang:
                    self.on_hang(True)
                return
            status.append(MISMATCH if answer is None else 0)
            if answer is None:
                self.asked = MISMATCH
            elif name != "Send":
                ctypes.memmove(target, answer, len(answer))
                if self.wrong and name == "AllReduce":
                    ctypes.c_uint8.from_address(target).value ^= 64

        self._submit(work)
        return status[0] if status else 0
