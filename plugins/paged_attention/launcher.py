"""Launch the attention of a step by plans (`launch.plan`). The import needs no GPU."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

import numpy as np

from llmc.plugins.cuda.kernel import Kernels
from llmc.plugins.paged_attention import launch
from llmc.plugins.paged_attention.launch import Attention, Plan


class AttentionLauncher:
    """Launches the attention of every layer of a step, in the order in which TensorRT runs them.

    All layers share one scratch buffer, because they run one after the other.
    """

    def __init__(
        self, kernels: Kernels, sm: int, multiprocessors: int, scratch: int, scratch_bytes: int
    ) -> None:
        """Create a launcher.

        sm: the SM that the kernels were compiled for, which decides their tiles. The GPU may be newer.
        multiprocessors: the GPU's number of multiprocessors.
        scratch, scratch_bytes: the address and size of device memory for the splits of long contexts. Less
            memory means fewer splits.
        """
        self._kernels, self._sm, self._multiprocessors = kernels, sm, multiprocessors
        self._scratch, self._scratch_bytes = scratch, scratch_bytes
        self._lengths: tuple[np.ndarray, np.ndarray] | None = None
        # Kind of layer -> its plan, and the arguments that all layers of the kind share.
        self._plans: dict[tuple[Attention, str, str | None], tuple[Plan, dict[str, float]]] = {}

    def begin(self, query_start: np.ndarray, past_lengths: np.ndarray) -> None:
        """Set the step's lengths on the host, int32 [S+1] and [S], for the launches until the next step.

        For a CUDA graph they are those of the largest step that it must serve: S sequences with one new token
        and the longest past. Grids and splits then cover every step of these shapes.
        """
        self._lengths = (query_start, past_lengths)
        self._plans.clear()

    def launch(
        self, attention: Attention, dtype: str, scale: float, tensors: Mapping[str, int], tokens: int,
        sequences: int, stream: int, kv_dtype: str | None = None,
        kv_scales: tuple[float, float] = (1.0, 1.0),
    ) -> None:  # fmt: skip
        """Launch one layer.

        tensors: argument name -> device address, of the operator's inputs and its `output`.
        tokens, sequences: the rows of `query` and of `past_lengths`, which may include padding.
        stream: the address of a CUstream.
        kv_dtype: a name in QUANTIZED_CACHES, or None for a cache in the model's dtype.
        kv_scales: the scales of keys and of values.
        Raises CudaError, and ValueError for tensors that do not fit the step or the kernels.
        """
        if self._lengths is None:
            raise ValueError("attention before the first step")
        query_start, past_lengths = self._lengths
        if sequences != len(past_lengths) or tokens < query_start[-1]:
            raise ValueError(
                f"a step of {query_start[-1]} tokens, {len(past_lengths)} sequences does not fit tensors of "
                f"{tokens} and {sequences}"
            )
        if misaligned := [name for name, address in tensors.items() if address % launch.ALIGNMENT]:
            raise ValueError(f"{misaligned[0]} does not begin at a multiple of {launch.ALIGNMENT} bytes")
        kind = (attention, dtype, kv_dtype)
        if kind not in self._plans:
            self._plans[kind] = self._prepare(*kind)
        plan, shared = self._plans[kind]
        arguments = {**shared, "scale": scale, "k_scale": kv_scales[0], "v_scale": kv_scales[1], **tensors}
        for planned in plan.launches:
            self._kernels.launch(str(planned.variant), planned.grid, arguments, stream)

    def _prepare(
        self, attention: Attention, dtype: str, kv_dtype: str | None
    ) -> tuple[Plan, dict[str, float]]:
        assert self._lengths is not None
        plan = self._plan(attention, dtype, kv_dtype)
        shared: dict[str, float] = {"sinks": 0, "partial_sums": 0, "partial_top": 0, "partial_total": 0}
        shared |= {name: self._scratch + at for name, at in launch.scratch_layout(plan)[0].items()}
        shared |= {"num_sequences": len(self._lengths[1]), "num_splits": plan.num_splits}
        return plan, shared | {"softcap": attention.softcap, "window": attention.window}

    def _plan(self, attention: Attention, dtype: str, kv_dtype: str | None) -> Plan:
        """Return a plan whose scratch fits. Many short prompts and a long decode need fewer splits."""
        assert self._lengths is not None
        start, past = self._lengths
        make = partial(launch.plan, sm=self._sm, multiprocessors=self._multiprocessors)
        plan = make(attention, dtype, kv_dtype, start, past)
        needed = launch.scratch_layout(plan)[1]
        if needed > self._scratch_bytes:
            padding = 3 * launch.ALIGNMENT * plan.num_splits
            fewer = max(1, plan.num_splits * self._scratch_bytes // (needed + padding))
            plan = make(attention, dtype, kv_dtype, start, past, num_splits=fewer)
        return plan
