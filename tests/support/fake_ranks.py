"""A stand-in for the ranks of a model, and what may go wrong with them. Followers run this module.

The "bundle" is a JSON file: {"rank", "step", "place", "do"}. `rank` does `do` in step `step`, before its
collective number `place`, or while it is loaded if `step` is 0.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

from llmc.runtime.batch import Batch
from llmc.runtime.errors import BundleError
from llmc.runtime.parallel.backend import ParallelBackend, start_ranks
from llmc.runtime.parallel.communicator import Communicator
from llmc.runtime.parallel.follower import serve
from llmc.runtime.parallel.messages import Job
from support.waiting import alive, wait_until

WIDTH = 24
STEP = Batch.pack([([3, 5, 7], 0, [0], True), ([11], 40, [2, 1], True), ([2, 2], 0, [3], [0, 1])])
TESTS = str(Path(__file__).parents[1])


def numbers(rank: int, step: int, tokens: np.ndarray) -> np.ndarray:
    """Return what a rank contributes to a step, float32 [T, WIDTH], of magnitudes whose sums are rounded."""
    random = np.random.default_rng([rank, step, *tokens])
    powers = random.integers(-20, 20, (len(tokens), WIDTH))
    return np.ldexp(random.standard_normal((len(tokens), WIDTH)), powers).astype(np.float32)


def expected(size: int, step: int, batch: Batch) -> np.ndarray:
    """Return the logits of a step: the sum over the ranks, followed by the numbers of each rank."""
    parts = [numbers(rank, step, batch.input_ids) for rank in range(size)]
    total = parts[0].copy()
    for part in parts[1:]:
        total = total + part
    return np.concatenate([total, *parts], axis=1)[batch.logits_index]


class FakeRank:
    """A backend with one all_reduce and one all_gather a step."""

    name, num_blocks, block_size = "fake", 4, 32

    def __init__(self, path: str, rank: int, communicator: Communicator) -> None:
        self._path, self._rank, self._communicator = path, rank, communicator
        self._step = 0
        self._act(0)

    def forward(self, batch: Batch) -> np.ndarray:
        self._step += 1
        rows, size = len(batch.input_ids), self._communicator.size
        part = numbers(self._rank, self._step, batch.input_ids)
        result = np.zeros((rows, WIDTH * (1 + size)), np.float32)
        total, whole = result[:, :WIDTH], result[:, WIDTH:]
        total[...] = part
        self._act(1)
        self._communicator.all_reduce(total)
        self._act(2)
        self._communicator.all_gather(part, whole)
        self._act(3)
        return result[batch.logits_index]

    def close(self) -> None:
        pass

    def _act(self, place: int) -> None:
        plan = json.loads(Path(self._path).read_text())
        if (plan.get("rank"), plan.get("step"), plan.get("place", 0)) == (self._rank, self._step, place):
            act(plan["do"], self._communicator)


def act(what: str, communicator: Communicator) -> None:
    """Do what a plan says, in this rank."""
    if what == "gather":  # where the others reduce
        communicator.all_gather(
            np.zeros((1, 2), np.float32), np.zeros((1, 2 * communicator.size), np.float32)
        )
    elif what == "reduce less":
        communicator.all_reduce(np.zeros((1, WIDTH), np.float32))
    elif what == "damaged":
        raise BundleError("the file is damaged", "copy it again")
    elif what == "memory":
        raise MemoryError("std::bad_alloc")
    elif what == "bug":
        raise ZeroDivisionError("a bug")
    elif what == "exit":
        os._exit(7)
    else:
        for _ in range(2 if what == "SIGINT twice" else 1):
            os.kill(os.getpid(), getattr(signal, what.split()[0]))


def load(path: str, rank: int, job: Job, communicator: Communicator) -> FakeRank:
    """Load a rank, as `follower.load_rank` does."""
    return FakeRank(path, rank, communicator)


def start(
    path: Path, size: int = 2, timeout: float = 600, module: str = "support.fake_ranks"
) -> ParallelBackend:
    """Start all ranks of the "bundle" at `path`."""
    job = Job("0" * 64, 4, 64, 8, 1, None, timeout)
    return start_ranks(
        str(path), size, job, lambda communicator: load(str(path), 0, job, communicator), module, [TESTS]
    )


def main() -> None:
    """The main function of a follower."""
    serve(load)


def write_plan(directory: Path, **what: object) -> Path:
    """Write the "bundle" of ranks that do what the fields say, or nothing wrong."""
    (directory / "plan").write_text(json.dumps(what))
    return directory / "plan"


def ends_with_its_parent(module: str, path: Path, number: signal.Signals, seconds: float = 0) -> None:
    """Check that no follower survives when the process that runs `module` gets a signal after `seconds`."""
    directories = os.pathsep.join([TESTS, os.environ.get("PYTHONPATH", "")])
    parent = subprocess.Popen(
        [sys.executable, "-m", module, str(path)],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env=os.environ | {"PYTHONPATH": directories},
    )
    assert parent.stdout
    pids = [int(pid) for pid in parent.stdout.readline().split()]
    assert len(pids) == 2
    time.sleep(seconds)
    assert all(map(alive, pids))
    parent.send_signal(number)
    parent.wait()
    parent.stdout.close()
    wait_until(lambda: not any(map(alive, pids)))


def run_forever(path: str) -> None:
    """The main function of a rank 0: print the followers' process ids, then run steps."""
    backend = start(Path(path), 3)
    print(*backend.pids, flush=True)
    while True:
        backend.forward(STEP)


if __name__ == "__main__":
    run_forever(sys.argv[1])
