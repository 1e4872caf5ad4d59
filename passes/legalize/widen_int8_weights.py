"""WidenInt8Weights: keep ONNX Runtime from multiplying int8 weights by INT8 activations in integers.

    before  Gemm(DequantizeLinear(QuantizeLinear(x)), DequantizeLinear(W [N, K], scale [N]))
    after   Gemm(DequantizeLinear(QuantizeLinear(x)), Mul(Cast(W), scale [N, 1]))

ONNX Runtime fuses two DequantizeLinear into an int8 Gemm, whose sums overflow on CPUs without VNNI. Its
option against that, session.x64quantprecision, fails on weight-only layers (1.32, 2026-11-26).
"""

from __future__ import annotations

import onnx_ir as ir

from llmc.passes import edit
from llmc.passes.contract import Matches
from llmc.passes.spec import Stage


class WidenInt8Weights:
    """Widen int8 weights. Counts one match per fp32 Gemm whose input is quantized to int8."""

    name = "widen-int8-weights"
    requires = Stage.QUANTIZED
    ensures = Stage.QUANTIZED

    def __call__(self, model: ir.Model) -> Matches:
        nodes = [node for node in model.graph if _is_int8_product(node)]
        for node in nodes:
            _widen(node)
        return Matches(len(nodes))


def _is_int8_product(node: ir.Node) -> bool:
    if node.op_type != "Gemm":
        return False
    x, weight = (edit.operand(node, index).producer() for index in (0, 1))
    dequantized = [
        producer is not None and producer.op_type == "DequantizeLinear" for producer in (x, weight)
    ]
    return all(dequantized) and x is not None and edit.operand(x, 0).dtype == ir.DataType.INT8


def _widen(node: ir.Node) -> None:
    dequantize = edit.operand(node, 1).producer()
    assert dequantize is not None
    codes, scale = edit.operand(dequantize, 0), edit.operand(dequantize, 1)
    shape, name = edit.dims(codes), str(codes.name)
    wide = edit.cast(node, codes, ir.DataType.FLOAT, f"{name}.cast")
    column = edit.reshape(node, scale, [shape[0], 1], f"{name}.column")
    edit.replace(dequantize, edit.insert(node, "Mul", [wide, column], {}, f"{name}.scaled", shape))
