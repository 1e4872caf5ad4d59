"""Bundles of several ranks for TensorRT: their graphs in ONNX Runtime, and their plans. None is run."""

from __future__ import annotations

import dataclasses
import json
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest

from llmc.compiler import zoo
from llmc.compiler.checkpoint.checkpoint import Checkpoint
from llmc.compiler.checkpoint.config import load_config
from llmc.compiler.checkpoint.model_keys import read_model
from llmc.compiler.driver import compile_model, plan_build
from llmc.compiler.progress import Silent
from llmc.compiler.request import BuildRequest
from llmc.compiler.targets.tensorrt import build, target
from llmc.compiler.targets.tensorrt.ranks import parts_of
from llmc.compiler.verify.engine_logits import blocks_for, ragged
from llmc.compiler.weights.write import attach_weights
from llmc.passes import contract, pipeline
from llmc.passes.legalize.finalize import serialize
from llmc.passes.legalize.lower_partial_embedding import LowerPartialEmbedding
from llmc.passes.legalize.tensorrt_boundary import to_tensorrt
from llmc.passes.shard.join import join
from llmc.passes.shard.stages import Stage, plan_stages
from llmc.plugins.collectives.spec import ALL_GATHER, ALL_REDUCE, DOMAIN, PARTIAL_EMBEDDING, RECV, SEND
from llmc.runtime.backends import load_backend
from llmc.runtime.backends.base import EngineFile, LoadOptions
from llmc.runtime.errors import BuildError, UnsupportedError
from support.families import DENSE, write_random
from support.sampled import every_nth
from support.traces import trace_once

needs_tensorrt = pytest.mark.skipif(
    not build.is_installed(target.RTX.library), reason="the package tensorrt-rtx is not installed"
)
SHAPES = ((2, 1), (4, 1), (2, 2), (1, 2))  # the ranks of a stage, and the stages
FAST = ("llama-tiny", 2, 2)
every_family = pytest.mark.parametrize(
    ("name", "tp", "pp"),
    [
        pytest.param(name, tp, pp, marks=() if (name, tp, pp) == FAST else pytest.mark.slow)
        for name in DENSE
        for tp, pp in SHAPES
    ],
)
FORMATS: list[dict[str, Any]] = [
    {},
    {"dtype": "fp16"},
    {"quant": "int8"},
    {"quant": "int4"},
    {"quant": "fp8", "kv_dtype": "fp8", "sms": (89,)},
    {"quant": "nvfp4", "sms": (120,)},
    {"quant": "mxfp4", "sms": (120,)},
]
LIMITS = build.EngineLimits(max_seq_len=256, max_tokens=64, max_sequences=4)
RNG = np.random.default_rng(0)
SEQUENCES = [RNG.integers(0, 256, length).tolist() for length in (70, 9, 33)]


def quantized(checkpoint: Path, dtype: str) -> ir.Model:
    """The canonical graph of a checkpoint, computing in `dtype`, without weights."""
    model = trace_once(load_config(Checkpoint.open(checkpoint)), dtype, 256).model.clone()
    contract.run(model, pipeline.canonicalize())
    return model


def logits(model: ir.Model, checkpoint: Path, file: Path) -> list[np.ndarray]:
    """The logits of SEQUENCES, in mixed steps, of a graph that ONNX Runtime runs in fp32."""
    contract.run(model, pipeline.oracle("fp32", False))
    file.write_bytes(serialize(model))
    options = LoadOptions(kv_blocks=blocks_for(SEQUENCES), threads=1)
    return ragged(load_backend(EngineFile("onnxruntime", file), options), SEQUENCES)


def with_weights(model: ir.Model, checkpoint: Path) -> ir.Model:
    opened = Checkpoint.open(checkpoint)
    keys, renamed = read_model(opened, load_config(opened))
    tensors = renamed.checkpoint.tensors
    tied = {name: tensors[of] for name, of in keys.tied.items() if of in tensors}
    attach_weights(model, {**tensors, **tied})
    return model


def stages(model: ir.Model, pp: int) -> tuple[Stage, ...]:
    return plan_stages(model, pp) if pp > 1 else ()


