"""The interface of backends: the options for loading an engine file, and the calls that run it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np

from llmc.runtime.batch import Batch
from llmc.runtime.bundle.reader import Bundle
from llmc.runtime.native.weights import Weights
from llmc.runtime.parallel.communicator import Communicator


@dataclass(frozen=True)
class EngineFile:
    """A file that a backend can load."""

    #: The name of the backend in a manifest.
    engine: str
    #: The file.
    path: Path
    #: The element type of the KV cache, as in the manifest.
    kv_dtype: str = "fp32"
    #: The bundle that holds the file. None: the file is a graph for the CPU.
    bundle: Bundle | None = None
    #: The weights of a native engine, if a thread reads them already.
    weights: Weights | None = None
    #: The rank of the engine, from 0.
    rank: int = 0

    @classmethod
    def of(cls, bundle: Bundle, weights: Weights | None = None, rank: int = 0) -> EngineFile:
        """Return the engine of a rank of a bundle. Raises BundleError if the bundle has none."""
        manifest = bundle.manifest
        path = bundle.engine_path(rank)
        return cls(manifest.target.engine, path, manifest.precision.kv_dtype, bundle, weights, rank)


@dataclass(frozen=True)
class LoadOptions:
    """Options for loading an engine."""

    #: Number of blocks of the KV cache. None: as many as `kv_memory` and the limits allow.
    kv_blocks: int | None = None
    #: Maximum size of the KV cache in bytes. None: the backend's default.
    kv_memory: int | None = None
    #: Maximum number of tokens in a step.
    max_tokens: int = 2048
    #: Maximum number of sequences in a step.
    max_sequences: int = 64
    #: Number of CPU threads. None: one per core, at most the CPU quota of the container.
    threads: int | None = None
    #: Number of activations in a row that share an int8 scale, in layers with int8 or int4 weights. None:
    #: activations are not quantized.
    activation_group: int | None = None
    #: The collectives of this rank. None: the bundle has a single rank.
    communicator: Communicator | None = None


class Candidates(NamedTuple):
    """The candidates for a row's next token."""

    #: Token ids, int32 [C], ascending. None: the whole vocabulary.
    ids: np.ndarray | None
    #: Logits of these tokens, float32 [C].
    logits: np.ndarray


class Backend(Protocol):
    """A loaded engine and the KV cache that it writes."""

    #: The name in reports, such as "openvino".
    name: str
    #: Number of blocks in the cache.
    num_blocks: int
    #: Tokens per block.
    block_size: int

    def forward(self, batch: Batch) -> np.ndarray:
        """Compute the batch's tokens and write their keys and values into the cache.

        Returns logits, float32 [N, vocab], for `batch.logits_index`. They are valid until the next call.
        Raises BackendError if the call fails. The engine then discards the whole cache.
        """
        ...


class RankBackend(Backend, Protocol):
    """A backend of one of several ranks."""

    def close(self) -> None:
        """End the engine's threads. Later calls are not allowed."""
        ...


class StageBackend(RankBackend, Protocol):
    """Rank 0 of a pipeline. It may begin several steps before it gets the logits of the first one."""

    def begin(self, batch: Batch) -> None:
        """Compute this stage's part of a step, and send what the next stage needs."""
        ...

    def finish(self, first: int, rows: int) -> np.ndarray:
        """Receive the logits of the first step that is not finished.

        first: the number of rows of logits since the last call of `forward`, or of `begin` after a `finish`
        rows: those of this step

        Returns all these rows, float32 [first + rows, vocab]. They are valid until the next call of `begin`.
        """
        ...


class ExchangingBackend(StageBackend, Protocol):
    """A rank that can exchange candidates with the others in place of whole rows of logits."""

    #: The largest k. 0: the ranks exchange whole rows only, or nothing.
    max_exchanged: int

    def begin_sampled(self, batch: Batch, k: int) -> None:
        """Compute this rank's part of a step with logits. All ranks get the same k, rank 0's at most."""
        ...

    def finish_sampled(self, rows: int, k: int) -> list[Candidates]:
        """Return the candidates of the first step that is not finished. See `SamplingBackend`.

        rows: the number of its rows of logits
        k: that of the step
        """
        ...


class PipelineBackend(Backend, Protocol):
    """A backend with stages that compute different steps at the same time. The engine checks `depth`."""

    #: The most steps in flight that help: submitted, and neither collected nor discarded. 1: use `forward`.
    depth: int

    def submit(self, batch: Batch) -> None:
        """Begin a step. It may read what an earlier step writes into the cache.

        Raises BackendError. No step is in flight after an error.
        """
        ...

    def collect(self) -> np.ndarray:
        """Wait for the oldest step in flight, which `submit` began. Return its logits as `forward` does.

        A step without rows of logits may still be computed when this returns float32 [0, 0]. Later steps may
        read what it writes into the cache. Raises BackendError. No step is in flight after an error.
        """
        ...

    def discard(self) -> None:
        """Wait until no step is in flight. The steps may have written into the cache."""
        ...


class SamplingBackend(Backend, Protocol):
    """A backend that can reduce logits to candidates on the device. The engine checks `max_candidates`."""

    #: The largest k of `forward_sampled`. 0: it is not available.
    max_candidates: int

    def forward_sampled(self, batch: Batch, k: int) -> list[Candidates]:
        """Compute the batch like `forward`, but return each row's k largest logits, and ties with the last.

        k = 1 is greedy decoding: only the first of tokens that tie is returned, maybe with 0 for its logit.
        The whole row is returned if too many logits tie, or if the maximum is NaN or infinite.
        """
        ...


class SamplingPipelineBackend(PipelineBackend, SamplingBackend, Protocol):
    """A backend with stages that can reduce logits to candidates. The engine checks `max_candidates`."""

    def submit_sampled(self, batch: Batch, k: int) -> None:
        """Begin a step like `submit`. `collect_sampled` returns its candidates."""
        ...

    def collect_sampled(self) -> list[Candidates]:
        """Wait for the oldest step in flight, which `submit_sampled` began. See `forward_sampled`."""
        ...
