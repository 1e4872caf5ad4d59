"""Time decode steps of a bundle of several ranks beside the same model in one process, and print Markdown.

    python benchmarks/ranks.py ONE.llmc RANKS.llmc [--fast]

Both have as many threads: the process one for each rank, and every rank one. Their steps take turns.
"""

from __future__ import annotations

import argparse
import os
import time

import numpy as np

from llmc.plugins.cpu import library
from llmc.runtime.backends import load_backend
from llmc.runtime.backends.base import Backend, EngineFile, LoadOptions
from llmc.runtime.backends.native import NativeBackend
from llmc.runtime.batch import Batch
from llmc.runtime.bundle.reader import Bundle
from llmc.runtime.load import activation_group
from llmc.runtime.parallel.backend import ParallelBackend, job_of, start_ranks
from llmc.runtime.parallel.communicator import Communicator

PROMPT = 16  # tokens
SEQUENCES = (1, 8)  # of a step


class Ranks:
    """All ranks of a bundle, one thread each. `times` gets the clock of rank 0 after each of its groups."""

    def __init__(self, bundle: Bundle, options: LoadOptions) -> None:
        engine = EngineFile.of(bundle)
        job = job_of(bundle, engine, options, 1, 60)
        self.own: NativeBackend
        self.times = np.zeros(0, np.int64)

        def load(communicator: Communicator) -> NativeBackend:
            self.own = load_backend(engine, job.load_options(communicator))
            self.times = np.zeros(len(self.own.executor.groups()) + 1, np.int64)
            self.own.forward = self._forward
            return self.own

        self.backend: ParallelBackend = start_ranks(str(bundle.path), bundle.manifest.parallel.tp, job, load)
        names = [group.name for group in self.own.executor.groups()]
        self.collectives = [n for n, name in enumerate(names) if name in ("all_reduce", "all_gather")]

    def _forward(self, batch: Batch) -> np.ndarray:
        self.times[0] = self.own.executor.library.llmc_ticks()
        return self.own.executor.run(batch, self.times[1:])


def batches(vocabulary: int, sequences: int, steps: int) -> list[Batch]:
    """Return a prefill and the decode steps behind it."""
    each = -(-(PROMPT + steps) // 32)
    tables = [list(range(each * s, each * (s + 1))) for s in range(sequences)]
    ids = np.random.default_rng(0).integers(0, vocabulary, (sequences, PROMPT + steps)).tolist()
    rows = list(zip(ids, tables, strict=True))
    prefill = Batch.pack([(prompt[:PROMPT], 0, blocks, True) for prompt, blocks in rows])
    decode = [
        Batch.pack([(prompt[at : at + 1], at, blocks, True) for prompt, blocks in rows])
        for at in range(PROMPT, PROMPT + steps)
    ]
    return [prefill, *decode]


def seconds(backend: Backend, batch: Batch) -> float:
    """Run a step."""
    begin = time.perf_counter()
    backend.forward(batch)
    return time.perf_counter() - begin


def measure(single: Backend, ranks: Ranks, steps: list[Batch], layers: int) -> list[str]:
    """Run the steps, in turns, and return the cells of a row after its first."""
    prefill, *decode = steps
    for backend in (single, ranks.backend):
        backend.forward(prefill)
    walls, spent = [], []
    begin = time.perf_counter(), library.load().llmc_ticks()
    for batch in decode:
        walls.append((seconds(single, batch), seconds(ranks.backend, batch)))
        spent.append(np.diff(ranks.times)[ranks.collectives])
    end = time.perf_counter(), library.load().llmc_ticks()
    rate = (end[1] - begin[1]) / (end[0] - begin[0])
    ours, theirs = 1e3 * np.quantile(walls, (0.5, 0.1), axis=0).T  # [median, best tenth]
    each = np.stack(spent) / rate  # seconds [steps, collectives]
    total, least = np.median(each.sum(1)), each.min(0).sum()
    return [
        *(f"{median:.1f}, {best:.1f}" for median, best in (ours, theirs)),
        "{:.2f}, {:.2f}".format(*theirs / ours),
        f"{len(ranks.collectives)}",
        f"{1e6 * total / layers:.0f}",
        f"{1e6 * least / layers:.0f}",
        f"{1e3 * total / theirs[0]:.0%}",
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description="Time decode steps of ranks beside one process.")
    parser.add_argument("one", help="a bundle of one rank")
    parser.add_argument("ranks", help="a bundle of the same model for several ranks")
    parser.add_argument("--steps", type=int, default=100, help="decode steps (default: 100)")
    parser.add_argument("--fast", action="store_true", help="quantize activations to int8")
    arguments = parser.parse_args()
    one, several = Bundle.open(arguments.one), Bundle.open(arguments.ranks)
    size = several.manifest.parallel.tp
    options = LoadOptions(
        kv_blocks=max(SEQUENCES) * -(-(PROMPT + arguments.steps) // 32),
        max_tokens=PROMPT * max(SEQUENCES),
        max_sequences=max(SEQUENCES),
        threads=size,
        activation_group=activation_group(one) if arguments.fast else None,
    )
    single = load_backend(EngineFile.of(one), options)
    ranks = Ranks(several, options)
    head = [
        "decode, requests",
        f"one process, {size} threads, ms",
        f"{size} ranks, ms",
        "ratio",
        "collectives",
        "us a layer",
        "least us a layer",
        "share of the step",
    ]
    print(
        f"{library.choose()}, {'fast' if arguments.fast else 'exact'}, load {os.getloadavg()[0]:.1f}",
        end=", ",
    )
    print(f"{arguments.steps} steps: median, best tenth\n\n| {' | '.join(head)} |\n{'|---' * len(head)}|")
    layers = len(several.manifest.geometry.layers)
    for sequences in SEQUENCES:
        cells = measure(
            single, ranks, batches(one.manifest.geometry.vocab_size, sequences, arguments.steps), layers
        )
        print(f"| {sequences} | {' | '.join(cells)} |", flush=True)
    ranks.backend.close()
    single.close()


if __name__ == "__main__":
    main()
