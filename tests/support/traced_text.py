"""A decoder layer as the tracer writes it, in ONNX's text form."""

from __future__ import annotations

import re

import onnx_ir as ir

from support.passes import mark_parameters

TRACED = """<ir_version: 10, opset_import: ["" : 23, "llmc" : 1]>
g (int64[1,T] input_ids, int64[1,T] position_ids) => (float[1,T,5] out)
<float[5,8] embed, float[9,2] cos_table, float[9,2] sin_table, float[8,8] wq, float[4,8] wk, float[4,8] wv,
 float[8,8] wo, float[5,8] head, float[8] norm, float[4] q_norm,
 int64[4] q_shape = {1,-1,2,4}, int64[4] k_shape = {1,-1,1,4}, int64[3] flat = {1,-1,8}>
{
  x = Gather (embed, input_ids)
  cos = Gather (cos_table, position_ids)
  sin = Gather (sin_table, position_ids)
  n = llmc.TracedRMSNorm <epsilon = 1e-5, offset = 1.0, rounds_once = 1> (x, norm)
  q0 = llmc.TracedLinear (n, wq)
  q1 = Reshape (q0, q_shape)
  q2 = Transpose <perm = [0,2,1,3]> (q1)
  q3 = llmc.TracedRMSNorm <epsilon = 1e-5, offset = 0.0, rounds_once = 0> (q2, q_norm)
  q = llmc.TracedRope <interleaved = 0> (q3, cos, sin)
  k0 = llmc.TracedLinear (n, wk)
  k1 = Reshape (k0, k_shape)
  k2 = Transpose <perm = [0,2,1,3]> (k1)
  k = llmc.TracedRope <interleaved = 0> (k2, cos, sin)
  v0 = llmc.TracedLinear (n, wv)
  v1 = Reshape (v0, k_shape)
  v = Transpose <perm = [0,2,1,3]> (v1)
  a = llmc.TracedAttention <scale = 0.5, softcap = 0.0, window = 3, layer = 0> (q, k, v)
  a1 = Reshape (a, flat)
  a2 = llmc.TracedLinear (a1, wo)
  y = Add (x, a2)
  z = llmc.TracedRMSNorm <epsilon = 1e-5, offset = 0.0, rounds_once = 0> (y, norm)
  out = llmc.TracedLinear (z, head)
}"""
SHAPES: dict[str, tuple[int | str, ...]] = {
    **dict.fromkeys(("x", "n", "q0", "a1", "a2", "y", "z"), (1, "T", 8)),
    **dict.fromkeys(("cos", "sin"), (1, "T", 2)),
    **dict.fromkeys(("k0", "v0"), (1, "T", 4)),
    **dict.fromkeys(("q1", "a"), (1, "T", 2, 4)),
    **dict.fromkeys(("k1", "v1"), (1, "T", 1, 4)),
    **dict.fromkeys(("q2", "q3", "q"), (1, 2, "T", 4)),
    **dict.fromkeys(("k2", "k", "v"), (1, 1, "T", 4)),
    "out": (1, "T", 5),
}
FLOAT = ir.TensorType(ir.DataType.FLOAT)
# Tests insert "bk", the bias of wk.
WEIGHTS = {
    name: ir.Shape([int(dim) for dim in dims.split(",")])
    for dims, name in re.findall(r"float\[([\d,]+)\] (\w+)", TRACED + "float[4] bk")
}


def traced(text: str = TRACED) -> ir.Model:
    """Return the text as a model with the shapes that a trace records.

    text: TRACED with changes. All outputs of nodes are float. Names that are not in SHAPES get (1, T, 8).
    """
    model = ir.from_onnx_text(text)
    for node in model.graph:
        for value in node.outputs:
            value.dtype = ir.DataType.FLOAT
            value.shape = ir.Shape(SHAPES.get(str(value.name), (1, "T", 8)))
    for node in model.graph:  # weights: initializers without data, as a trace has them
        for index, given in enumerate(node.inputs):
            if given is None or given.producer() or given.is_graph_input() or given.is_initializer():
                continue
            weight = model.graph.initializers.get(str(given.name))
            if weight is None:
                weight = ir.Value(name=given.name, shape=WEIGHTS[str(given.name)], type=FLOAT)
                model.graph.initializers.add(weight)
            node.replace_input_with(index, weight)
    return mark_parameters(model)
