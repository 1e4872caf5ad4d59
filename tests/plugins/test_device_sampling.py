"""Sampling beside the logits: the same tokens as from all logits, and kernels that find what it needs.

No GPU is needed, none is used. Triton decides when it is imported whether it interprets or compiles, so the
interpreted half runs in a process of its own: this file, started as a script (`main`).
"""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
import zlib
from collections.abc import Callable, Iterator
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmc.plugins.cuda.gpus import SHARED_LIMIT, SMS
from llmc.plugins.sampling import launch
from llmc.runtime.backends.base import Candidates
from llmc.runtime.batch import Batch
from llmc.runtime.engine import Engine
from llmc.runtime.errors import BackendError
from llmc.runtime.sampling import SamplingParams, candidates_needed, sample

no_triton = find_spec("triton") is None or find_spec("torch") is None
needs_triton = pytest.mark.skipif(no_triton, reason="the kernels need triton and torch")
INF, NAN = float("inf"), float("nan")


def largest(row: np.ndarray, k: int, capacity: int = launch.CAPACITY) -> np.ndarray | None:
    """What the kernels must find: ids, ascending; None where the host must look at the whole row."""
    if k == 1:
        best = row.argmax()
        return np.array([best]) if np.isfinite(row[best]) else None
    order = np.where(np.isnan(row), INF, row)  # and NaN above infinity
    ids = np.flatnonzero(order >= np.partition(order, -min(k, len(row)))[-min(k, len(row))])
    if np.isnan(row).sum() >= k:
        ids = np.flatnonzero(np.isnan(row))
    return ids if len(ids) <= capacity else None


# The same tokens.


@st.composite
def rows(draw: st.DrawFn) -> np.ndarray:
    """Few different values, so many ties; now and then infinite or not a number."""
    values = draw(st.lists(st.floats(-30, 30, width=32), min_size=1, max_size=8))
    odd = draw(st.lists(st.sampled_from([-INF, -INF, -0.0, 0.0, INF, NAN]), max_size=2))
    size, seed = draw(st.integers(1, 400)), draw(st.integers(0, 2**32 - 1))
    rng = np.random.default_rng(seed)
    row = rng.choice(np.array(values + odd, np.float32), size)
    spread = draw(st.booleans())
    return row + rng.standard_normal(size, np.float32) if spread else row


requests = st.builds(
    SamplingParams,
    temperature=st.sampled_from([0.0, 1e-30, 0.3, 1.0, 2.5]),
    top_k=st.integers(1, 60),
    top_p=st.sampled_from([1.0, 0.0, 0.3, 0.9]),
    min_p=st.sampled_from([0.0, 0.05, 0.5, 1.0]),
    seed=st.integers(0, 2**32 - 1),
)


def token(logits: np.ndarray, params: SamplingParams, ids: np.ndarray | None) -> tuple[int | str, Any]:
    """The token, or what is raised; and the generator's state afterwards."""
    rng = np.random.default_rng(params.seed)
    try:
        return sample(logits, params, [], rng, ids), rng.bit_generator.state
    except BackendError as error:
        return str(error), rng.bit_generator.state


@settings(max_examples=1000)
@given(rows(), requests, st.integers(0, 40))
def test_candidates_give_the_token_that_all_logits_give(
    row: np.ndarray, params: SamplingParams, more: int
) -> None:
    """`more`: another request of the step asked for a larger k."""
    k = candidates_needed([params], 256)
    assert k == (1 if not params.temperature else max(2, params.top_k))
    ids = largest(row, k + more)
    if ids is None:
        return
    values = row[ids] if k + more > 1 else np.zeros(1, np.float32)
    assert token(values, params, ids.astype(np.int32)) == token(row, params, None)


