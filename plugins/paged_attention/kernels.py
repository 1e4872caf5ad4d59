"""`llmc.PagedAttention` on NVIDIA GPUs: four Triton kernels, compiled ahead of time (`compile_kernels.py`).

    write_kv   new keys and values to their places in the cache
    prefill    sequences with two or more new tokens: flash attention over the paged cache
    decode     sequences with one new token: the same, the cache split among several programs
    reduce     puts the splits of `decode` together

`prefill` and `decode` are launched over the whole step and leave the other's sequences alone, so a step may
mix both. Grids follow from shapes alone (`launch.py`): nothing is copied to the host, and a step can be
captured in a CUDA graph. Sequences without new tokens are padding and cost an empty program.

Online softmax: Milakov and Gimelshein 2018 (arXiv:1805.02867). Tiling and the scores that never leave the
chip: FlashAttention-2 (arXiv:2307.08691). Splitting the cache for decoding: Flash-Decoding (Dao et al. 2023).
Query heads that share a key/value head lie in one tile, so that the cache is read once for all of them.
Sinks are logits without a value (gpt-oss): they enter the softmax's denominator only.
FP8 E4M3: OCP 8-bit floating point specification, revision 1.0.

Every size that decides an address is a constexpr. Scores and sums are float32, in units of log2(e), so that
exp is one instruction (exp2). Offsets into caches are 64-bit.
"""

# mypy: ignore-errors
# (Triton compiles these bodies itself; to Python they are untyped.)

from __future__ import annotations

import triton
import triton.language as tl

BLOCK = tl.constexpr(32)  # spec.BLOCK_SIZE: a kernel may only read constexpr globals
LOG2E = tl.constexpr(1.4426950408889634)
E4M3_MAX = tl.constexpr(448.0)
# E4M3 bits shifted into a float16 are the number over 2**8 (exponent biases 15 and 7), subnormals included.
E4M3_IN_HALF = tl.constexpr(256.0)
# Weights that are rounded to float16 are at most 2**15, not 1: small ones keep their bits.
HEADROOM = tl.constexpr(15.0)
HEADROOM_EXP2 = tl.constexpr(32768.0)
# The kinds of mask of a tile: see `_attend`.
ALL_SEEN = tl.constexpr(0)
ALIKE = tl.constexpr(1)
CAUSAL = tl.constexpr(2)
# FP8: how a cache is held. 0: in the model's dtype. 1: E4M3 read by shifts, for GPUs without the conversion
# instruction (before SM89), where the factor E4M3_IN_HALF is left to the scales. 2: E4M3 read by the GPU.


@triton.jit
def _sequence_of(query_start, num_sequences, item, TOKENS: tl.constexpr, CHUNK: tl.constexpr):
    """The sequence that owns a token (TOKENS == 0) or a tile of TOKENS tokens.

    Tiles of sequence s are numbered from query_start[s] // TOKENS + s: room for a partial tile each,
    increasing in s, and known without the other sequences' lengths.
    """
    count = 0
    for first in range(0, num_sequences, CHUNK):
        s = first + tl.arange(0, CHUNK)
        exists = s < num_sequences
        begin = tl.load(query_start + s, mask=exists, other=0)
        if TOKENS > 0:
            begin = begin // TOKENS + s
        count += tl.sum(((begin <= item) & exists).to(tl.int32), 0)
    return count - 1


@triton.jit
def _encode_e4m3(x):
    """float32 -> E4M3 bits: round to nearest even, saturate at 448, NaN stays NaN. For every GPU."""
    bits = x.to(tl.int32, bitcast=True)
    magnitude = tl.minimum(tl.abs(x), E4M3_MAX)
    whole = magnitude.to(tl.int32, bitcast=True)
    # Normal: drop 20 of 23 mantissa bits, nearest even; then the exponent's bias 127 becomes 7.
    normal = ((whole + 0x7FFFF + ((whole >> 20) & 1)) >> 20) - (120 << 3)
    # Below 2**-6 the step is 2**-9: adding 2**23 rounds to a multiple of 1, left in the low bits.
    small = (magnitude * 512.0 + 8388608.0).to(tl.int32, bitcast=True) & 0xF
    code = tl.where(magnitude < 0.015625, small, normal)
    code = tl.where(x != x, 0x7F, code)
    return (code | ((bits >> 24) & 0x80)).to(tl.uint8)


