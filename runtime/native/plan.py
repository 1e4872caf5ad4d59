"""The plan of a program on the CPU: quantized inputs, groups of instructions, and the memory of buffers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from llmc.plugins.cpu import library
from llmc.runtime.native.program import BINARY, ROUND, UNARY, Instruction, Matrix, Program, View

LINE = 64  # bytes of a cache line
_LARGEST_GROUP = 128  # activations that share a scale
COLLECTIVES = (library.ALL_REDUCE, library.ALL_GATHER)  # operations of all ranks
TRANSFER = 100  # an operation between two ranks, which the executor runs between those of the library
_ROWWISE = library.QUANTIZE  # operations up to this number work on one row at a time
_IN_PLACE = (
    *("unary", "binary", "glu", "round", "vector", "scalar"),
    *("rms_norm", "layer_norm", "rope", "all_reduce"),
)


@dataclass
class Planned:
    """An instruction before it has addresses."""

    #: The operation, as in program.h.
    op: int
    #: Whether its rows are those of logits, not those of tokens.
    per_logit: bool
    #: The program's instruction.
    source: Instruction
    #: The input in int8 digits, which QUANTIZE writes and LINEAR_INT reads.
    digits: Digits | None = None


@dataclass(eq=False)
class Digits:
    """A view of a buffer, quantized for matrices of integers: each number is one or more int8 digits."""

    #: Numbers of a row.
    width: int
    #: Numbers that share a scale.
    group: int
    #: Digits of a number.
    digits: int
    #: The scale of all groups, a constant of the weights file; "": each group has its own.
    scale: str = ""

    @property
    def row_bytes(self) -> int:
        """Bytes of a row's digits, scales and sums."""
        groups = self.width // self.group
        return (
            round_to_lines(self.digits * self.width)
            + round_to_lines(4 * groups)
            + round_to_lines(4 * groups * self.digits)
        )


@dataclass(eq=False)
class Place:
    """The memory of a buffer or of a quantized input during a step."""

    #: Bytes of a row.
    row_bytes: int
    #: The first group that needs it.
    first: int
    #: The last group that needs it.
    last: int
    #: Where it begins, in bytes per token of a step.
    offset: int = 0


@dataclass
class Plan:
    """A program as groups of planned instructions, and the memory that they write."""

    instructions: list[Planned] = field(default_factory=list)
    #: The instructions (begin, end) of each group.
    groups: list[tuple[int, int]] = field(default_factory=list)
    #: The number of a program's buffer -> its memory.
    buffers: dict[int, Place] = field(default_factory=dict)
    #: A buffer without memory of its own -> the buffer whose memory it shares, and its first column there.
    aliases: dict[int, tuple[int, int]] = field(default_factory=dict)
    #: A quantized input -> its memory.
    digits: dict[Digits, Place] = field(default_factory=dict)
    #: The size of all memory, in bytes per token of a step.
    row_bytes: int = 0


@dataclass(frozen=True)
class Group:
    """Instructions that run together, for a profile."""

    #: The operations; for a linear layer with its shape and dtype.
    name: str
    #: Whether its rows are those of logits, not those of tokens.
    per_logit: bool
    #: Bytes of a linear layer's weights.
    weight_bytes: int = 0
    #: Multiply-adds of a linear layer for one row: of fp32 numbers, or of int8 digits.
    products: int = 0
    #: Whether `products` are of integers.
    integer: bool = False


def group_of(matrix: Matrix) -> int:
    """Return how many activations share a scale: a multiple of 16, up to 128, that divides a block."""
    return next(size for size in range(min(matrix.block, _LARGEST_GROUP), 0, -16) if matrix.block % size == 0)


