"""A model as a program: a flat list of instructions over rows of numbers.

`docs/reference/program.md` is the specification. A program is data: it has no addresses, threads or
instruction sets. A buffer has one row per token of a step, or one per wanted row of logits. An instruction
reads views of buffers, which are ranges of columns, and constants of the weights file. It writes a buffer.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from llmc.runtime.bundle.strict_json import DAMAGED, decode, no_constants, plain, unique_keys
from llmc.runtime.errors import BundleError

PROGRAM_VERSION = 1
MAX_PROGRAM_BYTES = 64 << 20
MAX_INSTRUCTIONS = 1 << 14  # and buffers; a model of 126 layers has some 2,000
MAX_RANKS = 1 << 10
MAX_GROUPS, MAX_SCORED = (
    256,
    16,
)  # of grouped_top_k, as plugins/grouped_top_k/cpu/grouped_top_k.c has room for
TILE = 32  # rows of a packed matrix that lie together
VECTOR = 16  # numbers of a vector, which the size of latent keys is a multiple of
_MAX = 1 << 27  # of sizes and indices
_MAX_KEYS, _MAX_VALUES = 576, 512  # of a head, as plugins/paged_attention/cpu/attention.c has room for

UNARY = (
    "sigmoid",
    "silu",
    "gelu",
    "gelu_tanh",
    "tanh",
    "relu",
    "exp",
    "erf",
    "neg",
    "abs",
    "sqrt",
    "reciprocal",
    "square",
)
BINARY = ("add", "sub", "mul", "div", "min", "max")
ROUND = ("fp8", "fp4", "int8")
#: (clamp(up, -limit, limit) + 1) x gate x sigmoid(alpha x gate), gate at most limit. The rows of a matrix of
#: gates and ups alternate.
CLAMPED_SWIGLU = "clamped_swiglu"


def _size(value: int) -> str:
    return "" if 0 < value <= _MAX else f"must be 1 to {_MAX}"


def _index(value: int) -> str:
    return "" if 0 <= value <= _MAX else f"must be 0 to {_MAX}"


Size = Annotated[int, _size]
Index = Annotated[int, _index]


@dataclass(frozen=True)
class Buffer:
    """An array of rows of fp32 numbers."""

    #: Numbers of a row.
    width: Size
    #: One row for each token of the step, or one for each row of logits.
    rows: Literal["tokens", "logits"]


@dataclass(frozen=True)
class View:
    """Columns offset .. offset + width - 1 of a buffer."""

    buffer: Index
    offset: Index
    width: Size


#: The elements of matrices that are multiplied as integers. fp4 is E2M1, whose values are halves of integers.
INTEGERS = ("int8", "int4", "fp4")


@dataclass(frozen=True)
class Matrix:
    """A matrix [rows, columns] of the weights file, packed in tiles of 32 rows."""

    rows: Size
    columns: Size
    element: Literal["fp32", "fp16", "bf16", "fp8", "int8", "int4", "fp4"]
    #: Columns that share a scale, for fp8 all; 0 without scales.
    block: Index = 0
    #: The dtype of the scales of fp8 and of INTEGERS; otherwise "".
    scales: Literal["", "fp16", "fp32"] = ""

    @property
    def nbytes(self) -> int:
        """The bytes of the packed matrix."""
        tiles = -(-self.rows // TILE)
        if self.element in INTEGERS:
            scale = TILE * (2 if self.scales == "fp16" else 4)
            codes = self.columns * TILE // (1 if self.element == "int8" else 2)
            return tiles * (self.columns // self.block * scale + codes)
        if self.element == "fp8":
            return tiles * TILE * (4 + self.columns)
        return tiles * TILE * self.columns * (4 if self.element == "fp32" else 2)


@dataclass(frozen=True)
class Cache:
    """The paged KV cache of one layer: blocks of 32 tokens."""

    num_kv_heads: Size
    head_dim: Size
    #: 0: values are the first numbers of keys, and only keys are cached.
    v_head_dim: Index


@dataclass(frozen=True)
class Instruction:
    """One step of the program. `OPERATIONS` says which fields each operation has."""

    op: str
    #: The buffer that it writes, or None.
    out: Index | None
    #: The first column that it writes.
    offset: Index
    #: The columns that it reads.
    inputs: tuple[View, ...]
    #: Names in the weights file.
    weights: tuple[str, ...]
    #: "function", where the operation has one; otherwise "".
    function: str
    integers: Mapping[str, Index]
    floats: Mapping[str, float]


@dataclass(frozen=True)
class Operation:
    """The fields of an operation's instructions."""

    #: Number of inputs.
    inputs: int = 1
    #: Minimum and maximum number of weights.
    weights: tuple[int, int] = (0, 0)
    #: The values of "function".
    functions: tuple[str, ...] = ()
    #: The names of integer parameters.
    integers: tuple[str, ...] = ()
    #: The names of integer parameters that may be left out: 0.
    optional: tuple[str, ...] = ()
    #: The names of float parameters.
    floats: tuple[str, ...] = ()
    #: The names of float parameters that only some functions have.
    optional_floats: tuple[str, ...] = ()
    #: Whether it writes a buffer.
    writes: bool = True


