"""`make gpu-check` without a GPU: its plan, its comparison (on Triton's interpreter), its sums, its report.

The numbers in fabricated results are made up; no measurement is meant.
"""

from __future__ import annotations

import ctypes
import gc
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="gpu-check needs torch")
pytest.importorskip("triton", reason="gpu-check needs triton")

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))

from gpu_check import (  # noqa: E402
    aot,
    ceilings,
    correctness,
    graph,
    jit,
    parts,
    peers,
    report,
    speed,
    steps,
    tensorrt_try,
    tiles,
    tune,
)
from gpu_check import cases as planned  # noqa: E402
from gpu_check.card import Card  # noqa: E402
from gpu_check.cases import Case, Step  # noqa: E402
from gpu_check.options import Options  # noqa: E402
from gpu_check.work import Workload, visible_pairs, workloads  # noqa: E402

from llmc.plugins.cuda.gpus import SHARED_LIMIT  # noqa: E402
from llmc.plugins.paged_attention import compile_kernels, launch, reference  # noqa: E402
from llmc.plugins.paged_attention.launch import FP8  # noqa: E402
from llmc.runtime.bundle.reader import Bundle  # noqa: E402

CARD = Card("NVIDIA Made-Up 1", 90, 100, 80 << 30, 50 << 20, "driver 1.2.3, 700 W")
SMALL = Case("6/2x48/80 everything", "fp16", "mixed", planned.STEPS["mixed"])
without_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")


# The plan.


def test_every_pair_and_step_is_planned_once() -> None:
    every = planned.cases()
    assert len({str(case) for case in every}) == len(every)
    assert {(c.shape, c.dtypes) for c in every} == set(planned.PAIRS)
    assert {c.shape for c in every} == set(planned.SHAPES)
    assert {c.step_name for c in every} == set(planned.STEPS)
    assert {c.dtypes for c in every if c.attention.sinks} == set(planned.DTYPES)
    assert all(c.attention.window for c in every if c.step.forget)
    (far,) = (c for c in every if c.first_block)
    assert far.first_block * far.attention.num_kv_heads * 32 * far.attention.head_dim >= 2**31


def test_steps_cover_the_edges() -> None:
    lengths = [p + n for s in planned.STEPS.values() for p, n in zip(s.past, s.new, strict=True) if n]
    assert {1, 31, 32, 33} <= set(lengths)
    mixed = planned.STEPS["mixed"]
    kinds = {(p > 0, min(n, 2)) for p, n in zip(mixed.past, mixed.new, strict=True)}
    assert kinds == {(True, 1), (True, 2), (False, 2), (True, 0)}  # decode, chunk, fresh prefill, padding
    assert len(planned.STEPS["many"].new) > 2 * 128  # of launch._CHUNK
    for step in planned.STEPS.values():
        assert len(step.past) == len(step.new)
        assert min(step.past) >= 32 * step.shared


@pytest.mark.parametrize("count", [1, 3, 6])
def test_processes_share_the_cases_and_no_compilation(count: int) -> None:
    every = planned.cases()
    shares = [planned.share(every, index, count) for index in range(count)]
    assert sorted(map(str, every)) == sorted(str(case) for own in shares for case in own)
    pairs = [{(c.shape, c.dtypes) for c in own} for own in shares]
    assert sum(map(len, pairs)) == len(set().union(*pairs))
    assert len(planned.cases(quick=True)) < len(every) / 5


# The comparison, with launchers that are right or wrong in one way.


def ideal(case: Case) -> correctness.Launcher:
    """Writes what is expected, as a kernel without a flaw would."""

    def run(*given: Any, **_: Any) -> None:
        tensors, host = given[4], steps.make(case, 5)
        want = steps.expected(case, host)
        tensors["output"].copy_(torch.from_numpy(want.output))
        for name in steps.CACHES:
            tensors[name][case.first_block :].copy_(want.caches[name])

    return run


def verdict(case: Case, run: correctness.Launcher, repeats: int = 1) -> dict[str, Any]:
    return correctness.check(case, run, 5, device="cpu", sm=90, multiprocessors=8, repeats=repeats)


