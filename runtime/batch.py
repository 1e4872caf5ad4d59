"""The arrays of one step, named like the graph's inputs."""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Iterator, Mapping
from collections.abc import Sequence as Values
from dataclasses import dataclass

import numpy as np

from llmc.plugins.paged_attention import spec
from llmc.runtime.scheduler import ScheduledChunk
from llmc.runtime.sequence import Sequence

# The graph's inputs that describe a step -> their symbolic length. The other inputs are KV caches.
STEP_INPUTS: Mapping[str, str] = {
    "input_ids": "T",
    "position_ids": "T",
    **spec.STEP_INPUTS,
    "logits_index": "N",
}
# A chunk: its token ids, the number of cached tokens before it, the block table of its sequence, and which of
# its tokens get logits. True: the last one. False: none. Otherwise: their places in the chunk, ascending.
Row = tuple[Iterable[int], int, Values[int], bool | Values[int]]


@dataclass(frozen=True)
class Batch:
    """S chunks of S sequences, with their T tokens end to end and no padding. Every array is int32."""

    #: [T], the new tokens.
    input_ids: np.ndarray
    #: [T], the position of each token in its sequence.
    position_ids: np.ndarray
    #: [S+1], chunk s is the rows query_start[s] .. query_start[s+1]-1.
    query_start: np.ndarray
    #: [S], the number of tokens of each sequence in the cache.
    past_lengths: np.ndarray
    #: [n], the block tables of all sequences, for cached and new tokens.
    block_indices: np.ndarray
    #: [S+1], the table of sequence s is block_indices[block_begins[s] : block_begins[s+1]].
    block_begins: np.ndarray
    #: [N], the rows whose logits are wanted, ascending. N may be 0.
    logits_index: np.ndarray

    @classmethod
    def pack(cls, rows: Iterable[Row]) -> Batch:
        """Pack chunks, one of each sequence, into a step. See `Row`."""
        input_ids: list[int] = []
        position_ids: list[int] = []
        query_start, past_lengths, block_begins = [0], [], [0]
        block_indices: array[int] = array("i")  # an array copies long block tables faster than a list
        logits_index: list[int] = []
        for token_ids, past, block_table, wanted in rows:
            first = len(input_ids)
            input_ids.extend(token_ids)
            count = len(input_ids) - first
            position_ids.extend(range(past, past + count))
            query_start.append(len(input_ids))
            past_lengths.append(past)
            block_indices.extend(block_table)
            block_begins.append(len(block_indices))
            if wanted is True:
                logits_index.append(len(input_ids) - 1)
            elif wanted:
                logits_index.extend(first + index for index in wanted)
        columns = (
            input_ids,
            position_ids,
            query_start,
            past_lengths,
            block_indices,
            block_begins,
            logits_index,
        )
        return cls(*(np.array(column, np.int32) for column in columns))

    def split(self, sequences: int) -> Iterator[Batch]:
        """Split the step into consecutive steps of at most `sequences` sequences."""
        for first in range(0, len(self.past_lengths), sequences):
            last = min(first + sequences, len(self.past_lengths))
            begin, end = self.query_start[[first, last]]
            blocks_begin, blocks_end = self.block_begins[[first, last]]
            logits = self.logits_index
            yield Batch(
                input_ids=self.input_ids[begin:end],
                position_ids=self.position_ids[begin:end],
                query_start=self.query_start[first : last + 1] - begin,
                past_lengths=self.past_lengths[first:last],
                block_indices=self.block_indices[blocks_begin:blocks_end],
                block_begins=self.block_begins[first : last + 1] - blocks_begin,
                logits_index=logits[(logits >= begin) & (logits < end)] - begin,
            )

    def split_tokens(self, tokens: int) -> Iterator[Batch]:
        """Split the step into consecutive steps of at most `tokens` tokens, within a chunk if need be.

        The steps, one after the other, compute what this one does.
        """
        starts, logits = self.query_start, self.logits_index
        for begin in range(0, len(self.input_ids), tokens):
            end = min(begin + tokens, len(self.input_ids))
            first = int(np.searchsorted(starts[1:], begin, side="right"))
            last = int(np.searchsorted(starts[:-1], end, side="left"))
            blocks_begin, blocks_end = self.block_begins[[first, last]]
            yield Batch(
                input_ids=self.input_ids[begin:end],
                position_ids=self.position_ids[begin:end],
                query_start=np.clip(starts[first : last + 1], begin, end) - np.int32(begin),
                past_lengths=self.past_lengths[first:last]
                + np.maximum(np.int32(begin) - starts[first:last], np.int32(0)),
                block_indices=self.block_indices[blocks_begin:blocks_end],
                block_begins=self.block_begins[first : last + 1] - blocks_begin,
                logits_index=logits[(logits >= begin) & (logits < end)] - np.int32(begin),
            )


def build_batch(chunks: list[ScheduledChunk]) -> tuple[Batch, list[Sequence]]:
    """Pack a step. Return the step, and the sequence of each row of its logits.

    The last token of a chunk gets logits if the chunk completes its sequence's known tokens. A chunk from the
    middle of a prompt gets none.
    """
    completes = [count == sequence.num_pending for sequence, count in chunks]
    rows = (
        (s.token_ids[s.num_computed : s.num_computed + count], s.num_computed, s.block_table, done)
        for (s, count), done in zip(chunks, completes, strict=True)
    )
    sampled = [sequence for (sequence, _), done in zip(chunks, completes, strict=True) if done]
    return Batch.pack(rows), sampled
