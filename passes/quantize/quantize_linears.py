"""QuantizeLinears: replace the weights that a plan names by codes and scales.

    before             Gemm(x, W)
    weight-only        Gemm(x, DequantizeLinear(W, scale))       W: int8, int4 or E4M3, as in `formats.py`
    nvfp4-weight-only  Gemm(x, DequantizeLinear(W, DequantizeLinear(scale, scale_2)))    W: E2M1, scale: E4M3
    mxfp4              Gemm(x, DequantizeLinear<output_dtype>(W, scale))                 W: E2M1, scale: E8M0
    fp8                Gemm(DequantizeLinear(QuantizeLinear(x, input_scale), input_scale), ...)
    nvfp4              Gemm(llmc.RoundFP4(x, input_scale), ...)
    with AWQ           Gemm(Mul(x, pre_quant_scale), ...), quantized after the Mul
    int8-smoothquant   the same, multiplied and quantized in fp32: Cast(x), Cast(input_scale) if x has 16 bits

The matrices of `llmc.Experts` are quantized likewise, weight-only.

A Cast follows where the scale's type is not the graph's compute dtype. Weights with fp32 scales also have
fp32 input scales, between two Casts, so that no scale is rounded to 16 bits. TensorRT-RTX 1.7.1 builds that,
with plans of the same size (FP8, SM89 and SM120, 2026-11-26). OpenVINO keeps these forms compressed, TensorRT
fuses them, and ONNX Runtime computes them exactly. The initializers have no data yet:
`compiler/quantize/` computes it.
"""

from __future__ import annotations

import onnx_ir as ir

from llmc.passes import edit
from llmc.passes.contract import Matches
from llmc.passes.parameter import set_parameter
from llmc.passes.quantize import qdq
from llmc.passes.quantize.formats import Format
from llmc.passes.quantize.matrix import QuantizedMatrix
from llmc.passes.quantize.plan import InputFactors, QuantPlan
from llmc.passes.quantize.survey import matrices
from llmc.passes.spec import Stage
from llmc.plugins.round_fp4 import spec as round_fp4


class QuantizeLinears:
    """Quantize the matrices of a plan. Counts one match per matrix. Those without a Gemm are near misses."""

    name = "quantize-linears"
    requires = Stage.CANONICAL
    ensures = Stage.QUANTIZED

    def __init__(self, plan: QuantPlan) -> None:
        self._plan = plan

    def __call__(self, model: ir.Model) -> Matches:
        pending = {matrix.modules: matrix for matrix in self._plan.matrices()}
        modules = self._plan.quantized()
        matches = Matches()
        for node in list(model.graph):
            for index, record in matrices(node):
                matrix = pending.pop(record.modules, None)
                if matrix is None:
                    continue
                _quantize(model.graph, node, index, matrix, modules[matrix.modules[0]].pre_quant_scale)
                matches.count += 1
                if matrix.format.activations == "e2m1":
                    model.graph.opset_imports[round_fp4.DOMAIN] = round_fp4.ABI_VERSION
        matches.near_misses += [f"{' and '.join(names)}: no such linear layer" for names in pending]
        return matches


def _quantize(
    graph: ir.Graph, node: ir.Node, index: int, matrix: QuantizedMatrix, factors: InputFactors | None
) -> None:
    """Quantize input `index` of a node, and its first input where the format quantizes activations."""
    node.replace_input_with(index, _dequantized(graph, node, index, matrix))
    if factors:
        node.replace_input_with(0, qdq.multiplied_input(graph, node, matrix, factors))
    if matrix.format.smoothed:
        node.replace_input_with(0, qdq.smoothed_input(graph, node, matrix))
    elif matrix.format.activations:
        node.replace_input_with(0, qdq.rounded_input(graph, node, matrix))


def _dequantized(graph: ir.Graph, node: ir.Node, index: int, matrix: QuantizedMatrix) -> ir.Value:
    """Insert the dequantized weight of `node`, its input `index`, in the dtype of its first operand."""
    fmt, weight, x = matrix.format, edit.operand(node, index), edit.operand(node, 0)
    wanted, name = x.dtype, str(weight.name)
    assert wanted is not None
    weight.type = ir.TensorType(qdq.CODES[fmt.element])  # a new object: types may be shared
    set_parameter(weight, matrix.parameter("weight"))
    arrays = fmt.layout(matrix.shape)
    scale = qdq.initializer(graph, matrix.parameter("weight_scale"), *arrays["weight_scale"])
    if fmt.double_scaled:
        global_scale = qdq.initializer(graph, matrix.parameter("weight_scale_2"), *arrays["weight_scale_2"])
        scale = qdq.dequantize(node, scale, global_scale, {}, f"{scale.name}.wide")
    elif not fmt.float_scales:
        attributes = _axis(fmt) | {"output_dtype": wanted.value}
        operands, shape = [weight, scale], list(weight.shape or [])
        return edit.insert(
            node, "DequantizeLinear", operands, attributes, f"{name}.wide", shape, dtype=wanted
        )
    elif scale.dtype != wanted and wanted == ir.DataType.FLOAT:  # so that code x scale is exact
        scale = edit.cast(node, scale, wanted, f"{scale.name}.cast")
    wide = qdq.dequantize(node, weight, scale, _axis(fmt), f"{name}.wide")
    return wide if wide.dtype == wanted else edit.cast(node, wide, wanted, f"{wide.name}.cast")


def _axis(fmt: Format) -> dict[str, int]:
    if fmt.block > 0:
        return {"axis": 1, "block_size": fmt.block}
    return {} if fmt.block == -1 else {"axis": 0}
