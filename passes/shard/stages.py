"""Pipeline parallelism: divide the layers of a graph into stages, and cut out one of them.

    before                    after, in stage 1 of 2
    x = layer 1               x = llmc.Recv()
    logits = layer 2 (x)      logits = layer 2 (x), llmc.Send(logits)

Layer n reaches from one cut to the next. The cut before it is the place behind the attention of layer n - 1
and not behind its own where the fewest numbers of a token are still needed: the residual stream. Only values
that depend on tokens or on KV caches are transferred. What depends on positions alone is computed by every
stage that needs it.

Rank = stage x tp + rank in the stage. The ranks of a stage are a tensor-parallel group. Each sends to the
rank with its own place in the next stage. Rank 0 gets the logits from the first rank of the last stage, in
its graph or outside of the graphs (`logits` of CutStage).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import onnx_ir as ir

from llmc.passes import edit
from llmc.passes.canonicalize.gather_logits import ROWS
from llmc.passes.contract import Matches
from llmc.passes.geometry import attention_nodes
from llmc.passes.spec import Stage as GraphStage
from llmc.plugins.collectives import spec
from llmc.plugins.paged_attention.spec import NAME as ATTENTION
from llmc.runtime.errors import UnsupportedError

#: The key in the `meta` of a stage's graph: the number of logits, which the graph itself may lack.
VOCABULARY = "llmc.vocab_size"
_TOKENS = "input_ids"


@dataclass(frozen=True)
class Stage:
    """A stage of a pipeline."""

    #: Its layers: first .. stop - 1.
    first: int
    stop: int
    #: The bytes of its weights, with the embedding in the first stage and lm_head in the last one.
    weight_bytes: int


def plan_stages(model: ir.Model, count: int) -> tuple[Stage, ...]:
    """Divide the layers of a quantized graph into stages that take as long as each other, as far as possible.

    The time of a stage is taken to be proportional to the bytes of weights that a step reads. Of a table of
    embeddings or positions it reads only some rows, which are not counted.
    Raises UnsupportedError if there are fewer layers.
    """
    order = list(model.graph)
    cuts = _cuts(model, order)
    layers = len(cuts) + 1
    if count > layers:
        raise UnsupportedError(
            f"{count} stages cannot divide the {layers} layers of the model",
            f"choose a --pp up to {layers}",
            "pp",
        )
    bounds = [0, *(cut.place for cut in cuts), len(order)]
    parts = [order[begin:end] for begin, end in itertools.pairwise(bounds)]
    held = [_weight_bytes(nodes) for nodes in parts]
    read = [_weight_bytes(nodes, tables=False) for nodes in parts]
    return tuple(Stage(first, stop, sum(held[first:stop])) for first, stop in balanced(read, count))


def balanced(sizes: Sequence[int], count: int) -> list[tuple[int, int]]:
    """Divide `sizes` into `count` ranges (first, stop), each with one at least.

    The largest sum is as small as possible, and then the sum of the squares.
    """
    total = [0]
    for size in sizes:
        total.append(total[-1] + size)

    def best(limit: int | None) -> tuple[int, list[tuple[int, int]]]:
        """Return the smallest largest sum; with `limit`, of sums up to it, the smallest sum of squares."""
        # Number of sizes that are divided so far -> the cost, and the ranges.
        known: dict[int, tuple[int, list[tuple[int, int]]]] = {0: (0, [])}
        for part in range(1, count + 1):
            found: dict[int, tuple[int, list[tuple[int, int]]]] = {}
            for stop in range(part, len(sizes) - (count - part) + 1):
                for first, (cost, ranges) in known.items():
                    size = total[stop] - total[first]
                    if first >= stop or (limit is not None and size > limit):
                        continue
                    new = max(cost, size) if limit is None else cost + size * size
                    if stop not in found or new < found[stop][0]:
                        found[stop] = new, [*ranges, (first, stop)]
            known = found
        return known[len(sizes)]

    return best(best(None)[0])[1]


class CutStage:
    """Keep stage `number` of `stages` in the graph of rank `rank` of `tp` in its stage. Counts its layers.

    logits: whether rank 0 receives the logits in its graph. Otherwise only the last stage has them.
    """

    name = "cut-stage"
    requires = GraphStage.QUANTIZED
    ensures = GraphStage.QUANTIZED

    def __init__(
        self, stages: Sequence[Stage], number: int, rank: int = 0, tp: int = 1, logits: bool = True
    ) -> None:
        self._stages, self._number, self._rank, self._tp = stages, number, rank, tp
        self._logits = logits

    def __call__(self, model: ir.Model) -> Matches:
        graph, stage = model.graph, self._stages[self._number]
        if any(node.op_type in (spec.SEND, spec.RECV) for node in graph):
            return Matches()
        order = list(graph)
        cuts = _cuts(model, order)
        layers = attention_nodes(model)[stage.first : stage.stop]
        caches = [value for node in layers for value in node.outputs[1:] if value.is_graph_output()]
        logits = graph.outputs[0]
        last, links = len(self._stages) - 1, self._tp
        me = self._number * links + self._rank
        received: dict[ir.Value, ir.Value] = {}
        sent: list[ir.Value] = []
        outputs = [logits] if self._number == last else []
        if self._number:
            cut = cuts[stage.first - 1]
            for number, value in enumerate(cut.values):
                new = _like(value, f"{value.name}.received")
                graph.insert_before(order[0], _recv(new, me - links, number))
                received[value] = new
                for user, index in list(value.uses()):
                    if user in cut.behind:
                        user.replace_input_with(index, new)
        if self._number < last:
            for number, value in enumerate(cuts[stage.stop - 1].values):
                value = received.get(value, value)
                sent.append(_send(graph, value, me + links, number))
        if self._logits and self._rank == 0 and self._number == last:
            sent.append(_send(graph, logits, 0, 0))
        if self._logits and self._rank == 0 and self._number == 0:
            outputs = [_like(logits, "logits")]
            logits.name = "logits.computed"
            # Behind everything else: what is sent leads to the logits.
            graph.insert_after(list(graph)[-1], _recv(outputs[0], last * links, 0))
        kept = {value for node in layers for value in node.inputs[3:5]}
        graph.outputs.clear()
        graph.outputs.extend([*outputs, *sent, *caches])
        edit.remove_unused(model)
        for value in list(graph.inputs):
            if value not in kept and not list(value.uses()) and _is_cache(value):
                graph.inputs.remove(value)
        graph.opset_imports[spec.DOMAIN] = spec.ABI_VERSION
        graph.meta[VOCABULARY] = edit.dims(logits)[-1]
        return Matches(len(layers))


@dataclass(frozen=True)
class _Cut:
    """The place between two layers."""

    #: The nodes before it, in the order of the graph.
    place: int
    #: What the nodes behind it read of what those before it compute.
    values: list[ir.Value]
    behind: frozenset[ir.Node]


def _cuts(model: ir.Model, order: Sequence[ir.Node]) -> list[_Cut]:
    """Return the cut before each layer but the first."""
    streams = _of_tokens(order)
    number = {node: index for index, node in enumerate(order)}
    places = [number[node] for node in attention_nodes(model)]
    last_read = {
        value: max((number[use.node] for use in value.uses()), default=-1)
        for node in order
        for value in node.outputs
        if value in streams
    }
    widths: list[int] = []  # place -> numbers of a token that are needed behind it
    live: dict[ir.Value, int] = {}
    for place, node in enumerate(order):
        live = {value: last for value, last in live.items() if last >= place}
        widths.append(sum(math.prod(edit.dims(value)[1:]) for value in live))
        live |= {value: last_read[value] for value in node.outputs if last_read.get(value, -1) > place}
    cuts = []
    for before, behind in itertools.pairwise(places):
        # The last of equal places: the one in the middle of a layer, before its MLP, may be as narrow.
        place = min(range(before + 1, behind + 1), key=lambda place: (widths[place], -place))
        values = [value for value, last in last_read.items() if last >= place > number[_producer(value)]]
        cuts.append(_Cut(place, values, frozenset(order[place:])))
    return cuts


def _of_tokens(order: Sequence[ir.Node]) -> set[ir.Value]:
    """Return the values that depend on the tokens or on KV caches."""
    found: set[ir.Value] = set()
    for node in order:
        if node.op_type == ATTENTION or any(
            value is not None and (value in found or value.name == _TOKENS) for value in node.inputs
        ):
            found.update(node.outputs)
    return found


def _weight_bytes(nodes: Sequence[ir.Node], tables: bool = True) -> int:
    """Return the bytes of the weights of some nodes. tables: count those of which only some rows are read"""
    found: set[ir.Value] = set()

    def add(value: ir.Value | None) -> None:
        if value is None:
            return
        if value.is_initializer():
            found.add(value)
        elif (node := value.producer()) is not None and _is_constant(value):
            for operand in node.inputs:
                add(operand)

    for node in nodes:
        for value in node.inputs[0 if tables or not _looks_up(node) else 1 :]:
            add(value)
    return sum(
        -(-math.prod(edit.dims(value)) * value.dtype.bitwidth // 8)
        for value in found
        if value.dtype is not None
    )


def _looks_up(node: ir.Node) -> bool:
    """Return whether a node reads the rows of a table that tokens or positions choose."""
    chosen = node.op_type == "Gather" and node.attributes.get_int("axis", 0) == 0
    return chosen and not _is_constant(edit.operand(node, 1))


def _is_constant(value: ir.Value | None) -> bool:
    if value is None or value.is_initializer():
        return True
    node = value.producer()
    return node is not None and all(_is_constant(operand) for operand in node.inputs)


def _is_cache(value: ir.Value) -> bool:
    return value.shape is not None and len(value.shape) == 4


def _producer(value: ir.Value) -> ir.Node:
    node = value.producer()
    assert node is not None
    return node


def _like(value: ir.Value, name: str) -> ir.Value:
    """Return a new value with the shape and dtype of `value`."""
    assert value.shape is not None and value.dtype is not None
    return ir.Value(name=name, shape=ir.Shape(list(value.shape)), type=ir.TensorType(value.dtype))


def _recv(output: ir.Value, peer: int, sequence: int) -> ir.Node:
    attributes = {"peer": peer, "sequence": sequence}
    name = f"{output.name}.recv"
    return ir.node(spec.RECV, [], attributes, domain=spec.DOMAIN, outputs=[output], name=name)


def _send(graph: ir.Graph, value: ir.Value, peer: int, sequence: int) -> ir.Value:
    """Insert a Send behind the value. Return its output."""
    output = _like(value, f"{value.name}.sent")
    attributes = {"peer": peer, "sequence": sequence}
    node = ir.node(
        spec.SEND, [value], attributes, domain=spec.DOMAIN, outputs=[output], name=f"{output.name}"
    )
    graph.insert_after(_producer(value), node)
    return output


def rows_are_logits(value: ir.Value) -> bool:
    """Return whether a value has one row for each row of logits, not for each token."""
    return value.shape is not None and str(value.shape[0]) == ROWS


def unread_inputs(model: ir.Model) -> set[str]:
    """Return the names of the step's inputs that a pipeline stage on a GPU does not read.

    A stage that receives reads the number of tokens from `input_ids`.
    """
    transfers = {node.op_type for node in model.graph} & {spec.SEND, spec.RECV}
    if not transfers:
        return set()
    unread = {str(value.name) for value in model.graph.inputs if not list(value.uses())}
    return unread - ({_TOKENS} if spec.RECV in transfers else set())
