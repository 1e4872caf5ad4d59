"""Collectives, which the ranks of a group compute together, and transfers between ranks of different groups.

Every rank of a group calls the same collectives in the same order, with arrays of the same shapes.
Communicators check that: a rank that calls another one ends the step of all ranks with an error. The ranks of
a pipeline stage are a group. Without stages, all ranks are.
"""

from __future__ import annotations

import struct
from typing import NamedTuple, Protocol

import numpy as np

from llmc.runtime.bundle.strict_json import DAMAGED
from llmc.runtime.errors import RankError

ALL_REDUCE, ALL_GATHER, TRANSFER, PULSE = 1, 2, 3, 4
_NAMES = {ALL_REDUCE: "all_reduce", ALL_GATHER: "all_gather", TRANSFER: "transfer"}
_HEADER = struct.Struct("<IIQII")
HEADER_BYTES = _HEADER.size


class Communicator(Protocol):
    """The end of one rank. One thread at a time uses it."""

    #: The number of this rank in its group, from 0.
    rank: int
    #: The number of ranks in its group.
    size: int

    def all_reduce(self, array: np.ndarray) -> None:
        """Replace `array`, float32 [rows, width], by its sum over the ranks.

        The arrays are added in the order of the ranks, so every rank gets the same bits. `array` may be a
        strided view. Raises RankError if another rank ended, did not answer in time, or is elsewhere.
        """
        ...

    def all_gather(self, part: np.ndarray, whole: np.ndarray) -> None:
        """Write the `part` of every rank, side by side in the order of the ranks, to `whole`.

        part: float32 [rows, w]; whole: float32 [rows, size * w]. Both may be strided views, and `part` may be
        this rank's columns of `whole`. Raises RankError as `all_reduce` does.
        """
        ...

    def send(self, array: np.ndarray, to: int, sequence: int) -> None:
        """Send `array`, float32 [rows, width], to a rank of another group. Does not wait for it.

        to: the rank, among all
        sequence: the number of the transfer in a step

        Raises RankError if the rank ended.
        """
        ...

    def receive(self, array: np.ndarray, source: int, sequence: int) -> None:
        """Fill `array`, float32 [rows, width], with what a rank of another group sends.

        Raises RankError if the rank ended, makes no progress in time, or sends something else.
        """
        ...

    def watch(self, counters: np.ndarray) -> None:
        """Show progress to ranks of other groups, which wait for this one's arrays as long as it makes any.

        counters: integers that change while this rank computes
        """
        ...

    def close(self) -> None:
        """Leave the group. Other ranks that wait for this one get a RankError."""
        ...


class Collective(NamedTuple):
    """A call of a collective, or a transfer. The same call of the other ranks is equal to it."""

    operation: int
    #: Its place among the collectives of the step, from 1; the sequence number of a transfer.
    number: int
    #: The step, from 1.
    step: int
    rows: int
    #: The columns of the array that this rank contributes.
    width: int

    def pack(self) -> bytes:
        """Return HEADER_BYTES bytes that `unpack` reads."""
        return _HEADER.pack(*self)

    @classmethod
    def unpack(cls, data: bytes) -> Collective:
        """Return the call that `data` describes."""
        return cls(*_HEADER.unpack(data))

    def __str__(self) -> str:
        name = _NAMES.get(self.operation, "an unknown collective")
        return f"{name} {self.number} of step {self.step} (shape [{self.rows}, {self.width}])"


class RankEnded(RankError):
    """Another rank ended. Its own error is the cause, if it could report one.

    where: what the other ranks computed, such as "step 3"
    """

    def __init__(self, rank: int, where: str) -> None:
        super().__init__(f"rank {rank} ended in {where}", "load the bundle again")
        self.where = where


class Counter:
    """The collectives that a rank has called, for its messages to other ranks and to users."""

    def __init__(self) -> None:
        self._step = self._number = 0

    def begin_step(self, step: int) -> None:
        """Count the collectives of a new step from 1."""
        self._step, self._number = step, 0

    def next(self, operation: int, array: np.ndarray) -> Collective:
        """Return the next collective. Raises ValueError unless `array` is float32 [rows, width]."""
        check_array(operation, array)
        self._number += 1
        return Collective(operation, self._number, self._step, *array.shape)


def check_array(operation: int, array: np.ndarray) -> None:
    """Raise ValueError unless `array` is float32 [rows, width]."""
    if array.ndim != 2 or array.dtype != np.float32:
        raise ValueError(f"{_NAMES[operation]} of {array.dtype} {list(array.shape)}, not of float32 [n, w]")


def transfer_of(array: np.ndarray, sequence: int, step: int) -> Collective:
    """Return the transfer of an array. Raises ValueError unless it is float32 [rows, width]."""
    check_array(TRANSFER, array)
    return Collective(TRANSFER, sequence, step, *array.shape)


def check_parts(part: np.ndarray, whole: np.ndarray, size: int) -> None:
    """Raise ValueError unless `whole` has the shape and dtype of `size` parts side by side."""
    shape = (*part.shape[:-1], size * part.shape[-1])
    if whole.shape != shape or whole.dtype != np.float32:
        raise ValueError(
            f"all_gather of {size} parts {list(part.shape)} into {whole.dtype} {list(whole.shape)}"
        )


def no_answer(who: str, seconds: float, where: object) -> RankError:
    """Return the error for a rank that is alive, as far as the others can tell, but does not answer."""
    return RankError(
        f"{who} did not answer within {seconds:g} s in {where}",
        "its process may be stopped, or the machine may be out of memory; load the bundle again",
    )


def mismatch(mine: Collective, rank: int, other: Collective, other_rank: int) -> RankError:
    """Return the error for two ranks that are not in the same collective."""
    return RankError(f"the ranks disagree: rank {rank} is in {mine}, rank {other_rank} in {other}", DAMAGED)
