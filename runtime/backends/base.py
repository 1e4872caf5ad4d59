"""What the engine asks of whatever runs the graph."""

from __future__ import annotations

from typing import NamedTuple, Protocol

import numpy as np

from llmc.runtime.batch import Batch


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
