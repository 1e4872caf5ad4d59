"""The Triton kernels: run by Triton's interpreter against the numpy reference, and compiled for every SM.

No GPU is needed, none is used. Triton decides when it is imported whether it interprets or compiles, so the
interpreted half runs in a process of its own: this file, started as a script (`main`).
"""

from __future__ import annotations

import itertools
import os
import pickle
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from llmc.plugins.cuda.gpus import SHARED_LIMIT, SMS
from llmc.plugins.paged_attention import launch, reference, spec
from llmc.plugins.paged_attention.launch import FP8, Attention
from support.sampled import sampled

no_triton = find_spec("triton") is None or find_spec("torch") is None

# Half a unit in the last place, relative: what one rounding to the dtype can change.
ROUNDING = {"fp16": 2.0**-11, "bf16": 2.0**-8}
SHAPES = {
    "plain": Attention(4, 4, 64, 64),
    "grouped": Attention(8, 2, 64, 64),
    "groups of three": Attention(6, 2, 64, 64),
    "one kv head": Attention(4, 1, 128, 128),
    "odd heads": Attention(4, 2, 40, 40),
    "small heads": Attention(8, 4, 8, 8),
    "wide keys": Attention(4, 2, 96, 32),
    "narrow values": Attention(4, 2, 32, 16),
    "largest heads": Attention(2, 1, 256, 256),
    "window": Attention(4, 2, 64, 64, window=24),
    "window of one": Attention(4, 2, 32, 32, window=1),
    "sinks": Attention(8, 2, 64, 64, sinks=True),
    "softcap": Attention(4, 2, 64, 64, softcap=5.0),
    "everything": Attention(6, 2, 48, 80, window=33, softcap=5.0, sinks=True),
}
DTYPES = {
    "fp16": ("fp16", None),
    "bf16": ("bf16", None),
    "fp16-fp8": ("fp16", FP8),
    "bf16-fp8": ("bf16", FP8),
}
# (past, new) tokens of each sequence. A new count of 0 is padding, as in a captured step.
MIXED = ([70, 31, 64, 0, 32, 5], [1, 40, 1, 33, 2, 0])  # decode, chunk across pages, decode, fresh prefill
STEPS = {
    "mixed": MIXED,
    "fresh prefills": ([0, 0, 0, 0], [31, 32, 33, 1]),
    "decode": ([0, 30, 31, 32, 95, 7], [1, 1, 1, 1, 1, 0]),
    "long decode": ([300, 3], [1, 1]),
    "page ends": ([31, 32, 33, 63], [33, 32, 31, 2]),
}
K_SCALE, V_SCALE = 0.05, 0.02


def rounded(x: np.ndarray, dtype: str) -> np.ndarray:
    """float32, of values that the dtype has."""
    import torch

    to = {"fp16": torch.float16, "bf16": torch.bfloat16}[dtype]
    return torch.from_numpy(x).to(to).float().numpy()


def to_e4m3(x: np.ndarray, scale: float) -> np.ndarray:
    """E4M3 bits of x / scale, saturated, by torch."""
    import torch

    with np.errstate(over="ignore"):
        scaled = torch.from_numpy(np.clip(x / np.float32(scale), -448, 448))
    return scaled.to(torch.float8_e4m3fn).view(torch.uint8).numpy()


def from_e4m3(bits: np.ndarray, scale: float) -> np.ndarray:
    import torch

    return torch.from_numpy(bits).view(torch.float8_e4m3fn).float().numpy() * np.float32(scale)


