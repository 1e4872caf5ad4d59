"""WidenQuantizedCaches: store the values of quantized KV caches in fp32, for ONNX Runtime.

ONNX Runtime's Gather and ScatterND take no FP8.

    before  PagedAttention<s>(q, k, v, key_cache e4m3, ...)
    after   PagedAttention(q, Mul(Cast(Cast(Div(k, s), e4m3), fp32), s), ..., key_cache fp32, ...)

The cache holds code x scale in place of the code, so the operator reads the same keys and values. The
rounding is the operator's: division in fp32, to nearest even, saturated at the largest code.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from llmc.passes import edit
from llmc.passes.contract import Matches
from llmc.passes.geometry import attention_nodes
from llmc.passes.quantize.quantize_kv_cache import cache_of
from llmc.passes.spec import Stage

_ROLES = (("key", 1, 3, 1), ("value", 2, 4, 2))  # role, its input, its cache's input and output


class WidenQuantizedCaches:
    """Give each PagedAttention with quantized caches fp32 caches. Counts one match per node.

    rounded: False leaves keys and values unrounded, to measure the error of the rounding.
    """

    name = "widen-quantized-caches"
    requires = Stage.QUANTIZED
    ensures = Stage.QUANTIZED

    def __init__(self, *, rounded: bool = True) -> None:
        self._rounded = rounded

    def __call__(self, model: ir.Model) -> Matches:
        nodes = [node for node in attention_nodes(model) if cache_of(node)]
        for node in nodes:
            for role, index, cache, output in _ROLES:
                scale = float(edit.attribute(node, f"{role}_scale"))
                node.attributes.pop(f"{role}_scale")
                element = edit.operand(node, cache).dtype
                assert element is not None
                for value in (edit.operand(node, cache), node.outputs[output]):
                    value.type = ir.TensorType(ir.DataType.FLOAT)  # a new object: a clone shares its types
                if self._rounded:
                    node.replace_input_with(
                        index, _round(node, edit.operand(node, index), scale, role, element)
                    )
        return Matches(len(nodes))


def _round(node: ir.Node, x: ir.Value, scale: float, role: str, element: ir.DataType) -> ir.Value:
    graph, shape, name = node.graph, edit.dims(x), f"{node.name}.{role}"
    assert isinstance(graph, ir.Graph)
    factor = edit.constant(graph, np.array(scale, np.float32), f"{name}_scale")

    wide = edit.cast(node, x, ir.DataType.FLOAT, f"{name}.wide")
    scaled = edit.insert(node, "Div", [wide, factor], {}, f"{name}.scaled", shape)
    codes = edit.cast(node, scaled, element, f"{name}.codes")  # of 8-bit floats: saturates by default
    values = edit.cast(node, codes, ir.DataType.FLOAT, f"{name}.values")
    return edit.insert(node, "Mul", [values, factor], {}, f"{name}.rounded", shape)
