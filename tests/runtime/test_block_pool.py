"""The block pool: who owns a block, and what the prefix cache may hand out."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from llmc.runtime.block_pool import BlockPool, hash_block


def chain(*blocks: list[int]) -> list[bytes]:
    digests: list[bytes] = []
    for tokens in blocks:
        digests.append(hash_block(digests[-1] if digests else b"", tokens))
    return digests


def remembered(pool: BlockPool, digests: list[bytes]) -> list[int]:
    """Blocks under these digests, held by nobody."""
    blocks = pool.allocate(len(digests))
    for block, digest in zip(blocks, digests, strict=True):
        pool.remember(block, digest)
    pool.free(blocks)
    return blocks


def test_no_block_is_handed_out_twice() -> None:
    pool = BlockPool(4)
    assert sorted(pool.allocate(3) + pool.allocate(1)) == [0, 1, 2, 3]
    with pytest.raises(ValueError, match="1 blocks wanted, 0 of 4 are free"):
        pool.allocate(1)


def test_a_shared_block_stays_until_its_last_holder_lets_go() -> None:
    pool = BlockPool(2)
    blocks = pool.allocate(2)
    pool.share(blocks)
    pool.free(blocks)
    assert pool.num_free == 0
    pool.free(blocks)
    assert pool.num_free == 2
    with pytest.raises(ValueError, match="nobody holds it"):
        pool.free(blocks[:1])
    with pytest.raises(ValueError, match="nothing to share"):
        pool.share(blocks[:1])
    pool.check()


def test_the_same_prefix_finds_its_blocks_and_another_prefix_does_not() -> None:
    pool = BlockPool(4)
    digests = chain([1, 2], [3, 4], [5, 6])
    blocks = remembered(pool, digests)
    assert pool.match(chain([1, 2], [3, 4], [7, 8])) == blocks[:2]
    assert pool.match(chain([9, 9], [3, 4])) == []  # equal tokens after another beginning
    assert pool.num_used == 2
    pool.check()


def test_cached_blocks_count_as_free_and_the_oldest_is_evicted_first() -> None:
    pool = BlockPool(4)
    old, new = chain([1]), chain([2])
    remembered(pool, old)
    new_block = remembered(pool, new)
    assert pool.num_free == 4
    pool.allocate(3)  # two empty blocks, then the older cached one
    assert pool.match(old) == []
    assert pool.match(new) == new_block
    pool.check()


def test_a_prefix_is_evicted_from_its_end() -> None:
    pool = BlockPool(3)
    digests = chain([1], [2], [3])
    blocks = remembered(pool, digests)
    pool.allocate(2)
    assert pool.match(digests) == blocks[:1]


def test_reuse_protects_a_cached_block_from_eviction() -> None:
    pool = BlockPool(2)
    first, second = chain([1]), chain([2])
    remembered(pool, first)
    remembered(pool, second)
    pool.free(pool.match(first))  # now the second was released longest ago
    pool.allocate(1)
    assert pool.match(second) == []
    assert len(pool.match(first)) == 1


def test_of_two_blocks_with_equal_content_only_one_is_cached() -> None:
    pool = BlockPool(2)
    blocks = pool.allocate(2)
    for block in blocks:
        pool.remember(block, chain([1])[0])
    pool.free(blocks)
    assert pool.match(chain([1])) == blocks[:1]
    pool.check()


def test_without_prefix_cache_nothing_is_remembered() -> None:
    pool = BlockPool(2, prefix_cache=False)
    remembered(pool, chain([1]))
    assert pool.match(chain([1])) == []
    pool.check()


def test_after_forget_nothing_is_found_and_held_blocks_stay_held() -> None:
    pool = BlockPool(3)
    held = pool.allocate(1)
    pool.remember(held[0], chain([1])[0])
    remembered(pool, chain([2]))
    pool.forget()
    assert pool.match(chain([1])) == pool.match(chain([2])) == []
    assert pool.num_used == 1
    pool.check()


def test_check_notices_a_lost_block() -> None:
    pool = BlockPool(3)
    pool._empty.pop()
    with pytest.raises(AssertionError, match="block 0 has 0 references"):
        pool.check()


class PoolMachine(RuleBasedStateMachine):
    """Random holders of random prefixes over a pool of five blocks, against a model of who holds what."""

    def __init__(self) -> None:
        super().__init__()
        self.pool = BlockPool(5, block_size=1)
        self.tables: list[list[int]] = []
        self.content: dict[int, bytes] = {}  # what was last written into a block

    @rule(tokens=st.lists(st.integers(0, 1), min_size=1, max_size=4))
    def take_up_a_prefix_and_compute_the_rest(self, tokens: list[int]) -> None:
        digests = chain(*([token] for token in tokens))
        table = self.pool.match(digests[:-1])
        for block, digest in zip(table, digests, strict=False):
            assert self.content[block] == digest
        missing = len(tokens) - len(table)
        if missing > self.pool.num_free:
            self.pool.free(table)
            return
        table += self.pool.allocate(missing)
        for block, digest in list(zip(table, digests, strict=True))[-missing:]:
            assert not any(block in other for other in self.tables)
            self.content[block] = digest
            self.pool.remember(block, digest)
        self.tables.append(table)

    @precondition(lambda self: self.tables)
    @rule(data=st.data())
    def free(self, data: st.DataObject) -> None:
        self.pool.free(self.tables.pop(data.draw(st.integers(0, len(self.tables) - 1))))

    @precondition(lambda self: self.tables)
    @rule(data=st.data())
    def share(self, data: st.DataObject) -> None:
        table = data.draw(st.sampled_from(self.tables))
        self.pool.share(table)
        self.tables.append(list(table))

    @rule()
    def forget(self) -> None:
        self.pool.forget()

    @invariant()
    def holds(self) -> None:
        self.pool.check()
        for block in range(self.pool.num_blocks):
            assert self.pool.references(block) == sum(block in table for table in self.tables)

    def teardown(self) -> None:
        for table in self.tables:
            self.pool.free(table)
        self.pool.check()
        assert self.pool.num_used == 0


TestPoolMachine = PoolMachine.TestCase
TestPoolMachine.settings = settings(max_examples=60, stateful_step_count=30)
