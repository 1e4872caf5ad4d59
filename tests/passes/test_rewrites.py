"""Each rewrite behind the canonical graph on a few nodes: before, after, and that a second run finds nothing.

A line of the graph after it is `output dtype = operator inputs`.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
import pytest

from llmc.passes import contract
from llmc.passes.contract import Pass
from llmc.passes.legalize.attach_bodies import AttachBodies
from llmc.passes.legalize.drop_activation_quantization import DropActivationQuantization
from llmc.passes.legalize.emulate_16bit import RoundOutputs, RoundSoftmax, WidenCaches
from llmc.passes.legalize.keep_16bit_weights import Keep16BitWeights, Narrow, NarrowPlan
from llmc.passes.legalize.mxfp4_weights import DoubleFP4Weights, FloatScales
from llmc.passes.legalize.require_dtype import RequireDtype
from llmc.passes.legalize.unname_dims import UnnameDims
from llmc.passes.legalize.unpack_fp4_weights import UnpackFP4Weights
from llmc.passes.legalize.widen_int8_weights import WidenInt8Weights
from llmc.passes.legalize.widen_logits import WidenLogits
from llmc.passes.legalize.widen_norms import WidenNorms
from llmc.passes.legalize.widen_quantized_caches import WidenQuantizedCaches
from llmc.passes.parameter import parameter
from llmc.passes.quantize.formats import get_format
from llmc.passes.quantize.plan import Module, QuantPlan
from llmc.passes.quantize.quantize_kv_cache import QuantizeKVCache
from llmc.passes.quantize.quantize_linears import QuantizeLinears
from llmc.passes.quantize.untie_head import UntieHead
from llmc.passes.spec import ROUNDS_ONCE
from llmc.plugins.paged_attention.spec import QUANTIZED_CACHES
from support.passes import mark_parameters

BF16 = ir.DataType.BFLOAT16
HEAD = '<ir_version: 10, opset_import: ["" : 23, "llmc" : 1]> '


def graph(text: str) -> ir.Model:
    """The model of a text; values that no node makes and that have no data become parameters."""
    logging.getLogger("onnx_ir").setLevel(logging.ERROR)
    model = ir.from_onnx_text(HEAD + text)
    for node in model.graph:
        for value in node.inputs:
            if value is None or value.producer() or value.is_graph_input() or value.is_initializer():
                continue
            model.graph.initializers.add(value)
    return mark_parameters(model)


def lines(model: ir.Model) -> list[str]:
    return [
        f"{' '.join(f'{v.name} {v.dtype}' for v in node.outputs)} = {node.op_type} "
        + " ".join(str(value.name) if value else "-" for value in node.inputs)
        for node in model.graph
    ]


def plan(format: str, **fields: bool) -> QuantPlan:
    fmt = get_format(format)
    return QuantPlan(fmt, (Module("w", (4, 32), fmt, "", ("w",), **fields),), 16, 0)


@dataclass(frozen=True)
class Case:
    """matches: of the first run."""

    rewrite: Pass
    before: str
    after: str
    matches: int = 1


LINEAR = "g (float[T,32] x) => (float[T,4] y) <float[4,32] w> { y = Gemm <transB = 1> (x, w) }"
ATTENTION = """g (DT[T,8] q, DT[T,4] k, DT[T,4] v, CT[blocks,1,32,4] "key_cache.0",
  CT[blocks,1,32,4] "value_cache.0",
  int32[a] s, int32[b] p, int32[c] i, int32[d] o)
  => (DT[T,8] y, CT[blocks,1,32,4] "key_out.0", CT[blocks,1,32,4] "value_out.0") {
  y, "key_out.0", "value_out.0" = llmc.PagedAttention
    <num_heads = 2, num_kv_heads = 1, scale = 0.5, window = 0, softcap = 0.0 MORE>
    (q, k, v, "key_cache.0", "value_cache.0", s, p, i, o) }"""


def attention(dtype: str, cache: str, more: str = "") -> str:
    return ATTENTION.replace("DT", dtype).replace("CT", cache).replace("MORE", more)


SAME = "y {0} key_out.0 {1} value_out.0 {1} = PagedAttention q k v key_cache.0 value_cache.0 s p i o"
CASES = {
    "untie-head": Case(
        UntieHead(plan("int8", tied=True)),
        """g (int32[T] ids, float[T,32] x) => (float[T,32] e, float[T,4] y) <float[4,32] w> {
          e = Gather (w, ids)
          [w] y = Gemm <transB = 1> (x, w) }""",
        """e FLOAT = Gather w ids
        y FLOAT = Gemm x w.weight""",
    ),
    "quantize-linears int8": Case(
        QuantizeLinears(plan("int8")),
        LINEAR,
        """w.wide FLOAT = DequantizeLinear w w.weight_scale
        y FLOAT = Gemm x w.wide""",
    ),
    "quantize-linears int4": Case(
        QuantizeLinears(plan("int4")),
        LINEAR,
        """w.weight_scale.cast FLOAT = Cast w.weight_scale
        w.wide FLOAT = DequantizeLinear w w.weight_scale.cast
        y FLOAT = Gemm x w.wide""",
    ),
    "quantize-linears fp8": Case(
        QuantizeLinears(plan("fp8")),
        LINEAR,
        """w.wide FLOAT = DequantizeLinear w w.weight_scale
        w.input_scale.codes FLOAT8E4M3FN = QuantizeLinear x w.input_scale
        w.input_scale.rounded FLOAT = DequantizeLinear w.input_scale.codes w.input_scale
        y FLOAT = Gemm w.input_scale.rounded w.wide""",
    ),
    "quantize-linears nvfp4": Case(
        QuantizeLinears(plan("nvfp4")),
        LINEAR,
        """w.weight_scale.wide FLOAT = DequantizeLinear w.weight_scale w.weight_scale_2
        w.wide FLOAT = DequantizeLinear w w.weight_scale.wide
        w.input_scale.rounded FLOAT = RoundFP4 x w.input_scale
        y FLOAT = Gemm w.input_scale.rounded w.wide""",
    ),
    "quantize-kv-cache": Case(
        QuantizeKVCache(QUANTIZED_CACHES["fp8"]),
        attention("bfloat16", "bfloat16"),
        SAME.format("BFLOAT16", "FLOAT8E4M3FN"),
    ),
    "keep-16bit-weights": Case(
        Keep16BitWeights(NarrowPlan({"w.weight": Narrow("fp16", 3), "e.weight": Narrow("bf16")})),
        """g (int32[T] ids, float[T,32] x) => (float[T,8] r, float[T,4] y) <float[4,32] w, float[9,8] e,
          float[T,8] rows> {
          rows = Gather (e, ids)
          r = Neg (rows)
          y = Gemm <transB = 1> (x, w) }""",
        """rows BFLOAT16 = Gather e ids
        rows.wide FLOAT = Cast rows
        r FLOAT = Neg rows.wide
        w.wide FLOAT = Cast w
        y.input FLOAT = Mul x two_to_-3
        y FLOAT = Gemm y.input w.wide""",
        2,
    ),
    "unpack-fp4-weights": Case(
        UnpackFP4Weights(),
        """g (float[T,32] x) => (float[T,4] y) <float4e2m1[4,32] w, float[4,2] s, float[4,32] d> {
          d = DequantizeLinear <axis = 1, block_size = 16> (w, s)
          y = Gemm <transB = 1> (x, d) }""",
        """w.BitwiseAnd_2_16 UINT8 = BitwiseAnd w fp4_low_bits
        w.BitShift_2_16 UINT8 = BitShift w fp4_bits
        w.BitwiseAnd_2_16.column UINT8 = Unsqueeze w.BitwiseAnd_2_16 fp4_last_axis
        w.BitShift_2_16.column UINT8 = Unsqueeze w.BitShift_2_16 fp4_last_axis
        w.Concat_3_2 UINT8 = Concat w.BitwiseAnd_2_16.column w.BitShift_2_16.column
        w.Cast_3_2 INT32 = Cast w.Concat_3_2
        w.Gather_3_2 FLOAT = Gather fp4_values w.Cast_3_2
        w.blocks FLOAT = Reshape w.Gather_3_2 shape_4_2_16
        w.factors FLOAT = Reshape s shape_4_2_1
        w.Mul_3_16 FLOAT = Mul w.blocks w.factors
        w.unpacked FLOAT = Reshape w.Mul_3_16 shape_4_32
        y FLOAT = Gemm x w.unpacked""",
    ),
    "widen-int8-weights": Case(
        WidenInt8Weights(),
        """g (float[T,32] x) => (float[T,4] y) <int8[4,32] w, float[4] s, float[4,32] d, float z,
          int8[T,32] c, float[T,32] r> {
          d = DequantizeLinear <axis = 0> (w, s)
          c = QuantizeLinear (x, z)
          r = DequantizeLinear (c, z)
          y = Gemm <transB = 1> (r, d) }""",
        """c INT8 = QuantizeLinear x z
        r FLOAT = DequantizeLinear c z
        w.cast FLOAT = Cast w
        w.column FLOAT = Reshape s shape_4_1
        w.scaled FLOAT = Mul w.cast w.column
        y FLOAT = Gemm r w.scaled""",
    ),
    "drop-activation-quantization": Case(
        DropActivationQuantization(),
        """g (float[T,32] x) => (float[T,4] y, float[T,4] u) <float[4,32] w, float z, int8[T,32] c,
          float[T,32] r, float[T,32] f> {
          c = QuantizeLinear (x, z)
          r = DequantizeLinear (c, z)
          y = Gemm <transB = 1> (r, w)
          f = llmc.RoundFP4 (x, z)
          u = Gemm <transB = 1> (f, w) }""",
        """y FLOAT = Gemm x w
        u FLOAT = Gemm x w""",
        2,
    ),
    "widen-quantized-caches": Case(
        WidenQuantizedCaches(),
        attention("bfloat16", "float8e4m3fn", ", key_scale = 0.5, value_scale = 2.0"),
        """.key.wide FLOAT = Cast k
        .key.scaled FLOAT = Div .key.wide .key_scale
        .key.codes FLOAT8E4M3FN = Cast .key.scaled
        .key.values FLOAT = Cast .key.codes
        .key.rounded FLOAT = Mul .key.values .key_scale
        .value.wide FLOAT = Cast v
        .value.scaled FLOAT = Div .value.wide .value_scale
        .value.codes FLOAT8E4M3FN = Cast .value.scaled
        .value.values FLOAT = Cast .value.codes
        .value.rounded FLOAT = Mul .value.values .value_scale
        y BFLOAT16 key_out.0 FLOAT value_out.0 FLOAT = PagedAttention q .key.rounded .value.rounded """
        "key_cache.0 value_cache.0 s p i o",
    ),
    "double-fp4-weights": Case(
        DoubleFP4Weights(),
        """g (float[T,64] x) => (float[T,4] y) <float4e2m1[4,64] w, float8e8m0[4,2] s, float[4,64] d> {
          d = DequantizeLinear <axis = 1, block_size = 32, output_dtype = 1> (w, s)
          y = Gemm <transB = 1> (x, d) }""",
        """d FLOAT = DequantizeLinear w s
        y FLOAT = Gemm x d""",
    ),
    "float-scales": Case(
        FloatScales(),
        """g (float16[T,64] x) => (float16[T,4] y) <float4e2m1[4,64] w, float8e8m0[4,2] s, float16[4,64] d> {
          d = DequantizeLinear <axis = 1, block_size = 32, output_dtype = 10> (w, s)
          y = Gemm <transB = 1> (x, d) }""",
        """d FLOAT = DequantizeLinear w s
        d.narrow FLOAT16 = Cast d
        y FLOAT16 = Gemm x d.narrow""",
    ),
    "require-dtype": Case(
        RequireDtype(BF16, "bf16"), attention("bfloat16", "bfloat16"), SAME.format("BFLOAT16", "BFLOAT16"), 0
    ),
    "widen-norms": Case(
        WidenNorms(),
        """g (bfloat16[T,8] x) => (bfloat16[T,8] y) <bfloat16[8] w, bfloat16 one = {1}, bfloat16[8] a> {
          a = Add (w, one)
          [n] y = RMSNormalization <axis = -1, epsilon = 1e-6> (x, a) }""",
        """n.wide_weight FLOAT = Cast w
        n.wide_scale FLOAT = Add n.wide_weight one_wide
        n.wide_x FLOAT = Cast x
        n.wide FLOAT = RMSNormalization n.wide_x n.wide_scale
        y BFLOAT16 = Cast n.wide""",
    ),
    "widen-logits": Case(
        WidenLogits(),
        """g (bfloat16[T,8] x) => (bfloat16[T,8] logits) { logits = Neg (x) }""",
        """logits FLOAT = Cast logits_narrow
        logits_narrow BFLOAT16 = Neg x""",
    ),
    "unname-dims": Case(
        UnnameDims(), "g (float[T,8] x, float[N,8] z) => (float[T,8] y) { y = Neg (x) }", "y FLOAT = Neg x"
    ),
    "attach-bodies": Case(
        AttachBodies(), attention("float", "float"), SAME.format("FLOAT", "FLOAT")
    ),
    "widen-caches": Case(WidenCaches(BF16), attention("float", "bfloat16"), SAME.format("FLOAT", "FLOAT"), 4),
    "round-outputs": Case(
        RoundOutputs(BF16),
        """g (bfloat16[T,8] x) => (float[T,8] y) <bfloat16[8] w, bfloat16[T,8] n> {
          n = RMSNormalization <axis = -1, epsilon = 1e-6> (x, w)
          y = Cast <to = 1> (n) }""",
        """x.in_fp32 FLOAT = Cast x
        w.in_fp32 FLOAT = Cast w
        n.normal FLOAT = RMSNormalization x.in_fp32 ones_8
        n.normal_rounded BFLOAT16 = Cast n.normal
        n.normal_in_fp32 FLOAT = Cast n.normal_rounded
        n.scaled FLOAT = Mul n.normal_in_fp32 w.in_fp32
        n.rounded BFLOAT16 = Cast n.scaled
        y FLOAT = Cast n.rounded""",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_a_graph_before_and_after(name: str) -> None:
    case = CASES[name]
    model = graph(case.before)
    matches = case.rewrite(model)
    assert (matches.count, matches.near_misses) == (case.matches, [])
    assert lines(model) == [line.strip() for line in case.after.splitlines()]
    once = contract.as_text(model)
    assert case.rewrite(model).count == 0
    assert contract.as_text(model) == once


def test_what_lines_do_not_show() -> None:
    kept = graph(CASES["keep-16bit-weights"].before)
    CASES["keep-16bit-weights"].rewrite(kept)
    weight = kept.graph.initializers["w"]
    record = parameter(weight)
    assert record is not None
    assert (weight.dtype, record.exponent) == (ir.DataType.FLOAT16, 3)
    factor = kept.graph.initializers["two_to_-3"].const_value
    assert factor is not None
    assert factor.numpy() == np.float32(0.125)

    cache = graph(CASES["quantize-kv-cache"].before)
    CASES["quantize-kv-cache"].rewrite(cache)
    attributes = cache.graph[0].attributes
    assert [attributes[name].as_float() for name in ("key_scale", "value_scale")] == [1.0, 1.0]
    assert {value.dtype for value in cache.graph.inputs[3:5]} == {ir.DataType.FLOAT8E4M3FN}

    doubled = graph(CASES["double-fp4-weights"].before)
    CASES["double-fp4-weights"].rewrite(doubled)
    records = [parameter(value) for value in doubled.graph.initializers.values()]
    assert [(one.exponent, one.packed) for one in records if one] == [(1, "e2m1"), (-1, "")]
    types = [value.dtype for value in doubled.graph.initializers.values()]
    assert types == [ir.DataType.INT8, ir.DataType.FLOAT]

    unnamed = graph(CASES["unname-dims"].before)
    CASES["unname-dims"].rewrite(unnamed)
    assert [str(value.shape) for value in unnamed.graph.inputs] == ["[T,8]", "[None,8]"]


def test_a_norm_without_an_offset_is_widened_if_it_is_marked() -> None:
    text = """g (bfloat16[T,8] x) => (bfloat16[T,8] y) <bfloat16[8] w> {
      [n] y = RMSNormalization <axis = -1, epsilon = 1e-6> (x, w) }"""
    model = graph(text)
    assert WidenNorms()(model).count == 0
    model.graph[0].metadata_props[ROUNDS_ONCE] = "1"
    assert WidenNorms()(model).count == 1
    assert lines(model) == [
        "n.wide_weight FLOAT = Cast w",
        "n.wide_x FLOAT = Cast x",
        "n.wide FLOAT = RMSNormalization n.wide_x n.wide_weight",
        "y BFLOAT16 = Cast n.wide",
    ]
    assert WidenNorms()(model).count == 0


def test_a_body_carries_the_rounding_of_the_softmax() -> None:
    model = graph(attention("float", "float"))
    AttachBodies()(model)
    (body,) = model.functions.values()
    before = [node.op_type for node in body]
    assert RoundSoftmax(BF16)(model).count == 1
    after = [node.op_type for node in body]
    place = before.index("Softmax") + 1
    assert after == [*before[:place], "Cast", "Cast", *before[place:]]
    assert RoundSoftmax(BF16)(model).count == 0


def test_a_matrix_that_something_else_reads_is_a_near_miss() -> None:
    model = graph(
        LINEAR.replace("{ y", "{ u = Neg (w) y").replace("float[T,4] y", "float[T,4] y, float[4,32] u")
    )
    matches = Keep16BitWeights(NarrowPlan({"w.weight": Narrow("fp16")}))(model)
    assert matches.count == 0
    assert "w.weight" in matches.near_misses[0]


def test_a_planned_layer_that_the_graph_lacks_is_a_near_miss() -> None:
    model = graph(LINEAR.replace("w", "other"))
    matches = QuantizeLinears(plan("int8"))(model)
    assert matches.count == 0
    assert matches.near_misses == ["w: no such linear layer"]