@pytest.mark.parametrize(
    ("asked", "needed"),
    [
        ([{}], 1),
        ([{"top_k": 9}], 1),  # of no consequence when greedy
        ([{"temperature": 1.0, "top_k": 1}], 2),
        ([{"temperature": 1.0, "top_k": 9, "top_p": 0.5, "min_p": 0.1}, {}], 9),
        ([{}, {"temperature": 0.1, "top_k": 256}], 256),
        ([{"temperature": 1.0, "top_k": 257}], 0),
        ([{"temperature": 1.0}, {}], 0),
        ([{}, {"temperature": 1.0, "top_p": 0.9}], 0),
        ([{}, {"repetition_penalty": 1.1}], 0),
        ([], 0),
    ],
)
def test_what_a_step_needs(asked: list[dict[str, Any]], needed: int) -> None:
    assert candidates_needed([SamplingParams(**one) for one in asked], 256) == needed


class HashBackend:
    """Logits follow from the newest token and its position; many of them tie."""

    name, num_blocks, block_size = "hash", 64, 4
    vocab = 90

    def forward(self, batch: Batch) -> np.ndarray:
        found = [self.row(batch.input_ids[i], batch.position_ids[i]) for i in batch.logits_index]
        return np.array(found, np.float32).reshape(-1, self.vocab)

    def row(self, *context: Any) -> np.ndarray:
        rng = np.random.default_rng(zlib.crc32(np.array(context).tobytes()))
        return rng.integers(-8, 8, self.vocab) / 2


class CandidateBackend(HashBackend):
    max_candidates = 30

    def __init__(self) -> None:
        self.asked: list[int] = []

    def forward_sampled(self, batch: Batch, k: int) -> list[Candidates]:
        self.asked.append(k)
        assert len(batch.logits_index)
        answer = []
        for row in self.forward(batch):
            ids = largest(row, k, capacity=40)
            if ids is None:
                answer.append(Candidates(None, row))
            else:
                answer.append(Candidates(ids, row[ids] if k > 1 else np.zeros(1, np.float32)))
        return answer


def generate(backend: HashBackend, options: list[dict[str, Any]]) -> list[tuple[int, ...]]:
    engine = Engine(backend, None, (), 64, 16, 4, vocab_size=backend.vocab)
    rng = np.random.default_rng(0)
    prompts = [rng.integers(0, backend.vocab, length).tolist() for length in range(1, 40, 6)]
    params = [SamplingParams(max_tokens=9, **options[i % len(options)]) for i in range(len(prompts))]
    return [output.token_ids for output in engine.generate(prompts, params)]


SAMPLED = {"temperature": 1.0, "top_k": 7, "top_p": 0.9, "seed": 3}


@pytest.mark.parametrize(
    ("options", "asked"),
    [
        ([{}], {1}),
        ([SAMPLED], {7}),
        ([{"temperature": 1.0, "top_k": 1, "seed": 1}], {2}),
        ([{}, SAMPLED, {"temperature": 0.5, "top_k": 30, "seed": 5}], {1, 7, 30}),
        ([{"repetition_penalty": 1.3}], set()),
        ([{"temperature": 1.0, "seed": 4}], set()),
    ],
)
def test_an_engine_gives_the_same_tokens_from_candidates(
    options: list[dict[str, Any]], asked: set[int]
) -> None:
    backend = CandidateBackend()
    assert generate(backend, options) == generate(HashBackend(), options)
    assert set(backend.asked) <= asked
    assert bool(backend.asked) == bool(asked)
    if len(options) > 1:
        assert 30 in backend.asked


def test_a_backend_that_cannot_sample_is_not_asked_to() -> None:
    backend = CandidateBackend()
    backend.max_candidates = 0
    assert generate(backend, [{}]) == generate(HashBackend(), [{}])
    assert backend.asked == []


# The kernels, interpreted.

Run = Callable[..., list[Any]]


