"""Run a program on this machine: instructions with addresses, quantized inputs, and threads."""

from __future__ import annotations

import ctypes
import mmap
import threading
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from queue import SimpleQueue

import numpy as np

from llmc.plugins.cpu import library
from llmc.plugins.paged_attention.spec import BLOCK_SIZE
from llmc.runtime.batch import STEP_INPUTS, Batch
from llmc.runtime.native.program import BINARY, ROUND, UNARY, Cache, Instruction, Matrix, Program, View

_LINE = 64  # bytes of a cache line
_SETS = 8  # sets of counters: a late thread may still read those of earlier steps
_DIGIT_ROWS = 16  # rows of a tile of digits
_LARGEST_GROUP = 128  # activations that share a scale
_ROWWISE = library.QUANTIZE  # operations up to this number work on one row at a time
_IN_PLACE = ("unary", "binary", "glu", "round", "vector", "scalar", "rms_norm", "layer_norm", "rope")


@dataclass
class _Planned:
    """An instruction before it has addresses."""

    #: The operation, as in program.h.
    op: int
    #: Whether its rows are those of logits, not those of tokens.
    per_logit: bool
    #: The program's instruction.
    source: Instruction
    #: The input in int8 digits, which QUANTIZE writes and LINEAR_INT reads.
    digits: _Digits | None = None


@dataclass(eq=False)
class _Digits:
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
            _round_to_lines(self.digits * self.width)
            + _round_to_lines(4 * groups)
            + _round_to_lines(4 * groups * self.digits)
        )