def plan(program: Program, digits: int) -> Plan:
    """Insert the quantization of inputs, group the instructions that run row by row, and place the buffers.

    digits: int8 digits of an activation that a matrix of integers reads: 3 (24 bits) or 1 (8 bits).
        Activations that were rounded to int8 need only one.
    """
    result = Plan()
    known: dict[tuple[View, int], Digits] = {}
    rounded: dict[int, str] = {}  # a buffer that was rounded to int8 -> its scale
    for instruction in program.instructions:
        if instruction.out is not None:
            rounded.pop(instruction.out, None)
        if (instruction.op, instruction.function) == ("round", "int8"):
            rounded[instruction.out] = instruction.weights[0]  # type: ignore[index]
        rows = program.buffers[
            instruction.out if instruction.out is not None else instruction.inputs[0].buffer
        ].rows
        per_logit = rows == "logits"
        if instruction.op != "linear":
            result.instructions.append(Planned(_code(instruction), per_logit, instruction))
            known = {key: value for key, value in known.items() if key[0].buffer != instruction.out}
            continue
        matrix = program.matrices[instruction.weights[0]]
        if matrix.element not in ("int8", "int4"):
            result.instructions.append(Planned(library.LINEAR_FLOAT, per_logit, instruction))
            continue
        view, group = instruction.inputs[0], group_of(matrix)
        if (view, group) not in known:
            scale = rounded.get(view.buffer, "")
            known[view, group] = Digits(view.width, group, 1 if scale else digits, scale)
            result.instructions.append(Planned(library.QUANTIZE, per_logit, instruction, known[view, group]))
        result.instructions.append(Planned(library.LINEAR_INT, per_logit, instruction, known[view, group]))
    _make_groups(result)
    _place(program, result)
    return result


def _code(instruction: Instruction) -> int:
    return {
        "embed": library.EMBED,
        "embed_positions": library.EMBED,
        "slice": library.SLICE,
        "gather_rows": library.GATHER,
        "copy": library.COPY,
        "unary": library.UNARY,
        "binary": library.BINARY,
        "glu": library.GLU,
        "round": library.ROUND,
        "vector": library.VECTOR,
        "scalar": library.SCALAR,
        "rms_norm": library.RMSNORM,
        "layer_norm": library.LAYERNORM,
        "rope": library.ROPE,
        "write_kv": library.WRITE_KV,
        "attention": library.ATTENTION,
        "all_reduce": library.ALL_REDUCE,
        "all_gather": library.ALL_GATHER,
        "send": TRANSFER,
        "receive": TRANSFER,
    }[instruction.op]


def _make_groups(result: Plan) -> None:
    first = 0
    for index, planned in enumerate(result.instructions):
        following = result.instructions[index + 1] if index + 1 < len(result.instructions) else None
        continues = (
            following is not None
            and planned.op <= _ROWWISE
            and following.op <= _ROWWISE
            and following.op != library.GATHER  # it reads other rows than its own
            and planned.per_logit == following.per_logit
        )
        if not continues:
            result.groups.append((first, index + 1))
            first = index + 1


def _aliases(program: Program) -> dict[int, tuple[int, int]]:
    """Return the buffers that share the memory of an input that nothing reads later, to save memory traffic.

    Returns buffer -> (the buffer that it overwrites, its first column there), for whole vectors of columns,
    because operations write whole vectors. An output takes the place of an input exactly: if it shared only
    some columns with another input, they would be overwritten before they are read.
    """
    last_read = {
        view.buffer: number
        for number, instruction in enumerate(program.instructions)
        for view in instruction.inputs
    }
    if program.logits is not None:
        last_read[program.logits] = len(program.instructions)
    result: dict[int, tuple[int, int]] = {}
    for number, instruction in enumerate(program.instructions):
        if instruction.op not in _IN_PLACE or instruction.out is None:
            continue
        places = []
        for view in instruction.inputs:
            root, column = result.get(view.buffer, (view.buffer, 0))
            places.append((root, column + view.offset))
        for view, place in zip(instruction.inputs, places, strict=True):
            whole = view.width % 16 == 0 and view.offset % 16 == 0
            apart = all(
                other == place or other[0] != place[0] or abs(other[1] - place[1]) >= view.width
                for other in places
            )
            if last_read[view.buffer] == number and whole and apart:
                result[instruction.out] = place
                break
    return result


