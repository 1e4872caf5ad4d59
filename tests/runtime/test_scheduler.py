"""The scheduler: who computes what in a step, who waits, and that everybody is finished in the end."""

from __future__ import annotations

from collections import deque
from itertools import chain
from typing import NamedTuple

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from llmc.runtime.batch import build_batch
from llmc.runtime.block_pool import BlockPool
from llmc.runtime.errors import RequestError
from llmc.runtime.sampling import SamplingParams
from llmc.runtime.scheduler import ScheduledChunk, Scheduler
from llmc.runtime.sequence import Sequence, SequenceState


def scheduler(
    blocks: int = 16, size: int = 4, tokens: int = 8, sequences: int = 4, depth: int = 1, **pool: bool
) -> Scheduler:
    return Scheduler(BlockPool(blocks, size, **pool), tokens, sequences, max_seq_len=64, depth=depth)


def request(name: str, length: int, max_tokens: int = 4, first: int = 0) -> Sequence:
    return Sequence(name, range(first, first + length), SamplingParams(max_tokens=max_tokens))


def step(it: Scheduler, token: int = 7) -> dict[str, int]:
    """Computes a step; a sequence whose tokens are all computed gets a next one, or is finished."""
    chunks = it.schedule()
    it.commit(chunks)
    for sequence, _ in chunks:
        if not sequence.num_pending:
            sequence.token_ids.append(token)
            if sequence.num_output == sequence.params.max_tokens:
                it.finish(sequence, "length")
    it.check()
    return {sequence.request_id: count for sequence, count in chunks}


def test_a_long_prompt_is_prefilled_in_chunks_of_the_token_budget() -> None:
    it = scheduler()
    it.add(request("a", 20))
    assert [step(it) for _ in range(4)] == [{"a": 8}, {"a": 8}, {"a": 4}, {"a": 1}]


def test_decodes_go_before_prefill_and_prefill_takes_the_rest_of_the_budget() -> None:
    it = scheduler()
    it.add(request("a", 3))
    assert step(it) == {"a": 3}
    it.add(request("b", 20, first=30))
    assert list(step(it).items()) == [("a", 1), ("b", 7)]
    assert list(step(it).items()) == [("a", 1), ("b", 7)]


def test_no_more_sequences_run_than_allowed_and_the_next_one_follows() -> None:
    it = scheduler(sequences=2)
    for name in "abc":
        it.add(request(name, 2, max_tokens=2))
    assert step(it) == {"a": 2, "b": 2}
    assert step(it) == {"a": 1, "b": 1}
    assert step(it) == {"c": 2}


def test_a_prompt_waits_until_the_pool_can_hold_all_of_it() -> None:
    it = scheduler(blocks=4, prefix_cache=False)
    it.add(request("a", 8, max_tokens=3))
    it.add(request("b", 6, first=20))
    assert step(it) == {"a": 8}
    assert step(it) == {"a": 1}  # three blocks; b needs two
    assert step(it) == {"a": 1}
    assert step(it) == {"b": 6}


def test_the_youngest_is_preempted_and_returns_to_the_head_of_the_queue() -> None:
    it = scheduler(blocks=4, prefix_cache=False)
    a, b, c = request("a", 7, max_tokens=8), request("b", 5, max_tokens=8, first=20), request("c", 1)
    for sequence in (a, b, c):
        it.add(sequence)
    step(it)
    step(it)
    assert [len(a.block_table), len(b.block_table), c.state] == [2, 2, SequenceState.WAITING]
    step(it)  # a needs its third block: b gives its two back
    assert b.state is SequenceState.WAITING
    assert list(it.waiting) == [b, c]
    assert b.num_computed == 0
    assert not b.block_table
    assert it.num_preemptions == 1


def test_the_youngest_pauses_with_its_blocks_when_only_it_is_short_of_them() -> None:
    it = scheduler(blocks=4, prefix_cache=False)
    it.add(request("a", 5))
    it.add(request("b", 7, first=20))
    assert step(it) == {"a": 5, "b": 3}
    assert step(it) == {"a": 1, "b": 4}
    assert step(it) == {"a": 1, "b": 1}
    assert step(it) == {"a": 1}  # b needs a third block, and nobody is younger
    assert step(it) == {"b": 1}
    assert it.num_preemptions == 0


