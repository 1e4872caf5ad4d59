"""SinkTransposes: move a norm over the head's features in front of the head transpose.

before  x [1,T,H,D] -> Transpose -> TracedRMSNorm -> [1,H,T,D]
after   x -> TracedRMSNorm -> Transpose

The two commute because the norm works on the last axis only. Gemma 3 transposes first and Qwen 3 normalizes
first. After this pass, LowerRope and PageAttention see one form.
"""

from __future__ import annotations

import onnx_ir as ir

from llmc.passes import edit
from llmc.passes.canonicalize.lower_rope import HEADS_FIRST, is_head_transpose
from llmc.passes.contract import Matches
from llmc.passes.spec import Stage


class SinkTransposes:
    """Move norms in front of head transposes. Counts one match per norm."""

    name = "sink-transposes"
    requires = Stage.TRACED
    ensures = Stage.TRACED

    def __call__(self, model: ir.Model) -> Matches:
        nodes = [
            node
            for node in model.graph
            if node.op_type == "TracedRMSNorm" and is_head_transpose(edit.operand(node, 0).producer())
        ]
        for node in nodes:
            transpose = edit.operand(node, 0).producer()
            assert transpose is not None
            source, output = edit.operand(transpose, 0), node.outputs[0]
            inputs = [source, edit.operand(node, 1)]
            settings = {name: edit.attribute(node, name) for name in ("epsilon", "offset", "rounds_once")}
            shape = edit.dims(source)
            norm = edit.insert(
                node, "TracedRMSNorm", inputs, settings, f"{output.name}.tokens", shape, "llmc"
            )
            perm = {"perm": HEADS_FIRST}
            name = f"{output.name}.heads"
            edit.replace(node, edit.insert(node, "Transpose", [norm], perm, name, edit.dims(output)))
        edit.remove_unused(model)
        return Matches(len(nodes))