def _place(program: Program, result: Plan) -> None:
    """Give every buffer and every quantized input memory that nothing else uses in the same groups."""
    result.aliases = _aliases(program)
    for number, (first, last) in enumerate(result.groups):
        for planned in result.instructions[first:last]:
            if planned.digits is not None:
                place = result.digits.setdefault(
                    planned.digits, Place(planned.digits.row_bytes, number, number)
                )
                place.last = number
            reads = (
                [] if planned.op == library.LINEAR_INT else [view.buffer for view in planned.source.inputs]
            )
            writes = (
                [] if planned.op == library.QUANTIZE or planned.source.out is None else [planned.source.out]
            )
            for buffer in (*reads, *writes):
                root, _ = result.aliases.get(buffer, (buffer, 0))
                width = round_to_lines(4 * (program.buffers[root].width + 16)) + LINE
                place = result.buffers.setdefault(root, Place(width, number, number))
                place.last = number
    if program.logits is not None:
        result.buffers[result.aliases.get(program.logits, (program.logits, 0))[0]].last = len(result.groups)
    placed: list[Place] = []
    for place in sorted(
        [*result.buffers.values(), *result.digits.values()], key=lambda item: -item.row_bytes
    ):
        offset = 0
        for other in sorted(placed, key=lambda item: item.offset):
            if other.last < place.first or place.last < other.first:
                continue
            if offset + place.row_bytes <= other.offset:
                break
            offset = max(offset, other.offset + other.row_bytes)
        place.offset = offset
        placed.append(place)
        result.row_bytes = max(result.row_bytes, offset + place.row_bytes)


def numbers(program: Program, planned: Planned) -> Sequence[int]:
    """Return the array `n` of an instruction. program.h lists its elements for each operation."""
    source, integers = planned.source, planned.source.integers
    width = source.inputs[0].width if source.inputs else program.buffers[source.out or 0].width
    if planned.op == library.EMBED:
        by_position, matrix = source.op == "embed_positions", program.matrices[source.weights[0]]
        return width, library.KINDS[matrix.element], by_position, integers.get("begin", 0), matrix.rows
    if planned.op == library.SLICE:
        groups, out = integers["groups"], program.buffers[source.out or 0].width
        return groups, width // groups, integers["begin"], out // groups
    if planned.op in (library.UNARY, library.GLU):
        return width, UNARY.index(source.function)
    if planned.op == library.ROUND:
        return width, ROUND.index(source.function)
    if planned.op in (library.BINARY, library.VECTOR, library.SCALAR):
        return width, BINARY.index(source.function)
    if planned.op == library.RMSNORM:
        return integers["groups"], width // integers["groups"]
    if planned.op == library.LAYERNORM:
        group = width // integers["groups"]
        step = group if program.constants[source.weights[0]] == width else 0
        return group, len(source.weights) > 1, integers["groups"], step
    if planned.op == library.ROPE:
        return integers["heads"], width // integers["heads"], integers["rotated"], integers["interleaved"]
    if planned.op in (library.WRITE_KV, library.ATTENTION):
        cache = program.caches[integers["layer"]]
        sizes = (cache.num_kv_heads, cache.head_dim, cache.v_head_dim)
        if planned.op == library.WRITE_KV:
            return sizes
        return integers["heads"], *sizes, integers["window"], 0, 0, integers.get("chunk", 0)
    if planned.op == library.QUANTIZE:
        assert planned.digits is not None
        return width, planned.digits.group, planned.digits.digits
    if planned.op == library.LINEAR_FLOAT:
        matrix = program.matrices[source.weights[0]]
        return matrix.rows, matrix.columns, library.KINDS[matrix.element]
    if planned.op == library.LINEAR_INT:
        assert planned.digits is not None
        matrix = program.matrices[source.weights[0]]
        bits = 4 if matrix.element == "int4" else 8
        group, digits = planned.digits.group, planned.digits.digits
        return matrix.rows, matrix.columns, bits, matrix.block, group, digits, matrix.scales == "fp16"
    return (width,)


def round_to_lines(nbytes: int) -> int:
    """Round up to whole cache lines."""
    return -(-nbytes // LINE) * LINE
