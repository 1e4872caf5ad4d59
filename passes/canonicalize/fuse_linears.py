"""FuseLinears: fuse linear layers that read the same input into one, followed by a split.

before  q = Gemm(x, Wq); k = Gemm(x, Wk); v = Gemm(x, Wv)
after   q, k, v = Split(Gemm(x, [Wq; Wk; Wv]))

Reading one large weight uses the memory bandwidth better than reading several small ones. On the CPU it
also keeps the activation after a gate projection from being fused into a slower kernel
(docs/explanation/performance.md).
Routers and gates of experts stay apart. They are small, and they stay in the checkpoint's dtype where the
layers that read the same input are quantized.
The fused initializer has no data yet; its Parameter lists its parts in order.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import onnx_ir as ir

from llmc.passes import edit
from llmc.passes.contract import Matches
from llmc.passes.parameter import joined, new_parameter, parameter
from llmc.passes.spec import ELEMENTWISE, Stage, module_of
from llmc.plugins.grouped_top_k.spec import NAME as GROUPED_TOP_K


@dataclass(frozen=True)
class FusionKey:
    """The properties that pre-quantized layers must share to be fused."""

    #: Equal where one format can hold the rows of both layers.
    kind: tuple[str | int, ...]
    #: The name of the format, for the report.
    format: str
    #: Name and value of each property that a fused layer has only once, such as a global scale.
    shared: tuple[tuple[str, float | str | None], ...] = ()


@dataclass(frozen=True)
class FusionPlan:
    """The linear layers that can be fused only with layers of the same key."""

    #: The pre-quantized modules, each with its key.
    modules: Mapping[str, FusionKey] = field(default_factory=dict)

    def why_apart(self, modules: Sequence[str]) -> str:
        """Return why layers that read the same input cannot be fused exactly, or ""."""
        keys = [self.modules[name] for name in modules if name in self.modules]
        if not keys:
            return ""
        if len(keys) < len(modules):
            return "some are quantized and some are not"
        if len({key.kind for key in keys}) > 1:
            return f"they are stored as {' and '.join(dict.fromkeys(key.format for key in keys))}"
        for values in zip(*(key.shared for key in keys), strict=True):
            if len(set(values)) > 1:
                return f"they have different {values[0][0]}"
        return ""


class FuseLinears:
    """Fuse linear layers, except those that `plan` keeps apart. Counts one match per fused group."""

    name = "fuse-linears"
    requires = Stage.PACKED
    ensures = Stage.PACKED

    def __init__(self, plan: FusionPlan = FusionPlan()) -> None:
        self._plan = plan

    def __call__(self, model: ir.Model) -> Matches:
        matches = Matches()
        groups: defaultdict[ir.Value, list[ir.Node]] = defaultdict(list)
        for node in model.graph:
            is_linear = node.op_type == "Gemm" and "transB" in node.attributes
            if is_linear and edit.attribute(node, "transB") and not _is_gate(node):
                groups[edit.operand(node, 0)].append(node)
        for nodes in groups.values():
            if len(nodes) < 2:
                continue
            if reason := _why_not(nodes):
                matches.near_misses.append(f"{module_of(nodes[0])}: {reason}")
                continue
            if reason := self._plan.why_apart(_modules(nodes)):
                matches.near_misses.append(f"{module_of(nodes[0])} stays apart: {reason}")
                matches.declined += 1
                continue
            _fuse(model.graph, nodes)
            matches.count += 1
        edit.remove_unused(model)
        return matches


def _is_gate(node: ir.Node) -> bool:
    """Return whether a linear layer has one output, or chooses among its outputs as a router does."""
    readers = [use.node for use in node.outputs[0].uses()]
    while readers:
        reader = readers.pop()
        if reader.op_type in ("TopK", GROUPED_TOP_K):
            return True
        if reader.op_type in ELEMENTWISE or reader.op_type == "Softmax":
            widths = {edit.dims(value)[-1] for value in (*reader.outputs, node.outputs[0])}
            readers += [use.node for use in reader.outputs[0].uses()] if len(widths) == 1 else []
    return edit.dims(node.outputs[0])[-1] == 1


def _why_not(nodes: list[ir.Node]) -> str:
    weights = [edit.operand(node, 1) for node in nodes]
    if any(parameter(edit.operand(node, i)) is None for node in nodes for i in range(1, len(node.inputs))):
        return "a weight is not a parameter of the checkpoint"
    if len({weight.dtype for weight in weights}) > 1:
        return "the weights have different dtypes"
    if len({len(node.inputs) for node in nodes}) > 1:
        return "some of the layers have a bias and some have none"
    return ""


def _modules(nodes: list[ir.Node]) -> list[str]:
    records = [parameter(edit.operand(node, 1)) for node in nodes]
    return [module for record in records if record is not None for module in record.modules]


def _fuse(graph: ir.Graph, nodes: list[ir.Node]) -> None:
    first = nodes[0]
    x = edit.operand(first, 0)
    operands = [_joined(graph, nodes, index) for index in range(1, len(first.inputs))]
    sizes = [edit.dims(node.outputs[0])[1] for node in nodes]
    name = "|".join(module_of(node) for node in nodes)
    fused = edit.insert(first, "Gemm", [x, *operands], {"transB": 1}, name, [-1, sum(sizes)])
    lengths = edit.constant(graph, np.array(sizes, np.int64), "sizes_" + "_".join(map(str, sizes)))
    parts = [
        ir.Value(name=f"{module_of(node)}.part", shape=node.outputs[0].shape, type=node.outputs[0].type)
        for node in nodes
    ]
    split = ir.node("Split", [fused, lengths], {"axis": 1}, outputs=parts, name=f"{name}.split")
    split.metadata_props.update(first.metadata_props)
    graph.insert_before(first, split)
    for node, part in zip(nodes, parts, strict=True):
        edit.replace(node, part)


def _joined(graph: ir.Graph, nodes: list[ir.Node], index: int) -> ir.Value:
    """Add an initializer for the weights (index 1) or biases (index 2) of all `nodes`, in their order."""
    parts = [edit.operand(node, index) for node in nodes]
    records = [record for part in parts if (record := parameter(part)) is not None]
    shape = [sum(edit.dims(part)[0] for part in parts), *edit.dims(parts[0])[1:]]
    dtype = parts[0].dtype
    assert dtype is not None
    return new_parameter(graph, joined(records), ir.Shape(shape), dtype)
