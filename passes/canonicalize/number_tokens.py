"""NumberTokens: replace the numbers of the tokens, counted from 0, by their positions.

before  Range(0, T, 1)
after   Reshape(position_ids [1,T], [-1])

A trace has one sequence and no cache, so the number of a token is its position. Llama 4 counts its tokens to
scale the queries of the layers without rope.
"""

from __future__ import annotations

import onnx_ir as ir

from llmc.passes import edit
from llmc.passes.contract import Matches
from llmc.passes.spec import Stage


class NumberTokens:
    """Replace Range over the tokens by their positions. Counts one match per node."""

    name = "number-tokens"
    requires = Stage.TRACED
    ensures = Stage.TRACED

    def __call__(self, model: ir.Model) -> Matches:
        matches = Matches()
        positions = next((value for value in model.graph.inputs if value.name == "position_ids"), None)
        for node in list(model.graph):
            if positions is not None and node.op_type == "Range" and _counts_tokens(node, positions):
                name = f"{node.outputs[0].name}.positions"
                edit.replace(node, edit.reshape(node, positions, [-1], name))
                matches.count += 1
        edit.remove_unused(model)
        return matches


def _counts_tokens(node: ir.Node, positions: ir.Value) -> bool:
    """Return whether a Range counts 0, 1, ... for each of `positions`, [1, T]."""
    shape, numbers = node.outputs[0].shape, positions.shape
    if shape is None or numbers is None or len(shape) != 1 or len(numbers) != 2:
        return False
    steps = [edit.numbers(edit.operand(node, index)) for index in (0, 2)]
    return steps == [[0], [1]] and shape[0] == numbers[1] and node.outputs[0].dtype == positions.dtype
