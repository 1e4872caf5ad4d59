"""SinkTransposes: a norm over the head's features moves in front of the head transpose.

before  x [1,T,H,D] -> Transpose -> TracedRMSNorm -> [1,H,T,D]
after   x -> TracedRMSNorm -> Transpose

The two commute because the norm works on the last axis only. Gemma 3 writes it the first way, Qwen 3 the
second; afterwards LowerRope and PageAttention see one form.
"""

from __future__ import annotations

import onnx_ir as ir

from llmc.passes import edit
from llmc.passes.contract import Matches
from llmc.passes.lower_rope import HEADS_FIRST, is_head_transpose
from llmc.passes.spec import Stage


class SinkTransposes:
    """Counts one match per norm moved."""

    name = "sink-transposes"
    requires = Stage.TRACED
    ensures = Stage.TRACED

    def __call__(self, model: ir.Model) -> Matches:
        matches = Matches()
        for node in list(model.graph):
            x = node.inputs[0] if node.inputs else None
            producer = x.producer() if x is not None else None
            if node.op_type != "TracedRMSNorm" or producer is None or not is_head_transpose(producer):
                continue
            source, output = producer.inputs[0], node.outputs[0]
            assert source is not None and source.shape is not None and output.shape is not None
            attributes = {key: value.value for key, value in node.attributes.items()}
            name = f"{output.name}.tokens"
            inputs = [source, *node.inputs[1:]]
            shape = list(source.shape)
            norm = edit.insert(node, "TracedRMSNorm", inputs, attributes, name, shape, output.dtype, "llmc")
            heads = edit.insert(
                node, "Transpose", [norm], {"perm": HEADS_FIRST}, f"{output.name}.heads", list(output.shape), output.dtype
            )
            edit.replace(node, heads)
            matches.count += 1
        edit.remove_unused(model)
        return matches