def make_step(a: Attention, dtype: str, past: list[int], new: list[int]) -> dict[str, np.ndarray]:
    """Random tensors; cache slots without a past token are NaN."""
    rng = np.random.default_rng(sum(past) + sum(new) + a.head_dim)
    tokens, blocks = sum(new), 26
    free = rng.permutation(blocks).tolist()
    lengths = [p + n for p, n in zip(past, new, strict=True)]
    tables = [[free.pop() for _ in range(-(-length // spec.BLOCK_SIZE))] for length in lengths]

    def normal(*size: int) -> np.ndarray:
        return rounded(rng.standard_normal(size, dtype=np.float32), dtype)

    step = {
        "query": normal(tokens, a.num_heads * a.head_dim),
        "key": normal(tokens, a.num_kv_heads * a.head_dim),
        "value": normal(tokens, a.num_kv_heads * a.v_head_dim),
        "key_cache": normal(blocks, a.num_kv_heads, spec.BLOCK_SIZE, a.head_dim),
        "value_cache": normal(blocks, a.num_kv_heads, spec.BLOCK_SIZE, a.v_head_dim),
        "query_start": np.cumsum([0, *new]).astype(np.int32),
        "past_lengths": np.array(past, np.int32),
        "block_indices": np.array([block for table in tables for block in table], np.int32),
        "block_begins": np.cumsum([0, *map(len, tables)]).astype(np.int32),
    }
    used = np.zeros((blocks, spec.BLOCK_SIZE), bool)
    for table, length in zip(tables, past, strict=True):
        for n in range(length):
            used[table[n // spec.BLOCK_SIZE], n % spec.BLOCK_SIZE] = True
    for name in ("key_cache", "value_cache"):
        step[name].swapaxes(1, 2)[~used] = np.nan
    if a.sinks:
        step["sinks"] = rng.standard_normal(a.num_heads, dtype=np.float32)
    return step


def expected(
    a: Attention, dtype: str, kv_dtype: str | None, step: dict[str, np.ndarray]
) -> tuple[np.ndarray, np.ndarray, dict[str, np.ndarray]]:
    """The reference's output, how far off it a kernel may be, and the caches that must come out.

    The inputs are the same numbers in both, an FP8 cache included. A kernel rounds each softmax weight to the
    dtype (relative error u of what |values| contribute) and the output once more; sums are float32 (2**-15
    covers 256 products and exp2), and float16 weights below 2**-14 lose at most 2**-25 each.
    """
    step = {name: array.copy() for name, array in step.items()}
    if kv_dtype == FP8:
        for name, scale in (("key", K_SCALE), ("value", V_SCALE)):
            step[name] = from_e4m3(to_e4m3(step[name], scale), scale)
            cache = step[f"{name}_cache"]
            step[f"{name}_cache"] = from_e4m3(to_e4m3(cache, scale), scale)
    options: dict[str, Any] = {
        "num_heads": a.num_heads, "num_kv_heads": a.num_kv_heads, "scale": a.head_dim**-0.5,
        "window": a.window, "softcap": a.softcap,
    }  # fmt: skip
    absolute = {name: np.abs(x) if name.startswith("value") else x.copy() for name, x in step.items()}
    answer = reference.paged_attention(**step, **options)
    reach = reference.paged_attention(**absolute, **options)
    u = ROUNDING[dtype]
    return answer, u * np.abs(answer) + (u + 2**-15) * reach + 1e-5, step


Run = Callable[..., dict[str, np.ndarray]]


@pytest.fixture(scope="module")
def interpret() -> Iterator[Run]:
    """Runs a step in a process where Triton interprets."""
    if no_triton:
        pytest.skip("the kernels need triton and torch")
    paths = [str(Path(__file__).parents[1]), *filter(None, [os.environ.get("PYTHONPATH")])]  # for `support`
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join(paths)}
    process = subprocess.Popen(
        [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment
    )
    assert process.stdin is not None
    assert process.stdout is not None

    def run(*request: Any) -> dict[str, np.ndarray]:
        pickle.dump(request, process.stdin)
        process.stdin.flush()  # type: ignore[union-attr]
        result = pickle.load(process.stdout)
        if isinstance(result, str):
            pytest.fail(result)
        return result

    yield run
    process.stdin.close()
    assert process.wait(600) == 0


def main() -> None:
    """Serves `interpret`: steps on stdin, outputs and caches on stdout."""
    import traceback

    answers, sys.stdout = sys.stdout.buffer, sys.stderr
    while True:
        try:
            request = pickle.load(sys.stdin.buffer)
        except EOFError:
            return
        try:
            result: Any = _interpret(*request)
        except Exception:
            result = traceback.format_exc()
        pickle.dump(result, answers)
        answers.flush()


def _interpret(
    a: Attention,
    dtype: str,
    kv_dtype: str | None,
    step: dict[str, np.ndarray],
    num_splits: int | None = None,
    sm: int = 80,
) -> dict[str, np.ndarray]:
    import torch

    from support.triton_interpreter import run_attention

    model = {"fp16": torch.float16, "bf16": torch.bfloat16}[dtype]
    tensors = {name: torch.from_numpy(array) for name, array in step.items()}
    for name in ("query", "key", "value"):
        tensors[name] = tensors[name].to(model)
    for name, scale in (("key_cache", K_SCALE), ("value_cache", V_SCALE)):
        if kv_dtype == FP8:
            tensors[name] = torch.from_numpy(to_e4m3(step[name], scale).copy())
        else:
            tensors[name] = tensors[name].to(model)
    tokens = int(step["query_start"][-1])
    tensors["output"] = torch.full((tokens, a.num_heads * a.v_head_dim), float("nan"), dtype=model)
    plan = launch.plan(
        a, dtype, kv_dtype, step["query_start"], step["past_lengths"],
        sm=sm, multiprocessors=8, num_splits=num_splits,
    )  # fmt: skip
    scales = {"k_scale": K_SCALE, "v_scale": V_SCALE} if kv_dtype == FP8 else {}
    run_attention(a, dtype, kv_dtype, plan, tensors, scale=a.head_dim**-0.5, sm=sm, **scales)
    result = {"output": tensors["output"].float().numpy()}
    for name, scale in (("key_cache", K_SCALE), ("value_cache", V_SCALE)):
        cache = tensors[name].numpy() if kv_dtype == FP8 else tensors[name].float().numpy()
        result[name] = from_e4m3(cache, scale) if kv_dtype == FP8 else cache
    return result


def check(
    run: Run, a: Attention, dtype: str, kv_dtype: str | None, step: dict[str, np.ndarray],
    num_splits: int | None = None, sm: int = 80,
) -> None:  # fmt: skip
    answer, bound, caches = expected(a, dtype, kv_dtype, step)
    got = run(a, dtype, kv_dtype, step, num_splits, sm)
    excess = np.abs(got["output"] - answer) / bound
    assert np.isfinite(excess).all(), "a poisoned slot was read, or an output not written"
    assert excess.max() <= 1, f"{excess.max():.2f} times the bound"
    for name in ("key_cache", "value_cache"):
        assert np.array_equal(got[name], caches[name], equal_nan=True), name


@pytest.mark.parametrize(("shape", "dtypes"), sampled(SHAPES, DTYPES, every=5))
def test_a_mixed_step_is_the_reference(interpret: Run, shape: str, dtypes: str) -> None:
    a, (dtype, kv_dtype) = SHAPES[shape], DTYPES[dtypes]
    check(interpret, a, dtype, kv_dtype, make_step(a, dtype, *MIXED), num_splits=2)


@pytest.mark.parametrize("dtypes", ["fp16-fp8", "bf16-fp8"])
def test_gpus_with_an_fp8_conversion_read_the_same(interpret: Run, dtypes: str) -> None:
    a, (dtype, kv_dtype) = SHAPES["everything"], DTYPES[dtypes]
    check(interpret, a, dtype, kv_dtype, make_step(a, dtype, *MIXED), sm=90)


@pytest.mark.parametrize(
    ("shape", "dtypes"),
    sampled(
        ["grouped", "odd heads", "narrow values", "one kv head", "softcap", "largest heads"], DTYPES, every=5
    ),
)
def test_prefills_with_the_tiles_of_sm90_are_the_reference(interpret: Run, shape: str, dtypes: str) -> None:
    """No tile before the diagonal, one, several, and the whole of one sequence's blocks."""
    a, (dtype, kv_dtype) = SHAPES[shape], DTYPES[dtypes]
    check(interpret, a, dtype, kv_dtype, make_step(a, dtype, [200, 0, 63, 126], [20, 90, 2, 2]), sm=90)


# Each step with one of two shapes is fast.
@pytest.mark.parametrize(
    ("shape", "step"),
    [
        pytest.param(shape, step, marks=pytest.mark.slow if (number + other) % 2 else ())
        for number, step in enumerate(name for name in STEPS if name != "mixed")
        for other, shape in enumerate(("grouped", "everything"))
    ],
)
def test_other_steps_are_the_reference(interpret: Run, shape: str, step: str) -> None:
    a = SHAPES[shape]
    check(interpret, a, "fp16", None, make_step(a, "fp16", *STEPS[step]))


@pytest.mark.parametrize(("shape", "num_splits"), sampled(["grouped", "everything"], [1, 2, 5, 17], every=3))
def test_any_number_of_splits_gives_the_reference(interpret: Run, shape: str, num_splits: int) -> None:
    a = SHAPES[shape]
    check(interpret, a, "fp16", None, make_step(a, "fp16", [300, 3, 64], [1, 1, 1]), num_splits)


def test_padding_without_blocks_changes_nothing(interpret: Run) -> None:
    """A captured step is filled up with sequences that have neither past nor new tokens."""
    a = SHAPES["grouped"]
    step = make_step(a, "fp16", [70, 0, 31, 0], [1, 0, 40, 0])
    check(interpret, a, "fp16", None, step)
    padded = {name: array.copy() for name, array in step.items()}
    for name in ("query_start", "past_lengths", "block_begins"):
        step[name] = np.delete(step[name], [1, 3])
    padded_answer, answer = (expected(a, "fp16", None, each)[0] for each in (padded, step))
    assert np.array_equal(padded_answer, answer)


def test_sequences_may_share_prefix_blocks(interpret: Run) -> None:
    a = SHAPES["grouped"]
    step = make_step(a, "fp16", [32, 32, 32], [3, 1, 2])
    begins = step["block_begins"]
    step["block_indices"][begins[1:3]] = step["block_indices"][0]  # all read the first one's first block
    check(interpret, a, "fp16", None, step)


def test_blocks_that_a_window_has_left_behind_are_not_read(interpret: Run) -> None:
    a = SHAPES["window"]
    step = make_step(a, "fp16", [100, 130], [1, 9])
    answer, bound, _ = expected(a, "fp16", None, step)
    poisoned = int(np.setdiff1d(np.arange(26), step["block_indices"])[0])  # all NaN
    step["block_indices"][step["block_begins"][0] : step["block_begins"][0] + 2] = (
        poisoned  # 0..63, of 77..100
    )
    step["block_indices"][step["block_begins"][1] : step["block_begins"][1] + 3] = (
        poisoned  # 0..95, of 107..138
    )
    got = interpret(a, "fp16", None, step, 2)["output"]
    assert (np.abs(got - answer) <= bound).all()


@pytest.mark.parametrize("sm", [80, 90])
def test_bfloat16_queries_of_any_size_meet_fp8_caches(interpret: Run, sm: int) -> None:
    """Beyond what float16 has: rows from 2**3 down to 2**-120, columns apart by 2**-20, a row of zeros."""
    a = SHAPES["grouped"]
    step = make_step(a, "bf16", [70, 31], [40, 1])
    step["query"] *= np.float32(2.0) ** (3 - 3 * np.arange(41, dtype=np.float32))[:, None]
    step["query"][:, ::2] *= np.float32(2.0**-20)
    step["query"][5] = 0
    check(interpret, a, "bf16", FP8, step, sm=sm)


@pytest.mark.parametrize(("dtype", "sm"), sampled(["fp16", "bf16"], [80, 90], every=3))
def test_fp8_caches_round_every_number_as_torch_does(interpret: Run, dtype: str, sm: int) -> None:
    """All numbers of the dtype but NaN, as E4M3 bits in the cache, and one token's values read back."""
    import torch

    every = torch.arange(65536, dtype=torch.int32).to(torch.int16)
    numbers = every.view(torch.float16 if dtype == "fp16" else torch.bfloat16).float().numpy()
    numbers = np.nan_to_num(numbers, nan=1.0).reshape(64, 1024)
    a = Attention(8, 8, 128, 128)
    step = make_step(a, dtype, [0, 0], [64, 1])
    step["key"][:64] = step["value"][:64] = numbers
    codes = from_e4m3(np.arange(256).astype(np.uint8), V_SCALE)
    step["value"][64, :256] = rounded(np.nan_to_num(codes, nan=1.0), dtype)
    got = interpret(a, dtype, FP8, step, None, sm)
    alone = from_e4m3(to_e4m3(step["value"][64], V_SCALE), V_SCALE)  # its softmax is 1
    assert np.array_equal(got["output"][64], rounded(alone, dtype))
    table = step["block_indices"][:2]
    for name, scale in (("key_cache", K_SCALE), ("value_cache", V_SCALE)):
        rows = np.concatenate([got[name][block] for block in table], axis=1).swapaxes(0, 1).reshape(64, 1024)
        assert np.array_equal(rows, from_e4m3(to_e4m3(numbers, scale), scale))


# Plans: no triton needed.


@pytest.mark.parametrize("sm", [90, 100])
@pytest.mark.parametrize("kernel", ["prefill", "decode"])
def test_keys_and_values_are_swizzled_alike(kernel: str, sm: int) -> None:
    """ptxas 12.8 computes a wrong address for values of 32 bytes a row after keys of 64."""
    for head_dim, v_head_dim in itertools.product((8, 32, 40, 96, 256), repeat=2):
        v = launch.variant(kernel, Attention(4, 2, head_dim, v_head_dim), "fp16")
        sizes = launch.configure(v, sm).constants
        keys, values = (min(128, 2 * sizes[name]) for name in ("HEAD_DIM_PAD", "V_HEAD_DIM_PAD"))
        assert keys == values
        assert head_dim <= sizes["HEAD_DIM_PAD"]
        assert v_head_dim <= sizes["V_HEAD_DIM_PAD"]


def test_long_fp8_caches_are_split_among_more_programs() -> None:
    def found(sequences: int, context: int, kv_dtype: str | None) -> int:
        return launch.splits(sequences, 8, context, 132, kv_dtype)

    assert [found(8, 32768, kv_dtype) for kv_dtype in (None, FP8)] == [5, 20]
    assert [found(8, 8192, kv_dtype) for kv_dtype in (None, FP8)] == [5, 8]
    assert [found(8, 1024, kv_dtype) for kv_dtype in (None, FP8)] == [5, 5]
    assert [found(64, 32768, kv_dtype) for kv_dtype in (None, FP8)] == [1, 1]


def test_a_plan_launches_only_what_the_step_has() -> None:
    a = SHAPES["grouped"]

    def kernels(past: list[int], new: list[int], **options: Any) -> list[str]:
        starts = np.cumsum([0, *new])
        made = launch.plan(a, "bf16", None, starts, np.array(past), sm=90, multiprocessors=132, **options)
        return [one.variant.kernel for one in made.launches]

    assert kernels([0], [40]) == ["write_kv", "prefill"]
    assert kernels([40], [1]) == ["write_kv", "decode"]
    assert kernels([4000], [1]) == ["write_kv", "decode", "reduce"]
    assert kernels([4000, 0], [1, 9]) == ["write_kv", "prefill", "decode", "reduce"]
    assert kernels([4000, 0], [1, 0], num_splits=1) == ["write_kv", "decode"]


def test_scratch_is_what_the_splits_write() -> None:
    a = SHAPES["wide keys"]
    made = launch.plan(a, "bf16", None, np.array([0, 1, 2]), np.array([9000, 3]), sm=80, multiprocessors=108)
    assert made.num_splits == 54  # 2 * 108 programs wanted, 4 without splits; 9001 keys, at least 128 each
    assert made.scratch["partial_sums"] == (2, 4, 54, 32)
    assert made.scratch_bytes == 4 * 2 * 4 * 54 * (32 + 2)


@pytest.mark.parametrize("tokens", [1, 5, 18, 32, 128])
def test_every_token_has_a_tile(tokens: int) -> None:
    """The numbering of tiles that the kernels and the grid agree on: none missed, none past the grid."""
    rng = np.random.default_rng(tokens)
    for _ in range(50):
        new = rng.integers(0, 90, rng.integers(1, 9))
        starts = np.cumsum([0, *new])
        first = starts[:-1] // tokens + np.arange(len(new))
        assert (np.diff(first) > 0).all()
        ends = np.append(first[1:], starts[-1] // tokens + len(new))
        assert ((ends - first) * tokens >= new).all()


def test_variants_are_listed_once() -> None:
    layers = [Attention(8, 4, 256, 256, softcap=50.0), Attention(8, 4, 256, 256, window=9, softcap=50.0)] * 13
    names = [str(v) for v in launch.variants_for(layers, [("bf16", None)])]
    assert names == [
        "write_kv-bf16-h4x1d256",
        "prefill-bf16-h4x2d256-softcap",
        "decode-bf16-h4x2d256-softcap",
        "reduce-bf16-h4x2d256",
        "prefill-bf16-h4x2d256-window-softcap",
        "decode-bf16-h4x2d256-window-softcap",
    ]


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (lambda: Attention(6, 4, 64, 64), "do not share"),
        (lambda: Attention(65, 1, 64, 64), "more than 64"),
        (lambda: Attention(4, 4, 576, 512), "1 to 256"),
        (lambda: launch.variant("prefill", SHAPES["plain"], "fp32"), "fp16, bf16"),
        (lambda: launch.variant("prefill", SHAPES["plain"], "fp16", "bf16"), "choose fp16 or fp8"),
        (lambda: launch.configure(launch.variant("prefill", SHAPES["plain"], "fp16"), 75), "SM80, SM86"),
    ],
)
def test_what_is_not_supported_is_refused_by_name(wrong: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        wrong()


# Compilation.

compiles = pytest.mark.skipif(
    "TRITON_INTERPRET" in os.environ, reason="TRITON_INTERPRET: nothing is compiled"
)
QUICK = [
    *launch.variants_for([Attention(64, 8, 64, 64, window=128, sinks=True)], [("bf16", FP8)]),
    *launch.variants_for([Attention(8, 4, 256, 256, softcap=50.0)], [("fp16", None)])[1:3],
]


@compiles
@pytest.mark.parametrize(("sm", "half"), [(SMS[0], 0), (SMS[-2], 1)])
def test_kernels_compile_without_a_gpu_and_fit(sm: int, half: int, tmp_path: Path) -> None:
    from llmc.plugins.paged_attention.compile_kernels import compile_variant

    for variant in QUICK[half::2]:
        look_at(compile_variant(variant, sm, tmp_path), variant, sm)


@compiles
@pytest.mark.slow
@pytest.mark.parametrize("sm", SMS)
def test_kernels_of_common_shapes_compile_and_fit(
    sm: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each variant for an older and a newer SM. benchmarks/kernel_table.py compiles them for all."""
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "benchmarks"))
    from kernel_table import BF16, COMMON, FP16  # type: ignore[import-not-found]

    from llmc.plugins.paged_attention.compile_kernels import compile_variant

    variants = launch.variants_for(COMMON.values(), BF16 + FP16)
    mine = [one for number, one in enumerate(variants) if number % 3 == SMS.index(sm) % 3]
    assert {one.kernel for one in mine} == set(launch.ARGUMENTS)
    for variant in mine:
        look_at(compile_variant(variant, sm, tmp_path), variant, sm)


@compiles
def test_the_kernels_constants_are_those_of_the_contract() -> None:
    from llmc.plugins.paged_attention import kernels

    assert kernels.BLOCK.value == spec.BLOCK_SIZE
    assert kernels.E4M3_MAX.value == spec.E4M3_MAX


def look_at(kernel: Any, variant: launch.Variant, sm: int) -> None:
    suffix = "a" if sm >= 90 else ""
    assert kernel.name == variant.kernel
    assert kernel.cubin.startswith(b"\x7fELF")
    assert f".target sm_{sm}{suffix}".encode() in kernel.ptx
    assert kernel.shared_memory <= SHARED_LIMIT[sm]
    assert 0 < kernel.registers <= 255
    assert f".reqntid {32 * kernel.num_warps}".encode() in kernel.ptx
    # The signature and the two scratch pointers that Triton appends are the kernel's parameters.
    assert kernel.ptx.split(b")")[0].count(b".param") == len(kernel.signature) + 2
    for data in (kernel.ptx, kernel.cubin):
        assert str(Path(launch.__file__).parent).encode() not in data, "the build machine's paths"


@compiles
def test_compiled_kernels_are_cached_by_content(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from llmc.plugins.cuda import compile as cuda_compile
    from llmc.plugins.paged_attention import kernels
    from llmc.plugins.paged_attention.compile_kernels import compile_variant

    def key(v: launch.Variant, sm: int) -> str:
        function, config = getattr(kernels, v.kernel), launch.configure(v, sm)
        return cuda_compile.cache_key(function, str(v), launch.signature(v), config, sm)

    variant = QUICK[0]
    first = compile_variant(variant, 80, tmp_path / "a")
    again = compile_variant(variant, 80, tmp_path / "b")
    assert first == again  # byte for byte, compiled twice
    other = replace(variant, num_kv_heads=2)
    keys = {key(v, sm) for v in (variant, other) for sm in SMS}
    assert len(keys) == 2 * len(SMS)

    def refuse(*_: Any) -> None:
        raise AssertionError("compiled again")

    with monkeypatch.context() as patch:
        patch.setattr(cuda_compile, "_compile", refuse)
        assert compile_variant(variant, 80, tmp_path / "a") == first
    damaged = tmp_path / "a" / f"{key(variant, 80)}.cubin"
    damaged.write_bytes(b"\x7fELF")
    assert compile_variant(variant, 80, tmp_path / "a") == first
    assert damaged.read_bytes() == first.cubin
    with monkeypatch.context() as patch:
        patch.setattr(cuda_compile, "_compile", lambda *_: first)
        assert compile_variant(variant, 80, None) == first  # no home directory
        (tmp_path / "file").write_text("where the cache should be")
        assert compile_variant(variant, 80, tmp_path / "file" / "kernels") == first
        assert [path.name for path in tmp_path.iterdir() if path.is_file()] == ["file"]


if __name__ == "__main__":
    main()
