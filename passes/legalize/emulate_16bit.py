"""The graph that TensorRT gets, as one that ONNX Runtime computes on the CPU with the same roundings.

Every tensor keeps its type. A node that computes does so in fp32: its inputs are widened, which is exact, and
its outputs are rounded once, to nearest even, as a GPU does that sums in fp32. What rounds inside a node:

RMSNormalization  in fp32, rounded before the weight, and after it, as ONNX defines it and Llama does it
PagedAttention    scores, softmax and sums in fp32; the softmax weights are rounded for the second product

ONNX Runtime 1.32 has no bf16 arithmetic. It has fp16, but leaves roundings out where it likes: its error was
half of transformers' (tales, 2026-11-23), this graph's is within 15 % of it. Caches are fp32 and hold rounded
values, because the backend keeps them so; FP8 ones E4M3 codes times their scale (`onnxruntime_fp8_cache.py`).
docs/explanation/fidelity.md says what this proves.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import onnx_ir.passes.common as common

from llmc.passes import edit
from llmc.passes.geometry import attention_nodes
from llmc.passes.legalize.lower_for_tensorrt import DTYPES
from llmc.passes.legalize.unpack_fp4_weights import unpack_fp4
from llmc.passes.legalize.widen_fp8_caches import widen_fp8_caches
from llmc.passes.spec import STRUCTURAL
from llmc.plugins.paged_attention import body
from llmc.plugins.round_fp4 import body as round_fp4
from llmc.plugins.round_fp4 import spec as round_fp4_spec

# Beside weights/ while they are needed; no part of a bundle. The second: with the KV cache rounded to FP8.
ORACLE_FILE, KV_ORACLE_FILE = "rank0.oracle.onnx", "rank0.kv-oracle.onnx"
_MOVES = STRUCTURAL | {"Cast", "Identity"}  # these compute nothing: they take and give any type


def oracle_model(model: ir.Model, dtype: str, *, round_cache: bool = True) -> ir.Model:
    """A copy of `model`, which `lower_for_tensorrt` made in `dtype`, that ONNX Runtime can run.

    Its weights are the same external data, so its file must lie where the graph's lies. In "fp32" nothing is
    rounded, and all it gets is the body of its attention. round_cache: False for the numbers that a cache in
    the dtype would give where `model` has FP8 caches.
    """
    oracle = model.clone()
    unpack_fp4(oracle)
    widen_fp8_caches(oracle, rounded=round_cache)
    oracle.functions.clear()
    oracle.graph.opset_imports.pop("trt", None)
    if any(node.op_type == round_fp4_spec.NAME for node in oracle.graph):
        rounding = round_fp4.function()
        oracle.functions[rounding.identifier()] = rounding
    function = body.function()
    for node in attention_nodes(oracle):
        for name in ("plugin_namespace", "plugin_version"):
            node.attributes.pop(name, None)
    if narrow := DTYPES.get(dtype):
        for value in (*oracle.graph.inputs, *oracle.graph.outputs):
            if value.dtype == narrow:  # a cache
                value.type = ir.TensorType(ir.DataType.FLOAT)
        for node in list(oracle.graph):
            if node.op_type not in _MOVES:
                _compute_in_fp32(node, narrow)
        _round_softmax(function, narrow)
    oracle.functions[function.identifier()] = function
    common.TopologicalSortPass()(oracle)
    return oracle


def _compute_in_fp32(node: ir.Node, narrow: ir.DataType) -> None:
    """y = op(x) -> y = round(op(widen(x)))."""
    rounded = [value for value in node.outputs if value.dtype == narrow]
    for index, value in enumerate(node.inputs):
        if value is not None and value.dtype == narrow:
            node.replace_input_with(index, _widened(node, value))
    for value in rounded:
        _round(node, value, narrow)
    if node.op_type == "RMSNormalization" and rounded:
        _round_before_weight(node, narrow)


def _widened(node: ir.Node, value: ir.Value) -> ir.Value:
    """`value` in fp32: one Cast, however many use it."""
    name = f"{value.name}.in_fp32"
    for user, _ in value.uses():
        if user.outputs[0].name == name:
            return user.outputs[0]
    return _cast(node, value, ir.DataType.FLOAT, name)


def _round(node: ir.Node, value: ir.Value, narrow: ir.DataType) -> None:
    """Lets those that use `value` use it rounded; `value` itself is fp32 from here on."""
    value.type = ir.TensorType(ir.DataType.FLOAT)  # a new one: a clone shares its types with the original
    uses = list(value.uses())
    rounded = _cast(node, value, narrow, f"{value.name}.rounded")
    for user, index in uses:
        user.replace_input_with(index, rounded)


def _round_before_weight(node: ir.Node, narrow: ir.DataType) -> None:
    """norm(x, w) -> Mul(widen(round(norm(x, 1))), w)."""
    weight, output = edit.operand(node, 1), node.outputs[0]
    width = edit.dims(weight)
    assert isinstance(node.graph, ir.Graph)
    ones = edit.constant(node.graph, np.ones(width, np.float32), f"ones_{width[-1]}")
    shape = list(output.shape or [])
    settings = {key: edit.attribute(node, key) for key in ("axis", "epsilon") if key in node.attributes}
    x = edit.operand(node, 0)
    normal = edit.insert(node, "RMSNormalization", [x, ones], settings, f"{output.name}.normal", shape)
    short = _cast(node, normal, narrow, f"{output.name}.normal_rounded")
    wide = _cast(node, short, ir.DataType.FLOAT, f"{output.name}.normal_in_fp32")
    edit.replace(node, edit.insert(node, "Mul", [wide, weight], {}, f"{output.name}.scaled", shape))


def _round_softmax(function: ir.Function, narrow: ir.DataType) -> None:
    """Rounds attention's weights, which the kernels multiply with the values in the model's type."""
    (softmax,) = [node for node in function if node.op_type == "Softmax"]
    weights = softmax.outputs[0]
    uses = list(weights.uses())
    short = ir.node("Cast", [weights], {"to": narrow.value})
    wide = ir.node("Cast", [short.outputs[0]], {"to": ir.DataType.FLOAT.value})
    function.insert_after(softmax, [short, wide])
    for user, index in uses:
        user.replace_input_with(index, wide.outputs[0])


def _cast(near: ir.Node, x: ir.Value, dtype: ir.DataType, name: str) -> ir.Value:
    """Cast(x, dtype), to be put in order later."""
    value = edit.insert(near, "Cast", [x], {"to": dtype.value}, name, list(x.shape or []))
    value.dtype = dtype
    return value
