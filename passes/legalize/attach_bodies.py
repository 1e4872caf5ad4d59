"""AttachBodies: every llmc operator gets its function body. InlineBodies puts the bodies into the graph."""

from __future__ import annotations

import onnx_ir as ir
import onnx_ir.passes.common as common

from llmc.passes import edit
from llmc.passes.contract import Matches
from llmc.passes.spec import Stage
from llmc.plugins.operator import bodies_for
from llmc.plugins.round_fp4 import body as round_fp4
from llmc.plugins.round_fp4.spec import NAME as ROUND_FP4


class AttachBodies:
    """The bodies that any ONNX runtime executes. Counts those that the graph lacked."""

    name = "attach-bodies"
    requires = Stage.QUANTIZED
    ensures = Stage.QUANTIZED

    def __call__(self, model: ir.Model) -> Matches:
        return _attach(model, bodies_for(node.op_type for node in model.graph))


class AttachTensorRTBodies:
    """RoundFP4 in TensorRT's operators. Counts as `AttachBodies` does.

    PagedAttention gets no body: the parser would take that for the plugin.
    """

    name = "attach-tensorrt-bodies"
    requires = Stage.QUANTIZED
    ensures = Stage.QUANTIZED

    def __init__(self, dtype: ir.DataType) -> None:
        self._dtype = dtype

    def __call__(self, model: ir.Model) -> Matches:
        if not _uses(model, ROUND_FP4):
            return Matches()
        model.graph.opset_imports["trt"] = 1
        matches = _attach(model, [round_fp4.tensorrt_function(self._dtype)])
        edit.remove_unused(model)
        return matches


class InlineBodies:
    """Replaces operators that have a body by it. Counts them.

    TensorRT's parser (1.7.1) would name the layers of every instance of a function alike, and refuse the
    second.
    """

    name = "inline-bodies"
    requires = Stage.FOR_TENSORRT
    ensures = Stage.FOR_TENSORRT

    def __call__(self, model: ir.Model) -> Matches:
        count = sum(node.op_identifier() in model.functions for node in model.graph)
        common.InlinePass()(model)
        return Matches(count)


def _uses(model: ir.Model, operator: str) -> bool:
    return any(node.op_type == operator for node in model.graph)


def _attach(model: ir.Model, functions: list[ir.Function]) -> Matches:
    added = [function for function in functions if function.identifier() not in model.functions]
    for function in added:
        model.functions[function.identifier()] = function
    return Matches(len(added))
