"""The place of a rank among pipeline stages, and what all ranks agree on while they load.

Activations go from stage to stage on the GPUs, in the engines. The logits go from the last stage to rank 0
through the memory of the CPU, where rank 0 needs them. NCCL would let rank 0 wait for the logits of a step
before the next one has left it.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from llmc.plugins.collectives.spec import DOMAIN, RECV, SEND
from llmc.plugins.collectives.tensorrt_plugin import NAMES
from llmc.runtime.backends.tensorrt.nccl import Nccl, smallest, unique_id
from llmc.runtime.bundle.manifest import Manifest
from llmc.runtime.parallel.communicator import Communicator

#: The number of the transfer of logits in a step.
LOGITS_TRANSFER = 0
_COLLECTIVES = {name for name in NAMES if name not in (SEND, RECV)}


@dataclass(frozen=True)
class Place:
    """The place of a rank among all."""

    #: Its number among all.
    number: int
    #: The number of ranks in a stage.
    tp: int
    #: The number of stages.
    pp: int

    @property
    def size(self) -> int:
        """The number of all ranks."""
        return self.tp * self.pp

    @property
    def before(self) -> int | None:
        """The rank of the stage before that sends to this one. None: this is the first stage."""
        return self.number - self.tp if self.number >= self.tp else None

    @property
    def behind(self) -> int | None:
        """The rank of the next stage that this one sends to. None: this is the last stage."""
        return self.number + self.tp if self.number + self.tp < self.size else None

    @property
    def owner(self) -> int:
        """The rank that gives the logits to rank 0."""
        return self.size - self.tp


@dataclass(frozen=True)
class Rank:
    """What a rank has beside its engine."""

    #: Its communicator on the CPU, for what the ranks agree on while they load, and for logits.
    communicator: Communicator
    nccl: Nccl
    #: The number of its GPU.
    gpu: int
    place: Place


@dataclass(frozen=True)
class Exchanges:
    """How often a rank exchanges something on the GPU in a step, in this order."""

    receives: int
    collectives: int
    sends: int


def exchanges_of(manifest: Manifest, place: Place) -> Exchanges:
    """Return the exchanges of a rank."""
    if manifest.ranks is None:  # format 4, in which all ranks are one stage
        names = {f"{DOMAIN}.{name}" for name in _COLLECTIVES}
        counts = [operator.count for operator in manifest.operators if operator.name in names]
        return Exchanges(0, sum(counts), 0)
    counted: list[dict[str, int]] = [
        {each.operation: each.count for each in record.exchanges} for record in manifest.ranks
    ]
    own = counted[place.number]
    collectives = sum(own.get(name, 0) for name in _COLLECTIVES)
    sends = own.get(SEND, 0) if place.behind is not None else 0
    receives = counted[place.before].get(SEND, 0) if place.before is not None else 0
    return Exchanges(receives, collectives, sends)


def id_of_all(nccl: Nccl, communicator: Communicator, place: Place) -> bytes:
    """Return the id that rank 0 makes, on the ranks of all stages. Raises RankError if another rank ended."""
    if place.before is None:
        made = unique_id(nccl, communicator)
        numbers = np.frombuffer(made, np.uint8).astype(np.float32)[None]
    else:
        numbers = np.empty((1, 128), np.float32)
        communicator.receive(numbers, place.before, 0)
    if place.behind is not None:
        communicator.send(numbers, place.behind, 0)
    return numbers.astype(np.uint8).tobytes()


def smallest_of_all(number: int, communicator: Communicator, place: Place) -> int:
    """Return the smallest `number`, below 2**48, of the ranks of all stages."""
    number = smallest(number, communicator)
    if place.pp == 1:
        return number
    number = _passed_on(number, communicator, place)
    if place.number == place.owner:
        communicator.send(_halves(number), 0, 0)
    if place.number == 0:
        number = min(number, _received(communicator, place.owner))
    if place.before is None:
        number = smallest(number, communicator)
    return _passed_on(number, communicator, place)


def _passed_on(number: int, communicator: Communicator, place: Place) -> int:
    """Return the smallest number of the stages up to this one, and tell it to the next one."""
    if place.before is not None:
        number = min(number, _received(communicator, place.before))
    if place.behind is not None:
        communicator.send(_halves(number), place.behind, 0)
    return number


def _halves(number: int) -> np.ndarray:
    """Return a number as float32, which has 24 bits."""
    return np.array([[number >> 24, number & 0xFFFFFF]], np.float32)


def _received(communicator: Communicator, source: int) -> int:
    halves = np.empty((1, 2), np.float32)
    communicator.receive(halves, source, 0)
    high, low = halves[0]
    return (int(high) << 24) + int(low)