def test_no_newcomer_overtakes_a_prefill_that_is_short_of_blocks() -> None:
    it = scheduler(blocks=6, prefix_cache=False)
    it.add(request("a", 7, max_tokens=3))
    it.add(request("b", 16, max_tokens=2, first=20))
    it.add(request("c", 1))
    assert step(it) == {"a": 7, "b": 1}
    assert step(it) == {"a": 1, "b": 7}
    assert step(it) == {"a": 1}  # a takes the fifth block, b needs two: the sixth is not for c
    assert step(it) == {"b": 8}


def test_a_preempted_sequence_finds_its_blocks_in_the_prefix_cache() -> None:
    it = scheduler(blocks=6)
    a, b = request("a", 7, max_tokens=8), request("b", 9, max_tokens=8, first=20)
    it.add(a)
    it.add(b)
    while not it.num_preemptions:
        step(it)
    assert b.state is SequenceState.WAITING
    while b.state is SequenceState.WAITING:
        step(it)
    assert it.num_cached_tokens == 8  # both full blocks of b's prompt


def test_an_equal_prompt_is_shared_except_for_its_last_token() -> None:
    it = scheduler()
    a, b = request("a", 8), request("b", 8)
    it.add(a)
    assert step(it) == {"a": 8}
    it.add(b)
    assert step(it) == {"a": 1, "b": 4}  # 8 tokens are two full blocks, but only one may be taken over
    assert b.block_table[0] == a.block_table[0]
    assert b.block_table[1] != a.block_table[1]


def test_without_prefix_cache_nothing_is_shared() -> None:
    it = scheduler(prefix_cache=False)
    it.add(request("a", 8))
    step(it)
    it.add(request("b", 8))
    assert step(it) == {"a": 1, "b": 7}


def test_a_request_that_can_never_fit_the_pool_is_refused_with_the_numbers() -> None:
    it = scheduler(blocks=3)
    with pytest.raises(RequestError, match="need 4 cache blocks of 4 tokens, the engine has 3") as caught:
        it.add(request("a", 10, max_tokens=4))
    assert "lower --max-tokens to 3, or raise --kv-memory: it holds 12 tokens" in caught.value.hint
    it.add(request("a", 10, max_tokens=3))  # the last token is never computed: 12 are
    with pytest.raises(RequestError, match="15 prompt tokens") as caught:
        it.add(request("b", 15, max_tokens=1))
    assert "shorten the prompt" in caught.value.hint


def test_a_prompt_that_fills_the_context_is_refused() -> None:
    with pytest.raises(RequestError, match="the prompt has 64 tokens, the context 64"):
        scheduler(blocks=64).add(request("a", 64))


def test_the_context_limits_what_a_request_can_need() -> None:
    scheduler(blocks=16).add(request("a", 60, max_tokens=10**9))


def test_more_sequences_than_tokens_in_a_step_are_refused() -> None:
    with pytest.raises(RequestError, match="4 sequences at once with 3 tokens a step"):
        scheduler(tokens=3)


def names(chunks: list[ScheduledChunk]) -> dict[str, int]:
    return {sequence.request_id: count for sequence, count in chunks}


def decode(it: Scheduler, chunks: list[ScheduledChunk]) -> None:
    """Commits a step; all its sequences get a next token."""
    it.commit(chunks)
    for sequence, _ in chunks:
        sequence.token_ids.append(7)
    it.check()


def test_steps_in_flight_share_the_sequences_evenly() -> None:
    it = scheduler(depth=2, sequences=8)
    requests = [request(name, 1) for name in "abcdefg"]
    for each in requests:
        it.add(each)
    first, second = it.schedule(), it.schedule()
    assert [names(first), names(second)] == [dict.fromkeys("abcd", 1), dict.fromkeys("efg", 1)]
    assert it.schedule() == []
    decode(it, first)
    assert names(it.schedule()) == dict.fromkeys("abcd", 1)
    decode(it, second)
    for name in "efg":
        it.finish(next(each for each in requests if each.request_id == name), "length")
    assert it.schedule() == []  # all others are in flight
    decode(it, [ScheduledChunk(each, 1) for each in requests[:4]])
    first, second = it.schedule(), it.schedule()
    assert [names(first), names(second)] == [{"a": 1, "b": 1}, {"c": 1, "d": 1}]


