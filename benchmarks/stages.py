"""Measure how busy the stages of a pipeline are while requests decode, and print Markdown.

    python benchmarks/stages.py ONE.llmc STAGES.llmc [--requests 8] [--tokens 60] [--rounds 3]

Three engines take turns: one process with a thread for each stage, the stages with one step in flight, and
the stages with as many steps in flight as there are stages. Each stage has one thread.

A stage computes when it is inside of a step and does not wait for another stage. That includes the time in
which other work has its core, so the share of CPU time stands beside it.
"""

from __future__ import annotations

import argparse
import os
import struct
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from llmc.plugins.cpu import library
from llmc.runtime.backends import load_backend
from llmc.runtime.backends.base import Backend, EngineFile, LoadOptions, RankBackend
from llmc.runtime.bundle.reader import Bundle
from llmc.runtime.engine import Engine
from llmc.runtime.load import activation_group
from llmc.runtime.parallel.backend import ParallelBackend, job_of, start_ranks
from llmc.runtime.parallel.communicator import Communicator
from llmc.runtime.parallel.follower import load_rank, serve
from llmc.runtime.parallel.messages import Job
from llmc.runtime.sampling import SamplingParams

PROMPT = 16  # tokens
FILE = "LLMC_STAGES_FILE"  # environment variable: a file with the busy seconds of each rank
SECONDS = struct.Struct("<d")


def watch(backend: Any, communicator: Any, rank: int) -> RankBackend:
    """Write the seconds that a rank computes to the file, after each step."""
    file = os.open(os.environ[FILE], os.O_WRONLY)
    total = 0.0

    def timed(call: Any, sign: int) -> Any:
        def wrapped(*arguments: Any) -> Any:
            nonlocal total
            begun = time.perf_counter()
            try:
                return call(*arguments)
            finally:
                total += sign * (time.perf_counter() - begun)
                if sign > 0:
                    os.pwrite(file, SECONDS.pack(total), rank * SECONDS.size)

        return wrapped

    communicator.receive = timed(communicator.receive, -1)
    for name in ("begin", "finish") if rank == 0 else ("forward",):
        setattr(backend, name, timed(getattr(backend, name), 1))
    return backend


def main() -> None:
    """The main function of a follower."""
    serve(lambda path, rank, job, own: watch(load_rank(path, rank, job, own), own, rank))


class Run(NamedTuple):
    """What the decode steps of some requests took."""

    seconds: float
    tokens: int
    #: Of each rank.
    computing: np.ndarray
    cpu: np.ndarray


def load_stages(bundle: Bundle, options: LoadOptions) -> ParallelBackend:
    engine = EngineFile.of(bundle)
    job: Job = job_of(bundle, engine, options, 1, 60)

    def load(communicator: Communicator) -> RankBackend:
        return watch(load_backend(engine, job.load_options(communicator)), communicator, 0)

    size, directory = bundle.manifest.parallel.world_size, str(Path(__file__).parent)
    return start_ranks(str(bundle.path), size, job, load, "stages", [directory], bundle.manifest.parallel.pp)


def computing(ranks: int) -> np.ndarray:
    data = Path(os.environ[FILE]).read_bytes()
    return np.array([seconds for (seconds,) in SECONDS.iter_unpack(data)][:ranks])


def cpu(backend: Any) -> np.ndarray:
    """Return the CPU seconds of each rank."""
    others = [Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split() for pid in backend.pids]
    ticks = os.sysconf("SC_CLK_TCK")
    return np.array([time.process_time(), *((int(each[11]) + int(each[12])) / ticks for each in others)])


