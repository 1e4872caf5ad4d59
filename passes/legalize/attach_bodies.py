"""AttachBodies: add the function bodies of llmc's operators, which any ONNX runtime can execute."""

from __future__ import annotations

import onnx_ir as ir

from llmc.passes.contract import Matches
from llmc.passes.spec import Stage
from llmc.plugins.operator import bodies_for


class AttachBodies:
    """Add function bodies. Counts those that the graph lacked."""

    name = "attach-bodies"
    requires = Stage.QUANTIZED
    ensures = Stage.QUANTIZED

    def __call__(self, model: ir.Model) -> Matches:
        return _attach(model, bodies_for(node.op_type for node in model.graph))


def _attach(model: ir.Model, functions: list[ir.Function]) -> Matches:
    added = [function for function in functions if function.identifier() not in model.functions]
    for function in added:
        model.functions[function.identifier()] = function
    return Matches(len(added))
