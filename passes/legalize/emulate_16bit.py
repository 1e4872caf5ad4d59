"""Emulation of TensorRT's 16-bit arithmetic: a graph that ONNX Runtime computes with the same roundings.

Every tensor keeps its type. A node that computes does so in fp32: its inputs are widened, which is exact, and
its outputs are rounded once, to nearest even, as on a GPU that sums in fp32. Two operators also round inside:

RMSNormalization  in fp32, rounded before the weight and after it, as in ONNX's definition and in Llama
PagedAttention    scores, softmax and sums in fp32; the softmax weights are rounded for the second product

ONNX Runtime 1.32 has no bf16 arithmetic. It has fp16, but omits some of the roundings: its error was half of
transformers' (tales, 2026-11-23). This graph's error is within 15 % of it. Caches are fp32 and hold rounded
values, as in the backend. Quantized caches hold codes times their scale (`widen_quantized_caches.py`).
docs/explanation/fidelity.md describes how builds use this graph.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import onnx_ir.passes.common as common

from llmc.passes import edit
from llmc.passes.contract import Matches
from llmc.passes.spec import STRUCTURAL, Stage
from llmc.plugins.paged_attention.spec import NAME as PAGED_ATTENTION

_MOVES = STRUCTURAL | {"Cast", "Identity"}  # operators that compute nothing and take any type


class WidenCaches:
    """Make 16-bit caches fp32. Counts the graph inputs and outputs."""

    name = "widen-caches"
    requires = Stage.QUANTIZED
    ensures = Stage.QUANTIZED

    def __init__(self, narrow: ir.DataType) -> None:
        self._narrow = narrow

    def __call__(self, model: ir.Model) -> Matches:
        caches = [v for v in (*model.graph.inputs, *model.graph.outputs) if v.dtype == self._narrow]
        for value in caches:
            value.type = ir.TensorType(ir.DataType.FLOAT)
        return Matches(len(caches))


class RoundOutputs:
    """Rewrite y = op(x) to y = round(op(widen(x))), and sort the nodes. Counts the nodes rewritten."""

    name = "round-outputs"
    requires = Stage.QUANTIZED
    ensures = Stage.QUANTIZED

    def __init__(self, narrow: ir.DataType) -> None:
        self._narrow = narrow

    def __call__(self, model: ir.Model) -> Matches:
        matches = Matches()
        for node in list(model.graph):
            if node.op_type not in _MOVES:
                matches.count += _compute_in_fp32(node, self._narrow)
        common.TopologicalSortPass()(model)
        return matches


class RoundSoftmax:
    """Round the softmax weights, which the kernels multiply by the values in the model's dtype.

    The pass edits the function body of PagedAttention. Counts the bodies that it rewrote.
    """

    name = "round-softmax"
    requires = Stage.QUANTIZED
    ensures = Stage.QUANTIZED

    def __init__(self, narrow: ir.DataType) -> None:
        self._narrow = narrow

    def __call__(self, model: ir.Model) -> Matches:
        matches = Matches()
        for function in model.functions.values():
            if function.name == PAGED_ATTENTION:
                matches.count += _round_softmax(function, self._narrow)
        return matches


def _compute_in_fp32(node: ir.Node, narrow: ir.DataType) -> bool:
    """Rewrite one node. Return whether any input or output was narrow."""
    rounded = [value for value in node.outputs if value.dtype == narrow]
    inputs = [
        (i, value) for i, value in enumerate(node.inputs) if value is not None and value.dtype == narrow
    ]
    for index, value in inputs:
        node.replace_input_with(index, _widened(node, value))
    for value in rounded:
        _round(node, value, narrow)
    if node.op_type == "RMSNormalization" and rounded:
        _round_before_weight(node, narrow)
    return bool(rounded or inputs)


def _widened(node: ir.Node, value: ir.Value) -> ir.Value:
    """Return `value` in fp32. All its users share one Cast."""
    name = f"{value.name}.in_fp32"
    for user, _ in value.uses():
        if user.outputs[0].name == name:
            return user.outputs[0]
    return edit.cast(node, value, ir.DataType.FLOAT, name)


def _round(node: ir.Node, value: ir.Value, narrow: ir.DataType) -> None:
    """Make `value` fp32, and give its users the rounded value."""
    value.type = ir.TensorType(ir.DataType.FLOAT)  # a new object: a clone shares its types with the original
    uses = list(value.uses())
    rounded = edit.cast(node, value, narrow, f"{value.name}.rounded")
    for user, index in uses:
        user.replace_input_with(index, rounded)


def _round_before_weight(node: ir.Node, narrow: ir.DataType) -> None:
    """Rewrite norm(x, w) to Mul(widen(round(norm(x, 1))), w)."""
    weight, output = edit.operand(node, 1), node.outputs[0]
    width = edit.dims(weight)
    assert isinstance(node.graph, ir.Graph)
    ones = edit.constant(node.graph, np.ones(width, np.float32), f"ones_{width[-1]}")
    shape = list(output.shape or [])
    settings = {key: edit.attribute(node, key) for key in ("axis", "epsilon") if key in node.attributes}
    x = edit.operand(node, 0)
    normal = edit.insert(node, "RMSNormalization", [x, ones], settings, f"{output.name}.normal", shape)
    short = edit.cast(node, normal, narrow, f"{output.name}.normal_rounded")
    wide = edit.cast(node, short, ir.DataType.FLOAT, f"{output.name}.normal_in_fp32")
    edit.replace(node, edit.insert(node, "Mul", [wide, weight], {}, f"{output.name}.scaled", shape))


def _round_softmax(function: ir.Function, narrow: ir.DataType) -> bool:
    (softmax,) = [node for node in function if node.op_type == "Softmax"]
    weights = softmax.outputs[0]
    uses = list(weights.uses())
    if all(user.op_type == "Cast" for user, _ in uses):
        return False
    short = ir.node("Cast", [weights], {"to": narrow.value})
    wide = ir.node("Cast", [short.outputs[0]], {"to": ir.DataType.FLOAT.value})
    function.insert_after(softmax, [short, wide])
    for user, index in uses:
        user.replace_input_with(index, wide.outputs[0])
    return True
