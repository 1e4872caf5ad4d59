"""Every family in the zoo, on every CPU engine, compared with transformers in fp32.

Logits of ragged batches (prefill, chunked prefill, mixed steps, decode) and 64 greedy tokens.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from llmc.compiler.checkpoint.recipe import known_families
from llmc.compiler.driver import compile_model, plan_build
from llmc.compiler.request import BuildRequest
from llmc.compiler.verify.load import load as load_ranks
from llmc.compiler.zoo import list_zoo, zoo_config
from llmc.runtime.backends import load_backend
from llmc.runtime.backends.base import Backend, EngineFile, LoadOptions
from llmc.runtime.batch import Batch
from llmc.runtime.bundle.reader import Bundle
from llmc.runtime.engine import Engine
from llmc.runtime.errors import UnsupportedError
from llmc.runtime.sampling import SamplingParams
from support.families import FAST, LIKE_OTHERS, MIXTURES, OTHERS, WITH_EXPERTS, write_random

TOLERANCE = 1e-4  # fp32 logits
FAMILIES = [entry.name for entry in list_zoo() if entry.name.endswith(("-tiny", "-tiny-plain"))]
ENGINES = ("native", "openvino", "onnxruntime")
SOFTCAP = "gemma2-tiny"
CHUNKS = "llama4-text-tiny"
NOT_OPENVINO = (SOFTCAP, *MIXTURES)  # OpenVINO's attention has no softcap, and it has no mixture of experts
NEW_TOKENS = 64
# The number of tokens of each of three sequences, step by step: prefill, mixed, decode.
STEPS = [(70, 5, 33), (1, 40, 9), (1, 0, 17), (0, 32, 1), *[(1, 1, 1)] * 10]


@dataclass(frozen=True)
class Reference:
    """The results of transformers in fp32 for one checkpoint."""

    sequences: list[list[int]]
    logits: list[np.ndarray]
    prompts: list[list[int]]
    continuations: list[list[int]]


@functools.cache  # all engines are compared with one run of transformers
def reference(path: Path) -> Reference:
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, attn_implementation="eager")
    model.eval()
    rng, vocab = np.random.default_rng(1), model.config.vocab_size
    lengths = [sum(step[s] for step in STEPS) for s in range(3)]
    sequences = [rng.integers(0, vocab, length).tolist() for length in lengths]
    prompts = [rng.integers(0, vocab, length).tolist() for length in (1, 9, 40)]
    with torch.no_grad():
        logits = [model(input_ids=torch.tensor([ids])).logits[0].numpy() for ids in sequences]
        continuations = [
            model.generate(
                torch.tensor([prompt]),
                attention_mask=torch.ones(1, len(prompt), dtype=torch.int64),
                do_sample=False,
                min_new_tokens=NEW_TOKENS,
                max_new_tokens=NEW_TOKENS,
                pad_token_id=0,
                eos_token_id=None,
            )[0, len(prompt) :].tolist()
            for prompt in prompts
        ]
    return Reference(sequences, logits, prompts, continuations)


def backend_for(path: Path, engine: str, blocks: int = 64) -> Backend:
    """Return `engine` with the engine file of a bundle. ONNX Runtime can run OpenVINO's, too."""
    return load_backend(EngineFile(engine, Bundle.open(path).engine_path()), LoadOptions(kv_blocks=blocks))


