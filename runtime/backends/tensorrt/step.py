"""The arrays of a step on the GPU. Decode steps are padded to a few sizes (buckets), for CUDA graphs.

A graph is captured once for each bucket of b sequences and replayed for every decode step of b or fewer
sequences. It repeats the launches and shapes of its capture. Only the contents of the step arrays differ:

* Shapes are those of b tokens, sequences and logits. `block_indices` always has its full length, and
  `block_begins` decides which part of it is read.
* In a step of r sequences, sequences r..b-1 have no new token: query_start repeats r. decode and reduce skip
  them, and write_kv skips tokens from query_start[b] = r on, so nothing is written to any cache.
* Tokens r..b-1 are token 0 at position 0, which is safe to look up. Their attention output is uninitialized
  memory, perhaps NaN. Every other operator works on rows, so it reaches no row of a real token. Their
  logits are not read.
* The number of splits is the one for b contexts of max_seq_len tokens. For shorter contexts some splits are
  empty programs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from llmc.plugins.paged_attention.spec import BLOCK_SIZE
from llmc.runtime.batch import Batch
from llmc.runtime.errors import BackendError


def room(max_tokens: int, max_sequences: int, max_seq_len: int) -> dict[str, int]:
    """Return the maximum number of elements of each array of a step. Every sequence may need logits."""
    return {
        "input_ids": max_tokens,
        "position_ids": max_tokens,
        "query_start": max_sequences + 1,
        "past_lengths": max_sequences,
        "block_indices": max_sequences * -(-max_seq_len // BLOCK_SIZE),
        "block_begins": max_sequences + 1,
        "logits_index": max_sequences,
    }


def buckets(max_sequences: int) -> tuple[int, ...]:
    """Return the sizes that decode steps are padded to: powers of two, and max_sequences."""
    powers = [1 << exponent for exponent in range(max_sequences.bit_length())]
    return tuple(dict.fromkeys(min(size, max_sequences) for size in [*powers, max_sequences]))


def bucket_of(batch: Batch, sizes: Sequence[int]) -> int | None:
    """Return the smallest bucket for the step, or None if not every sequence has exactly one new token."""
    count = len(batch.past_lengths)
    if (
        not len(batch.input_ids) == len(batch.logits_index) == count
        or (np.diff(batch.query_start) != 1).any()
    ):
        return None
    return next((size for size in sizes if size >= count), None)


def fill(batch: Batch, bucket: int | None, arrays: Mapping[str, np.ndarray]) -> dict[str, int]:
    """Write the step into `arrays` (int32, by the names of Batch), padded if there is a bucket.

    Returns the number of valid elements of each array. It is also the array's shape in the engine, except for
    block_indices, whose shape is always its full length.
    A step without logits computes those of its first token, because no tensor may be empty.
    Raises BackendError for a step that is larger than the arrays.
    """
    count = bucket or len(batch.past_lengths)
    tokens = bucket or len(batch.input_ids)
    lengths = {
        "input_ids": tokens,
        "position_ids": tokens,
        "query_start": count + 1,
        "past_lengths": count,
        "block_indices": len(batch.block_indices),
        "block_begins": count + 1,
        "logits_index": bucket or max(1, len(batch.logits_index)),
    }
    for name, length in lengths.items():
        source, target = getattr(batch, name), arrays[name]
        if length > len(target):
            raise BackendError(
                f"the step needs {length} elements of {name}, the engine was loaded for {len(target)}",
                "lower max_batch_tokens or max_sequences",
            )
        target[: len(source)] = source
        repeats = name in ("query_start", "block_begins")
        target[len(source) : length] = source[-1] if repeats else 0
    return lengths
