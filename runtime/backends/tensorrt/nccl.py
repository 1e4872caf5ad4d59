"""The collectives and transfers of ranks on GPUs: NCCL, through ctypes.

The library is that of the package nvidia-nccl-cu13, or of the system. The ranks of a stage form a
communicator for their collectives, and the ranks of all stages another one for transfers. Their ids travel
over the communicator that the ranks have on the CPU.
"""

from __future__ import annotations

import ctypes
import importlib.util
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from llmc.plugins.collectives.spec import ALL_GATHER, ALL_REDUCE, RECV, SEND
from llmc.plugins.collectives.tensorrt_plugin import Attributes
from llmc.runtime.errors import BackendError, RankError
from llmc.runtime.parallel.communicator import Communicator, RankEnded

PACKAGE = "nvidia-nccl-cu13"
LIBRARY = "libnccl.so.2"
SECONDS = 60.0  # that a rank waits for the others, on the GPU and when they meet
_PAUSE = 20e-6  # seconds between two questions to the stream
_SUM = 0
_GROUP, _ALL = "group", "all"  # communicators
_COLLECTIVE = "collective"  # a kind of exchange, beside SEND and RECV
_DTYPES = {"fp16": 6, "fp32": 7, "bf16": 9}  # ncclDataType_t
_ID_BYTES = 128


class UniqueId(ctypes.Structure):
    """ncclUniqueId."""

    _fields_ = (("internal", ctypes.c_char * _ID_BYTES),)


_POINTER, _INT, _SIZE = ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t
_SIGNATURES: dict[str, tuple[Any, ...]] = {
    "ncclGetVersion": (_POINTER,),
    "ncclGetUniqueId": (_POINTER,),
    "ncclCommInitRank": (_POINTER, _INT, UniqueId, _INT),
    "ncclAllReduce": (_POINTER, _POINTER, _SIZE, _INT, _INT, _POINTER, _POINTER),
    "ncclAllGather": (_POINTER, _POINTER, _SIZE, _INT, _POINTER, _POINTER),
    "ncclSend": (_POINTER, _SIZE, _INT, _INT, _POINTER, _POINTER),
    "ncclRecv": (_POINTER, _SIZE, _INT, _INT, _POINTER, _POINTER),
    "ncclCommGetAsyncError": (_POINTER, _POINTER),
    "ncclCommAbort": (_POINTER,),
}


class Nccl:
    """The library."""

    def __init__(self) -> None:
        """Load the library. Raises BackendError if there is none."""
        file = packaged() or LIBRARY
        try:
            library = ctypes.CDLL(str(file))
        except OSError as error:
            raise BackendError(
                f"several ranks on GPUs need NCCL: {error}", f"pip install {PACKAGE}"
            ) from error
        self._functions: dict[str, Any] = {}
        for name, types in _SIGNATURES.items():
            function = getattr(library, name)
            function.argtypes, function.restype = types, ctypes.c_int
            self._functions[name] = function
        library.ncclGetErrorString.argtypes = (ctypes.c_int,)
        library.ncclGetErrorString.restype = ctypes.c_char_p
        self._describe = library.ncclGetErrorString

    def call(self, name: str, *arguments: Any) -> None:
        """Call a function. Raises BackendError if it fails."""
        self.check(name, self._functions[name](*arguments))

    def check(self, name: str, status: int) -> None:
        """Raise BackendError for the status that a function returned, unless it is success."""
        if status:
            reason = self._describe(status).decode(errors="replace").partition(" (run with")[0]
            raise BackendError(f"{name} failed: {reason}", "set NCCL_DEBUG=INFO for the reason")

    def version(self) -> str:
        """Return the version, such as "2.32.3"."""
        code = ctypes.c_int()
        self.call("ncclGetVersion", ctypes.byref(code))
        return f"{code.value // 10000}.{code.value // 100 % 100}.{code.value % 100}"


def packaged() -> Path | None:
    """Return the library of the package; None if it is not installed."""
    try:
        package = importlib.util.find_spec("nvidia.nccl")
    except ModuleNotFoundError:
        return None
    for place in (package.submodule_search_locations or ()) if package else ():
        if (file := Path(place, "lib", LIBRARY)).exists():
            return file
    return None


