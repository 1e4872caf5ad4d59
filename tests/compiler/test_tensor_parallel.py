"""Bundles of several ranks: built, verified, and run by real processes. test_families.py has all families."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import onnx_ir as ir
import pytest

from llmc.compiler.checkpoint.checkpoint import Checkpoint
from llmc.compiler.checkpoint.config import load_config
from llmc.compiler.driver import compile_model, plan_build
from llmc.compiler.request import BuildRequest
from llmc.passes import contract, edit, pipeline
from llmc.passes.parameter import parameters
from llmc.plugins.collectives import spec
from llmc.runtime.errors import BuildError, UnsupportedError
from llmc.runtime.load import load_engine
from llmc.runtime.sampling import SamplingParams
from support.families import write_random
from support.sampled import every_nth
from support.traces import trace_once

GREEDY = SamplingParams(max_tokens=16, ignore_eos=True)
PROMPTS = [[5, 6, 7], list(range(3, 50))]


@pytest.fixture
def quantized(checkpoint: Callable[[str], Path]) -> ir.Model:
    """The canonical graph of qwen3-tiny."""
    config = load_config(Checkpoint.open(checkpoint("qwen3-tiny")))
    model = trace_once(config, "fp32", 256).model
    contract.run(model, pipeline.canonicalize())
    return model


def test_real_processes_generate_what_one_rank_does(
    checkpoint: Callable[[str], Path], bundle: Callable[..., Path], tmp_path: Path
) -> None:
    """test_families.py compares one rank with transformers. Steps exchange candidates or whole rows."""
    sampled = replace(GREEDY, temperature=0.8, top_k=20, top_p=0.9, seed=3)
    whole = replace(GREEDY, temperature=0.8, seed=3)
    request = BuildRequest(str(checkpoint("llama-tiny")), tmp_path / "x.llmc", tp=2, verify=False)
    texts = []
    for path in (bundle("llama-tiny"), compile_model(request).path):
        engine = load_engine(path, max_batch_tokens=16, threads=1)
        asked = [GREEDY, [GREEDY, sampled], [sampled, whole]]
        outputs = [engine.generate(PROMPTS, params) for params in asked]
        texts.append([output.token_ids for each in outputs for output in each])
        engine.close()
    assert texts[0] == texts[1]


@pytest.mark.parametrize("ranks", [2, 4])
def test_every_element_of_a_divided_weight_has_one_rank(quantized: ir.Model, ranks: int) -> None:
    kept: dict[str, int] = {}
    order = set()
    for rank in range(ranks):
        part = quantized.clone()
        contract.run(part, pipeline.shard(rank, ranks))
        assert contract.run(part, pipeline.shard(rank, ranks))[0].matches == 0  # of its own result
        for value, record in parameters(part):
            if record.whole:
                kept[record.file_name] = kept.get(record.file_name, 0) + math.prod(edit.dims(value))
        collectives = [node for node in part.graph if node.op_type in (spec.ALL_REDUCE, spec.ALL_GATHER)]
        order.add(tuple((node.op_type, node.attributes["sequence"].value) for node in collectives))
    assert len(order) == 1
    assert [number for _, number in order.pop()] == list(range(6))  # embedding, 2 a layer, logits
    replicated = 2 if ranks == 4 else 1  # two KV heads: two ranks share one
    wholes = {record.file_name: math.prod(record.whole) for _, record in parameters(part) if record.whole}
    for name, count in kept.items():
        # queries 128 x 64, keys and values 64 x 64 each
        assert count == ((128 + 128 * replicated) * 64 if "k_proj" in name else wholes[name]), name


@pytest.mark.parametrize(
    ("options", "fact"),
    [
        ({"tp": 3}, "4 heads and 2 KV heads, which cannot be divided among 3 ranks"),
        ({"tp": 8}, "4 heads and 2 KV heads, which cannot be divided among 8 ranks"),
        ({"tp": 4, "quant": "int4", "rounding": "nearest", "kv_dtype": "int8"}, ""),
        ({"tp": 6, "heads": 18}, ""),
        ({"tp": 6, "heads": 18, "quant": "int4", "rounding": "nearest"}, "32 of which share a scale"),
        ({"tp": 4, "quant": "int4-block128", "rounding": "nearest"}, "128 of which share a scale"),
    ],
)
def test_what_cannot_be_divided_is_refused(
    options: dict[str, object],
    fact: str,
    checkpoint: Callable[[str], Path],
    tmp_path: Path,
) -> None:
    """Also where ranks share a KV head, and a block has parts of two ranks' heads."""
    source = checkpoint("qwen3-tiny")
    if heads := options.get("heads"):
        options = {name: value for name, value in options.items() if name != "heads"}
        source = write_random(
            "qwen3", tmp_path, num_attention_heads=heads, head_dim=16, intermediate_size=192
        )
    request = BuildRequest(str(source), tmp_path / "x.llmc", **options)  # type: ignore[arg-type]
    if not fact:
        assert plan_build(request)[0].resolved.tp == options["tp"]
        return
    with pytest.raises(UnsupportedError, match=fact) as caught:
        plan_build(request)
    assert caught.value.argument == "tp"


def test_requests_for_several_ranks_are_checked(tmp_path: Path) -> None:
    for options in (
        {"tp": 0},
        {"tp": 65},
        {"tp": 2, "engine": "onnxruntime"},
        {"tp": 2, "engine": "openvino"},
    ):
        with pytest.raises(BuildError, match="--tp is") as caught:
            BuildRequest("c", tmp_path / "x.llmc", **options)  # type: ignore[arg-type]
        assert caught.value.argument == "tp"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("ranks", "quant"),
    every_nth(2, (2, 4), (None, "int8", "int4", "fp8", "mxfp4", "nvfp4", "int8-smoothquant")),
)
def test_quantized_ranks_are_verified(
    quant: str | None,
    ranks: int,
    checkpoint: Callable[[str], Path],
    tmp_path: Path,
    fast_builds: None,
) -> None:
    """The verification compares all ranks with transformers on the same quantized weights.

    Each format with 2 or 4 ranks here, and as stages of 1 or 2 ranks in test_pipeline_parallel.py.
    """
    request = BuildRequest(str(checkpoint("qwen3-tiny")), tmp_path / "x.llmc", tp=ranks, quant=quant)
    first = compile_model(request).manifest
    assert first.verification.status == "passed"
    if quant == "int4":
        second = compile_model(replace(request, output=tmp_path / "y.llmc")).manifest
        assert first.files == second.files  # and the hashes in it
