"""What each rank needs and exchanges: planned, in a bundle, and in real ranks; and the GPUs that hold it."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from llmc.cli import main
from llmc.compiler import driver
from llmc.compiler.bundle_ranks import ranks_of
from llmc.compiler.driver import plan_build
from llmc.compiler.plan import BuildPlan
from llmc.compiler.rank_plan import CARDS, Exchange, RankPlan, gpu_sizes, memory_needed, tp_choices
from llmc.compiler.request import AUTO, BuildRequest, parse_memory, parse_tp
from llmc.compiler.targets.tensorrt import build, target
from llmc.compiler.verify.load import load
from llmc.plugins.collectives.spec import ALL_GATHER, ALL_REDUCE, SEND
from llmc.runtime.backends.base import EngineFile, LoadOptions
from llmc.runtime.batch import Batch
from llmc.runtime.bundle.manifest import Geometry, Layer
from llmc.runtime.bundle.reader import Bundle
from llmc.runtime.errors import BuildError
from llmc.runtime.parallel.threads import ThreadCommunicator

Checkpoint = Callable[[str], Path]
RANK = RankPlan(0, 0, 4, 8, 2, 10 * 10**9, 32 * 1000, 10**9)
STEP = Batch.pack([([5, 6, 7], 0, [0], True), ([9, 8], 0, [1], True)])


def without_tensorrt(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let plans be made where TensorRT is not installed."""
    monkeypatch.setattr(build, "is_installed", lambda library: True)
    monkeypatch.setattr(target, "version", lambda library: "1")