OPERATIONS: Mapping[str, Operation] = {
    # out = table[input_ids - begin]; 0 for ids that the table, a part of one rank, lacks
    "embed": Operation(inputs=0, weights=(1, 1), optional=("begin",)),
    # out = table[position_ids]
    "embed_positions": Operation(inputs=0, weights=(1, 1)),
    # out = the rows of the input whose logits are wanted
    "gather_rows": Operation(),
    # columns offset .. of out = the input
    "copy": Operation(),
    # out = for each of `groups` groups of columns, those of the first input, then those of the second
    "join": Operation(inputs=2, integers=("groups",)),
    # out = columns begin .. begin + width - 1 of each of `groups` groups of columns
    "slice": Operation(integers=("groups", "begin")),
    "unary": Operation(functions=UNARY),
    # out = f(first input, second input); the second one may have a single column
    "binary": Operation(inputs=2, functions=BINARY),
    # out = f(first input) x second input, f as of "unary"
    "glu": Operation(inputs=2, functions=UNARY),
    # out = the input rounded to a format, with a scale of the weights: see docs/reference/program.md
    "round": Operation(weights=(1, 1), functions=ROUND),
    # out = f(input, a vector of the weights)
    "vector": Operation(weights=(1, 1), functions=BINARY),
    # out = f(input, value)
    "scalar": Operation(functions=BINARY, floats=("value",)),
    # out = input / sqrt(mean(input^2) + epsilon) * weight, in `groups` groups of columns
    "rms_norm": Operation(weights=(1, 1), integers=("groups",), floats=("epsilon",)),
    # out = (input - mean) / sqrt(variance + epsilon) * weight (+ bias), in `groups` groups of columns,
    # which have the same weights or each its own
    "layer_norm": Operation(weights=(1, 2), integers=("groups",), floats=("epsilon",)),
    # rotary embedding of `heads` heads; weights: cosines and sines [positions, rotated / 2]
    "rope": Operation(weights=(2, 2), integers=("heads", "rotated", "interleaved")),
    # keys and values of the step's tokens go to the cache of `layer`
    "write_kv": Operation(inputs=2, integers=("layer",), writes=False),
    # keys of the step's tokens go to the cache of `layer`, which has no values
    "write_keys": Operation(integers=("layer",), writes=False),
    # out = exp(input), divided by its sum
    "softmax": Operation(),
    # out = the sum of the input's columns, one number
    "sum": Operation(),
    # out = the `k` largest numbers of the input in falling order, then their columns. Of equal numbers, the
    # one in the lowest column comes first
    "top_k": Operation(integers=("k",)),
    # out = k columns of the first input, then their places: as llmc.GroupedTopK
    "grouped_top_k": Operation(inputs=2, integers=("groups", "kept", "scored", "k")),
    # out = the experts (second input) of the first input, weighted by the third. Weights: the matrices of all
    # experts one below the other, gates and ups, then down; none or both of their biases. As llmc.Experts
    "experts": Operation(
        inputs=3,
        weights=(2, 4),
        functions=(*UNARY, CLAMPED_SWIGLU),
        integers=("experts",),
        optional_floats=("alpha", "limit"),
    ),
    # out = input x matrix^T; with `heads`, each group of columns of the input x the rows of its own
    "linear": Operation(weights=(1, 1), optional=("heads",)),
    # out = attention of queries over the cache of `layer`; as llmc.PagedAttention. A weight: the sinks.
    # value_width: of a cache without values
    "attention": Operation(
        weights=(0, 1),
        integers=("heads", "layer", "window"),
        optional=("chunk", "value_width"),
        floats=("scale", "softcap"),
    ),
    # out = the sum of every rank's input, added in the order of the ranks
    "all_reduce": Operation(integers=("ranks",)),
    # out = the columns of every rank's input, in the order of the ranks
    "all_gather": Operation(integers=("ranks",)),
    # the input goes to the rank `peer`
    "send": Operation(integers=("peer", "sequence"), writes=False),
    # out = what the rank `peer` sends
    "receive": Operation(inputs=0, integers=("peer", "sequence")),
}
COLLECTIVES = ("all_reduce", "all_gather")
TRANSFERS = ("send", "receive")


