"""A mixture of experts as the operations of the native library.

Each token has as many rows as chosen experts, its choices. The rows of all tokens are sorted by expert, so
that the rows of an expert lie together and its matrices are read once:

    sort_rows    order = the places of rows sorted by expert
    sorted_rows  s = rows of x, sorted
    linear       h = s · gate_up of the row's expert
    expert_bias  h = h + the bias of the row's expert, where it has one
    glu          h = f(gates) · ups; or clamped_swiglu, for gates and ups that alternate
    linear       d = h · down of the row's expert
    expert_bias  d = d + the bias of the row's expert, likewise
    sum_choices  out = the sum of d of a token's rows, in the order of its choices, times their weights
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType

from llmc.runtime.native.program import CLAMPED_SWIGLU, Buffer, Instruction, Program, View

_VECTOR = 16  # numbers of a vector; a row has room for one more
_NONE: Mapping[str, float] = MappingProxyType({})


@dataclass(frozen=True)
class Expanded:
    """A program whose mixtures of experts are instructions of their own."""

    program: Program
    #: A buffer with several rows for a token -> the fp32 numbers from one row to the next.
    strides: Mapping[int, int]


def expand(program: Program) -> Expanded:
    """Replace each instruction "experts" by those of this module, with new buffers at the end."""
    buffers, instructions, strides = list(program.buffers), [], {}

    def rows(choices: int, width: int) -> View:
        """Add a buffer with `choices` rows for a token."""
        stride = -(-width // _VECTOR) * _VECTOR + _VECTOR
        strides[len(buffers)] = stride
        buffers.append(Buffer(choices * stride, "tokens"))
        return View(len(buffers) - 1, 0, width)

    for instruction in program.instructions:
        if instruction.op != "experts":
            instructions.append(instruction)
            continue
        x, ids, weights = instruction.inputs
        experts, choices = instruction.integers["experts"], ids.width
        gate_up, down, *biases = instruction.weights
        inner = program.matrices[down].columns
        integers = {"experts": experts, "choices": choices}
        buffers.append(Buffer(2 * choices + 2 * (experts + 1), "tokens"))
        order = View(len(buffers) - 1, 0, buffers[-1].width)
        sorted_x, hidden = rows(choices, x.width), rows(choices, 2 * inner)
        activated, y = rows(choices, inner), rows(choices, program.matrices[down].rows // experts)

        def emit(
            op: str,
            out: int | None,
            inputs: tuple[View, ...],
            weights: tuple[str, ...] = (),
            function: str = "",
            integers: Mapping[str, int] = integers,
            floats: Mapping[str, float] = _NONE,
        ) -> None:
            instructions.append(Instruction(op, out, 0, inputs, weights, function, integers, floats))

        def biased(x: View, order: View, bias: Sequence[str], choices: int) -> View:
            """Add the biases of the experts, if there are any."""
            if not bias:
                return x
            out = rows(choices, x.width)
            emit("expert_bias", out.buffer, (x, order), tuple(bias))
            return out

        emit("sort_rows", order.buffer, (ids,))
        emit("sorted_rows", sorted_x.buffer, (x, order))
        emit("expert_linear", hidden.buffer, (sorted_x, order), (gate_up,))
        hidden = biased(hidden, order, biases[:1], choices)
        if instruction.function == CLAMPED_SWIGLU:
            emit("clamped_swiglu", activated.buffer, (hidden,), floats=instruction.floats)
        else:
            gates, ups = replace(hidden, width=inner), View(hidden.buffer, inner, inner)
            emit("glu", activated.buffer, (gates, ups), (), instruction.function)
        emit("expert_linear", y.buffer, (activated, order), (down,))
        y = biased(y, order, biases[1:], choices)
        emit("sum_choices", instruction.out, (y, weights, order))
    return Expanded(replace(program, buffers=tuple(buffers), instructions=tuple(instructions)), strides)
