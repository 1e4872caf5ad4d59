"""A model as a program: a flat list of instructions over rows of numbers.

`docs/reference/program.md` is the specification. A program is data: it has no addresses, threads or
instruction sets. A buffer has one row per token of a step, or one per wanted row of logits. An instruction
reads views of buffers, which are ranges of columns, and constants of the weights file. It writes a buffer.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from llmc.runtime.bundle.strict_json import decode, no_constants, plain, unique_keys
from llmc.runtime.errors import BundleError

PROGRAM_VERSION = 1
MAX_PROGRAM_BYTES = 64 << 20
TILE = 32  # rows of a packed matrix that lie together
_MAX = 1 << 27

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
ELEMENTS = ("fp32", "fp16", "bf16", "int8", "int4")


def _size(value: int) -> str:
    return "" if 0 < value <= _MAX else f"must be 1 to {_MAX}"


def _index(value: int) -> str:
    return "" if 0 <= value <= _MAX else f"must be 0 to {_MAX}"


Size = Annotated[int, _size]
Index = Annotated[int, _index]


@dataclass(frozen=True)
class Buffer:
    """Rows of fp32 numbers."""

    width: Size
    #: One row for each token of the step, or one for each row of logits.
    rows: Literal["tokens", "logits"]


@dataclass(frozen=True)
class View:
    """Columns offset .. offset + width - 1 of a buffer."""

    buffer: Index
    offset: Index
    width: Size


@dataclass(frozen=True)
class Matrix:
    """A matrix [rows, columns] of the weights file, packed in tiles of 32 rows."""

    rows: Size
    columns: Size
    element: Literal["fp32", "fp16", "bf16", "int8", "int4"]
    #: Columns that share a scale; 0 for floats.
    block: Index = 0
    #: The dtype of the scales; "" for floats.
    scales: Literal["", "fp16", "fp32"] = ""

    @property
    def nbytes(self) -> int:
        """The bytes of the packed matrix."""
        tiles = -(-self.rows // TILE)
        if self.element in ("int8", "int4"):
            scale = TILE * (2 if self.scales == "fp16" else 4)
            codes = self.columns * TILE // (2 if self.element == "int4" else 1)
            return tiles * (self.columns // self.block * scale + codes)
        return tiles * TILE * self.columns * (4 if self.element == "fp32" else 2)


@dataclass(frozen=True)
class Cache:
    """The paged KV cache of one layer: blocks of 32 tokens."""

    num_kv_heads: Size
    head_dim: Size
    v_head_dim: Size


@dataclass(frozen=True)
class Instruction:
    """One step of the program. `OPERATIONS` says which fields each operation has."""

    op: str
    #: The buffer that it writes, or None.
    out: Index | None
    #: The first column that it writes.
    offset: Index
    inputs: tuple[View, ...]
    #: Names in the weights file.
    weights: tuple[str, ...]
    #: "function", where the operation has one; otherwise "".
    function: str
    integers: Mapping[str, int]
    floats: Mapping[str, float]


@dataclass(frozen=True)
class Operation:
    """The fields of an operation's instructions."""

    inputs: int = 1
    weights: tuple[int, int] = (0, 0)
    functions: tuple[str, ...] = ()
    integers: tuple[str, ...] = ()
    floats: tuple[str, ...] = ()
    writes: bool = True


