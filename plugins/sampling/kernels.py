"""What the choice of next tokens needs of logits float32 [N, vocab], found on the GPU by four Triton kernels.

    argmax_parts, argmax_merge   greedy decoding: the first id of each row's maximum
    top_k_parts, top_k_merge     top-k sampling: every logit that is at least the row's k-th largest

Parts: one program for each CHUNK logits of a row. Merges: one program for each row.

    argmax   result int32 [N]: the id that numpy.argmax finds; -1 where the maximum is NaN or infinite.
    top_k    result int32 [N, 1 + 2 * CAPACITY]: how many there are, the ids in ascending order, the bits of
             their logits. All that tie with the k-th are among them, so k of them or more; all logits of the
             row where it has no k. A count of -1: more than CAPACITY.

Where a row's answer is -1 the host takes the row's logits instead. NaN is larger than every number, so a row
with a NaN has it among its candidates and the host's own check sees it. k is at most CAPACITY.

A k-th largest is found one bit at a time: 32 times, the keys that reach a trial value are counted,
in registers. No atomics and no order between programs: the same logits give the same bits.
"""

# mypy: ignore-errors
# (Triton compiles these bodies itself; to Python they are untyped.)

from __future__ import annotations

import triton
import triton.language as tl

LEAST = tl.constexpr(-(2**31))  # the key of no logit: below that of minus infinity
MOST = tl.constexpr(2**31 - 1)  # of NaN; also turns the order of negative numbers' bits around
INFINITY = tl.constexpr(0x7F800000)
MINUS_INFINITY = tl.constexpr(-0x7F800001)


@triton.jit
def _load_keys(logits, row, ids, vocab):
    """int32 that are ordered as the row's logits are: 0.0 equals -0.0; LEAST past the vocabulary."""
    real = ids < vocab
    x = tl.load(logits + row.to(tl.int64) * vocab + ids, mask=real, other=0.0)
    bits = x.to(tl.int32, bitcast=True)
    bits = tl.where(bits == LEAST, 0, bits)
    keys = tl.where(bits < 0, bits ^ MOST, bits)
    keys = tl.where(x != x, MOST, keys)
    return tl.where(real, keys, LEAST)


@triton.jit
def _kth_largest(keys, k):
    """The largest value that at least k of the keys reach; LEAST if fewer than k are above LEAST."""
    found = tl.where(tl.sum((keys >= 0).to(tl.int32), 0) >= k, 0, LEAST)  # the sign; then the bits below it
    for i in range(31):
        trial = found | (1 << (30 - i))
        found = tl.where(tl.sum((keys >= trial).to(tl.int32), 0) >= k, trial, found)
    return found


@triton.jit
def argmax_parts(partial, logits, vocab, CHUNK: tl.constexpr):
    """An int64 a part: the key of its maximum, and below that its id, turned so that the first is largest."""
    part, row = tl.program_id(0), tl.program_id(1)
    ids = part * CHUNK + tl.arange(0, CHUNK)
    keys = _load_keys(logits, row, ids, vocab)
    best = tl.max((keys.to(tl.int64) << 32) | (MOST - ids), 0)
    tl.store(partial + row * tl.num_programs(0) + part, best)


@triton.jit
def argmax_merge(result, partial, parts, PARTS: tl.constexpr):
    row = tl.program_id(0)
    part = tl.minimum(tl.arange(0, PARTS), parts - 1)
    best = tl.max(tl.load(partial + row * parts + part), 0)
    key = (best >> 32).to(tl.int32)
    first = MOST - (best & MOST).to(tl.int32)
    tl.store(result + row, tl.where((key > MINUS_INFINITY) & (key < INFINITY), first, -1))


@triton.jit
def top_k_parts(part_keys, part_ids, part_counts, part_lost, logits, vocab, k,
                CHUNK: tl.constexpr, TILE: tl.constexpr, CAPACITY: tl.constexpr):  # fmt: skip
    """The part's own candidates, in order. If ties make them too many, none of those that tie with the
    part's k-th is kept (then fewer than k are left), and `part_lost` is the key that they had."""
    part, row = tl.program_id(0), tl.program_id(1)
    index = row * tl.num_programs(0) + part
    chunk = _load_keys(logits, row, part * CHUNK + tl.arange(0, CHUNK), vocab)
    least = _kth_largest(chunk, k)
    reached = tl.sum(((chunk >= least) & (chunk > LEAST)).to(tl.int32), 0)
    lost = tl.where(reached > CAPACITY, least, LEAST)
    count = 0
    for start in range(
        0, CHUNK, TILE
    ):  # again from the cache: so many places at once would fill the registers
        ids = part * CHUNK + start + tl.arange(0, TILE)
        keys = _load_keys(logits, row, ids, vocab)
        kept = (keys >= least) & (keys > lost)
        place = index * CAPACITY + count + tl.cumsum(kept.to(tl.int32), 0) - 1
        tl.store(part_keys + place, keys, mask=kept)
        tl.store(part_ids + place, ids, mask=kept)
        count += tl.sum(kept.to(tl.int32), 0)
    tl.store(part_counts + index, count)
    tl.store(part_lost + index, lost)


@triton.jit
def top_k_merge(result, part_keys, part_ids, part_counts, part_lost, logits, vocab, parts, k,
                PARTS: tl.constexpr, CAPACITY: tl.constexpr):  # fmt: skip
    """Candidates of the row are candidates of their parts. What a part has lost matters only if the row's
    k-th is no larger: then more than CAPACITY logits reach it."""
    row = tl.program_id(0)
    place = tl.arange(0, PARTS * CAPACITY)
    owner = place // CAPACITY
    exists = place % CAPACITY < tl.load(part_counts + row * parts + owner, mask=owner < parts, other=0)
    every = tl.load(part_keys + row * parts * CAPACITY + place, mask=exists, other=LEAST)
    least = _kth_largest(every, k)
    lost = tl.max(tl.load(part_lost + row * parts + tl.minimum(tl.arange(0, PARTS), parts - 1)), 0)
    first = result + row * (1 + 2 * CAPACITY)
    slot = tl.arange(0, CAPACITY)
    total = 0
    for part in range(0, parts):
        index = row * parts + part
        filled = slot < tl.load(part_counts + index)
        keys = tl.load(part_keys + index * CAPACITY + slot, mask=filled, other=LEAST)
        kept = (keys >= least) & filled
        at = total + tl.cumsum(kept.to(tl.int32), 0) - 1
        total += tl.sum(kept.to(tl.int32), 0)
        kept = kept & (at < CAPACITY)
        ids = tl.load(part_ids + index * CAPACITY + slot, mask=kept, other=0)
        x = tl.load(logits + row.to(tl.int64) * vocab + ids, mask=kept, other=0.0)
        tl.store(first + 1 + at, ids, mask=kept)
        tl.store(first + 1 + CAPACITY + at, x.to(tl.int32, bitcast=True), mask=kept)
    whole = (total <= CAPACITY) & ((lost < least) | (lost == LEAST))
    tl.store(first, tl.where(whole, total, -1))
