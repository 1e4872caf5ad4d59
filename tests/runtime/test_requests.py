"""Many requests through one engine: the same tokens as each request alone."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from llmc.runtime.backends import load_backend
from llmc.runtime.backends.base import EngineFile, LoadOptions
from llmc.runtime.bundle.reader import Bundle
from llmc.runtime.engine import Engine
from llmc.runtime.sampling import SamplingParams
from support.sampled import sampled

# Blocks of the KV cache, and the tokens of a step at most.
MEMORY = {
    "all at once": (96, 512),
    "small chunks": (96, 16),
    "little memory": (14, 64),
    "constant preemption": (6, 16),
}
LENGTHS = (1, 2, 7, 15, 31, 32, 33, 47, 64, 65, 90, 120)


def make_engine(path: Path, blocks: int, chunk: int) -> Engine:
    opened = Bundle.open(path)
    backend = load_backend(EngineFile.of(opened), LoadOptions(kv_blocks=blocks))
    return Engine(backend, None, (), 256, max_batch_tokens=chunk, max_sequences=min(chunk, 16))


def twelve() -> list[tuple[list[int], SamplingParams]]:
    """Prompts of different lengths; every third samples, with its own seed."""
    rng = np.random.default_rng(5)
    requests = []
    for index, length in enumerate(LENGTHS):
        prompt = rng.integers(0, 300, length).tolist()
        sampling = {"temperature": 0.8, "top_k": 20, "seed": index} if index % 3 == 2 else {}
        requests.append((prompt, SamplingParams(max_tokens=20 + index, ignore_eos=True, **sampling)))
    return requests


@pytest.fixture(scope="module", params=["llama-tiny", "gemma2-tiny"])
def served(
    request: pytest.FixtureRequest, bundle: Callable[[str], Path]
) -> tuple[Path, list[tuple[int, ...]]]:
    """A bundle, and the tokens of each request served alone."""
    path = bundle(request.param)
    engine = make_engine(path, blocks=64, chunk=256)
    return path, [engine.generate([prompt], params)[0].token_ids for prompt, params in twelve()]


@pytest.mark.parametrize(("order", "memory"), sampled(["given", "reversed", "shuffled"], MEMORY, every=3))
def test_twelve_requests_together_equal_each_alone(
    served: tuple[Path, list[tuple[int, ...]]], order: str, memory: str
) -> None:
    (path, alone), (blocks, chunk) = served, MEMORY[memory]
    engine = make_engine(path, blocks, chunk)
    indices = list(range(12))
    if order == "reversed":
        indices.reverse()
    elif order == "shuffled":
        np.random.default_rng(6).shuffle(indices)
    requests = twelve()
    ids = {engine.add_request(*requests[index]): index for index in indices}
    together: dict[int, tuple[int, ...]] = {}
    while engine.has_unfinished:
        for output in engine.step():
            if output.finish_reason:
                together[ids[output.request_id]] = output.token_ids
        engine.scheduler.check()
    assert [together[index] for index in range(12)] == alone
    assert engine.scheduler.pool.num_free == blocks
    if blocks == 6:
        assert engine.stats.preemptions > 0, "the test must reach preemption"