def test_no_decode_waits_for_an_older_prefill() -> None:
    it = scheduler(depth=2, tokens=8)
    a, b = request("a", 30), request("b", 2, first=40)
    it.add(a)
    it.add(b)
    first, second = it.schedule(), it.schedule()
    assert [names(first), names(second)] == [{"a": 8}, {"b": 2}]
    it.commit(first)
    decode(it, second)
    c = request("c", 1)
    it.add(c)
    assert names(it.schedule()) == {"a": 8}  # a step has at most half of the sequences
    assert names(it.schedule()) == {"b": 1, "c": 1}


def test_an_aborted_sequence_in_flight_keeps_its_blocks_until_its_step_is_computed() -> None:
    it = scheduler(depth=2, blocks=4)
    a, b = request("a", 8), request("b", 8, first=20)
    it.add(a)
    chunks = it.schedule()
    it.finish(a, "abort")
    it.check()
    it.add(b)
    assert it.pool.num_used == 2
    second = it.schedule()
    assert names(second) == {"b": 8}
    it.commit(chunks)
    it.check()
    assert it.pool.num_used == 2
    assert not set(b.block_table) & set(a.block_table)
    assert it.schedule() == []
    decode(it, second)


def test_a_sequence_in_flight_is_not_preempted() -> None:
    it = scheduler(depth=2, blocks=4, prefix_cache=False)
    a, b = request("a", 8, max_tokens=8), request("b", 8, max_tokens=8, first=20)
    it.add(a)
    it.add(b)
    first, second = it.schedule(), it.schedule()
    decode(it, first)
    assert it.schedule() == []  # a needs a third block, and b is in flight
    decode(it, second)
    assert names(it.schedule()) == {"a": 1}
    assert b.state is SequenceState.WAITING
    assert it.num_preemptions == 1


def test_after_a_failed_step_every_block_is_free_and_everybody_waits_in_order() -> None:
    it = scheduler()
    for name in "abc":
        it.add(request(name, 3))
    step(it)
    it.schedule()
    it.rollback()
    it.check()
    assert it.pool.num_used == 0
    assert [sequence.request_id for sequence in it.waiting] == ["a", "b", "c"]


def test_a_batch_packs_tokens_positions_tables_and_wanted_logits() -> None:
    it = scheduler()
    a, b = request("a", 6), request("b", 9, first=30)
    it.add(a)
    step(it, token=7)
    it.add(b)
    chunks = it.schedule()
    batch, sampled = build_batch(chunks)
    assert batch.input_ids.tolist() == [7, 30, 31, 32, 33, 34, 35, 36]
    assert batch.position_ids.tolist() == [6, 0, 1, 2, 3, 4, 5, 6]
    assert batch.query_start.tolist() == [0, 1, 8]
    assert batch.past_lengths.tolist() == [6, 0]
    assert batch.block_begins.tolist() == [0, 2, 4]
    assert batch.block_indices.tolist() == [*a.block_table, *b.block_table]
    assert batch.logits_index.tolist() == [0]  # b's prompt goes on in the next step
    assert sampled == [a]
    assert {array.dtype for array in vars(batch).values()} == {np.dtype(np.int32)}


def test_a_batch_from_the_middle_of_a_prompt_wants_no_logits() -> None:
    it = scheduler()
    it.add(request("a", 20))
    batch, sampled = build_batch(it.schedule())
    assert batch.logits_index.shape == (0,)
    assert batch.logits_index.dtype == np.int32
    assert sampled == []


class Flight(NamedTuple):
    """A step in flight: its chunks, the block table of each, and the blocks that it writes."""

    chunks: list[ScheduledChunk]
    tables: list[list[int]]
    written: set[int]


