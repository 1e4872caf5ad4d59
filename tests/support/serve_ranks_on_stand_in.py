"""A script that serves requests with several ranks on the stand-ins for the driver, TensorRT and NCCL.

Rank 0 starts the others, whose process runs this module. test_tensorrt_backend.py starts the script.
"""

from __future__ import annotations

import importlib
import os
import signal
import sys
from collections import deque
from pathlib import Path
from typing import Any, cast

import numpy as np

from llmc.runtime.backends import load_backend
from llmc.runtime.backends.base import EngineFile, LoadOptions, RankBackend
from llmc.runtime.backends.tensorrt import nccl
from llmc.runtime.batch import Batch
from llmc.runtime.bundle.manifest import Manifest
from llmc.runtime.bundle.reader import Bundle
from llmc.runtime.engine import Engine as ServingEngine
from llmc.runtime.errors import LlmcError
from llmc.runtime.parallel.backend import job_of, start_ranks
from llmc.runtime.parallel.communicator import Communicator
from llmc.runtime.parallel.follower import serve
from llmc.runtime.parallel.messages import Job
from llmc.runtime.sampling import SamplingParams
from support import tensorrt_stand_in as stand_in
from support.cuda_stand_in import StandIn
from support.gpu_bundle import (
    MAX_LEN,
    PLAN_BYTES,
    RANKS,
    STAGES,
    VOCAB,
    gpu_changes,
    kernels,
    manifest_of_ranks,
)
from support.nccl_stand_in import Hub, StandInNccl
from support.tensorrt_stand_in import ReferenceBackend, StandInTensorRt

HUB = "LLMC_TEST_HUB"  # environment variable: the address
WRONG = "LLMC_TEST_WRONG"  # environment variable: what rank 1 does wrong
TESTS = str(Path(__file__).parents[1])
_alive: list[Any] = []  # what C code points to


def made() -> Manifest:
    return manifest_of_ranks(**gpu_changes(kernels=kernels((89, "cubin"), (80, "ptx"))))


def load(path: str, rank: int, job: Job, communicator: Communicator) -> RankBackend:
    """Load a rank, as `follower.load_rank` does."""
    gpu = StandIn()
    trt: Any = StandInTensorRt(importlib.import_module("tensorrt_rtx"), gpu, capturable=True, rank=rank)
    sys.modules["tensorrt_rtx"] = trt
    if rank and os.environ.get(WRONG) == "order":
        _swap_sums()
    if rank and os.environ.get(WRONG) == "transfers":
        _misnumber_transfers()
    nccl.SECONDS = 3
    library = StandInNccl(Path(os.environ["LLMC_TEST_NCCL"]), os.environ[HUB], gpu.submit, gpu.hang)
    _alive.extend((gpu, library))
    bundle = Bundle(Path(path), made())
    options = job.load_options(communicator)
    backend = load_backend(EngineFile.of(bundle, None, rank), options)
    assert gpu.device == rank  # each has a GPU
    stage, _ = divmod(rank, RANKS)
    assert ("download" in gpu.log) == (rank == RANKS * (STAGES - 1))  # only this rank has logits to give
    wanted = ({"AllReduce"} if stage else {"AllGather", "AllReduce"}) if RANKS > 1 else set()
    wanted |= ({"Recv"} if stage else set()) | ({"Send"} if stage < STAGES - 1 else set())
    assert {"AllGather", "AllReduce", "Send", "Recv"} & set(library.log) == wanted
    assert "instantiate" in gpu.log  # a step with collectives became a CUDA graph
    return cast(RankBackend, backend)


def _swap_sums() -> None:
    """Let the engine call the sums of the two layers in the other order."""
    real = stand_in.make_collective

    def make(trt: Any, sequence: int, operation: str, ranks: int) -> Any:
        return real(trt, (0, 2, 1)[sequence], operation, ranks)

    stand_in.make_collective = make


def _misnumber_transfers() -> None:
    """Let the engine receive an array that does not come."""
    real = stand_in.make_exchange

    def make(trt: Any, operation: str, **fields: int) -> Any:
        return real(trt, operation, **{**fields, "sequence": 1})

    stand_in.make_exchange = make


def main() -> None:
    """The main function of a follower."""
    serve(load)


def serve_requests(what: str, directory: Path) -> None:
    """Serve requests. Check every step."""
    hub = Hub()
    os.environ[HUB] = hub.address
    bundle = Bundle(directory, made())
    for file in kernels((89, "cubin")):
        (directory / file.file).write_bytes(file.variant.encode())
    for engine in bundle.manifest.engines:
        (directory / engine.file).write_bytes(PLAN_BYTES)
    options = LoadOptions(kv_memory=40 * 12288, max_sequences=6, max_tokens=64)
    job = job_of(bundle, EngineFile.of(bundle), options, 1, 20)
    path = str(directory)
    backend = start_ranks(
        path,
        RANKS * STAGES,
        job,
        lambda c: load(path, 0, job, c),
        "support.serve_ranks_on_stand_in",
        [TESTS],
        STAGES,
    )
    assert backend.num_blocks == 40
    expected = ReferenceBackend(backend.num_blocks)
    if what == "killed":
        os.kill(backend.pids[0], signal.SIGKILL)
        backend.forward(Batch.pack([([1, 2, 3], 0, [0], True)]))
    replayed: list[int] = []
    submitted: deque[np.ndarray] = deque()
    most = 0

    class Both:
        name, num_blocks, block_size = backend.name, backend.num_blocks, backend.block_size

        def forward(self, step: Batch) -> np.ndarray:
            logits, wanted = backend.forward(step), expected.forward(step)
            np.testing.assert_allclose(logits, wanted, atol=0.02)
            replayed.append(_alive[0].log.count("replay"))
            return logits

        # For stages.
        depth = backend.depth

        def submit(self, step: Batch) -> None:
            nonlocal most
            backend.submit(step)
            submitted.append(expected.forward(step))
            most = max(most, len(submitted))

        def collect(self) -> np.ndarray:
            logits, wanted = backend.collect(), submitted.popleft()
            if len(wanted):
                np.testing.assert_allclose(logits, wanted, atol=0.02)
            replayed.append(_alive[0].log.count("replay"))
            return logits

        def discard(self) -> None:
            backend.discard()
            submitted.clear()

    engine = ServingEngine(Both(), None, (), MAX_LEN, 64, 6, vocab_size=VOCAB)
    rng = np.random.default_rng(1)
    prompts = [rng.integers(0, VOCAB, length).tolist() for length in (150, 3, 40, 1)]
    engine.generate(prompts, [SamplingParams(max_tokens=answer) for answer in (6, 3, 5, 7)])
    assert replayed[-1] > 3
    assert (hub.calls.count(("AllGather", 1 * 12, "float32")) > 0) == (RANKS > 1)
    for rank in range(RANKS * (STAGES - 1)):
        assert hub.calls.count((f"Send {rank} to {rank + RANKS}", 1 * 24, "float32")) > 0
    assert most == (STAGES if STAGES > 1 else 0)  # steps in flight
    assert not hub.wrong
    backend.close()
    assert not _alive[0].memory
    assert not _alive[0].graphs
    print("as the reference says")


if __name__ == "__main__":
    sys.modules["support.serve_ranks_on_stand_in"] = sys.modules[__name__]
    try:
        serve_requests(sys.argv[1], Path(sys.argv[2]))
    except LlmcError as failure:
        print(f"{type(failure).__name__}: {failure.message}; {failure.hint}")
