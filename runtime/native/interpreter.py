"""A reference interpreter of programs: numpy in fp64, one instruction at a time."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from llmc.plugins.experts.reference import clamped_swiglu, experts, of_halves, top_k
from llmc.plugins.grouped_top_k.reference import grouped_top_k
from llmc.plugins.head_linear.reference import head_linear
from llmc.plugins.paged_attention.reference import paged_attention
from llmc.plugins.paged_attention.spec import BLOCK_SIZE
from llmc.runtime.batch import Batch
from llmc.runtime.native.program import CLAMPED_SWIGLU, Instruction, Program, View

_erf = np.vectorize(math.erf, otypes=[np.float64])
_UNARY: Mapping[str, Callable[[np.ndarray], np.ndarray]] = {
    "sigmoid": lambda x: 1 / (1 + np.exp(-x)),
    "silu": lambda x: x / (1 + np.exp(-x)),
    "gelu": lambda x: x / 2 * (1 + _erf(x / math.sqrt(2))),
    "gelu_tanh": lambda x: x / 2 * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))),
    "tanh": np.tanh,
    "relu": lambda x: np.maximum(x, 0),
    "exp": np.exp,
    "erf": _erf,
    "neg": np.negative,
    "abs": np.abs,
    "sqrt": np.sqrt,
    "reciprocal": np.reciprocal,
    "square": np.square,
}
_BINARY: Mapping[str, Callable[[np.ndarray, np.ndarray], np.ndarray]] = {
    "add": np.add,
    "sub": np.subtract,
    "mul": np.multiply,
    "div": np.divide,
    "min": np.minimum,
    "max": np.maximum,
}


def gated(function: str, **parameters: float) -> Callable[[np.ndarray], np.ndarray]:
    """Return what the experts of an instruction make of their gates and ups [2 * I]: [I]."""
    return clamped_swiglu(**parameters) if function == CLAMPED_SWIGLU else of_halves(_UNARY[function])


class Interpreter:
    """A program with its weights and KV cache.

    weights: the constants, and the matrices as fp64 [rows, columns]. num_blocks: blocks of the cache.
    kv_dtype: fp64; fp16: keys and values are rounded to it, and larger numbers become its largest one;
        int8: they are rounded with a scale for each token and head.
    exchange: takes this rank's array and returns those of all ranks, in their order; for the program of one
        of several ranks.
    transfer: takes a rank and the array for it; or None, and returns the array that this rank sends.
    """

    def __init__(
        self,
        program: Program,
        weights: Mapping[str, np.ndarray],
        num_blocks: int,
        kv_dtype: str = "fp64",
        exchange: Callable[[np.ndarray], Sequence[np.ndarray]] = lambda array: [array],
        transfer: Callable[[int, np.ndarray | None], np.ndarray] | None = None,
    ) -> None:
        self._program, self._weights, self._kv_dtype = program, weights, kv_dtype
        self._exchange, self._transfer = exchange, transfer
        self._caches = [
            (
                np.zeros((num_blocks, cache.num_kv_heads, BLOCK_SIZE, cache.head_dim)),
                np.zeros((num_blocks, cache.num_kv_heads, BLOCK_SIZE, cache.v_head_dim))
                if cache.v_head_dim
                else None,
            )
            for cache in program.caches
        ]

    def forward(self, batch: Batch) -> np.ndarray:
        """Run a step. Return the logits, float64 [N, vocab]; no rows in a rank without logits."""
        buffers: dict[int, np.ndarray] = {}
        pending: dict[int, tuple[np.ndarray, np.ndarray | None]] = {}
        for instruction in self._program.instructions:
            inputs = [_columns(buffers, view) for view in instruction.inputs]
            if instruction.op in ("write_kv", "write_keys"):  # the reference of attention writes them itself
                heads = self._program.caches[instruction.integers["layer"]].num_kv_heads
                if self._kv_dtype == "int8":
                    inputs = [_rounded(x, heads) for x in inputs]
                if self._kv_dtype == "fp16":
                    inputs = [_to_fp16(x) for x in inputs]
                values = inputs[1] if len(inputs) > 1 else None
                pending[instruction.integers["layer"]] = (inputs[0], values)
                continue
            if instruction.op == "send":
                assert self._transfer is not None
                self._transfer(instruction.integers["peer"], inputs[0])
                continue
            if instruction.op == "receive":
                assert self._transfer is not None
                result = self._transfer(instruction.integers["peer"], None)
            elif instruction.op == "attention":
                result = self._attention(
                    instruction, inputs[0], pending[instruction.integers["layer"]], batch
                )
            else:
                result = self._compute(instruction, inputs, batch)
            assert instruction.out is not None
            buffer = buffers.setdefault(
                instruction.out, np.zeros((len(result), self._program.buffers[instruction.out].width))
            )
            buffer[:, instruction.offset : instruction.offset + result.shape[1]] = result
        if self._program.logits is None:
            return np.empty((0, self._program.vocab_size))
        return buffers[self._program.logits]

    def _compute(self, instruction: Instruction, inputs: list[np.ndarray], batch: Batch) -> np.ndarray:
        weights = [self._weights[name] for name in instruction.weights]
        if instruction.op == "embed":
            rows = batch.input_ids - instruction.integers.get("begin", 0)
            found = (rows >= 0) & (rows < len(weights[0]))
            return np.where(found[:, None], weights[0][np.where(found, rows, 0)], 0.0)
        if instruction.op == "embed_positions":
            return weights[0][batch.position_ids]
        x = inputs[0]
        if instruction.op == "slice":
            assert instruction.out is not None
            number, begin = instruction.integers["groups"], instruction.integers["begin"]
            width = self._program.buffers[instruction.out].width // number
            return x.reshape(len(x), number, -1)[..., begin : begin + width].reshape(len(x), -1)
        if instruction.op == "gather_rows":
            return x[batch.logits_index]
        if instruction.op == "copy":
            return x
        if instruction.op == "join":
            number = instruction.integers["groups"]
            parts = [each.reshape(len(each), number, each.shape[1] // number) for each in inputs]
            joined = np.concatenate(parts, axis=2)
            return joined.reshape(len(x), number * joined.shape[2])
        if instruction.op == "all_reduce":
            return np.sum(np.stack(self._exchange(x)), axis=0)
        if instruction.op == "all_gather":
            return np.concatenate(self._exchange(x), axis=1)
        if instruction.op == "unary":
            return _UNARY[instruction.function](x)
        if instruction.op == "binary":
            return _BINARY[instruction.function](x, inputs[1])
        if instruction.op == "glu":
            return _UNARY[instruction.function](x) * inputs[1]
        if instruction.op == "round":
            return _ROUND[instruction.function](x.astype(np.float32), np.float32(weights[0].reshape(())))
        if instruction.op == "vector":
            return _BINARY[instruction.function](x, weights[0])
        if instruction.op == "scalar":
            return _BINARY[instruction.function](x, np.array(instruction.floats["value"]))
        if instruction.op == "softmax":
            powers = np.exp(x - x.max(axis=1, keepdims=True))
            return powers / powers.sum(axis=1, keepdims=True)
        if instruction.op == "sum":
            return x.sum(axis=1, keepdims=True)
        if instruction.op == "top_k":
            return np.concatenate(top_k(x, instruction.integers["k"]), axis=1)
        if instruction.op == "grouped_top_k":
            return np.concatenate(grouped_top_k(x, inputs[1], **instruction.integers), axis=1)
        if instruction.op == "experts":
            count = instruction.integers["experts"]
            ids = np.where((inputs[1] >= 0) & (inputs[1] < count), inputs[1], 0).astype(np.int64)
            gate = gated(instruction.function, **instruction.floats)
            return experts(x, ids, inputs[2], *weights, num_experts=count, gated=gate)
        if instruction.op == "linear":
            heads = instruction.integers.get("heads", 1)
            each = len(weights[0]) // heads
            return head_linear(x, weights[0], heads=heads, begin=0, rows=each, transposed=False)
        if instruction.op == "rms_norm":
            groups = x.reshape(len(x), instruction.integers["groups"], -1)
            square = np.mean(groups**2, axis=-1, keepdims=True)
            return (groups / np.sqrt(square + instruction.floats["epsilon"]) * weights[0]).reshape(x.shape)
        if instruction.op == "layer_norm":
            groups = x.reshape(len(x), instruction.integers["groups"], -1)
            centred = groups - groups.mean(axis=-1, keepdims=True)
            variance = np.mean(centred**2, axis=-1, keepdims=True)
            scale, *bias = (weight.reshape(-1, groups.shape[-1]) for weight in weights)
            scaled = centred / np.sqrt(variance + instruction.floats["epsilon"]) * scale
            return (scaled + (bias[0] if bias else 0)).reshape(x.shape)
        if instruction.op == "rope":
            return _rope(instruction, x, weights, batch.position_ids)
        raise ValueError(f"no operation {instruction.op}")

    def _attention(
        self,
        instruction: Instruction,
        query: np.ndarray,
        new: tuple[np.ndarray, np.ndarray | None],
        batch: Batch,
    ) -> np.ndarray:
        keys, values = self._caches[instruction.integers["layer"]]
        return paged_attention(
            query,
            *new,
            keys,
            values,
            batch.query_start,
            batch.past_lengths,
            batch.block_indices,
            batch.block_begins,
            num_heads=instruction.integers["heads"],
            num_kv_heads=keys.shape[1],
            scale=instruction.floats["scale"],
            window=instruction.integers["window"],
            softcap=instruction.floats["softcap"],
            chunk=instruction.integers.get("chunk", 0),
            sinks=self._weights[instruction.weights[0]] if instruction.weights else None,
            value_width=instruction.integers.get("value_width", 0),
        )


def _to_e4m3(x: np.ndarray) -> np.ndarray:
    """Return the nearest E4M3 number, ties to even, saturated. float32."""
    size = np.minimum(np.abs(x), np.float32(448))
    _, exponent = np.frexp(size)  # size = fraction x 2^exponent, with a fraction from 1/2
    step = np.ldexp(np.float32(1), np.maximum(exponent - 1, -6) - 3)
    return np.copysign(np.rint(size / step) * step, x).astype(np.float32)


def _to_fp4(x: np.ndarray, scale: np.float32) -> np.ndarray:
    """Return x as `llmc.RoundFP4` rounds it. float32."""
    codes = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6], np.float32)
    blocks = x.reshape(len(x), -1, 16)
    largest = np.abs(blocks).max(axis=-1, keepdims=True)
    of_block = _to_e4m3(largest / np.float32(6) / scale) * scale
    value = blocks / np.where(of_block == 0, np.float32(1), of_block)
    size = np.minimum(np.abs(value), np.float32(6))
    below = np.clip(np.searchsorted(codes, size, side="right") - 1, 0, 6)
    distance = 2 * size - codes[below] - codes[below + 1]  # above 0: the upper code is nearer
    upper = (distance > 0) | ((distance == 0) & (below % 2 == 1))  # a tie goes to the even code
    return np.asarray(np.copysign(codes[below + upper], value) * of_block).reshape(x.shape)


_ROUND = {
    "fp8": lambda x, scale: _to_e4m3(x / scale) * scale,
    "fp4": _to_fp4,
    "int8": lambda x, scale: np.clip(np.rint(x / scale), -128, 127) * scale,
}


def _rounded(x: np.ndarray, heads: int) -> np.ndarray:
    """Return rows of heads as multiples of the 127th part of each head's largest number."""
    each = x.reshape(len(x), heads, -1)
    scale = np.maximum(np.abs(each).max(axis=-1, keepdims=True) / 127, 1e-300)
    return (np.rint(each / scale) * scale).reshape(x.shape)


def _to_fp16(x: np.ndarray) -> np.ndarray:
    return np.clip(x, -65504, 65504).astype(np.float32).astype(np.float16).astype(np.float64)


def _columns(buffers: Mapping[int, np.ndarray], view: View) -> np.ndarray:
    return buffers[view.buffer][:, view.offset : view.offset + view.width]


def _rope(
    instruction: Instruction, x: np.ndarray, tables: list[np.ndarray], positions: np.ndarray
) -> np.ndarray:
    heads, rotated = instruction.integers["heads"], instruction.integers["rotated"]
    cosine, sine = (table.reshape(-1, rotated // 2)[positions][:, None] for table in tables)
    rows = x.reshape(len(x), heads, -1)
    result = rows.copy()
    if instruction.integers["interleaved"]:
        first, second = slice(0, rotated, 2), slice(1, rotated, 2)
    else:
        first, second = slice(0, rotated // 2), slice(rotated // 2, rotated)
    a, b = rows[..., first], rows[..., second]
    result[..., first], result[..., second] = a * cosine - b * sine, b * cosine + a * sine
    return result.reshape(x.shape)
