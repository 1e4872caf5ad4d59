"""The Q/DQ nodes around a quantized Gemm: its weight dequantized, its input multiplied and quantized.

The docstring of `quantize_linears.py` has a table of the forms.
Each function inserts its nodes before `node` and returns their result.
"""

from __future__ import annotations

from dataclasses import replace

import onnx_ir as ir

from llmc.passes import edit
from llmc.passes.dtypes import ONNX
from llmc.passes.parameter import Parameter, new_parameter, of_tensor
from llmc.passes.quantize.matrix import QuantizedMatrix
from llmc.passes.quantize.plan import InputFactors
from llmc.plugins.round_fp4 import spec as round_fp4

CODES = {
    "int8": ir.DataType.INT8,
    "int4": ir.DataType.INT4,
    "e4m3": ir.DataType.FLOAT8E4M3FN,
    "e2m1": ir.DataType.FLOAT4E2M1,
}
SCALES_OF = {"bf16": "BF16", "fp16": "F16"}  # TensorRT's compute dtype -> the dtype of its scales


def initializer(graph: ir.Graph, record: Parameter, dtype: str, shape: tuple[int, ...]) -> ir.Value:
    """Add an initializer for scales or factors. dtype: a safetensors name."""
    return new_parameter(graph, record, ir.Shape(shape), ONNX[dtype])


def dequantize(
    node: ir.Node, codes: ir.Value, scale: ir.Value, attributes: dict[str, int], name: str
) -> ir.Value:
    """Insert DequantizeLinear(codes, scale), in the dtype of the scale. attributes: the node's."""
    shape = list(codes.shape or [])
    return edit.insert(node, "DequantizeLinear", [codes, scale], attributes, name, shape, dtype=scale.dtype)


def multiplied_input(
    graph: ir.Graph, node: ir.Node, matrix: QuantizedMatrix, factors: InputFactors
) -> ir.Value:
    """Multiply x by the checkpoint's `factors`, in fp32 unless they have the dtype of x."""
    x, name = edit.operand(node, 0), factors.name
    assert x.dtype is not None
    same_dtype = ONNX[factors.dtype] == x.dtype
    record = replace(of_tensor(name, factors.shape), rows=matrix.rows[:1])
    values = initializer(graph, record, factors.dtype if same_dtype else "F32", factors.shape)
    wide = x if x.dtype == values.dtype else edit.cast(node, x, ir.DataType.FLOAT, f"{name}.x")
    product = edit.insert(node, "Mul", [wide, values], {}, f"{name}.scaled", list(x.shape or []))
    return product if product.dtype == x.dtype else edit.cast(node, product, x.dtype, f"{name}.narrow")


def smoothed_input(graph: ir.Graph, node: ir.Node, matrix: QuantizedMatrix) -> ir.Value:
    """Smooth and quantize x in fp32, and dequantize it to the dtype of x."""
    x, name = edit.operand(node, 0), matrix.initializer("input_scale")
    wanted, shape = x.dtype, list(x.shape or [])
    assert wanted is not None
    factors = initializer(graph, matrix.parameter("pre_quant_scale"), "F32", (matrix.columns,))
    scale = initializer(graph, matrix.parameter("input_scale"), "F32", ())
    wide = x if wanted == ir.DataType.FLOAT else edit.cast(node, x, ir.DataType.FLOAT, f"{name}.x")
    smoothed = edit.insert(node, "Mul", [wide, factors], {}, f"{name}.smoothed", shape)
    dtype = CODES[matrix.format.activations]
    settings = {"output_dtype": dtype.value}
    codes = edit.insert(
        node, "QuantizeLinear", [smoothed, scale], settings, f"{name}.codes", shape, dtype=dtype
    )
    step = scale if wanted == ir.DataType.FLOAT else edit.cast(node, scale, wanted, f"{name}.cast")
    return dequantize(node, codes, step, {}, f"{name}.rounded")


def rounded_input(graph: ir.Graph, node: ir.Node, matrix: QuantizedMatrix) -> ir.Value:
    """Quantize and dequantize x with the static `input_scale`."""
    x, fmt = edit.operand(node, 0), matrix.format
    name, shape = matrix.initializer("input_scale"), list(x.shape or [])
    assert x.dtype is not None
    record = matrix.parameter("input_scale")
    if fmt.activations == "e2m1":
        scale = initializer(graph, record, "F32", ())
        return edit.insert(
            node, round_fp4.NAME, [x, scale], {}, f"{name}.rounded", shape, domain=round_fp4.DOMAIN
        )
    narrow = fmt.scales in SCALES_OF.values()
    scale = new_parameter(graph, record, ir.Shape(()), x.dtype if narrow else ir.DataType.FLOAT)
    wide = x if scale.dtype == x.dtype else edit.cast(node, x, ir.DataType.FLOAT, f"{name}.x")
    dtype = CODES[fmt.activations]
    settings = {"output_dtype": dtype.value}
    codes = edit.insert(node, "QuantizeLinear", [wide, scale], settings, f"{name}.codes", shape, dtype=dtype)
    rounded = dequantize(node, codes, scale, {}, f"{name}.rounded")
    return rounded if rounded.dtype == x.dtype else edit.cast(node, rounded, x.dtype, f"{name}.narrow")