@dataclass(eq=False)
class _Place:
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

    instructions: list[_Planned] = field(default_factory=list)
    #: The instructions (begin, end) of each group.
    groups: list[tuple[int, int]] = field(default_factory=list)
    #: The number of a program's buffer -> its memory.
    buffers: dict[int, _Place] = field(default_factory=dict)
    #: A buffer without memory of its own -> the buffer whose memory it shares, and its first column there.
    aliases: dict[int, tuple[int, int]] = field(default_factory=dict)
    #: A quantized input -> its memory.
    digits: dict[_Digits, _Place] = field(default_factory=dict)
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
    known: dict[tuple[View, int], _Digits] = {}
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
            result.instructions.append(_Planned(_code(instruction), per_logit, instruction))
            known = {key: value for key, value in known.items() if key[0].buffer != instruction.out}
            continue
        matrix = program.matrices[instruction.weights[0]]
        if matrix.element not in ("int8", "int4"):
            result.instructions.append(_Planned(library.LINEAR_FLOAT, per_logit, instruction))
            continue
        view, group = instruction.inputs[0], group_of(matrix)
        if (view, group) not in known:
            scale = rounded.get(view.buffer, "")
            known[view, group] = _Digits(view.width, group, 1 if scale else digits, scale)
            result.instructions.append(_Planned(library.QUANTIZE, per_logit, instruction, known[view, group]))
        result.instructions.append(_Planned(library.LINEAR_INT, per_logit, instruction, known[view, group]))
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
    because operations write whole vectors.
    """
    last_read = {
        view.buffer: number
        for number, instruction in enumerate(program.instructions)
        for view in instruction.inputs
    }
    last_read[program.logits] = len(program.instructions)
    result: dict[int, tuple[int, int]] = {}
    for number, instruction in enumerate(program.instructions):
        if instruction.op not in _IN_PLACE or instruction.out is None:
            continue
        for view in instruction.inputs:
            root, column = result.get(view.buffer, (view.buffer, 0))
            if last_read[view.buffer] == number and view.width % 16 == 0 and view.offset % 16 == 0:
                result[instruction.out] = (root, column + view.offset)
                break
    return result


def _place(program: Program, result: Plan) -> None:
    """Give every buffer and every quantized input memory that nothing else uses in the same groups."""
    result.aliases = _aliases(program)
    for number, (first, last) in enumerate(result.groups):
        for planned in result.instructions[first:last]:
            if planned.digits is not None:
                place = result.digits.setdefault(
                    planned.digits, _Place(planned.digits.row_bytes, number, number)
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
                width = _round_to_lines(4 * (program.buffers[root].width + 16)) + _LINE
                place = result.buffers.setdefault(root, _Place(width, number, number))
                place.last = number
    result.buffers[result.aliases.get(program.logits, (program.logits, 0))[0]].last = len(result.groups)
    placed: list[_Place] = []
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


class Executor:
    """A program with its weights, its KV cache and the threads that run it.

    weights: the packed matrices and the constants, from `read_weights`.
    max_tokens: the maximum number of tokens in a step.
    num_blocks: the number of blocks of the KV cache, of 32 tokens each.
    threads: the number of threads, the caller's included.
    digits: int8 digits of an activation, see `plan`.
    kv_dtype: the dtype of the KV cache, fp32, or int8 with a scale for each token and head.
    isa: the name of a library of `plugins/cpu`. None: the best one for this CPU.
    """

    def __init__(
        self,
        program: Program,
        weights: Mapping[str, np.ndarray],
        *,
        max_tokens: int,
        num_blocks: int,
        threads: int,
        digits: int = 3,
        kv_dtype: str = "fp32",
        isa: str | None = None,
    ) -> None:
        #: The engine's library.
        self.library = library.load(isa)
        self._program, self._weights = program, weights
        self._plan = plan(program, digits)
        self._max_tokens, self._num_blocks, self._threads = max_tokens, num_blocks, threads
        self._capacity = -(-max_tokens // _DIGIT_ROWS) * _DIGIT_ROWS
        self._arena = _memory(self._plan.row_bytes * self._capacity + (1 << 16))
        self._base = _address(self._arena)
        self._digits, self._int8_cache = digits, kv_dtype == "int8"
        sizes = [size for cache in program.caches for size in _block_bytes(cache, kv_dtype)]
        self._block_bytes = sum(sizes)
        self._cache = _memory(num_blocks * self._block_bytes + _LINE)
        begins = _address(self._cache) + np.cumsum([0, *sizes])
        #: The addresses of each layer's keys and values in block 0.
        self._layers = [
            (int(begins[2 * layer]), int(begins[2 * layer + 1])) for layer in range(len(sizes) // 2)
        ]
        planned = self._plan.instructions
        self._code = (library.Instruction * len(planned))(
            *(self._bind(instruction) for instruction in planned)
        )
        self._groups = (library.Group * len(self._plan.groups))(
            *(library.Group(*pair) for pair in self._plan.groups)
        )
        counters = len(self._plan.groups) * library.COUNTER
        self._next = np.zeros((_SETS, counters), np.int32)
        self._done = np.zeros((_SETS, counters), np.int32)
        self._turn = 0
        self._workers = [_Worker(self.library) for _ in range(threads - 1)]
        self.close = weakref.finalize(self, _end, self._workers)

    def run(self, batch: Batch, times: np.ndarray | None = None) -> np.ndarray:
        """Run a step. Return the logits, float32 [N, vocab], which the next step overwrites.

        times: int64 [groups of the plan], filled with the ticks of the CPU's clock after each group

        Raises ValueError for a batch with too many rows, or with token ids, blocks or positions out of range.
        """
        self._check(batch)
        turn = self._turn = (self._turn + 1) % _SETS
        for worker in self._workers:
            worker.wait_for(_SETS - 1)  # until the slowest has left the step that used these counters
        tokens = len(batch.input_ids)
        counts = np.diff(batch.query_start)
        sequence = np.repeat(np.arange(len(counts), dtype=np.int32), counts)
        blocks = batch.block_begins[sequence] + batch.position_ids // BLOCK_SIZE
        slot = (batch.block_indices[blocks] * BLOCK_SIZE + batch.position_ids % BLOCK_SIZE).astype(np.int32)
        self._next[turn] = self._done[turn] = 0
        arrays = [np.ascontiguousarray(getattr(batch, name)) for name in STEP_INPUTS]
        step = library.Step(
            tokens,
            len(counts),
            len(batch.logits_index),
            self._threads,
            len(self._groups),
            **{name: array.ctypes.data for name, array in zip(STEP_INPUTS, arrays, strict=True)},
            code=ctypes.addressof(self._code),
            groups=ctypes.addressof(self._groups),
            slot=slot.ctypes.data,
            next=self._next[turn].ctypes.data,
            done=self._done[turn].ctypes.data,
            times=None if times is None else times.ctypes.data,
        )
        kept_alive = (
            arrays,
            slot,
            self._code,
            self._groups,
            self._next,
            self._done,
            self._arena,
            self._cache,
            self._weights,
        )
        for worker in self._workers:
            worker.start(step, kept_alive)
        self.library.llmc_run(ctypes.byref(step))
        address, stride = self._find(self._program.logits, 0)
        rows = np.frombuffer(
            self._arena, np.float32, len(batch.logits_index) * stride, address - self._base
        ).reshape(-1, stride)
        return rows[:, : self._program.vocab_size]

    def groups(self) -> list[Group]:
        """Return the groups of instructions that run together, in their order."""
        return [self._describe(*group) for group in self._plan.groups]

    def _describe(self, first: int, last: int) -> Group:
        planned = self._plan.instructions[first:last]
        names = " + ".join(
            "quantize" if item.op == library.QUANTIZE else item.source.function or item.source.op
            for item in planned
        )
        head = planned[0]
        if head.op not in (library.LINEAR_INT, library.LINEAR_FLOAT):
            return Group(names, head.per_logit)
        matrix = self._program.matrices[head.source.weights[0]]
        name = f"linear {matrix.rows} x {matrix.columns} {matrix.element}"
        digits = head.digits.digits if head.digits else 1
        products = matrix.rows * matrix.columns * digits
        return Group(name, head.per_logit, matrix.nbytes, products, head.digits is not None)

    def _check(self, batch: Batch) -> None:
        tokens = len(batch.input_ids)
        if not 0 < tokens <= self._max_tokens or len(batch.logits_index) > self._max_tokens:
            raise ValueError(f"a step of {tokens} tokens; the engine takes 1 to {self._max_tokens}")
        limits = (
            ("token ids", batch.input_ids, self._program.vocab_size),
            ("positions", batch.position_ids, self._program.max_positions or np.iinfo(np.int32).max),
            ("blocks", batch.block_indices, self._num_blocks),
            ("rows of logits", batch.logits_index, tokens),
        )
        for name, values, limit in limits:
            if len(values) and not 0 <= int(values.min()) <= int(values.max()) < limit:
                raise ValueError(f"{name} of the step are outside 0 to {limit - 1}")
        counts = np.diff(batch.query_start)
        lengths = batch.past_lengths + counts
        tables = np.diff(batch.block_begins)
        whole = batch.query_start[0] == 0 and batch.query_start[-1] == tokens and (counts >= 0).all()
        if (
            not whole
            or batch.block_begins[0] != 0
            or batch.block_begins[-1] != len(batch.block_indices)
            or (tables * BLOCK_SIZE < np.where(counts > 0, lengths, 0)).any()
            or (batch.past_lengths < 0).any()
            or not np.array_equal(_positions(batch, counts), batch.position_ids)
        ):
            raise ValueError("the arrays of the step contradict each other")

    def _offset(self, place: _Place) -> int:
        return place.offset * self._capacity

    def _find(self, buffer: int, column: int) -> tuple[int, int]:
        """Return the address of a column of a buffer's first row, and the fp32 numbers between rows."""
        root, offset = self._plan.aliases.get(buffer, (buffer, 0))
        place = self._plan.buffers[root]
        return self._base + self._offset(place) + 4 * (offset + column), place.row_bytes // 4

    def _bind(self, planned: _Planned) -> library.Instruction:
        source, n = planned.source, _numbers(self._program, planned)
        bound = library.Instruction(op=planned.op, per_logit=planned.per_logit)
        bound.n[: len(n)] = n
        if self._int8_cache and planned.op == library.WRITE_KV:
            bound.n[3] = 1
        if self._int8_cache and planned.op == library.ATTENTION:
            bound.n[5] = self._digits
        if source.out is not None and planned.op != library.QUANTIZE:
            bound.out, bound.out_stride = self._find(source.out, source.offset)
        views = () if planned.op == library.LINEAR_INT else source.inputs
        for name, view in zip(("a", "b"), views, strict=False):
            address, stride = self._find(view.buffer, view.offset)
            setattr(bound, name, address)
            setattr(bound, f"{name}_stride", stride)
        if planned.digits is not None:
            place, digits = self._plan.digits[planned.digits], planned.digits
            groups = digits.width // digits.group
            bound.q = self._base + self._offset(place)
            bound.scales = bound.q + _round_to_lines(digits.digits * digits.width) * self._capacity
            bound.sums = bound.scales + _round_to_lines(4 * groups) * self._capacity
            if planned.op == library.QUANTIZE and digits.scale:
                bound.v = self._weights[digits.scale].ctypes.data
        if planned.op != library.QUANTIZE:
            addresses = [self._weights[name].ctypes.data for name in source.weights]
            if planned.op in (library.EMBED, library.LINEAR_INT, library.LINEAR_FLOAT):
                bound.w = addresses[0]
            else:
                for name, address in zip(("v", "v2"), addresses, strict=False):
                    setattr(bound, name, address)
        if planned.op in (library.WRITE_KV, library.ATTENTION):
            bound.keys, bound.values = self._layers[source.integers["layer"]]
            bound.block_stride = self._block_bytes
        for name, value in source.floats.items():
            bound.x[1 if name == "softcap" else 0] = value
        return bound


