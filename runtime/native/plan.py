"""The plan of a program on the CPU: quantized inputs, groups of instructions, and the memory of buffers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from llmc.plugins.cpu import library
from llmc.runtime.native.experts import expand
from llmc.runtime.native.program import BINARY, INTEGERS, ROUND, UNARY, Instruction, Matrix, Program, View

LINE = 64  # bytes of a cache line
_LARGEST_GROUP = 128  # activations that share a scale
COLLECTIVES = (library.ALL_REDUCE, library.ALL_GATHER)  # operations of all ranks
TRANSFER = 100  # an operation between two ranks, which the executor runs between those of the library
_ROWWISE = library.QUANTIZE  # operations up to this number work on one row at a time
LINEAR = (library.LINEAR_INT, library.LINEAR_FLOAT, library.EXPERTS_INT, library.EXPERTS_FLOAT)
_OF_DIGITS = (library.LINEAR_INT, library.EXPERTS_INT)
_OF_TOKENS = (library.SORT_ROWS, library.SUM_CHOICES)  # though they are part of a mixture of experts
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
    #: The input in int8 digits, which QUANTIZE writes, and LINEAR_INT or EXPERTS_INT reads.
    digits: Digits | None = None

    @property
    def choices(self) -> int:
        """The rows that a token has, one for each of its experts; 0 if each token or logit has one row."""
        return 0 if self.op in _OF_TOKENS else self.source.integers.get("choices", 0)


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
    #: Rows of a token.
    choices: int = 1

    @property
    def row_bytes(self) -> int:
        """Bytes of the digits, scales and sums of a row."""
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

    #: The program with the instructions and buffers of `experts.py`.
    program: Program
    instructions: list[Planned] = field(default_factory=list)
    #: The instructions (begin, end) of each group.
    groups: list[tuple[int, int]] = field(default_factory=list)
    #: The number of a program's buffer -> its memory.
    buffers: dict[int, Place] = field(default_factory=dict)
    #: A buffer without memory of its own -> the buffer whose memory it shares, and its first column there.
    aliases: dict[int, tuple[int, int]] = field(default_factory=dict)
    #: A buffer with several rows for a token -> the fp32 numbers from one row to the next.
    strides: Mapping[int, int] = field(default_factory=dict)
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
    expanded = expand(program)
    program = expanded.program
    result = Plan(program, strides=expanded.strides)
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
        if instruction.op not in ("linear", "expert_linear"):
            result.instructions.append(Planned(_code(instruction), per_logit, instruction))
            known = {key: value for key, value in known.items() if key[0].buffer != instruction.out}
            continue
        matrix, choices = program.matrices[instruction.weights[0]], instruction.integers.get("choices", 0)
        of_floats, of_digits = (LINEAR[2:] if choices else LINEAR[:2])[::-1]
        if matrix.element not in INTEGERS:
            result.instructions.append(Planned(of_floats, per_logit, instruction))
            continue
        view, group = instruction.inputs[0], group_of(matrix)
        if (view, group) not in known:
            scale = rounded.get(view.buffer, "")
            known[view, group] = Digits(view.width, group, 1 if scale else digits, scale, choices or 1)
            result.instructions.append(Planned(library.QUANTIZE, per_logit, instruction, known[view, group]))
        result.instructions.append(Planned(of_digits, per_logit, instruction, known[view, group]))
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
        "join": library.JOIN,
        "unary": library.UNARY,
        "binary": library.BINARY,
        "glu": library.GLU,
        "round": library.ROUND,
        "vector": library.VECTOR,
        "scalar": library.SCALAR,
        "rms_norm": library.RMSNORM,
        "layer_norm": library.LAYERNORM,
        "rope": library.ROPE,
        "softmax": library.SOFTMAX,
        "sum": library.SUM,
        "top_k": library.TOP_K,
        "grouped_top_k": library.GROUPED_TOP_K,
        "sort_rows": library.SORT_ROWS,
        "sorted_rows": library.SORTED_ROWS,
        "sum_choices": library.SUM_CHOICES,
        "expert_bias": library.EXPERT_BIAS,
        "clamped_swiglu": library.CLAMPED_SWIGLU,
        "write_kv": library.WRITE_KV,
        "write_keys": library.WRITE_KV,
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
            and (planned.per_logit, planned.choices) == (following.per_logit, following.choices)
        )
        if not continues:
            result.groups.append((first, index + 1))
            first = index + 1


def _aliases(program: Program, strides: Mapping[int, int]) -> dict[int, tuple[int, int]]:
    """Return the buffers that share the memory of an input that nothing reads later, to save memory traffic.

    Returns buffer -> (the buffer that it overwrites, its first column there), for whole vectors of columns,
    because operations write whole vectors. An output takes the place of an input exactly: if it shared only
    some columns with another input, they would be overwritten before they are read.

    strides: as in Plan; such buffers do not share
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
        if instruction.op not in _IN_PLACE or instruction.out is None or instruction.out in strides:
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
    result.aliases = _aliases(program, result.strides)
    for number, (first, last) in enumerate(result.groups):
        for planned in result.instructions[first:last]:
            if planned.digits is not None:
                row_bytes = planned.digits.row_bytes * planned.digits.choices
                place = result.digits.setdefault(planned.digits, Place(row_bytes, number, number))
                place.last = number
            reads = [view.buffer for view in planned.source.inputs]
            if planned.op in _OF_DIGITS:  # the input was quantized; the others are still needed
                reads = reads[1:]
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
    if planned.op == library.BINARY:
        return width, BINARY.index(source.function), source.inputs[1].width == 1 != width
    if planned.op in (library.VECTOR, library.SCALAR):
        return width, BINARY.index(source.function)
    if planned.op == library.TOP_K:
        return width, integers["k"]
    if planned.op == library.JOIN:
        groups = integers["groups"]
        return groups, width // groups, source.inputs[1].width // groups
    if planned.op == library.GROUPED_TOP_K:
        return width, *(integers[name] for name in ("groups", "kept", "scored", "k"))
    if planned.op == library.SORT_ROWS:
        return integers["choices"], integers["experts"]
    if planned.op == library.CLAMPED_SWIGLU:
        return (width // 2,)
    if planned.op in (library.SORTED_ROWS, library.SUM_CHOICES, library.EXPERT_BIAS):
        return width, integers["choices"], integers["experts"]
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
        if source.op == "write_keys":  # they are stored as values are
            return cache.num_kv_heads, 0, cache.head_dim
        sizes = (cache.num_kv_heads, cache.head_dim, integers.get("value_width", cache.v_head_dim))
        if planned.op == library.WRITE_KV:
            return sizes
        return integers["heads"], *sizes, integers["window"], 0, 0, integers.get("chunk", 0)
    if planned.op == library.QUANTIZE:
        assert planned.digits is not None
        return width, planned.digits.group, planned.digits.digits
    if planned.op in (library.LINEAR_FLOAT, library.EXPERTS_FLOAT):
        matrix, experts = program.matrices[source.weights[0]], integers.get("experts", 1)
        heads = integers.get("heads", 1)
        return matrix.rows // experts, matrix.columns, library.KINDS[matrix.element], heads, 0, 0, 0, experts
    if planned.op in _OF_DIGITS:
        assert planned.digits is not None
        matrix, experts = program.matrices[source.weights[0]], integers.get("experts", 1)
        codes, group, digits = library.CODES[matrix.element], planned.digits.group, planned.digits.digits
        rows = matrix.rows // experts
        return rows, matrix.columns, codes, matrix.block, group, digits, matrix.scales == "fp16", experts
    return (width,)


def round_to_lines(nbytes: int) -> int:
    """Round up to whole cache lines."""
    return -(-nbytes // LINE) * LINE
