"""Large rotary tables become small ones in the graph that TensorRT gets."""

from __future__ import annotations

import functools
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest
from onnx_ir.passes.common import TopologicalSortPass
from transformers import AutoConfig, LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from llmc.compiler import zoo
from llmc.compiler.progress import Silent
from llmc.compiler.targets.base import GRAPH_FILE
from llmc.compiler.targets.tensorrt import build
from llmc.compiler.trace.export import trace
from llmc.compiler.trace.probes import rotary_tables
from llmc.passes import contract, edit
from llmc.passes.legalize import factor_rotary_tables
from llmc.passes.legalize.factor_rotary_tables import BLOCK, UNIT, FactorRotaryTables, factor
from llmc.passes.legalize.finalize import serialize
from llmc.passes.pipeline import canonicalize
from support.passes import lower_for_tensorrt

ROPES: dict[str, dict[str, Any]] = {
    "plain": {"rope_type": "default", "rope_theta": 1e6},
    "llama3": {
        "rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0,
        "high_freq_factor": 4.0, "original_max_position_embeddings": 8192,
    },
    "yarn": {
        "rope_type": "yarn", "rope_theta": 1e4, "factor": 32.0, "original_max_position_embeddings": 4096,
    },
}  # fmt: skip


def tables(rope: str, positions: int, width: int = 128) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """cos and sin [positions, width / 2] as a traced model has them, and its frequencies in fp64."""
    config = LlamaConfig(
        hidden_size=width, num_attention_heads=1, head_dim=width, max_position_embeddings=positions,
        rope_parameters=ROPES[rope],
    )  # fmt: skip
    module = LlamaRotaryEmbedding(config)
    table = rotary_tables("rotary_emb", module, positions)[""]
    return table.cos.numpy(), table.sin.numpy(), module.inv_freq.double().numpy()


# Numerics.


