"""QuantizeKVCache: each attention layer stores keys and values as codes, with a scale for each. For FP8:

    before  PagedAttention(q, k, v, key_cache bf16, value_cache bf16, ...)
    after   PagedAttention<key_scale, value_scale>(q, k, v, key_cache e4m3, value_cache e4m3, ...)

The operator rounds what enters the cache (`plugins/paged_attention/spec.py`); the rest of the graph stays.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import onnx_ir as ir

from llmc.passes.contract import Matches
from llmc.passes.geometry import attention_nodes, value_width
from llmc.passes.spec import Stage, module_of
from llmc.plugins.paged_attention.spec import QUANTIZED_CACHES, QuantizedCache
from llmc.runtime.errors import BuildError, UnsupportedError

_SMALLEST_NORMAL = 2.0**-126  # of fp32: below it a division would overflow
_CACHES = {3: 1, 4: 2}  # input of the operator -> the output that is the same memory
_SCALES = ("key_scale", "value_scale")
_BY_ELEMENT = {ir.DataType[cache.onnx]: cache for cache in QUANTIZED_CACHES.values()}


class QuantizeKVCache:
    """Quantize KV caches. Counts one match per layer. Scales are 1.0 until `fill_kv_scales` runs.

    Raises UnsupportedError for latent attention.
    """

    name = "quantize-kv-cache"
    requires = Stage.QUANTIZED  # a canonical graph also passes these checks
    ensures = Stage.QUANTIZED

    def __init__(self, cache: QuantizedCache) -> None:
        self._element = ir.DataType[cache.onnx]

    def __call__(self, model: ir.Model) -> Matches:
        nodes = [node for node in attention_nodes(model) if cache_of(node) is None]
        for node in nodes:
            if value_width(node):
                raise UnsupportedError(
                    f"{module_of(node)} is multi-head latent attention, whose KV cache llmc does not "
                    "quantize",
                    "leave --kv-dtype out",
                    "kv_dtype",
                )
            for name in _SCALES:
                node.attributes[name] = ir.AttrFloat32(name, 1.0)
            for index, output in _CACHES.items():
                for value in (node.inputs[index], node.outputs[output]):
                    assert value is not None
                    value.type = ir.TensorType(self._element)
        return Matches(len(nodes))


def fill_kv_scales(model: ir.Model, largest: Mapping[int, tuple[float, float]]) -> None:
    """Give the quantized caches of a graph, at any stage after QuantizeKVCache, their measured scales.

    largest: layer -> the largest magnitudes of its keys (after rotary embedding, as they enter the cache) and
    of its values. A scale is the magnitude divided by the largest code, as in ModelOpt's `k_scale` and
    `v_scale`. It is 1.0 for layers that `largest` lacks and for keys or values that are all 0.
    The scales are attributes, not initializers, because TensorRT's plugin takes them as fields.
    Raises BuildError for a layer that the model lacks and for a magnitude that is negative, infinite or NaN.
    """
    quantized = [(node, cache) for node in attention_nodes(model) if (cache := cache_of(node))]
    if unknown := sorted(largest.keys() - set(range(len(quantized)))):
        raise BuildError(
            f"KV scales for layer {unknown[0]} of a model with {len(quantized)} layers",
            "calibrate with this checkpoint",
        )
    for layer, (node, cache) in enumerate(quantized):
        for name, amax in zip(_SCALES, largest.get(layer, (0.0, 0.0)), strict=True):
            if not math.isfinite(amax) or amax < 0:
                raise BuildError(
                    f"the largest magnitude of {name.partition('_')[0]}s of {module_of(node)} is {amax}",
                    "calibrate with this checkpoint",
                )
            scale = max(amax / cache.largest, _SMALLEST_NORMAL) if amax else 1.0
            node.attributes[name] = ir.AttrFloat32(name, scale)


def cache_of(node: ir.Node) -> QuantizedCache | None:
    """Return the quantized cache of a PagedAttention node; None for caches in the model's dtype."""
    cache = node.inputs[3]
    return _BY_ELEMENT.get(cache.dtype) if cache is not None and cache.dtype is not None else None
