"""A script that serves requests with the GPU backend on the stand-ins for the driver and for TensorRT.

test_tensorrt_backend.py starts it in a process whose libcuda is the stand-in.
"""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import Any

import numpy as np

from llmc.plugins.sampling import launch as sampling
from llmc.runtime.backends import load_backend
from llmc.runtime.backends.base import EngineFile, LoadOptions
from llmc.runtime.backends.tensorrt import checks
from llmc.runtime.batch import Batch
from llmc.runtime.bundle.reader import Bundle
from llmc.runtime.engine import Engine as ServingEngine
from llmc.runtime.sampling import SamplingParams
from support.cuda_stand_in import StandIn
from support.gpu_bundle import (
    CACHE,
    KV_SCALES,
    LAYERS,
    MAX_LEN,
    VOCAB,
    gpu_changes,
    kernels,
    manifest,
    sampling_kernels,
)
from support.tensorrt_stand_in import ReferenceBackend, StandInTensorRt

# A number near the middle of two codes may become either, if the layer before it was rounded differently.
STEP_OF_E4M3 = 2**-3
ATOL = 0.1 if KV_SCALES else 0.02


def main(graphs: str, directory: Path) -> None:
    """Serve requests with the backend. Check every step, and that all memory is freed in the end."""
    import warnings

    real = importlib.import_module("tensorrt_rtx")
    gpu = StandIn(fail="end capture" if graphs == "no graphs" else "")
    trt: Any = StandInTensorRt(real, gpu, capturable=True, most_contexts=1 if graphs == "no room" else 99)
    sys.modules["tensorrt_rtx"] = trt
    files = (*kernels((89, "cubin"), (80, "ptx")), *sampling_kernels((89, "cubin")))
    made = manifest(**gpu_changes(kernels=files))
    for file in (*kernels((89, "cubin")), *sampling_kernels((89, "cubin"))):
        (directory / file.file).write_bytes(file.variant.encode())
    told: list[Any] = []
    warnings.showwarning = lambda message, *_, **__: told.append(str(message))
    warnings.simplefilter("always")
    # numpy's, in the interpreter: what rows of padding compute is never stored.
    warnings.filterwarnings("ignore", "overflow encountered in cast")

    checks.MODULES["tensorrt-rtx"] = "tensorrt_rtx"

    def load() -> Any:
        options = LoadOptions(kv_memory=40 * 6144 * CACHE.itemsize, max_sequences=6, max_tokens=64)
        return load_backend(EngineFile.of(Bundle(directory, made)), options)

    backend = load()
    assert backend.num_blocks == 40
    assert backend.name == "tensorrt-rtx"
    loaded = gpu.log.count("launch")
    assert loaded >= 2 * 2 * len(LAYERS)  # a prompt and a decode were tried

    expected = ReferenceBackend(backend.num_blocks)
    device = [[gpu.view(backend._addresses[f"{kind}_cache.{i}"], CACHE, expected.caches[i][j].shape)
               for j, kind in enumerate(("key", "value"))] for i in range(len(LAYERS))]  # fmt: skip
    for i in range(len(LAYERS)):
        for mine, theirs in zip(expected.caches[i], device[i], strict=True):
            mine[:] = theirs
            mine = mine.astype(np.float32)
            assert np.isfinite(mine[0, :, :2]).all()
            assert np.isnan(mine[0, :, 2:]).all()
            assert np.isnan(mine[1:]).all()
    sizes: list[tuple[int, int]] = []

    class Both:
        name, num_blocks, block_size = backend.name, backend.num_blocks, backend.block_size

        def forward(self, step: Batch) -> np.ndarray:
            logits, wanted = backend.forward(step), expected.forward(step)
            assert logits.shape == wanted.shape
            np.testing.assert_allclose(logits, wanted, atol=ATOL)
            sizes.append((len(step.input_ids), len(step.past_lengths)))
            return logits

    engine = ServingEngine(Both(), None, (), MAX_LEN, 64, 6, vocab_size=VOCAB)
    rng = np.random.default_rng(1)
    longest = 130 if graphs.startswith("no ") else 300  # beyond 256, decode is split
    lengths, answers = [longest, 3, 70, 1, 33, 5, 40], [8, 3, 6, 9, 2, 4, 5]
    prompts = [rng.integers(0, VOCAB, length).tolist() for length in lengths]
    engine.generate(prompts, [SamplingParams(max_tokens=answer) for answer in answers])
    decodes = [count for tokens, count in sizes if tokens == count]
    assert len(set(decodes)) >= 4, sizes
    for i in range(len(LAYERS)):
        for codes in zip(expected.caches[i], device[i], strict=True):
            mine, theirs = (array.astype(np.float32) for array in codes)
            np.testing.assert_array_equal(np.isnan(mine), np.isnan(theirs))  # nothing else was written
            np.testing.assert_allclose(mine, theirs, atol=0.02, rtol=STEP_OF_E4M3 if KV_SCALES else 0)
            assert not KV_SCALES or (mine != theirs)[~np.isnan(mine)].mean() < 0.02
    used = {next(size for size in (1, 2, 4, 6) if size >= count) for count in (1, *decodes)}
    assert backend._engine._engine.contexts == 1 + (0 if graphs == "no room" else len(used))
    if not graphs.startswith("no "):
        assert gpu.log.count("instantiate") == len(used), told
        assert gpu.log.count("replay") == len(decodes) + 1 - len(used)
        assert told == [], told
    else:
        assert gpu.log.count("replay") == 0
        assert len(told) == len(used)
        reason = (
            "cannot make an execution context"
            if graphs == "no room"
            else "CUDA_ERROR_STAND_IN: as it was told"
        )
        assert reason in told[0]
    if graphs == "graphs":  # its kernels are launched after the step, however that ran
        sample_on(backend, gpu)
    steps = gpu.log[gpu.log.index("wait") :]
    assert steps.count("allocate") == steps.count("pin") == 0  # nothing is allocated for a step
    before = gpu.log.count("upload")
    backend.forward(Batch.pack([([1, 2, 3], 0, [0], True), ([4], 9, [1], True)]))
    assert gpu.log.count("upload") == before + 1
    compiled = set(trt.cache.compiled)
    assert len(compiled) == backend._engine._engine.contexts

    before = len(gpu.log)
    backend.close()
    backend.close()
    closing = list(dict.fromkeys(gpu.log[before:]))
    order = ["wait", "drop graph", "unload", "free", "drop stream", "release"]
    assert [what for what in closing if what in order] == [
        w for w in order if w in closing or w != "drop graph"
    ]
    assert not gpu.memory
    assert not gpu.graphs
    assert not gpu.modules
    trt.cache = type(trt.cache)()
    again = load()
    assert trt.cache.compiled >= compiled  # the next start finds what this one compiled
    again.close()
    print("as the reference says")


