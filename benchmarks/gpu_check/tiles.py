"""The tiles and workloads of `--tune`, and their compilation in processes that need no torch."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from llmc.plugins.cuda.compile import CompileError, Kernel, compile_source
from llmc.plugins.cuda.config import Config
from llmc.plugins.cuda.gpus import SHARED_LIMIT
from llmc.plugins.paged_attention import launch
from llmc.plugins.paged_attention.launch import FP8, Variant

from .work import TUNED, Workload

_PREFILLS = (4096, 1024, 16384)
_DECODES = (  # batch, context
    (8, 8192), (1, 8192), (64, 1024), (1, 32768), (64, 8192), (8, 1024), (8, 32768), (1, 1024), (64, 32768),
)  # fmt: skip
WINDOWED = "64/8x64 window sinks"  # a key of work.SHAPES
_STAGES = (2, 3, 4)  # stages - 1 copies of keys and values are in flight
MAX_SPILLS = 128  # bytes per thread; tiles with more are not timed
_REGISTERS = 200  # of a thread's 255, for sums and scores


@dataclass(frozen=True)
class Tile:
    """The fields of a `Config` that a candidate changes."""

    #: Query rows of a program.
    rows: int
    #: Keys of one iteration.
    keys: int
    warps: int
    stages: int

    def config(self, v: Variant, sm: int) -> Config:
        constants = {**launch.configure(v, sm).constants, "ROWS": self.rows, "KEYS": self.keys}
        return Config(constants, self.warps, self.stages)


def default(v: Variant, sm: int) -> Tile:
    config = launch.configure(v, sm)
    sizes = config.constants
    return Tile(sizes["ROWS"], sizes["KEYS"], config.num_warps, config.num_stages)


def tiles(v: Variant, sm: int) -> list[Tile]:
    """Return the default, then all other tiles that may fit registers and shared memory."""
    first = default(v, sm)
    rows, warps = ((64, 128), (4, 8)) if v.kernel == "prefill" else ((first.rows,), (2, 4, 8))
    if v.kernel == "prefill" and v.has_window:  # a tile of rows reads their keys and a window of earlier ones
        rows = (32, 64, 128)
    combinations = [Tile(*sizes) for sizes in itertools.product(rows, (32, 64, 128), warps, _STAGES)]
    wide, v_wide = launch.padded(v.head_dim), launch.padded(v.v_head_dim)
    element = 1 if v.kv_dtype == FP8 else 2

    def fits(tile: Tile) -> bool:
        registers = tile.rows * (v_wide + tile.keys) / (32 * tile.warps)
        shared = tile.keys * (wide + v_wide) * element * (tile.stages - 1)
        return registers <= _REGISTERS and shared <= SHARED_LIMIT[sm] and tile.rows >= v.group

    return [first, *(tile for tile in combinations if tile != first and fits(tile))]


def workloads() -> Iterator[Workload]:
    """Yield the workloads, the most important first, because the time limit may end the list anywhere."""
    for context in _PREFILLS:
        yield Workload(WINDOWED, "bf16", None, 1, 0, context)
    for place, (batch, context) in enumerate(_DECODES):
        if place < len(_PREFILLS):
            for shape in TUNED:
                yield Workload(shape, "bf16", None, 1, 0, _PREFILLS[place])
        for kv_dtype, shape in itertools.product((FP8, None), TUNED):
            yield Workload(shape, "bf16", kv_dtype, batch, context - 1, 1)


def variant(w: Workload) -> Variant:
    return launch.variant(w.kind, w.attention, w.dtype, w.kv_dtype)


def name(v: Variant, tile: Tile) -> str:
    return f"{v.kernel}-{tile.rows}-{tile.keys}-{tile.warps}-{tile.stages}"


def build(v: Variant, sm: int, tile: Tile, cache: str) -> Kernel | None:
    """Return the compiled kernel, or None if it exceeds the SM's limits or spills too much."""
    from llmc.plugins.paged_attention import kernels

    try:
        function, config = getattr(kernels, v.kernel), tile.config(v, sm)
        compiled = compile_source(function, str(v), launch.signature(v), config, sm, Path(cache))
    except CompileError:
        return None
    return compiled if compiled.spills <= MAX_SPILLS or tile == default(v, sm) else None
