"""The graphs of all ranks as one graph: what the ranks compute together, for a machine without them.

    ranks                       joined
    llmc.AllReduce(x) on each   Add(Add(x of rank 0, x of rank 1), x of rank 2) ...
    llmc.AllGather(x) on each   Concat<axis = 1>(x of rank 0, x of rank 1, ...)

The values of rank r above 0 are called rank{r}.{name}. The arrays of a step are the same for all ranks. The
KV caches are those of each rank, and the logits are those of rank 0.
"""

from __future__ import annotations

from collections.abc import Sequence

import onnx
import onnx_ir as ir

from llmc.passes.spec import MODULE
from llmc.plugins.collectives.spec import ALL_GATHER, ALL_REDUCE, DOMAIN
from llmc.runtime.batch import STEP_INPUTS
from llmc.runtime.errors import BuildError

_COLLECTIVES = (ALL_REDUCE, ALL_GATHER)


def join(parts: Sequence[ir.Model]) -> ir.Model:
    """Return the joined graph of the ranks' finalized graphs, which are unchanged.

    Raises BuildError if the ranks do not have the same collectives in the same order.
    """
    protos = [ir.to_proto(part) for part in parts]
    joined = onnx.ModelProto()
    joined.CopyFrom(protos[0])
    graph = joined.graph
    graph.ClearField("node")
    nodes = [list(proto.graph.node) for proto in protos]
    calls = [[_call(node) for node in each if _is_collective(node)] for each in nodes]
    if any(each != calls[0] for each in calls):
        raise BuildError("the ranks have different collectives", "please report this with the model's config")
    names = [_Names(rank) for rank in range(len(parts))]
    while any(nodes):
        ends = []
        for name, each in zip(names, nodes, strict=True):
            while each and not _is_collective(each[0]):
                graph.node.append(name.renamed(each.pop(0)))
            ends += [each.pop(0)] if each else []
        if ends:
            inputs = [name.of(end.input[0]) for name, end in zip(names, ends, strict=True)]
            graph.node.extend(_combined(ends[0], inputs))
        for name, end in zip(names[1:], ends[1:], strict=False):
            name.same[end.output[0]] = ends[0].output[0]
    for name, proto in zip(names[1:], protos[1:], strict=True):
        _append_values(graph, name, proto.graph)
    return ir.from_proto(joined)


class _Names:
    """The names that the values of a rank have in the joined graph."""

    def __init__(self, rank: int) -> None:
        self._prefix = f"rank{rank}." if rank else ""
        #: A result of a collective -> its name in the joined graph.
        self.same = {name: name for name in STEP_INPUTS}

    def of(self, name: str) -> str:
        return self.same.get(name, f"{self._prefix}{name}") if name else ""

    def renamed(self, node: onnx.NodeProto) -> onnx.NodeProto:
        copy = onnx.NodeProto()
        copy.CopyFrom(node)
        copy.name = f"{self._prefix}{node.name}"
        copy.input[:] = map(self.of, node.input)
        copy.output[:] = map(self.of, node.output)
        return copy


def _append_values(graph: onnx.GraphProto, names: _Names, part: onnx.GraphProto) -> None:
    """Append the initializers, caches and types of values of a rank above 0."""
    for tensor in part.initializer:
        copy = graph.initializer.add()
        copy.CopyFrom(tensor)
        copy.name = names.of(tensor.name)
    values = (
        (graph.input, [value for value in part.input if value.name not in STEP_INPUTS]),
        (graph.output, list(part.output)[1:]),  # without the logits
        (graph.value_info, [value for value in part.value_info if value.name not in names.same]),
    )
    for target, source in values:
        for value in source:
            described = target.add()
            described.CopyFrom(value)
            described.name = names.of(value.name)


def _is_collective(node: onnx.NodeProto) -> bool:
    return node.domain == DOMAIN and node.op_type in _COLLECTIVES


def _call(node: onnx.NodeProto) -> tuple[str, dict[str, int]]:
    return node.op_type, {attribute.name: attribute.i for attribute in node.attribute}


def _combined(node: onnx.NodeProto, inputs: Sequence[str]) -> list[onnx.NodeProto]:
    """Return the nodes that compute the result of a collective from the `inputs` of all ranks."""
    (output,), metadata = node.output, [prop for prop in node.metadata_props if prop.key == MODULE]
    made = []
    if node.op_type == ALL_GATHER:
        made = [onnx.helper.make_node("Concat", inputs, [output], output, axis=1)]
    else:
        total = inputs[0]
        for rank, summand in enumerate(inputs[1:], 1):
            result = output if rank == len(inputs) - 1 else f"{output}.of_{rank + 1}"
            made.append(onnx.helper.make_node("Add", [total, summand], [result], result))
            total = result
    for each in made:
        each.metadata_props.extend(metadata)
    return made
