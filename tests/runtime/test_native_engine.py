"""The native engine's C against the interpreter of its programs, instruction by instruction."""

from __future__ import annotations

import ctypes
import dataclasses
import importlib.util
import itertools
import json
import os
import platform
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from llmc.compiler.weights.safetensors_writer import write_safetensors
from llmc.plugins.cpu import library
from llmc.runtime.backends.base import EngineFile, LoadOptions
from llmc.runtime.backends.native import NativeBackend
from llmc.runtime.batch import Batch
from llmc.runtime.bundle.reader import Bundle
from llmc.runtime.errors import BundleError
from llmc.runtime.native import weights as weights_module
from llmc.runtime.native.executor import Executor
from llmc.runtime.native.interpreter import Interpreter
from llmc.runtime.native.program import (
    BINARY,
    MAX_INSTRUCTIONS,
    UNARY,
    Cache,
    Instruction,
    Matrix,
    Program,
    View,
    check,
)
from llmc.runtime.native.weights import WeightsFile, start_reading
from support.native_fuzz import random_program, random_steps
from support.native_programs import POSITIONS, VOCABULARY, Builder, Built, constant, steps
from support.native_step import compile_runner, recorded_steps

ISAS = library.candidates()  # a library that was not compiled is an error, which a skipped test would hide
pytestmark = pytest.mark.skipif(not ISAS, reason="the native engine does not run on this CPU")

POSITIVE = ("sqrt", "reciprocal")


def run(
    built: Built, threads: int = 2, digits: int = 3, isa: str | None = None, kv_dtype: str = "fp32"
) -> list[np.ndarray]:
    program, weights, _ = built
    executor = Executor(
        program,
        weights,
        max_tokens=64,
        num_blocks=12,
        threads=threads,
        digits=digits,
        kv_dtype=kv_dtype,
        isa=isa,
    )  # type: ignore[arg-type]
    results = [executor.run(batch).copy() for batch in steps()]
    executor.close()
    return results


def expected(built: Built) -> list[np.ndarray]:
    program, _, weights = built
    interpreter = Interpreter(program, weights, 12)  # type: ignore[arg-type]
    return [interpreter.forward(batch) for batch in steps()]


def unary(function: str) -> Built:
    build = Builder(40)
    x = View(0, 0, 40)
    if function in POSITIVE:
        x = build.emit("scalar", 40, build.emit("unary", 40, x, function="abs"), function="add", value=0.1)
    return build.finish(build.emit("unary", 40, x, function=function))


def glu(function: str) -> Built:
    build = Builder(48)
    y = build.emit("scalar", 48, View(0, 0, 48), function="mul", value=-1.5)
    return build.finish(build.emit("glu", 48, y, View(0, 0, 48), function=function))


def binary(function: str) -> Built:
    build = Builder(50)
    v = build.vector("v", 50, np.random.default_rng(3).uniform(0.5, 2, 50))
    y = build.emit("vector", 50, View(0, 0, 50), weights=(v,), function=function)
    y = build.emit("scalar", 50, y, function=function, value=1.5)
    y = build.emit("binary", 50, y, View(0, 0, 50), function=function)
    return build.finish(y)


def rounding(function: str, scale: float) -> Built:
    build = Builder(48)
    return build.finish(
        build.emit(
            "round", 48, View(0, 0, 48), weights=(build.vector("s", 1, np.array([scale])),), function=function
        )
    )


