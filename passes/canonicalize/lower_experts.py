"""LowerExperts: replace the traced mixtures of experts by `llmc.Experts`.

before  TracedExperts(x, ids, weights, gate_up [E, 2*I, D], down [E, D, I])
after   Experts(x, ids, weights, gate_up [E*2*I, D], down [E*D, I])

The matrices of all experts become one, with the same data. So the passes and the packing of linear layers
apply to it.
"""

from __future__ import annotations

import onnx_ir as ir

from llmc.passes import edit
from llmc.passes.contract import Matches
from llmc.passes.parameter import Parameter, new_parameter, parameter
from llmc.passes.spec import Stage, module_of
from llmc.plugins.experts.spec import ABI_VERSION, ACTIVATIONS, DOMAIN, NAME
from llmc.runtime.errors import UnsupportedError


class LowerExperts:
    """Replace TracedExperts by Experts. Counts one match per mixture of experts."""

    name = "lower-experts"
    requires = Stage.PACKED
    ensures = Stage.PACKED

    def __call__(self, model: ir.Model) -> Matches:
        nodes = [node for node in model.graph if node.op_type == "TracedExperts"]
        for node in nodes:
            matrices = [_matrix(model.graph, edit.operand(node, index), node) for index in (3, 4)]
            inputs = [*(edit.operand(node, index) for index in range(3)), *matrices]
            activation = ACTIVATIONS.index(node.attributes["activation"].as_string())
            attributes = {"experts": edit.dims(edit.operand(node, 3))[0], "activation": activation}
            shape = edit.dims(node.outputs[0])
            edit.replace(node, edit.insert(node, NAME, inputs, attributes, module_of(node), shape, DOMAIN))
        if nodes:
            model.graph.opset_imports[DOMAIN] = ABI_VERSION
        edit.remove_unused(model)
        return Matches(len(nodes))


def _matrix(graph: ir.Graph, stack: ir.Value, node: ir.Node) -> ir.Value:
    """Add the parameter [E * rows, columns] with the data of `stack` [E, rows, columns]."""
    record = parameter(stack)
    if record is None or len(record.sources) != 1 or stack.dtype is None:
        raise UnsupportedError(
            f"the experts of module {module_of(node)} are no parameter of the checkpoint",
            "llmc does not support the experts of this architecture",
        )
    experts, rows, columns = edit.dims(stack)
    (source,) = record.sources
    shape = ir.Shape([experts * rows, columns])
    return new_parameter(graph, Parameter((source.tensor,), (experts * rows,), (source,)), shape, stack.dtype)