def _numbers(program: Program, planned: _Planned) -> Sequence[int]:
    """Return the array `n` of an instruction. program.h lists its elements for each operation."""
    source, integers = planned.source, planned.source.integers
    width = source.inputs[0].width if source.inputs else program.buffers[source.out or 0].width
    if planned.op == library.EMBED:
        by_position = source.op == "embed_positions"
        return width, library.KINDS[program.matrices[source.weights[0]].element], by_position
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
        return sizes if planned.op == library.WRITE_KV else (integers["heads"], *sizes, integers["window"])
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


class _Worker:
    """A thread that runs the steps of its queue."""

    def __init__(self, engine: ctypes.CDLL) -> None:
        self._engine = engine
        self._queue: SimpleQueue[tuple[library.Step, object] | None] = SimpleQueue()
        self._finished: SimpleQueue[None] = SimpleQueue()
        self._behind = 0
        threading.Thread(target=self._loop, name="llmc", daemon=True).start()

    def start(self, step: library.Step, reads: object) -> None:
        """Queue a step. reads: keeps the memory of the step alive, which a late thread may still read."""
        self._behind += 1
        self._queue.put((step, reads))

    def wait_for(self, steps: int) -> None:
        """Wait until the thread has left all but the last `steps` steps."""
        while self._behind > steps or not self._finished.empty():
            self._finished.get()
            self._behind -= 1

    def end(self) -> None:
        self._queue.put(None)

    def _loop(self) -> None:
        while (job := self._queue.get()) is not None:
            self._engine.llmc_run(ctypes.byref(job[0]))
            del job  # an executor that nobody uses any more is freed now
            self._finished.put(None)


