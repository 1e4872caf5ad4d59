"""Finalize: the last pass of every target, and the serialization of its graph."""

from __future__ import annotations

import onnx_ir as ir
import onnx_ir.passes.common as common

from llmc.passes.contract import Matches
from llmc.passes.spec import MODULE, Stage, module_of


class Finalize:
    """Name and sort the nodes, and drop the exporter's metadata, which holds paths of this machine.

    Each node keeps its module, so that an engine's messages can be traced back. Counts the nodes whose
    metadata was dropped. stage: the stage of the finished graph.
    """

    name = "finalize"

    def __init__(self, stage: Stage) -> None:
        self.requires = Stage.QUANTIZED
        self.ensures = stage

    def __call__(self, model: ir.Model) -> Matches:
        model.ir_version = 10
        model.producer_name, model.producer_version, model.doc_string = "llmc", None, None
        matches = Matches()
        for node in model.graph:
            kept = {MODULE: module_of(node)}
            if node.metadata_props != kept or node.doc_string is not None:
                node.metadata_props.clear()
                node.metadata_props.update(kept)
                node.doc_string = None
                matches.count += 1
        for value in [*model.graph.inputs, *model.graph.outputs, *model.graph.initializers.values()]:
            value.metadata_props.clear()
        model.metadata_props.clear()
        model.graph.metadata_props.clear()
        model.graph.name = "llmc"
        common.NameFixPass()(model)
        common.TopologicalSortPass()(model)
        return matches


def serialize(model: ir.Model) -> bytes:
    """Return the bytes of the ONNX file. The same model gives the same bytes."""
    return ir.to_proto(model).SerializeToString(deterministic=True)
