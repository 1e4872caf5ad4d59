"""Ownership of KV cache blocks: reference counts, and a prefix cache of full blocks.

A block is used, cached, or empty. Sequences hold references to a used block. A cached block has no
references, but it can be found by the hash of its content and used again. Cached blocks count as free.
Allocation takes empty blocks first and then evicts the cached block that was released longest ago.
"""

from __future__ import annotations

import hashlib
from array import array
from collections import OrderedDict
from collections.abc import Iterable, Sequence

from llmc.plugins.paged_attention.spec import BLOCK_SIZE


def hash_block(previous: bytes, token_ids: Sequence[int]) -> bytes:
    """Return the hash of a full block: 32 bytes over its tokens and, through `previous`, all tokens before.

    The hash is cryptographic, because a collision would show one user's context to another.
    """
    return hashlib.blake2b(previous + array("i", token_ids).tobytes(), digest_size=32).digest()


class BlockPool:
    """The blocks 0 .. num_blocks-1 of a KV cache, with `block_size` tokens each.

    prefix_cache: False keeps no freed block for reuse.
    """

    def __init__(self, num_blocks: int, block_size: int = BLOCK_SIZE, prefix_cache: bool = True) -> None:
        if num_blocks < 1 or block_size < 1:
            raise ValueError(f"a pool of {num_blocks} blocks of {block_size} tokens")
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.prefix_cache = prefix_cache
        self._references = [0] * num_blocks
        self._empty = list(range(num_blocks - 1, -1, -1))  # a stack that starts with low numbers
        self._cached: OrderedDict[int, None] = OrderedDict()  # in the order of release
        self._block_of: dict[bytes, int] = {}
        self._hash_of: dict[int, bytes] = {}

    @property
    def num_free(self) -> int:
        """Number of blocks that `allocate` can return now, if it evicts cached blocks."""
        return len(self._empty) + len(self._cached)

    @property
    def num_used(self) -> int:
        """Number of blocks that sequences hold."""
        return self.num_blocks - self.num_free

    def blocks_for(self, num_tokens: int) -> int:
        """Return the number of blocks for `num_tokens` tokens of one sequence."""
        return -(-num_tokens // self.block_size)

    def references(self, block: int) -> int:
        """Return how many sequences hold `block`."""
        return self._references[block]

    def allocate(self, count: int) -> list[int]:
        """Return `count` blocks of undefined content, each held once. Raises ValueError if fewer are free."""
        if count > self.num_free:
            raise ValueError(f"{count} blocks wanted, {self.num_free} of {self.num_blocks} are free")
        blocks = []
        for _ in range(count):
            if self._empty:
                block = self._empty.pop()
            else:
                block, _ = self._cached.popitem(last=False)
                del self._block_of[self._hash_of.pop(block)]
            self._references[block] = 1
            blocks.append(block)
        return blocks

    def share(self, blocks: Iterable[int]) -> None:
        """Add a reference to each block. Cached blocks become used."""
        for block in blocks:
            if self._references[block] == 0:
                if block not in self._cached:
                    raise ValueError(f"block {block} is empty, there is nothing to share")
                del self._cached[block]
            self._references[block] += 1

    def free(self, blocks: Sequence[int]) -> None:
        """Drop one reference to each block of a sequence's table.

        The last block comes first, so that the end of a prefix is evicted before its beginning.
        """
        for block in reversed(blocks):
            if self._references[block] == 0:
                raise ValueError(f"block {block} is freed, but nobody holds it")
            self._references[block] -= 1
            if self._references[block] == 0:
                if block in self._hash_of:
                    self._cached[block] = None
                else:
                    self._empty.append(block)

    def remember(self, block: int, digest: bytes) -> None:
        """Put a used block, full and computed, into the prefix cache. The first of two equal blocks stays."""
        if self.prefix_cache and digest not in self._block_of and block not in self._hash_of:
            self._block_of[digest] = block
            self._hash_of[block] = digest

    def match(self, digests: Iterable[bytes]) -> list[int]:
        """Return the cached blocks of the longest prefix, in order, and add a reference to each."""
        blocks = []
        for digest in digests:
            block = self._block_of.get(digest)
            if block is None:
                break
            blocks.append(block)
        self.share(blocks)
        return blocks

    def forget(self) -> None:
        """Empty the prefix cache. Used blocks stay used and lose their hash."""
        self._empty.extend(self._cached)
        self._cached.clear()
        self._block_of.clear()
        self._hash_of.clear()

    def check(self) -> None:
        """Check every invariant of the pool. Raises AssertionError with the first that fails."""
        empty, cached = set(self._empty), set(self._cached)
        invariant(len(empty) == len(self._empty), f"an empty block is listed twice: {self._empty}")
        invariant(not empty & cached, f"blocks both empty and cached: {empty & cached}")
        for block, count in enumerate(self._references):
            free = block in empty or block in cached
            invariant(count >= 0, f"block {block} has {count} references")
            invariant(free == (count == 0), f"block {block} has {count} references, free: {free}")
        for digest, block in self._block_of.items():
            invariant(self._hash_of.get(block) == digest, f"the hash of block {block} leads nowhere")
        invariant(len(self._hash_of) == len(self._block_of), "two blocks are cached under one hash")
        for block in cached:
            invariant(block in self._hash_of, f"cached block {block} has no hash")
        for block in empty:
            invariant(block not in self._hash_of, f"empty block {block} has a hash")
        invariant(self.prefix_cache or not self._hash_of, "a pool without prefix cache remembers blocks")
        invariant(self.num_free + self.num_used == self.num_blocks, "free and used do not add up")


def invariant(holds: bool, message: str) -> None:
    """Raise AssertionError(message) unless `holds`. Unlike `assert`, this also works under python -O."""
    if not holds:
        raise AssertionError(message)