@every_family
def test_the_joined_ranks_compute_what_one_rank_does(
    name: str, tp: int, pp: int, checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    """One rank is compared with transformers in test_tensorrt_oracle.py."""
    source = checkpoint(name)
    model = quantized(source, "fp32")
    parts = [with_weights(part, source) for part in parts_of(model, tp, "fp32", stages(model, pp))]
    assert len(parts) == tp * pp
    whole = with_weights(model.clone(), source)
    contract.run(whole, pipeline.legalize_tensorrt("fp32"))
    expected = logits(whole, source, tmp_path / "whole.onnx")
    joined = join(parts, tp)
    caches = {str(value.name) for value in joined.graph.inputs if "_cache." in str(value.name)}
    assert len(caches) == tp * sum("_cache." in str(value.name) for value in whole.graph.inputs)
    for mine, one in zip(logits(joined, source, tmp_path / "ranks.onnx"), expected, strict=True):
        if tp == 1:
            np.testing.assert_array_equal(mine, one)
        np.testing.assert_allclose(mine, one, atol=1e-4 * np.abs(one).max())


def test_ranks_with_different_collectives_are_not_joined(checkpoint: Callable[[str], Path]) -> None:
    parts = list(parts_of(quantized(checkpoint("llama-tiny"), "fp32"), 2, "fp32"))
    node = next(node for node in parts[1].graph if node.op_type == ALL_REDUCE)
    node.attributes["sequence"] = ir.AttrInt64("sequence", 9)
    with pytest.raises(BuildError, match="the ranks have different collectives"):
        join(parts)


def test_ranks_that_do_not_receive_what_others_send_are_not_joined(checkpoint: Callable[[str], Path]) -> None:
    model = quantized(checkpoint("llama-tiny"), "fp32")
    parts = list(parts_of(model, 1, "fp32", stages(model, 2)))
    (send,) = [node for node in parts[0].graph if node.op_type == SEND]
    send.attributes["peer"] = ir.AttrInt64("peer", 0)
    with pytest.raises(BuildError, match="rank 1 receives what rank 0 does not send"):
        join(parts, 1)
    del parts[1]
    with pytest.raises(BuildError, match="rank 0 sends what rank 0 does not receive"):
        join(parts, 1)


@pytest.mark.parametrize("dtype", ["fp32", "fp16"])
def test_a_part_of_an_embedding_has_zeros_for_other_tokens(dtype: str) -> None:
    kind = {"fp32": "float", "fp16": "float16"}[dtype]
    model = ir.from_onnx_text(
        f"""<ir_version: 10, opset_import: ["" : 23, "llmc" : 1]>
        g (int32[T] ids, {kind}[3,2] table) => ({kind}[T,2] y) {{
          y = llmc.{PARTIAL_EMBEDDING} <begin = 4> (ids, table)
        }}"""
    )
    assert LowerPartialEmbedding()(model).count == 1
    assert LowerPartialEmbedding()(model).count == 0
    table = np.array([[1, -2], [3, -4], [5, -6]], {"fp32": np.float32, "fp16": np.float16}[dtype])
    session = ort.InferenceSession(serialize(model))
    (rows,) = session.run(None, {"ids": np.array([0, 6, 3, 4, 7, 5, 200_000], np.int32), "table": table})
    np.testing.assert_array_equal(rows, [[0, 0], [5, -6], [0, 0], [1, -2], [0, 0], [3, -4], [0, 0]])


def test_the_parser_gets_columns_from_the_layout_of_nccl() -> None:
    """The plugin puts the ranks' parts one after the other, as NCCL does."""
    model = ir.from_onnx_text(
        f"""<ir_version: 10, opset_import: ["" : 23, "llmc" : 1]>
        g (float[N,2] x) => (float[N,6] y) {{
          y = llmc.{ALL_GATHER} <ranks = 3, sequence = 0> (x)
        }}"""
    )
    proto = to_tensorrt(model)
    (gather, *others) = proto.graph.node
    given = {a.name: onnx.helper.get_attribute_value(a) for a in gather.attribute}
    assert given == {"ranks": 3, "sequence": 0, "plugin_namespace": b"llmc", "plugin_version": b"1"}
    proto.graph.node.remove(gather)
    proto.graph.input[0].CopyFrom(
        onnx.helper.make_tensor_value_info(gather.output[0], onnx.TensorProto.FLOAT, [3, "N", 2])
    )
    parts = np.arange(3 * 4 * 2, dtype=np.float32).reshape(3, 4, 2)
    session = ort.InferenceSession(proto.SerializeToString())
    (whole,) = session.run(None, {gather.output[0]: parts})
    np.testing.assert_array_equal(whole, np.concatenate(list(parts), axis=1))
    assert [node.op_type for node in others] == ["Transpose", "Reshape"]


def test_collectives_that_do_not_depend_on_each_other_are_ordered() -> None:
    """Attention and MLP of a parallel layer: each engine could run either first."""
    reduce = f"llmc.{ALL_REDUCE} <ranks = 2, sequence = "
    model = ir.from_onnx_text(
        f"""<ir_version: 10, opset_import: ["" : 23, "llmc" : 1]>
        g (float[N,2] x) => (float[N,2] y) {{
          a = Abs (x)
          b = Neg (x)
          second = {reduce} 1> (b)
          first = {reduce} 0> (a)
          sum = Add (first, second)
          y = {reduce} 2> (sum)
        }}"""
    )
    nodes = to_tensorrt(model).graph.node
    inputs = {node.output[0]: list(node.input) for node in nodes if node.op_type == ALL_REDUCE}
    assert inputs == {"first": ["a"], "second": ["b", "first"], "y": ["sum"]}


def plan_of(part: ir.Model, source: Path, directory: Path) -> tuple[build.BuiltEngine, bytes]:
    directory.mkdir(exist_ok=True)
    graph, plan = directory / "rank0.onnx", directory / "rank0.plan"
    graph.write_bytes(to_tensorrt(with_weights(part, source)).SerializeToString())
    job = build.EngineJob(target.RTX.library, str(graph), str(plan), build.profile(part, LIMITS))
    return build.build(job, Silent()), plan.read_bytes()


@needs_tensorrt
@pytest.mark.parametrize(
    ("name", "tp", "pp"),
    [
        pytest.param(name, tp, pp, marks=() if (name, tp, pp) == FAST else pytest.mark.slow)
        for name, (tp, pp) in every_nth(2, DENSE, SHAPES)
    ],
)
def test_every_rank_gets_a_plan(
    name: str, tp: int, pp: int, checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    source = checkpoint(name)
    model = quantized(source, "bf16")
    parts = list(parts_of(model, tp, "bf16", stages(model, pp)))
    layers = zoo.zoo_config(name)["num_hidden_layers"]
    for rank, part in ((0, parts[0]), (len(parts) - 1, parts[-1])):  # the others are like one of them
        built, plan = plan_of(part, source, tmp_path)
        nodes = Counter(node.op_type for node in part.graph if node.domain == DOMAIN)
        assert built.attention_layers == layers // pp
        reduced = nodes[ALL_REDUCE] + nodes[ALL_GATHER]
        assert built.collectives == reduced + nodes[SEND] + nodes[RECV] > 0
        assert tp == 1 or reduced > built.attention_layers
        assert nodes[SEND] == (rank < tp * (pp - 1))
        assert nodes[RECV] == (rank >= tp and pp > 1)
        assert plan.count(b"sequence") >= built.collectives
        if rank and pp == 2 and (name, tp, pp) != FAST:  # a second time, where time does not matter
            assert plan_of(part, source, tmp_path / "in a directory with a longer name")[1] == plan


@needs_tensorrt
@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("gptj", {}),  # parallel layers
        ("falcon", {}),
        ("opt", {}),  # biases, learned positions
        ("gpt2", {}),
        ("gpt_neox", {}),
        ("phi", {}),
        ("qwen3", {"num_attention_heads": 6, "num_key_value_heads": 3}),  # unequal parts
    ],
)
def test_other_families(family: str, changes: dict[str, Any], tmp_path: Path) -> None:
    source = write_random(family, tmp_path, **changes)
    model = quantized(source, "fp32")
    parts = [with_weights(part, source) for part in parts_of(model, 2, "fp32", stages(model, 2))]
    whole = with_weights(model.clone(), source)
    contract.run(whole, pipeline.legalize_tensorrt("fp32"))
    expected = logits(whole, source, tmp_path / "whole.onnx")
    for mine, one in zip(logits(join(parts, 2), source, tmp_path / "ranks.onnx"), expected, strict=True):
        np.testing.assert_allclose(mine, one, atol=1e-4 * np.abs(one).max())
    model = quantized(source, "bf16")
    part = list(parts_of(model, 2, "bf16", stages(model, 2)))[3]
    built, _ = plan_of(part, source, tmp_path / "plan")
    nodes = Counter(node.op_type for node in part.graph if node.domain == DOMAIN)
    assert built.collectives == nodes[ALL_REDUCE] + nodes[ALL_GATHER] + nodes[RECV]
    assert nodes[RECV] > 0


