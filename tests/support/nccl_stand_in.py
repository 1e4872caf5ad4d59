"""A stand-in for NCCL: a library compiled by cc, whose collectives meet in a hub that checks them.

The hub runs in the process of the test. Ranks are threads of it or other processes. A collective of all ranks
must be the same operation, with the same number of elements and the same type: real NCCL would mix up data,
or wait forever. Sums are rounded after each addition, in the order of the ranks.
"""

from __future__ import annotations

import contextlib
import ctypes
import subprocess
import threading
from collections.abc import Callable
from multiprocessing.connection import Client, Connection, Listener
from pathlib import Path
from typing import Any

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


class Hub:
    """Where the ranks meet.

    calls: the collectives that all ranks called. wrong: the calls of each rank where they differed
    """

    def __init__(self, size: int) -> None:
        self._listener = Listener(family="AF_UNIX")
        self.address = str(self._listener.address)
        self.size = size
        self.calls: list[tuple[str, int, str]] = []
        self.wrong: list[list[Any]] = []
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()

    def _serve(self) -> None:
        ranks: dict[int, Connection] = {}
        while len(ranks) < self.size:
            connection = self._listener.accept()
            ranks[connection.recv()] = connection
        others = [ranks[rank] for rank in range(self.size)]
        for connection in others:
            connection.send("all are here")
        while True:
            try:
                given = [connection.recv() for connection in others]
            except (EOFError, OSError):
                break
            calls = [call for call, _ in given]
            if any(call != calls[0] for call in calls):
                self.wrong.append(calls)
                answer = None
            else:
                self.calls.append(calls[0])
                answer = _combined(calls[0], [data for _, data in given])
            for connection in others:
                with contextlib.suppress(OSError):  # it has gone
                    connection.send(answer)
        for connection in others:
            connection.close()

    def close(self) -> None:
        self._listener.close()


def _combined(call: tuple[str, int, str], parts: list[bytes]) -> bytes:
    name, _, dtype = call
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
        self._ranks: dict[int, Connection] = {}
        self.size = 0
        self._kind = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_char_p, ctypes.POINTER(ctypes.c_uint64))
        self._callback = self._kind(self._event)
        ctypes.CDLL(str(file)).stand_in(self._callback)

    def _event(self, name: bytes, given: Any) -> int:
        what = name.decode()
        self.log.append(what)
        if what in ("AllReduce", "AllGather"):
            return self._collective(what, *given[:7])
        return getattr(self, f"_{what}")(given)

    def _id(self, given: Any) -> int:
        ctypes.memmove(given[0], self.address.encode().ljust(128, b"\0"), 128)
        return 0

    def _init(self, given: Any) -> int:
        place, self.size, identity, rank = given[:4]
        connection = Client(ctypes.string_at(identity).decode(), family="AF_UNIX")
        connection.send(rank)
        assert connection.recv() == "all are here"
        self._ranks[handle := rank + 1] = connection
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
        assert (stream, op) == (34, 0)
        connection, kind = self._ranks[handle], DTYPES[dtype]
        status: list[int] = []  # empty while a graph is recorded

        def work() -> None:
            data = ctypes.string_at(source, count * kind.itemsize)
            try:
                connection.send(((name, count, kind.name), data))
                answer = connection.recv()
            except (EOFError, OSError):
                status.append(0 if self.on_hang else FAILED)
                if self.on_hang:
                    self.on_hang(True)
                return
            status.append(MISMATCH if answer is None else 0)
            if answer is None:
                self.asked = MISMATCH
            else:
                ctypes.memmove(target, answer, len(answer))
                if self.wrong and name == "AllReduce":
                    ctypes.c_uint8.from_address(target).value ^= 64

        self._submit(work)
        return status[0] if status else 0