def run_steps(backend: Backend, sequences: list[list[int]], steps: list[tuple[int, ...]]) -> list[np.ndarray]:
    """Return the logits of every position, computed in the given chunks, with shuffled block tables."""
    free = np.random.default_rng(2).permutation(backend.num_blocks).tolist()
    tables = [[free.pop() for _ in range(-(-len(ids) // 32))] for ids in sequences]
    past = [0] * len(sequences)
    rows: list[list[np.ndarray]] = [[] for _ in sequences]
    for step in steps:
        chunks = [(s, count) for s, count in enumerate(step) if count]
        ends = {s: past[s] + count for s, count in chunks}
        batch = Batch.pack(
            (sequences[s][past[s] : end], past[s], tables[s][: -(-end // 32)], range(end - past[s]))
            for s, end in ends.items()
        )
        logits, start = backend.forward(batch), 0
        for s, count in chunks:
            rows[s].append(logits[start : start + count].copy())
            start, past[s] = start + count, past[s] + count
    return [np.concatenate(row) for row in rows]


def check(expected: Reference, backend: Backend, max_seq_len: int) -> None:
    """Check that ragged steps give the same logits, and continuous batching the same greedy tokens."""
    for logits, got in zip(expected.logits, run_steps(backend, expected.sequences, STEPS), strict=True):
        assert np.ptp(logits) > 1, "the reference must depend on its input"
        assert np.abs(got - logits).max() < TOLERANCE
    engine = Engine(backend, None, (), max_seq_len, max_batch_tokens=24, max_sequences=8)
    outputs = engine.generate(expected.prompts, SamplingParams(max_tokens=NEW_TOKENS, ignore_eos=True))
    assert [list(output.token_ids) for output in outputs] == expected.continuations


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=pytest.mark.slow) if name in LIKE_OTHERS else name for name in FAMILIES],
)
def test_logits_and_greedy_text_equal_transformers(
    name: str, engine: str, checkpoint: Callable[[str], Path], bundle: Callable[..., Path]
) -> None:
    if name in NOT_OPENVINO and engine == "openvino":
        pytest.skip("OpenVINO lacks an operator of this family")
    if engine == "native":
        built = bundle(name)
        assert Bundle.open(built).manifest.target.engine == "native"  # the default
    else:
        built = bundle(name, "onnxruntime" if name in NOT_OPENVINO else "openvino")
    check(reference(checkpoint(name)), backend_for(built, engine), 256)


def test_every_recipe_is_tested_here() -> None:
    tested = {entry.model_type for entry in list_zoo() if entry.name in FAMILIES} | set(OTHERS)
    assert set(known_families()) <= tested


@pytest.mark.parametrize(
    "options",
    [
        {"tp": 2},
        pytest.param(
            {"target": "tensorrt-rtx", "dtype": "fp16"},
            marks=pytest.mark.slow,  # another trace
        ),
    ],
)
def test_experts_elsewhere_are_refused(
    options: dict[str, Any], checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    request = BuildRequest(str(checkpoint("qwen2-moe-tiny")), tmp_path / "x.llmc", **options)
    with pytest.raises(UnsupportedError, match=r"model\.layers\.0\.mlp\.experts is a mixture of experts"):
        plan_build(request)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tp": 2}, "which --tp does not divide"),
        ({"kv_dtype": "int8"}, "whose cache cannot be int8"),
        pytest.param(
            {"target": "tensorrt-rtx", "dtype": "fp16"},
            "which llmc cannot build for GPUs yet",
            marks=pytest.mark.slow,  # another trace
        ),
        pytest.param(
            {"target": "tensorrt-rtx", "dtype": "fp16", "kv_dtype": "fp8"},
            "whose KV cache llmc does not quantize",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_latent_attention_elsewhere_is_refused(
    options: dict[str, Any],
    message: str,
    checkpoint: Callable[[str], Path],
    tmp_path: Path,
) -> None:
    request = BuildRequest(str(checkpoint("deepseek-v3-tiny")), tmp_path / "x.llmc", **options)
    wanted = rf"model\.layers\.0\.self_attn is multi-head latent attention, {message}"
    with pytest.raises(UnsupportedError, match=wanted):
        plan_build(request)


@pytest.mark.parametrize(
    ("name", "lacks"),
    [
        (SOFTCAP, "has an attention softcap"),
        ("qwen2-moe-tiny", "is a mixture of experts"),
        ("deepseek-v3-tiny", "is multi-head latent attention"),
        (CHUNKS, "is attention in chunks"),
    ],
)
def test_openvino_names_what_it_lacks(
    name: str, lacks: str, checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    request = BuildRequest(str(checkpoint(name)), tmp_path / "x.llmc", engine="openvino")
    with pytest.raises(UnsupportedError, match=rf"OpenVINO cannot run this model: .* {lacks}"):
        plan_build(request)


def test_trained_checkpoint_equals_transformers(stories: Path, tmp_path: Path) -> None:
    expected = reference(stories)
    native, openvino = (build(stories, tmp_path / f"{name}.llmc", name) for name in (None, "openvino"))
    for path, engine in ((native, "native"), (openvino, "openvino"), (openvino, "onnxruntime")):
        check(expected, backend_for(path, engine), 512)


@pytest.mark.parametrize(
    "family", [name if name in FAST else pytest.param(name, marks=pytest.mark.slow) for name in OTHERS]
)
def test_families_without_a_zoo_model_equal_transformers(family: str, tmp_path: Path) -> None:
    """On the native engine, which has all operators of these families, and on OpenVINO or ONNX Runtime."""
    checkpoint = write_random(family, tmp_path)
    built = build(checkpoint, tmp_path / "x.llmc")
    assert Bundle.open(built).manifest.target.engine == "native"
    check(reference(checkpoint), backend_for(built, "native"), 256)
    other = "onnxruntime" if family in WITH_EXPERTS else "openvino"
    built = build(checkpoint, tmp_path / "y.llmc", other)
    check(reference(checkpoint), backend_for(built, other), 256)


# Grouped queries and tied embeddings; more ranks than KV heads, and softcaps; one layer for queries, keys and
# values of every group.
DIVIDED = (("llama-tiny", 2), ("gemma2-tiny", 4), ("falcon", 2))


@pytest.mark.parametrize(
    ("family", "ranks"),
    [
        pytest.param(family, ranks, marks=() if (family, ranks) in DIVIDED else pytest.mark.slow)
        for number, family in enumerate((*FAMILIES, *OTHERS))
        if family not in (*MIXTURES, *WITH_EXPERTS)
        for ranks in ((2, 4) if family in FAMILIES else (2, 4)[number % 2 : number % 2 + 1])
    ],
)
def test_ranks_together_equal_transformers(
    family: str,
    ranks: int,
    checkpoint: Callable[[str], Path],
    tmp_path: Path,
) -> None:
    source = checkpoint(family) if family in FAMILIES else write_random(family, tmp_path)
    bundle = Bundle.open(build(source, tmp_path / "x.llmc", tp=ranks))
    assert bundle.manifest.parallel.tp == len(bundle.manifest.engines) == ranks
    backend = load_ranks(EngineFile("native", bundle.engine_path()), 64, ranks)
    check(reference(source), backend, 256)


# Four layers with two kinds of windows; layers of one bias and norm for attention and MLP.
STAGED = (("gemma3-tiny", 1), ("qwen2-tiny", 2), ("gptj", 1))


@pytest.mark.parametrize(
    ("family", "tp"),
    [
        pytest.param(family, tp, marks=() if (family, tp) in STAGED else pytest.mark.slow)
        for family in (*FAMILIES, *OTHERS)
        for tp in ((1,) if family in (*MIXTURES, *WITH_EXPERTS) else (1, 2))
    ],
)
def test_stages_together_equal_transformers(
    family: str,
    tp: int,
    checkpoint: Callable[[str], Path],
    tmp_path: Path,
) -> None:
    source = checkpoint(family) if family in FAMILIES else write_random(family, tmp_path)
    bundle = Bundle.open(build(source, tmp_path / "x.llmc", tp=tp, pp=2))
    assert (bundle.manifest.parallel.pp, len(bundle.manifest.engines)) == (2, 2 * tp)
    backend = load_ranks(EngineFile("native", bundle.engine_path()), 64, 2 * tp, 2)
    check(reference(source), backend, 256)


def test_the_family_with_chunks_has_all_that_is_special_about_it() -> None:
    settings, longest = zoo_config(CHUNKS), sum(step[0] for step in STEPS)
    assert longest > 3 * settings["attention_chunk_size"]
    assert settings["attention_chunk_size"] % 32  # chunks begin within blocks of the cache
    assert longest > 2 * settings["floor_scale"]
    assert set(settings["no_rope_layers"]) == {0, 1}
    assert 0 < len(settings["moe_layers"]) < settings["num_hidden_layers"]


def test_logits_have_the_same_bits_in_any_batch_and_with_any_threads(
    checkpoint: Callable[[str], Path], bundle: Callable[..., Path]
) -> None:
    sequences, path = reference(checkpoint(CHUNKS)).sequences, Bundle.open(bundle(CHUNKS)).engine_path()
    results = []
    for threads in (1, 2):
        backend = load_backend(EngineFile("native", path), LoadOptions(kv_blocks=64, threads=threads))
        results.append(run_steps(backend, sequences, STEPS))
        whole = [run_steps(backend, [ids], [(len(ids),)])[0] for ids in sequences]
        results.append(whole)
    for other in results[1:]:
        for logits, got in zip(results[0], other, strict=True):
            assert np.array_equal(logits, got)


@pytest.mark.parametrize("name", ["deepseek-v3-tiny", CHUNKS])
def test_sequences_share_prefixes_and_are_preempted(
    name: str, checkpoint: Callable[[str], Path], bundle: Callable[..., Path]
) -> None:
    """Three prompts of 40 equal tokens and one of its own, in a cache that is too small for all of them."""
    expected = reference(checkpoint(name))
    prompt = expected.prompts[2]
    assert len(prompt) == 40
    engine = Engine(backend_for(bundle(name), "native", 7), None, (), 256, max_sequences=8)
    prompts = [prompt, expected.prompts[1], prompt, prompt]
    wanted = [expected.continuations[number] for number in (2, 1, 2, 2)]
    outputs = engine.generate(prompts, SamplingParams(max_tokens=64, ignore_eos=True))
    assert [list(output.token_ids) for output in outputs] == wanted
    assert engine.stats.cached_tokens > 0
    assert engine.stats.preemptions > 0


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "changes", "options"),
    [
        # DeepSeek-V2-Lite: no groups, no compressed queries, no YaRN.
        ("deepseek_v2", {"topk_method": "greedy", "n_group": 1, "topk_group": 1, "q_lora_rank": None}, {}),
        (
            "deepseek_v2",
            {"num_attention_heads": 40, "num_key_value_heads": 40, "hidden_size": 80, "qk_rope_head_dim": 32},
            {"quant": "int8"},
        ),
        ("deepseek_v3", {"rope_interleave": False, "attention_bias": True, "qk_nope_head_dim": 32}, {}),
        (
            "deepseek_v3",
            {"q_lora_rank": None, "norm_topk_prob": False, "n_group": 1, "topk_group": 1},
            {"pp": 2},
        ),
    ],
)
def test_other_forms_equal_transformers(
    family: str,
    changes: dict[str, Any],
    options: dict[str, Any],
    tmp_path: Path,
) -> None:
    settings = {
        key: value
        for key, value in zoo_config("deepseek-v3-tiny").items()
        if key not in ("model_type", "architectures", "dtype")
    }
    settings |= {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}}
    path = write_random(family, tmp_path, **settings | changes)
    record = compile_model(BuildRequest(str(path), tmp_path / "x.llmc", **options)).manifest.verification
    assert record.status == "passed"
    if not options:
        assert Bundle.open(tmp_path / "x.llmc").manifest.target.engine == "native"
        check(reference(path), backend_for(tmp_path / "x.llmc", "native"), 256)


def build(checkpoint: Path, output: Path, engine: str | None = None, tp: int = 1, pp: int = 1) -> Path:
    request = BuildRequest(str(checkpoint), output, engine=engine, tp=tp, pp=pp, verify=False)
    return compile_model(request).path
