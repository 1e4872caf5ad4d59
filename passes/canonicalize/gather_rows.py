"""GatherRows: look up rows of tables with Gather, whichever operator the model's code was traced to.

before  GatherND(x, Unsqueeze(index, -1))                                  x[index] of PyTorch
        GatherElements(table [1,P,C], Tile(Unsqueeze(index, -1)), axis 1)  torch.gather with repeated indices
after   Gather(x, index), Gather(table [P,C], index)

GPT-J and CodeGen keep the angles of their rotary embedding in such a table; Falcon indexes heads.
"""

from __future__ import annotations

import math

import onnx_ir as ir

from llmc.passes import edit
from llmc.passes.contract import Matches
from llmc.passes.spec import Stage

_REPEATS = {"Expand", "Identity", "Tile", "Unsqueeze"}


class GatherRows:
    """Replace other gathers by Gather. Counts one match per node."""

    name = "gather-rows"
    requires = Stage.TRACED
    ensures = Stage.TRACED

    def __call__(self, model: ir.Model) -> Matches:
        matches = Matches()
        for node in list(model.graph):
            operands = None
            if node.op_type == "GatherND":
                operands = _of_gather_nd(node)
            elif node.op_type == "GatherElements":
                operands = _of_gather_elements(node)
            if operands is not None:
                name = f"{node.outputs[0].name}.rows"
                shape = edit.dims(node.outputs[0])
                edit.replace(node, edit.insert(node, "Gather", operands, {"axis": 0}, name, shape))
                matches.count += 1
        edit.remove_unused(model)
        return matches


def _of_gather_nd(node: ir.Node) -> tuple[ir.Value, ir.Value] | None:
    """Return (x, index) of a GatherND along the first axis alone, or None."""
    index = edit.operand(node, 1)
    batched = "batch_dims" in node.attributes and edit.attribute(node, "batch_dims") != 0
    if batched or edit.dims(index)[-1] != 1:
        return None
    x, producer = edit.operand(node, 0), index.producer()
    if index.const_value is not None:
        assert isinstance(node.graph, ir.Graph)
        rows = index.const_value.numpy()[..., 0]
        return x, edit.constant(node.graph, rows, f"{index.name}_rows")
    if producer is None or producer.op_type != "Unsqueeze" or edit.numbers(producer.inputs[1]) != [-1]:
        return None
    return x, edit.operand(producer, 0)


def _of_gather_elements(node: ir.Node) -> tuple[ir.Value, ir.Value] | None:
    """Return (table [P, C], index [1, T]) of a GatherElements that reads whole rows, or None."""
    whole, repeated = edit.operand(node, 0), edit.operand(node, 1)
    shape = edit.dims(whole)
    if edit.attribute(node, "axis") != 1 or shape[0] != 1 or edit.dims(repeated) != [1, -1, shape[-1]]:
        return None
    table, index = _source(whole), _source(repeated)
    size = math.prod(edit.dims(table))
    if table.const_value is None or size != math.prod(shape) or edit.dims(index) != [1, -1]:
        return None
    if edit.dims(table) == shape[1:]:
        return table, index
    assert isinstance(node.graph, ir.Graph)
    array = table.const_value.numpy().reshape(shape[1:])
    return edit.constant(node.graph, array, f"{table.name}_rows"), index


def _source(value: ir.Value) -> ir.Value:
    """Return the value that `value` repeats, or `value`."""
    producer = value.producer()
    while producer is not None and producer.op_type in _REPEATS:
        value = edit.operand(producer, 0)
        producer = value.producer()
    return value
