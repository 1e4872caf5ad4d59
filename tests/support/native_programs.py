"""Small programs for the native engine, their weights, and steps for them."""

from __future__ import annotations

from collections.abc import Mapping

import ml_dtypes
import numpy as np

from llmc.compiler.targets.native.pack import pack_floats, pack_fp8, pack_integers
from llmc.runtime.batch import Batch
from llmc.runtime.native.program import (
    INTEGERS,
    Buffer,
    Cache,
    Instruction,
    Matrix,
    Program,
    View,
    check,
)

VOCABULARY, POSITIONS = 50, 128
#: A program, its packed weights, and the same for the interpreter.
Built = tuple[Program, Mapping[str, np.ndarray], Mapping[str, np.ndarray]]


def constant(size: int) -> np.ndarray:
    """Return zeros, with room for whole vectors of 16 numbers, which the engine reads."""
    return np.zeros(-(-size // 16) * 16, np.float32)[:size]


class Builder:
    """A program in the making. Buffer 0 holds the embedded tokens; `finish` gathers the rows of logits.

    table: the rows of the embedding, from the row of token `begin`. Default: random rows for all tokens.
    """

    def __init__(
        self, width: int, seed: int = 0, table: np.ndarray | None = None, begin: int | None = None
    ) -> None:
        self.rng = np.random.default_rng(seed)
        self.buffers: list[Buffer] = []
        self.instructions: list[Instruction] = []
        self.caches: list[Cache] = []
        self.matrices: dict[str, Matrix] = {}
        self.constants: dict[str, int] = {}
        self.packed: dict[str, np.ndarray] = {}
        self.exact: dict[str, np.ndarray] = {}
        rows = VOCABULARY if table is None else len(table)
        name = self.matrix("table", rows, width, "fp32", values=table)
        parameters = {} if begin is None else {"begin": begin}
        self.emit("embed", width, weights=(name,), **parameters)

    def emit(
        self,
        op: str,
        width: int,
        *inputs: View,
        weights: tuple[str, ...] = (),
        function: str = "",
        rows: str = "tokens",
        offset: int = 0,
        out: int | None = None,
        **parameters: float,
    ) -> View:
        """Append an instruction that writes a new buffer, or `out`, and return the view of it."""
        if out is None:
            self.buffers.append(Buffer(width, rows))  # type: ignore[arg-type]
            out = len(self.buffers) - 1
        integers = {name: value for name, value in parameters.items() if isinstance(value, int)}
        floats = {name: value for name, value in parameters.items() if isinstance(value, float)}
        self.instructions.append(Instruction(op, out, offset, inputs, weights, function, integers, floats))
        return View(out, 0, self.buffers[out].width)

    def vector(self, name: str, size: int, values: np.ndarray | None = None) -> str:
        array = self.rng.standard_normal(size) if values is None else values
        self.constants[name] = size
        self.packed[name] = constant(size)
        self.packed[name][:] = array
        self.exact[name] = self.packed[name].astype(np.float64)
        return name

    def matrix(
        self,
        name: str,
        rows: int,
        columns: int,
        element: str,
        block: int = 0,
        scales: str = "",
        values: np.ndarray | None = None,
    ) -> str:
        """A random matrix, or one of float `values`, packed for the engine and exact for the interpreter."""
        one = self.matrices[name] = Matrix(rows, columns, element, block, scales)  # type: ignore[arg-type]
        if element in INTEGERS:
            least, most = {"int8": (-127, 127), "int4": (-7, 7), "fp4": (0, 15)}[element]
            codes = self.rng.integers(least, most + 1, (rows, columns)).astype(np.int8)
            dtype = np.float16 if scales == "fp16" else np.float32
            factors = self.rng.uniform(0.001, 0.01, (rows, columns // block)).astype(dtype)
            self.packed[name] = pack_integers(codes, factors, one)
            if element == "fp4":
                codes = codes.view(ml_dtypes.float4_e2m1fn).astype(np.float64) * 2
            self.exact[name] = codes * np.repeat(factors.astype(np.float64), block, axis=1)
            return name
        data = self.rng.standard_normal((rows, columns)) if values is None else values
        data = data.astype(np.float32)
        if element == "fp8":
            codes = data.astype(ml_dtypes.float8_e4m3fn)
            factors = self.rng.uniform(0.001, 0.01, (rows, 1)).astype(np.float32)
            self.packed[name] = pack_fp8(codes, factors)
            self.exact[name] = codes.astype(np.float64) * factors
            return name
        if element == "bf16":
            bits = data.view(np.uint32) & 0xFFFF0000
            self.packed[name] = pack_floats((bits >> 16).astype(np.uint16))
            self.exact[name] = bits.view(np.float32).astype(np.float64)
        else:
            data = data.astype(np.float16) if element == "fp16" else data
            self.packed[name] = pack_floats(data)
            self.exact[name] = data.astype(np.float64)
        return name

    def finish(self, last: View) -> Built:
        """Return the program, its packed weights, and the same for the interpreter. Its logits are `last`."""
        logits = last
        if self.buffers[last.buffer].rows == "tokens":
            logits = self.emit("gather_rows", last.width, last, rows="logits")
        if last.width != VOCABULARY:
            head = self.matrix("head", VOCABULARY, last.width, "fp32")
            logits = self.emit("linear", VOCABULARY, logits, weights=(head,), rows="logits")
        program = Program(
            1,
            tuple(self.buffers),
            tuple(self.caches),
            self.matrices,
            self.constants,
            tuple(self.instructions),
            logits.buffer,
            VOCABULARY,
            POSITIONS,
        )
        check(program)
        return (
            program,
            {n: a.view(np.uint8) if n in self.matrices else a for n, a in self.packed.items()},
            self.exact,
        )


def steps(seed: int = 1, num_blocks: int = 12) -> list[Batch]:
    """Ragged steps of three sequences: prefill, a mixed step, decoding, a row without logits."""
    rng = np.random.default_rng(seed)
    free = rng.permutation(num_blocks).tolist()
    tables = [[free.pop() for _ in range(4)] for _ in range(3)]
    past = [0, 0, 0]
    batches = []
    for counts in ((40, 0, 7), (1, 33, 2), (1, 1, 1), (0, 1, 50), (1, 1, 1)):
        rows = []
        for s, count in enumerate(counts):
            if count:
                wanted = count != 2
                table = tables[s][: -(-(past[s] + count) // 32)]
                rows.append((rng.integers(0, VOCABULARY, count).tolist(), past[s], table, wanted))
                past[s] += count
        batches.append(Batch.pack(rows))
    return batches