def sample_on(backend: Any, gpu: StandIn) -> None:
    """Serve requests with all logits and with candidates. Check that the tokens agree and what is copied."""
    assert backend.max_candidates == sampling.MAX_K

    class AllLogits:
        name, num_blocks, block_size = backend.name, backend.num_blocks, backend.block_size
        forward = backend.forward

    def tokens(on: Any, options: list[dict[str, Any]]) -> tuple[list[tuple[int, ...]], int, list[int]]:
        """Return the tokens of each request, their number, and the bytes of each copy to the host."""
        engine = ServingEngine(on, None, (), MAX_LEN, 64, 6, vocab_size=VOCAB)
        params = [SamplingParams(max_tokens=4 + i, **given) for i, given in enumerate(options)]
        prompts = [
            np.random.default_rng(i).integers(0, VOCAB, 20 * i + 1).tolist() for i in range(len(params))
        ]
        before = len(gpu.downloads)
        outputs = engine.generate(prompts, params)
        return [o.token_ids for o in outputs], engine.stats.generated_tokens, gpu.downloads[before:]

    top_k: dict[str, Any] = {"temperature": 1.5, "top_k": 9, "top_p": 0.95}
    row = 4 * (1 + 2 * sampling.CAPACITY)
    for options, nbytes in (
        ([{}] * 3, 4),
        ([{**top_k, "seed": i} for i in range(3)], row),
        ([{"temperature": 0.7, "top_k": 300, "seed": 8}, {}, {**top_k, "seed": 7}], None),
    ):
        wanted, logits, whole = tokens(AllLogits(), options)
        got, count, downloads = tokens(backend, options)
        assert got == wanted
        assert (count, sum(whole)) == (logits, logits * 4 * VOCAB)
        assert nbytes is None or sum(downloads) == count * nbytes
    assert any(size % (4 * VOCAB) == 0 for size in downloads)  # steps with a k that is too large
    assert {row, 2 * row} <= set(downloads)  # and those after that request's end

    # Rows that the kernels cannot answer are copied whole.
    device = gpu.view(backend._addresses["logits"], np.float32, (3, VOCAB))
    device[:], device[1, 5], device[2, 6] = -1, np.nan, np.inf
    device[0, 7:9] = 3
    found = backend._sampler.candidates(3, 1)
    assert [c.ids is None for c in found] == [False, True, True]
    assert found[0].ids.tolist() == [7]
    np.testing.assert_array_equal(found[1].logits, device[1])
    assert backend._sampler.candidates(1, 2)[0].ids.tolist() == [7, 8]


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
