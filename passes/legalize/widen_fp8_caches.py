"""FP8 KV caches for ONNX Runtime, whose Gather and ScatterND take no FP8: the same numbers, held in fp32.

    before  PagedAttention<s>(q, k, v, key_cache e4m3, ...)
    after   PagedAttention(q, Mul(Cast(Cast(Div(k, s), e4m3), fp32), s), ..., key_cache fp32, ...)

The cache holds code x scale where it held the code, so the operator reads the same keys and values. Rounding
is that of the operator's contract: divided in fp32, to nearest even, saturated at 448.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from llmc.passes import edit
from llmc.passes.geometry import attention_nodes
from llmc.passes.quantize.quantize_kv_cache import has_fp8_cache

_ROLES = (("key", 1, 3, 1), ("value", 2, 4, 2))  # role, its input, its cache's input and output


def widen_fp8_caches(model: ir.Model, *, rounded: bool = True) -> None:
    """Rewrites every PagedAttention with FP8 caches to one with fp32 caches, in place.

    rounded: False leaves keys and values as they are, to see what the rounding costs.
    """
    for node in attention_nodes(model):
        if not has_fp8_cache(node):
            continue
        for role, index, cache, output in _ROLES:
            scale = float(edit.attribute(node, f"{role}_scale"))
            node.attributes.pop(f"{role}_scale")
            for value in (edit.operand(node, cache), node.outputs[output]):
                value.type = ir.TensorType(ir.DataType.FLOAT)  # a new one: a clone shares its types
            if rounded:
                node.replace_input_with(index, _round(node, edit.operand(node, index), scale, role))


def _round(node: ir.Node, x: ir.Value, scale: float, role: str) -> ir.Value:
    graph, shape, name = node.graph, edit.dims(x), f"{node.name}.{role}"
    assert isinstance(graph, ir.Graph)
    factor = edit.constant(graph, np.array(scale, np.float32), f"{name}_scale")

    def cast(value: ir.Value, dtype: ir.DataType, suffix: str) -> ir.Value:
        made = edit.insert(node, "Cast", [value], {"to": dtype.value}, f"{name}.{suffix}", shape)
        made.dtype = dtype
        return made

    wide = cast(x, ir.DataType.FLOAT, "wide")
    scaled = edit.insert(node, "Div", [wide, factor], {}, f"{name}.scaled", shape)
    codes = cast(scaled, ir.DataType.FLOAT8E4M3FN, "codes")  # saturates, as Cast does by default
    values = cast(codes, ir.DataType.FLOAT, "values")
    return edit.insert(node, "Mul", [values, factor], {}, f"{name}.rounded", shape)