@triton.jit
def _from_cache(x, FP8: tl.constexpr):
    """Cache entries as they are, or E4M3 as float16, exactly; shifts leave them divided by E4M3_IN_HALF."""
    if FP8 == 2:
        result = x.to(tl.float8e4nv, bitcast=True).to(tl.float16)
    elif FP8 == 1:
        code = x.to(tl.uint16)
        result = (((code & 0x80) << 8) | ((code & 0x7F) << 7)).to(tl.float16, bitcast=True)
    else:
        result = x
    return result


@triton.jit
def _load_values(cache, entry, known, WIDTH: tl.constexpr, WIDTH_PAD: tl.constexpr, KEYS: tl.constexpr,
                 MASKED: tl.constexpr, PAIRS: tl.constexpr, FP8: tl.constexpr):  # fmt: skip
    """Values [KEYS, WIDTH_PAD] for the second product, from E4M3 two at a time.

    The product wants a column's keys side by side, and reading from shared memory can turn 16-bit elements
    so, but not bytes, which would be read one by one. PAIRS: two columns are loaded as one number, widened,
    and turned afterwards. (wgmma takes values as they lie.)
    """
    if FP8 > 0 and PAIRS:
        column = tl.arange(0, WIDTH_PAD // 2)[None, :]
        place = cache.to(tl.pointer_type(tl.uint16)) + entry * (WIDTH // 2) + column
        if WIDTH < WIDTH_PAD or MASKED:
            pair = tl.load(place, mask=known[:, None] & (column < WIDTH // 2), other=0)
        else:
            pair = tl.load(place)
        low, high = (pair & 0xFF).to(tl.uint8), (pair >> 8).to(tl.uint8)
        joined = tl.join(_from_cache(low, FP8), _from_cache(high, FP8))
        return tl.reshape(joined, [KEYS, WIDTH_PAD])
    column = tl.arange(0, WIDTH_PAD)[None, :]
    place = cache + entry * WIDTH + column
    if WIDTH < WIDTH_PAD or MASKED:
        return _from_cache(tl.load(place, mask=known[:, None] & (column < WIDTH), other=0), FP8)
    return _from_cache(tl.load(place), FP8)


@triton.jit
def _write_row(source, cache, token, entry, scale, KV_HEADS: tl.constexpr, WIDTH: tl.constexpr,
               HEADS_PAD: tl.constexpr, WIDTH_PAD: tl.constexpr, FP8: tl.constexpr):  # fmt: skip
    """One token's keys or values; `entry` is (block * KV_HEADS) * BLOCK + offset, of head 0."""
    head = tl.arange(0, HEADS_PAD)[:, None]
    column = tl.arange(0, WIDTH_PAD)[None, :]
    real = (head < KV_HEADS) & (column < WIDTH)
    x = tl.load(source + token * (KV_HEADS * WIDTH) + head * WIDTH + column, mask=real, other=0.0)
    if FP8 > 0:
        x = _encode_e4m3(tl.div_rn(x.to(tl.float32), scale))
    tl.store(cache + (entry + head * BLOCK) * WIDTH + column, x, mask=real)


@triton.jit
def write_kv(key, value, key_cache, value_cache,
             query_start, past_lengths, block_indices, block_begins, num_sequences, k_scale, v_scale,
             KV_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, V_HEAD_DIM: tl.constexpr,
             KV_HEADS_PAD: tl.constexpr, HEAD_DIM_PAD: tl.constexpr, V_HEAD_DIM_PAD: tl.constexpr,
             FP8: tl.constexpr, CHUNK: tl.constexpr):  # fmt: skip
    """One program a token. An FP8 cache holds e4m3(x / scale). Tokens past the last sequence are padding."""
    token = tl.program_id(0)
    if token >= tl.load(query_start + num_sequences):
        return
    s = _sequence_of(query_start, num_sequences, token, 0, CHUNK)
    position = tl.load(past_lengths + s) + token - tl.load(query_start + s)
    block = tl.load(block_indices + tl.load(block_begins + s) + position // BLOCK).to(tl.int64)
    entry = block * (KV_HEADS * BLOCK) + position % BLOCK
    wide = token.to(tl.int64)
    _write_row(key, key_cache, wide, entry, k_scale, KV_HEADS, HEAD_DIM, KV_HEADS_PAD, HEAD_DIM_PAD, FP8)
    _write_row(value, value_cache, wide, entry, v_scale,
               KV_HEADS, V_HEAD_DIM, KV_HEADS_PAD, V_HEAD_DIM_PAD, FP8)  # fmt: skip


@triton.jit
def _start(sinks, head, real, with_sink, ROWS: tl.constexpr, HAS_SINKS: tl.constexpr,
           HALF: tl.constexpr):  # fmt: skip
    """Each row's base and sum of exponentials, relative to the base, before the first key.

    The base is the running maximum, less HEADROOM where weights are rounded to float16 (HALF).
    """
    top = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    if HAS_SINKS:
        sink = tl.load(sinks + head, mask=real, other=0.0) * LOG2E
        one = 1.0
        if HALF:
            sink = sink - HEADROOM
            one = HEADROOM_EXP2
        top = tl.where(with_sink, sink, top)
        total = tl.where(with_sink, one, total)
    return top, total


@triton.jit
def _query_in_half(q):
    """bfloat16 rows as float16, times a power of two that brings each row's largest to 2**14..2**15, and
    one over that power. Elements down to 2**-31 of the row's largest keep all their bits."""
    wide = q.to(tl.float32)
    largest = tl.max(tl.abs(wide), 1).to(tl.int32, bitcast=True) >> 23
    largest = tl.maximum(largest, 15)
    grown = wide * ((268 - largest) << 23).to(tl.float32, bitcast=True)[:, None]
    return grown.to(tl.float16), ((largest - 14) << 23).to(tl.float32, bitcast=True)


@triton.jit
def _products(q, key_cache, entry, known, HEAD_DIM: tl.constexpr, HEAD_DIM_PAD: tl.constexpr,
              MASKED: tl.constexpr, FP8: tl.constexpr):  # fmt: skip
    """Queries times a tile's keys, float32."""
    column = tl.arange(0, HEAD_DIM_PAD)[None, :]
    place = key_cache + entry * HEAD_DIM + column
    if HEAD_DIM < HEAD_DIM_PAD or MASKED:
        k = tl.load(place, mask=known[:, None] & (column < HEAD_DIM), other=0)
    else:
        k = tl.load(place)
    return tl.dot(q, tl.trans(_from_cache(k, FP8)))


@triton.jit
def _attend(top, total, sums, q, row_scale, position, key_cache, value_cache, table, kv_head,
            first, begin, end, softcap, window,
            KV_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, V_HEAD_DIM: tl.constexpr,
            HEAD_DIM_PAD: tl.constexpr, V_HEAD_DIM_PAD: tl.constexpr,
            KEYS: tl.constexpr, MASK: tl.constexpr, HAS_WINDOW: tl.constexpr, HAS_SOFTCAP: tl.constexpr,
            FP8: tl.constexpr, VALUES_IN_PAIRS: tl.constexpr, STAGES: tl.constexpr):  # fmt: skip
    """Rows of queries against the keys first <= n < end of one sequence, in tiles of KEYS from `begin`.

    MASK: ALL_SEEN, every row sees every key of every tile, and begin..end is whole tiles; ALIKE, all rows
    see first..end; CAUSAL, each row sees what its `position` lets it. Cache entries outside first..end are
    never used: their blocks may be somebody else's, their contents anything. `row_scale` [ROWS] takes
    scores to units of log2(e). Returns top, total and the unscaled sums of values.

    Block numbers are loaded a tile before their keys, which need not wait for them.
    """
    MASKED: tl.constexpr = MASK != ALL_SEEN
    n = begin + tl.arange(0, KEYS)
    known = (n >= first) & (n < end)
    block = tl.load(table + n // BLOCK, mask=known, other=0)
    for start in tl.range(begin, end, KEYS, num_stages=STAGES):
        n = start + tl.arange(0, KEYS)
        known = (n >= first) & (n < end)
        entry = ((block.to(tl.int64) * KV_HEADS + kv_head) * BLOCK + n % BLOCK)[:, None]
        block = tl.load(table + n // BLOCK + KEYS // BLOCK, mask=n + KEYS < end, other=0)
        scores = _products(q, key_cache, entry, known, HEAD_DIM, HEAD_DIM_PAD, MASKED, FP8)
        if HAS_SOFTCAP:
            # c*tanh(s/c); tanh(x) = 1 - 2/(exp(2x) + 1) stays right when exp overflows.
            grown = tl.exp2(scores * (row_scale * (2.0 / softcap))[:, None])
            scores = (softcap * LOG2E) * (1.0 - 2.0 / (grown + 1.0))
        if MASK == ALIKE:
            scores = tl.where(known[None, :], scores, float("-inf"))
        if MASK == CAUSAL:
            visible = n[None, :] <= position[:, None]
            if HAS_WINDOW:
                visible = visible & (n[None, :] > position[:, None] - window)
            scores = tl.where(visible, scores, float("-inf"))
        peak = tl.max(scores, 1)
        if not HAS_SOFTCAP:
            peak = peak * row_scale
        if q.dtype == tl.float16:
            peak = peak - HEADROOM
        new_top = tl.maximum(top, peak)
        base = tl.where(new_top == float("-inf"), 0.0, new_top)  # nothing seen yet: not inf - inf
        if HAS_SOFTCAP:
            weights = tl.exp2(scores - base[:, None])
        else:
            weights = tl.exp2(scores * row_scale[:, None] - base[:, None])  # one multiply-add
        fade = tl.exp2(top - base)
        total = total * fade + tl.sum(weights, 1)
        v = _load_values(value_cache, entry, known, V_HEAD_DIM, V_HEAD_DIM_PAD, KEYS, MASKED,
                         VALUES_IN_PAIRS, FP8)  # fmt: skip
        sums = tl.dot(weights.to(q.dtype), v, sums * fade[:, None])
        top = new_top
    return top, total, sums


@triton.jit
def _prepared(q, scale, k_scale, ROWS: tl.constexpr, FP8: tl.constexpr):
    """Queries in the dtype of the products, and each row's factor from products to units of log2(e)."""
    if FP8 > 0:
        scale = scale * k_scale
    if FP8 == 1:
        scale = scale * E4M3_IN_HALF
    row_scale = tl.full([ROWS], 1.0, tl.float32) * (scale * LOG2E)
    if FP8 > 0 and q.dtype == tl.bfloat16:
        q, less = _query_in_half(q)
        row_scale = row_scale * less
    return q, row_scale


@triton.jit
def prefill(output, query, key_cache, value_cache,
            query_start, past_lengths, block_indices, block_begins, sinks,
            num_sequences, scale, softcap, window, k_scale, v_scale,
            KV_HEADS: tl.constexpr, GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, V_HEAD_DIM: tl.constexpr,
            HEAD_DIM_PAD: tl.constexpr, V_HEAD_DIM_PAD: tl.constexpr, ROWS: tl.constexpr,
            KEYS: tl.constexpr, HAS_WINDOW: tl.constexpr, HAS_SINKS: tl.constexpr,
            HAS_SOFTCAP: tl.constexpr, FP8: tl.constexpr, VALUES_IN_PAIRS: tl.constexpr,
            CHUNK: tl.constexpr):  # fmt: skip
    """Program (tile, key/value head): ROWS // GROUP tokens of one sequence, GROUP query heads each."""
    TOKENS: tl.constexpr = ROWS // GROUP
    tile = tl.num_programs(0) - 1 - tl.program_id(0)  # a prompt's last tokens, which see most, first
    kv_head = tl.program_id(1)
    s = _sequence_of(query_start, num_sequences, tile, TOKENS, CHUNK)
    begin_token = tl.load(query_start + s)
    new = tl.load(query_start + s + 1) - begin_token
    tile_token = (tile - (begin_token // TOKENS + s)) * TOKENS
    if (new < 2) | (tile_token >= new):
        return
    row = tl.arange(0, ROWS)
    token = tile_token + row // GROUP
    head = kv_head * GROUP + row % GROUP
    real = (row < TOKENS * GROUP) & (token < new)
    past = tl.load(past_lengths + s)
    position = tl.where(real, past + token, -1)

    place = ((begin_token + token).to(tl.int64) * (KV_HEADS * GROUP) + head)[:, None]
    column = tl.arange(0, HEAD_DIM_PAD)[None, :]
    q = tl.load(query + place * HEAD_DIM + column, mask=real[:, None] & (column < HEAD_DIM), other=0.0)

    end = past + tl.minimum(tile_token + TOKENS, new)
    first = 0
    if HAS_WINDOW:
        first = tl.maximum(past + tile_token - window + 1, 0)
    table = block_indices + tl.load(block_begins + s)
    q, row_scale = _prepared(q, scale, k_scale, ROWS, FP8)
    top, total = _start(sinks, head, real, real, ROWS, HAS_SINKS, q.dtype == tl.float16)
    sums = tl.zeros([ROWS, V_HEAD_DIM_PAD], tl.float32)
    edge = first // KEYS * KEYS
    if not HAS_WINDOW:
        edge = (past + tile_token + 1) // KEYS * KEYS  # all rows see all keys before it
        top, total, sums = _attend(
            top, total, sums, q, row_scale, position, key_cache, value_cache, table, kv_head,
            0, 0, edge, softcap, window,
            KV_HEADS, HEAD_DIM, V_HEAD_DIM, HEAD_DIM_PAD, V_HEAD_DIM_PAD, KEYS,
            ALL_SEEN, HAS_WINDOW, HAS_SOFTCAP, FP8, VALUES_IN_PAIRS, None)  # fmt: skip
    top, total, sums = _attend(
        top, total, sums, q, row_scale, position, key_cache, value_cache, table, kv_head,
        first, edge, end, softcap, window,
        KV_HEADS, HEAD_DIM, V_HEAD_DIM, HEAD_DIM_PAD, V_HEAD_DIM_PAD, KEYS,
        CAUSAL, HAS_WINDOW, HAS_SOFTCAP, FP8, VALUES_IN_PAIRS, None if HAS_WINDOW else 1)  # fmt: skip

    share = 1.0 / tl.where(real, total, 1.0)
    if FP8 == 1:
        share = share * E4M3_IN_HALF
    if FP8 > 0:
        share = share * v_scale
    v_column = tl.arange(0, V_HEAD_DIM_PAD)[None, :]
    result = (sums * share[:, None]).to(output.dtype.element_ty)
    tl.store(output + place * V_HEAD_DIM + v_column, result, mask=real[:, None] & (v_column < V_HEAD_DIM))


@triton.jit
def decode(output, partial_sums, partial_top, partial_total, query, key_cache, value_cache,
           query_start, past_lengths, block_indices, block_begins, sinks,
           num_splits, scale, softcap, window, k_scale, v_scale,
           KV_HEADS: tl.constexpr, GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, V_HEAD_DIM: tl.constexpr,
           HEAD_DIM_PAD: tl.constexpr, V_HEAD_DIM_PAD: tl.constexpr, ROWS: tl.constexpr,
           KEYS: tl.constexpr, HAS_WINDOW: tl.constexpr, HAS_SINKS: tl.constexpr,
           HAS_SOFTCAP: tl.constexpr, FP8: tl.constexpr, VALUES_IN_PAIRS: tl.constexpr):  # fmt: skip
    """Program (sequence, key/value head, split): a contiguous share of the keys that the token sees.

    With one split the result goes to `output`. With more, the program leaves its maximum (units of log2),
    its sum of exponentials and its unscaled sums of values in [S, num_heads, num_splits(, Dv)]; a share
    without keys leaves the maximum -inf and nothing else.
    """
    s = tl.program_id(0)
    kv_head = tl.program_id(1)
    split = tl.program_id(2)
    token = tl.load(query_start + s)
    if tl.load(query_start + s + 1) - token != 1:
        return
    row = tl.arange(0, ROWS)
    head = kv_head * GROUP + row
    real = row < GROUP
    place = (token.to(tl.int64) * (KV_HEADS * GROUP) + head)[:, None]
    column = tl.arange(0, HEAD_DIM_PAD)[None, :]
    v_column = tl.arange(0, V_HEAD_DIM_PAD)[None, :]
    v_real = real[:, None] & (v_column < V_HEAD_DIM)

    last = tl.load(past_lengths + s)
    first = 0
    if HAS_WINDOW:
        first = tl.maximum(last - window + 1, 0)
    lowest = first // KEYS * KEYS
    share_keys = tl.cdiv(tl.cdiv(last + 1 - lowest, KEYS), num_splits) * KEYS
    begin = lowest + split * share_keys
    end = tl.minimum(begin + share_keys, last + 1)
    partial = (s.to(tl.int64) * (KV_HEADS * GROUP) + head) * num_splits + split
    if begin >= end:
        tl.store(partial_top + partial, tl.full([ROWS], float("-inf"), tl.float32), mask=real)
        return

    q = tl.load(query + place * HEAD_DIM + column, mask=real[:, None] & (column < HEAD_DIM), other=0.0)
    table = block_indices + tl.load(block_begins + s)
    q, row_scale = _prepared(q, scale, k_scale, ROWS, FP8)
    top, total = _start(sinks, head, real, real & (split == 0), ROWS, HAS_SINKS, q.dtype == tl.float16)
    sums = tl.zeros([ROWS, V_HEAD_DIM_PAD], tl.float32)
    top, total, sums = _attend(
        top, total, sums, q, row_scale, last, key_cache, value_cache, table, kv_head,
        first, begin, end, softcap, window,
        KV_HEADS, HEAD_DIM, V_HEAD_DIM, HEAD_DIM_PAD, V_HEAD_DIM_PAD, KEYS,
        ALIKE, HAS_WINDOW, HAS_SOFTCAP, FP8, VALUES_IN_PAIRS, None)  # fmt: skip
    if FP8 == 1:
        sums = sums * E4M3_IN_HALF
    if FP8 > 0:
        sums = sums * v_scale
    if num_splits == 1:
        result = (sums / tl.where(real, total, 1.0)[:, None]).to(output.dtype.element_ty)
        tl.store(output + place * V_HEAD_DIM + v_column, result, mask=v_real)
    else:
        tl.store(partial_top + partial, top, mask=real)
        tl.store(partial_total + partial, total, mask=real)
        tl.store(partial_sums + partial[:, None] * V_HEAD_DIM + v_column, sums, mask=v_real)


@triton.jit
def reduce(output, partial_sums, partial_top, partial_total, query_start, num_splits,
           HEADS: tl.constexpr, V_HEAD_DIM: tl.constexpr, V_HEAD_DIM_PAD: tl.constexpr,
           MAX_SPLITS: tl.constexpr):  # fmt: skip
    """Program (sequence, query head): the splits' sums, brought to one maximum and added."""
    s = tl.program_id(0)
    head = tl.program_id(1)
    token = tl.load(query_start + s)
    if tl.load(query_start + s + 1) - token != 1:
        return
    begin = (s.to(tl.int64) * HEADS + head) * num_splits
    split = tl.arange(0, MAX_SPLITS)
    tops = tl.load(partial_top + begin + split, mask=split < num_splits, other=float("-inf"))
    top = tl.max(tops, 0)
    totals = tl.load(partial_total + begin + split, mask=tops > float("-inf"), other=0.0)
    total = tl.sum(totals * tl.exp2(tops - top), 0)
    column = tl.arange(0, V_HEAD_DIM_PAD)
    sums = tl.zeros([V_HEAD_DIM_PAD], tl.float32)
    for i in range(0, num_splits):
        own = tl.load(partial_top + begin + i)
        written = tl.where(own == float("-inf"), 0, V_HEAD_DIM)
        x = tl.load(partial_sums + (begin + i) * V_HEAD_DIM + column, mask=column < written, other=0.0)
        sums += x * tl.exp2(own - top)
    place = (token.to(tl.int64) * HEADS + head) * V_HEAD_DIM
    tl.store(output + place + column, (sums / total).to(output.dtype.element_ty), mask=column < V_HEAD_DIM)
