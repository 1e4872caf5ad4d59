"""The forms in which model code writes rope, heads and positions become the form that later passes know."""

from __future__ import annotations

import logging

import onnx_ir as ir
import pytest

from llmc.passes import spec
from llmc.passes.canonicalize.fold_expands import FoldExpands
from llmc.passes.canonicalize.fuse_partial_rope import FusePartialRope
from llmc.passes.canonicalize.gather_rows import GatherRows
from llmc.passes.canonicalize.number_tokens import NumberTokens
from llmc.passes.canonicalize.pack_tokens import PackTokens
from llmc.passes.canonicalize.sink_transposes import SinkTransposes
from llmc.passes.contract import Pass
from llmc.runtime.errors import UnsupportedError

HEAD = '<ir_version: 10, opset_import: ["" : 23, "llmc" : 1]> '
INDICES = "int64[1] zero = {0}, int64[1] two = {2}, int64[1] last = {3}, int64[1] end = {9223372036854775807}"


def graph(text: str) -> ir.Model:
    logging.getLogger("onnx_ir").setLevel(logging.ERROR)
    return ir.from_onnx_text(HEAD + text)


def rewritten(rewrite: Pass, text: str, matches: int = 1) -> list[str]:
    """Run a pass twice and return the graph, a line a node: `operator inputs`."""
    model = graph(text)
    assert rewrite(model).count == matches
    once = [
        " ".join([node.op_type, *(str(v.name) for v in node.inputs if v is not None)]) for node in model.graph
    ]
    assert rewrite(model).count == 0
    assert len(once) == len(list(model.graph))
    return once


def partial_rope(first: str, second: str) -> str:
    return f"""g (float[1,2,T,8] x, float[1,T,1] cos, float[1,T,1] sin) => (float[1,2,T,8] y)
      <{INDICES}, float[1,2,T,2] a, float[1,2,T,6] b, float[1,2,T,2] r> {{
      a = Slice (x, {first}, last)
      b = Slice (x, {second}, last)
      r = llmc.TracedRope <interleaved = 0> (a, cos, sin)
      y = Concat <axis = -1> (r, b) }}"""


def test_slices_around_rope_become_a_rope_of_the_first_features() -> None:
    assert rewritten(FusePartialRope(), partial_rope("zero, two", "two, end")) == ["TracedRope x cos sin"]


def test_rope_of_other_features_stays_and_is_reported() -> None:
    model = graph(partial_rope("two, end", "zero, two"))
    matches = FusePartialRope()(model)
    assert matches.count == 0
    assert "not the first" in matches.near_misses[0]


def test_rope_by_token_becomes_rope_by_head() -> None:
    text = f"""g (float[1,T,2,8] x, float[1,T,1] cos, float[1,T,1] sin) => (float[1,T,2,8] y)
      <{INDICES}, float[1,T,2,2] a, float[1,T,2,6] b, float[1,2,T,2] h, float[1,2,T,2] r, float[1,T,2,2] t> {{
      a = Slice (x, zero, two, last)
      b = Slice (x, two, end, last)
      h = Transpose <perm = [0,2,1,3]> (a)
      r = llmc.TracedRope <interleaved = 1> (h, cos, sin)
      t = Transpose <perm = [0,2,1,3]> (r)
      y = Concat <axis = 3> (t, b) }}"""
    assert [line.split()[0] for line in rewritten(FusePartialRope(), text)] == [
        "Transpose",
        "TracedRope",
        "Transpose",
    ]


def test_an_index_along_the_first_axis_becomes_gather() -> None:
    text = """g (float[9,4] table, int64[1,T] ids) => (float[1,T,4] y)
      <int64[1] axis = {-1}, int64[1,T,1] i> {
      i = Unsqueeze (ids, axis)
      y = GatherND (table, i) }"""
    assert rewritten(GatherRows(), text) == ["Gather table ids"]


def test_whole_rows_of_gather_elements_become_gather() -> None:
    text = """g (int64[1,T] ids) => (float[1,T,2] y)
      <float[1,3,2] table = {0,1,2,3,4,5}, int64[1] axis = {-1}, int64[3] repeats = {1,1,2},
       int64[1,T,1] i, int64[1,T,2] j> {
      i = Unsqueeze (ids, axis)
      j = Tile (i, repeats)
      y = GatherElements <axis = 1> (table, j) }"""
    assert rewritten(GatherRows(), text) == ["Gather table_rows ids"]


