"""What a rank has and exchanges, read from its graph."""

from __future__ import annotations

import math
from dataclasses import replace

import onnx_ir as ir

from llmc.compiler.rank_plan import Exchange, RankPlan
from llmc.passes import edit
from llmc.passes.geometry import attention_nodes, cached_layers
from llmc.passes.shard.stages import Stage, rows_are_logits
from llmc.plugins.collectives.spec import ALL_GATHER, ALL_REDUCE, SEND
from llmc.runtime.backends.kv_cache import block_bytes
from llmc.runtime.bundle.manifest import Geometry


def rank_plan(
    rank: int,
    part: ir.Model,
    stage: Stage | None,
    geometry: Geometry,
    kv_dtype: str,
    weight_bytes: int,
    activation_bytes: int | None,
) -> RankPlan:
    """Return the plan of a rank.

    part: its legalized graph
    stage: its stage of the pipeline; None: every rank has all layers
    geometry: the model's
    kv_dtype: the dtype of the KV cache, by its name in the manifest
    """
    layers = cached_layers(part)
    first = stage.first if stage else 0
    return RankPlan(
        rank,
        first,
        first + len(layers),
        max(int(edit.attribute(node, "num_heads")) for node in attention_nodes(part)),
        max(layer.num_kv_heads for layer in layers),
        weight_bytes,
        block_bytes(replace(geometry, layers=layers), kv_dtype),
        activation_bytes,
        exchanges(part),
    )


def exchanges(part: ir.Model) -> tuple[Exchange, ...]:
    """Return what the rank of a graph gives to others."""
    found = []
    for operation in (ALL_REDUCE, ALL_GATHER, SEND):
        inputs = [edit.operand(node, 0) for node in part.graph if node.op_type == operation]
        if inputs:
            of_logits = sum(_row_bytes(value) for value in inputs if rows_are_logits(value))
            total = sum(map(_row_bytes, inputs))
            found.append(Exchange(operation, len(inputs), total - of_logits, of_logits))
    return tuple(found)


def _row_bytes(value: ir.Value) -> int:
    assert value.dtype is not None
    return math.prod(edit.dims(value)[1:]) * value.dtype.bitwidth // 8
