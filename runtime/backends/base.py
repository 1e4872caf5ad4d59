"""What the engine asks of whatever runs the graph."""

from __future__ import annotations

from typing import Protocol

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
