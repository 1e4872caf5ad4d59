"""Launches the attention of a step by plans (`launch.plan`). Importing this needs no GPU."""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import partial

import numpy as np

from llmc.plugins.cuda.kernel import Kernels
from llmc.plugins.paged_attention import launch
from llmc.plugins.paged_attention.launch import Attention, Plan

_ALIGNMENT = 16  # bytes; the kernels are compiled for tensors that begin at multiples of it


def scratch_layout(plan: Plan) -> tuple[dict[str, int], int]:
    """Where a plan's scratch tensors lie behind each other: offset by name, and bytes in all."""
    offsets, end = {}, 0
    for name, shape in plan.scratch.items():
        offsets[name] = end
        end += -(-4 * math.prod(shape) // _ALIGNMENT) * _ALIGNMENT
    return offsets, end


class AttentionLauncher:
    """Launches the attention of every layer of a step, in the order in which TensorRT comes to them.

    All layers share one piece of scratch memory: they run one after the other, each needs the one before.
    """

    def __init__(
        self, kernels: Kernels, sm: int, multiprocessors: int, scratch: int, scratch_bytes: int
    ) -> None:
        """sm: what the kernels were compiled for, which decides their tiles; it may be older than the GPU.
        scratch, scratch_bytes: device memory for splits of long contexts; with less there are fewer."""
        self._kernels, self._sm, self._multiprocessors = kernels, sm, multiprocessors
        self._scratch, self._scratch_bytes = scratch, scratch_bytes
        self._lengths: tuple[np.ndarray, np.ndarray] | None = None
        # Kind of layer -> its plan, and the arguments that all layers of the kind share.
        self._plans: dict[tuple[Attention, str, str | None], tuple[Plan, dict[str, float]]] = {}

    def begin(self, query_start: np.ndarray, past_lengths: np.ndarray) -> None:
        """The step's lengths on the host, int32 [S+1] and [S]: launches follow from them until the next step.

        For a CUDA graph give those of the largest step it shall serve: S sequences of one new token and the
        longest past. Grids and splits then cover every step of these shapes.
        """
        self._lengths = (query_start, past_lengths)
        self._plans.clear()

    def launch(
        self, attention: Attention, dtype: str, scale: float, tensors: Mapping[str, int], tokens: int,
        sequences: int, stream: int, kv_dtype: str | None = None,
        kv_scales: tuple[float, float] = (1.0, 1.0),
    ) -> None:  # fmt: skip
        """One layer. `tensors`: argument name -> device address, of the operator's inputs and its `output`;
        tokens, sequences: the rows of `query` and of `past_lengths`, which may include padding; kv_dtype:
        a name in QUANTIZED_CACHES, None for a cache in the model's dtype; kv_scales: of keys and of values.

        Raises CudaError; ValueError for tensors that do not fit the step or the kernels.
        """
        if self._lengths is None:
            raise ValueError("attention before the first step")
        query_start, past_lengths = self._lengths
        if sequences != len(past_lengths) or tokens < query_start[-1]:
            raise ValueError(
                f"a step of {query_start[-1]} tokens, {len(past_lengths)} sequences does not fit tensors of "
                f"{tokens} and {sequences}"
            )
        if misaligned := [name for name, address in tensors.items() if address % _ALIGNMENT]:
            raise ValueError(f"{misaligned[0]} does not begin at a multiple of {_ALIGNMENT} bytes")
        kind = (attention, dtype, kv_dtype)
        if kind not in self._plans:
            self._plans[kind] = self._prepare(*kind)
        plan, shared = self._plans[kind]
        arguments = {**shared, "scale": scale, "k_scale": kv_scales[0], "v_scale": kv_scales[1], **tensors}
        for one in plan.launches:
            self._kernels.launch(str(one.variant), one.grid, arguments, stream)

    def _prepare(
        self, attention: Attention, dtype: str, kv_dtype: str | None
    ) -> tuple[Plan, dict[str, float]]:
        assert self._lengths is not None
        plan = self._plan(attention, dtype, kv_dtype)
        shared: dict[str, float] = {"sinks": 0, "partial_sums": 0, "partial_top": 0, "partial_total": 0}
        shared |= {name: self._scratch + at for name, at in scratch_layout(plan)[0].items()}
        shared |= {"num_sequences": len(self._lengths[1]), "num_splits": plan.num_splits}
        return plan, shared | {"softcap": attention.softcap, "window": attention.window}

    def _plan(self, attention: Attention, dtype: str, kv_dtype: str | None) -> Plan:
        """The plan whose scratch fits: a step of many short prompts and a long decode would want much."""
        assert self._lengths is not None
        start, past = self._lengths
        make = partial(launch.plan, sm=self._sm, multiprocessors=self._multiprocessors)
        plan = make(attention, dtype, kv_dtype, start, past)
        needed = scratch_layout(plan)[1]
        if needed > self._scratch_bytes:
            padding = 3 * _ALIGNMENT * plan.num_splits
            fewer = max(1, plan.num_splits * self._scratch_bytes // (needed + padding))
            plan = make(attention, dtype, kv_dtype, start, past, num_splits=fewer)
        return plan
