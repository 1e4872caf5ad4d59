"""Which features of each divided value a rank has.

The features that a rank needs are found from the end of the graph: a layer that is divided by its inputs
needs the rank's share of them, and every node before it the features that the next one needs.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import onnx_ir as ir

from llmc.passes import edit
from llmc.passes.shard.roles import Roles, features
from llmc.passes.spec import module_of
from llmc.plugins.paged_attention.spec import NAME as ATTENTION
from llmc.plugins.round_fp4.spec import BLOCK as FP4_BLOCK
from llmc.plugins.round_fp4.spec import NAME as ROUND_FP4
from llmc.runtime.errors import UnsupportedError

_ALIGNED = 16  # inputs of a layer that a rank has are a multiple of this, if they can be


@dataclass
class Parts:
    """The part of one rank."""

    #: Divided value -> whether the rank has each feature, bool [features].
    masks: dict[ir.Value, np.ndarray] = field(default_factory=dict)
    #: Attention -> its heads and its KV heads, ascending.
    heads: dict[ir.Node, tuple[np.ndarray, np.ndarray]] = field(default_factory=dict)


def find_parts(model: ir.Model, roles: Roles, rank: int, ranks: int) -> Parts:
    """Return the features that `rank` of `ranks` computes.

    Raises UnsupportedError if heads, or blocks that share a scale, cannot be divided.
    """
    parts = Parts()

    def need(value: ir.Value | None, mask: np.ndarray) -> None:
        if value is not None and value in roles.divided:
            parts.masks[value] = parts.masks[value] | mask if value in parts.masks else mask

    logits = model.graph.outputs[0]
    if logits in roles.divided:
        width = features(logits)[-1]
        need(logits, _share(width, width // ranks, rank, ranks))
    for node in reversed(list(model.graph)):
        if node in roles.rows:
            need(node.inputs[0], _inputs_of(node, roles.rows[node], rank, ranks))
            continue
        wanted = {output: parts.masks[output] for output in node.outputs if output in parts.masks}
        if not wanted or node in roles.columns:
            continue
        if node.op_type == ATTENTION:
            parts.heads[node] = _heads(node, wanted[node.outputs[0]])
            for index, (chosen, total) in enumerate(operands_of(node, *parts.heads[node])):
                mask = np.zeros((total, math.prod(features(edit.operand(node, index))) // total), bool)
                mask[chosen] = True
                need(node.inputs[index], mask.reshape(-1))
            continue
        for index, value in enumerate(node.inputs):
            if value is not None and value in roles.divided:
                need(value, _before(node, index, wanted))
    return parts


def places(mask: np.ndarray, value: ir.Value) -> list[np.ndarray]:
    """Return the indices along each axis of the features that `mask` keeps of `value`.

    Raises UnsupportedError if the features are no product of indices.
    """
    kept = mask.reshape(features(value))
    axes = range(kept.ndim)
    found = [np.flatnonzero(kept.any(axis=tuple(other for other in axes if other != axis))) for axis in axes]
    if math.prod(map(len, found)) != int(mask.sum()):
        raise UnsupportedError(
            f"the features of {value.name} cannot be divided among the ranks", "build without --tp"
        )
    return found


def block_of(weight: ir.Value) -> int:
    """Return how many inputs of a layer share a scale of its weight; 0: all, or there are no scales."""
    while (node := weight.producer()) is not None:
        if block := node.attributes.get_int("block_size", 0):
            return block
        weight = edit.operand(node, 0)
    return 0


def _share(total: int, unit: int, rank: int, ranks: int) -> np.ndarray:
    """Return the mask of a rank's share: consecutive units, the first ranks have one more if need be."""
    mask = np.zeros(total, bool)
    units = np.array_split(np.arange(total // unit), ranks)[rank]
    mask[units[0] * unit : (units[-1] + 1) * unit] = True
    return mask


def _inputs_of(gemm: ir.Node, attention: ir.Node | None, rank: int, ranks: int) -> np.ndarray:
    """Return which inputs of a linear layer the rank multiplies."""
    total, block = math.prod(features(edit.operand(gemm, 0))), block_of(edit.operand(gemm, 1))
    unit = max(block, 1)
    if attention is not None:
        heads, kv_heads = (int(edit.attribute(attention, name)) for name in ("num_heads", "num_kv_heads"))
        # Whole groups; or, where ranks share a KV head, as many heads for each rank, so that none has two.
        group = heads // kv_heads if kv_heads >= ranks else heads // ranks
        if kv_heads < ranks and (ranks % kv_heads or heads % ranks):
            raise UnsupportedError(
                f"{module_of(attention)} has {heads} heads and {kv_heads} KV heads, which cannot be divided "
                f"among {ranks} ranks",
                f"choose a --tp that divides {heads}" + (f", up to {kv_heads}" if ranks % kv_heads else ""),
                "tp",
            )
        part = group * (total // heads)
        unit = math.lcm(unit, part) if kv_heads >= ranks or part % unit == 0 else total
    elif total % _ALIGNED == 0 and total // math.lcm(unit, _ALIGNED) >= ranks:
        unit = math.lcm(unit, _ALIGNED)
    if total % unit or total // unit < ranks:
        shared = f", {block} of which share a scale" if block else ""
        raise UnsupportedError(
            f"{module_of(gemm)} has {total} inputs{shared}, which cannot be divided among {ranks} ranks",
            "choose a smaller --tp" + (", or a format with smaller blocks" if block else ""),
            "tp",
        )
    return _share(total, unit, rank, ranks)


def _heads(node: ir.Node, mask: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the heads and KV heads whose outputs `mask` keeps.

    Raises UnsupportedError if it keeps a part of a head, or more heads of one KV head than of another.
    """
    total, kv_total = (int(edit.attribute(node, name)) for name in ("num_heads", "num_kv_heads"))
    each = mask.reshape(total, -1)
    heads = np.flatnonzero(each.any(axis=1))
    kv_heads, counts = np.unique(heads // (total // kv_total), return_counts=True)
    if not each[heads].all() or len(set(counts.tolist())) > 1:
        raise UnsupportedError(
            f"{module_of(node)}: the layers behind it divide its heads", "build without --tp", "tp"
        )
    return heads, kv_heads


def operands_of(node: ir.Node, heads: np.ndarray, kv_heads: np.ndarray) -> list[tuple[np.ndarray, int]]:
    """Return which heads of queries, keys and values attention keeps, each with the number of all heads."""
    total, kv_total = (int(edit.attribute(node, name)) for name in ("num_heads", "num_kv_heads"))
    return [(heads, total), (kv_heads, kv_total), (kv_heads, kv_total)]


def _before(node: ir.Node, index: int, wanted: Mapping[ir.Value, np.ndarray]) -> np.ndarray:
    """Return which features of an input are needed for the wanted features of the outputs."""
    shape = features(edit.operand(node, index))
    numbers = np.arange(math.prod(shape)).reshape(shape)
    mask = np.zeros(numbers.size, bool)
    if node.op_type == "Concat":
        ((output, kept),) = wanted.items()
        axis = int(edit.attribute(node, "axis")) % len(edit.dims(output)) - 1
        begin = sum(features(edit.operand(node, before))[axis] for before in range(index))
        return _range(kept.reshape(features(output)), axis, begin, begin + shape[axis])
    for output, kept in wanted.items():
        mask[moved(node, output, numbers)[kept]] = True
    group = {"RMSNormalization": shape[-1], "LayerNormalization": shape[-1], "RotaryEmbedding": shape[-1]}
    size = FP4_BLOCK if node.op_type == ROUND_FP4 else group.get(node.op_type, 1)
    return np.repeat(mask.reshape(-1, size).any(axis=1), size)


def moved(node: ir.Node, output: ir.Value, numbers: np.ndarray) -> np.ndarray:
    """Return the elements of `numbers` [features of the input] in the order of the output's features."""
    if node.op_type == "Split":
        axis = node.attributes.get_int("axis", 0) % (numbers.ndim + 1) - 1
        begin = 0
        for other in node.outputs:
            count = features(other)[axis]
            if other is output:
                return _range(numbers, axis, begin, begin + count)
            begin += count
    if node.op_type == "Gather":
        axis = node.attributes.get_int("axis", 0) % (numbers.ndim + 1) - 1
        return np.take(numbers, edit.numbers(node.inputs[1]) or [], axis=axis).reshape(-1)
    if node.op_type == "Slice":
        axis, begin, end = slice_of(node)
        return _range(numbers, axis, begin, end)
    return numbers.reshape(-1)


def _range(numbers: np.ndarray, axis: int, begin: int, end: int) -> np.ndarray:
    """Return the elements with the indices begin .. end - 1 along an axis, in order."""
    return numbers[(slice(None),) * axis + (slice(begin, end),)].reshape(-1)


def slice_of(node: ir.Node) -> tuple[int, int, int]:
    """Return the axis of the features that a Slice cuts, and its range.

    Raises UnsupportedError if it cuts several axes, or with steps.
    """
    starts, ends, axes, *steps = (edit.numbers(value) for value in node.inputs[1:])
    if not starts or not ends or not axes or len(axes) != 1 or (steps and steps[0] != [1]):
        raise UnsupportedError(f"{module_of(node)} (Slice) cannot be divided", "build without --tp")
    shape = edit.dims(edit.operand(node, 0))
    axis = axes[0] % len(shape)
    begin, end, _ = slice(starts[0], ends[0]).indices(shape[axis])
    return axis - 1, begin, end