OPERATIONS: Mapping[str, Operation] = {
    # out = table[input_ids]
    "embed": Operation(inputs=0, weights=(1, 1)),
    # out = the rows of the input whose logits are wanted
    "gather_rows": Operation(),
    # columns offset .. of out = the input
    "copy": Operation(),
    "unary": Operation(functions=UNARY),
    # out = f(first input, second input)
    "binary": Operation(inputs=2, functions=BINARY),
    # out = f(input, a vector of the weights)
    "vector": Operation(weights=(1, 1), functions=BINARY),
    # out = f(input, value)
    "scalar": Operation(functions=BINARY, floats=("value",)),
    # out = input / sqrt(mean(input^2) + epsilon) * weight, in `groups` groups of columns
    "rms_norm": Operation(weights=(1, 1), integers=("groups",), floats=("epsilon",)),
    # out = (input - mean) / sqrt(variance + epsilon) * weight (+ bias)
    "layer_norm": Operation(weights=(1, 2), floats=("epsilon",)),
    # rotary embedding of `heads` heads; weights: cosines and sines [positions, rotated / 2]
    "rope": Operation(weights=(2, 2), integers=("heads", "rotated", "interleaved")),
    # keys and values of the step's tokens go to the cache of `layer`
    "write_kv": Operation(inputs=2, integers=("layer",), writes=False),
    # out = input x matrix^T
    "linear": Operation(weights=(1, 1)),
    # out = attention of queries over the cache of `layer`; as llmc.PagedAttention
    "attention": Operation(integers=("heads", "layer", "window"), floats=("scale", "softcap")),
}


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
    #: The buffer of the logits.
    logits: Index
    vocab_size: Size
    #: Positions of the rotary tables; a step has smaller ones. 0: the model has no tables.
    max_positions: Index

    def to_json(self) -> bytes:
        """Return the program as JSON: sorted keys, one line per instruction, ASCII."""
        tree = plain(self)
        instructions = tree.pop("instructions")
        head = json.dumps(tree, sort_keys=True, indent=1, allow_nan=False)
        lines = ",\n  ".join(json.dumps(one, sort_keys=True, allow_nan=False) for one in instructions)
        return f'{head[:-2]},\n "instructions": [\n  {lines}\n ]\n}}\n'.encode("ascii")

    @staticmethod
    def from_json(data: bytes) -> Program:
        """Read and check a program. Raises BundleError, naming the field or the instruction."""
        if len(data) > MAX_PROGRAM_BYTES:
            raise BundleError(f"the program is larger than {MAX_PROGRAM_BYTES} bytes")
        try:
            tree = json.loads(
                data.decode("ascii"), object_pairs_hook=unique_keys, parse_constant=no_constants
            )
        except (ValueError, RecursionError) as error:
            raise BundleError(f"the program is not JSON: {ascii(str(error))[1:-1]}") from error
        program: Program = decode(Program, tree, "program")
        check(program)
        return program


def check(program: Program) -> None:
    """Raise BundleError for a program that reads or writes outside its buffers, constants or caches.

    An executor relies on this: after it, every row of every instruction stays inside its arrays.
    """
    written: set[int] = set()
    for number, one in enumerate(program.instructions):
        for complaint in _complaints(program, one, written):
            raise BundleError(f"instruction {number} ({one.op}) of the program {complaint}")
        if one.out is not None:
            written.add(one.out)
    if program.logits not in written or program.buffers[program.logits].rows != "logits":
        raise BundleError("the program writes no logits")
    if program.buffers[program.logits].width != program.vocab_size:
        raise BundleError("the program's logits are not as wide as its vocabulary")


def _complaints(program: Program, one: Instruction, written: set[int]) -> Iterator[str]:
    operation = OPERATIONS.get(one.op)
    if operation is None:
        yield "is not an operation of this llmc"
        return
    if len(one.inputs) != operation.inputs:
        yield f"has {len(one.inputs)} inputs"
    if not operation.weights[0] <= len(one.weights) <= operation.weights[1]:
        yield f"has {len(one.weights)} weights"
    if set(one.integers) != set(operation.integers) or set(one.floats) != set(operation.floats):
        yield "has other parameters than its operation"
    if one.function not in (operation.functions or ("",)):
        yield f"has no function {one.function!r}"
    if (one.out is not None) != operation.writes:
        yield "must write a buffer" if operation.writes else "writes no buffer"
    for view in one.inputs:
        if view.buffer >= len(program.buffers) or view.buffer not in written:
            yield "reads a buffer that nothing has written"
        elif view.offset + view.width > program.buffers[view.buffer].width:
            yield "reads past the columns of its buffer"
        elif view.buffer == one.out:
            yield "writes the buffer that it reads"
    for name in one.weights:
        if name not in program.matrices and name not in program.constants:
            yield f"reads {name!r}, which the weights lack"
    if one.out is not None and one.out >= len(program.buffers):
        yield "writes a buffer that does not exist"
    yield from _shape_complaints(program, one)


_SAME_WIDTH = ("gather_rows", "unary", "binary", "vector", "scalar", "rms_norm", "layer_norm", "rope")