@dataclass(frozen=True)
class Program:
    """A model for one rank."""

    version: Literal[1]
    buffers: tuple[Buffer, ...]
    caches: tuple[Cache, ...]
    matrices: Mapping[str, Matrix]
    #: Vectors and tables, fp32, of the weights file: name -> number of elements.
    constants: Mapping[str, Size]
    instructions: tuple[Instruction, ...]
    #: The buffer of the logits. None: the rank has none.
    logits: Index | None
    vocab_size: Size
    #: Rows of the tables of positions; a step has smaller positions. 0: the model has no tables.
    max_positions: Index

    @functools.cached_property
    def ranks(self) -> int:
        """The number of ranks that run the same layers together."""
        collectives = (each for each in self.instructions if each.op in COLLECTIVES)
        return next((each.integers.get("ranks", 0) for each in collectives), 1)

    def to_json(self) -> bytes:
        """Return the program as JSON: sorted keys, one line per instruction, ASCII."""
        tree = plain(self)
        instructions = tree.pop("instructions")
        head = json.dumps(tree, sort_keys=True, indent=1, allow_nan=False)
        lines = ",\n  ".join(
            json.dumps(instruction, sort_keys=True, allow_nan=False) for instruction in instructions
        )
        return f'{head[:-2]},\n "instructions": [\n  {lines}\n ]\n}}\n'.encode("ascii")

    @staticmethod
    def from_json(data: bytes) -> Program:
        """Read and check a program. Raises BundleError, naming the field or the instruction."""
        if len(data) > MAX_PROGRAM_BYTES:
            raise BundleError(f"the program is larger than {MAX_PROGRAM_BYTES} bytes", DAMAGED)
        try:
            tree = json.loads(
                data.decode("ascii"), object_pairs_hook=unique_keys, parse_constant=no_constants
            )
        except (ValueError, RecursionError) as error:
            raise BundleError(f"the program is not JSON: {ascii(str(error))[1:-1]}", DAMAGED) from error
        program: Program = decode(Program, tree, "the program")
        check(program)
        return program


def check(program: Program) -> None:
    """Raise BundleError for a program that reads or writes outside its buffers, constants or caches.

    An executor relies on this: after it, every row of every instruction stays inside its arrays.
    """
    if len(program.instructions) > MAX_INSTRUCTIONS or len(program.buffers) > MAX_INSTRUCTIONS:
        raise BundleError(f"the program has more than {MAX_INSTRUCTIONS} instructions or buffers", DAMAGED)
    for name, matrix in program.matrices.items():
        if complaint := _matrix_complaint(matrix):
            raise BundleError(f"the matrix {name!a:.99} of the program {complaint}", DAMAGED)
    for layer, cache in enumerate(program.caches):
        if cache.head_dim % 2 or cache.head_dim > _MAX_KEYS or cache.v_head_dim > _MAX_VALUES:
            complaint = f"has heads of an odd size, or of more than {_MAX_KEYS} keys or {_MAX_VALUES} values"
            raise BundleError(f"cache {layer} of the program {complaint}", DAMAGED)
        if not cache.v_head_dim and cache.head_dim % VECTOR:
            complaint = f"has latent keys whose size is no multiple of {VECTOR}"
            raise BundleError(f"cache {layer} of the program {complaint}", DAMAGED)
    written: set[int] = set()
    finished: set[int] = set()  # buffers that no other instruction may write
    for number, instruction in enumerate(program.instructions):
        for complaint in _complaints(program, instruction, written, finished):
            raise BundleError(f"instruction {number} ({instruction.op}) of the program {complaint}", DAMAGED)
        finished |= {view.buffer for view in instruction.inputs}
        if instruction.out is not None:
            written.add(instruction.out)
            if instruction.op != "copy":
                finished.add(instruction.out)
    if program.logits is None:
        if not any(each.op == "send" for each in program.instructions):
            raise BundleError("the program writes no logits", DAMAGED)
        return
    if program.logits not in written or program.buffers[program.logits].rows != "logits":
        raise BundleError("the program writes no logits", DAMAGED)
    if program.buffers[program.logits].width != program.vocab_size:
        raise BundleError("the program's logits are not as wide as its vocabulary", DAMAGED)


