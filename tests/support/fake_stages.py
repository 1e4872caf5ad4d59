"""A stand-in for the stages of a pipeline, and what may go wrong with them. Followers run this module.

The "bundle" is a JSON file: {"rank", "step", "do"}. `rank` does `do` in step `step` before it computes.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import numpy as np

from llmc.runtime.batch import Batch
from llmc.runtime.engine import Engine
from llmc.runtime.parallel.backend import ParallelBackend, start_ranks
from llmc.runtime.parallel.communicator import Communicator
from llmc.runtime.parallel.follower import serve
from llmc.runtime.parallel.messages import Job
from llmc.runtime.sampling import SamplingParams
from support.fake_ranks import TESTS, act

VOCAB = 24
SLOW = 2.0  # seconds


def numbers(rank: int, batch: Batch) -> np.ndarray:
    """Return what a stage adds for each token, float32 [T, VOCAB]."""
    pairs = zip(batch.input_ids, batch.position_ids, strict=True)
    rows = [np.random.default_rng([rank, *pair]).standard_normal(VOCAB) for pair in pairs]
    return np.array(rows, np.float32)


def expected(size: int, batch: Batch) -> np.ndarray:
    """Return the logits of a step."""
    total = numbers(0, batch)
    for rank in range(1, size):
        total = total + numbers(rank, batch)
    return total[batch.logits_index]


class FakeStage:
    """A stage. Each adds its numbers to what the stage before has sent, and the last one sends logits."""

    name, num_blocks, block_size = "fake", 32, 32

    def __init__(self, path: str, rank: int, size: int, communicator: Communicator) -> None:
        self._path, self._rank, self._size, self._communicator = path, rank, size, communicator
        self._counters = np.zeros(1, np.int32)
        communicator.watch(self._counters)
        self._step = 0
        self._logits = np.zeros((1024, VOCAB), np.float32)

    def forward(self, batch: Batch) -> np.ndarray:
        self.begin(batch)
        return np.zeros((0, VOCAB), np.float32)

    def begin(self, batch: Batch) -> None:
        self._step += 1
        rows = np.zeros((len(batch.input_ids), VOCAB), np.float32)
        if self._rank:
            self._communicator.receive(rows, self._rank - 1, 0)
        plan = json.loads(Path(self._path).read_text())
        if (plan.get("rank"), plan.get("step")) == (self._rank, self._step):
            self._act(plan["do"])
        rows += numbers(self._rank, batch)
        last = self._rank == self._size - 1
        self._communicator.send(
            rows[batch.logits_index] if last else rows, 0 if last else self._rank + 1, int(last)
        )

    def finish(self, first: int, rows: int) -> np.ndarray:
        self._communicator.receive(self._logits[first : first + rows], self._size - 1, 1)
        return self._logits[: first + rows]

    def close(self) -> None:
        pass

    def _act(self, what: str) -> None:
        if what != "slow":
            act(what, self._communicator)
            return
        for _ in range(15):
            time.sleep(SLOW / 15)
            self._counters += 1


def load(path: str, rank: int, job: Job, communicator: Communicator) -> FakeStage:
    """Load a rank, as `follower.load_rank` does. `max_sequences` of the job is the number of stages."""
    return FakeStage(path, rank, job.max_sequences, communicator)


def start(path: Path, size: int = 2, timeout: float = 600) -> ParallelBackend:
    """Start all stages of the "bundle" at `path`."""
    job = Job("0" * 64, 32, 64, size, 1, None, timeout)
    return start_ranks(
        str(path),
        size,
        job,
        lambda communicator: load(str(path), 0, job, communicator),
        "support.fake_stages",
        [TESTS],
        size,
    )


def main() -> None:
    """The main function of a follower."""
    serve(load)


def run_forever(path: str) -> None:
    """The main function of a rank 0: print the followers' process ids, then serve requests."""
    backend = start(Path(path), 3)
    engine = Engine(backend, None, (), 1024, vocab_size=VOCAB)
    for token in range(8):
        engine.add_request([token], SamplingParams(max_tokens=1000))
    print(*backend.pids, flush=True)
    while True:
        engine.step()


if __name__ == "__main__":
    run_forever(sys.argv[1])
