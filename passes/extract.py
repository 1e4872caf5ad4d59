"""Extraction of a subgraph as a model that ONNX Runtime can run."""

from __future__ import annotations

from collections.abc import Sequence

import onnx_ir as ir

from llmc.passes.legalize.attach_bodies import AttachBodies
from llmc.passes.legalize.finalize import Finalize
from llmc.passes.spec import Stage


def extract(model: ir.Model, inputs: Sequence[ir.Value], outputs: Sequence[ir.Value]) -> ir.Model:
    """Return the subgraph between `inputs` and `outputs`, with its ports in that order. `model` is unchanged.

    Parameters among `inputs` are graph inputs of the subgraph, not initializers.
    """
    graph = ir.convenience.extract(model.graph, inputs, outputs)
    for value in graph.inputs:
        graph.initializers.pop(str(value.name), None)
    part = ir.Model(graph, ir_version=10)
    AttachBodies()(part)
    Finalize(Stage.FOR_ONNXRUNTIME)(part)
    return part
