"""LowerHeadLinears: replace the traced linear layers of each head by `llmc.HeadLinear`.

before  TracedHeadLinear(x [T, H, K], w) -> [T, H, N]
after   Reshape(HeadLinear(Reshape(x, [T, H*K]), w)) -> [T, H, N]
"""

from __future__ import annotations

import onnx_ir as ir

from llmc.passes import edit
from llmc.passes.contract import Matches
from llmc.passes.spec import Stage, module_of
from llmc.plugins.head_linear.spec import ABI_VERSION, DOMAIN, NAME


class LowerHeadLinears:
    """Replace TracedHeadLinear by HeadLinear. Counts one match per layer."""

    name = "lower-head-linears"
    requires = Stage.PACKED
    ensures = Stage.PACKED

    def __call__(self, model: ir.Model) -> Matches:
        nodes = [node for node in model.graph if node.op_type == "TracedHeadLinear"]
        for node in nodes:
            x, name = edit.operand(node, 0), f"{module_of(node)}.{node.outputs[0].name}"
            _, heads, width = edit.dims(x)
            settings = {key: int(edit.attribute(node, key)) for key in ("begin", "rows", "transposed")}
            result = edit.dims(node.outputs[0])
            flat = edit.reshape(node, x, [-1, heads * width], f"{name}.heads")
            inputs, shape = [flat, edit.operand(node, 1)], [-1, heads * result[2]]
            product = edit.insert(node, NAME, inputs, {"heads": heads, **settings}, name, shape, DOMAIN)
            edit.replace(node, edit.reshape(node, product, result, f"{name}.apart"))
        if nodes:
            model.graph.opset_imports[DOMAIN] = ABI_VERSION
        edit.remove_unused(model)
        return Matches(len(nodes))
