"""Bundles of pipeline stages: built, verified, and run by processes. test_families.py has all families."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from llmc.cli import main
from llmc.compiler.driver import compile_model, plan_build
from llmc.compiler.request import BuildRequest
from llmc.runtime.backends.kv_cache import block_bytes
from llmc.runtime.batch import Batch
from llmc.runtime.bundle.reader import Bundle
from llmc.runtime.errors import BuildError, RankError, UnsupportedError
from llmc.runtime.load import load_engine
from llmc.runtime.native.program import Program
from llmc.runtime.native.weights import start_reading
from llmc.runtime.sampling import SamplingParams
from support.sampled import every_nth

GREEDY = SamplingParams(max_tokens=16, ignore_eos=True)
PROMPTS = [[5, 6, 7], list(range(3, 50)), [9, 8], [100, 3]]
Checkpoint = Callable[[str], Path]


def build(source: Path, path: Path, **options: Any) -> Bundle:
    request = BuildRequest(str(source), path, **{"verify": False, **options})
    return Bundle.open(compile_model(request).path)


def generated(path: Path, prompts: list[list[int]]) -> list[tuple[int, ...]]:
    engine = load_engine(path, max_batch_tokens=16, threads=1)
    try:
        return [output.token_ids for output in engine.generate(prompts, GREEDY)]
    finally:
        engine.close()


def served(path: Path) -> dict[str, tuple[tuple[int, ...], str]]:
    """Serve requests that arrive one after the other, with few blocks. Return their tokens and text."""
    blocks = block_bytes(Bundle.open(path).manifest.geometry, "fp32") * 9
    engine = load_engine(path, max_batch_tokens=24, max_sequences=6, threads=1, kv_memory=blocks)
    assert engine.backend.num_blocks == 9
    random = np.random.default_rng(7)
    shared = random.integers(3, 384, 40).tolist()  # more than a block
    results = {}
    for number in range(60):
        if number % 4 == 0 and number < 40:
            prompt = [*shared[: 40 if number % 8 else 7], *random.integers(3, 384, 5).tolist()]
            params = SamplingParams(
                max_tokens=30, ignore_eos=True, temperature=0.8 * (number % 3), seed=number, top_k=50
            )
            engine.add_request(prompt, params, f"{number}")
        if number == 22:
            assert engine.abort("20")
        for output in engine.step():
            if output.finish_reason:
                results[output.request_id] = output.token_ids, output.text
    while engine.has_unfinished:
        for output in engine.step():
            if output.finish_reason:
                results[output.request_id] = output.token_ids, output.text
    assert engine.stats.preemptions
    assert engine.stats.cached_tokens
    engine.scheduler.check()
    engine.close()
    return results


@pytest.mark.parametrize(("tp", "pp"), [(1, 2), pytest.param(2, 2, marks=pytest.mark.slow)])
def test_real_processes_generate_what_one_rank_does(
    tp: int,
    pp: int,
    checkpoint: Checkpoint,
    bundle: Callable[..., Path],
    tmp_path: Path,
) -> None:
    """Several requests, so that some are prefilled while others decode, and steps are in flight."""
    built = build(checkpoint("llama-tiny"), tmp_path / "x.llmc", tp=tp, pp=pp)
    assert generated(built.path, PROMPTS) == generated(bundle("llama-tiny"), PROMPTS)
    ones = served(bundle("llama-tiny"))
    assert served(built.path) == ones
    assert len(ones) == 9


@pytest.mark.skipif(sys.platform != "linux", reason="Linux only")
@pytest.mark.parametrize("tp", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_the_parts_of_a_long_step_give_the_same_bits(tp: int, checkpoint: Checkpoint, tmp_path: Path) -> None:
    """Two steps of two sequences: of 200 tokens, which the stages compute in parts, and of two."""
    random, ids = np.random.default_rng(4), np.random.default_rng(5).integers(0, 384, (2, 101)).tolist()
    tables = random.permutation(8).reshape(2, 4).tolist()
    first = Batch.pack((ids[s][:100], 0, tables[s], sorted({3, 40 + s, 99})) for s in (0, 1))
    second = Batch.pack((ids[s][100:], 100, tables[s], True) for s in (0, 1))
    none = Batch.pack([(ids[0][:80], 0, tables[0], False)])
    results = []
    source = checkpoint("llama-tiny")
    for pp in (1, 2):
        engine = load_engine(build(source, tmp_path / f"{pp}.llmc", tp=tp, pp=pp), threads=1)
        backend = engine.backend
        got = [backend.forward(step).copy() for step in (first, second, none, second)]
        assert [len(each) for each in got] == [6, 2, 0, 2]
        results.append(got)
        if pp == 2:
            assert backend._steps == 6 + 1 + 2 + 1  # type: ignore[attr-defined]  # 200 and 80 tokens in parts
            for k in (1, 20):
                found = backend.forward_sampled(first, k)  # type: ignore[attr-defined]
                for (tokens, kept), row in zip(found, got[0], strict=True):
                    np.testing.assert_array_equal(tokens, np.sort(np.argsort(-row)[:k]))
                    np.testing.assert_array_equal(kept, row[tokens])
            backend.submit_sampled(first, 1)  # type: ignore[attr-defined]
            backend.submit(first)  # type: ignore[attr-defined]
            backend.discard()  # type: ignore[attr-defined]
            np.testing.assert_array_equal(backend.forward(second), got[1])
        engine.close()
    for one, staged in zip(*results, strict=True):
        np.testing.assert_array_equal(one, staged)


@pytest.mark.skipif(sys.platform != "linux", reason="Linux only")
def test_a_stage_that_is_killed_ends_the_job(checkpoint: Checkpoint, tmp_path: Path) -> None:
    built = build(checkpoint("llama-tiny"), tmp_path / "x.llmc", pp=2)
    engine = load_engine(built, threads=1)
    (pid,) = engine.backend.pids  # type: ignore[attr-defined]
    engine.add_request(PROMPTS[0], GREEDY)
    engine.step()
    os.kill(pid, signal.SIGKILL)
    with pytest.raises(RankError, match=r"rank 1 was killed by signal 9 \(Killed\) in .*step 2"):
        engine.step()
    with pytest.raises(RankError, match="the ranks have ended"):
        engine.step()


def test_the_command_line_says_what_each_stage_has(
    checkpoint: Checkpoint, tmp_path: Path, fast_builds: None, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "x.llmc"
    assert main.main(["build", str(checkpoint("llama-tiny")), "-o", str(path), "--pp", "2"]) == 0
    capsys.readouterr()
    assert main.main(["inspect", str(path)]) == 0
    shown = capsys.readouterr().out
    assert "verified against transformers" in shown
    lines = {line.split("  ")[0]: line for line in shown.splitlines()}
    assert "2 stages of 1" in lines["ranks"]
    assert "layer 0," in lines["rank 0"]
    assert "layer 1," in lines["rank 1"]
    assert "256 bytes for a token to the next stage" in lines["transfers"]
    assert main.main(["inspect", str(path), "--program", "--rank", "1"]) == 0
    shown = capsys.readouterr().out
    assert "receive(peer=0, sequence=0)" in shown.splitlines()[0]
    assert "send(" in shown.splitlines()[-1]


@pytest.mark.parametrize("tp", [1, 2])
def test_tied_weights_are_stored_once(tp: int, checkpoint: Checkpoint, tmp_path: Path) -> None:
    """The first and the last stage of three or four ranks read the same file, and the others do not."""
    source = checkpoint("gemma3-tiny")
    one = build(source, tmp_path / "one.llmc", tp=tp)
    staged = build(source, tmp_path / "x.llmc", tp=tp, pp=3)
    files = {name for name in staged.manifest.weights.files if "ranks" in name}
    ends = ["ranks0+2"] if tp == 1 else ["ranks0+4", "ranks1+5"]
    assert {f"weights/packed.{end}.safetensors" for end in ends} <= files
    # What a file takes beside its tensors: the header, and gaps between them.
    added = len(staged.manifest.weights.files) - len(one.manifest.weights.files)
    assert staged.manifest.weights.bytes <= one.manifest.weights.bytes + 256 * added
    middle = staged.engine_path(tp)
    weights, _ = start_reading(middle, tp).arrays(Program.from_json(middle.read_bytes()))
    assert not any("embed_tokens" in name for name in weights)


@pytest.mark.parametrize("quant", ["int8", pytest.param("int4", marks=pytest.mark.slow)])
def test_stages_have_the_codes_of_one_rank(quant: str, checkpoint: Checkpoint, tmp_path: Path) -> None:
    source = checkpoint("qwen3-tiny")
    options: dict[str, Any] = {"quant": quant, "rounding": "nearest"}
    one = build(source, tmp_path / "one.llmc", **options)
    staged = build(source, tmp_path / "x.llmc", pp=2, **options)
    whole = arrays(one, None)
    parts: dict[str, np.ndarray] = {}
    for rank in (0, 1):
        for name, array in arrays(staged, rank).items():
            np.testing.assert_array_equal(array, whole[name])
            parts[name] = array
    assert parts.keys() == whole.keys()
    assert generated(staged.path, PROMPTS) == generated(one.path, PROMPTS)


def arrays(bundle: Bundle, rank: int | None) -> Mapping[str, np.ndarray]:
    path = bundle.engine_path(rank or 0)
    found, memory = start_reading(path, rank).arrays(Program.from_json(path.read_bytes()))
    return {name: array.copy() for name, array in found.items() if memory is not None}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("tp", "quant"), every_nth(2, (1, 2), ("int4", "int8", "fp8", "nvfp4", "mxfp4", "int8-smoothquant"))
)
def test_quantized_stages_are_verified(
    quant: str, tp: int, checkpoint: Checkpoint, tmp_path: Path, fast_builds: None
) -> None:
    """The verification compares all ranks with transformers on the same quantized weights."""
    options: dict[str, Any] = {"tp": tp, "pp": 2, "quant": quant, "verify": True}
    first = build(checkpoint("qwen3-tiny"), tmp_path / "x.llmc", **options)
    assert first.manifest.verification.status == "passed"
    if quant == "int4":
        second = build(checkpoint("qwen3-tiny"), tmp_path / "y.llmc", **options)
        assert first.manifest.files == second.manifest.files  # and the hashes in it


def test_the_plan_has_the_stages(checkpoint: Checkpoint, tmp_path: Path) -> None:
    source = str(checkpoint("llama-tiny"))
    plan, _ = plan_build(BuildRequest(source, tmp_path / "x.llmc", tp=2, pp=2))
    assert [(stage.first, stage.stop) for stage in plan.stages] == [(0, 1), (1, 2)]
    assert sum(stage.weight_bytes for stage in plan.stages) > plan.sizes.weight_bytes  # a tied table twice
    with pytest.raises(UnsupportedError, match="3 stages cannot divide the 2 layers"):
        plan_build(BuildRequest(source, tmp_path / "x.llmc", pp=3))


@pytest.mark.parametrize(
    ("options", "fact"),
    [
        ({"pp": 0}, "--pp is 0"),
        ({"pp": 65}, "--pp is 65"),
        (
            {"pp": 2, "engine": "onnxruntime"},
            "--pp is for the native engine and TensorRT, not for onnxruntime",
        ),
        ({"pp": 64, "tp": 8}, "--tp 8 and --pp 64 make 512 ranks"),
    ],
)
def test_requests_for_stages_are_checked(options: dict[str, Any], fact: str, tmp_path: Path) -> None:
    with pytest.raises(BuildError, match=fact) as caught:
        BuildRequest("c", tmp_path / "x.llmc", **options)
    assert caught.value.argument == "pp"
    assert caught.value.hint
