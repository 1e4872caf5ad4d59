"""UnpackFP4Weights: replace packed E2M1 weights by a table lookup, for ONNX Runtime, which has no FP4.

    before  DequantizeLinear(W [N, K] e2m1, scale [N, K/B])              B columns share a scale
    after   Mul(Reshape(Gather(table, nibbles of W [N, K/2] uint8), [N, K/B, B]), scale) as [N, K]

A code stands for one of 16 numbers (elements.E2M1_VALUES), so the result is bit-identical. E8M0 scales,
which ONNX Runtime also lacks, are looked up in the same way.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from llmc.passes import edit
from llmc.passes.contract import Matches
from llmc.passes.parameter import parameter, set_parameter
from llmc.passes.quantize.elements import E2M1_VALUES
from llmc.passes.spec import Stage


class UnpackFP4Weights:
    """Unpack E2M1 weights. Counts one match per matrix. If `model` is a clone, the original stays packed."""

    name = "unpack-fp4-weights"
    requires = Stage.QUANTIZED
    ensures = Stage.QUANTIZED

    def __call__(self, model: ir.Model) -> Matches:
        matches = Matches()
        for node in list(model.graph):
            if node.op_type == "DequantizeLinear":
                codes = edit.operand(node, 0)
                if codes.is_initializer() and codes.dtype == ir.DataType.FLOAT4E2M1:
                    rows, columns = edit.dims(codes)
                    _look_up(model.graph, node, _as_bytes(model.graph, codes, (rows, columns // 2)))
                    matches.count += 1
        return matches


def _as_bytes(graph: ir.Graph, codes: ir.Value, dims: tuple[int, ...]) -> ir.Value:
    shape, data = ir.Shape(dims), codes.const_value
    packed = ir.Value(name=codes.name, shape=shape, type=ir.TensorType(ir.DataType.UINT8))
    if data is not None:
        assert isinstance(data, ir.ExternalTensor)
        packed.const_value = ir.ExternalTensor(
            data.location, data.offset, data.length, ir.DataType.UINT8, shape=shape, name=data.name,
            base_dir=data.base_dir,
        )  # fmt: skip
    if (record := parameter(codes)) is not None:
        set_parameter(packed, record)
    ir.convenience.replace_all_uses_with(codes, packed)
    del graph.initializers[str(codes.name)]
    graph.initializers.add(packed)
    return packed


def _look_up(graph: ir.Graph, node: ir.Node, packed: ir.Value) -> None:
    scale, name, (rows, half) = edit.operand(node, 1), str(packed.name), edit.dims(packed)
    if scale.dtype == ir.DataType.FLOAT8E8M0:
        scale = _powers_of_two(graph, node, _as_bytes(graph, scale, tuple(edit.dims(scale))))
    elif scale.dtype != ir.DataType.FLOAT:
        scale = edit.cast(node, scale, ir.DataType.FLOAT, f"{scale.name}.cast")
    columns, blocks = 2 * half, edit.dims(scale)[1]

    def add(op: str, inputs: list[ir.Value], attributes: dict[str, object], shape: list[int]) -> ir.Value:
        return edit.insert(node, op, inputs, attributes, f"{name}.{op}_{len(shape)}_{shape[-1]}", shape)

    def constant(label: str, value: object, dtype: type) -> ir.Value:
        return edit.constant(graph, np.array(value, dtype), label)

    low = add("BitwiseAnd", [packed, constant("fp4_low_bits", 15, np.uint8)], {}, [rows, half])
    bits = constant("fp4_bits", 4, np.uint8)
    high = add("BitShift", [packed, bits], {"direction": "RIGHT"}, [rows, half])
    last = constant("fp4_last_axis", [2], np.int64)
    pair = [
        edit.insert(node, "Unsqueeze", [n, last], {}, f"{n.name}.column", [rows, half, 1])
        for n in (low, high)
    ]
    nibbles = add("Concat", pair, {"axis": 2}, [rows, half, 2])
    index = edit.cast(node, nibbles, ir.DataType.INT32, f"{name}.Cast_3_2")
    table = edit.constant(graph, E2M1_VALUES, "fp4_values")
    values = add("Gather", [table, index], {"axis": 0}, [rows, half, 2])
    blocked = edit.reshape(node, values, [rows, blocks, columns // blocks], f"{name}.blocks")
    wide = edit.reshape(node, scale, [rows, blocks, 1], f"{name}.factors")
    scaled = add("Mul", [blocked, wide], {}, [rows, blocks, columns // blocks])
    unpacked = edit.reshape(node, scaled, [rows, columns], f"{name}.unpacked")
    wanted = node.outputs[0].dtype
    if wanted is not None and wanted != unpacked.dtype:  # MXFP4 in a 16-bit graph
        unpacked = edit.cast(node, unpacked, wanted, f"{name}.narrow")
    edit.replace(node, unpacked)


def _powers_of_two(graph: ir.Graph, node: ir.Node, scale: ir.Value) -> ir.Value:
    """Return E8M0 bytes as fp32: byte b is 2^(b - 127), and 255 is NaN."""
    name, shape = str(scale.name), edit.dims(scale)
    values = np.append(np.ldexp(np.float32(1), np.arange(255) - 127), np.float32(np.nan))
    table = edit.constant(graph, values, "e8m0_values")
    index = edit.cast(node, scale, ir.DataType.INT32, f"{name}.index")
    return edit.insert(node, "Gather", [table, index], {"axis": 0}, f"{name}.values", shape)