@pytest.mark.parametrize("rope", list(ROPES))
@pytest.mark.parametrize("positions", [40_960, 131_072])
def test_products_are_as_near_to_exact_angles_as_the_whole_tables(rope: str, positions: int) -> None:
    cos, sin, frequency = tables(rope, positions)
    factors = factor(cos, sin)
    assert factors is not None
    scale = float(cos[0, 0])
    assert scale == pytest.approx(1.3466 if rope == "yarn" else 1.0, abs=1e-4)
    squares = np.zeros(2)
    largest = 0.0
    for h, begin in enumerate(range(0, positions, BLOCK)):
        angles = np.arange(begin, begin + BLOCK)[:, None] * frequency
        bound = scale * UNIT * (angles + 16)
        for whole, products, exact in zip(
            (cos, sin), factors.block(h), (np.cos(angles), np.sin(angles)), strict=True
        ):
            rows = whole[begin : begin + BLOCK]
            assert products.dtype == np.float32
            errors = np.abs(rows - scale * exact), np.abs(products - scale * exact)
            assert (errors[1] <= bound).all()
            squares += [np.square(error).sum() for error in errors]
            largest = max(largest, float(np.abs(products - rows).max()))
    assert squares[1] <= 1.05 * squares[0]  # the rms error; 0.96 to 1.02 times were measured
    assert largest <= scale * 2 * UNIT * (positions + 8)  # 4.9e-3 and 1.6e-2 at most, 3.6e-3 and 7.8e-3 seen
    small = sum(table.nbytes for table in vars(factors).values())
    assert small == (BLOCK + positions // BLOCK) * 64 * 8
    assert small < 0.02 * (cos.nbytes + sin.nbytes)


def test_a_context_that_is_no_multiple_of_a_block() -> None:
    cos, sin, _ = tables("plain", 1000)
    factors = factor(cos, sin)
    assert factors is not None
    assert len(factors.high_cos) == 4
    last = factors.block(3)
    np.testing.assert_allclose(last[0][: 1000 - 768], cos[768:], atol=1000 * 2 * UNIT)
    np.testing.assert_allclose(last[1][: 1000 - 768], sin[768:], atol=1000 * 2 * UNIT)


def test_few_rows_are_not_worth_it() -> None:
    cos, sin, _ = tables("plain", 2 * BLOCK + 1)
    assert factor(cos, sin) is not None
    assert factor(cos[:-1], sin[:-1]) is None


@pytest.mark.parametrize("change", ["other frequencies", "another factor", "one element", "no numbers"])
def test_tables_that_are_no_rotation_are_refused(change: str) -> None:
    cos, sin, frequency = tables("plain", 2048)
    if change == "other frequencies":  # from a position on, as LongRoPE's two tables would be
        angles = np.arange(1024, 2048)[:, None] * frequency / 4
        cos[1024:], sin[1024:] = np.cos(angles), np.sin(angles)
    elif change == "another factor":
        cos[:, 5:] *= 1.25
        sin[:, 5:] *= 1.25
    elif change == "one element":
        sin[1500, 40] += 1e-3
    else:
        cos[700, 3] = np.nan
    assert factor(cos, sin) is None


# The graph.


@functools.cache
def canonical(name: str, positions: int) -> ir.Model:
    config = {**zoo.zoo_config(name), "max_position_embeddings": positions}
    model = trace(AutoConfig.for_model(config.pop("model_type"), **config), "bf16", positions).model
    contract.run(model, canonicalize())
    return model


def table_shapes(model: ir.Model) -> dict[str, list[int]]:
    values = model.graph.initializers.values()
    return {str(v.name): edit.dims(v) for v in values if ".rotary_emb." in str(v.name)}


def test_the_graph_before_and_after() -> None:
    model = canonical("llama-tiny", 1024).clone()
    before = Counter(node.op_type for node in model.graph)
    assert table_shapes(model) == {f"model.rotary_emb.{part}_table": [1024, 8] for part in ("cos", "sin")}
    lower_for_tensorrt(model, "bf16")
    assert table_shapes(model) == {
        f"model.rotary_emb.{part}_table.{rows}": [count, 8]
        for part in ("cos", "sin")
        for rows, count in (("high", 4), ("low", BLOCK))
    }
    after = Counter(node.op_type for node in model.graph)
    # Two gathers become four, their rows are multiplied and added; Div, Mul and Sub split the positions; the
    # logits are cast.
    assert after - before == {"Gather": 2, "Div": 1, "Mul": 5, "Sub": 2, "Add": 1, "Cast": 1}
    assert not before - after
    for node in model.graph:
        if node.op_type in ("Div", "Gather"):
            assert edit.operand(node, int(node.op_type == "Gather")).dtype == ir.DataType.INT32
        if node.op_type == "RotaryEmbedding":
            rounded = edit.operand(edit.operand(node, 1).producer(), 0).producer()  # type: ignore[arg-type]
            assert rounded is not None
            assert (rounded.op_type, rounded.outputs[0].dtype) == ("Cast", ir.DataType.BFLOAT16)
            assert edit.operand(rounded, 0).dtype == ir.DataType.FLOAT
    assert FactorRotaryTables()(model).count == 0  # nothing is left to do


def test_two_kinds_of_rope_share_the_split_positions() -> None:
    model = canonical("gemma3-tiny", 1024).clone()
    assert len(table_shapes(model)) == 4
    assert FactorRotaryTables()(model).count == 2
    edit.remove_unused(model)
    assert sorted(size for size, _ in table_shapes(model).values()) == [4] * 4 + [BLOCK] * 4
    counts = Counter(node.op_type for node in model.graph)
    assert (counts["Div"], counts["RotaryEmbedding"]) == (1, 8)


def test_a_short_context_keeps_its_tables() -> None:
    model = canonical("llama-tiny", 2 * BLOCK).clone()
    before = [str(node) for node in model.graph]
    assert FactorRotaryTables()(model).count == 0
    assert [str(node) for node in model.graph] == before


def rotation(positions_dtype: str, cos: np.ndarray, sin: np.ndarray) -> ir.Model:
    """A graph that rotates (1, 0): its output [T, 1, 1, 2 * R] is the cos and the sin of its positions."""
    half = cos.shape[1]
    model = ir.from_onnx_text(
        f"""<ir_version: 10, opset_import: ["" : 23]>
        g ({positions_dtype}[T] position_ids, float[T,1,1,{2 * half}] x) => (float[T,1,1,{2 * half}] y)
          <int64[3] shape = {{-1, 1, {half}}}, float[1,1] cos = {{0}}, float[1,1] sin = {{0}}> {{
          c = Gather <axis = 0> (cos, position_ids)
          s = Gather <axis = 0> (sin, position_ids)
          crows = Reshape (c, shape)
          srows = Reshape (s, shape)
          y = RotaryEmbedding (x, crows, srows)
        }}"""
    )
    for node in model.graph:
        node.outputs[0].dtype = ir.DataType.FLOAT
        node.outputs[0].shape = ir.Shape(["T", half] if node.op_type == "Gather" else ["T", 1, half])
    for name, table in (("cos", cos), ("sin", sin)):
        value = model.graph.initializers[name]
        value.const_value, value.shape = ir.tensor(table, name=name), ir.Shape(table.shape)
    return model


@pytest.mark.parametrize("dtype", ["int32", "int64"])
@pytest.mark.parametrize("rope", list(ROPES))
def test_the_new_graph_gives_cos_and_sin_of_every_position(rope: str, dtype: str) -> None:
    count = 5000
    cos, sin, frequency = tables(rope, count, 32)
    model = rotation(dtype, cos, sin)
    assert FactorRotaryTables()(model).count == 1
    edit.remove_unused(model)
    TopologicalSortPass()(model)
    positions = np.random.default_rng(0).permutation(count).astype(dtype)
    x = np.zeros((count, 1, 1, 32), np.float32)
    x[..., :16] = 1
    session = ort.InferenceSession(serialize(model), providers=["CPUExecutionProvider"])
    got = np.asarray(session.run(None, {"position_ids": positions, "x": x})[0]).reshape(count, 32)
    angles = positions[:, None] * frequency
    exact = np.concatenate((np.cos(angles), np.sin(angles)), 1) * float(cos[0, 0])
    assert (np.abs(got - exact) <= cos[0, 0] * UNIT * (np.tile(angles, 2) + 16)).all()


# The engine.


def plan_bytes(model: ir.Model, directory: Path) -> tuple[int, bytes]:
    """Size and content of the engine of a lowered graph, with random weights in the graph's own file."""
    rng = np.random.default_rng(0)
    for value in model.graph.initializers.values():
        if value.const_value is None:
            assert value.dtype is not None
            drawn = rng.standard_normal(edit.dims(value)).astype(value.dtype.numpy())
            value.const_value = ir.tensor(drawn, name=value.name)
    directory.mkdir()
    graph, plan = directory / GRAPH_FILE, directory / "rank0.plan"
    graph.write_bytes(serialize(model))
    profile = build.profile(model, build.EngineLimits(40_960, 512, 16))
    job = build.EngineJob("tensorrt_rtx", str(graph), str(plan), profile, (89,))
    built = build.build(job, Silent())
    assert built.attention_layers == 2
    return built.plan_bytes, plan.read_bytes()


@pytest.mark.slow
@pytest.mark.skipif(
    not build.is_installed("tensorrt_rtx"), reason="the package tensorrt-rtx is not installed"
)
def test_the_engine_is_smaller_by_the_tables(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = 40_960 * 8 * 2 * 4
    model = canonical("llama-tiny", 40_960).clone()
    lower_for_tensorrt(model, "bf16")
    small, plan = plan_bytes(model, tmp_path / "small")
    assert plan == plan_bytes(model, tmp_path / "again")[1]
    monkeypatch.setattr(factor_rotary_tables, "factor", lambda cos, sin: None)
    model = canonical("llama-tiny", 40_960).clone()
    lower_for_tensorrt(model, "bf16")
    large, _ = plan_bytes(model, tmp_path / "large")
    assert large - small > 0.95 * whole
