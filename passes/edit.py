"""The few graph edits that the passes share."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

TOKENS = "T"  # the symbolic number of tokens in a step


def constant(graph: ir.Graph, array: np.ndarray, name: str) -> ir.Value:
    """An initializer with the content of `array`, shared with an equal one of the same `name`."""
    existing = graph.initializers.get(name)
    if existing is not None:
        return existing
    value = ir.Value(
        name=name,
        const_value=ir.tensor(array, name=name),
        shape=ir.Shape(array.shape),
        type=ir.TensorType(ir.DataType.from_numpy(array.dtype)),
    )
    graph.register_initializer(value)
    return value


def reshape(before: ir.Node, x: ir.Value, shape: Sequence[int], name: str) -> ir.Value:
    """Inserts Reshape(x, shape) before a node; -1 stands for the axis of the tokens."""
    graph = before.graph
    assert isinstance(graph, ir.Graph)
    target = constant(graph, np.array(shape, np.int64), "shape_" + "_".join(str(d) for d in shape))
    dims = [TOKENS if dim == -1 else dim for dim in shape]
    return insert(before, "Reshape", [x, target], {}, name, dims, x.dtype)


def insert(
    before: ir.Node,
    op: str,
    inputs: Sequence[ir.Value | None],
    attributes: dict[str, object],
    name: str,
    shape: Sequence[int | str | ir.SymbolicDim],
    dtype: ir.DataType | None,
    domain: str = "",
) -> ir.Value:
    """Inserts a node with one output before another, keeping the trail to the checkpoint's module."""
    output = ir.Value(name=name, shape=ir.Shape(shape), type=ir.TensorType(dtype) if dtype else None)
    node = ir.node(op, list(inputs), attributes, domain=domain, outputs=[output], name=name)
    node.metadata_props.update(before.metadata_props)
    assert before.graph is not None
    before.graph.insert_before(before, node)
    return output


def replace(old: ir.Node, new: ir.Value) -> None:
    """Lets everything that used `old`'s only output use `new`, and removes `old`."""
    output = old.outputs[0]
    graph = old.graph
    assert isinstance(graph, ir.Graph)
    for index, value in enumerate(graph.outputs):
        if value is output:
            new.name, output.name = output.name, f"{output.name}_replaced"
            graph.outputs[index] = new
    ir.convenience.replace_all_uses_with(output, new)
    graph.remove(old, safe=True)


def attribute(node: ir.Node, name: str) -> int | float:
    """A number attribute of `node`."""
    value = node.attributes[name].value
    assert isinstance(value, int | float)
    return value


def remove_unused(model: ir.Model) -> None:
    """Removes nodes and initializers that no output needs."""
    import onnx_ir.passes.common as common

    common.RemoveUnusedNodesPass()(model)
