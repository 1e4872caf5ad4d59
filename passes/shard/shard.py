"""Shard: keep the part of a quantized graph that one rank computes, with collectives where ranks combine.

    before                    after, on each rank
    Gather(E, input_ids)      llmc.AllReduce(llmc.PartialEmbedding(input_ids, some rows of E))
    Gemm(x, W), x whole       Gemm(x, some rows of W)
    Gemm(x, W, b), x divided  Add(llmc.AllReduce(Gemm(x, some columns of W)), b)
    llmc.PagedAttention       the same, with some heads
    logits = f(Gemm(x, W))    logits = llmc.AllGather(f(Gemm(x, some rows of W)))

`roles.py` decides which values are divided, `parts.py` which features of them a rank has.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import onnx_ir as ir

from llmc.passes import edit
from llmc.passes.contract import Matches
from llmc.passes.parameter import parameter, set_parameter
from llmc.passes.shard.parts import Parts, find_parts, moved, operands_of, places, slice_of
from llmc.passes.shard.roles import Roles, features, find_roles
from llmc.passes.spec import Stage, module_of
from llmc.plugins.collectives import spec
from llmc.plugins.paged_attention.spec import NAME as ATTENTION
from llmc.runtime.errors import UnsupportedError

_PART = "llmc.part"  # the key in `ir.Value.meta`


class Shard:
    """Keep the part of `rank` among `ranks` ranks. Counts the linear layers that are divided."""

    name = "shard"
    requires = Stage.QUANTIZED
    ensures = Stage.QUANTIZED

    def __init__(self, rank: int, ranks: int) -> None:
        self._rank, self._ranks = rank, ranks

    def __call__(self, model: ir.Model) -> Matches:
        if any(node.op_type in spec.OF_RANKS for node in model.graph):
            return Matches()
        roles = find_roles(model, self._ranks)
        parts = find_parts(model, roles, self._rank, self._ranks)
        _Sharding(model, roles, parts, self._rank, self._ranks).run()
        return Matches(len(roles.columns) + len(roles.rows))


class _Sharding:
    def __init__(self, model: ir.Model, roles: Roles, parts: Parts, rank: int, ranks: int) -> None:
        self._model, self._roles, self._parts = model, roles, parts
        self._rank, self._ranks = rank, ranks
        self._sequence = 0
        self._places = {value: places(mask, value) for value, mask in parts.masks.items()}
        self._shapes = {value: features(value) for value in roles.divided}
        self._made: dict[tuple[ir.Value, int, bytes], ir.Value] = {}

    def run(self) -> None:
        graph = self._model.graph
        for node in list(graph):
            if node in self._roles.rows:
                self._divide_inputs(node)
            elif node in self._roles.columns:
                self._divide_outputs(node)
            elif node.op_type == ATTENTION:
                self._divide_attention(node)
            elif _is_embedding(node):
                self._divide_embedding(node)
            elif any(value in self._roles.divided for value in node.outputs):
                self._keep_features(node)
        for value, kept in self._places.items():
            assert value.shape is not None
            value.shape = ir.Shape([value.shape[0], *map(len, kept)])
        self._gather_logits()
        edit.remove_unused(self._model)
        graph.opset_imports[spec.DOMAIN] = spec.ABI_VERSION

    # Linear layers

    def _divide_outputs(self, node: ir.Node) -> None:
        (kept,) = self._places[node.outputs[0]]
        axis = 0 if node.attributes.get_int("transB", 0) else 1
        node.replace_input_with(1, self._part(node, edit.operand(node, 1), axis, kept))
        if len(node.inputs) > 2 and node.inputs[2] is not None:
            bias = edit.operand(node, 2)
            node.replace_input_with(2, self._part(node, bias, len(edit.dims(bias)) - 1, kept))

    def _divide_inputs(self, node: ir.Node) -> None:
        kept = np.flatnonzero(self._parts.masks[edit.operand(node, 0)])
        axis = 1 if node.attributes.get_int("transB", 0) else 0
        node.replace_input_with(1, self._part(node, edit.operand(node, 1), axis, kept))
        bias = node.inputs[2] if len(node.inputs) > 2 else None
        if bias is not None:
            node.replace_input_with(2, None)
        out = node.outputs[0]
        total = self._collective(node, out, spec.ALL_REDUCE, edit.dims(out))
        if bias is not None:
            self._after(total, "Add", [total, bias], f"{out.name}.biased", edit.dims(out))

    def _divide_embedding(self, node: ir.Node) -> None:
        table, ids = edit.operand(node, 0), edit.operand(node, 1)
        total, width = edit.dims(table)
        if total % self._ranks:
            return
        rows = total // self._ranks
        begin = self._rank * rows
        part = self._part(node, table, 0, np.arange(begin, begin + rows))
        name, shape = f"{node.outputs[0].name}.part", [-1, width]
        found = edit.insert(
            node, spec.PARTIAL_EMBEDDING, [ids, part], {"begin": begin}, name, shape, spec.DOMAIN, table.dtype
        )
        producer = found.producer()
        assert producer is not None
        edit.replace(node, self._collective(producer, found, spec.ALL_REDUCE, shape))

    def _gather_logits(self) -> None:
        graph = self._model.graph
        logits = graph.outputs[0]
        if logits not in self._roles.divided:
            return
        node = logits.producer()
        assert node is not None
        shape = [edit.dims(logits)[0], *self._shapes[logits]]
        whole = self._collective(node, logits, spec.ALL_GATHER, shape)
        whole.name, logits.name = logits.name, f"{logits.name}.part"
        graph.outputs[0] = whole

    def _collective(self, node: ir.Node, x: ir.Value, op: str, shape: list[int]) -> ir.Value:
        attributes = {"ranks": self._ranks, "sequence": self._sequence}
        self._sequence += 1
        name = f"{x.name}.{'sum' if op == spec.ALL_REDUCE else 'whole'}"
        return self._after(x, op, [x], name, shape, attributes, spec.DOMAIN)

    def _after(
        self,
        x: ir.Value,
        op: str,
        inputs: Sequence[ir.Value],
        name: str,
        shape: list[int],
        attributes: dict[str, int] | None = None,
        domain: str = "",
    ) -> ir.Value:
        """Insert a node behind `x`, for all its readers."""
        producer, uses = x.producer(), list(x.uses())
        assert producer is not None and isinstance(producer.graph, ir.Graph) and x.shape is not None
        output = ir.Value(
            name=name,
            shape=ir.Shape([x.shape[0] if dim == -1 else dim for dim in shape]),  # of tokens or of logits
            type=ir.TensorType(x.dtype) if x.dtype is not None else None,
        )
        node = ir.node(op, list(inputs), attributes or {}, domain=domain, outputs=[output], name=name)
        node.metadata_props.update(producer.metadata_props)
        producer.graph.insert_after(producer, node)
        for user, index in uses:
            user.replace_input_with(index, output)
        return output

    # Attention

    def _divide_attention(self, node: ir.Node) -> None:
        heads, kv_heads = self._parts.heads[node]
        for index, (kept, total) in enumerate(operands_of(node, heads, kv_heads)):
            operand = edit.operand(node, index)
            if operand not in self._roles.divided:  # it is whole: take the heads
                width = edit.dims(operand)[1] // total
                columns = self._columns(node, operand, int(kept[0]) * width, len(kept) * width)
                node.replace_input_with(index, columns)
        node.attributes["num_heads"] = ir.AttrInt64("num_heads", len(heads))
        node.attributes["num_kv_heads"] = ir.AttrInt64("num_kv_heads", len(kv_heads))
        for cache in (*node.inputs[3:5], *node.outputs[1:3]):
            assert cache is not None and cache.shape is not None
            cache.shape = ir.Shape([cache.shape[0], len(kv_heads), *cache.shape[2:]])

    def _columns(self, before: ir.Node, x: ir.Value, begin: int, count: int) -> ir.Value:
        graph = self._model.graph
        bounds = [_integer(graph, number) for number in (begin, begin + count, 1)]
        return edit.insert(before, "Slice", [x, *bounds], {}, f"{x.name}.heads", [edit.dims(x)[0], count])

    # Other nodes

    def _keep_features(self, node: ir.Node) -> None:
        """Keep the rank's features of a node that reads divided values."""
        graph, output = self._model.graph, node.outputs[0]
        self._check(node)
        kept = self._places[output]
        if node.op_type == "Reshape":
            first = (edit.numbers(node.inputs[1]) or [-1])[0]
            node.replace_input_with(1, edit.shape_constant(graph, [first, *map(len, kept)]))
        elif node.op_type == "Split":
            axis = node.attributes.get_int("axis", 0) % (len(kept) + 1) - 1
            sizes = [len(self._places[each][axis]) for each in node.outputs]
            name = "sizes_" + "_".join(map(str, sizes))
            node.attributes.pop("num_outputs", None)
            node.resize_inputs(2)
            node.replace_input_with(1, edit.constant(graph, np.array(sizes, np.int64), name))
        elif node.op_type in ("Gather", "Slice"):
            self._keep_range(node)
        elif node.op_type != "Concat":
            for index, value in enumerate(node.inputs):
                if value is not None and value in self._roles.constants:
                    node.replace_input_with(index, self._vector(node, value, output))

    def _check(self, node: ir.Node) -> None:
        """Raise UnsupportedError unless the rank's inputs hold exactly its features of the outputs."""
        if node.op_type == "Concat":
            return
        for value in node.inputs:
            if value is None or value not in self._roles.divided:
                continue
            mask = self._parts.masks[value].reshape(self._shapes[value])
            for output in node.outputs:
                if not np.array_equal(moved(node, output, mask), self._parts.masks[output]):
                    raise UnsupportedError(
                        f"{module_of(node)} ({node.op_type}) cannot be divided among {self._ranks} ranks",
                        "choose another --tp",
                        "tp",
                    )

    def _keep_range(self, node: ir.Node) -> None:
        """Let a Gather or Slice of columns take the rank's columns among those that the rank has."""
        graph, source = self._model.graph, edit.operand(node, 0)
        if node.op_type == "Gather":
            axis = node.attributes.get_int("axis", 0) % (len(self._shapes[source]) + 1) - 1
            taken = np.array(edit.numbers(node.inputs[1])) % self._shapes[source][axis]
        else:
            axis, begin, end = slice_of(node)
            taken = np.arange(begin, end)
        had = self._places[source][axis]
        numbers = np.flatnonzero(np.isin(had, taken))
        if node.op_type == "Gather":
            name = "columns_" + "_".join(map(str, numbers))
            shape = edit.dims(edit.operand(node, 1))
            node.replace_input_with(1, edit.constant(graph, numbers.reshape(shape or ()), name))
            return
        for index, number in ((1, numbers[0]), (2, numbers[-1] + 1)):
            node.replace_input_with(index, _integer(graph, int(number)))

    def _vector(self, node: ir.Node, value: ir.Value, output: ir.Value) -> ir.Value:
        """Return the rank's part of a constant that is combined with features."""
        shape, whole = edit.dims(value), self._shapes[output]
        for axis, kept in enumerate(self._places[output]):
            place = axis - len(whole) + len(shape)
            if place >= 0 and shape[place] == whole[axis] and len(kept) < whole[axis]:
                value = self._part(node, value, place, kept)
        return value

    # Constants

    def _part(self, node: ir.Node, value: ir.Value, axis: int, kept: np.ndarray) -> ir.Value:
        """Return the elements `kept` along an axis of a constant."""
        return self._cut(node, value, axis, kept, edit.dims(value)[axis])

    def _cut(self, node: ir.Node, value: ir.Value, axis: int, kept: np.ndarray, total: int) -> ir.Value:
        """Return the elements of a constant for `kept` of `total` indices. A block of them may share one."""
        shape = edit.dims(value)
        if axis >= len(shape) or shape[axis] == 1 or len(kept) == total:
            return value
        key = (value, axis, kept.tobytes())
        if key not in self._made:
            block = total // shape[axis]
            indices = np.unique(kept // block)
            producer = value.producer()
            self._made[key] = (
                self._cut_initializer(value, axis, indices)
                if producer is None
                else self._cut_expression(node, producer, axis, kept, total)
            )
        return self._made[key]

    def _cut_expression(
        self, node: ir.Node, producer: ir.Node, axis: int, kept: np.ndarray, total: int
    ) -> ir.Value:
        whole = producer.outputs[0]
        rank = len(edit.dims(whole))
        inputs = []
        for operand in producer.inputs:
            assert operand is not None
            dims = edit.dims(operand)
            # The scales of rows are a vector. Other operands are aligned at the last axis.
            place = axis if producer.op_type == "DequantizeLinear" else axis - rank + len(dims)
            inputs.append(self._cut(node, operand, place, kept, total) if place >= 0 else operand)
        if producer.op_type not in ("Cast", "DequantizeLinear", "Add", "Mul", "Sub", "Div"):
            raise UnsupportedError(
                f"{module_of(producer)} ({producer.op_type}) computes a weight, which cannot be divided",
                "build without --tp",
            )
        shape = edit.dims(whole)
        block = total // shape[axis]
        shape[axis] = len(np.unique(kept // block))
        attributes = {name: attribute.value for name, attribute in producer.attributes.items()}
        return edit.insert(
            node, producer.op_type, inputs, attributes, f"{whole.name}.part", shape, dtype=whole.dtype
        )

    def _cut_initializer(self, value: ir.Value, axis: int, indices: np.ndarray) -> ir.Value:
        """Return the elements `indices` along an axis of an initializer. `is_part` is true of it."""
        graph, shape, record = self._model.graph, edit.dims(value), parameter(value)
        shape[axis] = len(indices)
        if record is None:
            assert value.const_value is not None
            array = np.take(value.const_value.numpy(), indices, axis=axis)
            part = edit.constant(graph, array, f"{value.name}.part")
            part.meta[_PART] = True
            return part
        whole = record.whole or tuple(edit.dims(value))
        record = replace(record, whole=whole, kept=(*record.kept, (axis, _ranges(indices))))
        assert value.dtype is not None
        name = f"{value.name}.part"
        new = ir.Value(name=name, shape=ir.Shape(shape), type=ir.TensorType(value.dtype))
        set_parameter(new, record)
        new.meta[_PART] = True
        graph.initializers.add(new)
        return new


def is_part(value: ir.Value) -> bool:
    """Return whether a constant value of a rank's graph is, or is made of, a part of an initializer."""
    producer = value.producer()
    if producer is None:
        return _PART in value.meta
    return any(operand is not None and is_part(operand) for operand in producer.inputs)


def _is_embedding(node: ir.Node) -> bool:
    """Return whether a node looks up the rows of the step's tokens."""
    if node.op_type != "Gather" or node.attributes.get_int("axis", 0) != 0:
        return False
    table, ids = edit.operand(node, 0), edit.operand(node, 1)
    return ids.name == "input_ids" and table.is_initializer() and len(edit.dims(table)) == 2


def _integer(graph: ir.Graph, number: int) -> ir.Value:
    return edit.constant(graph, np.array([number], np.int64), f"int_{number}")


def _ranges(indices: np.ndarray) -> tuple[tuple[int, int], ...]:
    """Return ascending indices as ranges (first, stop)."""
    breaks = np.flatnonzero(np.diff(indices) != 1) + 1
    return tuple((int(run[0]), int(run[-1]) + 1) for run in np.split(indices, breaks))
