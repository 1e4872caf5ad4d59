"""Run the canonical graph a decoder layer at a time, to collect the inputs of its linear layers and cache.

The graph is cut into one subgraph for each decoder layer. Memory holds the weights and inputs of one layer
and the values that later layers need (the residual stream), however many layers there are.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from llmc.compiler.calibrate.steps import steps
from llmc.compiler.calibrate.subgraph import Piece
from llmc.compiler.checkpoint.safetensors import TensorRef
from llmc.passes import edit
from llmc.passes.geometry import attention_nodes, value_width
from llmc.passes.quantize.survey import linear
from llmc.passes.spec import module_of
from llmc.runtime.batch import Batch
from llmc.runtime.errors import BuildError, UnsupportedError

_NUMBERED = re.compile(r"(?:.*?\.)?\d+(?=\.|$)")  # a module's name up to its first number
_BEFORE = -1  # the number of the subgraph before the first decoder layer


@dataclass(frozen=True)
class LayerInputs:
    """The inputs of one decoder layer, float32, for the tokens of all sequences in order."""

    layer: int
    #: Fused linear layers -> their input, [tokens, in].
    inputs: dict[tuple[str, ...], np.ndarray]
    #: The keys that are written to the cache, [tokens, kv_heads x head_dim].
    keys: np.ndarray
    #: The values that are written to the cache, [tokens, kv_heads x head_dim]; for latent attention the keys.
    values: np.ndarray


def layers(
    model: ir.Model, tensors: Mapping[str, TensorRef], sequences: Sequence[Sequence[int]]
) -> Iterator[LayerInputs]:
    """Yield the inputs of the linear layers and of the cache of each decoder layer of `model`, in order.

    model: a canonical graph in fp32 whose parameters have no data yet. It is not changed, and must not change
        before the last layer is yielded.
    tensors: the checkpoint's tensors, by name
    sequences: token ids, none longer than the context of the graph

    Drop the inputs of one layer before asking for the next, so that memory holds only one layer's inputs.
    Linear layers outside of the decoder layers (lm_head) and those with a shared weight are left out.
    Raises BuildError if a tensor is missing or not in floating point, or if the model overflows;
    UnsupportedError if the module names do not tell the decoder layers apart.
    """
    attention = attention_nodes(model)
    layer_of = _layers(model, attention)
    piece_of = _pieces(model, layer_of)
    groups = [_groups(node for node in model.graph if layer_of[node] == n) for n in range(len(attention))]
    caches = [
        (edit.operand(node, 1), edit.operand(node, 1 if value_width(node) else 2)) for node in attention
    ]
    layer_values = [{*linears.values(), *kv} for linears, kv in zip(groups, caches, strict=True)]
    needed = _ancestors(model, {value for values in layer_values for value in values})
    batches = steps(sequences)
    # For each step, the values that later subgraphs need.
    crossing: list[dict[ir.Value, np.ndarray]] = [{} for _ in batches]
    for piece in range(_BEFORE, len(attention)):
        shown = layer_values[piece] if piece != _BEFORE else set()
        nodes = [node for node in needed if piece_of[node] == piece]
        later = {
            value
            for node in needed
            if piece_of[node] > piece
            for value in node.inputs
            if value is not None and value.producer() is not None
        }
        later |= {value for values in layer_values[piece + 1 :] for value in values}
        arrays = _run(Piece(model, nodes, [*shown, *later], tensors), batches, crossing, shown, later)
        if piece == _BEFORE:
            continue
        _refuse_overflow(arrays, piece)
        keys, values = (arrays[value] for value in caches[piece])
        inputs = {modules: arrays[value] for modules, value in groups[piece].items()}
        del arrays
        yield LayerInputs(piece, inputs, keys, values)
        del inputs, keys, values


def _run(
    piece: Piece,
    batches: Sequence[Batch],
    crossing: list[dict[ir.Value, np.ndarray]],
    shown: set[ir.Value],
    later: set[ir.Value],
) -> dict[ir.Value, np.ndarray]:
    """Run one subgraph on all steps. Return the values `shown`, float32 [tokens, width], over all steps.

    The values `later` replace those in `crossing`.
    """
    tokens = sum(len(batch.input_ids) for batch in batches)
    seen = {value: np.empty((tokens, edit.dims(value)[-1]), np.float32) for value in shown}
    first = 0
    for index, batch in enumerate(batches):
        arrays = piece(batch, crossing[index])
        last = first + len(batch.input_ids)
        for value, array in seen.items():
            array[first:last] = arrays[value]
        crossing[index] = {value: array for value, array in arrays.items() if value in later}
        first = last
    return seen


def _layers(model: ir.Model, attention: Sequence[ir.Node]) -> dict[ir.Node, int]:
    """Return the decoder layer of each node, by the name of its module; _BEFORE for the others."""
    prefixes = {_prefix(node): layer for layer, node in enumerate(attention)}
    if not attention or len(prefixes) < len(attention) or "" in prefixes:
        names = ", ".join(map(module_of, attention[:3]))
        raise UnsupportedError(
            f"the names of the model's attention ({names or 'none'}) do not tell its decoder layers apart",
            "choose a quantization that needs no calibration",
        )
    return {node: prefixes.get(_prefix(node), _BEFORE) for node in model.graph}


def _prefix(node: ir.Node) -> str:
    match = _NUMBERED.match(module_of(node))
    return match.group() if match else ""


def _pieces(model: ir.Model, layer_of: Mapping[ir.Node, int]) -> dict[ir.Node, int]:
    """Return the number of the subgraph that runs each node: its layer, or the first one with its inputs."""
    piece_of: dict[ir.Node, int] = {}
    for node in model.graph:
        producers = (value.producer() for value in node.inputs if value is not None)
        ready = max((piece_of[producer] for producer in producers if producer is not None), default=_BEFORE)
        piece_of[node] = max(ready, layer_of[node])
        if _BEFORE < layer_of[node] < ready:
            raise UnsupportedError(
                f"{module_of(node)} depends on a later decoder layer",
                "choose a quantization that needs no calibration",
            )
    return piece_of


def _groups(nodes: Iterable[ir.Node]) -> dict[tuple[str, ...], ir.Value]:
    """Map the linear layers among `nodes` to their input. Fused layers are one entry."""
    records = ((node, linear(node)) for node in nodes)
    return {record.modules: edit.operand(node, 0) for node, record in records if record is not None}


def _ancestors(model: ir.Model, values: set[ir.Value]) -> list[ir.Node]:
    """Return the nodes that `values` depend on, in the order of the graph."""
    needed = set(values)
    nodes = []
    for node in reversed(list(model.graph)):
        if needed.intersection(node.outputs):
            nodes.append(node)
            needed.update(value for value in node.inputs if value is not None)
    return nodes[::-1]


def _refuse_overflow(arrays: Mapping[ir.Value, np.ndarray], layer: int) -> None:
    for value, array in arrays.items():
        if not np.isfinite(array.sum(dtype=np.float64)):
            raise BuildError(
                f"{value.name} in decoder layer {layer} is infinite or NaN on the calibration text",
                "run `llmc check CHECKPOINT`: the weights may be damaged",
            )
