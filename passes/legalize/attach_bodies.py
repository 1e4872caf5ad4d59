"""AttachBodies: add the function bodies of llmc's operators, which any ONNX runtime can execute."""

from __future__ import annotations

import onnx_ir as ir

from llmc.passes.contract import Matches
from llmc.passes.geometry import attention_nodes, chunk_size, value_width
from llmc.passes.spec import Stage, module_of
from llmc.plugins.operator import OPERATORS, bodies_for
from llmc.plugins.paged_attention.spec import NAME as ATTENTION
from llmc.runtime.errors import UnsupportedError


class AttachBodies:
    """Add function bodies. Counts those that the graph lacked."""

    name = "attach-bodies"
    requires = Stage.QUANTIZED
    ensures = Stage.QUANTIZED

    def __call__(self, model: ir.Model) -> Matches:
        names = (node.op_type for node in model.graph)
        form = {"latent": _latent(model), "chunks": _set_chunks(model)}
        functions = bodies_for(names, _with_optional_inputs(model), {ATTENTION: form})
        added = [function for function in functions if function.identifier() not in model.functions]
        for function in added:
            model.functions[function.identifier()] = function
        return Matches(len(added))


def _set_chunks(model: ir.Model) -> bool:
    """Return whether attention has chunks, and let all nodes say their size: an operator has one body."""
    nodes = attention_nodes(model)
    chunks = any(map(chunk_size, nodes))
    if chunks:
        for node in nodes:
            node.attributes["chunk"] = ir.AttrInt64("chunk", chunk_size(node))
    return chunks


def _latent(model: ir.Model) -> bool:
    """Return whether the values of attention are numbers of its keys.

    Raises UnsupportedError if that is so for only some of the nodes: an operator has one body.
    """
    nodes = [node for node in model.graph if node.op_type == ATTENTION]
    latent = [node for node in nodes if value_width(node)]
    if latent and len(latent) < len(nodes):
        raise UnsupportedError(
            f"{module_of(latent[0])} is multi-head latent attention, and attention of other layers is not",
            "only the native engine runs such a model: --engine native",
        )
    return bool(latent)


def _with_optional_inputs(model: ir.Model) -> set[str]:
    """Return the operators whose nodes have their optional inputs.

    Raises UnsupportedError if only some of the nodes have them: an operator has one body.
    """
    result: set[str] = set()
    for name, operator in OPERATORS.items():
        nodes = [node for node in model.graph if operator.required and node.op_type == name]
        given = [node for node in nodes if len(node.inputs) > operator.required]
        if given and len(given) < len(nodes):
            raise UnsupportedError(
                f"{module_of(given[0])} has optional inputs of {operator.full_name} that others lack",
                "only the native engine runs such a model: --engine native",
            )
        if given:
            result.add(name)
    return result