def _end(workers: Sequence[_Worker]) -> None:
    for worker in workers:
        worker.end()


def _block_bytes(cache: Cache, kv_dtype: str) -> tuple[int, int]:
    """Return the bytes of a block's keys and of its values, which are padded to whole vectors."""
    per_number = cache.num_kv_heads * BLOCK_SIZE
    value_width = -(-cache.v_head_dim // 16) * 16
    if kv_dtype == "int8":
        return per_number * (-(-cache.head_dim // 4) * 4 + 4), per_number * (value_width + 4)
    return per_number * cache.head_dim * 4, per_number * value_width * 4


def _positions(batch: Batch, counts: np.ndarray) -> np.ndarray:
    """Return the position of every token, int [T], computed from its sequence's cached tokens."""
    return np.arange(len(batch.input_ids)) - np.repeat(batch.query_start[:-1] - batch.past_lengths, counts)


def _round_to_lines(nbytes: int) -> int:
    """Round up to whole cache lines."""
    return -(-nbytes // _LINE) * _LINE


def _memory(nbytes: int) -> mmap.mmap:
    """Return zeroed memory, in huge pages where the system has them."""
    memory = mmap.mmap(-1, nbytes)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        memory.madvise(mmap.MADV_HUGEPAGE)
    return memory


def _address(memory: mmap.mmap) -> int:
    return ctypes.addressof(ctypes.c_char.from_buffer(memory))
