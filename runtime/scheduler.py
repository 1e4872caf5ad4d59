"""Continuous batching: the choice of tokens and sequences for the next step.

Sequences are served in the order of arrival. Running sequences decode first, and the rest of the step's token
budget prefills the next prompts in chunks. When blocks run out, the youngest running sequence is preempted:
it frees its blocks and waits at the head of the queue to be computed again (its full blocks usually come from
the prefix cache). So the oldest sequence always gets the blocks that it needs. The scheduler rejects
requests that the whole pool cannot hold, so every accepted request finishes.

A backend with pipeline stages computes several steps at the same time. A sequence is in at most one of them,
because its next token follows from that step. Each step takes its share of the running sequences. Blocks of a
sequence in flight are not freed: a sequence is not preempted, and an aborted one keeps its blocks until its
step is committed.
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
    depth: the maximum number of steps in flight, scheduled but neither committed nor rolled back.
    """

    def __init__(
        self, pool: BlockPool, max_batch_tokens: int, max_sequences: int, max_seq_len: int, depth: int = 1
    ) -> None:
        if not 1 <= max_sequences <= max_batch_tokens:
            raise RequestError(
                f"{max_sequences} sequences at once with {max_batch_tokens} tokens a step",
                "each running sequence needs a token a step: use 1 <= max_sequences <= max_batch_tokens",
            )
        self.pool = pool
        self.max_batch_tokens = max_batch_tokens
        self.max_sequences = max_sequences
        self.max_seq_len = max_seq_len
        self.depth = depth
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []  # oldest first
        self.in_flight: dict[Sequence, int] = {}  # with the number of tokens; some may be finished (aborted)
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
        """Return the next step's chunks, with blocks for all their tokens.

        Empty only if nothing is queued, or if it has to wait for a step in flight. The caller must call
        `commit` when the chunks are computed, in the order of the steps, or `rollback` if that failed.
        """
        chunks: list[ScheduledChunk] = []
        budget = self.max_batch_tokens
        short_of_blocks = False
        idle = [sequence for sequence in self.running if sequence not in self.in_flight]
        share = self._share(len(self.running))
        chosen = idle[:share]
        pending = [sequence.num_pending for sequence in chosen]
        decodes = pending.count(1)
        # The oldest comes first. A prefill leaves a token to each decode, so no decode waits for it.
        for sequence, wanted in zip(chosen, pending, strict=True):
            if sequence.state is not SequenceState.RUNNING:
                break  # it and all younger ones have just been preempted
            decodes -= wanted == 1
            count = min(wanted, budget - decodes)
            while count and not self._grow(sequence, count):
                short_of_blocks = True
                if self.running[-1] is sequence or self.running[-1] in self.in_flight:
                    count = 0  # nobody can be preempted now: keep its blocks and wait for free ones
                else:
                    self._preempt_youngest()
                    self.num_preemptions += 1
            if count:
                chunks.append(ScheduledChunk(sequence, count))
                budget -= count
        if short_of_blocks or len(chosen) < len(idle):
            # A sequence that lacks blocks goes first. A small new one would only be preempted for it.
            return self._launch(chunks)
        share = self._share(len(self.running) + len(self.waiting))
        while budget and self.waiting and len(self.running) < self.max_sequences and len(chunks) < share:
            sequence = self.waiting[0]
            if not self._admit(sequence):
                break
            count = min(sequence.num_pending, budget)
            self._grow(sequence, count)
            chunks.append(ScheduledChunk(sequence, count))
            budget -= count
        return self._launch(chunks)

    def commit(self, chunks: list[ScheduledChunk]) -> None:
        """Record that the chunks are in the cache. Their full blocks can now be shared."""
        size = self.pool.block_size
        for sequence, count in chunks:
            del self.in_flight[sequence]
            if sequence.state is SequenceState.FINISHED:
                self._release(sequence)
                continue
            full_before = sequence.num_computed // size
            sequence.num_computed += count
            full = sequence.num_computed // size
            if self.pool.prefix_cache and full > full_before:
                digests = sequence.block_digests(full, size)
                for index in range(full_before, full):
                    self.pool.remember(sequence.block_table[index], digests[index])

    def rollback(self) -> None:
        """Discard the cache and all steps in flight after a failed step. Every sequence is computed again.

        The backend must not compute any of these steps any more.
        """
        for sequence in self.in_flight:
            if sequence.state is SequenceState.FINISHED:
                self._release(sequence)
        self.in_flight.clear()
        while self.running:
            self._preempt_youngest()
        self.pool.forget()

    def finish(self, sequence: Sequence, reason: FinishReason) -> None:
        """Remove a waiting or running sequence and free its blocks, those of a sequence in flight later."""
        if sequence.state is SequenceState.RUNNING:
            self.running.remove(sequence)
            if sequence not in self.in_flight:
                self._release(sequence)
        else:
            self.waiting.remove(sequence)
        sequence.state = SequenceState.FINISHED
        sequence.finish_reason = reason

    def _share(self, sequences: int) -> int:
        """Return how many of so many sequences a step takes, so that all steps in flight have as many."""
        return -(-min(sequences, self.max_sequences) // self.depth)

    def _launch(self, chunks: list[ScheduledChunk]) -> list[ScheduledChunk]:
        self.in_flight.update(chunks)
        return chunks

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
        """Check every invariant, between calls. Raises AssertionError with the first that fails."""
        self.pool.check()
        arrivals = [sequence.arrival for sequence in (*self.running, *self.waiting)]
        invariant(arrivals == sorted(set(arrivals)), f"not in the order of arrival: {arrivals}")
        invariant(len(self.running) <= self.max_sequences, f"{len(self.running)} sequences run")
        prefilling = [
            sequence
            for sequence in self.running
            if sequence.num_pending - self.in_flight.get(sequence, 0) > 1
        ]
        invariant(len(prefilling) <= self.depth, f"{len(prefilling)} sequences are still prefilling")
        invariant(
            self.depth > 1 or prefilling in ([], self.running[-1:]),
            "a sequence that is not the youngest is still prefilling",
        )
        aborted = [sequence for sequence in self.in_flight if sequence.state is SequenceState.FINISHED]
        for sequence in self.running:
            invariant(sequence.state is SequenceState.RUNNING, f"{sequence} is among the running")
        for sequence in self.in_flight:
            invariant(sequence in self.running or sequence in aborted, f"{sequence} is in flight and waits")
        held: dict[int, int] = {}
        for sequence in (*self.running, *aborted):
            table, computed = sequence.block_table, sequence.num_computed
            written = computed + self.in_flight.get(sequence, 0)
            invariant(0 <= computed < len(sequence.token_ids), f"{sequence} has nothing left to compute")
            invariant(written <= len(sequence.token_ids), f"{sequence} computes tokens that it lacks")
            invariant(len(table) == self.pool.blocks_for(written), f"{sequence} has the wrong table length")
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