@pytest.mark.parametrize("dtypes", list(planned.DTYPES))
def test_a_kernel_without_a_flaw_passes(dtypes: str) -> None:
    for name, step in planned.STEPS.items():
        if name not in ("many", "long", "most splits", "splits"):
            case = replace(SMALL, dtypes=dtypes, step_name=name, step=step, first_block=3)
            row = verdict(case, ideal(case), repeats=2)
            assert row["status"] == "passed", row
            assert row["error / bound"] < 1


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda t: t["output"].mul_(1.01), "outside the bound"),
        (
            lambda t: t["output"][3, 100].fill_(float("nan")),
            "1 outputs not finite, the first: token 3, head 1",
        ),
        (lambda t: t["output"][:, :80].copy_(t["output"][:, 80:160].clone()), "outside the bound"),
        (lambda t: t["value_cache"][6, 1, 3, 5].fill_(0.25), "value_cache: 1 blocks differ, the first is 4"),
        (lambda t: t["key_cache"][1, 0, 0, 0].fill_(0), "key_cache: written outside the case's blocks"),
    ],
)
def test_a_flawed_kernel_fails(spoil: Any, message: str) -> None:
    case = replace(SMALL, first_block=2)

    def run(*given: Any, **options: Any) -> None:
        ideal(case)(*given, **options)
        spoil(given[4])

    row = verdict(case, run)
    assert row["status"] == "failed"
    assert message in row["error"]


def test_results_that_change_from_run_to_run_fail() -> None:
    runs = iter(range(10))

    def run(*given: Any, **options: Any) -> None:
        ideal(SMALL)(*given, **options)
        if next(runs) == 2:
            given[4]["output"].view(torch.int16)[0, 0] ^= 1  # a unit in the last place: within the bound

    row = verdict(SMALL, run, repeats=3)
    assert row["error"] == "another output when run again"


