"""UntieHead: give an lm_head that is tied to the embedding a separate matrix, if the plan quantizes it.

before  Gather(E, ids), Gemm(x, E)
after   Gather(E, ids), Gemm(x, W)         W: a parameter with the rows of E
"""

from __future__ import annotations

from dataclasses import replace

import onnx_ir as ir

from llmc.passes import edit
from llmc.passes.contract import Matches
from llmc.passes.parameter import new_parameter
from llmc.passes.quantize.plan import QuantPlan
from llmc.passes.quantize.survey import tied_linear
from llmc.passes.spec import Stage, module_of


class UntieHead:
    """Untie matrices from the embedding. Counts one match per matrix."""

    name = "untie-head"
    requires = Stage.CANONICAL
    ensures = Stage.CANONICAL

    def __init__(self, plan: QuantPlan) -> None:
        self._modules = {module.name for module in plan.modules if module.tied and module.format}

    def __call__(self, model: ir.Model) -> Matches:
        matches = Matches()
        for node in model.graph:
            record = tied_linear(node) if module_of(node) in self._modules else None
            if record is None:
                continue
            weight = edit.operand(node, 1)
            assert weight.dtype is not None
            assert weight.shape is not None
            untied = replace(record, modules=(module_of(node),))
            node.replace_input_with(1, new_parameter(model.graph, untied, weight.shape, weight.dtype))
            matches.count += 1
        return matches
