"""The geometry of a canonical graph, from which the runtime sizes its buffers."""

from __future__ import annotations

from typing import Literal

import onnx_ir as ir

from llmc.passes import edit
from llmc.plugins.paged_attention.spec import BLOCK_SIZE, NAME
from llmc.runtime.bundle.manifest import Geometry, Layer


def attention_nodes(model: ir.Model) -> list[ir.Node]:
    """Return the paged attention nodes in the order of the layers."""
    nodes = [node for node in model.graph if node.op_type == NAME]
    return sorted(nodes, key=lambda node: int(str(edit.operand(node, 3).name).rpartition(".")[2]))


def value_width(attention: ir.Node) -> int:
    """Return the number of the numbers of a key that are its value; 0 if values have a cache of their own."""
    return attention.attributes.get_int("value_width", 0)


def chunk_size(attention: ir.Node) -> int:
    """Return the number of positions of a chunk, in which tokens attend to each other; 0 without chunks."""
    return attention.attributes.get_int("chunk", 0)


def cached_layers(model: ir.Model) -> tuple[Layer, ...]:
    """Return the attention layers of a canonical graph, or of a rank's part of one, from their KV caches."""
    layers = []
    for node in attention_nodes(model):
        _, kv_heads, _, width = edit.dims(edit.operand(node, 3))
        values = node.inputs[4]
        window, chunk = int(edit.attribute(node, "window")), chunk_size(node)
        kind: Literal["sliding", "chunked", "full"] = "chunked" if chunk else "sliding" if window else "full"
        layers.append(Layer(kind, chunk or window, kv_heads, width, edit.dims(values)[3] if values else 0))
    return tuple(layers)


def read_geometry(model: ir.Model) -> Geometry:
    """Return the geometry of a canonical graph. The config is not read: the engine runs the graph."""
    layers = cached_layers(model)
    embedding = next(node for node in model.graph if node.op_type == "Gather").outputs[0]
    return Geometry(
        num_layers=len(layers),
        num_heads=max(int(edit.attribute(node, "num_heads")) for node in attention_nodes(model)),
        num_kv_heads=max(layer.num_kv_heads for layer in layers),
        head_dim=max(layer.head_dim for layer in layers),
        v_head_dim=max(layer.v_head_dim for layer in layers),
        hidden_size=edit.dims(embedding)[-1],
        vocab_size=edit.dims(model.graph.outputs[0])[-1],
        layers=layers,
        block_size=BLOCK_SIZE,
    )