def _matrix_complaint(matrix: Matrix) -> str:
    """Return why a matrix cannot be packed, or ""."""
    if matrix.element in INTEGERS:
        if not matrix.scales or matrix.block < 16 or matrix.columns % matrix.block or matrix.block % 16:
            return "has blocks that do not fit"
    elif matrix.element == "fp8":
        if matrix.scales != "fp32" or matrix.block != matrix.columns:
            return "is fp8 without a scale for each row"
    elif matrix.block or matrix.scales:
        return "is of floats with scales"
    return ""


def _complaints(
    program: Program, instruction: Instruction, written: set[int], finished: set[int]
) -> Iterator[str]:
    operation = OPERATIONS.get(instruction.op)
    if operation is None:
        yield "is not an operation of this llmc"
        return
    if len(instruction.inputs) != operation.inputs:
        yield f"has {len(instruction.inputs)} inputs"
    if not operation.weights[0] <= len(instruction.weights) <= operation.weights[1]:
        yield f"has {len(instruction.weights)} weights"
    integers = set(instruction.integers) - set(operation.optional)
    floats = set(instruction.floats) - set(operation.optional_floats)
    if integers != set(operation.integers) or floats != set(operation.floats):
        yield "has other parameters than its operation"
    if instruction.function not in (operation.functions or ("",)):
        yield f"has no function {instruction.function!r}"
    if (instruction.out is not None) != operation.writes:
        yield "must write a buffer" if operation.writes else "writes no buffer"
    for view in instruction.inputs:
        if view.buffer >= len(program.buffers) or view.buffer not in written:
            yield "reads a buffer that nothing has written"
        elif view.offset + view.width > program.buffers[view.buffer].width:
            yield "reads past the columns of its buffer"
        elif view.buffer == instruction.out:
            yield "writes the buffer that it reads"
    for name in instruction.weights:
        if name not in program.matrices and name not in program.constants:
            yield f"reads {name!r}, which the weights lack"
    if instruction.out is not None and instruction.out >= len(program.buffers):
        yield "writes a buffer that does not exist"
    if instruction.out in finished or (instruction.op != "copy" and instruction.out in written):
        yield "writes a buffer that was written or read before"
    yield from _shape_complaints(program, instruction)


_SAME_WIDTH = (
    "gather_rows",
    "unary",
    "binary",
    "glu",
    "round",
    "vector",
    "scalar",
    "rms_norm",
    "layer_norm",
    "rope",
    "softmax",
    "all_reduce",
)


def _shape_complaints(program: Program, instruction: Instruction) -> Iterator[str]:
    """Yield the problems of an instruction's sizes. The buffers and weights that it names exist."""
    out = program.buffers[instruction.out] if instruction.out is not None else None
    first = instruction.inputs[0] if instruction.inputs else None
    rows = {program.buffers[view.buffer].rows for view in instruction.inputs}
    if instruction.op == "gather_rows":
        if rows != {"tokens"} or out is None or out.rows != "logits":
            yield "must go from tokens to rows of logits"
    elif out is not None and rows - {out.rows}:
        yield "mixes rows of tokens and of logits"
    if instruction.op in (
        "embed",
        "embed_positions",
        "rope",
        "write_kv",
        "write_keys",
        "attention",
        "experts",
    ) and (rows | ({out.rows} if out else set())) != {"tokens"}:
        yield "works on tokens only"
    if instruction.offset and instruction.op != "copy":
        yield "cannot write at an offset"
    width = out.width if out else 0
    if instruction.op == "copy":
        assert first is not None
        if instruction.offset + first.width > width:
            yield "writes past the columns of its buffer"
    elif instruction.op in _SAME_WIDTH and any(
        view.width != width and not (instruction.op == "binary" and number == 1 and view.width == 1)
        for number, view in enumerate(instruction.inputs)
    ):
        yield "has inputs of another width than its output"
    yield from _operand_complaints(program, instruction, width)


