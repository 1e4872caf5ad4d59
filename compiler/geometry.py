"""Reads off the canonical graph what the runtime must know to size its buffers."""

from __future__ import annotations

import onnx_ir as ir

from llmc.plugins.paged_attention.spec import BLOCK_SIZE, NAME
from llmc.runtime.bundle.manifest import Geometry, Layer


def attention_nodes(model: ir.Model) -> list[ir.Node]:
    """The paged attention nodes, layer by layer."""
    nodes = [node for node in model.graph if node.op_type == NAME]
    return sorted(nodes, key=lambda node: int((node.inputs[3].name or "").rpartition(".")[2]))  # type: ignore[union-attr]


def read_geometry(model: ir.Model) -> Geometry:
    """The geometry of a canonical graph; the graph, not the config, is what the engine computes."""
    layers, heads = [], 0
    for node in attention_nodes(model):
        key_cache, value_cache = node.inputs[3], node.inputs[4]
        assert key_cache is not None and key_cache.shape is not None
        assert value_cache is not None and value_cache.shape is not None
        window = node.attributes["window"].as_int()
        heads = max(heads, node.attributes["num_heads"].as_int())
        layers.append(
            Layer(
                kind="sliding" if window else "full",
                window=window,
                num_kv_heads=int(key_cache.shape[1]),  # type: ignore[arg-type]
                head_dim=int(key_cache.shape[3]),  # type: ignore[arg-type]
                v_head_dim=int(value_cache.shape[3]),  # type: ignore[arg-type]
            )
        )
    logits = model.graph.outputs[0]
    embedding = next(node for node in model.graph if node.op_type == "Gather").outputs[0]
    assert logits.shape is not None and embedding.shape is not None
    return Geometry(
        num_layers=len(layers),
        num_heads=heads,
        num_kv_heads=max(layer.num_kv_heads for layer in layers),
        head_dim=max(layer.head_dim for layer in layers),
        v_head_dim=max(layer.v_head_dim for layer in layers),
        hidden_size=int(embedding.shape[-1]),  # type: ignore[arg-type]
        vocab_size=int(logits.shape[-1]),  # type: ignore[arg-type]
        layers=tuple(layers),
        block_size=BLOCK_SIZE,
    )
