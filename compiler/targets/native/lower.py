"""Lower a quantized graph to the native engine's program.

Reshape, Split and column slices become views. Expressions of weights become constants. The other nodes become
instructions of `runtime/native/program.py`. The graph is not changed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Literal

import numpy as np
import onnx_ir as ir

from llmc.compiler.targets.native.constants import (
    ELEMENTWISE,
    ConstantSource,
    HeadRows,
    MatrixSource,
    evaluate,
    integers,
    refusal,
)
from llmc.compiler.targets.native.fuse import fuse
from llmc.passes import edit
from llmc.passes.geometry import attention_nodes, chunk_size, value_width
from llmc.passes.shard.stages import VOCABULARY, rows_are_logits
from llmc.plugins.collectives.spec import ALL_GATHER, ALL_REDUCE, PARTIAL_EMBEDDING, RECV, SEND
from llmc.plugins.experts.spec import ACTIVATIONS, MATRICES, REQUIRED
from llmc.plugins.experts.spec import NAME as EXPERTS
from llmc.plugins.grouped_top_k.spec import NAME as GROUPED_TOP_K
from llmc.plugins.head_linear.spec import NAME as HEAD_LINEAR
from llmc.plugins.paged_attention.spec import NAME as ATTENTION
from llmc.plugins.paged_attention.spec import SINKS
from llmc.plugins.round_fp4.spec import NAME as ROUND_FP4
from llmc.runtime.errors import UnsupportedError
from llmc.runtime.native.program import (
    CLAMPED_SWIGLU,
    MAX_GROUPS,
    MAX_SCORED,
    TILE,
    VECTOR,
    Buffer,
    Cache,
    Instruction,
    Matrix,
    Program,
    View,
    check,
)

_UNARY = {
    "Sigmoid": "sigmoid",
    "Tanh": "tanh",
    "Relu": "relu",
    "Exp": "exp",
    "Erf": "erf",
    "Neg": "neg",
    "Abs": "abs",
    "Sqrt": "sqrt",
    "Reciprocal": "reciprocal",
}
_BINARY = {"Add": "add", "Sub": "sub", "Mul": "mul", "Div": "div", "Min": "min", "Max": "max"}
_COMMUTATIVE = ("add", "mul", "min", "max")
_ELEMENTS: Mapping[ir.DataType, Literal["fp32", "fp16", "bf16", "fp8", "int8", "int4", "fp4"]] = {
    ir.DataType.FLOAT: "fp32",
    ir.DataType.FLOAT16: "fp16",
    ir.DataType.BFLOAT16: "bf16",
    ir.DataType.INT8: "int8",
    ir.DataType.INT4: "int4",
    ir.DataType.FLOAT8E4M3FN: "fp8",
    ir.DataType.FLOAT4E2M1: "fp4",
}
_ROUND = {ir.DataType.FLOAT8E4M3FN: "fp8", ir.DataType.INT8: "int8"}
_EMPTY: Mapping[str, int] = MappingProxyType({})


@dataclass(frozen=True)
class Lowered:
    """A program, and the values of the graph that its weights are made of."""

    program: Program
    #: Name of a matrix of the program -> its source.
    matrices: Mapping[str, MatrixSource]
    #: Name of a constant of the program -> its source.
    constants: Mapping[str, ConstantSource]


def lower(model: ir.Model) -> Lowered:
    """Lower a legalized graph in fp32, or a quantized one to see whether it can be lowered.

    Raises UnsupportedError, with the module and the reason, for a node that the native engine cannot run.
    """
    return _Lowering(model).run()


@dataclass
class _Lowering:
    model: ir.Model
    views: dict[ir.Value, View] = field(default_factory=dict)
    buffers: list[Buffer] = field(default_factory=list)
    caches: dict[int, Cache] = field(default_factory=dict)
    instructions: list[Instruction] = field(default_factory=list)
    matrices: dict[str, Matrix] = field(default_factory=dict)
    sources: dict[str, MatrixSource] = field(default_factory=dict)
    constants: dict[str, ConstantSource] = field(default_factory=dict)
    tables: dict[ir.Value, ConstantSource] = field(
        default_factory=dict
    )  # rows of a rotary table -> the table
    offsets: dict[ir.Value, int] = field(default_factory=dict)  # position_ids plus a constant -> the constant
    of_position: set[ir.Value] = field(
        default_factory=set
    )  # a number for each token, which its position gives
    positions: int = 0
    layers: dict[int, int] = field(default_factory=dict)  # of the model -> of the program

    def run(self) -> Lowered:
        graph = self.model.graph
        self.offsets = {value: 0 for value in graph.inputs if value.name == "position_ids"}
        self.of_position = set(self.offsets)
        self.layers = {
            layer: number for number, layer in enumerate(sorted(map(_layer, attention_nodes(self.model))))
        }
        for node in graph:
            if not self._is_constant(node.outputs[0]):
                self._lower(node)
        logits = self.views.get(graph.outputs[0]) if graph.outputs[0].name == "logits" else None
        if (logits is None and VOCABULARY not in graph.meta) or (
            logits and logits.width != self.buffers[logits.buffer].width
        ):
            raise UnsupportedError(
                "the graph's logits are no buffer of the program", "choose another --engine"
            )
        program = Program(
            1,
            tuple(self.buffers),
            tuple(self.caches[layer] for layer in sorted(self.caches)),
            self.matrices,
            {name: source.elements for name, source in self.constants.items()},
            tuple(self.instructions),
            None if logits is None else logits.buffer,
            logits.width if logits else int(graph.meta[VOCABULARY]),
            self.positions,
        )
        program = fuse(program)
        check(program)
        return Lowered(program, self.sources, self.constants)

    def _lower(self, node: ir.Node) -> None:
        if self._depends_on_position(node):
            self.of_position.add(node.outputs[0])
            if node.op_type != "Add":
                return
        lowering = _NODES.get(node.op_type)
        if lowering is None and node.op_type in _UNARY:
            self._unary(node, _UNARY[node.op_type])
        elif lowering is None and node.op_type in _BINARY:
            self._binary(node, _BINARY[node.op_type])
        elif lowering is None:
            raise refusal(node, "the native engine lacks this operator")
        else:
            lowering(self, node)

    # Values

    def _is_constant(self, value: ir.Value | None) -> bool:
        if value is None or value.is_initializer():
            return True
        node = value.producer()
        return (
            node is not None
            and node.op_type != RECV
            and all(self._is_constant(operand) for operand in node.inputs)
        )

    def _depends_on_position(self, node: ir.Node) -> bool:
        operands = [operand for operand in node.inputs if not self._is_constant(operand)]
        return node.op_type in ELEMENTWISE and all(operand in self.of_position for operand in operands)

    def _view(self, node: ir.Node, index: int) -> View:
        view = self.views.get(edit.operand(node, index))
        if view is None:
            raise refusal(node, f"its input {index} is not a row of numbers")
        return view

    def _constant(self, value: ir.Value) -> str:
        shape = edit.dims(value)
        return self._record(str(value.name), ConstantSource(value, 0, shape[-1] if shape else 1))

    def _record(self, name: str, source: ConstantSource) -> str:
        self.constants[name] = source
        return name

    def _emit(
        self,
        node: ir.Node,
        op: str,
        inputs: tuple[View, ...] = (),
        *,
        weights: tuple[str, ...] = (),
        function: str = "",
        integers: Mapping[str, int] = _EMPTY,
        floats: Mapping[str, float] = MappingProxyType({}),
        width: int | None = None,
        rows: str | None = None,
        output: ir.Value | None = None,
    ) -> None:
        """Append an instruction that writes a new buffer, which becomes `output`.

        output: by default the node's first
        width: columns of the buffer, by default those of the first input
        rows: "tokens" or "logits", by default that of the first input's buffer
        """
        width = width or inputs[0].width
        buffer_rows = rows or (self.buffers[inputs[0].buffer].rows if inputs else "tokens")
        self.buffers.append(Buffer(width, "logits" if buffer_rows == "logits" else "tokens"))
        out = len(self.buffers) - 1
        self.instructions.append(
            Instruction(op, out, 0, inputs, weights, function, dict(integers), dict(floats))
        )
        self.views[output or node.outputs[0]] = View(out, 0, width)

    # Operators

    def _gather(self, node: ir.Node) -> None:
        table, indices = edit.operand(node, 0), edit.operand(node, 1)
        axis = node.attributes.get_int("axis", 0)
        if axis != 0:
            self._gather_columns(node, axis)
            return
        if indices.name == "input_ids" and self._is_constant(table):
            name = self._matrix(table, node)
            self._emit(node, "embed", weights=(name,), width=edit.dims(table)[1])
        elif self.offsets.get(indices) == 0 and self._is_rotary(node):
            self.tables[node.outputs[0]] = ConstantSource(table, 0, edit.dims(table)[1])
        elif indices in self.offsets and self._is_constant(table):
            skip = self.offsets[indices]
            name = self._matrix(table, node, skip)
            self._limit_positions(node, self.matrices[name].rows)
            self._emit(node, "embed_positions", weights=(name,), width=edit.dims(table)[1])
        elif indices.name == "logits_index":
            self._emit(node, "gather_rows", (self._view(node, 0),), rows="logits")
        else:
            raise refusal(node, f"it gathers by {indices.name}")

    def _reshape(self, node: ir.Node) -> None:
        source = edit.operand(node, 0)
        if source in self.tables:
            self.tables[node.outputs[0]] = self.tables[source]
            return
        view = self._view(node, 0)
        shape = edit.dims(node.outputs[0])
        if shape[0] != -1 or int(np.prod(shape[1:])) != view.width:
            raise refusal(node, "it mixes tokens and features")
        self.views[node.outputs[0]] = view

    def _is_rotary(self, node: ir.Node) -> bool:
        """Return whether only rotary embeddings read the rows of a table, or columns of them."""
        if node.op_type == "Gather" and not self._is_constant(edit.operand(node, 0)):
            return False
        readers = [use.node for output in node.outputs for use in output.uses()]
        return all(
            reader.op_type == "RotaryEmbedding"
            or (reader.op_type in ("Reshape", "Split") and self._is_rotary(reader))
            for reader in readers
        )

    def _limit_positions(self, node: ir.Node, rows: int) -> None:
        if self.positions not in (0, rows):
            raise refusal(node, f"its table has {rows} positions, another one {self.positions}")
        self.positions = rows

    def _gather_columns(self, node: ir.Node, axis: int) -> None:
        indices = edit.operand(node, 1)
        if not self._is_constant(indices):
            raise refusal(node, "it gathers columns by values of the step")
        size = edit.dims(edit.operand(node, 0))[axis]
        numbers = [int(index) % size for index in evaluate(indices).reshape(-1)]
        if not numbers or numbers != list(range(numbers[0], numbers[0] + len(numbers))):
            raise refusal(node, "it gathers columns that are not neighbours")
        self._columns(node, node.outputs[0], axis, numbers[0], len(numbers))

    def _split(self, node: ir.Node) -> None:
        axis, shape = node.attributes.get_int("axis", 0), edit.dims(edit.operand(node, 0))
        begin = 0
        for output in node.outputs:
            count = edit.dims(output)[axis % len(shape)]
            self._columns(node, output, axis, begin, count)
            begin += count

    def _slice(self, node: ir.Node) -> None:
        shape = edit.dims(edit.operand(node, 0))
        starts, ends, axes, *steps = (integers(value) for value in node.inputs[1:])
        if len(axes) != 1 or (steps and steps[0] != [1]):
            raise refusal(node, "it slices several axes, or with steps")
        start, end, _ = slice(starts[0], ends[0]).indices(shape[axes[0] % len(shape)])
        self._columns(node, node.outputs[0], axes[0], start, end - start)

    def _columns(self, node: ir.Node, output: ir.Value, axis: int, begin: int, count: int) -> None:
        """Lower some elements of an axis: to a view, or to a copy if they are no range of columns."""
        source, shape = edit.operand(node, 0), edit.dims(edit.operand(node, 0))
        if source in self.tables:
            table = self.tables[source]
            self.tables[output] = ConstantSource(table.value, table.begin + begin, count)
            return
        view = self._view(node, 0)
        axis %= len(shape)
        if axis == 0 or begin < 0 or begin + count > shape[axis]:
            raise refusal(node, "it takes some of the tokens")
        groups, inner = int(np.prod(shape[1:axis])), int(np.prod(shape[axis + 1 :]))
        if groups == 1:
            self.views[output] = View(view.buffer, view.offset + begin * inner, count * inner)
            return
        integers = {"groups": groups, "begin": begin * inner}
        self._emit(node, "slice", (view,), integers=integers, width=groups * count * inner, output=output)

    def _concat(self, node: ir.Node) -> None:
        parts = [self._view(node, index) for index in range(len(node.inputs))]
        shape = edit.dims(node.outputs[0])
        axis = int(edit.attribute(node, "axis")) % len(shape)
        groups = int(np.prod(shape[1:axis]))
        if axis == 0 or (groups != 1 and len(parts) != 2):
            raise refusal(node, "it joins something else than columns")
        if groups != 1:
            width = parts[0].width + parts[1].width
            self._emit(node, "join", (parts[0], parts[1]), integers={"groups": groups}, width=width)
            return
        self.buffers.append(Buffer(sum(part.width for part in parts), self.buffers[parts[0].buffer].rows))
        out, offset = len(self.buffers) - 1, 0
        for part in parts:
            self.instructions.append(Instruction("copy", out, offset, (part,), (), "", {}, {}))
            offset += part.width
        self.views[node.outputs[0]] = View(out, 0, offset)

    def _cast(self, node: ir.Node) -> None:
        if node.outputs[0].dtype != ir.DataType.FLOAT:
            raise refusal(node, f"it converts to {node.outputs[0].dtype}")
        self.views[node.outputs[0]] = self._view(node, 0)

    def _quantize(self, node: ir.Node) -> None:
        """Lower QuantizeLinear. The DequantizeLinear behind it has nothing left to do."""
        codes = node.outputs[0]
        function = _ROUND.get(codes.dtype) if codes.dtype is not None else None
        readers = [use.node for use in codes.uses()]
        scale = edit.operand(node, 1)
        if function is None or len(node.inputs) > 2 or int(np.prod(edit.dims(scale))) != 1:
            raise refusal(node, f"it quantizes activations to {codes.dtype} in another way than per tensor")
        if any(reader.op_type != "DequantizeLinear" or reader.inputs[1] is not scale for reader in readers):
            raise refusal(node, "its codes are read by something else than DequantizeLinear")
        self._emit(node, "round", (self._view(node, 0),), function=function, weights=(self._constant(scale),))

    def _round_fp4(self, node: ir.Node) -> None:
        scale = self._constant(edit.operand(node, 1))
        self._emit(node, "round", (self._view(node, 0),), function="fp4", weights=(scale,))

    def _identity(self, node: ir.Node) -> None:
        self.views[node.outputs[0]] = self._view(node, 0)

    def _unary(self, node: ir.Node, function: str) -> None:
        self._emit(node, "unary", (self._view(node, 0),), function=function)

    def _gelu(self, node: ir.Node) -> None:
        approximate = node.attributes.get_string("approximate", "none")
        self._unary(node, "gelu_tanh" if approximate == "tanh" else "gelu")

    def _swish(self, node: ir.Node) -> None:
        if node.attributes.get_float("alpha", 1.0) != 1.0:
            raise refusal(node, "its alpha is not 1")
        self._unary(node, "silu")

    def _pow(self, node: ir.Node) -> None:
        exponent = edit.operand(node, 1)
        power = float(evaluate(exponent)) if self._is_constant(exponent) and not edit.dims(exponent) else 0.0
        if power not in (0.5, 2.0, 3.0):
            raise refusal(node, "its exponent is none of 0.5, 2 and 3")
        self._unary(node, "sqrt" if power == 0.5 else "square")
        if power == 3.0:
            square = self.views[node.outputs[0]]
            self._emit(node, "binary", (square, self._view(node, 0)), function="mul")

    def _binary(self, node: ir.Node, function: str) -> None:
        left, right = edit.operand(node, 0), edit.operand(node, 1)
        if left in self.offsets and function == "add" and self._is_constant(right) and not edit.dims(right):
            self.offsets[node.outputs[0]] = self.offsets[left] + int(evaluate(right))
            return
        if node.outputs[0] in self.of_position:
            return
        if function == "mul" and left in self.of_position:
            left, right = right, left
        if function == "mul" and right in self.of_position:
            self._scale_by_position(node, left, right)
            return
        if self._is_constant(left):
            if function not in _COMMUTATIVE:
                raise refusal(node, "its first operand is a constant")
            left, right = right, left
        view, other = self.views.get(left), self.views.get(right)
        if view and other and view.width == 1 and function in _COMMUTATIVE:
            view, other = other, view
        if view is None:
            raise refusal(node, "an operand is not a row of numbers")
        if not self._is_constant(right):
            if other is None or other.width not in (1, view.width):
                raise refusal(node, "its operands have different widths")
            self._emit(node, "binary", (view, other), function=function)
            return
        elements = int(np.prod(edit.dims(right)))
        if elements == 1:
            value = float(evaluate(right).reshape(()))
            self._emit(node, "scalar", (view,), function=function, floats={"value": value})
        elif elements == view.width and edit.dims(right) == edit.dims(left)[-len(edit.dims(right)) :]:
            self._emit(node, "vector", (view,), function=function, weights=(self._constant(right),))
        else:
            raise refusal(
                node, f"a constant of shape {edit.dims(right)} has no place in a row of {view.width}"
            )

    def _softmax(self, node: ir.Node) -> None:
        self._require_last_axis(node)
        self._emit(node, "softmax", (self._view(node, 0),))

    def _reduce_sum(self, node: ir.Node) -> None:
        rank = len(edit.dims(edit.operand(node, 0)))
        axes = integers(node.inputs[1]) if len(node.inputs) > 1 else []
        if rank != 2 or axes not in ([-1], [1]):
            raise refusal(node, "it adds something else than the columns of a row")
        self._emit(node, "sum", (self._view(node, 0),), width=1)

    def _top_k(self, node: ir.Node) -> None:
        self._require_last_axis(node)
        if not node.attributes.get_int("largest", 1) or not self._is_constant(node.inputs[1]):
            raise refusal(node, "it takes the smallest numbers, or a number of them that varies")
        (k,) = integers(node.inputs[1])
        self._emit(node, "top_k", (self._view(node, 0),), integers={"k": k}, width=2 * k)
        both = self.views[node.outputs[0]]
        self.views[node.outputs[0]] = replace(both, width=k)
        self.views[node.outputs[1]] = View(both.buffer, k, k)

    def _grouped_top_k(self, node: ir.Node) -> None:
        names = ("groups", "kept", "scored", "k")
        integers = {name: int(edit.attribute(node, name)) for name in names}
        if integers["groups"] > MAX_GROUPS or integers["scored"] > MAX_SCORED:
            raise refusal(node, f"it has more than {MAX_GROUPS} groups, or scores more than {MAX_SCORED}")
        k = integers["k"]
        views = (self._view(node, 0), self._view(node, 1))
        self._emit(node, "grouped_top_k", views, integers=integers, width=2 * k)
        both = self.views[node.outputs[0]]
        self.views[node.outputs[0]] = replace(both, width=k)
        self.views[node.outputs[1]] = View(both.buffer, k, k)

    def _require_last_axis(self, node: ir.Node) -> None:
        rank = len(edit.dims(edit.operand(node, 0)))
        if rank != 2 or node.attributes.get_int("axis", -1) not in (-1, 1):
            raise refusal(node, "it works along another axis than the columns of a row")

    def _experts(self, node: ir.Node) -> None:
        experts = int(edit.attribute(node, "experts"))
        names = tuple(self._matrix(edit.operand(node, index), node) for index in MATRICES)
        for name in names:
            if self.matrices[name].rows // experts % TILE:
                rows = self.matrices[name].rows // experts
                raise refusal(
                    node, f"a matrix of its experts has {rows} rows, which is no multiple of {TILE}"
                )
        function = ACTIVATIONS[int(edit.attribute(node, "activation"))]
        names += tuple(self._constant(value) for value in node.inputs[REQUIRED:] if value is not None)
        clamp = ("limit", "alpha") if function == CLAMPED_SWIGLU else ()
        floats = {name: float(edit.attribute(node, name)) for name in clamp}
        views = tuple(self._view(node, index) for index in range(3))
        integers = {"experts": experts}
        self._emit(node, "experts", views, weights=names, function=function, integers=integers, floats=floats)

    def _clip(self, node: ir.Node) -> None:
        view = self._view(node, 0)
        bounds = list(node.inputs[1:])
        output = node.outputs[0]
        for function, bound in zip(("max", "min"), bounds, strict=False):
            if bound is not None:
                floats = {"value": float(evaluate(bound).reshape(()))}
                self._emit(node, "scalar", (view,), function=function, floats=floats)
                view = self.views[output]
        self.views[output] = view

    def _rms_norm(self, node: ir.Node) -> None:
        view, weight = self._view(node, 0), edit.operand(node, 1)
        width = edit.dims(edit.operand(node, 0))[-1]
        if node.attributes.get_int("axis", -1) not in (-1, len(edit.dims(edit.operand(node, 0))) - 1):
            raise refusal(node, "it normalizes over more than the last axis")
        self._emit(
            node,
            "rms_norm",
            (view,),
            weights=(self._constant(weight),),
            integers={"groups": view.width // width},
            floats={"epsilon": node.attributes.get_float("epsilon", 1e-5)},
        )

    def _layer_norm(self, node: ir.Node) -> None:
        view, shape = self._view(node, 0), edit.dims(edit.operand(node, 0))
        if node.attributes.get_int("axis", -1) not in (-1, len(shape) - 1):
            raise refusal(node, "it normalizes over more than the last axis")
        self._emit(
            node,
            "layer_norm",
            (view,),
            weights=tuple(self._constant(value) for value in node.inputs[1:] if value is not None),
            integers={"groups": view.width // shape[-1]},
            floats={"epsilon": node.attributes.get_float("epsilon", 1e-5)},
        )

    def _rope(self, node: ir.Node) -> None:
        view, shape = self._view(node, 0), edit.dims(edit.operand(node, 0))
        cosine, sine = (self.tables.get(edit.operand(node, index)) for index in (1, 2))
        if cosine is None or sine is None or len(shape) != 4:
            raise refusal(node, "its angles do not come from tables")
        heads, width = shape[1] * shape[2], shape[3]
        rotated = node.attributes.get_int("rotary_embedding_dim", 0) or width
        self._limit_positions(node, edit.dims(cosine.value)[0])
        tables = (self._record(f"{table.value.name}:{table.begin}", table) for table in (cosine, sine))
        self._emit(
            node,
            "rope",
            (view,),
            weights=tuple(tables),
            integers={
                "heads": heads,
                "rotated": rotated,
                "interleaved": node.attributes.get_int("interleaved", 0),
            },
        )

    def _scale_by_position(self, node: ir.Node, left: ir.Value, right: ir.Value) -> None:
        """Lower left x right, where `right` is a number that the position of a token gives.

        If all of `left` was rotated, the tables of the rotation are scaled.
        """
        view, rows = self._view(node, list(node.inputs).index(left)), self.positions
        rows = rows or next((edit.dims(table.value)[0] for table in self.tables.values()), 0)
        if edit.dims(right) != [-1] + [1] * (len(edit.dims(left)) - 1) or not rows:
            raise refusal(
                node, "its factor depends on the position in a way that the engine has no table for"
            )
        known = {
            value: np.arange(rows, dtype=np.int32) for value in self.of_position if value.is_graph_input()
        }
        factors = evaluate(right, known).reshape(-1, 1).astype(np.float32)
        rotation = self._rotation(left)
        if rotation is None:
            name = f"{right.name}:factors"
            self._limit_positions(node, rows)
            self.matrices[name] = Matrix(rows, 1, "fp32")
            self.sources[name] = MatrixSource(ir.Value(name=name, const_value=ir.tensor(factors, name=name)))
            self._emit(node, "embed_positions", weights=(name,), width=1)
            self._emit(node, "binary", (view, self.views[node.outputs[0]]), function="mul")
            return
        tables = []
        for name in rotation.weights:
            source = replace(self.constants[name], factors=factors)
            tables.append(self._record(f"{name}:{right.name}", source))
        self.instructions[self.instructions.index(rotation)] = replace(rotation, weights=tuple(tables))
        self.views[node.outputs[0]] = view

    def _rotation(self, value: ir.Value) -> Instruction | None:
        """Return the instruction that rotated all numbers of `value`, if nothing else reads them."""
        chain = [value]  # from the rotated heads
        while (producer := chain[-1].producer()) is not None and producer.op_type == "Reshape":
            chain.append(edit.operand(producer, 0))
        view = self.views[value]
        instruction = next((each for each in self.instructions if each.out == view.buffer), None)
        if (
            instruction is None
            or instruction.op != "rope"
            or instruction.integers["rotated"] * instruction.integers["heads"] != view.width
            or any(len(list(each.uses())) != 1 for each in chain)
        ):
            return None
        return instruction

    def _attention(self, node: ir.Node) -> None:
        cache_input, layer = edit.operand(node, 3), self.layers[_layer(node)]
        _, kv_heads, _, width = edit.dims(cache_input)
        if cache_input.dtype != ir.DataType.FLOAT:
            raise refusal(node, f"its KV cache is {cache_input.dtype}")
        latent = value_width(node)
        if latent and width % VECTOR:
            raise refusal(node, f"its latent keys have {width} numbers, which is no multiple of {VECTOR}")
        self.caches[layer] = Cache(kv_heads, width, 0 if latent else edit.dims(edit.operand(node, 4))[3])
        query, *new = (self._view(node, index) for index in range(2 if latent else 3))
        write = "write_keys" if latent else "write_kv"
        self.instructions.append(Instruction(write, None, 0, tuple(new), (), "", {"layer": layer}, {}))
        heads, window = (int(edit.attribute(node, name)) for name in ("num_heads", "window"))
        self._emit(
            node,
            "attention",
            (query,),
            weights=tuple(self._constant(value) for value in node.inputs[SINKS:] if value is not None),
            width=heads * (latent or self.caches[layer].v_head_dim),
            integers={"heads": heads, "layer": layer, "window": window}
            | ({"value_width": latent} if latent else {})
            | ({"chunk": chunk} if (chunk := chunk_size(node)) else {}),
            floats={name: float(edit.attribute(node, name)) for name in ("scale", "softcap")},
        )

    def _partial_embedding(self, node: ir.Node) -> None:
        table = edit.operand(node, 1)
        name, begin = self._matrix(table, node), int(edit.attribute(node, "begin"))
        integers = {"begin": begin} if begin else {}
        self._emit(node, "embed", weights=(name,), integers=integers, width=edit.dims(table)[1])

    def _collective(self, node: ir.Node) -> None:
        view, ranks = self._view(node, 0), int(edit.attribute(node, "ranks"))
        gathers = node.op_type == ALL_GATHER
        op, width = ("all_gather", view.width * ranks) if gathers else ("all_reduce", view.width)
        self._emit(node, op, (view,), integers={"ranks": ranks}, width=width)

    def _send(self, node: ir.Node) -> None:
        integers = {name: int(edit.attribute(node, name)) for name in ("peer", "sequence")}
        self.instructions.append(Instruction("send", None, 0, (self._view(node, 0),), (), "", integers, {}))

    def _receive(self, node: ir.Node) -> None:
        out, integers = (
            node.outputs[0],
            {name: int(edit.attribute(node, name)) for name in ("peer", "sequence")},
        )
        rows = "logits" if rows_are_logits(out) else "tokens"
        self._emit(node, "receive", integers=integers, width=int(np.prod(edit.dims(out)[1:])), rows=rows)

    def _gemm(self, node: ir.Node) -> None:
        if node.attributes.get_int("transA", 0):
            raise refusal(node, "its activations are transposed")
        view, weight = self._view(node, 0), edit.operand(node, 1)
        transposed = not node.attributes.get_int("transB", 0)
        name, rows = self._matrix(weight, node, transposed=transposed), edit.dims(weight)[int(transposed)]
        self._emit(node, "linear", (view,), weights=(name,), width=rows)
        bias = node.inputs[2] if len(node.inputs) > 2 else None
        if bias is not None:
            out = self.views[node.outputs[0]]
            self._emit(node, "vector", (out,), function="add", weights=(self._constant(bias),))

    def _head_linear(self, node: ir.Node) -> None:
        weight, (heads, begin, rows, transposed) = (
            edit.operand(node, 1),
            (int(edit.attribute(node, name)) for name in ("heads", "begin", "rows", "transposed")),
        )
        source = weight
        while (producer := source.producer()) is not None and producer.op_type == "Cast":
            source = edit.operand(producer, 0)
        element = _ELEMENTS.get(source.dtype) if source.dtype is not None else None
        if producer is not None or element not in ("fp32", "fp16", "bf16"):
            raise refusal(node, "its matrices of heads are quantized")
        columns = edit.dims(weight)[1]
        outputs, width = (columns, rows) if transposed else (rows, columns)
        if outputs % TILE:
            raise refusal(node, f"a matrix of its heads has {outputs} rows, which is no multiple of {TILE}")
        name = f"{source.name}:{begin}"
        self.matrices[name] = Matrix(heads * outputs, width, element)
        of_heads = HeadRows(heads, begin, rows, bool(transposed))
        self.sources[name] = MatrixSource(source, heads=of_heads)
        integers, view = {"heads": heads}, self._view(node, 0)
        self._emit(node, "linear", (view,), weights=(name,), integers=integers, width=heads * outputs)

    def _matrix(self, weight: ir.Value, node: ir.Node, skip: int = 0, *, transposed: bool = False) -> str:
        """Record a matrix of the program, see `MatrixSource`, and return its name."""
        rows, columns = edit.dims(weight)[::-1] if transposed else edit.dims(weight)
        rows -= skip
        source = weight
        while (producer := source.producer()) is not None and producer.op_type == "Cast":
            source = edit.operand(producer, 0)
        name, scales, block = str(source.name), None, 0
        dequantized = None
        if producer is not None and producer.op_type == "DequantizeLinear":
            codes, scales = edit.operand(producer, 0), edit.operand(producer, 1)
            name, block = str(codes.name), _block(producer, columns)
            odd = block % 16 or columns % block or (_ELEMENTS.get(codes.dtype) == "fp8" and block != columns)  # type: ignore[arg-type]
            if codes.dtype not in _ELEMENTS or codes.producer() is not None or odd:
                dequantized = weight  # as fp32
            else:
                source = codes
        elif producer is not None:
            dequantized = weight
        if name in self.matrices:
            same = (self.matrices[name].rows, self.sources[name].skip, self.sources[name].transposed)
            if same != (rows, skip, transposed):
                raise refusal(node, "its matrix is used in another way elsewhere")
            return name
        if (skip or transposed) and producer is not None:
            raise refusal(node, "its matrix is quantized and not in rows of outputs")
        if dequantized is not None:
            self.matrices[name] = Matrix(rows, columns, "fp32")
            self.sources[name] = MatrixSource(source, None, dequantized)
            return name
        element = _ELEMENTS.get(source.dtype) if source.dtype is not None else None
        if element is None:
            raise refusal(node, f"its weight is {source.dtype}")
        half = scales is not None and _scale_dtype(scales) == ir.DataType.FLOAT16
        scale_dtype: Literal["", "fp16", "fp32"] = "" if scales is None else "fp16" if half else "fp32"
        self.matrices[name] = Matrix(rows, columns, element, block, scale_dtype)
        self.sources[name] = MatrixSource(source, scales, transposed=transposed, skip=skip)
        return name


_NODES: Mapping[str, Callable[[_Lowering, ir.Node], None]] = {
    "Gather": _Lowering._gather,
    "Reshape": _Lowering._reshape,
    "Split": _Lowering._split,
    "Slice": _Lowering._slice,
    "Concat": _Lowering._concat,
    "Cast": _Lowering._cast,
    "Identity": _Lowering._identity,
    "QuantizeLinear": _Lowering._quantize,
    "DequantizeLinear": _Lowering._identity,
    ROUND_FP4: _Lowering._round_fp4,
    "Gelu": _Lowering._gelu,
    "Swish": _Lowering._swish,
    "Pow": _Lowering._pow,
    "Clip": _Lowering._clip,
    "RMSNormalization": _Lowering._rms_norm,
    "LayerNormalization": _Lowering._layer_norm,
    "RotaryEmbedding": _Lowering._rope,
    "Gemm": _Lowering._gemm,
    "Softmax": _Lowering._softmax,
    "ReduceSum": _Lowering._reduce_sum,
    "TopK": _Lowering._top_k,
    EXPERTS: _Lowering._experts,
    GROUPED_TOP_K: _Lowering._grouped_top_k,
    HEAD_LINEAR: _Lowering._head_linear,
    ATTENTION: _Lowering._attention,
    ALL_REDUCE: _Lowering._collective,
    ALL_GATHER: _Lowering._collective,
    PARTIAL_EMBEDDING: _Lowering._partial_embedding,
    SEND: _Lowering._send,
    RECV: _Lowering._receive,
}


def _layer(attention: ir.Node) -> int:
    return int(str(edit.operand(attention, 3).name).rpartition(".")[2])


def _block(node: ir.Node, columns: int) -> int:
    """Return the number of columns that share a scale."""
    block = node.attributes.get_int("block_size", 0)
    return block or columns


def _scale_dtype(value: ir.Value) -> ir.DataType | None:
    while (node := value.producer()) is not None and node.op_type == "Cast":
        value = edit.operand(node, 0)
    return value.dtype
