"""DoubleFP4Weights and FloatScales: store MXFP4 weights without E8M0 scales. No value changes.

    before            DequantizeLinear<block_size = 32, output_dtype = D>(W e2m1, scale e8m0)
    DoubleFP4Weights  DequantizeLinear<block_size = 32>(2 W int8, scale / 2 fp32)                  D: fp32
    FloatScales       DequantizeLinear<block_size = 32>(W e2m1, scale bf16)                        D: bf16
                      Cast<D>(DequantizeLinear<block_size = 32>(W e2m1, scale fp32))               D: fp16

Twice an E2M1 value is an integer of at most 12, and half of a power of two is a power of two. OpenVINO keeps
int8 weights compressed; ONNX Runtime 1.32 has no 4-bit floats. The parser of TensorRT-RTX 1.7.1 takes no
initializer in E8M0; bf16 holds every power of two of E8M0, fp16 does not.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import onnx_ir as ir

from llmc.passes import edit
from llmc.passes.contract import Matches
from llmc.passes.parameter import parameter, set_parameter
from llmc.passes.spec import Stage


class DoubleFP4Weights:
    """Store MXFP4 weights as int8 with fp32 scales. Counts one match per matrix."""

    name = "double-fp4-weights"
    requires = Stage.QUANTIZED
    ensures = Stage.QUANTIZED

    def __call__(self, model: ir.Model) -> Matches:
        return _rewrite(model, _double)


class FloatScales:
    """Store the scales of MXFP4 weights as bf16 or fp32. Counts one match per matrix."""

    name = "float-scales"
    requires = Stage.QUANTIZED
    ensures = Stage.QUANTIZED

    def __call__(self, model: ir.Model) -> Matches:
        return _rewrite(model, _widen_scales)


def _rewrite(model: ir.Model, rewrite: Callable[[ir.Node], None]) -> Matches:
    nodes = [node for node in model.graph if node.op_type == "DequantizeLinear" and _is_mxfp4(node)]
    for node in nodes:
        rewrite(node)
        del node.attributes["output_dtype"]  # the default is the dtype of the scale
    return Matches(len(nodes))


def _is_mxfp4(node: ir.Node) -> bool:
    types = [edit.operand(node, index).dtype for index in (0, 1)]
    return types == [ir.DataType.FLOAT4E2M1, ir.DataType.FLOAT8E8M0]


def _double(node: ir.Node) -> None:
    _store(edit.operand(node, 0), ir.DataType.INT8, exponent=1, packed="e2m1")
    _store(edit.operand(node, 1), ir.DataType.FLOAT, exponent=-1)


def _widen_scales(node: ir.Node) -> None:
    output = node.outputs[0]
    wanted = output.dtype
    assert wanted is not None
    dtype = wanted if wanted == ir.DataType.BFLOAT16 else ir.DataType.FLOAT
    _store(edit.operand(node, 1), dtype)
    if dtype == wanted:
        return
    output.type = ir.TensorType(dtype)
    (user, index), *_ = output.uses()
    user.replace_input_with(index, edit.cast(user, output, wanted, f"{output.name}.narrow"))


def _store(value: ir.Value, dtype: ir.DataType, exponent: int = 0, packed: str = "") -> None:
    """Make the file store `value` as another type. It must have no data yet."""
    record = parameter(value)
    assert record is not None
    assert value.const_value is None
    set_parameter(value, replace(record, exponent=exponent, packed=packed))
    value.type = ir.TensorType(dtype)  # a new object: a clone of the graph shares its types