class SchedulerMachine(RuleBasedStateMachine):
    """Random requests, steps, failures and aborts; tiny pools, so that blocks run out all the time.

    Up to `depth` steps are in flight. What they compute is written down when they are scheduled.
    """

    @initialize(
        blocks=st.integers(3, 8), size=st.integers(1, 4), tokens=st.integers(1, 9), cache=st.booleans(),
        sequences=st.integers(1, 4), depth=st.integers(1, 3),
    )  # fmt: skip
    def start(self, blocks: int, size: int, tokens: int, cache: bool, sequences: int, depth: int) -> None:
        pool = BlockPool(blocks, size, cache)
        self.it = Scheduler(pool, tokens, min(sequences, tokens), max_seq_len=20, depth=depth)
        self.alive: list[Sequence] = []
        self.flights: deque[Flight] = deque()

    @rule(prompt=st.lists(st.integers(0, 1), min_size=1, max_size=12), max_tokens=st.integers(1, 8))
    def add(self, prompt: list[int], max_tokens: int) -> None:
        sequence = Sequence(str(len(self.alive)), prompt, SamplingParams(max_tokens=max_tokens))
        try:
            self.it.add(sequence)
            self.alive.append(sequence)
        except RequestError:
            needed = min(len(prompt) + max_tokens, 20) - 1
            assert needed > self.it.pool.num_blocks * self.it.pool.block_size

    @precondition(lambda self: len(self.flights) < self.it.depth)
    @rule()
    def schedule(self) -> None:
        it = self.it
        chunks = it.schedule()
        if not self.flights:
            assert bool(chunks) == bool(self.alive), "a step with nothing to do although somebody waits"
        if not chunks:
            return
        assert sum(count for _, count in chunks) <= it.max_batch_tokens
        flight = Flight(chunks, [list(sequence.block_table) for sequence, _ in chunks], set())
        for sequence, count in chunks:
            assert 1 <= count <= sequence.num_pending
            end = sequence.num_computed + count
            assert len(sequence.block_table) == it.pool.blocks_for(end)
            written = sequence.block_table[sequence.num_computed // it.pool.block_size :]
            assert all(it.pool.references(block) == 1 for block in written), "a shared block is written"
            flight.written.update(written)
        for other in self.flights:
            assert not {s for s, _ in chunks} & {s for s, _ in other.chunks}, "a sequence is in two steps"
            assert flight.written.isdisjoint(chain(*other.tables)), "a block in flight is given away"
            assert other.written.isdisjoint(chain(*flight.tables)), "a block is read before it is written"
        self.flights.append(flight)

    @precondition(lambda self: self.flights)
    @rule(token=st.integers(0, 1), fails=st.integers(0, 9))
    def commit(self, token: int, fails: int) -> None:
        it = self.it
        if fails == 0:
            it.rollback()
            self.flights.clear()
            return
        chunks, tables, _ = self.flights.popleft()
        for (sequence, _), table in zip(chunks, tables, strict=True):
            assert list(sequence.block_table) == table
            assert all(it.pool.references(block) for block in table), "a block in flight is free"
        it.commit(chunks)
        for sequence, _ in chunks:
            if not sequence.num_pending and sequence.state is not SequenceState.FINISHED:
                sequence.token_ids.append(token)
                if sequence.num_output == sequence.params.max_tokens or len(sequence.token_ids) == 20:
                    it.finish(sequence, "length")
                    self.alive.remove(sequence)

    @precondition(lambda self: self.alive)
    @rule(data=st.data())
    def abort(self, data: st.DataObject) -> None:
        sequence = self.alive.pop(data.draw(st.integers(0, len(self.alive) - 1)))
        self.it.finish(sequence, "abort")

    @invariant()
    def holds(self) -> None:
        if hasattr(self, "it"):
            self.it.check()

    def teardown(self) -> None:
        if not hasattr(self, "it"):
            return
        for _ in range(2000):
            while len(self.flights) < self.it.depth:
                before = len(self.flights)
                self.schedule()
                self.it.check()
                if len(self.flights) == before:
                    break
            if not self.flights:
                break
            self.commit(token=1, fails=1)
            self.it.check()
        assert not self.alive, "not finished after 2000 steps"
        assert self.it.pool.num_used == 0


TestSchedulerMachine = SchedulerMachine.TestCase
TestSchedulerMachine.settings = settings(max_examples=80, stateful_step_count=50)
