"""The contract of `llmc.PagedAttention`: one place for names, shapes, attributes and the ABI version.

A step holds T tokens of S sequences, packed end to end. Sequence s owns the tokens
query_start[s] .. query_start[s+1] and already has past_lengths[s] tokens in the cache. Its cache blocks,
in order of position, are block_indices[block_begins[s] .. block_begins[s+1]] (CSR); they cover the past
and the new tokens. The operator first writes the keys and values of the new tokens to their places, then
attends: a token at position p sees positions 0..p, or p-window+1..p when window > 0.

    inputs      query        [T, num_heads*D]          model dtype
                key          [T, num_kv_heads*D]
                value        [T, num_kv_heads*Dv]
                key_cache    [blocks, num_kv_heads, 32, D]     model dtype, or FLOAT8E4M3FN both
                value_cache  [blocks, num_kv_heads, 32, Dv]
                query_start [S+1], past_lengths [S], block_indices [n], block_begins [S+1]   int32
    outputs     output [T, num_heads*Dv]; key_cache_out, value_cache_out: the caches after the writes.
                An engine writes in place: output cache and input cache are the same memory.
    attributes  num_heads, num_kv_heads, scale, window (0: none), softcap (0: none);
                key_scale, value_scale (1.0 where they are missing): of FLOAT8E4M3FN caches

Query head h reads key/value head h // (num_heads // num_kv_heads). With softcap c, a score s becomes
c*tanh(s/c) before the mask. D and Dv may differ.

A FLOAT8E4M3FN cache holds codes: x / key_scale (of values: value_scale), divided in fp32, rounded to nearest
even and saturated at 448. A token attends to codes x scale, those of its own step included. Caches in the
model's dtype have no scales.

The ABI stays 1 where an attribute is added whose absence means what it meant before, and whose presence an
older plugin refuses, as it does every name that it does not know.
"""

from __future__ import annotations

DOMAIN = "llmc"
NAME = "PagedAttention"
ABI_VERSION = 1
E4M3_MAX = 448.0
BLOCK_SIZE = 32  # tokens a block; fixed, because OpenVINO's PagedAttention on CPU fixes it

# Graph inputs that describe a step -> their length, symbolically.
STEP_INPUTS = {
    "query_start": "S_plus_1",
    "past_lengths": "S",
    "block_indices": "n",
    "block_begins": "S_plus_1",
}
