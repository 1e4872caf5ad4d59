"""`llmc.Experts` as a function of standard ONNX operators, which any ONNX runtime executes in fp32.

It computes all experts for all tokens and gives those that were not chosen the weight 0. This takes E / K
times the arithmetic of an engine, which computes only the chosen ones.
"""

from __future__ import annotations

from typing import Any

import onnx_ir as ir
import onnxscript
from onnxscript import opset23 as op

from llmc.plugins.experts.spec import ABI_VERSION, DOMAIN


# mypy: disable-error-code="no-untyped-def,name-defined"
@onnxscript.script(onnxscript.values.Opset(DOMAIN, ABI_VERSION), default_opset=op)
def Experts(x, ids, weights, gate_up, down, experts: int, activation: int):
    last, second, zero = (
        op.Constant(value_ints=[-1]),
        op.Constant(value_ints=[1]),
        op.Constant(value_int=0),
    )
    count = op.Unsqueeze(op.Constant(value_int=experts), op.Constant(value_ints=[0]))
    width = op.Shape(x, start=1, end=2)
    all_up = op.Transpose(op.Reshape(gate_up, op.Concat(count, last, width, axis=0)), perm=[0, 2, 1])
    all_down = op.Transpose(op.Reshape(down, op.Concat(count, width, last, axis=0)), perm=[0, 2, 1])
    gate, up = op.Split(
        op.MatMul(op.Unsqueeze(x, op.Constant(value_ints=[0])), all_up), num_outputs=2, axis=2
    )
    is_silu = op.Equal(op.Constant(value_int=activation), zero)
    hidden = op.Mul(op.Where(is_silu, op.Mul(gate, op.Sigmoid(gate)), op.Gelu(gate)), up)  # [E, T, I]
    chosen = op.OneHot(ids, count, op.Constant(value_floats=[0.0, 1.0]))  # [T, K, E]
    shares = op.ReduceSum(op.Mul(chosen, op.Unsqueeze(weights, last)), second, keepdims=0)  # [T, E]
    shares = op.Unsqueeze(op.Transpose(shares, perm=[1, 0]), last)  # [E, T, 1]
    return op.ReduceSum(op.Mul(op.MatMul(hidden, all_down), shares), op.Constant(value_ints=[0]), keepdims=0)


def function() -> ir.Function:
    """Return the function body as an `onnx_ir.Function`, to be stored in a model that uses the operator."""
    body: Any = Experts
    return ir.serde.deserialize_function(body.to_function_proto())
