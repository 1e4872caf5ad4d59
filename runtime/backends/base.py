"""The interface of backends: what loads an engine file, and what runs it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np

from llmc.runtime.batch import Batch
from llmc.runtime.bundle.reader import Bundle


@dataclass(frozen=True)
class EngineFile:
    """A file that a backend can load. Without a bundle it is a graph for the CPU."""

    engine: str  # the backend's name in a manifest
    path: Path
    kv_dtype: str = "fp32"  # of the KV cache, as in the manifest
    bundle: Bundle | None = None

    @classmethod
    def of(cls, bundle: Bundle) -> EngineFile:
        """The engine of a bundle. Raises BundleError if the bundle has none."""
        manifest = bundle.manifest
        return cls(manifest.target.engine, bundle.engine_path(), manifest.precision.kv_dtype, bundle)


@dataclass(frozen=True)
class LoadOptions:
    """Options for loading an engine."""

    kv_blocks: int | None = None  # of the KV cache; None: as many as `kv_memory` and the limits allow
    kv_memory: int | None = None  # bytes of the KV cache at most; None: the backend's default
    max_tokens: int = 2048  # of a step
    max_sequences: int = 64  # of a step
    threads: int | None = None  # of the CPU; None: one for each core
    # Activations of a row that share an int8 scale before they meet int8 or int4 weights; None: not rounded.
    activation_group: int | None = None


class Backend(Protocol):
    """A loaded engine and the KV cache it writes.

    name: what reports call it, such as "openvino".
    num_blocks, block_size: the cache holds num_blocks blocks of block_size tokens each.
    """

    name: str
    num_blocks: int
    block_size: int

    def forward(self, batch: Batch) -> np.ndarray:
        """Computes the batch's tokens and writes their keys and values into the cache.

        Returns logits float32 [N, vocab] for `batch.logits_index`, valid until the next call.
        Raises BackendError when the call fails; the engine then trusts nothing in the cache.
        """
        ...


class Candidates(NamedTuple):
    """Tokens among which a row's next one is.

    ids: int32 [C], ascending; None for the whole vocabulary. logits: float32 [C], theirs.
    """

    ids: np.ndarray | None
    logits: np.ndarray


class SamplingBackend(Backend, Protocol):
    """A backend that can leave most logits where they are computed. The engine asks for `max_candidates`.

    max_candidates: the largest k of `forward_sampled`; 0 where it cannot do it at all.
    """

    max_candidates: int

    def forward_sampled(self, batch: Batch, k: int) -> list[Candidates]:
        """As `forward`, but of each row only the k largest logits, and all that tie with the last of them.

        k = 1 is greedy decoding: of tokens that tie the first alone, and 0 in place of its logit.
        A row may come whole: where too many tie, or where its logits are not numbers.
        """
        ...
