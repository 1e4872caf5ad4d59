"""Which values of a graph are divided among the ranks, and which linear layers by outputs or by inputs.

A value is whole, the same on every rank, or divided: each rank has some of its features. A linear layer that
reads a whole value is divided by its outputs, one that reads a divided value by its inputs, and its results
are summed over the ranks. Attention is divided by heads. The logits are divided by tokens of the vocabulary
and gathered.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import onnx_ir as ir

from llmc.passes import edit
from llmc.passes.geometry import value_width
from llmc.passes.spec import ELEMENTWISE, module_of
from llmc.plugins.experts.spec import NAME as EXPERTS
from llmc.plugins.paged_attention.spec import NAME as ATTENTION
from llmc.plugins.paged_attention.spec import SINKS
from llmc.plugins.round_fp4.spec import NAME as ROUND_FP4
from llmc.runtime.errors import UnsupportedError

_NORMS = ("RMSNormalization", "LayerNormalization")
_SAME_FEATURES = ELEMENTWISE | {"QuantizeLinear", "DequantizeLinear", "RotaryEmbedding", ROUND_FP4}
_MOVES = ("Reshape", "Split", "Slice", "Gather", "Concat")


@dataclass
class Roles:
    """The division of a graph."""

    #: The divided values.
    divided: set[ir.Value] = field(default_factory=set)
    #: Linear layers that are divided by their outputs.
    columns: set[ir.Node] = field(default_factory=set)
    #: Linear layers that are divided by their inputs, and the attention whose heads these are, if any.
    rows: dict[ir.Node, ir.Node | None] = field(default_factory=dict)
    #: Values that do not vary: initializers, and what is computed of them.
    constants: set[ir.Value] = field(default_factory=set)


def find_roles(model: ir.Model, ranks: int) -> Roles:
    """Divide a quantized graph among `ranks` ranks.

    A linear layer whose outputs meet whole values, or are normalized together, stays whole.
    Raises UnsupportedError for attention whose output does so, for attention sinks, and for a mixture of
    experts.
    """
    for node in model.graph:
        if node.op_type == ATTENTION and len(node.inputs) > SINKS:
            raise UnsupportedError(
                f"{module_of(node)} has attention sinks, which --tp does not divide",
                f"--pp {ranks} divides the layers among as many ranks",
                "tp",
            )
        if node.op_type == ATTENTION and value_width(node):
            raise UnsupportedError(
                f"{module_of(node)} is multi-head latent attention, which --tp does not divide",
                f"--pp {ranks} divides the layers among as many ranks",
                "tp",
            )
        if node.op_type == EXPERTS:
            raise UnsupportedError(
                f"{module_of(node)} is a mixture of experts, which --tp does not divide",
                f"--pp {ranks} divides the layers among as many ranks",
                "tp",
            )
    whole: set[ir.Node] = set()
    while True:
        roles, conflicts = _propagate(model, ranks, whole)
        if not conflicts:
            return roles
        whole |= conflicts


def features(value: ir.Value) -> list[int]:
    """Return the shape of a value without the axis of the tokens."""
    return edit.dims(value)[1:]


def _propagate(model: ir.Model, ranks: int, whole: set[ir.Node]) -> tuple[Roles, set[ir.Node]]:
    """Return the roles if the layers in `whole` stay whole, and the other layers that must stay whole."""
    roles = Roles(constants=set(model.graph.initializers.values()))
    origins: dict[ir.Value, frozenset[ir.Node]] = {}  # divided value -> the layers that it comes from
    heads: dict[ir.Value, ir.Node] = {}  # divided value -> the attention whose output it is
    conflicts: set[ir.Node] = set()
    for node in model.graph:
        inputs = [value for value in node.inputs if value is not None]
        if all(value in roles.constants for value in inputs):
            roles.constants.update(node.outputs)
            continue
        sources = [value for value in inputs if value in roles.divided]
        if node.op_type == "Gemm":
            if sources:
                roles.rows[node] = heads.get(sources[0])
            elif node not in whole:
                roles.columns.add(node)
                roles.divided.add(node.outputs[0])
                origins[node.outputs[0]] = frozenset((node,))
            continue
        if node.op_type == ATTENTION:
            roles.divided.add(node.outputs[0])
            heads[node.outputs[0]] = node
            origins[node.outputs[0]] = frozenset()
            continue
        if not sources:
            continue
        origin = frozenset().union(*(origins[value] for value in sources))
        others = [value for value in inputs if value not in roles.divided and value not in roles.constants]
        if not _can_divide(node, sources, others):
            if not origin:
                raise UnsupportedError(
                    f"{module_of(node)} ({node.op_type}) combines the outputs of all attention heads, which "
                    "tensor parallelism divides among the ranks",
                    "build without --tp",
                )
            conflicts |= origin
            continue
        roles.divided.update(node.outputs)
        attention = next((heads[source] for source in sources if source in heads), None)
        for output in node.outputs:
            origins[output] = origin
            if attention is not None:
                heads[output] = attention
    logits = model.graph.outputs[0]
    if logits in roles.divided and features(logits)[-1] % ranks:
        conflicts |= origins[logits]
    return roles, conflicts


def _can_divide(node: ir.Node, divided: list[ir.Value], whole: list[ir.Value]) -> bool:
    """Return whether a rank can compute its features of a node's output from its features of the inputs."""
    shape = features(divided[0])
    if len({math.prod(features(value)) for value in divided}) > 1 and node.op_type != "Concat":
        return False
    if node.op_type in _NORMS:
        return edit.dims(divided[0])[-1] < math.prod(shape)
    if node.op_type == "RotaryEmbedding":
        return node.inputs[0] in divided
    if node.op_type in _MOVES:
        axis = node.attributes.get_int("axis", 1)
        return not whole and (node.op_type not in ("Gather", "Split", "Concat") or axis != 0)
    if node.op_type not in _SAME_FEATURES:
        return False
    return all(math.prod(features(value)) == 1 for value in whole)
