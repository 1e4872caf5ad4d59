"""Every family in the zoo, on both CPU engines, against transformers in fp32.

Logits of ragged batches (prefill, chunked prefill, mixed steps, decode) and 64 greedy tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from llmc.compiler.zoo import list_zoo
from llmc.runtime.backends import load_backend
from llmc.runtime.backends.base import Backend
from llmc.runtime.batch import Batch
from llmc.runtime.bundle.reader import Bundle
from llmc.runtime.engine import Engine
from llmc.runtime.sampling import SamplingParams

TOLERANCE = 1e-4  # fp32 logits
FAMILIES = [entry.name for entry in list_zoo() if entry.name.endswith(("-tiny", "-tiny-plain"))]
ENGINES = ("openvino", "onnxruntime")
# Tokens that each of three sequences gets, step by step: prefill, mixed, decode.
STEPS = [(70, 5, 33), (1, 40, 9), (1, 0, 17), (0, 32, 1), *[(1, 1, 1)] * 10]


def reference(path: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, attn_implementation="eager").eval()


def backend_for(path: Path, engine: str, blocks: int = 64) -> Backend:
    bundle = Bundle.open(path)
    if engine == "openvino" and bundle.manifest.target.engine != "openvino":
        pytest.skip(f"OpenVINO cannot take this graph: {bundle.manifest.target.reason}")
    return load_backend(engine, bundle.engine_path(), blocks)


def run_steps(backend: Backend, sequences: list[list[int]], steps: list[tuple[int, ...]]) -> list[np.ndarray]:
    """Logits of every position, computed in the given chunks, with shuffled block tables."""
    free = np.random.default_rng(2).permutation(backend.num_blocks).tolist()
    tables = [[free.pop() for _ in range(-(-len(ids) // 32))] for ids in sequences]
    past = [0] * len(sequences)
    rows: list[list[np.ndarray]] = [[] for _ in sequences]
    for step in steps:
        chunks = [(s, count) for s, count in enumerate(step) if count]
        used = [tables[s][: -(-(past[s] + count) // 32)] for s, count in chunks]
        ids = [token for s, count in chunks for token in sequences[s][past[s] : past[s] + count]]
        batch = Batch(
            input_ids=np.array(ids, np.int32),
            position_ids=np.array(
                [p for s, count in chunks for p in range(past[s], past[s] + count)], np.int32
            ),
            query_start=np.cumsum([0, *(count for _, count in chunks)], dtype=np.int32),
            past_lengths=np.array([past[s] for s, _ in chunks], np.int32),
            block_indices=np.array([block for table in used for block in table], np.int32),
            block_begins=np.cumsum([0, *map(len, used)], dtype=np.int32),
            logits_index=np.arange(len(ids), dtype=np.int32),
        )
        logits, start = backend.forward(batch), 0
        for s, count in chunks:
            rows[s].append(logits[start : start + count].copy())
            start, past[s] = start + count, past[s] + count
    return [np.concatenate(row) for row in rows]


def check_logits(model: Any, backend: Backend, vocab: int) -> None:
    rng = np.random.default_rng(1)
    lengths = [sum(step[s] for step in STEPS) for s in range(3)]
    sequences = [rng.integers(0, vocab, length).tolist() for length in lengths]
    for ids, got in zip(sequences, run_steps(backend, sequences, STEPS), strict=True):
        with torch.no_grad():
            expected = model(input_ids=torch.tensor([ids])).logits[0].numpy()
        assert np.ptp(expected) > 1, "the reference must depend on its input"
        assert np.abs(got - expected).max() < TOLERANCE


def check_greedy(model: Any, engine: Engine, vocab: int) -> None:
    rng = np.random.default_rng(3)
    prompts = [rng.integers(0, vocab, length).tolist() for length in (1, 9, 40)]
    outputs = engine.generate(prompts, SamplingParams(max_tokens=64, ignore_eos=True))
    for prompt, output in zip(prompts, outputs, strict=True):
        with torch.no_grad():
            expected = model.generate(
                torch.tensor([prompt]),
                attention_mask=torch.ones(1, len(prompt), dtype=torch.int64),
                do_sample=False,
                min_new_tokens=64,
                max_new_tokens=64,
                pad_token_id=0,
                eos_token_id=None,
            )
        assert list(output.token_ids) == expected[0, len(prompt) :].tolist()


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("name", FAMILIES)
def test_logits_and_greedy_text_equal_transformers(
    name: str, engine: str, checkpoint: Callable[[str], Path], bundle: Callable[[str], Path]
) -> None:
    model = reference(checkpoint(name))
    backend = backend_for(bundle(name), engine)
    vocab = model.config.vocab_size
    check_logits(model, backend, vocab)
    check_greedy(model, Engine(backend, None, (), 256, max_batch_tokens=24, max_sequences=8), vocab)


def test_only_the_softcap_family_needs_onnx_runtime(bundle: Callable[[str], Path]) -> None:
    chosen = {name: Bundle.open(bundle(name)).manifest.target.engine for name in FAMILIES}
    assert [name for name, engine in chosen.items() if engine != "openvino"] == ["gemma2-tiny"]


@pytest.mark.parametrize("engine", ENGINES)
def test_a_trained_checkpoint_equals_transformers(engine: str, stories: Path, stories_bundle: Path) -> None:
    model = reference(stories)
    backend = backend_for(stories_bundle, engine)
    check_logits(model, backend, 512)
    check_greedy(model, Engine(backend, None, (), 512, max_batch_tokens=24, max_sequences=8), 512)
