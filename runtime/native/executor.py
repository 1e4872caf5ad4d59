"""Run a program on this machine: instructions with addresses, and threads."""

from __future__ import annotations

import ctypes
import mmap
import threading
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from queue import SimpleQueue

import numpy as np

from llmc.plugins.cpu import library
from llmc.plugins.paged_attention.spec import BLOCK_SIZE
from llmc.runtime.batch import STEP_INPUTS, Batch
from llmc.runtime.memory import allocate
from llmc.runtime.native.plan import (
    COLLECTIVES,
    LINE,
    LINEAR,
    TRANSFER,
    Group,
    Place,
    Plan,
    Planned,
    numbers,
    plan,
    round_to_lines,
)
from llmc.runtime.native.program import TRANSFERS, Cache, Program, View
from llmc.runtime.parallel import candidates
from llmc.runtime.parallel.communicator import Communicator
from llmc.runtime.parallel.processes import ProcessCommunicator

_SETS = 8  # sets of counters: a late thread may still read those of earlier steps
_DIGIT_ROWS = 16  # rows of a tile of digits
_PART_BYTES = 8 << 20  # for the results of parts of a context; longer contexts are not split


class Executor:
    """A program with its weights, its KV cache and the threads that run it.

    weights: the packed matrices and the constants, from `read_weights`. Constants are read in whole vectors,
        up to a multiple of 64 bytes.
    max_tokens: the maximum number of tokens in a step.
    num_blocks: the number of blocks of the KV cache, of 32 tokens each.
    threads: the number of threads, the caller's included.
    digits: int8 digits of an activation, see `plan`.
    kv_dtype: the dtype of the KV cache, fp32, fp16, or int8 with a scale for each token and head.
    isa: the name of a library of `plugins/cpu`. None: the best one for this CPU.
    communicator: combines values of the ranks, if the program is that of one of several.
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
        communicator: Communicator | None = None,
    ) -> None:
        size = communicator.size if communicator else 1
        if size != program.ranks:
            raise ValueError(f"the program is one of {program.ranks} ranks, and {size} run")
        if communicator is None and any(each.op in TRANSFERS for each in program.instructions):
            raise ValueError("the program is that of a pipeline stage, and it runs alone")
        if kv_dtype == "int8" and any(not cache.v_head_dim for cache in program.caches):
            raise ValueError("latent keys have no cache of int8")
        self._communicator = communicator
        #: The engine itself runs the collectives of ranks that share memory.
        self._shared = communicator if size > 1 and isinstance(communicator, ProcessCommunicator) else None
        #: The engine's library.
        self.library = library.load(isa)
        self._plan = plan(program, digits)
        self._program, self._weights = self._plan.program, weights
        self._max_tokens, self._num_blocks, self._threads = max_tokens, num_blocks, threads
        self._capacity = -(-max_tokens // _DIGIT_ROWS) * _DIGIT_ROWS
        self._arena = allocate(self._plan.row_bytes * self._capacity + (1 << 16))
        self._base = _address(self._arena)
        self._digits, self._kv_dtype = digits, kv_dtype
        sizes = [size for cache in program.caches for size in _block_bytes(cache, kv_dtype)]
        self._block_bytes = sum(sizes)
        self._cache = allocate(num_blocks * self._block_bytes + LINE)
        begins = _address(self._cache) + np.cumsum([0, *sizes])
        #: The addresses of each layer's keys and values in block 0. Latent keys are at both.
        self._layers = [
            (int(begins[2 * layer + (0 if cache.v_head_dim else 1)]), int(begins[2 * layer + 1]))
            for layer, cache in enumerate(program.caches)
        ]
        self._parts = allocate(_PART_BYTES)
        self._merged = np.zeros(threads * library.COUNTER, np.int32)
        planned = self._plan.instructions
        self._code = (library.Instruction * len(planned))(
            *(self._bind(instruction) for instruction in planned)
        )
        self._groups = (library.Group * len(self._plan.groups))(
            *(library.Group(*pair) for pair in self._plan.groups)
        )
        pauses = (TRANSFER,) if self._shared is not None else (*COLLECTIVES, TRANSFER)
        begin = _begin_of_tail(self._plan, program)
        spans = _segments(self._plan, pauses, begin)
        segments = [(*span, self._exchanges(span[0], pauses)) for span in spans]
        self._segments = [segment for segment in segments if segment[0] < begin]
        #: What brings whole rows of logits to rank 0, or their candidates.
        self._tail = segments[len(self._segments) :]
        #: Fills the logits in a rank that another one computes them for.
        self._received = self._pop_received()
        self._candidates: np.ndarray | None = None
        counters = len(self._plan.groups) * library.COUNTER
        self._next = np.zeros((_SETS, counters), np.int32)
        self._done = np.zeros((_SETS, counters), np.int32)
        if communicator is not None:
            communicator.watch(self._done)
        self._turn = 0
        self._workers = [_Worker(self.library) for _ in range(threads - 1)]
        self.close = weakref.finalize(self, _end, self._workers)

    def run(self, batch: Batch, times: np.ndarray | None = None) -> np.ndarray:
        """Run a step. Return the logits, float32 [N, vocab], which the next step overwrites.

        Returns no rows in a rank without logits.

        times: int64 [groups of the plan], filled with the ticks of the CPU's clock after each group

        Raises ValueError for a batch with too many rows, or with token ids, blocks or positions out of range.
        """
        self.begin(batch, times)
        return self.finish(0, len(batch.logits_index))

    @property
    def max_exchanged(self) -> int:
        """The largest k of `begin` in rank 0; 0 if the ranks exchange no logits."""
        if not self._tail and self._received is None:
            return 0
        return candidates.most_of(self._program.vocab_size // self._program.ranks)

    def begin(self, batch: Batch, times: np.ndarray | None = None, k: int = 0) -> None:
        """Run a step, but do not wait for logits that another rank computes. See `run`.

        k: exchange the k largest logits of each row; 0: whole rows. All ranks get the same number, up to
            the `max_exchanged` of rank 0.
        """
        arrays = self._arrays(batch)
        tokens = len(batch.input_ids)
        slot = np.empty(tokens, np.int32)
        step = library.Step(
            tokens,
            len(batch.past_lengths),
            len(batch.logits_index),
            self._threads,
            len(self._groups),
            **{name: array.ctypes.data for name, array in zip(STEP_INPUTS, arrays, strict=True)},
            code=ctypes.addressof(self._code),
            groups=ctypes.addressof(self._groups),
            slot=slot.ctypes.data,
            merged=self._merged.ctypes.data,
            parts=_address(self._parts),
            part_floats=_PART_BYTES // 4,
            times=None if times is None else times.ctypes.data,
        )
        self._check(step, len(batch.block_indices))
        turn = self._turn = (self._turn + 1) % _SETS
        for worker in self._workers:
            worker.wait_for(_SETS - 1)  # until the slowest has left the step that used these counters
        self._next[turn] = self._done[turn] = 0
        step.next, step.done = self._next[turn].ctypes.data, self._done[turn].ctypes.data
        kept_alive = (
            arrays,
            slot,
            self._code,
            self._groups,
            self._next,
            self._done,
            self._arena,
            self._cache,
            self._parts,
            self._merged,
            self._weights,
            self._shared and (self._shared.exchange, self._shared.memory),
        )

        def run(segments: Sequence[_Segment]) -> None:
            for first, last, exchange in segments:
                if exchange is not None:
                    rows = len(batch.logits_index) if exchange.per_logit else tokens
                    if isinstance(exchange, _Exchange):
                        self._combine(exchange, rows)
                    else:
                        self._move(exchange, 0, rows)
                    if times is not None:
                        times[first] = self.library.llmc_ticks()
                    continue
                part = self._part(step, first, last, times)
                self._start(part, kept_alive)

        run(self._segments)
        if self._tail and not (k and self._exchange_candidates(len(batch.logits_index), k)):
            run(self._tail)

    def finish_sampled(self, rows: int, k: int) -> list[tuple[np.ndarray | None, np.ndarray]]:
        """Return the token ids and logits of each row of a step that `begin` has run with `k`.

        Token ids None: the logits of the whole vocabulary. See `SamplingBackend`.
        """
        found = self._candidates
        if self._received is not None:
            found = np.empty((rows, candidates.width(k)), np.float32)
            self._move(replace(self._received, array=found), 0, rows)
            if not candidates.complete(found):
                self._move(self._received, 0, rows)
        assert found is not None
        assert self._program.logits is not None
        if candidates.complete(found):
            return candidates.rows_of(found)
        whole = self._rows(View(self._program.logits, 0, self._program.vocab_size), rows)
        return [(None, row) for row in whole.copy()]

    def finish(self, first: int, rows: int) -> np.ndarray:
        """Return the logits of steps that `begin` has run. See `StageBackend.finish`."""
        if self._program.logits is None:
            return np.empty((0, self._program.vocab_size), np.float32)
        if self._received is not None:
            self._move(self._received, first, rows)
        return self._rows(View(self._program.logits, 0, self._program.vocab_size), first + rows)

    def _exchange_candidates(self, rows: int, k: int) -> bool:
        """Give the k largest logits of each row to rank 0. Return False if it needs whole rows."""
        assert self._communicator is not None
        last = self._plan.instructions[-1].source
        head = self._plan.instructions[self._plan.groups[self._tail[0][0]][0]].source
        gathers, (view,) = head.op == "all_gather", head.inputs
        first = self._communicator.rank * view.width if gathers else 0
        found = candidates.select(self._rows(view, rows), k, first)
        if gathers:
            parts = np.empty((rows, self._communicator.size * candidates.width(k)), np.float32)
            self._communicator.all_gather(found, parts)
            found = candidates.merge(parts, k)
        if last.op == "send":
            self._communicator.send(found, last.integers["peer"], last.integers["sequence"])
        self._candidates = found
        return candidates.complete(found)

    def _start(self, part: library.Step, reads: object) -> None:
        """Run the groups of a step on all threads. reads: see `_Worker.start`"""
        if self._shared is None:
            for worker in self._workers:
                worker.start(part, reads)
            self.library.llmc_run(ctypes.byref(part))
            return
        with self._shared.begin(part):
            for worker in self._workers:
                worker.start(part, reads)
            self._shared.run(self.library, part)

    def _part(self, step: library.Step, first: int, last: int, times: np.ndarray | None) -> library.Step:
        """Return the step of the groups first .. last - 1."""
        part = library.Step.from_buffer_copy(step)
        counter = 4 * library.COUNTER * first
        part.num_groups = last - first
        part.groups += first * ctypes.sizeof(library.Group)
        part.next += counter
        part.done += counter
        if times is not None:
            part.times = times[first:].ctypes.data
        return part

    def _exchanges(self, group: int, pauses: Sequence[int]) -> _Exchange | _Transfer | None:
        """Return the collective or transfer that is the group `group`; None if it is none of `pauses`."""
        planned = self._plan.instructions[self._plan.groups[group][0]]
        if planned.op not in pauses:
            return None
        if planned.op == TRANSFER:
            return self._transfer(planned)
        source = planned.source
        assert source.out is not None
        out = View(source.out, 0, self._program.buffers[source.out].width)
        part, whole = self._rows(source.inputs[0], self._capacity), self._rows(out, self._capacity)
        if part.ctypes.data == whole.ctypes.data:
            whole = part
        return _Exchange(source.op == "all_gather", planned.per_logit, part, whole)

    def _pop_received(self) -> _Transfer | None:
        """Remove the last segment and return it, if it receives the logits."""
        last = self._plan.instructions[-1].source
        if last.op != "receive" or last.out != self._program.logits:
            return None
        *_, received = self._segments.pop()
        assert isinstance(received, _Transfer)
        return received

    def _transfer(self, planned: Planned) -> _Transfer:
        source, sends = planned.source, planned.source.op == "send"
        out = source.out or 0
        view = source.inputs[0] if sends else View(out, 0, self._program.buffers[out].width)
        rows = self._rows(view, self._capacity)
        return _Transfer(sends, planned.per_logit, source.integers["peer"], source.integers["sequence"], rows)

    def _move(self, transfer: _Transfer, first: int, rows: int) -> None:
        """Send or receive the rows first .. first + rows - 1. Without rows, the receiver still waits."""
        assert self._communicator is not None
        move = self._communicator.send if transfer.sends else self._communicator.receive
        move(transfer.array[first : first + rows], transfer.peer, transfer.sequence)

    def _combine(self, exchange: _Exchange, rows: int) -> None:
        """Run a collective on the first `rows` rows."""
        if not rows:
            return
        assert self._communicator is not None
        part, whole = exchange.part[:rows], exchange.whole[:rows]
        if exchange.gathers:
            self._communicator.all_gather(part, whole)
            return
        if exchange.part is not exchange.whole:
            np.copyto(whole, part)
        self._communicator.all_reduce(whole)

    def _rows(self, view: View, rows: int) -> np.ndarray:
        """Return the first rows of a view, float32 [rows, width], which the instructions write."""
        address, stride = self._find(view.buffer, view.offset)
        shape, strides = (rows, view.width), (4 * stride, 4)
        return np.ndarray(shape, np.float32, self._arena, address - self._base, strides)

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
        if head.op not in LINEAR:
            return Group(names, head.per_logit)
        matrix = self._program.matrices[head.source.weights[0]]
        if experts := head.source.integers.get("experts"):  # which ones, only a step knows
            shape = f"{matrix.rows // experts} x {matrix.columns} {matrix.element}"
            return Group(f"linear of {experts} experts {shape}", head.per_logit)
        heads = head.source.integers.get("heads", 1)
        of_heads = f" of {heads} heads" if heads > 1 else ""
        name = f"linear{of_heads} {matrix.rows // heads} x {matrix.columns} {matrix.element}"
        digits = head.digits.digits if head.digits else 1
        products = matrix.rows * matrix.columns * digits
        return Group(name, head.per_logit, matrix.nbytes, products, head.digits is not None)

    def _arrays(self, batch: Batch) -> list[np.ndarray]:
        """Return the arrays of a step in memory without gaps, after a check of their lengths."""
        arrays = []
        for name in STEP_INPUTS:
            array = getattr(batch, name)
            if array.ndim != 1 or array.dtype != np.int32:
                raise ValueError(f"{name} of the step is not a vector of int32")
            arrays.append(np.ascontiguousarray(array))
        tokens, sequences = len(batch.input_ids), len(batch.past_lengths)
        if not 0 < tokens <= self._max_tokens or len(batch.logits_index) > self._max_tokens:
            raise ValueError(f"a step of {tokens} tokens; the engine takes 1 to {self._max_tokens}")
        starts = len(batch.query_start), len(batch.block_begins)
        if len(batch.position_ids) != tokens or starts != (sequences + 1, sequences + 1):
            raise ValueError("the arrays of the step contradict each other")
        return arrays

    def _check(self, step: library.Step, tables: int) -> None:
        """Check the numbers of a step, and fill its slots. tables: the length of `block_indices`"""
        limits = {
            library.TOKEN_IDS: ("token ids", self._program.vocab_size),
            library.POSITIONS: ("positions", self._program.max_positions or np.iinfo(np.int32).max),
            library.BLOCKS: ("blocks", self._num_blocks),
            library.LOGIT_ROWS: ("rows of logits", step.tokens),
        }
        most = [limits[fault][1] for fault in (library.TOKEN_IDS, library.POSITIONS, library.BLOCKS)]
        fault = self.library.llmc_check(ctypes.byref(step), *most, tables)
        if fault in limits:
            name, limit = limits[fault]
            raise ValueError(f"{name} of the step are outside 0 to {limit - 1}")
        if fault:
            raise ValueError("the arrays of the step contradict each other")

    def _offset(self, place: Place) -> int:
        return place.offset * self._capacity

    def _find(self, buffer: int, column: int) -> tuple[int, int]:
        """Return the address of a column of a buffer's first row, and the fp32 numbers between rows."""
        root, offset = self._plan.aliases.get(buffer, (buffer, 0))
        place = self._plan.buffers[root]
        stride = self._plan.strides.get(buffer, place.row_bytes // 4)
        return self._base + self._offset(place) + 4 * (offset + column), stride

    def _bind(self, planned: Planned) -> library.Instruction:
        source, n = planned.source, numbers(self._program, planned)
        bound = library.Instruction(op=planned.op, per_logit=planned.per_logit, choices=planned.choices)
        bound.n[: len(n)] = n
        if planned.op == library.WRITE_KV:
            bound.n[3] = library.CACHES[self._kv_dtype]
        if planned.op == library.ATTENTION:
            bound.n[5:7] = self._digits, library.CACHES[self._kv_dtype]
        if planned.op == library.SORT_ROWS:
            bound.order, _ = self._find(source.out or 0, 0)
        elif "experts" in source.integers and source.op not in ("glu", "clamped_swiglu"):
            bound.order, _ = self._find(source.inputs[-1].buffer, 0)
        if source.out is not None and planned.op != library.QUANTIZE:
            bound.out, bound.out_stride = self._find(source.out, source.offset)
        views = () if planned.op in (library.LINEAR_INT, library.EXPERTS_INT) else source.inputs[:2]
        if source.op == "write_keys":
            views *= 2  # as keys of no numbers, and as values
        for name, view in zip(("a", "b"), views, strict=False):
            address, stride = self._find(view.buffer, view.offset)
            setattr(bound, name, address)
            setattr(bound, f"{name}_stride", stride)
        if planned.digits is not None:
            place, digits = self._plan.digits[planned.digits], planned.digits
            groups = digits.width // digits.group
            bound.q = self._base + self._offset(place)
            rows = self._capacity * digits.choices
            bound.scales = bound.q + round_to_lines(digits.digits * digits.width) * rows
            bound.sums = bound.scales + round_to_lines(4 * groups) * rows
            if planned.op == library.QUANTIZE and digits.scale:
                bound.v = self._weights[digits.scale].ctypes.data
        if planned.op != library.QUANTIZE:
            addresses = [self._weights[name].ctypes.data for name in source.weights]
            if planned.op == library.EMBED or planned.op in LINEAR:
                bound.w = addresses[0]
            else:
                for name, address in zip(("v", "v2"), addresses, strict=False):
                    setattr(bound, name, address)
        if planned.op in (library.WRITE_KV, library.ATTENTION):
            bound.keys, bound.values = self._layers[source.integers["layer"]]
            bound.block_stride = self._block_bytes
        for name, value in source.floats.items():
            bound.x[1 if name in ("softcap", "alpha") else 0] = value
        return bound


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


@dataclass(frozen=True)
class _Exchange:
    """A collective with the rows that it reads and writes, as many as a step may have."""

    #: Whether it gathers columns. Otherwise it adds.
    gathers: bool
    per_logit: bool
    #: Float32 [rows, width]. A sum may be written to the rows that it reads.
    part: np.ndarray
    whole: np.ndarray


@dataclass(frozen=True)
class _Transfer:
    """A transfer to or from another rank."""

    sends: bool
    per_logit: bool
    peer: int
    sequence: int
    #: What is sent, or filled: float32 [rows, width], as many rows as a step may have.
    array: np.ndarray


_Segment = tuple[int, int, _Exchange | _Transfer | None]


def _segments(planned: Plan, pauses: Sequence[int], tail: int) -> list[tuple[int, int]]:
    """Return the groups (first, last) that run in one go: an operation of `pauses`, or all between two.

    tail: a group that begins a segment
    """
    segments: list[tuple[int, int]] = []
    first = 0
    for number, (begin, _) in enumerate(planned.groups):
        pause = planned.instructions[begin].op in pauses
        if pause or number == tail:
            segments += [(first, number)] if number > first else []
            segments += [(number, number + 1)] if pause else []
            first = number + pause
    return segments + ([(first, len(planned.groups))] if first < len(planned.groups) else [])


def _begin_of_tail(planned: Plan, program: Program) -> int:
    """Return the first of the last groups that gather whole rows of logits and send them to rank 0."""
    begin = len(planned.groups)
    for op in ("send", "all_gather"):
        if not begin:
            break
        first, _ = planned.groups[begin - 1]
        instruction = planned.instructions[first].source
        width = instruction.inputs[0].width if instruction.inputs else 0
        if op == "all_gather":
            width *= program.ranks
        if (instruction.op, width) == (op, program.vocab_size) and planned.instructions[first].per_logit:
            begin -= 1
    return begin


def _block_bytes(cache: Cache, kv_dtype: str) -> tuple[int, int]:
    """Return the bytes of a block's keys and of its values, which are padded to whole vectors.

    Latent keys are stored as values are.
    """
    per_number = cache.num_kv_heads * BLOCK_SIZE
    if not cache.v_head_dim:
        return 0, per_number * cache.head_dim * (2 if kv_dtype == "fp16" else 4)
    value_width = -(-cache.v_head_dim // 16) * 16
    if kv_dtype == "int8":
        return per_number * (-(-cache.head_dim // 4) * 4 + 4), per_number * (value_width + 4)
    size = 2 if kv_dtype == "fp16" else 4
    return per_number * cache.head_dim * size, per_number * value_width * size


def _address(memory: mmap.mmap) -> int:
    return ctypes.addressof(ctypes.c_char.from_buffer(memory))
