"""Time other tiles than those of `launch.configure` on this GPU, as a basis for changes of that function.

Candidates are compiled ahead of time in parallel, and launched as in an engine. The output of each must match
the default's before its time counts. The JSON file lists the results, best first. No code is changed.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import torch

from llmc.plugins.cuda.compile import Kernel
from llmc.plugins.paged_attention import launch
from llmc.plugins.paged_attention.launch import MAX_SPLITS, Variant

from . import jit, use_this_checkout
from .aot import addresses, kernel_image
from .card import Card
from .options import Row, failure
from .speed import difference, make_tensors, rates
from .tiles import Tile, build, default, name, tiles, variant, workloads
from .timing import L2, seconds
from .work import Workload

_DIFFERENCE = 0.01  # relative root mean square; tiles differ in the rounding of sums
_REPEATS = 12
_FINALISTS = 5  # tiles that are timed with other numbers of splits

Built = dict[Tile, Kernel]


def measure(w: Workload, kernels: Any, made: Built, card: Card, seed: int, l2: L2) -> list[Row]:
    """Time all candidates for one workload. Return the fastest first, and failed ones last with the error.

    kernels: `plugins.cuda.kernel.Kernels` of `made`, by `name`. made: tile -> its compiled kernel.
    """
    a, tensors, v = w.attention, make_tensors(w, seed), variant(w)
    lengths = [tensors[n].cpu().numpy() for n in ("query_start", "past_lengths")]
    rows: list[Row] = []
    expected: list[torch.Tensor] = []

    def prepared(tile: Tile, num_splits: int | None) -> tuple[Callable[[], None], int]:
        plan = launch.plan(
            a, w.dtype, w.kv_dtype, *lengths, sm=card.sm, multiprocessors=card.multiprocessors,
            num_splits=num_splits,
        )  # fmt: skip
        _, attend, *rest = jit.bind(a, plan, tensors, scale=a.head_dim**-0.5)  # the caches are full already
        grid, given, stream = attend.grid, addresses(attend), torch.cuda.current_stream().cuda_stream
        if w.kind == "prefill":
            grid = (w.new * w.batch // (tile.rows // v.group) + w.batch, *grid[1:])

        def call() -> None:
            kernels.launch(name(v, tile), grid, given, stream)
            for bound in rest:  # reduce, which keeps the scratch of both alive
                jit.run(bound, card.sm)

        return call, plan.num_splits

    def add(tile: Tile, num_splits: int | None = None) -> None:
        row: Row = {**asdict(tile), "default": tile == default(v, card.sm) and num_splits is None}
        row |= {key: getattr(made[tile], key) for key in ("registers", "spills", "shared_memory")}
        try:
            call, row["splits"] = prepared(tile, num_splits)
            tensors["output"].fill_(float("nan"))
            call()
            expected[:] = expected or [tensors["output"].clone()]
            row["difference"] = difference(tensors["output"], expected[0])
            if not row["difference"] < _DIFFERENCE:
                raise ValueError(f"differs from the default by {row['difference']:.3g}, relative")
            took = seconds(call, repeats=_REPEATS, l2=l2 if w.kind == "decode" else None, warmup=1)
            row |= {"seconds": took, **rates(w, took)}
        except (RuntimeError, ValueError) as error:
            row |= failure(name(v, tile), error)
            torch.cuda.synchronize()  # raises if the fault destroyed the context
        rows.append(row)

    def slowness(row: Row) -> float:
        return float(row.get("seconds", float("inf")))

    for tile in made:
        add(tile)
    if w.kind == "decode" and "splits" in rows[0]:
        default_splits = rows[0]["splits"]
        for row in sorted(rows, key=slowness)[:_FINALISTS]:
            for count in sorted(
                {1, default_splits // 2, 2 * default_splits, 4 * default_splits} - {0, default_splits}
            ):
                if count <= MAX_SPLITS:
                    add(Tile(*(row[field.name] for field in fields(Tile))), count)
    return sorted(rows, key=slowness)


def run(card: Card, seed: int, about: dict[str, Any], output: Path, time_limit: float) -> int:
    """Write `output`/tiles-sm<N>.json after every workload. Return 1 if a candidate failed, else 0."""
    from llmc.plugins.cuda import kernel

    deadline = time.monotonic() + time_limit
    planned, done, l2 = list(workloads()), [], L2(card.l2)
    output.mkdir(parents=True, exist_ok=True)
    file = output / f"tiles-sm{card.sm}.json"
    pool = ProcessPoolExecutor(
        max(1, (os.cpu_count() or 2) - 2), multiprocessing.get_context("spawn"), use_this_checkout
    )
    loaded: dict[Variant, tuple[Any, Built]] = {}
    with tempfile.TemporaryDirectory() as cache:
        try:
            jobs = {
                v: {tile: pool.submit(build, v, card.sm, tile, cache) for tile in tiles(v, card.sm)}
                for v in dict.fromkeys(map(variant, planned))
            }
            for w in planned:
                if time.monotonic() > deadline:
                    break
                try:
                    torch.cuda.empty_cache()
                    if (v := variant(w)) not in loaded:
                        answers = {tile: job.result() for tile, job in jobs[v].items()}
                        made = {tile: compiled for tile, compiled in answers.items() if compiled}
                        images = [kernel_image(name(v, tile), k) for tile, k in made.items()]
                        loaded[v] = (kernel.Kernels(images, launch.ARGUMENTS), made)
                    found = measure(w, *loaded[v], card, seed, l2)
                except Exception as error:  # other workloads still run
                    found = [failure(str(w), error)]
                done.append({"workload": str(w), "candidates": found})
                file.write_text(json.dumps({"machine": about, "workloads": done}, indent=1) + "\n")
                print(_line(w, found), flush=True)
                torch.cuda.synchronize()  # raises if a fault destroyed the context
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
    print(f"{len(done)} of {len(planned)} workloads; written: {file}")
    wrong = [row for entry in done for row in entry["candidates"] if row.get("status") == "failed"]
    return 1 if wrong else 0


def _line(w: Workload, found: list[Row]) -> str:
    if "default" not in found[0]:
        return f"{w}: failed: {found[0]['error']}"
    usual, best = next(row for row in found if row["default"]), found[0]
    if "seconds" not in usual:
        return f"{w}: the default failed: {usual['error']}"
    tile = " ".join(f"{key} {best[key]}" for key in ("rows", "keys", "warps", "stages", "splits"))
    wrong = sum(row.get("status") == "failed" for row in found)
    gain = usual["seconds"] / best["seconds"]
    return f"{w}: {usual['seconds'] * 1e6:.1f} us; {tile}: x{gain:.2f}" + (
        f"; {wrong} wrong" if wrong else ""
    )
