"""FoldReshapes: keep only the last of consecutive reshapes, and remove reshapes that change nothing.

This is sound because every reshape target has one free axis, the tokens, and otherwise constant axes.
"""

from __future__ import annotations

import onnx_ir as ir

from llmc.passes import edit
from llmc.passes.contract import Matches
from llmc.passes.spec import Stage


class FoldReshapes:
    """Fold redundant reshapes. Counts the reshapes that were bypassed or removed."""

    name = "fold-reshapes"
    requires = Stage.PACKED
    ensures = Stage.PACKED

    def __call__(self, model: ir.Model) -> Matches:
        matches = Matches()
        for node in list(model.graph):
            if node.op_type != "Reshape":
                continue
            source = edit.operand(node, 0)
            producer = source.producer()
            if producer is not None and producer.op_type == "Reshape":
                source = edit.operand(producer, 0)
                node.replace_input_with(0, source)
                matches.count += 1
            output = node.outputs[0]
            if source.shape == output.shape and output not in model.graph.outputs:
                edit.replace(node, source)
                matches.count += 1
        edit.remove_unused(model)
        return matches
