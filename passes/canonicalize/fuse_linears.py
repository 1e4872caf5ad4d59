"""FuseLinears: linear layers that read the same input become one, and a split.

before  q = Gemm(x, Wq); k = Gemm(x, Wk); v = Gemm(x, Wv)
after   q, k, v = Split(Gemm(x, [Wq; Wk; Wv]))

One pass over a larger weight keeps memory busier than several small ones, and on the CPU it keeps the
activation after a gate projection from being fused into a slower kernel (docs/explanation/performance.md).
The fused initializer has no data yet; its name is the names of its parts, in order, joined by `|`.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence

import numpy as np
import onnx_ir as ir

from llmc.passes import edit
from llmc.passes.contract import Matches
from llmc.passes.spec import Stage, module_of

JOIN = "|"


class FuseLinears:
    """Counts one match per group of layers made one.

    why_apart: from the names of weights that could be one to the reason why they must not, or "".
    """

    name = "fuse-linears"
    requires = Stage.PACKED
    ensures = Stage.PACKED

    def __init__(self, why_apart: Callable[[Sequence[str]], str] = lambda weights: "") -> None:
        self._why_apart = why_apart

    def __call__(self, model: ir.Model) -> Matches:
        matches = Matches()
        groups: defaultdict[ir.Value, list[ir.Node]] = defaultdict(list)
        for node in model.graph:
            if node.op_type == "Gemm":
                groups[edit.operand(node, 0)].append(node)
        for nodes in groups.values():
            if len(nodes) < 2:
                continue
            if reason := _why_not(nodes):
                matches.near_misses.append(f"{module_of(nodes[0])}: {reason}")
                continue
            if reason := self._why_apart([str(edit.operand(node, 1).name) for node in nodes]):
                matches.near_misses.append(f"{module_of(nodes[0])} stays apart: {reason}")
                matches.declined += 1
                continue
            _fuse(model.graph, nodes)
            matches.count += 1
        edit.remove_unused(model)
        return matches


def _why_not(nodes: list[ir.Node]) -> str:
    weights = [edit.operand(node, 1) for node in nodes]
    if any(weight.const_value is not None or not weight.is_initializer() for weight in weights):
        return "a weight is not a parameter of the checkpoint"
    if len({weight.dtype for weight in weights}) > 1:
        return "the weights have different dtypes"
    if len({len(node.inputs) for node in nodes}) > 1:
        return "some of the layers have a bias and some have none"
    return ""


def _fuse(graph: ir.Graph, nodes: list[ir.Node]) -> None:
    first = nodes[0]
    x = edit.operand(first, 0)
    operands = [_joined(graph, nodes, index) for index in range(1, len(first.inputs))]
    sizes = [edit.dims(node.outputs[0])[1] for node in nodes]
    name = JOIN.join(module_of(node) for node in nodes)
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
    """The initializer that holds the weights (1) or biases (2) of all `nodes`, one after the other."""
    parts = [edit.operand(node, index) for node in nodes]
    shape = [sum(edit.dims(part)[0] for part in parts), *edit.dims(parts[0])[1:]]
    value = ir.Value(
        name=JOIN.join(str(part.name) for part in parts), shape=ir.Shape(shape), type=parts[0].type
    )
    graph.initializers.add(value)  # (register_initializer demands data)
    return value
