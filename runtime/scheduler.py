"""Continuous batching: the choice of tokens and sequences for the next step.

Sequences are served in the order of arrival. Running sequences decode first, and the rest of the step's token
budget prefills the next prompts in chunks. When blocks run out, the youngest running sequence is preempted:
it frees its blocks and waits at the head of the queue to be computed again (its full blocks usually come from
the prefix cache). So the oldest sequence always gets the blocks that it needs. The scheduler rejects
requests that the whole pool cannot hold, so every accepted request finishes.
"""

from __future__ import annotations

from collections import deque
from typing import NamedTuple

from llmc.runtime.block_pool import BlockPool, invariant
from llmc.runtime.errors import RequestError
from llmc.runtime.sequence import FinishReason, Sequence, SequenceState


class ScheduledChunk(NamedTuple):
    """The next `num_tokens` uncomputed tokens of `sequence`. Its block table has room for them."""

    sequence: Sequence
    num_tokens: int


class Scheduler:
    """The waiting and the running sequences, and their blocks.

    max_batch_tokens: the maximum number of tokens in a step.
    max_sequences: the maximum number of sequences that run at the same time.
    max_seq_len: the model's context in tokens, prompt and output together.
    """

    def __init__(self, pool: BlockPool, max_batch_tokens: int, max_sequences: int, max_seq_len: int) -> None:
        if not 1 <= max_sequences <= max_batch_tokens:
            raise RequestError(
                f"{max_sequences} sequences at once with {max_batch_tokens} tokens a step",
                "each running sequence needs a token a step: use 1 <= max_sequences <= max_batch_tokens",
            )
        self.pool = pool
        self.max_batch_tokens = max_batch_tokens
        self.max_sequences = max_sequences
        self.max_seq_len = max_seq_len
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []  # oldest first
        self.num_preemptions = 0
        self.num_cached_tokens = 0  # tokens taken from the prefix cache instead of computed
        self._arrivals = 0

    def add(self, sequence: Sequence) -> None:
        """Queue a new sequence. Raises RequestError if it can never run (see `check_fits`)."""
        self.check_fits(sequence)
        sequence.arrival = self._arrivals
        self._arrivals += 1
        self.waiting.append(sequence)

    def check_fits(self, sequence: Sequence) -> None:
        """Raise RequestError if the prompt fills the context, or if prompt and output exceed the pool."""
        prompt, pool = sequence.prompt_tokens, self.pool
        if prompt >= self.max_seq_len:
            raise RequestError(
                f"the prompt has {prompt} tokens, the context {self.max_seq_len}",
                f"shorten the prompt to at most {self.max_seq_len - 1} tokens",
            )
        # The last token is generated but not computed.
        cached = min(prompt + sequence.params.max_tokens, self.max_seq_len) - 1
        if pool.blocks_for(cached) > pool.num_blocks:
            room = pool.num_blocks * pool.block_size - prompt + 1
            raise RequestError(
                f"{prompt} prompt tokens and up to {cached + 1 - prompt} new ones need "
                f"{pool.blocks_for(cached)} cache blocks of {pool.block_size} tokens, "
                f"the engine has {pool.num_blocks}",
                (f"lower --max-tokens to {room}" if room > 0 else "shorten the prompt")
                + f", or raise --kv-memory: it holds {pool.num_blocks * pool.block_size} tokens",
            )

    def schedule(self) -> list[ScheduledChunk]:
        """Return the next step's chunks, with blocks for all their tokens. Empty only if nothing is queued.

        The caller must call `commit` when they are computed, or `rollback` if that failed.
        """
        chunks: list[ScheduledChunk] = []
        budget = self.max_batch_tokens
        short_of_blocks = False
        # The oldest comes first. Only the youngest can still be in prefill, so no decode waits for a prefill.
        for sequence in list(self.running):
            if sequence.state is not SequenceState.RUNNING:
                break  # it and all younger ones have just been preempted
            count = min(sequence.num_pending, budget)
            while count and not self._grow(sequence, count):
                short_of_blocks = True
                if self.running[-1] is sequence:
                    count = 0  # no younger sequence to preempt: keep its blocks and wait for free ones
                else:
                    self._preempt_youngest()
                    self.num_preemptions += 1
            if count:
                chunks.append(ScheduledChunk(sequence, count))
                budget -= count
        # A sequence that lacks blocks goes first. A small new one would only be preempted for it.
        while budget and not short_of_blocks and self.waiting and len(self.running) < self.max_sequences:
            sequence = self.waiting[0]
            if not self._admit(sequence):
                break
            count = min(sequence.num_pending, budget)
            self._grow(sequence, count)
            chunks.append(ScheduledChunk(sequence, count))
            budget -= count
        return chunks

    def commit(self, chunks: list[ScheduledChunk]) -> None:
        """Record that the chunks are in the cache. Their full blocks can now be shared."""
        size = self.pool.block_size
        for sequence, count in chunks:
            full_before = sequence.num_computed // size
            sequence.num_computed += count
            full = sequence.num_computed // size
            if self.pool.prefix_cache and full > full_before:
                digests = sequence.block_digests(full, size)
                for index in range(full_before, full):
                    self.pool.remember(sequence.block_table[index], digests[index])

    def rollback(self) -> None:
        """Discard the cache after a failed step. Every sequence is computed again."""
        while self.running:
            self._preempt_youngest()
        self.pool.forget()

    def finish(self, sequence: Sequence, reason: FinishReason) -> None:
        """Remove a waiting or running sequence and free its blocks."""
        if sequence.state is SequenceState.RUNNING:
            self.running.remove(sequence)
            self._release(sequence)
        else:
            self.waiting.remove(sequence)
        sequence.state = SequenceState.FINISHED
        sequence.finish_reason = reason

    def _grow(self, sequence: Sequence, count: int) -> bool:
        """Allocate blocks for `count` more computed tokens. If too few are free, only return False."""
        missing = self.pool.blocks_for(sequence.num_computed + count) - len(sequence.block_table)
        if missing > self.pool.num_free:
            return False
        if missing > 0:
            sequence.block_table.extend(self.pool.allocate(missing))
        return True

    def _admit(self, sequence: Sequence) -> bool:
        """Start the head of the queue if the pool can hold all its known tokens. Return whether it can."""
        pool, known = self.pool, len(sequence.token_ids)
        shared: list[int] = []
        if pool.prefix_cache:
            # The last token is never taken from the cache: its logits are wanted, so it has to be computed.
            shared = pool.match(sequence.block_digests((known - 1) // pool.block_size, pool.block_size))
        if pool.blocks_for(known) - len(shared) > pool.num_free:
            pool.free(shared)
            return False
        sequence.block_table.extend(shared)
        sequence.num_computed = len(shared) * pool.block_size
        sequence.state = SequenceState.RUNNING
        self.num_cached_tokens += sequence.num_computed
        self.running.append(self.waiting.popleft())
        return True

    def _preempt_youngest(self) -> None:
        youngest = self.running.pop()
        self._release(youngest)
        youngest.state = SequenceState.WAITING
        self.waiting.appendleft(youngest)

    def _release(self, sequence: Sequence) -> None:
        self.pool.free(sequence.block_table)
        del sequence.block_table[:]
        sequence.num_computed = 0

    def check(self) -> None:
        """Check every invariant, between steps. Raises AssertionError with the first that fails."""
        self.pool.check()
        arrivals = [sequence.arrival for sequence in (*self.running, *self.waiting)]
        invariant(arrivals == sorted(set(arrivals)), f"not in the order of arrival: {arrivals}")
        invariant(len(self.running) <= self.max_sequences, f"{len(self.running)} sequences run")
        prefilling = [sequence.num_pending > 1 for sequence in self.running[:-1]]
        invariant(not any(prefilling), "a sequence that is not the youngest is still prefilling")
        held: dict[int, int] = {}
        for sequence in self.running:
            table, computed = sequence.block_table, sequence.num_computed
            invariant(sequence.state is SequenceState.RUNNING, f"{sequence} is among the running")
            invariant(0 <= computed < len(sequence.token_ids), f"{sequence} has nothing left to compute")
            invariant(len(table) == self.pool.blocks_for(computed), f"{sequence} has the wrong table length")
            for index, block in enumerate(table):
                held[block] = held.get(block, 0) + 1
                shared = self.pool.references(block) > 1
                full = (index + 1) * self.pool.block_size <= computed
                invariant(full or not shared, f"{sequence} shares block {block}, which it still writes")
        for sequence in self.waiting:
            invariant(sequence.state is SequenceState.WAITING, f"{sequence} is among the waiting")
            invariant(not sequence.block_table and not sequence.num_computed, f"{sequence} holds blocks")
        for block in range(self.pool.num_blocks):
            references = self.pool.references(block)
            invariant(
                references == held.get(block, 0),
                f"block {block} has {references} references, {held.get(block, 0)} tables hold it",
            )
