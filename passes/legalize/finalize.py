"""What every target does last to a graph, and how the graph becomes a file."""

from __future__ import annotations

import onnx_ir as ir
import onnx_ir.passes.common as common

from llmc.passes.spec import module_of

MODULE = "llmc.module"  # metadata of a node: the checkpoint's module that it was traced from


def finish(model: ir.Model) -> None:
    """Names and orders the graph, and drops the exporter's trail, which holds paths of this machine.

    In place. Each node keeps its module, so that an engine's messages can be traced back.
    """
    model.ir_version = 10
    model.producer_name, model.producer_version, model.doc_string = "llmc", None, None
    for node in model.graph:
        module = module_of(node)
        node.metadata_props.clear()
        node.metadata_props[MODULE] = module
        node.doc_string = None
    for value in [*model.graph.inputs, *model.graph.outputs, *model.graph.initializers.values()]:
        value.metadata_props.clear()
    model.metadata_props.clear()
    model.graph.metadata_props.clear()
    model.graph.name = "llmc"
    common.NameFixPass()(model)
    common.TopologicalSortPass()(model)


def serialize(model: ir.Model) -> bytes:
    """The bytes of the ONNX file; the same model gives the same bytes."""
    return ir.to_proto(model).SerializeToString(deterministic=True)
