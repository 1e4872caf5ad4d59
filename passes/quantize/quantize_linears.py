"""Puts a plan into a canonical graph: the weights that it names become codes and scales.

    before             Gemm(x, W)
    weight-only        Gemm(x, DequantizeLinear(W, scale))       W: int8, int4 or E4M3, as in `formats.py`
    nvfp4-weight-only  Gemm(x, DequantizeLinear(W, DequantizeLinear(scale, scale_2)))    W: E2M1, scale: E4M3
    fp8                Gemm(DequantizeLinear(QuantizeLinear(x, input_scale), input_scale), ...)
    nvfp4              Gemm(llmc.RoundFP4(x, input_scale), ...)
    with AWQ           Gemm(Mul(x, pre_quant_scale), ...), rounded after the Mul
    int8-smoothquant   the same, multiplied and rounded in fp32: Cast(x), Cast(input_scale) if x has 16 bits

A Cast follows where the scale is of another type than the graph computes in. Weights that come with fp32
scales have fp32 input scales as well, between two Casts, so that no scale is rounded to 16 bits: TensorRT-RTX
1.7.1 builds that, with plans of the same size (FP8, SM89 and SM120, 2026-11-26). These are the forms that
OpenVINO keeps compressed, that TensorRT fuses, and that ONNX Runtime computes exactly. The initializers have
no data yet: `produce.py` makes it, or `stored_arrays.py` takes it from a quantized checkpoint.
"""

from __future__ import annotations

import math

import onnx_ir as ir

from llmc.compiler.quantize.prequantized_plan import (
    PrequantizedPlan,
    PrequantizedWeights,
    make_prequantized_plan,
)
from llmc.passes import edit
from llmc.passes.canonicalize.fuse_linears import JOIN
from llmc.passes.quantize import qdq
from llmc.passes.quantize.formats import Format
from llmc.passes.quantize.matrix import QuantizedMatrix
from llmc.passes.quantize.plan import QuantPlan, make_plan
from llmc.passes.spec import module_of
from llmc.plugins.round_fp4 import spec as round_fp4

_WEIGHT = ".weight"


def plan_weights(
    model: ir.Model,
    fmt: str,
    exclude: tuple[str, ...],
    recipe_exclude: tuple[str, ...],
    stored_bits: int,
    scales: str | None = None,
    head: str | None = None,
) -> QuantPlan:
    """The plan for the linear layers of a canonical graph, and lm_head's if `head` is its format.

    A tied lm_head that is quantized gets an initializer of its own, in place. Raises RequestError as
    `make_plan` does.
    """
    tied = _untie_head(model) if head else {}
    shapes, groups, others = _survey(model)
    plan = make_plan(
        shapes, fmt, exclude, recipe_exclude, groups=groups, scales=scales, stored_bits=stored_bits,
        other_params=others, head=head, tied=tuple(tied),
    )  # fmt: skip
    for module in plan.modules:
        if module.tied and not module.format:
            _tie_again(model, *tied[module.name])
    return plan


def plan_prequantized(model: ir.Model, stored: PrequantizedWeights, stored_bits: int) -> PrequantizedPlan:
    """The plan for a quantized checkpoint; `stored_bits` is what its other weights have. Raises
    UnsupportedError as `make_prequantized_plan` does."""
    shapes, groups, others = _survey(model)
    return make_prequantized_plan(stored, shapes, groups, stored_bits=stored_bits, other_params=others)


def _survey(model: ir.Model) -> tuple[dict[str, tuple[int, int]], list[tuple[str, ...]], int]:
    """The linear layers [out, in], those multiplied as one, and the parameters outside of them."""
    shapes: dict[str, tuple[int, int]] = {}
    groups, in_matrices = [], 0
    for node in _linears(model):
        parts = _parts(node)
        groups.append(parts)
        rows, columns = edit.dims(edit.operand(node, 1))
        in_matrices += rows * columns
        shapes |= {part: (size, columns) for part, size in zip(parts, _rows(node, len(parts)), strict=True)}
    parameters = [value for value in model.graph.initializers.values() if _is_weight(value)]
    every = sum(math.prod(edit.dims(value)) for value in parameters)
    return shapes, groups, every - in_matrices


