"""A quantized graph without the rounding of its activations: the half of it that can be proven exactly.

    QuantizeLinear(x, s), DequantizeLinear(., s)  ->  x          llmc.RoundFP4(x, s)  ->  x

Where a value lies at the edge between two codes, the last bit of fp32 decides, and two right engines differ
by a whole code. So a build proves this graph to the bounds of fp32, and the rounding beside it.
"""

from __future__ import annotations

import onnx_ir as ir

from llmc.passes import edit
from llmc.plugins.round_fp4 import spec as round_fp4


def rounded_to(model: ir.Model) -> set[ir.DataType]:
    """The types of the codes that layers round to what they multiply with; none where none does."""
    found = set()
    for node in model.graph:
        if node.op_type == round_fp4.NAME:
            found.add(ir.DataType.FLOAT4E2M1)
        elif node.op_type == "QuantizeLinear":
            assert node.outputs[0].dtype is not None
            found.add(node.outputs[0].dtype)
    return found


def with_exact_inputs(model: ir.Model) -> ir.Model:
    """A copy of `model` that multiplies with activations as they are. Its weights are the same files."""
    exact = model.clone()
    for node in list(exact.graph):
        if _is_rounding(node):
            last = node if node.op_type == round_fp4.NAME else next(iter(node.outputs[0].uses())).node
            ir.convenience.replace_all_uses_with(last.outputs[0], edit.operand(node, 0))
    edit.remove_unused(exact)
    return exact


def _is_rounding(node: ir.Node) -> bool:
    return node.op_type in ("QuantizeLinear", round_fp4.NAME)