def counted(start: int, step: int, tokens: str = "T") -> str:
    return f"""g (int64[1,T] position_ids, int64 count) => (int64[{tokens}] y)
      <int64 start = {{{start}}}, int64 step = {{{step}}}> {{ y = Range (start, count, step) }}"""


def test_numbers_of_tokens_are_their_positions() -> None:
    assert rewritten(NumberTokens(), counted(0, 1)) == ["Reshape position_ids shape_-1"]


@pytest.mark.parametrize("text", [counted(1, 1), counted(0, 2), counted(0, 1, "S")])
def test_other_ranges_are_refused_by_name(text: str) -> None:
    model = graph(text)
    assert NumberTokens()(model).count == 0
    with pytest.raises(UnsupportedError, match="operator Range of module"):
        FoldExpands()(model)


def test_other_gathers_are_refused_by_name() -> None:
    text = """g (float[9,4] table, int64[1,T,2] i) => (float[1,T] y) { y = GatherND (table, i) }"""
    model = graph(text)
    assert GatherRows()(model).count == 0
    with pytest.raises(UnsupportedError, match="operator GatherND of module"):
        FoldExpands()(model)


def test_a_broadcast_before_an_addition_goes() -> None:
    text = """g (float[1,T,4] x, float[4] b) => (float[1,T,4] y)
      <int64[1] one = {1}, int64[1] four = {4}, int64[1] t, int64[3] s, float[1,T,4] e> {
      t = Shape <start = 1, end = 2> (x)
      s = Concat <axis = 0> (one, t, four)
      e = Expand (b, s)
      y = Add (x, e) }"""
    assert rewritten(FoldExpands(), text) == ["Add x b"]


def test_repeated_heads_are_read_once() -> None:
    text = """g (float[1,4,T,8] q, float[1,T,2,1,8] k, float[1,T,2,1,8] v) => (float[1,T,4,8] y)
      <int64[5] s = {1,1,2,2,8}, int64[4] f = {1,-1,4,8}, float[1,T,2,2,8] k1, float[1,T,4,8] k2,
       float[1,4,T,8] k3, float[1,T,2,2,8] v1, float[1,T,4,8] v2, float[1,4,T,8] v3> {
      k1 = Expand (k, s)
      k2 = Reshape (k1, f)
      k3 = Transpose <perm = [0,2,1,3]> (k2)
      v1 = Expand (v, s)
      v2 = Reshape (v1, f)
      v3 = Transpose <perm = [0,2,1,3]> (v2)
      y = llmc.TracedAttention <scale = 1.0, softcap = 0.0, window = 0, layer = 0> (q, k3, v3) }"""
    model = graph(text)
    assert FoldExpands()(model).count == 1
    assert [node.op_type for node in model.graph] == ["Reshape", "Transpose"] * 2 + ["TracedAttention"]
    attention = list(model.graph)[-1]
    assert [list(v.shape or [])[1] for v in attention.inputs if v is not None] == [4, 2, 2]


SINKS = {  # the nodes before, the nodes after, the number of moved operators
    "a LayerNorm over the features": (
        "h = Transpose <perm = [0,2,1,3]> (x)\n y = LayerNormalization <axis = -1> (h, w)",
        ["LayerNormalization", "Transpose"],
        1,
    ),
    "a norm for every head": (
        """h = Transpose <perm = [0,2,1,3]> (x)
        a, b = Split <axis = 1, num_outputs = 2> (h)
        c = LayerNormalization <axis = -1> (a, w)
        y = Concat <axis = 1> (c, b)""",
        ["Split", "LayerNormalization", "Concat", "Transpose"],
        3,
    ),
    "two transposes": ("h = Transpose <perm = [0,2,1,3]> (x)\n y = Transpose <perm = [0,2,1,3]> (h)", [], 0),
}


@pytest.mark.parametrize(("nodes", "after", "moved"), SINKS.values(), ids=SINKS)
def test_head_transposes_sink(nodes: str, after: list[str], moved: int) -> None:
    text = f"""g (float[1,T,2,8] x) => (float[1,2,T,8] y) <float[8] w = {{1,1,1,1,1,1,1,1}},
      float[1,2,T,8] h, float[1,1,T,8] a, float[1,1,T,8] b, float[1,1,T,8] c> {{ {nodes} }}"""
    lines = rewritten(SinkTransposes(), text, moved)
    assert [line.split()[0] for line in lines] == after


