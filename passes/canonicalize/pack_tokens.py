"""PackTokens: remove the batch axis, so that T can be the tokens of many sequences end to end.

before  activations [1, ..., T, ...]: T comes first, or after other axes such as the heads
after   the same without the first axis; input_ids and position_ids are [T], int32

This is sound because, once attention is paged, every remaining operator treats each token by itself. Each
operator has a rule. An operator without a rule is refused by name.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from llmc.passes import edit
from llmc.passes.contract import Matches
from llmc.passes.spec import ELEMENTWISE, STRUCTURAL, Stage, module_of
from llmc.runtime.errors import UnsupportedError

_ROWWISE = {"TracedLinear", "TracedHeadLinear", "TracedRMSNorm", "RotaryEmbedding", "PagedAttention"}
_AXIS = {"Concat", "LayerNormalization", "Softmax", "Split"}
_AXES_INPUT = {"Slice": 3, "Squeeze": 1, "Unsqueeze": 1}  # operator -> the input that names its axes
_KEEPS_DTYPE = (ELEMENTWISE | STRUCTURAL) - {"Cast", "Gather"}


class PackTokens:
    """Remove the batch axis. Counts 1, or 0 if there is none."""

    name = "pack-tokens"
    requires = Stage.PAGED
    ensures = Stage.PACKED

    def __call__(self, model: ir.Model) -> Matches:
        graph = model.graph
        ids = [value for value in graph.inputs if value.name in ("input_ids", "position_ids")]
        if all(len(edit.dims(value)) == 1 for value in ids):
            return Matches(0)
        batched = {value for value in ids if _has_batch(value)}
        batched |= {value for node in graph for value in node.outputs if _has_batch(value)}
        for value in ids:
            value.shape = ir.Shape([edit.TOKENS])
            value.type = ir.TensorType(ir.DataType.INT32)
        for node in list(graph):
            _pack(graph, node, batched)
            _name_tokens(node)
            _narrow_integers(graph, node)
        edit.remove_unused(model)
        return Matches(1)


def _pack(graph: ir.Graph, node: ir.Node, batched: set[ir.Value]) -> None:
    outputs = [value for value in node.outputs if value in batched]
    if not outputs:
        data = node.inputs[0] if node.inputs else None
        removes = (
            node.op_type in {"Gather", "ReduceSum", "TopK", *_AXIS, *_AXES_INPUT}
            and data is not None
            and data in batched
        )
        _require(not removes, node, "removes the batch axis or the tokens")
        return
    shape = edit.dims(outputs[0])
    if node.op_type == "Reshape":
        node.replace_input_with(1, edit.shape_constant(graph, shape[1:]))
    elif node.op_type in ELEMENTWISE:
        _squeeze_constants(graph, node, len(shape))
    elif node.op_type in _AXIS:
        _shift_axis(node, len(shape))
    elif node.op_type in _AXES_INPUT:
        _shift_axes(graph, node, _AXES_INPUT[node.op_type], len(shape))
    elif node.op_type == "Gather":
        data = node.inputs[0]
        if data is not None and data in batched:  # else the rows of a table
            _shift_axis(node, len(edit.dims(data)) + 1)  # its batch axis is removed already
    elif node.op_type == "Transpose":
        perm = list(node.attributes["perm"].as_ints())
        _require(perm[0] == 0, node, f"moves the batch axis (perm={perm})")
        node.attributes["perm"] = ir.AttrInt64s("perm", [axis - 1 for axis in perm[1:]])
    else:
        _require(node.op_type in _ROWWISE, node, "has no rule for packed tokens")
    for value in outputs:
        value.shape = ir.Shape([edit.TOKENS if dim == -1 else dim for dim in edit.dims(value)[1:]])


def _name_tokens(node: ir.Node) -> None:
    """Name the tokens of values that never had a batch axis, as the router's of a mixture of experts."""
    for value in node.outputs:
        if value.shape is not None and len(value.shape) and edit.dims(value)[0] == -1:
            value.shape = ir.Shape([edit.TOKENS, *value.shape[1:]])


def _has_batch(value: ir.Value) -> bool:
    """Return whether the shape is [1, ..., T, ...]."""
    return (
        value.shape is not None
        and len(value.shape) >= 2
        and edit.dims(value)[0] == 1
        and -1 in edit.dims(value)
    )


def _squeeze_constants(graph: ir.Graph, node: ir.Node, rank: int) -> None:
    """Drop the batch axis of constants of full rank, which would broadcast it back in."""
    for index, value in enumerate(node.inputs):
        if value is None or not value.is_initializer() or len(edit.dims(value)) < rank:
            continue
        droppable = value.const_value is not None and edit.dims(value)[0] == 1
        _require(droppable, node, "has an operand with a batch axis")
        assert value.const_value is not None
        array = value.const_value.numpy()[0]
        node.replace_input_with(index, edit.constant(graph, array, f"{value.name}_packed"))


def _narrow_integers(graph: ir.Graph, node: ir.Node) -> None:
    """Compute in int32 with the step's tokens and positions, which are int64 in the trace."""
    operands = [value for value in node.inputs if value is not None]
    if node.op_type not in _KEEPS_DTYPE or not operands:
        return
    data = operands if node.op_type in ELEMENTWISE else operands[:1]  # without shapes and axes
    if all(value.dtype != ir.DataType.INT32 for value in data):
        return
    for index, value in enumerate(node.inputs):
        constant = value.const_value if value is not None else None
        if node.op_type in ELEMENTWISE and constant is not None and constant.dtype == ir.DataType.INT64:
            array = constant.numpy()
            limits = np.iinfo(np.int32)
            _require(limits.min <= array.min() and array.max() <= limits.max, node, "needs 64-bit integers")
            assert value is not None
            name = f"{value.name}_int32"
            node.replace_input_with(index, edit.constant(graph, array.astype(np.int32), name))
    for output in node.outputs:
        if output.dtype == ir.DataType.INT64:
            output.type = ir.TensorType(ir.DataType.INT32)


def _shift_axis(node: ir.Node, rank: int) -> None:
    """Renumber the attribute `axis` of shapes of `rank` axes for shapes without the batch axis.

    Its default is -1 for LayerNormalization and Softmax, and 0 for the other operators.
    """
    default = -1 if node.op_type in ("LayerNormalization", "Softmax") else 0
    axis = node.attributes["axis"].as_int() if "axis" in node.attributes else default
    _require(axis not in (0, -rank), node, f"works along the batch axis (axis={axis})")
    if axis > 0:
        node.attributes["axis"] = ir.AttrInt64("axis", axis - 1)


def _shift_axes(graph: ir.Graph, node: ir.Node, index: int, rank: int) -> None:
    """Renumber the axes that input `index` names for shapes without the batch axis.

    rank: the number of axes of the output
    """
    values = edit.numbers(node.inputs[index]) if len(node.inputs) > index else None
    _require(values is not None, node, "has axes that are not constant")
    assert values is not None
    rank += len(values) if node.op_type == "Squeeze" else 0  # its axes are those of the input
    _require(not {0, -rank} & set(values), node, "changes the batch axis")
    shifted = np.array([axis - 1 if axis > 0 else axis for axis in values], np.int64)
    name = "axes_" + "_".join(str(value) for value in shifted)
    node.replace_input_with(index, edit.constant(graph, shifted, name))


def _require(condition: bool, node: ir.Node, problem: str) -> None:
    if not condition:
        raise UnsupportedError(
            f"operator {node.op_type} of module {module_of(node)} {problem}",
            "llmc compiles models that treat every token alike outside attention",
        )