def _operand_complaints(program: Program, instruction: Instruction, width: int) -> Iterator[str]:
    integers, first = instruction.integers, instruction.inputs[0] if instruction.inputs else None
    if instruction.op == "vector" and program.constants.get(instruction.weights[0]) != width:
        yield "has a constant of another width"
    if instruction.op == "round":
        if program.constants.get(instruction.weights[0]) != 1:
            yield "has a scale that is no single number"
        if instruction.function == "fp4" and width % 16:
            yield "has blocks that do not fit"
    if instruction.op in ("rms_norm", "layer_norm"):
        groups, sizes = integers["groups"], {program.constants.get(name) for name in instruction.weights}
        each = instruction.op == "layer_norm" and sizes == {width}  # weights for each group
        if groups < 1 or width % groups or (sizes != {width // groups} and not each):
            yield "has groups that do not fit its weights"
    if instruction.op == "slice":
        groups, begin = integers["groups"], integers["begin"]
        if groups < 1 or width % groups or first is None or first.width % groups:
            yield "has groups that do not fit"
        elif begin < 0 or begin + width // groups > first.width // groups:
            yield "reads past the columns of a group"
    if instruction.op == "rope":
        heads, rotated = integers["heads"], integers["rotated"]
        if heads < 1 or width % heads or rotated < 2 or rotated % 2 or rotated > width // heads:
            yield "has heads that do not fit"
        elif any(
            program.constants.get(name) != program.max_positions * rotated // 2
            for name in instruction.weights
        ):
            yield "has tables of another size"
    if instruction.op in ("embed", "embed_positions"):
        matrix = program.matrices.get(instruction.weights[0])
        rows = program.vocab_size if instruction.op == "embed" else program.max_positions
        begin = integers.get("begin", 0)
        if begin and program.ranks == 1:
            yield "has a part of a table, and there is one rank"
        is_part = instruction.op == "embed" and program.ranks > 1
        fits = matrix is not None and (begin + matrix.rows <= rows if is_part else matrix.rows == rows)
        if matrix is None or matrix.columns != width or not fits:
            yield "has a table of another shape"
        elif matrix.scales:
            yield "has a table of quantized numbers"
    if instruction.op == "sum" and width != 1:
        yield "has an output of several columns"
    if instruction.op == "top_k" and (
        first is None or not 1 <= integers["k"] <= first.width or width != 2 * integers["k"]
    ):
        yield "has an output of another width"
    if instruction.op == "join":
        second, groups = instruction.inputs[1], integers["groups"]
        if groups < 1 or first is None or first.width % groups or second.width % groups:
            yield "has groups that do not fit"
        elif width != first.width + second.width:
            yield "has an output of another width"
    if instruction.op == "grouped_top_k":
        yield from _group_complaints(instruction, width)
    if instruction.op == "experts":
        yield from _expert_complaints(program, instruction, width)
    if instruction.op == "linear":
        matrix, heads = program.matrices.get(instruction.weights[0]), integers.get("heads", 1)
        if matrix is None or first is None or matrix.columns * heads != first.width or matrix.rows != width:
            yield "has a matrix of another shape"
        elif heads != 1 and (heads < 1 or matrix.rows % (heads * TILE) or matrix.scales):
            yield f"has heads whose rows are quantized, or are no multiple of {TILE}"
    if instruction.op in COLLECTIVES:
        ranks = integers["ranks"]
        if not 2 <= ranks <= MAX_RANKS or ranks != program.ranks:
            yield "has another number of ranks"
        elif instruction.op == "all_gather" and (first is None or width != ranks * first.width):
            yield "has an output that is not as wide as the inputs of all ranks"
    if instruction.op in TRANSFERS and integers["peer"] >= MAX_RANKS:
        yield "has a rank that cannot be"
    if instruction.op in ("write_kv", "write_keys", "attention"):
        yield from _cache_complaints(program, instruction, width)


def _group_complaints(instruction: Instruction, width: int) -> Iterator[str]:
    x, choice = instruction.inputs
    groups, kept, scored, k = (instruction.integers[name] for name in ("groups", "kept", "scored", "k"))
    if x.width != choice.width or not 1 <= groups <= MAX_GROUPS or x.width % groups:
        yield "has groups that do not fit"
    elif not 1 <= kept <= groups or not 1 <= scored <= min(MAX_SCORED, x.width // groups):
        yield "keeps or scores what its groups lack"
    elif not 1 <= k <= kept * (x.width // groups) or width != 2 * k:
        yield "has an output of another width"


def _expert_complaints(program: Program, instruction: Instruction, width: int) -> Iterator[str]:
    x, ids, weights = instruction.inputs
    gate_up, down = (program.matrices.get(name) for name in instruction.weights[:2])
    biases = [program.constants.get(name) for name in instruction.weights[2:]]
    experts, clamped = instruction.integers["experts"], instruction.function == CLAMPED_SWIGLU
    if gate_up is None or down is None or experts < 1:
        yield "has no experts"
    elif (gate_up.rows, gate_up.columns, down.rows) != (2 * experts * down.columns, x.width, experts * width):
        yield "has matrices of another shape"
    elif 2 * down.columns % TILE or width % TILE:
        yield f"has experts whose rows are no multiple of {TILE}"
    elif biases and biases != [gate_up.rows, down.rows]:
        yield "has biases of another size"
    elif ids.width != weights.width:
        yield "has another number of weights than of experts"
    elif set(instruction.floats) != ({"alpha", "limit"} if clamped else set()):
        yield "has other parameters than its function"
    elif (ids.width + 1) * (2 * down.columns + width + x.width + experts) > _MAX:
        yield "has more numbers for a token than the engine can hold"


def _cache_complaints(program: Program, instruction: Instruction, width: int) -> Iterator[str]:
    layer = instruction.integers["layer"]
    if not 0 <= layer < len(program.caches):
        yield "has no such cache"
        return
    cache = program.caches[layer]
    if instruction.op == "write_keys":
        if cache.v_head_dim or instruction.inputs[0].width != cache.num_kv_heads * cache.head_dim:
            yield "has keys of another width, or its cache has values"
        return
    if instruction.op == "write_kv":
        if not cache.v_head_dim:
            yield "writes values to a cache that has none"
        sizes = (cache.num_kv_heads * cache.head_dim, cache.num_kv_heads * cache.v_head_dim)
        if tuple(view.width for view in instruction.inputs) != sizes:
            yield "has keys or values of another width"
        return
    heads, value_width = instruction.integers["heads"], instruction.integers.get("value_width", 0)
    if bool(value_width) == bool(cache.v_head_dim) or value_width > min(cache.head_dim, _MAX_VALUES):
        yield "takes values from elsewhere than its cache has them"
    elif heads < 1 or heads % cache.num_kv_heads:
        yield "has heads that the cache's heads do not divide"
    elif instruction.inputs[0].width != heads * cache.head_dim or width != heads * (
        value_width or cache.v_head_dim
    ):
        yield "has queries of another width"
    elif any(program.constants.get(name) != heads for name in instruction.weights):
        yield "has sinks for another number of heads"


def describe(instruction: Instruction) -> str:
    """Return an instruction as one line of text, for `llmc inspect --program`."""
    reads: list[Any] = [f"b{v.buffer}[{v.offset}:{v.offset + v.width}]" for v in instruction.inputs]
    reads += instruction.weights
    parameters = [
        f"{name}={value:g}" for name, value in {**instruction.integers, **instruction.floats}.items()
    ]
    name = f"{instruction.op}.{instruction.function}" if instruction.function else instruction.op
    target = (
        ""
        if instruction.out is None
        else f"b{instruction.out}{f'[{instruction.offset}:]' if instruction.offset else ''} = "
    )
    return f"{target}{name}({', '.join([*reads, *parameters])})"
