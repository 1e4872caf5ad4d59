"""PackTokens: remove the batch axis, so that T can be the tokens of many sequences end to end.

before  every activation [1, T, ...]
after   every activation [T, ...]; input_ids and position_ids are [T], int32

This is sound because, once attention is paged, every remaining operator treats each token by itself. Each
operator has a rule. An operator without a rule is refused by name.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from llmc.passes import edit
from llmc.passes.contract import Matches
from llmc.passes.spec import ELEMENTWISE, Stage, module_of
from llmc.runtime.errors import UnsupportedError

_ROWWISE = {"TracedLinear", "TracedRMSNorm", "Gather", "RotaryEmbedding", "PagedAttention"}
_AXIS = {"Concat", "LayerNormalization", "Softmax", "Split"}


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
        for value in ids:
            value.shape = ir.Shape([edit.TOKENS])
            value.type = ir.TensorType(ir.DataType.INT32)
        for node in list(graph):
            _pack(graph, node)
        edit.remove_unused(model)
        return Matches(1)


def _pack(graph: ir.Graph, node: ir.Node) -> None:
    batched = [value for value in node.outputs if _has_batch(value)]
    if not batched:
        return
    shape = edit.dims(batched[0])
    if node.op_type == "Reshape":
        node.replace_input_with(1, edit.shape_constant(graph, shape[1:]))
    elif node.op_type in ELEMENTWISE:
        _squeeze_constants(graph, node, len(shape))
    elif node.op_type in _AXIS:
        axis = node.attributes["axis"].as_int() if "axis" in node.attributes else 0
        _require(axis != 0, node, f"works along the batch axis (axis={axis})")
        if axis > 0:
            node.attributes["axis"] = ir.AttrInt64("axis", axis - 1)
    elif node.op_type == "Slice":
        _shift_axes(graph, node)
    elif node.op_type == "Transpose":
        perm = list(node.attributes["perm"].as_ints())
        _require(perm[0] == 0, node, f"moves the batch axis (perm={perm})")
        node.attributes["perm"] = ir.AttrInt64s("perm", [axis - 1 for axis in perm[1:]])
    else:
        _require(node.op_type in _ROWWISE, node, "has no rule for packed tokens")
    for value in batched:
        value.shape = ir.Shape([edit.TOKENS if dim == -1 else dim for dim in edit.dims(value)[1:]])


def _has_batch(value: ir.Value) -> bool:
    return value.shape is not None and len(value.shape) >= 2 and edit.dims(value)[:2] == [1, -1]


def _squeeze_constants(graph: ir.Graph, node: ir.Node, rank: int) -> None:
    """Drop the batch axis of constants of full rank, which would broadcast it back in."""
    for index, value in enumerate(node.inputs):
        if value is None or not value.is_initializer() or len(edit.dims(value)) < rank:
            continue
        _require(value.const_value is not None and edit.dims(value)[0] == 1, node, "is per batch entry")
        assert value.const_value is not None
        array = value.const_value.numpy()[0]
        node.replace_input_with(index, edit.constant(graph, array, f"{value.name}_packed"))


def _shift_axes(graph: ir.Graph, node: ir.Node) -> None:
    axes = node.inputs[3] if len(node.inputs) > 3 else None
    constant = axes.const_value if axes is not None else None
    _require(constant is not None, node, "slices along axes that are not constant")
    assert constant is not None
    values = constant.numpy()
    _require(bool((values != 0).all()), node, "slices the batch axis")
    shifted = np.where(values > 0, values - 1, values).astype(np.int64)
    name = "axes_" + "_".join(str(value) for value in shifted)
    node.replace_input_with(3, edit.constant(graph, shifted, name))


def _require(condition: bool, node: ir.Node, what: str) -> None:
    if not condition:
        raise UnsupportedError(
            f"operator {node.op_type} of module {module_of(node)} {what}",
            "llmc compiles models that treat every token alike outside attention",
        )
