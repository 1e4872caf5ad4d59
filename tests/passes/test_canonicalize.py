"""Each pass on a small graph: what it makes, what it refuses, that a second run finds nothing."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx_ir as ir
import pytest

from llmc.passes import spec
from llmc.passes.canonicalize.fold_reshapes import FoldReshapes
from llmc.passes.canonicalize.fuse_linears import FuseLinears
from llmc.passes.canonicalize.gather_logits import GatherLogits
from llmc.passes.canonicalize.lower_layers import LowerLinear, LowerRMSNorm
from llmc.passes.canonicalize.lower_rope import LowerRope
from llmc.passes.canonicalize.pack_tokens import PackTokens
from llmc.passes.canonicalize.page_attention import PageAttention
from llmc.passes.canonicalize.sink_transposes import SinkTransposes
from llmc.passes.contract import Matches, Pass, run
from llmc.passes.pipeline import canonicalize
from llmc.runtime.errors import BuildError, UnsupportedError
from support.traced_text import TRACED, traced

BEFORE: list[Pass] = [LowerRope(), SinkTransposes(), PageAttention()]


def ops(model: ir.Model) -> list[str]:
    return [node.op_type for node in model.graph]


def producer(model: ir.Model, name: str, index: int = 0) -> ir.Node:
    """The node that computes input `index` of the node that makes value `name`."""
    node = next(n for n in model.graph if any(v.name == name for v in n.outputs))
    value = node.inputs[index]
    assert value is not None
    found = value.producer()
    assert found is not None
    return found


def test_the_pipeline_makes_a_canonical_graph_with_one_node_a_module() -> None:
    model = traced()
    reports = run(model, canonicalize(), {"lower-linear": 5, "lower-rope": 2})
    assert {report.name: report.matches for report in reports} == {
        "number-tokens": 0,
        "gather-rows": 0,
        "fuse-partial-rope": 0,
        "fold-expands": 0,
        "lower-rope": 2,
        "sink-transposes": 1,
        "page-attention": 1,
        "pack-tokens": 1,
        "lower-head-linears": 0,
        "fold-reshapes": 7,
        "lower-linear": 5,
        "lower-rms-norm": 3,
        "lower-experts": 0,
        "fuse-linears": 1,
        "gather-logits": 1,
    }
    assert spec.check(model, spec.Stage.CANONICAL) == []
    assert ops(model).count("Gemm") == 3
    assert ops(model).count("Reshape") == 7  # cos, sin; q: norm, rope, attention; k: rope, attention
    assert "Transpose" not in ops(model)
    assert [value.name for value in model.graph.inputs] == [
        "input_ids",
        "position_ids",
        "query_start",
        "past_lengths",
        "block_indices",
        "block_begins",
        "key_cache.0",
        "value_cache.0",
        "logits_index",
    ]
    assert [value.name for value in model.graph.outputs] == ["logits", "key_cache_out.0", "value_cache_out.0"]


def test_a_second_run_of_the_pipeline_changes_nothing() -> None:
    model = traced()
    run(model, canonicalize())
    before = ir.to_proto(model).SerializeToString(deterministic=True)
    assert [report.matches for report in run(model, canonicalize())] == [0] * len(canonicalize())
    assert ir.to_proto(model).SerializeToString(deterministic=True) == before


def test_a_norm_after_the_head_transpose_moves_before_it() -> None:
    model = traced()
    assert SinkTransposes()(model).count == 1
    rope = next(node for node in model.graph if node.op_type == "TracedRope")
    assert rope.inputs[0] is not None
    transpose = rope.inputs[0].producer()
    assert transpose is not None
    assert transpose.op_type == "Transpose"
    assert transpose.inputs[0] is not None
    norm = transpose.inputs[0].producer()
    assert norm is not None
    assert norm.op_type == "TracedRMSNorm"
    assert norm.attributes["epsilon"].as_float() == pytest.approx(1e-5)
    assert list(norm.outputs[0].shape or []) == [1, "T", 2, 4]


def test_rope_partial_rotation_is_stated_on_the_operator() -> None:
    model = traced(TRACED.replace("float[9,2]", "float[9,1]"))
    for value in (v for node in model.graph for v in node.outputs if v.name in ("cos", "sin")):
        value.shape = ir.Shape([1, "T", 1])
    LowerRope()(model)
    rope = next(node for node in model.graph if node.op_type == "RotaryEmbedding")
    assert rope.attributes["rotary_embedding_dim"].as_int() == 2
    assert rope.attributes["num_heads"].as_int() == 2


def test_rope_without_a_head_transpose_is_lowered() -> None:
    text = TRACED.replace("(q2, q_norm)", "(q2, q_norm)\n  q4 = Neg (q3)").replace("(q3, cos", "(q4, cos")
    model = traced(text)
    next(v for node in model.graph for v in node.outputs if v.name == "q4").shape = ir.Shape([1, 2, "T", 4])
    assert LowerRope()(model).count == 2
    assert ops(model).count("RotaryEmbedding") == 2


def test_paged_attention_gets_token_major_operands_and_the_traced_attributes() -> None:
    model = traced()
    run(model, BEFORE, {})
    node = next(node for node in model.graph if node.op_type == "PagedAttention")
    assert [list(v.shape or []) for v in node.inputs[:3] if v is not None] == [["T", 8], ["T", 4], ["T", 4]]
    assert {name: attribute.value for name, attribute in node.attributes.items()} == {
        "num_heads": 2,
        "num_kv_heads": 1,
        "scale": 0.5,
        "window": 3,
        "softcap": 0.0,
    }


def test_packing_drops_the_batch_axis_everywhere() -> None:
    model = traced()
    run(model, [*BEFORE, PackTokens()], {})
    activations = [v for node in model.graph for v in node.outputs if "cache" not in str(v.name)]
    assert all(v.shape is not None and v.shape[0] == "T" for v in activations)
    assert [v.dtype for v in model.graph.inputs[:2]] == [ir.DataType.INT32] * 2


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        ("y = NonZero (a2)", "outside the operators llmc knows"),
        ("y = ReduceSum (a2)", "has no rule for packed tokens"),
        ("y = Concat <axis = 0> (x, a2)", "works along the batch axis"),
        ("y = Transpose <perm = [1,0,2]> (a2)", "moves the batch axis"),
        ("y = Expand (a2, flat)", "has no rule for packed tokens"),
    ],
)
def test_an_operator_that_mixes_tokens_is_refused_by_name(line: str, complaint: str) -> None:
    with pytest.raises((UnsupportedError, BuildError), match=complaint):
        run(traced(TRACED.replace("y = Add (x, a2)", line)), canonicalize())


def test_split_axes_follow_the_packed_layout() -> None:
    text = TRACED.replace(
        "y = Add (x, a2)", "h1, h2 = Split <axis = 2, num_outputs = 2> (a2)\n  y = Concat <axis = 2> (h2, h1)"
    )
    model = traced(text)
    for node in model.graph:
        if node.op_type == "Split":
            for value in node.outputs:
                value.shape = ir.Shape([1, "T", 4])
    run(model, canonicalize())
    axes = [n.attributes["axis"].as_int() for n in model.graph if n.op_type in ("Split", "Concat")]
    assert axes == [1, 1, 1]  # q, k, v; and these two


def test_linear_becomes_gemm_on_the_checkpoints_own_weight() -> None:
    model = traced()
    run(model, [*BEFORE, PackTokens(), LowerLinear()], {})
    gemm = next(node for node in model.graph if node.op_type == "Gemm")
    assert [value.name for value in gemm.inputs if value is not None][1] == "wq"
    assert gemm.attributes["transB"].as_int() == 1


def test_a_norm_with_offset_scales_by_weight_plus_one() -> None:
    model = traced()
    run(model, [*BEFORE, PackTokens(), LowerRMSNorm()], {})
    norms = [node for node in model.graph if node.op_type == "RMSNormalization"]
    first = norms[0].inputs[1]
    assert first is not None
    add = first.producer()
    assert add is not None
    assert [str(v.name) for v in add.inputs if v is not None] == ["norm", "offset_FLOAT"]
    assert model.graph.initializers["offset_FLOAT"].const_value is not None
    assert np.array_equal(model.graph.initializers["offset_FLOAT"].const_value.numpy(), np.float32(1))
    assert all(node.inputs[1] is not None and node.inputs[1].producer() is None for node in norms[1:])


def test_reshapes_fold_to_one_or_none() -> None:
    model = traced()
    run(model, [*BEFORE, PackTokens()], {})
    before = ops(model).count("Reshape")
    matches = FoldReshapes()(model)
    assert matches.count > 0
    assert ops(model).count("Reshape") < before
    for node in model.graph:
        if node.op_type == "Reshape":
            source = node.inputs[0]
            assert source is not None
            inner = source.producer()
            assert inner is None or inner.op_type != "Reshape"


def test_layers_that_read_the_same_input_become_one_and_a_split() -> None:
    model = traced()
    run(model, [*BEFORE, PackTokens(), LowerLinear()], {})
    outputs = [str(node.outputs[0].name) for node in model.graph if node.op_type == "Gemm"][:3]
    assert FuseLinears()(model).count == 1
    fused = next(node for node in model.graph if node.op_type == "Gemm")
    assert [str(v.name) for v in fused.inputs if v is not None] == ["n", "wq.weight|wk.weight|wv.weight"]
    assert list(model.graph.initializers["wq.weight|wk.weight|wv.weight"].shape or []) == [16, 8]
    split = next(node for node in model.graph if node.op_type == "Split")
    assert [list(v.shape or []) for v in split.outputs] == [["T", 8], ["T", 4], ["T", 4]]
    assert len(outputs) == 3
    assert not {"wq", "wk", "wv"} & model.graph.initializers.keys()


def test_layers_of_which_some_have_a_bias_are_left_alone_and_reported() -> None:
    model = traced(TRACED.replace("(n, wk)", "(n, wk, bk)"))
    run(model, [*BEFORE, PackTokens(), LowerLinear()], {})
    matches = FuseLinears()(model)
    assert matches.count == 0
    assert "bias" in matches.near_misses[0]


def test_only_wanted_rows_reach_the_last_norm() -> None:
    model = traced()
    run(model, canonicalize())
    norm = producer(model, "logits")
    assert norm.op_type == "RMSNormalization"
    assert norm.inputs[0] is not None
    gather = norm.inputs[0].producer()
    assert gather is not None
    assert gather.op_type == "Gather"
    assert gather.inputs[1] is not None
    assert gather.inputs[1].name == "logits_index"


def test_a_model_that_does_not_end_in_a_linear_layer_is_refused() -> None:
    text = TRACED.replace("out = llmc.TracedLinear (z, head)", "out = Concat <axis = 2> (z, z)")
    with pytest.raises(UnsupportedError, match="does not end in a linear layer"):
        run(traced(text), canonicalize())


def test_fewer_matches_than_the_recipe_expects_is_an_error() -> None:
    with pytest.raises(UnsupportedError, match="lower-rope rewrote 2 of 4 places"):
        run(traced(), canonicalize(), {"lower-rope": 4})


def test_the_runner_notices_a_pass_that_breaks_the_graph() -> None:
    class Careless:
        name, requires, ensures = "careless", spec.Stage.TRACED, spec.Stage.PAGED

        def __call__(self, model: ir.Model) -> Matches:
            return Matches(1)

    with pytest.raises(BuildError, match="after pass careless the graph is not paged: operator TracedRope"):
        run(traced(), [Careless()], {})


def test_a_pass_gets_the_stage_that_it_requires() -> None:
    with pytest.raises(BuildError, match="pass lower-linear requires a packed graph"):
        run(traced(), [LowerLinear()], {})


@pytest.mark.parametrize(
    "make", [SinkTransposes, LowerRope, PageAttention, PackTokens, FoldReshapes, FuseLinears, GatherLogits]
)
def test_a_pass_that_has_run_finds_nothing(make: Callable[[], Pass]) -> None:
    model = traced()
    run(model, canonicalize())
    assert make()(model).count == 0
