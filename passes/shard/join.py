"""The graphs of all ranks as one graph: what the ranks compute together, for a machine without them.

    ranks                       joined
    llmc.AllReduce(x) on each   Add(Add(x of rank 0, x of rank 1), x of rank 2) ...
    llmc.AllGather(x) on each   Concat<axis = 1>(x of rank 0, x of rank 1, ...)
    llmc.Send(x)                nothing
    llmc.Recv()                 the x that the other rank sends

The values of rank r above 0 are called rank{r}.{name}. The arrays of a step are the same for all ranks. The
KV caches are those of each rank, and the logits are those of the first rank of the last pipeline stage.
"""

from __future__ import annotations

from collections.abc import Sequence

import onnx
import onnx_ir as ir

from llmc.passes.spec import MODULE
from llmc.plugins.collectives.spec import ALL_GATHER, ALL_REDUCE, DOMAIN, RECV, SEND
from llmc.runtime.batch import STEP_INPUTS
from llmc.runtime.errors import BuildError

_COLLECTIVES = (ALL_REDUCE, ALL_GATHER)
_REPORT = "please report this with the model's config"
_LOGITS = "logits"


def join(parts: Sequence[ir.Model], tp: int | None = None) -> ir.Model:
    """Return the joined graph of the ranks' finalized graphs, which are unchanged.

    tp: the number of ranks in a pipeline stage; None: there is one stage

    Raises BuildError if the ranks of a stage do not have the same collectives in the same order, or if a rank
    does not receive what another one sends to it.
    """
    protos = [ir.to_proto(part) for part in parts]
    joined = onnx.ModelProto()
    joined.CopyFrom(protos[0])
    graph = joined.graph
    for field in ("node", "input", "output", "initializer", "value_info"):
        graph.ClearField(field)
    names = [_Names(rank) for rank in range(len(parts))]
    transfers = _Transfers()
    size = tp or len(parts)
    owner = names[len(parts) - size]
    owner.same[_LOGITS] = _LOGITS
    for first in range(0, len(parts), size):
        ranks = range(first, first + size)
        _join_stage(graph, names[first : first + size], [protos[rank].graph for rank in ranks], transfers)
    transfers.check_all_received()
    for name, proto in zip(names, protos, strict=True):
        _append_values(graph, name, proto.graph, logits=name is owner)
    outputs = sorted(graph.output, key=lambda value: value.name != _LOGITS)
    graph.ClearField("output")
    graph.output.extend(outputs)
    return ir.from_proto(joined)


def _join_stage(
    graph: onnx.GraphProto,
    names: Sequence[_Names],
    parts: Sequence[onnx.GraphProto],
    transfers: _Transfers,
) -> None:
    """Append the nodes of the ranks of a stage."""
    nodes = [list(part.node) for part in parts]
    calls = [[_call(node) for node in each if _is_collective(node)] for each in nodes]
    if any(each != calls[0] for each in calls):
        raise BuildError("the ranks have different collectives", _REPORT)
    while any(nodes):
        ends = []
        for name, each in zip(names, nodes, strict=True):
            while each and not _is_collective(each[0]):
                node = each.pop(0)
                if node.domain == DOMAIN and node.op_type in (SEND, RECV):
                    transfers.add(name, node)
                else:
                    graph.node.append(name.renamed(node))
            ends += [each.pop(0)] if each else []
        if ends:
            inputs = [name.of(end.input[0]) for name, end in zip(names, ends, strict=True)]
            graph.node.extend(_combined(ends[0], inputs, names[0].of(ends[0].output[0])))
        for name, end in zip(names[1:], ends[1:], strict=False):
            name.same[end.output[0]] = names[0].of(ends[0].output[0])


class _Transfers:
    """What ranks have sent, and others have yet to receive."""

    def __init__(self) -> None:
        #: (sender, receiver, sequence) -> the name in the joined graph.
        self._sent: dict[tuple[int, int, int], str] = {}

    def add(self, names: _Names, node: onnx.NodeProto) -> None:
        """Take what a Send sends, or give a Recv what was sent."""
        given = _call(node)[1]
        if node.op_type == SEND:
            self._sent[names.rank, given["peer"], given["sequence"]] = names.of(node.input[0])
            names.dropped.add(node.output[0])
            return
        found = self._sent.pop((given["peer"], names.rank, given["sequence"]), None)
        if found is None:
            raise BuildError(f"rank {names.rank} receives what rank {given['peer']} does not send", _REPORT)
        names.same[node.output[0]] = found

    def check_all_received(self) -> None:
        """Raise BuildError for what no rank receives."""
        for sender, receiver, _ in self._sent:
            raise BuildError(f"rank {sender} sends what rank {receiver} does not receive", _REPORT)


class _Names:
    """The names that the values of a rank have in the joined graph."""

    def __init__(self, rank: int) -> None:
        self.rank, self._prefix = rank, f"rank{rank}." if rank else ""
        #: A result of a collective or a Recv -> its name in the joined graph.
        self.same = {name: name for name in STEP_INPUTS}
        #: The outputs of Sends, which the joined graph lacks.
        self.dropped: set[str] = set()

    def of(self, name: str) -> str:
        return self.same.get(name, f"{self._prefix}{name}") if name else ""

    def renamed(self, node: onnx.NodeProto) -> onnx.NodeProto:
        copy = onnx.NodeProto()
        copy.CopyFrom(node)
        copy.name = f"{self._prefix}{node.name}"
        copy.input[:] = map(self.of, node.input)
        copy.output[:] = map(self.of, node.output)
        return copy


def _append_values(graph: onnx.GraphProto, names: _Names, part: onnx.GraphProto, logits: bool) -> None:
    """Append the initializers, caches and types of values of a rank, and the `logits` if they are its own.

    Rank 0 has the inputs of a step.
    """
    left_out = names.dropped | (set() if logits else {_LOGITS})
    for tensor in part.initializer:
        copy = graph.initializer.add()
        copy.CopyFrom(tensor)
        copy.name = names.of(tensor.name)
    values = (
        (graph.input, [value for value in part.input if not names.rank or value.name not in STEP_INPUTS]),
        (graph.output, [value for value in part.output if value.name not in left_out]),
        (graph.value_info, [v for v in part.value_info if v.name not in {*names.same, *names.dropped}]),
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


def _combined(node: onnx.NodeProto, inputs: Sequence[str], output: str) -> list[onnx.NodeProto]:
    """Return the nodes that compute the result of a collective, `output`, from the `inputs` of all ranks."""
    metadata = [prop for prop in node.metadata_props if prop.key == MODULE]
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