@pytest.mark.parametrize(
    ("options", "error", "fact"),
    [
        ({"tp": 3}, UnsupportedError, "4 heads and 2 KV heads, which cannot be divided among 3 ranks"),
        ({"tp": 4, "quant": "int4-block128"}, UnsupportedError, "128 of which share a scale"),
        ({"tp": 65}, BuildError, "--tp is 65"),
    ],
)
def test_what_cannot_be_divided_is_refused(
    options: dict[str, Any],
    error: type[Exception],
    fact: str,
    checkpoint: Callable[[str], Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(build, "is_installed", lambda library: True)
    monkeypatch.setattr(target, "version", lambda library: "1")
    with pytest.raises(error, match=fact) as caught:
        plan_build(
            BuildRequest(str(checkpoint("qwen3-tiny")), tmp_path / "x.llmc", target="tensorrt-rtx", **options)
        )
    assert caught.value.argument == "tp"  # type: ignore[attr-defined]


@needs_tensorrt
@pytest.mark.slow
@pytest.mark.parametrize(
    ("tp", "pp", "options"),
    [
        *((2, 1, options) for options in FORMATS[::2]),
        *((4, 1, options) for options in FORMATS[1::2]),
        *((2, 2, options) for options in FORMATS[::3]),
        (1, 2, {}),
    ],
)
def test_all_ranks_are_verified_and_built(
    tp: int,
    pp: int,
    options: dict[str, Any],
    checkpoint: Callable[[str], Path],
    tmp_path: Path,
    fast_builds: None,
) -> None:
    """The verification compares the joined graphs with transformers, on the same quantized weights."""
    source = str(checkpoint("qwen3-tiny"))
    request = BuildRequest(source, tmp_path / "x.llmc", target="tensorrt-rtx", tp=tp, pp=pp, **options)
    manifest = compile_model(request).manifest
    assert manifest.verification.status == "passed"
    assert "joined" in manifest.verification.details["compared"]
    assert [engine.file for engine in manifest.engines] == [f"engines/rank{r}.plan" for r in range(tp * pp)]
    counts = {operator.name: operator.count for operator in manifest.operators}  # of rank 0
    if tp > 1:
        assert counts["llmc.AllReduce"] == (5 if pp == 1 else 3)  # the embedding, and two a layer
    assert counts.get("llmc.AllGather", 0) == (tp > 1 and pp == 1)
    assert counts.get("llmc.Send", 0) == (pp > 1)
    assert "llmc.PartialEmbedding" not in counts
    passes = {report.name: report.matches for report in manifest.passes}
    if tp > 1:
        assert passes["shard"] == 9  # linear layers: four a layer, and lm_head
    assert passes["widen-logits"] == (pp == 1)
    folders = {path.partition("/")[0] for path in manifest.files if "/" in path}
    assert folders <= {"engines", "kernels", "tokenizer"}  # the plans contain the weights
    said = subprocess.run(
        [sys.executable, "-m", "llmc", "inspect", str(request.output)], capture_output=True, text=True
    )
    assert manifest.ranks is not None
    assert [(rank.first, rank.stop) for rank in manifest.ranks] == [
        (stage * 2 // pp, (stage + 1) * 2 // pp) for stage in range(pp) for _ in range(tp)
    ]
    width, vocabulary = manifest.geometry.hidden_size, manifest.geometry.vocab_size
    if (tp, pp) == (2, 1):  # in 16 bits
        assert (
            f"5 AllReduce and 1 AllGather a step; a rank gives {5 * 2 * width} bytes for a token and "
            f"{vocabulary} bytes for a row of logits"
        ) in said.stdout, said.stdout + said.stderr
    if pp > 1:
        assert f"{2 * width} bytes for a token to the next stage" in said.stdout, said.stdout + said.stderr
        assert f"{4 * vocabulary / 1024:.1f} KiB for a row of logits to rank 0" in said.stdout
    heads = {1: "4 heads", 2: "2 heads", 4: "1 head"}[tp]
    kv_heads = "2 KV heads" if tp == 1 else "1 KV head"
    shown_layers = "layers 0-1" if pp == 1 else r"layer [01]"
    # Ranks whose plans are of different sizes have different lines.
    line = rf"^ranks? (\d)(?:-(\d))? +{shown_layers}, {heads}, {kv_heads}; "
    runs = re.findall(line, said.stdout, re.MULTILINE)
    shown = [rank for first, last in runs for rank in range(int(first), int(last or first) + 1)]
    assert shown == list(range(tp * pp)), said.stdout
    if not options:
        second = compile_model(dataclasses.replace(request, output=tmp_path / "y.llmc")).manifest
        assert json.loads(second.to_json()) == json.loads(manifest.to_json())
