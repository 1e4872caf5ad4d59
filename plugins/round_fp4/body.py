"""`llmc.RoundFP4` as a function of standard ONNX operators, which any ONNX runtime executes in fp32."""

from __future__ import annotations

from typing import Any

import onnx_ir as ir
import onnxscript
from onnxscript import opset23 as op

from llmc.plugins.round_fp4.spec import ABI_VERSION, BLOCK, DOMAIN, E2M1_MAX


# mypy: disable-error-code="no-untyped-def,name-defined"
@onnxscript.script(onnxscript.values.Opset(DOMAIN, ABI_VERSION), default_opset=op)
def RoundFP4(x, global_scale):
    blocks = op.Reshape(x, op.Constant(value_ints=[0, -1, BLOCK]))
    six, two, half = (
        op.Constant(value_float=E2M1_MAX),
        op.Constant(value_float=2.0),
        op.Constant(value_float=0.5),
    )
    largest = op.ReduceMax(op.Abs(blocks), op.Constant(value_ints=[-1]), keepdims=1)
    short = op.Cast(op.Div(op.Div(largest, six), global_scale), to=17)  # saturates at 448
    scale = op.Mul(op.Cast(short, to=1), global_scale)
    zero = op.Constant(value_float=0.0)
    divisor = op.Where(op.Equal(scale, zero), op.Constant(value_float=1.0), scale)
    value = op.Div(blocks, divisor)
    size = op.Min(op.Abs(value), six)
    small = op.Mul(op.Round(op.Mul(size, two)), half)  # E2M1 has steps of 1/2 up to 2,
    large = op.Mul(op.Round(op.Mul(size, half)), two)  # of 2 from 4 to 6, and of 1 between
    upper = op.Where(op.Less(size, op.Constant(value_float=4.0)), op.Round(size), large)
    rounded = op.Where(op.Less(size, two), small, upper)
    return op.Reshape(op.Mul(op.Mul(op.Sign(value), rounded), scale), op.Shape(x))


def function() -> ir.Function:
    """Return the function body as an `onnx_ir.Function`, to be stored in a model that uses the operator."""
    body: Any = RoundFP4
    return ir.serde.deserialize_function(body.to_function_proto())
