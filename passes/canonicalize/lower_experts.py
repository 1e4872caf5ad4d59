"""LowerExperts: replace the traced mixtures of experts by `llmc.Experts`.

before  TracedExperts(x, ids, weights, gate_up [E, 2*I, D], down [E, D, I], biases)
after   Experts(x, ids, weights, gate_up [E*2*I, D], down [E*D, I], biases)

The matrices of all experts become one. So the passes and the packing of linear layers apply to it. Its data
are the same, or the model's matrices are [E, D, 2*I] and [E, I, D], and each is transposed
(`Source.transposed`).
"""

from __future__ import annotations

from dataclasses import replace

import onnx_ir as ir

from llmc.passes import edit
from llmc.passes.contract import Matches
from llmc.passes.parameter import Parameter, new_parameter, parameter
from llmc.passes.spec import Stage, module_of
from llmc.plugins.experts.spec import ABI_VERSION, ACTIVATIONS, DOMAIN, MATRICES, NAME, REQUIRED
from llmc.runtime.errors import UnsupportedError


class LowerExperts:
    """Replace TracedExperts by Experts. Counts one match per mixture of experts."""

    name = "lower-experts"
    requires = Stage.PACKED
    ensures = Stage.PACKED

    def __call__(self, model: ir.Model) -> Matches:
        nodes = [node for node in model.graph if node.op_type == "TracedExperts"]
        for node in nodes:
            matrices = [_matrix(model.graph, edit.operand(node, index), node) for index in MATRICES]
            biases = [value for value in node.inputs[REQUIRED:] if value is not None]
            inputs = [*(edit.operand(node, index) for index in range(3)), *matrices, *biases]
            attributes = {
                "experts": edit.dims(edit.operand(node, 3))[0],
                "activation": ACTIVATIONS.index(node.attributes["activation"].as_string()),
                "limit": float(edit.attribute(node, "limit")),
                "alpha": float(edit.attribute(node, "alpha")),
            }
            shape = edit.dims(node.outputs[0])
            edit.replace(node, edit.insert(node, NAME, inputs, attributes, module_of(node), shape, DOMAIN))
        if nodes:
            model.graph.opset_imports[DOMAIN] = ABI_VERSION
        edit.remove_unused(model)
        return Matches(len(nodes))


def _matrix(graph: ir.Graph, stack: ir.Value, node: ir.Node) -> ir.Value:
    """Add the parameter [E * rows, columns] with the data of `stack`, [E, rows, columns] or transposed."""
    record = parameter(stack)
    if record is None or len(record.sources) != 1 or stack.dtype is None:
        raise UnsupportedError(
            f"the experts of module {module_of(node)} are no parameter of the checkpoint",
            "llmc does not support the experts of this architecture",
        )
    transposed = bool(edit.attribute(node, "transposed"))
    experts, *shape_of_each = edit.dims(stack)
    rows, columns = shape_of_each[::-1] if transposed else shape_of_each
    source = replace(record.sources[0], transposed=transposed)
    shape = ir.Shape([experts * rows, columns])
    return new_parameter(graph, Parameter((source.tensor,), (experts * rows,), (source,)), shape, stack.dtype)
