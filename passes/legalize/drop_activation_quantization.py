"""DropActivationQuantization: remove activation quantization, so that the graph can be verified in fp32.

    QuantizeLinear(x, s), DequantizeLinear(., s)  ->  x          llmc.RoundFP4(x, s)  ->  x

Where a value lies on the edge between two codes, the last bit of fp32 decides, and two correct engines can
differ by a whole code. So a build verifies this graph to the bounds of fp32, and the quantization separately.
"""

from __future__ import annotations

import onnx_ir as ir

from llmc.passes import edit
from llmc.passes.contract import Matches
from llmc.passes.spec import Stage
from llmc.plugins.round_fp4 import spec as round_fp4


class DropActivationQuantization:
    """Remove activation quantization. Counts one match per quantized input."""

    name = "drop-activation-quantization"
    requires = Stage.QUANTIZED
    ensures = Stage.QUANTIZED

    def __call__(self, model: ir.Model) -> Matches:
        nodes = [node for node in model.graph if _quantizes(node)]
        for node in nodes:
            last = node if node.op_type == round_fp4.NAME else next(iter(node.outputs[0].uses())).node
            ir.convenience.replace_all_uses_with(last.outputs[0], edit.operand(node, 0))
        edit.remove_unused(model)
        return Matches(len(nodes))


def rounded_to(model: ir.Model) -> set[ir.DataType]:
    """Return the element types that layers quantize their activations to, if any."""
    elements = set()
    for node in model.graph:
        if node.op_type == round_fp4.NAME:
            elements.add(ir.DataType.FLOAT4E2M1)
        elif node.op_type == "QuantizeLinear":
            assert node.outputs[0].dtype is not None
            elements.add(node.outputs[0].dtype)
    return elements


def _quantizes(node: ir.Node) -> bool:
    return node.op_type in ("QuantizeLinear", round_fp4.NAME)