def norms(groups: int) -> Built:
    build = Builder(72)
    y = build.emit(
        "rms_norm",
        72,
        View(0, 0, 72),
        weights=(build.vector("w", 72 // groups),),
        groups=groups,
        epsilon=1e-5,
    )
    scale, bias = build.vector("g", 72 // groups), build.vector("b", 72 // groups)
    y = build.emit("layer_norm", 72, y, weights=(scale, bias), groups=groups, epsilon=1e-5)
    y = build.emit("layer_norm", 72, y, weights=(scale,), groups=groups, epsilon=1e-5)
    each = build.vector("each", 72)
    return build.finish(build.emit("layer_norm", 72, y, weights=(each, each), groups=groups, epsilon=1e-5))


def slices() -> Built:
    build = Builder(60)
    y = build.emit("slice", 36, View(0, 0, 60), groups=3, begin=5)
    build.matrix("positions", POSITIONS, 36, "fp32")
    z = build.emit("embed_positions", 36, weights=("positions",))
    return build.finish(build.emit("binary", 36, y, z, function="add"))


def rotations(rotated: int, interleaved: int) -> Built:
    build = Builder(4 * 40)
    angles = np.random.default_rng(5).uniform(0, 6, POSITIONS * rotated // 2)
    tables = (
        build.vector("cos", len(angles), np.cos(angles)),
        build.vector("sin", len(angles), np.sin(angles)),
    )
    y = build.emit(
        "rope", 160, View(0, 0, 160), weights=tables, heads=4, rotated=rotated, interleaved=interleaved
    )
    return build.finish(y)


def copies() -> Built:
    build = Builder(50)
    y = build.emit("copy", 50, View(0, 20, 30))
    build.emit("copy", 50, View(0, 0, 20), out=y.buffer, offset=30)
    return build.finish(y)


def overlap(op: str, function: str, first: int, second: int) -> Built:
    """Two views of one buffer that share columns. Nothing reads the buffer later."""
    build = Builder(112)
    y = build.emit("scalar", 112, View(0, 0, 112), function="mul", value=0.5)
    views = View(y.buffer, first, 64), View(y.buffer, second, 64)
    return build.finish(build.emit(op, 64, *views, function=function))


def attention(
    heads: int,
    kv_heads: int,
    width: int,
    value_width: int,
    window: int,
    softcap: float,
    chunk: int = 0,
    sinks: bool = False,
) -> Built:
    build = Builder(heads * width + kv_heads * (width + value_width))
    build.caches.append(Cache(kv_heads, width, value_width))
    first, second = heads * width, kv_heads * width
    key, value = View(0, first, second), View(0, first + second, kv_heads * value_width)
    build.instructions.append(
        dataclasses.replace(
            build.instructions[0],
            op="write_kv",
            out=None,
            inputs=(key, value),
            weights=(),
            integers={"layer": 0},
        )
    )
    y = build.emit(
        "attention",
        heads * value_width,
        View(0, 0, first),
        weights=(build.vector("sinks", heads),) if sinks else (),
        heads=heads,
        layer=0,
        window=window,
        **({"chunk": chunk} if chunk else {}),
        scale=width**-0.5,
        softcap=softcap,
    )
    return build.finish(y)


def latent_attention(heads: int, width: int, value_width: int, window: int = 0, kv_heads: int = 1) -> Built:
    build = Builder((heads + kv_heads) * width)
    build.caches.append(Cache(kv_heads, width, 0))
    first, keys = heads * width, kv_heads * width
    build.instructions.append(
        Instruction("write_keys", None, 0, (View(0, first, keys),), (), "", {"layer": 0}, {})
    )
    sizes = {"heads": heads, "layer": 0, "window": window, "value_width": value_width}
    query = View(0, 0, first)
    y = build.emit("attention", heads * value_width, query, **sizes, scale=width**-0.5, softcap=0.0)
    return build.finish(y)


def linear_of_heads(element: str) -> Built:
    build = Builder(5 * 40)
    w = build.matrix("w", 5 * 64, 40, element)
    return build.finish(build.emit("linear", 5 * 64, View(0, 0, 200), weights=(w,), heads=5))


def joined() -> Built:
    build = Builder(90)
    return build.finish(build.emit("join", 66, View(0, 5, 36), View(0, 47, 30), groups=6))


def grouped_top_k(kept: int, scored: int) -> Built:
    """Whole numbers, so that groups and columns are often equal."""
    build = Builder(24, table=np.random.default_rng(3).integers(0, 4, (50, 24)))
    chosen = build.emit(
        "grouped_top_k", 8, View(0, 12, 12), View(0, 0, 12), groups=4, kept=kept, scored=scored, k=4
    )
    return build.finish(chosen)


def linear(element: str, block: int = 0, scales: str = "", rows: int = 50, columns: int = 256) -> Built:
    build = Builder(columns)
    return build.finish(
        build.emit(
            "linear",
            rows,
            View(0, 0, columns),
            weights=(build.matrix("w", rows, columns, element, block, scales),),
        )
    )


PROGRAMS: dict[str, Callable[[], Built]] = {
    **{name: lambda name=name: unary(name) for name in UNARY},  # type: ignore[misc]
    **{f"glu {name}": lambda name=name: glu(name) for name in ("silu", "gelu", "gelu_tanh")},  # type: ignore[misc]
    **{name: lambda name=name: binary(name) for name in BINARY},  # type: ignore[misc]
    "round to fp8": lambda: rounding("fp8", 0.03),
    "round to small fp8": lambda: rounding("fp8", 100.0),
    "round to large fp8": lambda: rounding("fp8", 1e-3),
    "round to fp4": lambda: rounding("fp4", 1e-3),
    "round to fp4, blocks of 0": lambda: rounding("fp4", 1e6),
    "round to int8": lambda: rounding("int8", 0.01),
    "norms": lambda: norms(1),
    "norms of heads": lambda: norms(3),
    "slices and positions": slices,
    "rotation": lambda: rotations(40, 0),
    "part of a head": lambda: rotations(12, 0),
    "interleaved": lambda: rotations(40, 1),
    "copies": copies,
    "views that overlap": lambda: overlap("binary", "sub", 32, 16),
    "views that overlap, the other way": lambda: overlap("binary", "sub", 0, 16),
    "glu of views that overlap": lambda: overlap("glu", "silu", 48, 0),
    "glu of one view": lambda: overlap("glu", "silu", 32, 32),
    "attention": lambda: attention(4, 2, 32, 32, 0, 0.0),
    "one head": lambda: attention(1, 1, 16, 16, 0, 0.0),
    "values of another width": lambda: attention(6, 2, 24, 40, 0, 0.0),
    "multi-query": lambda: attention(20, 1, 16, 48, 0, 0.0),
    "window": lambda: attention(4, 4, 32, 32, 20, 0.0),
    "window of one": lambda: attention(4, 4, 32, 32, 1, 0.0),
    "softcap": lambda: attention(4, 2, 32, 64, 0, 3.0),
    "chunks": lambda: attention(4, 2, 32, 32, 0, 0.0, chunk=12),
    "sinks": lambda: attention(6, 2, 16, 16, 20, 0.0, sinks=True),
    "latent heads": lambda: attention(16, 1, 576, 512, 0, 0.0),
    "more heads than rows": lambda: attention(74, 2, 16, 16, 0, 0.0),
    "latent": lambda: latent_attention(16, 576, 512),
    "latent, many heads": lambda: latent_attention(128, 48, 32),
    "latent, 40 heads and a window": lambda: latent_attention(40, 32, 24, window=20),
    "latent, all numbers are values": lambda: latent_attention(6, 32, 32, kv_heads=2),
    "linear of heads": lambda: linear_of_heads("fp32"),
    "linear of heads, bf16": lambda: linear_of_heads("bf16"),
    "join": joined,
    "grouped top k": lambda: grouped_top_k(2, 2),
    "grouped top k of best": lambda: grouped_top_k(3, 1),
    "fp32": lambda: linear("fp32"),
    "fp16": lambda: linear("fp16"),
    "bf16": lambda: linear("bf16", columns=100),
    "fp8": lambda: linear("fp8", 256, "fp32"),
    "int4 block 32": lambda: linear("int4", 32, "fp16"),
    "int4 block 128": lambda: linear("int4", 128, "fp16", rows=77),
    "int4 fp32 scales": lambda: linear("int4", 64, "fp32"),
    "fp4 block 16": lambda: linear("fp4", 16, "fp32"),
    "fp4 block 32": lambda: linear("fp4", 32, "fp32", rows=77),
    "int8 per row": lambda: linear("int8", 256, "fp32"),
    "int8 blocks": lambda: linear("int8", 32, "fp16"),
    "int8 blocks of 48": lambda: linear("int8", 48, "fp32", columns=240),
}


@pytest.mark.parametrize("name", PROGRAMS)
def test_an_instruction_is_the_interpreters(name: str) -> None:
    built = PROGRAMS[name]()
    for got, want in zip(run(built), expected(built), strict=True):
        assert got.shape == want.shape
        size = np.abs(want).max() if want.size else 1.0
        np.testing.assert_allclose(got, want, rtol=0, atol=2e-6 * size)


@pytest.mark.parametrize(
    "name", ["fp32", "fp16", "bf16", "int4 block 32", "fp4 block 16", "int8 blocks", "int8 per row"]
)
def test_a_linear_layer_is_exact_to_a_millionth(name: str) -> None:
    """Relative to the norms of row and input, which is what rounding errors scale with."""
    built = PROGRAMS[name]()
    exact, batch = built[2], steps()[0]
    x, w = exact["table"][batch.input_ids[batch.logits_index]], exact["w"]  # type: ignore[index]
    bound = 1e-6 * np.linalg.norm(x, axis=1)[:, None] * np.linalg.norm(w, axis=1)[None]
    assert (np.abs(run(built)[0] - x @ w.T) <= bound).all()


@pytest.mark.parametrize(
    "name",
    [
        *("gelu", "norms", "attention", "softcap", "latent", "latent, many heads", "linear of heads", "bf16"),
        *("int4 block 32", "fp4 block 16", "int8 per row"),
    ],
)
def test_threads_and_instruction_sets_give_the_same_bits(name: str) -> None:
    built = PROGRAMS[name]()
    want = run(built, threads=1)
    for isa in ISAS:
        for threads in (1, 2, 4):
            for got, first in zip(run(built, threads, isa=isa), want, strict=True):
                assert got.tobytes() == first.tobytes(), (isa, threads)


@pytest.mark.parametrize("digits", [1, 3])
@pytest.mark.parametrize(
    ("element", "block", "scales"),
    [
        *[("int4", 128, "fp16"), ("int4", 32, "fp16"), ("int8", 640, "fp32"), ("int8", 80, "fp32")],
        *[("fp4", 16, "fp32"), ("fp4", 32, "fp32")],
    ],
)
def test_a_row_of_a_long_step_is_that_row_alone(element: str, block: int, scales: str, digits: int) -> None:
    """300 rows are more than a panel of AMX, and no multiple of its tiles."""
    program, weights, _ = linear(element, block, scales, rows=40, columns=640)
    lengths, tokens = (110, 120, 70), np.random.default_rng(1).integers(0, VOCABULARY, 300)
    sequences = np.split(tokens, np.cumsum(lengths)[:-1])
    batch = Batch.pack([(ids, 0, range(4 * n, 4 * n + 4), True) for n, ids in enumerate(sequences)])
    batch = dataclasses.replace(batch, logits_index=np.arange(300, dtype=np.int32))
    results = []
    for isa in ISAS:
        executor = Executor(
            program, weights, max_tokens=300, num_blocks=12, threads=2, digits=digits, isa=isa
        )
        results.append(executor.run(batch).copy())
        assert results[-1].tobytes() == results[0].tobytes(), isa
    alone = np.concatenate(
        [executor.run(Batch.pack([([token], 0, range(1), True)])).copy() for token in range(VOCABULARY)]
    )
    assert results[0].tobytes() == alone[tokens].tobytes()


ATTENTION = (
    "attention",
    "values of another width",
    "multi-query",
    "window",
    "softcap",
    "chunks",
    "sinks",
    "latent heads",
)


@pytest.mark.parametrize("name", [*ATTENTION, "latent", "latent, 40 heads and a window"])
def test_a_cache_of_fp16_rounds_keys_and_values(name: str) -> None:
    built = PROGRAMS[name]()
    program, _, weights = built
    interpreter = Interpreter(program, weights, 12, "fp16")  # type: ignore[arg-type]
    got = run(built, kv_dtype="fp16")
    for result, batch in zip(got, steps(), strict=True):
        want = interpreter.forward(batch)
        np.testing.assert_allclose(result, want, rtol=0, atol=2e-6 * np.abs(want).max())
    assert any((a != b).any() for a, b in zip(got, run(built), strict=True))
    for isa in ISAS:
        for result, first in zip(run(built, 1, isa=isa, kv_dtype="fp16"), got, strict=True):
            assert result.tobytes() == first.tobytes(), isa


def test_numbers_beyond_fp16_become_its_largest_in_the_cache() -> None:
    program, weights, exact = attention(2, 1, 16, 16, 0, 0.0)
    packed = {**weights, "table": (weights["table"].view(np.float32) * 1e6).view(np.uint8)}
    exact = {**exact, "table": exact["table"] * 1e6}
    batch = steps()[0]
    want = Interpreter(program, exact, 12, "fp16").forward(batch)
    got = run((program, packed, exact), kv_dtype="fp16")[0]
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=2e-6 * np.abs(want).max())


@pytest.mark.parametrize("digits", [1, 3])
@pytest.mark.parametrize(
    ("sizes", "kv_dtype"),
    [
        *[
            (sizes, kv_dtype)
            for sizes in ((4, 2, 32, 32), (3, 1, 80, 40), (8, 8, 64, 16), (2, 2, 24, 24))
            for kv_dtype in ("fp32", "int8")
        ],
        ((40, 48, 32), "fp32"),
    ],
)
def test_many_queries_give_the_bits_of_each_alone(sizes: tuple[int, ...], digits: int, kv_dtype: str) -> None:
    """Tiles of queries that are full, half empty, or at the border of a part. AMX takes those of int8."""
    program, weights, _ = latent_attention(*sizes) if len(sizes) == 3 else attention(*sizes, 0, 0.0)
    program = dataclasses.replace(program, max_positions=0)
    ids, table = np.random.default_rng(2).integers(0, VOCABULARY, 300).tolist(), range(10)

    def run_steps(isa: str, cuts: list[int]) -> bytes:
        executor = Executor(
            program,
            weights,
            max_tokens=300,
            num_blocks=10,
            threads=2,
            digits=digits,
            kv_dtype=kv_dtype,
            isa=isa,
        )
        rows = []
        for begin, end in itertools.pairwise(cuts):
            batch = Batch.pack([(ids[begin:end], begin, table[: -(-end // 32)], True)])
            batch = dataclasses.replace(batch, logits_index=np.arange(end - begin, dtype=np.int32))
            rows.append(executor.run(batch).copy())
        executor.close()
        return np.concatenate(rows).tobytes()

    want = run_steps(ISAS[-1], list(range(301)))
    for isa in ISAS:
        assert run_steps(isa, [0, 300]) == want, isa
        assert run_steps(isa, [0, 7, 250, 261, 300]) == want, isa


def test_latent_keys_have_no_cache_of_int8() -> None:
    with pytest.raises(ValueError, match="latent keys have no cache of int8"):
        run(PROGRAMS["latent"](), kv_dtype="int8")


LONG = {
    "long latent": lambda: latent_attention(40, 48, 32),
    "long": lambda: attention(4, 2, 32, 32, 0, 0.0),
    "long, one head": lambda: attention(3, 1, 16, 40, 0, 0.0, sinks=True),
    "long window": lambda: attention(4, 4, 32, 32, 300, 3.0),
    "long chunks": lambda: attention(4, 2, 32, 32, 0, 0.0, chunk=400),
}


@pytest.mark.parametrize(
    ("name", "kv_dtype"),
    [
        (name, kv_dtype)
        for name in LONG
        for kv_dtype in ("fp32", "fp16", *([] if "latent" in name else ["int8"]))
    ],
)
def test_a_context_of_many_parts_is_split_without_changing_a_bit(name: str, kv_dtype: str) -> None:
    """A part has 256 keys. One thread takes all parts of a head; more threads share them."""
    program, weights, exact = LONG[name]()
    program = dataclasses.replace(program, max_positions=0)
    ids = np.random.default_rng(0).integers(0, VOCABULARY, 830).tolist()
    tables = list(range(27))

    def rows(past: int, count: int) -> tuple[list[int], int, list[int], bool]:
        return ids[past : past + count], past, tables[: -(-(past + count) // 32)], True

    split = [Batch.pack([rows(past, min(300, 820 - past))]) for past in range(0, 820, 300)]
    split += [Batch.pack([rows(820, 1)]), Batch.pack([rows(821, 3)])]
    other = [Batch.pack([rows(0, 512)]), Batch.pack([rows(512, 308)]), *split[-2:]]

    def results(batches: list[Batch], threads: int, isa: str | None = None) -> list[bytes]:
        executor = Executor(
            program,
            weights,
            max_tokens=512,
            num_blocks=28,
            threads=threads,
            kv_dtype=kv_dtype,
            isa=isa,
        )
        logits = [executor.run(batch).tobytes() for batch in batches]
        executor.close()
        return logits[-2:]

    want = results(split, 1)
    assert results(other, 1) == want
    for isa in ISAS:
        for threads in (1, 2, 4):
            assert results(split, threads, isa) == want, (isa, threads)
    interpreter = Interpreter(program, exact, 28, "fp64" if kv_dtype == "fp32" else kv_dtype)
    exactly = [interpreter.forward(batch) for batch in (other[0], other[1], *other[2:])][-2:]
    for got, reference in zip(want, exactly, strict=True):
        close = (
            np.abs(np.frombuffer(got, np.float32) - reference.reshape(-1)) <= 4e-6 * np.abs(reference).max()
        )
        assert close.mean() > (0.98 if kv_dtype == "int8" else 0.9999)


@pytest.mark.parametrize("name", ATTENTION)
def test_a_cache_of_int8_rounds_keys_and_values(name: str) -> None:
    built = PROGRAMS[name]()
    program, _, weights = built
    interpreter = Interpreter(program, weights, 12, "int8")  # type: ignore[arg-type]
    want = [interpreter.forward(batch) for batch in steps()]
    for got, reference, exact in zip(run(built, kv_dtype="int8"), want, expected(built), strict=True):
        # A key or value within 1e-6 of the middle of two codes may get the other one.
        close = np.abs(got - reference) <= 2e-6 * np.abs(reference).max()
        assert close.mean() > 0.98
        assert np.abs(got - reference).max() < 0.5 * np.abs(exact - reference).max()
    for isa in ISAS:
        for got, first in zip(
            run(built, 1, isa=isa, kv_dtype="int8"), run(built, kv_dtype="int8"), strict=True
        ):
            assert got.tobytes() == first.tobytes(), isa


@pytest.mark.parametrize("name", ["attention", "latent heads"])
def test_one_digit_rounds_queries_too(name: str) -> None:
    built = PROGRAMS[name]()
    exact, fast = run(built, kv_dtype="int8"), run(built, kv_dtype="int8", digits=1)
    for got, want in zip(fast, exact, strict=True):
        assert 0 < np.abs(got - want).max() < 0.05 * np.abs(want).max()


def test_activations_that_were_rounded_to_int8_need_one_digit() -> None:
    build = Builder(256)
    scale = build.vector("s", 1, np.array([0.02]))
    y = build.emit("round", 256, View(0, 0, 256), weights=(scale,), function="int8")
    y = build.emit("linear", 50, y, weights=(build.matrix("w", 50, 256, "int8", 64, "fp32"),))
    built = build.finish(y)
    for digits in (1, 3):
        for got, want in zip(run(built, digits=digits), expected(built), strict=True):
            np.testing.assert_allclose(got, want, rtol=0, atol=2e-6 * np.abs(want).max())


def test_one_digit_rounds_activations_to_eight_bits() -> None:
    built = PROGRAMS["int4 block 32"]()
    exact = built[2]
    batch = steps()[0]
    x = exact["table"][batch.input_ids[batch.logits_index]].reshape(-1, 8, 32)  # type: ignore[index]
    scale = np.abs(x).max(axis=-1, keepdims=True) / 127
    rounded = (np.rint(x / scale) * scale).reshape(len(x), -1)
    got = run(built, digits=1)[0]
    np.testing.assert_allclose(got, rounded @ exact["w"].T, atol=1e-4)  # type: ignore[index]
    assert np.abs(got - run(built)[0]).max() > 1e-4


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"input_ids": 50}, "token ids"),
        ({"input_ids": -1}, "token ids"),
        ({"position_ids": POSITIONS}, "positions"),
        ({"block_indices": 12}, "blocks"),
        ({"logits_index": 1000}, "rows of logits"),
        ({"past_lengths": 5}, "contradict"),
        ({"query_start": 3}, "contradict"),
        ({"block_begins": 7}, "contradict"),
    ],
)
def test_steps_that_would_leave_the_arrays_are_refused(change: dict[str, int], message: str) -> None:
    program, weights, _ = PROGRAMS["attention"]()
    executor = Executor(program, weights, max_tokens=64, num_blocks=12, threads=1)  # type: ignore[arg-type]
    ((name, value),) = change.items()
    arrays = {name: getattr(steps()[0], name).copy()}
    arrays[name][0] = value
    with pytest.raises(ValueError, match=message):
        executor.run(dataclasses.replace(steps()[0], **arrays))


@pytest.mark.parametrize(
    "change",
    [
        {"past_lengths": np.zeros(1, np.int32)},
        {"input_ids": np.zeros(47, np.int64)},
        {"logits_index": np.zeros((1, 1), np.int32)},
        {"query_start": np.zeros(0, np.int32)},
        # The differences of these wrap to positive numbers.
        {"query_start": np.array([0, 2**31 - 1, -2, 47], np.int32), "past_lengths": np.zeros(3, np.int32)},
    ],
)
def test_steps_with_arrays_of_another_length_or_dtype_are_refused(change: dict[str, np.ndarray]) -> None:
    program, weights, _ = PROGRAMS["attention"]()
    executor = Executor(program, weights, max_tokens=64, num_blocks=12, threads=1)
    with pytest.raises(ValueError, match=r"contradict|not a vector of int32"):
        executor.run(dataclasses.replace(steps()[0], **change))


def test_a_step_of_too_many_tokens_is_refused() -> None:
    program, weights, _ = PROGRAMS["fp32"]()
    executor = Executor(program, weights, max_tokens=8, num_blocks=12, threads=1)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="takes 1 to 8"):
        executor.run(steps()[0])


def test_programs_survive_json() -> None:
    program, _, _ = PROGRAMS["attention"]()
    assert Program.from_json(program.to_json()) == program


def test_a_changed_number_of_a_program_is_refused_or_harmless() -> None:
    """Every number of a program changed, one at a time. What `check` lets through must run."""
    program, _, _ = PROGRAMS["values of another width"]()
    text = program.to_json().decode()
    tree, refused = json.loads(text), 0
    places: list[tuple[object, object]] = []

    def walk(node: object) -> None:
        for key, value in node.items() if isinstance(node, dict) else enumerate(node):  # type: ignore[arg-type]
            if isinstance(value, dict | list):
                walk(value)
            elif isinstance(value, int | float):
                places.append((node, key))

    walk(tree)
    assert len(places) > 40
    for node, key in places:
        before = node[key]  # type: ignore[index]
        for value in (0, 1, -1, before + 1, before * 2, 1 << 26, 1 << 40):
            node[key] = value  # type: ignore[index]
            try:
                changed = Program.from_json(json.dumps(tree).encode())
                arrays = {
                    name: np.zeros(matrix.nbytes, np.uint8) for name, matrix in changed.matrices.items()
                } | {name: constant(size) for name, size in changed.constants.items()}
                executor = Executor(changed, arrays, max_tokens=64, num_blocks=12, threads=1)
                executor.run(steps()[0])
            except (BundleError, ValueError, MemoryError, OSError):
                refused += 1
        node[key] = before  # type: ignore[index]
    assert refused > 100


def test_check_names_the_instruction() -> None:
    program, _, _ = PROGRAMS["attention"]()
    instructions = list(program.instructions)
    instructions[1] = dataclasses.replace(
        instructions[1], inputs=(View(0, 0, 10_000), instructions[1].inputs[1])
    )
    with pytest.raises(BundleError, match=r"instruction 1 \(write_kv\) .* past the columns"):
        check(dataclasses.replace(program, instructions=tuple(instructions)))


@pytest.mark.parametrize(
    "matrix",
    [
        Matrix(4, 32, "int8", 0, "fp32"),
        Matrix(4, 32, "int4", 16),
        Matrix(4, 32, "int8", 48, "fp16"),
        Matrix(4, 32, "int4", 8, "fp16"),
        Matrix(4, 32, "fp4", 32),
        Matrix(4, 32, "fp8", 16, "fp32"),
        Matrix(4, 32, "fp16", 32, "fp32"),
    ],
)
def test_a_matrix_that_cannot_be_packed_is_refused_even_if_nothing_reads_it(matrix: Matrix) -> None:
    program, _, _ = PROGRAMS["fp32"]()
    with pytest.raises(BundleError, match="the matrix 'unused' of the program"):
        check(dataclasses.replace(program, matrices={**program.matrices, "unused": matrix}))


def test_a_program_without_end_is_refused() -> None:
    program, _, _ = PROGRAMS["fp32"]()
    buffers = program.buffers[:1] * (MAX_INSTRUCTIONS + 1)
    with pytest.raises(BundleError, match="more than 16384 instructions or buffers"):
        check(dataclasses.replace(program, buffers=buffers))


def test_a_program_must_be_that_of_the_manifest(tmp_path: Path) -> None:
    """The manifest sizes the KV cache, and the program says how it is laid out."""
    program, weights, _ = PROGRAMS["attention"]()
    (tmp_path / "weights").mkdir()
    (tmp_path / "rank0.program.json").write_bytes(program.to_json())
    entries = [
        (name, "U8" if name in program.matrices else "F32", array.shape) for name, array in weights.items()
    ]
    write_safetensors(
        tmp_path / "weights/packed.safetensors", entries, lambda name: [memoryview(weights[name]).cast("B")]
    )
    golden = Bundle.open(Path(__file__).parents[1] / "golden" / "format-1.llmc", verify_hashes=False).manifest
    [cache] = program.caches
    layer = dataclasses.replace(golden.geometry.layers[0], **dataclasses.asdict(cache))
    geometry = dataclasses.replace(
        golden.geometry, num_layers=1, layers=(layer,), vocab_size=program.vocab_size
    )
    limits = dataclasses.replace(golden.limits, max_seq_len=POSITIONS)
    manifest = dataclasses.replace(golden, geometry=geometry, limits=limits)

    def load(**changed: Any) -> NativeBackend:
        bundle = Bundle(tmp_path, dataclasses.replace(manifest, **changed))
        engine = EngineFile("native", tmp_path / "rank0.program.json", "fp32", bundle)
        return NativeBackend(engine, 1, LoadOptions(threads=1))

    load().close()
    wider = dataclasses.replace(layer, head_dim=2 * layer.head_dim)
    for changed, message in (
        ({"geometry": dataclasses.replace(geometry, layers=(wider,))}, "other KV caches"),
        ({"geometry": dataclasses.replace(geometry, layers=(layer, layer))}, "other KV caches"),
        ({"geometry": dataclasses.replace(geometry, vocab_size=7)}, "another vocabulary"),
        ({"limits": dataclasses.replace(limits, max_seq_len=POSITIONS + 1)}, "fewer positions"),
    ):
        with pytest.raises(BundleError, match=message):
            load(**changed)


def test_a_weights_file_is_read_in_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Several threads read it. The tensors are not equal, so a part in another part's place would show."""
    monkeypatch.setattr(weights_module, "_PAGE", 4096)
    monkeypatch.setattr(weights_module, "available_cpus", lambda: 3)
    program, path, written = _weights_file(tmp_path)
    arrays, _ = WeightsFile(path).arrays(program)
    assert path.stat().st_size > 3 * 4096
    for name, array in written.items():
        np.testing.assert_array_equal(arrays[name], array)


def test_a_weights_file_that_becomes_shorter_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program, path, _ = _weights_file(tmp_path)
    read = WeightsFile._read

    def cut(self: WeightsFile, first: int, last: int) -> None:
        os.truncate(path, path.stat().st_size - 100)
        read(self, first, last)

    monkeypatch.setattr(WeightsFile, "_read", cut)
    with pytest.raises(BundleError, match="became shorter while it was read"):
        WeightsFile(path).arrays(program)


def test_a_weights_file_that_cannot_be_read_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program, path, _ = _weights_file(tmp_path)
    with pytest.raises(BundleError, match=r"cannot read weights/packed\.safetensors: No such file"):
        start_reading(tmp_path / "rank0.program.json")
    read = WeightsFile._read

    def remove(self: WeightsFile, first: int, last: int) -> None:
        path.unlink()
        read(self, first, last)

    monkeypatch.setattr(WeightsFile, "_read", remove)
    with pytest.raises(BundleError, match=r"cannot read weights/packed\.safetensors: No such file"):
        WeightsFile(path).arrays(program)


def _weights_file(directory: Path) -> tuple[Program, Path, Mapping[str, np.ndarray]]:
    """Return a program, the weights file that was written for it, and the arrays in the file."""
    program, weights, _ = random_program(3)
    entries = [
        (name, "U8" if name in program.matrices else "F32", array.shape) for name, array in weights.items()
    ]
    path = directory / "packed.safetensors"
    write_safetensors(path, entries, lambda name: [memoryview(weights[name]).cast("B")])
    return program, path, weights


QEMU = shutil.which("qemu-aarch64-static") or shutil.which("qemu-aarch64")
NEEDS_QEMU = pytest.mark.skipif(not QEMU, reason="needs an emulator of ARM: apt-get install qemu-user")


@pytest.mark.slow
@pytest.mark.skipif(not importlib.util.find_spec("ziglang"), reason="needs a C compiler: pip install ziglang")
@pytest.mark.parametrize(
    "name",
    [
        pytest.param(ISAS[-1] if ISAS else "", id="this machine"),
        pytest.param("aarch64-i8mm", marks=NEEDS_QEMU),
        pytest.param("aarch64-dotprod", marks=NEEDS_QEMU),
    ],
)
def test_an_emulated_cpu_gives_the_same_bits(name: str, tmp_path: Path) -> None:
    runner = compile_runner(name, tmp_path)
    command = [str(runner)] if name.startswith(platform.machine()) else [str(QEMU), str(runner)]
    cases = [(label, make(), steps()[:3]) for label, make in PROGRAMS.items()]
    seeds = range(5 if command[0] == str(runner) else 20)  # here, test_native_fuzz.py runs more of them
    cases += [(f"random {seed}", random_program(seed), random_steps(seed, 12, 2)) for seed in seeds]
    for label, built, batches in cases:
        files, want = [], b""
        for digits, kv_dtype in ((3, "fp32"), (3, "fp16"), (1, "int8")):
            if kv_dtype == "int8" and any(not cache.v_head_dim for cache in built[0].caches):
                continue
            for image, logits in recorded_steps(built, batches, digits=digits, kv_dtype=kv_dtype):
                files.append(tmp_path / f"step{len(files)}")
                files[-1].write_bytes(image)
                want += logits.tobytes()
        done = subprocess.run([*command, *map(str, files)], stdout=subprocess.PIPE, check=True)
        assert done.stdout == want, label


def burn(processes: int) -> list[subprocess.Popen[bytes]]:
    return [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(processes)]


def test_threads_that_lose_their_cores_give_the_same_bits() -> None:
    built, batches = random_program(3), random_steps(3, 12, 6)
    executor = Executor(built[0], built[1], max_tokens=64, num_blocks=12, threads=1)
    want = [executor.run(batch).tobytes() for batch in batches]
    others = burn(2 * len(os.sched_getaffinity(0)))
    try:
        for _ in range(20):
            executor = Executor(built[0], built[1], max_tokens=64, num_blocks=12, threads=4)
            assert [executor.run(batch).tobytes() for batch in batches] == want
    finally:
        for other in others:
            other.kill()
            other.wait()


def test_a_thread_that_waits_for_another_one_sleeps_until_that_is_finished() -> None:
    """Two threads of a step with one item. The first finds it taken, as if the second had lost its core."""
    engine = library.load()
    counters = np.zeros((2, library.COUNTER), np.int32)  # next and done
    numbers = np.zeros((2, 16), np.float32)
    code = library.Instruction(op=library.COPY, a=numbers[0].ctypes.data, out=numbers[1].ctypes.data)
    code.n[0] = 16
    group = library.Group(0, 1)
    step = library.Step(1, 1, 0, 2, 1, next=counters[0].ctypes.data, done=counters[1].ctypes.data)
    step.code, step.groups = ctypes.addressof(code), ctypes.addressof(group)
    numbers[0], counters[0] = 3, 1
    thread = threading.Thread(target=engine.llmc_run, args=(ctypes.byref(step),), daemon=True)
    thread.start()
    call = Path(f"/proc/self/task/{thread.native_id}/syscall")
    deadline = time.monotonic() + 30
    while f"{counters[1].ctypes.data:#x}" not in call.read_text():  # futex(the counter, ...)
        assert time.monotonic() < deadline, "it waits without sleeping"
    assert thread.is_alive()
    counters[0] = 0
    engine.llmc_run(ctypes.byref(step))
    thread.join(30)
    assert not thread.is_alive()
    assert (numbers[1] == 3).all()


@pytest.mark.slow
def test_an_idle_executor_uses_no_cpu_time() -> None:
    program, weights, _ = random_program(3)
    executor = Executor(program, weights, max_tokens=64, num_blocks=12, threads=4)
    executor.run(random_steps(3, 12, 1)[0])
    begin = os.times()
    threading.Event().wait(1)
    end = os.times()
    assert end.user + end.system - begin.user - begin.system < 0.1
    executor.close()
