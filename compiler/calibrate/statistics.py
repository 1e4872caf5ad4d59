"""What calibration measures of a decoder layer: clip ranges, and the second moments that GPTQ needs."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TypeVar

import numpy as np

from llmc.compiler.calibrate.ranges import ClipRanges, ranges
from llmc.compiler.calibrate.run_layers import LayerInputs

T = TypeVar("T")
Group = tuple[str, ...]  # fused linear layers, which share their input


@dataclass(frozen=True)
class LayerStatistics:
    """The statistics of one decoder layer."""

    layer: int
    #: Linear layer -> the clip ranges of its input.
    ranges: dict[str, ClipRanges]
    #: The largest magnitudes of keys and values.
    kv: tuple[float, float]
    #: Fused linear layers -> the second moment of their input, float32 [in, in].
    moments: dict[Group, np.ndarray] = field(default_factory=dict)
    #: Fused linear layers -> their input, float32 [tokens, in].
    inputs: dict[Group, np.ndarray] = field(default_factory=dict)


def second_moment(x: np.ndarray) -> np.ndarray:
    """Return x^T x / tokens, float32 [in, in], of inputs `x`, float32 [tokens, in]."""
    moment = x.T @ x
    moment /= np.float32(len(x))
    return moment


def measure(
    layers: Iterable[LayerInputs],
    with_moments: Callable[[Group], bool],
    with_inputs: Callable[[Group], bool] = lambda group: False,
) -> Iterator[LayerStatistics]:
    """Yield the statistics of each layer.

    with_moments, with_inputs: whether the second moment or the whole input of fused linear layers is wanted
    """
    for layer in layers:
        clip_ranges, kv = ranges(layer)
        moments = {group: second_moment(x) for group, x in layer.inputs.items() if with_moments(group)}
        inputs = {group: x for group, x in layer.inputs.items() if with_inputs(group)}
        statistics = LayerStatistics(layer.layer, clip_ranges, kv, moments, inputs)
        del layer, moments, inputs  # free before the next layer runs
        yield statistics
        del statistics


def ahead(items: Iterable[T]) -> Iterator[T]:
    """Yield `items`. A thread computes the next one while the caller works on this one."""
    iterator, end = iter(items), object()
    with ThreadPoolExecutor(1, "llmc-calibration") as pool:
        coming = pool.submit(next, iterator, end)
        while (item := coming.result()) is not end:
            coming = pool.submit(next, iterator, end)
            yield item  # type: ignore[misc]
            del item
