"""LowerPartialEmbedding: the lookup in a part of a table, as standard operators.

    before  llmc.PartialEmbedding<begin = b>(ids, table [R, W])
    after   local = ids - b
            row = Min(Max(local, 0), R - 1)
            Mul(Gather(table, row), 1 - Min(Abs(local - row), 1))

An id that the part lacks looks up another row, which is multiplied by 0. Weights are finite, so its result
is 0. The operators are those that TensorRT-RTX 1.7.1 and ONNX Runtime have for int32.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from llmc.passes import edit
from llmc.passes.contract import Matches
from llmc.passes.spec import Stage
from llmc.plugins.collectives.spec import PARTIAL_EMBEDDING


class LowerPartialEmbedding:
    """Lower every PartialEmbedding. Counts one match per node."""

    name = "lower-partial-embedding"
    requires = Stage.QUANTIZED
    ensures = Stage.QUANTIZED

    def __call__(self, model: ir.Model) -> Matches:
        nodes = [node for node in model.graph if node.op_type == PARTIAL_EMBEDDING]
        for node in nodes:
            _lower(node)
        return Matches(len(nodes))


def _lower(node: ir.Node) -> None:
    graph, name = node.graph, str(node.outputs[0].name)
    ids, table = edit.operand(node, 0), edit.operand(node, 1)
    assert isinstance(graph, ir.Graph) and ids.dtype is not None and table.dtype is not None
    rows, width = edit.dims(table)
    dtype = ids.dtype.numpy()

    def number(value: int) -> ir.Value:
        return edit.constant(graph, np.array(value, dtype), f"embedding_{value}")

    def insert(op: str, inputs: list[ir.Value], label: str, shape: list[int]) -> ir.Value:
        return edit.insert(node, op, inputs, {}, f"{name}.{label}", shape)

    local = insert("Sub", [ids, number(int(edit.attribute(node, "begin")))], "local", [-1])
    low = insert("Max", [local, number(0)], "low", [-1])
    row = insert("Min", [low, number(rows - 1)], "row", [-1])
    found = edit.insert(node, "Gather", [table, row], {"axis": 0}, f"{name}.rows", [-1, width])
    away = insert("Abs", [insert("Sub", [local, row], "away", [-1])], "distance", [-1])
    lacks = insert("Min", [away, number(1)], "lacks", [-1])
    has = insert("Sub", [number(1), lacks], "has", [-1])
    column = edit.reshape(node, has, [-1, 1], f"{name}.column")
    factor = edit.cast(node, column, table.dtype, f"{name}.factor")
    edit.replace(node, insert("Mul", [found, factor], "own", [-1, width]))
