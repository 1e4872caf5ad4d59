"""The graph of a bundle as an ONNX file, with its weights as external data."""

from __future__ import annotations

from collections.abc import Callable

import onnx_ir as ir

from llmc.compiler.bundle_writer import BundleWriter
from llmc.compiler.targets.base import GRAPH_FILE, WeightSources
from llmc.compiler.weights.write import write_weights
from llmc.passes.legalize.finalize import serialize


def write_graph(
    model: ir.Model, sources: WeightSources, writer: BundleWriter, on_bytes: Callable[[int], None]
) -> None:
    """Write WEIGHTS_FILE, and GRAPH_FILE, which refers to it. on_bytes: see `Target.write_weights`."""
    write_weights(model, sources.tensors, writer, on_bytes, sources.made)
    writer.path(GRAPH_FILE).write_bytes(serialize(model))
