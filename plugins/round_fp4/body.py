"""What `llmc.RoundFP4` means, as function bodies: in standard operators, and in TensorRT's own.

`function()` is the reference, which any ONNX runtime executes in fp32. `tensorrt_function(dtype)` is what
TensorRT fuses with the product behind it: `TRT_FP4DynamicQuantize` and the two DequantizeLinear that undo it
(https://github.com/onnx/onnx-tensorrt, its custom operators; builds in TensorRT-RTX 1.7.1 for SM120).
"""

from __future__ import annotations

from typing import Any

import onnx_ir as ir
import onnxscript
from onnxscript import opset23 as op

from llmc.plugins.round_fp4.spec import ABI_VERSION, BLOCK, DOMAIN, E2M1_MAX, NAME

_FP8 = 17  # TensorProto.DataType.FLOAT8E4M3FN
_OPSETS = {"": 23, "trt": 1}


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
    """The reference, for fp32 inputs; to be stored in a model that uses the operator."""
    body: Any = RoundFP4
    return ir.serde.deserialize_function(body.to_function_proto())


def tensorrt_function(dtype: ir.DataType) -> ir.Function:
    """The operator for a graph that computes in `dtype` (fp16 or bf16), as TensorRT has it."""
    x, over = ir.Value(name="x"), ir.Value(name="global_scale")
    quantize = ir.node(
        "TRT_FP4DynamicQuantize",
        [x, over],
        {"axis": -1, "block_size": BLOCK, "scale_type": _FP8},
        domain="trt",
        num_outputs=2,
        name="quantize",
    )
    codes, scales = quantize.outputs
    wide = ir.node("DequantizeLinear", [scales, over], name="scales")
    blocked = {"axis": -1, "block_size": BLOCK}
    values = ir.node("DequantizeLinear", [codes, wide.outputs[0]], blocked, name="values")
    result = ir.node("Cast", [values.outputs[0]], {"to": dtype.value}, name="result")
    nodes = [quantize, wide, values, result]
    for node in nodes:
        for index, value in enumerate(node.outputs):
            value.name = f"{node.name}_{index}"
    graph = ir.Graph([x, over], [result.outputs[0]], nodes=nodes, opset_imports=_OPSETS)
    return ir.Function(DOMAIN, NAME, graph=graph, attributes=[])
