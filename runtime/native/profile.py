"""The time of each kind of instruction in a step, beside what the machine reaches at most."""

from __future__ import annotations

import statistics
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from llmc.plugins.cpu import library
from llmc.runtime.batch import Batch
from llmc.runtime.native.executor import Executor

_READ_BYTES = 256 << 20  # more than the caches of most machines
_SECONDS = 0.2  # of a measurement of products
_ROUNDS = 5


@dataclass(frozen=True)
class Peak:
    """What all threads together reach in loops that do nothing else."""

    #: Bytes read from memory in a second.
    bytes_per_second: float
    #: Multiply-adds of fp32 numbers in a second.
    float_products: float
    #: Multiply-adds of 8-bit integers in a second.
    integer_products: float


@dataclass(frozen=True)
class Layer:
    """The instructions of one kind in one step."""

    #: The operation, for linear layers with shape and dtype, for others the operations that run together.
    name: str
    count: int
    #: All of them together; the median of the steps.
    seconds: float
    #: Bytes of weights that they read.
    weight_bytes: int
    #: Multiply-adds of linear layers: of fp32 numbers, or of int8 digits.
    products: int
    #: Whether `products` are of integers.
    integer: bool


def peak(threads: int) -> Peak:
    """Measure the machine's speed with `threads` threads. It takes about two seconds."""
    engine = library.load()
    memory = np.ones(_READ_BYTES // threads // 256 * 256 * threads, np.uint8)
    part = memory.nbytes // threads
    starts = [memory.ctypes.data + number * part for number in range(threads)]
    reading = min(
        _together([lambda start=start: engine.llmc_read(start, part) for start in starts])  # type: ignore[misc]
        for _ in range(_ROUNDS)
    )
    return Peak(
        memory.nbytes / reading,
        _products_per_second(engine.llmc_float_products, threads),
        _products_per_second(engine.llmc_integer_products, threads),
    )


def _products_per_second(function: Callable[[int], int], threads: int) -> float:
    turns = 1 << 12
    done: list[int] = []
    while True:
        seconds = _together([lambda count=turns: done.append(function(count))] * threads)  # type: ignore[misc]
        if seconds > _SECONDS:
            return sum(done[-threads:]) / seconds
        turns *= 2


def profile(executor: Executor, batches: Sequence[Batch]) -> tuple[float, list[Layer]]:
    """Run the steps and return the median seconds of a step and its layers, the slowest first."""
    walls, ticks, rates = [], [], []
    groups = executor.groups()
    for batch in batches:
        times = np.zeros(len(groups) + 1, np.int64)
        begun = time.perf_counter()
        times[0] = executor.library.llmc_ticks()
        executor.run(batch, times[1:])
        walls.append(time.perf_counter() - begun)
        rates.append((executor.library.llmc_ticks() - int(times[0])) / walls[-1])
        ticks.append(np.diff(times))
    seconds = np.median(np.stack(ticks), axis=0) / statistics.median(rates)
    totals: dict[str, Layer] = {}
    rows = len(batches[0].input_ids), len(batches[0].logits_index)
    for group, spent in zip(groups, seconds, strict=True):
        old = totals.get(group.name, Layer(group.name, 0, 0.0, 0, 0, group.integer))
        products = group.products * rows[group.per_logit]
        totals[group.name] = Layer(
            group.name,
            old.count + 1,
            old.seconds + float(spent),
            old.weight_bytes + group.weight_bytes,
            old.products + products,
            group.integer,
        )
    return statistics.median(walls), sorted(totals.values(), key=lambda layer: -layer.seconds)


def _together(calls: Sequence[Callable[[], object]]) -> float:
    """Run the calls in threads of their own and return the seconds until the last one is finished."""
    threads = [threading.Thread(target=call) for call in calls]
    begun = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return time.perf_counter() - begun
