"""What stands around a quantized product in the graph: codes widened, and inputs multiplied and rounded.

`apply.py` has the forms as a table. Each function inserts its nodes before `node` and returns their result.
"""

from __future__ import annotations

import onnx_ir as ir

from llmc.passes import edit
from llmc.passes.quantize.matrix import QuantizedMatrix
from llmc.plugins.round_fp4 import spec as round_fp4

CODES = {
    "int8": ir.DataType.INT8,
    "int4": ir.DataType.INT4,
    "e4m3": ir.DataType.FLOAT8E4M3FN,
    "e2m1": ir.DataType.FLOAT4E2M1,
}
SCALES = {
    "F32": ir.DataType.FLOAT,
    "F16": ir.DataType.FLOAT16,
    "BF16": ir.DataType.BFLOAT16,
    "F8_E4M3": ir.DataType.FLOAT8E4M3FN,
}
SCALES_OF = {"bf16": "BF16", "fp16": "F16"}  # what TensorRT computes in -> the dtype of its scales


def initializer(graph: ir.Graph, name: str, dtype: str, shape: tuple[int, ...]) -> ir.Value:
    value = ir.Value(name=name, type=ir.TensorType(SCALES[dtype]), shape=ir.Shape(shape))
    graph.initializers.add(value)
    return value


def dequantize(node: ir.Node, codes: ir.Value, scale: ir.Value, where: dict[str, int], name: str) -> ir.Value:
    value = edit.insert(node, "DequantizeLinear", [codes, scale], where, name, list(codes.shape or []))
    assert scale.dtype is not None
    value.dtype = scale.dtype
    return value


def cast(node: ir.Node, value: ir.Value, dtype: ir.DataType, name: str = "") -> ir.Value:
    name = name or f"{value.name}.cast"
    wide = edit.insert(node, "Cast", [value], {"to": dtype.value}, name, edit.dims(value))
    wide.dtype = dtype
    return wide


def multiplied_input(
    graph: ir.Graph, node: ir.Node, name: str, dtype: str, shape: tuple[int, ...]
) -> ir.Value:
    """x times the factors `name`, in fp32 unless these have the dtype of x."""
    x = edit.operand(node, 0)
    assert x.dtype is not None
    same = SCALES[dtype] == x.dtype
    values = initializer(graph, name, dtype if same else "F32", shape)
    wide = x if x.dtype == values.dtype else cast(node, x, ir.DataType.FLOAT, f"{name}.x")
    product = edit.insert(node, "Mul", [wide, values], {}, f"{name}.scaled", list(x.shape or []))
    return product if product.dtype == x.dtype else cast(node, product, x.dtype, f"{name}.narrow")


def smoothed_input(graph: ir.Graph, node: ir.Node, matrix: QuantizedMatrix) -> ir.Value:
    """Multiplied and rounded in fp32, whatever x is: only codes, and what they stand for, are narrow."""
    x, name = edit.operand(node, 0), matrix.initializer("input_scale")
    wanted, shape = x.dtype, list(x.shape or [])
    assert wanted is not None
    factors = initializer(graph, matrix.initializer("pre_quant_scale"), "F32", (matrix.columns,))
    scale = initializer(graph, name, "F32", ())
    wide = x if wanted == ir.DataType.FLOAT else cast(node, x, ir.DataType.FLOAT, f"{name}.x")
    smoothed = edit.insert(node, "Mul", [wide, factors], {}, f"{name}.smoothed", shape)
    dtype = CODES[matrix.format.activations]
    settings = {"output_dtype": dtype.value}
    codes = edit.insert(node, "QuantizeLinear", [smoothed, scale], settings, f"{name}.codes", shape)
    codes.dtype = dtype
    step = scale if wanted == ir.DataType.FLOAT else cast(node, scale, wanted)
    return dequantize(node, codes, step, {}, f"{name}.rounded")


def rounded_input(graph: ir.Graph, node: ir.Node, matrix: QuantizedMatrix) -> ir.Value:
    x, fmt = edit.operand(node, 0), matrix.format
    name, shape = matrix.initializer("input_scale"), list(x.shape or [])
    assert x.dtype is not None
    scale = ir.Value(name=name, shape=ir.Shape(()))
    graph.initializers.add(scale)
    if fmt.activations == "e2m1":
        scale.type = ir.TensorType(ir.DataType.FLOAT)
        return edit.insert(
            node, round_fp4.NAME, [x, scale], {}, f"{name}.rounded", shape, domain=round_fp4.DOMAIN
        )
    narrow = fmt.scales in SCALES_OF.values()
    scale.type = ir.TensorType(x.dtype if narrow else ir.DataType.FLOAT)
    wide = x if scale.dtype == x.dtype else cast(node, x, ir.DataType.FLOAT, f"{name}.x")
    settings = {"output_dtype": CODES[fmt.activations].value}
    codes = edit.insert(node, "QuantizeLinear", [wide, scale], settings, f"{name}.codes", shape)
    codes.dtype = CODES[fmt.activations]
    rounded = dequantize(node, codes, scale, {}, f"{name}.rounded")
    return rounded if rounded.dtype == x.dtype else cast(node, rounded, x.dtype, f"{name}.narrow")
