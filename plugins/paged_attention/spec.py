"""The contract of `llmc.PagedAttention`: one place for names, shapes, attributes and the ABI version.

A step holds T tokens of S sequences, packed end to end. Sequence s owns the tokens
query_start[s] .. query_start[s+1] and already has past_lengths[s] tokens in the cache. Its cache blocks,
in order of position, are block_indices[block_begins[s] .. block_begins[s+1]] (CSR); they cover the past
and the new tokens. The operator first writes the keys and values of the new tokens to their places, then
attends: a token at position p sees positions 0..p, or p-window+1..p when window > 0.

    inputs      query        [T, num_heads*D]          model dtype
                key          [T, num_kv_heads*D]
                value        [T, num_kv_heads*Dv]
                key_cache    [blocks, num_kv_heads, 32, D]     model dtype, or a quantized cache's both
                value_cache  [blocks, num_kv_heads, 32, Dv]
                query_start [S+1], past_lengths [S], block_indices [n], block_begins [S+1]   int32
    outputs     output [T, num_heads*Dv]; key_cache_out, value_cache_out: the caches after the writes.
                An engine writes in place: output cache and input cache are the same memory.
    attributes  num_heads, num_kv_heads, scale, window (0: none), softcap (0: none);
                key_scale, value_scale (1.0 where they are missing): of quantized caches

Query head h reads key/value head h // (num_heads // num_kv_heads). With softcap c, a score s becomes
c*tanh(s/c) before the mask. D and Dv may differ.

A quantized cache (QUANTIZED_CACHES) holds codes: x / key_scale (of values: value_scale), divided in fp32,
rounded to nearest even and saturated at the largest code. A token attends to codes x scale, those of its own
step included. Caches in the model's dtype have no scales.

The ABI stays 1 where an attribute is added whose absence means what it meant before, and whose presence an
older plugin refuses, as it does every name that it does not know.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

DOMAIN = "llmc"
NAME = "PagedAttention"
ABI_VERSION = 1
E4M3_MAX = 448.0
BLOCK_SIZE = 32  # tokens a block; fixed, because OpenVINO's PagedAttention on CPU fixes it


@dataclass(frozen=True)
class QuantizedCache:
    """A KV cache of codes, one byte each, with one scale for a layer's keys and one for its values."""

    #: As manifests, kernel variants and `request.TARGETS` call it.
    name: str
    #: The element type in ONNX.
    onnx: str
    #: The element type in TensorRT.
    tensorrt: str
    #: The largest code.
    largest: float


# By name. Whatever depends on the element type of a cache asks this table, except the kernels.
QUANTIZED_CACHES: Mapping[str, QuantizedCache] = {
    cache.name: cache for cache in (QuantizedCache("fp8", "FLOAT8E4M3FN", "FP8", E4M3_MAX),)
}

# Graph inputs that describe a step -> their length, symbolically.
STEP_INPUTS = {
    "query_start": "S_plus_1",
    "past_lengths": "S",
    "block_indices": "n",
    "block_begins": "S_plus_1",
}
