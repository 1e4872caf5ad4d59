"""What rank 0 and the followers send to each other: the job, the steps, and reports.

    rank 0 -> follower   one JSON line: the fields of `Job` and the version of llmc; then steps
    follower -> rank 0   JSON lines: {"loaded": true}, or {"error": {"kind", "message", "hint", "ended"}}

A step is its number, the number of candidates of each row of logits (0: whole rows), the lengths of the
arrays of the batch, and these arrays, in the order of STEP_INPUTS.
Step 0 tells a follower that a launcher started that there are no more.
"""

from __future__ import annotations

import json
import socket
import struct
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

import llmc
from llmc.runtime.backends.base import LoadOptions
from llmc.runtime.batch import STEP_INPUTS, Batch
from llmc.runtime.errors import RankError
from llmc.runtime.parallel.communicator import Communicator

_STEP = struct.Struct(f"<QI{len(STEP_INPUTS)}I")
_LONGEST_LINE, _LONGEST_STEP = 1 << 16, 1 << 28  # bytes
#: The message after the last step.
END = bytes(_STEP.size)


@dataclass(frozen=True)
class Job:
    """What a follower needs to load its rank, in the same way as the others."""

    #: The sha256 of the manifest that rank 0 has read.
    manifest_sha256: str
    #: None: the ranks agree on it when they know what their GPUs hold.
    kv_blocks: int | None
    max_tokens: int
    max_sequences: int
    #: The number of threads of each rank.
    threads: int
    activation_group: int | None
    #: The seconds that a rank waits for another one.
    timeout: float
    #: The size of the KV cache of all ranks together, in bytes; None: the default.
    kv_memory: int | None = None

    def load_options(self, communicator: Communicator) -> LoadOptions:
        """Return the options for loading a rank with its communicator."""
        return LoadOptions(
            kv_blocks=self.kv_blocks,
            kv_memory=self.kv_memory,
            max_tokens=self.max_tokens,
            max_sequences=self.max_sequences,
            threads=self.threads,
            activation_group=self.activation_group,
            communicator=communicator,
        )

    def to_line(self) -> bytes:
        """Return the line for a follower."""
        return json.dumps({"llmc": llmc.__version__, **asdict(self)}).encode() + b"\n"

    @classmethod
    def of_line(cls, line: bytes) -> Job:
        """Read the line. Raises RankError if rank 0 is another version of llmc."""
        fields = json.loads(line)
        if (version := fields.pop("llmc")) != llmc.__version__:
            raise RankError(
                f"llmc is {llmc.__version__}, and {version} in rank 0",
                "start again when the installation of llmc is complete",
            )
        return cls(**fields)


def pack_step(number: int, batch: Batch, k: int = 0) -> bytes:
    """Return the bytes of a step. k: the number of candidates"""
    arrays = [np.ascontiguousarray(getattr(batch, name), np.int32) for name in STEP_INPUTS]
    return _STEP.pack(number, k, *map(len, arrays)) + np.concatenate(arrays).tobytes()


def receive_step(channel: socket.socket) -> tuple[int, Batch, int] | None:
    """Wait for a step. Return its number, batch and candidates, or None if rank 0 has closed the channel.

    Raises RankError for more data than a step has.
    """
    header = _receive(channel, _STEP.size)
    if header is None:
        return None
    number, k, *lengths = _STEP.unpack(header)
    if 4 * sum(lengths) > _LONGEST_STEP:
        raise RankError(f"rank 0 sent a step of {4 * sum(lengths)} bytes", "please report this")
    data = _receive(channel, 4 * sum(lengths))
    if data is None:
        return None
    arrays = np.split(np.frombuffer(data, np.int32), np.cumsum(lengths[:-1]))
    return number, Batch(**dict(zip(STEP_INPUTS, arrays, strict=True))), k


def send_report(channel: socket.socket, **report: Any) -> None:
    """Send a line to rank 0. Raises ConnectionError if it is gone."""
    channel.sendall(json.dumps(report).encode() + b"\n", socket.MSG_NOSIGNAL)


def receive_line(channel: socket.socket) -> bytes:
    """Wait for a line, and return it; b"" if the channel ends before its end. Reads nothing after it.

    Returns the beginning of a line that is too long.
    """
    line = bytearray()
    while not line.endswith(b"\n") and len(line) < _LONGEST_LINE:
        try:
            byte = channel.recv(1)
        except ConnectionError:
            byte = b""
        if not byte:
            return b""
        line += byte
    return bytes(line)


def _receive(channel: socket.socket, count: int) -> bytearray | None:
    data = bytearray(count)
    view = memoryview(data)
    while view:
        received = channel.recv_into(view)
        if not received:
            return None
        view = view[received:]
    return data
