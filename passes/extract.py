"""A part of a graph as a model of its own, for ONNX Runtime."""

from __future__ import annotations

from collections.abc import Sequence

import onnx_ir as ir

from llmc.passes.legalize.attach_bodies import AttachBodies
from llmc.passes.legalize.finalize import Finalize
from llmc.passes.spec import Stage


def extract(model: ir.Model, inputs: Sequence[ir.Value], outputs: Sequence[ir.Value]) -> ir.Model:
    """The nodes of `model` between `inputs` and `outputs`, with ports in that order; `model` stays as it is.

    Parameters among `inputs` are graph inputs of the part, not initializers.
    """
    graph = ir.convenience.extract(model.graph, inputs, outputs)
    for value in graph.inputs:
        graph.initializers.pop(str(value.name), None)
    part = ir.Model(graph, ir_version=10)
    AttachBodies()(part)
    Finalize(Stage.FOR_ONNXRUNTIME)(part)
    return part
