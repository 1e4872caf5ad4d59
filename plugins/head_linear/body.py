"""`llmc.HeadLinear` as a function of standard ONNX operators, which any ONNX runtime executes."""

from __future__ import annotations

from typing import Any

import onnx_ir as ir
import onnxscript
from onnxscript import opset23 as op

from llmc.plugins.head_linear.spec import ABI_VERSION, DOMAIN


# mypy: disable-error-code="no-untyped-def,name-defined"
@onnxscript.script(onnxscript.values.Opset(DOMAIN, ABI_VERSION), default_opset=op)
def HeadLinear(x, w, heads: int, begin: int, rows: int, transposed: int):
    first = op.Constant(value_ints=[0])
    second = op.Constant(value_ints=[1])
    last = op.Constant(value_ints=[-1])
    count = op.Unsqueeze(op.Constant(value_int=heads), first)
    start = op.Unsqueeze(op.Constant(value_int=begin), first)
    end = op.Add(start, op.Unsqueeze(op.Constant(value_int=rows), first))
    each = op.Reshape(w, op.Concat(count, last, op.Shape(w, start=1, end=2), axis=0))
    part = op.Slice(each, start, end, second)  # [H, rows, columns]
    tokens = op.Shape(x, start=0, end=1)
    by_head = op.Transpose(op.Reshape(x, op.Concat(tokens, count, last, axis=0)), perm=[1, 0, 2])
    is_transposed = op.Constant(value_int=transposed)
    zero = op.Constant(value_int=0)
    if is_transposed > zero:
        product = op.MatMul(by_head, part)
    else:
        product = op.MatMul(by_head, op.Transpose(part, perm=[0, 2, 1]))
    return op.Reshape(op.Transpose(product, perm=[1, 0, 2]), op.Concat(tokens, last, axis=0))


def function() -> ir.Function:
    """Return the function body as an `onnx_ir.Function`, to be stored in a model that uses the operator."""
    body: Any = HeadLinear
    return ir.serde.deserialize_function(body.to_function_proto())
