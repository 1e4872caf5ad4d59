"""Measure the GPU's peak memory bandwidth and matrix-multiplication throughput."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch

from .options import Options, Row, failure
from .timing import seconds

_SIZE = 8192  # rows and columns of the matrices
_BYTES = 4 << 30  # maximum size of the copied array


def rows(options: Options) -> Iterator[Row]:
    repeats = 10 if options.quick else 20
    yield from _measured_or_failed("memory", partial(_memory, repeats))
    for dtype, torch_dtype in (("bf16", torch.bfloat16), ("fp16", torch.float16)):
        yield from _measured_or_failed(f"matmul, {dtype}", partial(_matmul, dtype, torch_dtype, repeats))


def _measured_or_failed(name: str, measure: Callable[[], Iterator[Row]]) -> Iterator[Row]:
    """Yield the results of one measurement. If it fails, yield that, so that the others still run."""
    try:
        yield from measure()
    except Exception as error:
        yield failure(name, error)
    torch.cuda.empty_cache()


def _memory(repeats: int) -> Iterator[Row]:
    free, _ = torch.cuda.mem_get_info()
    source = torch.ones(min(_BYTES, free // 4) // 4, dtype=torch.float32, device="cuda")
    target, total = torch.empty_like(source), torch.zeros((), device="cuda")
    took = seconds(lambda: target.copy_(source), repeats=repeats)
    yield measured("memory, copy", gbps=2 * source.nbytes / took / 1e9, seconds=took)
    took = seconds(lambda: torch.sum(source, dim=0, out=total), repeats=repeats)
    yield measured("memory, read", gbps=source.nbytes / took / 1e9, seconds=took)


def _matmul(dtype: str, torch_dtype: torch.dtype, repeats: int) -> Iterator[Row]:
    a, b = (torch.randn(_SIZE, _SIZE, device="cuda").to(torch_dtype) for _ in range(2))
    c = torch.empty_like(a)
    took = seconds(lambda: torch.matmul(a, b, out=c), repeats=repeats)
    yield measured(f"matmul, {dtype}", dtype=dtype, tflops=2 * _SIZE**3 / took / 1e12, seconds=took)


def measured(name: str, **figures: object) -> Row:
    return {"name": name, "status": "measured", **figures}