def test_the_axis_of_a_single_head_is_a_reshape() -> None:
    text = """g (float[1,T,12] x) => (float[1,T,2,4] q, float[1,1,T,4] k) <int64[1] axis = {1},
      int64[2] sizes = {8,4}, int64[4] shape = {1,-1,2,4}, float[1,1,T,12] u, float[1,1,T,8] a> {
      u = Unsqueeze (x, axis)
      a, k = Split <axis = 3> (u, sizes)
      q = Reshape (a, shape) }"""
    model = graph(text)
    assert SinkTransposes()(model).count == 1
    assert [node.op_type for node in model.graph] == ["Reshape", "Split", "Transpose", "Reshape"]


POSITIONS = """g (int64[1,T] input_ids, int64[1,T] position_ids) => (float[1,T,4] y)
  <float[9,4] table, int64 offset = {2}, int64[1,T] p> {
  p = Add (position_ids, offset)
  y = Gather (table, p) }"""


def test_what_is_added_to_positions_becomes_int32_with_them() -> None:
    model = graph(POSITIONS)
    PackTokens()(model)
    add = next(node for node in model.graph if node.op_type == "Add")
    dtypes = [value.dtype for value in (*add.inputs, *add.outputs) if value is not None]
    assert dtypes == [ir.DataType.INT32] * 3
    assert spec.check(model, spec.Stage.TRACED) == []


def test_constants_beyond_int32_are_refused() -> None:
    model = graph(POSITIONS.replace("{2}", "{4294967296}"))
    with pytest.raises(UnsupportedError, match="needs 64-bit integers"):
        PackTokens()(model)


def test_a_stage_allows_one_element_type_an_operator() -> None:
    model = graph(POSITIONS)
    model.graph.inputs[1].type = ir.TensorType(ir.DataType.INT32)
    problems = spec.check(model, spec.Stage.TRACED)
    assert any("mixes the element types INT32 and INT64" in problem for problem in problems)


@pytest.mark.parametrize(
    ("node", "message"),
    [
        ("Gather <axis = -3> (x, zero)", "along the batch axis"),
        ("LayerNormalization <axis = -3> (x, x)", "along the batch axis"),
        ("Softmax <axis = -3> (x)", "along the batch axis"),
        ("Concat <axis = -3> (x, x)", "along the batch axis"),
        ("Slice (x, zero, one, axes)", "changes the batch axis"),
        ("Unsqueeze (x, four)", "changes the batch axis"),
        ("Squeeze (x, axes)", "removes the batch axis"),
        ("Gather <axis = 1> (x, last)", "removes the batch axis or the tokens"),
    ],
)
def test_a_batch_axis_is_refused_by_any_number(node: str, message: str) -> None:
    shape = {"Unsqueeze": "[1,1,T,4]", "Squeeze": "[T,4]"}.get(node.split()[0], "[1,T,4]")
    shape = "[1,4]" if "last" in node else shape
    model = graph(f"""g (int64[1,T] input_ids, int64[1,T] position_ids) => (float{shape} y)
      <float[9,4] table, int64[1] zero = {{0}}, int64[1] one = {{1}}, int64 last = {{-1}},
       int64[1] axes = {{-3}}, int64[1] four = {{-4}}, float[1,T,4] x> {{
      x = Gather <axis = 0> (table, input_ids)
      y = {node} }}""")
    with pytest.raises(UnsupportedError, match=message):
        PackTokens()(model)


@pytest.mark.parametrize(
    ("node", "after"), [("Gather <axis = 2> (x, i)", 1), ("LayerNormalization <axis = 2> (x, w)", 1)]
)
def test_axes_follow_the_packed_layout(node: str, after: int) -> None:
    text = f"""g (int64[1,T] input_ids, int64[1,T] position_ids) => (float[1,T,4] y)
      <float[9,4] table, int64[4] i = {{3,2,1,0}}, float[4] w = {{1,1,1,1}}, float[1,T,4] x> {{
      x = Gather <axis = 0> (table, input_ids)
      y = {node} }}"""
    model = graph(text)
    PackTokens()(model)
    assert [n.attributes["axis"].as_int() for n in model.graph] == [0, after]
    assert list(model.graph.outputs[0].shape or []) == ["T", 4]