def test_a_bundle_has_the_ranks_of_its_plan(
    checkpoint: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Four ranks run a step of five tokens and two rows of logits."""
    given: dict[tuple[int, str], list[int]] = {}

    def count(method: str, operation: str) -> None:
        original = getattr(ThreadCommunicator, method)

        def counted(self: Any, array: np.ndarray, *more: Any) -> None:
            given.setdefault((self._number, operation), []).append(array.nbytes)
            original(self, array, *more)

        monkeypatch.setattr(ThreadCommunicator, method, counted)

    for method, operation in (("all_reduce", ALL_REDUCE), ("all_gather", ALL_GATHER), ("send", SEND)):
        count(method, operation)
    request = BuildRequest(
        str(checkpoint("llama-tiny")), tmp_path / "x.llmc", tp=2, pp=2, kv_dtype="int8", verify=False
    )
    plans: list[BuildPlan] = []

    def planned(*arguments: Any) -> Any:
        made = plan_build(*arguments)
        plans.append(made[0])
        return made

    monkeypatch.setattr(driver, "plan_build", planned)
    bundle = Bundle.open(driver.compile_model(request).path)
    (plan,) = plans
    assert ranks_of(bundle) == plan.ranks
    assert [(rank.first, rank.stop, rank.num_heads, rank.num_kv_heads) for rank in plan.ranks] == [
        (0, 1, 2, 1),
        (0, 1, 2, 1),
        (1, 2, 2, 1),
        (1, 2, 2, 1),
    ]
    blocks = 3
    backend = load(EngineFile.of(bundle), blocks, 4, 2)
    assert backend.forward(STEP).shape == (2, 384)
    for rank, loaded in zip(plan.ranks, backend._ranks, strict=True):  # type: ignore[attr-defined]
        executor = loaded.executor
        assert rank.weight_bytes == sum(array.nbytes for array in executor._weights.values())
        assert rank.kv_bytes(32 * blocks) == len(executor._cache) - 64
        assert rank.activation_bytes == len(executor._arena) - (1 << 16)
        found = {each.operation: each for each in rank.exchanges}
        calls = {operation: sizes for (number, operation), sizes in given.items() if number == rank.rank}
        assert found.keys() == calls.keys()
        for operation, each in found.items():
            assert each.token_bytes is not None and each.logits_bytes is not None  # noqa: PT018
            assert (each.count, 5 * each.token_bytes + 2 * each.logits_bytes) == (
                len(calls[operation]),
                sum(calls[operation]),
            )
    backend.close()  # type: ignore[attr-defined]
    given.clear()
    greedy = load(EngineFile.of(bundle), blocks, 4, 2)
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda rank: rank.begin_sampled(STEP, 1), greedy._ranks))  # type: ignore[attr-defined]
    greedy.close()  # type: ignore[attr-defined]
    sent = [sum(given.get((rank, name), [0])[-1] for name in (ALL_GATHER, SEND)) for rank in range(4)]
    assert [rank.greedy_bytes for rank in plan.ranks] == [None, None, 24, 12]
    assert sent[2:] == [2 * 24, 2 * 12]


@pytest.mark.parametrize(
    ("tp", "options", "choices"),
    [
        (3, {}, [3]),  # whatever it is: the passes refuse it
        (AUTO, {}, [1, 2, 4, 8, 24]),
        (AUTO, {"pp": 64}, [1, 2, 4]),  # at most 256 ranks
    ],
)
def test_the_numbers_of_ranks_that_auto_tries(tp: Any, options: dict[str, int], choices: list[int]) -> None:
    """24 heads of queries, and 8 KV heads, which 3, 6 and 12 ranks would divide unequally."""
    layers = (Layer("full", 0, 8, 64, 64),) * 2
    geometry = Geometry(2, 24, 8, 64, 64, 1536, 1000, layers)
    request = BuildRequest("c", Path("x.llmc"), tp=tp, rank_memory=1, **options)
    assert tp_choices(request, geometry) == choices


def test_what_a_gpu_holds() -> None:
    """The verdict about a size of GPU is that about the same memory."""
    for sm, names in ((89, {"L4", "RTX 4090"}), (90, {"H100", "H200"}), (120, {"RTX 5090"})):
        found = gpu_sizes([RANK], 4096, (sm,))
        assert names <= {name for gpu in found for name in gpu.cards}
        assert sum(len(gpu.cards) for gpu in found) == sum(card.sm == sm for card in CARDS)
    for weights in range(10**9, 240 * 10**9, 7 * 10**9):
        rank = replace(RANK, weight_bytes=weights)
        needed = memory_needed(rank, 4096, on_gpu=True)
        assert needed > rank.needed(4096) + max(1 << 29, 0.03 * needed) - 1  # what the runtime leaves free
        for gpu in gpu_sizes([RANK, rank], 4096, (80, 86, 89, 90, 100, 120)):
            assert gpu.fits == (gpu.gigabytes * 10**9 >= needed)
            assert gpu.fits == (gpu.kv_tokens >= 4096)
    small, large = gpu_sizes([replace(RANK, weight_bytes=39 * 10**9)], 10**6, (80,))
    assert (small.gigabytes, small.kv_tokens, small.fits) == (40, 0, False)
    assert (large.gigabytes, large.fits) == (80, True)


@pytest.mark.parametrize(
    ("text", "size"),
    [("24GB", 24 * 10**9), ("22.5GiB", 22.5 * 2**30), ("512 MB", 512 * 10**6), ("1tib", 2**40)],
)
def test_units_of_memory(text: str, size: float) -> None:
    assert parse_memory(text) == size


@pytest.mark.parametrize("text", ["24", "24G", "GB", "-1GB", "24 gigabytes", "", "1e3GB", "٢GB"])
def test_memory_without_a_unit_is_refused(text: str) -> None:
    with pytest.raises(BuildError, match="--rank-memory is") as caught:
        parse_memory(text)
    assert caught.value.argument == "rank_memory"


def test_options_that_do_not_go_together(tmp_path: Path) -> None:
    for text in ("all", "2.0", ""):
        with pytest.raises(BuildError, match="--tp is") as caught:
            parse_tp(text)
        assert caught.value.argument == "tp"
    for options, argument in (
        ({"tp": AUTO}, "rank_memory"),
        ({"rank_memory": 0}, "rank_memory"),
        ({"tp": AUTO, "rank_memory": 1, "engine": "openvino"}, "tp"),
        ({"tp": AUTO, "rank_memory": 1, "pp": 65}, "pp"),
    ):
        with pytest.raises(BuildError) as caught:
            BuildRequest("c", tmp_path / "x.llmc", **options)  # type: ignore[arg-type]
        assert caught.value.argument == argument
        assert caught.value.hint


@pytest.mark.parametrize(
    "options",
    [
        {"target": "cpu"},
        pytest.param({"target": "cpu", "pp": 2}, marks=pytest.mark.slow),
        pytest.param({"target": "tensorrt-rtx"}, marks=pytest.mark.slow),
    ],
)
def test_auto_takes_the_fewest_ranks_that_fit(
    options: dict[str, Any], checkpoint: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With steps of one token, a rank of this tiny model needs less than the whole model."""
    without_tensorrt(monkeypatch)
    monkeypatch.setattr(LoadOptions, "max_tokens", 1)
    monkeypatch.setattr(build.EngineLimits, "max_tokens", 1)
    monkeypatch.setattr(build.EngineLimits, "max_logits", 1)
    request = BuildRequest(str(checkpoint("llama-tiny")), tmp_path / "x.llmc", **options)
    needed = {}
    for tp in (1, 2, 4):
        ranks = plan_build(replace(request, tp=tp))[0].ranks
        needed[tp] = max(memory_needed(rank, 256, on_gpu=request.target != "cpu") for rank in ranks)
    assert needed[1] > needed[2] > needed[4]
    for tp, memory in needed.items():
        plan, _ = plan_build(replace(request, tp=AUTO, rank_memory=memory))
        assert (plan.resolved.tp, len(plan.ranks)) == (tp, tp * request.pp)
    with pytest.raises(BuildError, match=r"with --tp 4, rank \d needs .* GB for 256 tokens") as caught:
        plan_build(replace(request, tp=AUTO, rank_memory=needed[4] - 1))
    assert caught.value.argument == "rank_memory"
    with pytest.raises(BuildError, match=r"with --tp 2, rank \d needs") as caught:
        plan_build(replace(request, tp=2, rank_memory=needed[2] - 1))
    assert "--tp auto" in caught.value.hint


def test_tensorrt_ranks_are_planned(
    checkpoint: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In bf16: 64 features of the hidden state, 192 logits of a rank, and 256 tokens of 2 x 16 numbers."""
    without_tensorrt(monkeypatch)
    request = BuildRequest(str(checkpoint("llama-tiny")), tmp_path / "x.llmc", target="tensorrt-rtx", tp=2)
    plan, _ = plan_build(request)
    for rank in plan.ranks:
        assert rank.exchanges == (Exchange(ALL_REDUCE, 5, 5 * 64 * 2, 0), Exchange(ALL_GATHER, 1, 0, 192 * 2))
        assert rank.kv_bytes(256) == 256 * 2 * 2 * 16 * 2  # two layers of one KV head
        assert rank.activation_bytes is not None
        logits = build.EngineLimits.max_logits * 384 * 4
        assert logits < rank.activation_bytes < 100 * logits
    first, second = plan_build(replace(request, tp=1, pp=2))[0].ranks
    assert first.exchanges == (Exchange(SEND, 1, 64 * 2, 0),)
    assert second.exchanges == (Exchange(SEND, 1, 0, 384 * 4),)  # logits in fp32
    assert [(rank.first, rank.stop) for rank in (first, second)] == [(0, 1), (1, 2)]
    (whole,) = plan_build(replace(request, tp=1))[0].ranks
    assert whole.activation_bytes is not None
    for rank in (first, second):  # each layer needs as much as the other one
        assert rank.activation_bytes is not None
        assert whole.activation_bytes / 2 < rank.activation_bytes <= whole.activation_bytes
    assert sum(rank.weight_bytes for rank in plan.ranks) > plan.sizes.weight_bytes  # norms on both
    names = Counter(report.name for report in plan.passes)
    assert names["shard"] == names["factor-rotary-tables"] == names["finalize"] == 1
    assert {report.name: report.matches for report in plan.passes}["shard"] == 9
    assert all(sm in (80, 86, 89, 120) for sm in {card.sm for card in CARDS if card.name in str(plan.gpus)})


def test_the_command_line_says_what_a_rank_needs(
    checkpoint: Checkpoint,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    without_tensorrt(monkeypatch)
    output = ["build", str(checkpoint("llama-tiny")), "-o", str(tmp_path / "x.llmc")]
    command = [*output, "--tp", "auto", "--rank-memory", "24GB", "--target", "tensorrt-rtx", "--dry-run"]
    assert main.main(command) == 0
    facts, gpus, _ = capsys.readouterr().out.split("\n\n")
    assert "of KV cache for 256 tokens" in facts
    assert [line.split("  ")[0] for line in gpus.splitlines()[1:]] == [
        f"{size} GB" for size in (16, 24, 32, 40, 48, 80, 96)
    ]
    assert main.main([*command, "--tp", "2", "--json"]) == 0
    record = json.loads(capsys.readouterr().out)
    assert [gpu["gigabytes"] for gpu in record["gpus"]] == [16, 24, 32, 40, 48, 80, 96]
    first, _ = record["ranks"]
    assert first["kv_bytes"] == 256 * 2 * 2 * 16 * 2
    assert first["memory_bytes"] == first["weight_bytes"] + first["kv_bytes"] + first["activation_bytes"]
    assert main.main([*output, "--tp", "2", "--rank-memory", "1MB", "--dry-run"]) == 2
    said = capsys.readouterr()
    assert "--rank-memory is 0.001 GB" in said.err
    assert not said.out


def test_a_bundle_for_one_rank_says_what_it_needs(bundle: Callable[..., Path]) -> None:
    for engine in (None, "onnxruntime"):
        (rank,) = ranks_of(Bundle.open(bundle("llama-tiny", engine)))
        assert asdict(rank)["exchanges"] == ()
        assert (rank.first, rank.stop, rank.num_heads, rank.num_kv_heads) == (0, 2, 4, 2)
        assert rank.kv_bytes(33) == 64 * 2 * 2 * 2 * 16 * 4
        assert (rank.activation_bytes is None) == (engine is not None)
    assert LoadOptions.max_tokens == 2048
