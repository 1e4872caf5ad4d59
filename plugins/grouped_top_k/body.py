"""`llmc.GroupedTopK` as a function of standard ONNX operators, which any ONNX runtime executes."""

from __future__ import annotations

from typing import Any

import onnx_ir as ir
import onnxscript
from onnxscript import opset23 as op

from llmc.plugins.grouped_top_k.spec import ABI_VERSION, DOMAIN


# mypy: disable-error-code="no-untyped-def,name-defined"
@onnxscript.script(onnxscript.values.Opset(DOMAIN, ABI_VERSION), default_opset=op)
def GroupedTopK(x, choice, groups: int, kept: int, scored: int, k: int):
    first = op.Constant(value_ints=[0])
    second = op.Constant(value_ints=[1])
    last = op.Constant(value_ints=[-1])
    count = op.Unsqueeze(op.Constant(value_int=groups), first)
    tokens = op.Shape(choice, start=0, end=1)
    by_group = op.Reshape(choice, op.Concat(tokens, count, last, axis=0))
    best, _ = op.TopK(by_group, op.Unsqueeze(op.Constant(value_int=scored), first), axis=-1)
    scores = op.ReduceSum(best, last, keepdims=0)  # [T, groups]
    _, chosen = op.TopK(scores, op.Unsqueeze(op.Constant(value_int=kept), first), axis=-1)
    marks = op.ReduceSum(op.OneHot(chosen, count, op.Constant(value_floats=[0.0, 1.0])), second, keepdims=0)
    allowed = op.Unsqueeze(op.Greater(marks, op.Constant(value_float=0.5)), last)
    lowest = op.CastLike(op.Constant(value_float=float("-inf")), choice)
    open_to_all = op.Reshape(op.Where(allowed, by_group, lowest), op.Shape(choice))
    _, ids = op.TopK(open_to_all, op.Unsqueeze(op.Constant(value_int=k), first), axis=-1)
    values = op.GatherElements(x, ids, axis=1)
    return values, ids


def function() -> ir.Function:
    """Return the function body as an `onnx_ir.Function`, to be stored in a model that uses the operator."""
    body: Any = GroupedTopK
    return ir.serde.deserialize_function(body.to_function_proto())