def apply_plan(model: ir.Model, plan: QuantPlan) -> list[QuantizedMatrix]:
    """Rewrites `model` in place. Returns the matrices whose data `produce.py` must make, in its order."""
    quantized, matrices = plan.quantized(), []
    for node in _linears(model):
        parts = _parts(node)
        if parts[0] not in quantized:
            continue
        fmt, factor = quantized[parts[0]].format, quantized[parts[0]].pre_quant_scale
        assert fmt is not None
        columns = edit.dims(edit.operand(node, 1))[1]
        matrix = QuantizedMatrix(parts, tuple(_rows(node, len(parts))), columns, fmt)
        node.replace_input_with(1, _dequantized(model.graph, node, matrix))
        if factor:
            multiplied = qdq.multiplied_input(model.graph, node, factor.name, factor.dtype, factor.shape)
            node.replace_input_with(0, multiplied)
        if fmt.smoothed:
            node.replace_input_with(0, qdq.smoothed_input(model.graph, node, matrix))
        elif fmt.activations:
            node.replace_input_with(0, qdq.rounded_input(model.graph, node, matrix))
        matrices.append(matrix)
    if any(matrix.format.activations == "e2m1" for matrix in matrices):
        model.graph.opset_imports[round_fp4.DOMAIN] = round_fp4.ABI_VERSION
    return matrices


def _untie_head(model: ir.Model) -> dict[str, tuple[ir.Node, ir.Value]]:
    """Gives Gemms that multiply with the embedding a matrix of their own, in place.

    Returns their modules -> Gemm, embedding.
    """
    found = {}
    for node in model.graph:
        weight = edit.operand(node, 1) if node.op_type == "Gemm" else None
        if weight is None or not _is_weight(weight) or len(weight.uses()) == 1:
            continue
        name = module_of(node)
        assert weight.dtype is not None
        own = ir.Value(name=name + _WEIGHT, shape=weight.shape, type=ir.TensorType(weight.dtype))
        model.graph.initializers.add(own)
        node.replace_input_with(1, own)
        found[name] = node, weight
    return found


def _tie_again(model: ir.Model, node: ir.Node, embedding: ir.Value) -> None:
    """Undoes `_untie_head` for one Gemm."""
    own = edit.operand(node, 1)
    node.replace_input_with(1, embedding)
    model.graph.initializers.pop(str(own.name))


def _linears(model: ir.Model) -> list[ir.Node]:
    """Gemms that multiply with a parameter that nobody else reads (a tied lm_head is the embedding too)."""
    return [
        node
        for node in model.graph
        if node.op_type == "Gemm" and _is_weight(weight := edit.operand(node, 1)) and len(weight.uses()) == 1
    ]


def _is_weight(value: ir.Value) -> bool:
    return value.is_initializer() and value.const_value is None


def _parts(node: ir.Node) -> tuple[str, ...]:
    return tuple(part.removesuffix(_WEIGHT) for part in str(edit.operand(node, 1).name).split(JOIN))


def _rows(node: ir.Node, count: int) -> list[int]:
    """The rows of each layer in a Gemm; of fused ones, from the Split behind it."""
    if count == 1:
        return [edit.dims(edit.operand(node, 1))[0]]
    split = next(iter(node.outputs[0].uses())).node
    sizes = edit.operand(split, 1).const_value
    assert sizes is not None
    return [int(size) for size in sizes.numpy()]


def _dequantized(graph: ir.Graph, node: ir.Node, matrix: QuantizedMatrix) -> ir.Value:
    """The weight of `node`, from codes and scales, in the dtype of its other operand."""
    fmt, weight, x = matrix.format, edit.operand(node, 1), edit.operand(node, 0)
    wanted, name = x.dtype, str(weight.name)
    assert wanted is not None
    weight.type = ir.TensorType(qdq.CODES[fmt.element])  # a new one: types may be shared
    arrays = fmt.layout(matrix.shape)
    scale = qdq.initializer(graph, matrix.initializer("weight_scale"), *arrays["weight_scale"])
    if fmt.element == "e2m1":
        global_scale = qdq.initializer(graph, matrix.initializer("weight_scale_2"), *arrays["weight_scale_2"])
        scale = qdq.dequantize(node, scale, global_scale, {}, f"{scale.name}.wide")
    elif scale.dtype != wanted and wanted == ir.DataType.FLOAT:  # the product of code and scale is then exact
        scale = qdq.cast(node, scale, wanted)
    wide = qdq.dequantize(node, weight, scale, _axis(fmt), f"{name}.wide")
    return wide if wide.dtype == wanted else qdq.cast(node, wide, wanted)


def _axis(fmt: Format) -> dict[str, int]:
    if fmt.block > 0:
        return {"axis": 1, "block_size": fmt.block}
    return {} if fmt.block == -1 else {"axis": 0}
