"""GatherLogits: compute logits for the wanted rows only.

before  hidden [T, K] -> norm -> lm_head -> logits [T, V]
after   hidden -> Gather(logits_index [N]) -> norm -> lm_head -> logits [N, V]
"""

from __future__ import annotations

import onnx_ir as ir

from llmc.passes import edit
from llmc.passes.contract import Matches
from llmc.passes.spec import ELEMENTWISE, Stage
from llmc.runtime.errors import UnsupportedError

INDEX = "logits_index"  # graph input [N] int32: the rows of the packed tokens whose logits are wanted
ROWS = "N"  # the symbolic number of these rows


class GatherLogits:
    """Gather the rows before the final norm. Counts 1, or 0 if the graph gathers them already."""

    name = "gather-logits"
    requires = Stage.PACKED
    ensures = Stage.CANONICAL

    def __call__(self, model: ir.Model) -> Matches:
        graph = model.graph
        if any(value.name == INDEX for value in graph.inputs):
            return Matches(0)
        logits = graph.outputs[0]
        chain = _rowwise_chain(logits)
        first = chain[-1]
        hidden = edit.operand(first, 0)
        index = ir.Value(name=INDEX, shape=ir.Shape([ROWS]), type=ir.TensorType(ir.DataType.INT32))
        graph.inputs.append(index)
        shape: list[edit.Dim] = [ROWS, *edit.dims(hidden)[1:]]
        rows = edit.insert(first, "Gather", [hidden, index], {"axis": 0}, "hidden_rows", shape)
        first.replace_input_with(0, rows)
        for node in chain:
            output = node.outputs[0]
            output.shape = ir.Shape([ROWS, *edit.dims(output)[1:]])
        logits.name = "logits"
        return Matches(1)


def _rowwise_chain(logits: ir.Value) -> list[ir.Node]:
    """Return the nodes from `logits` back to the norm before the lm_head. Input 0 is the activation."""
    chain: list[ir.Node] = []
    node = logits.producer()
    while node is not None and node.op_type in ELEMENTWISE:
        chain.append(node)
        node = edit.operand(node, 0).producer()
    if node is None or node.op_type != "Gemm":
        raise UnsupportedError(
            "the model does not end in a linear layer over the vocabulary",
            "llmc compiles causal language models",
        )
    chain.append(node)
    before = edit.operand(node, 0).producer()
    if before is not None and before.op_type == "RMSNormalization":
        chain.append(before)
    return chain