@dataclass(frozen=True)
class Neighbors:
    """The ranks of other pipeline stages that a rank exchanges arrays with in a step."""

    #: From `stages.id_of_all`, the same for all ranks.
    unique_id: bytes
    #: The number of this rank among all, and how many there are.
    number: int
    size: int
    #: The rank of the stage before; None: there is none. The number of arrays that it sends.
    before: int | None
    receives: int
    #: The rank of the next stage; None: there is none. The number of arrays that it gets.
    behind: int | None
    sends: int


class Unanswered(RankEnded):
    """Other ranks did not answer on the GPU in time. If one ended, its own error is the cause."""

    def __init__(self, seconds: float, where: str) -> None:
        RankError.__init__(
            self,
            f"another rank did not answer within {seconds:g} s {where}",
            "its process may have ended; NCCL_DEBUG=INFO shows what NCCL does",
        )
        self.where = where.removeprefix("in ")


class NcclCollectives:
    """The communicators of a rank, for the plugins of its engine. See `Collectives`.

    A step first receives, then runs its collectives, and then sends.
    """

    def __init__(
        self, nccl: Nccl, size: int, rank: int, unique_id: bytes, count: int,
        in_context: Callable[[], None] = lambda: None, timeout: float | None = None,
        neighbors: Neighbors | None = None,
    ) -> None:  # fmt: skip
        """Meet the other ranks.

        size, rank: of the group of this rank, which is its stage
        unique_id: from `unique_id`, the same for the ranks of a group; b"": the group has no collectives
        count: the number of collectives of a step
        in_context: makes the GPU's context that of the calling thread
        timeout: the seconds to wait for the others; None: SECONDS
        neighbors: None: there is one stage

        Raises BackendError, and Unanswered.
        """
        self.size, self.rank, self._neighbors = size, rank, neighbors
        self._nccl, self._next = nccl, 0
        self._timeout = SECONDS if timeout is None else timeout
        receives, sends = (neighbors.receives, neighbors.sends) if neighbors else (0, 0)
        phases = ((RECV, receives), (_COLLECTIVE, count), (SEND, sends))
        #: What a step runs: (kind, number).
        self._order = [(kind, number) for kind, most in phases for number in range(most)]
        #: Of the group, and of all ranks.
        self._handles: dict[str, ctypes.c_void_p] = {}
        try:
            if unique_id:
                self._handles[_GROUP] = self._meet(unique_id, size, rank, in_context)
            if neighbors:
                self._handles[_ALL] = self._meet(
                    neighbors.unique_id, neighbors.size, neighbors.number, in_context
                )
        except BaseException:
            self.close()
            raise

    def _meet(
        self, unique_id: bytes, size: int, rank: int, in_context: Callable[[], None]
    ) -> ctypes.c_void_p:
        """Return a communicator of `size` ranks when all are there."""
        handle, errors = ctypes.c_void_p(), list[Exception]()

        def meet() -> None:
            try:
                in_context()
                identity = UniqueId.from_buffer_copy(unique_id)
                self._nccl.call("ncclCommInitRank", ctypes.byref(handle), size, identity, rank)
            except Exception as error:
                errors.append(error)

        meeting = threading.Thread(target=meet, name="llmc-nccl", daemon=True)
        meeting.start()
        meeting.join(self._timeout)
        if meeting.is_alive():
            raise Unanswered(self._timeout, "while the ranks met in NCCL")
        if errors:
            raise errors[0]
        return handle

    def begin(self) -> None:
        """Begin a run of the engine: its collectives and transfers are counted from 0."""
        self._next = 0

    def end(self) -> None:
        """End a run. Raises BackendError if the engine left out collectives or transfers."""
        if self._next != len(self._order):
            what = "collectives and transfers" if self._neighbors else "collectives"
            raise BackendError(
                f"the engine ran {self._next} of {len(self._order)} {what}", "build the bundle again"
            )

    def run(
        self, operation: str, attributes: Attributes, dtype: str, source: int, target: int, count: int,
        stream: int,
    ) -> None:  # fmt: skip
        """Put a collective or transfer on the stream. Raises BackendError unless it is the next of the step.

        NCCL does not notice that ranks call different collectives: it mixes up their data, or waits forever.
        """
        self._check(operation, attributes)
        self._next += 1
        kind, group, all_ranks = _DTYPES[dtype], self._handles.get(_GROUP), self._handles.get(_ALL)
        if operation == SEND:
            self._nccl.call("ncclSend", source, count, kind, attributes.peer, all_ranks, stream)
        elif operation == RECV:
            self._nccl.call("ncclRecv", target, count, kind, attributes.peer, all_ranks, stream)
        elif operation == ALL_REDUCE:
            self._nccl.call("ncclAllReduce", source, target, count, kind, _SUM, group, stream)
        else:
            assert operation == ALL_GATHER
            self._nccl.call("ncclAllGather", source, target, count, kind, group, stream)

    def _check(self, operation: str, attributes: Attributes) -> None:
        """Raise BackendError if this is not what the engine of this rank is to run now."""
        kind = operation if operation in (SEND, RECV) else _COLLECTIVE
        if kind == _COLLECTIVE and attributes.ranks != self.size:
            raise BackendError(
                f"the engine is one of {attributes.ranks} ranks, here are {self.size}", "build it again"
            )
        due = self._order[self._next] if self._next < len(self._order) else None
        if (kind, attributes.sequence) != due:
            wanted = f"{due[0]} {due[1]}" if due else "nothing"
            raise BackendError(
                f"the engine runs {kind} {attributes.sequence} where {wanted} is due",
                "build the bundle again, and report this if it does not help",
            )
        if kind == _COLLECTIVE:
            return
        assert self._neighbors is not None  # transfers are due
        peer = self._neighbors.behind if kind == SEND else self._neighbors.before
        if attributes.peer != peer:
            raise BackendError(
                f"the engine runs {kind} {attributes.sequence} with rank {attributes.peer}, not rank {peer}",
                "build the bundle again",
            )

    def wait(self, is_done: Callable[[], bool]) -> None:
        """Wait until `is_done`, which asks the stream.

        Raises BackendError for an error that NCCL finds, and Unanswered.
        """
        end = time.monotonic() + self._timeout
        while not is_done():
            for handle in self._handles.values():
                status = ctypes.c_int()
                self._nccl.call("ncclCommGetAsyncError", handle, ctypes.byref(status))
                self._nccl.check("a collective", status.value)
            if time.monotonic() > end:
                raise Unanswered(self._timeout, "in a collective on the GPU")
            time.sleep(_PAUSE)

    def close(self) -> None:
        """End collectives that wait for other ranks, and free the communicators.

        Graphs that hold collectives must be gone. ncclCommDestroy would wait for the other ranks, which may
        have ended.
        """
        while self._handles:
            _, handle = self._handles.popitem()
            self._nccl.call("ncclCommAbort", handle)


def unique_id(nccl: Nccl, communicator: Communicator) -> bytes:
    """Return the id that rank 0 makes, on every rank. Raises RankError if another rank ended."""
    made = bytearray(_ID_BYTES)
    if communicator.rank == 0:
        identity = UniqueId()
        nccl.call("ncclGetUniqueId", ctypes.byref(identity))
        made[:] = bytes(identity)
    numbers = np.frombuffer(bytes(made), np.uint8).astype(np.float32)[None]
    communicator.all_reduce(numbers)  # the others add 0
    return numbers.astype(np.uint8).tobytes()


def smallest(number: int, communicator: Communicator) -> int:
    """Return the smallest `number`, below 2**48, of all ranks."""
    own = np.array([[number >> 24, number & 0xFFFFFF]], np.float32)  # fp32 has 24 bits
    whole = np.empty((1, 2 * communicator.size), np.float32)
    communicator.all_gather(own, whole)
    return min((int(high) << 24) + int(low) for high, low in whole.reshape(-1, 2))
