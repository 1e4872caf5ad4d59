"""int8 weights beside rounded activations, for ONNX Runtime: the same numbers, in a form not fused there.

    before  Gemm(DequantizeLinear(QuantizeLinear(x)), DequantizeLinear(W [N, K], scale [N]))
    after   Gemm(DequantizeLinear(QuantizeLinear(x)), Mul(Cast(W), scale [N, 1]))

Of two DequantizeLinear it would make an int8 product, whose sums overflow on CPUs without VNNI (its own
option against that, session.x64quantprecision, fails on layers with weights alone; 1.32, 2026-11-26).
"""

from __future__ import annotations

import onnx_ir as ir

from llmc.passes import edit


def widen_int8_weights(model: ir.Model) -> None:
    """Rewrites the weights of fp32 Gemms whose inputs are rounded to int8, in place."""
    for node in list(model.graph):
        if node.op_type != "Gemm":
            continue
        last = edit.operand(node, 0).producer()
        if last is None or last.op_type != "DequantizeLinear":
            continue
        if edit.operand(last, 0).dtype == ir.DataType.INT8:
            _widen(node)


def _widen(node: ir.Node) -> None:
    last = edit.operand(node, 1).producer()
    assert last is not None
    codes, scale = edit.operand(last, 0), edit.operand(last, 1)
    shape, name = edit.dims(codes), str(codes.name)
    wide = edit.insert(node, "Cast", [codes], {"to": ir.DataType.FLOAT.value}, f"{name}.cast", shape)
    wide.dtype = ir.DataType.FLOAT
    column = edit.reshape(node, scale, [shape[0], 1], f"{name}.column")
    edit.replace(last, edit.insert(node, "Mul", [wide, column], {}, f"{name}.scaled", shape))