def decode(engine: Engine, prompts: list[list[int]], tokens: int, stages: bool) -> Run:
    """Serve requests. Measure from the first step after all have a token until the first one is finished."""
    ids = [engine.add_request(prompt, SamplingParams(tokens, ignore_eos=True)) for prompt in prompts]
    waiting = set(ids)
    while waiting:
        waiting -= {output.request_id for output in engine.step()}
    ranks = len(engine.backend.pids) + 1 if stages else 0  # type: ignore[attr-defined]

    def now() -> tuple[float, np.ndarray, np.ndarray]:
        return time.perf_counter(), computing(ranks), cpu(engine.backend) if stages else np.zeros(0)

    begun, count = now(), 0
    finished = False
    while not finished:
        outputs = engine.step()
        count += len(outputs)
        finished = any(output.finish_reason for output in outputs)
    ended = now()
    while engine.has_unfinished:
        engine.step()
    return Run(ended[0] - begun[0], count, ended[1] - begun[1], ended[2] - begun[2])


def compare() -> None:
    parser = argparse.ArgumentParser(description="Measure how busy the stages of a pipeline are.")
    parser.add_argument("one", help="a bundle of one rank")
    parser.add_argument("stages", help="a bundle of the same model with --pp")
    parser.add_argument("--requests", type=int, default=8, help="requests that decode (default: 8)")
    parser.add_argument("--tokens", type=int, default=60, help="tokens of each request (default: 60)")
    parser.add_argument("--rounds", type=int, default=3, help="how often the engines take turns (default: 3)")
    parser.add_argument("--fast", action="store_true", help="quantize activations to int8")
    arguments = parser.parse_args()
    one, several = Bundle.open(arguments.one), Bundle.open(arguments.stages)
    if (count := several.manifest.parallel.pp) == 1 or several.manifest.parallel.tp > 1:
        parser.error(f"{arguments.stages} has no stages of one rank")
    options = LoadOptions(
        kv_blocks=arguments.requests * -(-(PROMPT + arguments.tokens) // 32),
        max_tokens=PROMPT * arguments.requests,
        max_sequences=arguments.requests,
        threads=count,
        activation_group=activation_group(one) if arguments.fast else None,
    )
    vocabulary = one.manifest.geometry.vocab_size
    random = np.random.default_rng(0)
    prompts = random.integers(0, vocabulary, (arguments.requests, PROMPT)).tolist()

    def engine(backend: Backend) -> Engine:
        limit = one.manifest.limits.max_seq_len
        return Engine(
            backend, None, (), limit, options.max_tokens, options.max_sequences, vocab_size=vocabulary
        )

    with tempfile.NamedTemporaryFile() as file:
        file.write(bytes(SECONDS.size * count))
        file.flush()
        os.environ[FILE] = file.name
        backend = load_stages(several, options)
        single = engine(load_backend(EngineFile.of(one), options))
        overlapping = engine(backend)
        backend.depth = 1  # this engine calls `forward`, which waits for the step
        waiting = engine(backend)
        backend.depth = count
        names = [f"one process, {count} threads", "one step in flight", f"{count} steps in flight"]
        runs: list[list[Run]] = [[], [], []]
        for _ in range(arguments.rounds):
            for found, each in zip(runs, (single, waiting, overlapping), strict=True):
                found.append(decode(each, prompts, arguments.tokens, each is not single))
        backend.close()
    print(
        f"{library.choose()}, {'fast' if arguments.fast else 'exact'}, load {os.getloadavg()[0]:.1f}, "
        f"{arguments.requests} requests, {arguments.tokens} tokens each, {arguments.rounds} rounds\n"
    )
    print("| | tokens/s, median and best | each stage computes | each stage's CPU time |\n|---|---|---|---|")
    for name, found in zip(names, runs, strict=True):
        rates = [run.tokens / run.seconds for run in found]
        shares = [
            ", ".join(
                f"{share:.0%}" for share in np.median([values / run.seconds for run, values in each], 0)
            )
            for each in ([(run, run.computing) for run in found], [(run, run.cpu) for run in found])
        ]
        print(f"| {name} | {np.median(rates):.1f}, {max(rates):.1f} | {' | '.join(shares)} |")


if __name__ == "__main__":
    compare()
