"""The specification of `llmc.PagedAttention`: names, shapes, attributes and the ABI version.

A step holds T tokens of S sequences, packed end to end. The tokens of sequence s are
query_start[s] .. query_start[s+1]-1. The cache already holds past_lengths[s] tokens of it. Its cache blocks,
in the order of positions, are block_indices[block_begins[s] : block_begins[s+1]] (CSR). They cover the past
and the new tokens. The operator first writes the keys and values of the new tokens into the cache. Then a
token at position p attends to positions 0..p, or p-window+1..p if window > 0, or floor(p/chunk)*chunk..p if
chunk > 0.

    inputs      query        [T, num_heads*D]          model dtype
                key          [T, num_kv_heads*D]
                value        [T, num_kv_heads*Dv]
                key_cache    [blocks, num_kv_heads, 32, D]     model dtype, or that of a quantized cache
                value_cache  [blocks, num_kv_heads, 32, Dv]
                query_start [S+1], past_lengths [S], block_indices [n], block_begins [S+1]   int32
                sinks        [num_heads]              optional: model dtype
    outputs     output [T, num_heads*Dv]; key_cache_out, value_cache_out: the caches after the writes.
                An engine writes in place: output cache and input cache are the same memory.
    attributes  num_heads, num_kv_heads, scale, window (0: none), softcap (0: none);
                key_scale, value_scale (default 1.0), of quantized caches;
                value_width (default 0), of latent attention; chunk (default 0: none)

Query head h reads key/value head h // (num_heads // num_kv_heads). With softcap c, a score s becomes
c*tanh(s/c) before the mask. D and Dv may differ. A sink is a score of its head without a key and a value: the
weights of a token's keys are their shares of a softmax over their scores and the sink.

Latent attention (value_width > 0) has keys alone: the value of a token is the first value_width numbers of
its key, and Dv = value_width. The inputs value and value_cache and the output value_cache_out are left out.
This is multi-head latent attention (DeepSeek-V2, arXiv:2405.04434) in the absorbed form: one key head, whose
key is a latent vector and a rotated part (D = 576, Dv = 512 in DeepSeek-V3). Its caches are not quantized.

A quantized cache (QUANTIZED_CACHES) holds codes: x / key_scale (for values x / value_scale), divided in fp32,
rounded to nearest even and saturated at the largest code. A token attends to code x scale, also for tokens of
its own step. Caches in the model's dtype have no scales.

A new attribute or optional input keeps ABI 1 if a node without it means the same as before. An older plugin
refuses a node with it, as it refuses every attribute that it does not know.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

DOMAIN = "llmc"
NAME = "PagedAttention"
ABI_VERSION = 1
E4M3_MAX = 448.0
#: The place of the sinks among the inputs.
SINKS = 9
BLOCK_SIZE = 32  # tokens per block, fixed by OpenVINO's PagedAttention on the CPU


@dataclass(frozen=True)
class QuantizedCache:
    """A KV cache of codes, one byte each, with one scale for a layer's keys and one for its values."""

    #: The name in manifests, kernel variants and `request.TARGETS`.
    name: str
    #: The element type in ONNX.
    onnx: str
    #: The element type in TensorRT.
    tensorrt: str
    #: The largest code.
    largest: float


# Name -> cache. All code that depends on the element type of a cache uses this table, except the kernels.
QUANTIZED_CACHES: Mapping[str, QuantizedCache] = {
    cache.name: cache for cache in (QuantizedCache("fp8", "FLOAT8E4M3FN", "FP8", E4M3_MAX),)
}

# Graph inputs that describe a step -> their symbolic length.
STEP_INPUTS = {
    "query_start": "S_plus_1",
    "past_lengths": "S",
    "block_indices": "n",
    "block_begins": "S_plus_1",
}
