"""The size of the KV cache of a CPU engine. `tensorrt/sizes.py` has that of GPUs."""

from __future__ import annotations

from llmc.plugins.paged_attention.spec import QUANTIZED_CACHES
from llmc.runtime.backends.base import EngineFile, LoadOptions
from llmc.runtime.bundle.manifest import Geometry
from llmc.runtime.dtypes import BY_NAME
from llmc.runtime.errors import RequestError
from llmc.runtime.memory import available_memory

_DEFAULT_SHARE = 0.25  # of the memory that is available now
_DEFAULT_LIMIT = 4 << 30


def block_bytes(geometry: Geometry, kv_dtype: str) -> int:
    """Return the bytes of one KV block, keys and values of all layers.

    int8 is the native engine's cache, with an fp32 scale for each token and head of keys and of values. u8 is
    OpenVINO's, with an fp32 scale and zero point for each channel of a block of keys and for each token of a
    block of values.
    """
    size, layers = geometry.block_size, geometry.layers
    if kv_dtype == "int8":
        return size * sum(
            layer.num_kv_heads * (_round_up(layer.head_dim, 4) + 4 + _round_up(layer.v_head_dim, 16) + 4)
            for layer in layers
        )
    if kv_dtype == "u8":
        return sum(
            layer.num_kv_heads * ((size + 8) * layer.head_dim + size * (layer.v_head_dim + 8))
            for layer in layers
        )
    elements = sum(layer.num_kv_heads * (layer.head_dim + layer.v_head_dim) for layer in layers)
    element = 1 if kv_dtype in QUANTIZED_CACHES else BY_NAME[kv_dtype].bits // 8
    return elements * size * element


def cpu_blocks(engine: EngineFile, options: LoadOptions) -> int:
    """Return how many KV blocks to allocate: full contexts of all sequences, as far as the memory allows.

    Raises RequestError if not even one block fits.
    """
    if options.kv_blocks is not None:
        return options.kv_blocks
    if engine.bundle is None:
        raise ValueError("an engine without a bundle needs kv_blocks")
    manifest = engine.bundle.manifest
    geometry = manifest.geometry
    block = block_bytes(geometry, engine.kv_dtype)
    useful = options.max_sequences * -(-manifest.limits.max_seq_len // geometry.block_size)
    budget = options.kv_memory if options.kv_memory is not None else _default_memory()
    blocks = min(useful, budget // block)
    if blocks < 1:
        raise RequestError(
            f"{budget} bytes of KV cache hold no block of {geometry.block_size} tokens ({block} bytes)",
            f"give at least {block} bytes with --kv-memory",
            "kv_memory" if options.kv_memory is not None else "",
        )
    return blocks


def _round_up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple


def _default_memory() -> int:
    available = available_memory()
    return _DEFAULT_LIMIT if available is None else min(_DEFAULT_LIMIT, int(available * _DEFAULT_SHARE))
