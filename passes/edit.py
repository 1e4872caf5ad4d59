"""The graph reads and edits that the passes share."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import onnx_ir as ir
import onnx_ir.passes.common

TOKENS = "T"  # the symbolic number of tokens in a step

Dim = int | str | ir.SymbolicDim


def operand(node: ir.Node, index: int) -> ir.Value:
    """Return input `index` of `node`, which must exist."""
    value = node.inputs[index]
    assert value is not None, f"{node.op_type} lacks input {index}"
    return value


def dims(value: ir.Value) -> list[int]:
    """Return the shape of `value`, with -1 for the number of tokens."""
    assert value.shape is not None, f"{value.name} has no shape"
    return [dim if isinstance(dim, int) else -1 for dim in value.shape]


def attribute(node: ir.Node, name: str) -> int | float:
    """Return an int or float attribute of `node`."""
    value = node.attributes[name].value
    assert isinstance(value, int | float), f"{node.op_type}.{name} is not a number"
    return value


def numbers(value: ir.Value | None) -> list[int] | None:
    """Return the elements of a constant of integers; None if `value` is not one."""
    if value is None or value.const_value is None:
        return None
    return [int(element) for element in value.const_value.numpy().reshape(-1)]


def constant(graph: ir.Graph, array: np.ndarray, name: str) -> ir.Value:
    """Return the initializer `name`, and add it with the content of `array` if the graph lacks it."""
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


def insert(
    before: ir.Node,
    op: str,
    inputs: Sequence[ir.Value | None],
    attributes: Mapping[str, object],
    name: str,
    shape: Sequence[Dim],
    domain: str = "",
    dtype: ir.DataType | None = None,
) -> ir.Value:
    """Insert a node with one output before another, with the metadata that names the checkpoint's module.

    before: the node in front of which the new one goes.
    op, domain: the operator. The default domain is that of standard ONNX operators.
    name: the name of the node and of its output.
    shape: the output's shape. -1 is the axis of the tokens.
    dtype: the output's dtype. The default is that of the first input.
    """
    if dtype is None and inputs[0] is not None:
        dtype = inputs[0].dtype
    symbolic = ir.Shape([TOKENS if dim == -1 else dim for dim in shape])
    output = ir.Value(name=name, shape=symbolic, type=ir.TensorType(dtype) if dtype else None)
    node = ir.node(op, list(inputs), dict(attributes), domain=domain, outputs=[output], name=name)
    node.metadata_props.update(before.metadata_props)
    assert before.graph is not None
    before.graph.insert_before(before, node)
    return output


def cast(before: ir.Node, x: ir.Value, dtype: ir.DataType, name: str) -> ir.Value:
    """Insert Cast(x, dtype) before a node."""
    return insert(before, "Cast", [x], {"to": dtype.value}, name, list(x.shape or []), dtype=dtype)


def reshape(before: ir.Node, x: ir.Value, shape: Sequence[int], name: str) -> ir.Value:
    """Insert Reshape(x, shape) before a node."""
    assert isinstance(before.graph, ir.Graph)
    return insert(before, "Reshape", [x, shape_constant(before.graph, shape)], {}, name, shape)


def shape_constant(graph: ir.Graph, shape: Sequence[int]) -> ir.Value:
    """Return the int64 initializer that holds a Reshape's target shape."""
    return constant(graph, np.array(shape, np.int64), "shape_" + "_".join(str(dim) for dim in shape))


def replace(old: ir.Node, new: ir.Value) -> None:
    """Replace the only output of `old` by `new` wherever it is used, and remove `old`."""
    output, graph = old.outputs[0], old.graph
    assert isinstance(graph, ir.Graph)
    for index, value in enumerate(graph.outputs):
        if value is output:
            new.name, output.name = output.name, f"{output.name}_replaced"
            graph.outputs[index] = new
    ir.convenience.replace_all_uses_with(output, new)
    graph.remove(old, safe=True)


def remove_unused(model: ir.Model) -> None:
    """Remove nodes and initializers that no output needs."""
    onnx_ir.passes.common.RemoveUnusedNodesPass()(model)