def _shape_complaints(program: Program, one: Instruction) -> Iterator[str]:
    """Sizes, for an instruction whose references exist."""
    out = program.buffers[one.out] if one.out is not None else None
    first = one.inputs[0] if one.inputs else None
    rows = {program.buffers[view.buffer].rows for view in one.inputs}
    if one.op == "gather_rows":
        if rows != {"tokens"} or out is None or out.rows != "logits":
            yield "must go from tokens to rows of logits"
    elif out is not None and rows - {out.rows}:
        yield "mixes rows of tokens and of logits"
    if one.op in ("embed", "rope", "write_kv", "attention") and (rows | ({out.rows} if out else set())) != {
        "tokens"
    }:
        yield "works on tokens only"
    if one.offset and one.op != "copy":
        yield "cannot write at an offset"
    width = out.width if out else 0
    if one.op == "copy":
        assert first is not None
        if one.offset + first.width > width:
            yield "writes past the columns of its buffer"
    elif one.op in _SAME_WIDTH and any(view.width != width for view in one.inputs):
        yield "has inputs of another width than its output"
    yield from _operand_complaints(program, one, width)


def _operand_complaints(program: Program, one: Instruction, width: int) -> Iterator[str]:
    integers, first = one.integers, one.inputs[0] if one.inputs else None
    if one.op in ("vector", "layer_norm") and any(
        program.constants.get(name) != width for name in one.weights
    ):
        yield "has a constant of another width"
    if one.op == "rms_norm":
        groups = integers["groups"]
        if groups < 1 or width % groups or program.constants.get(one.weights[0]) != width // groups:
            yield "has groups that do not fit its weight"
    if one.op == "rope":
        heads, rotated = integers["heads"], integers["rotated"]
        if heads < 1 or width % heads or rotated < 2 or rotated % 2 or rotated > width // heads:
            yield "has heads that do not fit"
        elif any(program.constants.get(name) != program.max_positions * rotated // 2 for name in one.weights):
            yield "has tables of another size"
    if one.op == "embed":
        matrix = program.matrices.get(one.weights[0])
        if matrix is None or matrix.columns != width or matrix.rows != program.vocab_size:
            yield "has a table of another shape"
        elif matrix.element in ("int8", "int4"):
            yield "has a table of integers"
    if one.op == "linear":
        matrix = program.matrices.get(one.weights[0])
        if matrix is None or first is None or matrix.columns != first.width or matrix.rows != width:
            yield "has a matrix of another shape"
        elif matrix.element in ("int8", "int4"):
            if not matrix.scales or matrix.block < 16 or matrix.columns % matrix.block or matrix.block % 16:
                yield "has a matrix with blocks that do not fit"
        elif matrix.block or matrix.scales:
            yield "has a matrix of floats with scales"
    if one.op in ("write_kv", "attention"):
        yield from _cache_complaints(program, one, width)


def _cache_complaints(program: Program, one: Instruction, width: int) -> Iterator[str]:
    layer = one.integers["layer"]
    if not 0 <= layer < len(program.caches):
        yield "has no such cache"
        return
    cache = program.caches[layer]
    if cache.head_dim % 2 or cache.head_dim > 576 or cache.v_head_dim > 512:
        yield "has heads of an odd size, or of more than 576 keys or 512 values"
    if one.op == "write_kv":
        sizes = (cache.num_kv_heads * cache.head_dim, cache.num_kv_heads * cache.v_head_dim)
        if tuple(view.width for view in one.inputs) != sizes:
            yield "has keys or values of another width"
        return
    heads = one.integers["heads"]
    if heads < 1 or heads % cache.num_kv_heads or heads // cache.num_kv_heads > 32:
        yield "has heads that the cache's heads do not divide, or more than 32 for one"
    elif one.inputs[0].width != heads * cache.head_dim or width != heads * cache.v_head_dim:
        yield "has queries of another width"
    if one.integers["window"] < 0:
        yield "has a negative window"


def describe(one: Instruction) -> str:
    """Return an instruction as one line of text, for `llmc inspect --program`."""
    reads: list[Any] = [f"b{v.buffer}[{v.offset}:{v.offset + v.width}]" for v in one.inputs]
    reads += one.weights
    parameters = [f"{name}={value:g}" for name, value in {**one.integers, **one.floats}.items()]
    name = f"{one.op}.{one.function}" if one.function else one.op
    target = "" if one.out is None else f"b{one.out}{f'[{one.offset}:]' if one.offset else ''} = "
    return f"{target}{name}({', '.join([*reads, *parameters])})"
