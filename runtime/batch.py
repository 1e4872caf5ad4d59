"""The arrays of one step, under the names of the graph's inputs."""

from __future__ import annotations

from array import array
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from llmc.runtime.scheduler import ScheduledChunk
from llmc.runtime.sequence import Sequence


@dataclass(frozen=True)
class Batch:
    """S chunks of S sequences, their T tokens end to end, no padding. Every array is int32.

    input_ids [T], position_ids [T]: the new tokens and their places in their own sequences.
    query_start [S+1]: chunk s is the rows query_start[s] .. query_start[s+1]-1.
    past_lengths [S]: tokens of each sequence that are in the cache already.
    block_indices [n], block_begins [S+1]: the block table of sequence s, for its past and its new
        tokens, is block_indices[block_begins[s] : block_begins[s+1]].
    logits_index [N]: the rows whose logits are wanted, ascending; N may be 0.
    """

    input_ids: np.ndarray
    position_ids: np.ndarray
    query_start: np.ndarray
    past_lengths: np.ndarray
    block_indices: np.ndarray
    block_begins: np.ndarray
    logits_index: np.ndarray

    def split(self, sequences: int) -> Iterator[Batch]:
        """The same step as several, one after the other, of at most `sequences` sequences each."""
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


def build_batch(chunks: list[ScheduledChunk]) -> tuple[Batch, list[Sequence]]:
    """The step's arrays, and the sequence that each row of its logits belongs to.

    Logits are wanted for the last token of every chunk that completes its sequence's known tokens;
    a chunk from the middle of a prompt wants none.
    """
    input_ids: list[int] = []
    position_ids: list[int] = []
    query_start, past_lengths, block_begins = [0], [], [0]
    block_indices: array[int] = array("i")  # long contexts have long tables: copied, not unpacked
    logits_index: list[int] = []
    sampled: list[Sequence] = []
    for sequence, count in chunks:
        past = sequence.num_computed
        input_ids += sequence.token_ids[past : past + count]
        position_ids += range(past, past + count)
        query_start.append(len(input_ids))
        past_lengths.append(past)
        block_indices += sequence.block_table
        block_begins.append(len(block_indices))
        if count == sequence.num_pending:
            logits_index.append(len(input_ids) - 1)
            sampled.append(sequence)
    batch = Batch(
        input_ids=np.array(input_ids, np.int32),
        position_ids=np.array(position_ids, np.int32),
        query_start=np.array(query_start, np.int32),
        past_lengths=np.array(past_lengths, np.int32),
        block_indices=np.array(block_indices, np.int32),
        block_begins=np.array(block_begins, np.int32),
        logits_index=np.array(logits_index, np.int32),
    )
    return batch, sampled
