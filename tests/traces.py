"""Traces that several tests start from: made once, copied for each."""

from __future__ import annotations

import onnx_ir as ir

from llmc.compiler.trace.export import Trace


def copy_of(done: Trace) -> Trace:
    """A trace that can be rewritten; `done` stays as it is."""
    model = done.model.clone()
    values = [*model.graph.inputs, *model.graph.initializers.values()]
    for value in (*values, *(value for node in model.graph for value in node.outputs)):
        if value.dtype is not None:
            value.type = ir.TensorType(value.dtype)  # a clone shares them with the original
    return Trace(model, done.parameters, done.tied, done.replaced)
