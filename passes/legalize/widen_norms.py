"""WidenNorms: normalize and scale in fp32 where a norm rounds once, as in Gemma and OLMo 2.

    before  RMSNormalization(x, w)                16 bits; w may be Add(weight, c)
    after   Cast(RMSNormalization(Cast(x, fp32), Cast(w, fp32)))       Add in fp32 too

Other norms round before the weight, as in Llama. The trace probes the model's norm module and marks the node.
"""

from __future__ import annotations

import onnx_ir as ir

from llmc.passes import edit
from llmc.passes.contract import Matches
from llmc.passes.spec import ROUNDS_ONCE, Stage


class WidenNorms:
    """Widen marked norms. Counts one match per norm."""

    name = "widen-norms"
    requires = Stage.QUANTIZED
    ensures = Stage.QUANTIZED

    def __call__(self, model: ir.Model) -> Matches:
        nodes = [node for node in model.graph if _is_narrow(node) and _rounds_once(node)]
        for node in nodes:
            _widen(node)
        edit.remove_unused(model)
        return Matches(len(nodes))


def _is_narrow(node: ir.Node) -> bool:
    return node.op_type == "RMSNormalization" and edit.operand(node, 1).dtype != ir.DataType.FLOAT


def _rounds_once(node: ir.Node) -> bool:
    return ROUNDS_ONCE in node.metadata_props or _offset(edit.operand(node, 1)) is not None


def _offset(scale: ir.Value) -> ir.Node | None:
    """Return the Add that produces a norm's weight, or None."""
    add = scale.producer()
    return add if add is not None and add.op_type == "Add" else None


def _widen(node: ir.Node) -> None:
    x, scale = edit.operand(node, 0), edit.operand(node, 1)
    name, graph = node.name or str(node.outputs[0].name), node.graph
    assert isinstance(graph, ir.Graph)
    assert x.dtype is not None
    add = _offset(scale)
    weight = scale if add is None else edit.operand(add, 0)
    wide_scale = edit.cast(node, weight, ir.DataType.FLOAT, f"{name}.wide_weight")
    if add is not None:
        offset = edit.operand(add, 1)
        assert offset.const_value is not None
        wide_offset = edit.constant(
            graph, offset.const_value.numpy().astype("float32"), f"{offset.name}_wide"
        )
        wide_scale = edit.insert(
            node, "Add", [wide_scale, wide_offset], {}, f"{name}.wide_scale", edit.dims(weight)
        )
    wide_x = edit.cast(node, x, ir.DataType.FLOAT, f"{name}.wide_x")
    settings = {key: edit.attribute(node, key) for key in ("axis", "epsilon")}
    shape = list(x.shape or [])
    wide = edit.insert(node, "RMSNormalization", [wide_x, wide_scale], settings, f"{name}.wide", shape)
    edit.replace(node, edit.cast(node, wide, x.dtype, f"{name}.rounded"))