@pytest.fixture(scope="module")
def interpret() -> Iterator[Run]:
    """Calls `run_sampling` in a process whose Triton interprets."""
    if no_triton:
        pytest.skip("the kernels need triton and torch")
    process = subprocess.Popen(
        [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        env={**os.environ, "TRITON_INTERPRET": "1"},
    )  # fmt: skip
    assert process.stdin is not None
    assert process.stdout is not None

    def run(*request: Any) -> list[Any]:
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
    """Serves `interpret`: arguments on stdin, candidates on stdout."""
    import traceback

    import torch

    from support.triton_interpreter import run_sampling

    answers, sys.stdout = sys.stdout.buffer, sys.stderr
    while True:
        try:
            logits, *rest = pickle.load(sys.stdin.buffer)
        except EOFError:
            return
        try:
            result: Any = run_sampling(torch.from_numpy(logits), *rest)
        except Exception:
            result = traceback.format_exc()
        pickle.dump(result, answers)
        answers.flush()


def make_rows(kind: str, count: int, vocab: int) -> np.ndarray:
    rng = np.random.default_rng(vocab + count)
    rows = rng.normal(0, 3, (count, vocab)).astype(np.float32)
    rows[:, rng.integers(0, vocab, vocab // 50 + 1)] = -INF
    if kind == "half precision":
        rows = rows.astype(np.float16).astype(np.float32)
    elif kind == "ties":
        rows = np.round(rows * 4) / 4
        rows[(rows == 0) & (rng.random(rows.shape) < 0.5)] = -0.0
    elif kind == "few numbers":
        rows[rng.random(rows.shape) < 0.999] = -INF
        rows[:, vocab // 2] = 1
    elif kind == "one part":  # the largest in a row, as common tokens are in a vocabulary
        rows[:, : vocab // 9] += 30
    elif kind == "signed zeros":  # the first of the largest is -0.0
        rows = -1 - np.abs(rows)
        rows[:, vocab // 3 :: vocab // 8] = 0.0
        rows[:, vocab // 3 :: vocab // 4] = -0.0
    elif kind == "odd":
        for row, values in zip(rows, ([NAN], [INF, INF], [NAN, INF], [-NAN], [3e38, -3e38]), strict=False):
            rows_at = rng.integers(0, vocab, len(values))
            row[rows_at] = values
    elif kind == "constant":
        rows[:] = np.array([-INF, 0, -0.0, 7, NAN], np.float32)[:count, None]
    return rows


KINDS = ("plain", "half precision", "ties", "few numbers", "one part", "signed zeros", "odd", "constant")


def compare(got: list[Any], rows: np.ndarray, k: int, capacity: int = launch.CAPACITY) -> None:
    for row, answer in zip(rows, got, strict=True):
        ids = largest(row, k, capacity)
        if ids is None:
            assert answer is None
            continue
        assert answer is not None
        assert answer[0].dtype == np.int32
        np.testing.assert_array_equal(answer[0], ids)
        expected = row[ids] if k > 1 else np.zeros(1, np.float32)
        np.testing.assert_array_equal(answer[1].view(np.int32), expected.view(np.int32))  # the same bits


slow = partial(pytest.param, marks=pytest.mark.slow)


@pytest.mark.parametrize("k", [1, slow(2), slow(5), slow(50), slow(256)])
@pytest.mark.parametrize("kind", [kind if kind in ("ties", "odd") else slow(kind) for kind in KINDS])
def test_the_kernels_find_what_numpy_finds(interpret: Run, kind: str, k: int) -> None:
    """At their own sizes: three parts, the last of them not full."""
    rows = make_rows(kind, 5, 2 * launch.CHUNK + 7777)
    compare(interpret(rows, k), rows, k)


@pytest.mark.parametrize(("count", "vocab"), [(1, 1), (2, 3), (3, 53), (4, 300), (5, 999)])
def test_any_number_of_rows_and_small_vocabularies(interpret: Run, count: int, vocab: int) -> None:
    for k in (1, 2, 256):  # up to 256: all there are
        rows = make_rows("ties", count, vocab)
        compare(interpret(rows, k), rows, k)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("chunk", "capacity"), [slow(32, 16), (128, 64)])
def test_other_sizes_where_parts_lose_ties(interpret: Run, kind: str, chunk: int, capacity: int) -> None:
    """A part may give up its ties only where the row's answer does not need them."""
    rows = make_rows(kind, 5, 4 * chunk + 1)
    for k in (1, 2, 16):
        compare(interpret(rows, k, chunk, capacity), rows, k, capacity)


# Launching and compiling.


def test_grids_and_scratch_of_a_large_vocabulary() -> None:
    assert launch.launches(3, 128256, 1) == [("argmax_parts", (8, 3, 1)), ("argmax_merge", (3, 1, 1))]
    assert launch.launches(3, 128256, 2) == [("top_k_parts", (8, 3, 1)), ("top_k_merge", (3, 1, 1))]
    assert launch.parts(launch.MAX_VOCAB) == launch.MAX_PARTS
    assert launch.MAX_VOCAB >= 262_208
    assert launch.scratch(3, 128256)["part_ids"] == 3 * 8 * launch.CAPACITY * 4
    arguments = {name for types in launch.ARGUMENTS.values() for name in types}
    assert arguments - set(launch.scratch(1, 9)) == {"result", "logits", "vocab", "parts", "k"}


compiles = pytest.mark.skipif(
    no_triton or "TRITON_INTERPRET" in os.environ, reason="there is no triton, or nothing is compiled"
)


@compiles
@pytest.mark.parametrize("sm", SMS)
def test_the_kernels_compile_without_a_gpu_and_spill_nothing(sm: int, tmp_path: Path) -> None:
    from llmc.plugins.sampling.compile_kernels import compile_kernel

    for name, types in launch.ARGUMENTS.items():
        made = compile_kernel(name, sm, tmp_path)
        assert made.name == name
        assert made.cubin.startswith(b"\x7fELF")
        assert f".target sm_{sm}{'a' if sm >= 90 else ''}".encode() in made.ptx
        assert made.shared_memory <= SHARED_LIMIT[sm]
        assert made.spills == 0
        assert made.registers * 32 * made.num_warps <= 65536, "more than a multiprocessor has"
        assert made.signature == types
        assert made.ptx.split(b")")[0].count(b".param") == len(types) + 2
        for data in (made.ptx, made.cubin):
            assert str(Path(launch.__file__).parent).encode() not in data, "the build machine's paths"


@compiles
def test_compiled_kernels_are_cached_by_content(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from llmc.plugins.cuda import compile as cuda_compile
    from llmc.plugins.sampling.compile_kernels import compile_kernel

    first = compile_kernel("argmax_merge", 80, tmp_path / "a")
    assert compile_kernel("argmax_merge", 80, tmp_path / "b") == first  # byte for byte, compiled twice

    def refuse(*_: Any) -> None:
        raise AssertionError("compiled again")

    monkeypatch.setattr(cuda_compile, "_compile", refuse)
    assert compile_kernel("argmax_merge", 80, tmp_path / "a") == first
    for other in (("argmax_merge", 86), ("argmax_parts", 80)):
        with pytest.raises(AssertionError, match="compiled again"):
            compile_kernel(*other, tmp_path / "a")


@compiles
def test_a_bundle_carries_the_kernels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from llmc.compiler.progress import Silent
    from llmc.compiler.targets.base import Resolved
    from llmc.compiler.targets.tensorrt import kernels

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(kernels, "layers", lambda model: [])

    def path(file: str) -> Path:
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        return tmp_path / file

    resolved = Resolved("tensorrt-rtx", "bf16", "bf16", (86, 121))
    models: Any = [None]  # `layers` above needs none
    work: Any = SimpleNamespace(path=path)
    files = kernels.compile_into(models, resolved, work, Silent())
    assert [(f.variant, f.sm, f.kind) for f in files] == [
        (f"{name}-abi1", *code) for name in launch.ARGUMENTS for code in ((86, "cubin"), (89, "ptx"))
    ]
    assert [f.entry for f in files[::2]] == list(launch.ARGUMENTS)
    assert all((tmp_path / f.file).stat().st_size for f in files)


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[1]))  # for `support`
    main()