def test_unused_and_forgotten_blocks_are_poisoned() -> None:
    case = replace(SMALL, step_name="left behind", step=planned.STEPS["left behind"])
    host = steps.make(case, 1)
    table, begins = host["block_indices"].tolist(), host["block_begins"].tolist()
    gone = table[begins[0] : begins[0] + (300 - 33 + 1) // 32]
    assert len(set(gone)) == 1
    assert host["key_cache"][gone[0]].isnan().all()
    assert not host["key_cache"][table[begins[1] - 1], :, : 300 % 32].isnan().any()
    assert host["key_cache"][table[begins[1] - 1], :, 300 % 32 :].isnan().all()


INTERPRETED = """
import json, sys
sys.path[:0] = ["benchmarks", "tests"]
import gpu_check
gpu_check.use_this_checkout()
from llmc.plugins.paged_attention import launch
from gpu_check import cases, correctness
from support.triton_interpreter import run_attention
assert launch.__file__ == str(gpu_check.ROOT / "plugins/paged_attention/launch.py"), launch.__file__
for shape, dtypes, step, first_block in json.loads(sys.argv[1]):
    case = cases.Case(shape, dtypes, step, cases.STEPS[step], first_block)
    row = correctness.check(case, run_attention, 7, device="cpu", sm=90, multiprocessors=8)
    print(json.dumps(row))
"""


def test_the_kernels_pass_on_the_interpreter() -> None:
    wanted = [
        ("6/2x48/80 everything", "fp16", "left behind", 0),
        ("8/4x8", "bf16-fp8kv", "mixed", 2),
        ("4/2x32 window of one", "bf16", "shared prefix", 0),
        ("6/2x40", "fp16", "page ends", 1),
        ("8/4x8", "fp16", "decode", 0),
    ]
    done = subprocess.run(
        [sys.executable, "-c", INTERPRETED, json.dumps(wanted)],
        cwd=ROOT, env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert [row["status"] for row in rows] == ["passed"] * len(wanted), rows


# Launching: Triton's own machinery on a driver that records.


class Recorder:
    """As much of a driver as Triton needs to compile for a GPU and to believe that it launches."""

    def __init__(self, sm: int) -> None:
        self.sm, self.cubins, self.launches = sm, [], []
        self.utils = self

    def get_device_properties(self, _: int) -> dict[str, int]:
        return {"max_shared_mem": SHARED_LIMIT[self.sm]}

    def load_binary(self, name: str, cubin: bytes, *_: Any) -> tuple[Any, ...]:
        self.cubins.append(cubin)
        return object(), 1, 32, 0, 1024

    def unload_module(self, _: object) -> None:
        pass

    def launcher_cls(self, source: Any, metadata: Any) -> Any:
        return lambda *given: self.launches.append((metadata.name, given[:3]))

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, _: int) -> int:
        return 0

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", self.sm, 32)


@pytest.mark.skipif("TRITON_INTERPRET" in os.environ, reason="nothing is compiled")
@pytest.mark.parametrize("sm", [pytest.param(80, marks=pytest.mark.slow), 90])
def test_the_jit_compiles_what_is_compiled_ahead_of_time(
    sm: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from triton import knobs
    from triton.runtime.driver import driver

    recorder = Recorder(sm)
    monkeypatch.setattr(driver, "_active", recorder)
    jit.kernel.cache_clear()
    case = replace(SMALL, dtypes="bf16-fp8kv")
    host = steps.make(case, 1)
    plan = steps.plan(case, host, sm, 132)
    tensors = correctness.place(case, host, "cpu")
    with knobs.cache.scope(), knobs.compilation.scope():
        knobs.cache.dir = str(tmp_path / "triton")
        knobs.compilation.disable_line_info = True
        jit.run_compiled(
            case.attention, case.dtype, case.kv_dtype, plan, tensors, sm=sm, **steps.scales(case)
        )
    for name in launch.ARGUMENTS:  # what was compiled for this driver goes with it
        jit.kernel(name).device_caches.clear()
    jit.kernel.cache_clear()
    gc.collect()
    assert recorder.launches == [(one.variant.kernel, one.grid) for one in plan.launches]
    assert [name for name, _ in recorder.launches] == ["write_kv", "prefill", "decode", "reduce"]
    ahead = [compile_kernels.compile_variant(one.variant, sm, tmp_path / "aot") for one in plan.launches]
    assert recorder.cubins == [kernel.cubin for kernel in ahead]
    image = aot.image(plan.launches[0].variant, sm, tmp_path / "aot")
    assert image.variant == str(plan.launches[0].variant)
    assert (image.entry, image.image) == ("write_kv", ahead[0].cubin)


def test_arguments_are_bound_in_the_kernels_order() -> None:
    host = steps.make(SMALL, 1)
    tensors = correctness.place(SMALL, host, "cpu")
    plan = steps.plan(SMALL, host, 90, 132)
    bounds = jit.bind(SMALL.attention, plan, tensors, **steps.scales(SMALL))
    for bound in bounds:
        assert list(bound.arguments) == list(launch.ARGUMENTS[bound.variant.kernel])
        for name, type_ in launch.signature(bound.variant).items():
            given = bound.arguments[name]
            kind = {"i32": int, "fp32": float}.get(type_)
            assert type(given) is kind if kind else isinstance(given, torch.Tensor), name
    decode, reduce = bounds[2:]
    assert decode.arguments["partial_sums"] is reduce.arguments["partial_sums"]
    assert tuple(decode.arguments["partial_sums"].shape) == plan.scratch["partial_sums"]
    assert decode.arguments["partial_sums"].isnan().all()
    assert decode.arguments["num_splits"] == 2
    assert aot.addresses(decode)["query"] == tensors["query"].data_ptr()


def test_buffers_of_a_graph_hold_every_step() -> None:
    case = Case("64/8x64 window sinks", "bf16-fp8kv", "graph", graph.CAPTURED)
    hosts = [steps.make(case, 1), steps.make(replace(case, step=graph.REPLAYED), 2)]
    buffers = graph.make_buffers(hosts, 64 * 64, "cpu")
    for host in hosts:
        graph.fill(buffers, host)
        assert buffers["output"].isnan().all()
        for name, tensor in host.items():
            assert correctness.same_bits(buffers[name][: len(tensor)].contiguous(), tensor), name
    assert len(graph.CAPTURED.past) == len(graph.REPLAYED.past)
    assert set(graph.CAPTURED.new) == {1}


# Sums of work, counted by hand.


def test_visible_pairs() -> None:
    assert visible_pairs(0, 4) == 1 + 2 + 3 + 4
    assert visible_pairs(5, 2) == 6 + 7
    assert visible_pairs(0, 4, 2) == 1 + 2 + 2 + 2
    assert visible_pairs(5, 2, 3) == 3 + 3


def test_flops_and_bytes() -> None:
    prefill = Workload("32/8x128", "bf16", None, 1, 0, 4)
    assert prefill.flops == 32 * 10 * (128 + 128) * 2  # heads, pairs, multiply-adds a pair, FLOPs each
    decode = Workload("32/8x128", "bf16", None, 3, 63, 1)
    assert decode.bytes_read == 3 * 64 * 8 * (128 + 128) * 2 == decode.cache_bytes
    assert replace(decode, kv_dtype=FP8).bytes_read == decode.bytes_read // 2
    window = Workload("64/8x64 window sinks", "bf16", None, 2, 1023, 1)
    assert window.bytes_read == 2 * 128 * 8 * (64 + 64) * 2
    assert window.cache_bytes == 8 * window.bytes_read
    assert speed.rates(decode, 1e-6) == {"gbps": pytest.approx(decode.bytes_read / 1e3)}
    assert speed.rates(prefill, 1e-6) == {"tflops": pytest.approx(prefill.flops / 1e6)}


def test_workloads_fill_their_pages_and_are_named_once() -> None:
    every = list(workloads())
    assert len({str(w) for w in every}) == len(every)
    assert all(w.context % 256 == 0 for w in every)
    assert {w.batch for w in every if w.kind == "decode"} == {1, 8, 64, 256}
    assert set(workloads(quick=True)) < set(every)


# The peers, on the CPU.

SMALL_WORK = [Workload("32/8x128", "bf16", None, 1, 0, 256), Workload("32/8x128", "bf16", None, 2, 255, 1)]


def attend(w: Workload, t: dict[str, torch.Tensor]) -> torch.Tensor:
    """What the reference gives for a workload; writes the caches."""
    a = w.attention
    given = {
        n: x.float().numpy() if x.is_floating_point() else x.numpy() for n, x in t.items() if n != "output"
    }
    output = reference.paged_attention(
        **given, num_heads=a.num_heads, num_kv_heads=a.num_kv_heads, scale=a.head_dim**-0.5
    )
    for name in steps.CACHES:
        t[name].copy_(torch.from_numpy(given[name]))
    return torch.from_numpy(output)


def pages_of(pool: torch.Tensor, table: torch.Tensor, position_axis: int) -> torch.Tensor:
    """[heads, tokens, width] of one sequence from a paged cache."""
    return pool[table.long()].movedim(position_axis, 2).transpose(0, 1).flatten(1, 2)


def one_by_one(query: torch.Tensor, keys: list[torch.Tensor], values: list[torch.Tensor]) -> torch.Tensor:
    """query [T, H, D]; every sequence has T / len(keys) tokens, the last of its context."""
    results = []
    for q, k, v in zip(query.chunk(len(keys)), keys, values, strict=True):
        mask = torch.ones(len(q), k.shape[1], dtype=torch.bool).tril(k.shape[1] - len(q))
        given = (q.transpose(0, 1)[None], k[None], v[None])
        out = torch.nn.functional.scaled_dot_product_attention(*given, attn_mask=mask, enable_gqa=True)
        results.append(out[0].transpose(0, 1))
    return torch.cat(results)


class FakeFlashInfer:
    """Understands pages as FlashInfer documents them: HND, CSR tables, the length of the last page."""

    def __init__(self, _: torch.Tensor, layout: str, **__: Any) -> None:
        assert layout == "HND"

    def plan(self, *given: Any, causal: bool = True, **_: Any) -> None:
        *tables, heads, kv_heads, head_dim, page = given
        assert (heads, kv_heads, head_dim, page) == (32, 8, 128, 32)
        self.begins, self.indices, self.last = tables[-3:]
        assert causal

    def run(self, query: torch.Tensor, caches: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        gathered: list[list[torch.Tensor]] = [[], []]
        for s, last in enumerate(self.last.tolist()):
            table = self.indices[self.begins[s] : self.begins[s + 1]]
            length = 32 * (len(table) - 1) + last
            for held, pool in zip(gathered, caches, strict=True):
                held.append(pages_of(pool, table, 2)[:, :length])
        return one_by_one(query, *gathered)


def fake_flash_attn(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *lengths: Any, **o: Any
) -> torch.Tensor:
    """Both functions of flash-attn that are used: pages of [tokens, heads, width], a table, causal."""
    assert o["causal"]
    assert k.shape[1] == 256
    if lengths:
        starts_q, starts_k, longest_q, longest_k = lengths
        assert (int(starts_q[-1]), int(starts_k[-1])) == (longest_q, longest_k) == (256, 256)
    else:
        assert o["cache_seqlens"].tolist() == [256, 256]
    held = [[pages_of(pool, row, 1) for row in o["block_table"]] for pool in (k, v)]
    return one_by_one(q.flatten(0, -3), *held)


@pytest.mark.parametrize("w", SMALL_WORK, ids=str)
@pytest.mark.parametrize("name", list(peers.PEERS))
def test_a_peer_is_given_the_same_attention(name: str, w: Workload, monkeypatch: pytest.MonkeyPatch) -> None:
    fake = {
        "BatchDecodeWithPagedKVCacheWrapper": FakeFlashInfer,
        "BatchPrefillWithPagedKVCacheWrapper": FakeFlashInfer,
        "flash_attn_with_kvcache": fake_flash_attn,
        "flash_attn_varlen_func": fake_flash_attn,
    }
    for module in ("flashinfer", "flash_attn"):
        monkeypatch.setitem(sys.modules, module, SimpleNamespace(**fake))
    tensors = speed.make_tensors(w, 3, "cpu")
    want = attend(w, tensors)
    got = peers.PEERS[name](w, tensors)()
    assert speed.difference(got.reshape(want.shape), want) < speed._DIFFERENCE / 2
    tensors["block_indices"] = tensors["block_indices"].flip(0).contiguous()
    wrong = peers.PEERS[name](w, tensors)()
    assert speed.difference(wrong.reshape(want.shape), want) > speed._DIFFERENCE


def test_a_peer_that_is_not_there_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "flash_attn", None)
    assert peers.missing("flash-attn").startswith("ModuleNotFoundError: ")
    assert peers.missing("torch sdpa") == ""
    assert peers.cannot("torch sdpa", Workload("64/8x64 window sinks", "bf16", None, 1, 0, 256))
    assert peers.cannot("flashinfer", Workload("32/8x128", "bf16", FP8, 1, 255, 1))


def test_an_engine_that_cannot_run_is_recorded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (row,) = tensorrt_try.rows(Options(1))
    assert (row["status"], row["error"]) == ("absent", "no --engine BUNDLE was given")
    (row,) = tensorrt_try.rows(Options(1, engine=str(tmp_path / "none")))
    assert row["status"] == "failed"
    assert row["error"].startswith("BundleError: ")
    for engine, library in (("tensorrt-rtx", "tensorrt_rtx"), ("tensorrt", "tensorrt")):
        made = SimpleNamespace(manifest=SimpleNamespace(target=SimpleNamespace(engine=engine)))
        monkeypatch.setattr(Bundle, "open", lambda *_, made=made, **__: made)
        monkeypatch.setitem(sys.modules, library, None)
        (row,) = tensorrt_try.rows(Options(1, engine=str(tmp_path)))
        assert row["status"] == "absent"
        assert library in row["error"]
        monkeypatch.setitem(sys.modules, library, SimpleNamespace(__version__="1.0"))
        (row,) = tensorrt_try.rows(Options(1, engine=str(tmp_path)))
        assert row["status"] == "failed"
        assert row["library"] == f"{library} 1.0"


def test_a_workload_that_fails_leaves_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    planned = SMALL_WORK * 2
    done: list[Workload] = []

    def contest(w: Workload, *_: Any) -> Any:
        done.append(w)
        if len(done) == 1:
            raise MemoryError("none left")
        yield {"name": str(w), "status": "measured"}

    def synchronize() -> None:
        if len(done) == 3:
            raise RuntimeError("an illegal memory access")

    monkeypatch.setattr(speed, "workloads", lambda **_: planned)
    monkeypatch.setattr(speed, "current", lambda: CARD)
    monkeypatch.setattr(speed, "L2", lambda _: None)
    monkeypatch.setattr(speed, "_contest", contest)
    for name, fake in (("synchronize", synchronize), ("mem_get_info", lambda: (64 << 30, 80 << 30))):
        monkeypatch.setattr(torch.cuda, name, fake)
    found = list(speed.rows(Options(1), ("llmc",)))
    assert [row["status"] for row in found] == ["failed", "measured", "measured", "failed"]
    assert found[0]["error"] == "MemoryError: none left"
    assert found[3]["error"] == "1 workloads not run after a fault"


def test_a_ceiling_that_fails_leaves_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    def memory(_: int) -> Any:
        yield {"name": "memory, copy", "status": "measured"}
        raise MemoryError("none left")

    monkeypatch.setattr(ceilings, "_memory", memory)
    monkeypatch.setattr(ceilings, "_matmul", lambda *_: iter([{"name": "matmul", "status": "measured"}]))
    statuses = [row["status"] for row in ceilings.rows(Options(1))]
    assert statuses == ["measured", "failed", "measured", "measured"]


# The report.


def fabricated() -> dict[str, Any]:
    decode = {"kind": "decode", "workload": "decode A", "dtype": "bf16", "status": "measured"}
    prefill = {"kind": "prefill", "workload": "prefill B", "dtype": "fp16", "status": "measured"}
    done = {"status": "passed", "seconds": 1.0}
    checked = {"shape": "a|b", "dtypes": "bf16", "status": "passed", "error / bound": 0.25}
    wrong = {"status": "failed", "error": "2 outputs\noutside", "error / bound": 3.0}
    ours = {"who": "llmc", "write_seconds": 2e-6, "splits": 9}
    peer = {"who": "torch sdpa"}
    return {
        "machine": report.machine(CARD, Options(11)),
        "parts": {
            "correctness": {"status": "failed", "seconds": 2.0, "error": "stopped after 2 s", "rows": [
                {**checked, "name": "one"},
                {**checked, **wrong, "name": "two"},
            ]},
            "ceilings": {**done, "rows": [
                {"name": "copy", "status": "measured", "gbps": 2000.0},
                {"name": "read", "status": "measured", "gbps": 2500.0},
                {"name": "matmul", "status": "measured", "dtype": "fp16", "tflops": 800.0},
            ]},
            "speed": {**done, "rows": [
                {**decode, **ours, "name": "x", "seconds": 1e-5, "gbps": 1250.0},
                {**decode, **peer, "name": "y", "seconds": 2e-5, "gbps": 625.0},
                {**prefill, **ours, "name": "z", "seconds": 1e-3, "tflops": 200.0},
                {**prefill, **peer, "name": "w", "status": "absent", "error": "not asked"},
            ]},
            "FlashInfer": {"status": "absent", "seconds": 1.0, "rows": [
                {"name": "flashinfer", "status": "absent", "error": "ModuleNotFoundError: none"},
            ]},
        },
    }  # fmt: skip


def test_the_page_says_what_the_numbers_say() -> None:
    page = report.markdown(fabricated())
    lines = page.splitlines()
    assert lines[0].startswith("# NVIDIA Made-Up 1, ")
    assert "driver 1.2.3, 700 W" in page
    assert f"torch {torch.__version__}" in page
    assert "seed 11" in page
    assert "| correctness | failed | 2 | 1 failed, 1 passed |" in lines
    assert "* correctness: stopped after 2 s" in lines
    assert "* correctness, two: 2 outputs outside" in lines
    assert "| a\\|b | bf16 | 1 of 2 | 3.00 |" in lines
    assert "memory 2500 GB/s, matmul fp16 800 TFLOP/s" in lines
    assert "| decode A | 1250 (10.0) | 625 (20.0) | 50% | 2.0 | 9 |" in lines
    assert "| prefill B | 200 (1000.0) | 25% | 2.0 | 9 |" in lines
    assert "* FlashInfer, flashinfer: ModuleNotFoundError: none" in lines


def test_json_and_page_are_written_side_by_side(tmp_path: Path) -> None:
    result = fabricated()
    data, page = report.save(result, tmp_path / "gpu")
    assert json.loads(data.read_text()) == result
    assert page.read_text() == report.markdown(result)
    assert data.stem == page.stem
    assert data.name.startswith("nvidia-made-up-1-20")


def test_a_page_of_a_check_that_found_nothing() -> None:
    result = {"machine": report.machine(CARD, Options(1)), "parts": {}}
    assert "| part | status | seconds | results |" in report.markdown(result)


# Parts are processes.


@without_gpu
def test_a_part_that_fails_leaves_a_report(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from gpu_check.__main__ import _check, _parser

    arguments = _parser().parse_args(
        ["--part", "ceilings", "--part", "FlashInfer", "--output", str(tmp_path)]
    )
    arguments.time_limit = 60.0
    assert _check(CARD, Options(3, quick=True), arguments) == 1
    (written,) = tmp_path.glob("*.json")
    found = json.loads(written.read_text())["parts"]
    assert set(found) == {"ceilings", "FlashInfer"}
    assert found["ceilings"]["status"] == "failed"
    assert found["ceilings"]["rows"][0]["traceback"]
    said = capsys.readouterr()
    assert said.err.splitlines()[0].startswith("error: failed: ceilings")
    assert said.err.splitlines()[1] == f"hint: {written} says what and where"


def test_a_part_that_takes_too_long_is_stopped() -> None:
    found = parts.run_part(replace(parts.PARTS[0], processes=2, limit=1.0), Options(3), 100.0)
    assert found["status"] == "failed"
    assert found["error"] == "stopped after 1 s"
    assert parts.run_part(parts.PARTS[0], Options(3), 0.0)["error"] == "not run: no time was left"


def test_half_a_line_of_results_is_left_out(tmp_path: Path) -> None:
    file = tmp_path / "rows"
    file.write_text('{"name": "a"}\n{"name": "b"}\n{"na')
    assert parts.read_rows(file) == [{"name": "a"}, {"name": "b"}]
    assert parts.read_rows(tmp_path / "none") == []


@without_gpu
@pytest.mark.parametrize(
    "command", [["benchmarks/gpu_check"], ["-m", "benchmarks.gpu_check"]], ids=["path", "-m"]
)
def test_without_a_gpu_two_lines_say_so(command: list[str]) -> None:
    done = subprocess.run([sys.executable, *command], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stdout == ""
    first, second = done.stderr.splitlines()
    assert first == "error: there is no CUDA GPU that torch can use"
    assert second.startswith("hint: run `make gpu-check` on a machine with an NVIDIA GPU")


def test_every_element_of_a_step_is_in_the_dtype() -> None:
    host = steps.make(Case("8/4x8", "bf16-fp8kv", "x", Step((5,), (1,))), 1)
    assert host["query"].dtype == torch.bfloat16
    assert host["key_cache"].dtype == torch.uint8
    every = torch.from_numpy(np.arange(256).astype(np.uint8))
    back = steps.to_e4m3(steps.from_e4m3(every, 0.5), 0.5)
    assert torch.equal(back, every)


# The tiles that `--tune` tries.


@pytest.mark.parametrize("sm", [80, 90, 120])
def test_tiles_begin_with_the_default(sm: int) -> None:
    for v in map(tiles.variant, tiles.workloads()):
        found = tiles.tiles(v, sm)
        assert found[0].config(v, sm) == launch.configure(v, sm)
        assert len({tiles.name(v, tile) for tile in found}) == len(found) > 8


class Filled:
    """Kernels that fill the output with ones; one tile's with twos."""

    def __init__(self, *_: Any) -> None:
        self.grids: dict[str, tuple[int, ...]] = {}

    def launch(self, name: str, grid: tuple[int, ...], given: dict[str, Any], _: int) -> None:
        self.grids[name] = grid
        value = 2.0 if name.endswith("-64-32-4-2") else 1.0
        data = torch.full((64,), value, dtype=torch.bfloat16).view(torch.int16).numpy()
        ctypes.memmove(given["output"], data.ctypes.data, data.nbytes)


@pytest.fixture
def no_gpu_is_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tune, "make_tensors", lambda w, seed: speed.make_tensors(w, seed, "cpu"))
    monkeypatch.setattr(tune, "difference", lambda a, b: speed.difference(a.flatten()[:64], b.flatten()[:64]))
    monkeypatch.setattr(tune, "L2", lambda _: None)
    monkeypatch.setattr(tune.jit, "run", lambda *_: None)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: SimpleNamespace(cuda_stream=0))
    times = iter(range(1000, 0, -1))  # later ones are faster

    def seconds(call: Any, **_: Any) -> float:
        call()
        return next(times) / 1e6

    monkeypatch.setattr(tune, "seconds", seconds)


@pytest.mark.usefixtures("no_gpu_is_needed")
def test_candidates_are_sorted_and_wrong_ones_told() -> None:
    w = Workload("32/8x64", "bf16", None, 1, 0, 256)
    v = tiles.variant(w)
    known: Any = SimpleNamespace(registers=99, spills=0, shared_memory=1)
    made = dict.fromkeys(tiles.tiles(v, 90), known)
    kernels = Filled()
    found = tune.measure(w, kernels, made, CARD, 3, None)  # type: ignore[arg-type]
    assert len(found) == len(made)
    times = [row["seconds"] for row in found[:-1]]
    assert times == sorted(times)
    assert found[-1]["error"] == "ValueError: differs from the default by 1, relative"
    assert [row["rows"] for row in found if row["default"]] == [128]
    assert kernels.grids["prefill-64-128-8-2"] == (256 // (64 // 4) + 1, 8, 1)
    w = Workload("32/8x64", "bf16", FP8, 1, 8191, 1)
    made = dict.fromkeys(tiles.tiles(tiles.variant(w), 90), known)
    found = tune.measure(w, Filled(), made, CARD, 3, None)  # type: ignore[arg-type]
    assert {row["splits"] for row in found} == {25, 1, 12, 50}
    assert len(found) == len(made) + 3 * 5


@pytest.mark.usefixtures("no_gpu_is_needed")
def test_tuning_compiles_and_writes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("cuda.bindings")
    from llmc.plugins.cuda import kernel

    w = Workload("32/8x64", "bf16", None, 1, 31, 1)
    monkeypatch.setattr(kernel, "Kernels", Filled)
    monkeypatch.setattr(tune, "workloads", lambda: [w])
    monkeypatch.setattr(tune, "tiles", lambda v, sm: tiles.tiles(v, sm)[:2])
    assert tune.run(CARD, 3, {}, tmp_path, 100.0) == 0
    (entry,) = json.loads((tmp_path / "tiles-sm90.json").read_text())["workloads"]
    assert entry["workload"] == str(w)
    assert [row["default"] for row in entry["candidates"]] == [False] * 5 + [True]  # 2 tiles, 3 splits
    assert "1000.0 us; rows 16 keys 64" in capsys.readouterr().out
    assert tune.run(CARD, 3, {}, tmp_path, -1.0) == 0


@pytest.mark.usefixtures("no_gpu_is_needed")
def test_a_workload_that_cannot_be_tuned_leaves_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("cuda.bindings")
    from llmc.plugins.cuda import kernel

    planned = [Workload("32/8x64", "bf16", None, batch, 31, 1) for batch in (1, 2)]

    def measure(w: Workload, *_: Any) -> list[dict[str, Any]]:
        if w is planned[0]:
            raise MemoryError("none left")
        return [
            {"default": True, "seconds": 1e-6, "rows": 16, "keys": 64, "warps": 4, "stages": 2, "splits": 1}
        ]

    monkeypatch.setattr(kernel, "Kernels", Filled)
    monkeypatch.setattr(tune, "workloads", lambda: planned)
    monkeypatch.setattr(tune, "tiles", lambda v, sm: [])
    monkeypatch.setattr(tune, "measure", measure)
    assert tune.run(CARD, 3, {}, tmp_path, 100.0) == 1
    first, second = json.loads((tmp_path / "tiles-sm90.json").read_text())["workloads"]
    assert first["candidates"][0]["error"] == "MemoryError: none left"
    assert second["candidates"][0]["seconds"] == 1e-6
    assert capsys.readouterr().out.startswith(f"{planned[0]}: failed: MemoryError: none left\n")
