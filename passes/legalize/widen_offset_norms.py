"""WidenOffsetNorms: a norm whose weight has an offset computes in fp32 and rounds once, as Gemma has it.

    before  RMSNormalization(x, Add(w, c))                                       16 bits
    after   Cast(RMSNormalization(Cast(x, fp32), Add(Cast(w, fp32), c)))

transformers adds, normalizes and scales in fp32 there. Other norms round before the weight, as Llama does.
"""

from __future__ import annotations

import onnx_ir as ir

from llmc.passes import edit
from llmc.passes.contract import Matches
from llmc.passes.spec import Stage


class WidenOffsetNorms:
    """Counts one match per norm."""

    name = "widen-offset-norms"
    requires = Stage.QUANTIZED
    ensures = Stage.QUANTIZED

    def __call__(self, model: ir.Model) -> Matches:
        nodes = [node for node in model.graph if _is_narrow_offset_norm(node)]
        for node in nodes:
            _widen(node)
        edit.remove_unused(model)
        return Matches(len(nodes))


def _is_narrow_offset_norm(node: ir.Node) -> bool:
    if node.op_type != "RMSNormalization":
        return False
    scale = edit.operand(node, 1)
    add = scale.producer()
    return add is not None and add.op_type == "Add" and scale.dtype != ir.DataType.FLOAT


def _widen(node: ir.Node) -> None:
    x, add = edit.operand(node, 0), edit.operand(node, 1).producer()
    assert add is not None
    weight, offset = edit.operand(add, 0), edit.operand(add, 1)
    name, graph = node.name or str(node.outputs[0].name), node.graph
    assert isinstance(graph, ir.Graph)
    assert weight.dtype is not None
    assert offset.const_value is not None
    one = edit.constant(graph, offset.const_value.numpy().astype("float32"), f"{offset.name}_wide")
    wide_weight = edit.cast(node, weight, ir.DataType.FLOAT, f"{name}.wide_weight")
    wide_scale = edit.insert(node, "Add", [wide_weight, one], {}, f"{name}.wide_scale", edit.dims(weight))
    wide_x = edit.cast(node, x, ir.DataType.FLOAT, f"{name}.wide_x")
    settings = {key: edit.attribute(node, key) for key in ("axis", "epsilon")}
    shape = list(x.shape or [])
    wide = edit.insert(node, "RMSNormalization", [wide_x, wide_scale], settings, f"{name}.wide", shape)
    edit.replace(node, edit.cast(node, wide, weight.dtype, f"{name}.rounded"))
